"""How the directions of features turn."""

from __future__ import annotations

import numpy as np

from crosslens.report.chart import (
    HEAT,
    SERIES,
    Chart,
    Frame,
    Style,
    add_line,
    add_matrix,
    apply_colors,
    ints,
    named_ticks,
    new_figure,
    new_panels,
    over_snapshots,
    shown,
)
from crosslens.report.entries import figure


@figure("rotation-rate", section="evolution", title="Rotation", tables=("rotation",), wide=True, optional=True)
def rotation_rate(table: Frame) -> Chart | str:
    """Median angle between a feature's decoder vectors at neighbouring snapshots, per interval and per doubling of the
    training tokens (of steps where tokens are unknown). The null is the angle between two estimates of the same vector
    on different halves of the held-out tokens: what sampling alone makes of no rotation. Compare it with the angle
    between such estimates at neighbouring snapshots. A change of basis that all activations share turns every vector:
    the angle after the linear map between the two snapshots leaves it out. How far two seeds differ at one snapshot
    says which angles a dictionary does not determine at all."""
    if not np.isfinite(table["angle"].to_numpy(dtype=float)).any():
        return "No feature has a decoder vector long enough to compare at two neighbouring snapshots."
    names = _intervals(table)
    per_doubling = np.isfinite(table["angle_per_doubling"].to_numpy(dtype=float)).any()
    both = ("mapped_angle", "seeds_angle")
    table = table.assign(**{name: np.nan for name in both if name not in table})
    panels: dict[str, tuple[str, ...]] = {"degrees per interval": ("angle", "halves_angle", "null_angle", *both)}
    if per_doubling:
        panels["degrees per doubling of training"] = ("angle_per_doubling", "", "null_per_doubling", "", "")
    words = (
        "decoder vectors",
        "estimates on different halves",
        "null: the same snapshot, different halves",
        "decoder vectors after the common linear map",
        "two seeds at the later snapshot",
    )
    figure = new_panels(len(panels), height=420)
    for col, (title, columns) in enumerate(panels.items(), 1):
        for i, (column, name) in enumerate(zip(columns, words, strict=True)):
            if column and np.isfinite(table[column].to_numpy(dtype=float)).any():
                add_line(
                    figure, range(len(table)), table, column, name, Style.of(i), hover=names,
                    value=f"%{{y:.2f}} {title}", showlegend=col == 1, row=1, col=col,
                )  # fmt: skip
        figure.update_yaxes(title_text=title, row=1, col=col)
    figure.update_xaxes(named_ticks(names, slanted=True)).update_yaxes(rangemode="tozero")
    note = "Medians over live features with a direction at both snapshots."
    if not np.isfinite(table["seeds_angle"].to_numpy(dtype=float)).any():
        note += " One seed was trained, so how far two seeds differ is not known."
    if per_doubling:
        rates = table["angle_per_doubling"].to_numpy(dtype=float)
        low, high = (table.iloc[int(find(rates))] for find in (np.nanargmin, np.nanargmax))
        ends = [
            f"{row['angle_per_doubling']:.1f}° ({row['from']} to {row['to']}{', an end' * bool(row['at_edge'])})"
            for row in (low, high)
        ]
        note += (
            f" From {ends[0]} to {ends[1]} per doubling: a rate to compare intervals by, not the angle that a doubling "
            "reaches, since directions also turn back."
        )
    return Chart(figure, table, note)


@figure("rotation", section="evolution", title="Rotation by interval", tables=("rotation",), optional=True)
def rotation(table: Frame) -> Chart | str:
    """Number of features whose decoder vector rotates more between these two snapshots than in any other interval.
    Intervals that span more of the training leave more room for it: the rate per doubling allows for that. Vectors
    shorter than a twentieth of the feature's largest norm are ignored."""
    if not table["rotated"].sum():
        return "No feature changes direction between neighbouring snapshots."
    names = _intervals(table)
    figure = new_figure("features that rotate most here", bargap=0.25)
    figure.add_bar(
        x=list(range(len(table))),
        y=ints(table["rotated"]),
        marker={"color": [SERIES[1] if point else SERIES[0] for point in table["largest"]]},
        hovertext=[
            f"<b>{name}</b><br>{row.rotated} features<br>{row.n:,} features with a direction at both snapshots, median "
            f"cosine {row.median_cosine:.3f}" + "<br>at an end of the snapshots" * bool(row.at_edge)
            for name, row in zip(names, table.itertuples(), strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="between snapshots", **named_ticks(names, slanted=True))
    row = table.loc[table["largest"]].iloc[0]
    note = (
        f"{row['share']:.0%} of the {int(table['rotated'].sum()):,} features that change direction rotate most between "
        f"{row['from']} and {row['to']} (orange)."
    )
    if row["at_edge"]:
        note += " This is an end of the snapshots: these features may rotate more outside of them."
    return Chart(figure, table, note)


@figure(
    "cosines",
    section="evolution",
    title="Similarity of directions between snapshots",
    tables=("cosines",),
    optional=True,
)
def cosines(table: Frame) -> Chart | str:
    """Median cosine between a live feature's decoder vectors at two snapshots. 1 is the same direction; random
    directions have about 0.

    Args:
        table: "cosines" from `evolve`.
    """
    if not table["n"].sum():
        return "No feature has a decoder vector long enough to compare at two snapshots."
    figure, axis = over_snapshots(table, "", even=True, height=180 + 30 * table["snapshot"].nunique())
    texts = [
        f"{one}<br>{other}<br>median {row.median:.3f}, interquartile range {row.lower_quartile:.3f} to "
        f"{row.upper_quartile:.3f}, {row.n:,} features"
        for one, other, row in zip(
            axis.hover(table["snapshot"]), axis.hover(table["other"]), table.itertuples(), strict=True
        )
    ]
    cells = table.assign(text=texts)
    add_matrix(figure, cells, "median", ("snapshot", axis.names()), ("other", axis.positions))
    least = min(0.0, float(table["median"].min()))
    apply_colors(figure, HEAT, {least: f"{least:.1f}".replace("-", "−"), 1.0: "1, same direction"})
    return Chart(figure, table)


def _intervals(table: Frame) -> list[str]:
    """Names of the intervals in the rows of a table."""
    return [f"{shown(a, 10)} → {shown(b, 10)}" for a, b in zip(table["from"], table["to"], strict=True)]
