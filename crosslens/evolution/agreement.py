"""Agreement of neighbouring snapshots on the tokens where a feature is strongest.

A crosscoder computes each activation `f_i` from all snapshots together, so `f_i` cannot show whether two snapshots
agree on a feature. This check reads every snapshot on its own.

1. Score every token by the strength of feature i at snapshot s. With z the token's scaled activation minus the mean, C
   the covariance of z over tokens, and d_is the feature's decoder row:
   `by="filter"`      <z, (C + ridge tr(C)/D)^-1 d_is>: the component along d_is beyond its usual variation (default);
   `by="projection"`  <z, d_is> / |d_is|: the projection on the direction;
   `by="encoder"`     <z, W_enc[s, i]>: the snapshot's own term of the pre-activation.
   The filter is the linear reading with the least interference, and only needs the snapshot's own activations and
   decoder. In a crowded space other features dominate any single direction: in the demo's trained snapshots the
   feature is active on .11 to .18 of the top 20 tokens by projection, and on .29 to .45 of those by filter. Encoder
   terms are meaningful only as a sum: training does not determine which snapshot a feature is read from, and a term
   may only cancel the noise of another.
2. Keep the `n_top` held-out tokens with the largest strength at every snapshot.
3. The agreement of two neighbouring snapshots is the share of these tokens they have in common; chance is n_top /
   tokens. Reported beside it: the share of these tokens on which the crosscoder says the feature is active.

Limits: features with similar directions still interfere, so low agreement at low norms may be due to them; and two
snapshots may agree on tokens for another reason than the feature, such as the word. The filter needs more held-out
tokens than D. The check is new here.
Symbols: n tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import in_rounds
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_pairs
from crosslens.evolution.held_out import HeldOut, read
from crosslens.evolution.lifecycles import relative_norms, require_two_snapshots

_ENTRIES = 1 << 22  # strengths of features on tokens at a time: more do not fit the cache

_STRENGTHS = ("filter", "projection", "encoder")


@torch.no_grad()
def top_agreement(
    crosscoder: Crosscoder,
    acts: Activations | HeldOut,
    features: Int[Tensor, " n"] | None = None,
    *,
    n_top: int = 20,
    by: str = "filter",
    ridge: float = 1e-3,
    min_norm: float = 0.05,
) -> pd.DataFrame:
    """Compare the tokens on which a feature is strongest between every pair of neighbouring snapshots.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of its snapshots; the held-out ones are used.
        features: indices; all features active on these tokens if None.
        n_top: tokens per feature and snapshot.
        by: measure of strength: "filter", "projection" or "encoder".
        ridge: regularisation of the filter, as a share of the mean variance.
        min_norm: agreement is NaN where a decoder row is below this share of the feature's largest norm.

    Returns:
        A row per feature and pair: feature, snapshot and other (indices), label, other_label, step, other_step, norm
        (the smaller relative decoder norm of the two), agreement, active and other_active (share of the snapshot's top
        tokens on which the feature is active), chance.

    Raises:
        UserError: one snapshot only, unknown `by`, n_top out of range, activations that are not the crosscoder's.
    """
    S = crosscoder.n_snapshots
    require_two_snapshots("agreement", S)
    if by not in _STRENGTHS:
        raise UserError(f"by={by!r} is unknown: use {', '.join(map(repr, _STRENGTHS))}")
    if n_top < 1:
        raise UserError(f"n_top={n_top} must be at least 1")
    if not ridge > 0:
        raise UserError(f"ridge={ridge} must be above 0: it is a share of the mean variance, such as 1e-3")
    held = read(crosscoder, acts, purpose="Agreement")
    n = len(held)
    if n_top > n:
        raise UserError(f"n_top={n_top} is more than the {n} held-out tokens: ask for at most {n // 2}")
    active = (held.f > 0).astype(bool)
    ids = torch.from_numpy(np.flatnonzero(active.sum(0))) if features is None else features
    active = active.tocsc()[:, ids.numpy()]
    block = max(1, _ENTRIES // n)  # of features
    filters = held.covariances if by == "filter" else None  # by all processes, before they part

    def strongest(s: int) -> tuple[Int[Tensor, "n k"], Float64[Tensor, " n"]]:
        centred = (held.x[s] - held.means[s].float()).to(held.device)
        if filters is not None:  # they are symmetric: applied to the tokens, which are fewer than the features
            centred = centred @ _inverse(filters[s], ridge).to(centred)
        top = torch.cat([_top(_directions(crosscoder, part, s, by), centred, n_top) for part in ids.split(block)])
        rows = active[top.numpy().flatten(), np.arange(len(ids)).repeat(n_top)]
        return top, torch.from_numpy(np.reshape(rows, (-1, n_top)).mean(1))

    agreement, share = (torch.empty(len(ids), size, dtype=torch.float64) for size in (S - 1, S))
    before = torch.empty(0)
    for s, (top, share[:, s]) in enumerate(in_rounds(strongest, range(S))):
        if s:
            agreement[:, s - 1] = _shared(before, top)
        before = top
    v = relative_norms(crosscoder.decoder_norms)[ids]
    smaller = torch.minimum(v[:, 1:], v[:, :-1])
    if by != "encoder":
        agreement = agreement.masked_fill(~(smaller >= min_norm), torch.nan)
    place = np.tile(np.arange(S - 1), len(ids))
    table = snapshot_pairs(crosscoder, place, place + 1, ("label", "step"))
    table.insert(0, "feature", ids.repeat_interleave(S - 1).numpy())
    for name, values in (
        ("norm", smaller), ("agreement", agreement), ("active", share[:, :-1]), ("other_active", share[:, 1:])
    ):  # fmt: skip
        table[name] = values.flatten().numpy()
    return table.assign(chance=n_top / n)


def _top(rows: Float[Tensor, "b D"], x: Float[Tensor, "n D"], k: int) -> Int[Tensor, "b k"]:
    """The k tokens with the largest inner products with each row, in their order; ties go to the earlier token."""
    strength = (rows @ x.T).float()
    values, places = strength.topk(min(k + 1, len(x)), dim=1)
    # of equal values topk takes any: where the next one is equal to the last, the order decides
    tied = (values[:, k:] == values[:, k - 1 : k]).any(1)
    places = places[:, :k]
    if tied.any():
        places[tied] = strength[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return places.sort(dim=1).values.cpu()


def _shared(one: Int[Tensor, "f k"], other: Int[Tensor, "f k"]) -> Float[Tensor, " f"]:
    """Share of the tokens in both."""
    both = torch.cat([one, other], 1).sort(dim=1).values
    return (both[:, 1:] == both[:, :-1]).sum(1).double() / one.shape[1]


def _inverse(covariance: Float[Tensor, "D D"], ridge: float) -> Float[Tensor, "D D"]:
    """Inverse of the regularised covariance."""
    size = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.inv(covariance + ridge * size * torch.eye(len(covariance)))


def _directions(crosscoder: Crosscoder, ids: Int[Tensor, " b"], s: int, by: str) -> Float[Tensor, "b D"]:
    """Vectors whose inner products with tokens are the strengths at snapshot s, up to a factor per feature."""
    return crosscoder.W_enc_by_snapshot[s][:, ids].T if by == "encoder" else crosscoder.W_dec_by_snapshot[ids, s]
