"""The fast training step against the dense reference in plain autograd: equal loss, gradients and parameters.

The measure: `found` agrees with `wanted` if every entry is finite and max|found - wanted| <= tolerance * max|wanted| +
FLOOR for each tensor. The tolerance is 1e-5 in float32 and a million times less in float64, where only rounding can
remain. Everything runs with `torch.use_deterministic_algorithms(True)`, which also fills uninitialised memory with NaN.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from crosslens.crosscoders import TRAINING_ARCHITECTURES, CrosscoderTrainingSAE
from crosslens.crosscoders.kernels import sparse
from crosslens.training.config import TrainConfig
from crosslens.training.trainer import CrosscoderTrainer
from tests.crosscoders.reference import KNOWN, dense_forward_pass

TOP = ["topk_crosscoder", "batchtopk_crosscoder"]
SNAPSHOTS = [1, 3, 32]
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
FLOOR = 1e-30  # only for tensors that are zero throughout
D, F, B = 6, 64, 48  # in the tests with fixed shapes, where about 8 % of the features are kept

# DENSE_ABOVE for each of two equal ways: sums over active pairs, or dense products; "faster" is the library's choice
DENSE_ABOVE = {"pairs": 2.0, "products": -1.0, "faster": None}
WAYS = ["pairs", "products"]


@pytest.fixture(scope="module", autouse=True)
def deterministic() -> Iterator[None]:
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # threads only slow such small tensors down
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- crosscoders, batches and steps


def new(architecture: str, S: int, dtype: str = "float32", **options: Any) -> CrosscoderTrainingSAE:
    cls, config = TRAINING_ARCHITECTURES[architecture]
    shape = {"d_in": S * D, "d_sae": F, "n_snapshots": S, "dtype": dtype}
    return cls(config(**{**shape, **({"k": 5} if architecture in TOP else {}), **options}))  # type: ignore[arg-type]


def make(architecture: str, S: int, seed: int = 0, dtype: str = "float32", **options: Any) -> CrosscoderTrainingSAE:
    """All parameters random; pre-activations and decoder norms are about 1, thresholds between .1 and 3."""
    sae = new(architecture, S, dtype, **options)
    draw = torch.Generator().manual_seed(seed)
    spread = {"W_enc": (S * D) ** -0.5, "b_enc": 0.3, "W_dec": D**-0.5, "b_dec": 0.3, "log_threshold": 0.8}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            drawn = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(spread[name] * drawn - 0.5 * (name == "log_threshold"))
        sae.activation_scale.copy_(0.5 + torch.rand(S, generator=draw))
    return sae


def raw(S: int, seed: int = 0, n: int = B, d: int = D) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, S, d, generator=draw, dtype=torch.float64)


def step_input(x: Tensor, dead: Tensor | None = None, coefficient: float = 0.7, step: int = 0) -> TrainStepInput:
    coefficients = {"l1": coefficient, "sparsity": coefficient}
    return TrainStepInput(
        sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
    )


def mask(*dead: int) -> Tensor:
    return torch.isin(torch.arange(F), torch.tensor(dead))


def gradients(sae: CrosscoderTrainingSAE, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in sae.named_parameters()
    }


def agree(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """The measure of this module."""
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, what
    assert bool(found.isfinite().all()) and bool(wanted.isfinite().all()), f"{what} is not finite"
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    assert error <= tolerance * size + FLOOR, f"{what}: off by {error:.3g} where the largest is {size:.3g}"


def choose(patch: pytest.MonkeyPatch, way: str) -> None:
    """Take one of the two ways everywhere."""
    for key in sparse.DENSE_ABOVE if DENSE_ABOVE[way] is not None else ():
        patch.setitem(sparse.DENSE_ABOVE, key, DENSE_ABOVE[way])


def same_step(
    sae: CrosscoderTrainingSAE, inputs: TrainStepInput, way: str = "pairs", tolerance: float | None = None
) -> TrainStepOutput:
    """The output of the fast step, compared with the dense one: features, reconstruction, each loss, each gradient."""
    tolerance = tolerance or TOLERANCE[sae.cfg.dtype]
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, way)
        fast = sae.train().training_forward_pass(inputs)
        found = gradients(sae, fast.loss)
    dense = dense_forward_pass(sae, inputs)
    wanted = gradients(sae, dense.loss)
    features = fast.feature_acts.to_dense()
    assert torch.equal(features != 0, dense.feature_acts != 0), "different features are kept"
    agree(features, dense.feature_acts, tolerance, "features")
    agree(fast.sae_out, dense.sae_out, tolerance, "reconstruction")
    assert set(fast.losses) == set(dense.losses) and set(found) == set(wanted)
    for name in dense.losses:
        agree(fast.losses[name], dense.losses[name], tolerance, name)
    agree(fast.loss, dense.loss, tolerance, "loss")
    for name in wanted:
        agree(found[name], wanted[name], tolerance, f"gradient of {name}")
    return fast


# ---------------------------------------------------------------------- chosen cases


@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_loss_and_every_gradient(architecture: str, way: str, S: int):
    for seed in range(2):
        output = same_step(make(architecture, S, seed), step_input(raw(S, seed).float()), way)
        kept = int(output.feature_acts.to_dense().count_nonzero())
        assert 0 < kept < 0.7 * B * F, "an empty or full selection would test little"
        assert all(loss.item() > 0 for name, loss in output.losses.items() if name[:3] != "aux")


@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", TOP)
def test_the_auxiliary_loss_of_dead_features(architecture: str, way: str, S: int):
    for dead in (mask(), mask(7), mask(1, 30, 63), mask(0, 2, 5, 11, 12, 13, 40), torch.ones(F, dtype=torch.bool)):
        output = same_step(make(architecture, S, seed=9), step_input(raw(S, seed=9).float(), dead), way)
        assert (output.losses["auxiliary_reconstruction_loss"].item() > 0) == bool(dead.any())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", TOP)
def test_one_token_has_a_residual_that_does_not_vary(architecture: str, way: str):
    output = same_step(make(architecture, 2), step_input(raw(2, n=1).float(), mask(3, 4, 5, 6)), way)
    assert output.losses["auxiliary_reconstruction_loss"].item() == 0


@pytest.mark.parametrize("k", [1, 33, F, 0.01, 7.77])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", TOP)
def test_few_and_many_kept(architecture: str, way: str, k: float):
    if architecture == "topk_crosscoder" and k != int(k):
        return
    sae = make(architecture, 3, k=k)
    output = same_step(sae, step_input(raw(3).float()), way)
    kept, positive = int(output.feature_acts.to_dense().count_nonzero()), int((output.hidden_pre > 0).sum())  # type: ignore[union-attr]
    if architecture == "batchtopk_crosscoder":
        assert kept == min(max(1, round(k * B)), positive)
    elif k < F / 4:
        assert kept == k * B
    else:
        assert kept <= min(k * B, positive)


def on_a_grid(architecture: str, S: int, seed: int = 0, window: float = 4.0, **options: Any) -> CrosscoderTrainingSAE:
    """With integer activations, pre-activations are integers and scores are multiples of 1/2, without rounding.

    Decoder rows have norms 0, 1/2 or 1, and thresholds are 1, so some scores equal the threshold exactly, some are 0,
    and some lie on an edge of the window (3 for window 4; 1/2 and 3/2 for window 1).
    """
    sae = make(architecture, S, seed, **{**options, **({"jumprelu_window": window} if "jump" in architecture else {})})
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.activation_scale.fill_(1.0)
        sae.b_dec.copy_(torch.randint(-1, 2, (S * D,), generator=draw))
        sae.W_enc.copy_(
            torch.randint(-2, 3, sae.W_enc.shape, generator=draw)
            * (torch.rand(sae.W_enc.shape, generator=draw) < 2 / S / D)
        )
        sae.b_enc.copy_(torch.randint(-2, 3, (F,), generator=draw))
        rows = torch.zeros(F, S, D)
        rows[torch.arange(F)[:, None], torch.arange(S), torch.randint(D, (F, S), generator=draw)] = torch.randint(
            -2, 3, (F, S), generator=draw
        ).float()
        sae.W_dec.copy_(rows.flatten(1) / 2)
        if "jump" in architecture:
            sae.log_threshold.zero_()  # type: ignore[operator,union-attr]
    return sae


@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_ties(architecture: str, way: str, S: int):
    for seed, window in enumerate((4.0, 1.0)):
        sae, x = on_a_grid(architecture, S, seed, window), raw(S, seed).mul(1.5).round().float()
        output = same_step(sae, step_input(x, mask(0, 1, 2, 3, 20, 21, 22) if architecture in TOP else None), way)
        h, features = output.hidden_pre, output.feature_acts.to_dense()
        assert h is not None and torch.equal(h, h.round()) and bool((h == 0).any())
        scores = h.relu() * sae.decoder_norms.sum(-1)
        if architecture == "topk_crosscoder":
            least = torch.where(features != 0, scores, torch.inf).amin(1, keepdim=True)
            assert bool(((scores == least) & (scores > 0) & (features == 0)).any()), "no tie was broken"
        elif architecture == "batchtopk_crosscoder":
            assert bool((scores[features == 0] == scores[features != 0].min()).any()), "no tie was broken"
        elif architecture == "jumprelu_crosscoder":
            z = h[:, None, :] * sae.decoder_norms.T
            edges = (1 - window / 2, 1, 1 + window / 2)
            assert all(bool((z == edge).any()) for edge in edges if edge > 0), "no score lies on a gate or an edge"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_only_ties(architecture: str, way: str):
    """All tokens and all features are equal: the earliest are kept."""
    sae = make(architecture, 2)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_((p[:, :1] if p is sae.W_enc else p[:1]).expand_as(p) if p is not sae.b_dec else p)
        sae.b_enc.fill_(3.0)
    features = same_step(sae, step_input(raw(2, n=1).float().expand(B, 2, D)), way).feature_acts.to_dense() != 0
    if architecture == "topk_crosscoder":
        assert bool(features[:, :5].all()) and not bool(features[:, 5:].any())
    elif architecture == "batchtopk_crosscoder":
        assert bool(features.flatten()[: 5 * B].all()) and not bool(features.flatten()[5 * B :].any())
    else:
        assert bool(features.all())


@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_no_active_feature_at_all(architecture: str, way: str, S: int):
    sae = make(architecture, S)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    output = same_step(sae, step_input(raw(S).float(), mask(1, 2, 3, 4, 5)), way)
    assert not bool(output.feature_acts.to_dense().any())
    found = gradients(sae, sae.training_forward_pass(step_input(raw(S).float(), mask(1, 2, 3, 4, 5))).loss)
    assert {name for name, gradient in found.items() if bool(gradient.any())} == {"b_dec"}


@pytest.mark.parametrize("always", [3, F])
@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_features_active_in_every_token(architecture: str, way: str, S: int, always: int):
    for bias in (200.0,):
        sae = make(architecture, S, **({"k": F} if architecture in TOP and always == F else {}))
        with torch.no_grad():
            sae.b_enc[:always] += bias
            if architecture not in TOP:
                sae.W_dec[:always] /= bias
            if architecture == "jumprelu_crosscoder":
                sae.log_threshold[:always] = -3.0  # type: ignore[operator,index]
        features = same_step(sae, step_input(raw(S).float()), way).feature_acts.to_dense()
        assert bool(features[:, :always].all())


@pytest.mark.parametrize("way", WAYS)
def test_a_threshold_far_below_all_scores_gets_no_gradient(way: str):
    """Features active in every token and above the window: rounding must not move their thresholds.

    Adam turns any gradient that is not zero into a whole step.
    """
    for seed in range(2):
        sae = make("jumprelu_crosscoder", 3, seed)
        with torch.no_grad():
            sae.b_enc[:20] += 100
        with pytest.MonkeyPatch.context() as patch:
            choose(patch, way)
            output = sae.training_forward_pass(step_input(raw(3, seed).float()))
            found = gradients(sae, output.loss)["log_threshold"]
        assert bool(output.feature_acts.to_dense()[:, :20].all()) and bool(found[20:].any())
        assert found[:20].tolist() == [0.0] * 20


@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_zero_decoder_rows(architecture: str, way: str, S: int):
    sae = make(architecture, S)
    rows = sae.W_dec_by_snapshot
    with torch.no_grad():
        rows[:6] = 0  # features without a decoder, some of them dead
        rows[6:20, 0] = 0  # absent at the first snapshot
        rows[20:30, 1:] = 0  # absent at all others
        rows[30:40, S // 2] *= 1e-30  # its square underflows
        sae.b_enc[:10] += 4  # these fire
    some, all_strongest = mask(0, 1, 2, 7, 8, 9, 21, 33), mask(0, 7)  # more than D / 2, and fewer
    for dead in (some, all_strongest):
        same_step(sae, step_input(raw(S).float(), dead), way)
    with torch.no_grad():
        sae.W_dec.zero_()
    for dead in (some, all_strongest):
        same_step(sae, step_input(raw(S).float(), dead), way)


@pytest.mark.parametrize("window", [0.02, 4.0, 100.0])
@pytest.mark.parametrize("shift", [-6.0, -1.0, 0.7, 1.5])
@pytest.mark.parametrize("S", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_windows_and_thresholds(way: str, S: int, shift: float, window: float):
    """Thresholds below and above half the window: far, and mixed."""
    sae = make("jumprelu_crosscoder", S, jumprelu_window=window)
    with torch.no_grad():
        sae.log_threshold += shift  # type: ignore[operator,assignment]
    same_step(sae, step_input(raw(S).float()), way)


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_several_blocks(architecture: str, way: str, numpy: bool, monkeypatch: pytest.MonkeyPatch):
    for block in (1, 5 * F + 1):
        small_blocks(monkeypatch, block=block, sample=50, columns=block % 61, numpy=numpy)
        for dead in (mask(1, 5, 9, 30), torch.arange(F) > 10):
            same_step(make(architecture, 3, seed=2), step_input(raw(3, seed=2).float(), dead), way)


def small_blocks(patch: pytest.MonkeyPatch, block: int, sample: int, columns: int, numpy: bool) -> None:
    patch.setattr("crosslens.crosscoders.kernels.topk.BLOCK", block)
    patch.setattr("crosslens.crosscoders.kernels.topk.SAMPLE", sample)
    patch.setattr("crosslens.crosscoders.kernels.gated.COLUMNS", max(1, columns))
    patch.setattr("crosslens.crosscoders.kernels.topk.NUMPY_THREADS", 1000 if numpy else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_the_same_bits_every_time(architecture: str, way: str):
    """With and without deterministic algorithms, which on a CPU must not matter."""
    runs: list[list[Tensor]] = []
    for deterministic in (True, True, False):
        torch.use_deterministic_algorithms(deterministic)
        try:
            sae = make(architecture, 3)
            output = same_step(sae, step_input(raw(3).float(), mask(1, 2, 3, 4, 5, 6)), way)
            again = sae.training_forward_pass(step_input(raw(3).float(), mask(1, 2, 3, 4, 5, 6)))
            runs.append([output.loss.detach(), *gradients(sae, again.loss).values()])
        finally:
            torch.use_deterministic_algorithms(True)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("architecture", KNOWN)
def test_gradients_add_up_over_batches(architecture: str):
    """One step leaves nothing behind for the next, and gradients accumulate."""
    sae, batches = make(architecture, 3), [raw(3, seed).float() for seed in range(3)]
    wanted = [gradients(sae, dense_forward_pass(sae, step_input(x)).loss) for x in batches]
    sae.zero_grad()
    outputs = [sae.training_forward_pass(step_input(x)) for x in batches]
    for weight, output in zip((1.0, -0.5, 3.0), outputs, strict=True):
        (weight * output.loss).backward()
    for name, p in sae.named_parameters():
        total = wanted[0][name] - 0.5 * wanted[1][name] + 3.0 * wanted[2][name]
        assert p.grad is not None
        agree(p.grad, total, 1e-5, f"gradient of {name}")


# ---------------------------------------------------------------------- any case


@dataclass(frozen=True)
class Case:
    """A crosscoder and a batch on a grid, so that pre-activations are sums without rounding, in any order.

    No gate then depends on the order of a sum, ties are exact, and h = 0 occurs.
    """

    S: int
    D: int
    F: int
    B: int
    seed: int
    k: float  # fraction of features kept
    bias: float  # of the encoder, in standard deviations of h: how dense the features are
    loudness: int  # of the activations, a power of two
    decoder: float  # size of decoder rows relative to a good reconstruction
    empty: float  # fraction of zero decoder rows: single ones, and all of a feature
    twins: bool  # pairs of equal features and of equal tokens
    dead: float  # fraction of dead features
    coefficient: float
    threshold: float  # log of the thresholds relative to the scores
    spread: float  # of log-thresholds over features
    window: float  # log of half the window relative to the thresholds
    saturation: float  # log of the penalty's stretch times the scores
    way: str
    numpy: bool
    block: int
    sample: int
    columns: int

    def build(self, architecture: str, dtype: str) -> tuple[CrosscoderTrainingSAE, TrainStepInput]:
        draw = torch.Generator().manual_seed(self.seed)
        S, D, F, B = self.S, self.D, self.F, self.B
        loudness = 2.0**self.loudness

        def grid(*shape: int) -> Tensor:
            return torch.randint(-8, 9, shape, generator=draw, dtype=torch.float64) / 4

        x, W_enc = loudness * grid(B, S, D), grid(S * D, F)
        spread = loudness * 1.5 * (S * D) ** 0.5  # of h
        b_enc = 2.0**-4 * loudness * (grid(F) + (self.bias * 16 * 1.5 * (S * D) ** 0.5)).round()
        W_dec = torch.randn(F, S, D, generator=draw, dtype=torch.float64) * self.decoder / spread * loudness
        W_dec[torch.rand(F, S, generator=draw) < self.empty] = 0
        W_dec[torch.rand(F, generator=draw) < self.empty] = 0
        log_threshold = self.threshold + self.spread * torch.randn(F, generator=draw, dtype=torch.float64)
        size = spread * float(W_dec.norm(dim=-1).mean() + 1e-3 * self.decoder / spread * loudness)  # of h n
        log_threshold += math.log(size)
        if self.twins:
            x[B // 2 :] = x[: B - B // 2].clone()
            for parameter in (W_enc.T, b_enc, W_dec, log_threshold):
                parameter[F // 2 :] = parameter[: F - F // 2].clone()
        options: dict[str, Any] = {}
        if architecture in TOP:
            k = max(1.0 / B, self.k * F)
            options = {"k": max(1, round(k)) if architecture == "topk_crosscoder" else k}
        elif architecture == "jumprelu_crosscoder":
            window = 2 * size * math.exp(self.threshold + self.window)
            options = {"jumprelu_window": window, "tanh_stretch": math.exp(self.saturation) / size}
        cls, config = TRAINING_ARCHITECTURES[architecture]
        sae = cls(config(d_in=S * D, d_sae=F, n_snapshots=S, dtype=dtype, **options))  # type: ignore[arg-type]
        with torch.no_grad():
            sae.W_enc.copy_(W_enc)
            sae.b_enc.copy_(b_enc)
            sae.W_dec.copy_(W_dec.flatten(1).float())
            sae.b_dec.copy_((loudness * grid(S * D)).float())
            sae.activation_scale.copy_(2.0 ** torch.randint(-1, 2, (S,), generator=draw))
            if architecture == "jumprelu_crosscoder":
                sae.log_threshold.copy_(log_threshold.float())  # type: ignore[operator]
        dead = torch.rand(F, generator=draw) < self.dead
        x = x.to(sae.dtype) / sae.activation_scale[:, None].to(sae.dtype)
        return sae, step_input(x, dead, self.coefficient)


CASES = st.builds(
    Case,
    S=st.sampled_from(SNAPSHOTS),
    D=st.integers(1, 9),
    F=st.integers(1, 70),
    B=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    k=st.floats(0, 1),
    bias=st.floats(-3, 3),
    loudness=st.integers(-6, 6),
    decoder=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    empty=st.sampled_from([0.0, 0.0, 0.2, 0.9, 1.0]),
    twins=st.booleans(),
    dead=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    coefficient=st.floats(0, 3),
    threshold=st.floats(-8, 3),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    window=st.floats(-7, 7),
    saturation=st.floats(-2, 3),
    way=st.sampled_from(list(DENSE_ABOVE)),
    numpy=st.booleans(),
    block=st.sampled_from([1, 100, 1 << 18]),
    sample=st.sampled_from([4, 100, 1 << 16]),
    columns=st.sampled_from([1, 7, 1024]),
)


def rounding(case: Case, architecture: str) -> float:
    """Error of the dense reference itself in float32, by the measure of this module."""
    found, wanted = (
        gradients(sae, dense_forward_pass(sae.train(), inputs).loss)
        for sae, inputs in (case.build(architecture, dtype) for dtype in ("float32", "float64"))
    )
    return max(float((found[name] - p).abs().max() / (p.abs().max() + FLOOR)) for name, p in wanted.items())


def any_case(architecture: str, dtype: str, case: Case) -> None:
    # where all terms of a sum cancel, two float32 answers need not agree; the float64 ones do
    assume(dtype == "float64" or rounding(case, architecture) < 2e-6)
    sae, inputs = case.build(architecture, dtype)
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, case.block, case.sample, case.columns, case.numpy)
        same_step(sae, inputs, case.way)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("architecture", KNOWN)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_any_case(architecture: str, dtype: str, case: Case):
    any_case(architecture, dtype, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("architecture", KNOWN)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_any_of_many_cases(architecture: str, dtype: str, case: Case):
    any_case(architecture, dtype, case)


# ---------------------------------------------------------------------- twenty steps


STEPS = 20


def learning(architecture: str, S: int = 3) -> CrosscoderTrainingSAE:
    """A crosscoder whose training has warmups, dead features, and features that are always active."""
    options: dict[str, Any] = {
        "standard_crosscoder": {"l1_coefficient": 0.5, "l1_warm_up_steps": 8},
        "topk_crosscoder": {"k": 4, "k_start": 10.0, "k_anneal_steps": 12},
        "batchtopk_crosscoder": {"k": 3.7, "k_start": 10.0, "k_anneal_steps": 12},
        "jumprelu_crosscoder": {"sparsity_coefficient": 0.3, "sparsity_warm_up_steps": 8, "jumprelu_window": 2.0},
    }[architecture]
    sae = make(architecture, S, seed=1, **options)
    with torch.no_grad():
        sae.b_enc[:2] += 6  # above the window in every token
        sae.b_enc[10:18] -= 8  # dead
    return sae


def learn_slowly(sae: CrosscoderTrainingSAE, config: TrainConfig, batches: list[Tensor]) -> list[float]:
    """Train by the dense reference with plain Adam; the gradient norm (without thresholds) of every step."""
    cfg: Any = sae.cfg
    clipped = [p for name, p in sae.named_parameters() if name != "log_threshold"]
    factor = getattr(cfg, "jumprelu_threshold_lr_factor", None)
    groups = [(clipped, 1.0), *([([sae.log_threshold], factor)] if factor else [])]
    adam = torch.optim.Adam(
        [{"params": params} for params, _ in groups], betas=(config.adam_beta1, config.adam_beta2), foreach=False
    )
    silent, norms = torch.zeros(F), []
    for step, x in enumerate(batches):
        rate = min(1, (step + 1) / (config.lr_warm_up * STEPS))
        left = min(1, (STEPS - step) / (config.lr_decay * STEPS))
        for group, (_, relative) in zip(adam.param_groups, groups, strict=True):
            group["lr"] = config.lr * relative * min(rate, config.lr_end_factor + (1 - config.lr_end_factor) * left)
        inputs = step_input(x, silent > config.dead_tokens, step=step)
        rising = min(1, step / 8)
        inputs.coefficients = {"l1": 0.5 * rising, "sparsity": 0.3 * rising}
        output = dense_forward_pass(sae, inputs)
        adam.zero_grad()
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(clipped, config.max_grad_norm or math.inf)
        adam.step()
        norms.append(norm.item())
        silent = torch.where((output.feature_acts != 0).any(0), 0, silent + len(x))
    if "topk" in cfg.architecture():
        assert bool((silent > config.dead_tokens).any()), "the auxiliary loss was never used"
    return norms


@pytest.mark.parametrize(("way", "clip"), [("pairs", "always"), ("products", "never"), ("faster", None)])
@pytest.mark.parametrize("architecture", KNOWN)
def test_parameters_after_twenty_steps(architecture: str, way: str, clip: str | None):
    limit = {"always": 0.02, "never": 1e4, None: None}[clip]
    config = TrainConfig(
        batch_size=B, training_tokens=STEPS * B, lr=1e-3, lr_warm_up=0.2, lr_decay=0.4, lr_end_factor=0.1,
        adam_beta2=0.99, max_grad_norm=limit, dead_tokens=3 * B, evaluate=False, device="cpu",
    )  # fmt: skip
    batches = [raw(3, seed).float() for seed in range(STEPS)]
    sae = learning(architecture)
    slow, start = copy.deepcopy(sae), copy.deepcopy(sae)
    norms = learn_slowly(slow, config, batches)
    assert clip != "always" or min(norms) > 0.02
    assert clip != "never" or max(norms) < 1e4
    trainer = CrosscoderTrainer(config, sae, iter(()), total=STEPS * B)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, way)
        for x in batches:
            trainer.step(x)
            trainer.n_training_steps += 1
    for (name, found), wanted, before in zip(
        sae.named_parameters(), slow.parameters(), start.parameters(), strict=True
    ):
        agree(found, wanted, 1e-5, name)
        moved = wanted - before
        assert bool(moved.any())
        agree(found - before, moved, 1e-3, f"change of {name}")


# ---------------------------------------------------------------------- the same on a GPU


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("S", SNAPSHOTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_loss_and_every_gradient_on_a_gpu(architecture: str, way: str, S: int):
    for seed in range(3):
        sae = make(architecture, S, seed, device="cuda")
        output = same_step(sae, step_input(raw(S, seed).float().to("cuda"), mask(1, 2, 30, 31, 32).to("cuda")), way)
        assert output.loss.device.type == "cuda" and bool(output.feature_acts.to_dense().any())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", KNOWN)
def test_a_gpu_and_a_cpu_agree(architecture: str, way: str):
    """On data with integer pre-activations and exact scores, so that the same features are kept."""
    found: list[dict[str, Tensor]] = []
    for device in ("cpu", "cuda"):
        sae, x = on_a_grid(architecture, 3, device=device), raw(3).mul(1.5).round().float()
        output = same_step(sae, step_input(x.to(device), mask(0, 1, 2, 3, 20).to(device)), way)
        again = gradients(
            sae, sae.training_forward_pass(step_input(x.to(device), mask(0, 1, 2, 3, 20).to(device))).loss
        )
        found.append({name: p.cpu() for name, p in {**again, "loss": output.loss}.items()})
    for name, wanted in found[0].items():
        agree(found[1][name], wanted, 1e-5, name)
