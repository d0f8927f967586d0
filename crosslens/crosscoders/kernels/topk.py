"""Which (token, feature) pairs a gate keeps, found without sorting or copying the B * F pre-activations.

- TopK (`token_top_pairs`): the k largest scores of each token.
- BatchTopK (`batch_top_pairs`): the largest scores of a whole batch.
- ReLU and JumpReLU (`pairs_above`): every pre-activation above the bound of its feature.

The first two start from a lower bound on the threshold, list the pairs above it, and take the exact k-th value among
those. Equal scores are kept in order of position.

On a GPU, the host waits wherever the size of a result depends on values. Listing pairs is one such wait; nothing else
here waits if one process holds all features: positions of a known number of marks come from a sort, and TopK always
returns k pairs a token, with the value 0 where it has fewer positive scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.distributed.strategy import ONE_PROCESS, Strategy

SAMPLE = 1 << 14  # entries sampled for the first bound on a batch's threshold
BLOCK = 1 << 18  # entries of a (tokens, F) block on a CPU: it stays in the cache
GPU_BLOCK = 1 << 29  # the same on a GPU, where the host waits for each
GPU_ROWS = 1 << 25  # the same where it does not wait
# with few threads, numpy compares, lists positions and partitions three times as fast as torch
NUMPY_THREADS, NUMPY_DTYPES = 2, (torch.float32, torch.float64)


@dataclass(frozen=True)
class Pairs:
    """Active (token, feature) pairs, sorted by token.

    Attributes:
        tokens: token b of each pair.
        features: feature i of each pair.
        values: f = h of each pair, positive; 0 for a pair that is not active, which has no gradient.
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
        ordered, order = self.features.int().sort(stable=True)  # half the bytes, half the time
        return order, row_pointers(ordered, self.shape[1])

    def select(self, which: Int[Tensor, " m"]) -> Pairs:
        """The pairs at the positions `which`, which are in order."""
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


def marked(mask: Bool[Tensor, " n"], count: int | None = None) -> Int[Tensor, " m"]:
    """Positions of the marks, in order; the host waits for a GPU unless it knows their number."""
    if count is None or not mask.is_cuda:
        return mask.nonzero().flatten()
    return mask.logical_not().byte().sort(stable=True).indices[:count]


def row_pointers(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " m"]:
    """CSR row pointers (n + 1) of ids in ascending order."""
    # counting them would make the host wait for a GPU
    return torch.searchsorted(sorted_ids, torch.arange(n + 1, dtype=sorted_ids.dtype, device=sorted_ids.device))


@torch.no_grad()
def batch_top_pairs(
    hidden_pre: Float[Tensor, "B F"], norms: Float[Tensor, " F"], count: int, strategy: Strategy = ONE_PROCESS
) -> tuple[Pairs, Float[Tensor, " n"]]:
    """The `count` largest positive scores `relu(h) n` of a batch, and those scores; of equal ones the earlier.

    The lower bound comes from a sample of the entries. With several processes, each returns its own pairs among the
    `count` largest of all.
    """
    # slightly lower, because the division rounds
    bound = 0.999 * _sampled_bound(hidden_pre, norms, count, strategy)
    pairs = pairs_above(hidden_pre, _over(bound, norms))
    if strategy.count(len(pairs.values)) < count:
        pairs = pairs_above(hidden_pre, _over(torch.zeros_like(bound), norms))
    scores = pairs.values * norms.index_select(0, pairs.features)
    n_found = strategy.count(len(scores))
    if n_found <= count:
        return _keep(pairs, scores, scores > 0)
    kth, n_tied = strategy.kth_largest(scores, count)
    kept = (scores > kth) | strategy.earliest(scores == kth, pairs.tokens, pairs.features, pairs.shape, n_tied)
    if hidden_pre.is_cuda and strategy.alone:
        which = marked(kept | scores.isnan(), count)
        return pairs.select(which), scores.index_select(0, which)
    return _keep(pairs, scores, kept & (scores > 0))


@torch.no_grad()
def token_top_pairs(
    hidden_pre: Float[Tensor, "B F"], norms: Float[Tensor, " F"], k: int, strategy: Strategy = ONE_PROCESS
) -> Pairs:
    """The k largest positive scores `relu(h) n` of every token; of equal ones the earlier.

    The lower bound of a token is the k-th largest of the maxima of groups of features. With several processes, each
    returns its own pairs among the k largest of all.
    """
    here = min(k, hidden_pre.shape[1])
    if hidden_pre.is_cuda and strategy.alone:
        return _top_of_rows(hidden_pre, norms, here)
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
    kth, allowed = strategy.kth_per_token(padded.topk(k, dim=-1, sorted=False).values)
    return _keep(pairs, scores, first_largest(padded, kth, allowed)[pairs.tokens, rank])[0]


def pairs_of(hidden_pre: Float[Tensor, "B F"], mask: Bool[Tensor, "B F"]) -> Pairs:
    """The marked pairs."""
    return _pairs_at(hidden_pre, mask.flatten().nonzero().flatten())


@torch.no_grad()
def pairs_above(hidden_pre: Float[Tensor, "B F"], bounds: Float[Tensor, " F"]) -> Pairs:
    """The pairs with `h > bound` of their feature. NaN is kept, so that it shows in the loss."""
    found = [_where_above(block, bounds).add_(start * hidden_pre.shape[1]) for start, block in _blocks(hidden_pre)]
    return _pairs_at(hidden_pre, torch.cat(found))


def top_of_tokens(scores: Float[Tensor, "B n"], k: int) -> Bool[Tensor, "B n"]:
    """Mask of the k largest positive scores of every token; of equal ones the earlier. NaN counts as the largest."""
    if numpy_is_faster(scores):
        values = scores.numpy()
        kth = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k, None]
        mask = (values >= kth) & (values > 0)
        # else some token has more scores that equal its k-th than it may keep, or NaN, and the general form decides
        if np.count_nonzero(mask, axis=1).max() <= k and not np.isnan(values.sum()):
            return torch.from_numpy(mask)
    return first_largest(scores, kth_of_rows(scores, k), k) & ~(scores <= 0)


def kth_of_rows(scores: Float[Tensor, "*B n"], k: int) -> Float[Tensor, "*B 1"]:
    """The k-th largest value in the last dimension; NaN ranks first, and infinity stands for it."""
    top = scores.topk(k, dim=-1, sorted=False).values
    return torch.where(top.isnan(), torch.inf, top).amin(-1, keepdim=True)


def first_largest(scores: Float[Tensor, "*B n"], kth: Tensor, k: int | Tensor) -> Bool[Tensor, "*B n"]:
    """Mask of the k largest entries in the last dimension, given the k-th largest value; of equal ones the earlier."""
    larger, tied = (scores > kth) | scores.isnan(), scores == kth
    return larger | (tied & (tied.cumsum(-1, dtype=torch.int32) <= k - larger.sum(-1, keepdim=True)))


def density(hidden_pre: Float[Tensor, "B F"], bounds: Float[Tensor, " F"]) -> float:
    """Fraction of pairs with `h > bound`, estimated on every sixteenth token."""
    sample = hidden_pre[::16]
    return float((sample > bounds).count_nonzero()) / max(1, sample.numel())


def _top_of_rows(hidden_pre: Float[Tensor, "B F"], norms: Float[Tensor, " F"], k: int) -> Pairs:
    """k pairs of every token: those that `top_of_tokens` keeps, and others with the value 0 if they are fewer."""
    features: list[Tensor] = []
    values: list[Tensor] = []
    for block in hidden_pre.split(max(1, GPU_ROWS // hidden_pre.shape[1])):
        kept = top_of_tokens(block.relu() * norms, k)
        which = kept.to(block.dtype).topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        features.append(which)
        values.append(torch.where(kept.gather(1, which), block.gather(1, which), 0.0))
    tokens = torch.arange(len(hidden_pre), device=hidden_pre.device)[:, None].expand(-1, k)
    shape = hidden_pre.shape[0], hidden_pre.shape[1]
    return Pairs(tokens.flatten(), torch.cat(features).flatten(), torch.cat(values).flatten(), shape)


def numpy_is_faster(x: Tensor) -> bool:
    """Whether numpy compares, lists positions and partitions faster than torch."""
    return x.dtype in NUMPY_DTYPES and x.device.type == "cpu" and torch.get_num_threads() <= NUMPY_THREADS


def _grouped(scores: Float[Tensor, "B F"], k: int) -> Float[Tensor, "B G"]:
    """Maxima of at least 2 k equal groups of features; the features themselves if they cannot be grouped."""
    size = 1
    while scores.shape[1] % (2 * size) == 0 and scores.shape[1] // (2 * size) >= 2 * k:
        size *= 2
    return scores.unflatten(1, (-1, size)).amax(-1)


def _sampled_bound(hidden_pre: Tensor, norms: Tensor, count: int, strategy: Strategy) -> Tensor:
    flat = hidden_pre.flatten()
    # an odd stride visits all features of a dictionary whose size is a power of two
    stride = max(1, flat.numel() // SAMPLE) | 1
    which = torch.arange(0, flat.numel(), stride, device=flat.device)
    sample = flat.index_select(0, which) * norms.index_select(0, which % len(norms))
    expected = count / stride
    rank = min(strategy.count(len(sample)), int(expected + 5 * expected**0.5) + 16)
    return strategy.kth_largest(sample.clamp_min(0), rank)[0]


def _over(bound: Tensor, norms: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
    """What h must exceed for its score to exceed `bound`; nothing does where the norm is 0."""
    return torch.where(norms == 0, torch.inf, bound / norms)


def _where_above(block: Float[Tensor, "b F"], bounds: Tensor) -> Int[Tensor, " n"]:
    """Flat positions of the entries that are not `<= bounds`."""
    if numpy_is_faster(block):
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
    """The next smaller number, at least 0: `score > that` keeps positive scores of at least `bound`."""
    return torch.nextafter(bound, torch.full_like(bound, -torch.inf)).clamp_min(0)


def _blocks(hidden_pre: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, (BLOCK if hidden_pre.device.type == "cpu" else GPU_BLOCK) // hidden_pre.shape[1])
    for start in range(0, len(hidden_pre), rows):
        yield start, hidden_pre[start : start + rows]
