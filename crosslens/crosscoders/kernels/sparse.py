"""The training step on active pairs: of the five dense products of size B * S * D * F, only the encoder's remains.

A pair (b, i) is active if the gate keeps feature i for token b. With the pairs in CSR order:

1. h = x W_enc + b_enc                      one dense product, outside autograd
2. pairs = the entries that the gate keeps  (`crosslens.crosscoders.kernels.topk`); f = h there
3. x_hat = sum over pairs f W_dec[i]        embedding-bag over rows of W_dec
4. backward, e = d loss / d x_hat:
       df[b, i]  = <e_b, W_dec[i]>          sampled product on the pairs
       dW_dec[i] = sum_b f[b, i] e_b        embedding-bag over the transposed index
       dW_enc[i] = sum_b df[b, i] x_b       the same, with df

These are exactly the gradients of the dense autograd code, which stays in `crosslens.crosscoders.base` as the
reference. Where more than `DENSE_ABOVE` of the pairs are active, dense products are faster and are used instead.

On a CPU the sums over pairs are bound by memory: rows are gathered from `TILE` columns of a table at a time, which stay
in the cache. The two large gradients are written into memory that is kept between steps (`Memory`), because the first
touch of new memory takes longer than the sums; h and e lie in it before they are overwritten by the gradients.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, mse_loss

from crosslens.crosscoders.kernels.products import product
from crosslens.crosscoders.kernels.topk import Pairs
from crosslens.distributed.devices import Precision, has_triton
from crosslens.distributed.strategy import ONE_PROCESS, Strategy

# torch warns once per process; only the sampled product uses CSR
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta|Sparse invariant checks are implicitly")

# Fraction of active pairs above which dense products win, as benchmarks/density.py measures it: on a CPU .25 with AVX2,
# less where dense products are faster; on other devices by the precision of those products, on an H100 at S, D, F, B =
# 8, 768, 32768, 4096.
DENSE_ABOVE = {"cpu": 0.2, "float32": 0.089, "tf32": 0.0136, "bfloat16": 0.006}

CACHED = 1 << 16  # entries of a block on a CPU that stays in the cache
TILE = 64  # columns of a table that rows are gathered from at a time on a CPU

# The gradients of W_dec and of W_enc transposed, (2, F, N)
Memory: TypeAlias = Tensor

# Feature activations of a batch, in the form that is faster to compute with.
Acts: TypeAlias = Pairs | Tensor


class Weights(NamedTuple):
    """The parameters that every crosscoder has. The gradient of `W_enc` has the memory layout of an (F, N) matrix."""

    W_enc: Float[Tensor, "N F"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F N"]
    b_dec: Float[Tensor, " N"]


def dense_is_faster(active: float, device: torch.device, precision: Precision) -> bool:
    """Whether dense products in a precision are faster on a device if this fraction of the pairs is active."""
    return active > DENSE_ABOVE["cpu" if device.type == "cpu" else precision]


def decode(acts: Acts, W_dec: Float[Tensor, "F N"], precision: Precision = "float32") -> Float[Tensor, "B N"]:
    """`f W_dec`; `precision` is that of a dense product, as everywhere in this module."""
    if isinstance(acts, Tensor):
        return product(acts, W_dec, precision)
    return sum_rows(W_dec, acts.features, acts.rows, acts.values)


def gradients(
    acts: Acts,
    e: Tensor,
    x: Tensor,
    W_dec: Tensor,
    slope: Float[Tensor, " F"] | None = None,
    precision: Precision = "float32",
    memory: Memory | None = None,
) -> tuple[Float[Tensor, "F N"], Float[Tensor, "F N"], Float[Tensor, " F"]]:
    """Gradients for W_dec, W_enc transposed, and b_enc.

    Args:
        acts: f (B, F).
        e: d loss / d (f W_dec), (B, N).
        x: encoder input (B, N).
        W_dec: (F, N).
        slope: d loss / d f_i of a penalty, added on active pairs.
        precision: of the dense products.
        memory: where the first two are written, the second one last; None allocates them.
    """
    dW_dec, dW_enc = (None, None) if memory is None else memory
    if isinstance(acts, Tensor):
        df = product(e, W_dec.T, precision)
        if slope is not None:
            df.add_(slope)
        df.mul_(acts > 0)
        return product(acts.T, e, precision), product(df.T, x, precision), df.sum(0)
    order, starts = acts.by_feature
    tokens, features = acts.tokens.index_select(0, order), acts.features.index_select(0, order)
    # by feature: each row of W_dec is read once, and e, the smaller table, stays in the cache
    df, values = sampled_product(starts, tokens, W_dec, e), acts.values.index_select(0, order)
    if slope is not None:
        df = df + slope.index_select(0, features)
    df = torch.where(values == 0, 0.0, df)
    return (
        sum_rows(e, tokens, starts, values, dW_dec),
        sum_rows(x, tokens, starts, df, dW_enc),
        torch.zeros_like(W_dec[:, 0]).index_add_(0, features, df),
    )


def sum_rows(
    table: Float[Tensor, "m N"],
    ids: Int[Tensor, " p"],
    starts: Int[Tensor, " n_1"],
    weights: Float[Tensor, " p"],
    out: Float[Tensor, "n N"] | None = None,
) -> Float[Tensor, "n N"]:
    """Weighted sums of rows of a table, one for each group of pairs.

    On a CPU, `TILE` columns at a time: the part of the table that rows are gathered from then stays in the cache.

    Args:
        table: its rows.
        ids: the row of each pair.
        starts: where the pairs of each group start, and the number of pairs.
        weights: the factor of each pair.
        out: where the sums are written; None allocates them.
    """
    table, first = table.detach(), starts[:-1]
    if table.device.type != "cpu" and not has_triton():
        sums = embedding_bag(ids, table.contiguous(), first, mode="sum", per_sample_weights=weights)
        return sums if out is None else out.copy_(sums)
    if out is None:
        out = table.new_empty(len(first), table.shape[1])
    if table.is_cuda:
        from crosslens.crosscoders.kernels.gathered import gathered_sums  # Triton is optional

        gathered_sums(table.contiguous(), ids, starts, weights, out)
        return out
    for start in range(0, table.shape[1], TILE):
        tile = table[:, start : start + TILE].contiguous()
        out[:, start : start + TILE] = embedding_bag(ids, tile, first, mode="sum", per_sample_weights=weights)
    return out


def sampled_product(rows: Tensor, columns: Tensor, a: Float[Tensor, "m N"], b: Float[Tensor, "n N"]) -> Tensor:
    """`<a_i, b_j>` at the entries (i, j) of a CSR pattern."""
    blank = a.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(rows, columns, blank, (len(a), len(b)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()


def add_norm_gradient(dW_dec: Tensor, W_dec: Tensor, norms: Tensor, dnorms: Float[Tensor, "F S"]) -> None:
    """Add to `dW_dec`, in place, the gradient through the decoder norms: `dn_is W_dec[i, s] / n_is`, 0 at n = 0."""
    along = torch.where(norms > 0, dnorms / norms, 0.0)
    shape = (*norms.shape, -1)
    dW_dec.view(shape).addcmul_(W_dec.view(shape), along[..., None])


def reconstruct(
    x: Float[Tensor, "B N"],
    acts: Acts,
    weights: Weights,
    norms: Float[Tensor, "F S"] | None = None,
    dead: tuple[Int[Tensor, " m"], Acts] | None = None,
    strategy: Strategy = ONE_PROCESS,
    precision: Precision = "float32",
    memory: Memory | None = None,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, " F"] | None, Float[Tensor, "B N"] | None]:
    """The terms that losses are computed from, with exact gradients for all four parameters.

    Args:
        x: encoder input.
        acts: f, the features that the gate kept; the gate carries no gradient.
        weights: the parameters.
        norms: decoder norms n_is, detached, if a penalty needs them.
        dead: ids of features, and their activations among themselves, for a second reconstruction.
        strategy: sums both reconstructions over the features of all processes.
        precision: of dense products.
        memory: where the gradients of W_dec and W_enc are written; None allocates them.

    Returns:
        `f W_dec + b_dec`; per feature `sum_s n_is * mean_B f_i`, or None without `norms`; the reconstruction by the
        dead features without bias, or None.
    """
    ids, dead_acts = dead if dead is not None else (None, None)
    x_hat, weighted, rebuilt = _Reconstruct.apply(  # type: ignore[misc]
        x, *weights, acts, norms, ids, dead_acts, strategy, precision, memory
    )
    return x_hat, weighted, rebuilt


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        acts: Acts,
        norms: Tensor | None,
        ids: Tensor | None,
        dead_acts: Acts | None,
        strategy: Strategy,
        precision: Precision,
        memory: Memory | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        del W_enc, b_enc
        ctx.set_materialize_grads(False)
        mean_f = None if norms is None else _mean(acts)
        ctx.save_for_backward(x, W_dec, norms, mean_f, ids)
        ctx.acts, ctx.dead_acts, ctx.precision, ctx.memory = acts, dead_acts, precision, memory
        weighted = None if norms is None or mean_f is None else norms.sum(-1) * mean_f
        rebuilt = (
            None
            if ids is None or dead_acts is None
            else strategy.sum_features_(decode(dead_acts, W_dec[ids], precision))
        )
        return strategy.sum_features_(decode(acts, W_dec, precision)).add_(b_dec), weighted, rebuilt

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, e: Tensor | None, dweighted: Tensor | None, drebuilt: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_dec, norms, mean_f, ids = ctx.saved_tensors
        e = torch.zeros_like(x) if e is None else e
        db_dec = e.sum(0)  # first: e may lie where the gradients are written
        slope = None if dweighted is None else dweighted * norms.sum(-1) / len(x)
        of_dead = None
        if drebuilt is not None:  # first, for the same reason
            of_dead = gradients(ctx.dead_acts, drebuilt, x, W_dec[ids], precision=ctx.precision)
        dW_dec, dW_enc, db_enc = gradients(ctx.acts, e, x, W_dec, slope, ctx.precision, ctx.memory)
        if dweighted is not None:
            add_norm_gradient(dW_dec, W_dec, norms, (dweighted * mean_f)[:, None].expand_as(norms))
        if of_dead is not None:
            for total, part in zip((dW_dec, dW_enc, db_enc), of_dead, strict=True):
                total.index_add_(0, ids, part)
        return None, dW_enc.T, db_enc, dW_dec.detach(), db_dec, *[None] * 7


def hidden_pre_in(memory: Memory | None, B: int) -> Float[Tensor, "B F"] | None:
    """Where h may lie until a backward pass, or None if it does not fit."""
    if memory is None or 2 * memory.shape[2] < B:
        return None
    return memory.view(-1)[: B * memory.shape[1]].view(B, -1)


def squared_error(
    x_hat: Float[Tensor, "B N"], x: Float[Tensor, "B N"], memory: Memory | None = None, part: int = 0
) -> Float[Tensor, ""]:
    """`mean_B |x_hat - x|^2`.

    Args:
        x_hat: reconstruction.
        x: target, which receives no gradient.
        memory: where the difference and then its gradient are written; None allocates them.
        part: which part of the memory, counted from its end.
    """
    end = 0 if memory is None else memory.numel() - part * x.numel()
    # in the gradient that is written last
    if memory is None or 2 * (end - x.numel()) < memory.numel():
        return mse_loss(x_hat, x, reduction="sum") / len(x)
    out = memory.view(-1)[end - x.numel() : end].view_as(x)
    return _SquaredError.apply(x_hat, x, out)  # type: ignore[return-value]


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor, out: Tensor) -> Tensor:
        ctx.e = out
        squares: list[Tensor] = []
        # blocks of tokens stay in the cache between the two operations
        rows = max(1, CACHED // x.shape[1])
        for block, *of in zip(out.split(rows), x_hat.split(rows), x.split(rows), strict=True):
            flat = torch.sub(*of, out=block).view(-1)
            squares.append(torch.dot(flat, flat))
        return torch.stack(squares).sum() / len(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.e.mul_(2 * g / len(ctx.e)), None, None


def change_error(x_hat: Float[Tensor, "B N"], x: Float[Tensor, "B N"], n_snapshots: int) -> Float[Tensor, ""]:
    """`mean_B sum_s |(x_hat_s+1 - x_hat_s) - (x_s+1 - x_s)|^2` over neighbouring snapshots; N = S D."""
    return _ChangeError.apply(x_hat, x, n_snapshots)  # type: ignore[return-value]


class _ChangeError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor, n_snapshots: int) -> Tensor:
        ctx.slope = torch.empty_like(x_hat)
        squares: list[Tensor] = []
        # blocks of tokens stay in the cache: one pass over memory for the loss and its gradient
        rows = max(1, CACHED // x.shape[1])
        for slope, *of in zip(ctx.slope.split(rows), x_hat.split(rows), x.split(rows), strict=True):
            error = torch.sub(*of).view(len(slope), n_snapshots, -1)
            change = error.diff(dim=1)
            squares.append(torch.dot(change.flatten(), change.flatten()))
            slope = slope.zero_().view_as(error)
            slope[:, 1:] += change
            slope[:, :-1] -= change
        return torch.stack(squares).sum() / len(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.slope.mul_(2 * g / len(ctx.slope)), None, None


def _mean(acts: Acts) -> Float[Tensor, " F"]:
    if isinstance(acts, Tensor):
        return acts.mean(0)
    total = acts.values.new_zeros(acts.shape[1]).index_add_(0, acts.features, acts.values)
    return total / acts.shape[0]
