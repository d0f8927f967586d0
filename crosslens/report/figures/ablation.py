"""Ablations of sets of features, and how far effects add up and carry over."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from crosslens.report.chart import (
    AT,
    INK,
    MUTED,
    SERIES,
    SIGNED,
    Chart,
    Frame,
    Style,
    add_diagonal,
    add_level,
    add_line,
    add_matrix,
    add_series,
    apply_colors,
    feature_names,
    floats,
    ints,
    new_figure,
    over_snapshots,
    pick,
    shown,
)
from crosslens.report.entries import figure

ABLATE_K, KEEP_K = 15, 100  # set sizes over snapshots; the nearest size that was measured is drawn
MIN_CLEAN = 0.1  # of the largest |clean metric|: below this, shares divide by noise
_SETS = {
    "top": ("top features by effect", Style(SERIES[0], "circle")),
    "random": ("random active features", Style(MUTED, "square", "dash")),
    "size_matched": ("size-matched features", Style(SERIES[1], "diamond", "dot")),
    "change_matched": ("change-matched features", Style(SERIES[2], "triangle-up", "dashdot")),
}
SET_TO = {
    "patch": "their values on the paired prompt",
    "zero": "zero",
    "mean": "their means over the prompts",
    "": "another value",  # runs that do not say
}
_COLUMNS = {
    "share": "Metric as a share of the clean one, 1 + (metric − clean) / |clean|.",
    "share_sd": "Standard deviation of that share over draws.",
}  # of the figures' numbers
_SHARE: dict[str, Any] = {
    "y_title": "share of the clean metric", "yaxis_tickformat": ".0%", "yaxis_zerolinecolor": MUTED,
    "yaxis_rangemode": "tozero",
}  # fmt: skip


@figure(
    "ablate-size",
    section="ablation",
    title="Ablating the top k features, last snapshot",
    tables=("ablation/<task>",),
    columns=_COLUMNS,
)
def ablate_by_size(table: Frame) -> Chart | str:
    """Share of the clean metric that remains when k features are ablated and the error node is kept. Top features have
    the largest signed IE."""
    return ablation_by_size(table, "ablate")


@figure(
    "keep-size",
    section="ablation",
    title="Keeping only the top k features, last snapshot",
    tables=("ablation/<task>",),
    columns=_COLUMNS,
)
def keep_by_size(table: Frame) -> Chart | str:
    """Share of the clean metric when only k features are kept, without the error node. Top features have the largest
    |IE|."""
    return ablation_by_size(table, "keep")


def ablation_by_size(table: Frame, mode: str) -> Chart | str:
    """Share of the clean metric by set size, at the last snapshot."""
    rows = _shares(table, mode)
    if rows.empty:
        return f"The ablation table has no rows with mode {mode!r}."
    last = rows["snapshot"].max()
    clean = float(rows.loc[rows["snapshot"] == last, "clean"].iloc[0])
    label = str(rows.loc[rows["snapshot"] == last, "label"].iloc[0])
    rows = rows[(rows["snapshot"] == last) & rows["share"].notna()].sort_values("k")
    if rows.empty:
        return f"The clean metric at {label} is {clean:.3f}, too close to zero to divide by."
    figure = new_figure(**_SHARE)
    add_level(figure, 1, "clean")
    alone = float((rows["reconstruction_only"] / rows["clean"]).iloc[0])
    if mode == "keep" and math.isfinite(alone):
        add_level(figure, alone, "all features (reconstruction)", "dashdot")
    sizes = sorted(set(ints(rows["k"])))
    # a logarithmic axis has no 0: the empty set is drawn half a decade before the smallest other
    places = {size: float(size) if size else min((other for other in sizes if other), default=1) / 3 for size in sizes}
    for name, style, lines in _sets(rows):
        x, texts = [places[size] for size in ints(lines["k"])], [f"k = {size}" for size in ints(lines["k"])]
        add_line(figure, x, lines, "share", name, style, hover=texts, value="%{y:.1%}", band=True)
    ticks: dict[str, Any] = {"tickmode": "array", "tickvals": list(places.values()), "ticktext": sizes}
    figure.update_xaxes(type="log", title_text="number of features k (log scale)", **ticks)
    draws = int(rows["n_draws"].max())
    note = f"At {label}, where the clean metric is {clean:.3f} logits. {set_to(rows)}"
    note += f"Bands: the interval of up to {draws:,} random draws, 95% by default."
    return Chart(figure, _ablation_data(rows), note)


@figure(
    "ablate-snapshots",
    section="ablation",
    title="Ablating the top features, all snapshots",
    tables=("ablation/<task>",),
    columns=_COLUMNS,
)
def ablate_over_snapshots(table: Frame) -> Chart | str:
    """The same at one set size; the top features are selected separately at each snapshot."""
    return ablation_over_snapshots(table, "ablate")


@figure(
    "keep-snapshots",
    section="ablation",
    title="Keeping only the top features, all snapshots",
    tables=("ablation/<task>",),
    columns=_COLUMNS,
)
def keep_over_snapshots(table: Frame) -> Chart | str:
    """The same at one set size; the top features are selected separately at each snapshot."""
    return ablation_over_snapshots(table, "keep")


def ablation_over_snapshots(table: Frame, mode: str) -> Chart | str:
    """Share of the clean metric over snapshots, at one set size."""
    rows = _shares(table, mode)
    if rows.empty:
        return f"The ablation table has no rows with mode {mode!r}."
    coverage = rows.groupby("k")["snapshot"].nunique()
    if coverage.max() < 2:
        return "Only one snapshot was ablated."
    wanted = KEEP_K if mode == "keep" else ABLATE_K
    k = min(ints(coverage.index[coverage == coverage.max()].to_numpy()), key=lambda size: (abs(size - wanted), size))
    rows = rows[rows["k"] == k].sort_values("snapshot")
    small = sorted(set(rows.loc[rows["share"].isna(), "snapshot"]))
    figure, axis = over_snapshots(rows, **_SHARE)
    add_level(figure, 1, "clean")
    for name, style, lines in _sets(rows):
        add_series(figure, axis, lines, "share", name, style, value="%{y:.1%}", band=True)
    note = f"Sets of k = {k} features. {set_to(rows)}Bands: the interval of the random draws, 95% by default."
    if small:
        labels = ", ".join(axis.labels[int(s)] for s in small)
        note += f" Not shown at {labels}, where |clean metric| is below {MIN_CLEAN:.0%} of its largest value."
    return Chart(figure, _ablation_data(rows), note)


def set_to(rows: Frame) -> str:
    """A sentence on what ablated features become, and the space after it; nothing for tables that do not say."""
    return f"Ablated features are set to {SET_TO[str(rows['baseline'].iloc[0])]}. " if "baseline" in rows else ""


def effects_of(snapshots: Frame | None, *, counted: bool = True) -> str:
    """A sentence on what features are set to in effects, and on how many prompts, with the space before it.

    Args:
        snapshots: from `Attribution.snapshot_frame`; nothing is said without it, or where it does not say.
        counted: say the number of prompts; otherwise effects are those in single ones.
    """
    if snapshots is None or "baseline" not in snapshots:
        return ""
    row = snapshots.iloc[0]
    groups = f" in {int(row['n_groups']):,} groups" if "n_groups" in snapshots else ""
    on = f", on {int(row['n']):,} prompts{groups}" if counted else ""
    return f" Effects are those of features set to {SET_TO[str(row['baseline'])]}{on}."


def _shares(table: Frame, mode: str) -> Frame:
    """Rows of a mode with the metric as a share of the clean one, NaN where the clean one is too close to zero.

    share = 1 + (metric - clean) / |clean|. This is metric / clean where clean > 0, and falls with the metric even
    where the model still prefers the wrong answer.
    """
    rows = table[table["mode"] == mode].copy()
    size = rows["clean"].abs()
    size = size.where(size >= MIN_CLEAN * size.max())
    rows["share"] = 1 + (rows["metric"] - rows["clean"]) / size
    for edge in ("low", "high"):
        rows[f"share_{edge}"] = 1 + (rows[f"metric_{edge}"] - rows["clean"]) / size
    return rows


def _sets(rows: Frame) -> list[tuple[str, Style, Frame]]:
    """Name, style and rows of each series: by kind of set, and by error node if both settings were measured."""
    both = rows["error"].nunique() > 1
    series: list[tuple[str, Style, Frame]] = []
    for kind, (name, style) in _SETS.items():
        for error, lines in rows[rows["features"] == kind].groupby("error"):
            suffix = (", error node kept" if error else ", without error node") if both else ""
            symbol = style.symbol + ("-open" if both and error else "")
            series.append((name + suffix, replace(style, symbol=symbol), lines))
    return series


def _ablation_data(rows: Frame) -> Frame:
    return pick(rows, *AT, "mode", "baseline", "features", "error", "k", "moved", "metric", "metric_sd", "clean",
                "share", "share_sd", "n_draws")  # fmt: skip


@figure(
    "zeroing",
    section="ablation",
    title="Exchanging or zeroing the top features, all snapshots",
    tables=("ablation/<task>", "zeroing/<task>"),
    columns=_COLUMNS,
    optional=True,
)
def zeroing(table: Frame, zeroed: Frame) -> Chart | str:
    """Share of the clean metric that remains when the top features of a snapshot take their values on the paired
    prompt, and when they are set to zero. An exchange of all that the pair differs in reverses the metric; zeroing can
    only take away."""
    k = int(zeroed["k"].iloc[0])
    exchanged = table[(table["k"] == k) & (table["mode"] == "ablate")]
    rows = pd.concat([_shares(exchanged, "ablate"), _shares(zeroed, "ablate")]).sort_values("snapshot")
    if rows["share"].isna().all() or rows["snapshot"].nunique() < 2:
        return "Only one snapshot was ablated."
    figure, axis = over_snapshots(rows, **_SHARE)
    add_level(figure, 1, "clean")
    for baseline, words, dash in (("patch", "exchanged", "solid"), ("zero", "set to zero", "dot")):
        for kind in ("top", "change_matched"):
            name, style = _SETS[kind]
            lines = rows[(rows["features"] == kind) & (rows["baseline"] == baseline)]
            if len(lines):
                each = replace(style, dash=dash)
                add_series(figure, axis, lines, "share", f"{name}, {words}", each, value="%{y:.1%}")
    note = f"Sets of k = {k} features, exchanged with the paired prompt or set to zero."
    return Chart(figure, _ablation_data(rows), note)


@figure(
    "additivity",
    section="ablation",
    title="Additivity of effects",
    tables=("additivity/<task>", "additivity/<task>.snapshots", "names"),
    optional=True,
)
def additivity(pairs: Frame, summary: Frame, names: Frame | None = None) -> Chart:
    """Effect of ablating two features together, against the sum of their single effects. Where points leave the line,
    the effect of a set is not the sum of the effects of its features.

    Args:
        pairs: `Additivity.pairs`.
        summary: `Additivity.summary`.
        names: feature, name.
    """
    called = feature_names(names)
    row = summary.sort_values("snapshot").iloc[-1]
    points = pairs[pairs["snapshot"] == row["snapshot"]]
    figure = new_figure("effect of ablating both (logits)", height=420)
    ends = [float(np.nanmin(points[["sum", "joint"]])), float(np.nanmax(points[["sum", "joint"]]))]
    add_diagonal(figure, ends, "effects add up")
    figure.add_scatter(
        x=floats(points["sum"]),
        y=floats(points["joint"]),
        mode="markers",
        name="a pair of features",
        marker={"size": 6, "opacity": 0.7, "color": SERIES[0]},
        customdata=[
            [shown(called(int(a))), shown(called(int(b))), x, y]
            for a, b, x, y in points[["feature_a", "feature_b", "effect_a", "effect_b"]].itertuples(index=False)
        ],
        hovertemplate="features %{customdata[0]} and %{customdata[1]}<br>single effects %{customdata[2]:.3f} and "
        "%{customdata[3]:.3f}<br>sum %{x:.3f}, joint %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="sum of single effects (logits)", showgrid=True, zeroline=False)
    figure.update_yaxes(zeroline=False, linecolor=INK)
    note = (
        f"At {row['label']}. {set_to(summary)}{int(row['n_pairs'])} pairs of the {int(row['k'])} features with the "
        "largest |IE|, on "
        f"{int(row['n_prompts'])} prompts. {row['interacting']:.0%} of them ({row['interacting_low']:.0%} to "
        f"{row['interacting_high']:.0%}) interact: they miss the sum by more than half of the smaller effect. Sum of "
        f"|joint − sum| / sum of |sum| "
        f"{row['deviation']:.1%} ({row['deviation_low']:.1%} to {row['deviation_high']:.1%})."
    )
    return Chart(figure, points, note)


@figure(
    "transfer",
    section="ablation",
    title="Transfer between snapshots",
    tables=("transfer/<task>",),
    wide=True,
    optional=True,
)
def transfer(table: Frame) -> Chart | str:
    """Effect of ablating the top features of one snapshot (row) at another (column), as a share of the effect of
    ablating all features there. Where a row is below the column's diagonal, the model uses other features by then."""
    if table["share"].notna().sum() == 0:
        return "Ablating all features changes the metric too little at every snapshot to divide by."
    at = table.drop_duplicates("ablated_at")[["ablated_at", "ablated_at_label", "ablated_at_step"]]
    at = at.set_axis(["snapshot", "label", "step"], axis=1)
    figure, axis = over_snapshots(at, "top features of", even=True, height=160 + 30 * len(at))
    texts = [
        f"top features of {one}<br>ablated at {other}<br>{_percent(row.share)}<br>{row.shared} of them are also top "
        "features there"
        for one, other, row in zip(
            axis.hover(table["selected_at"]), axis.hover(table["ablated_at"]), table.itertuples(), strict=True
        )
    ]
    cells = table.assign(text=texts)
    add_matrix(figure, cells, "share", ("selected_at", axis.names()), ("ablated_at", axis.positions))
    largest = max(1.0, float(table["share"].abs().max()))
    apply_colors(figure, SIGNED, {-largest: f"−{largest:.0%}", largest: f"{largest:.0%} of the change"})
    figure.update_xaxes(title_text="ablated at")
    k = ", ".join(str(size) for size in sorted(set(ints(table["k"]))))
    note = f"Sets of k = {k} features. {set_to(table)}100% is the change from ablating all features at that snapshot."
    blank = sorted({str(label) for label in table.loc[table["share"].isna(), "ablated_at_label"]})
    if blank:
        note += f" Blank at {', '.join(blank)}, where this change is too small to divide by."
    return Chart(figure, table, note)


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.0%} of the change".replace("-", "−")
