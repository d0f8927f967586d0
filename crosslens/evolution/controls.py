"""Controls on single features: is one really absent where its decoder is small, and where is it read from?

1. Latent scaling (after Minder et al., arXiv 2504.02922, extended to S snapshots). A penalty on decoder norms shrinks
   decoder rows, so a small row may be due to the penalty and not to the model. With
   r = x_s - x_hat_s + f_is W_dec[i, s], the residual with the feature's own contribution added back, and d a unit
   direction, the least-squares coefficient

       beta_is = E[f_i <r, d>] / E[f_i^2]

   is how much of d there is per unit of f_i that no other feature explains. It equals the decoder norm if the
   reconstruction is right. d is the decoder row at s (`own`) or at the feature's peak (`peak`). TopK and BatchTopK
   have no penalty: once they are trained, E[f_i (x_s - x_hat_s)] = 0, and beta is the decoder norm.
2. Encoder share: the pre-activation is a sum over snapshots, h_i = sum_s x_s W_enc[s, i] + b_i. The share of s is its
   part of the rise of h_i from all tokens to those where the feature is active. It exposes features that are read from
   later snapshots than those where they are present. This measure is new here.

The sums run over the held-out tokens once, in blocks, and over active (token, feature) pairs only. x is scaled.
Symbols: B tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import DECLARATIONS, Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.lifecycles import check_activations, held_out_features

_BLOCK = 4096  # features at a time


@dataclass(frozen=True)
class LatentScaling:
    """Least-squares coefficients of decoder directions, in units of decoder norms; NaN for features that never fire.

    Attributes:
        own: on residuals, along the decoder row at the same snapshot (NaN where that row is zero).
        peak: on residuals, along the decoder row at the snapshot of the largest norm.
        norms: decoder norms to compare with. If `own` is far above the norm, the row is shrunk.
    """

    own: Float[Tensor, "F S"]
    peak: Float[Tensor, "F S"]
    norms: Float[Tensor, "F S"]

    def to_frame(self, labels: list[str]) -> pd.DataFrame:
        """A row per feature: feature, own/<label>, peak/<label>.

        Args:
            labels: S names of the snapshots.
        """
        columns: dict[str, Any] = {"feature": np.arange(len(self.norms))}
        for name in ("own", "peak"):
            values = getattr(self, name).numpy()
            columns |= {f"{name}/{label}": values[:, s] for s, label in enumerate(labels)}
        return pd.DataFrame(columns)


@torch.no_grad()
def latent_scaling(crosscoder: Crosscoder, acts: Activations) -> LatentScaling:
    """Measure how much of each feature's direction is in the activations of every snapshot.

    Args:
        crosscoder: a crosscoder with an architecture that penalises decoder norms (Standard or JumpReLU).
        acts: activations of its snapshots; the held-out ones are used.

    Raises:
        UserError: a TopK or BatchTopK crosscoder, no activations held out, or activations of other snapshots.
    """
    if not penalises_decoder(crosscoder):
        raise UserError(
            f"latent_scaling is meaningless for {crosscoder.cfg.architecture()}, where it equals the decoder norm: use "
            "decoder_norms, or a standard or jumprelu crosscoder"
        )
    check_activations(crosscoder, acts)
    F, S = crosscoder.cfg.d_sae, crosscoder.n_snapshots
    decoder, norms = crosscoder.W_dec_by_snapshot, crosscoder.decoder_norms
    peak = norms.argmax(1)
    # <r, W_own> and <r, W_peak>, weighted by f; divided by the length of W at the end
    sums = torch.zeros(2, F, S, dtype=torch.float64)
    squares = torch.zeros(F, dtype=torch.float64)
    for x, features in held_out_features(crosscoder, acts, "Latent scaling"):
        scaled = crosscoder.scale(x)
        error = scaled - crosscoder.decode_flat(features).view_as(scaled)
        squares += features.double().square().sum(0).cpu()
        blocks = [(part, features[:, part].to_sparse().t().coalesce()) for part in _active(features).split(_BLOCK)]
        for s in range(S):
            # add the feature's own contribution back: sum f f_is <W_is, d>
            gated = (features * crosscoder.snapshot_acts(features, s)).sum(0)
            for part, by_feature in blocks:
                own, top = decoder[part, s], decoder[part, peak[part]]
                left = by_feature @ error[:, s] + gated[part, None] * own
                sums[:, part.cpu(), s] += torch.stack([(left * row).sum(1) for row in (own, top)]).double().cpu()
    lengths = norms.double().cpu()
    at_peak = lengths.amax(1, keepdim=True).expand(F, S)
    found = sums / squares[:, None] / torch.stack([lengths, at_peak])
    found = torch.where(found.isfinite(), found, torch.nan)
    return LatentScaling(*found, norms=lengths)


def penalises_decoder(crosscoder: Crosscoder) -> bool:
    """Whether the training loss shrinks decoder norms."""
    return DECLARATIONS[crosscoder.cfg.architecture()].penalises_decoder


@torch.no_grad()
def encoder_share(crosscoder: Crosscoder, acts: Activations) -> Float[Tensor, "F S"]:
    """Compute the share of every snapshot in what makes a feature active; rows sum to 1.

    With p_is = x_s W_enc[s, i], the contribution of snapshot s, and expectations over all tokens and over those where
    f_i > 0: `(E[p_is | active] - E[p_is]) / sum_s' (E[p_is' | active] - E[p_is'])`. A share is negative if a snapshot
    inhibits the feature; other shares can then exceed 1.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; the held-out ones are used.

    Returns:
        Shares, NaN for features that are never active, or always.

    Raises:
        UserError: no activations held out, or activations of other snapshots.
    """
    check_activations(crosscoder, acts)
    F, S, D = crosscoder.cfg.d_sae, crosscoder.n_snapshots, crosscoder.d_model
    encoder = crosscoder.W_enc_by_snapshot
    sums, counts, n = torch.zeros(F, S, dtype=torch.float64), torch.zeros(F, dtype=torch.float64), 0
    total = torch.zeros(S, D, dtype=torch.float64)
    for x, features in held_out_features(crosscoder, acts, "Encoder shares"):
        n += len(x)
        scaled, active = crosscoder.scale(x), (features > 0).to(x.dtype)
        total += scaled.double().sum(0).cpu()
        counts += active.sum(0).cpu()
        for part in _active(active).split(_BLOCK):
            by_feature = active[:, part].to_sparse().t().coalesce()
            for s in range(S):
                found = ((by_feature @ scaled[:, s]) * encoder[s, :, part].T).sum(1)
                sums[part.cpu(), s] += found.double().cpu()
    rest = torch.stack([total[s] @ encoder[s].double().cpu() for s in range(S)], 1) / n
    rise = sums / counts[:, None] - rest
    rise = rise.masked_fill((counts == n)[:, None], torch.nan)
    return rise / rise.sum(1, keepdim=True)


def _active(features: Float[Tensor, "B F"]) -> Tensor:
    return features.any(0).nonzero().flatten()
