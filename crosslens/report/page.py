"""Write the page of a run.

1. Every entry of `sections.SECTIONS` gets its tables, and draws a chart, a table, or says in words what is missing.
2. Its numbers go to `data/<entry>.csv`, its figure as compact JSON into the page, escaped for a <script> element.
3. The template makes HTML of the list; plotly's script, copied from the installed package, draws the JSON offline.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from crosslens.report.chart import THEME, Chart, Grid
from crosslens.report.entries import Entry, Section
from crosslens.report.overview import Overview, overview
from crosslens.report.sections import SECTIONS
from crosslens.rundir import RunDir

_PLOTLY = "plotly.min.js"
_DIGITS = 5  # significant digits of the numbers that are drawn; the CSV files hold all
_POSITION_DIGITS = 7  # of those along x: steps that lie close must not fall together


@dataclass(frozen=True)
class Block:
    """An entry as it stands on the page: a figure, a table, or the words for why there is neither."""

    id: str
    entry: Entry
    figure: Markup | None = None
    height: int = 0
    grid: Grid | None = None
    words: str = ""
    note: str = ""
    csv: str = ""


@dataclass(frozen=True)
class Part:
    """A section as it stands on the page: blocks of the whole run, those of each task, or why there are none."""

    section: Section
    blocks: list[Block]
    tasks: list[tuple[str, list[Block]]] = field(default_factory=list)
    words: str = ""


class _Tables:
    """Tables of a run by the names that entries use; each is read once."""

    def __init__(self, run: RunDir, info: dict[str, Any]) -> None:
        self._run, self._info = run, info
        self._read: dict[str, pd.DataFrame | None] = {}

    def __getitem__(self, name: str) -> pd.DataFrame | None:
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> pd.DataFrame | None:
        if name == "snapshots":
            return self._snapshots()
        kind, star, suffix = name.partition("/*")
        if not star:
            table = self._run.table(name)
            return None if table is None or table.empty else table
        tables = {task: self[f"{kind}/{task}{suffix}"] for task in self._run.tasks(kind)}
        found = [table.assign(task=task) for task, table in tables.items() if table is not None]
        return pd.concat(found, ignore_index=True) if found else None

    def _snapshots(self) -> pd.DataFrame | None:
        """Snapshot, label, step and tokens as run.json lists them, or as the columns of the evolution table do."""
        rows: list[dict[str, Any]] = self._info.get("snapshots") or []
        evolution = self["evolution"]
        if not rows and evolution is not None:
            names = (str(name) for name in evolution.columns)
            rows = [{"label": name.removeprefix("norm/")} for name in names if name.startswith("norm/")]
        if not rows:
            return None
        columns = {key: [row.get(key) for row in rows] for key in ("label", "step", "tokens")}
        return pd.DataFrame({"snapshot": range(len(rows)), **columns})


def write_report(run_dir: str | Path, *, title: str | None = None) -> Path:
    """Write `report/index.html` of a run directory, with the script and the CSV files that it needs.

    The page opens from disk without a network. What a run has no table of is named on the page with the command that
    makes it.

    Args:
        run_dir: a directory with run.json.
        title: of the page; the model and hook point when None.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no run in the directory, or its run.json is not JSON.
    """
    run = RunDir.open(run_dir)
    info = run.read_json()
    tables = _Tables(run, info)
    csv: dict[str, pd.DataFrame] = {}
    parts = [_part(section, tables, run, csv) for section in SECTIONS]
    facts = overview(info, tables.__getitem__, run.tasks("attribution"))
    page = _render(facts, parts, title or facts.title)
    data = run.report / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, table in csv.items():
        _replace(data / name, table.to_csv(index=False))
    for stale in data.glob("*.csv"):
        if stale.name not in csv:
            stale.unlink()
    _replace(run.report / _PLOTLY, get_plotlyjs())
    _replace(run.report / "index.html", page)
    return run.report / "index.html"


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


def _part(section: Section, tables: _Tables, run: RunDir, csv: dict[str, pd.DataFrame]) -> Part:
    blocks = _blocks(section.entries, section, tables, csv)
    names = run.tasks(section.kind) if section.per_task else []
    tasks = [(task, _blocks(section.per_task, section, tables, csv, task)) for task in names]
    if not tasks and all(block.words == section.empty for block in blocks):
        return Part(section, [], words=section.empty)  # once, not under every title
    return Part(section, blocks, tasks)


def _blocks(
    entries: Iterable[Entry],
    section: Section,
    tables: _Tables,
    csv: dict[str, pd.DataFrame],
    task: str | None = None,
) -> list[Block]:
    made = [(entry, _block(entry, section, tables, csv, task)) for entry in entries]
    return [block for entry, block in made if not (entry.optional and block.words == section.empty)]


def _block(
    entry: Entry, section: Section, tables: _Tables, csv: dict[str, pd.DataFrame], task: str | None = None
) -> Block:
    id = _free_name(entry.name if task is None else f"{entry.name}-{_slug(task)}", {Path(name).stem for name in csv})
    wanted = [tables[name if task is None else name.format(task=task)] for name in entry.tables]
    found = [table for table in wanted if table is not None]
    if len(found) < len(wanted):
        return Block(id, entry, words=section.empty)
    try:
        drawn = entry.draw(*found)
    except KeyError as error:
        return Block(id, entry, words=f"A table of this run has no column {error}. {_AGAIN}")
    if isinstance(drawn, str):
        return Block(id, entry, words=drawn)
    csv[f"{id}.csv"] = drawn.data
    if isinstance(drawn, Grid):
        return Block(id, entry, grid=drawn, note=drawn.note, csv=f"data/{id}.csv")
    spec = _spec(drawn)
    return Block(id, entry, script_json(spec), spec["layout"]["height"], note=drawn.note, csv=f"data/{id}.csv")


_AGAIN = "It was written by another version; run the command that makes it again."


def _spec(chart: Chart) -> dict[str, Any]:
    spec = chart.figure.to_dict()
    return compact({"data": spec["data"], "layout": spec["layout"]})


def _render(facts: Overview, parts: list[Part], title: str) -> str:
    environment = Environment(
        loader=PackageLoader("crosslens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html.j2").render(
        title=title,
        facts=facts,
        parts=parts,
        plotly=_PLOTLY,
        theme=script_json(THEME),
        css=Markup(_asset("page.css")),
        js=Markup(_asset("page.js")),
    )


def _asset(name: str) -> str:
    return (files("crosslens.report") / "templates" / name).read_text(encoding="utf-8")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:60] or "task"


def _free_name(name: str, taken: Iterable[str]) -> str:
    """The name, or the name with the first number that makes it new: "a b" and "a-b" are different tasks."""
    used, free, number = set(taken), name, 2
    while free in used:
        free, number = f"{name}-{number}", number + 1
    return free


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
