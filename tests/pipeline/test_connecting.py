"""`connect`: edges between the features of two runs, in their table, the terminal and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosslens.cli.app import app
from crosslens.config import ConnectOptions
from crosslens.crosscoders import load
from crosslens.errors import UserError
from crosslens.pipeline.connecting import connect
from crosslens.report import write_report
from crosslens.rundir import RunDir
from tests.plain_model import ITEMS


@pytest.fixture(scope="module")
def upper(train_upper: Callable[[int], RunDir]) -> RunDir:
    return train_upper(6)


def test_edges_are_kept_printed_and_shown(
    upper: RunDir, run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "pairs.jsonl"
    task.write_text("\n".join(json.dumps({k: v for k, v in each.items() if k != "patch_prefix"}) for each in ITEMS))
    words = ["connect", str(upper.path), "--lower", str(run.path), "--task", str(task), "--device", "cpu"]
    with pytest.raises(UserError, match="has no effects on 'pairs', which would choose the features: give --feature"):
        list(connect(upper, ConnectOptions(lower=run.path, task=(str(task),)), device="cpu"))
    alive = load(upper.crosscoder).decoder_norms.sum(1).topk(6).indices.tolist()
    capsys.readouterr()
    app([*words, "--feature", ",".join(map(str, alive)), "--n-edges", "4"])
    shown = capsys.readouterr().out
    assert "pairs, edges from blocks.0.hook_resid_post at step20: 4 prompts in 4 groups" in shown
    made = upper.made_with("edges/pairs")
    assert made["lower"]["id"] == run.read_json()["id"] and made["lower"]["activations"] == "float32"
    assert made["connect"]["n_edges"] == 4 and set(made["lower"]) == {"id", "weights", "activations"}
    table: Any = upper.table("edges/pairs")
    assert table is not None and set(table["feature"]) <= set(alive)
    assert table.groupby("feature")["from_feature"].nunique().max() <= 4
    app([*words, "--feature", str(table["feature"].iloc[0]), "--json"])
    rows = json.loads(capsys.readouterr().out)["edges"]["pairs"]
    assert {row["from_hook"] for row in rows} == {"blocks.0.hook_resid_post"}
    assert {row["feature"] for row in rows} == {table["feature"].iloc[0]}
    task.write_text(task.read_text().replace(ITEMS[0]["prefix"], ITEMS[1]["prefix"]))
    app([*words, "--feature", str(table["feature"].iloc[0])])
    assert upper.made_with("edges/pairs")["items"] != made["items"]
    write_report(upper.path)
    page = (upper.report / "task-pairs.html").read_text()
    assert "Edges from an earlier hook point" in page and f"lower feature {rows[0]['from_feature']}" in page
    assert (upper.report / "data" / "edges-pairs.csv").is_file()
    app(["remove", str(upper.path), "--task", "pairs"])
    assert upper.table("edges/pairs") is None


def test_runs_in_the_wrong_order_are_refused(upper: RunDir, run: RunDir, tmp_path: Path) -> None:
    task = tmp_path / "pairs.jsonl"
    task.write_text(json.dumps(ITEMS[0]))
    options = ConnectOptions(lower=upper.path, task=(str(task),), feature=(1,))
    with pytest.raises(UserError, match="give the one at the earlier hook point first"):
        list(connect(run, options, device="cpu"))
