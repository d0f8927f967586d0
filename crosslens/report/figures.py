"""Figures of the models and of the dictionary: accuracy, reconstruction, evolution, probes. Tables in, charts out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from crosslens.report.chart import (
    GRID,
    HEAT,
    INK,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_bars,
    add_level,
    add_line,
    apply_colors,
    floats,
    ints,
    new_figure,
    shown,
)
from crosslens.report.points import add_points

MAX_ROWS = 2000  # of the heat map; more are thinner than a pixel
MAX_POINTS = 3000  # of a scatter; more make the page slow
ORIGINS = ("initial", "emergent", "never")
FATES = ("persistent", "transient")


def accuracy(table: Frame) -> Chart:
    """Accuracy per task over snapshots, with its 95 % interval as a band."""
    axis = SnapshotAxis.of(table)
    figure = new_figure("accuracy", yaxis_tickformat=".0%", yaxis_range=[-0.03, 1.05])
    add_level(figure, 0.5, "chance")
    for i, (task, rows) in enumerate(table.groupby("task", sort=False)):
        rows = rows.sort_values("snapshot")
        ids = ints(rows["snapshot"])
        add_line(
            figure,
            axis.x(ids),
            floats(rows["accuracy"]),
            shown(task),
            Style.of(i),
            hover=axis.hover(ids),
            number=".1%",
            low=floats(rows["low"]),
            high=floats(rows["high"]),
        )
    axis.apply(figure)
    counts = table.groupby("task", sort=False)["n"].max()
    data = _pick(table, "task", "snapshot", "label", "step", "tokens", "accuracy", "low", "high", "n")
    return Chart(figure, data, "Items: " + ", ".join(f"{task} {int(n):,}" for task, n in counts.items()) + ".")


def explained_variance(table: Frame) -> Chart:
    """Explained variance of the reconstruction, both definitions."""
    names = {"explained_variance": "over all tokens", "explained_variance_per_token": "mean over tokens"}
    chart = _per_snapshot(table, names, "explained variance (share)", number=".4f")
    mean, worst = table["explained_variance"].mean(), table["explained_variance"].min()
    label = table.loc[table["explained_variance"].idxmin(), "label"]
    return Chart(chart.figure, chart.data, f"Over all tokens: mean {mean:.3f}, least {worst:.3f} at {label}.")


def l0(table: Frame) -> Chart:
    """Active features per token."""
    chart = _per_snapshot(table, {"l0": "L0"}, "L0 (features per token)", number=".2f")
    chart.figure.update_yaxes(rangemode="tozero")
    note = f"Mean {table['l0'].mean():.2f}."
    if "dead_fraction" in table:
        note += f" Dead features: {table['dead_fraction'].iloc[0]:.1%}."
    return Chart(chart.figure, chart.data, note)


def dead(table: Frame) -> Chart:
    """Share of features that no held-out token activates."""
    percent = table.assign(dead=100 * table["dead_fraction"])
    chart = _per_snapshot(percent, {"dead": "dead features"}, "dead features (%)", number=".2f")
    chart.figure.update_yaxes(rangemode="tozero")
    low, high = percent["dead"].min(), percent["dead"].max()
    return Chart(chart.figure, chart.data, f"{low:.1f} % at every snapshot." if low == high else "")


def cross_entropy(table: Frame) -> Chart:
    """Cross-entropy of the clean, spliced and zeroed models."""
    names = {"ce_clean": "clean", "ce_spliced": "spliced", "ce_zero": "zeroed"}
    chart = _per_snapshot(table, names, "cross-entropy (nats per token)")
    recovered: Any = pd.to_numeric(table["ce_recovered"], errors="coerce") if "ce_recovered" in table else pd.Series()
    known = recovered.dropna()
    if known.empty:
        note = "CE recovered is not defined at any snapshot: zeros cost less than 0.1 nat."
    else:
        note = f"CE recovered: {known.min():.3f} to {known.max():.3f}"
        missing = len(table) - len(known)
        note += f"; not defined at {missing} of {len(table)} snapshots, where zeros cost less than 0.1 nat" * bool(
            missing
        )
        note += "."
    return Chart(chart.figure, chart.data, note)


def kl(table: Frame) -> Chart:
    """KL divergence of the spliced model from the clean one."""
    chart = _per_snapshot(table, {"kl": "KL"}, "KL (nats per token)", number=".4f")
    chart.figure.update_yaxes(rangemode="tozero")
    return chart


def evolution_map(table: Frame, snapshots: Frame) -> Chart | str:
    """Heat map of normalised decoder norms, features ordered by origin, then birth, then peak.

    Args:
        table: evolution; its `norm/<label>` columns stand in the order of the snapshots.
        snapshots: snapshot, label, step.
    """
    alive = ordered_features(table)
    if alive.empty:
        return "Every feature is dead: none fired on the held-out tokens."
    columns = [name for name in table.columns if str(name).startswith("norm/")]
    chosen = alive.iloc[np.unique(np.linspace(0, len(alive) - 1, min(MAX_ROWS, len(alive))).round().astype(int))]
    norms = chosen[columns].to_numpy(dtype=float)
    v = norms / norms.max(1, keepdims=True)
    labels = [str(name).removeprefix("norm/") for name in columns]
    known = snapshots.drop_duplicates("label").set_index("label")
    order = pd.DataFrame(
        {
            "snapshot": range(len(labels)),
            "label": labels,
            "step": [known["step"].get(label) if "step" in known else None for label in labels],
        }
    )
    axis = SnapshotAxis.of(order, even=True)
    figure = new_figure("features", height=620)
    figure.add_heatmap(
        # bytes, which plotly writes as base64: 2000 rows of numbers as text would be most of the page
        z=np.nan_to_num(v * 100).round().astype(np.uint8),
        x=list(axis.positions.values()),
        y=list(range(len(chosen))),
        coloraxis="coloraxis",
        hovertemplate="feature %{customdata}<br>%{text}<br>v = %{z} %<extra></extra>",
    )
    axis.apply(figure)
    groups = chosen["origin"].to_numpy()
    middles = {origin: float(np.flatnonzero(groups == origin).mean()) for origin in ORIGINS if (groups == origin).any()}
    totals = alive["origin"].value_counts()
    # a label takes a good twentieth of the height: thin groups next to each other would print over each other
    labelled = {origin: y for origin, y in middles.items() if (groups == origin).mean() > 0.06}
    thin = ", ".join(f"{totals[origin]:,} {origin}" for origin in middles if origin not in labelled)
    figure.update_layout(
        # the script spreads these over the rows and columns, as the hover texts of each cell
        meta={"axis": "labels", "rows": ints(chosen["feature"]), "columns": axis.hover(list(axis.labels))},
    )
    apply_colors(figure, HEAT, {0: "v = 0", 100: "1"})
    figure.update_yaxes(
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        tickmode="array",
        tickvals=list(labelled.values()),
        ticktext=[f"{origin}<br>({totals[origin]:,})" for origin in labelled],
    )
    for origin in middles:
        first = float(np.flatnonzero(groups == origin)[0])
        if first > 0:
            figure.add_hline(y=first - 0.5, line={"color": INK, "width": 1})
    dead = len(table) - len(alive)
    note = f"{len(alive):,} features; {dead:,} dead ones left out."
    if len(chosen) < len(alive):
        note += f" {len(chosen):,} of them are drawn, evenly spaced in this order."
    if thin:
        note += f" Too thin for a label, from top to bottom: {thin}."
    data = chosen[[c for c in ("feature", "origin", "fate", "birth", "peak") if c in chosen]].reset_index(drop=True)
    return Chart(figure, pd.concat([data, pd.DataFrame(v, columns=pd.Index(labels))], axis=1), note)


def ordered_features(evolution: Frame) -> Frame:
    """Features that are alive, by origin, then birth, then peak."""
    alive = evolution[evolution["alive"].astype(bool)]
    rank = alive["origin"].map({origin: i for i, origin in enumerate(ORIGINS)}).astype(float)
    keys = pd.DataFrame({"origin": rank, "birth": floats(alive["birth"]), "peak": floats(alive["peak"])}, alive.index)
    return alive.loc[keys.sort_values(["origin", "birth", "peak"], kind="stable").index]


def births(table: Frame, snapshots: Frame) -> Chart | str:
    """Emergent features by the snapshot of their birth, stacked by fate."""
    alive = table[table["alive"].astype(bool)]
    emergent = alive[alive["origin"] == "emergent"]
    if emergent.empty:
        return "No feature emerged after the first snapshot."
    axis = SnapshotAxis.of(snapshots, even=True)
    ids = list(axis.labels)
    counts = pd.DataFrame(
        {fate: emergent.loc[emergent["fate"] == fate, "birth"].astype(int).value_counts().reindex(ids, fill_value=0)
         for fate in FATES}
    )  # fmt: skip
    figure = new_figure("features born", barmode="stack", bargap=0.25)
    add_bars(figure, axis, counts, "features")
    axis.apply(figure)
    figure.update_xaxes(title_text="snapshot of birth")
    data = pd.DataFrame({"snapshot": ids, "label": [axis.labels[i] for i in ids]})
    data = pd.concat([data, counts.reset_index(drop=True)], axis=1)
    note = (
        f"{len(emergent):,} features emerged; the {(alive['origin'] == 'initial').sum():,} initial ones are not drawn."
    )
    return Chart(figure, data, note)


def origins(table: Frame) -> Chart | str:
    """Features by origin, stacked by fate."""
    alive = table[table["alive"].astype(bool)]
    if alive.empty:
        return "Every feature is dead: none fired on the held-out tokens."
    counts = pd.crosstab(alive["origin"], alive["fate"]).reindex(index=ORIGINS, columns=FATES, fill_value=0)
    figure = new_figure("", height=260, barmode="stack", bargap=0.35)
    for i, fate in enumerate(FATES):
        figure.add_bar(
            y=list(ORIGINS),
            x=ints(counts[fate]),
            orientation="h",
            name=fate,
            marker={"color": SERIES[i]},
            hovertemplate="<b>%{y}, %{fullData.name}</b><br>%{x} features<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="features", showgrid=True, gridcolor=GRID)
    data = counts.stack().rename("features").reset_index()
    return Chart(figure, data, f"{len(alive):,} features alive, {len(table) - len(alive):,} dead.")


def probe(table: Frame) -> Chart | str:
    """Held-out error of a feature's linear probes against its decoder norm, a point per feature and snapshot."""
    points = table.dropna(subset=["norm", "probe_error"])
    if len(points) < 3:
        return f"Only {len(points)} features could be probed; too few to draw."
    drawn = points.iloc[np.unique(np.linspace(0, len(points) - 1, min(MAX_POINTS, len(points))).round().astype(int))]
    axis = SnapshotAxis.of(table, even=True)
    figure = new_figure("probe error (share of tokens)", height=480)
    figure.update_yaxes(rangemode="tozero")
    add_level(figure, 0.5, "chance")
    texts = axis.hover(ints(drawn["snapshot"]))
    add_points(figure, axis, drawn, "norm", "probe_error", texts, "norm %{x:.3f}, error %{y:.3f}")
    figure.update_xaxes(title_text="decoder norm / its largest (share)", showgrid=True, zeroline=False)
    untrained = sorted(set(ints(points.loc[pd.to_numeric(points["step"], errors="coerce") == 0, "snapshot"])))
    note = f"All snapshots: {_correlation(points, [])}."
    if untrained and len(axis.labels) > 1:
        note += f" Without step 0: {_correlation(points, untrained)}."
    if len(drawn) < len(points):
        note += f" {len(drawn):,} of {len(points):,} points are drawn, evenly spaced in the table."
    return Chart(figure, _pick(drawn, "feature", "snapshot", "label", "step", "norm", "probe_error", "n"), note)


def _correlation(points: Frame, without: list[int]) -> str:
    """Rank correlation of norm and error with its interval, in words."""
    from crosslens.evolution.probes import (
        probe_correlation,
    )  # here, for it loads SAELens: seconds that most reports can do without

    kept = points[~points["snapshot"].isin(without)]
    if kept["feature"].nunique() < 2:
        return "too few features for a correlation"
    found = probe_correlation(points, without=without)
    text = (
        f"Spearman {found['spearman']:.2f}, 95 % interval {found['spearman_low']:.2f} to {found['spearman_high']:.2f}"
    )
    return f"{text}, {found['n']:,} points of {found['n_features']:,} features".replace("-", "−")


def _per_snapshot(table: Frame, names: dict[str, str], y_title: str, number: str = ".3f") -> Chart:
    """Columns of a table with one row per snapshot, as lines."""
    rows = table.sort_values("snapshot")
    axis = SnapshotAxis.of(rows)
    ids = ints(rows["snapshot"])
    figure = new_figure(y_title, height=320)
    present = [column for column in names if column in rows]
    for i, column in enumerate(present):
        add_line(
            figure, axis.x(ids), floats(rows[column]), names[column], Style.of(i), hover=axis.hover(ids), number=number
        )
    figure.update_layout(showlegend=len(present) > 1)
    axis.apply(figure)
    return Chart(figure, _pick(rows, "snapshot", "label", "step", "tokens", *present))


def _pick(table: Frame, *columns: str) -> Frame:
    return table[[column for column in columns if column in table]].reset_index(drop=True)
