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
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosslens.crosscoders.kernels.products import product
from crosslens.crosscoders.kernels.topk import Pairs
from crosslens.crosscoders.strategy import ONE_PROCESS, Strategy
from crosslens.distributed.devices import Precision

# torch warns once per process; only the sampled product uses CSR
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

DENSE_ABOVE = 0.075  # fraction of active pairs above which dense products win; measured by benchmarks/density.py

# Feature activations of a batch, in the form that is faster to compute with.
Acts: TypeAlias = Pairs | Tensor


class Weights(NamedTuple):
    """The parameters that every crosscoder has. The gradient of `W_enc` has the memory layout of an (F, N) matrix."""

    W_enc: Float[Tensor, "N F"]
    b_enc: Float[Tensor, " F"]
    W_dec: Float[Tensor, "F N"]
    b_dec: Float[Tensor, " N"]


def dense_is_faster(active: float) -> bool:
    """Whether dense products are faster if this fraction of the pairs is active."""
    return active > DENSE_ABOVE


def decode(acts: Acts, W_dec: Float[Tensor, "F N"], precision: Precision = "float32") -> Float[Tensor, "B N"]:
    """`f W_dec`; `precision` is that of a dense product, as everywhere in this module."""
    if isinstance(acts, Tensor):
        return product(acts, W_dec, precision)
    return embedding_bag(acts.features, W_dec, acts.rows[:-1], mode="sum", per_sample_weights=acts.values)


def gradients(
    acts: Acts,
    e: Tensor,
    x: Tensor,
    W_dec: Tensor,
    slope: Float[Tensor, " F"] | None = None,
    precision: Precision = "float32",
) -> tuple[Float[Tensor, "F N"], Float[Tensor, "F N"], Float[Tensor, " F"]]:
    """Gradients for W_dec, W_enc transposed, and b_enc.

    Args:
        acts: f (B, F).
        e: d loss / d (f W_dec), (B, N).
        x: encoder input (B, N).
        W_dec: (F, N).
        slope: d loss / d f_i of a penalty, added on active pairs.
        precision: of the dense products.
    """
    if isinstance(acts, Tensor):
        df = product(e, W_dec.T, precision)
        if slope is not None:
            df.add_(slope)
        df.mul_(acts > 0)
        return product(acts.T, e, precision), product(df.T, x, precision), df.sum(0)
    df = sampled_product(acts.rows, acts.features, e, W_dec)
    if slope is not None:
        df = df + slope[acts.features]
    order, rows = acts.by_feature
    by_feature, starts = acts.tokens.index_select(0, order), rows[:-1]
    return (
        embedding_bag(by_feature, e, starts, mode="sum", per_sample_weights=acts.values.index_select(0, order)),
        embedding_bag(by_feature, x, starts, mode="sum", per_sample_weights=df.index_select(0, order)),
        torch.zeros_like(W_dec[:, 0]).index_add_(0, acts.features, df),
    )


def sampled_product(rows: Tensor, columns: Tensor, e: Float[Tensor, "B N"], W: Float[Tensor, "F N"]) -> Tensor:
    """`<e_b, W_i>` at the entries (b, i) of a CSR pattern."""
    blank = e.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(rows, columns, blank, (len(e), len(W)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, e, W.T, beta=0.0).values()


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

    Returns:
        `f W_dec + b_dec`; per feature `sum_s n_is * mean_B f_i`, or None without `norms`; the reconstruction by the
        dead features without bias, or None.
    """
    ids, dead_acts = dead if dead is not None else (None, None)
    x_hat, weighted, rebuilt = _Reconstruct.apply(  # type: ignore[misc]
        x, *weights, acts, norms, ids, dead_acts, strategy, precision
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
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        del W_enc, b_enc
        ctx.set_materialize_grads(False)
        mean_f = None if norms is None else _mean(acts)
        ctx.save_for_backward(x, W_dec, norms, mean_f, ids)
        ctx.acts, ctx.dead_acts, ctx.precision = acts, dead_acts, precision
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
        slope = None if dweighted is None else dweighted * norms.sum(-1) / len(x)
        dW_dec, dW_enc, db_enc = gradients(ctx.acts, e, x, W_dec, slope, ctx.precision)
        if dweighted is not None:
            add_norm_gradient(dW_dec, W_dec, norms, (dweighted * mean_f)[:, None].expand_as(norms))
        if drebuilt is not None:
            of_dead = gradients(ctx.dead_acts, drebuilt, x, W_dec[ids], precision=ctx.precision)
            for total, part in zip((dW_dec, dW_enc, db_enc), of_dead, strict=True):
                total.index_add_(0, ids, part)
        return None, dW_enc.T, db_enc, dW_dec, e.sum(0), None, None, None, None, None, None


def _mean(acts: Acts) -> Float[Tensor, " F"]:
    if isinstance(acts, Tensor):
        return acts.mean(0)
    total = acts.values.new_zeros(acts.shape[1]).index_add_(0, acts.features, acts.values)
    return total / acts.shape[0]
