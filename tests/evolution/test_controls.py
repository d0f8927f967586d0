"""Latent scaling and encoder share: plain loops, and known shrinkage and absence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.errors import UserError
from crosslens.evolution.controls import encoder_share, latent_scaling
from crosslens.snapshots.collection import Snapshots
from tests.given import Held, of_norms, of_rows


def arrays(cc: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decoder (F, S, D), encoder (S, D, F) and decoder bias (S, D) in float64."""
    parts = (cc.W_dec_by_snapshot, cc.W_enc_by_snapshot, cc.b_dec_by_snapshot)
    return tuple(part.detach().numpy().astype(float) for part in parts)  # type: ignore[return-value]


def some_crosscoder(F: int, S: int, D: int, seed: int, *, jumprelu: bool) -> tuple[Any, torch.Tensor]:
    """A crosscoder where feature 0 never fires and feature 1 is zero at snapshot 0; and activations."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(F, S, generator=generator) + 0.1
    norms[1, 0] = 0.0
    cc = of_norms(norms, D=D, seed=seed, jumprelu=jumprelu)
    cc.b_enc.data = torch.randn(F, generator=generator) * 0.3 - 0.2
    cc.b_enc.data[0] = -99
    cc.b_dec.data = torch.randn(S * D, generator=generator)
    cc.activation_scale.copy_(torch.rand(S, generator=generator) + 0.5)
    if jumprelu:
        cc.log_threshold.data = torch.linspace(-4, -1.5, F)
    return cc, torch.randn(37, S, D, generator=generator)


def gated(cc: Any, value: float, i: int, s: int, jumprelu: bool) -> float:
    if jumprelu and value * float(cc.W_dec_by_snapshot[i, s].norm()) <= float(cc.threshold[i]):
        return 0.0
    return value


def slow_scaling(cc: Any, x: torch.Tensor, jumprelu: bool) -> dict[str, np.ndarray]:
    """The definition, one token, feature and snapshot at a time."""
    W, _, bias = arrays(cc)
    F, S, _ = W.shape
    scale = cc.activation_scale.numpy().astype(float)
    norms = np.linalg.norm(W, axis=-1)
    upper: dict[str, np.ndarray] = {name: np.zeros((F, S)) for name in ("own", "peak")}
    lower = np.zeros(F)
    for token in x:
        f = cc.encode(token).numpy().astype(float)
        lower += f**2
        for s in range(S):
            here = [gated(cc, f[i], i, s, jumprelu) for i in range(F)]
            target = scale[s] * token[s].numpy().astype(float)
            rebuilt = bias[s] + sum(here[i] * W[i, s] for i in range(F))
            for i in range(F):
                residual = target - rebuilt + here[i] * W[i, s]
                p = int(norms[i].argmax())
                for name, row in (("own", W[i, s]), ("peak", W[i, p])):
                    with np.errstate(invalid="ignore"):
                        d = row / np.sqrt(row @ row)
                    upper[name][i, s] += f[i] * (residual @ d)
    with np.errstate(invalid="ignore"):
        return {name: sums / lower[:, None] for name, sums in upper.items()}


@pytest.mark.parametrize("jumprelu", [False, True])
@pytest.mark.parametrize(("F", "S", "D", "seed"), [(6, 3, 4, 0), (9, 2, 5, 1)])
@torch.no_grad()
def test_latent_scaling_is_the_least_squares_coefficient(F: int, S: int, D: int, seed: int, jumprelu: bool) -> None:
    cc, x = some_crosscoder(F, S, D, seed, jumprelu=jumprelu)
    found, slow = latent_scaling(cc, Held(x)), slow_scaling(cc, x, jumprelu)
    for name, values in slow.items():
        assert getattr(found, name).numpy() == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True), name
    assert found.own[0].isnan().all() and found.own[1, 0].isnan() and not found.peak[1:].isnan().any()
    assert torch.allclose(found.norms, cc.decoder_norms.double())
    peak = cc.decoder_norms.argmax(1)
    assert torch.equal(found.own[range(1, F), peak[1:]], found.peak[range(1, F), peak[1:]])
    table = found.to_frame([f"step{s}" for s in range(S)])
    assert len(table.columns) == 1 + 2 * S and np.array_equal(table["peak/step1"], found.peak[:, 1], equal_nan=True)


@torch.no_grad()
def test_latent_scaling_equals_the_norm_of_a_perfect_reconstruction() -> None:
    """Orthogonal features, no noise: beta is the true norm, also where the decoder row is shrunk."""
    rows = torch.zeros(3, 2, 4)
    rows[0, :, 0], rows[1, :, 1], rows[2, :, 2] = 2.0, 1.0, 1.0
    true = rows.clone()
    rows[1, 0] *= 0.1  # shrunk: in the activations it is as strong as at the peak
    rows[2, 0] *= 0.1
    true[2, 0] = 0.0  # really absent
    cc = of_rows(rows)
    values = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * (torch.arange(150).view(50, 3) % 4 > 0)
    cc.W_enc.data.zero_()
    for i, size in enumerate((2.0, 1.0, 1.0)):  # read at the last snapshot, exactly
        cc.W_enc_by_snapshot.data[1, i, i] = 1 / size
    x = torch.einsum("bi,isd->bsd", values, true)
    assert torch.allclose(cc.encode(x), values)
    found = latent_scaling(cc, Held(x))
    expected = [[2.0, 2.0], [1.0, 1.0], [0.0, 1.0]]
    for name in ("own", "peak"):
        assert getattr(found, name).numpy() == pytest.approx(np.array(expected), abs=1e-5)
    assert found.norms[1, 0] < 0.2 * found.own[1, 0]  # shrinkage shows


@pytest.mark.parametrize("jumprelu", [False, True])
@pytest.mark.parametrize(("F", "S", "D", "seed"), [(6, 3, 4, 0), (9, 2, 5, 1)])
@torch.no_grad()
def test_encoder_share_matches_plain_loops(F: int, S: int, D: int, seed: int, jumprelu: bool) -> None:
    cc, x = some_crosscoder(F, S, D, seed, jumprelu=jumprelu)
    cc.b_enc.data[2] = 99.0  # always active: nothing rises
    found = encoder_share(cc, Held(x))
    _, encoder, _ = arrays(cc)
    scale = cc.activation_scale.numpy().astype(float)
    active = np.array([(cc.encode(token) > 0).tolist() for token in x])
    for i in range(F):
        parts = np.array([[scale[s] * token[s].numpy() @ encoder[s, :, i] for s in range(S)] for token in x])
        if active[:, i].all() or not active[:, i].any():
            assert found[i].isnan().all()
            continue
        rise = parts[active[:, i]].mean(0) - parts.mean(0)
        assert found[i].numpy() == pytest.approx(rise / rise.sum(), rel=1e-4, abs=1e-4)
        assert float(found[i].sum()) == pytest.approx(1.0)
    assert found[0].isnan().all() and found[2].isnan().all() and not found[3:].isnan().any()


@torch.no_grad()
def test_encoder_share_shows_where_a_feature_is_read() -> None:
    """Two features are written at the first snapshot only; one is read there, the other from the last."""
    cc = of_rows([[[1.0, 0], [0, 0]], [[1.0, 0], [0, 0]]])
    cc.W_enc.data = torch.tensor([[1.0, 0], [0, 0], [0, 0], [0, 1.0]])
    x = torch.randn(40, 2, 2, generator=torch.Generator().manual_seed(1)) + 3
    cc.b_enc.data.fill_(-3.0)
    assert encoder_share(cc, Held(x)).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    x[:, 1, 0] = x[:, 0, 0]  # the second snapshot has the same input and inhibits the feature half as much
    cc.W_enc.data[:, 0] = torch.tensor([2.0, 0, -1, 0])
    assert encoder_share(cc, Held(x))[0].tolist() == pytest.approx([2.0, -1.0])


def test_errors(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", tiny_text, 500, 16)
    other = [{**row, "fingerprint": "0" * 64} for row in acts.metadata()["snapshots"]]
    wrong = of_norms(torch.ones(4, 3), other, D=16)
    fits = of_norms(torch.ones(4, 3), acts.metadata()["snapshots"], D=16)
    for control in (latent_scaling, encoder_share):
        with pytest.raises(UserError, match="trained on other weights"):
            control(wrong, acts)
        with pytest.raises(UserError, match="no activations are held out"):
            control(of_norms(torch.ones(2, 3)), Held(torch.zeros(0, 3, 4)))
        control(fits, acts)
    dead = of_norms(torch.ones(2, 3))
    dead.b_enc.data.fill_(-99)
    held = Held(torch.randn(6, 3, 4))
    assert latent_scaling(dead, held).own.isnan().all() and encoder_share(dead, held).isnan().all()
