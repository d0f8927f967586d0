"""What a verb prints: lines and tables for a person, or with --json one object for a program.

On a terminal a table is drawn by rich: it leaves out columns of little weight where the terminal is too narrow, and
folds the cells of the others. Elsewhere, in a log or a pipe, it is plain text, a line per row and all columns.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crosslens.distributed.devices import is_first
from crosslens.errors import visible

MIN_WIDTH = 40


class Column(NamedTuple):
    """A column of a table."""

    name: str
    left: bool = False
    """Aligned to the left, as words are; numbers are aligned to the right."""
    drop: int = 0
    """Columns of the highest number are left out first on a narrow terminal; 0 is never left out."""


class Output:
    """Where a verb prints. Of several processes only the first does.

    Args:
        as_json: print nothing on stdout but one JSON object at the end, and announcements on stderr.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.silent = not is_first()

    def say(self, words: str) -> None:
        """Print lines of text."""
        if not self.silent:
            print(visible(words), file=sys.stderr if self.as_json else sys.stdout)

    def table(
        self,
        columns: Sequence[Column],
        rows: Iterable[Sequence[str]],
        *,
        title: str = "",
        note: str = "",
        bare: bool = False,
    ) -> None:
        """Print a table, unless there is an object that holds its values.

        Args:
            columns: what is in them.
            rows: the text of every cell.
            title: a line above it.
            note: a line below it.
            bare: outside of a terminal print the rows alone, which programs read.
        """
        if self.silent or self.as_json:
            return
        # of a label or token with a line break the rest would look like another row
        cells = [[visible(cell).replace("\n", "\\n").replace("\t", "\\t") for cell in row] for row in rows]
        columns = [column._replace(name=visible(column.name)) for column in columns]  # some are named after snapshots
        title, note = visible(title), visible(note)
        if sys.stdout.isatty():
            _draw(columns, cells, title, note)
            return
        lines = _aligned(cells if bare else [[column.name for column in columns], *cells], columns)
        for line in lines if bare else [title, *lines, note]:
            if line:
                print(line)  # noqa: T201

    def end(self, **values: Any) -> None:
        """Print the object, if one was asked for."""
        if self.as_json and not self.silent:
            print(visible(json.dumps(to_json(values), indent=1, allow_nan=False, ensure_ascii=False)))  # noqa: T201


def to_json(value: Any) -> Any:
    """A value as JSON can hold it; what is missing, infinite or not a number becomes null, a data frame its rows."""
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(inner) for inner in value]
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a data frame; importing pandas takes half a second
        return [to_json(row) for row in value.to_dict("records")]
    if hasattr(value, "tolist"):  # of numpy, pandas or torch
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value) or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value


def number(value: Any, digits: int = 3, *, sign: bool = False) -> str:
    """A number with a fixed number of decimals; - where it is missing."""
    if _missing(value):
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage; - where it is missing."""
    return "-" if _missing(value) else f"{value:.{digits}%}"


def measured(value: Any, error: Any, *, sign: bool = False) -> str:
    """A number and its standard error, both to the second digit of the error: `+5.04 ± 0.15`."""
    if _missing(value) or _missing(error):
        return number(value, sign=sign)
    digits = 3 if error <= 0 else min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:{'+' if sign else ''}.{digits}f} ± {error:.{digits}f}"


def counted(n: int, word: str) -> str:
    """`1 table`, `2 tables`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def size(n_bytes: int) -> str:
    """Bytes in the unit that leaves at most three digits."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def _missing(value: Any) -> bool:
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def _aligned(rows: Sequence[Sequence[str]], columns: Sequence[Column]) -> list[str]:
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    return [
        "  ".join(
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in rows
    ]


def _draw(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str, note: str) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    room = max(MIN_WIDTH, console.width)
    widths = [max(map(cell_len, [column.name, *(row[i] for row in rows)])) for i, column in enumerate(columns)]
    shown = list(range(len(columns)))
    while sum(widths[i] for i in shown) + 2 * (len(shown) - 1) > room and any(columns[i].drop for i in shown):
        shown.remove(max(shown, key=lambda i: (columns[i].drop, i)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for i in shown:
        table.add_column(columns[i].name, justify="left" if columns[i].left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    if title:
        console.print(title, style="bold")
    console.print(table)
    if left_out := [column.name for i, column in enumerate(columns) if i not in shown]:
        note = f"{note}\n" * bool(note) + f"no room for {', '.join(left_out)}: widen the terminal"
    if note:
        console.print(note, style="dim")
    console.print()
