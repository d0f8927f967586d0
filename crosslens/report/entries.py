"""What the report knows of a figure: a decorator beside the function that draws it.

    @figure("rotation", section="evolution", title="Rotation by interval", tables=("rotation",))
    def rotation(table: Frame) -> Chart | str: ...

The first paragraph of the function's docstring stands below its title on the page: one or two sentences on what is
shown, in which unit, and how it is computed.

A figure is in the report once its function is in a file of `crosslens.report.figures`; nothing else has to name it. One
in another program is in the reports that this program writes.
What is said where one of its tables is missing, and what its columns mean, is declared in `crosslens.tables`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias, TypeVar

from crosslens.report.chart import Chart, Grid, Prompts
from crosslens.tables import Column, Table, find_table

Draw: TypeAlias = Callable[..., "Chart | Grid | Prompts | str"]
AnyDraw = TypeVar("AnyDraw", bound=Draw)
_FIGURES: dict[tuple[str, str], Entry] = {}  # by section and name: a cell of a notebook may run twice
# tables that the report makes of others, see `report.tables.Tables`
_MADE_OF = {"snapshots": ("evolution",), "tasks": ("attribution/<task>", "accuracy")}


@dataclass(frozen=True)
class Entry:
    """A figure, table of numbers or set of prompts on a page, as given to `figure`, which decorates `draw`."""

    name: str
    section: str
    title: str
    definition: str
    draw: Draw
    tables: tuple[str, ...]
    wide: bool = False
    optional: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def needed(self) -> int:
        """How many of its tables, from the first on, it cannot do without: those without a default in `draw`."""
        return sum(each.default is each.empty for each in inspect.signature(self.draw).parameters.values())

    def describe(self, column: str) -> Column | None:
        """What a column of its numbers means; None if nothing is known."""
        own = Table("", "", "", {name: Column(text) for name, text in self.columns.items()}).column(column)
        declared = (table.column(column) for name in self.tables for table in _declarations(name))
        return own or next(filter(None, declared), None)


def figure(
    name: str,
    *,
    section: str,
    title: str,
    tables: tuple[str, ...],
    definition: str | None = None,
    wide: bool = False,
    optional: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Callable[[AnyDraw], AnyDraw]:
    """Put the figure that a function draws on a page of the report.

    Args:
        name: stem of its anchor and CSV file.
        section: name of its section, which `sections` lists.
        title: heading.
        tables: names of the tables that the function takes, in order; "<task>" is the task of a task's page. One whose
            parameter has a default of None may be missing or have no rows.
        definition: what stands below the heading; by default the first paragraph of the function's docstring.
        wide: full width, even where two figures fit side by side.
        optional: omitted if a table is missing, instead of saying so.
        columns: meaning of the columns of its numbers that are not columns of these tables.

    Returns:
        A decorator for a function of the tables that returns a `Chart`, another kind of content, or a sentence that
        says why there is nothing to draw.
    """

    def add(draw: AnyDraw) -> AnyDraw:
        said = definition or " ".join((inspect.getdoc(draw) or "").partition("\n\n")[0].split())
        _FIGURES[section, name] = Entry(name, section, title, said, draw, tables, wide, optional, columns or {})
        return draw

    return add


def list_figures() -> list[Entry]:
    """All figures, by file and in the order in which each file has them; last those of other programs."""
    _load()
    homes = "crosslens.report.figures."
    return sorted(_FIGURES.values(), key=lambda e: (not e.draw.__module__.startswith(homes), e.draw.__module__))


@cache
def _load() -> None:
    package = importlib.import_module("crosslens.report.figures")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def advise(name: str) -> str:
    """What to say where a table, by its name in `report.tables.Tables`, does not exist."""
    return next((table.advise() for table in _declarations(name)), f"The run has no table {name}.")


def _declarations(name: str) -> list[Table]:
    """What is declared of a table, or of the tables that the report makes it of."""
    stored = _MADE_OF.get(name, (name.partition("@")[0].replace("/*", "/<task>"),))
    return [table for one in stored if (table := find_table(one)) is not None]
