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

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import DECLARATIONS, Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.columns import per_feature, snapshot_columns
from crosslens.evolution.held_out import Block, check_activations, read
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
def latent_scaling(crosscoder: Crosscoder, acts: Activations) -> LatentScaling:
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
    check_activations(crosscoder, acts)
    sums = ScalingSums(crosscoder)
    read(crosscoder, acts, sums, purpose="Latent scaling")
    return sums.scaling()


class ScalingSums:
    """The accumulator of `latent_scaling`: `sum f_i <r, W>` for both rows, and `sum f_i^2`."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        F, S = crosscoder.cfg.d_sae, crosscoder.n_snapshots
        self.norms, self.labels = crosscoder.decoder_norms.detach(), snapshot_columns(crosscoder)["label"].tolist()
        self.sums = torch.zeros(2, F, S, dtype=torch.float64)
        self.squares = torch.zeros(F, dtype=torch.float64)

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        decoder, values = block.crosscoder.W_dec_by_snapshot, block.pairs.values
        at_peak = torch.arange(len(decoder), device=decoder.device), self.norms.argmax(1)
        self.squares += block.count(values.double().square())
        for s in range(decoder.shape[1]):
            # add the feature's own contribution back: sum f f_is <W_is, d>
            own, gated = decoder[:, s], block.count(values * block.gated(s)).to(decoder)
            left = block.sum_by_feature(block.error[:, s], values) + gated[:, None] * own
            for which, row in enumerate((own, decoder[at_peak])):
                self.sums[which, :, s] += (left * row).sum(1).double().cpu()

    def scaling(self) -> LatentScaling:
        """Coefficients along unit directions."""
        lengths = self.norms.double().cpu()
        at_peak = lengths.amax(1, keepdim=True).expand_as(lengths)
        found = self.sums / self.squares[:, None] / torch.stack([lengths, at_peak])
        found = torch.where(found.isfinite(), found, torch.nan)
        return LatentScaling(*found, norms=lengths)

    def result(self) -> pd.DataFrame:
        """The table "scaling"."""
        return self.scaling().to_frame(self.labels)


@measure("scaling")
def _scaling(crosscoder: Crosscoder, acts: Activations) -> ScalingSums | None:
    del acts
    return ScalingSums(crosscoder) if penalises_decoder(crosscoder) else None


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
    sums = EncoderSums(crosscoder)
    read(crosscoder, acts, sums, purpose="Encoder shares")
    return sums.result()


class EncoderSums:
    """The accumulator of `encoder_share`: contributions where the feature is active, and activations everywhere."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        F, S, D = crosscoder.cfg.d_sae, crosscoder.n_snapshots, crosscoder.d_model
        self.encoder = crosscoder.W_enc_by_snapshot.detach()
        self.sums, self.counts, self.n = torch.zeros(F, S, dtype=torch.float64), torch.zeros(F).double(), 0
        self.total = torch.zeros(S, D, dtype=torch.float64)

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        self.n += len(block)
        active = block.pairs.values > 0
        self.total += block.scaled.double().sum(0).cpu()
        self.counts += block.count(active)
        for s, encoder in enumerate(self.encoder):
            found = block.sum_by_feature(block.scaled[:, s], active) * encoder.T
            self.sums[:, s] += found.sum(1).double().cpu()

    def result(self) -> Float[Tensor, "F S"]:
        """Shares of every snapshot."""
        everywhere = [total @ encoder.double().cpu() for total, encoder in zip(self.total, self.encoder, strict=True)]
        rise = self.sums / self.counts[:, None] - torch.stack(everywhere, 1) / self.n
        rise = rise.masked_fill((self.counts == self.n)[:, None], torch.nan)
        return rise / rise.sum(1, keepdim=True)
