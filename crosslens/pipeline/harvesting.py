"""`harvest`: activations on disk, which any number of trainings read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosslens.config import HarvestOptions, ModelOptions, SourceOptions
from crosslens.pipeline.opening import find_activations
from crosslens.rundir import check_writable

if TYPE_CHECKING:
    from crosslens.activations import Activations


def harvest(source: SourceOptions, options: HarvestOptions, models: ModelOptions | None = None) -> Activations:
    """Write activations to disk; repeated, it continues, and several processes may write at once.

    Args:
        source: the activations, of one or more hook points.
        options: where to, and how.
        models: how language models run.

    Returns:
        The activations, from disk.

    Raises:
        UserError: snapshots, hook points or a dataset that do not exist, or a folder that cannot be written to.
    """
    check_writable(options.cache)
    load = find_activations(source, models or ModelOptions())
    return load().cache(options.cache, options.cache_dtype, evict=options.evict, verify=options.verify)
