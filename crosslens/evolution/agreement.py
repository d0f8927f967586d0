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
2. Keep the `n_top` held-out tokens with the largest strength at every snapshot, in one pass over batches of tokens.
   The means and covariances that strengths are measured by come from a reading before it, without encoding.
3. The agreement of two neighbouring snapshots is the share of these tokens they have in common; chance is n_top /
   tokens. Reported beside it: the share of these tokens on which the crosscoder says the feature is active.

Limits: features with similar directions still interfere, so low agreement at low norms may be due to them; and two
snapshots may agree on tokens for another reason than the feature, such as the word. The filter needs more held-out
tokens than D. The check is new here.
Symbols: B tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_pairs
from crosslens.evolution.held_out import Block, check_activations, read, read_activations
from crosslens.evolution.lifecycles import relative_norms, require_two_snapshots

_BLOCK = 1024  # features at a time
_STRENGTHS = ("filter", "projection", "encoder")


@torch.no_grad()
def top_agreement(
    crosscoder: Crosscoder,
    acts: Activations,
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
    tokens = TopTokens(crosscoder, features, n_top=n_top, by=by, ridge=ridge, min_norm=min_norm)
    check_activations(crosscoder, acts)
    moments = Moments(crosscoder)
    for x in read_activations(crosscoder, acts):
        moments.add(x)
    tokens.start(moments)
    read(crosscoder, acts, tokens, purpose="Agreement")
    return tokens.result()


class Moments:
    """Means and covariances of the scaled activations of every snapshot, in float64."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        S, D = crosscoder.n_snapshots, crosscoder.d_model
        self.crosscoder = crosscoder
        self.total, self.squares, self.n = torch.zeros(S, D).double(), torch.zeros(S, D, D).double(), 0

    def add(self, x: Float[Tensor, "B S D"]) -> None:
        """Take the next tokens."""
        scaled = self.crosscoder.scale(x).double().cpu().transpose(0, 1)
        self.total += scaled.sum(1)
        self.squares += scaled.mT @ scaled
        self.n += len(x)

    def result(self) -> tuple[Float[Tensor, "S D"], Float[Tensor, "S D D"]]:
        """Means and covariances."""
        mean = self.total / max(self.n, 1)
        return mean, self.squares / max(self.n, 1) - mean[:, :, None] * mean[:, None]


class TopTokens:
    """The accumulator of `top_agreement`: the tokens on which features are strongest, and whether f_i > 0 there.

    `start` takes the moments, which are needed before the first token.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        features: Int[Tensor, " n"] | None = None,
        *,
        n_top: int = 20,
        by: str = "filter",
        ridge: float = 1e-3,
        min_norm: float = 0.05,
    ) -> None:
        S = crosscoder.n_snapshots
        require_two_snapshots("agreement", S)
        if by not in _STRENGTHS:
            raise UserError(f"by={by!r} is unknown: use {', '.join(map(repr, _STRENGTHS))}")
        if n_top < 1:
            raise UserError(f"n_top={n_top} must be at least 1")
        if not ridge > 0:
            raise UserError(f"ridge={ridge} must be above 0: it is a share of the mean variance, such as 1e-3")
        self.crosscoder, self.by, self.ridge, self.min_norm, self.n_top = crosscoder, by, ridge, min_norm, n_top
        self.every = features is None
        self.ids = torch.arange(crosscoder.cfg.d_sae) if features is None else features
        shape = (len(self.ids), S, n_top)
        self.values, self.places = torch.full(shape, -torch.inf), torch.full(shape, -1, dtype=torch.int32)
        self.active = torch.zeros(shape, dtype=torch.bool)
        self.fires = torch.zeros(len(self.ids), dtype=torch.bool)
        self.n = 0

    def start(self, moments: Moments) -> None:
        """Take what strengths are measured by."""
        mean, covariance = moments.result()
        self.mean = mean.to(self.crosscoder.W_dec)
        if self.by == "filter":
            self.inverse = _inverse(covariance, self.ridge).to(self.crosscoder.W_dec)

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        centred = (block.scaled - self.mean).transpose(0, 1)
        if self.by == "filter":  # it is symmetric: applied to the tokens, which are fewer than the features
            centred = centred @ self.inverse
        for start in range(0, len(self.ids), _BLOCK):
            part = slice(start, start + _BLOCK)
            chosen = self.ids[part].to(block.x.device)
            active = block.features[:, chosen].T > 0
            self.fires[part] |= active.any(1).cpu()
            for s in range(self.crosscoder.n_snapshots):
                strength = _directions(self.crosscoder, chosen, s, self.by) @ centred[s].T
                self._keep(part, s, strength.float(), active, block.first)
        self.n += len(block)

    def _keep(
        self, part: slice, s: int, strength: Float[Tensor, "b B"], active: Bool[Tensor, "b B"], first: int
    ) -> None:
        """Join the largest strengths so far with the largest new ones; ties go to the earlier token."""
        k = min(self.n_top, strength.shape[1])
        values, places = strength.topk(k, dim=1)
        # of equal values topk takes any
        tied = (strength >= values[:, -1:]).sum(1) > k
        if tied.any():
            places[tied] = strength[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
        places = places.sort(dim=1).values
        new = (strength.gather(1, places).cpu(), (places + first).int().cpu(), active.gather(1, places).cpu())
        kept = (self.values, self.places, self.active)
        whole = [torch.cat([old[part, s], more], 1) for old, more in zip(kept, new, strict=True)]
        order = whole[0].sort(dim=1, descending=True, stable=True).indices[:, : self.n_top].sort(dim=1).values
        for old, more in zip(kept, whole, strict=True):
            old[part, s] = more.gather(1, order)

    def result(self) -> pd.DataFrame:
        """The table of `top_agreement`.

        Raises:
            UserError: fewer tokens than n_top.
        """
        if self.n_top > self.n:
            raise UserError(
                f"n_top={self.n_top} is more than the {self.n} held-out tokens: ask for at most {self.n // 2}"
            )
        S = self.crosscoder.n_snapshots
        v = relative_norms(self.crosscoder.decoder_norms)[self.ids]
        smaller = torch.minimum(v[:, 1:], v[:, :-1])
        agreement = self._shared()
        if self.by != "encoder":
            agreement = agreement.masked_fill(~(smaller >= self.min_norm), torch.nan)
        active = self.active.double().mean(-1)
        kept = self.fires if self.every else torch.ones_like(self.fires)
        before = np.tile(np.arange(S - 1), int(kept.sum()))
        table = snapshot_pairs(self.crosscoder, before, before + 1, ("label", "step"))
        table.insert(0, "feature", self.ids[kept].repeat_interleave(S - 1).numpy())
        for name, values in (
            ("norm", smaller), ("agreement", agreement), ("active", active[:, :-1]), ("other_active", active[:, 1:])
        ):  # fmt: skip
            table[name] = values[kept].flatten().numpy()
        return table.assign(chance=self.n_top / self.n)

    def _shared(self) -> Float[Tensor, "n S1"]:
        """Share of the tokens that neighbouring snapshots have in common."""
        n, S, k = self.places.shape
        out = torch.empty(n, S - 1, dtype=torch.float64)
        for start in range(0, n, _BLOCK):
            part = slice(start, start + _BLOCK)
            one, other = self.places[part, :-1, :, None], self.places[part, 1:, None, :]
            out[part] = (one == other).sum((-1, -2)).double() / k
        return out


def _inverse(covariance: Float[Tensor, "S D D"], ridge: float) -> Float[Tensor, "S D D"]:
    """Inverses of the regularised covariances."""
    size = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    covariance = covariance + (ridge * size)[:, None, None] * torch.eye(covariance.shape[1]).double()
    # one at a time: in PyTorch 2.13 with several threads, batches of matrices of 160 rows or more fail or hang
    return torch.stack([torch.linalg.inv(matrix) for matrix in covariance])


def _directions(crosscoder: Crosscoder, ids: Int[Tensor, " b"], s: int, by: str) -> Float[Tensor, "b D"]:
    """Vectors whose inner products with tokens are the strengths at snapshot s, up to a factor per feature."""
    return crosscoder.W_enc_by_snapshot[s][:, ids].T if by == "encoder" else crosscoder.W_dec_by_snapshot[ids, s]
