"""Figures of the phases of training: predictions against n-gram counts beside the features, what the correlation of
probe errors is made of, whether neighbouring snapshots agree on features, and which snapshots to take. Tables in,
charts out.
"""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from crosslens.report.chart import (
    INK,
    MUTED,
    Cell,
    Chart,
    Frame,
    Grid,
    SnapshotAxis,
    Style,
    add_level,
    add_line,
    floats,
    ints,
    new_figure,
    shown,
)

_FAINT = "rgba(107,116,126,0.16)"  # MUTED, as a band
_NATS = {"kl1": "unigram KL", "kl2": "bigram KL", "loss": "loss"}
_SHARES = {
    "bigram_progress": "fall of the bigram KL done",
    "settled": "features settled",
    "present": "features present",
    "dimensionality": "total dimensionality / d_model",
}
_PARTS = {
    "all": "all snapshots",
    "trained": "without step 0",
    "within_features": "within features",
    "within_snapshots": "within snapshots",
    "disattenuated": "less the probes' noise",
}
_NORM_BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)


def dynamics(table: Frame, phases: Frame | None = None) -> Chart:
    """Divergences from the counts and the loss above, shares of features below, over one axis of steps.

    Args:
        table: of `dynamics_table`, or of `Dynamics.to_frame`.
        phases: of `find_phases`; its turning point is marked.
    """
    rows = table.sort_values("snapshot")
    axis = SnapshotAxis.of(rows)
    ids = ints(rows["snapshot"])
    x, hover = axis.x(ids), axis.hover(ids)
    shares = [name for name in _SHARES if name in rows]
    figure = new_figure("nats per token", height=320 + 240 * bool(shares))
    for i, (name, title) in enumerate(_NATS.items()):
        low, high = floats(rows[f"{name}_low"]), floats(rows[f"{name}_high"])
        add_line(figure, x, floats(rows[name]), title, Style.of(i), hover=hover, unit=" nats", low=low, high=high)
    add_level(figure, float(rows["h1"].iloc[0]), "H1, the unigrams' entropy", "dash")
    add_level(figure, float(rows["h2"].iloc[0]), "H2, the bigrams' entropy")
    for i, name in enumerate(shares, start=len(_NATS)):
        values = floats(rows[name])
        if name in ("settled", "present"):
            # a crosscoder of fewer snapshots leaves gaps
            values = [value / total for value, total in zip(values, floats(rows["alive"]), strict=True)]
        known = [j for j, value in enumerate(values) if math.isfinite(value)]
        add_line(
            figure, [x[j] for j in known], [values[j] for j in known], _SHARES[name], Style.of(i),
            hover=[hover[j] for j in known],
        )  # fmt: skip
        figure.data[-1].yaxis = "y2"
    if shares:
        quiet = {
            name: figure.layout["yaxis"][name] for name in ("gridcolor", "linecolor", "zerolinecolor", "automargin")
        }
        quiet |= {"title_standoff": 10, "title_font_size": 13, "tickfont_size": 12}
        lower = {**quiet, "anchor": "x", "domain": [0, 0.44], "range": [-0.03, 1.05], "title_text": "share"}
        figure.update_layout(yaxis_domain=[0.56, 1], yaxis2=lower, xaxis_anchor="y2")
    figure.update_layout(yaxis_rangemode="tozero")
    note = (
        f"{int(rows['n'].iloc[0]):,} predictions per snapshot. H1 is the least loss of a model that knows the counts "
    )
    note += "of single tokens only, H2 of one that knows pairs."
    if phases is not None:
        note += " " + _mark(figure, axis, phases, "y2" if shares else "y")
    axis.apply(figure)
    return Chart(figure, rows.reset_index(drop=True), note)


def _mark(figure: go.Figure, axis: SnapshotAxis, phases: Frame, y: str) -> str:
    """Draw the turning point into a panel; in words."""
    found = phases.set_index("event")
    if "turning_point" not in found.index or pd.isna(found.loc["turning_point", "snapshot"]):
        return "There is no turning point: the features are never behind the fall of the bigram KL."
    point = found.loc["turning_point"]
    at, low, high = (axis.x([int(point[name])])[0] for name in ("snapshot", "low", "high"))
    figure.add_scatter(
        x=[low, high, high, low], y=[0, 0, 1, 1], fill="toself", fillcolor=_FAINT, mode="none", hoverinfo="skip",
        showlegend=False, yaxis=y, meta="band",
    )  # fmt: skip
    figure.add_scatter(
        x=[at, at], y=[0, 1], mode="lines", line={"color": MUTED, "dash": "dot", "width": 2}, name="turning point",
        hoverinfo="skip", yaxis=y,
    )  # fmt: skip
    text = (
        f"The turning point is {shown(point['label'])} (95 % interval, with the spacing of snapshots, "
        f"{shown(axis.labels[int(point['low'])])} to {shown(axis.labels[int(point['high'])])}): there the fall of the "
        f"bigram KL leads the settling of features most, by {point['lead']:.2f} ({point['lead_low']:.2f} to "
        f"{point['lead_high']:.2f})."
    )
    if "settling" in found.index and not pd.isna(found.loc["settling", "snapshot"]):
        text += f" Half of the features have settled by {shown(found.loc['settling', 'label'])}."
    return text


def probe_parts(table: Frame) -> Chart:
    """Correlation of probe error and decoder norm, and of its parts, with intervals.

    Args:
        table: of `probe_parts`.
    """
    names = [_PARTS.get(str(part), shown(part)) for part in table["part"]]
    figure = new_figure("", height=140 + 40 * len(names))
    for i, measure in enumerate(("spearman", "pearson")):
        values, low, high = (floats(table[f"{measure}{end}"]) for end in ("", "_low", "_high"))
        style = Style.of(i)
        figure.add_scatter(
            x=values,
            y=[row + (0.12 if i else -0.12) for row in range(len(names))],
            mode="markers",
            name=measure.capitalize(),
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [b - a for a, b in zip(values, high, strict=True)],
                "arrayminus": [a - b for a, b in zip(values, low, strict=True)],
                "color": style.color,
                "thickness": 1.5,
            },
            customdata=[
                [name, f"{a:.2f} to {b:.2f}, {n:,} points"]
                for name, a, b, n in zip(names, low, high, ints(table["n"]), strict=True)
            ],
            hovertemplate="<b>%{fullData.name}</b>, %{customdata[0]}<br>%{x:.3f}<br>%{customdata[1]}<extra></extra>",
        )
    figure.update_yaxes(
        autorange="reversed", showgrid=False, zeroline=False, tickvals=list(range(len(names))), ticktext=names
    )
    figure.update_xaxes(title_text="correlation", range=[-1.03, 0.53], showgrid=True)
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    last = table.iloc[-1]
    note = (
        f"Without step 0 probe errors vary by {last['sd_error']:.3f} and relative norms by {last['sd_norm']:.2f} "
        f"(standard deviations); the errors' reliability is {last['reliability']:.2f}. Where a feature can be read off "
        "every snapshot there is little for a norm to explain."
    )
    return Chart(figure, table.reset_index(drop=True), note)


def agreement(table: Frame) -> Chart | str:
    """Mean agreement of neighbouring snapshots on where features are strongest, by how strong their decoders are.

    Args:
        table: of `top_agreement`.
    """
    known = table.dropna(subset=["agreement"])
    if known.empty:
        return "No feature has a direction at two neighbouring snapshots."
    pairs = known.rename(columns={"snapshot": "before"}).assign(
        snapshot=known["other"], label=known["other_label"], step=known["other_step"]
    )
    axis = SnapshotAxis.of(pairs)
    figure = new_figure("tokens in common (share)", yaxis_range=[-0.03, 1.05])
    chance = float(known["chance"].iloc[0])
    add_level(figure, chance, "chance")
    drawn: list[Frame] = []
    for i, (low, high) in enumerate(zip(_NORM_BANDS, _NORM_BANDS[1:], strict=False)):
        band = pairs[(pairs["norm"] > low) & (pairs["norm"] <= high)]
        if band.empty:
            continue
        means = band.groupby("snapshot")["agreement"].agg(["mean", "size"]).reset_index()
        ids = ints(means["snapshot"])
        texts = [f"{text}, {n:,} features" for text, n in zip(axis.hover(ids), ints(means["size"]), strict=True)]
        add_line(figure, axis.x(ids), floats(means["mean"]), f"norm {low:g} to {high:g}", Style.of(i), hover=texts)
        drawn.append(means.assign(norm_from=low, norm_to=high))
    axis.apply(figure)
    note = (
        "Each point compares a snapshot with the one before it; norms are the smaller of the two, relative to the "
        f"feature's largest. Chance is {chance:.4f}."
    )
    return Chart(figure, pd.concat(drawn, ignore_index=True), note)


def proposal(table: Frame) -> Grid:
    """The proposed snapshots and the reasons for each.

    Args:
        table: of `propose_snapshots`.
    """
    chosen = table[table["chosen"].astype(bool)]
    rows = [
        [Cell(shown(row["label"])), Cell(shown(row["stands_for"], 60)), Cell(shown(row["reason"], 240))]
        for row in chosen.to_dict("records")
    ]
    note = f"{len(chosen)} of {len(table)} snapshots; what they leave to be represented adds up to "
    note += f"{table['distance'].sum():.3f}."
    return Grid(["snapshot", "stands for", "why"], rows, table.reset_index(drop=True), note)
