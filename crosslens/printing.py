"""How results show themselves: text where they are printed, HTML in a notebook, and figures of the report.

A result says what it is in a line, shows a table of the columns that matter, and ends with what its numbers mean.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd

from crosslens.errors import visible

_MOST = 40  # rows shown


class Result(pd.DataFrame):
    """A table that prints the columns that matter first, and names the others.

    What is selected or computed from it is a plain data frame, as is `pd.DataFrame(table)`.
    """

    _metadata: ClassVar[list[str]] = ["_shown"]

    @classmethod
    def of(cls, table: pd.DataFrame, title: str, columns: Sequence[str], note: str = "") -> Result:
        """A table that shows these columns.

        Args:
            table: what is shown.
            title: what it is, with denominators.
            columns: of the table, in the order in which they are shown.
            note: what the numbers mean.
        """
        made = cls(table)
        others = ", ".join(str(name) for name in table if name not in columns)
        made._shown = title, list(columns), "\n".join(filter(None, [note, f"further columns: {others}"]))
        return made

    def _parts(self) -> tuple[str, pd.DataFrame, str] | None:
        # pandas makes some results of this class without what is shown
        shown = getattr(self, "_shown", None)
        if shown is None or not set(shown[1]) <= set(self.columns):
            return None
        title, columns, note = shown
        return title, pd.DataFrame(pd.DataFrame(self)[columns]), note

    def __repr__(self) -> str:
        parts = self._parts()
        return super().__repr__() if parts is None else as_text(*parts)

    def _repr_html_(self) -> str | None:
        parts = self._parts()
        return super()._repr_html_() if parts is None else as_html(*parts)  # pyright: ignore


def as_text(title: str, table: pd.DataFrame, note: str = "") -> str:
    """A result for a terminal; numbers with three decimals, and of many rows the first and last."""
    rows = table.to_string(index=False, max_rows=_MOST, float_format="{:.3f}".format, na_rep="-")
    return visible("\n".join(filter(None, [title, rows if len(table) else "", note])))


def as_html(title: str, table: pd.DataFrame | Mapping[str, object], note: str = "") -> str:
    """The same for a notebook, or names with their values; all text is escaped."""
    if not isinstance(table, pd.DataFrame):
        table = pd.DataFrame({"": list(table), "value": list(map(str, table.values()))})
    parts = [f"<p><b>{html.escape(title)}</b></p>"]
    if len(table):
        # to_html shortens long texts otherwise, in the middle of their escapes
        with pd.option_context("display.max_colwidth", None):
            parts.append(table.to_html(index=False, max_rows=_MOST, border=0, float_format="{:.3f}".format, na_rep="-"))
    if note:
        parts.append(f"<p><small>{'<br>'.join(map(html.escape, note.splitlines()))}</small></p>")
    return visible("".join(parts))


def plot(tables: Mapping[str, pd.DataFrame], figure: str, task: str | None = None) -> Any:
    """The report's figure of these tables; see `crosslens.report.inline`.

    The report stands above everything that it shows, so it is looked up when a figure is asked for.
    """
    return importlib.import_module("crosslens.report.inline").plot(tables, figure, task)
