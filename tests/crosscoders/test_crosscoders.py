"""The four architectures against slow implementations written from the formulas, in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

import crosslens
from crosslens.crosscoders import (
    ARCHITECTURES,
    TRAINING_ARCHITECTURES,
    BatchTopKCrosscoderTrainingConfig,
    BatchTopKCrosscoderTrainingSAE,
    Crosscoder,
    CrosscoderTrainingSAE,
    JumpReLUCrosscoderTrainingConfig,
    StandardCrosscoderTrainingConfig,
    TopKCrosscoderTrainingConfig,
    register,
)
from crosslens.crosscoders.architectures import jumprelu
from crosslens.crosscoders.kernels import sparse
from crosslens.crosscoders.kernels.topk import batch_top_pairs, token_top_pairs
from crosslens.errors import UserError
from tests.crosscoders.reference import KNOWN, SnapshotJumpReLU, dense_forward_pass

B, D, F = 7, 6, 12
CONFIGS: dict[str, Callable[..., Any]] = {
    "standard_crosscoder": StandardCrosscoderTrainingConfig,
    "topk_crosscoder": TopKCrosscoderTrainingConfig,
    "batchtopk_crosscoder": BatchTopKCrosscoderTrainingConfig,
    "jumprelu_crosscoder": JumpReLUCrosscoderTrainingConfig,
}
EXTRAS: dict[str, dict[str, Any]] = {"topk_crosscoder": {"k": 3}, "batchtopk_crosscoder": {"k": 2.6}}


def make(architecture: str, S: int, seed: int = 0, dtype: str = "float64", **options: Any) -> CrosscoderTrainingSAE:
    """A crosscoder with random parameters, so that no gradient vanishes by symmetry."""
    config = CONFIGS[architecture](
        **{"d_in": S * D, "d_sae": F, "n_snapshots": S, "dtype": dtype, **EXTRAS.get(architecture, {}), **options}
    )
    sae = TRAINING_ARCHITECTURES[architecture][0](config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            spread = {"W_enc": 0.4, "b_enc": 0.3, "W_dec": 0.5, "b_dec": 0.5, "direct_threshold": 0.1}.get(name, 0.5)
            centre = {"log_threshold": math.log(0.6), "direct_threshold": 0.6}.get(name, 0.0)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        sae.activation_scale.copy_(0.5 + torch.rand(S, generator=draw))
    return sae


def raw(S: int, seed: int = 0, n: int = B) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, S, D, generator=draw, dtype=torch.float64) * (1 + torch.arange(S)[:, None])


def step_input(x: Tensor, dead: Tensor | None = None, coefficient: float = 0.7, step: int = 0) -> TrainStepInput:
    coefficients = {"l1": coefficient, "sparsity": coefficient}
    return TrainStepInput(
        sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
    )


def gradients(sae: CrosscoderTrainingSAE, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in sae.named_parameters()
    }


# ---------------------------------------------------------------------- the formulas, one scalar at a time


class Slow:
    """The formulas, on scaled activations, in loops over tokens, snapshots and features."""

    def __init__(self, sae: CrosscoderTrainingSAE, x: Tensor) -> None:
        self.p = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
        self.S, self.c = sae.n_snapshots, sae.activation_scale.double().tolist()
        self.relative = sae.cfg.apply_b_dec_to_input
        self.B, self.F = len(x), sae.cfg.d_sae
        self.x = [[self.c[s] * x[b, s] for s in range(self.S)] for b in range(self.B)]
        self.h = [[self.hidden(b, i) for i in range(self.F)] for b in range(self.B)]
        self.n = [[self.norm(i, s) for s in range(self.S)] for i in range(self.F)]

    def enc(self, s: int, i: int) -> Tensor:
        return self.p["W_enc"][s * D : (s + 1) * D, i]

    def dec(self, i: int, s: int) -> Tensor:
        return self.p["W_dec"][i, s * D : (s + 1) * D]

    def hidden(self, b: int, i: int) -> Tensor:
        h = self.p["b_enc"][i]
        for s in range(self.S):
            for d in range(D):
                read = self.x[b][s][d] - self.p["b_dec"][s * D + d] if self.relative else self.x[b][s][d]
                h = h + read * self.enc(s, i)[d]
        return h

    def norm(self, i: int, s: int) -> Tensor:
        row = self.dec(i, s)
        # the norm has no derivative at zero: use the subgradient 0
        return row.square().sum().sqrt() if bool(row.any()) else torch.zeros((), dtype=torch.float64)

    def total_norm(self, i: int) -> float:
        return sum(n.item() for n in self.n[i])

    def score(self, b: int, i: int) -> float:
        return max(0.0, self.h[b][i].item()) * self.total_norm(i)

    def relu(self, b: int, i: int) -> Tensor:
        h = self.h[b][i]
        return h if h.item() > 0 else torch.zeros((), dtype=torch.float64)

    def decode(self, f: dict[tuple[int, int], Tensor], bias: bool = True) -> list[list[Tensor]]:
        out = []
        for b in range(self.B):
            row = []
            for s in range(self.S):
                x_hat = self.p["b_dec"][s * D : (s + 1) * D] if bias else torch.zeros(D, dtype=torch.float64)
                for i in range(self.F):
                    if (b, i) in f:
                        x_hat = x_hat + f[b, i] * self.dec(i, s)
                row.append(x_hat)
            out.append(row)
        return out

    def squared_error(self, a: list[list[Tensor]], b: list[list[Tensor]]) -> Tensor:
        return sum(
            ((u - v).square().sum() for row, other in zip(a, b, strict=True) for u, v in zip(row, other, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )

    def grads(self, loss: Tensor) -> dict[str, Tensor]:
        loss.backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.p.items()}

    def dense(self, f: dict[tuple[int, int], Tensor]) -> Tensor:
        out = torch.zeros(self.B, self.F, dtype=torch.float64)
        for (b, i), value in f.items():
            out[b, i] = value.detach()
        return out


def slow_standard(slow: Slow, coefficient: float) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor]]:
    f = {(b, i): slow.relu(b, i) for b in range(slow.B) for i in range(slow.F)}
    penalty = sum((f[b, i] * sum(slow.n[i]) for b in range(slow.B) for i in range(slow.F)), torch.zeros(()))
    mse = slow.squared_error(slow.decode(f), slow.x) / slow.B
    return f, {"mse_loss": mse, "l1_loss": coefficient * penalty / slow.B}


def slow_topk(
    slow: Slow, k: float, batch: bool, dead: list[int], alpha: float = 1 / 32
) -> tuple[dict[tuple[int, int], Tensor], dict[str, Tensor]]:
    pairs = [(slow.score(b, i), b, i) for b in range(slow.B) for i in range(slow.F)]
    if batch:
        kept = sorted(pairs, reverse=True)[: round(k * slow.B)]
    else:
        kept = [p for b in range(slow.B) for p in sorted((q for q in pairs if q[1] == b), reverse=True)[: int(k)]]
    f = {(b, i): slow.relu(b, i) for _, b, i in kept}
    x_hat = slow.decode(f)
    residual = [[(x - y).detach() for x, y in zip(*rows, strict=True)] for rows in zip(slow.x, x_hat, strict=True)]
    auxiliary = torch.zeros((), dtype=torch.float64)
    if dead:
        n_aux = min(D // 2, len(dead))
        chosen = {
            (b, i): slow.relu(b, i)
            for b in range(slow.B)
            for _, i in sorted(((slow.score(b, i), i) for i in dead), reverse=True)[:n_aux]
        }
        mean = [sum(residual[b][s] for b in range(slow.B)) / slow.B for s in range(slow.S)]
        spread = slow.squared_error(residual, [mean] * slow.B)  # type: ignore[list-item]
        centre = [sum(slow.x[b][s] for b in range(slow.B)) / slow.B for s in range(slow.S)]
        variance = slow.squared_error(slow.x, [centre] * slow.B) / slow.B  # type: ignore[list-item]
        auxiliary = variance * slow.squared_error(slow.decode(chosen, bias=False), residual) / spread
    mse = slow.squared_error(x_hat, slow.x) / slow.B
    return f, {"mse_loss": mse, "auxiliary_reconstruction_loss": alpha * auxiliary}


def slow_jumprelu(
    sae: CrosscoderTrainingSAE, x: Tensor, coefficient: float, window: float = 4.0, stretch: float = 4.0
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """Loss and gradients without autograd: every derivative is written out, including the straight-through ones."""
    S, n_tokens, n_features = sae.n_snapshots, len(x), sae.cfg.d_sae
    W_enc, W_dec, b_enc, b_dec, log_t = (
        getattr(sae, name).detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold")
    )
    x = x * sae.activation_scale.double()[:, None]
    part = [slice(s * D, (s + 1) * D) for s in range(S)]
    t = [math.exp(v) for v in log_t.tolist()]
    n = [[math.sqrt(float(W_dec[i, part[s]].square().sum())) for s in range(S)] for i in range(n_features)]
    relative = sae.cfg.apply_b_dec_to_input
    read = x - b_dec.view(S, D) if relative else x  # by the encoder
    h = [
        [float(b_enc[i]) + sum(float(read[b, s] @ W_enc[part[s], i]) for s in range(S)) for i in range(n_features)]
        for b in range(n_tokens)
    ]
    gate = {(b, i, s): h[b][i] * n[i][s] > t[i] for b in range(n_tokens) for i in range(n_features) for s in range(S)}
    f = {key: h[key[0]][key[1]] if is_open else 0.0 for key, is_open in gate.items()}
    error: dict[tuple[int, int], Tensor] = {}
    for b in range(n_tokens):
        for s in range(S):
            x_hat = b_dec[part[s]].clone()
            for i in range(n_features):
                x_hat += f[b, i, s] * W_dec[i, part[s]]
            error[b, s] = x_hat - x[b, s]
    N = n_tokens * S
    mse = sum(float(e @ e) for e in error.values()) / N
    tanh = {(b, i, s): math.tanh(stretch * value * n[i][s]) for (b, i, s), value in f.items()}
    phi = [sum(tanh[b, i, s] for b in range(n_tokens) for s in range(S)) / N for i in range(n_features)]
    penalty = coefficient * sum(p * (1 + p / 0.01) for p in phi)

    g = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
    for b in range(n_tokens):
        for s in range(S):
            g["b_dec"][part[s]] += 2 * error[b, s] / N
    for b in range(n_tokens):
        for i in range(n_features):
            dh = 0.0
            for s in range(S):
                slope = coefficient * (1 + 2 * phi[i] / 0.01) / N * (1 - tanh[b, i, s] ** 2) * stretch
                df = 2 / N * float(error[b, s] @ W_dec[i, part[s]]) + slope * n[i][s]
                g["W_dec"][i, part[s]] += 2 / N * f[b, i, s] * error[b, s]
                if n[i][s] > 0:  # dn/dW = W / n; n gets no gradient from the gate
                    g["W_dec"][i, part[s]] += slope * f[b, i, s] * W_dec[i, part[s]] / n[i][s]
                z = h[b][i] * n[i][s]
                if abs(z - t[i]) < window / 2 and z > 0:
                    g["log_threshold"][i] += t[i] * df * -(t[i] / (window * n[i][s]))
                dh += df if gate[b, i, s] else 0.0
            g["b_enc"][i] += dh
            for s in range(S):
                g["W_enc"][part[s], i] += dh * read[b, s]
                g["b_dec"][part[s]] -= relative * dh * W_enc[part[s], i]
    features = torch.tensor(
        [
            [h[b][i] if any(gate[b, i, s] for s in range(S)) else 0.0 for i in range(n_features)]
            for b in range(n_tokens)
        ],
        dtype=torch.float64,
    )
    return features, {"mse_loss": mse, "sparsity_loss": penalty}, g


def close(found: Tensor, wanted: Tensor, what: str, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


WAYS = ("pairs", "dense products", "reference")


def forward(sae: CrosscoderTrainingSAE, way: str, inputs: TrainStepInput) -> TrainStepOutput:
    """One forward pass: on active pairs, with the kernels' dense products, or in plain autograd."""
    if way == "reference":
        return dense_forward_pass(sae, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sparse.DENSE_ABOVE, "cpu", 2.0 if way == "pairs" else -1.0)
        return sae.training_forward_pass(inputs)


def compare(
    sae: CrosscoderTrainingSAE,
    x: Tensor,
    dead: list[int] | None = None,
    way: str = "pairs",
    coefficient: float = 0.7,
) -> TrainStepOutput:
    """Losses, features and every gradient of one step against the slow implementation."""
    architecture = sae.cfg.architecture()
    mask = None
    if dead is not None:
        mask = torch.zeros(F, dtype=torch.bool)
        mask[dead] = True
    output = forward(sae, way, step_input(x, mask, coefficient))
    found = gradients(sae, output.loss)
    if architecture == "jumprelu_crosscoder":
        features, losses, wanted = slow_jumprelu(sae, x, coefficient)
        losses = {name: torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}
    else:
        slow = Slow(sae, x)
        if architecture == "standard_crosscoder":
            f, losses = slow_standard(slow, coefficient)
        else:
            f, losses = slow_topk(slow, sae.cfg.k, architecture == "batchtopk_crosscoder", dead or [])  # type: ignore[attr-defined]
        features, wanted = slow.dense(f), slow.grads(sum(losses.values(), torch.zeros(())))
    assert set(output.losses) == set(losses)
    for name, value in losses.items():
        close(output.losses[name], value.double(), name)
    close(output.loss, sum(losses.values(), torch.zeros(())).double(), "loss")
    close(output.feature_acts.to_dense(), features, "features")
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert bool(torch.isfinite(found[name]).all()), name
        close(found[name], gradient, f"gradient of {name}")
    return output


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_loss_and_every_gradient(architecture: str, way: str, S: int):
    for seed, relative in ((0, True), (1, False)):
        sae, x = make(architecture, S, seed, apply_b_dec_to_input=relative), raw(S, seed)
        output = compare(sae, x, way=way)
        assert output.loss.item() > 0 and int((output.feature_acts.to_dense() != 0).sum()) > 0
        scaled = (x * sae.activation_scale.double()[:, None]).flatten(1) - relative * sae.b_dec.detach()
        close(output.sae_in, scaled, "sae_in is scaled")
        assert output.sae_out.shape == (B, S * D)
        expected = (output.sae_out - scaled).square().sum(-1).mean() / (S if architecture.startswith("jump") else 1)
        close(output.losses["mse_loss"], expected, "the reconstruction loss is that of sae_out and sae_in")


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_silent_features_zero_rows_and_ties(architecture: str, way: str, S: int):
    sae, x = make(architecture, S, seed=3), raw(S, seed=3)
    with torch.no_grad():
        sae.b_enc[0] = -1e3  # never fires
        sae.W_dec[1] = 0  # fires, without a decoder
        sae.W_dec[2, :D] = 0  # exists from the second snapshot on (nowhere when S is 1)
        sae.W_enc[:, 4], sae.W_dec[4], sae.b_enc[4] = sae.W_enc[:, 3], sae.W_dec[3], sae.b_enc[3]  # twins tie
        if architecture == "jumprelu_crosscoder":
            sae.log_threshold[4] = sae.log_threshold[3]  # type: ignore[operator,index]
    if "topk" not in architecture:
        compare(sae, x, way=way)
        return
    # either twin may be kept: only their sum is determined
    output = forward(sae, way, step_input(x))
    found = gradients(sae, output.loss)
    slow = Slow(sae, x)
    f, losses = slow_topk(slow, sae.cfg.k, architecture == "batchtopk_crosscoder", [])  # type: ignore[attr-defined]
    close(output.losses["mse_loss"], losses["mse_loss"], "mse_loss")
    wanted = slow.grads(losses["mse_loss"])
    kept = output.feature_acts.to_dense()
    k = sae.cfg.k  # type: ignore[attr-defined]
    assert int((kept != 0).sum()) <= round(k * B)
    close(kept[:, 3] + kept[:, 4], slow.dense(f)[:, 3] + slow.dense(f)[:, 4], "features of the twins")
    for name, axis in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0), ("b_dec", None)):
        a, b = found[name], wanted[name]
        assert bool(torch.isfinite(a).all()), name
        if axis is not None:
            a, b = a.movedim(axis, 0), b.movedim(axis, 0)
            close(a[3] + a[4], b[3] + b[4], f"twins' gradient of {name}")
            others = [i for i in range(F) if i not in (3, 4)]
            a, b = a[others], b[others]
        close(a, b, f"gradient of {name}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_no_active_feature_at_all(architecture: str, way: str):
    sae, x = make(architecture, 2), raw(2)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    output = compare(sae, x, way=way)
    assert not bool(output.feature_acts.to_dense().any())
    close(output.losses["mse_loss"] * (2 if architecture.startswith("jump") else 1),
          output.sae_in.square().sum(-1).mean(), "the decoder bias remains, which sae_in is relative to")  # fmt: skip


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_a_parameter_that_is_nan_shows_in_the_loss(architecture: str, way: str, name: str):
    for where in (slice(None), slice(3, 4)):
        sae = make(architecture, 2)
        with torch.no_grad():
            sae.b_enc.add_(1)
            parameter = getattr(sae, name)
            (parameter.T if name == "W_enc" else parameter)[where] = math.nan
        assert forward(sae, way, step_input(raw(2))).loss.isnan()


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["topk_crosscoder", "batchtopk_crosscoder"])
def test_auxiliary_loss_and_its_gradients(architecture: str, way: str, S: int):
    for dead in ([5], [1, 4, 9], [0, 2, 3, 6, 7, 10, 11]):  # fewer than D/2, as many, more
        output = compare(make(architecture, S, seed=5), raw(S, seed=5), dead=dead, way=way)
        assert output.losses["auxiliary_reconstruction_loss"].item() > 0
    without = compare(make(architecture, S, seed=5), raw(S, seed=5), dead=[], way=way)
    assert float(without.losses["auxiliary_reconstruction_loss"]) == 0


@pytest.mark.parametrize("architecture", ["topk_crosscoder", "batchtopk_crosscoder"])
def test_descending_the_auxiliary_loss_makes_dead_features_explain_the_residual(architecture: str):
    S, dead = 2, [0, 1, 2, 3, 4]
    sae, x = make(architecture, S, seed=1), raw(S, seed=1, n=64)
    mask = torch.zeros(F, dtype=torch.bool)
    mask[dead] = True
    with torch.no_grad():
        sae.W_dec[dead] *= 1e-3  # never among the strongest, so really dead
        sae.b_enc[5:] += 4
    first = sae.training_forward_pass(step_input(x, mask))
    assert not bool(first.feature_acts.to_dense()[:, dead].any())
    residual = (first.sae_in - first.sae_out).detach()

    def left() -> float:
        """Fraction of the residual left after adding the strongest dead features to the reconstruction."""
        h = (first.sae_in @ sae.W_enc + sae.b_enc).detach()
        scores = h.relu() * sae.decoder_norms.detach().sum(-1)
        rest = residual.clone()
        for b in range(len(x)):
            for i in sorted(dead, key=lambda i: -float(scores[b, i]))[: D // 2]:
                rest[b] -= h[b, i].relu() * sae.W_dec[i].detach()
        return float(rest.square().sum() / residual.square().sum())

    before = left()
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    for _ in range(10):
        loss = sae.training_forward_pass(step_input(x, mask)).losses["auxiliary_reconstruction_loss"]
        optimizer.zero_grad()
        loss.backward()
        assert not bool(sae.W_dec.grad[5:].any()) and not bool(sae.W_enc.grad[:, 5:].any())  # the others do not move
        optimizer.step()
    assert before == pytest.approx(1, abs=0.02)
    assert left() < 0.9  # with the opposite sign it would exceed 1


@pytest.mark.parametrize("sample", [1 << 16, 8])  # 8: the bound comes from a sample
@pytest.mark.parametrize("kind", ["random", "ties", "ascending", "few positive", "constant"])
@pytest.mark.parametrize("width", [31, 32])  # 32: features are bounded in groups
@pytest.mark.parametrize("numpy", [True, False])
def test_selection_on_pairs(kind: str, sample: int, width: int, numpy: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crosslens.crosscoders.kernels.topk.SAMPLE", sample)
    monkeypatch.setattr("crosslens.crosscoders.kernels.topk.NUMPY_THREADS", 1000 if numpy else 0)
    h = torch.randn(13, width, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        h = (h * 2).round()
    elif kind == "ascending":
        h = h.flatten().sort().values.view(13, width)
    elif kind == "few positive":
        h = h - 2
    elif kind == "constant":
        h = torch.ones_like(h)
    norms = (1 + torch.arange(width) % 3).float()
    scores = h.relu() * norms
    order = sorted((-float(scores[b, i]), b, i) for b in range(13) for i in range(width))
    for count in (1, 30, 200, 402, 13 * width):
        pairs, found = batch_top_pairs(h, norms, count)
        assert torch.equal(found, scores[pairs.tokens, pairs.features])
        kept = sorted((b, i) for u, b, i in order[:count] if u < 0)  # of equal scores the earlier ones
        assert list(zip(pairs.tokens.tolist(), pairs.features.tolist(), strict=True)) == kept
        assert pairs.values.tolist() == [float(h[b, i]) for b, i in kept] and pairs.shape == (13, width)
    for k in (1, 5, width):
        pairs = token_top_pairs(h, norms, k)
        rows = [[(u, b, i) for u, b, i in order if b == row][:k] for row in range(13)]
        kept = sorted((b, i) for row in rows for u, b, i in row if u < 0)
        assert list(zip(pairs.tokens.tolist(), pairs.features.tolist(), strict=True)) == kept
        assert pairs.values.tolist() == [float(h[b, i]) for b, i in kept] and pairs.shape == (13, width)


@pytest.mark.parametrize("architecture", ["topk_crosscoder", "batchtopk_crosscoder"])
def test_active_pairs_equal_dense_autograd_in_float32(architecture: str):
    S, width, n_features, n_tokens = 3, 32, 1024, 256  # large enough for the sampled bound
    config = CONFIGS[architecture](d_in=S * width, d_sae=n_features, n_snapshots=S, k=16)
    sae = TRAINING_ARCHITECTURES[architecture][0](config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    x = torch.randn(n_tokens, S, width, generator=draw)
    dead = torch.rand(n_features, generator=draw) < 0.1
    outputs = [sae.training_forward_pass(step_input(x, dead)), dense_forward_pass(sae, step_input(x, dead))]  # type: ignore[operator,union-attr]
    fast, dense = (gradients(sae, output.loss) for output in outputs)
    for name, gradient in dense.items():
        assert float((fast[name] - gradient).abs().max()) < 1e-5 * float(gradient.abs().max()), name
    assert outputs[0].loss.item() == pytest.approx(outputs[1].loss.item(), rel=1e-5)
    assert torch.equal(outputs[0].feature_acts.to_dense(), outputs[1].feature_acts)


# ---------------------------------------------------------------------- JumpReLU's gate


def test_jumprelu_gives_the_norms_no_gradient():
    h = torch.randn(4, F, dtype=torch.float64, requires_grad=True)
    norms = torch.rand(F, 3, dtype=torch.float64, requires_grad=True)
    threshold = torch.full((F,), 0.3, dtype=torch.float64, requires_grad=True)
    acts = SnapshotJumpReLU.apply(h, norms, threshold, 4.0)
    acts.square().sum().backward()  # type: ignore[union-attr]
    assert norms.grad is None and h.grad is not None and threshold.grad is not None
    assert bool(threshold.grad.any())
    # the same in the model: without a penalty, the decoder's gradient is that of a linear decoder of fixed features
    sae, x = make("jumprelu_crosscoder", 3), raw(3)
    output = compare(sae, x, coefficient=0.0)
    found = gradients(sae, sae.training_forward_pass(step_input(x, coefficient=0.0)).loss)["W_dec"]
    error = (output.sae_out - output.sae_in).detach().unflatten(-1, (3, D))
    f = torch.stack([sae.snapshot_acts(output.feature_acts.detach().to_dense(), s) for s in range(3)], 1)
    close(found, torch.einsum("bsf,bsd->fsd", f, error).flatten(1) * 2 / (B * 3), "gradient of W_dec")


def test_jumprelu_window_is_what_the_config_says():
    S = 2
    for window in (0.5, 4.0):
        sae, x = make("jumprelu_crosscoder", S, jumprelu_window=window), raw(S)
        found = gradients(sae, sae.training_forward_pass(step_input(x)).loss)
        close(found["log_threshold"], slow_jumprelu(sae, x, 0.7, window)[2]["log_threshold"], f"window {window}")


@pytest.mark.parametrize("S", [1, 3])
def test_jumprelu_encode_and_decode_repeat_the_gates_of_training(S: int):
    sae, x = make("jumprelu_crosscoder", S, seed=2), raw(S, seed=2)
    features, _, _ = slow_jumprelu(sae, x, 0.0)
    close(sae.encode(x), features, "encode is h if any gate is open")
    output = sae.training_forward_pass(step_input(x))
    decoded = sae.decode(sae.encode(x))
    sae_out = (output.sae_out + sae.b_dec).unflatten(-1, (S, D))
    close(decoded, sae_out / sae.activation_scale[:, None], "decode of unedited features")
    for s in range(S):
        of_snapshot = sae.snapshot_acts(features, s)
        n, t = sae.decoder_norms[:, s].tolist(), sae.log_threshold.exp().tolist()  # type: ignore[operator,union-attr]
        expected = [[f if f * n[i] > t[i] else 0.0 for i, f in enumerate(row)] for row in features.tolist()]
        close(of_snapshot, torch.tensor(expected, dtype=torch.float64), "gate of one snapshot")
        close(sae.decode_snapshot(of_snapshot, s), decoded[:, s], "decode_snapshot")
    if S > 1:  # else this tests nothing
        assert any(bool((sae.snapshot_acts(features, 0) != sae.snapshot_acts(features, s)).any()) for s in range(1, S))


# ---------------------------------------------------------------------- inference


@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("architecture", KNOWN)
def test_inference_gate_and_decoder(architecture: str, S: int):
    sae, x = make(architecture, S, seed=4), raw(S, seed=4)
    if architecture == "batchtopk_crosscoder":
        sae.threshold.fill_(0.8)  # type: ignore[operator,union-attr]
    cc, slow = sae.to_inference(), Slow(sae, x)
    wanted = torch.zeros(B, F, dtype=torch.float64)
    for b in range(B):
        strongest = sorted(range(F), key=lambda i: -slow.score(b, i))[:3]
        for i in range(F):
            h, norms = slow.h[b][i].item(), [n.item() for n in slow.n[i]]
            passes = {
                "standard_crosscoder": h > 0,
                "topk_crosscoder": i in strongest and h > 0,
                "batchtopk_crosscoder": max(h, 0) * sum(norms) > float(torch.tensor(0.8)),
                "jumprelu_crosscoder": any(
                    h * n > math.exp(slow.p["log_threshold"][i].item()) for n in norms
                ) if architecture == "jumprelu_crosscoder" else False,
            }[architecture]  # fmt: skip
            wanted[b, i] = h if passes else 0.0
    close(cc.encode(x), wanted, "encode")
    assert 0 < int(wanted.count_nonzero()) < wanted.numel()
    decoded = torch.zeros(B, S, D, dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            decoded[b, s] = sae.b_dec[s * D : (s + 1) * D].detach()
            for i in range(F):
                is_open = architecture != "jumprelu_crosscoder" or float(wanted[b, i]) * slow.n[i][s].item() > math.exp(
                    slow.p["log_threshold"][i].item()
                )
                decoded[b, s] += wanted[b, i] * is_open * slow.dec(i, s).detach()
            decoded[b, s] /= sae.activation_scale[s].double()
    close(cc.decode(wanted), decoded, "decode")
    close(cc(x), decoded, "forward")
    close(cc.encode(x.expand(2, 5, B, S, D))[1, 3], wanted, "any leading dimensions")
    assert not cc.training and not any(p.requires_grad for p in cc.parameters())
    for name, parameter in cc.named_parameters():
        assert parameter.data_ptr() == sae.get_parameter(name).data_ptr()  # shared, not copied
    assert all(p.requires_grad for p in sae.parameters())


@pytest.mark.parametrize("S", [1, 3])
def test_views_and_norms(S: int):
    sae = make("standard_crosscoder", S)
    assert (sae.n_snapshots, sae.d_model) == (S, D)
    for s in range(S):
        rows = slice(s * D, (s + 1) * D)
        assert torch.equal(sae.W_enc_by_snapshot[s], sae.W_enc[rows])
        assert torch.equal(sae.W_dec_by_snapshot[:, s], sae.W_dec[:, rows])
        assert torch.equal(sae.b_dec_by_snapshot[s], sae.b_dec[rows])
        for i in range(F):
            norm = math.sqrt(sum(v * v for v in sae.W_dec[i, rows].tolist()))
            assert sae.decoder_norms[i, s].item() == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("architecture", KNOWN)
def test_initial_weights(architecture: str):
    for shared in (False, True):
        sae = make(architecture, 3)
        config = CONFIGS[architecture](
            d_in=3 * D, d_sae=F, n_snapshots=3, decoder_init_norm=0.08, **EXTRAS.get(architecture, {}),
            decoder_init="shared" if shared else "independent",
        )  # fmt: skip
        sae = TRAINING_ARCHITECTURES[architecture][0](config)
        torch.testing.assert_close(sae.decoder_norms, torch.full((F, 3), 0.08))
        assert torch.equal(sae.W_enc, sae.W_dec.T) and not bool(sae.b_enc.any()) and not bool(sae.b_dec.any())
        rows = sae.W_dec_by_snapshot
        assert torch.equal(rows[:, 0], rows[:, 1]) == shared
        assert bool((rows[:, 0] @ rows[:, 0].T != 0).all()) and not torch.equal(rows[0], rows[1])
    if architecture == "jumprelu_crosscoder":
        torch.testing.assert_close(sae.log_threshold.exp(), torch.full((F,), 0.1))  # type: ignore[operator,union-attr]


# ---------------------------------------------------------------------- the scale of each snapshot


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_snapshot_ten_times_louder_gives_the_same_features(architecture: str):
    sae, x = make(architecture, 3), raw(3)
    cc = sae.eval().to_inference()
    if architecture == "batchtopk_crosscoder":
        cc.threshold.fill_(0.5)  # type: ignore[operator,union-attr]
    features, decoded = cc.encode(x), cc.decode(cc.encode(x))
    losses = {k: v.item() for k, v in sae.training_forward_pass(step_input(x)).losses.items()}
    louder = x.clone()
    louder[:, 1] *= 16  # a power of two, so that nothing is rounded
    cc.activation_scale[1] /= 16
    assert torch.equal(cc.encode(louder), features)
    expected = decoded.clone()
    expected[:, 1] *= 16
    assert torch.equal(cc.decode(features), expected)
    close(cc.decode_snapshot(cc.snapshot_acts(features, 1), 1), expected[:, 1], "decode_snapshot")
    assert {k: v.item() for k, v in sae.training_forward_pass(step_input(louder)).losses.items()} == losses
    # ten times, and applied exactly once: the features of scaled activations under a scale of 1
    cc.activation_scale[1] *= 1.6
    ten = x.clone()
    ten[:, 1] *= 10
    torch.testing.assert_close(cc.encode(ten), features, rtol=1e-5, atol=1e-6)
    scale = cc.activation_scale.clone()
    cc.activation_scale.fill_(1.0)
    torch.testing.assert_close(cc.encode(ten * scale[:, None]), features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", KNOWN)
def test_the_scale_stays_in_float32(architecture: str, tmp_path: Path):
    scale = torch.tensor([0.123456789, 7.654321, 1 / 3])
    sae = make(architecture, 3, dtype="float32")
    sae.activation_scale.copy_(scale)

    def check(crosscoder: Any, dtype: torch.dtype = torch.bfloat16) -> None:
        assert crosscoder.activation_scale.dtype == torch.float32
        assert torch.equal(crosscoder.activation_scale, scale)
        assert crosscoder.W_dec.dtype == dtype == crosscoder.dtype

    check(copy.deepcopy(sae), torch.float32)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    check(half)
    with pytest.raises(UserError, match="dtype='bfloat16' is not available in training: .*TrainConfig"):
        half.training_forward_pass(step_input(raw(3).bfloat16()))
    check(copy.deepcopy(half))
    check(half.to_inference())
    check(half.to_inference().to("cpu"))
    check(copy.deepcopy(half).to(torch.float32), torch.float32)
    half.save_model(tmp_path / "training")
    check(TrainingSAE.load_from_disk(tmp_path / "training"))
    half.save_inference_model(tmp_path / "inference")
    check(SAE.load_from_disk(tmp_path / "inference"))
    check(crosslens.load(tmp_path / "inference", dtype="float32"), torch.float32)
    check(crosslens.load(tmp_path / "inference"))
    sae.to_inference().save(tmp_path / "full")
    check(crosslens.load(tmp_path / "full", dtype="bfloat16"))
    check(crosslens.load(tmp_path / "full", dtype="float64"), torch.float64)


def test_weights_of_a_checkpoint_come_with_their_own_scale(tmp_path: Path):
    sae = make("standard_crosscoder", 2, dtype="float32")
    sae.save_model(tmp_path / "first")
    first = sae.activation_scale.clone()
    sae.activation_scale.mul_(3)
    sae.save_model(tmp_path / "second")
    sae.load_weights_from_checkpoint(tmp_path / "first")
    assert torch.equal(sae.activation_scale, first)


@pytest.mark.parametrize("architecture", KNOWN)
def test_nothing_is_ever_folded(architecture: str, tmp_path: Path):
    sae = make(architecture, 2)
    ones = torch.ones(2 * D)
    for crosscoder in (sae, sae.to_inference()):
        before = copy.deepcopy(crosscoder.state_dict())
        for fold in (
            crosscoder.fold_W_dec_norm,
            crosscoder.fold_and_get_W_dec_norm,
            lambda: crosscoder.fold_activation_norm_scaling_factor(2.0),  # noqa: B023
            lambda: crosscoder.fold_activation_whitening(ones, ones, ones),  # noqa: B023
        ):
            with pytest.raises(UserError, match="is not available: folding"):
                fold()
        assert all(torch.equal(v, before[k]) for k, v in crosscoder.state_dict().items())
    sae.save_inference_model(tmp_path)
    with pytest.raises(UserError, match="folding"):
        SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)


# ---------------------------------------------------------------------- disk


@pytest.mark.parametrize("architecture", KNOWN)
def test_saved_and_loaded_outputs_are_identical(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sae = make(architecture, 3, dtype="float32").eval()
    sae.cfg.metadata.snapshots = [{"label": name, "step": i, "tokens": None} for i, name in enumerate("abc")]
    if architecture == "batchtopk_crosscoder":
        sae.threshold.fill_(0.7)  # type: ignore[operator,union-attr]
    x = raw(3).float()
    features, decoded = sae.encode(x), sae.decode(sae.encode(x))
    assert 0 < int(features.count_nonzero()) < features.numel()

    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "repo" / "inference")
    assert sae.save(tmp_path / "saved") == tmp_path / "saved"
    cc = sae.to_inference()
    cc.save_model(tmp_path / "again")

    def download(repo_id: str, filename: str, **_: Any) -> str:
        if "sparsity" in filename:
            from huggingface_hub.errors import EntryNotFoundError

            raise EntryNotFoundError(filename)
        assert repo_id == "someone/repo"
        return str(tmp_path / "repo" / filename)

    monkeypatch.setattr("sae_lens.loading.pretrained_sae_loaders.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded: list[Any] = [
        cc,
        TrainingSAE.load_from_disk(tmp_path / "training").eval(),
        SAE.load_from_disk(tmp_path / "training"),
        SAE.load_from_disk(tmp_path / "repo" / "inference"),
        SAE.load_from_disk(tmp_path / "again"),
        crosslens.load(tmp_path / "saved"),
        SAE.from_pretrained("someone/repo", "inference"),
        crosslens.from_pretrained("someone/repo", "inference"),
        copy.deepcopy(cc),
    ]
    for crosscoder in loaded:
        is_training = isinstance(crosscoder, TrainingSAE)
        classes = TRAINING_ARCHITECTURES if is_training else ARCHITECTURES
        assert type(crosscoder) is classes[architecture][0]
        assert type(crosscoder.cfg) is classes[architecture][1] and isinstance(crosscoder, Crosscoder)
        assert torch.equal(crosscoder.encode(x), features)
        assert torch.equal(crosscoder.decode(features), decoded)
        assert torch.equal(crosscoder.decoder_norms, sae.decoder_norms)
        assert (crosscoder.n_snapshots, crosscoder.d_model, crosscoder.cfg.d_sae) == (3, D, F)
        assert crosscoder.cfg.snapshot_labels == ["a", "b", "c"]
        assert crosscoder.cfg.metadata.training_architecture == architecture
    assert not loaded[5].training and not any(p.requires_grad for p in loaded[5].parameters())


def test_loading_what_is_no_crosscoder(tmp_path: Path):
    with pytest.raises(UserError, match="holds no crosscoder"):
        crosslens.load(tmp_path / "nothing")
    cc = make("standard_crosscoder", 2).to_inference()
    cc.save(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        crosslens.load(tmp_path / "damaged")
    cc.save(tmp_path / "unknown")
    config = tmp_path / "unknown" / "cfg.json"
    config.write_text(config.read_text().replace("standard_crosscoder", "quantum_crosscoder"))
    with pytest.raises(UserError, match="quantum_crosscoder.*known are batchtopk_crosscoder"):
        crosslens.load(tmp_path / "unknown")
    plain = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=4, d_sae=8))
    plain.save_model(tmp_path / "plain")
    with pytest.raises(UserError, match="is a StandardSAE, not a crosscoder"):
        crosslens.load(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_sae": 0}, "d_sae=0 must be positive"),
        ({"n_snapshots": 0}, "n_snapshots=0 must be positive"),
        ({"d_in": 7, "n_snapshots": 2}, "d_in=7 is not a multiple of n_snapshots=2"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not available"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' is not available"),
        ({"decoder_init_norm": 0.0}, "decoder_init_norm=0.0 must be positive"),
    ],
)
@pytest.mark.parametrize("architecture", KNOWN)
def test_configs_that_cannot_be(architecture: str, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        CONFIGS[architecture](**{"d_sae": F, **EXTRAS.get(architecture, {}), **options})


@pytest.mark.parametrize("architecture", KNOWN)
def test_the_encoder_product_is_rounded_as_asked(architecture: str):
    sae, x = make(architecture, 3, dtype="float32"), raw(3).float()
    exact = sae.training_forward_pass(step_input(x))
    sae.precision = "bfloat16"
    rounded = sae.training_forward_pass(step_input(x))
    flat = sae.process_sae_in(x)
    product = (flat.bfloat16() @ sae.W_enc.bfloat16()).float() + sae.b_enc
    assert torch.equal(rounded.hidden_pre, product) and rounded.hidden_pre.dtype == torch.float32
    assert 0 < float((rounded.hidden_pre - exact.hidden_pre).abs().max()) < 0.05 * float(exact.hidden_pre.abs().max())
    acts = rounded.feature_acts.to_dense()
    if architecture != "jumprelu_crosscoder":  # where it is a dense product, the reconstruction is rounded, too
        close(rounded.sae_out, acts @ sae.W_dec, "reconstruction, relative to b_dec", rtol=0.02, atol=0.02)
    assert torch.equal(acts, torch.where(acts > 0, product, 0.0))
    sae.precision = "float32"
    assert torch.equal(sae.training_forward_pass(step_input(x)).hidden_pre, exact.hidden_pre)


@pytest.mark.parametrize("S", [1, 2, 16])
@pytest.mark.parametrize("architecture", ["topk_crosscoder", "batchtopk_crosscoder"])
def test_the_auxiliary_loss_is_a_share_of_the_variance_at_every_width(architecture: str, S: int):
    sae, x = make(architecture, S, seed=1), raw(S, seed=1, n=64)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:4] = True
    with torch.no_grad():
        sae.W_dec[:4] *= 1e-4  # features that rebuild nothing: the whole residual is left
    for unit in (1.0, 100.0):
        losses = sae.training_forward_pass(step_input(unit * x, dead)).losses
        flat = sae.process_sae_in(unit * x)
        variance = float((flat - flat.mean(0)).square().sum(1).mean())
        residual = losses["auxiliary_reconstruction_loss"].item() / (sae.cfg.aux_loss_coefficient * variance)
        # 1 but for the residual's mean, which dead features leave, too
        assert 1 - 1e-3 <= residual < 4


@pytest.mark.parametrize("architecture", ["topk_crosscoder", "batchtopk_crosscoder"])
def test_k_out_of_range(architecture: str):
    for k in (0, -1, F + 1):
        with pytest.raises(UserError, match=rf"k={k} is not in \(0, d_sae={F}\]"):
            CONFIGS[architecture](d_sae=F, k=k)
    for k in (2.5, 3.0):
        if architecture == "topk_crosscoder":
            with pytest.raises(UserError, match=f"k={k} is not an integer"):
                _build_topk(k)
        else:
            assert CONFIGS[architecture](d_sae=F, k=k).k == k
    with pytest.raises(UserError, match="k_start=99 is not in"):
        CONFIGS[architecture](d_sae=F, k=3, k_start=99)


def _build_topk(k: float) -> None:
    config = TopKCrosscoderTrainingConfig(d_sae=F, k=2)
    config.k = k  # type: ignore[assignment]
    config.__post_init__()


# ---------------------------------------------------------------------- flat input, as for any SAELens SAE


@pytest.mark.parametrize("leading", [(), (B,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("architecture", KNOWN)
def test_flat_input_gives_the_same_result(architecture: str, S: int, leading: tuple[int, ...]):
    sae = make(architecture, S)
    x = raw(S, n=max(1, math.prod(leading))).reshape(*leading, S, D)
    flat = x.flatten(-2)
    inference = sae.to_inference()
    for crosscoder in (sae, inference):
        features = crosscoder.encode(x)
        assert features.shape == (*leading, F) and torch.equal(crosscoder.encode(flat), features)
        assert crosscoder(x).shape == (*leading, S, D) and torch.equal(crosscoder(flat), crosscoder(x))
    assert all(map(torch.equal, sae.encode_with_hidden_pre(flat), sae.encode_with_hidden_pre(x)))
    inference.use_error_term = True
    torch.testing.assert_close(inference(flat), x)


@pytest.mark.parametrize("architecture", KNOWN)
def test_a_training_step_on_flat_input(architecture: str):
    sae, x = make(architecture, 3), raw(3)
    for forward_pass in (sae.training_forward_pass, partial(dense_forward_pass, sae)):
        outputs = [forward_pass(step_input(batch)) for batch in (x, x.flatten(1))]
        found, wanted = (gradients(sae, output.loss) for output in outputs)
        assert torch.equal(outputs[0].loss, outputs[1].loss)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_snapshot_prefers_the_layout_with_snapshots():
    """With S = 1, (..., 1, D) could be either; it is (..., S, D)."""
    sae, x = make("standard_crosscoder", 1), raw(1)
    assert sae.encode(x).shape == (B, F) and sae.encode(x[:, 0]).shape == (B, F)
    assert sae.encode(x[0]).shape == (F,)


@pytest.mark.parametrize("shape", [(B, 3 * D + 1), (B, D, 3), (B, 2, D), (B, D), (3 * D + 3,)])
def test_activations_of_another_shape_are_refused(shape: tuple[int, ...]):
    sae = make("standard_crosscoder", 3)
    for call in (sae.encode, sae, sae.to_inference()):
        with pytest.raises(UserError) as error:
            call(torch.zeros(shape, dtype=torch.float64))
        assert str(error.value) == (
            f"activations of shape {shape} do not fit this crosscoder: give (..., n_snapshots, d_model) = (..., 3, 6), "
            "or flat (..., 18)"
        )


# ---------------------------------------------------------------------- BatchTopK's threshold, annealing


def test_threshold_is_a_moving_average_of_the_smallest_kept_score():
    sae = make("batchtopk_crosscoder", 2, k=3, topk_threshold_lr=0.25)
    assert isinstance(sae, BatchTopKCrosscoderTrainingSAE)
    expected = None
    for seed in range(4):
        x = raw(2, seed)
        slow = Slow(sae, x)
        kept = sorted((slow.score(b, i) for b in range(B) for i in range(F)), reverse=True)[: 3 * B]
        smallest = min(u for u in kept if u > 0)
        expected = smallest if expected is None else 0.75 * expected + 0.25 * smallest
        output = sae.training_forward_pass(dataclasses.replace(step_input(x), is_logging_step=True))
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-6)
        assert float(output.metrics["threshold"]) == float(sae.threshold)
    before = sae.threshold.clone()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    sae.training_forward_pass(step_input(raw(2)))  # nothing kept, so nothing changes
    assert torch.equal(sae.threshold, before)


def test_k_is_annealed():
    for architecture in ("topk_crosscoder", "batchtopk_crosscoder"):
        sae, x = make(architecture, 2, k=2, k_start=10.0, k_anneal_steps=4), raw(2, n=40)
        with torch.no_grad():
            sae.b_enc.fill_(50.0)  # every feature could fire
        for step, k in enumerate((10, 8, 6, 4, 2, 2, 2)):
            acts = sae.training_forward_pass(step_input(x, step=step)).feature_acts.to_dense()
            assert int(acts.count_nonzero()) == k * len(x)
        assert int(sae.to_inference().encode(x).count_nonzero()) == 2 * len(x) or architecture.startswith("batch")


# ---------------------------------------------------------------------- contracts with SAELens


def test_saelens_registers_once_and_by_name():
    for name in KNOWN:
        assert SAE_CLASS_REGISTRY[name] == ARCHITECTURES[name]
        assert SAE_TRAINING_CLASS_REGISTRY[name] == TRAINING_ARCHITECTURES[name]
        with pytest.raises(ValueError, match="already registered"):
            sae_lens.register_sae_class(name, *ARCHITECTURES[name])
        with pytest.raises(ValueError, match="already registered"):
            sae_lens.register_sae_training_class(name, *TRAINING_ARCHITECTURES[name])
    register()  # again is harmless
    assert SAE_CLASS_REGISTRY[KNOWN[0]] == ARCHITECTURES[KNOWN[0]]


def test_saelens_calls_the_reshape_seam(monkeypatch: pytest.MonkeyPatch):
    cc = make("standard_crosscoder", 3).to_inference()
    x, calls = raw(3), []
    inward, outward = cc.reshape_fn_in, cc.reshape_fn_out
    monkeypatch.setattr(cc, "reshape_fn_in", lambda t: calls.append(tuple(t.shape)) or inward(t))
    monkeypatch.setattr(cc, "reshape_fn_out", lambda t, d: calls.append(tuple(t.shape)) or outward(t, d))
    cc(x)
    assert calls == [(B, 3, D), (B, 3 * D)]


def test_saelens_hooks_see_flat_activations_and_features():
    cc = make("standard_crosscoder", 3).to_inference()
    x = raw(3)
    out, cache = cc.run_with_cache(x)
    shapes = {name: tuple(t.shape) for name, t in cache.items()}
    assert shapes["hook_sae_input"] == shapes["hook_sae_recons"] == (B, 3 * D)
    assert shapes["hook_sae_acts_pre"] == shapes["hook_sae_acts_post"] == (B, F)
    assert shapes["hook_sae_output"] == (B, 3, D)
    assert torch.equal(cache["hook_sae_acts_post"], cc.encode(x)) and torch.equal(out, cache["hook_sae_output"])


@pytest.mark.parametrize("architecture", KNOWN)
def test_train_step_output_has_saelens_fields_and_metrics_when_logged(architecture: str):
    sae, x = make(architecture, 3), raw(3)
    sae.cfg.metadata.snapshots = [{"label": name} for name in ("early", "mid", "late")]
    assert sae.training_forward_pass(step_input(x)).metrics == {}
    output = sae.training_forward_pass(dataclasses.replace(step_input(x), is_logging_step=True))
    fields = ("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss", "losses", "metrics")
    assert isinstance(output, TrainStepOutput) and all(hasattr(output, name) for name in fields)
    for s, label in enumerate(("early", "mid", "late")):
        target = (x * sae.activation_scale.double()[:, None])[:, s]
        found = (output.sae_out + sae.b_dec).detach().unflatten(-1, (3, D))[:, s]
        unexplained = sum(float((target[b] - found[b]).square().sum()) for b in range(B))
        spread = sum(float((target[b] - target.mean(0)).square().sum()) for b in range(B))
        assert float(output.metrics[f"explained_variance/{label}"]) == pytest.approx(1 - unexplained / spread)
        per_snapshot = sae.snapshot_acts(output.feature_acts.detach().to_dense(), s)
        fired = sum(int(v != 0) for row in per_snapshot.tolist() for v in row)
        assert float(output.metrics[f"l0/{label}"]) == pytest.approx(fired / B)


def test_the_coefficient_is_steered_to_an_l0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain loops, with dense sums and on pairs; the first batches are too dense, then too sparse."""
    target, smooth, rate = 3.0, 0.1, 0.25
    monkeypatch.setattr(jumprelu, "_STEERING", rate)
    for dense in (2.0, 0.0):
        cfg = JumpReLUCrosscoderTrainingConfig(
            d_in=3 * 4, d_sae=8, n_snapshots=3, target_l0=target, jumprelu_init_threshold=0.05
        )
        sae: Any = TrainingSAE.from_dict(cfg.to_dict())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in (sae.W_enc, sae.W_dec):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        integral = smoothed = 0.0
        for step in range(6):
            sae.b_enc.data.fill_(3.0 - 2 * step)
            x = torch.randn(10, 3, 4, generator=generator)
            h, norms, threshold = sae.hidden_pre(sae.process_sae_in(x)), sae.decoder_norms, sae.threshold
            l0 = (
                sum(float(h[b, i] * norms[i, s] > threshold[i]) for b in range(10) for i in range(8) for s in range(3))
                / 30
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sparse.DENSE_ABOVE, "cpu", dense)
                output = sae.training_forward_pass(TrainStepInput(x, {"sparsity": 0.3}, None, step, False))
            phi = (
                (cfg.tanh_stretch * torch.relu(h)[:, None] * norms.T * (h[:, None] * norms.T > threshold))
                .tanh()
                .mean((0, 1))
            )
            penalty = 0.3 * math.exp(integral) * float((phi * (1 + phi / cfg.frequency_scale)).sum())
            assert float(output.losses["sparsity_loss"]) == pytest.approx(penalty, rel=1e-4)
            smoothed += smooth * (math.log(max(l0, 1e-3) / target) - smoothed)
            integral += rate * smoothed
            assert sae.steered.tolist() == pytest.approx([integral, smoothed], abs=1e-5)
        assert "steered" not in sae.to_inference().state_dict()
        sae.eval()
        sae.training_forward_pass(TrainStepInput(x, {"sparsity": 0.3}, None, 6, False))
        assert sae.steered.tolist() == pytest.approx([integral, smoothed], abs=1e-5)
    for wrong in (0.0, 9.0):
        with pytest.raises(UserError, match="target_l0"):
            JumpReLUCrosscoderTrainingConfig(d_in=12, d_sae=8, n_snapshots=3, target_l0=wrong)


NEW_TERMS: dict[str, dict[str, Any]] = {
    "l0": {"target_l0": 2.0, "l0_coefficient": 0.8, "jumprelu_window": 1.5},
    "pre_act": {"pre_act_loss_coefficient": 0.6},
    "direct": {"direct_thresholds": True},
    "all": {
        "target_l0": 2.0, "l0_coefficient": 0.8, "pre_act_loss_coefficient": 0.6, "direct_thresholds": True,
        "n_shared": 3, "shared_penalty": 0.3, "delta_coefficient": 0.7,
    },
}  # fmt: skip


@pytest.mark.parametrize("terms", NEW_TERMS)
@pytest.mark.parametrize("way", ["pairs", "dense products"])
@pytest.mark.parametrize("S", [1, 3])
def test_further_terms_of_jumprelu(S: int, way: str, terms: str):
    """Loss and every gradient against plain autograd, with three features dead; seeds differ in what is open."""
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[0, 5, 7]] = True
    for seed in range(3):
        sae, x = make("jumprelu_crosscoder", S, seed, **NEW_TERMS[terms]), raw(S, seed)
        inputs = step_input(x, dead)
        output, wanted = forward(sae, way, inputs), dense_forward_pass(sae, inputs)
        assert set(output.losses) == set(wanted.losses)
        for name, value in wanted.losses.items():
            assert value.item() > 0 or name == "delta_loss"
            close(output.losses[name], value, name)
        found, expected = gradients(sae, output.loss), gradients(sae, wanted.loss)
        for name, gradient in expected.items():
            assert gradient.any() and gradient.isfinite().all(), name
            close(found[name], gradient, f"gradient of {name}")


def test_dead_features_come_back_by_the_pre_activation_loss():
    """Descending this loss alone opens the gates of the features that it is of, and of no other."""
    sae: Any = make("jumprelu_crosscoder", 2, pre_act_loss_coefficient=1.0)
    x, dead = raw(2), torch.zeros(F, dtype=torch.bool)
    dead[[2, 9]] = True
    with torch.no_grad():
        sae.b_enc[[2, 3, 9]] = -8.0
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        sae.training_forward_pass(step_input(x, dead, coefficient=0.0)).losses["pre_act_loss"].backward()
        optimizer.step()
    fired = (sae.encode(x) > 0).any(0)
    assert fired[2] and fired[9] and not fired[3]


def test_thresholds_trained_directly_stay_positive_and_are_saved_as_logarithms(tmp_path: Path):
    sae: Any = make("jumprelu_crosscoder", 2, direct_thresholds=True)
    assert "log_threshold" not in dict(sae.named_parameters())
    with torch.no_grad():
        sae.direct_threshold[0] = -1.0
    sae.constrain_()
    assert bool((sae.direct_threshold > 0).all())
    with torch.no_grad():
        sae.direct_threshold[0] = 0.4
    x = raw(2)
    for way in (sae.to_inference(), crosslens.load(sae.save(tmp_path))):
        close(way.log_threshold.exp(), sae.threshold, "threshold")  # type: ignore[operator]
        close(way.encode(x), sae.eval().encode(x), "features")
