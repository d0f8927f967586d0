"""Train one crosscoder per seed on the same activations, to see which features do not depend on the seed."""

from __future__ import annotations

import dataclasses

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.training.config import TrainConfig
from crosslens.training.run import train


def train_seeds(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig | None = None,
    n_seeds: int = 3,
) -> dict[int, Crosscoder]:
    """Train crosscoders that differ in their initial weights, one after the other; `cl.train` for every seed.

    The data and their order are those of `acts`, the same for all. With a run directory the first seed is trained in
    it, exactly as by `cl.train`, and the others in directories inside it; a finished seed is loaded, an interrupted one
    continues.

    Args:
        acts: live or cached activations; cached ones are harvested once.
        architecture: one of the four training configs.
        config: how to train; `config.seed` is the first seed, the others follow it.
        n_seeds: number of crosscoders.

    Returns:
        The crosscoders by seed.

    Raises:
        UserError: fewer than one seed, or as `cl.train`.
    """
    config = config or TrainConfig()
    if n_seeds < 1:
        raise UserError(f"n_seeds={n_seeds} must be 1 or more")
    run = None if config.run_dir is None else RunDir(config.run_dir)
    trained: dict[int, Crosscoder] = {}
    for seed in range(config.seed, config.seed + n_seeds):
        folder = config.run_dir if run is None or seed == config.seed else run.other_seed(seed).path
        trained[seed] = train(acts, architecture, dataclasses.replace(config, seed=seed, run_dir=folder))
    return trained
