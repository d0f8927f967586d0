"""Entries as they stand on a page: a figure as JSON, a table, or the words for why there is neither."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from crosslens.report.chart import Chart, Frame, Grid
from crosslens.report.entries import Entry, Section
from crosslens.report.tables import Tables

_DIGITS = 5  # significant digits of the numbers that are drawn; the CSV files hold all
_POSITION_DIGITS = 7  # of those along x: steps that lie close must not fall together
AGAIN = "It was written by another version; run the command that makes it again."


@dataclass(frozen=True)
class Block:
    """An entry as it stands on a page.

    Attributes:
        id: of its anchor and its files; of one task, it ends in the task's name.
        entry: what it is of.
        figure: JSON for a <script> element, where there is something to draw.
        height: pixels of the figure.
        grid: a table in its place.
        tinted: whether its cells are numbers tinted by their size, and not words.
        words: why there is neither.
        note: below the figure.
        csv: path of its numbers.
    """

    id: str
    entry: Entry
    figure: Markup | None = None
    height: int = 0
    grid: Grid | None = None
    tinted: bool = False
    words: str = ""
    note: str = ""
    csv: str = ""


@dataclass(frozen=True)
class Part:
    """A section as it stands on a page: blocks of the whole run, those of each task, or why there are none."""

    section: Section
    blocks: list[Block]
    tasks: list[tuple[str, str, list[Block]]] = field(default_factory=list)
    """Name, anchor and blocks of each task."""
    words: str = ""


def make_part(section: Section, tables: Tables, csv: dict[str, pd.DataFrame]) -> Part:
    """Draw the entries of a section.

    Args:
        section: what to draw.
        tables: of the run.
        csv: numbers by name of the file; those of the section are added.
    """
    blocks = _blocks(section.entries, section, tables, csv)
    names = tables.tasks(section.kind) if section.per_task else []
    taken: list[str] = []
    tasks: list[tuple[str, str, list[Block]]] = []
    for task in names:
        taken.append(_free_name(f"{section.name}-{_slug(task)}", taken))
        tasks.append((task, taken[-1], _blocks(section.per_task, section, tables, csv, task)))
    if not tasks and all(block.words == section.empty for block in blocks):
        return Part(section, [], words=section.empty)  # once, not under every title
    return Part(section, blocks, tasks)


def figure_spec(chart: Chart) -> dict[str, Any]:
    """Data and layout of a figure, for the page's script."""
    spec = chart.figure.to_dict()
    return compact({"data": spec["data"], "layout": spec["layout"]})


def compact(value: Any, digits: int = _DIGITS) -> Any:
    """A figure's dictionary with rounded floats, null for what is not finite, and no plotly template."""
    if isinstance(value, dict):
        # a typed array is {"dtype", "bdata", "shape"}: strings, which pass unchanged
        return {
            key: compact(part, _POSITION_DIGITS if key in ("x", "positions", "tickvals") else digits)
            for key, part in value.items()
            if key != "template"
        }
    if isinstance(value, list | tuple):
        return [compact(part, digits) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{digits}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return value


def script_json(value: Any) -> Markup:
    """JSON that can stand in a <script> element: no character that could end it or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _blocks(
    entries: Iterable[Entry],
    section: Section,
    tables: Tables,
    csv: dict[str, pd.DataFrame],
    task: str | None = None,
) -> list[Block]:
    made = [(entry, _block(entry, section, tables, csv, task)) for entry in entries]
    return [block for entry, block in made if not (entry.optional and block.words == section.empty)]


def _block(
    entry: Entry, section: Section, tables: Tables, csv: dict[str, pd.DataFrame], task: str | None = None
) -> Block:
    id = _free_name(entry.name if task is None else f"{entry.name}-{_slug(task)}", {Path(name).stem for name in csv})
    wanted = [tables[name if task is None else name.format(task=task)] for name in entry.tables]
    found = [table for table in wanted if table is not None]
    if len(found) < len(wanted):
        return Block(id, entry, words=section.empty)
    try:
        drawn = entry.draw(*found)
    except KeyError as error:
        return Block(id, entry, words=f"A table of this run has no column {error}. {AGAIN}")
    if isinstance(drawn, str):
        return Block(id, entry, words=drawn)
    csv[f"{id}.csv"] = drawn.data
    if isinstance(drawn, Grid):
        tinted = any(cell.weight for row in drawn.rows for cell in row)
        return Block(id, entry, grid=drawn, tinted=tinted, note=drawn.note, csv=f"data/{id}.csv")
    spec = figure_spec(drawn)
    _date(spec["layout"].get("meta"), tables["snapshots"])
    return Block(id, entry, script_json(spec), spec["layout"]["height"], note=drawn.note, csv=f"data/{id}.csv")


def _date(meta: Any, snapshots: Frame | None) -> None:
    """Tokens beside the steps of an axis, where its table has none and the run records them."""
    if snapshots is None or not isinstance(meta, dict) or meta.get("axis") != "steps" or "tokens" in meta:
        return
    known = snapshots.dropna(subset=["step", "tokens"]).astype({"step": int, "tokens": int})
    tokens = dict(zip(known["step"], known["tokens"], strict=True))
    if len({tokens[step] for step in meta["steps"] if step in tokens}) == len(meta["steps"]):
        meta["tokens"] = [tokens[step] for step in meta["steps"]]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:60] or "task"


def _free_name(name: str, taken: Iterable[str]) -> str:
    """The name, or the name with the first number that makes it new: "a b" and "a-b" are different tasks."""
    used, free, number = set(taken), name, 2
    while free in used:
        free, number = f"{name}-{number}", number + 1
    return free
