"""Figures of the Evolution page: lifecycles, rotation, dimensionality, splits, complexity, probes.

Each function turns tables into a chart, or into a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy.cluster.hierarchy import leaves_list, linkage

from crosslens.features.labels import complexity_correlation
from crosslens.report.chart import (
    FEATURES,
    GRID,
    HEAT,
    INK,
    MUTED,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_bars,
    add_level,
    add_line,
    add_matrix,
    add_points,
    apply_colors,
    evenly_spaced,
    feature_names,
    floats,
    ints,
    new_figure,
    shown,
)
from crosslens.report.tables import MEASURES, by_measure, curves, main_measure

MAX_ROWS = 2000  # of the heat map; more would be thinner than a pixel
MAX_POINTS = 4000  # of a scatter plot; more make the page slow
ORIGINS = ("initial", "emergent", "never")
FATES = ("persistent", "transient")
_ALL_DEAD = "Every feature is dead: none is active on any held-out token."
_PARTS = {
    "all": "all snapshots",
    "trained": "without step 0",
    "within_features": "within features",
    "within_snapshots": "within snapshots",
    "disattenuated": "corrected for probe noise",
}
_READINGS = {
    ("r2", "all"): "R²",
    ("r2", "lexical"): "R², lexical",
    ("r2", "contextual"): "R², contextual",
    ("within", "contextual"): "within-token R², contextual",
    ("norm", "all"): "decoder norm",
}
_NORM_BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)
_EVENTS = {"birth": "born here", "peak": "strongest here"}


def _panels(y_title: str, n: int, *, height: int) -> Any:
    """A figure of n panels side by side, whose axes look alike; the first has the title of the y axis."""
    figure = new_figure(y_title, height=height)
    layout: Any = figure.layout
    figure.update_layout(grid={"rows": 1, "columns": n, "pattern": "independent", "xgap": 0.1 if n < 3 else 0.25})
    for place in range(2, n + 1):
        y = {**layout.yaxis.to_plotly_json(), "title": {"font": {"size": 13}, "standoff": 10}}
        figure.update_layout({f"xaxis{place}": layout.xaxis.to_plotly_json(), f"yaxis{place}": y})
    return figure


def evolution_map(
    evolution: Frame, lifecycles: Frame, snapshots: Frame, names: Frame | None = None, measure: str | None = None
) -> Chart | str:
    """Heat map of relative presence, with features ordered by origin, birth and peak, then clustered.

    Args:
        evolution: a row per feature and snapshot, from `evolve`.
        lifecycles: a row per measure and feature.
        snapshots: snapshot, label, step.
        names: feature, name.
        measure: "r2", "within" or "norm"; the main one if None.
    """
    called = feature_names(names)
    measure = measure or main_measure(lifecycles)
    table = by_measure(lifecycles, measure)
    alive = ordered_features(table)
    if alive.empty:
        return _ALL_DEAD
    drawn = evenly_spaced(alive, MAX_ROWS)
    values = curves(evolution, drawn["feature"], measure)
    v = values / values.max(1, keepdims=True)
    places = _clustered(drawn, v)
    drawn, v = drawn.iloc[places], v[places]
    labels = evolution.drop_duplicates("snapshot").sort_values("snapshot")["label"].astype(str).tolist()
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
        # bytes, which plotly writes as base64: as text, 2000 rows would be most of the page
        z=np.nan_to_num(v * 100).round().astype(np.uint8),
        x=list(axis.positions.values()),
        y=list(range(len(drawn))),
        coloraxis="coloraxis",
        meta=FEATURES,
        hovertemplate="feature %{text}<br>v = %{z}%<extra></extra>",
    )
    axis.apply(figure)
    groups = drawn["origin"].to_numpy()
    middles = {origin: float(np.flatnonzero(groups == origin).mean()) for origin in ORIGINS if (groups == origin).any()}
    totals = alive["origin"].value_counts()
    # a label takes about 5% of the height, so the labels of thin groups would overlap
    labelled = {origin: y for origin, y in middles.items() if (groups == origin).mean() > 0.06}
    thin = ", ".join(f"{totals[origin]:,} “{origin}”" for origin in middles if origin not in labelled)
    figure.update_layout(
        # the page's script expands these to the tooltips of all cells
        meta={
            "axis": "labels",
            "rows": ints(drawn["feature"]),
            "names": [shown(called(feature)) for feature in ints(drawn["feature"])],
            "columns": axis.hover(list(axis.labels)),
        },
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
    note = _of_all(table, measure)
    if len(drawn) < len(alive):
        note += f" {len(drawn):,} of them are drawn, evenly spaced in this order."
    if thin:
        note += f" Groups too thin to be named beside the figure, from top to bottom: {thin}."
    data = drawn[[c for c in ("feature", "origin", "fate", "birth", "peak") if c in drawn]].reset_index(drop=True)
    return Chart(figure, pd.concat([data, pd.DataFrame(v, columns=pd.Index(labels))], axis=1), note)


def _clustered(lifecycles: Frame, v: np.ndarray) -> np.ndarray:
    """An order of rows that stay sorted by origin, birth and peak, in which rows of similar curves are neighbours.

    Within each group these are the leaves of Ward's clustering, turned so that early ones come first.
    """
    groups = lifecycles.groupby(["origin", "birth", "peak"], sort=False, dropna=False).ngroup().to_numpy()
    order: list[np.ndarray] = []
    for group in pd.unique(groups):
        rows = np.flatnonzero(groups == group)
        if len(rows) > 2:
            rows = rows[leaves_list(linkage(v[rows], "ward"))]
            late = v[rows] @ np.arange(v.shape[1]) / v[rows].sum(1)
            rows = rows[::-1] if late[: len(rows) // 2].mean() > late[len(rows) // 2 :].mean() else rows
        order.append(rows)
    return np.concatenate(order)


def _of_all(table: Frame, measure: str) -> str:
    """How many features a lifecycle is known of, in words."""
    alive, read = table["alive"].astype(bool), table["origin"].notna()
    words = f"{read.sum():,} features by {MEASURES[measure]}"
    why = {
        "r2": "unknown (R² below 0.05 at every snapshot)",
        "within": "unknown (within-token R² below 0.05 at every snapshot, or lexical)",
        "norm": "without a decoder norm",
    }
    rest = [(int((~alive).sum()), "dead"), (int((alive & ~read).sum()), why[measure])]
    left = " and ".join(f"{n:,} {what}" for n, what in rest if n)
    return f"{words}; left out: {left}." if left else f"{words}."


def ordered_features(lifecycles: Frame) -> Frame:
    """Features with a lifecycle by one measure, ordered by origin, then birth, then peak."""
    alive = lifecycles[lifecycles["origin"].notna()]
    rank = alive["origin"].map({origin: i for i, origin in enumerate(ORIGINS)}).astype(float)
    keys = pd.DataFrame({"origin": rank, "birth": floats(alive["birth"]), "peak": floats(alive["peak"])}, alive.index)
    return alive.loc[keys.sort_values(["origin", "birth", "peak"], kind="stable").index]


def births(lifecycles: Frame, snapshots: Frame) -> Chart | str:
    """Number of emergent features by snapshot of birth, stacked by fate, with those by decoder norm beside them."""
    measure = main_measure(lifecycles)
    alive = by_measure(lifecycles).dropna(subset=["origin"])
    emergent = alive[alive["origin"] == "emergent"]
    if emergent.empty:
        return f"No feature emerged after the first snapshot by {MEASURES[measure]}."
    axis = SnapshotAxis.of(snapshots, even=True)
    ids = list(axis.labels)
    counts = pd.DataFrame(
        {fate: emergent.loc[emergent["fate"] == fate, "birth"].astype(int).value_counts().reindex(ids, fill_value=0)
         for fate in FATES}
    )  # fmt: skip
    figure = new_figure("features born", barmode="stack", bargap=0.25)
    add_bars(figure, axis, counts, "features")
    note = (
        f"By {MEASURES[measure]} {len(emergent):,} features emerged; {(alive['origin'] == 'initial').sum():,} initial "
        "ones are not shown."
    )
    if measure != "norm":
        others = by_measure(lifecycles, "norm")
        others = others[others["origin"] == "emergent"]
        by_norm = others["birth"].astype(int).value_counts().reindex(ids, fill_value=0)
        figure.add_scatter(
            x=axis.x(ids),
            y=ints(by_norm),
            mode="markers",
            name="by decoder norm",
            marker={"color": INK, "symbol": "line-ew-open", "size": 18, "line": {"width": 2}},
            customdata=axis.hover(ids),
            hovertemplate="<b>%{customdata}</b><br>%{y} features by decoder norm<extra></extra>",
        )
        counts["by decoder norm"] = by_norm
        note += f" By decoder norm {len(others):,} emerged (lines)."
    axis.apply(figure)
    figure.update_xaxes(title_text="snapshot of birth")
    data = pd.DataFrame({"snapshot": ids, "label": [axis.labels[i] for i in ids]})
    data = pd.concat([data, counts.reset_index(drop=True)], axis=1)
    return Chart(figure, data, note)


def birth_counts(table: Frame) -> Chart | str:
    """Births over thresholds of presence by each measure: forward, reversed in time, and in untrained models.

    Args:
        table: from `count_births`, with or without untrained models.
    """
    if not table["n"].sum():
        return _ALL_DEAD
    drawn = table[table["n"] > 0]
    groups = [group for group in _READINGS if group in set(zip(drawn["measure"], drawn["kind"], strict=True))]
    figure = _panels("share of features born", len(groups), height=420)
    highest = 0.0
    for place, group in enumerate(groups):
        rows = drawn[(drawn["measure"] == group[0]) & (drawn["kind"] == group[1])].sort_values("threshold")
        n, x = rows["n"].to_numpy(dtype=float), floats(rows["threshold"])
        curves = {"forward": rows["born"] / n, "reversed in time": rows["born_reversed"] / n}
        if "untrained" in rows:
            curves["models that never trained"] = rows["untrained"]
        ends = {"xaxis": f"x{place + 1}" if place else "x", "yaxis": f"y{place + 1}" if place else "y"}
        for i, (name, values) in enumerate(curves.items()):
            highest = max(highest, float(np.nan_to_num(values.to_numpy(dtype=float)).max()))
            style = Style.of(i)
            figure.add_scatter(
                x=x,
                y=floats(values),
                name=name,
                legendgroup=name,
                showlegend=place == 0,
                mode="lines+markers",
                line={"color": style.color},
                marker={"color": style.color, "symbol": style.symbol, "size": 8},
                hovertemplate=f"<b>{name}</b><br>{_READINGS[group]}, threshold %{{x}}<br>%{{y:.1%}}<extra></extra>",
                **ends,
            )
    for place, group in enumerate(groups):
        n = drawn.loc[(drawn["measure"] == group[0]) & (drawn["kind"] == group[1]), "n"].iloc[0]
        title = f"{_READINGS[group].replace(', ', '<br>')} ({int(n):,})"
        end = str(place + 1) if place else ""
        figure.update_layout(
            {
                f"xaxis{end}": {"title": {"text": title}, "tickvals": sorted(set(floats(drawn["threshold"])))},
                f"yaxis{end}": {"range": [-0.02, 1.05 * highest + 0.02], "tickformat": ".0%"},
            }
        )
    at = drawn[(drawn["threshold"] == 0.5) & (drawn["kind"] == "all")]
    parts = [
        f"{MEASURES[str(row['measure'])]} {row['born']:,} forward, {row['born_reversed']:,} reversed"
        for row in at.to_dict("records")
    ]
    note = f"At threshold 0.5, by {'; by '.join(parts)}." if parts else ""
    known = table["untrained"] if "untrained" in table else pd.Series(dtype=float)
    if not known.notna().any():
        words = "{} Untrained models were not measured; <code>crosslens evolve --untrained</code> measures them."
        note = Markup(words).format(note)
    return Chart(figure, table.reset_index(drop=True), note.strip())


def origins(lifecycles: Frame) -> Chart | str:
    """Number of features by origin, stacked by fate, for every measure of presence."""
    read = lifecycles.dropna(subset=["origin"])
    if read.empty:
        return _ALL_DEAD
    parts: list[Frame] = []
    for measure in pd.unique(read["measure"]):
        rows = read[read["measure"] == measure]
        counts = pd.crosstab(rows["origin"], rows["fate"]).reindex(index=ORIGINS, columns=FATES, fill_value=0)
        parts.append(counts.reset_index(names="origin").assign(measure=measure))
    data = pd.concat(parts, ignore_index=True)
    names = [MEASURES[str(measure)] for measure in data["measure"]]
    figure = new_figure("", height=110 + 34 * len(data), barmode="stack", bargap=0.35)
    for i, fate in enumerate(FATES):
        figure.add_bar(
            y=[names, data["origin"].tolist()],
            x=ints(data[fate]),
            orientation="h",
            name=fate,
            marker={"color": SERIES[i]},
            hovertemplate="<b>%{y}, %{fullData.name}</b><br>%{x} features<extra></extra>",
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="features", showgrid=True, gridcolor=GRID)
    first = by_measure(lifecycles)
    alive = int(first["alive"].sum())
    note = f"{alive:,} live features, {len(first) - alive:,} dead."
    if "within" in set(read["measure"]):
        note += " By within-token R² only contextual features are read."
    return Chart(figure, data[["measure", "origin", *FATES]], note)


def rotation(table: Frame) -> Chart | str:
    """Number of features by the interval between snapshots in which they rotate most."""
    if not table["rotated"].sum():
        return "No feature changes direction between neighbouring snapshots."
    names = [f"{shown(a, 10)} → {shown(b, 10)}" for a, b in zip(table["from"], table["to"], strict=True)]
    figure = new_figure("features that rotate most here", bargap=0.25)
    ends = table["at_edge"].to_numpy(dtype=bool)
    figure.add_bar(
        x=list(range(len(table))),
        y=ints(table["rotated"]),
        marker={"color": [SERIES[1] if point else SERIES[0] for point in table["largest"]]},
        customdata=[
            [
                name,
                f"{n:,} features with a direction at both snapshots, median cosine {cosine:.3f}"
                + "<br>at an end of the snapshots" * edge,
            ]
            for name, n, cosine, edge in zip(
                names, ints(table["n"]), floats(table["median_cosine"]), ends.tolist(), strict=True
            )
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
    row = table.loc[table["largest"]].iloc[0]
    note = (
        f"{row['share']:.0%} of the {int(table['rotated'].sum()):,} features that change direction rotate most between "
        f"{row['from']} and {row['to']} (orange)."
    )
    if row["at_edge"]:
        note += " This is an end of the snapshots: these features may rotate more outside of them."
    return Chart(figure, table.reset_index(drop=True), note)


def rotation_rate(table: Frame) -> Chart | str:
    """Median angle that features turn in every interval, per interval and per doubling of training, with the null."""
    if not np.isfinite(table["angle"].to_numpy(dtype=float)).any():
        return "No feature has a decoder vector long enough to compare at two neighbouring snapshots."
    names = [f"{shown(a, 10)} → {shown(b, 10)}" for a, b in zip(table["from"], table["to"], strict=True)]
    per_doubling = np.isfinite(table["angle_per_doubling"].to_numpy(dtype=float)).any()
    panels = [("degrees per interval", ("angle", "halves_angle", "null_angle"))]
    if per_doubling:
        panels.append(("degrees per doubling of training", ("angle_per_doubling", "", "null_per_doubling")))
    words = ("decoder vectors", "estimates on different halves", "null: the same snapshot, different halves")
    figure = _panels("", len(panels), height=420)
    x = list(range(len(table)))
    for place, (title, columns) in enumerate(panels):
        end = str(place + 1) if place else ""
        for i, (column, name) in enumerate(zip(columns, words, strict=True)):
            if not column or not np.isfinite(table[column].to_numpy(dtype=float)).any():
                continue
            style = Style.of(i)
            figure.add_scatter(
                x=x,
                y=floats(table[column]),
                name=name,
                legendgroup=name,
                showlegend=place == 0,
                mode="lines+markers",
                line={"color": style.color, "dash": style.dash},
                marker={"color": style.color, "symbol": style.symbol, "size": 8},
                customdata=names,
                hovertemplate=f"<b>{name}</b><br>%{{customdata}}<br>%{{y:.2f}} {title}<extra></extra>",
                xaxis=f"x{end}",
                yaxis=f"y{end}",
            )
        figure.update_layout(
            {
                f"xaxis{end}": {"tickmode": "array", "tickvals": x, "ticktext": names, "tickangle": -45},
                f"yaxis{end}": {"title": {"text": title}, "rangemode": "tozero"},
            }
        )
    note = "Medians over live features with a direction at both snapshots."
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
    return Chart(figure, table.reset_index(drop=True), note)


def cosines(table: Frame) -> Chart | str:
    """Median cosine between a feature's decoder vectors at each pair of snapshots.

    Args:
        table: "cosines" from `study_evolution`.
    """
    if not table["n"].sum():
        return "No feature has a decoder vector long enough to compare at two snapshots."
    axis = SnapshotAxis.of(table, even=True)
    ids = list(axis.labels)
    median = table.pivot(index="snapshot", columns="other", values="median").to_numpy(dtype=float)
    low, high, n = (table.pivot(index="snapshot", columns="other", values=c).to_numpy() for c in ("low", "high", "n"))
    hover = axis.hover(ids)
    figure = new_figure("", height=180 + 30 * len(ids))
    texts = [
        [
            f"{hover[a]}<br>{hover[b]}<br>median {median[a, b]:.3f}, interquartile range {low[a, b]:.3f} to "
            f"{high[a, b]:.3f}, {int(n[a, b]):,} features"
            for b in range(len(ids))
        ]
        for a in range(len(ids))
    ]
    add_matrix(figure, median, texts, axis.x(ids), list(axis.names().values()))
    least = min(0.0, float(np.nanmin(median)))
    apply_colors(figure, HEAT, {least: f"{least:.1f}".replace("-", "−"), 1.0: "1, same direction"})
    axis.apply(figure)
    return Chart(figure, table.reset_index(drop=True))


def dimensionality(table: Frame) -> Chart | str:
    """Total dimensionality of the present features by two formulas, of random directions, and of the activations."""
    if not table["total"].any():
        return "No feature is present at any snapshot."
    axis = SnapshotAxis.of(table)
    ids = ints(table["snapshot"])
    figure = new_figure("dimensions / d_model", height=380)
    d_model = float((table["total"] / table["share"]).max())
    drawn = table.assign(participation=table["participation_ratio"] / d_model)
    lines = {
        "share": "features, by activation",
        "random_share": "random directions, by activation",
        "elhage_share": "features, all alike (Elhage et al.)",
        "random_elhage_share": "random directions, all alike",
        "participation": "participation ratio of the activations",
    }
    for i, (column, name) in enumerate(lines.items()):
        add_line(figure, axis.x(ids), floats(drawn[column]), name, Style.of(i), hover=axis.hover(ids))
    figure.update_yaxes(rangemode="tozero")
    axis.apply(figure)
    first, last = table.iloc[0], table.iloc[-1]
    note = (
        f"By decoder norm, {int(first['present']):,} features are present at {first['label']}, "
        f"{int(last['present']):,} at {last['label']}. The participation ratio is {first['participation_ratio']:.1f} "
        f"and {last['participation_ratio']:.1f} of {d_model:.0f} dimensions."
    )
    return Chart(figure, table.reset_index(drop=True), note)


def splits_and_replacements(splits: Frame, replacements: Frame, snapshots: Frame) -> Chart | str:
    """Number of splits, mergers and replacements by snapshot.

    Args:
        splits: from `splits`.
        replacements: from `replacements`.
        snapshots: snapshot, label, step.
    """
    axis = SnapshotAxis.of(snapshots, even=True)
    ids = list(axis.labels)
    kinds = {
        "replacement": replacements["birth"],
        "split": splits.loc[splits["kind"] == "split", "at"],
        "merger": splits.loc[splits["kind"] == "merger", "at"],
    }
    counts = pd.DataFrame(
        {name: pd.Series(dates).astype(int).value_counts().reindex(ids, fill_value=0) for name, dates in kinds.items()}
    )
    if not counts.to_numpy().sum():
        return "No feature splits, merges or is replaced at these thresholds."
    figure = new_figure("pairs of features", barmode="group", bargap=0.25)
    add_bars(figure, axis, counts, "pairs")
    axis.apply(figure)
    data = counts.rename_axis("snapshot").reset_index()
    data.insert(1, "label", [axis.labels[i] for i in ids])
    return Chart(figure, data, f"{int(counts.to_numpy().sum()):,} pairs in total.")


def scaling(table: Frame, evolution: Frame, lifecycles: Frame, names: Frame | None = None) -> Chart | str:
    """Latent scaling against decoder norm, a point per live feature and snapshot.

    Args:
        table: from `LatentScaling.to_frame`.
        evolution: a row per feature and snapshot, from `evolve`.
        lifecycles: a row per measure and feature.
        names: feature, name.
    """
    called = feature_names(names)
    labels = [str(name).removeprefix("peak/") for name in table.columns if str(name).startswith("peak/")]
    by_norm = by_measure(lifecycles, "norm")
    features = by_norm.loc[by_norm["alive"].astype(bool), "feature"]
    norm = curves(evolution, features, "norm")
    top = norm.max(1, keepdims=True)
    found = table.set_index("feature").loc[features, [f"peak/{label}" for label in labels]].to_numpy(dtype=float)
    v, beta = norm / top, found / top
    keep = np.isfinite(beta)
    if not keep.any():
        return "No feature fires on the held-out tokens."
    feature, snapshot = np.nonzero(keep)
    data = pd.DataFrame(
        {
            "feature": features.to_numpy()[feature],
            "label": np.array(labels, dtype=object)[snapshot],
            "strength": v[keep],
            "scaling": beta[keep],
        }
    )
    drawn = evenly_spaced(data, MAX_POINTS)
    figure = new_figure("latent scaling / largest norm", height=440)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="scaling = norm", line={"color": MUTED, "dash": "dot"}
    )  # fmt: skip
    figure.add_scattergl(
        x=floats(drawn["strength"]),
        y=floats(drawn["scaling"]),
        mode="markers",
        name="a feature at a snapshot",
        marker={"size": 4, "opacity": 0.4, "color": SERIES[0]},
        customdata=[
            [f, shown(called(f)), shown(label, 40)]
            for f, label in zip(ints(drawn["feature"]), drawn["label"], strict=True)
        ],
        meta=FEATURES,
        hovertemplate="feature %{customdata[1]}<br>%{customdata[2]}<br>norm %{x:.3f}, scaling %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="decoder norm / largest norm", showgrid=True, gridcolor=GRID, zeroline=False)
    absent = v[keep] < 0.5
    hidden = float((beta[keep][absent] >= 0.5).mean()) if absent.any() else 0.0
    note = (
        f"At {int(absent.sum()):,} points the norm says the feature is absent (below half of its largest norm); at "
        f"{hidden:.1%} of them the scaling says it is present."
    )
    if len(drawn) < len(data):
        note += f" {len(drawn):,} of {len(data):,} points are drawn, evenly spaced."
    return Chart(figure, data, note)


def encoder(table: Frame, lifecycles: Frame) -> Chart | str:
    """Median encoder share of each snapshot, by the snapshot in which features are born.

    Args:
        table: from `encoder_share`, a column share/<label> per snapshot.
        lifecycles: a row per measure and feature; the main measure dates births.
    """
    evolution = by_measure(lifecycles)
    columns = [str(name) for name in table.columns if str(name).startswith("share/")]
    labels = [name.removeprefix("share/") for name in columns]
    birth = evolution.set_index("feature")["birth"].reindex(table["feature"]).reset_index(drop=True)
    known = birth.notna() & table[columns].notna().all(axis=1)
    if not known.any():
        return "No feature is born at any snapshot."
    rows = table.loc[known, columns].groupby(birth[known].astype(int)).median()
    counts = birth[known].astype(int).value_counts()
    shares = rows.to_numpy(dtype=float)
    figure = new_figure("born at", height=180 + 28 * len(rows))
    names = [f"{shown(labels[int(b)], 14)} ({int(counts[b])})" for b in rows.index]
    texts = [
        [f"born at {name}<br>read from {shown(label)}: {value:.1%}" for label, value in zip(labels, row, strict=True)]
        for name, row in zip(names, shares, strict=True)
    ]
    add_matrix(figure, shares, texts, range(len(labels)), names)
    apply_colors(figure, HEAT, {0.0: "0%", float(shares.max()): f"{shares.max():.0%} of the encoder input"})
    figure.update_xaxes(
        title_text="read from", tickmode="array", tickvals=list(range(len(labels))),
        ticktext=[shown(label, 14) for label in labels], tickangle=-45,
    )  # fmt: skip
    before = [line[: int(b)].sum() for b, line in zip(rows.index, shares, strict=True) if b > 0]
    note = "Number of features in parentheses. Left of the diagonal: read from snapshots before birth."
    if before:
        note += f" These shares sum to at most {max(before):.0%}."
    data = rows.reset_index().rename(columns={"birth": "born"})
    return Chart(figure, data, note)


def complexity(labels: Frame, lifecycles: Frame, snapshots: Frame) -> Chart | str:
    """Mean complexity of the features that are born, and of those that peak, at each snapshot.

    Args:
        labels: from `label_features`: feature, complexity.
        lifecycles: a row per measure and feature; the main measure dates births and peaks.
        snapshots: snapshot, label, step.
    """
    evolution = by_measure(lifecycles)
    rated = labels[["feature", "complexity"]].dropna()
    if rated.empty:
        return "No feature has a complexity rating."
    rated = rated.merge(evolution[["feature", *_EVENTS]], on="feature").astype({"complexity": float})
    axis = SnapshotAxis.of(snapshots)
    figure = new_figure("complexity (1 to 5)", yaxis_range=[0.8, 5.2], yaxis_dtick=1)
    parts: list[pd.DataFrame] = []
    for i, (event, name) in enumerate(_EVENTS.items()):
        grouped = rated.dropna(subset=[event]).astype({event: int}).groupby(event)["complexity"]
        rows = grouped.agg(mean="mean", se="sem", n="count").reset_index(names="snapshot")
        ids, mean, se = ints(rows["snapshot"]), floats(rows["mean"]), floats(rows["se"])
        hover = [f"{text}<br>{n:,} features" for text, n in zip(axis.hover(ids), ints(rows["n"]), strict=True)]
        low, high = ((np.asarray(mean) + sign * 2 * np.asarray(se)).tolist() for sign in (-1, 1))
        add_line(figure, axis.x(ids), mean, name, Style.of(i), hover=hover, value="%{y:.2f}", band=(low, high))
        names = [axis.labels[snapshot] for snapshot in ids]
        parts.append(rows.assign(event=event, label=names)[["event", "snapshot", "label", "mean", "se", "n"]])
    axis.apply(figure)
    note = f"{len(rated):,} features have a complexity rating."
    for row in complexity_correlation(rated, evolution, unit="index").to_dict("records"):
        if np.isfinite(row["spearman"]):
            interval = f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            note += f" Spearman with {row['event']} {row['spearman']:+.2f} {interval}, {row['n']:,} features."
    return Chart(figure, pd.concat(parts, ignore_index=True), note.replace("-", "−"))


def probe(table: Frame, evolution: Frame, names: Frame | None = None) -> Chart | str:
    """Held-out error of linear probes against R² and against decoder norm, a point per feature and snapshot."""
    points = table.dropna(subset=["norm", "probe_error"])
    if len(points) < 3:
        return f"Only {len(points)} probes could be fitted, too few to draw."
    points = points.merge(evolution[["feature", "snapshot", "r2"]], on=["feature", "snapshot"], how="left")
    drawn = evenly_spaced(points, MAX_POINTS)
    axis = SnapshotAxis.of(table, even=True)
    panels = [("norm", "decoder norm / largest norm", "norm")]
    if points["r2"].notna().any():
        panels.insert(0, ("r2", "R²", "R²"))
    figure = _panels("probe error (share of tokens)", len(panels), height=480)
    top = 1.05 * max(0.5, float(points["probe_error"].max()))
    for place, (column, title, name) in enumerate(panels):
        end = str(place + 1) if place else ""
        known: Frame = drawn.dropna(subset=[column])
        add_points(figure, axis, known, column, "probe_error", f"{name} %{{x:.3f}}, error %{{y:.3f}}", names)
        figure.data[-1].update(xaxis=f"x{end}", yaxis=f"y{end}")
        figure.add_shape(
            type="line", xref=f"x{end} domain", yref=f"y{end}", x0=0, x1=1, y0=0.5, y1=0.5,
            line={"color": MUTED, "dash": "dot"},
        )  # fmt: skip
        figure.add_annotation(
            text="chance", xref=f"x{end} domain", yref=f"y{end}", x=1, y=0.5, xanchor="right", yanchor="bottom",
            showarrow=False, font={"color": MUTED},
        )  # fmt: skip
        figure.update_layout(
            {
                f"xaxis{end}": {"title": {"text": title}, "showgrid": True, "zeroline": False},
                f"yaxis{end}": {"range": [0, top]},
            }
        )
    note = f"All points, by decoder norm: {_correlation(points, [])}."
    untrained = sorted(set(ints(points.loc[pd.to_numeric(points["step"], errors="coerce") == 0, "snapshot"])))
    if untrained and len(axis.labels) > 1:
        note += f" Without step 0: {_correlation(points, untrained)}."
    if len(drawn) < len(points):
        note += f" {len(drawn):,} of {len(points):,} points are drawn, evenly spaced in the table."
    columns = [c for c in ("feature", "snapshot", "label", "step", "r2", "norm", "probe_error", "n") if c in drawn]
    return Chart(figure, drawn[columns].reset_index(drop=True), note)


def probe_presence(table: Frame) -> Chart | str:
    """Rank correlation of probe error and every measure of presence, within and between features, with intervals.

    Args:
        table: from `probe_presence`.
    """
    known = table.dropna(subset=["spearman"]).reset_index(drop=True)
    if known.empty:
        return "No feature that was probed has a reading of presence."
    names = [
        f"{MEASURES[str(row['measure'])]}, {str(row['part']).replace('_', ' ')}" for row in known.to_dict("records")
    ]
    order = np.argsort(known["part"] == "between_features", kind="stable")
    known, names = known.iloc[order].reset_index(drop=True), [names[i] for i in order]
    figure = new_figure("", height=140 + 36 * len(names))
    values, low, high = (floats(known[f"spearman{end}"]) for end in ("", "_low", "_high"))
    figure.add_scatter(
        x=values,
        y=list(range(len(names))),
        mode="markers",
        showlegend=False,
        marker={"color": [SERIES[0] if part == "within_features" else MUTED for part in known["part"]], "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [b - a for a, b in zip(values, high, strict=True)],
            "arrayminus": [a - b for a, b in zip(values, low, strict=True)],
            "color": MUTED,
            "thickness": 1.5,
        },
        customdata=[
            [name, f"{a:.2f} to {b:.2f}, {n:,} points of {features:,} features"]
            for name, a, b, n, features in zip(
                names, low, high, ints(known["n"]), ints(known["n_features"]), strict=True
            )
        ],
        hovertemplate="<b>%{customdata[0]}</b><br>%{x:.3f}<br>%{customdata[1]}<extra></extra>",
    )
    figure.update_yaxes(
        autorange="reversed", showgrid=False, zeroline=False, tickvals=list(range(len(names))), ticktext=names
    )
    figure.update_xaxes(title_text="Spearman correlation", range=[-1.03, 0.53], showgrid=True)
    figure.add_vline(x=0, line={"color": INK, "width": 1})
    within = known[known["part"] == "within_features"].to_dict("records")
    words = [
        f"{MEASURES[str(row['measure'])]} "
        + f"{row['spearman']:.2f} ({row['spearman_low']:.2f} to {row['spearman_high']:.2f})".replace("-", "−")
        for row in within
    ]
    note = f"Within features: {', '.join(words)}. Correlations between features have nothing to do with training."
    return Chart(figure, table.reset_index(drop=True), note)


def _correlation(points: Frame, without: list[int]) -> str:
    """Rank correlation of norm and error with its interval, in words."""
    # imports SAELens, which takes seconds that most reports do not need
    from crosslens.evolution.probes import probe_correlation

    kept = points[~points["snapshot"].isin(without)]
    if kept["feature"].nunique() < 2:
        return "too few features for a correlation"
    found = probe_correlation(points, without=without)
    text = f"Spearman {found['spearman']:.2f}, 95% interval {found['spearman_low']:.2f} to {found['spearman_high']:.2f}"
    return f"{text}, {found['n']:,} points of {found['n_features']:,} features".replace("-", "−")


def probe_parts(table: Frame) -> Chart:
    """Correlation of probe error and decoder norm, in total and by part, with intervals."""
    n = table.set_index("part")["n"]
    untrained = n.get("trained") != n.get("all")  # whether step 0 is a snapshot
    table = table if untrained else table[table["part"] != "trained"].reset_index(drop=True)
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
        f"{'Without step 0, the' if untrained else 'The'} standard deviation of probe errors is "
        f"{last['sd_error']:.3f} and that of relative norms {last['sd_norm']:.2f}; the reliability of the errors is "
        f"{last['reliability']:.2f}. If a feature can be decoded from every snapshot, there is little variation for "
        "its norm to explain."
    )
    return Chart(figure, table.reset_index(drop=True), note)


def agreement(table: Frame) -> Chart | str:
    """Mean overlap of a feature's top tokens between neighbouring snapshots, by decoder norm."""
    known = table.dropna(subset=["agreement"])
    if known.empty:
        return "No feature has a decoder vector long enough to compare at two neighbouring snapshots."
    pairs = known.rename(columns={"snapshot": "before"}).assign(
        snapshot=known["other"], label=known["other_label"], step=known["other_step"]
    )
    axis = SnapshotAxis.of(pairs)
    figure = new_figure("shared tokens (share)", yaxis_range=[-0.03, 1.05])
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
        "Each point compares a snapshot with the one before it. Norms are the smaller of the two, relative to the "
        f"feature's largest. Chance is {chance:.4f}."
    )
    return Chart(figure, pd.concat(drawn, ignore_index=True), note)
