"""The parts of the step on active pairs: selection, gradients, and memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from crosslens.crosscoders import TRAINING_ARCHITECTURES
from crosslens.crosscoders.kernels import sparse
from crosslens.crosscoders.kernels.gated import Gates, reconstruct_gated
from crosslens.crosscoders.kernels.sparse import Acts, Weights, reconstruct, squared_error, sum_rows
from crosslens.crosscoders.kernels.topk import (
    Pairs,
    batch_top_pairs,
    first_largest,
    pairs_above,
    token_top_pairs,
    top_of_tokens,
)
from tests.crosscoders.reference import KNOWN, dense_forward_pass

TOP = ["topk_crosscoder", "batchtopk_crosscoder"]


@pytest.fixture(scope="module", autouse=True)
def deterministic() -> Iterator[None]:
    """Deterministic algorithms also fill uninitialised memory with NaN."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # threads only slow such small tensors down
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- selection


def entries(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.tokens.tolist(), pairs.features.tolist(), strict=True))


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Pre-activations (B, F) and norms (F,): continuous, or of few values, so that ties abound; some norms are zero."""
    B, F = draw(st.integers(1, 24)), draw(st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 64, 128])))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    h, norms = torch.randn(B, F), torch.rand(F) + 0.1
    if draw(st.booleans()):
        h, norms = (draw(st.sampled_from([0.5, 2.0])) * h).round(), (3 * norms).ceil()
    h += draw(st.sampled_from([-3.0, 0.0, 3.0]))
    norms[torch.rand(F) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    h *= 2.0 ** draw(st.integers(-60, 60))
    return h, norms


BLOCKS = {
    "numpy": st.booleans(),
    "block": st.sampled_from([1, 200, 1 << 18]),
    "sample": st.sampled_from([1, 9, 1 << 16]),
}


def with_blocks(patch: pytest.MonkeyPatch, numpy: bool, block: int, sample: int) -> None:
    patch.setattr("crosslens.crosscoders.kernels.topk.NUMPY_THREADS", 10_000 if numpy else 0)
    patch.setattr("crosslens.crosscoders.kernels.topk.BLOCK", block)
    patch.setattr("crosslens.crosscoders.kernels.topk.SAMPLE", sample)


many = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@many
@given(data=selections(), fraction=st.floats(0, 1), **BLOCKS)
def test_the_largest_of_a_batch(data: tuple[Tensor, Tensor], fraction: float, numpy: bool, block: int, sample: int):
    h, norms = data
    count = max(1, round(fraction * h.numel()))
    with pytest.MonkeyPatch.context() as patch:
        with_blocks(patch, numpy, block, sample)
        pairs, scores = batch_top_pairs(h, norms, count)
    u = (h.relu() * norms).tolist()
    order = sorted((-u[b][i], b, i) for b in range(len(h)) for i in range(len(norms)))
    wanted = sorted((b, i) for score, b, i in order[:count] if score < 0)
    assert entries(pairs) == wanted
    assert pairs.values.tolist() == [h[b, i].item() for b, i in wanted]
    assert scores.tolist() == [u[b][i] for b, i in wanted] and pairs.shape == tuple(h.shape)


@pytest.mark.parametrize("sample", [1, 3, 20])
def test_any_number_of_a_batch(sample: int, monkeypatch: pytest.MonkeyPatch):
    """The bound from a small sample leaves more pairs than wanted, as many, one less, or none."""
    with_blocks(monkeypatch, True, 20, sample)
    for seed in range(3):
        torch.manual_seed(seed)
        h, norms = torch.randn(7, 9), torch.rand(9)
        u = h.relu() * norms
        n_positive = int((u > 0).sum())
        for count in range(1, h.numel() + 1):
            pairs, _ = batch_top_pairs(h, norms, count)
            assert len(pairs.values) == min(count, n_positive)
            assert (
                u[pairs.tokens, pairs.features].min() == u.flatten().sort(descending=True).values[len(pairs.values) - 1]
            )


@many
@given(data=selections(), fraction=st.floats(0, 1), **BLOCKS)
def test_the_largest_of_every_token(data: tuple[Tensor, Tensor], fraction: float, numpy: bool, block: int, sample: int):
    h, norms = data
    k = max(1, round(fraction * len(norms)))
    with pytest.MonkeyPatch.context() as patch:
        with_blocks(patch, numpy, block, sample)
        pairs = token_top_pairs(h, norms, k)
    u, wanted = (h.relu() * norms).tolist(), []
    for b in range(len(h)):
        largest = sorted((-u[b][i], i) for i in range(len(norms)))[:k]
        wanted += sorted((b, i) for score, i in largest if score < 0)
    assert entries(pairs) == wanted
    assert pairs.values.tolist() == [h[b, i].item() for b, i in wanted] and pairs.shape == tuple(h.shape)


@many
@given(data=selections(), level=st.sampled_from([-math.inf, 0.0, 0.5, math.inf, math.nan]), **BLOCKS)
def test_what_is_above_a_bound(data: tuple[Tensor, Tensor], level: float, numpy: bool, block: int, sample: int):
    h, bounds = data[0].clone(), data[1].clone()
    bounds[::3], h[::2, ::4] = level, math.nan
    with pytest.MonkeyPatch.context() as patch:
        with_blocks(patch, numpy, block, sample)
        pairs = pairs_above(h, bounds)
    # NaN is kept: only entries known to be no larger are left out
    assert entries(pairs) == [
        (b, i) for b in range(len(h)) for i in range(h.shape[1]) if not h[b, i].item() <= bounds[i].item()
    ]
    kept = h[pairs.tokens, pairs.features]
    assert torch.equal(pairs.values.isnan(), kept.isnan()) and torch.equal(pairs.values.nan_to_num(), kept.nan_to_num())


@many
@given(data=selections(), fraction=st.floats(0, 1))
def test_pairs_in_both_orders(data: tuple[Tensor, Tensor], fraction: float):
    h, norms = data
    pairs, _ = batch_top_pairs(h, norms, max(1, round(fraction * h.numel())))
    (B, F), where = pairs.shape, entries(pairs)
    rows, (order, columns) = pairs.rows.tolist(), pairs.by_feature
    assert len(rows) == B + 1 and len(columns) == F + 1
    for b in range(B):
        assert [entry for entry in where if entry[0] == b] == where[rows[b] : rows[b + 1]]
    for i in range(F):
        of_feature = order[columns[i] : columns[i + 1]].tolist()
        assert [where[n] for n in of_feature] == [entry for entry in where if entry[1] == i]
    dense = torch.zeros(B, F)
    for (b, i), value in zip(where, pairs.values.tolist(), strict=True):
        dense[b, i] = value
    assert torch.equal(pairs.to_dense(), dense)
    assert torch.equal(pairs.to_sparse().to_dense(), dense) and pairs.to_sparse().is_coalesced()
    half = pairs.select(torch.arange(0, len(where), 2))
    assert entries(half) == where[::2] and torch.equal(half.values, pairs.values[::2]) and half.shape == (B, F)


@many
@given(data=selections(), fraction=st.floats(0, 1))
def test_first_largest_breaks_ties_by_position(data: tuple[Tensor, Tensor], fraction: float):
    scores = data[0]
    k = max(1, round(fraction * scores.shape[1]))
    kth = scores.topk(k, dim=-1).values.amin(-1, keepdim=True)
    for row, kept in zip(scores.tolist(), first_largest(scores, kth, k).tolist(), strict=True):
        largest = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        assert [i for i, is_kept in enumerate(kept) if is_kept] == sorted(largest)


@many
@given(data=selections(), fraction=st.floats(0, 1), numpy=st.booleans(), lost=st.booleans())
def test_the_largest_of_every_token_as_a_mask(data: tuple[Tensor, Tensor], fraction: float, numpy: bool, lost: bool):
    scores = data[0].relu() * data[1]
    if lost:
        scores[::2, 0] = math.nan
    k = max(1, round(fraction * scores.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        with_blocks(patch, numpy, 1 << 18, 1 << 16)
        mask = top_of_tokens(scores, k)
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        largest = sorted(range(len(row)), key=lambda i: (-math.inf if math.isnan(row[i]) else -row[i], i))[:k]
        assert [i for i, is_kept in enumerate(kept) if is_kept] == sorted(i for i in largest if not row[i] <= 0)


# ---------------------------------------------------------------------- gradients, in float64


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def arguments(S: int, D: int, F: int, B: int, seed: int = 0) -> Arguments:
    """x, W_enc, b_enc, W_dec, b_dec; all but x with gradients, W_enc in the memory layout of (F, S D)."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    x, W_enc, b_enc, W_dec, b_dec = randn(B, S * D), randn(F, S * D).T, randn(F), randn(F, S * D), randn(S * D)
    for parameter in (W_enc, b_enc, W_dec, b_dec):
        parameter.requires_grad_()
    return x, W_enc, b_enc, W_dec, b_dec


def norms_of(W_dec: Tensor, S: int) -> Tensor:
    return W_dec.detach().unflatten(1, (S, -1)).norm(dim=-1)


def kept_of(h: Tensor, where: Tensor, dense: bool) -> Acts:
    """The pre-activations at given entries, in either form."""
    tokens, features = where.nonzero(as_tuple=True)
    return h * where if dense else Pairs(tokens, features, h[tokens, features], tuple(h.shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("S", "D", "F", "B"), [(1, 3, 5, 4), (2, 2, 4, 6), (3, 1, 6, 3)])
def test_reconstruct_by_finite_differences(S: int, D: int, F: int, B: int, dense: bool):
    """All three outputs by all four parameters. The gate is held; h, and the norms, move with the parameters."""
    x, *parameters = arguments(S, D, F, B)
    h = x @ parameters[0] + parameters[1]
    active = (h > 0).detach()
    ids = torch.arange(0, F, 2)
    alive = active.clone()
    active[:, 1], active[0] = False, False  # a feature and a token with no pair at all
    assert bool(active.any()) and bool(alive[:, ids].any()) and float(h.abs().min()) > 1e-4

    def outputs(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
        h = (x @ W_enc + b_enc).detach()
        dead = ids, kept_of(h[:, ids], alive[:, ids], dense)
        weights = Weights(W_enc, b_enc, W_dec, b_dec)
        found = reconstruct(x, kept_of(h, active, dense), weights, norms_of(W_dec, S), dead)
        return tuple(out for out in found if out is not None)

    assert len(outputs(*parameters)) == 3
    assert gradcheck(outputs, parameters)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("S", "D", "F", "B"), [(1, 3, 5, 4), (2, 2, 4, 6), (3, 1, 6, 3)])
def test_reconstruct_gated_by_finite_differences(S: int, D: int, F: int, B: int, dense: bool):
    """x_hat and phi by all parameters but the threshold, whose gradient is no derivative: nothing moves with it."""
    x, *parameters = arguments(S, D, F, B)
    threshold = torch.linspace(0.3, 2.5, F, dtype=torch.float64)  # below and above half the window

    def outputs(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
        gates = Gates((x @ W_enc + b_enc).detach(), norms_of(W_dec, S), threshold, 3.0, 0.4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sparse.DENSE_ABOVE, "cpu", -1.0 if dense else 2.0)
            pairs = gates.open_pairs()
        assert (pairs is None) == dense
        return reconstruct_gated(x, gates, pairs, Weights(W_enc, b_enc, W_dec, b_dec), threshold)[:2]

    h, norms = (x @ parameters[0] + parameters[1]).detach(), norms_of(parameters[2], S)
    z = h[:, None] * norms.T
    assert bool((z > threshold).any()) and bool((z < threshold).any())
    assert float((z - threshold).abs().min()) > 1e-3  # no gate opens or closes under a finite difference
    assert gradcheck(outputs, parameters)


def threshold_gradient(
    h: Tensor, norms: Tensor, threshold: Tensor, window: float, stretch: float, G: Tensor, dphi: Tensor
) -> Tensor:
    """`-(t / w) sum over |h n - t| < w/2, h n > 0 of (G + p) / n`, entry by entry.

    G (B, S, F) is <e_bs, W_dec[i, s]>, and p what the penalty's slope adds at f_bis.
    """
    B, S, F = G.shape
    out = torch.zeros(F, dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            for i in range(F):
                n, t = norms[i, s].item(), threshold[i].item()
                z = h[b, i].item() * n
                if z <= 0 or abs(z - t) >= window / 2:
                    continue
                f = h[b, i].item() if z > t else 0.0
                p = dphi[i].item() * stretch * n * (1 - math.tanh(stretch * f * n) ** 2) / (B * S)
                out[i] -= t / (window * n) * (G[b, s, i].item() + p)
    return out


@pytest.mark.parametrize("columns", [2, 1024])
@pytest.mark.parametrize("window", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("S", [1, 2, 5])
def test_the_straight_through_gradient_of_thresholds(
    S: int, dense: bool, window: float, columns: int, monkeypatch: pytest.MonkeyPatch
):
    D, F, B = 3, 11, 20
    for seed in range(2):
        x, W_enc, b_enc, W_dec, b_dec = arguments(S, D, F, B, seed)
        with torch.no_grad():
            W_dec[0] = 0
            W_dec[1, :D] = 0
            b_enc[2] = 50  # open, above the window, in every token
            b_enc[3] = -50  # never open
        threshold = torch.linspace(0.02, 4, F, dtype=torch.float64).requires_grad_()
        gates = Gates((x @ W_enc + b_enc).detach(), norms_of(W_dec, S), threshold.detach(), window, 0.4)
        monkeypatch.setitem(sparse.DENSE_ABOVE, "cpu", -1.0 if dense else 2.0)
        monkeypatch.setattr("crosslens.crosscoders.kernels.gated.COLUMNS", columns)
        weights = Weights(W_enc, b_enc, W_dec, b_dec)
        x_hat, phi, _ = reconstruct_gated(x, gates, gates.open_pairs(), weights, threshold)
        e, dphi = torch.randn_like(x_hat), torch.randn_like(phi)
        both: tuple[tuple[Tensor | None, Tensor | None], ...] = ((e, dphi), (e, None), (None, dphi))
        for upstream in both:
            given_up = [(out, g) for out, g in zip((x_hat, phi), upstream, strict=True) if g is not None]
            (found,) = torch.autograd.grad(
                [out for out, _ in given_up], threshold, [g for _, g in given_up], retain_graph=True
            )
            G = torch.einsum("bsd,fsd->bsf", e.view(B, S, D), W_dec.detach().view(F, S, D)) * (upstream[0] is not None)
            slope = dphi * (upstream[1] is not None)
            wanted = threshold_gradient(gates.hidden_pre, gates.norms, gates.threshold, window, 0.4, G, slope)
            assert bool(wanted.any()) or window < 1
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_that_come_in_any_layout(dense: bool):
    """What reaches the function may be one number seen from everywhere, or transposed."""
    S, D, F, B = 3, 4, 9, 12
    x, *parameters = arguments(S, D, F, B)
    W_enc, b_enc, W_dec, b_dec = parameters
    threshold = torch.full((F,), 0.5, dtype=torch.float64, requires_grad=True)
    h = (x @ W_enc + b_enc).detach()
    gates = Gates(h, norms_of(W_dec, S), threshold.detach(), 2.0, 0.4)
    functions: list[Callable[[], Any]] = [
        lambda: reconstruct(x, kept_of(h, h > 0, dense), Weights(*parameters), norms_of(W_dec, S)),
        lambda: reconstruct_gated(x, gates, gates.open_pairs(), Weights(*parameters), threshold),
    ]
    inputs = [*parameters, threshold]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sparse.DENSE_ABOVE, "cpu", -1.0 if dense else 2.0)
        for function in functions:
            weights = torch.randn(S * D, B, dtype=torch.float64)
            for g in (torch.ones((), dtype=torch.float64).expand(B, S * D), weights.T, weights[:1].T.expand(B, S * D)):
                found = torch.autograd.grad(function()[0], inputs, g, allow_unused=True)
                wanted = torch.autograd.grad(function()[0], inputs, g.contiguous(), allow_unused=True)
                for a, b in zip(found, wanted, strict=True):
                    assert (a is None) == (b is None)
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- sums of rows, and the loss


@pytest.mark.parametrize("N", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("given", [False, True])
def test_sums_of_rows(N: int, given: bool):
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        table = torch.randn(9, 2 * N, generator=draw, dtype=torch.float64)[:, ::2][:, :N]  # not contiguous
        sizes = torch.randint(0, 4, (11,), generator=draw)  # some groups are empty
        starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        ids = torch.randint(0, 9, (int(starts[-1]),), generator=draw)
        weights = torch.randn(len(ids), generator=draw, dtype=torch.float64)
        wanted = torch.zeros(11, N, dtype=torch.float64)
        for group in range(11):
            for pair in range(int(starts[group]), int(starts[group + 1])):
                wanted[group] += weights[pair] * table[ids[pair]]
        out = torch.full((11, N), math.nan, dtype=torch.float64) if given else None
        found = sum_rows(table, ids, starts, weights, out)
        assert out is None or found is out
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("F", "B"), [(40, 40), (40, 7), (5, 7)])  # the difference fits into the memory, or does not
@pytest.mark.parametrize("cached", [1, 30, 1 << 16])
def test_the_squared_error_in_given_memory(F: int, B: int, cached: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crosslens.crosscoders.kernels.sparse.CACHED", cached)
    x_hat, x = torch.randn(2, B, 12, dtype=torch.float64)
    x_hat.requires_grad_()
    memory = torch.full((2, F, 12), math.nan, dtype=torch.float64)
    loss = 3 * squared_error(x_hat, x, memory)
    loss.backward()
    assert float(loss) == pytest.approx(3 * float((x_hat - x).square().sum()) / B, rel=1e-12)
    torch.testing.assert_close(x_hat.grad, 6 * (x_hat - x).detach() / B, rtol=1e-12, atol=0)
    assert bool(memory.isnan().any()) == (memory.numel() > x.numel() or F < B)


# ---------------------------------------------------------------------- memory


class Made(TorchDispatchMode):
    """The sizes of all floating-point memory that operations make, views apart; the backward pass included."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.kept = [tensor.untyped_storage() for tensor in known]  # kept, so that no address is used again
        self.seen = {storage.data_ptr() for storage in self.kept}
        self.sizes: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            parts = [tensor.values()] if tensor.layout in (torch.sparse_csr, torch.sparse_coo) else [tensor]
            for part in parts:
                storage = part.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.kept.append(storage)
                    self.seen.add(storage.data_ptr())
                    self.sizes.append((storage.nbytes() // part.element_size(), str(func)))
        return out


def step_of(architecture: str, S: int, D: int, F: int, B: int, **options: Any) -> tuple[Any, TrainStepInput]:
    cls, config = TRAINING_ARCHITECTURES[architecture]
    torch.manual_seed(0)
    sae: Any = cls(config(d_in=S * D, d_sae=F, n_snapshots=S, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(S * D, F) / (S * D) ** 0.5)
        sae.b_enc.fill_(0.0 if architecture in TOP else -2.0)  # some per cent of h are positive
        sae.W_dec.copy_(torch.randn(F, S * D) / D**0.5)
    dead = (torch.rand(F) < 0.1) if architecture in TOP else None
    coefficients = {"l1": 0.1, "sparsity": 0.1}
    x = torch.randn(B, S, D)
    return sae, TrainStepInput(
        sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
    )


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("dense", [False, True])
def test_given_memory_changes_no_gradient(architecture: str, dense: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sparse.DENSE_ABOVE, "cpu", -1.0 if dense else 2.0)
    for S, D, F, B in ((4, 32, 512, 96), (2, 20, 24, 96)):  # all of h and e fit into the memory, or neither
        sae, inputs = step_of(architecture, S, D, F, B, **({"k": 8} if architecture in TOP else {}))
        found: list[list[Tensor]] = []
        for memory in (None, torch.full((2, F, S * D), math.nan)):
            sae.zero_grad()
            sae.gradient_memory = memory
            output = sae.training_forward_pass(inputs)
            output.loss.backward()
            assert len(output.hidden_pre) == (B if memory is None or sae.backward_reads_hidden_pre or F == 24 else 0)
            found.append([output.loss.detach(), *(p.grad.clone() for p in sae.parameters())])
            if memory is not None and not dense:
                assert sae.W_dec.grad.data_ptr() == memory.data_ptr()
                assert sae.W_enc.grad.data_ptr() == memory[1].data_ptr()
        for fresh, reused in zip(*found, strict=True):
            torch.testing.assert_close(reused, fresh, rtol=1e-5, atol=1e-5 * float(fresh.abs().max()))


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("architecture", KNOWN)
def test_what_memory_a_step_makes(architecture: str, numpy: bool, monkeypatch: pytest.MonkeyPatch):
    """No tensor of B S F numbers; for TopK and BatchTopK none of B F but h, and for the others as few as it takes."""
    S, D, F, B = 4, 32, 512, 768  # weights, (S D, F), and activations, (B, S D), are smaller than (B, F)
    blocks = 8
    monkeypatch.setattr("crosslens.crosscoders.kernels.topk.BLOCK", B * F // blocks)
    monkeypatch.setattr("crosslens.crosscoders.kernels.gated.COLUMNS", F // blocks)
    monkeypatch.setattr("crosslens.crosscoders.kernels.topk.NUMPY_THREADS", 10_000 if numpy else 0)
    options = {"k": 8} if architecture in TOP else {}
    sae, inputs = step_of(architecture, S, D, F, B, **options)

    def step() -> Tensor:
        output = sae.training_forward_pass(inputs)
        output.loss.backward()
        assert 0.01 < output.feature_acts._nnz() / (B * F) < 0.05
        assert (output.losses.get("auxiliary_reconstruction_loss") is not None) == (architecture in TOP)
        return output.hidden_pre

    with Made(inputs.sae_in, *sae.parameters(), *sae.buffers()) as made:
        hidden_pre = step()
    large = sorted((size, name) for size, name in made.sizes if size >= B * F)
    assert hidden_pre.numel() == B * F and large[0][0] == B * F, large
    assert [name for _, name in large if "addmm" in name or "linear" in name] == [large[0][1]], large
    assert len(large) == 1, large
    assert made.sizes and max(size for size, _ in made.sizes if size < B * F) < B * F / 2

    # numpy's memory is not torch's: masks of a byte, and positions, of one block at a time
    sae.zero_grad()
    tracemalloc.start()
    try:
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * B * F / 2


def test_the_dense_reference_makes_what_the_step_avoids():
    """The record does see such tensors."""
    for architecture in KNOWN:
        S, D, F, B = 4, 32, 512, 768
        sae, inputs = step_of(architecture, S, D, F, B, **({"k": 8} if architecture in TOP else {}))
        with Made(inputs.sae_in, *sae.parameters()) as made:
            dense_forward_pass(sae, inputs).loss.backward()
        assert sum(size == B * F for size, _ in made.sizes) > 2
        assert any(size == B * S * F for size, _ in made.sizes) == (architecture == "jumprelu_crosscoder")
