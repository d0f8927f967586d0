"""Figures of the pages of tasks: effects of features, features over training, ablation and its checks; and all tasks.

Each function turns tables into a chart or a grid, or into a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from crosslens.report.chart import (
    FEATURES,
    GRID,
    HEAT,
    INK,
    MUTED,
    SERIES,
    Cell,
    Chart,
    Frame,
    Grid,
    Prompts,
    SnapshotAxis,
    Style,
    add_level,
    add_line,
    add_matrix,
    add_points,
    apply_colors,
    feature_names,
    floats,
    ints,
    new_figure,
    shown,
    task_link,
    task_pages,
)

N_LINES = 12  # features drawn as lines
N_ROWS = 20  # features in the table
N_TIMELINE = 40  # features in the timeline
MAX_POINTS = 2000  # features in the ternary plot
FINE_COMPLETENESS = 1.0  # per cent; below it the figure is small
MAX_PAIRS = 800  # of a feature and a snapshot
ABLATE_K, KEEP_K = 15, 100  # set sizes over snapshots; the nearest size that was measured is drawn
MIN_CLEAN = 0.1  # of the largest |clean metric|: below this, shares divide by noise
_NOTHING = (
    "No feature has a significant effect on this task (false discovery rate 5%). With more items, smaller effects "
    "become significant."
)
_MEASURES = {
    "share_relie": "share RelIE",
    "relie": "RelIE",
    "decodability": "decodability (R²)",
    "reldec": "RelDec (decoder norm)",
}
_SHORT = {"share_relie": "share<br>RelIE", "relie": "RelIE", "decodability": "R²", "reldec": "RelDec"}
"""The same for the narrow ticks of a phone."""
_SETS = {
    "top": ("top features by effect", Style(SERIES[0], "circle")),
    "random": ("random active features", Style(MUTED, "square", "dash")),
    "size_matched": ("size-matched features", Style(SERIES[1], "diamond", "dot")),
}
# by the column `baseline` of an ablation table
_ABLATED = {
    "zero": "Ablated features are set to zero.",
    "mean": "Ablated features are set to their mean over the prompts.",
    "patch": "Ablated features are set to their value on the paired prompt.",
}
_GAP = 0.1  # between panels, as a fraction of the width
_SIGNED = (SERIES[1], HEAT[0], SERIES[0])  # below zero, zero, above


def completeness(table: Frame, tasks: Frame | None = None) -> Chart | str:
    """Completeness error over snapshots, a line per task, in the colours of `tasks`."""
    data = table[["task", "snapshot", "label", "step", "completeness_error"]].sort_values(["task", "snapshot"])
    values = 100 * data["completeness_error"]
    if values.dropna().empty:
        return "The completeness error is undefined at every snapshot."
    axis = SnapshotAxis.of(data)
    figure = new_figure("error (%)", height=340)
    styles = Style.of_tasks(list(dict.fromkeys(data["task"])), tasks)
    for task, style in styles.items():
        rows = data[data["task"] == task]
        ids = ints(rows["snapshot"])
        percent = floats(100 * rows["completeness_error"])
        add_line(
            figure, axis.x(ids), percent, shown(task), style, hover=axis.hover(ids), value="%{y:.2g}%",
            meta={"page": task_pages(tasks).get(task)},
        )  # fmt: skip
    if (values.dropna() > 0).all():
        figure.update_yaxes(type="log", dtick=1, exponentformat="power", title_text="error (%, log scale)")
    axis.apply(figure)
    worst = data.loc[values.idxmax()]
    small = bool(values.max() <= FINE_COMPLETENESS)
    figure.update_layout(height=230 if small else 340)
    note = Markup("Largest: {}% ({}, {}).").format(
        f"{values.max():.2g}", task_link(str(worst["task"]), tasks), worst["label"]
    )
    return Chart(figure, data.reset_index(drop=True), note, small)


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
        return _NOTHING
    title = _MEASURES[column]
    n = table["snapshot"].nunique()
    if n == 2:
        return _strip(table, names, column, title)
    if n == 3:
        return _ternary(table, names, column)
    said = ""
    if column == "share_relie":
        table, said = _without_chance(table, chance)
    chart = _feature_lines(table, names, column, title)
    chart.figure.update_yaxes(rangemode="tozero")
    return Chart(chart.figure, chart.data, f"{chart.note}{said}")


def _without_chance(table: Frame, chance: Frame | None, not_drawn: str = "Not drawn") -> tuple[Frame, str]:
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
    size = _largest(defined)
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
    size = _largest(defined)
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


def signed_effects(table: Frame, names: Frame | None = None) -> Chart | str:
    """Signed IE of the features that `relative_effects` draws as lines, and of the largest others in grey."""
    if table["ie"].notna().sum() == 0:
        return _NOTHING
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
        ids = ints(rows["snapshot"])
        name, style = shown(called(feature)), Style.of(i)
        if feature in others:
            name, style = f"{name} (n.s.)", replace(style, color=MUTED)
        add_line(
            figure, axis.x(ids), floats(rows[column]), name, style, hover=axis.hover(ids), meta={"feature": feature}
        )
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


def signed_against_relative(table: Frame, names: Frame | None = None, chance: Frame | None = None) -> Chart | str:
    """Signed IE against share RelIE, a point per feature and snapshot, for the features with the largest effects.

    Arguments as in `relative_effects`.
    """
    axis = SnapshotAxis.of(table, even=True)
    features = top_features(table, max(1, MAX_PAIRS // len(axis.labels)))
    if not features:
        return _NOTHING
    rows, said = _without_chance(table[table["feature"].isin(features)], chance)
    rows = rows.dropna(subset=["share_relie"])
    figure = new_figure("IE (logits)", height=440)
    add_points(figure, axis, rows, "share_relie", "ie", "share RelIE %{x:.3f}, IE %{y:+.3f}", names)
    figure.update_xaxes(title_text="share RelIE", showgrid=True, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    note = f"{_which(table, len(features))}{said}"
    columns = [c for c in ("feature", "snapshot", "label", "step", "ie", "ie_se", "share_relie", "relie") if c in rows]
    return Chart(figure, rows[columns].reset_index(drop=True), note)


def effect_budget(table: Frame) -> Chart:
    """The clean and baseline metrics, and the contributions of the features and the error node."""
    rows = table.sort_values("snapshot").reset_index(drop=True)
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
    return Chart(figure, rows[["snapshot", "label", "step", *names]], f"Means over {int(rows['n'].max()):,} prompts.")


def validation(summary: Frame) -> Chart:
    """How well each measure predicts exact effects over snapshots, with intervals.

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
        value = rows["correlation"]
        figure.add_scatter(
            x=[_MEASURES[measure] for measure in measures],
            y=floats(value),
            mode="markers",
            name=name,
            marker={"color": Style.of(i).color, "symbol": Style.of(i).symbol, "size": 9},
            error_y={
                "type": "data",
                "array": floats(rows["high"] - value),
                "arrayminus": floats(value - rows["low"]),
                "thickness": 1,
            },
            hovertemplate="%{x}: %{y:.2f}<extra>" + name + "</extra>",
        )
    figure.update_yaxes(range=[-1.03, 1.03], zeroline=True, zerolinecolor=MUTED)
    figure.update_layout(scattermode="group")
    figure.update_xaxes(
        tickvals=[_MEASURES[measure] for measure in measures], ticktext=[_SHORT[measure] for measure in measures]
    )
    level = f"{float(summary['level'].iloc[0]):.0%}"
    note = f"{int(summary['n_features'].iloc[0]):,} features with a significant effect, bars are {level} intervals."
    return Chart(figure, summary.reset_index(drop=True), note)


def effect_table(table: Frame, snapshots: Frame, names: Frame | None = None) -> Grid | str:
    """IE and its standard error by snapshot, the last first, for the features with the largest effects, tinted by sign
    and size; below those with a significant effect, the largest others in grey.

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
        return _NOTHING
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


def prompt_words(table: Frame, names: Frame | None = None) -> Prompts | str:
    """Prompts with each word tinted by the effect of the features active on it, at any snapshot.

    Args:
        table: from `Attribution.prompt_frame`.
        names: feature, name.
    """
    if not table["effect"].abs().max() > 0:
        return "No feature has an effect on these prompts."
    called = feature_names(names)
    rows = table.sort_values(["prompt", "position", "snapshot"])
    written = rows["token"].astype(str)  # with the spaces between words
    words, text = pd.factorize(written.where(written.str.strip() != "", "␣"))
    rows = rows.assign(word=words)
    snapshots = rows.drop_duplicates("snapshot").sort_values("snapshot")
    prompts: list[dict[str, Any]] = []
    for prompt, part in rows.groupby("prompt", sort=True):
        wide = {
            column: part.pivot(index="snapshot", columns="position", values=column)
            for column in ("effect", "feature", "word")
        }
        effects = [[float(f"{effect:.3g}") for effect in floats(line)] for line in wide["effect"].to_numpy()]
        features = [ints(line) for line in wide["feature"].to_numpy()]
        tokens = ints(wide["word"].iloc[0])
        answers = part.iloc[0][["correct", "wrong"]].tolist() if {"correct", "wrong"} <= set(part) else []
        prompts.append(
            {"id": int(str(prompt)), "tokens": tokens, "effects": effects, "features": features, "answers": answers}
        )
    largest = float(rows["effect"].abs().max())
    known = sorted(set(ints(rows.loc[rows["feature"] >= 0, "feature"])))
    contents = {
        "labels": [str(label) for label in snapshots["label"]],
        "words": text.tolist(),
        "names": {str(feature): called(feature) for feature in known},
        "largest": largest,
        "prompts": prompts,
    }
    note = f"The deepest colour is an effect of {largest:.2f} logits. The {len(prompts)} prompts that were kept."
    return Prompts(contents, rows.drop(columns="word").reset_index(drop=True), note)


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


def top_features(table: Frame, n: int) -> list[int]:
    """The `n` features with the largest |IE| at any snapshot, largest first, among those with a significant effect,
    which have a RelIE."""
    defined = table.dropna(subset=["relie"])
    return ints(_largest(defined).index[:n].to_numpy())


def _others(table: Frame, n: int) -> list[int]:
    """The same among those without a significant effect; effects of zero are left out."""
    significant = table.loc[table["relie"].notna(), "feature"]
    rest: Frame = table[~table["feature"].isin(significant)]
    largest: Frame = _largest(rest)
    return ints(largest[largest > 0].index[:n].to_numpy())


def _largest(table: Frame) -> pd.Series:
    """max over snapshots of |IE| by feature, largest first; ties by feature."""
    return table["ie"].abs().groupby(table["feature"]).max().sort_values(ascending=False, kind="stable")


class _Panel(NamedTuple):
    """A heat map of one column of the table, by row and snapshot."""

    column: str
    title: str
    signed: bool
    number: str


def feature_timeline(table: Frame, known: Frame | None = None, chance: Frame | None = None) -> Chart | str:
    """Decoder norm, signed IE and share RelIE of a task's features, a row each, ordered by when they matter.

    Args:
        table: from `follow_features`.
        known: feature, name.
        chance: as in `relative_effects`.
    """
    if table.empty:
        return _NOTHING
    table, said = _without_chance(table, chance, "Share RelIE is not drawn")
    kept = table[table["feature"].isin(_largest(table).index[:N_TIMELINE])].sort_values(["order", "snapshot"])
    names: dict[str, str] = {}
    for feature, examples in kept.drop_duplicates("feature")[["feature", "examples"]].itertuples(index=False):
        word = str(examples).partition("]")[0].rpartition("[")[2]
        names[str(feature)] = f"{feature} {shown(word, 12)}" if word else str(feature)
    called = feature_names(known, 40)
    texts = [
        f"feature {shown(called(feature), 60)}<br>{shown(text, 110)}"
        for feature, text in kept.drop_duplicates("feature")[["feature", "examples"]].itertuples(index=False)
    ]
    panels = (
        _Panel("strength", "decoder norm / largest norm", False, ".2f"),
        _Panel("ie", "IE (logits)", True, "+.3f"),
        _Panel("share_relie", "share RelIE", False, ".2f"),
    )
    figure = _panels(kept.assign(row=kept["feature"].astype(str)), panels, names, texts)
    marked = kept[kept["top"].astype(bool)]
    axis = SnapshotAxis.of(kept, even=True)
    figure.add_scatter(
        x=axis.x(ints(marked["snapshot"])),
        y=[list(names).index(str(feature)) for feature in marked["feature"]],
        xaxis="x2",
        mode="markers",
        name="among the snapshot's top features",
        marker={"symbol": "circle", "size": 5, "color": INK},
        hoverinfo="skip",
        showlegend=True,
    )
    total = table["feature"].nunique()
    note = (
        "Rows are ordered by the centre of mass of share RelIE, from features that matter early to those that matter "
        "late."
    )
    if total > N_TIMELINE:
        note += f" The {N_TIMELINE} features with the largest |IE| are drawn, of {total:,}."
    note += said
    columns = [name for name in table if name != "order"]
    return Chart(figure, kept[columns].reset_index(drop=True), note)


def _panels(table: Frame, panels: tuple[_Panel, ...], names: dict[str, str], texts: list[str]) -> go.Figure:
    """Heat maps side by side, with a row for each of `names`.

    Args:
        table: columns row, snapshot, label and those of the panels.
        panels: from left to right.
        names: label of each row, by row.
        texts: added to the tooltips of each row.
    """
    axis = SnapshotAxis.of(table, even=True)
    ids, rows = list(axis.labels), list(names)
    height = 190 + 20 * len(rows)
    figure = new_figure("", height=height)
    figure.update_layout(margin_t=114)
    width = (1 - _GAP * (len(panels) - 1)) / len(panels)
    positions, ticks = list(axis.positions.values()), list(axis.names().values())
    ends = sorted({0, len(ids) - 1})
    common: Any = figure.layout["xaxis"].to_plotly_json()
    signed = [table[panel.column].abs().max() for panel in panels if panel.signed]
    largest = float(np.nanmax([*signed, 0.0])) or 1.0  # one scale for all signed panels
    hover = [[f"{name}<br>{text}" for text in axis.hover(ids)] for name in names.values()]
    for n, panel in enumerate(panels):
        suffix = "" if n == 0 else str(n + 1)
        left = n * (width + _GAP)
        wide = table.pivot(index="row", columns="snapshot", values=panel.column).reindex(index=rows, columns=ids)
        figure.add_heatmap(
            z=[floats(row) for row in wide.to_numpy(dtype=float)],
            x=positions,
            y=list(range(len(rows))),
            xaxis=f"x{suffix}",
            coloraxis=f"coloraxis{suffix}",
            text=[[f"{cell}: {panel.title} {_written(value, panel.number)}" + (f"<br>{text}" if text else "")
                   for cell, value in zip(line, floats(values), strict=True)]
                  for line, values, text in zip(hover, wide.to_numpy(dtype=float), texts, strict=True)],
            customdata=[[int(feature)] * len(ids) for feature in rows],
            meta=FEATURES,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            ygap=1,
        )  # fmt: skip
        figure.layout[f"xaxis{suffix}"] = {
            **common,
            "domain": [left, left + width],
            "anchor": "y",
            "tickmode": "array",
            # only the two ends fit below a third of the page
            "tickvals": [positions[i] for i in ends],
            "ticktext": [ticks[i] for i in ends],
            "range": [positions[0] - 0.5, positions[-1] + 0.5],
            "zeroline": False,
        }
        own = float(np.nanmax([*floats(table[panel.column]), 0.0])) or 1.0
        low, high = (-largest, largest) if panel.signed else (0.0, own)
        colors = _SIGNED if panel.signed else HEAT
        figure.layout[f"coloraxis{suffix}"] = {
            "cmin": low,
            "cmax": high,
            "colorscale": [[i / (len(colors) - 1), color] for i, color in enumerate(colors)],
            "colorbar": {
                "orientation": "h",
                "thickness": 10,
                "len": width,
                "x": left,
                "xanchor": "left",
                "xpad": 0,
                "yref": "container",
                "y": 1 - 30 / height,  # below the toolbar
                "yanchor": "top",
                "outlinewidth": 0,
                "ticklabelposition": "outside top",
                "ticklabeloverflow": "allow",
                # only the two ends fit above a third of a phone
                "tickvals": [low, high],
                "ticktext": [_written(tick, ".2g") for tick in (low, high)],
            },
        }
        # in a low figure, the colour bar's own title would overlap it
        figure.add_annotation(
            text=panel.title, x=left, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom", yshift=4,
            showarrow=False, font={"color": INK, "size": 13},
        )  # fmt: skip
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
        tickmode="array",
        tickvals=list(range(len(rows))),
        ticktext=list(names.values()),
        tickfont={"size": 11},
    )
    return figure


def _written(value: float, number: str) -> str:
    return "unknown" if not math.isfinite(value) else f"{value:{number}}".replace("-", "−")


def language_overlap(table: Frame) -> Chart:
    """Number of top features that two languages share, and what chance would give.

    Args:
        table: from `compare_languages`, of one k.
    """
    axis = SnapshotAxis.of(table)
    figure = new_figure("features shared")
    for i, ((one, other), rows) in enumerate(table.groupby(["language", "other"], sort=False)):
        rows = rows.sort_values("snapshot")
        ids = ints(rows["snapshot"])
        texts = [f"{hover}, p = {p:.2g}" for hover, p in zip(axis.hover(ids), floats(rows["p"]), strict=True)]
        name = f"{shown(one)}, {shown(other)}"
        style = Style.of(i)
        add_line(figure, axis.x(ids), floats(rows["shared"]), name, style, hover=texts, value="%{y:d}")
        add_line(
            figure, axis.x(ids), floats(rows["expected"]), f"{name}, by chance",
            Style(style.color, dash="dot", markers=False), hover=axis.hover(ids), value="%{y:.1f}",
            band=(floats(rows["low"]), floats(rows["high"])),
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    axis.apply(figure)
    k = ", ".join(str(size) for size in sorted(set(ints(table["k"]))))
    level = f"{float(table['level'].iloc[0]):.0%}"
    note = f"Sets of k = {k} features. Bands: {level} of sets of features of the same sizes, active in both languages."
    return Chart(figure, table.reset_index(drop=True), note)


def ablation_by_size(table: Frame, mode: str) -> Chart | str:
    """Share of the clean metric by set size, at the last snapshot."""
    rows = _shares(table, mode)
    if rows.empty:
        return f"The ablation table has no rows with mode {mode!r}."
    last = rows["snapshot"].max()
    clean = float(rows.loc[rows["snapshot"] == last, "clean"].iloc[0])
    label = str(rows.loc[rows["snapshot"] == last, "label"].iloc[0])
    rows = rows[(rows["snapshot"] == last) & rows["share"].notna()].sort_values("k")
    if rows.empty:
        return f"The clean metric at {label} is {clean:.3f}, too close to zero to divide by."
    figure = new_figure("share of the clean metric", yaxis_tickformat=".0%")
    _levels(figure, rows, mode)
    sizes = sorted(set(ints(rows["k"])))
    # a logarithmic axis has no 0: the empty set is drawn half a decade before the smallest other
    places = {size: float(size) if size else min((other for other in sizes if other), default=1) / 3 for size in sizes}
    for name, style, lines in _sets(rows):
        k = ints(lines["k"])
        texts = [f"k = {size}" for size in k]
        x = [places[size] for size in k]
        add_line(figure, x, floats(lines["share"]), name, style, hover=texts, value="%{y:.1%}", band=_band(lines))
    figure.update_xaxes(
        type="log",
        title_text="number of features k (log scale)",
        tickmode="array",
        tickvals=list(places.values()),
        ticktext=sizes,
    )
    draws = int(rows["n_draws"].max())
    note = f"At {label}, where the clean metric is {clean:.3f} logits."
    if "baseline" in rows:
        note += f" {_ABLATED[str(rows['baseline'].iloc[0])]}"
    note += f" Bands: the interval of up to {draws:,} random draws, 95% by default."
    return Chart(figure, _ablation_data(rows), note)


def ablation_over_snapshots(table: Frame, mode: str) -> Chart | str:
    """Share of the clean metric over snapshots, at one set size."""
    rows = _shares(table, mode)
    if rows.empty:
        return f"The ablation table has no rows with mode {mode!r}."
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
        add_line(
            figure, axis.x(ids), floats(lines["share"]), name, style, hover=axis.hover(ids), value="%{y:.1%}",
            band=_band(lines),
        )  # fmt: skip
    axis.apply(figure)
    note = f"Sets of k = {k} features. Bands: the interval of the random draws, 95% by default."
    if small:
        labels = ", ".join(axis.labels[int(s)] for s in small)
        note += f" Not shown at {labels}, where |clean metric| is below {MIN_CLEAN:.0%} of its largest value."
    return Chart(figure, _ablation_data(rows), note)


def _shares(table: Frame, mode: str) -> Frame:
    """Rows of a mode with the metric as a share of the clean one, NaN where the clean one is too close to zero.

    share = 1 + (metric - clean) / |clean|. This is metric / clean where clean > 0, and falls with the metric even
    where the model still prefers the wrong answer.
    """
    rows = table[table["mode"] == mode].copy()
    size = rows["clean"].abs()
    size = size.where(size >= MIN_CLEAN * size.max())
    rows["share"] = 1 + (rows["metric"] - rows["clean"]) / size
    for edge in ("low", "high"):
        rows[f"share_{edge}"] = 1 + (rows[f"metric_{edge}"] - rows["clean"]) / size
    return rows


def _sets(rows: Frame) -> list[tuple[str, Style, Frame]]:
    """Name, style and rows of each series: by kind of set, and by error node if both settings were measured."""
    both = rows["error"].nunique() > 1
    series: list[tuple[str, Style, Frame]] = []
    for kind, (name, style) in _SETS.items():
        for error, lines in rows[rows["features"] == kind].groupby("error"):
            suffix = (", error node kept" if error else ", without error node") if both else ""
            symbol = style.symbol + ("-open" if both and error else "")
            series.append((name + suffix, Style(style.color, symbol, style.dash), lines))
    return series


def _band(lines: Frame) -> tuple[list[float], list[float]] | None:
    """The interval over draws; None for a single set."""
    low, high = floats(lines["share_low"]), floats(lines["share_high"])
    return (low, high) if np.isfinite(low).any() else None


def _levels(figure: go.Figure, rows: Frame, mode: str) -> None:
    add_level(figure, 1, "clean")
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED, rangemode="tozero")
    alone = float((rows["reconstruction_only"] / rows["clean"]).iloc[0])
    if mode == "keep" and math.isfinite(alone):
        add_level(figure, alone, "all features (reconstruction)", "dashdot")


def _ablation_data(rows: Frame) -> Frame:
    columns = ("snapshot", "label", "step", "mode", "features", "error", "k", "metric", "metric_sd", "clean",
               "share", "share_sd", "n_draws")  # fmt: skip
    return rows[[c for c in columns if c in rows]].reset_index(drop=True)


def additivity(pairs: Frame, summary: Frame, names: Frame | None = None) -> Chart:
    """Joint effects of pairs of features against the sum of their single effects, at the last snapshot measured.

    Args:
        pairs: `Additivity.pairs`.
        summary: `Additivity.summary`.
        names: feature, name.
    """
    called = feature_names(names)
    row = summary.sort_values("snapshot").iloc[-1]
    points = pairs[pairs["snapshot"] == row["snapshot"]]
    figure = new_figure("effect of ablating both (logits)", height=420)
    ends = [float(np.nanmin(points[["sum", "joint"]])), float(np.nanmax(points[["sum", "joint"]]))]
    figure.add_trace(
        go.Scatter(x=ends, y=ends, mode="lines", name="effects add up", line={"color": MUTED, "dash": "dot"})
    )
    figure.add_scatter(
        x=floats(points["sum"]),
        y=floats(points["joint"]),
        mode="markers",
        name="a pair of features",
        marker={"size": 6, "opacity": 0.7, "color": SERIES[0]},
        customdata=[
            [shown(called(int(a))), shown(called(int(b))), x, y]
            for a, b, x, y in points[["feature_a", "feature_b", "effect_a", "effect_b"]].itertuples(index=False)
        ],
        hovertemplate="features %{customdata[0]} and %{customdata[1]}<br>single effects %{customdata[2]:.3f} and "
        "%{customdata[3]:.3f}<br>sum %{x:.3f}, joint %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="sum of single effects (logits)", showgrid=True, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(zeroline=False, linecolor=INK)
    note = (
        f"At {row['label']}: {int(row['n_pairs'])} pairs of the {int(row['k'])} features with the largest |IE|, on "
        f"{int(row['n_prompts'])} prompts. {row['interacting']:.0%} of them ({row['interacting_low']:.0%} to "
        f"{row['interacting_high']:.0%}) interact: they miss the sum by more than half of the smaller effect. Sum of "
        f"|joint − sum| / sum of |sum| "
        f"{row['deviation']:.1%} ({row['deviation_low']:.1%} to {row['deviation_high']:.1%})."
    )
    return Chart(figure, points.reset_index(drop=True), note)


def transfer(table: Frame) -> Chart | str:
    """Effect of ablating the top features of each snapshot (rows) at every snapshot (columns)."""
    if table["share"].notna().sum() == 0:
        return "Ablating all features changes the metric too little at every snapshot to divide by."
    wide = table.pivot(index="selected_at", columns="ablated_at", values="share").to_numpy(dtype=float)
    rows = table.drop_duplicates("ablated_at")[["ablated_at", "ablated_at_label", "ablated_at_step"]]
    axis = SnapshotAxis.of(rows.set_axis(["snapshot", "label", "step"], axis=1), even=True)
    ids = list(axis.labels)
    hover = axis.hover(ids)
    shared = table.pivot(index="selected_at", columns="ablated_at", values="shared").to_numpy(dtype=int)
    figure = new_figure("top features of", height=160 + 30 * len(ids))
    texts = [
        [
            f"top features of {hover[a]}<br>ablated at {hover[b]}<br>{_percent(wide[a, b])}<br>{shared[a, b]} of them "
            "are also top features there"
            for b in range(len(ids))
        ]
        for a in range(len(ids))
    ]
    add_matrix(figure, wide, texts, axis.x(ids), list(axis.names().values()))
    largest = max(1.0, float(np.nanmax(np.abs(wide))))
    apply_colors(figure, _SIGNED, {-largest: f"−{largest:.0%}", largest: f"{largest:.0%} of the change"})
    axis.apply(figure)
    figure.update_xaxes(title_text="ablated at")
    k = ", ".join(str(size) for size in sorted(set(ints(table["k"]))))
    note = f"Sets of k = {k} features. 100% is the change from ablating all features at that snapshot."
    blank = sorted({str(label) for label in table.loc[table["share"].isna(), "ablated_at_label"]})
    if blank:
        note += f" Blank at {', '.join(blank)}, where this change is too small to divide by."
    return Chart(figure, table.reset_index(drop=True), note)


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.0%} of the change".replace("-", "−")
