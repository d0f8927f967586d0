"""The rate of false births: the same pipeline on models between which nothing was learnt.

1. *Untrained* models: S models of the family's shape are drawn from S seeds and not trained. Nothing is born in them,
   but a crosscoder over them, trained and read in the same way, has births all the same, by noise and by chance
   differences between the models. It has hardly any contextual features, so it is no null for those.
2. *Exchangeable* models: trained models of one step that differ in their seeds. Their features are of all kinds, and
   their order has no meaning.

The share of features that is born in them is the share that a count over real snapshots does not owe to training.
Models are run live: nothing is cached on disk.

Symbols: S snapshots.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from sae_lens.registry import get_sae_training_class
from transformers import AutoModelForCausalLM

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingConfig
from crosslens.errors import UserError, read_json
from crosslens.evolution.births import THRESHOLDS, count_births, presence_curves
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.held_out import read
from crosslens.evolution.presence import check_tokens, measure_decodability
from crosslens.pipeline.opening import find_snapshots
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from crosslens.training.config import TrainConfig
from crosslens.training.run import train


def untrained_snapshots(snapshots: Snapshots, folder: str | Path, n_models: int | None = None) -> Snapshots:
    """Write independently initialised models of the shape of given ones, and open them as snapshots.

    Args:
        snapshots: models whose configuration, initialisation and tokenizer to use.
        folder: a new or empty folder for the weights.
        n_models: S; as many as `snapshots` if None.

    Returns:
        Snapshots `seed0`, `seed1`, ... without steps.

    Raises:
        UserError: fewer than two models, or a folder with something in it.
    """
    n_models = len(snapshots) if n_models is None else n_models
    if n_models < 2:
        raise UserError(f"n_models={n_models}: births need 2 or more snapshots")
    root = Path(folder)
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: give a new folder for the untrained models")
    config = snapshots[0].config()
    for seed in range(n_models):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=snapshots.trust_remote_code)
        model.float().save_pretrained(root / f"step{seed}")
    snapshots.tokenizer.save_pretrained(root / "tokenizer")
    found = Snapshots.local(root, trust_remote_code=snapshots.trust_remote_code)
    return Snapshots(
        [dataclasses.replace(one, label=f"seed{i}", step=None) for i, one in enumerate(found)], "untrained"
    )


def recorded_training(run: RunDir, device: str) -> tuple[CrosscoderTrainingConfig, TrainConfig]:
    """The two configs that a run directory's crosscoder was trained with.

    Args:
        run: a run directory with a trained crosscoder.
        device: device to train on.
    """
    identity = run.read_json()["identity"]
    details = dict(identity["architecture"])
    _, made = get_sae_training_class(details.pop("architecture"))
    architecture = made.from_dict({**details, "device": device})
    assert isinstance(architecture, CrosscoderTrainingConfig)
    return architecture, TrainConfig(**identity["training"], device=device)


def read_models(path: str | Path) -> Snapshots:
    """Open the models that a JSON file names, such as the seeds of one step.

    Args:
        path: a file such as {"seed1": "org/model-seed1@step1000", "seed2": "runs/b/step1000"}, where a place is a
            folder, `org/model` or `org/model@revision`.

    Raises:
        UserError: not such a file, fewer than two models, or a place that does not exist.
    """
    found = read_json(Path(path), "file of models")
    if not all(isinstance(place, str) for place in found.values()) or len(found) < 2:
        raise UserError(
            f"{path} must name two models or more, such as "
            '{"seed1": "org/model@step1000", "seed2": "runs/b/step1000"}'
        )
    return find_snapshots(",".join(f"{label}={place}" for label, place in found.items()), None)()


def null_births(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig | None = None,
    *,
    models: Snapshots | None = None,
    n_models: int | None = None,
    thresholds: tuple[float, ...] = THRESHOLDS,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
) -> pd.DataFrame:
    """Count the births in a crosscoder over models without a history, trained and read in the same way.

    Args:
        acts: as of `null_crosscoder`, as are the others.
        architecture: see there.
        config: see there.
        models: see there.
        n_models: see there.
        thresholds: as in `count_births`.
        min_run: as in `count_births`.
        min_firing_rate: features active on this share of the held-out tokens or less are dead.

    Returns:
        The result of `count_births`, a row per measure, kind and threshold.

    Raises:
        UserError: fewer than two models, or as `train`.
    """
    with null_crosscoder(acts, architecture, config, models=models, n_models=n_models) as (crosscoder, live):
        return births_without_history(
            crosscoder, live, thresholds=thresholds, min_run=min_run, min_firing_rate=min_firing_rate
        )


def births_without_history(
    crosscoder: Crosscoder,
    live: Activations,
    *,
    thresholds: tuple[float, ...] = THRESHOLDS,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
) -> pd.DataFrame:
    """Count the births in the crosscoder of `null_crosscoder`, as `null_births` does.

    Args:
        crosscoder: over models without a history.
        live: activations of these models.
        thresholds: as in `count_births`.
        min_run: as in `count_births`.
        min_firing_rate: features active on this share of the held-out tokens or less are dead.

    Returns:
        The result of `count_births`.
    """
    check_tokens(crosscoder, live)  # before anything is encoded
    held = read(crosscoder, live, purpose="Null")
    found = measure_decodability(crosscoder, held)
    alive = (measure_firing(crosscoder, held).rate > min_firing_rate).numpy()
    curves = presence_curves(crosscoder.decoder_norms, found, alive)
    return count_births(curves, found.lexical, found, thresholds=thresholds, min_run=min_run)


@contextmanager
def null_crosscoder(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig | None = None,
    *,
    models: Snapshots | None = None,
    n_models: int | None = None,
) -> Generator[tuple[Crosscoder, Activations]]:
    """Train a crosscoder over models without a history, which exist while it is used.

    Args:
        acts: activations of the trained snapshots; its hook point and tokens are used, and its models' shape if no
            others are given.
        architecture: as the crosscoder over the trained snapshots; shapes are filled in anew.
        config: as for that crosscoder; nothing is logged, and no run directory is written.
        models: exchangeable models of the same tokenizer; untrained ones are drawn if None.
        n_models: untrained models; as many as there are snapshots if None.

    Yields:
        The crosscoder, and the activations of its models on the same tokens.

    Raises:
        UserError: fewer than two models, or as `train`.
    """
    config = dataclasses.replace(
        config or TrainConfig(), run_dir=None, wandb_project=None, evaluate=False, n_checkpoints=0
    )
    architecture = dataclasses.replace(architecture, d_in=0, n_snapshots=1)
    with tempfile.TemporaryDirectory() as folder:
        snapshots = models or untrained_snapshots(acts.snapshots, Path(folder) / "models", n_models)
        live = Activations(snapshots, acts.hook_name, acts.dataset, seed=acts.seed, settings=acts.settings)
        yield train(live, architecture, config), live
