"""No run is lost: killed at any moment, asked to stop, or without W&B, a training ends with the same weights."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
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

import crosslens
import crosslens.training.checkpoints
from crosslens.activations.loader import Activations
from crosslens.crosscoders import load
from crosslens.rundir import RunDir
from crosslens.training.run import claim, train
from crosslens.training.trainer import CrosscoderTrainer
from tests.training.test_run import (
    ALL,
    STEPS,
    B,
    Interrupted,
    T,
    breaking,
    config,
    reference,
    same,
    wandb_records,
    weights,
)

__all__ = ["reference"]  # a fixture
EXHAUSTIVE = pytest.mark.exhaustive
Reference = Callable[[str], dict[str, torch.Tensor]]
pytestmark = pytest.mark.usefixtures("one_thread")
HOOK = "blocks.1.hook_resid_post"


def forked(body: Callable[[], Any]) -> Any:
    """A process that runs `body`, forked from this one."""
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def wait_for(file: Path, process: Any) -> bool:
    """Wait until the process has created the file, or has ended; whether the file is there."""
    while not file.exists() and process.is_alive():
        time.sleep(0.005)
    return file.exists()


def waiting(at: Path) -> type[BaseException]:
    """An error for `breaking` that is never raised: the stream creates `at` and then waits forever."""

    class Waits(Exception):
        def __init__(self) -> None:
            at.touch()
            while True:
                time.sleep(1)

    return Waits


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "architecture"),
    [("live", "batchtopk_crosscoder"), pytest.param("acts", "jumprelu_crosscoder", marks=EXHAUSTIVE)],
)
def test_killed_again_and_again(
    source: str, architecture: str, reference: Reference, request: pytest.FixtureRequest, tmp_path: Path
):
    """kill -9 after a random number of steps, until the training ends: the weights are those of a run in one piece.

    A process announces the step after which it is to be killed, goes on for two more, and then waits to be killed.
    """
    acts: Activations = request.getfixturevalue(source)
    settings = config(run_dir=tmp_path / "run", n_checkpoints=12)
    draw, step = random.Random(0), CrosscoderTrainer.step

    def body(steps: int, at: Path) -> None:
        n_made = 0

        def stepping(self: CrosscoderTrainer, batch: torch.Tensor) -> Any:
            nonlocal n_made
            n_made += 1
            if n_made == steps:
                at.touch()
            while n_made > steps + 2:
                time.sleep(1)
            return step(self, batch)

        CrosscoderTrainer.step = stepping  # type: ignore[method-assign]
        train(acts, ALL[architecture](), settings)

    resumed_from: list[str] = []
    for i in itertools.count():
        found = RunDir(tmp_path / "run").last_checkpoint()
        resumed_from += [] if found is None else [found.name]
        # a checkpoint is written every second step, so that each process gets further than the one before
        process = forked(functools.partial(body, draw.randint(4, 9), tmp_path / f"at-{i}"))
        if not wait_for(tmp_path / f"at-{i}", process):
            break
        process.kill()
        process.join()
    process.join()
    assert process.exitcode == 0 and len(resumed_from) >= 2 and len(set(resumed_from)) == len(resumed_from)
    assert same(weights(load(tmp_path / "run" / "crosscoder", "cpu")), reference(architecture))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "moment"),
    [
        *((call, 1) for call in ("os.fsync", "os.replace", "shutil.rmtree", "json.dumps")),
        *(pytest.param(c, m, marks=EXHAUSTIVE) for c in ("os.fsync", "os.replace", "shutil.rmtree") for m in (2, 4)),
    ],
)
def test_killed_while_a_checkpoint_is_written(
    acts: Activations, reference: Reference, tmp_path: Path, call: str, moment: int
):
    """At calls that write, rename and delete, counted from the second checkpoint."""
    settings = config(run_dir=tmp_path / "run", n_checkpoints=5)
    owner, name = call.split(".")
    module = {"os": os, "shutil": shutil, "json": json}[owner]
    original, save, n_saved, n_called = getattr(module, name), CrosscoderTrainer._save, 0, 0

    def body() -> None:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal n_called
            n_called += n_saved >= 2
            if n_called >= moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        def saving(self: CrosscoderTrainer, folder: Path) -> None:
            nonlocal n_saved
            n_saved += 1
            setattr(module, name, counted)
            save(self, folder)
            setattr(module, name, original)

        CrosscoderTrainer._save = saving  # type: ignore[method-assign]
        train(acts, ALL["topk_crosscoder"](), settings)

    process = forked(body)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = RunDir(tmp_path / "run").last_checkpoint()
    assert found is not None and (found / "state.json").is_file()  # a complete one is always there
    resumed = train(breaking(acts, STEPS), ALL["topk_crosscoder"](), settings)
    assert same(weights(resumed), reference("topk_crosscoder"))


# ---------------------------------------------------------------------- asked to stop


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "data", "save"])
def test_sigterm_writes_a_checkpoint_and_exits_with_0(
    acts: Activations, reference: Reference, tmp_path: Path, moment: str
):
    """During a step, while waiting for data that never comes, and while writing a checkpoint."""
    settings = config(run_dir=tmp_path / "run", n_checkpoints=0 if moment != "save" else 3)
    at = tmp_path / "at"

    def until_asked_to_stop(trainer: CrosscoderTrainer) -> None:
        at.touch()
        while not trainer.stop:
            time.sleep(0.005)

    def body() -> None:
        step, save = CrosscoderTrainer._step, CrosscoderTrainer._save

        def stepping(self: CrosscoderTrainer, batch: torch.Tensor) -> Any:
            if self.n_training_steps == 10:
                until_asked_to_stop(self)
            return step(self, batch)

        def saving(self: CrosscoderTrainer, folder: Path) -> None:
            if not at.exists():
                until_asked_to_stop(self)
            save(self, folder)

        if moment == "step":
            CrosscoderTrainer._step = stepping  # type: ignore[method-assign]
        elif moment == "save":
            CrosscoderTrainer._save = saving  # type: ignore[method-assign]
        source = breaking(acts, 10, error=waiting(at)) if moment == "data" else acts
        train(source, ALL["batchtopk_crosscoder"](), settings)

    process = forked(body)
    assert wait_for(at, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    assert not (tmp_path / "run" / "crosscoder").exists()
    found = RunDir(tmp_path / "run").last_checkpoint()
    assert found is not None
    done = int(found.name.removeprefix("tokens-")) // B
    assert done == {"step": 11, "data": 10}.get(moment, done) and done > 0
    resumed = train(breaking(acts, STEPS - done), ALL["batchtopk_crosscoder"](), settings)
    assert same(weights(resumed), reference("batchtopk_crosscoder"))


def test_sigterm_before_the_first_step_writes_no_checkpoint(acts: Activations, tmp_path: Path):
    at, settings = tmp_path / "at", config(run_dir=tmp_path / "run")
    process = forked(lambda: train(breaking(acts, 0, error=waiting(at)), ALL["topk_crosscoder"](), settings))
    assert wait_for(at, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0 and RunDir(tmp_path / "run").last_checkpoint() is None


def test_a_checkpoint_of_the_same_step_is_not_written_again(acts: Activations, tmp_path: Path):
    """Replacing it by itself would leave a moment without any checkpoint."""
    run, at = tmp_path / "run", tmp_path / "at"
    with pytest.raises(Interrupted):
        train(breaking(acts, 9), ALL["topk_crosscoder"](), config(run_dir=run))
    found = RunDir(run).last_checkpoint()
    assert found is not None
    before = {path.name: path.stat().st_ino for path in found.iterdir()}
    stream = breaking(acts, 0, error=waiting(at))
    process = forked(lambda: train(stream, ALL["topk_crosscoder"](), config(run_dir=run)))
    assert wait_for(at, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0 and RunDir(run).last_checkpoint() == found
    assert {path.name: path.stat().st_ino for path in found.iterdir()} == before


def test_the_users_signal_handler_is_restored(acts: Activations, tmp_path: Path):
    def mine(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        train(acts, ALL["topk_crosscoder"](), config(run_dir=tmp_path / "run"))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------- several processes, started by torchrun


def torchrun(acts: Activations, run: Path, tmp_path: Path) -> Any:
    """The command that a user would type, with two processes."""
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


def until_checkpoint(process: Any, run: Path) -> None:
    """Wait for the first checkpoint."""
    while RunDir(run).last_checkpoint() is None:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def workers(process: Any) -> list[int]:
    """Process ids of the processes that torchrun started, by rank."""
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
@EXHAUSTIVE
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
def test_torchrun_one_rank_dies_and_the_next_call_resumes(acts: Activations, tmp_path: Path):
    run = tmp_path / "run"
    first = torchrun(acts, run, tmp_path)
    until_checkpoint(first, run)
    os.kill(workers(first)[1], signal.SIGKILL)
    _, errors = first.communicate(timeout=600)
    assert first.returncode != 0
    assert re.search(r"rank\s*:\s*1 \(local_rank: 1\)", errors) and "SIGKILL" in errors
    assert RunDir(run).last_checkpoint() is not None and not (run / "crosscoder").exists()
    second = torchrun(acts, run, tmp_path)
    said, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    assert said.count("saved in") == 1 and said.count("400 steps of 64 tokens") == 1
    assert "in each of 2 processes" in said and not (run / "checkpoints").exists()
    assert RunDir(run).read_json()["processes"] == 2 and RunDir(run).table("evaluation") is not None
    assert load(run / "crosscoder").cfg.d_sae == 40


@pytest.mark.slow
@EXHAUSTIVE
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("told", ["a worker", "torchrun"])
def test_sigterm_to_one_of_several_stops_all_with_a_checkpoint(acts: Activations, tmp_path: Path, told: str):
    run = tmp_path / "run"
    process = torchrun(acts, run, tmp_path)
    until_checkpoint(process, run)
    os.kill(workers(process)[1] if told == "a worker" else process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == (0 if told == "a worker" else 1)  # torchrun reports its own end as a failure
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
    wandb.teardown()  # wandb reads the environment once
    yield tmp_path
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param("closed port", marks=EXHAUSTIVE),
        "no key",
        pytest.param("silent server", marks=EXHAUSTIVE),
        pytest.param("closed port, run started online", marks=EXHAUSTIVE),
    ],
)
def test_training_goes_on_without_wandb(
    acts: Activations,
    reference: Reference,
    offline_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
):
    """A closed port, a server that accepts and never answers, and a user who never logged in."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if trouble == "silent server":
            server.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        if trouble == "no key":
            monkeypatch.delenv("WANDB_API_KEY")
            monkeypatch.setenv("HOME", str(offline_folder))
            monkeypatch.setenv("NETRC", str(offline_folder / "none"))
        settings = config(run_dir=offline_folder / "run", wandb_project="evolution", wandb_log_frequency=5)
        if "started online" in trouble:
            claim(acts, ALL["topk_crosscoder"](), settings)
            RunDir(offline_folder / "run").update(wandb_id="abcd1234")
        with pytest.warns(UserWarning, match="this run is logged offline"):
            cc = train(acts, ALL["topk_crosscoder"](), settings)
    assert same(weights(cc), reference("topk_crosscoder"))
    wandb.teardown()
    (log,) = (offline_folder / "run").rglob("offline-run-*/run-*.wandb")
    assert [row["_step"] for row in history(log) if "losses/overall_loss" in row] == [4, 9, 14, 19]


def history(log: Path) -> list[dict[str, Any]]:
    """The logged rows."""
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
    wandb.teardown()  # flushes the files
    logs = sorted((offline_folder / "run").rglob("run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(logs) == 2 and len({log.name for log in logs}) == 1  # two files of one run
    steps = [[row["_step"] for row in history(log) if "losses/overall_loss" in row] for log in logs]
    assert steps[0] == list(range(14)) and steps[1] == list(range(done, STEPS))
    losses = [
        {row["_step"]: row["losses/overall_loss"] for row in history(log) if "losses/overall_loss" in row}
        for log in logs
    ]
    for step in range(done, 14):  # logged twice, with the same value
        assert losses[0][step] == losses[1][step]


def test_training_in_a_thread_needs_no_signals(acts: Activations, tmp_path: Path):
    """Notebooks and servers may train outside the main thread, where signal handlers cannot be set."""
    done: list[Any] = []
    thread = threading.Thread(
        target=lambda: done.append(train(acts, ALL["topk_crosscoder"](), config(run_dir=tmp_path / "run")))
    )
    thread.start()
    thread.join()
    assert len(done) == 1
