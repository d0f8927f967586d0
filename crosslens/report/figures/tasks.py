"""Accuracy on tasks, their items, and how complete the measured effects are."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from markupsafe import Markup

from crosslens.report.chart import (
    AT,
    Cell,
    Chart,
    Frame,
    Grid,
    Style,
    add_level,
    add_series,
    evenly_spaced,
    over_snapshots,
    pick,
    shown,
    task_link,
    task_pages,
)
from crosslens.report.entries import figure

N_ITEMS = 3  # items shown as examples of a task
FINE_COMPLETENESS = 1.0  # per cent; below it the figure is small


@figure("accuracy", section="accuracy", title="Accuracy by task", tables=("accuracy", "tasks"), wide=True)
def accuracy(table: Frame, tasks: Frame | None = None, *, links: bool = True) -> Chart:
    """Share of items for which the correct continuation has a higher logit than the wrong one at the last position.
    Bands are 95% Wilson intervals over items.

    Args:
        table: from `Task.accuracy`, of one task or several.
        tasks: the run's table of that name.
        links: link to the pages of the tasks.
    """
    figure, axis = over_snapshots(table, "accuracy", yaxis_tickformat=".0%", yaxis_range=[-0.03, 1.05])
    add_level(figure, 0.5, "chance")
    styles = Style.of_tasks(list(dict.fromkeys(table["task"])), tasks)
    pages = tasks if links else None
    for task, style in styles.items():
        rows = table[table["task"] == task].sort_values("snapshot")
        page = {"page": task_pages(pages).get(task)}
        add_series(figure, axis, rows, "accuracy", shown(task), style, band=True, value="%{y:.1%}", meta=page)
    columns = ("task", *AT, "tokens", "accuracy", "accuracy_low", "accuracy_high", "at_chance", "n", "few", "skipped",
               "reasons", "merged", "merged_reasons")  # fmt: skip
    notes = [
        Markup("{} {}").format(task_link(str(task), pages), _items(rows))
        for task, rows in table.groupby("task", sort=False)
    ]
    return Chart(figure, pick(table, *columns), Markup("Items: {}.").format(Markup("; ").join(notes)))


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


@figure(
    "tasks",
    section="tasks",
    title="Accuracy by task, last snapshot",
    tables=("tasks",),
    wide=True,
    columns={"page": "File of the task's page."},
)
def task_table(tasks: Frame) -> Grid:
    """Share of items for which the correct continuation has a higher logit than the wrong one at the last position,
    with its 95% Wilson interval over items; chance is 50%.

    Args:
        tasks: the run's table of that name.
    """
    rows: list[list[Cell]] = []
    for row in tasks.to_dict("records"):
        if pd.isna(row.get("accuracy", math.nan)):
            texts = ["not measured", "", "", "", ""]
        else:
            interval = f"[{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]"
            texts = [f"{row['n']:,.0f}", _left_out(row) or "none", row["label"], f"{row['accuracy']:.1%}", interval]
        rows.append([Cell(row["task"], link=row["page"]), *(Cell(str(text)) for text in texts)])
    header = ["task", "items", "left out", "snapshot", "accuracy", "95% interval"]
    return Grid(header, rows, tasks, columns=("task", "n", "", "label", "accuracy", ""))


@figure(
    "completeness",
    section="tasks",
    title="Completeness error",
    tables=("completeness/*", "tasks"),
    wide=True,
    optional=True,
)
def completeness(table: Frame, tasks: Frame | None = None) -> Chart | str:
    """Mean over prompts of |sum of effects − (clean − baseline metric)|, as a percentage of the mean of |clean −
    baseline metric|, of integrated gradients. At 0, the effects account for all of that difference."""
    data = table[["task", *AT, "completeness_error"]].sort_values(["task", "snapshot"])
    values = 100 * data["completeness_error"]
    if values.dropna().empty:
        return "The completeness error is undefined at every snapshot."
    small = bool(values.max() <= FINE_COMPLETENESS)
    figure, axis = over_snapshots(data, "error (%)", height=230 if small else 340)
    styles = Style.of_tasks(list(dict.fromkeys(data["task"])), tasks)
    for task, style in styles.items():
        rows = data.assign(percent=values)[data["task"] == task]
        page = {"page": task_pages(tasks).get(task)}
        add_series(figure, axis, rows, "percent", shown(task), style, value="%{y:.2g}%", meta=page)
    if (values.dropna() > 0).all():
        figure.update_yaxes(type="log", dtick=1, exponentformat="power", title_text="error (%, log scale)")
    worst = data.loc[values.idxmax()]
    note = Markup("Largest: {}% ({}, {}).").format(
        f"{values.max():.2g}", task_link(str(worst["task"]), tasks), worst["label"]
    )
    return Chart(figure, data, note, small)


@figure("accuracy", section="items", title="Accuracy", tables=("accuracy@<task>", "tasks"), wide=True)
def task_accuracy(table: Frame, tasks: Frame | None = None) -> Chart:
    """Share of items for which the correct continuation has a higher logit than the wrong one at the last position. The
    band is the 95% Wilson interval over items."""
    return accuracy(table, tasks, links=False)


@figure("items", section="items", title="Examples of items", tables=("prompts/<task>",), wide=True, optional=True)
def item_table(table: Frame) -> Grid:
    """The model reads the prompt; the metric is logit(correct) − logit(wrong) after its last word. On the paired
    prompt, if there is one, the wrong answer is the correct one.

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
    return Grid(["", *titles.values()], rows, items, columns=("prompt", *titles))
