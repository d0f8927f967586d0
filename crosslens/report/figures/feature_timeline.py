"""The features of a task over training, side by side."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from crosslens.report.chart import (
    FEATURES,
    HEAT,
    INK,
    SIGNED,
    Chart,
    Frame,
    SnapshotAxis,
    color_axis,
    feature_names,
    floats,
    ints,
    name_rows,
    new_figure,
    shown,
)
from crosslens.report.entries import figure
from crosslens.report.figures.ablation import effects_of
from crosslens.report.figures.effects import NOTHING, largest_effects, without_chance

N_TIMELINE = 40  # features in the timeline
_GAP = 0.1  # between panels, as a fraction of the width


@figure(
    "timeline",
    section="effects",
    title="Features over training",
    tables=("timeline/<task>", "names", "chance@<task>", "attribution/<task>.snapshots"),
    wide=True,
    optional=True,
)
def feature_timeline(
    table: Frame, known: Frame | None = None, chance: Frame | None = None, snapshots: Frame | None = None
) -> Chart | str:
    """Decoder norm, signed effect (IE) and relative effect (share RelIE) by snapshot, a row per feature, for the
    features with the largest |IE|. Rows are labelled with the feature's number and the word in the prompts at which it
    is most active.

    Args:
        table: from `follow_features`.
        known: feature, name.
        chance: as in `relative_effects`.
        snapshots: as there.
    """
    if table.empty:
        return NOTHING
    table, said = without_chance(table, chance, "Share RelIE is not drawn")
    kept = table[table["feature"].isin(largest_effects(table).index[:N_TIMELINE])].sort_values(["order", "snapshot"])
    names: dict[str, str] = {}
    for feature, examples in kept.drop_duplicates("feature")[["feature", "examples"]].itertuples(index=False):
        word = str(examples).partition("]")[0].rpartition("[")[2]
        names[str(feature)] = f"{feature} {shown(word, 12)}" if word else str(feature)
    called = feature_names(known, 40)
    texts = [
        f"feature {shown(called(feature), 60)}<br>{shown(text, 110)}"
        for feature, text in kept.drop_duplicates("feature")[["feature", "examples"]].itertuples(index=False)
    ]
    panels = (
        _Panel("strength", "decoder norm / largest norm", False, ".2f"),
        _Panel("ie", "IE (logits)", True, "+.3f"),
        _Panel("share_relie", "share RelIE", False, ".2f"),
    )
    figure = _panels(kept.assign(row=kept["feature"].astype(str)), panels, names, texts)
    marked = kept[kept["top"].astype(bool)]
    axis = SnapshotAxis.of(kept, even=True)
    figure.add_scatter(
        x=axis.x(ints(marked["snapshot"])),
        y=[list(names).index(str(feature)) for feature in marked["feature"]],
        xaxis="x2",
        mode="markers",
        name="among the snapshot's top features",
        marker={"symbol": "circle", "size": 5, "color": INK},
        hoverinfo="skip",
        showlegend=True,
    )
    total = table["feature"].nunique()
    note = (
        "Rows are ordered by the centre of mass of share RelIE, from features that matter early to those that matter "
        "late."
    )
    if total > N_TIMELINE:
        note += f" The {N_TIMELINE} features with the largest |IE| are drawn, of {total:,}."
    note += effects_of(snapshots) + said
    columns = [name for name in table if name != "order"]
    return Chart(figure, kept[columns].reset_index(drop=True), note)


class _Panel(NamedTuple):
    """A heat map of one column of the table, by row and snapshot."""

    column: str
    title: str
    signed: bool
    number: str


def _panels(table: Frame, panels: tuple[_Panel, ...], names: dict[str, str], texts: list[str]) -> go.Figure:
    """Heat maps side by side, with a row for each of `names`.

    Args:
        table: columns row, snapshot, label and those of the panels.
        panels: from left to right.
        names: label of each row, by row.
        texts: added to the tooltips of each row.
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
    largest = float(np.nanmax([*signed, 0.0])) or 1.0  # one scale for all signed panels
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
            customdata=[[int(feature)] * len(ids) for feature in rows],
            meta=FEATURES,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            ygap=1,
        )  # fmt: skip
        figure.layout[f"xaxis{suffix}"] = {
            **common,
            "domain": [left, left + width],
            "anchor": "y",
            "tickmode": "array",
            # only the two ends fit below a third of the page
            "tickvals": [positions[i] for i in ends],
            "ticktext": [ticks[i] for i in ends],
            "range": [positions[0] - 0.5, positions[-1] + 0.5],
            "zeroline": False,
        }
        own = float(np.nanmax([*floats(table[panel.column]), 0.0])) or 1.0
        low, high = (-largest, largest) if panel.signed else (0.0, own)
        ends_of = {tick: _written(tick, ".2g") for tick in (low, high)}  # no more fit above a third of a phone
        figure.layout[f"coloraxis{suffix}"] = color_axis(
            SIGNED if panel.signed else HEAT, ends_of, len=width, x=left, xpad=0, y=1 - 30 / height
        )  # below the toolbar
        # in a low figure, the colour bar's own title would overlap it
        figure.add_annotation(
            text=panel.title, x=left, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", yshift=4,
            showarrow=False, font={"color": INK, "size": 13},
        )  # fmt: skip
    name_rows(figure, list(names.values()), autorange=None, range=[len(rows) - 0.5, -0.5], tickfont={"size": 11})
    return figure


def _written(value: float, number: str) -> str:
    return "unknown" if not math.isfinite(value) else f"{value:{number}}".replace("-", "−")
