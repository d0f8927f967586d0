"""Effects of features on a task, over snapshots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from crosslens.report.chart import (
    FEATURES,
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
    add_points,
    add_series,
    error_bars,
    feature_names,
    floats,
    ints,
    new_figure,
    shown,
)
from crosslens.report.entries import figure

N_LINES = 12  # features drawn as lines
N_ROWS = 20  # features in the table
MAX_POINTS = 2000  # features in the ternary plot
MAX_PAIRS = 800  # of a feature and a snapshot
NOTHING = (
    "No feature has a significant effect on this task (false discovery rate 5%). With more items, smaller effects "
    "become significant."
)
_MEASURES = {
    "share_relie": "share RelIE",
    "relie": "RelIE",
    "decodability": "decodability (R²)",
    "reldec": "RelDec (decoder norm)",
    "snapshot": "the snapshot's index alone",
}
_SHORT = {
    "share_relie": "share<br>RelIE",
    "relie": "RelIE",
    "decodability": "R²",
    "reldec": "RelDec",
    "snapshot": "snapshot<br>alone",
}
_COLUMNS = {
    "ie_largest": "The effect of largest size, in logits.",
    "share_relie/<label>": "Share RelIE at the snapshot.",
    "relie/<label>": "RelIE at the snapshot.",
}  # of the figures' numbers


@figure(
    "ie-table",
    page="task",
    section="effects",
    title="Features with the largest effects",
    tables=("attribution/<task>", "attribution/<task>.snapshots", "names"),
    wide=True,
)
def effect_table(table: Frame, snapshots: Frame, names: Frame | None = None) -> Grid | str:
    """IE ± standard error over prompts, in logits, by snapshot, the last one first: features with a significant effect
    at some snapshot, largest |IE| first, then, in grey, the largest others. Blue supports the correct answer, orange
    opposes it.

    Args:
        table: from `Attribution.to_frame`.
        snapshots: from `Attribution.snapshot_frame`.
        names: feature, name.
    """
    called = feature_names(names)
    top = top_features(table, N_ROWS)
    others = _others(table, N_ROWS - len(top))
    features = [*top, *others]
    if not features:
        return NOTHING
    axis = SnapshotAxis.of(table)
    rows = table[table["feature"].isin(features)]
    late = list(axis.labels)[::-1]
    ie = rows.pivot(index="feature", columns="snapshot", values="ie").reindex(index=features, columns=late)
    se = rows.pivot(index="feature", columns="snapshot", values="ie_se").reindex_like(ie)
    largest = float(np.nanmax(np.abs(ie.to_numpy())))
    if "mostly_later" in rows:
        flags = rows.pivot(index="feature", columns="snapshot", values="mostly_later").reindex_like(ie)
        later = {feature: flags.loc[feature].astype(bool).tolist() for feature in features}
    else:
        later = {feature: [False] * ie.shape[1] for feature in features}
    grid = [
        [Cell(called(feature) + (" (n.s.)" if feature in others else ""), link=f"feature.html#{feature}")]
        + [
            Cell(
                f"{value:+.3f} ±\N{NO-BREAK SPACE}{error:.3f}".replace("-", "−") + ("†" if late else ""),
                0.0 if feature in others else math.copysign(math.sqrt(abs(value) / largest), value),
                muted=feature in others,
            )
            for value, error, late in zip(floats(ie.loc[feature]), floats(se.loc[feature]), later[feature], strict=True)
        ]
        for feature in features
    ]
    order = {feature: i for i, feature in enumerate(features)}
    data = rows.sort_values(["feature", "snapshot"], key=lambda column: column.replace(order), kind="stable")
    columns = [c for c in ("feature", "snapshot", "label", "step", "ie", "ie_se", "q", "share_relie", "relie",
               "reldec", "encoder_share", "read_later") if c in data]  # fmt: skip
    note = _which(table, len(top), len(others))
    if any(any(flags) for flags in later.values()):
        note += " † More than half of what activates the feature is read from later snapshots."
    note += f" {_agreement(snapshots)}"
    return Grid(["feature", *(axis.labels[s] for s in late)], grid, data[columns].reset_index(drop=True), note)


def _agreement(snapshots: Frame) -> str:
    """How far the estimates agree with exact effects of the same kind."""
    method = f"Estimated by {snapshots['method'].iloc[0]}"
    known = snapshots.dropna(subset=["agreement"]) if "agreement" in snapshots else snapshots.iloc[:0]
    if known.empty:
        return f"{method}."
    worst = known.loc[known["agreement"].idxmin()]
    return (
        f"{method}; rank correlation of the largest effects with exact ablation "
        f"{known.sort_values('snapshot')['agreement'].iloc[-1]:.2f} at the last snapshot, lowest "
        f"{worst['agreement']:.2f} at {worst['label']}."
    )


@figure(
    "share-relie",
    page="task",
    section="effects",
    title="Relative effect, of shares (share RelIE)",
    tables=("attribution/<task>", "names", "chance@<task>"),
    columns=_COLUMNS,
)
def share_relie_lines(table: Frame, names: Frame | None = None, chance: Frame | None = None) -> Chart | str:
    """Each snapshot's share of a feature's effect after dividing by the snapshot's total |IE|, for features with a
    significant effect at some snapshot."""
    return relative_effects(table, names, chance, "share_relie")


@figure(
    "relie",
    page="task",
    section="effects",
    title="Relative effect (RelIE)",
    tables=("attribution/<task>", "names"),
    columns=_COLUMNS,
)
def relie_lines(table: Frame, names: Frame | None = None) -> Chart | str:
    """Each snapshot's share of a feature's effect, |IE| / sum of |IE|, for features with a significant effect at some
    snapshot."""
    return relative_effects(table, names, column="relie")


def relative_effects(
    table: Frame, names: Frame | None = None, chance: Frame | None = None, column: str = "share_relie"
) -> Chart | str:
    """Share RelIE or RelIE: a strip for two snapshots, a triangle for three, otherwise lines of the largest effects.

    Args:
        table: from `Attribution.to_frame`.
        names: feature, name.
        chance: label of each snapshot at which accuracy is at chance; lines of share RelIE leave these out.
        column: "share_relie" or "relie".
    """
    if table["relie"].notna().sum() == 0:
        return NOTHING
    title = _MEASURES[column]
    n = table["snapshot"].nunique()
    if n == 2:
        return _strip(table, names, column, title)
    if n == 3:
        return _ternary(table, names, column)
    said = ""
    if column == "share_relie":
        table, said = without_chance(table, chance)
    chart = _feature_lines(table, names, column, title)
    chart.figure.update_yaxes(rangemode="tozero")
    return Chart(chart.figure, chart.data, f"{chart.note}{said}")


def without_chance(table: Frame, chance: Frame | None, not_drawn: str = "Not drawn") -> tuple[Frame, str]:
    """The table without share RelIE where accuracy is at chance, and a sentence that says so.

    The total |IE| is tiny at these snapshots, so that a share of it can be large without meaning anything.
    """
    labels = list(dict.fromkeys(table.sort_values("snapshot")["label"]))
    at_chance = [label for label in labels if chance is not None and label in set(chance["label"])]
    if not at_chance or len(at_chance) == len(labels):
        return table, " Accuracy is at chance at every snapshot." if at_chance else ""
    left = table.assign(share_relie=table["share_relie"].mask(table["label"].isin(at_chance)))
    return left, (
        f" {not_drawn} at {', '.join(at_chance)}, where accuracy is at chance: the total effect is tiny there, so that "
        "shares of it say nothing."
    )


def _strip(table: Frame, names: Frame | None, column: str, title: str) -> Chart:
    """A point per feature at the share of the second of two snapshots, over its largest signed effect."""
    axis = SnapshotAxis.of(table)
    _, second = axis.labels
    called, ends = feature_names(names), list(axis.names().values())
    defined = table.dropna(subset=[column])
    size = largest_effects(defined)
    features = size.index[:MAX_POINTS]
    share = defined[defined["snapshot"] == second].set_index("feature")[column].reindex(features)
    strongest: Frame = _strongest(defined, features)
    figure = new_figure("IE (logits)", height=360)
    for name, inside, style in (
        ("supports the correct answer", strongest > 0, Style(SERIES[0], "circle")),
        ("opposes it", strongest <= 0, Style(SERIES[1], "diamond")),
    ):
        figure.add_scatter(
            x=floats(share[inside]),
            y=floats(strongest[inside]),
            mode="markers",
            name=name,
            marker={"color": style.color, "symbol": style.symbol, "opacity": 0.75, "size": 8},
            customdata=[[f, shown(called(f))] for f in ints(strongest[inside].index.to_numpy())],
            hovertemplate=f"feature %{{customdata[1]}}<br>IE %{{y:+.3f}} logits<br>{ends[1]} %{{x:.2f}}<extra></extra>",
            meta=FEATURES,
        )
    for edge in (0.3, 0.7):
        figure.add_vline(edge, line={"color": MUTED, "dash": "dot", "width": 1})
    figure.update_xaxes(
        title_text=f"{title} of {ends[1]}<br>(0: only {ends[0]}, 1: only {ends[1]})",
        range=[-0.03, 1.03],
        showgrid=True,
        gridcolor=GRID,
        zeroline=False,
    )
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    data = pd.DataFrame({"feature": features, "ie_largest": strongest.to_numpy(), column: share.to_numpy()})
    note = (
        f"{len(features):,} features with a significant effect. Below 0.3 a feature is discontinued, above 0.7 it has "
        "emerged."
    )
    return Chart(figure, data, note)


def _strongest(table: Frame, features: pd.Index) -> pd.Series:
    """The effect of largest |IE| of each feature."""
    order = table["ie"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].drop_duplicates("feature").set_index("feature")["ie"].reindex(features)


def _ternary(table: Frame, names: Frame | None, column: str) -> Chart:
    axis, called = SnapshotAxis.of(table), feature_names(names)
    corners = list(axis.labels)
    defined = table.dropna(subset=[column])
    size = largest_effects(defined)
    features = size.index[:MAX_POINTS]
    shares = defined.pivot(index="feature", columns="snapshot", values=column).reindex(features)[corners].fillna(0.0)
    strongest: Any = _strongest(defined, features)
    texts = list(axis.names().values())
    figure = new_figure("", height=520)
    signs = "supports the correct answer", "opposes it"
    for i, (name, inside) in enumerate(zip(signs, (strongest > 0, strongest <= 0), strict=True)):
        part = shares[inside]
        figure.add_scatterternary(
            a=floats(part[corners[2]]),
            b=floats(part[corners[0]]),
            c=floats(part[corners[1]]),
            mode="markers",
            name=name,
            marker={
                "color": SERIES[i],
                "symbol": ("circle", "diamond")[i],
                "opacity": 0.75,
                # the area grows with |IE|
                "size": [5 + 17 * math.sqrt(v / size.iloc[0]) for v in size[part.index]],
                "line": {"width": 0},
            },
            customdata=[[f, float(strongest[f]), shown(called(f))] for f in ints(part.index.to_numpy())],
            meta=FEATURES,
            hovertemplate=(
                f"feature %{{customdata[2]}}<br>IE %{{customdata[1]:+.3f}} logits<br>{texts[0]} %{{b:.2f}}<br>"
                f"{texts[1]} %{{c:.2f}}<br>{texts[2]} %{{a:.2f}}<extra></extra>"
            ),
        )
    corner = {"gridcolor": GRID, "linecolor": MUTED, "tickvals": [0.2, 0.4, 0.6, 0.8], "ticks": "", "min": 0}
    figure.update_layout(
        meta={"axis": "triangle"},
        ternary={
            "sum": 1,
            "bgcolor": "rgba(0,0,0,0)",
            **{
                f"{side}axis": {
                    **corner,
                    "title": {"text": text, "font": {"color": INK, "size": 13}},
                    "tickfont": {"color": MUTED},
                }
                for side, text in zip("bca", texts, strict=True)
            },
        },
        margin={"l": 56, "r": 56, "t": 56, "b": 48},
    )
    data = pd.DataFrame({"feature": features, "ie_largest": strongest.to_numpy()})
    for corner_snapshot in corners:
        data[f"{column}/{axis.labels[corner_snapshot]}"] = shares[corner_snapshot].to_numpy()
    hidden = table["feature"].nunique() - len(size)
    note = (
        "Each point is a feature, near the corner of the snapshot where it matters most; its area grows with its "
        f"largest |IE|, whose sign gives the colour. {len(features):,} features; {hidden:,} without a significant "
        "effect are omitted."
    )
    if len(features) < len(size):
        note += f" {len(size) - len(features):,} with smaller effects are not drawn."
    return Chart(figure, data, note)


@figure("ie", page="task", section="effects", title="Signed effect (IE)", tables=("attribution/<task>", "names"))
def signed_effects(table: Frame, names: Frame | None = None) -> Chart | str:
    """Mean effect over prompts, in logits. Positive values support the correct answer, negative ones oppose it."""
    if table["ie"].notna().sum() == 0:
        return NOTHING
    chart = _feature_lines(table, names, "ie", "IE (logits)", fill=True)
    chart.figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    return chart


def _feature_lines(table: Frame, names: Frame | None, column: str, y_title: str, *, fill: bool = False) -> Chart:
    """A column over snapshots, a line per feature, for the features with the largest significant effects; up to the
    same number, `fill` adds the largest others in grey."""
    features, called = top_features(table, N_LINES), feature_names(names, 10)
    others = _others(table, N_LINES - len(features)) if fill else []
    axis = SnapshotAxis.of(table)
    figure = new_figure(y_title, height=400)
    parts: list[Frame] = []
    for i, feature in enumerate([*features, *others]):
        rows = table[table["feature"] == feature].sort_values("snapshot")
        name, style = shown(called(feature)), Style.of(i)
        if feature in others:
            name, style = f"{name} (n.s.)", replace(style, color=MUTED)
        add_series(figure, axis, rows, column, name, style, meta={"feature": feature})
        parts.append(rows)
    figure.update_layout(legend_title_text="feature")
    axis.apply(figure)
    data = pd.concat(parts, ignore_index=True)
    extra = ("ie_se", "ie_low", "ie_high", "q") if column == "ie" else (f"{column}_low", f"{column}_high")
    columns = [c for c in ("feature", "snapshot", "label", "step", column, *extra) if c in data]
    return Chart(figure, data[columns], _which(table, len(features), len(others)))


def _which(table: Frame, drawn: int, others: int = 0) -> str:
    """Which features are shown: those with a significant effect, and the largest others."""
    n, total = table.loc[table["relie"].notna(), "feature"].nunique(), table["feature"].nunique()
    note = f"{n:,} of {total:,} features have a significant effect (FDR 5%) at some snapshot"
    if drawn < n:
        note += f"; the {drawn:,} with the largest |IE| are shown"
    if others:
        which = f"the {others:,} with the largest |IE| of" if others < total - n else "all"
        note += f". Grey, n.s.: {which} the others, whose effects are not significant"
    return f"{note}."


@figure(
    "ie-relie",
    page="task",
    section="effects",
    title="Signed and relative effects",
    tables=("attribution/<task>", "names", "chance@<task>"),
    wide=True,
)
def signed_against_relative(table: Frame, names: Frame | None = None, chance: Frame | None = None) -> Chart | str:
    """A point per feature and snapshot, coloured by snapshot. Points on the right belong to features that act mostly at
    that snapshot, points on the left to features that act mostly at others.

    Arguments as in `relative_effects`.
    """
    axis = SnapshotAxis.of(table, even=True)
    features = top_features(table, max(1, MAX_PAIRS // len(axis.labels)))
    if not features:
        return NOTHING
    rows, said = without_chance(table[table["feature"].isin(features)], chance)
    rows = rows.dropna(subset=["share_relie"])
    figure = new_figure("IE (logits)", height=440)
    add_points(figure, axis, rows, "share_relie", "ie", "share RelIE %{x:.3f}, IE %{y:+.3f}", names)
    figure.update_xaxes(title_text="share RelIE", showgrid=True, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    note = f"{_which(table, len(features))}{said}"
    columns = [c for c in ("feature", "snapshot", "label", "step", "ie", "ie_se", "share_relie", "relie") if c in rows]
    return Chart(figure, rows[columns].reset_index(drop=True), note)


@figure(
    "budget",
    page="task",
    section="effects",
    title="Decomposition of the metric",
    tables=("completeness/<task>",),
    wide=True,
    optional=True,
)
def effect_budget(table: Frame) -> Chart:
    """Clean metric, baseline metric, and the summed effects of all features and of the error node by integrated
    gradients, in logits. Features + error node + baseline add up to the clean metric."""
    rows = table.sort_values("snapshot").reset_index(drop=True)
    names = {
        "metric_clean": "clean metric",
        "features_effect": "sum of IE over features",
        "error_effect": "error node",
        "metric_baseline": "baseline metric",
    }
    axis = SnapshotAxis.of(rows)
    figure = new_figure("logits")
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    for i, (column, name) in enumerate(names.items()):
        add_series(figure, axis, rows, column, name, Style.of(i))
    axis.apply(figure)
    return Chart(figure, rows[["snapshot", "label", "step", *names]], f"Means over {int(rows['n'].max()):,} prompts.")


@figure(
    "validation",
    page="task",
    section="effects",
    title="Which measure says when a feature acts",
    tables=("validation/<task>.summary",),
    wide=True,
    optional=True,
)
def validation(summary: Frame) -> Chart:
    """Every feature with a significant effect is ablated alone at every snapshot, on held-out prompts. Correlation of
    each measure with these exact effects: over the snapshots of a feature (when it acts), and over features, of the
    ratio between neighbouring snapshots (which features grow).

    Args:
        summary: `Validation.summary`.
    """
    names = {
        ("within", "effect"): "when a feature acts",
        ("within", "share"): "when a feature acts, as a share of all",
        ("pairs", "effect"): "which features grow",
        ("pairs", "share"): "which features grow, as a share of all",
    }
    figure = new_figure("Spearman correlation with exact effects", height=380)
    measures = [name for name in _MEASURES if name in set(summary["measure"])]
    for i, ((kind, target), name) in enumerate(names.items()):
        rows = summary[(summary["kind"] == kind) & (summary["target"] == target)].set_index("measure").reindex(measures)
        figure.add_scatter(
            x=[_MEASURES[measure] for measure in measures],
            y=floats(rows["correlation"]),
            mode="markers",
            name=name,
            marker={"color": Style.of(i).color, "symbol": Style.of(i).symbol, "size": 9},
            error_y=error_bars(
                *(floats(rows[edge]) for edge in ("correlation", "correlation_low", "correlation_high")), thickness=1
            ),
            hovertemplate="%{x}: %{y:.2f}<extra>" + name + "</extra>",
        )
    figure.update_yaxes(range=[-1.03, 1.03], zeroline=True, zerolinecolor=MUTED)
    figure.update_layout(scattermode="group")
    figure.update_xaxes(
        tickvals=[_MEASURES[measure] for measure in measures], ticktext=[_SHORT[measure] for measure in measures]
    )
    level = f"{float(summary['level'].iloc[0]):.0%}"
    note = f"{int(summary['n_features'].iloc[0]):,} features with a significant effect, bars are {level} intervals."
    if "partial" in summary:
        rows = summary[(summary["kind"] == "within") & summary["partial"].notna()]
        found = [
            f"{_MEASURES[str(row['measure'])]} {row['partial']:.2f} ({row['partial_low']:.2f} to "
            f"{row['partial_high']:.2f})" + " of shares" * (row["target"] == "share")
            for row in rows.to_dict("records")
        ]
        note += f" Most effects grow in training. Beyond the snapshot's index: {', '.join(found)}." * bool(found)
    return Chart(figure, summary.reset_index(drop=True), note)


def top_features(table: Frame, n: int) -> list[int]:
    """The `n` features with the largest |IE| at any snapshot, largest first, among those with a significant effect,
    which have a RelIE."""
    defined = table.dropna(subset=["relie"])
    return ints(largest_effects(defined).index[:n].to_numpy())


def _others(table: Frame, n: int) -> list[int]:
    """The same among those without a significant effect; effects of zero are left out."""
    significant = table.loc[table["relie"].notna(), "feature"]
    rest: Frame = table[~table["feature"].isin(significant)]
    largest: Frame = largest_effects(rest)
    return ints(largest[largest > 0].index[:n].to_numpy())


def largest_effects(table: Frame) -> pd.Series:
    """max over snapshots of |IE| by feature, largest first; ties by feature."""
    return table["ie"].abs().groupby(table["feature"]).max().sort_values(ascending=False, kind="stable")
