"""`evolve`, `label` and `report` on a run directory: what each leaves, and what it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosslens import tables
from crosslens.config import EvolveOptions, LabelOptions, ReportOptions
from crosslens.errors import UserError
from crosslens.evolution import measures
from crosslens.evolution.ngrams import count_ngrams
from crosslens.features.labels import Estimate
from crosslens.pipeline.evolving import evolve
from crosslens.pipeline.labelling import label
from crosslens.pipeline.opening import encoder_shares, read_run
from crosslens.pipeline.reporting import report
from crosslens.report import entries
from crosslens.rundir import RunDir


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page "Add a measure" defines, with its measure and figure, for one test."""
    assert entries.list_figures() and measures._MEASURES
    monkeypatch.setattr(entries, "_FIGURES", dict(entries._FIGURES))
    monkeypatch.setattr(measures, "_MEASURES", dict(measures._MEASURES))
    monkeypatch.setattr(tables, "TABLES", [*tables.TABLES])
    names: dict[str, Any] = {"__name__": "mine"}
    page = (Path(__file__).parents[2] / "docs" / "measure.md").read_text(encoding="utf-8")
    for code in re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S):
        exec(code, names)
    return names


def test_evolve_leaves_its_tables(run: RunDir, example: dict[str, Any]) -> None:
    example["test_dominance_counts_the_largest_of_every_token"]()
    found = evolve(run, EvolveOptions(n_probes=3, seed=2), device="cpu")
    crosscoder, acts = read_run(run, "cpu")
    assert found["lifecycles"]["feature"].nunique() == crosscoder.cfg.d_sae
    # the measure of the page is taken, saved and drawn like any other
    firing = found["evolution"].drop_duplicates("feature")["firing_rate"].to_numpy()
    assert np.allclose(found["dominance"]["active"] / found["dominance"]["active"].sum(), firing / firing.sum())
    assert "Strongest features" in (report(run).page.parent / "evolution.html").read_text(encoding="utf-8")
    assert "### `dominance`" in tables.render_markdown()
    for name in (*found, "examples", "lens", "nearest"):
        assert run.table(name) is not None, name
    assert found["probe"]["feature"].nunique() == 3
    share = encoder_shares(run, crosscoder.cfg.d_sae, acts.snapshots.labels)
    assert share is not None
    assert np.allclose(share.sum(-1), 1)
    assert encoder_shares(run, crosscoder.cfg.d_sae + 1, acts.snapshots.labels) is None
    assert encoder_shares(run, crosscoder.cfg.d_sae, ["another"]) is None
    # counts of other text change what the models are compared with, and nothing else
    counts = count_ngrams([acts.train_tokens()[:20]], acts.snapshots.tokenizer)
    other = evolve(run, EvolveOptions(n_probes=3, seed=2), device="cpu", counts=counts)
    assert other["lifecycles"].equals(found["lifecycles"])
    assert not other["dynamics"].equals(found["dynamics"])


def test_labels_ask_before_they_are_made(run: RunDir) -> None:
    with pytest.raises(UserError, match="has no examples of features: run `crosslens evolve"):
        label(run, LabelOptions(local=True))
    evolve(run, EvolveOptions(n_probes=3), device="cpu")
    seen: list[Estimate] = []

    def refuse(estimate: Estimate) -> bool:
        seen.append(estimate)
        return False

    label(run, LabelOptions(local=True), confirm=refuse)
    assert len(seen) == 1 and seen[0].requests == 0 and run.table("labels") is None
    labels = label(run, LabelOptions(local=True, features=(1, 2)))
    table = run.table("labels")
    assert table is not None and set(table["feature"]) <= {1, 2} and len(labels.table) == len(table)
    with pytest.raises(UserError, match="give --client and --model, or --local"):
        LabelOptions()


def test_a_report_of_what_is_there(run: RunDir) -> None:
    written = report(run, ReportOptions(title="A title of one's own"))
    assert written.wandb is None and "A title of one&#39;s own" in written.page.read_text()
