"""How complex the features are that are born, or strongest, at a snapshot, as a language model judges it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crosslens.features.labels import complexity_correlation
from crosslens.report.chart import Chart, Frame, SnapshotAxis, Style, add_line, floats, ints, new_figure

_EVENTS = {"birth": "born here", "peak": "strongest here"}


def complexity(labels: Frame, evolution: Frame, snapshots: Frame) -> Chart | str:
    """Mean complexity of the features that are born, and of those that peak, at each snapshot.

    Args:
        labels: of `label_features`: feature, complexity.
        evolution: of `evolve`.
        snapshots: snapshot, label, step.
    """
    judged = labels[["feature", "complexity"]].dropna()
    if judged.empty:
        return "No feature has been given a complexity."
    judged = judged.merge(evolution[["feature", *_EVENTS]], on="feature").astype({"complexity": float})
    axis = SnapshotAxis.of(snapshots)
    figure = new_figure("complexity (1 to 5)", yaxis_range=[0.8, 5.2], yaxis_dtick=1)
    parts: list[pd.DataFrame] = []
    for i, (event, name) in enumerate(_EVENTS.items()):
        grouped = judged.dropna(subset=[event]).astype({event: int}).groupby(event)["complexity"]
        rows = grouped.agg(mean="mean", se="sem", n="count").reset_index(names="snapshot")
        ids, mean, se = ints(rows["snapshot"]), floats(rows["mean"]), floats(rows["se"])
        hover = [f"{text}<br>{n:,} features" for text, n in zip(axis.hover(ids), ints(rows["n"]), strict=True)]
        low, high = ((np.asarray(mean) + sign * 2 * np.asarray(se)).tolist() for sign in (-1, 1))
        add_line(figure, axis.x(ids), mean, name, Style.of(i), hover=hover, number=".2f", low=low, high=high)
        names = [axis.labels[snapshot] for snapshot in ids]
        parts.append(rows.assign(event=event, label=names)[["event", "snapshot", "label", "mean", "se", "n"]])
    axis.apply(figure)
    note = f"{len(judged):,} features have a complexity."
    for row in complexity_correlation(judged, evolution, unit="index").to_dict("records"):
        if np.isfinite(row["spearman"]):
            interval = f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            note += f" With {row['event']}: Spearman {row['spearman']:+.2f} {interval}, {row['n']:,} features."
    return Chart(figure, pd.concat(parts, ignore_index=True), note.replace("-", "−"))
