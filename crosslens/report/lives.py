"""Figures of how features live: where they turn, how much room they take, what takes over from what, and whether their
decoder norms can be believed. Tables in, charts out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from crosslens.report.chart import (
    GRID,
    HEAT,
    MUTED,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_bars,
    add_line,
    add_matrix,
    apply_colors,
    floats,
    ints,
    new_figure,
    shown,
)

MAX_POINTS = 4000  # that are drawn


def turning(table: Frame) -> Chart | str:
    """Features by the pair of neighbouring snapshots between which they make their largest turn.

    Args:
        table: of `turning`.
    """
    if not table["turned"].sum():
        return "No feature changes its direction between neighbouring snapshots."
    names = [f"{shown(a, 10)} → {shown(b, 10)}" for a, b in zip(table["from"], table["to"], strict=True)]
    figure = new_figure("features that turn most here", bargap=0.25)
    figure.add_bar(
        x=list(range(len(table))),
        y=ints(table["turned"]),
        marker={"color": [SERIES[1] if point else SERIES[0] for point in table["turning_point"]]},
        customdata=[
            [name, f"{n:,} features with a direction at both, median cosine {cosine:.3f}"]
            for name, n, cosine in zip(names, ints(table["n"]), floats(table["median_cosine"]), strict=True)
        ],
        hovertemplate="<b>%{customdata[0]}</b><br>%{y} features<br>%{customdata[1]}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(
        title_text="between snapshots",
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=names,
        tickangle=-45,
    )
    row = table.loc[table["turning_point"]].iloc[0]
    note = (
        f"The turning point lies between {row['from']} and {row['to']}: {row['share']:.0%} of the "
        f"{int(table['turned'].sum()):,} features that turn at all do so there."
    )
    return Chart(figure, table.reset_index(drop=True), note)


def cosines(table: Frame) -> Chart | str:
    """Median cosine of decoder rows between every two snapshots.

    Args:
        table: of `study_evolution`, "cosines".
    """
    if not table["n"].sum():
        return "No feature has a direction at two snapshots."
    axis = SnapshotAxis.of(table, even=True)
    ids = list(axis.labels)
    median = table.pivot(index="snapshot", columns="other", values="median").to_numpy(dtype=float)
    low, high, n = (table.pivot(index="snapshot", columns="other", values=c).to_numpy() for c in ("low", "high", "n"))
    hover = axis.hover(ids)
    figure = new_figure("", height=180 + 30 * len(ids))
    texts = [
        [
            f"{hover[a]}<br>{hover[b]}<br>median {median[a, b]:.3f}, half of the {int(n[a, b]):,} features from "
            f"{low[a, b]:.3f} to {high[a, b]:.3f}"
            for b in range(len(ids))
        ]
        for a in range(len(ids))
    ]
    add_matrix(figure, median, texts, axis.x(ids), list(axis.names().values()))
    least = min(0.0, float(np.nanmin(median)))
    apply_colors(figure, HEAT, {least: f"{least:.1f}".replace("-", "−"), 1.0: "1, the same direction"})
    axis.apply(figure)
    return Chart(figure, table.reset_index(drop=True))


def dimensionality(table: Frame) -> Chart:
    """Share of the space that present features fill, beside random directions, and how many they are.

    Args:
        table: of `total_dimensionality`.
    """
    axis = SnapshotAxis.of(table)
    ids = ints(table["snapshot"])
    figure = new_figure("sum of D / d_model", height=340)
    for i, (column, name) in enumerate((("share", "features"), ("random_share", "random directions"))):
        add_line(figure, axis.x(ids), floats(table[column]), name, Style.of(i), hover=axis.hover(ids))
    figure.update_yaxes(rangemode="tozero")
    axis.apply(figure)
    first, last = table.iloc[0], table.iloc[-1]
    note = (
        f"Present: {int(first['present']):,} features at {first['label']}, {int(last['present']):,} at {last['label']}."
    )
    return Chart(figure, table.reset_index(drop=True), note)


def scaling(table: Frame, evolution: Frame) -> Chart | str:
    """Latent scaling along the direction at the peak against the decoder norm, a point per live feature and snapshot.

    Args:
        table: of `LatentScaling.to_frame`.
        evolution: of `evolve`.
    """
    norms = [str(name) for name in evolution.columns if str(name).startswith("norm/")]
    labels = [name.removeprefix("norm/") for name in norms]
    alive = evolution["alive"].to_numpy(dtype=bool)
    norm = evolution.loc[alive, norms].to_numpy(dtype=float)
    top = norm.max(1, keepdims=True)
    found = table.loc[alive, [f"peak/{label}" for label in labels]].to_numpy(dtype=float)
    v, beta = norm / top, found / top
    keep = np.isfinite(beta)
    if not keep.any():
        return "No feature fires on the held-out tokens."
    feature, snapshot = np.nonzero(keep)
    data = pd.DataFrame(
        {
            "feature": evolution.loc[alive, "feature"].to_numpy()[feature],
            "label": np.array(labels, dtype=object)[snapshot],
            "strength": v[keep],
            "scaling": beta[keep],
        }
    )
    drawn = data.iloc[np.unique(np.linspace(0, len(data) - 1, min(MAX_POINTS, len(data))).round().astype(int))]
    figure = new_figure("latent scaling / largest norm", height=440)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="the norm can be believed", line={"color": MUTED, "dash": "dot"}
    )
    figure.add_scattergl(
        x=floats(drawn["strength"]),
        y=floats(drawn["scaling"]),
        mode="markers",
        name="a feature at a snapshot",
        marker={"size": 4, "opacity": 0.4, "color": SERIES[0]},
        customdata=[[int(f), shown(label, 40)] for f, label in zip(drawn["feature"], drawn["label"], strict=True)],
        hovertemplate="feature %{customdata[0]}<br>%{customdata[1]}<br>norm %{x:.3f}, scaling %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="decoder norm / its largest", showgrid=True, gridcolor=GRID, zeroline=False)
    absent = v[keep] < 0.5
    hidden = float((beta[keep][absent] >= 0.5).mean()) if absent.any() else 0.0
    note = (
        f"Of {int(absent.sum()):,} absences (norm below half of the largest), {hidden:.1%} are not: the direction is "
        "there to half of its largest norm or more, and a small decoder row hides it."
    )
    if len(drawn) < len(data):
        note += f" {len(drawn):,} of {len(data):,} points are drawn, evenly spaced."
    return Chart(figure, data, note)


def encoder(table: Frame, evolution: Frame) -> Chart | str:
    """From which snapshots features are read, by the snapshot of their birth: the median share.

    Args:
        table: of `encoder_share`, a column share/<label> per snapshot.
        evolution: of `evolve`.
    """
    columns = [str(name) for name in table.columns if str(name).startswith("share/")]
    labels = [name.removeprefix("share/") for name in columns]
    birth = evolution["birth"].where(evolution["alive"].astype(bool))
    known = birth.notna() & table[columns].notna().all(axis=1)
    if not known.any():
        return "No feature has a birth."
    rows = table.loc[known, columns].groupby(birth[known].astype(int)).median()
    counts = birth[known].astype(int).value_counts()
    shares = rows.to_numpy(dtype=float)
    figure = new_figure("born at", height=180 + 28 * len(rows))
    names = [f"{shown(labels[int(b)], 14)} ({int(counts[b])})" for b in rows.index]
    texts = [
        [f"born at {name}<br>read at {shown(label)}: {value:.1%}" for label, value in zip(labels, row, strict=True)]
        for name, row in zip(names, shares, strict=True)
    ]
    add_matrix(figure, shares, texts, range(len(labels)), names)
    apply_colors(figure, HEAT, {0.0: "0 %", float(shares.max()): f"{shares.max():.0%} of what makes it active"})
    figure.update_xaxes(
        title_text="read at", tickmode="array", tickvals=list(range(len(labels))),
        ticktext=[shown(label, 14) for label in labels], tickangle=-45,
    )  # fmt: skip
    before = [line[: int(b)].sum() for b, line in zip(rows.index, shares, strict=True) if b > 0]
    note = "Below the diagonal: features are read at snapshots before their birth."
    if before:
        note += f" Those shares sum to {max(before):.0%} at most."
    data = rows.reset_index().rename(columns={"birth": "born"})
    return Chart(figure, data, note)


def takeovers(found: Frame, partings: Frame, snapshots: Frame) -> Chart | str:
    """Features that split, merge, or take over, by snapshot.

    Args:
        found: of `successions`.
        partings: of `partings`.
        snapshots: snapshot, label, step.
    """
    axis = SnapshotAxis.of(snapshots, even=True)
    ids = list(axis.labels)
    kinds = {
        "taken over by another feature": found["birth"],
        "two features part": partings.loc[partings["kind"] == "split", "at"],
        "two features merge": partings.loc[partings["kind"] == "merger", "at"],
    }
    counts = pd.DataFrame(
        {name: pd.Series(dates).astype(int).value_counts().reindex(ids, fill_value=0) for name, dates in kinds.items()}
    )
    if not counts.to_numpy().sum():
        return "No feature splits, merges, or is taken over by another at these thresholds."
    figure = new_figure("pairs of features", barmode="group", bargap=0.25)
    add_bars(figure, axis, counts, "pairs")
    axis.apply(figure)
    data = counts.rename_axis("snapshot").reset_index()
    data.insert(1, "label", [axis.labels[i] for i in ids])
    return Chart(figure, data, f"{int(counts.to_numpy().sum()):,} pairs in all.")
