"""Effects of features on a task, over snapshots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from crosslens.causal.relative import FDR
from crosslens.report.chart import (
    AT,
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
    add_line,
    add_points,
    add_series,
    error_bars,
    feature_names,
    floats,
    ints,
    new_figure,
    over_snapshots,
    pick,
    shown,
)
from crosslens.report.entries import figure
from crosslens.report.figures.ablation import effects_of, set_to

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
_LATER = " † More than half of what activates the feature is read from later snapshots."
_COLUMNS = {
    "ie_largest": "The effect of largest size, in logits.",
    "share_relie/<label>": "Share RelIE at the snapshot.",
    "relie/<label>": "RelIE at the snapshot.",
}  # of the figures' numbers


@figure(
    "ie-table",
    section="effects",
    title="Features with the largest effects",
    tables=("attribution/<task>", "attribution/<task>.snapshots", "names"),
    wide=True,
)
def effect_table(table: Frame, snapshots: Frame, names: Frame | None = None) -> Grid | str:
    """IE ± standard error over groups of prompts, in logits, by snapshot, the last one first: features with a
    significant effect at some snapshot, largest |IE| first, then, in grey, the largest others. Blue supports the
    correct answer, orange opposes it.

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
    flagged = rows if "mostly_later" in rows else rows.assign(mostly_later=False)
    later = flagged.pivot(index="feature", columns="snapshot", values="mostly_later").reindex_like(ie).astype(bool)
    grid = [
        [Cell(called(feature) + (" (n.s.)" if feature in others else ""), link=f"feature.html#{feature}")]
        + [
            Cell(
                f"{value:+.3f} ±\N{NO-BREAK SPACE}{error:.3f}".replace("-", "−") + "†" * flag,
                0.0 if feature in others else math.copysign(math.sqrt(abs(value) / largest), value),
                muted=feature in others,
            )
            for value, error, flag in zip(ie.loc[feature], se.loc[feature], later.loc[feature], strict=True)
        ]
        for feature in features
    ]
    order = {feature: i for i, feature in enumerate(features)}
    data = rows.sort_values(["feature", "snapshot"], key=lambda column: column.replace(order), kind="stable")
    columns = ("ie", "ie_se", "q", "share_relie", "relie", "reldec", "encoder_share", "read_later")
    note = _which(table, len(top), len(others))
    if later.to_numpy().any():
        note += _LATER
    note += f"{effects_of(snapshots)} {_agreement(snapshots)}"
    return Grid(["feature", *(axis.labels[s] for s in late)], grid, pick(data, "feature", *AT, *columns), note)


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
    section="effects",
    title="Relative effect, of shares (share RelIE)",
    tables=("attribution/<task>", "names", "chance@<task>", "attribution/<task>.snapshots"),
    columns=_COLUMNS,
)
def share_relie_lines(
    table: Frame, names: Frame | None = None, chance: Frame | None = None, snapshots: Frame | None = None
) -> Chart | str:
    """Each snapshot's share of a feature's effect after dividing by the snapshot's total |IE|, for features with a
    significant effect at some snapshot."""
    return relative_effects(table, names, chance, "share_relie", snapshots)


@figure(
    "relie",
    section="effects",
    title="Relative effect (RelIE)",
    tables=("attribution/<task>", "names", "attribution/<task>.snapshots"),
    columns=_COLUMNS,
)
def relie_lines(table: Frame, names: Frame | None = None, snapshots: Frame | None = None) -> Chart | str:
    """Each snapshot's share of a feature's effect, |IE| / sum of |IE|, for features with a significant effect at some
    snapshot."""
    return relative_effects(table, names, column="relie", snapshots=snapshots)


def relative_effects(
    table: Frame,
    names: Frame | None = None,
    chance: Frame | None = None,
    column: str = "share_relie",
    snapshots: Frame | None = None,
) -> Chart | str:
    """Share RelIE or RelIE: a strip for two snapshots, a triangle for three, otherwise lines of the largest effects.

    Args:
        table: from `Attribution.to_frame`.
        names: feature, name.
        chance: label of each snapshot at which accuracy is at chance; lines of share RelIE leave these out.
        column: "share_relie" or "relie".
        snapshots: from `Attribution.snapshot_frame`.
    """
    if table["relie"].notna().sum() == 0:
        return NOTHING
    title, said = _MEASURES[column], effects_of(snapshots)
    n = table["snapshot"].nunique()
    if n == 2:
        return _strip(table, names, column, title, said)
    if n == 3:
        return _ternary(table, names, column, said)
    if column == "share_relie":
        table, left_out = without_chance(table, chance)
        said += left_out
    return _feature_lines(table, names, column, title, said, yaxis_rangemode="tozero")


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


def _strip(table: Frame, names: Frame | None, column: str, title: str, said: str) -> Chart:
    """A point per feature at the share of the second of two snapshots, over its largest signed effect."""
    axis = SnapshotAxis.of(table)
    ends = list(axis.names().values())
    points = _points(table, names, column)
    figure = new_figure("IE (logits)", height=360, yaxis_zerolinecolor=MUTED)
    for name, part, marker in _by_sign(points):
        figure.add_scatter(
            x=floats(part.iloc[:, 1]),
            y=floats(part["ie_largest"]),
            mode="markers",
            name=name,
            marker={**marker, "size": 8},
            customdata=part[["feature", "called"]].to_numpy(dtype=object).tolist(),
            hovertemplate=f"feature %{{customdata[1]}}<br>IE %{{y:+.3f}} logits<br>{ends[1]} %{{x:.2f}}<extra></extra>",
            meta=FEATURES,
        )
    for edge in (0.3, 0.7):
        figure.add_vline(edge, line={"color": MUTED, "dash": "dot", "width": 1})
    figure.update_xaxes(
        title_text=f"{title} of {ends[1]}<br>(0: only {ends[0]}, 1: only {ends[1]})",
        range=[-0.03, 1.03],
        showgrid=True,
        zeroline=False,
    )
    data = points[["feature", "ie_largest"]].assign(**{column: points.iloc[:, 1]})
    note = f"{_which(table, len(points))} Below 0.3 a feature is discontinued, above 0.7 it has emerged.{said}"
    return Chart(figure, data, note)


def _points(table: Frame, names: Frame | None, column: str) -> Frame:
    """A row per feature with a significant effect, largest |IE| first: the column at every snapshot by its number, and
    feature, ie_largest (the effect of largest size) and called (its name, escaped)."""
    defined, called = table.dropna(subset=[column]), feature_names(names)
    order = defined["ie"].abs().sort_values(ascending=False, kind="stable").index
    largest = defined.loc[order].drop_duplicates("feature").set_index("feature")["ie"]
    features = largest_effects(defined).index[:MAX_POINTS]
    points = defined.pivot(index="feature", columns="snapshot", values=column).reindex(features)
    return points.assign(
        feature=features, ie_largest=largest.reindex(features), called=[shown(called(feature)) for feature in features]
    )


def _by_sign(points: Frame) -> list[tuple[str, Frame, dict[str, Any]]]:
    """Name, rows and marker of the features that support the correct answer, and of those that oppose it."""
    supports = points["ie_largest"] > 0
    return [
        ("supports the correct answer", points[supports], {"color": SERIES[0], "symbol": "circle", "opacity": 0.75}),
        ("opposes it", points[~supports], {"color": SERIES[1], "symbol": "diamond", "opacity": 0.75}),
    ]


def _ternary(table: Frame, names: Frame | None, column: str, said: str) -> Chart:
    axis, points = SnapshotAxis.of(table), _points(table, names, column)
    corners, texts = list(axis.labels), list(axis.names().values())
    points[corners] = points[corners].fillna(0.0)
    figure = new_figure("", height=520)
    largest = points["ie_largest"].abs().max()
    for name, part, marker in _by_sign(points):
        figure.add_scatterternary(
            a=floats(part[corners[2]]),
            b=floats(part[corners[0]]),
            c=floats(part[corners[1]]),
            mode="markers",
            name=name,
            # the area grows with |IE|
            marker={**marker, "size": floats(5 + 17 * np.sqrt(part["ie_largest"].abs() / largest)), "line_width": 0},
            customdata=part[["feature", "ie_largest", "called"]].to_numpy(dtype=object).tolist(),
            meta=FEATURES,
            hovertemplate=(
                f"feature %{{customdata[2]}}<br>IE %{{customdata[1]:+.3f}} logits<br>{texts[0]} %{{b:.2f}}<br>"
                f"{texts[1]} %{{c:.2f}}<br>{texts[2]} %{{a:.2f}}<extra></extra>"
            ),
        )
    corner = {"gridcolor": GRID, "linecolor": MUTED, "tickvals": [0.2, 0.4, 0.6, 0.8], "ticks": "", "min": 0}
    axes = {
        f"{side}axis": {**corner, "title": {"text": text, "font": {"color": INK, "size": 13}}, "tickfont_color": MUTED}
        for side, text in zip("bca", texts, strict=True)
    }
    figure.update_layout(
        meta={"axis": "triangle"},
        ternary={"sum": 1, "bgcolor": "rgba(0,0,0,0)", **axes},
        margin={"l": 56, "r": 56, "t": 56, "b": 48},
    )
    data = points[["feature", "ie_largest", *corners]]
    data = data.rename(columns={snapshot: f"{column}/{label}" for snapshot, label in axis.labels.items()})
    hidden = table["feature"].nunique() - table.dropna(subset=[column])["feature"].nunique()
    note = (
        "Each point is a feature, near the corner of the snapshot where it matters most; its area grows with its "
        f"largest |IE|, whose sign gives the colour. {_which(table, len(points))} {hidden:,} without a significant "
        f"effect are omitted.{said}"
    )
    return Chart(figure, data, note)


@figure(
    "ie",
    section="effects",
    title="Signed effect (IE)",
    tables=("attribution/<task>", "names", "attribution/<task>.snapshots"),
)
def signed_effects(table: Frame, names: Frame | None = None, snapshots: Frame | None = None) -> Chart | str:
    """Mean effect over prompts, in logits. Positive values support the correct answer, negative ones oppose it."""
    if table["ie"].notna().sum() == 0:
        return NOTHING
    said = effects_of(snapshots)
    return _feature_lines(table, names, "ie", "IE (logits)", said, fill=True, yaxis_zerolinecolor=MUTED)


def _feature_lines(
    table: Frame, names: Frame | None, column: str, y_title: str, said: str = "", *, fill: bool = False, **layout: Any
) -> Chart:
    """A column over snapshots, a line per feature, for the features with the largest significant effects; up to the
    same number, `fill` adds the largest others in grey."""
    features, called = top_features(table, N_LINES), feature_names(names, 10)
    others = _others(table, N_LINES - len(features)) if fill else []
    figure, axis = over_snapshots(table, y_title, height=400, legend_title_text="feature", **layout)
    parts: list[Frame] = []
    marked = False
    for i, feature in enumerate([*features, *others]):
        rows = table[table["feature"] == feature].sort_values("snapshot")
        name, style = shown(called(feature)), Style.of(i)
        if feature in others:
            name, style = f"{name} (n.s.)", replace(style, color=MUTED)
        hover = [
            f"{at} †" if later else at
            for at, later in zip(axis.hover(rows["snapshot"]), _mostly_later(rows), strict=True)
        ]
        marked |= any(_mostly_later(rows))
        add_series(figure, axis, rows, column, name, style, hover=hover, meta={"feature": feature})
        parts.append(rows)
    extra = ("ie_se", "ie_low", "ie_high", "q") if column == "ie" else (f"{column}_low", f"{column}_high")
    data = pick(pd.concat(parts), "feature", *AT, column, *extra)
    return Chart(figure, data, _which(table, len(features), len(others)) + said + _LATER * marked)


def _mostly_later(rows: Frame) -> list[bool]:
    """At which rows most of what activates the feature is read from later snapshots, as far as that is known."""
    return rows["mostly_later"].astype(bool).tolist() if "mostly_later" in rows else [False] * len(rows)


def _which(table: Frame, drawn: int, others: int = 0) -> str:
    """Which features are shown: those with a significant effect, with how many of them have none, and the largest
    others."""
    n, total = table.loc[table["relie"].notna(), "feature"].nunique(), table["feature"].nunique()
    note = f"{n:,} of {total:,} features have a significant effect at some snapshot (FDR {FDR:.0%}"
    note += f": on average at most {FDR * n:,.1f} of these by chance)"
    if drawn < n:
        note += f"; the {drawn:,} with the largest |IE| are shown"
    if others:
        which = f"the {others:,} with the largest |IE| of" if others < total - n else "all"
        note += f". Grey, n.s.: {which} the others, whose effects are not significant"
    return f"{note}."


@figure(
    "ie-relie",
    section="effects",
    title="Signed and relative effects",
    tables=("attribution/<task>", "names", "chance@<task>", "attribution/<task>.snapshots"),
    wide=True,
)
def signed_against_relative(
    table: Frame, names: Frame | None = None, chance: Frame | None = None, snapshots: Frame | None = None
) -> Chart | str:
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
    figure = new_figure("IE (logits)", height=440, yaxis_zerolinecolor=MUTED)
    add_points(figure, axis, rows, "share_relie", "ie", "share RelIE %{x:.3f}, IE %{y:+.3f}", names)
    figure.update_xaxes(title_text="share RelIE", showgrid=True, zeroline=False)
    data = pick(rows, "feature", *AT, "ie", "ie_se", "share_relie", "relie")
    return Chart(figure, data, _which(table, len(features)) + effects_of(snapshots) + said)


@figure(
    "budget",
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
    figure, axis = over_snapshots(rows, "logits", yaxis_zerolinecolor=MUTED)
    for i, (column, name) in enumerate(names.items()):
        add_series(figure, axis, rows, column, name, Style.of(i))
    note = effects_of(rows).strip() or f"Means over {int(rows['n'].max()):,} prompts."
    return Chart(figure, rows[[*AT, *names]], note)


@figure(
    "validation",
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
    figure = new_figure(
        "Spearman correlation with exact effects", yaxis_range=[-1.03, 1.03], yaxis_zerolinecolor=MUTED,
        scattermode="group",
    )  # fmt: skip
    measures = [name for name in _MEASURES if name in set(summary["measure"])]
    drawn = [_MEASURES[measure] for measure in measures]
    for i, ((kind, target), name) in enumerate(names.items()):
        rows = summary[(summary["kind"] == kind) & (summary["target"] == target)].set_index("measure").reindex(measures)
        add_line(
            figure, drawn, rows, "correlation", name, Style.of(i), hover=drawn, value="%{y:.2f}", mode="markers",
            error_y=error_bars(rows, "correlation"),
        )  # fmt: skip
    figure.update_xaxes(tickvals=drawn, ticktext=[_SHORT[measure] for measure in measures])
    level = f"{float(summary['level'].iloc[0]):.0%}"
    note = f"{set_to(summary)}{int(summary['n_features'].iloc[0]):,} features with a significant effect, bars are "
    note += f"{level} intervals."
    if "partial" in summary:
        rows = summary[(summary["kind"] == "within") & summary["partial"].notna()]
        found = [
            f"{_MEASURES[str(row['measure'])]} {row['partial']:.2f} ({row['partial_low']:.2f} to "
            f"{row['partial_high']:.2f})" + " of shares" * (row["target"] == "share")
            for row in rows.to_dict("records")
        ]
        note += f" Most effects grow in training. Beyond the snapshot's index: {', '.join(found)}." * bool(found)
    return Chart(figure, summary, note)


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
