"""When a task's features begin, by five readings; R2 on paired prompts; and what is represented and read out."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crosslens.causal.dates import DATES
from crosslens.evolution.concepts import PRESENCE
from crosslens.report.chart import (
    AT,
    FEATURES,
    GRID,
    HEAT,
    MUTED,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_level,
    add_matrix,
    add_series,
    apply_colors,
    feature_names,
    floats,
    ints,
    name_rows,
    over_snapshots,
    shown,
)
from crosslens.report.entries import figure

N_CURVES = 6
_SURE = 0.05
_STATES = ("neither", "represented", "read out", "both")


@figure(
    "dates",
    section="dates",
    title="Dates of the top features",
    tables=("dates/<task>", "snapshots", "names"),
    wide=True,
    optional=True,
)
def dates(table: Frame, snapshots: Frame, names: Frame | None = None) -> Chart | str:
    """A row per feature with the largest |IE| at the last snapshot; a mark where each of the readings above first holds
    for two snapshots in a row. Bars are 95% intervals of these dates. The vertical line is where the model succeeds at
    the task.

    Args:
        table: from `feature_dates`.
        snapshots: snapshot, label, step.
        names: feature, name.
    """
    if table.empty:
        return "No feature is dated."
    figure, axis = over_snapshots(snapshots, "", even=True, height=170 + 34 * len(table))
    called = feature_names(names, 24)
    rows = [shown(called(feature), 24) for feature in ints(table["feature"])]
    kinds = [kind for kind in DATES if kind != "succeeds"]
    for i, kind in enumerate(kinds):
        known = np.flatnonzero(table[kind].notna())
        ends = table[[kind, f"{kind}_low", f"{kind}_high"]].iloc[known].ffill(axis=1)  # some have no interval
        # never is drawn as the last snapshot
        places, low, high = ends.clip(upper=len(axis.labels) - 1).to_numpy(dtype=int).T.tolist()
        texts = [
            text if a == b else f"{text}<br>95% interval {axis.labels[a]} to {axis.labels[b]}"
            for text, a, b in zip(axis.hover(places), low, high, strict=True)
        ]
        style = Style.of(i)
        figure.add_scatter(
            x=axis.x(places),
            # dates at the same snapshot would hide each other
            y=[row + 0.16 * (i - (len(kinds) - 1) / 2) for row in known.tolist()],
            mode="markers",
            name=DATES[kind],
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            error_x={
                "type": "data",
                "symmetric": False,
                "thickness": 1.5,
                "width": 0,
                "array": np.subtract(high, places).clip(0).tolist(),
                "arrayminus": np.subtract(places, low).clip(0).tolist(),
            },
            customdata=[
                [ints(table["feature"])[row], rows[row], text] for row, text in zip(known.tolist(), texts, strict=True)
            ],
            hovertemplate="%{customdata[1]}<br>%{fullData.name}: %{customdata[2]}<extra></extra>",
            meta=FEATURES,
            showlegend=True,
        )
    at = table["succeeds"].dropna()
    if len(at):
        figure.add_vline(
            x=axis.x([int(at.iloc[0])])[0],
            line={"color": MUTED, "dash": "dash", "width": 1.5},
            name=DATES["succeeds"],
            showlegend=True,
        )
    name_rows(figure, rows, autorange=None, range=[len(rows) - 0.5, -0.5])
    for edge in range(1, len(rows)):
        figure.add_hline(y=edge - 0.5, line={"color": GRID, "width": 1})
    figure.update_xaxes(range=[-0.5, len(axis.labels) - 0.5])
    parts = [f"{words} {_middle(table[kind], axis)}" for kind, words in DATES.items()]
    if len(at):
        low, high = ints(table.loc[at.index[0], ["succeeds_low", "succeeds_high"]].clip(upper=len(axis.labels) - 1))
        parts[-1] += f" (95% interval {axis.labels[low]} to {axis.labels[high]})" * (low < high)
    missing = int(table["concept"].isna().sum())
    note = f"Median dates: {'; '.join(parts)}."
    if missing:
        note += f" For {missing} of {len(table)} features no concept is readable on the paired prompts (q ≤ {_SURE:g})."
    return Chart(figure, table, note)


def _middle(dates: pd.Series, axis: SnapshotAxis) -> str:
    known = dates.dropna()
    return axis.names()[int(np.quantile(known, 0.5, method="lower"))] if len(known) else "never"


@figure(
    "concepts",
    section="dates",
    title="Concept readable: R² on paired prompts",
    tables=("concepts/<task>.curves", "concepts/<task>", "dates/<task>", "names"),
    optional=True,
)
def concept_curves(curves: Frame, births: Frame, dated: Frame, names: Frame | None = None) -> Chart | str:
    """How well the difference between a snapshot's activations on two paired prompts predicts the difference of the
    feature, by ridge regression fitted on the pairs of other groups of prompts. Bands are 95% intervals over groups.

    Args:
        curves: from `concept_births`.
        births: from there, too.
        dated: whose features are drawn.
        names: feature, name.
    """
    drawn = [feature for feature in ints(dated["feature"]) if feature in set(ints(births["feature"]))][:N_CURVES]
    born = births[(births["birth"] > 0) & (births["q"] <= _SURE)]
    note = (
        f"{len(born):,} of {births['feature'].nunique():,} features that tell the pairs apart have a concept that is "
        f"born after the first snapshot (q ≤ {_SURE:g})."
    )
    if not drawn:
        return f"None of the features with the largest effects tells the pairs apart at this position. {note}"
    figure, axis = over_snapshots(curves, "R² on paired prompts", yaxis_range=[-0.25, 1.05])
    add_level(figure, 0, "no better than 0")
    called = feature_names(names, 18)
    for i, feature in enumerate(drawn):
        rows = curves[curves["feature"] == feature].sort_values("snapshot")
        clipped = rows.assign(r2_low=rows["r2_low"].clip(lower=-0.25))
        name = shown(called(feature), 22)
        add_series(figure, axis, clipped, "r2", name, Style.of(i), band=True, meta={"feature": feature})
    return Chart(figure, curves[curves["feature"].isin(drawn)], note)


@figure(
    "read-out",
    section="dates",
    title="Represented and read out",
    tables=("read_out/<task>", "concepts/<task>.curves", "concepts/<task>", "names"),
    optional=True,
    columns={"state": "neither, represented, read out or both."},
)
def represented_and_read(
    read: Frame, curves: Frame | None = None, births: Frame | None = None, names: Frame | None = None
) -> Chart | str:
    """Represented: R² on paired prompts is at least .7 of its largest. Read out: the feature's values at the last
    snapshot, put into this one, move the metric by a tenth or more of what they do at the last, and by more than random
    directions do. On the held-out half of the prompts.

    Args:
        read: from `read_out`.
        curves: from `concept_births`.
        births: from there, too.
        names: feature, name.
    """
    single = read[read["feature"].notna()].astype({"feature": int})
    if not single["share"].notna().any():
        return "No feature has a sure effect at the last snapshot when exchanged with the paired prompt."
    if curves is None or births is None:
        single = single.assign(r2=np.nan, represented=False)
    else:
        largest = births.set_index("feature")["r2"].where(births.set_index("feature")["readable_q"] <= _SURE)
        single = single.merge(curves[["feature", "snapshot", "r2"]], on=["feature", "snapshot"], how="left")
        single["represented"] = single["r2"] >= PRESENCE * single["feature"].map(largest)
    single["state"] = [_STATES[a + 2 * b] for a, b in zip(single["represented"], single["read_out"], strict=True)]
    features = list(dict.fromkeys(single["feature"].tolist()))
    called = feature_names(names, 24)
    rows = {feature: shown(called(feature), 24) for feature in features}
    figure, axis = over_snapshots(single, "", even=True, height=170 + 26 * len(rows))
    single["text"] = [
        f"{rows[row.feature]}<br>{hover}<br>{row.state}<br>share of the late effect {row.share:.2f}, random "
        f"{row.random_share:.2f}<br>R² on pairs {row.r2:.2f}".replace("nan", "unknown")
        for row, hover in zip(single.itertuples(), axis.hover(single["snapshot"]), strict=True)
    ]
    sure = single.groupby("feature")["share"].transform("count") > 0
    cells = single.assign(state=single["state"].map(_STATES.index).where(sure))
    add_matrix(figure, cells, "state", ("feature", rows), ("snapshot", axis.positions))
    colors = (HEAT[0], SERIES[1], HEAT[2], SERIES[0])
    apply_colors(figure, colors, dict(enumerate(_STATES)))
    figure.update_layout(coloraxis_showscale=False, showlegend=True)  # four states are no scale
    for state, color in zip(_STATES, colors, strict=True):
        marker = {"symbol": "square", "size": 10, "color": color}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=state, marker=marker, showlegend=True)
    together = read[read["feature"].isna()].sort_values("snapshot")
    begins = together.loc[together["read_out"].astype(bool), "label"]
    random = floats(together["random_share"])
    note = "All of them together are read out " + (f"from {begins.iloc[0]} on." if len(begins) else "nowhere.")
    if np.isfinite(random).any():
        note += f" Random directions of their size reach {np.nanmax(random):.2f} of the late effect at most."
    if blank := single.loc[~sure, "feature"].nunique():
        note += f" Rows without colour, {blank}, have no sure effect at the last snapshot."
    columns = ["feature", *AT, "state", "share", "mapped_share", "random_share", "r2"]
    return Chart(figure, single[columns], note)
