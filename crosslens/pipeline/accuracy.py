"""`accuracy`: how often models prefer the correct answers of tasks, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from crosslens.config import AccuracyOptions, ModelOptions
from crosslens.distributed.devices import check_device
from crosslens.pipeline.opening import parse_settings, parse_snapshots, parse_tasks


def accuracy(options: AccuracyOptions, models: ModelOptions | None = None) -> Iterator[tuple[str, pd.DataFrame]]:
    """Measure the accuracy of snapshots on tasks; nothing is written.

    Args:
        options: snapshots and tasks.
        models: how models run; `ModelOptions()` if None.

    Yields:
        Name of every task, and the result of `Task.accuracy`.

    Raises:
        UserError: no such device, snapshot or task, or a task without usable items.
    """
    models = models or ModelOptions()
    check_device(models.device)
    tasks = parse_tasks(options.task)
    snapshots = parse_snapshots(options.snapshots, options.steps).trusting_code(options.trust_remote_code)
    for task in tasks:
        yield task.name, task.accuracy(snapshots, settings=parse_settings(**vars(models)))
