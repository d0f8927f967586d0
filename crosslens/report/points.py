"""A cloud of points, one per feature and snapshot, coloured by the snapshot."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from crosslens.report.chart import HEAT, Frame, SnapshotAxis, apply_colors, floats, ints


def add_points(
    figure: go.Figure, axis: SnapshotAxis, table: Frame, x: str, y: str, texts: Sequence[str], of: str
) -> None:
    """Points of a table with the columns feature and snapshot.

    Args:
        figure: to draw on.
        axis: of the snapshots.
        table: a row per point.
        x: column along x.
        y: column along y.
        texts: what is said of the snapshot of each point.
        of: what is said of its place, as plotly's template.
    """
    order = {snapshot: i for i, snapshot in enumerate(axis.labels)}
    names = list(axis.names().values())
    figure.add_scatter(
        x=floats(table[x]),
        y=floats(table[y]),
        mode="markers",
        showlegend=False,
        marker={
            "size": 6,
            "opacity": 0.75,
            "color": [order[s] for s in ints(table["snapshot"])],
            "coloraxis": "coloraxis",
        },
        customdata=[[feature, text] for feature, text in zip(ints(table["feature"]), texts, strict=True)],
        hovertemplate=f"feature %{{customdata[0]}}<br>%{{customdata[1]}}<br>{of}<extra></extra>",
    )
    # without the faint shades: a point needs more contrast than an area
    apply_colors(figure, HEAT[2:], {0: names[0], max(1, len(names) - 1): names[-1]})
