"""Logging to W&B after training: offline with the real client, and read back from its files."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb

import crosslens as cl
from crosslens.cli import app as cli
from crosslens.pipeline import reporting
from crosslens.report.wandb_log import MAX_ROWS
from crosslens.rundir import RunDir
from tests.report.test_pages import add_study, lives, make_run, table, wide
from tests.training.test_run import wandb_records


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DATA_DIR", str(tmp_path / "w"))):
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it reads the environment once
    yield add_study(make_run(tmp_path / "r", 3), "simple")
    wandb.teardown()


def read(run: RunDir) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Runs, last values by key, and the artifacts of tables."""
    wandb.teardown()  # its service has written everything when it ends
    records = [record for log in sorted(run.path.rglob("run-*.wandb")) for record in wandb_records(log)]
    items = [item for record in records for item in record.history.item]
    values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
    kinds = [(record.WhichOneof("record_type"), record) for record in records]
    tables = [record.artifact for kind, record in kinds if kind == "artifact" and record.artifact.type == "tables"]
    return [record.run for kind, record in kinds if kind == "run"], values, tables


def media(run: RunDir, path: str) -> str:
    (found,) = run.path.rglob(path)
    return found.read_text(encoding="utf-8")


def test_everything_is_read_back(run: RunDir) -> None:
    run.update(wandb_id="abcd1234", wandb_project="evolution")
    assert cl.report.log_report(run.path) == "abcd1234"
    runs, values, (artifact,) = read(run)
    assert {(one.run_id, one.project) for one in runs} == {("abcd1234", "evolution")}

    assert artifact.name == "abcd1234-tables"
    kept = {file.path: pd.read_parquet(file.local_path) for file in artifact.manifest.contents}
    assert set(kept) == {f"{path.relative_to(run.path)}" for path in run.path.rglob("*.parquet")}
    assert {"evolution.parquet", "evaluation.parquet", "attribution/simple.parquet"} <= set(kept)
    for name, found in kept.items():
        pd.testing.assert_frame_equal(found, table(run, name.removesuffix(".parquet")))

    evolution = lives(run)
    browsed = json.loads(media(run, values["evolution/features/path"]))
    assert browsed["columns"] == list(evolution.columns)
    missing = evolution.isna().to_numpy()
    assert missing.any() and [[cell is None for cell in row] for row in browsed["data"]] == missing.tolist()
    assert [row[0] for row in browsed["data"]] == evolution["feature"].tolist()

    page = media(run, values["evolution/presence/path"])
    (shape, data) = re.search(r'"z":\{"dtype":"u1","bdata":"([^"]+)","shape":"(\d+), 3"\}', page).group(2, 1)  # type: ignore[union-attr]
    z = np.frombuffer(base64.b64decode(data.replace("\\u002f", "/")), np.uint8).reshape(int(shape), 3)
    (features,) = re.findall(r'"rows":\[([\d,]+)\]', page)
    r2 = wide(run, "r2").loc[[int(one) for one in features.split(",")]].to_numpy().clip(0)
    np.testing.assert_allclose(z, 100 * r2 / r2.max(1, keepdims=True), atol=0.51)
    assert '"customdata":[[' in page and "cdn" in page


def test_a_run_trained_without_wandb_is_given_a_project(run: RunDir) -> None:
    with pytest.raises(cl.UserError, match="was trained without W&B, so no project is known: pass project="):
        cl.report.log_report(run.path)
    assert not list(run.path.rglob("*.wandb"))
    first = cl.report.log_report(run.path, project="later")
    assert run.read_json()["wandb_id"] == first and run.read_json()["wandb_project"] == "later"
    assert cl.report.log_report(run.path) == first, "the run is continued"
    runs, _, artifacts = read(run)
    assert {one.run_id for one in runs} == {first} and len(artifacts) == 2
    assert artifacts[0].digest == artifacts[1].digest, "W&B keeps one version of what is the same"


def test_from_the_command_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(reporting, "write_report", lambda path, **_: path / "report" / "index.html")
    monkeypatch.setattr(reporting, "log_report", lambda path, project: asked.append((path, project)) or "abcd1234")
    for options in ([], ["--wandb"], ["--wandb-project", "evolution"]):
        monkeypatch.setattr(sys, "argv", ["crosslens", "report", str(run.path), *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        page, *logged = capsys.readouterr().out.splitlines()
        assert page == str(run.report / "index.html") and logged == ["W&B run abcd1234"] * bool(options)
    assert asked == [(run.path, None), (run.path, "evolution")]


def test_large_tables_are_not_browsed_and_runs_without_tables_refused(run: RunDir) -> None:
    found = table(run, "lifecycles")
    run.save_table("lifecycles", pd.concat([found] * (MAX_ROWS // len(lives(run)) + 1), ignore_index=True))
    cl.report.log_report(run.path, project="p")
    _, values, (artifact,) = read(run)
    assert "evolution/presence/path" in values and "evolution/features/path" not in values
    assert "evolution.parquet" in {file.path for file in artifact.manifest.contents}

    bare = RunDir(run.path.parent / "bare")
    bare.write_json(run.read_json())
    with pytest.raises(cl.UserError, match="has no tables yet: run `crosslens evolve"):
        cl.report.log_report(bare.path)
