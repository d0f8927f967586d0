"""Analyses on a GPU leave the tables that they leave on a CPU.

The test has a pretended GPU, and with `-m gpu` a real one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from crosslens.config import ConnectOptions, SteerOptions, TraceOptions
from crosslens.pipeline.connecting import connect
from crosslens.pipeline.steering import steer
from crosslens.pipeline.tracing import trace
from crosslens.rundir import RunDir
from crosslens.snapshots.snapshot import Snapshot
from tests.pipeline.test_processes import analyse
from tests.pretend_cuda import Pretended, Real


@pytest.fixture
def upper(train_upper: Callable[[int], RunDir], tmp_path: Path) -> RunDir:
    """A copy of a run one block above `run`."""
    shutil.copytree(train_upper(6).path, tmp_path / "upper")
    return RunDir(tmp_path / "upper")


def analyse_all(run: RunDir, upper: RunDir, task: str, device: str) -> None:
    """Everything with a device that analyses a run."""
    analyse(run, task, device)
    trace(run, ["the cat near the fish"], TraceOptions(answers="sees,likes"), device=device)
    list(steer(run, ["the cat near"], SteerOptions(feature=(1,), factor=0.0, length=3), device=device))
    edges = ConnectOptions(lower=run.path, task=(task,), feature=tuple(range(8)), n_edges=3)
    list(connect(upper, edges, device=device))


def same(found: pd.DataFrame | None, expected: pd.DataFrame | None, gpu: Pretended | Real) -> None:
    """Equal to rounding: a real GPU's sums have another order, and angles of weak rows amplify that."""
    assert found is not None and expected is not None
    pd.testing.assert_index_equal(found.columns, expected.columns)
    for name in expected.columns:
        rounding = {"rtol": 1e-6, "atol": 1e-8}
        if gpu.real and expected[name].dtype.kind == "f":
            rounding = {"rtol": 0, "atol": 1e-3 * float(expected[name].abs().max())}
        pd.testing.assert_series_equal(found[name], expected[name], **rounding)  # type: ignore[call-overload]


@pytest.mark.exhaustive
def test_analyses_leave_the_tables_of_a_cpu(
    run: RunDir,
    upper: RunDir,
    paired_words: str,
    tmp_path: Path,
    gpu: Pretended | Real,
    monkeypatch: pytest.MonkeyPatch,
):
    if not gpu.real:
        monkeypatch.setattr(Snapshot, "_check_device", lambda *_: None)
    on_cpu, on_gpu = [run, upper], [RunDir(tmp_path / f"{each.path.name}_on_gpu") for each in (run, upper)]
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        shutil.copytree(expected.path, found.path)
    analyse_all(*on_gpu, paired_words, "cuda")
    analyse_all(*on_cpu, paired_words, "cpu")
    different: dict[str, str] = {}
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        names = expected.table_names()
        assert found.table_names() == names and (len(names) > 30 or expected is upper)
        for name in names:
            try:
                same(found.table(name), expected.table(name), gpu)
            except AssertionError as error:
                different[f"{expected.path.name} {name}"] = str(error)
    assert not different, "\n\n".join(f"{name}: {error}" for name, error in different.items())
