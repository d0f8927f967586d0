"""`report`: the HTML pages of a run, and its tables on W&B."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from crosslens.config import ReportOptions
from crosslens.report import log_report, write_report
from crosslens.rundir import RunDir


class Reported(NamedTuple):
    """Where a report is."""

    page: Path
    """The first page."""
    wandb: str | None
    """The run on W&B, if its tables were added to one."""


def report(run: RunDir, options: ReportOptions | None = None) -> Reported:
    """Write the report of a run.

    Args:
        run: with a crosscoder; what has not been analysed yet is named on the pages, with the command that does it.
        options: `ReportOptions()` if None.

    Raises:
        UserError: no run, no consensus of seeds where it is asked for, or no run on W&B to add tables to.
    """
    options = options or ReportOptions()
    if options.consensus:
        run.consensus()
    page = write_report(run.path, title=options.title, consensus=options.consensus)
    wanted = options.wandb or options.wandb_project is not None
    return Reported(page, log_report(run.path, project=options.wandb_project) if wanted else None)
