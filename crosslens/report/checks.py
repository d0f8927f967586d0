"""Figures that check effects: one snapshot's features at another, and pairs of features ablated together."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go

from crosslens.report.chart import (
    GRID,
    HEAT,
    INK,
    MUTED,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    add_matrix,
    apply_colors,
    floats,
    ints,
    new_figure,
)

_SIGNED = (SERIES[1], HEAT[0], SERIES[0])  # below zero, zero, above
_SETS = {"top": "top features", "random": "random features", "size_matched": "size-matched features"}


def transfer(table: Frame) -> Chart | str:
    """What ablating the top features of one snapshot does at each other, as a matrix.

    Args:
        table: of `transfer_matrix`.
    """
    if table["share"].notna().sum() == 0:
        return "The metric changes too little at every snapshot to divide by."
    wide = table.pivot(index="chosen", columns="judged", values="share").to_numpy(dtype=float)
    rows = table.drop_duplicates("judged").rename(columns={"judged_label": "label", "judged_step": "step"})
    axis = SnapshotAxis.of(rows.assign(snapshot=rows["judged"])[["snapshot", "label", "step"]], even=True)
    ids = list(axis.labels)
    hover = axis.hover(ids)
    shared = table.pivot(index="chosen", columns="judged", values="shared").to_numpy(dtype=int)
    figure = new_figure("features chosen at", height=160 + 30 * len(ids))
    texts = [
        [
            f"chosen at {hover[a]}<br>ablated at {hover[b]}<br>{_written(wide[a, b])}<br>{shared[a, b]} of them are in "
            "its own set"
            for b in range(len(ids))
        ]
        for a in range(len(ids))
    ]
    add_matrix(figure, wide, texts, axis.x(ids), list(axis.names().values()))
    largest = max(1.0, float(np.nanmax(np.abs(wide))))
    apply_colors(figure, _SIGNED, {-largest: f"−{largest:.0%}", largest: f"{largest:.0%} of the change"})
    axis.apply(figure)
    figure.update_xaxes(title_text="ablated at")
    k = ", ".join(str(size) for size in sorted(set(ints(table["k"]))))
    note = f"Sets of k = {k}. 100 %: as much as ablating all features at that snapshot."
    blank = sorted({str(label) for label in table.loc[table["share"].isna(), "judged_label"]})
    if blank:
        note += f" Blank at {', '.join(blank)}, where that is too little to divide by."
    return Chart(figure, table.reset_index(drop=True), note)


def additivity(pairs: Frame, summary: Frame) -> Chart:
    """Joint effects of pairs against the sum of both alone, at the last snapshot measured.

    Args:
        pairs: `Additivity.pairs`.
        summary: `Additivity.summary`.
    """
    row = summary.sort_values("snapshot").iloc[-1]
    points = pairs[pairs["snapshot"] == row["snapshot"]]
    figure = new_figure("both ablated together (logits)", height=420)
    ends = [float(np.nanmin(points[["sum", "joint"]])), float(np.nanmax(points[["sum", "joint"]]))]
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", name="effects add up", line={"color": MUTED, "dash": "dot"})
    )
    figure.add_scatter(
        x=floats(points["sum"]),
        y=floats(points["joint"]),
        mode="markers",
        name="a pair of features",
        marker={"size": 6, "opacity": 0.7, "color": SERIES[0]},
        customdata=points[["feature_a", "feature_b", "effect_a", "effect_b"]].to_numpy(dtype=float).tolist(),
        hovertemplate="features %{customdata[0]} and %{customdata[1]}<br>alone %{customdata[2]:.3f} and "
        "%{customdata[3]:.3f}<br>sum %{x:.3f}, together %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="sum of both ablated alone (logits)", showgrid=True, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(zeroline=False, linecolor=INK)
    note = (
        f"At {row['label']}: {int(row['n_pairs'])} pairs of the {int(row['k'])} features of largest |IE|, on "
        f"{int(row['n_prompts'])} prompts. Correlation {row['correlation']:.3f} "
        f"({row['correlation_low']:.3f} to {row['correlation_high']:.3f}); sum of |deviations| / sum of |sums| "
        f"{row['deviation']:.1%} ({row['deviation_low']:.1%} to {row['deviation_high']:.1%})."
    )
    return Chart(figure, points.reset_index(drop=True), note)


def _written(share: float) -> str:
    return "not known" if math.isnan(share) else f"{share:.0%} of the change".replace("-", "−")
