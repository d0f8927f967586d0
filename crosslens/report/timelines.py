"""Figures of what becomes of things over the snapshots, a row each: a task's features, edges between features; and the
overlap of languages. Tables in, charts out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from crosslens.report.chart import (
    HEAT,
    INK,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_line,
    floats,
    ints,
    new_figure,
    shown,
)

N_ROWS = 40  # features, or pairs of them, that are drawn
_GAP = 0.1  # between panels, as a share of the width
_SIGNED = (SERIES[1], HEAT[0], SERIES[0])  # below zero, zero, above


class _Panel(NamedTuple):
    """One of the heat maps side by side: a column of the table, by row and snapshot."""

    column: str
    title: str
    signed: bool
    number: str


def feature_timeline(table: Frame) -> Chart | str:
    """Decoder norm, signed effect and RelIE of a task's features, a row each, ordered by when they matter.

    Args:
        table: of `follow_features`.
    """
    if table.empty:
        return "No feature has an effect above two standard errors at any snapshot."
    largest = table["ie"].abs().groupby(table["feature"]).max().sort_values(ascending=False, kind="stable")
    kept = table[table["feature"].isin(largest.index[:N_ROWS])].sort_values(["order", "snapshot"])
    names: dict[str, str] = {}
    for feature, examples in kept.drop_duplicates("feature")[["feature", "examples"]].itertuples(index=False):
        word = str(examples).partition("]")[0].rpartition("[")[2]
        names[str(feature)] = f"{feature} {shown(word, 12)}" if word else str(feature)
    texts = [shown(text, 110) for text in kept.drop_duplicates("feature")["examples"]]
    panels = (
        _Panel("strength", "decoder norm / its largest", False, ".2f"),
        _Panel("ie", "IE (logits)", True, "+.3f"),
        _Panel("relie", "RelIE (share)", False, ".2f"),
    )
    figure = _panels(kept.assign(row=kept["feature"].astype(str)), panels, names, texts)
    marked = kept[kept["top"].astype(bool)]
    axis = SnapshotAxis.of(kept, even=True)
    figure.add_scatter(
        x=axis.x(ints(marked["snapshot"])),
        y=[list(names).index(str(feature)) for feature in marked["feature"]],
        xaxis="x2",
        mode="markers",
        name="among the top features of the snapshot",
        marker={"symbol": "circle", "size": 5, "color": INK},
        hoverinfo="skip",
        showlegend=True,
    )
    total = table["feature"].nunique()
    note = (
        "Rows are ordered by the centre of mass of RelIE: what matters early stands above what matters late. Behind "
        "the number of a feature stands the word at which it is most active."
    )
    if total > N_ROWS:
        note += f" The {N_ROWS} features of largest |IE| are drawn, of {total:,}."
    columns = [name for name in table if name != "order"]
    return Chart(figure, kept[columns].reset_index(drop=True), note)


def edge_timeline(table: Frame) -> Chart | str:
    """Effects of lower features on upper ones, a row per pair: to first order, and by intervention.

    Args:
        table: of `Edges.to_frame`.
    """
    pairs = table["lower"].astype(str) + " → " + table["upper"].astype(str)
    largest = table["effect"].abs().groupby(pairs).max().sort_values(ascending=False, kind="stable")
    largest = largest[largest > 0]
    if largest.empty:
        return "No lower feature acts on any upper one."
    table = table.assign(row=pairs)
    kept = table[pairs.isin(largest.index[:N_ROWS])]
    # by when they are strong: the mean snapshot, weighted by the size of the edge
    size = kept["effect"].abs()
    when = (size * kept["snapshot"]).groupby(kept["row"]).sum() / size.groupby(kept["row"]).sum()
    kept = kept.assign(order=kept["row"].map(when)).sort_values(["order", "row", "snapshot"], kind="stable")
    names = {str(row): str(row) for row in kept["row"].unique()}
    panels = (
        _Panel("effect", "to first order", True, "+.3f"),
        _Panel("exact", "by intervention", True, "+.3f"),
    )
    figure = _panels(kept, panels, names, [""] * len(names))
    note = (
        "What the upper feature loses, summed over positions, when the lower one is set to its baseline. Rows are "
        "ordered by when the edge is strong; blank where no intervention was made."
    )
    if len(largest) > N_ROWS:
        note += f" The {N_ROWS} strongest pairs are drawn, of {len(largest):,}."
    return Chart(figure, kept.drop(columns=["row", "order"]).reset_index(drop=True), note)


def language_overlap(table: Frame) -> Chart:
    """Features shared by the top sets of two languages, over the band of what chance gives.

    Args:
        table: of `compare_languages`, of one k.
    """
    axis = SnapshotAxis.of(table)
    figure = new_figure("features shared")
    for i, ((one, other), rows) in enumerate(table.groupby(["language", "other"], sort=False)):
        rows = rows.sort_values("snapshot")
        ids = ints(rows["snapshot"])
        texts = [f"{hover}, p = {p:.2g}" for hover, p in zip(axis.hover(ids), floats(rows["p"]), strict=True)]
        name = f"{shown(one)}, {shown(other)}"
        style = Style.of(i)
        add_line(figure, axis.x(ids), floats(rows["shared"]), name, style, hover=texts, number="d")
        add_line(
            figure, axis.x(ids), floats(rows["expected"]), f"{name}, by chance", Style(style.color, "line-ew", "dot"),
            hover=axis.hover(ids), number=".1f", low=floats(rows["low"]), high=floats(rows["high"]), markers=False,
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    axis.apply(figure)
    k = ", ".join(str(size) for size in sorted(set(ints(table["k"]))))
    level = f"{float(table['level'].iloc[0]):.0%}"
    note = f"Sets of k = {k}. Bands: {level} of random draws from the features that are active in both languages."
    return Chart(figure, table.reset_index(drop=True), note)


def _panels(table: Frame, panels: tuple[_Panel, ...], names: dict[str, str], texts: list[str]) -> go.Figure:
    """Heat maps side by side, with one row for each of `names`.

    Args:
        table: with the columns row, snapshot, label and those of the panels.
        panels: from left to right.
        names: what to write beside each row, by row.
        texts: to add to what hovering over a row shows.
    """
    axis = SnapshotAxis.of(table, even=True)
    ids, rows = list(axis.labels), list(names)
    height = 190 + 20 * len(rows)
    figure = new_figure("", height=height)
    figure.update_layout(margin_t=114)
    width = (1 - _GAP * (len(panels) - 1)) / len(panels)
    positions, ticks = list(axis.positions.values()), list(axis.names().values())
    ends = sorted({0, len(ids) - 1})
    common: Any = figure.layout["xaxis"].to_plotly_json()
    signed = [table[panel.column].abs().max() for panel in panels if panel.signed]
    largest = float(np.nanmax([*signed, 0.0])) or 1.0  # one scale for all that are signed
    hover = [[f"{name}<br>{text}" for text in axis.hover(ids)] for name in names.values()]
    for n, panel in enumerate(panels):
        suffix = "" if n == 0 else str(n + 1)
        left = n * (width + _GAP)
        wide = table.pivot(index="row", columns="snapshot", values=panel.column).reindex(index=rows, columns=ids)
        figure.add_heatmap(
            z=[floats(row) for row in wide.to_numpy(dtype=float)],
            x=positions,
            y=list(range(len(rows))),
            xaxis=f"x{suffix}",
            coloraxis=f"coloraxis{suffix}",
            text=[[f"{cell}: {panel.title} {_written(value, panel.number)}" + (f"<br>{text}" if text else "")
                   for cell, value in zip(line, floats(values), strict=True)]
                  for line, values, text in zip(hover, wide.to_numpy(dtype=float), texts, strict=True)],
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            ygap=1,
        )  # fmt: skip
        figure.layout[f"xaxis{suffix}"] = {
            **common,
            "domain": [left, left + width],
            "anchor": "y",
            "tickmode": "array",
            # more than the two ends do not fit below a third of the page
            "tickvals": [positions[i] for i in ends],
            "ticktext": [ticks[i] for i in ends],
            "range": [positions[0] - 0.5, positions[-1] + 0.5],
            "zeroline": False,
        }
        own = float(np.nanmax([*floats(table[panel.column]), 0.0])) or 1.0
        low, high = (-largest, largest) if panel.signed else (0.0, own)
        colors = _SIGNED if panel.signed else HEAT
        figure.layout[f"coloraxis{suffix}"] = {
            "cmin": low,
            "cmax": high,
            "colorscale": [[i / (len(colors) - 1), color] for i, color in enumerate(colors)],
            "colorbar": {
                "orientation": "h",
                "thickness": 10,
                "len": width,
                "x": left,
                "xanchor": "left",
                "xpad": 0,
                "yref": "container",
                "y": 1 - 30 / height,  # below the toolbar
                "yanchor": "top",
                "outlinewidth": 0,
                "ticklabelposition": "outside top",
                "ticklabeloverflow": "allow",
                # the two ends: three numbers do not fit above a third of a phone
                "tickvals": [low, high],
                "ticktext": [_written(tick, ".2g") for tick in (low, high)],
            },
        }
        # a title of the colour bar would stand on it in a low figure
        figure.add_annotation(
            text=panel.title, x=left, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", yshift=4,
            showarrow=False, font={"color": INK, "size": 13},
        )  # fmt: skip
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        tickmode="array",
        tickvals=list(range(len(rows))),
        ticktext=list(names.values()),
        tickfont={"size": 11},
    )
    return figure


def _written(value: float, number: str) -> str:
    return "not known" if not math.isfinite(value) else f"{value:{number}}".replace("-", "−")
