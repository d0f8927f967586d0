"""Figures of the Overview page: accuracy, reconstruction, what the model predicts when, which snapshots to use; and the
table of tasks and their items.

Each function turns tables into a chart, or into a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup

from crosslens.report.chart import (
    MUTED,
    Cell,
    Chart,
    Frame,
    Grid,
    SnapshotAxis,
    Style,
    add_level,
    add_line,
    evenly_spaced,
    floats,
    ints,
    new_figure,
    shown,
    task_link,
    task_pages,
)

N_ITEMS = 3  # items shown as examples of a task
# where the values are at least this good, the figure is small
FINE_EV, FINE_DEAD, FINE_CE, FINE_KL = 0.9, 0.1, 0.95, 0.1
_FAINT = "rgba(107,116,126,0.16)"  # MUTED, as a band
_NATS = {"kl1": "unigram KL", "kl2": "bigram KL", "loss": "loss"}
_SHARES = {
    "bigram_progress": "fall of the bigram KL completed",
    "settled": "features settled",
    "present": "features present",
    "dimensionality": "total dimensionality / d_model",
}


def accuracy(table: Frame, tasks: Frame | None = None, *, links: bool = True) -> Chart:
    """Accuracy per task over snapshots, with its 95% interval as a band, in the colours of `tasks`.

    Args:
        table: from `Task.accuracy`, of one task or several.
        tasks: the run's table of that name.
        links: link to the pages of the tasks.
    """
    axis = SnapshotAxis.of(table)
    figure = new_figure("accuracy", yaxis_tickformat=".0%", yaxis_range=[-0.03, 1.05])
    add_level(figure, 0.5, "chance")
    styles = Style.of_tasks(list(dict.fromkeys(table["task"])), tasks)
    pages = tasks if links else None
    for task, style in styles.items():
        rows = table[table["task"] == task].sort_values("snapshot")
        ids = ints(rows["snapshot"])
        add_line(
            figure,
            axis.x(ids),
            floats(rows["accuracy"]),
            shown(task),
            style,
            hover=axis.hover(ids),
            value="%{y:.1%}",
            band=(floats(rows["low"]), floats(rows["high"])),
            meta={"page": task_pages(pages).get(task)},
        )
    axis.apply(figure)
    columns = ("task", "snapshot", "label", "step", "tokens", "accuracy", "low", "high", "at_chance", "n", "few")
    columns += ("skipped", "reasons", "merged", "merged_reasons")
    notes = [
        Markup("{} {}").format(task_link(str(task), pages), _items(rows))
        for task, rows in table.groupby("task", sort=False)
    ]
    return Chart(figure, _pick(table, *columns), Markup("Items: {}.").format(Markup("; ").join(notes)))


def _items(rows: Frame) -> str:
    """How many items a task has, what was left out of it, and where its accuracy is at chance."""
    first = rows.iloc[0]
    parts = [f"{int(rows['n'].max()):,}"]
    if first.get("few", False):
        parts.append("too few for means over tasks")
    parts += filter(None, [_left_out(first)])
    if "at_chance" in rows and rows["at_chance"].any():
        labels = rows.loc[rows["at_chance"].astype(bool)].sort_values("snapshot")["label"]
        parts.append("at chance at " + (", ".join(labels) if len(labels) < len(rows) else "every snapshot"))
    return ", ".join(parts)


def _left_out(row: Any) -> str:
    """How many items of a task were merged or skipped, and why, from a row of the accuracy table."""
    parts = (("merged", "merged_reasons"), ("skipped", "reasons"))
    return ", ".join(f"{int(row[name]):,} {name} ({row[reasons]})" for name, reasons in parts if row.get(name, 0))


def task_table(tasks: Frame) -> Grid:
    """Items and accuracy at the last snapshot, a row per task, with a link to its page.

    Args:
        tasks: the run's table of that name.
    """
    rows: list[list[Cell]] = []
    for row in tasks.to_dict("records"):
        if pd.isna(row.get("accuracy", math.nan)):
            texts = ["not measured", "", "", "", ""]
        else:
            interval = f"[{row['low']:.1%}, {row['high']:.1%}]"
            texts = [f"{row['n']:,.0f}", _left_out(row) or "none", row["label"], f"{row['accuracy']:.1%}", interval]
        rows.append([Cell(row["task"], link=row["page"]), *(Cell(str(text)) for text in texts)])
    header = ["task", "items", "left out", "snapshot", "accuracy", "95% interval"]
    return Grid(header, rows, tasks)


def item_table(table: Frame) -> Grid:
    """Some items of a task: the prompt, its answers and the paired prompt, where there are pairs.

    Args:
        table: from `Attribution.prompt_frame`.
    """
    titles = {"prefix": "prompt", "correct": "correct", "wrong": "wrong"}
    if table["paired"].notna().any():
        titles["paired"] = "paired prompt"
    items = table.drop_duplicates("prompt").sort_values("prompt")[["prompt", *titles]].reset_index(drop=True)
    rows = [
        [Cell(f"prompt {prompt}"), *(Cell("" if text is None else str(text).strip()) for text in texts)]
        for prompt, *texts in evenly_spaced(items, N_ITEMS).itertuples(index=False)
    ]
    return Grid(["", *titles.values()], rows, items)


def explained_variance(table: Frame) -> Chart:
    """Explained variance of the reconstruction, by both definitions."""
    names = {"explained_variance": "over all tokens", "explained_variance_per_token": "mean over tokens"}
    small = bool(table["explained_variance"].min() >= FINE_EV)
    chart = _per_snapshot(table, names, "explained variance", value="%{y:.4f}", small=small)
    mean, worst = table["explained_variance"].mean(), table["explained_variance"].min()
    label = table.loc[table["explained_variance"].idxmin(), "label"]
    return Chart(chart.figure, chart.data, f"Over all tokens: mean {mean:.3f}, lowest {worst:.3f} at {label}.", small)


def l0(table: Frame) -> Chart | str:
    """Active features per token; in words if all snapshots share a gate."""
    if table["l0"].nunique() == 1:
        return f"{table['l0'].iloc[0]:.2f} at every snapshot."
    chart = _per_snapshot(table, {"l0": "L0"}, "L0", value="%{y:.2f}", small=True)
    chart.figure.update_yaxes(rangemode="tozero")
    note = f"Mean {table['l0'].mean():.2f}."
    if "dead_fraction" in table:
        note += f" Dead features: {table['dead_fraction'].iloc[0]:.1%}."
    return Chart(chart.figure, chart.data, note, small=True)


def dead(table: Frame) -> Chart | str:
    """Percentage of features that are active on no held-out token; in words if all snapshots share a gate."""
    percent = table.assign(dead=100 * table["dead_fraction"])
    if percent["dead"].nunique() == 1:
        return f"{percent['dead'].iloc[0]:.1f}% at every snapshot."
    small = bool(percent["dead"].max() <= 100 * FINE_DEAD)
    chart = _per_snapshot(percent, {"dead": "dead features"}, "dead (%)", value="%{y:.2f}", small=small)
    chart.figure.update_yaxes(rangemode="tozero")
    return Chart(chart.figure, chart.data, small=small)


def cross_entropy(table: Frame) -> Chart:
    """Cross-entropy of the clean, spliced and zero-ablated models."""
    names = {"ce_clean": "clean", "ce_spliced": "spliced", "ce_zero": "zero-ablated"}
    recovered: Any = pd.to_numeric(table["ce_recovered"], errors="coerce") if "ce_recovered" in table else pd.Series()
    known = recovered.dropna()
    small = bool(known.min() >= FINE_CE)
    chart = _per_snapshot(table, names, "nats per token", small=small)
    if known.empty:
        note = "CE recovered is undefined at every snapshot: zero ablation costs less than 0.1 nats."
    else:
        note = f"CE recovered: {known.min():.3f} to {known.max():.3f}."
        if missing := len(table) - len(known):
            note += f" Undefined at {missing} of {len(table)} snapshots, where zero ablation costs less than 0.1 nats."
    return Chart(chart.figure, chart.data, note, small)


def kl(table: Frame) -> Chart:
    """KL divergence of the spliced model from the clean one."""
    small = bool(table["kl"].max() <= FINE_KL)
    chart = _per_snapshot(table, {"kl": "KL"}, "nats per token", value="%{y:.4f}", small=small)
    chart.figure.update_yaxes(rangemode="tozero")
    return chart


def dynamics(table: Frame, phases: Frame | None = None) -> Chart:
    """KL from n-gram predictions and loss in the upper panel, shares of features in the lower one.

    Args:
        table: from `dynamics_table` or `Dynamics.to_frame`.
        phases: from `find_phases`; its turning point is marked.
    """
    rows = table.sort_values("snapshot")
    axis = SnapshotAxis.of(rows)
    ids = ints(rows["snapshot"])
    x, hover = axis.x(ids), axis.hover(ids)
    shares = [name for name in _SHARES if name in rows]
    figure = new_figure("nats per token", height=320 + 240 * bool(shares))
    for i, (name, title) in enumerate(_NATS.items()):
        band = floats(rows[f"{name}_low"]), floats(rows[f"{name}_high"])
        add_line(
            figure, x, floats(rows[name]), title, Style.of(i), hover=hover, value="%{y:.3f} nats", band=band
        )  # fmt: skip
    add_level(figure, float(rows["h1"].iloc[0]), "unigram entropy (H1)", "dash")
    add_level(figure, float(rows["h2"].iloc[0]), "bigram entropy (H2)")
    for i, name in enumerate(shares, start=len(_NATS)):
        values = floats(rows[name])
        if name in ("settled", "present"):
            # a crosscoder trained on fewer snapshots leaves gaps
            values = [value / total for value, total in zip(values, floats(rows["alive"]), strict=True)]
        known = [j for j, value in enumerate(values) if math.isfinite(value)]
        add_line(
            figure, [x[j] for j in known], [values[j] for j in known], _SHARES[name], Style.of(i),
            hover=[hover[j] for j in known],
        )  # fmt: skip
        figure.data[-1].yaxis = "y2"
    if shares:
        quiet = {
            name: figure.layout["yaxis"][name] for name in ("gridcolor", "linecolor", "zerolinecolor", "automargin")
        }
        quiet |= {"title_standoff": 10, "title_font_size": 13, "tickfont_size": 12}
        lower = {**quiet, "anchor": "x", "domain": [0, 0.44], "range": [-0.03, 1.05], "title_text": "share"}
        figure.update_layout(yaxis_domain=[0.56, 1], yaxis2=lower, xaxis_anchor="y2")
    figure.update_layout(yaxis_rangemode="tozero")
    note = (
        f"{int(rows['n'].iloc[0]):,} predictions per snapshot. H1 is the lowest loss possible with unigram counts "
        "alone, H2 with bigram counts."
    )
    if phases is not None:
        note += " " + _mark(figure, axis, phases, "y2" if shares else "y")
    axis.apply(figure)
    return Chart(figure, rows.reset_index(drop=True), note)


def _mark(figure: go.Figure, axis: SnapshotAxis, phases: Frame, y: str) -> str:
    """Mark the turning point in a panel, and describe it and the leads of both phases."""
    found = phases.set_index("event")
    if "turning_point" not in found.index:
        return ""
    point, statistics, features = (found.loc[name] for name in ("turning_point", "statistics_lead", "features_lead"))

    def lead(row: pd.Series) -> str:
        text = f"{row['lead']:.2f} ({row['lead_low']:.2f} to {row['lead_high']:.2f})"
        return text if bool(pd.isna(row["snapshot"])) else f"{text} at {shown(row['label'])}"

    both = (
        f"The share of the bigram KL's fall exceeds that of settled features by at most {lead(statistics)}, the share "
        f"of settled features that of the fall by at most {lead(features)}."
    )
    if not point["resolved"]:
        curve = "the bigram KL's fall" if point["jump_of"] == "statistics" else "the features' settling"
        start = shown(point["jump_from"]) if isinstance(point["jump_from"], str) else "the start"
        return (
            f"Unresolved: {point['jump']:.0%} of {curve} lies between {start} and {shown(point['jump_to'])}, so these "
            f"snapshots cannot tell which phase comes first; snapshots in between could. {both}"
        )
    if pd.isna(point["snapshot"]):
        return f"There is no turning point: features lead at least as much as statistics. {both}"
    at, low, high = (axis.x([int(point[name])])[0] for name in ("snapshot", "low", "high"))
    figure.add_scatter(
        x=[low, high, high, low], y=[0, 0, 1, 1], fill="toself", fillcolor=_FAINT, mode="none", hoverinfo="skip",
        showlegend=False, yaxis=y, meta="band",
    )  # fmt: skip
    figure.add_scatter(
        x=[at, at], y=[0, 1], mode="lines", line={"color": MUTED, "dash": "dot", "width": 2}, name="turning point",
        hoverinfo="skip", yaxis=y,
    )  # fmt: skip
    first, last = (shown(axis.labels[int(point[name])]) for name in ("low", "high"))
    text = (
        f"The turning point, where statistics lead most, is {shown(point['label'])} (95% interval, including the "
        f"spacing of the snapshots: {first} to {last}). {both}"
    )
    if "settling" in found.index and not pd.isna(found.loc["settling", "snapshot"]):
        text += f" Half of the features have settled by {shown(found.loc['settling', 'label'])}."
    return text


def proposal(table: Frame) -> Grid:
    """The proposed snapshots, with reasons."""
    chosen = table[table["chosen"].astype(bool)]
    rows = [
        [Cell(shown(row["label"])), Cell(shown(row["stands_for"], 60)), Cell(shown(row["reason"], 240))]
        for row in chosen.to_dict("records")
    ]
    note = f"{len(chosen)} of {len(table)} snapshots. The distances of all snapshots to their representatives sum to "
    note += f"{table['distance'].sum():.3f}."
    left: Frame = table[~table["chosen"].astype(bool) & (table["reason"] != "")]
    if len(left):
        reasons = (f"{row['label']} {str(row['reason']).removeprefix('left out: ')}" for row in left.to_dict("records"))
        note += f" Left out: {'; '.join(shown(text, 240) for text in reasons)}."
    return Grid(["snapshot", "represents", "reason"], rows, table.reset_index(drop=True), note)


def _per_snapshot(
    table: Frame, names: dict[str, str], y_title: str, value: str = "%{y:.3f}", *, small: bool = False
) -> Chart:
    """A line per column of a table with one row per snapshot."""
    rows = table.sort_values("snapshot")
    axis = SnapshotAxis.of(rows)
    ids = ints(rows["snapshot"])
    figure = new_figure(y_title, height=210 if small else 320)
    present = [column for column in names if column in rows]
    for i, column in enumerate(present):
        add_line(
            figure, axis.x(ids), floats(rows[column]), names[column], Style.of(i), hover=axis.hover(ids), value=value
        )
    figure.update_layout(showlegend=len(present) > 1)
    axis.apply(figure)
    return Chart(figure, _pick(rows, "snapshot", "label", "step", "tokens", *present), small=small)


def _pick(table: Frame, *columns: str) -> Frame:
    return table[[column for column in columns if column in table]].reset_index(drop=True)
