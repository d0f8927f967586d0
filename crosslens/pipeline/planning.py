"""`plan`: disk, memory and time of a harvest and of training, before any of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crosslens.config import (
    CacheOptions,
    CrosscoderOptions,
    ModelOptions,
    PlanOptions,
    SourceOptions,
    TrainingOptions,
)
from crosslens.pipeline.opening import find_activations
from crosslens.pipeline.training import (
    check_processes,
    check_training,
    make_architecture,
    make_config,
    recipe_training,
)

if TYPE_CHECKING:
    from crosslens.activations.plan import Plan


class Steps(NamedTuple):
    """The steps of a training."""

    n: int
    tokens: int
    """Of a step."""
    seconds: float
    """Of all steps in one process on this machine, by some that were timed; data, logs and checkpoints come to it."""


class Planned(NamedTuple):
    """What a harvest, a training and its analysis take."""

    plan: Plan
    """Of the harvest and the training."""
    evolve: tuple[int, float] | None
    """Bytes of memory and seconds of one CPU core to read presence; None without a crosscoder."""
    steps: Steps | None
    """None without a crosscoder."""
    untrained: list[str]
    """Which snapshots have not been trained, in words."""


def plan(
    source: SourceOptions,
    crosscoder: CrosscoderOptions | None = None,
    training: TrainingOptions | None = None,
    *,
    models: ModelOptions | None = None,
    cache: CacheOptions | None = None,
    options: PlanOptions | None = None,
) -> Planned:
    """Estimate disk, memory and time, without downloading weights.

    Args:
        source: the activations, of one or more hook points.
        crosscoder: with a number of features or a recipe it adds the memory of training.
        training: how it is trained; None: as the recipe says, or the defaults.
        models: how language models run.
        cache: the folder that a cache would be written to.
        options: on how many processes.

    Raises:
        UserError: as `harvest` and `train`.
    """
    crosscoder, models, cache = crosscoder or CrosscoderOptions(), models or ModelOptions(), cache or CacheOptions()
    training = training or TrainingOptions(**recipe_training(crosscoder.recipe))
    processes = (options or PlanOptions()).processes
    trained = crosscoder.d_sae is not None or crosscoder.recipe is not None
    check_processes(processes, training.data_parallel)
    if trained:
        check_training(None, source, crosscoder, training, models, processes)
    load = find_activations(source, models)
    from crosslens.evolution import plan_decodability, untrained_steps
    from crosslens.training.timing import seconds_per_step

    acts = load()
    architecture, config = None, make_config(training, acts.settings.device)
    if trained:
        architecture = make_architecture(crosscoder, config, acts.n_tokens)
    planned = acts.plan(
        training_tokens=training.training_tokens,
        folder=cache.cache or Path("."),
        dtype=cache.cache_dtype,
        architecture=architecture,
        batch_size=training.batch_size,
        adam_moments=training.adam_moments,
        processes=processes,
        data_parallel=training.data_parallel,
    )
    evolving, steps = None, None
    if architecture is not None:
        S, D = acts.n_snapshots, acts[source.hook[0]].d_model
        evolving = plan_decodability(architecture.d_sae, S, D, acts.dataset.n_held_out)
        n = (config.training_tokens or acts.n_tokens) // config.batch_size
        steps = Steps(n, config.batch_size, n * seconds_per_step(architecture, S, D, config))
    return Planned(planned, evolving, steps, untrained_steps(acts.snapshots.labels, acts.snapshots.steps))
