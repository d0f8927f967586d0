"""A figure of the report in a notebook, from tables that are in memory.

The tables are saved as those of a run in a temporary folder, and read and drawn as for a page. A chart is shown by
plotly; what the page's own script draws, such as prompts with a slider, is in a frame with that script and its style.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from importlib.resources import files
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from markupsafe import Markup

from crosslens.errors import UserError, did_you_mean
from crosslens.report.chart import THEME, Chart, Prompts
from crosslens.report.entries import advise, list_figures
from crosslens.report.page import Block, render, script_json
from crosslens.report.tables import Tables
from crosslens.rundir import RunDir

_HEIGHT = 720  # pixels of a frame


class Inline:
    """A part of a page in a frame; `html` is the whole document."""

    def __init__(self, document: str) -> None:
        self.html = document

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" style="width: 100%; height: {_HEIGHT}px; border: 0" '
            'sandbox="allow-scripts" title="a figure of the report"></iframe>'
        )


def plot(tables: Mapping[str, pd.DataFrame], name: str, task: str | None = None) -> Any:
    """Draw a figure of the report.

    Args:
        tables: by their names in a run directory.
        name: of the figure, as in its anchor on a page.
        task: for figures of a task's page.

    Returns:
        A plotly figure, or what a notebook shows in a frame.

    Raises:
        UserError: there is no such figure of these tables, or it has nothing to draw.
    """
    with TemporaryDirectory() as temporary:
        run = RunDir(temporary)
        run.save_tables(tables)
        found = Tables(run, {})
        drawable: dict[str, Any] = {}
        for entry in list_figures():
            names = [each.replace("<task>", task or "<task>") for each in entry.tables]
            read = [found[each] for each in names]
            if all(table is not None for table in read[: entry.needed]):
                drawable.setdefault(entry.name, (entry, read))
        if name not in drawable:
            known = next((entry for entry in list_figures() if entry.name == name), None)
            why = f" needs more than is here: {advise(known.tables[0])}" if known else " is unknown"
            raise UserError(f"the figure {name!r}{why}; use one of {', '.join(drawable)}{did_you_mean(name, drawable)}")
    entry, read = drawable[name]
    drawn = entry.draw(*read)
    if isinstance(drawn, str):
        raise UserError(f"the figure {name!r} has nothing to draw: {drawn}")
    if isinstance(drawn, Chart):
        return drawn.figure.update_layout(title_text=entry.title, margin_t=48)
    contents = script_json(drawn.contents) if isinstance(drawn, Prompts) else script_json(None)
    # the package's own files: they are not escaped
    css, script = (
        Markup((files("crosslens.report") / "templates" / each).read_text("utf-8"))
        for each in ("report.css", "figures.js")
    )
    block = Block(entry.name, entry, drawn, contents)
    return Inline(render("inline.html.j2", block=block, theme=script_json(THEME), css=css, script=script))
