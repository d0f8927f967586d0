"""Figures of phases, probes and agreement, against their tables."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crosslens.report.chart import MUTED, Chart, Grid, Prompts, Style, new_panels
from crosslens.report.figures import ablation as ablation_figures
from crosslens.report.figures import dates as dates_figures
from crosslens.report.figures import effects as effects_figures
from crosslens.report.figures import feature_timeline as timeline_figures
from crosslens.report.figures import lifecycles as lifecycles_figures
from crosslens.report.figures import phases as phases_figures
from crosslens.report.figures import probes as probes_figures
from crosslens.report.figures import prompts as prompts_figures
from crosslens.report.figures import rotation as rotation_figures
from crosslens.report.figures import structure as structure_figures
from crosslens.report.figures import trace as trace_figures
from crosslens.report.tables import free_name


def dynamics_of(S: int = 5, gap: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(S)
    steps = [10 * s for s in range(S)]
    table = pd.DataFrame({"snapshot": range(S), "label": [f"step{n}" for n in steps], "step": steps, "tokens": steps})
    for name in ("kl1", "kl2", "loss"):
        table[name] = rng.uniform(1, 5, S)
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.1, table[name] + 0.1
    table = table.assign(bigram_progress=np.linspace(0, 1, S), h1=5.0, h2=3.0, n=700, known=1.0)
    for name, values in (("present", [8] * S), ("settled", range(S)), ("alive", [16] * S)):
        table[name] = pd.array(list(values), dtype="Int64")
    table["dimensionality"] = rng.uniform(size=S)
    if gap:
        table.loc[1, ["present", "settled", "alive"]] = pd.NA
        table.loc[1, "dimensionality"] = np.nan
    return table


def turning_point(snapshot: Any, **changed: Any) -> pd.DataFrame:
    row = {"event": "turning_point", "snapshot": snapshot, "label": "step20", "snapshot_low": 1, "snapshot_high": 3}
    row |= {"lead": 0.81, "lead_low": 0.7, "lead_high": 0.9, "resolved": True, "jump": 0.6, "jump_of": "statistics"}
    row |= {"jump_from": "step0", "jump_to": "step10", **changed}
    features = {"event": "features_lead", "snapshot": pd.NA, "lead": 0.0, "lead_low": 0.0, "lead_high": 0.1}
    settling = {"event": "settling", "snapshot": 3, "label": "step30"}
    return pd.DataFrame([row, {**row, "event": "statistics_lead", "snapshot": 2}, features, settling])


def traces(chart: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in chart.figure.data if trace.meta != "band"}


@pytest.mark.parametrize("gap", [False, True])
def test_dynamics_draws_the_table(gap: bool) -> None:
    table = dynamics_of(gap=gap)
    chart = phases_figures.dynamics(table.sample(frac=1, random_state=0), turning_point(2))
    drawn = traces(chart)
    for name, column in (("unigram KL", "kl1"), ("bigram KL", "kl2"), ("loss", "loss")):
        assert list(drawn[name].y) == table[column].tolist() and drawn[name].yaxis is None
    kept = [0, 2, 3, 4] if gap else [0, 1, 2, 3, 4]
    for name, values in (
        ("features settled", [s / 16 for s in range(5)]),
        ("features present", [0.5] * 5),
        ("total dimensionality / d_model", table["dimensionality"].tolist()),
    ):
        assert list(drawn[name].y) == [values[s] for s in kept] and drawn[name].yaxis == "y2"
        assert list(drawn[name].x) == [drawn["loss"].x[s] for s in kept]
    assert list(drawn["turning point"].x) == [drawn["loss"].x[2]] * 2
    band = next(trace for trace in chart.figure.data if trace.meta == "band" and trace.yaxis == "y2")
    assert set(band.x) == {drawn["loss"].x[1], drawn["loss"].x[3]}
    for words in (
        "The turning point, where statistics lead most, is step20 (95% interval, including the spacing of the "
        "snapshots: step10 to step30).",
        "exceeds that of settled features by at most 0.81 (0.70 to 0.90) at step20,",
        "that of the fall by at most 0.00 (0.00 to 0.10). Half of the features have settled by step30.",
        "700 predictions",
    ):
        assert words in chart.note
    assert sorted(shape.y0 for shape in chart.figure.layout.shapes) == [3, 5]


def test_dynamics_without_features_or_turning_point() -> None:
    plain = dynamics_of().drop(columns=["present", "settled", "alive", "dimensionality", "bigram_progress"])
    chart = phases_figures.dynamics(plain)
    assert set(traces(chart)) == {"unigram KL", "bigram KL", "loss"} and "yaxis2" not in chart.figure.layout
    for table, words in (
        (turning_point(pd.NA), "There is no turning point: features lead at least as much as statistics. The share"),
        (
            turning_point(pd.NA, resolved=False),
            "Unresolved: 60% of the bigram KL's fall lies between step0 and step10, so these snapshots cannot tell",
        ),
        (
            turning_point(pd.NA, resolved=False, jump_of="features", jump_from=None),
            "Unresolved: 60% of the features' settling lies between the start and step10,",
        ),
    ):
        chart = phases_figures.dynamics(dynamics_of(), table)
        assert words in chart.note and "turning point" not in traces(chart)


def test_probe_parts_draws_the_table() -> None:
    names = ["all", "trained", "within_features", "within_snapshots", "disattenuated"]
    table = pd.DataFrame(
        {
            "part": names,
            "n": [100, 90, 90, 90, 90],
            "n_features": 9,
            "sd_norm": 0.2,
            "sd_error": 0.05,
            "reliability": 0.9,
        }
    )
    for measure in ("spearman", "pearson"):
        table[measure] = np.linspace(-0.9, -0.1, 5)
        table[f"{measure}_low"], table[f"{measure}_high"] = table[measure] - 0.05, table[measure] + 0.08
    chart = probes_figures.probe_parts(table)
    for trace, measure in zip(chart.figure.data, ("spearman", "pearson"), strict=True):
        assert list(trace.x) == table[measure].tolist()
        assert list(trace.error_x.array) == pytest.approx([0.08] * 5)
        assert list(trace.error_x.arrayminus) == pytest.approx([0.05] * 5)
    assert "Without step 0, the standard deviation of probe errors is 0.050 and that of relative norms" in chart.note
    assert "reliability of the errors is 0.90" in chart.note
    without: Any = probes_figures.probe_parts(table.assign(n=90))  # step 0 is not among the snapshots
    assert list(without.figure.data[0].x) == table["spearman"].drop(1).tolist()
    assert "step 0" not in without.note and "without step 0" not in without.figure.layout.yaxis.ticktext


def test_agreement_means_are_those_of_the_bands() -> None:
    rng = np.random.default_rng(0)
    pairs = [(i, s) for i in range(30) for s in range(3)]
    table = pd.DataFrame(pairs, columns=["feature", "snapshot"]).assign(chance=0.01)
    table["other"] = table["snapshot"] + 1
    for end, column in (("", "snapshot"), ("other_", "other")):
        table[f"{end}label"], table[f"{end}step"] = "step" + table[column].astype(str), table[column] * 10
    table["norm"], table["agreement"] = rng.uniform(size=90), rng.uniform(size=90)
    table.loc[5, "agreement"] = np.nan
    chart: Any = probes_figures.agreement(table)
    drawn = traces(chart)
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)):
        band = table[(table["norm"] > low) & (table["norm"] <= high)].dropna()
        expected = [band.loc[band["other"] == s, "agreement"].mean() for s in (1, 2, 3)]
        assert list(drawn[f"norm {low:g} to {high:g}"].y) == pytest.approx([m for m in expected if not math.isnan(m)])
    assert (
        probes_figures.agreement(table.assign(agreement=np.nan))
        == "No feature has a decoder vector long enough to compare at two neighbouring snapshots."
    )


@pytest.mark.parametrize("tokens", [False, True])
def test_rotation_rate_draws_the_table_and_names_its_ends(tokens: bool) -> None:
    table = pd.DataFrame(
        {"from": ["a", "b", "c"], "to": ["b", "c", "d"], "at_edge": [True, False, True], "angle": [30.0, 20.0, 25.0],
         "halves_angle": [32.0, 23.0, 28.0], "null_angle": [3.0, 4.0, 5.0], "mapped_angle": [9.0, 8.0, 7.0],
         "angle_per_doubling": [15.0, 40.0, 5.0] if tokens else np.nan, "null_per_doubling": [1.0, 2.0, 3.0]}
    )  # fmt: skip
    chart: Any = rotation_figures.rotation_rate(table)
    columns = ["angle", "halves_angle", "null_angle", "mapped_angle"]
    columns += ["angle_per_doubling", "null_per_doubling"] if tokens else []
    drawn = list(chart.figure.data)
    assert [list(trace.y) for trace in drawn] == [table[column].tolist() for column in columns]
    words = ["decoder vectors", "estimates on different halves", "null: the same snapshot, different halves"]
    words += ["decoder vectors after the common linear map", words[0], words[2]]
    assert [trace.name for trace in drawn] == words[: len(drawn)]
    assert list(chart.figure.layout.xaxis.ticktext) == ["a → b", "b → c", "c → d"]
    assert chart.figure.layout.yaxis.title.text == "degrees per interval"
    ends = "From 5.0° (c to d, an end) to 40.0° (b to c) per doubling"
    assert (ends in chart.note) == tokens
    assert "One seed was trained, so how far two seeds differ is not known" in chart.note
    several: Any = rotation_figures.rotation_rate(table.assign(seeds_angle=[50.0, 55.0, 60.0]))
    assert [trace.name for trace in several.figure.data][4] == "two seeds at the later snapshot"
    assert "One seed was trained" not in several.note
    assert isinstance(rotation_figures.rotation_rate(table.assign(angle=np.nan)), str)


def test_the_interval_of_most_rotation_stands_out() -> None:
    table = pd.DataFrame(
        {"from": ["a", "b"], "to": ["b", "c"], "rotated": [3, 1], "n": [7, 8], "share": [0.75, 0.25],
         "median_cosine": [0.5, 0.9], "largest": [True, False], "at_edge": [True, True]}
    )  # fmt: skip
    chart: Any = rotation_figures.rotation(table)
    (bars,) = chart.figure.data
    assert list(bars.y) == [3, 1] and bars.marker.color[0] != bars.marker.color[1]
    assert "3 features" in bars.hovertext[0] and "cosine 0.500" in bars.hovertext[0]
    assert chart.note.startswith(
        "75% of the 4 features that change direction rotate most between a and b (orange). This"
    )
    inner: Any = rotation_figures.rotation(table.assign(at_edge=False))
    assert inner.note.endswith("(orange).")
    assert isinstance(rotation_figures.rotation(table.assign(rotated=0)), str)


def test_median_cosines_fill_the_matrix() -> None:
    table = pd.DataFrame([(a, b) for a in range(3) for b in range(3)], columns=["snapshot", "other"])
    table["label"], table["step"] = "step" + table["snapshot"].astype(str), table["snapshot"]
    table["median"] = [1, -0.25, 0.5, -0.25, 1, 0.75, 0.5, 0.75, 1]
    table = table.assign(lower_quartile=table["median"] - 0.1, upper_quartile=table["median"] + 0.2, n=9)
    chart: Any = rotation_figures.cosines(table)
    (cells,) = chart.figure.data
    assert np.array_equal(np.array(cells.z, dtype=float), table["median"].to_numpy().reshape(3, 3))
    assert "interquartile range -0.350 to -0.050, 9 features" in cells.text[0][1]
    assert (chart.figure.layout.coloraxis.cmin, chart.figure.layout.coloraxis.cmax) == (-0.25, 1)
    assert isinstance(rotation_figures.cosines(table.assign(n=0)), str)


def test_sets_are_exchanged_or_zeroed_at_every_snapshot() -> None:
    rows = [
        {"snapshot": s, "label": f"step{s}", "step": s, "features": kind, "k": k, "mode": "ablate", "clean": 2.0,
         "metric": k * (s + 1) / 10 + (kind == "top"), "metric_low": 0.0, "metric_high": 1.0, "error": True}
        for s in range(3) for kind in ("top", "change_matched", "random") for k in (1, 5)
    ]  # fmt: skip
    exchanged = pd.DataFrame(rows).assign(baseline="patch")
    zeroed = exchanged[(exchanged["k"] == 5) & (exchanged["features"] != "random")].assign(baseline="zero")
    zeroed = zeroed.assign(metric=zeroed["metric"] / 2)
    chart: Any = ablation_figures.zeroing(exchanged, zeroed)
    drawn = traces(chart)
    for kind, name in (("top", "top features by effect"), ("change_matched", "change-matched features")):
        share = exchanged[(exchanged["features"] == kind) & (exchanged["k"] == 5)]["metric"].to_numpy() / 2
        assert list(drawn[f"{name}, exchanged"].y) == pytest.approx(share.tolist())
        assert list(drawn[f"{name}, set to zero"].y) == pytest.approx((share / 2).tolist())
    assert len(drawn) == 4
    assert chart.note == "Sets of k = 5 features, exchanged with the paired prompt or set to zero."
    one = (table.query("snapshot == 2") for table in (exchanged, zeroed))
    assert ablation_figures.zeroing(*one) == "Only one snapshot was ablated."


def test_the_colours_of_transfer_reach_the_largest_share_of_either_sign() -> None:
    rows = [
        {"selected_at": a, "selected_at_label": f"step{a}", "selected_at_step": a, "ablated_at": b,
         "ablated_at_label": f"step{b}", "ablated_at_step": b, "share": -2.0 if a < b else 0.5, "shared": 1, "k": 3,
         "baseline": "zero"}
        for a in range(3) for b in range(3)
    ]  # fmt: skip
    chart: Any = ablation_figures.transfer(pd.DataFrame(rows))
    assert (chart.figure.layout.coloraxis.cmin, chart.figure.layout.coloraxis.cmax) == (-2, 2)


def test_what_never_comes_is_drawn_at_the_last_snapshot() -> None:
    table = pd.DataFrame({"feature": [4, 7]})
    for kind in dates_figures.DATES:
        table[kind], table[f"{kind}_low"], table[f"{kind}_high"] = [1, 3], [0, 2], [2, 3]
    snapshots = pd.DataFrame({"snapshot": range(3), "label": ["step0", "step1", "step2"], "step": range(3)})
    chart: Any = dates_figures.dates(table, snapshots)
    first, ticks = chart.figure.data[0], chart.figure.layout.xaxis.tickvals
    assert list(first.x) == [ticks[1], ticks[2]]
    assert list(first.error_x.array) == [1, 0] and list(first.error_x.arrayminus) == [1, 0]


def test_features_without_any_effect_are_not_drawn_as_others() -> None:
    table = pd.DataFrame({"feature": [1, 2, 3], "ie": [0.1, 0.0, -0.2], "relie": np.nan})
    assert effects_figures._others(table, 5) == [3, 1]


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_group_begin_with_the_early_ones(seed: int) -> None:
    v = np.random.default_rng(seed).uniform(0.1, 1, (6, 5))
    order = lifecycles_figures._clustered(pd.DataFrame({"origin": ["a"] * 6, "birth": 0, "peak": 0}), v)
    late = v[order] @ np.arange(5) / v[order].sum(1)
    assert sorted(order) == list(range(6)) and late[:3].mean() <= late[3:].mean()


def test_lines_part_the_origins_of_the_map() -> None:
    origins, S = ["emergent"] * 3 + ["initial"] * 2 + ["never"] * 4, 4
    lifecycles = pd.DataFrame({"feature": range(9), "measure": "norm", "origin": origins, "fate": "persistent"})
    lifecycles = lifecycles.assign(birth=1, peak=2, alive=True)
    evolution = pd.DataFrame({"feature": np.repeat(range(9), S), "snapshot": np.tile(range(S), 9)})
    evolution["label"] = "step" + evolution["snapshot"].astype(str)
    evolution["norm"] = np.random.default_rng(0).uniform(0.1, 1, 9 * S)
    chart: Any = lifecycles_figures.evolution_map(evolution, lifecycles, evolution.head(S).assign(step=range(S)))
    assert [shape.y0 for shape in chart.figure.layout.shapes] == [1.5, 4.5]  # 2 initial rows, 3 emergent, 4 never


def test_panels_stand_side_by_side_at_full_height() -> None:
    layout = new_panels(3, height=300).layout
    axes = [(layout[f"xaxis{i}"], layout[f"yaxis{i}"]) for i in ("", "2", "3")]
    assert all(y.domain == (0, 1) for _, y in axes)
    assert all(left.domain[1] < right.domain[0] for (left, _), (right, _) in itertools.pairwise(axes))


def test_names_differ_where_file_systems_do_not_know_case() -> None:
    assert [free_name("A", taken) for taken in ([], ["b"], ["a"], ["a", "A-2"])] == ["A", "A", "A-2", "A-3"]


def concepts() -> tuple[pd.DataFrame, pd.DataFrame]:
    """R2 of three features at three snapshots, and their births, of which two are sure."""
    curves = pd.DataFrame([(f, s) for f in (4, 7, 9) for s in range(3)], columns=["feature", "snapshot"])
    curves["label"], curves["step"] = "step" + curves["snapshot"].astype(str), curves["snapshot"]
    curves["r2"] = [0.1, 0.8, 1.0, 0.0, 0.1, 0.9, 0.5, 0.5, 0.5]
    curves["r2_low"], curves["r2_high"] = curves["r2"] - 0.4, curves["r2"] + 0.1
    births = pd.DataFrame({"feature": [4, 7, 9], "birth": [1, 2, 0], "r2": [1.0, 0.9, 0.5], "q": [0.01, 0.2, 0.9]})
    return curves, births.assign(readable_q=[0.01, 0.02, 0.5])


def test_curves_of_concepts_are_those_of_the_dated_features() -> None:
    curves, births = concepts()
    dated, names = pd.DataFrame({"feature": [7, 3, 4]}), pd.DataFrame({"feature": [7], "name": ["<i>"]})
    chart: Any = dates_figures.concept_curves(curves, births, dated, names)
    drawn = traces(chart)
    assert list(drawn)[-2:] == ["7 &lt;i&gt;", "4"] and "9" not in drawn
    assert list(drawn["4"].y) == [0.1, 0.8, 1.0]
    bands = [trace for trace in chart.figure.data if trace.meta == "band"]
    assert min(y for band in bands for y in band.y) == -0.25, "cut where the axis ends"
    assert chart.note.startswith("1 of 3 features that tell the pairs apart have a concept that is born after")
    nothing = dates_figures.concept_curves(curves, births, dated.iloc[1:2])
    assert isinstance(nothing, str) and nothing.endswith(chart.note)


def test_a_feature_is_represented_and_read_out_or_not() -> None:
    curves, births = concepts()
    read = curves[["feature", "snapshot", "label", "step"]].assign(
        share=[0.0, 0.05, 1.0, 0.0, 0.5, 1.0, np.nan, np.nan, np.nan], mapped_share=np.nan, random_share=0.02
    )
    read["read_out"] = read["share"] > 0.1
    together = read[read["feature"] == 7].assign(feature=np.nan)
    chart: Any = dates_figures.represented_and_read(pd.concat([read, together]), curves, births)
    states = chart.data.set_index(["feature", "snapshot"])["state"]
    assert states[4].tolist() == ["neither", "represented", "both"]
    assert states[7].tolist() == ["neither", "read out", "both"]
    assert states[9].tolist() == ["neither"] * 3, "it is not sure that its concept is readable"
    cells = next(trace for trace in chart.figure.data if trace.type == "heatmap")
    assert np.array_equal(np.array(cells.z, dtype=float), [[0, 1, 3], [0, 2, 3], [np.nan] * 3], equal_nan=True)
    assert chart.note == (
        "All of them together are read out from step1 on. Random directions of their size reach 0.02 of the late "
        "effect at most. Rows without colour, 1, have no sure effect at the last snapshot."
    )


def test_pairs_are_counted_where_they_split_merge_or_follow() -> None:
    snapshots = pd.DataFrame({"snapshot": range(3), "label": list("abc"), "step": range(3)})
    splits = pd.DataFrame({"kind": ["split", "split", "merger"], "at": [1, 2, 2]})
    found = pd.DataFrame(
        {
            "kind": ["split", "merger", "replacement"],
            "n": [2, 1, 2],
            "by_chance": [0.25, 1.5, 0],
            "most_by_chance": [1, 3, 0],
        }
    )
    chart: Any = structure_figures.splits_and_replacements(found, snapshots, splits, pd.DataFrame({"birth": [1, 1]}))
    drawn = {name: list(trace.y) for name, trace in traces(chart).items()}
    assert drawn == {"replacement": [0, 2, 0], "split": [0, 1, 1], "merger": [0, 0, 1]}
    assert chart.data["label"].tolist() == ["a", "b", "c"]
    assert "2 splits (by chance 0.2, in 95% of draws at most 1); 1 merger (by chance 1.5," in chart.note
    assert isinstance(structure_figures.splits_and_replacements(found, snapshots), str)


def test_steered_texts_stand_side_by_side_with_the_newest_first() -> None:
    table = pd.DataFrame(
        {"features": ["3,5", "5"], "add": [4.0, np.nan], "factor": [np.nan, 2.5], "label": ["a", "b"],
         "text": ["the", "<b>"], "plain": [" cat", " dog"], "steered": [" king", " fish"],
         "text_loss_change": [-0.125, np.nan]}
    )  # fmt: skip
    grid = trace_figures.steered_models(table, pd.DataFrame({"feature": [5], "name": ["nouns"]}))
    assert [[cell.text for cell in row] for row in grid.rows] == [
        ["5 nouns", "× 2.5", "b", "<b>", " dog", " fish", ""],
        ["3, 5 nouns", "+ 4", "a", "the", " cat", " king", "−0.125"],
    ]
    assert [row[0].link for row in grid.rows] == ["feature.html#5", "feature.html#3"]


def test_proposal_lists_the_chosen_snapshots_and_escapes_text() -> None:
    table = pd.DataFrame(
        {
            "snapshot": range(3),
            "label": ["a", "b", "<b>c</b>"],
            "chosen": [True, False, True],
            "distance": [0, 0.25, 0],
            "stands_for": ["a, b", "", "<b>c</b>"],
            "reason": ["the first snapshot", "", "the last snapshot"],
        }
    )
    grid = phases_figures.proposal(table)
    assert isinstance(grid, Grid) and [row[0].text for row in grid.rows] == ["a", "&lt;b&gt;c&lt;/b&gt;"]
    assert grid.rows[0][1].text == "a, b" and "2 of 3 snapshots" in grid.note and "0.250" in grid.note
    assert len(grid.data) == 3


def counted(untrained: bool = True) -> pd.DataFrame:
    groups = [("r2", "all"), ("r2", "lexical"), ("r2", "contextual"), ("within", "contextual"), ("norm", "all")]
    rows = [
        {"measure": measure, "kind": kind, "threshold": threshold, "n": 20 + i, "born": 3 + i + j, "born_reversed": j}
        for i, (measure, kind) in enumerate(groups)
        for j, threshold in enumerate((0.3, 0.4))
    ]
    table = pd.DataFrame(rows)
    return table.assign(untrained=0.04, untrained_n=50) if untrained else table


@pytest.mark.parametrize("untrained", [False, True])
def test_birth_counts_stand_beside_their_controls(untrained: bool) -> None:
    table = counted(untrained)
    chart = lifecycles_figures.birth_counts(table)
    assert not isinstance(chart, str)
    drawn: list[Any] = list(chart.figure.data)
    assert len(drawn) == 5 * (2 + untrained)
    for place, (_, rows) in enumerate(table.groupby(["measure", "kind"], sort=False)):
        axis = f"x{place + 1}" if place else "x"
        own = {trace.name: trace for trace in drawn if trace.xaxis == axis}
        assert list(own["forward"].x) == [0.3, 0.4]
        assert list(own["forward"].y) == (rows["born"] / rows["n"]).tolist()
        assert list(own["reversed in time"].y) == (rows["born_reversed"] / rows["n"]).tolist()
        assert ("models that never trained" in own) == untrained
    assert "by R² 4 forward, 1 reversed; by decoder norm 8 forward, 1 reversed" in chart.note
    assert ("--untrained" in chart.note) == (not untrained)
    pd.testing.assert_frame_equal(chart.data, table)
    assert isinstance(lifecycles_figures.birth_counts(table.assign(n=0)), str)


def prompt_table(S: int = 4, n_prompts: int = 8) -> pd.DataFrame:
    """The words of prompts of different lengths; nothing acts on the first, and position 1 opposes the answer."""
    rows = [
        {"prompt": prompt, "snapshot": s, "label": f"step{s}", "step": s, "position": t, "token": " <b>"[: t + 1],
         "effect": 0.1 * s * (-1) ** t * (t > 0), "feature": t if t * s else -1, "feature_effect": 0.1 * s * t}
        for prompt in range(n_prompts)
        for s in range(S)
        for t in range(3 + prompt % 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def effects(n_significant: int, n_others: int) -> pd.DataFrame:
    """Features 0, 1, ... with |IE| of .1, .2, ... at the last of five snapshots; the first ones are significant."""
    rows = [
        {"feature": f, "snapshot": s, "label": f"step{s}", "step": 10 * (s + 1), "ie": 0.1 * (f + 1) * (s + 1) / 5,
         "ie_se": 0.01, "relie": (s + 1) / 15 if f < n_significant else np.nan,
         "share_relie": 0.2 if f < n_significant else np.nan}
        for f in range(n_significant + n_others)
        for s in range(5)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("n_significant", "n_others"), [(3, 2), (3, 40), (15, 10), (30, 4), (0, 5)])
def test_features_without_a_significant_effect_follow_in_grey(n_significant: int, n_others: int) -> None:
    """Also where their effects are larger."""
    table = effects(n_significant, n_others)
    snapshots = pd.DataFrame({"snapshot": [4], "label": "step4", "method": "removal"})
    grid, lines = effects_figures.effect_table(table, snapshots), effects_figures.signed_effects(table)
    assert isinstance(grid, Grid) and isinstance(lines, Chart)
    order = [*range(n_significant)[::-1], *range(n_significant, n_significant + n_others)[::-1]]
    for shown, most in (
        ([(row[0].text, all(c.muted for c in row[1:]), any(c.weight for c in row[1:])) for row in grid.rows], 20),
        ([(trace.name, trace.line.color == MUTED, trace.line.color != MUTED) for trace in lines.figure.data], 12),
    ):
        features = [f for f in order if f < n_significant][:most]
        features += [f for f in order if f >= n_significant][: most - len(features)]
        wanted = [(f"{f}" if f < n_significant else f"{f} (n.s.)", f >= n_significant, f < n_significant)
                  for f in features]  # fmt: skip
        assert shown == wanted
    total, drawn = n_significant + n_others, min(n_significant, 12)
    by_chance = f"(FDR 5%: on average at most {0.05 * n_significant:.1f} of these by chance)"
    assert f"{n_significant} of {total} features have a significant effect at some snapshot {by_chance}" in lines.note
    assert (f"the {drawn} with the largest |IE| are shown" in lines.note) == (n_significant > 12)
    assert ("Grey, n.s.: " in lines.note) == (n_significant < 12)
    assert "Grey, n.s.: the 9 with the largest |IE| of the others" in lines.note or (n_significant, n_others) != (3, 40)


@pytest.mark.parametrize(
    ("baseline", "words"),
    [("patch", "their values on the paired prompt"), ("zero", "zero"), ("mean", "their means over the prompts")],
)
def test_figures_of_effects_say_what_features_are_set_to_and_on_how_many_groups(baseline: str, words: str) -> None:
    table = effects(3, 2)
    snapshots = pd.DataFrame(
        {"snapshot": range(5), "label": [f"step{s}" for s in range(5)], "step": range(5), "method": "removal",
         "metric_clean": 1.0, "features_effect": 0.5, "error_effect": 0.1, "metric_baseline": 0.4, "n": 60,
         "n_groups": 44, "baseline": baseline}
    )  # fmt: skip
    followed = table.assign(order=table["feature"], strength=0.5, top=True, examples="the [boy]")
    charts: list[Any] = [
        effects_figures.effect_table(table, snapshots),
        effects_figures.signed_effects(table, None, snapshots),
        effects_figures.share_relie_lines(table, None, None, snapshots),
        effects_figures.relie_lines(table, None, snapshots),
        effects_figures.signed_against_relative(table, None, None, snapshots),
        effects_figures.effect_budget(snapshots),
        timeline_figures.feature_timeline(followed, None, None, snapshots),
    ]
    summary = pd.DataFrame(
        [{"kind": "within", "target": "effect", "measure": "relie", "correlation": 0.5, "correlation_low": 0.4,
          "correlation_high": 0.6, "level": 0.95, "n_features": 9, "baseline": baseline}]
    )  # fmt: skip
    for chart in charts:
        assert f"Effects are those of features set to {words}, on 60 prompts in 44 groups." in chart.note
    for few in (table[table["snapshot"] >= 3], table[table["snapshot"] >= 2]):  # a strip, a triangle
        two: Any = effects_figures.share_relie_lines(few, None, None, snapshots)
        assert f"set to {words}" in two.note
    single: Any = prompts_figures.prompt_words(prompt_table(), None, snapshots)
    assert single.note.endswith(f" Effects are those of features set to {words}.")
    validated: Any = effects_figures.validation(summary)
    assert f"Ablated features are set to {words}." in validated.note
    earlier: Any = effects_figures.signed_effects(table)  # a run that does not say
    assert "set to" not in earlier.note


@pytest.mark.parametrize(("n_snapshots", "words"), [(2, "Below 0.3"), (3, "Each point"), (5, "the 12 with")])
def test_classes_stand_beside_the_number_that_has_one_by_chance(n_snapshots: int, words: str) -> None:
    table = effects(40, 10)
    chart: Any = effects_figures.relie_lines(table[table["snapshot"] < n_snapshots])
    by_chance = "(FDR 5%: on average at most 2.0 of these by chance)"
    assert words in chart.note
    assert f"40 of 50 features have a significant effect at some snapshot {by_chance}" in chart.note


@pytest.mark.parametrize("chance", [[], ["step0", "step1"], ["step3"], [f"step{s}" for s in range(5)]])
def test_shares_are_not_drawn_where_accuracy_is_at_chance(chance: list[str]) -> None:
    table, labels = effects(3, 2), pd.DataFrame({"label": chance})
    left = len(chance) if len(chance) < 5 else 0
    for column in ("share_relie", "relie"):
        chart: Any = effects_figures.relative_effects(table, None, labels, column)
        gaps = [[not np.isfinite(y) for y in trace.y] for trace in chart.figure.data]
        wanted = [column == "share_relie" and bool(left) and f"step{s}" in chance for s in range(5)]
        assert gaps == [wanted] * 3
        assert ("where accuracy is at chance" in chart.note) == any(wanted)
    points: Any = effects_figures.signed_against_relative(table, None, labels)
    assert len(points.figure.data[0].x) == 3 * (5 - left) == len(points.data)
    assert (f"Not drawn at {', '.join(chance)}, where" in points.note) == bool(left)
    assert ("at chance at every snapshot" in points.note) == (len(chance) == 5)


def test_words_are_tinted_by_their_effects() -> None:
    names = pd.DataFrame({"feature": [1, 2], "name": ["boy", "\u202e"]})
    made = prompts_figures.prompt_words(prompt_table(), names)
    assert isinstance(made, Prompts)
    found, source = made.contents, prompt_table().set_index(["prompt", "snapshot", "position"])
    assert found["labels"] == [f"step{s}" for s in range(4)] and found["largest"] == pytest.approx(0.3)
    assert found["names"]["1"] == "1 boy" and found["names"]["2"] == "2", "what cannot be seen is left out"
    assert [prompt["id"] for prompt in found["prompts"]] == list(range(8))
    for prompt in found["prompts"]:
        for s in range(4):
            for t, word in enumerate(prompt["tokens"]):
                row = source.loc[prompt["id"], s, t]
                assert found["words"][word] == (row["token"] if row["token"].strip() else "␣"), "spaces are kept"
                assert prompt["effects"][s][t] == pytest.approx(row["effect"])
                assert prompt["features"][s][t] == row["feature"]
        assert len(prompt["tokens"]) == 3 + prompt["id"] % 2
    assert "0.30 logits. The 8 prompts" in made.note and len(made.data) == len(prompt_table())
    assert isinstance(prompts_figures.prompt_words(prompt_table().assign(effect=0.0)), str)


@pytest.mark.parametrize(
    ("tokens", "prefix", "shown"),
    [
        (["<bos>", "the", "boy", ".", "the"], "the  boy. the", ["<bos>", "the", "  boy", ".", " the"]),
        (["the", " boy", "", "s", "?"], "the boys", ["the", " boy", "␣", "s", "?"]),
    ],
)
def test_words_keep_the_spaces_of_the_prompt(tokens: list[str], prefix: str, shown: list[str]) -> None:
    table = pd.DataFrame({"token": tokens, "position": range(5), "prefix": prefix, "feature": 1, "effect": 0.5})
    made: Any = prompts_figures.prompt_words(table.assign(prompt=0, snapshot=0, label="a", correct="x", wrong="y"))
    assert [made.contents["words"][word] for word in made.contents["prompts"][0]["tokens"]] == shown


def test_a_task_has_one_colour() -> None:
    tasks = pd.DataFrame({"task": ["b", "a", "c"]})
    assert Style.of_tasks(["a", "c"], tasks) == {"a": Style.of(1), "c": Style.of(2)}
    assert Style.of_tasks(["d", "a"], tasks) == {"d": Style.of(3), "a": Style.of(1)}
    assert Style.of_tasks(["d", "a"], None) == {"d": Style.of(0), "a": Style.of(1)}
