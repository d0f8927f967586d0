"""`connect`: edges into the features of a run from those of a run at an earlier hook point, for tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from crosslens.causal.circuits import connect_features
from crosslens.config import ConnectOptions, decisive
from crosslens.errors import UserError, json_checksum
from crosslens.pipeline.opening import items_digest, parse_tasks, read_run
from crosslens.rundir import RunDir

if TYPE_CHECKING:
    import pandas as pd

TARGETS = 10  # features that edges lead to where none are given


def connect(run: RunDir, options: ConnectOptions, *, device: str | None = None) -> Iterator[tuple[str, pd.DataFrame]]:
    """Find the edges into the features of a run, on the prompts of tasks.

    Args:
        run: with a trained crosscoder.
        options: the lower run, tasks, features.
        device: of models and crosscoders; CUDA if available.

    Yields:
        Name of every task, and the result of `causal.connect_features`; the table edges/<task> is saved by then.

    Raises:
        UserError: no features are given and the task has no effects in the run; as `connect_features` and `read_run`.
    """
    tasks = parse_tasks(options.task)
    chosen = {task.name: options.feature or _largest(run, task.name) for task in tasks}
    with run.writing():
        upper, acts = read_run(run, device, reads_text=False, allow_changed_data=options.allow_changed_data)
        lower_run = RunDir.open(options.lower)
        lower, _ = read_run(lower_run, device, reads_text=False, allow_changed_data=options.allow_changed_data)
        # a path may be that of another run tomorrow
        below = {"id": lower_run.read_json().get("id"), "weights": json_checksum(lower.cfg.metadata.checksums)}
        below |= lower_run.noted
        for task in tasks:
            features = chosen[task.name]
            table = connect_features(
                lower, upper, acts.snapshots, task, features, n=options.n_edges, settings=acts.settings
            )
            made = {key: value for key, value in decisive(options).items() if key != "task"}
            run.note(connect=made, lower=below, items=items_digest(task))
            run.save_table(f"edges/{task.name}", table)
            yield task.name, table


def _largest(run: RunDir, task: str) -> Sequence[int]:
    """The features with the largest |effect| on a task at the last snapshot."""
    effects = run.table(f"attribution/{task}")
    if effects is None:
        raise UserError(
            f"{run.path} has no effects on {task!r}, which would choose the features: give --feature, or run "
            "`crosslens attribute` first"
        )
    last: pd.DataFrame = effects.loc[effects["snapshot"] == effects["snapshot"].max()]
    return last.assign(size=lambda table: table["ie"].abs()).nlargest(TARGETS, "size")["feature"].tolist()
