"""The verb `crosslens report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_run(
    run_dir: Annotated[Path, typer.Argument(help="Run directory that `crosslens train` made.", metavar="RUN")],
    wandb: Annotated[bool, typer.Option("--wandb", help="Add the heat map and all tables to the run on W&B.")] = False,
    wandb_project: Annotated[
        str | None, typer.Option("--wandb-project", help="Do so in this project, for runs trained without W&B.")
    ] = None,
) -> None:
    """Write the pages of a run directory."""
    from crosslens.report import log_report, write_report
    from crosslens.rundir import RunDir

    typer.echo(str(write_report(RunDir.open(run_dir).path)))
    if wandb or wandb_project is not None:
        typer.echo(f"W&B run {log_report(run_dir, project=wandb_project)}")
