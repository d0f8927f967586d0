"""The training step on active pairs: of the five dense products of size B * S * D * F, only the encoder's is made.

A pair (b, i) is active when token b keeps feature i. With the pairs in CSR order:

1. h = x W_enc + b_enc                      one dense product, outside autograd
2. pairs = the entries that the gate keeps; f = h there
3. x_hat = sum over pairs f W_dec[i]        embedding-bag over rows of W_dec
4. backward, e = d loss / d x_hat:
       df[b, i]  = <e_b, W_dec[i]>          sampled product on the pairs
       dW_dec[i] = sum_b f[b, i] e_b        embedding-bag over the transposed index
       dW_enc[i] = sum_b df[b, i] x_b       the same, with df

Exactly the gradients of the dense autograd code, which stays in `base` as the reference. Where more than
`DENSE_ABOVE` of the pairs are active, dense products are the faster way to the same sums, and are used instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from crosslens.distributed.parallel import ALONE, Parallel

# torch says so once per process; the sampled product is all that is used of CSR
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

Precision = Literal["float32", "tf32", "bfloat16"]

DENSE_ABOVE = 0.075  # share of active pairs from which dense products win; measured by benchmarks/density.py
SAMPLE = 1 << 16  # entries looked at for a first bound on the threshold
BLOCK = 1 << 18  # entries of a (tokens, F) block on a CPU: it stays in the cache
GPU_BLOCK = 1 << 27
# on few threads numpy compares and lists positions three times as fast as torch
NUMPY_THREADS, NUMPY_DTYPES = 2, (torch.float32, torch.float64)


@dataclass(frozen=True)
class Pairs:
    """Active (token, feature) pairs, sorted by token.

    Attributes:
        tokens: token b of each pair.
        features: feature i of each pair.
        values: f = h of each pair, positive.
        shape: (B, F).
    """

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    shape: tuple[int, int]

    @cached_property
    def rows(self) -> Int[Tensor, " m"]:
        """CSR row pointers, (B + 1,)."""
        return row_pointers(self.tokens, self.shape[0])

    @cached_property
    def by_feature(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
        """The order that sorts the pairs by feature, then token, and its row pointers (F + 1,)."""
        ordered, order = self.features.sort(stable=True)
        return order, row_pointers(ordered, self.shape[1])

    def select(self, which: Int[Tensor, " m"]) -> Pairs:
        """Some of the pairs, in order."""
        return Pairs(
            self.tokens.index_select(0, which),
            self.features.index_select(0, which),
            self.values.index_select(0, which),
            self.shape,
        )

    def to_sparse(self) -> Tensor:
        """Feature activations (B, F) as a coalesced COO tensor."""
        indices = torch.stack([self.tokens, self.features])
        return torch.sparse_coo_tensor(indices, self.values, self.shape, is_coalesced=True, check_invariants=False)

    def to_dense(self) -> Float[Tensor, "B F"]:
        """Feature activations as a dense tensor."""
        dense = self.values.new_zeros(self.shape)
        dense[self.tokens, self.features] = self.values
        return dense


# Feature activations of a batch, in the form that is faster to compute with.
Acts: TypeAlias = Pairs | Tensor


def encoder_product(
    x: Float[Tensor, "... N"],
    W_enc: Float[Tensor, "N F"],
    b_enc: Float[Tensor, " F"],
    precision: Precision = "float32",
) -> Float[Tensor, "... F"]:
    """`h = x W_enc + b_enc`, with the product in the given precision and the sum with the bias in that of `x`."""
    if precision == "bfloat16":
        return linear(x.bfloat16(), W_enc.T.bfloat16()).to(x.dtype).add_(b_enc)
    if precision == "tf32":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return linear(x, W_enc.T, b_enc)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    return linear(x, W_enc.T, b_enc)


# ---------------------------------------------------------------------- selection
@torch.no_grad()
def batch_top_pairs(
    hidden_pre: Float[Tensor, "B F"], norms: Float[Tensor, " F"], count: int, parallel: Parallel = ALONE
) -> tuple[Pairs, Float[Tensor, " n"]]:
    """The `count` largest positive scores `relu(h) n` of a whole batch, of equal ones the earlier; and those scores.

    A sample bounds the threshold from below, the exact k-th value is taken among the survivors: nothing of size
    B * F is sorted. Of several processes each returns its own pairs among the `count` of all.
    """
    # a little lower, for the rounding of the division
    bound = 0.999 * _sampled_bound(hidden_pre, norms, count, parallel).clamp_min(0)
    pairs = pairs_above(hidden_pre, bound / norms)
    if parallel.count(len(pairs.values)) < count:
        pairs = pairs_above(hidden_pre, torch.zeros_like(norms))
    scores = pairs.values * norms.index_select(0, pairs.features)
    pairs, scores = _keep(pairs, scores, scores > 0)
    if parallel.count(len(scores)) <= count:
        return pairs, scores
    if parallel.alone:
        return _keep(pairs, scores, first_largest(scores, scores.topk(count, sorted=False).values.amin(), count))
    kth, n_tied = parallel.kth_largest(scores, count)
    kept = (scores > kth) | scores.isnan()
    tied = (scores == kth).nonzero().flatten()
    # tokens and features of the whole batch and dictionary: a process holds a range of either
    first_token, first_feature, n_features = parallel.corner(*hidden_pre.shape)
    places = (pairs.tokens[tied] + first_token) * n_features + pairs.features[tied] + first_feature
    kept[tied] = torch.isin(places, parallel.earliest(places, n_tied))
    return _keep(pairs, scores, kept)


@torch.no_grad()
def token_top_pairs(
    hidden_pre: Float[Tensor, "B F"], norms: Float[Tensor, " F"], k: int, parallel: Parallel = ALONE
) -> Pairs:
    """The k largest positive scores `relu(h) n` of every token, of equal ones the earlier.

    The k-th largest of the maxima of groups of features bounds a token's threshold from below; its exact k-th value is
    taken among the survivors. Of several processes each returns its own pairs among the k of all: they exchange the
    k largest scores that each has for a token.
    """
    here = min(k, hidden_pre.shape[1])
    found = [torch.empty(0, dtype=torch.long, device=hidden_pre.device)]
    for start, block in _blocks(hidden_pre) if here else ():
        scores = block * norms
        bound = _grouped(scores, here).topk(here, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        found.append(_where_above(scores, _below(bound)).add_(start * hidden_pre.shape[1]))
    pairs = _pairs_at(hidden_pre, torch.cat(found))
    scores = pairs.values * norms.index_select(0, pairs.features)
    rank = torch.arange(len(scores), device=scores.device) - pairs.rows[pairs.tokens]
    widest = max(k, int((pairs.rows[1:] - pairs.rows[:-1]).max()))
    padded = scores.new_full((len(hidden_pre), widest), -torch.inf)
    padded[pairs.tokens, rank] = scores
    largest = padded.topk(k, dim=-1, sorted=False).values
    kth, allowed = largest.amin(-1, keepdim=True), k
    if not parallel.alone:
        kth, allowed = _share_of_largest(largest, k, parallel)
    return _keep(pairs, scores, first_largest(padded, kth, allowed)[pairs.tokens, rank])[0]


def _share_of_largest(largest: Float[Tensor, "B k"], k: int, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """The k-th largest score (B, 1) of every token over processes, and how many of the k (B, 1) are in this one."""
    parts = parallel.of_features(largest)
    kth = parts.transpose(0, 1).flatten(1).topk(k, dim=-1, sorted=False).values.amin(-1)
    larger, tied = ((parts > kth[:, None]) | parts.isnan()).sum(-1), (parts == kth[:, None]).sum(-1)
    before = (tied.cumsum(0) - tied)[parallel.share]
    tied_here = (k - larger.sum(0) - before).clamp_min(0)
    return kth[:, None], (larger[parallel.share] + tied_here)[:, None]


@torch.no_grad()
def pairs_above(hidden_pre: Float[Tensor, "B F"], bounds: Float[Tensor, " F"]) -> Pairs:
    """The pairs with `h > bound` of their feature. NaN is kept, and shows in the loss."""
    found = [_where_above(block, bounds).add_(start * hidden_pre.shape[1]) for start, block in _blocks(hidden_pre)]
    return _pairs_at(hidden_pre, torch.cat(found))


def first_largest(scores: Float[Tensor, "*B n"], kth: Tensor, k: int | Tensor) -> Tensor:
    """Mask of the k largest entries in the last dimension, of equal ones the earlier, from the k-th largest value."""
    larger, tied = (scores > kth) | scores.isnan(), scores == kth
    return larger | (tied & (tied.cumsum(-1) <= k - larger.sum(-1, keepdim=True)))


def _grouped(scores: Float[Tensor, "B F"], k: int) -> Float[Tensor, "B G"]:
    """Maxima of groups of features, at least 2 k of them; all features where they do not divide so."""
    size = 1
    while scores.shape[1] % (2 * size) == 0 and scores.shape[1] // (2 * size) >= 2 * k:
        size *= 2
    return scores.unflatten(1, (-1, size)).amax(-1)


def _sampled_bound(hidden_pre: Tensor, norms: Tensor, count: int, parallel: Parallel) -> Tensor:
    flat = hidden_pre.flatten()
    # an odd stride visits all features of a dictionary whose size is a power of two
    stride = max(1, flat.numel() // SAMPLE) | 1
    which = torch.arange(0, flat.numel(), stride, device=flat.device)
    sample = flat.index_select(0, which) * norms.index_select(0, which % len(norms))
    rank = min(parallel.count(len(sample)), int(1.2 * count / stride) + 64)
    return sample.topk(rank).values[-1] if parallel.alone else parallel.kth_largest(sample.clamp_min(0), rank)[0]


def _where_above(block: Float[Tensor, "b F"], bounds: Tensor) -> Int[Tensor, " n"]:
    """Flat positions of the entries that are not `<= bounds`."""
    if block.dtype in NUMPY_DTYPES and block.device.type == "cpu" and torch.get_num_threads() <= NUMPY_THREADS:
        left_out = np.less_equal(block.numpy(), bounds.numpy())
        return torch.from_numpy(np.flatnonzero(np.logical_not(left_out, out=left_out)))
    return (block <= bounds).logical_not_().flatten().nonzero().flatten()


def _pairs_at(hidden_pre: Tensor, positions: Int[Tensor, " n"]) -> Pairs:
    B, F = hidden_pre.shape
    tokens = positions // F
    return Pairs(tokens, positions - tokens * F, hidden_pre.flatten().index_select(0, positions), (B, F))


def _keep(pairs: Pairs, scores: Tensor, mask: Tensor) -> tuple[Pairs, Tensor]:
    kept = (mask | scores.isnan()).nonzero().flatten()
    return pairs.select(kept), scores.index_select(0, kept)


def _below(bound: Tensor) -> Tensor:
    """The next smaller number, and at least 0: `score > that` keeps what is not smaller than `bound`, and positive."""
    return torch.nextafter(bound, torch.full_like(bound, -torch.inf)).clamp_min(0)


def _blocks(hidden_pre: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, (BLOCK if hidden_pre.device.type == "cpu" else GPU_BLOCK) // hidden_pre.shape[1])
    for start in range(0, len(hidden_pre), rows):
        yield start, hidden_pre[start : start + rows]


def dense_is_faster(share: float) -> bool:
    """Whether dense products are the faster way at this share of active pairs."""
    return share > DENSE_ABOVE


def density(hidden_pre: Float[Tensor, "B F"], bounds: Float[Tensor, " F"]) -> float:
    """Share of pairs with `h > bound`, on every sixteenth token: enough to choose the faster way."""
    sample = hidden_pre[::16]
    return float((sample > bounds).count_nonzero()) / max(1, sample.numel())


# ---------------------------------------------------------------------- decode, and its gradients
def decode(acts: Acts, W_dec: Float[Tensor, "F N"]) -> Float[Tensor, "B N"]:
    """`f W_dec`."""
    if isinstance(acts, Tensor):
        return acts @ W_dec
    return embedding_bag(acts.features, W_dec, acts.rows[:-1], mode="sum", per_sample_weights=acts.values)


def gradients(
    acts: Acts, e: Tensor, x: Tensor, W_dec: Tensor, slope: Float[Tensor, " F"] | None = None
) -> tuple[Float[Tensor, "F N"], Float[Tensor, "F N"], Float[Tensor, " F"]]:
    """Gradients for W_dec, W_enc transposed, and b_enc.

    Args:
        acts: f (B, F).
        e: d loss / d (f W_dec), (B, N).
        x: what the encoder read, (B, N).
        W_dec: (F, N).
        slope: d loss / d f_i of a penalty, added on active pairs.
    """
    if isinstance(acts, Tensor):
        df = e @ W_dec.T if slope is None else torch.addmm(slope, e, W_dec.T)
        df.mul_(acts > 0)
        return acts.T @ e, df.T @ x, df.sum(0)
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


def row_pointers(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " m"]:
    """CSR row pointers (n + 1) of ids in ascending order."""
    counts = torch.bincount(sorted_ids, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def add_norm_gradient(dW_dec: Tensor, W_dec: Tensor, norms: Tensor, dnorms: Float[Tensor, "F S"]) -> None:
    """Add to `dW_dec`, in place, what reaches the decoder through its norms: `dn_is W_dec[i, s] / n_is`, 0 at n = 0."""
    along = torch.where(norms > 0, dnorms / norms, 0.0)
    shape = (*norms.shape, -1)
    dW_dec.view(shape).addcmul_(W_dec.view(shape), along[..., None])


def reconstruct(
    x: Float[Tensor, "B N"],
    acts: Acts,
    W_enc: Float[Tensor, "N F"],
    b_enc: Float[Tensor, " F"],
    W_dec: Float[Tensor, "F N"],
    b_dec: Float[Tensor, " N"],
    norms: Float[Tensor, "F S"] | None = None,
    dead: tuple[Int[Tensor, " m"], Acts] | None = None,
    parallel: Parallel = ALONE,
) -> tuple[Float[Tensor, "B N"], Float[Tensor, " F"] | None, Float[Tensor, "B N"] | None]:
    """What the losses are made of, with exact gradients for all four parameters.

    Args:
        x: what the encoder read.
        acts: f, the features that the gate kept; their gate carries no gradient.
        W_enc: encoder; its gradient comes in the memory layout of a (F, N) matrix.
        b_enc: encoder bias.
        W_dec: decoder.
        b_dec: decoder bias.
        norms: decoder norms n_is, detached, where a penalty needs them.
        dead: ids of features, and their activations among themselves, for a second reconstruction.
        parallel: processes that share the features; both reconstructions are of all.

    Returns:
        `f W_dec + b_dec`; per feature `sum_s n_is * mean_B f_i`, or None without `norms`; the reconstruction of the
        dead features without bias, or None.
    """
    ids, dead_acts = dead if dead is not None else (None, None)
    x_hat, weighted, rebuilt = _Reconstruct.apply(  # type: ignore[misc]
        x, W_enc, b_enc, W_dec, b_dec, acts, norms, ids, dead_acts, parallel
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
        parallel: Parallel,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        del W_enc, b_enc
        ctx.set_materialize_grads(False)
        mean_f = None if norms is None else _mean(acts)
        ctx.save_for_backward(x, W_dec, norms, mean_f, ids)
        ctx.acts, ctx.dead_acts = acts, dead_acts
        weighted = None if norms is None or mean_f is None else norms.sum(-1) * mean_f
        rebuilt = None if ids is None or dead_acts is None else parallel.sum_features_(decode(dead_acts, W_dec[ids]))
        return parallel.sum_features_(decode(acts, W_dec)).add_(b_dec), weighted, rebuilt

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, e: Tensor | None, dweighted: Tensor | None, drebuilt: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_dec, norms, mean_f, ids = ctx.saved_tensors
        e = torch.zeros_like(x) if e is None else e
        slope = None if dweighted is None else dweighted * norms.sum(-1) / len(x)
        dW_dec, dW_enc, db_enc = gradients(ctx.acts, e, x, W_dec, slope)
        if dweighted is not None:
            add_norm_gradient(dW_dec, W_dec, norms, (dweighted * mean_f)[:, None].expand_as(norms))
        if drebuilt is not None:
            for total, part in zip(
                (dW_dec, dW_enc, db_enc), gradients(ctx.dead_acts, drebuilt, x, W_dec[ids]), strict=True
            ):
                total.index_add_(0, ids, part)
        return None, dW_enc.T, db_enc, dW_dec, e.sum(0), None, None, None, None, None


def _mean(acts: Acts) -> Float[Tensor, " F"]:
    if isinstance(acts, Tensor):
        return acts.mean(0)
    total = acts.values.new_zeros(acts.shape[1]).index_add_(0, acts.features, acts.values)
    return total / acts.shape[0]
