"""What a page is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crosslens.report.chart import Chart, Grid

Draw = Callable[..., Chart | Grid | str]


@dataclass(frozen=True)
class Entry:
    """A figure of a page.

    Attributes:
        name: stem of its anchor and CSV file.
        title: what is shown.
        definition: one or two sentences: what, in which unit, how computed.
        draw: from the tables to the figure, or to the reason why there is nothing to draw.
        tables: names of the tables that `draw` takes, in order. "{task}" stands for the task; "kind/*" is all tasks'
            tables of a kind, one below the other, with a column `task`; "snapshots" is the list in run.json.
        wide: takes the full width also where two figures fit side by side.
        optional: left out where a table is missing, instead of named as missing.
    """

    name: str
    title: str
    definition: str
    draw: Draw
    tables: tuple[str, ...]
    wide: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        name: its anchor.
        title: its heading.
        intro: a sentence or two before the figures.
        empty: what is said in place of a figure whose table is missing.
        entries: figures of the whole run.
        per_task: figures drawn once per task.
        kind: "attribution" or "ablation": whose tasks.
    """

    name: str
    title: str
    intro: str
    empty: str
    entries: tuple[Entry, ...] = ()
    per_task: tuple[Entry, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Page:
    """Sections in one file.

    Attributes:
        name: stem of the file.
        title: its heading, and its name in the navigation.
        intro: a sentence or two at its top.
        sections: in order.
    """

    name: str
    title: str
    intro: str
    sections: tuple[Section, ...]
