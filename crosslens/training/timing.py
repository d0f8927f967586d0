"""How long a training step takes here, before there is anything to train on."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch

from crosslens.activations.plan import clock, training_bytes
from crosslens.crosscoders import DECLARATIONS, TRAINING_ARCHITECTURES, CrosscoderTrainingConfig
from crosslens.training.config import TrainConfig
from crosslens.training.trainer import CrosscoderTrainer

_LARGEST = 2 << 30
"""Bytes that the crosscoder whose steps are timed may take."""
_WARM, _STEPS = 2, 5
_DEAD = 3  # of as many features one is dead where an auxiliary loss is timed


class StepSeconds(NamedTuple):
    """Seconds of a training step."""

    alive: float
    """Without dead features."""
    dead: float
    """With a third of the features dead; the same where no auxiliary loss revives them."""


def seconds_per_step(
    architecture: CrosscoderTrainingConfig,
    n_snapshots: int,
    d_model: int,
    config: TrainConfig,
    largest_bytes: int = _LARGEST,
) -> StepSeconds:
    """Time steps on random activations, in one process, without shared and dedicated features.

    Time for data, logs and checkpoints is not in it. A crosscoder that takes more than `largest_bytes` is not made: two
    with fewer features are timed, and the rest is extrapolated by a straight line, since the costs of a step are linear
    in the number of features.

    Args:
        architecture: d_sae and the gate.
        n_snapshots: S.
        d_model: D.
        config: the batch size, the precision and the device.
        largest_bytes: memory for the measurement.

    Returns:
        Medians of five after the first two.
    """

    def timed(d_sae: int) -> Any:
        return _time(dataclasses.replace(architecture, d_sae=d_sae), n_snapshots, d_model, config)

    d_sae, least = architecture.d_sae, 2 * int(getattr(architecture, "k", 1))
    size = training_bytes(architecture, n_snapshots, d_model, config.batch_size, adam_moments=config.adam_moments)
    largest = max(least, min(d_sae, int(d_sae * largest_bytes / size)))
    if largest >= d_sae or largest // 2 < least:
        return StepSeconds(*timed(largest) * d_sae / largest)
    more, less = timed(largest), timed(largest // 2)
    slope = (more - less).clip(0) / (largest - largest // 2)
    return StepSeconds(*more + slope * (d_sae - largest))


def _time(architecture: CrosscoderTrainingConfig, n_snapshots: int, d_model: int, config: TrainConfig) -> Any:
    """Both times of a `StepSeconds`, as an array."""
    made = dataclasses.replace(
        architecture,
        n_snapshots=n_snapshots,
        d_in=n_snapshots * d_model,
        n_shared=0,
        shared_penalty=None,
        dedicated={},
        decoder_init="shared",  # drawing independent rows takes long
        decoder_init_norm=architecture.decoder_init_norm or 1.0,
        device=config.device,
    )
    sae_class: Any = TRAINING_ARCHITECTURES[architecture.architecture()][0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = sae_class(made)
        batch = torch.randn(config.batch_size, n_snapshots, d_model).to(config.device)
    how = dataclasses.replace(config, run_dir=None, wandb_project=None, training_tokens=None, lr_warm_up_steps=None)
    trainer = CrosscoderTrainer(how, sae, iter(()), 1000 * config.batch_size)
    medians: list[float] = []
    revives = DECLARATIONS[architecture.architecture()].revives_dead
    for n_dead in (0, architecture.d_sae // _DEAD) if revives else (0,):
        seconds: list[float] = []
        for _ in range(_WARM + _STEPS):
            trainer.n_forward_passes_since_fired[:n_dead] = torch.inf  # random activations would revive them
            began = clock(batch.device.type)
            trainer.step(batch)
            trainer.n_training_steps += 1
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            seconds.append(clock(batch.device.type) - began)
        medians.append(sorted(seconds[_WARM:])[_STEPS // 2])
    return np.array([medians[0], medians[-1]])
