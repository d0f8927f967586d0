"""What `evolve` is forecast to need, beside what it does with a tiny crosscoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import crosslens as cl
from crosslens.activations.loader import Activations
from crosslens.activations.plan import encoding_operations, logit_bytes
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.evolution import dynamics, evolve, measure_dynamics, plan_evolution, probe
from crosslens.evolution.dynamics import plan_predictions
from crosslens.evolution.ngrams import count_ngrams
from crosslens.evolution.phases import predicted_tokens
from crosslens.features import feature_tables
from crosslens.training import TrainConfig

F, K = 24, 4


def test_tokens_are_those_that_evolve_encodes_and_runs(live: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=F, k=K)
    planned = live.plan(measure=False, architecture=architecture, batch_size=64)
    memory, operations, run = plan_evolution(live, architecture, planned)
    crosscoder = cl.train(live, architecture, TrainConfig(batch_size=64, lr=1e-2, device="cpu", evaluate=False))
    encoded, ran, encode, model_at = [0], [0], crosscoder.encode, live.snapshots.model

    def counted(x: torch.Tensor) -> torch.Tensor:
        encoded[0] += x.shape[:-2].numel()
        return encode(x)

    monkeypatch.setattr(crosscoder, "encode", counted)
    evolution = evolve(crosscoder, live)
    evolution.tables()
    feature_tables(crosscoder, live)

    def watched(*arguments: Any) -> Any:
        model = model_at(*arguments)

        def call(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
            ran[0] += tokens.numel()
            return model(tokens, **options)

        return call

    with monkeypatch.context() as watching:
        watching.setattr(live.snapshots, "model", watched)
        measure_dynamics(crosscoder, live, evolution=evolution)
    before = encoded[0]
    probe(crosscoder, live, evolution, n_features=F)
    n, positions = planned.n_held_out, live.held_out_tokens().numel()
    assert before == n + positions and encoded[0] - before <= live.n_tokens  # until all features have enough
    assert operations["encoding"] == (n + positions + live.n_tokens) * encoding_operations(F, 3 * 16)
    assert encoding_operations(F, 48) > 2 * 48 * F
    assert run == ran[0]
    kept = planned.process_bytes + 2 * 4 * F * 48 + planned.held_out_bytes + planned.whole_bytes
    assert memory > kept + 8 * 48 * live.n_tokens  # probes gather activations, and put them together
    whole = sum(4 * p.numel() for p in live.snapshots[0].load().original_model.parameters())
    assert planned.whole_bytes == pytest.approx(3 * whole, rel=0.01)


@pytest.mark.parametrize("sums", [1 << 26, 200])
def test_sums_of_predictions_are_counted(live: Activations, monkeypatch: pytest.MonkeyPatch, sums: int) -> None:
    monkeypatch.setattr(dynamics, "_SUMS", sums)
    tokenizer, tokens = live.snapshots.tokenizer, predicted_tokens(live)
    counts = count_ngrams(live.train_tokens(), tokenizer)
    made: list[Any] = []

    class Kept(dynamics._Averages):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(dynamics, "_Averages", Kept)
    dynamics.measure_predictions(live.snapshots, counts, tokens, n_bootstrap=3)
    held, operations = plan_predictions(counts, tokens, tokenizer, n_bootstrap=3)
    (one,) = made
    size, V = sum(each.numel() for each in (one.sums, one.pairs, one.seen)), len(tokenizer)
    assert held == 8 * size + 4 * one.pairs.numel() + 40 * dynamics._PAIRS + logit_bytes(V, tokens.shape[1])
    assert operations >= 3 * 2 * size + tokens.numel() * V
