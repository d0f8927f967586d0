"""`plan`: disk, memory and time of a harvest, of training and of `evolve`, before any of it."""

from __future__ import annotations

import time
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
    from crosslens.activations import Activations
    from crosslens.activations.plan import Plan
    from crosslens.crosscoders import CrosscoderTrainingConfig
    from crosslens.training import TrainConfig


class Forecast(NamedTuple):
    """What a command takes in one process on this machine."""

    seconds: float
    """NaN where no weights are on this disk, so that no forward pass can be timed."""
    memory: int
    """Bytes at the peak, host and device together."""


class Steps(NamedTuple):
    """The steps of a training, and the seconds that all of them take by some that were timed."""

    n: int
    tokens: int
    """Of a step."""
    low: float
    """If no feature dies."""
    high: float
    """If a third of the features are dead as soon as features can be: the auxiliary loss takes time."""


class Planned(NamedTuple):
    """What a harvest, a training and its analysis take."""

    plan: Plan
    """Of the harvest and the training."""
    forecasts: dict[str, Forecast]
    """By command: harvest; with a crosscoder also train, from a cache or live as the plan recommends, and evolve."""
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
    from crosslens.activations.plan import (
        EVALUATED_TOKENS,
        READING_SECONDS,
        STORING_SECONDS,
        evaluation_operations,
        product_rate,
    )
    from crosslens.evolution import plan_evolution, untrained_steps

    imported = time.process_time()
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
    steps = None
    hooks = [acts[name] for name in source.hook]
    stored = STORING_SECONDS * planned.forwards * sum(each.d_model for each in hooks)
    harvest = Forecast(planned.process_seconds + planned.seconds + stored, planned.harvest_memory)
    forecasts = {"harvest": harvest}
    if architecture is not None:
        acts = hooks[0]
        steps, rate = _time_steps(acts, architecture, config), product_rate(config.device)
        token = planned.seconds / planned.forwards  # up to the hook point
        whole = token * planned.whole_share
        V = len(acts.snapshots.tokenizer)
        evaluation = evaluation_operations(planned.n_held_out, architecture.d_sae, acts.n_snapshots, acts.d_model, V)
        # activations are harvested again, and whole models run clean, spliced and zeroed
        passes = acts.n_snapshots * EVALUATED_TOKENS * (token + 3 * whole)
        # how many features will die is not known: half-way between none and many, steps are a quarter off at most
        data = READING_SECONDS * steps.n * steps.tokens * acts.n_snapshots * acts.d_model
        if planned.recommendation[0] == "live":
            data = planned.passes * planned.seconds
        took = imported + (steps.low + steps.high) / 2 + data + evaluation / rate + passes
        forecasts["train"] = Forecast(took, planned.train_memory)
        memory, operations, tokens = plan_evolution(acts, architecture, planned)
        seconds = imported + sum(operations.values()) / rate + tokens * whole
        forecasts["evolve"] = Forecast(seconds, memory)
    return Planned(planned, forecasts, steps, untrained_steps(acts.snapshots.labels, acts.snapshots.steps))


def _time_steps(acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig) -> Steps:
    from crosslens.training.timing import seconds_per_step

    n = (config.training_tokens or acts.n_tokens) // config.batch_size
    before = min(n, config.dead_tokens // config.batch_size)  # steps in which no feature can be dead
    alive, dead = seconds_per_step(architecture, acts.n_snapshots, acts.d_model, config)
    return Steps(n, config.batch_size, n * alive, before * alive + (n - before) * dead)
