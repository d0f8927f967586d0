"""Tasks of a run: what `attribute` and `ablate` leave, `study` builds on; another split is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from crosslens.causal.analyses import study as study_task
from crosslens.config import AblateOptions, AttributeOptions, StudyOptions
from crosslens.errors import UserError
from crosslens.pipeline.opening import read_run
from crosslens.pipeline.studying import ablate, attribute, study
from crosslens.pipeline.summary import summarise_study
from crosslens.rundir import RunDir
from crosslens.tasks.task import Task

SIZES = {
    "ablate_k": (1, 3), "keep_k": (0, 3), "k": 3, "n_draws": 2, "n_draws_last": 3, "n_exact": 4, "n_validated": 3,
    "n_bootstrap": 20, "n_pairs": 4, "n_read_out": 2,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Items of a task, in a file."""
    nouns = ("cat", "dog", "king", "child")
    rows = [
        {
            "prefix": f"the {noun} near the {other}",
            "patch_prefix": f"the {other} near the {noun}",
            "correct": " sees",
            "wrong": " likes",
        }
        for noun in nouns
        for other in nouns
        if noun != other
    ]
    path = tmp_path / "tiny.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def same(a: pd.DataFrame | None, b: pd.DataFrame) -> None:
    assert a is not None
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


def test_a_study_leaves_the_tables_of_the_task(run: RunDir, file: Path) -> None:
    options = StudyOptions(task=(str(file),), **SIZES, seed=1)  # type: ignore[arg-type]
    [(name, found)] = study(run, options, device="cpu")
    assert name == "tiny"
    curves, summary = found.tables["ablation/tiny"], summarise_study(found, 15)
    assert summary["k"] == 3 == summarise_study(found, 3)["k"] and summary["ablation"]["n_kept"] == 3
    last = curves[(curves["snapshot"] == curves["snapshot"].max()) & (curves["mode"] == "ablate") & (curves["k"] == 3)]
    for kind, metric in zip(last["features"], last["metric"], strict=True):
        assert summary["ablation"][f"{kind}_k"] == metric
    crosscoder, acts = read_run(run, "cpu")
    accuracy = run.table("accuracy")
    assert accuracy is not None and set(accuracy["task"]) == {"tiny"} and len(accuracy) == len(acts.snapshots)
    alone = study_task(
        crosscoder, acts.snapshots, Task.local(file), sizes=options, seed=1, settings=acts.settings, accuracy=accuracy
    )
    assert found.tables.keys() == alone.tables.keys()
    for each, table in alone.tables.items():
        same(run.table(each), table)
    # tables that are there are not made again
    (run.path / "timeline" / "tiny.parquet").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("*/tiny*.parquet")}
    [(_, again)] = study(run, options, device="cpu")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    same(run.table("timeline/tiny"), alone.tables["timeline/tiny"])
    # other sizes begin anew, with the effects that are there
    [(_, other)] = study(run, replace(options, n_pairs=3), device="cpu")
    assert len(other.tables["additivity/tiny"]) == 3
    effects = run.path / "attribution" / "tiny.parquet"
    assert before[effects] == effects.stat().st_mtime_ns


@pytest.mark.parametrize("n_saved", [3, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (2, 4))])
def test_a_study_that_is_killed_between_two_tables_continues(
    run: RunDir, file: Path, n_saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy is saved first, then the tables of the effects."""
    options = StudyOptions(task=(str(file),), **SIZES, seed=1)  # type: ignore[arg-type]
    save, saved = RunDir.save_table, list[str]()

    def killed(self: RunDir, name: str, table: pd.DataFrame, **others: Any) -> None:
        if len(saved) == n_saved:
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, table, **others)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunDir, "save_table", killed)
        list(study(run, options, device="cpu"))
    effects = ["accuracy", "prompts/tiny", "attribution/tiny.snapshots", "attribution/tiny"]
    assert saved == effects[:n_saved]
    [(_, found)] = study(run, options, device="cpu")
    assert {"prompts/tiny", "attribution/tiny", "attribution/tiny.snapshots"} <= found.tables.keys()
    assert {*run.table_names()} == {"accuracy", "evaluation", *found.tables}


def test_a_study_builds_on_its_first_parts(run: RunDir, file: Path) -> None:
    spec = (str(file),)
    [(_, first)] = attribute(run, AttributeOptions(task=spec, n_exact=3, seed=1), device="cpu")
    [(_, second)] = ablate(run, AblateOptions(task=spec, k=(1, 2), n_draws=2, seed=1), device="cpu")
    left = {name: run.table(name) for name in ("attribution/tiny", "prompts/tiny", "ablation/tiny")}
    same(left["attribution/tiny"], first.tables["attribution/tiny"])
    same(left["ablation/tiny"], second.curves)
    sizes = second.curves.groupby("mode")["k"].unique()
    assert sizes["ablate"].tolist() == [1, 2] and sizes["keep"].tolist() == [0, 1, 2]
    options = StudyOptions(task=spec, **SIZES, seed=1)  # type: ignore[arg-type]
    [(_, found)] = study(run, options, device="cpu")
    for name, table in left.items():
        assert table is not None
        same(run.table(name), table)
        same(found.tables[name], table)
    # effects that are estimated anew leave no table of the study that was based on the old ones
    next(attribute(run, AttributeOptions(task=spec, n_exact=0, seed=1), device="cpu"))
    accuracy = run.table("accuracy")
    assert accuracy is not None and accuracy["snapshot"].is_unique  # measured anew, in place of the old rows
    transfer = run.path / "transfer" / "tiny.parquet"
    before = transfer.stat().st_mtime_ns
    [_] = study(run, options, device="cpu")
    assert transfer.stat().st_mtime_ns > before


def test_another_split_is_refused(run: RunDir, file: Path) -> None:
    """Features would be tested on prompts that they were chosen on."""
    spec = (str(file),)
    [_] = attribute(run, AttributeOptions(task=spec, n_exact=0, seed=1), device="cpu")
    with pytest.raises(UserError, match="seed 2 splits the prompts of 'tiny' otherwise than seed 1, .* use --seed 1"):
        list(ablate(run, AblateOptions(task=spec, seed=2), device="cpu"))
    options = StudyOptions(task=spec, **SIZES, seed=2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed 2 splits"):
        list(study(run, options, device="cpu"))
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="has other items than when its effects .* were estimated"):
        list(ablate(run, AblateOptions(task=spec, seed=1), device="cpu"))
    [_] = attribute(run, AttributeOptions(task=spec, n_exact=0, seed=2), device="cpu")
    [_] = ablate(run, AblateOptions(task=spec, k=(1,), n_draws=2, seed=2), device="cpu")
    with pytest.raises(UserError, match="has no effects on 'other'"):
        list(ablate(run, AblateOptions(task=(Task.local(file, name="other"),)), device="cpu"))
