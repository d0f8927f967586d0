"""Weights & Biases runs: one per run directory, started by training and continued by later commands.

Without a connection or an API key, a run is logged offline; training never stops because of logging.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from crosslens.errors import UserError, brief, did_you_mean, shortened
from crosslens.rundir import RunDir

_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def check_wandb() -> None:
    """Refuse a mode that W&B does not know; without importing it.

    Raises:
        UserError: WANDB_MODE in the environment is none.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode and mode not in _MODES:
        raise UserError(
            f"WANDB_MODE={shortened(repr(mode))} in the environment is unknown: use online, offline or disabled"
            f"{did_you_mean(mode, _MODES)}"
        )


@contextmanager
def wandb_run(
    project: str,
    *,
    run: RunDir | None = None,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    disabled: bool = False,
) -> Generator[Any]:
    """A W&B run, finished at the end: the one recorded in the run directory, else a new one.

    WANDB_MODE=offline, WANDB_INIT_TIMEOUT and the other environment variables of W&B apply.

    Args:
        project: W&B project.
        run: directory that records the id of its W&B run, and holds W&B's files.
        name: name of a new run.
        config: recorded with the run.
        disabled: log nothing.

    Raises:
        UserError: the environment has settings that W&B does not know.
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
    # paths, arguments, user and host stay here
    wanted = {"init_timeout": patience, "finish_timeout": 5 * patience, "x_disable_meta": True, "host": "crosslens"}
    check_wandb()
    try:
        blank: Any = wandb.Settings()  # the oldest supported release has not all of them
    except ValueError as error:
        raise UserError(f"W&B refuses its settings ({brief(error)}): check the variables WANDB_*") from error
    settings: Any = {name: value for name, value in wanted.items() if hasattr(blank, name)}
    try:
        started = wandb.init(**options, settings=wandb.Settings(**settings))
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        warnings.warn(
            f"W&B cannot be reached ({reason}); this run is logged offline, upload it with `wandb sync`",
            stacklevel=3,
        )
        wandb.teardown()  # the failed run still holds the id
        started = wandb.init(**options, mode="offline", settings=wandb.Settings(**settings))
    try:
        if run is not None:
            run.update(wandb_id=started.id, wandb_project=project)
        yield started
    finally:
        wandb.finish()
