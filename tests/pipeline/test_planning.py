"""Seconds of a training by those of a step."""

from __future__ import annotations

import pytest

from crosslens.activations.loader import Activations
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.pipeline import planning
from crosslens.training import TrainConfig, timing


@pytest.mark.parametrize(("dead_tokens", "before"), [(1000, 10), (10_000_000, 40), (50, 0)])
def test_features_can_be_dead_after_as_many_tokens(
    live: Activations, monkeypatch: pytest.MonkeyPatch, dead_tokens: int, before: int
) -> None:
    monkeypatch.setattr(timing, "seconds_per_step", lambda *_: timing.StepSeconds(1.0, 3.0))
    config = TrainConfig(training_tokens=4050, batch_size=100, dead_tokens=dead_tokens)
    steps = planning._time_steps(live, BatchTopKCrosscoderTrainingConfig(d_sae=8, k=2), config)
    assert steps == (40, 100, 40.0, before * 1.0 + (40 - before) * 3.0)
