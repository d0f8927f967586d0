"""Harvesting that is killed, shared or out of disk space ends with the same bytes as an undisturbed harvest.

Processes are forked from one that has run no model yet: this file as a program.
"""

from __future__ import annotations

import os
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

from crosslens.activations import cache, files
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots

HOOK, T = "blocks.1.hook_resid_post", 16
N_SHARDS = 6  # five for training, one held out
N_PAIRS = 3 * N_SHARDS


def make(folder: Path) -> Activations:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 16, (100, T), generator=draw)
    return Activations(Snapshots.local(folder), HOOK, Dataset(tokens, 1300, held_out_tokens=200))


@pytest.mark.exhaustive
def test_killed_shared_and_out_of_disk(tiny_snapshots: Path, tmp_path: Path) -> None:
    """The checks below, in one process; a limit on file sizes replaces a small disk where none can be mounted."""
    disk, mount = tmp_path / "disk", shutil.which("mount")
    disk.mkdir()
    command = [mount or "", "-t", "tmpfs", "-o", "size=600k", "t", disk]
    mounted = mount is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        done = subprocess.run(
            [sys.executable, __file__, tiny_snapshots, tmp_path, *([disk] if mounted else [])],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"},
            timeout=600,
        )
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
    expected = ["kill", "share", "full" if mounted else "limit"]
    assert done.stdout.split() == expected, done.stdout + done.stderr


def test_a_disk_that_is_too_small_is_reported_before_anything_runs(
    tiny_snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda _: 100_000)
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
        patch.setattr(cache, "FILE_BYTES", 10 * T * 32)
        place = activations_of.tokens.shape[0] // 2
        activations_of.tokens[place, 7] = 5  # the only one with the broken row; attention spreads it over the sequence
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


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < deadline, "nothing happened for five minutes"
        time.sleep(0.002)


def reference(acts: Activations, root: Path) -> dict[str, bytes]:
    assert died_of(fork(lambda: acts.cache(root / "reference"))) == 0
    found = contents(root / "reference")
    assert len(found) == 1 + N_SHARDS + N_PAIRS and not any(name.endswith((".tmp", ".lock")) for name in found)
    return found


def check_kill(acts: Activations, whole: dict[str, bytes], root: Path) -> None:
    target = root / "cache"

    def torn(path: Path, *_: Any) -> None:
        """A process that dies in the middle of a file."""
        path.with_suffix(".tmp").write_bytes(bytes(5000))
        os.kill(os.getpid(), signal.SIGKILL)

    moments: list[Callable[[], None]] = [
        lambda: killing(os, "replace", 1),  # between the manifest's temporary file and the manifest
        lambda: killing(os, "replace", 1, after=True),
        lambda: killing(os, "replace", 3),  # while the tokens are written
        lambda: setattr(files, "write_file", torn),  # in one of the tokens
        lambda: killing(os, "replace", N_SHARDS - 2, after=True),
        lambda: setattr(files, "write_file", torn),  # in one of the activations
        lambda: killing(os, "replace", 4, after=True),
        lambda: killing(cache, "write_shard", 5),
    ]
    for moment in moments:

        def work(moment: Callable[[], None] = moment) -> None:
            moment()
            acts.cache(target)

        assert died_of(fork(work)) == -signal.SIGKILL
    # killed from outside, each time after some more files
    for wanted in (9, 12):
        pid = fork(lambda: acts.cache(target))
        wait_for(lambda wanted=wanted: len(list(target.glob("acts-*.safetensors"))) >= wanted)
        os.kill(pid, signal.SIGKILL)
        died_of(pid)
    before = {path.name: path.stat().st_mtime_ns for path in target.glob("acts-*.safetensors")}
    assert len(before) >= 12
    assert died_of(fork(lambda: acts.cache(target))) == 0
    equal(target, whole)
    assert all((target / name).stat().st_mtime_ns == when for name, when in before.items())


def check_share(acts: Activations, whole: dict[str, bytes], root: Path) -> None:
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

    # two ranks, or two commands by hand: every pair is harvested once, by whichever process comes first
    for name, world in (("ranks", 2), ("hand", 1)):
        (root / name).mkdir()
        log = root / name / "log"
        pids = [fork(partial(rank, i if world > 1 else 0, world, log, 0.02)) for i in range(2)]
        assert [died_of(pid) for pid in pids] == [0, 0]
        done = log.read_text().split()
        assert len(done) == len(set(done)) == N_PAIRS, name
        equal(root / name / "cache", whole)
    # ranks begin at different pairs, so each loads another snapshot
    (root / "second").mkdir()
    assert died_of(fork(lambda: rank(1, 3, root / "second" / "log"))) == 0
    assert (root / "second" / "log").read_text().split()[0] == "acts-00000-s01.safetensors"
    equal(root / "second" / "cache", whole)
    # a process that dies leaves its pair to the one that waits for it
    (root / "dies").mkdir()
    first = fork(lambda: rank(0, 1, root / "dies" / "log1", slow=600))
    wait_for((root / "dies" / "log1").exists)
    second = fork(lambda: rank(0, 1, root / "dies" / "log2"))
    # it was writing one pair, and has harvested the next
    wait_for(lambda: len(list((root / "dies" / "cache").glob("acts-*.safetensors"))) == N_PAIRS - 2)
    os.kill(first, signal.SIGKILL)
    assert (died_of(first), died_of(second)) == (-signal.SIGKILL, 0)
    equal(root / "dies" / "cache", whole)


def check_limit(acts: Activations, whole: dict[str, bytes], root: Path) -> None:
    """From the 12th file on, files may have at most 6,000 bytes; the files before are kept."""
    target = root / "cache"

    def limited() -> None:
        write = cache.write_shard
        made = [0]

        def later(*args: Any) -> Any:
            made[0] += 1
            if made[0] == 12:
                resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
            return write(*args)

        cache.write_shard = later
        try:
            acts.cache(target)
        except UserError as error:
            assert "the disk is full: " in str(error) and "is kept: free some space" in str(error), error
            assert "\n" not in str(error)
            return
        raise AssertionError("the limit was not reported")

    assert died_of(fork(limited)) == 0
    assert len(list(target.glob("acts-*.safetensors"))) == 11 and not list(target.glob("*.tmp"))
    assert died_of(fork(lambda: acts.cache(target))) == 0
    equal(target, whole)


def check_full(acts: Activations, whole: dict[str, bytes], disk: Path) -> None:
    """Another program fills the disk while the cache is written."""
    target, ballast = disk / "cache", disk / "ballast"

    def crowded() -> None:
        write = cache.write_shard

        def later(path: Path, *args: Any) -> Any:
            if path.name == "acts-00003-s01.safetensors":
                free = shutil.disk_usage(target).free
                ballast.write_bytes(bytes(free - 4096))
            return write(path, *args)

        cache.write_shard = later
        try:
            acts.cache(target)
        except UserError as error:
            assert "the disk is full: " in str(error) and "No space left on device" in str(error), error
            return
        raise AssertionError("the full disk was not reported")

    assert died_of(fork(crowded)) == 0
    assert len(list(target.glob("acts-*.safetensors"))) == N_SHARDS + 3 and not list(target.glob("*.tmp"))

    def still_full() -> None:
        try:
            acts.cache(target)
        except UserError as error:
            assert "MiB more and the disk has 0.0 MiB free" in str(error), error
            return
        raise AssertionError("the disk is still full")

    assert died_of(fork(still_full)) == 0
    ballast.unlink()
    assert died_of(fork(lambda: acts.cache(target))) == 0
    equal(target, whole)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cache.FILE_BYTES = 20 * T * 32
    root = Path(sys.argv[2])
    acts = make(Path(sys.argv[1]))
    whole = reference(acts, root)
    places = {"kill": root / "kill", "share": root / "share"}
    places |= {"full": Path(sys.argv[3])} if len(sys.argv) > 3 else {"limit": root / "limit"}
    checks = {"kill": check_kill, "share": check_share, "full": check_full, "limit": check_limit}
    for name, place in places.items():
        place.mkdir(exist_ok=True)
        checks[name](acts, whole, place)
        sys.stdout.write(f"{name}\n")
