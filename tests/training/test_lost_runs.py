"""Runs that cannot be lost: killed at any moment, asked to stop, left by a process or by W&B; nothing is missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

import crosslens.training.trainer
from crosslens.activations.loader import Activations
from crosslens.crosscoders import load
from crosslens.rundir import RunDir
from crosslens.training.run import claim, train
from crosslens.training.trainer import CrosscoderTrainer
from tests.training.test_run import ALL, STEPS, B, Interrupted, T, breaking, config, same, wandb_records, weights

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "blocks.1.hook_resid_post"


def forked(body: Callable[[], Any]) -> Any:
    """A process that does what this one would, started at once."""
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def slowly(seconds: float) -> Callable[[CrosscoderTrainer, torch.Tensor], Any]:
    """A step that takes longer."""
    step = CrosscoderTrainer.step

    def slow(self: CrosscoderTrainer, batch: torch.Tensor) -> Any:
        time.sleep(seconds)
        return step(self, batch)

    return slow


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "architecture"), [("live", "batchtopk_crosscoder"), ("acts", "jumprelu_crosscoder")]
)
def test_killed_again_and_again(source: str, architecture: str, request: pytest.FixtureRequest, tmp_path: Path):
    """kill -9 after random times, until it is done: the weights are those of a run that nothing has happened to."""
    acts: Activations = request.getfixturevalue(source)
    settings = config(run_dir=tmp_path / "run", n_checkpoints=12)
    draw, kills, resumed = random.Random(0), 0, set()

    def body() -> None:
        # 8 steps at most before the longest draw ends: no two processes can do all of them
        CrosscoderTrainer.step = slowly(0.25)  # type: ignore[method-assign]
        train(acts, ALL[architecture](), settings)

    for _ in range(60):
        found = RunDir(tmp_path / "run").last_checkpoint()
        resumed.add(None if found is None else found.name)
        process = forked(body)
        process.join(draw.uniform(0.3, 2.0))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 2 and len(resumed) >= 2
    assert same(weights(load(tmp_path / "run" / "crosscoder")), weights(train(acts, ALL[architecture](), config())))


@pytest.mark.slow
@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "shutil.rmtree", "json.dumps"])
@pytest.mark.parametrize("moment", [1, 2, 4])
def test_killed_while_a_checkpoint_is_written(acts: Activations, tmp_path: Path, call: str, moment: int):
    """At some of the calls that write, rename and clear away, counted from the second checkpoint."""
    settings = config(run_dir=tmp_path / "run", n_checkpoints=5)
    module, name = (
        {"os": os, "shutil": crosslens.training.trainer.shutil, "json": crosslens.training.trainer.json}[
            call.split(".")[0]
        ],
        (call.split(".")[1]),
    )
    does, save, n_saved, n_called = getattr(module, name), CrosscoderTrainer._save, 0, 0

    def body() -> None:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal n_called
            n_called += n_saved >= 2
            if n_called >= moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return does(*arguments, **options)

        def saving(self: CrosscoderTrainer, folder: Path) -> None:
            nonlocal n_saved
            n_saved += 1
            setattr(module, name, counted)
            save(self, folder)
            setattr(module, name, does)

        CrosscoderTrainer._save = saving  # type: ignore[method-assign]
        train(acts, ALL["topk_crosscoder"](), settings)

    process = forked(body)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = RunDir(tmp_path / "run").last_checkpoint()
    assert found is not None and (found / "state.json").is_file()  # a whole one is always there
    resumed = train(breaking(acts, STEPS), ALL["topk_crosscoder"](), settings)
    assert same(weights(resumed), weights(train(acts, ALL["topk_crosscoder"](), config())))


# ---------------------------------------------------------------------- asked to stop


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "data", "save"])
def test_sigterm_writes_a_checkpoint_and_ends_well(acts: Activations, tmp_path: Path, moment: str):
    """In the middle of a step, while it waits for data that will not come, and while a checkpoint is being written."""
    settings = config(run_dir=tmp_path / "run", n_checkpoints=0 if moment != "save" else 3)
    at = tmp_path / "at"

    def arrived() -> None:
        at.touch()
        time.sleep(1.0)

    def body() -> None:
        step, save = CrosscoderTrainer._step, CrosscoderTrainer._save
        source = acts

        def stepping(self: CrosscoderTrainer, batch: torch.Tensor) -> Any:
            if self.n_training_steps == 10:
                arrived()
            return step(self, batch)

        def saving(self: CrosscoderTrainer, folder: Path) -> None:
            if not at.exists():
                arrived()
            save(self, folder)

        if moment == "step":
            CrosscoderTrainer._step = stepping  # type: ignore[method-assign]
        elif moment == "save":
            CrosscoderTrainer._save = saving  # type: ignore[method-assign]
        else:
            source = breaking(acts, 10, error=_Never)
        train(source, ALL["batchtopk_crosscoder"](), settings)

    class _Never(Exception):
        def __init__(self) -> None:
            at.touch()
            time.sleep(600)

    process = forked(body)
    while not at.exists():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0 and time.monotonic() - began < 10
    assert not (tmp_path / "run" / "crosscoder").exists()
    found = RunDir(tmp_path / "run").last_checkpoint()
    assert found is not None
    done = int(found.name.removeprefix("tokens-")) // B
    assert done == {"step": 11, "data": 10}.get(moment, done) and done > 0
    resumed = train(breaking(acts, STEPS - done), ALL["batchtopk_crosscoder"](), settings)
    assert same(weights(resumed), weights(train(acts, ALL["batchtopk_crosscoder"](), config())))


def test_sigterm_before_the_first_step_loses_nothing(acts: Activations, tmp_path: Path):
    at = tmp_path / "at"

    class _Never(Exception):
        def __init__(self) -> None:
            at.touch()
            time.sleep(600)

    process = forked(
        lambda: train(breaking(acts, 0, error=_Never), ALL["topk_crosscoder"](), config(run_dir=tmp_path / "run"))
    )
    while not at.exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0 and RunDir(tmp_path / "run").last_checkpoint() is None


def test_a_checkpoint_of_the_same_step_is_not_written_again(acts: Activations, tmp_path: Path):
    """To replace a whole one by itself would mean a moment without any."""
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(breaking(acts, 9), ALL["topk_crosscoder"](), config(run_dir=run))
    found = RunDir(run).last_checkpoint()
    assert found is not None
    before = {path.name: path.stat().st_ino for path in found.iterdir()}
    at = tmp_path / "at"

    class _Never(Exception):
        def __init__(self) -> None:
            at.touch()
            time.sleep(600)

    process = forked(lambda: train(breaking(acts, 0, error=_Never), ALL["topk_crosscoder"](), config(run_dir=run)))
    while not at.exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0 and RunDir(run).last_checkpoint() == found
    assert {path.name: path.stat().st_ino for path in found.iterdir()} == before


def test_a_handler_of_the_user_comes_back(acts: Activations, tmp_path: Path):
    def mine(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        train(acts, ALL["topk_crosscoder"](), config(run_dir=tmp_path / "run"))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------- several processes, started by torchrun


def torchrun(acts: Activations, run: Path, tmp_path: Path) -> Any:
    """The command of a user, with two processes."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(acts.dataset.source))  # type: ignore[arg-type]
    command = [
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crosslens", "train"),
        *(
            "--snapshots",
            Path(acts.snapshots[0].name).parent,
            "--hook",
            HOOK,
            "--dataset",
            text,
            "--cache",
            tmp_path / "cache",
        ),
        *("--n-tokens", 3000, "--context-size", T, "--d-sae", 40, "--k", 4, "--batch-size", B, "--run-dir", run),
        *("--training-tokens", 400 * B, "--n-checkpoints", 100, "--architecture", "topk", "--cache-dtype", "float32"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(crosslens.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def until_checkpoint(process: Any, run: Path) -> float:
    """Wait for the first checkpoint; the time then."""
    deadline = time.monotonic() + 240
    while RunDir(run).last_checkpoint() is None:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
    return time.monotonic()


def workers(process: Any) -> list[int]:
    """Process ids of what torchrun has started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == process.pid:
                rank = re.search(rb"\0RANK=(\d+)\0", (folder / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(folder.name)
        except (OSError, IndexError):
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_torchrun_one_rank_dies_and_the_next_call_goes_on(acts: Activations, tmp_path: Path):
    run = tmp_path / "run"
    first = torchrun(acts, run, tmp_path)
    began = until_checkpoint(first, run)
    os.kill(workers(first)[1], signal.SIGKILL)
    _, errors = first.communicate(timeout=120)
    assert time.monotonic() - began < 60 and first.returncode != 0
    assert re.search(r"rank\s*:\s*1 \(local_rank: 1\)", errors) and "SIGKILL" in errors
    assert RunDir(run).last_checkpoint() is not None and not (run / "crosscoder").exists()
    second = torchrun(acts, run, tmp_path)
    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert said.count("saved in") == 1 and said.count("400 steps of 64 activations") == 1
    assert "in each of 2 processes" in said and not (run / "checkpoints").exists()
    assert RunDir(run).read_json()["processes"] == 2 and RunDir(run).table("evaluation") is not None
    assert load(run / "crosscoder").cfg.d_sae == 40


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("told", ["a worker", "torchrun"])
def test_sigterm_to_one_of_several_stops_all_with_a_checkpoint(acts: Activations, tmp_path: Path, told: str):
    run = tmp_path / "run"
    process = torchrun(acts, run, tmp_path)
    began = until_checkpoint(process, run)
    os.kill(workers(process)[1] if told == "a worker" else process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - began < 30, errors
    assert process.returncode == (0 if told == "a worker" else 1)  # torchrun calls its own end a failure
    assert errors.count("stopped by SIGTERM") == 1
    found = RunDir(run).last_checkpoint()
    assert found is not None and f"after {int(found.name.removeprefix('tokens-')):,} activations" in errors
    assert json.loads((found / "state.json").read_text())["n_training_samples"] < 400 * B


# ---------------------------------------------------------------------- W&B


@pytest.fixture
def offline_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it reads the environment once
    yield tmp_path
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["nobody listens", "nobody answers", "no key", "nobody listens to the rest"])
def test_wandb_out_of_reach_stops_nothing(
    acts: Activations, offline_folder: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
):
    """A closed port, a server that accepts and says nothing, and a user who never logged in."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if trouble == "nobody answers":
            server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        if trouble == "no key":
            monkeypatch.delenv("WANDB_API_KEY")
            monkeypatch.setenv("HOME", str(offline_folder))
            monkeypatch.setenv("NETRC", str(offline_folder / "none"))
        settings = config(run_dir=offline_folder / "run", wandb_project="evolution", wandb_log_frequency=5)
        if "rest" in trouble:  # the run has begun online, and is continued
            claim(acts, ALL["topk_crosscoder"](), settings)
            RunDir(offline_folder / "run").update(wandb_id="abcd1234")
        began = time.monotonic()
        with pytest.warns(UserWarning, match="this run is logged offline"):
            cc = train(acts, ALL["topk_crosscoder"](), settings)
        assert time.monotonic() - began < 60
    assert same(weights(cc), weights(train(acts, ALL["topk_crosscoder"](), config())))
    wandb.teardown()
    (log,) = (offline_folder / "run").rglob("offline-run-*/run-*.wandb")
    assert [row["_step"] for row in history(log) if "losses/overall_loss" in row] == [4, 9, 14, 19]


def history(log: Path) -> list[dict[str, Any]]:
    """Rows that were logged."""
    rows = [record.history.item for record in wandb_records(log) if record.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items} for items in rows]


@pytest.mark.slow
def test_a_resumed_run_is_the_same_wandb_run(acts: Activations, offline_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = config(run_dir=offline_folder / "run", wandb_project="evolution", wandb_log_frequency=1, n_checkpoints=5)
    with pytest.raises(Interrupted):
        train(breaking(acts, 14), ALL["topk_crosscoder"](), settings)
    found = RunDir(offline_folder / "run").last_checkpoint()
    assert found is not None
    done = int(found.name.removeprefix("tokens-")) // B
    train(acts, ALL["topk_crosscoder"](), settings)
    wandb.teardown()  # its service has written everything when it ends
    logs = sorted((offline_folder / "run").rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(logs) == 2 and len({log.name for log in logs}) == 1  # two parts of one run
    steps = [[row["_step"] for row in history(log) if "losses/overall_loss" in row] for log in logs]
    assert steps[0] == list(range(14)) and steps[1] == list(range(done, STEPS))
    losses = [
        {row["_step"]: row["losses/overall_loss"] for row in history(log) if "losses/overall_loss" in row}
        for log in logs
    ]
    for step in range(done, 14):  # logged twice, and the same
        assert losses[0][step] == losses[1][step]


def test_training_in_a_thread_needs_no_signals(acts: Activations, tmp_path: Path):
    """Notebooks and servers may train outside the main thread, where no handler can be set."""
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(train(acts, ALL["topk_crosscoder"](), config(run_dir=tmp_path / "run")))
    )
    thread.start()
    thread.join(60)
    assert len(done) == 1
