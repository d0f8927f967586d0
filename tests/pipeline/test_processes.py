"""Analyses of a run in several processes leave the tables of one, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import crosslens
from crosslens.config import AblateOptions, AttributeOptions, EvolveOptions, StudyOptions
from crosslens.errors import UserError
from crosslens.pipeline.evolving import evolve
from crosslens.pipeline.studying import ablate, attribute, study
from crosslens.rundir import RunDir
from tests.pipeline.test_studying import SIZES
from tests.ranks import run_ranks

EXHAUSTIVE = pytest.mark.exhaustive


def analyse(run: RunDir, task: str, device: str = "cpu") -> None:
    """All verbs that are divided."""
    evolve(RunDir(run.path), EvolveOptions(n_probes=4), device=device)
    list(attribute(run, AttributeOptions(task=(task,), n_exact=3), device=device))
    list(ablate(run, AblateOptions(task=(task,), k=(1, 2), n_draws=2), device=device))
    list(study(run, StudyOptions(task=(task,), **SIZES), device=device))  # type: ignore[arg-type]


def tables(run: RunDir) -> dict[str, pd.DataFrame]:
    found = {name: run.table(name) for name in run.table_names()}
    return {name: table for name, table in found.items() if table is not None}


def compare(expected: RunDir, found: RunDir) -> None:
    one, several = tables(expected), tables(found)
    assert one.keys() == several.keys() and len(one) > 30
    for name, table in one.items():
        pd.testing.assert_frame_equal(several[name], table, rtol=1e-6, atol=1e-8)
        assert found.made_with(name) == expected.made_with(name)
    settings = [run.read_json() for run in (expected, found)]
    assert settings[0]["studied"] == settings[1]["studied"] and settings[0]["splits"] == settings[1]["splits"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=EXHAUSTIVE)])
@pytest.mark.parametrize("cached", [pytest.param(True, marks=EXHAUSTIVE), False])
def test_several_processes_leave_the_tables_of_one(
    run: RunDir, paired_words: str, tmp_path: Path, world: int, cached: bool
):
    if not cached:
        contents = run.read_json()
        source = {key: value for key, value in contents["source"].items() if key not in ("cache", "cache_dtype")}
        run.write_json({**contents, "source": source})
    shutil.copytree(run.path, tmp_path / "several")
    analyse(run, paired_words)

    def body(_: int) -> None:
        analyse(RunDir(tmp_path / "several"), paired_words)

    run_ranks(world, tmp_path, body)
    compare(run, RunDir(tmp_path / "several"))


@pytest.mark.slow
def test_a_null_needs_one_process(run: RunDir, tmp_path: Path):
    def body(_: int) -> torch.Tensor:
        with pytest.raises(UserError, match="train another crosscoder, in one process.*without torchrun"):
            evolve(run, EvolveOptions(untrained=True), device="cpu")
        return torch.zeros(1)

    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    run_ranks(2, tmp_path, body)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}


@pytest.mark.slow
@EXHAUSTIVE
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_the_next_call_completes(
    run: RunDir, paired_words: str, tmp_path: Path, victim: int
):
    from tests.training.test_lost_runs import workers

    shutil.copytree(run.path, tmp_path / "several")
    several = RunDir(tmp_path / "several")
    for one in (run, several):
        evolve(RunDir(one.path), EvolveOptions(n_probes=4), device="cpu")
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items() if isinstance(value, int)]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crosslens"),
        *("study", str(several.path), "--task", paired_words, "--device", "cpu", *sizes),
    ]
    path = str(Path(crosslens.__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while several.table("attribution/tiny") is None:
        assert first.poll() is None, first.communicate()[1]
    os.kill(workers(first)[victim], signal.SIGKILL)
    first.communicate(timeout=600)
    assert first.returncode and several.table("timeline/tiny") is None
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("transfer, additivity, timeline, validation") == 1
    options = StudyOptions(task=(paired_words,), **{k: v for k, v in SIZES.items() if isinstance(v, int)})  # type: ignore[arg-type]
    list(study(run, options, device="cpu"))
    compare(run, several)


def test_other_commands_run_in_one_process(run: RunDir) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "a"}
    for verb in ("report", "status"):
        command = [sys.executable, "-m", "crosslens", verb, str(run.path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and done.stdout == ""
        assert f"crosslens {verb} runs in one process: start it without torchrun, which is for ablate" in done.stderr
    assert not run.report.exists()
