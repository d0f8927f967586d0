"""Figures of what features do for a task: effects, their shares, completeness, ablation. Tables in, charts out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from crosslens.report.chart import (
    GRID,
    INK,
    MUTED,
    SERIES,
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
from crosslens.report.points import add_points

N_LINES = 12  # features drawn as lines
N_ROWS = 20  # features in the table
MAX_POINTS = 2000  # of the triangle
MAX_PAIRS = 800  # of a feature and a snapshot
ABLATE_K, KEEP_K = 15, 100  # sizes wanted over snapshots; the nearest that was measured is drawn
MIN_CLEAN = 0.1  # of the largest |clean metric|: below it a share divides by noise
_NOTHING = "No feature has an effect above two standard errors on this task."
_SETS = {
    "top": ("top features by effect", Style(SERIES[0], "circle")),
    "random": ("random active features", Style(MUTED, "square", "dash")),
    "size_matched": ("size-matched features", Style(SERIES[1], "diamond", "dot")),
}

EDITED = {
    "zero": "Features outside what is left are set to zero.",
    "mean": "Features outside what is left are set to their mean over the prompts.",
    "patch": "Features outside what is left are set to their value on the paired prompt.",
}
"""What became of the edited features, by the column `value` of an ablation table."""


def top_features(table: Frame, n: int) -> list[int]:
    """Features of the largest max over snapshots of |IE|, largest first, among those whose RelIE is defined."""
    defined = table.dropna(subset=["relie"])
    return ints(_largest(defined).index[:n].to_numpy())


def relative_effects(table: Frame) -> Chart | str:
    """RelIE: a triangle when there are exactly three snapshots, otherwise lines of the features of largest effect."""
    if table["relie"].notna().sum() == 0:
        return _NOTHING
    return _triangle(table) if table["snapshot"].nunique() == 3 else _relie_lines(table)


def signed_effects(table: Frame) -> Chart | str:
    """Signed IE of the same features as `relative_effects` draws as lines."""
    if table["relie"].notna().sum() == 0:
        return _NOTHING
    chart = _feature_lines(table, "ie", "IE (logits)")
    chart.figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    return chart


def effects_against_shares(table: Frame) -> Chart | str:
    """Signed IE against RelIE, a point per feature and snapshot, of the features of largest effect."""
    axis = SnapshotAxis.of(table, even=True)
    features = top_features(table, max(1, MAX_PAIRS // len(axis.labels)))
    if not features:
        return _NOTHING
    rows = table[table["feature"].isin(features)].dropna(subset=["relie"])
    figure = new_figure("IE (logits)", height=440)
    texts = [axis.names()[s] for s in ints(rows["snapshot"])]
    add_points(figure, axis, rows, "relie", "ie", texts, "RelIE %{x:.3f}, IE %{y:+.3f}")
    figure.update_xaxes(title_text="RelIE (share)", showgrid=True, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    note = f"The {len(features)} features of largest |IE| at any snapshot."
    columns = [c for c in ("feature", "snapshot", "label", "step", "ie", "ie_se", "relie") if c in rows]
    return Chart(figure, rows[columns].reset_index(drop=True), note)


def effect_table(table: Frame) -> Grid | str:
    """IE with its standard error per snapshot, the features of largest effect, tinted by sign and size."""
    features = top_features(table, N_ROWS)
    if not features:
        return _NOTHING
    axis = SnapshotAxis.of(table)
    rows = table[table["feature"].isin(features)]
    ie = rows.pivot(index="feature", columns="snapshot", values="ie").reindex(index=features, columns=list(axis.labels))
    se = rows.pivot(index="feature", columns="snapshot", values="ie_se").reindex_like(ie)
    largest = float(np.nanmax(np.abs(ie.to_numpy())))
    grid = [
        [Cell(str(feature))]
        + [
            Cell(f"{value:+.3f} ± {error:.3f}".replace("-", "−"), math.copysign(math.sqrt(abs(value) / largest), value))
            for value, error in zip(floats(ie.loc[feature]), floats(se.loc[feature]), strict=True)
        ]
        for feature in features
    ]
    order = {feature: i for i, feature in enumerate(features)}
    data = rows.sort_values(["feature", "snapshot"], key=lambda column: column.replace(order), kind="stable")
    columns = [c for c in ("feature", "snapshot", "label", "step", "ie", "ie_se", "relie", "reldec") if c in data]
    total = table["feature"].nunique()
    note = f"The {len(features)} features of largest |IE| at any snapshot, of {total:,} in the table."
    return Grid(["feature", *axis.labels.values()], grid, data[columns].reset_index(drop=True), note)


def effect_budget(table: Frame, effects: Frame) -> Chart:
    """The metric, its baseline, and what features and error node contribute."""
    rows = table.sort_values("snapshot").reset_index(drop=True)
    rows["features_effect"] = rows["snapshot"].map(effects.groupby("snapshot")["ie"].sum())
    names = {
        "metric_clean": "clean metric",
        "features_effect": "sum of IE over features",
        "error_effect": "error node",
        "metric_baseline": "baseline metric",
    }
    axis = SnapshotAxis.of(rows)
    ids = ints(rows["snapshot"])
    figure = new_figure("logits")
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    for i, (column, name) in enumerate(names.items()):
        add_line(figure, axis.x(ids), floats(rows[column]), name, Style.of(i), hover=axis.hover(ids))
    axis.apply(figure)
    return Chart(
        figure, rows[["snapshot", "label", "step", *names]], f"Averaged over {int(rows['n'].max()):,} prompts."
    )


def completeness(table: Frame) -> Chart | str:
    """Completeness error per snapshot, a line per task."""
    data = table[["task", "snapshot", "label", "step", "completeness_error"]].sort_values(["task", "snapshot"])
    values = 100 * data["completeness_error"]
    if values.dropna().empty:
        return "The completeness error is not defined at any snapshot."
    axis = SnapshotAxis.of(data)
    figure = new_figure("completeness error (%)", height=340)
    for i, (task, rows) in enumerate(data.groupby("task", sort=False)):
        ids = ints(rows["snapshot"])
        percent = floats(100 * rows["completeness_error"])
        add_line(figure, axis.x(ids), percent, shown(task), Style.of(i), hover=axis.hover(ids), unit=" %", number=".2g")
    if (values.dropna() > 0).all():
        figure.update_yaxes(type="log", dtick=1, exponentformat="power", title_text="completeness error (%, log scale)")
    axis.apply(figure)
    worst = data.loc[values.idxmax()]
    note = f"Largest: {values.max():.2g} % ({worst['task']}, {worst['label']})."
    return Chart(figure, data.reset_index(drop=True), note)


def ablation_by_size(table: Frame, mode: str) -> Chart | str:
    """Share of the clean metric against the size of the set, at the last snapshot."""
    rows = _shares(table, mode)
    if rows.empty:
        return f"Nothing was measured with mode {mode!r}."
    last = rows["snapshot"].max()
    clean = float(rows.loc[rows["snapshot"] == last, "clean"].iloc[0])
    label = str(rows.loc[rows["snapshot"] == last, "label"].iloc[0])
    rows = rows[(rows["snapshot"] == last) & rows["share"].notna()].sort_values("k")
    if rows.empty:
        return f"The clean metric at {label} is {clean:.3f}, too near zero to take shares of."
    figure = new_figure("share of the clean metric", yaxis_tickformat=".0%")
    _levels(figure, rows, mode)
    for name, style, lines in _sets(rows):
        k = ints(lines["k"])
        low, high = _band(lines)
        texts = [f"k = {size}" for size in k]
        add_line(figure, k, floats(lines["share"]), name, style, hover=texts, number=".1%", low=low, high=high)
    sizes = sorted(set(ints(rows["k"])))
    figure.update_xaxes(
        type="log", title_text="features in the set, k (log scale)", tickmode="array", tickvals=sizes, ticktext=sizes
    )
    draws = int(rows["n_draws"].max())
    note = f"At {label}; the clean metric is {clean:.3f} logits."
    if "value" in rows:
        note += f" {EDITED[str(rows['value'].iloc[0])]}"
    note += f" Bands: the interval that holds 95 % of up to {draws:,} draws, unless another was asked for."
    return Chart(figure, _ablation_data(rows), note)


def ablation_over_snapshots(table: Frame, mode: str) -> Chart | str:
    """The same at one size of the set, over snapshots."""
    rows = _shares(table, mode)
    if rows.empty:
        return f"Nothing was measured with mode {mode!r}."
    coverage = rows.groupby("k")["snapshot"].nunique()
    if coverage.max() < 2:
        return "Only one snapshot was ablated."
    wanted = KEEP_K if mode == "keep" else ABLATE_K
    k = min(ints(coverage.index[coverage == coverage.max()].to_numpy()), key=lambda size: (abs(size - wanted), size))
    rows = rows[rows["k"] == k].sort_values("snapshot")
    small = sorted(set(rows.loc[rows["share"].isna(), "snapshot"]))
    axis = SnapshotAxis.of(rows)
    figure = new_figure("share of the clean metric", yaxis_tickformat=".0%")
    add_level(figure, 1, "clean")
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, rangemode="tozero")
    for name, style, lines in _sets(rows):
        ids = ints(lines["snapshot"])
        low, high = _band(lines)
        add_line(
            figure, axis.x(ids), floats(lines["share"]), name, style, hover=axis.hover(ids), number=".1%",
            low=low, high=high,
        )  # fmt: skip
    axis.apply(figure)
    note = f"Sets of k = {k}. Bands: the interval that holds 95 % of the draws, unless another was asked for."
    if small:
        labels = ", ".join(axis.labels[int(s)] for s in small)
        note += f" Not shown at {labels}: there |clean| is below {MIN_CLEAN:.0%} of its largest value."
    return Chart(figure, _ablation_data(rows), note)


def _largest(table: Frame) -> pd.Series:
    """max over snapshots of |IE| by feature, largest first; ties by feature."""
    return table["ie"].abs().groupby(table["feature"]).max().sort_values(ascending=False, kind="stable")


def _triangle(table: Frame) -> Chart:
    axis = SnapshotAxis.of(table)
    corners = list(axis.labels)
    defined = table.dropna(subset=["relie"])
    size = _largest(defined)
    features = size.index[:MAX_POINTS]
    shares = defined.pivot(index="feature", columns="snapshot", values="relie").reindex(features)[corners].fillna(0.0)
    ie = defined.pivot(index="feature", columns="snapshot", values="ie").reindex(features)[corners].fillna(0.0)
    strongest: Any = pd.Series([row[np.abs(row).argmax()] for row in ie.to_numpy()], features)
    texts = list(axis.names().values())
    figure = new_figure("", height=520)
    for i, (name, inside) in enumerate((("supports the answer", strongest > 0), ("opposes it", strongest <= 0))):
        part = shares[inside]
        figure.add_scatterternary(
            a=floats(part[corners[2]]),
            b=floats(part[corners[0]]),
            c=floats(part[corners[1]]),
            mode="markers",
            name=f"{name}, where |IE| is largest",
            marker={
                "color": SERIES[i],
                "symbol": ("circle", "diamond")[i],
                "opacity": 0.75,
                # the area grows with |IE|
                "size": [5 + 17 * math.sqrt(v / size.iloc[0]) for v in size[part.index]],
                "line": {"width": 0},
            },
            customdata=[[int(str(f)), float(s)] for f, s in strongest[part.index].items()],
            hovertemplate=(
                f"feature %{{customdata[0]}}<br>IE %{{customdata[1]:+.3f}} logits<br>{texts[0]} %{{b:.2f}}<br>"
                f"{texts[1]} %{{c:.2f}}<br>{texts[2]} %{{a:.2f}}<extra></extra>"
            ),
        )
    corner = {"gridcolor": GRID, "linecolor": MUTED, "tickvals": [0.2, 0.4, 0.6, 0.8], "ticks": "", "min": 0}
    figure.update_layout(
        meta={"axis": "triangle"},
        ternary={
            "sum": 1,
            "bgcolor": "rgba(0,0,0,0)",
            "aaxis": {
                **corner,
                "title": {"text": texts[2], "font": {"color": INK, "size": 13}},
                "tickfont": {"color": MUTED},
            },
            "baxis": {
                **corner,
                "title": {"text": texts[0], "font": {"color": INK, "size": 13}},
                "tickfont": {"color": MUTED},
            },
            "caxis": {
                **corner,
                "title": {"text": texts[1], "font": {"color": INK, "size": 13}},
                "tickfont": {"color": MUTED},
            },
        },
        margin={"l": 56, "r": 56, "t": 56, "b": 48},
    )
    data = pd.DataFrame({"feature": features, "ie_largest": strongest.to_numpy()})
    for corner_snapshot in corners:
        data[f"relie/{axis.labels[corner_snapshot]}"] = shares[corner_snapshot].to_numpy()
    hidden = table["feature"].nunique() - len(size)
    note = (
        "A feature is a point, near the corner of the snapshot where it matters most; its area grows with its largest "
        f"|IE|. {len(features):,} features; {hidden:,} without an effect above two standard errors are left out."
    )
    if len(features) < len(size):
        note += f" {len(size) - len(features):,} of smaller effect are not drawn."
    return Chart(figure, data, note)


def _relie_lines(table: Frame) -> Chart:
    chart = _feature_lines(table, "relie", "RelIE (share)")
    chart.figure.update_yaxes(rangemode="tozero")
    return chart


def _feature_lines(table: Frame, column: str, y_title: str) -> Chart:
    """A column over snapshots, for the features of largest effect."""
    features = top_features(table, N_LINES)
    axis = SnapshotAxis.of(table)
    figure = new_figure(y_title, height=400)
    parts: list[Frame] = []
    for i, feature in enumerate(features):
        rows = table[table["feature"] == feature].sort_values("snapshot")
        ids = ints(rows["snapshot"])
        add_line(figure, axis.x(ids), floats(rows[column]), str(feature), Style.of(i), hover=axis.hover(ids))
        parts.append(rows)
    figure.update_layout(legend_title_text="feature")
    axis.apply(figure)
    data = pd.concat(parts, ignore_index=True)
    extra = "ie_se" if column == "ie" else "relie_normalised"
    columns = [c for c in ("feature", "snapshot", "label", "step", column, extra) if c in data]
    return Chart(figure, data[columns], f"The {len(features)} features of largest |IE| at any snapshot.")


def _shares(table: Frame, mode: str) -> Frame:
    """Rows of a mode with the metric as a share of the clean one, NaN where that is too near zero.

    share = 1 + (metric - clean) / |clean|, which is metric / clean where clean > 0, and falls when the metric falls
    also where the model still prefers the wrong answer.
    """
    rows = table[table["mode"] == mode].copy()
    size = rows["clean"].abs()
    size = size.where(size >= MIN_CLEAN * size.max())
    rows["share"] = 1 + (rows["metric"] - rows["clean"]) / size
    for edge in ("low", "high"):
        rows[f"share_{edge}"] = 1 + (rows[f"metric_{edge}"] - rows["clean"]) / size
    return rows


def _sets(rows: Frame) -> list[tuple[str, Style, Frame]]:
    """The series of an ablation: by kind of set, and by error node where both were measured."""
    both = rows["error"].nunique() > 1
    series: list[tuple[str, Style, Frame]] = []
    for kind, (name, style) in _SETS.items():
        for error, lines in rows[rows["features"] == kind].groupby("error"):
            suffix = (", error node kept" if error else ", without error node") if both else ""
            plain = Style(style.color, style.symbol + ("-open" if both and error else ""), style.dash)
            series.append((name + suffix, plain, lines))
    return series


def _band(lines: Frame) -> tuple[list[float] | None, list[float] | None]:
    """The band over draws; none when there was a single set."""
    low, high = floats(lines["share_low"]), floats(lines["share_high"])
    return (low, high) if np.isfinite(low).any() else (None, None)


def _levels(figure: go.Figure, rows: Frame, mode: str) -> None:
    add_level(figure, 1, "clean")
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, rangemode="tozero")
    alone = float((rows["reconstruction_only"] / rows["clean"]).iloc[0])
    if mode == "keep" and math.isfinite(alone):
        add_level(figure, alone, "reconstruction alone", "dashdot")


def _ablation_data(rows: Frame) -> Frame:
    columns = ("snapshot", "label", "step", "mode", "features", "error", "k", "metric", "metric_sd", "clean",
               "share", "share_sd", "n_draws")  # fmt: skip
    return rows[[c for c in columns if c in rows]].reset_index(drop=True)
