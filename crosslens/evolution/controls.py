"""Controls on single features: is one really absent where its decoder is small, and where is it read from?

1. Latent scaling (after Minder et al., arXiv 2504.02922, extended to S snapshots). A penalty on decoder norms shrinks
   decoder rows, so a small row may be due to the penalty and not to the model. With
   r = x_s - x_hat_s + f_is W_dec[i, s], the residual with the feature's own contribution added back, and d a unit
   direction, the least-squares coefficient

       beta_is = E[f_i <r, d>] / E[f_i^2]

   is how much of d there is per unit of f_i that no other feature explains. It equals the decoder norm if the
   reconstruction is right. d is the decoder row at s (`own`) or at the feature's peak (`peak`). Without
   a penalty, once a crosscoder is trained, E[f_i (x_s - x_hat_s)] = 0, and beta is the decoder norm.
2. Encoder share: the pre-activation is a sum over snapshots, h_i = sum_s x_s W_enc[s, i] + b_i. The share of s is its
   part of the rise of h_i from all tokens to those where the feature is active. It exposes features that are read from
   later snapshots than those where they are present. This measure is new here.

The sums run over active (token, feature) pairs only. x is scaled.
Symbols: B tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import DECLARATIONS, Crosscoder
from crosslens.distributed.together import each
from crosslens.errors import UserError
from crosslens.evolution.columns import per_feature, snapshot_columns
from crosslens.evolution.held_out import HeldOut, read, sums_by_column
from crosslens.evolution.measures import measure


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
        return per_feature(labels, own=self.own, peak=self.peak)


@torch.no_grad()
def latent_scaling(crosscoder: Crosscoder, acts: Activations | HeldOut) -> LatentScaling:
    """Measure how much of each feature's direction is in the activations of every snapshot.

    Args:
        crosscoder: of an architecture that penalises decoder norms.
        acts: activations of its snapshots; the held-out ones are used.

    Raises:
        UserError: an architecture without such a penalty, no activations held out, or activations of other snapshots.
    """
    if not penalises_decoder(crosscoder):
        others = " or ".join(name for name, each in DECLARATIONS.items() if each.penalises_decoder)
        raise UserError(
            f"latent_scaling is meaningless for {crosscoder.cfg.architecture()}, where it equals the decoder norm: use "
            f"decoder_norms, or a {others}"
        )
    held = read(crosscoder, acts, purpose="Latent scaling")
    decoder, norms = crosscoder.W_dec_by_snapshot, crosscoder.decoder_norms.detach()
    at_peak = decoder[torch.arange(len(decoder), device=decoder.device), norms.argmax(1)]
    columns = held.f.tocsc()
    squares = torch.from_numpy(columns.astype(np.float64).power(2).sum(0))

    def sums_at(s: int) -> Float64[Tensor, "2 F"]:
        own, gated = decoder[:, s].contiguous(), held.gated(s)
        left = held.x[s].to(held.device) - crosscoder.b_dec_by_snapshot[s]
        left -= sums_by_column(gated.T.tocsc(), own)  # the transpose: by token
        # add the feature's own contribution back: sum f f_is <W_is, d>
        twice = torch.from_numpy(columns.multiply(gated.tocsc()).sum(0)).to(own)
        found = sums_by_column(columns, left).addcmul_(twice[:, None], own)
        return torch.stack([(found * row).sum(1).double().cpu() for row in (own, at_peak)])

    sums = torch.stack(each(sums_at, range(crosscoder.n_snapshots)), -1)
    lengths = norms.double().cpu()
    found = sums / squares[:, None] / torch.stack([lengths, lengths.amax(1, keepdim=True).expand_as(lengths)])
    found = torch.where(found.isfinite(), found, torch.nan)
    return LatentScaling(*found, norms=lengths)


@measure("scaling")
def _scaling(held: HeldOut) -> pd.DataFrame | None:
    if not penalises_decoder(held.crosscoder):
        return None
    labels = snapshot_columns(held.crosscoder)["label"].tolist()
    return latent_scaling(held.crosscoder, held).to_frame(labels)


def penalises_decoder(crosscoder: Crosscoder) -> bool:
    """Whether the training loss shrinks decoder norms."""
    return DECLARATIONS[crosscoder.cfg.architecture()].penalises_decoder


@torch.no_grad()
def encoder_share(crosscoder: Crosscoder, acts: Activations | HeldOut) -> Float[Tensor, "F S"]:
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
    held = read(crosscoder, acts, purpose="Encoder shares")
    active = (held.f > 0).astype(np.float32).tocsc()
    counts = torch.from_numpy(active.sum(0)).double()
    found: list[Tensor] = []
    for x, mean, encoder in zip(held.x, held.means, crosscoder.W_enc_by_snapshot.detach(), strict=True):
        sums = sums_by_column(active, (x - mean.float()).to(held.device))
        found.append((sums * encoder.T).sum(1).double().cpu())
    rise = torch.stack(found, 1) / counts[:, None]
    rise = rise.masked_fill((counts == len(held))[:, None], torch.nan)
    return rise / rise.sum(1, keepdim=True)
