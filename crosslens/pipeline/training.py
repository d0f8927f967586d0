"""`train`: a crosscoder, or one per seed, in one process or under torchrun; repeated, it continues."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crosslens.config import (
    DEFAULT_K,
    RECIPES,
    CacheOptions,
    CrosscoderOptions,
    ModelOptions,
    SeedsOptions,
    SourceOptions,
    TrainingOptions,
    decisive,
)
from crosslens.distributed.devices import check_launcher, find_assumed_device, is_first, rank_and_world
from crosslens.errors import UserError, json_checksum
from crosslens.pipeline.opening import find_activations
from crosslens.rundir import RunDir, check_writable, crosscoder_folder
from crosslens.training import recipes
from crosslens.training.config import TrainConfig
from crosslens.training.logging import check_wandb

if TYPE_CHECKING:
    import pandas as pd

    from crosslens.activations import Activations
    from crosslens.crosscoders import Crosscoder, CrosscoderTrainingConfig


class Trained(NamedTuple):
    """What was trained."""

    crosscoders: dict[int, Crosscoder]
    """By seed."""
    agreement: str
    """What the seeds have in common, in words; empty for one seed."""


def train(
    run: RunDir,
    source: SourceOptions,
    crosscoder: CrosscoderOptions,
    training: TrainingOptions | None = None,
    *,
    models: ModelOptions | None = None,
    cache: CacheOptions | None = None,
    seeds: SeedsOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train crosscoders in a run directory.

    Args:
        run: a new directory, or that of the same training, which continues.
        source: the activations, of one hook point.
        crosscoder: what is trained.
        training: how; None: as the recipe of `crosscoder` says, or the defaults.
        models: how language models run.
        cache: whether activations are written to disk first.
        seeds: how many crosscoders.
        say: called with what is known before the training begins: doubtful snapshots, steps, memory.

    Raises:
        UserError: an option that contradicts another, missing data, or the directory of another run. What can be
            refused without the data is refused before anything heavy is imported.
    """
    models, cache, seeds = models or ModelOptions(), cache or CacheOptions(), seeds or SeedsOptions()
    training = training or TrainingOptions(**recipe_training(crosscoder.recipe))
    run.check_usable()
    check_one_hook(source)
    if crosscoder.init_from is not None and seeds.seeds > 1:
        raise UserError(
            f"--seeds {seeds.seeds} differ in their first weights, which --init-from gives all of them: leave one of "
            "them out"
        )
    check_training(run, source, crosscoder, training, models)
    if cache.cache is not None:
        check_writable(cache.cache)
    load = find_activations(source, models)
    from crosslens.evolution import describe_doubtful, doubtful_snapshots
    from crosslens.training.continuation import open_source
    from crosslens.training.run import claim
    from crosslens.training.run import train as train_one
    from crosslens.training.seeds import train_seeds

    start = None if crosscoder.init_from is None else open_source(crosscoder.init_from)
    acts = load()
    config = make_config(training, acts.settings.device, run.path, source.seed)
    architecture = make_architecture(crosscoder, config, acts.n_tokens)
    with run.writing() if is_first() else nullcontext():
        if is_first():
            # refuse the directory of another run before the harvest, during which it is not to be given to another
            rounding = None if cache.cache is None else cache.cache_dtype
            claim(acts, architecture, config, cache_dtype=rounding, source=start)
            if isinstance(source.snapshots, str):
                run.update(options=given(source, crosscoder, training, models, cache, seeds, run_dir=run.path))
        if cache.cache is not None:
            acts = acts.cache(cache.cache, cache.cache_dtype)
        planned = acts.plan(
            measure=False,
            training_tokens=config.training_tokens,
            architecture=architecture,
            batch_size=config.batch_size,
            adam_moments=config.adam_moments,
            processes=_n_processes(),
            data_parallel=config.data_parallel,
        )
        if is_first() and acts.n_snapshots > 1 and not (run.crosscoder / "cfg.json").is_file():
            for line in describe_doubtful(doubtful_snapshots(acts)):
                say(line)
        total = (config.training_tokens or acts.n_tokens) // config.batch_size
        memory = dataclasses.replace(planned, cached=cache.cache is not None).training
        say(f"{total:,} steps of {config.batch_size:,} tokens\n{memory}")
        if start is not None:
            return Trained({source.seed: train_one(acts, architecture, config, init_from=start)}, "")
        trained = train_seeds(acts, architecture, config, seeds.seeds)
        agreement = save_seeds(run, trained, acts) if is_first() and seeds.seeds > 1 else ""
        return Trained(trained, agreement)


def save_seeds(run: RunDir, crosscoders: Mapping[int, Crosscoder], acts: Activations, threshold: float = 0.7) -> str:
    """Write the tables of `compare_seeds` to the run directories of several seeds.

    The directory of the first seed gets `seeds` and `seeds_rotation`; each directory gets `consensus`, about its own
    features. Tables of the same crosscoders are not made again.

    Args:
        run: the run directory of the first seed.
        crosscoders: the crosscoders by seed, as `train_seeds` returns them.
        acts: the activations that they were trained on.
        threshold: correlation from which a partner counts.

    Returns:
        The lines of `describe_seeds`.

    Raises:
        UserError: as `consensus`.
    """
    from crosslens.evolution.seeds import compare_seeds, describe_seeds

    first = min(crosscoders)
    places = {seed: run if seed == first else run.other_seed(seed) for seed in crosscoders}
    of = json_checksum([threshold, {str(seed): place.crosscoder_checksums() for seed, place in places.items()}])
    compared = run.read_json().get("seeds_compared", {})
    if compared.get("of") == of and (known := _saved_seeds(run, places, compared["tables"])):
        return describe_seeds(known, threshold)
    tables = compare_seeds({str(seed): each for seed, each in crosscoders.items()}, acts, threshold)
    found = tables["consensus"]
    run.save_tables({name: table for name, table in tables.items() if name != "consensus"})
    for seed, place in places.items():
        place.save_table("consensus", found.loc[found["crosscoder"] == str(seed)].reset_index(drop=True))
    run.update(seeds_compared={"of": of, "tables": [*tables]})
    return describe_seeds(tables, threshold)


def _saved_seeds(run: RunDir, places: Mapping[int, RunDir], names: Sequence[str]) -> dict[str, pd.DataFrame] | None:
    """These tables of `save_seeds` as they are; None if one is missing."""
    import pandas as pd

    saved = {name: run.table(name) for name in names if name != "consensus"}
    found = {name: table for name, table in saved.items() if table is not None}
    own = [table for place in places.values() if (table := place.table("consensus")) is not None]
    if len(found) < len(saved) or len(own) < len(places):
        return None
    return {**found, "consensus": pd.concat(own, ignore_index=True)}


def check_one_hook(source: SourceOptions) -> None:
    """Refuse several hook points."""
    if len(source.hook) > 1:
        raise UserError(
            f"--hook is given {len(source.hook)} times: a crosscoder reads one hook point, so train once for each (a "
            "folder that `crosslens harvest` filled for several serves them all)"
        )


def check_training(
    run: RunDir | None,
    source: SourceOptions,
    crosscoder: CrosscoderOptions,
    training: TrainingOptions,
    models: ModelOptions,
    processes: int | None = None,
) -> None:
    """Check the options of training against each other, and against the run directory; quick, without torch.

    Args:
        run: the run directory, if there is one.
        source: the activations.
        crosscoder: what is trained.
        training: how.
        models: for the device.
        processes: of torchrun; None: those that there are.

    Raises:
        UserError: no number of features, numbers that contradict each other, processes that cannot be grouped, or the
            directory of another run.
    """
    start = crosscoder.init_from
    if start is not None and crosscoder_folder(start.expanduser()) is None:
        raise UserError(f"--init-from {start} holds no crosscoder: give a folder with cfg.json, or a run directory")
    if crosscoder.recipe is None and crosscoder.d_sae is None:
        raise UserError("--d-sae is missing: give the number of features, or a --recipe, which sets it")
    config = make_config(training, models.device or find_assumed_device(), seed=source.seed)
    if source.n_tokens is not None and config.batch_size > source.n_tokens:
        raise UserError(f"--batch-size {config.batch_size} must be at most --n-tokens {source.n_tokens}, one epoch")
    total = None if config.training_tokens is None else config.training_tokens // config.batch_size
    settings = crosscoder.settings(total)
    check_launcher()
    if training.wandb_project is not None:
        check_wandb()
    check_processes(_n_processes() if processes is None else processes, config.data_parallel)
    if run is not None:
        details = {"architecture": f"{crosscoder.name}_crosscoder"}
        details |= {"k": DEFAULT_K} if crosscoder.has("k") else {}
        names = ("batch_size", "lr", "lr_warm_up", "lr_decay", "dead_tokens", "adam_moments", "seed")
        run.check_settings(
            {
                "architecture": {**details, **{name: settings[name] for name in settings if "_steps" not in name}},
                "training": {name: getattr(config, name) for name in names},
                "models": decisive(models, live=False),
            }
        )


def check_processes(processes: int, data_parallel: int) -> None:
    """Refuse groups of processes of unequal size; whether they can split d_sae and the batch is checked with torch."""
    if processes % data_parallel:
        raise UserError(
            f"--data-parallel {data_parallel} does not divide the {processes} process{'es' * (processes > 1)} of this "
            f"run: start a multiple of {data_parallel} processes with torchrun, or leave it out"
        )


def make_config(
    training: TrainingOptions, device: str, run_dir: Path | None = None, seed: int = 0, **others: Any
) -> TrainConfig:
    """How and where is trained."""
    how = {each.name: getattr(training, each.name) for each in fields(TrainingOptions)}
    return TrainConfig(**how, device=device, run_dir=run_dir, seed=seed, **others)


def make_architecture(crosscoder: CrosscoderOptions, config: TrainConfig, n_tokens: int) -> CrosscoderTrainingConfig:
    """What is trained, as the architecture's config.

    Args:
        crosscoder: the options.
        config: how it is trained.
        n_tokens: activations of an epoch, which is trained on if no option or recipe gives another number.

    Raises:
        UserError: a warmup or annealing is longer than the training.
    """
    from crosslens.crosscoders import TRAINING_ARCHITECTURES

    settings = crosscoder.settings((config.training_tokens or n_tokens) // config.batch_size)
    if crosscoder.recipe is None:
        return TRAINING_ARCHITECTURES[f"{crosscoder.name}_crosscoder"][1](**settings)
    of_paper = {name: getattr(config, name) for name in ("training_tokens", "batch_size", "device")}
    architecture, _ = getattr(recipes, crosscoder.recipe)(**of_paper)
    return dataclasses.replace(architecture, **settings)


def recipe_training(recipe: str | None) -> dict[str, Any]:
    """The fields of `TrainingOptions` that a recipe sets."""
    return {name: value for name, value in RECIPES.get(recipe or "", {}).items() if name != "architecture"}


def given(*options: Any, **others: Any) -> dict[str, Any]:
    """The options that differ from their defaults and the recipe, by their names on the command line."""
    recipe = next((each.recipe for each in options if isinstance(each, CrosscoderOptions)), None)
    found: dict[str, Any] = dict(others)
    for each in options:
        for field in fields(each):
            value = getattr(each, field.name)
            if value != RECIPES.get(recipe or "", {}).get(field.name, field.default):
                found["model_dtype" if field.name == "dtype" else field.name] = value
    return json.loads(json.dumps(found, default=str))


def _n_processes() -> int:
    return rank_and_world()[1]
