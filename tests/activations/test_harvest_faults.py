"""Harvesting that is killed, shared, or out of disk ends with the same bytes as harvesting in peace.

Processes are forked from one that has run no model yet: this file as a program.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosslens.activations import cache
from crosslens.activations import cache as shards
from crosslens.activations import loader as activations
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots

HOOK, T = "blocks.1.hook_resid_post", 16
N_PAIRS = 3 * 9


def make(folder: Path) -> Activations:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 16, (9 * 20, T), generator=draw)
    return Activations(Snapshots.local(folder), HOOK, Dataset(tokens, 2500, held_out_tokens=300))


def in_process(mode: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, __file__, mode, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "fine", done.stdout


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_is_byte_identical(tiny_snapshots: Path, tmp_path: Path) -> None:
    in_process("kill", tiny_snapshots, tmp_path)


@pytest.mark.slow
def test_several_processes_share_the_work(tiny_snapshots: Path, tmp_path: Path) -> None:
    in_process("share", tiny_snapshots, tmp_path)


@pytest.mark.slow
def test_a_file_that_cannot_be_written_leaves_a_resumable_cache(tiny_snapshots: Path, tmp_path: Path) -> None:
    in_process("limit", tiny_snapshots, tmp_path)


@pytest.mark.slow
def test_a_full_disk_leaves_a_resumable_cache(tiny_snapshots: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=400k", "t", disk], check=False).returncode:
        pytest.skip("a small file system needs the right to mount one; the limit on files is tested without")
    try:
        in_process("full", tiny_snapshots, tmp_path)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_too_small_is_told_before_anything_is_run(
    tiny_snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "free_bytes", lambda _: 100_000)
    with pytest.raises(UserError, match=r"cache needs 0.\d MiB more and the disk has 0.1 MiB free: free so"):
        make(tiny_snapshots).cache(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_non_finite_activations_are_named_by_snapshot_hook_and_shard(tiny_snapshots: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_snapshots, tmp_path / "broken"))
    tensors = load_file(folder / "step10" / "model.safetensors")
    tensors["gpt_neox.embed_in.weight"][5, 3] = float("inf")
    save_file(tensors, folder / "step10" / "model.safetensors", metadata={"format": "pt"})
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, 16, (60, T), generator=draw)
    activations_of = Activations(Snapshots.local(folder), HOOK, Dataset(tokens, 600, held_out_tokens=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "BLOCK_TOKENS", 10 * T)
        place = activations_of.tokens.shape[0] // 2
        activations_of.tokens[place, 7] = 5  # no other meets the spoilt row; attention spreads it over the sequence
        expected = f"snapshot step10 has non-finite activations at {HOOK}, shard {place // 10} .*sequence {place} at "
        with pytest.raises(UserError, match=expected) as caught:
            activations_of.cache(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    written = {path.name for path in (tmp_path / "cache").glob("acts-*")}
    assert f"acts-{place // 10:05d}-s01.safetensors" not in written and "acts-00000-s00.safetensors" in written


# ---------------------------------------------------------------------- the program
def equal(folder: Path, whole: dict[str, bytes]) -> None:
    found = contents(folder)
    assert sorted(found) == sorted(whole), set(found) ^ set(whole)
    assert [name for name in whole if found[name] != whole[name]] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fork(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (progress bars)
        try:
            work()
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return pid


def died_of(pid: int) -> int:
    """0 for a good end, else the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killing(module: Any, name: str, at: int, after: bool = False) -> None:
    """From now on this process is killed at the at-th call of a function, before or after it."""
    original, calls = getattr(module, name), [0]

    def watched(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, watched)


def reference(acts: Activations, root: Path) -> dict[str, bytes]:
    assert died_of(fork(lambda: acts.cache(root / "reference"))) == 0
    found = contents(root / "reference")
    assert len(found) == 1 + 9 + N_PAIRS and not any(name.endswith((".tmp", ".lock")) for name in found)
    return found


def check_kill(folder: Path, root: Path) -> None:
    acts = make(folder)
    whole, target = reference(acts, root), root / "cache"

    def torn(*args: Any) -> None:
        """A process that dies in the middle of a file."""
        data = shards_save(*args)
        Path(target / "acts-00000-s00.torn.tmp").write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    shards_save = shards.save
    moments: list[Callable[[], None]] = [
        lambda: killing(os, "replace", 3),  # while the tokens are written: there is no manifest yet
        lambda: killing(os, "replace", 10),  # between the manifest's temporary file and the manifest
        lambda: killing(os, "replace", 10, after=True),
        lambda: setattr(shards, "save", torn),
        lambda: killing(os, "replace", 2),
        lambda: killing(os, "replace", 4, after=True),
        lambda: killing(activations, "fill", 1),
        lambda: killing(cache, "write_shard", 5),
    ]
    for moment in moments:

        def work(moment: Callable[[], None] = moment) -> None:
            moment()
            acts.cache(target)

        assert died_of(fork(work)) == -signal.SIGKILL
    draw = random.Random(0)
    for _ in range(6):
        pid = fork(lambda: acts.cache(target))
        time.sleep(draw.uniform(0.05, 1.5))
        os.kill(pid, signal.SIGKILL)
        died_of(pid)
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("acts-*.safetensors")}
    assert len(before) >= 8
    assert died_of(fork(lambda: acts.cache(target))) == 0
    equal(target, whole)
    assert all((target / name).stat().st_mtime_ns == when for name, when in before.items())


def check_share(folder: Path, root: Path) -> None:
    acts = make(folder)
    whole = reference(acts, root)

    def noting(log: Path, slow: float = 0.0) -> None:
        write = cache.write_shard

        def noted(path: Path, *args: Any) -> Any:
            with log.open("a") as file:
                file.write(f"{path.name}\n")
            time.sleep(slow)
            return write(path, *args)

        cache.write_shard = noted

    def rank(i: int, n: int, log: Path, slow: float = 0.0) -> None:
        os.environ.update(RANK=str(i), WORLD_SIZE=str(n))
        noting(log, slow)
        acts.cache(log.parent / "cache")

    # three ranks, or three commands by hand: every pair once, whoever was there first
    for name, world in (("ranks", 3), ("hand", 1)):
        (root / name).mkdir()
        log = root / name / "log"
        pids = [fork(partial(rank, i if world > 1 else 0, world, log, 0.02)) for i in range(3)]
        assert [died_of(pid) for pid in pids] == [0, 0, 0]
        done = log.read_text().split()
        assert len(done) == len(set(done)) == N_PAIRS, name
        equal(root / name / "cache", whole)
    # a rank begins at a part of its own, so that each loads another snapshot
    (root / "second").mkdir()
    assert died_of(fork(lambda: rank(1, 3, root / "second" / "log"))) == 0
    assert (root / "second" / "log").read_text().split()[0] == "acts-00000-s01.safetensors"
    equal(root / "second" / "cache", whole)
    # one that dies over a pair leaves it to the one that waits for it
    (root / "dies").mkdir()
    first = fork(lambda: rank(0, 1, root / "dies" / "log1", slow=30))
    while not (root / "dies" / "log1").exists():
        time.sleep(0.02)
    second = fork(lambda: rank(0, 1, root / "dies" / "log2"))
    while len(list((root / "dies" / "cache").glob("acts-*.safetensors"))) < N_PAIRS - 1:
        time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    assert (died_of(first), died_of(second)) == (-signal.SIGKILL, 0)
    equal(root / "dies" / "cache", whole)
    # where the system has no locks, two write the same shards, and the cache is the same

    def without_locks() -> None:
        cache.fcntl = None
        acts.cache(root / "no locks")

    pids = [fork(without_locks) for _ in range(2)]
    assert [died_of(pid) for pid in pids] == [0, 0]
    (root / "no locks" / "harvest.lock").unlink()
    equal(root / "no locks", whole)


def check_limit(folder: Path, root: Path) -> None:
    """No file may be as large as the last shard of float32: the others are written, and stay."""
    acts = make(folder)
    target = root / "cache"

    def limited() -> None:
        write = cache.write_shard
        made = [0]

        def later(*args: Any) -> Any:
            made[0] += 1
            if made[0] == 12:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
            return write(*args)

        cache.write_shard = later
        try:
            acts.cache(target)
        except UserError as error:
            assert "the disk is full: " in str(error) and "is kept: free some space" in str(error), error
            assert "\n" not in str(error)
            return
        raise AssertionError("the limit was not noticed")

    assert died_of(fork(limited)) == 0
    assert len(list(target.glob("acts-*.safetensors"))) == 11 and not list(target.glob("*.tmp"))
    whole = reference(acts, root)
    assert died_of(fork(lambda: acts.cache(target))) == 0
    equal(target, whole)


def check_full(folder: Path, root: Path) -> None:
    """Somebody else fills the disk while the cache is written."""
    acts = make(folder)
    whole, target, ballast = reference(acts, root), root / "disk" / "cache", root / "disk" / "ballast"

    def crowded() -> None:
        write = cache.write_shard

        def later(path: Path, *args: Any) -> Any:
            if path.name == "acts-00004-s01.safetensors":
                free = shutil.disk_usage(target).free
                ballast.write_bytes(bytes(free - 4096))
            return write(path, *args)

        cache.write_shard = later
        try:
            acts.cache(target)
        except UserError as error:
            assert "the disk is full: " in str(error) and "No space left on device" in str(error), error
            return
        raise AssertionError("the full disk was not noticed")

    assert died_of(fork(crowded)) == 0
    assert len(list(target.glob("acts-*.safetensors"))) == 9 + 4 and not list(target.glob("*.tmp"))

    def still_full() -> None:
        try:
            acts.cache(target)
        except UserError as error:
            assert "MiB more and the disk has 0.0 MiB free" in str(error), error
            return
        raise AssertionError("it is full still")

    assert died_of(fork(still_full)) == 0
    ballast.unlink()
    assert died_of(fork(lambda: acts.cache(target))) == 0
    equal(target, whole)


if __name__ == "__main__":
    torch.set_num_threads(1)
    activations.BLOCK_TOKENS = 20 * T
    checks = {"kill": check_kill, "share": check_share, "limit": check_limit, "full": check_full}
    checks[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.write("fine\n")
