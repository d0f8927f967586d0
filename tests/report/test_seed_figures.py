"""Figures of seeds and of the sweep, against their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crosslens.report.chart import Chart
from crosslens.report.figures import seeds as seeds_figures
from crosslens.report.tables import Tables
from tests.report.test_pages import make_run


def consensus_of(n: int = 3, F: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"crosscoder": "0", "feature": range(F), "alive": rng.random(F) < 0.8})
    table["firing_rate"] = np.where(table["alive"], 10 ** rng.uniform(-6, 0, F), 0)
    table["n_seeds"] = np.where(table["alive"], rng.integers(1, n + 1, F), 0)
    table["variance"] = np.where(table["alive"], rng.random(F), 0)
    table["variance"] /= table["variance"].sum()
    return table.assign(of=n, consensus=2 * table["n_seeds"] > n, correlation=0.5)


PAIRS = pd.DataFrame(
    {"a": ["0", "0"], "b": ["1", "2"], "share_a": [0.5, 0.6], "share_b": [0.4, 0.7], "variance_a": [0.9, 0.9],
     "variance_b": [0.8, 0.8], "cosine_a": [0.1, 0.1], "cosine_b": [0.3, 0.3], "null_a": [0.0, 0.01]}
)  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 5])
def test_seeds_draws_the_table(n: int) -> None:
    table = consensus_of(n)
    chart = seeds_figures.seeds(table, PAIRS)
    assert isinstance(chart, Chart)
    live = table[table["alive"]]
    number, weight = chart.figure.data
    assert list(number.x) == list(weight.x) == list(range(1, n + 1))
    for i, k in enumerate(range(1, n + 1)):
        assert number.y[i] == pytest.approx((live["n_seeds"] == k).mean())
        assert weight.y[i] == pytest.approx(live.loc[live["n_seeds"] == k, "variance"].sum())
    assert f"Most of {n} seeds have {int(live['consensus'].sum())} of {len(live)} live features" in chart.note
    assert "55% of the live features have a partner (40% to 70% over 2 pairs, both directions)" in chart.note
    assert "weighted by variance 85%; 20% have a partner whose decoder" in chart.note and "0.5% have one" in chart.note
    assert "is dead" in str(seeds_figures.seeds(table.assign(alive=False), PAIRS))


def test_partners_by_kind_are_means_over_pairs() -> None:
    asked = ("shared", "born_too", "same_birth", "within_1")
    kinds = [(b, kind) for b in ("1", "2") for kind in ("all", "lexical", "contextual")]
    table = pd.DataFrame(kinds, columns=["b", "kind"]).assign(a="0")
    rng = np.random.default_rng(0)
    for name in asked:
        table[name], table[f"{name}_by_chance"] = rng.random(6), rng.random(6) / 9
    chart: Any = seeds_figures.births_of_partners(table)
    means = table.groupby("kind")[[*table.columns[3:]]].mean()
    shares, chances = chart.figure.data[::2], chart.figure.data[1::2]
    for share, chance, kind in zip(shares, chances, ("all", "lexical", "contextual"), strict=True):
        assert (share.name, chance.name) == (f"{kind} features", "by chance")
        assert list(share.y) == pytest.approx([means.loc[kind, name] for name in asked])
        assert list(chance.y) == pytest.approx([means.loc[kind, f"{name}_by_chance"] for name in asked])
    row = means.loc["all"]
    assert chart.note == (
        f"2 pairs of seeds. Of the features that are born in one and have a partner, {row['born_too']:.0%} are born in "
        f"the other too (by chance {row['born_too_by_chance']:.0%}); {row['same_birth']:.0%} of these at the same "
        f"snapshot (by chance {row['same_birth_by_chance']:.0%})."
    )


def test_rates_draw_the_table() -> None:
    table = consensus_of()
    chart = seeds_figures.seeds_by_rate(table)
    assert isinstance(chart, Chart)
    live, bar = table[table["alive"]], chart.figure.data[0]
    for row, drawn in zip(chart.data.to_dict("records"), bar.y, strict=True):
        here = live[(live["firing_rate"] >= row["rate_from"]) & (live["firing_rate"] < row["rate_to"])]
        assert len(here) == row["features"] and drawn == pytest.approx(here["consensus"].mean())
    assert sum(map(int, bar.text)) == len(live)
    always = seeds_figures.seeds_by_rate(live.assign(firing_rate=1.0))
    assert isinstance(always, Chart) and always.data["features"].tolist() == [len(live)]
    assert "is dead" in str(seeds_figures.seeds_by_rate(table.assign(alive=False)))


def test_the_sweep_draws_the_table() -> None:
    grid = [(F, k) for F in (128, 256) for k in (4.0, 8.0, 16.0)]
    table = pd.DataFrame(grid, columns=["d_sae", "k"]).assign(seeds=2, live=100.0, dead=0.01)
    rng = np.random.default_rng(1)
    for name in ("explained_variance", "least_explained", "agreement", "variance"):
        table[name] = rng.random(6)
    table["agreement_low"], table["agreement_high"] = table["agreement"] - 0.1, table["agreement"] + 0.2
    table["proposed"] = table.index == 4
    chart = seeds_figures.sweep(table.sample(frac=1, random_state=0))
    ring, *lines = chart.figure.data
    assert (ring.x[0], ring.y[0]) == (table.loc[4, "least_explained"], table.loc[4, "agreement"])
    assert [line.name for line in lines] == ["F=128", "F=256"]
    for line, (_, rows) in zip(lines, table.groupby("d_sae"), strict=True):
        assert list(line.x) == rows["least_explained"].tolist() and list(line.y) == rows["agreement"].tolist()
        assert list(line.text) == ["k=4", "k=8", "k=16"]
        assert list(line.error_y.array) == pytest.approx([0.2] * 3)
        assert list(line.error_y.arrayminus) == pytest.approx([0.1] * 3)
    assert "Proposed: F=256, k=8" in chart.note


def test_a_report_of_consensus_features_counts_the_others_among_the_seeds(tmp_path: Path) -> None:
    run, table = make_run(tmp_path, 3), consensus_of(F=120)
    run.save_table("consensus", table)
    tables, kept = Tables(run, run.read_json(), consensus=True), set(table.loc[table["consensus"], "feature"])
    for name in ("lifecycles", "evolution", "attribution/simple"):
        found, whole = tables[name], run.table(name)
        assert found is not None and whole is not None
        assert set(found["feature"]) == set(whole["feature"]) & kept < set(whole["feature"])
    pd.testing.assert_frame_equal(tables["consensus"], table)
