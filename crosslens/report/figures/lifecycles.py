"""When features are present, are born and disappear."""

from __future__ import annotations

import numpy as np
import pandas as pd
from markupsafe import Markup
from scipy.cluster.hierarchy import leaves_list, linkage

from crosslens.evolution.lifecycles import PRESENCE
from crosslens.report.chart import (
    FEATURES,
    HEAT,
    INK,
    SERIES,
    Chart,
    Frame,
    Style,
    add_bars,
    add_line,
    apply_colors,
    error_bars,
    evenly_spaced,
    feature_names,
    floats,
    ints,
    new_figure,
    new_panels,
    over_snapshots,
    pick,
    shown,
)
from crosslens.report.entries import figure
from crosslens.report.tables import MEASURES, by_measure, curves, main_measure

MAX_ROWS = 2000  # of the heat map; more would be thinner than a pixel
ORIGINS = ("initial", "emergent", "never")
FATES = ("persistent", "transient")
_ENDS = tuple(f"{name}_{end}" for name in ("born", "born_reversed") for end in ("low", "high"))
_ALL_DEAD = "Every feature is dead: none is active on any held-out token."
_READINGS = {
    ("r2", "all"): "R²",
    ("r2", "lexical"): "R², lexical",
    ("r2", "contextual"): "R², contextual",
    ("within", "contextual"): "within-token R², contextual",
    ("norm", "all"): "decoder norm",
}
_COLUMNS = {
    "<label>": "Presence at this snapshot, divided by the feature's largest.",
}  # of the figures' numbers


@figure(
    "evolution-map",
    section="evolution",
    title="Presence over training",
    tables=("evolution", "lifecycles", "snapshots", "names"),
    wide=True,
    columns=_COLUMNS,
)
def evolution_map(
    evolution: Frame, lifecycles: Frame, snapshots: Frame, names: Frame | None = None, measure: str | None = None
) -> Chart | str:
    """v = R² / largest R² over snapshots (0 to 1). Each row is a feature; rows are ordered by origin, birth and peak,
    then clustered by their curves. Drag to zoom in; a click opens the feature.

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
    figure, axis = over_snapshots(order, "features", even=True, height=620)
    figure.add_heatmap(
        # bytes, which plotly writes as base64: as text, 2000 rows would be most of the page
        z=np.nan_to_num(v * 100).round().astype(np.uint8),
        x=list(axis.positions.values()),
        y=list(range(len(drawn))),
        coloraxis="coloraxis",
        meta=FEATURES,
        hovertemplate="feature %{text}<br>v = %{z}%<extra></extra>",
    )
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
    data = pick(drawn, "feature", "origin", "fate", "birth", "peak")
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
        "within": "unknown (within-token R² below 0.05 at every snapshot, or hardly any variance within token types)",
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


_NULLS = {"untrained": "models that never trained", "exchangeable": "models of other seeds, one step"}
_CURVES = {"born": "forward", "born_reversed": "reversed in time", **_NULLS}


@figure(
    "birth-counts",
    section="evolution",
    title="Births with their controls",
    tables=("birth_counts",),
    wide=True,
    optional=True,
)
def birth_counts(table: Frame) -> Chart | str:
    """Share of features that are born after the first snapshot, over the threshold of presence (a share of the
    feature's largest value), by decoder norm and by decodability (R²): how well the activations of a snapshot alone
    predict the feature on held-out tokens; within-token R² is what the context adds. Bars: 95 % intervals over groups
    of documents. A count is believable as far as it exceeds the same count in a crosscoder over models without a
    history: untrained, or trained ones that differ in their seeds. With the snapshots reversed, features that fade are
    counted, and noise. Lexical features vary mostly between token types.

    Args:
        table: from `count_births`, with or without nulls.
    """
    if not table["n"].sum():
        return _ALL_DEAD
    drawn = table[table["n"] > 0]
    groups = [group for group in _READINGS if group in set(zip(drawn["measure"], drawn["kind"], strict=True))]
    figure, highest = new_panels(len(groups), height=420), 0.0
    for col, group in enumerate(groups, 1):
        rows = drawn[(drawn["measure"] == group[0]) & (drawn["kind"] == group[1])].sort_values("threshold")
        shares = {name: rows[name] / rows["n"] for name in ("born", "born_reversed", *_ENDS) if name in rows}
        rows = rows.assign(**shares)
        highest = max(highest, float(rows.reindex(columns=[*_CURVES, *_ENDS]).max().max()))
        known = set(rows.dropna(axis=1))
        texts = [f"{_READINGS[group]}, threshold {threshold}" for threshold in rows["threshold"]]
        for i, (column, name) in enumerate(_CURVES.items()):
            if column in rows:
                add_line(
                    figure, floats(rows["threshold"]), rows, column, name, Style.of(i), hover=texts, value="%{y:.1%}",
                    error_y=error_bars(rows, column) if f"{column}_low" in known else None,
                    showlegend=col == 1, row=1, col=col,
                )  # fmt: skip
        title = f"{_READINGS[group].replace(', ', '<br>')} ({rows['n'].iloc[0]:,})"
        figure.update_xaxes(title_text=title, tickvals=sorted(set(floats(drawn["threshold"]))), row=1, col=col)
    figure.update_yaxes(range=[-0.02, 1.05 * highest + 0.02], tickformat=".0%")
    figure.update_layout(yaxis_title_text="share of features born")
    at = drawn[(drawn["threshold"] == PRESENCE) & (drawn["kind"] == "all")]
    parts = [
        f"{MEASURES[str(row['measure'])]} {row['born']:,} forward, {row['born_reversed']:,} reversed"
        for row in at.to_dict("records")
    ]
    note = f"At threshold {PRESENCE}, by {'; by '.join(parts)}." if parts else ""
    beyond = at["beyond_trend"].dropna() if "beyond_trend" in at else pd.Series(dtype=float)
    if len(beyond):
        row = at.loc[beyond.index[0]]
        interval = f" ({row['beyond_trend_low']:,.0f} to {row['beyond_trend_high']:,.0f})" * ("beyond_trend_low" in at)
        note += f" Of these births by R², {int(beyond.iloc[0]):,}{interval} exceed the common trend of all features."
    if not any(table[name].notna().any() for name in _NULLS if name in table):
        command = Markup("<code>crosslens evolve --untrained</code> or <code>--null</code>")
        note = Markup("{} Models without a history were not measured; {} do.").format(note, command)
    return Chart(figure, table, note.strip())


@figure(
    "births",
    section="evolution",
    title="Births",
    tables=("lifecycles", "snapshots"),
    columns={
        "persistent": "Features born here that are present at the last snapshot.",
        "transient": "Features born here that disappear for good.",
        "by decoder norm": "Features born here by decoder norm.",
    },
)
def births(lifecycles: Frame, snapshots: Frame) -> Chart | str:
    """Number of emergent features by the snapshot of birth by R², and whether they persist to the last snapshot; beside
    it, the number by decoder norm."""
    measure = main_measure(lifecycles)
    alive = by_measure(lifecycles).dropna(subset=["origin"])
    emergent = alive[alive["origin"] == "emergent"]
    if emergent.empty:
        return f"No feature emerged after the first snapshot by {MEASURES[measure]}."
    figure, axis = over_snapshots(snapshots, "features born", even=True, barmode="stack", bargap=0.25)
    ids = list(axis.labels)
    counts = pd.DataFrame({fate: axis.count(emergent.loc[emergent["fate"] == fate, "birth"]) for fate in FATES})
    add_bars(figure, axis, counts, "features")
    note = (
        f"By {MEASURES[measure]} {len(emergent):,} features emerged; {(alive['origin'] == 'initial').sum():,} initial "
        "ones are not shown."
    )
    if measure != "norm":
        others = by_measure(lifecycles, "norm")
        others = others[others["origin"] == "emergent"]
        by_norm = axis.count(others["birth"])
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
    figure.update_xaxes(title_text="snapshot of birth")
    data = pd.DataFrame({"snapshot": ids, "label": [axis.labels[i] for i in ids]})
    data = pd.concat([data, counts.reset_index(drop=True)], axis=1)
    return Chart(figure, data, note)


@figure(
    "origins",
    section="evolution",
    title="Origin and fate",
    tables=("lifecycles",),
    columns={
        "persistent": "Features of this origin that are present at the last snapshot.",
        "transient": "Features of this origin that disappear for good.",
    },
)
def origins(lifecycles: Frame) -> Chart | str:
    """Number of features by origin, and whether they persist to the last snapshot, by every measure."""
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
    figure.update_xaxes(title_text="features", showgrid=True)
    first = by_measure(lifecycles)
    alive = int(first["alive"].sum())
    note = f"{alive:,} live features, {len(first) - alive:,} dead."
    if "within" in set(read["measure"]):
        note += " By within-token R², features with 5% of their variance within token types or more are read."
    return Chart(figure, data[["measure", "origin", *FATES]], note)


@figure(
    "norm-map",
    section="evolution",
    title="Decoder norms over training",
    tables=("evolution", "lifecycles", "snapshots", "names"),
    wide=True,
    optional=True,
    columns=_COLUMNS,
)
def norm_map(evolution: Frame, lifecycles: Frame, snapshots: Frame, names: Frame | None = None) -> Chart | str:
    """The same for decoder norms, the papers' reading: v = norm / largest norm, ordered by the lifecycles that follow
    from it. Norms do not know the direction of time: see the births with their controls."""
    return evolution_map(evolution, lifecycles, snapshots, names, "norm")
