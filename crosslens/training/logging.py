"""Runs on Weights & Biases: one per run directory, begun by training, continued by whatever is added later.

Without a connection, or without a key, a run is recorded on this disk: no training is lost for its log.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from crosslens.rundir import RunDir


@contextmanager
def wandb_run(
    project: str,
    *,
    run: RunDir | None = None,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    disabled: bool = False,
) -> Generator[Any]:
    """A W&B run, finished at the end: that of the run directory, continued, or a new one.

    WANDB_MODE=offline, WANDB_INIT_TIMEOUT and W&B's other variables hold.

    Args:
        project: on W&B.
        run: the directory that records which W&B run is its own, and holds what W&B writes.
        name: of a new run.
        config: recorded with the run.
        disabled: take part, and log nothing.
    """
    import wandb

    if disabled:
        with wandb.init(mode="disabled") as started:
            yield started
        return
    recorded = run.read_json().get("wandb_id") if run is not None and run.exists() else None
    options: dict[str, Any] = {
        "project": project,
        "name": name,
        "id": recorded,
        "resume": "allow" if recorded else None,
        "dir": None if run is None else str(run.path),
        "config": config,
    }
    patience = float(os.environ.get("WANDB_INIT_TIMEOUT", 60))
    limits: dict[str, Any] = {"init_timeout": patience}
    if hasattr(wandb.Settings(), "finish_timeout"):  # younger than the oldest release that is allowed
        limits["finish_timeout"] = 5 * patience
    try:
        started = wandb.init(**options, settings=wandb.Settings(**limits))
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"W&B cannot be reached ({reason}); this run is logged offline: `wandb sync` sends it later", stacklevel=3
        )
        wandb.teardown()  # what has failed still holds the id
        started = wandb.init(**options, mode="offline")
    try:
        if run is not None:
            run.update(wandb_id=started.id, wandb_project=project)
        yield started
    finally:
        wandb.finish()
