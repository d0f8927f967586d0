"""Held-out activations that are kept in a file give what those in memory give."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, JumpReLUCrosscoder, JumpReLUCrosscoderConfig
from crosslens.evolution import held_out
from crosslens.evolution.held_out import held_out_features, read
from crosslens.evolution.history import evolve


@pytest.fixture(scope="module")
def crosscoder(acts: Activations) -> Crosscoder:
    """With gates of their own at every snapshot, and some features active."""
    cfg = JumpReLUCrosscoderConfig(d_in=acts.n_snapshots * acts.d_model, d_sae=24, n_snapshots=acts.n_snapshots)
    made, draw = JumpReLUCrosscoder(cfg), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in (made.W_enc, made.W_dec):
            weights.copy_(torch.randn(weights.shape, generator=draw))
    return made.requires_grad_(False)


@pytest.mark.parametrize("limit", [0, 1 << 32])
def test_rows_are_those_of_the_activations(
    acts: Activations, crosscoder: Crosscoder, limit: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(held_out, "HELD_BYTES", limit)
    monkeypatch.setattr(held_out, "batch_tokens", lambda _: 37)  # several blocks, the last of another size
    held = read(crosscoder, acts)
    blocks = list(held_out_features(crosscoder, acts))
    assert len(blocks) > 3
    raw, features = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    assert len(held.x) == acts.n_snapshots and len(held) == len(raw)
    for s, x in enumerate(held.x):
        assert torch.equal(x, crosscoder.scale(raw)[:, s])
        assert torch.equal(torch.from_numpy(held.gated(s).toarray()), crosscoder.snapshot_acts(features, s))
    assert torch.equal(torch.from_numpy(held.f.toarray()), features)


def test_tables_are_the_same(acts: Activations, crosscoder: Crosscoder, monkeypatch: pytest.MonkeyPatch):
    expected = evolve(crosscoder, acts).tables()
    monkeypatch.setattr(held_out, "HELD_BYTES", 0)
    found = evolve(crosscoder, acts).tables()
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table)
