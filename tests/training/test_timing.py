"""How long a step takes, measured before a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from crosslens.crosscoders import (
    DECLARATIONS,
    BatchTopKCrosscoderTrainingConfig,
    JumpReLUCrosscoderTrainingConfig,
    StandardCrosscoderTrainingConfig,
    TopKCrosscoderTrainingConfig,
)
from crosslens.training import timing
from crosslens.training.config import TrainConfig
from crosslens.training.timing import seconds_per_step
from crosslens.training.trainer import CrosscoderTrainer

SHAPE: dict[str, Any] = {"d_in": 1, "n_snapshots": 1, "d_sae": 64}


@pytest.mark.parametrize(
    "architecture",
    [
        BatchTopKCrosscoderTrainingConfig(k=4, **SHAPE),
        TopKCrosscoderTrainingConfig(k=4, **SHAPE),
        JumpReLUCrosscoderTrainingConfig(**SHAPE),
        StandardCrosscoderTrainingConfig(**SHAPE),
    ],
    ids=lambda each: each.architecture(),
)
def test_real_steps_are_timed(architecture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only steps move, so that nothing depends on the machine."""
    clock, seen = [0.0], list[tuple[int, ...]]()
    step = CrosscoderTrainer.step

    def counted(trainer: CrosscoderTrainer, batch: torch.Tensor) -> Any:
        clock[0] += 3.0 + float(trainer.dead_neurons.sum())
        seen.append((*batch.shape, trainer.sae.cfg.d_sae))
        return step(trainer, batch)

    monkeypatch.setattr(CrosscoderTrainer, "step", counted)
    monkeypatch.setattr(timing, "clock", lambda _: clock[0])
    state = torch.get_rng_state()
    config = TrainConfig(batch_size=32, device="cpu", training_tokens=320, lr_warm_up=3)
    dead = 64 // 3 if DECLARATIONS[architecture.architecture()].revives_dead else 0
    assert seconds_per_step(architecture, 3, 8, config) == pytest.approx((3.0, 3.0 + dead))
    assert {*seen} == {(32, 3, 8, 64)} and len(seen) > 3
    assert torch.equal(state, torch.get_rng_state()), "the random numbers of others stay what they were"


def test_large_crosscoders_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost that is linear in the number of features is found exactly, without a crosscoder that large."""
    sizes: list[int] = []

    def linear(architecture: Any, *_: Any) -> Any:
        sizes.append(architecture.d_sae)
        return np.array([0.5, 1.0]) + 1e-3 * architecture.d_sae

    monkeypatch.setattr(timing, "_time", linear)
    config = TrainConfig(batch_size=32, device="cpu")
    large = BatchTopKCrosscoderTrainingConfig(k=4, d_in=1, n_snapshots=1, d_sae=100_000)
    assert seconds_per_step(large, 4, 64, config, largest_bytes=200 << 20) == pytest.approx((100.5, 101.0))
    assert len(sizes) == 2 and max(sizes) < 100_000
    # where not even a small one fits, the least that the architecture allows is taken
    sizes.clear()
    seconds_per_step(large, 4, 64, config, largest_bytes=1)
    assert sizes == [8]
