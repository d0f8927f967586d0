"""The JumpReLU step with one gate per (feature, snapshot), without a tensor of B * S * F.

With n_is the decoder norms, t_i the thresholds, w the window, e = d loss / d x_hat and G_bis = <e_bs, W_dec[i, s]>:

    f_bis = h_bi 1[h_bi n_is > t_i],  x_hat_bs = sum_i f_bis W_dec[i, s] + b_dec[s],
    phi_i = mean_{b,s} tanh(stretch f_bis n_is)

Gradients, with p_bis = d phi-penalty / d f_bis:

    dh_bi      = sum_s 1[open] (G_bis + p_bis)
    dW_dec     = sum_b f_bis e_bs, and what reaches n_is through phi
    dt_i       = -t_i / w * sum_{b,s: |h n - t| < w/2, h n > 0} (G_bis + p_bis) / n_is

`low`, mean_b sum_i max(0, t_i - h_bi max_s n_is) over dead features, adds -max_s n_is 1[h n < t] / B to dh_bi, and
1[h n < t] / B to dt_i. The number of open gates (`open_gates`) has a gradient for t_i only: -1 / w for every pair in
its window.

The sum in dt_i runs over a window that holds most pairs with h > 0, open or not, so it needs one more product of the
size of the encoder's, computed once for all snapshots: with M_i = sum_b 1[h_bi > 0] e_b (a dense product), the sum over
all b with h_bi > 0 is <M_is, W_dec[i, s]>. The open pairs are known one by one, and those above the window are
subtracted. Two kinds of features are summed densely over their closed pairs instead: those with pairs below the window
(t_i >= w/2), and those that are nearly always open, where the difference of two large sums would be mostly rounding.
Where more than `DENSE_ABOVE` of the pairs are open (the first steps), every sum is dense, `COLUMNS` features at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.crosscoders.kernels.products import product
from crosslens.crosscoders.kernels.sparse import (
    Memory,
    Weights,
    add_norm_gradient,
    dense_is_faster,
    sampled_product,
    sum_rows,
)
from crosslens.crosscoders.kernels.topk import Pairs, density, pairs_above, row_pointers
from crosslens.distributed.devices import Precision
from crosslens.distributed.strategy import ONE_PROCESS, Strategy

COLUMNS = 1024  # features per block of the dense sums


@dataclass(frozen=True)
class Gates:
    """Everything that decides which gates are open.

    Attributes:
        hidden_pre: h (B, F).
        norms: n_is (F, S), detached.
        threshold: t_i (F,), detached.
        window: w.
        stretch: stretch of the tanh.
        precision: of dense products.
    """

    hidden_pre: Float[Tensor, "B F"]
    norms: Float[Tensor, "F S"]
    threshold: Float[Tensor, " F"]
    window: float
    stretch: float
    precision: Precision = "float32"

    def block(self, columns: slice) -> Gates:
        """The gates of the features `columns`."""
        hidden_pre = self.hidden_pre[:, columns].contiguous()
        return replace(self, hidden_pre=hidden_pre, norms=self.norms[columns], threshold=self.threshold[columns])

    def open_pairs(self) -> Pairs | None:
        """The pairs with any gate open, or None if dense sums are faster."""
        largest = self.norms.amax(-1)
        # slightly lower, because the division rounds; the gates themselves decide
        bounds = 0.999 * self.threshold / largest
        device = bounds.device
        if device.type == "cpu" and dense_is_faster(density(self.hidden_pre, bounds), device, self.precision):
            return None
        pairs = pairs_above(self.hidden_pre, bounds)
        # the number of pairs says the same, and the host waits once
        if device.type != "cpu" and dense_is_faster(len(pairs.values) / self.hidden_pre.numel(), device, "float32"):
            return None
        closed = pairs.values * largest[pairs.features] <= self.threshold[pairs.features]
        if device.type != "cpu":
            return replace(pairs, values=torch.where(closed, 0.0, pairs.values))
        return pairs.select(closed.logical_not_().nonzero().flatten())

    def n_open(self, pairs: Pairs | None) -> Tensor:
        """Number of open gates over tokens, features and snapshots, a scalar; `pairs` is `open_pairs()`."""
        if pairs is not None:
            scores = pairs.values[:, None] * self.norms[pairs.features]
            return (scores > self.threshold[pairs.features, None]).sum().to(scores.dtype)
        blocks = [self.block(columns) for columns in _columns(len(self.threshold))]
        counts = [(_dense_acts(block, s) != 0).sum() for block in blocks for s in range(self.norms.shape[1])]
        return torch.stack(counts).sum().to(self.hidden_pre.dtype)


def reconstruct_gated(
    x: Float[Tensor, "B N"],
    gates: Gates,
    pairs: Pairs | None,
    weights: Weights,
    threshold: Float[Tensor, " F"],
    strategy: Strategy = ONE_PROCESS,
    memory: Memory | None = None,
    dead: Int[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, " F"], Float[Tensor, ""]]:
    """Reconstruction, phi and low, with the gradients of the module's docstring for all parameters.

    Args:
        x: encoder input.
        gates: pre-activations, norms and thresholds, all detached.
        pairs: `gates.open_pairs()`.
        weights: the parameters.
        threshold: t_i, which receives the straight-through gradient.
        strategy: sums the reconstruction over the features of all processes.
        memory: where the gradients of W_dec and W_enc may be written; None allocates them.
        dead: ids of the features that low is of; None: it is 0.
    """
    return _ReconstructGated.apply(  # type: ignore[return-value]
        x, gates, pairs, *weights, threshold, strategy, memory, dead
    )


def open_gates(gates: Gates, pairs: Pairs | None, threshold: Float[Tensor, " F"]) -> Float[Tensor, ""]:
    """Number of open gates over tokens, features and snapshots, with the gradient of the module's docstring.

    Args:
        gates: pre-activations, norms and thresholds, all detached.
        pairs: `gates.open_pairs()`.
        threshold: t_i, which receives the straight-through gradient.
    """
    return _OpenGates.apply(gates, pairs, threshold)  # type: ignore[return-value]


class _OpenGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Gates, pairs: Pairs | None, threshold: Tensor) -> Tensor:
        del threshold
        ctx.gates = gates
        return gates.n_open(pairs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[override]
        gates: Gates = ctx.gates
        F, S = gates.norms.shape
        near = torch.zeros_like(gates.threshold)
        for columns in _columns(F):
            block = gates.block(columns)
            for s in range(S):
                near[columns] += _in_window(block.hidden_pre * block.norms[:, s], block).sum(0)
        return None, None, -g / gates.window * near


class _ReconstructGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Gates,
        pairs: Pairs | None,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        strategy: Strategy,
        memory: Memory | None,
        dead: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del W_enc, b_enc, threshold
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W_dec)
        ctx.dead, low = dead, x.new_zeros(())
        if dead is not None:
            short = gates.threshold[dead] - gates.hidden_pre[:, dead] * gates.norms[dead].amax(-1)
            ctx.below, low = short > 0, short.relu_().sum() / len(x)
        ctx.gates, ctx.pairs, ctx.memory = gates, pairs, memory
        F, S = gates.norms.shape
        decoder = W_dec.view(F, S, -1)
        x_hat = torch.zeros_like(x)
        phi = x.new_zeros(F)
        for columns in _columns(F) if pairs is None else ():
            block = gates.block(columns)
            for s in range(S):
                acts = _dense_acts(block, s)
                x_hat.view(len(x), S, -1)[:, s] += product(acts, decoder[columns, s], gates.precision)
                phi[columns] += acts.mul_(block.norms[:, s] * gates.stretch).tanh_().sum(0)
        if pairs is not None:
            for s in range(S):
                into = x_hat.view(len(x), S, -1)[:, s]
                opened = _open(gates, pairs, s, by_feature=False)
                sum_rows(decoder[:, s], opened.features, opened.starts, opened.values, into)
                phi.index_add_(0, opened.features, (gates.stretch * opened.scores).tanh())
        return strategy.sum_features_(x_hat).add_(b_dec), phi / (len(x) * S), low

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, e: Tensor | None, dphi: Tensor | None, dlow: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_dec = ctx.saved_tensors
        gates: Gates = ctx.gates
        F, S = gates.norms.shape
        e = torch.zeros_like(x) if e is None else e
        db_dec = e.sum(0)  # first: e may lie where the gradients are written
        # d penalty / d f_bis at f = 0, divided by n_is
        slope = x.new_zeros(F) if dphi is None else dphi * gates.stretch / (len(x) * S)
        pairs: Pairs | None = ctx.pairs
        if pairs is None:
            dW_dec, dnorms, dW_enc, db_enc, in_window = _dense_sums(gates, e, x, W_dec, slope)
        else:
            sums = _pair_sums(gates, pairs, e, x, W_dec, slope, ctx.memory)
            dW_dec, dnorms, dW_enc, db_enc, in_window = sums
        if dphi is not None:
            add_norm_gradient(dW_dec, W_dec, gates.norms, dnorms)
        scaled = torch.where(gates.norms > 0, in_window / gates.norms, 0.0)
        dthreshold = -gates.threshold / gates.window * scaled.sum(-1)
        if ctx.dead is not None and dlow is not None:
            below = ctx.below.to(x.dtype).mul_(dlow / len(x))
            dthreshold.index_add_(0, ctx.dead, below.sum(0))
            dh = below.mul_(-gates.norms[ctx.dead].amax(-1))
            dW_enc.index_add_(0, ctx.dead, product(dh.T, x, gates.precision))
            db_enc.index_add_(0, ctx.dead, dh.sum(0))
        return None, None, None, dW_enc.T, db_enc, dW_dec.detach(), db_dec, dthreshold, None, None, None


def _dense_acts(gates: Gates, s: int) -> Float[Tensor, "B F"]:
    return gates.hidden_pre * (gates.hidden_pre * gates.norms[:, s] > gates.threshold)


def _dense_sums(
    gates: Gates, e: Tensor, x: Tensor, W_dec: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for W_dec, norms, W_enc transposed, b_enc; and `sum_b (G + p)` over the window (F, S)."""
    F, S = gates.norms.shape
    by_snapshot, decoder = e.view(len(e), S, -1), W_dec.view(F, S, -1)
    dW_dec, dnorms, in_window = torch.empty_like(W_dec), torch.empty_like(gates.norms), torch.empty_like(gates.norms)
    dW_enc, db_enc = torch.empty_like(W_dec), torch.empty_like(slope)
    for columns in _columns(F):
        block = gates.block(columns)
        dh = torch.zeros_like(block.hidden_pre)
        for s in range(S):
            norm, acts = block.norms[:, s], _dense_acts(block, s)
            dW_dec.view(F, S, -1)[columns, s] = product(acts.T, by_snapshot[:, s], gates.precision)
            sech2 = 1 - (gates.stretch * acts * norm).tanh_().square_()
            dnorms[columns, s] = slope[columns] * (sech2 * acts).sum(0)
            at_open = product(by_snapshot[:, s], decoder[columns, s].T, gates.precision)
            df = at_open.addcmul_(sech2, slope[columns] * norm)
            dh.addcmul_(df, acts != 0)
            in_window[columns, s] = df.mul_(_in_window(block.hidden_pre * norm, block)).sum(0)
        dW_enc[columns], db_enc[columns] = product(dh.T, x, gates.precision), dh.sum(0)
    return dW_dec, dnorms, dW_enc, db_enc, in_window


def _in_window(scores: Float[Tensor, "B F"], gates: Gates) -> Bool[Tensor, "B F"]:
    return ((scores - gates.threshold).abs() < gates.window / 2) & (scores > 0)


class _Open(NamedTuple):
    """The pairs whose gate is open at one snapshot: which of the given ones, what they hold, and where groups start.

    On a GPU, where the host would have to wait for their number, all pairs: those whose gate is closed hold zeros.
    """

    which: Int[Tensor, " m"] | slice
    tokens: Int[Tensor, " m"]
    features: Int[Tensor, " m"]
    values: Float[Tensor, " m"]
    scores: Float[Tensor, " m"]
    starts: Int[Tensor, " r"]


def _open(gates: Gates, pairs: Pairs, s: int, by_feature: bool) -> _Open:
    """The pairs, sorted by token or by feature, that are open at snapshot s."""
    scores = pairs.values * gates.norms[:, s].index_select(0, pairs.features)
    opened = (scores <= gates.threshold.index_select(0, pairs.features)).logical_not_()
    if scores.is_cuda:
        values, scores = torch.where(opened, pairs.values, 0.0), torch.where(opened, scores, 0.0)
        open_pairs, which = replace(pairs, values=values), slice(None)
    else:
        which = opened.nonzero().flatten()
        open_pairs, scores = pairs.select(which), scores.index_select(0, which)
    tokens, features, values, (B, F) = open_pairs.tokens, open_pairs.features, open_pairs.values, pairs.shape
    starts = row_pointers(features, F) if by_feature else row_pointers(tokens, B)
    return _Open(which, tokens, features, values, scores, starts)


def _pair_sums(
    gates: Gates, pairs: Pairs, e: Tensor, x: Tensor, W_dec: Tensor, slope: Tensor, memory: Memory | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same as `_dense_sums`, from the open pairs and one dense product for the window."""
    F, S = gates.norms.shape
    by_snapshot, decoder = e.view(len(e), S, -1), W_dec.view(F, S, -1)
    dW_dec, dW_enc = (torch.empty_like(W_dec), None) if memory is None else memory
    in_window, apart = _closed_sums(gates, pairs, e, W_dec, slope)
    dnorms, df = torch.zeros_like(gates.norms), torch.zeros_like(pairs.values)
    order, starts = pairs.by_feature
    pairs = pairs.select(order)
    for s in range(S):
        opened, errors = _open(gates, pairs, s, by_feature=True), by_snapshot[:, s].contiguous()
        at_open = sampled_product(opened.starts, opened.tokens, decoder[:, s].contiguous(), errors)
        slopes = slope.index_select(0, opened.features)
        sech2 = 1 - (gates.stretch * opened.scores).tanh_().square_()
        at_zero = slopes * gates.norms[:, s].index_select(0, opened.features)
        df_open = torch.where(opened.values == 0, 0.0, at_open + at_zero * sech2)
        df[opened.which] += df_open
        dnorms[:, s].index_add_(0, opened.features, slopes * sech2 * opened.values)
        near = (opened.scores - gates.threshold.index_select(0, opened.features)).abs() < gates.window / 2
        # the sum over h > 0 counts every open pair with the slope of a closed one
        left_out = apart.index_select(0, opened.features) | (opened.values == 0)
        held = torch.where(left_out, 0.0, at_open + at_zero)
        in_window[:, s].index_add_(0, opened.features, torch.where(near, df_open, 0.0) - held)
        sum_rows(errors, opened.tokens, opened.starts, opened.values, dW_dec.view(F, S, -1)[:, s])
    dW_enc = sum_rows(x, pairs.tokens, starts, df, dW_enc)
    return dW_dec, dnorms, dW_enc, torch.zeros_like(slope).index_add_(0, pairs.features, df), in_window


def _closed_sums(
    gates: Gates, pairs: Pairs, e: Tensor, W_dec: Tensor, slope: Tensor
) -> tuple[Float[Tensor, "F S"], Bool[Tensor, " F"]]:
    """`sum_b (G + p0)` over the window, and which features it covers only the closed pairs of.

    p0 is the slope of the penalty at f = 0. For all other features the sum is over `h n > 0`, open pairs included.
    """
    F, S = gates.norms.shape
    sums, positives = torch.empty_like(gates.norms), torch.empty_like(gates.threshold)
    for columns in _columns(F):
        positive = (gates.hidden_pre[:, columns] > 0).to(e.dtype)
        positives[columns] = positive.sum(0)
        products = product(positive.T, e, gates.precision).mul_(W_dec[columns])
        sums[columns] = products.view(-1, S, e.shape[1] // S).sum(-1)
        sums[columns] += positives[columns, None] * slope[columns, None] * gates.norms[columns]
    n_open = torch.zeros_like(positives).index_add_(0, pairs.features, (pairs.values != 0).to(e.dtype))
    # pairs below the window exist only if t >= w/2; where nearly all are open, the difference would be mostly rounding
    apart = (gates.threshold >= gates.window / 2) | (n_open > 0.9 * positives)
    ids = apart.nonzero().flatten()
    if len(ids):
        hidden_pre, decoder = gates.hidden_pre[:, ids], W_dec[ids].view(len(ids), S, -1)
        for s in range(S):
            scores = hidden_pre * gates.norms[ids, s]
            closed = (scores > 0) & (scores <= gates.threshold[ids])
            closed &= (scores - gates.threshold[ids]).abs() < gates.window / 2
            at = (
                product(e.view(len(e), S, -1)[:, s], decoder[:, s].T, gates.precision)
                + slope[ids] * gates.norms[ids, s]
            )
            sums[ids, s] = at.mul_(closed).sum(0)
    return sums, apart


def _columns(n: int) -> Iterator[slice]:
    for start in range(0, n, COLUMNS):
        yield slice(start, start + COLUMNS)
