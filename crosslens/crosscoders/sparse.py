"""The TopK and BatchTopK training step on active pairs: only the encoder's forward product is dense.

A pair (b, i) is active when token b keeps feature i; B * k of the B * F pairs are. With the pairs in CSR order:

1. h = x W_enc + b_enc                      one dense product, outside autograd
2. pairs = the entries that the scores keep; f = relu(h) there
3. x_hat = sum over pairs f W_dec[i]        embedding-bag over rows of W_dec
4. backward, e = d loss / d x_hat:
       df[b, i]  = <e_b, W_dec[i]>          sampled product on the pairs, 0 where f is 0
       dW_dec[i] = sum_b f[b, i] e_b        embedding-bag over the transposed index
       dW_enc[i] = sum_b df[b, i] x_b       the same, with df

Exactly the gradients of the dense autograd code, which stays in `base` and `topk` as the reference.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

# torch says so once per process; the sampled product is all that is used of CSR
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

SAMPLE = 1 << 16  # entries looked at for the first bound on the threshold


@dataclass(frozen=True)
class Pairs:
    """Active (token, feature) pairs, sorted by token.

    Attributes:
        tokens: token b of each pair.
        features: feature i of each pair.
        values: f = relu(h) of each pair.
        shape: (B, F).
    """

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    shape: tuple[int, int]

    def to_sparse(self) -> Tensor:
        """Feature activations (B, F) as a coalesced COO tensor."""
        indices = torch.stack([self.tokens, self.features])
        return torch.sparse_coo_tensor(indices, self.values, self.shape, is_coalesced=True, check_invariants=False)


@torch.no_grad()
def batch_top_pairs(hidden_pre: Float[Tensor, "B F"], scores: Float[Tensor, "B F"], count: int) -> Pairs:
    """The `count` largest positive scores of a whole batch; of equal scores the earlier ones."""
    flat = scores.flatten()
    threshold = kth_largest(flat, count)
    # what is not smaller, instead of what is larger: NaN is chosen, and shows in the loss
    chosen = ((flat < threshold) | (flat <= 0)).logical_not_().nonzero().flatten()
    if len(chosen) > count:
        values = flat[chosen]
        tied = (values == threshold).nonzero().flatten()
        free = count - (len(chosen) - len(tied))
        dropped = torch.ones_like(values, dtype=torch.bool).index_fill_(0, tied[free:], False)
        chosen = chosen[dropped]
    n_features = scores.shape[1]
    return Pairs(
        chosen // n_features, chosen % n_features, hidden_pre.flatten()[chosen].relu(), (len(scores), n_features)
    )


@torch.no_grad()
def token_top_pairs(hidden_pre: Float[Tensor, "B F"], scores: Float[Tensor, "B F"], k: int) -> Pairs:
    """The k largest scores of every token."""
    features = scores.topk(k, dim=-1, sorted=False).indices.sort(-1).values
    tokens = torch.arange(len(scores), device=scores.device).repeat_interleave(k)
    return Pairs(
        tokens, features.flatten(), hidden_pre.gather(1, features).relu().flatten(), (len(scores), scores.shape[1])
    )


def kth_largest(flat: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest entry, exactly: a strided sample bounds it from below, the survivors decide."""
    stride = max(1, flat.numel() // SAMPLE)
    sample = flat[::stride]
    rank = min(sample.numel(), int(1.3 * k / stride) + 64)
    bound = sample.topk(rank).values[-1]
    survivors = flat[flat >= bound]
    if survivors.numel() < k:
        survivors = flat
    return survivors.topk(k, sorted=False).values.amin()


def decode_pairs(
    x: Float[Tensor, "B N"],
    pairs: Pairs,
    W_enc: Float[Tensor, "N F"],
    b_enc: Float[Tensor, " F"],
    W_dec: Float[Tensor, "F N"],
) -> Float[Tensor, "B N"]:
    """`f W_dec` over active pairs, with gradients for both matrices and the encoder bias."""
    out = _DecodePairs.apply(x, W_enc, b_enc, W_dec, pairs.tokens, pairs.features, pairs.values)
    assert isinstance(out, Tensor)
    return out


class _DecodePairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, tokens: Tensor, features: Tensor, f: Tensor
    ) -> Tensor:
        del W_enc, b_enc
        ctx.save_for_backward(x, W_dec, tokens, features, f)
        return embedding_bag(features, W_dec, _offsets(tokens, len(x))[:-1], mode="sum", per_sample_weights=f)

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_dec, tokens, features, f = ctx.saved_tensors
        F = len(W_dec)
        rows = _offsets(tokens, len(x))
        pattern = torch.sparse_csr_tensor(rows, features, torch.zeros_like(f), (len(x), F), check_invariants=False)
        df = torch.sparse.sampled_addmm(pattern, e, W_dec.T, beta=0.0).values()
        df = torch.where(f > 0, df, torch.zeros_like(df))
        order = features.argsort(stable=True)
        transposed = _offsets(features[order], F)[:-1]
        by_feature = tokens[order]
        dW_dec = embedding_bag(by_feature, e, transposed, mode="sum", per_sample_weights=f[order])
        dW_enc = embedding_bag(by_feature, x, transposed, mode="sum", per_sample_weights=df[order])
        db_enc = torch.zeros(F, dtype=f.dtype, device=f.device).index_add_(0, features, df)
        return None, dW_enc.T, db_enc, dW_dec, None, None, None


def _offsets(sorted_ids: Int[Tensor, " n"], n: int) -> Int[Tensor, " m"]:
    """CSR row pointers (n + 1) of ids in ascending order."""
    counts = torch.bincount(sorted_ids, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
