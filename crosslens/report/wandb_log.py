"""Add the results of a run to its Weights & Biases run.

All tables go into one artifact, as the parquet files on disk. The heat map of decoder norms is logged as an HTML page,
because W&B's plotly script cannot read the typed arrays of plotly 6 and newer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from crosslens.errors import UserError
from crosslens.report.figures.lifecycles import evolution_map
from crosslens.report.tables import Tables, by_measure
from crosslens.rundir import RunDir
from crosslens.training.logging import wandb_run

MAX_ROWS = 10_000  # of a table to browse on W&B; the files have all


def log_report(run_dir: str | Path, *, project: str | None = None) -> str:
    """Add the tables of a run directory and the heat map of its features to W&B.

    Logs `evolution/presence` (HTML), `evolution/features` (a table, for at most 10,000 features), and an artifact
    `<id>-tables` of type "tables" with all tables as parquet files. Resumes the W&B run of the training if there is
    one, and starts one otherwise. With WANDB_MODE=offline, nothing leaves this machine.

    Args:
        run_dir: a directory with run.json.
        project: for runs that have not been logged; by default the project recorded in run.json.

    Returns:
        The id of the W&B run.

    Raises:
        UserError: the directory contains no run, the run has no tables, or no project is known.
    """
    run = RunDir.open(run_dir)
    info = run.read_json()
    project = project or info.get("wandb_project")
    if project is None:
        raise UserError(f"{run_dir} was trained without W&B, so no project is known: pass project=")
    names = run.table_names()
    if not names:
        raise UserError(f"{run_dir} has no tables yet: run `crosslens evolve {run_dir}` first")
    tables = Tables(run, info)
    evolution, lifecycles, snapshots = tables["evolution"], tables["lifecycles"], tables["snapshots"]
    import wandb

    with wandb_run(project, run=run) as started:
        if evolution is not None and lifecycles is not None and snapshots is not None:
            chart = evolution_map(evolution, lifecycles, snapshots)
            if not isinstance(chart, str):
                page = _with_tooltips(chart.figure).to_html(include_plotlyjs="cdn")
                started.log({"evolution/presence": wandb.Html(page, inject=False)}, commit=False)
            features = by_measure(lifecycles)
            if len(features) <= MAX_ROWS:
                # W&B accepts only None as missing
                known = features.astype(object).where(features.notna(), None)
                started.log({"evolution/features": wandb.Table(dataframe=known)}, commit=False)
            started.log({})
        artifact = wandb.Artifact(f"{started.id}-tables", type="tables", description=f"Tables of {run.path.name}.")
        for name in names:
            artifact.add_file(str(run.path / f"{name}.parquet"), name=f"{name}.parquet")
        started.log_artifact(artifact)
        return str(started.id)


def _with_tooltips(figure: go.Figure) -> go.Figure:
    """A heat map with the tooltips that, on the report's pages, a script expands from rows and columns."""
    figure = go.Figure(figure)
    layout: Any = figure.layout
    meta: dict[str, Any] = layout.meta or {}
    if "rows" in meta:
        figure.update_traces(
            customdata=[[row] * len(meta["columns"]) for row in meta["rows"]],
            text=[[f"{name}<br>{column}" for column in meta["columns"]] for name in meta["names"]],
            selector={"type": "heatmap"},
        )
    return figure
