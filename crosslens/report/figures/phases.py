"""What the model predicts when, and which snapshots represent the run."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from crosslens.evolution.dynamics import MIN_COSINE
from crosslens.report.chart import (
    MUTED,
    Cell,
    Chart,
    Frame,
    Grid,
    SnapshotAxis,
    Style,
    add_level,
    add_series,
    over_snapshots,
    shown,
)
from crosslens.report.entries import figure

_FAINT = "rgba(107,116,126,0.16)"  # MUTED, as a band
_NATS = {"kl1": "unigram KL", "kl2": "bigram KL", "loss": "loss"}
_SHARES = {
    "bigram_progress": "fall of the bigram KL completed",
    "settled": "features settled",
    "present": "features present",
    "dimensionality": "total dimensionality / d_model",
}


@figure(
    "dynamics",
    section="phases",
    title="N-gram statistics and features",
    tables=("dynamics", "phases"),
    wide=True,
    optional=True,
)
def dynamics(table: Frame, phases: Frame | None = None) -> Chart:
    """Top: KL divergence of the corpus's unigram and bigram statistics from the model's predictions, averaged over
    contexts, and the loss, in nats per token. Bottom, as shares: how much of the bigram KL's fall is completed;
    features that have settled, which stay close to their final direction from here on; features present, by R²; total
    dimensionality / d_model.

    Args:
        table: from `dynamics_table` or `Dynamics.to_frame`.
        phases: from `find_phases`; its turning point is marked.
    """
    rows = table.sort_values("snapshot")
    shares = [name for name in _SHARES if name in rows]
    figure, axis = over_snapshots(rows, "nats per token", height=320 + 240 * bool(shares))
    for i, (name, title) in enumerate(_NATS.items()):
        add_series(figure, axis, rows, name, title, Style.of(i), value="%{y:.3f} nats", band=True)
    add_level(figure, float(rows["h1"].iloc[0]), "unigram entropy (H1)", "dash")
    add_level(figure, float(rows["h2"].iloc[0]), "bigram entropy (H2)")
    for i, name in enumerate(shares, start=len(_NATS)):
        # a crosscoder trained on fewer snapshots leaves gaps
        known = rows.dropna(subset=[name])
        if name in ("settled", "present"):
            known = known.assign(**{name: known[name] / known["alive"]})
        add_series(figure, axis, known, name, _SHARES[name], Style.of(i), yaxis="y2")
    if shares:
        lower = {**figure.layout["yaxis"].to_plotly_json(), "anchor": "x", "domain": [0, 0.44], "range": [-0.03, 1.05]}
        figure.update_layout(yaxis_domain=[0.56, 1], yaxis2=lower, yaxis2_title_text="share", xaxis_anchor="y2")
    figure.update_layout(yaxis_rangemode="tozero")
    note = (
        f"{int(rows['n'].iloc[0]):,} predictions per snapshot. H1 is the lowest loss possible with unigram counts "
        "alone, H2 with bigram counts."
    )
    if "settled_angle" in rows and rows["settled"].notna().any():
        angle = float(rows["settled_angle"].iloc[0])
        fixed = math.isclose(math.cos(math.radians(angle)), MIN_COSINE)
        why = "a fixed level, because no other seeds were trained" if fixed else "the angle between seeds"
        note += f" A feature is settled within {angle:.0f}° of its final direction, {why}."
    if phases is not None:
        note += " " + _mark(figure, axis, phases, "y2" if shares else "y")
    return Chart(figure, rows, note)


def _mark(figure: go.Figure, axis: SnapshotAxis, phases: Frame, y: str) -> str:
    """Mark the turning point in a panel, and describe it and the leads of both phases."""
    found = phases.set_index("event")
    if "turning_point" not in found.index:
        return ""
    point, statistics, features = (found.loc[name] for name in ("turning_point", "statistics_lead", "features_lead"))

    def lead(row: pd.Series) -> str:
        text = f"{row['lead']:.2f} ({row['lead_low']:.2f} to {row['lead_high']:.2f})"
        return text if bool(pd.isna(row["snapshot"])) else f"{text} at {shown(row['label'])}"

    both = (
        f"The share of the bigram KL's fall exceeds that of settled features by at most {lead(statistics)}, the share "
        f"of settled features that of the fall by at most {lead(features)}."
    )
    if not point["resolved"]:
        curve = "the bigram KL's fall" if point["jump_of"] == "statistics" else "the features' settling"
        start = shown(point["jump_from"]) if isinstance(point["jump_from"], str) else "the start"
        return (
            f"Unresolved: {point['jump']:.0%} of {curve} lies between {start} and {shown(point['jump_to'])}, so these "
            f"snapshots cannot tell which phase comes first; snapshots in between could. {both}"
        )
    if pd.isna(point["snapshot"]):
        return f"There is no turning point: features lead at least as much as statistics. {both}"
    at, low, high = (axis.x([int(point[name])])[0] for name in ("snapshot", "snapshot_low", "snapshot_high"))
    figure.add_scatter(
        x=[low, high, high, low], y=[0, 0, 1, 1], fill="toself", fillcolor=_FAINT, mode="none", hoverinfo="skip",
        showlegend=False, yaxis=y, meta="band",
    )  # fmt: skip
    figure.add_scatter(
        x=[at, at], y=[0, 1], mode="lines", line={"color": MUTED, "dash": "dot", "width": 2}, name="turning point",
        hoverinfo="skip", yaxis=y,
    )  # fmt: skip
    first, last = (shown(axis.labels[int(point[name])]) for name in ("snapshot_low", "snapshot_high"))
    text = (
        f"The turning point, where statistics lead most, is {shown(point['label'])} (95% interval, including the "
        f"spacing of the snapshots: {first} to {last}). {both}"
    )
    if "settling" in found.index and not pd.isna(found.loc["settling", "snapshot"]):
        text += f" Half of the features have settled by {shown(found.loc['settling', 'label'])}."
    return text


@figure("selection", section="phases", title="Suggested snapshots", tables=("selection",), wide=True, optional=True)
def proposal(table: Frame) -> Grid:
    """A subset of snapshots chosen so that all others are close to one of them in accuracy and activation
    similarity."""
    chosen = table[table["chosen"].astype(bool)]
    rows = [
        [Cell(shown(row["label"])), Cell(shown(row["stands_for"], 60)), Cell(shown(row["reason"], 240))]
        for row in chosen.to_dict("records")
    ]
    note = f"{len(chosen)} of {len(table)} snapshots. The distances of all snapshots to their representatives sum to "
    note += f"{table['distance'].sum():.3f}."
    left: Frame = table[~table["chosen"].astype(bool) & (table["reason"] != "")]
    if len(left):
        reasons = (f"{row['label']} {str(row['reason']).removeprefix('left out: ')}" for row in left.to_dict("records"))
        note += f" Left out: {'; '.join(shown(text, 240) for text in reasons)}."
    return Grid(["snapshot", "represents", "reason"], rows, table, note)
