"""Initialise a crosscoder: a scale per snapshot, biases at the mean, and decoder norms with the least error.

On the first activations of the data:

1. c_s = sqrt(D / E|a_s - mean a_s|^2) (`scale="std"`: every snapshot has the same variance), or sqrt(D) / E|a_s|
   (`scale="norm"`, as in both papers), kept in the model as `activation_scale`.
2. `bias_init="mean"`: b_dec[s] = mean of c_s a_s, and b_enc = -sum_s b_dec[s] W_enc[s], or 0 if the encoder reads the
   deviation from b_dec, so that features read and write deviations from the mean. Otherwise every feature has to
   represent part of the mean, and a reconstruction from no features is near zero, where layer normalisation makes a
   spliced model's output meaningless.
3. `decoder_init_norm=None`: the norm of all decoder rows with the least reconstruction error, by grid search (Ge et
   al., arXiv 2509.17196).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import TRAINING_ARCHITECTURES, Crosscoder, CrosscoderTrainingConfig, CrosscoderTrainingSAE
from crosslens.distributed.parallel import ALONE, Parallel
from crosslens.distributed.strategy import ONE_PROCESS
from crosslens.errors import UserError
from crosslens.progress import say
from crosslens.training.continuation import start_from

NEW_NORM = 0.1
"""Of the decoder rows of features that a continued crosscoder gets, where the norm would be searched."""
LITTLE = 0.25  # share of variance in the mean squared norm below which `train` warns
CONSTANT = 1e-10  # share below which activations are constant: float32 rounds at 1e-14 of the square


def initialise(
    architecture: CrosscoderTrainingConfig,
    acts: Activations,
    *,
    batch_size: int,
    scale_tokens: int,
    seed: int,
    parallel: Parallel = ALONE,
    first: Sequence[Float[Tensor, "B S D"]] | None = None,
    source: Crosscoder | None = None,
) -> CrosscoderTrainingSAE:
    """A crosscoder ready to train.

    Args:
        architecture: with shapes and metadata filled in.
        acts: the data.
        batch_size: activations processed at a time.
        scale_tokens: activations used to estimate scales and means.
        seed: seed for the weights.
        parallel: the processes that train it; together they start from the weights that one process would start from.
        first: the batches that `first_batches` counts, if they have been read already.
        source: whose weights it starts from, checked by `crosslens.training.continuation.check_source`.

    Raises:
        UserError: the activations of a snapshot are constant, all zero, or not finite.
    """
    searched = architecture.decoder_init_norm is None and source is None
    if architecture.decoder_init_norm is None:
        architecture = dataclasses.replace(architecture, decoder_init_norm=1.0 if searched else NEW_NORM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = _made(architecture, parallel)
    n_batches = first_batches(acts, batch_size, scale_tokens)
    # no name holds the stream, whose buffer is let go of before the norm is searched
    moments = first_moments(first or acts.batches(batch_size, epochs=1, parallel=parallel), n_batches)
    scale = snapshot_scales(moments, architecture.scale, acts)
    if parallel.rank == 0:
        name_constant(moments, architecture.scale, acts)
    if source is not None:
        start_from(sae, source, moments.means, scale)
        return sae
    sae.activation_scale.copy_(scale)
    with torch.no_grad():
        if architecture.bias_init == "mean":
            sae.b_dec.copy_((moments.means * scale[:, None]).flatten())
        if searched:
            search_decoder_norm(sae, moments.batch.to(sae.device), parallel)
        else:
            centre(sae)
    return sae


def uninitialised(architecture: CrosscoderTrainingConfig, parallel: Parallel = ALONE) -> CrosscoderTrainingSAE:
    """A crosscoder with arbitrary weights, for a checkpoint to be loaded into.

    Args:
        architecture: with shapes and metadata filled in.
        parallel: the processes that train it.
    """
    with torch.device("meta"):  # draws no numbers
        sae = _made(dataclasses.replace(architecture, device="meta"), parallel)
    sae.to_empty(device=architecture.device)
    return sae.to(architecture.device)


def _made(architecture: CrosscoderTrainingConfig, parallel: Parallel) -> CrosscoderTrainingSAE:
    sae_class: Any = TRAINING_ARCHITECTURES[architecture.architecture()][0]
    return sae_class(architecture, strategy=ONE_PROCESS if parallel.alone else parallel)


class Moments(NamedTuple):
    """Moments of the raw activations of each snapshot, in float64, and one batch of them."""

    norms: Float[Tensor, " S"]
    """mean |a_s|"""
    squares: Float[Tensor, " S"]
    """mean |a_s|^2"""
    means: Float[Tensor, "S D"]
    batch: Float[Tensor, "B S D"]

    @property
    def variances(self) -> Float[Tensor, " S"]:
        """mean |a_s - mean a_s|^2"""
        return self.squares - self.means.square().sum(-1)

    @property
    def shares(self) -> Float[Tensor, " S"]:
        """The variance as a share of the mean squared norm."""
        return self.variances / self.squares


def first_batches(acts: Activations, batch_size: int, n_tokens: int) -> int:
    """How many whole batches `n_tokens` activations make, one at least."""
    return max(1, min(n_tokens, acts.n_tokens) // batch_size)


def first_moments(batches: Iterable[Float[Tensor, "B S D"]], n_batches: int) -> Moments:
    """The moments of the first batches, which are equally long."""
    norms = squares = means = torch.zeros((), dtype=torch.float64)
    batch = torch.empty(0)
    for batch in islice(batches, n_batches):
        rows = batch.double()
        lengths = rows.norm(dim=-1)
        norms = norms + lengths.mean(0)
        squares = squares + lengths.square().mean(0)
        means = means + rows.mean(0)
    return Moments(norms / n_batches, squares / n_batches, means / n_batches, batch)


def snapshot_scales(moments: Moments, scale: Literal["std", "norm"], acts: Activations) -> Float[Tensor, " S"]:
    """c_s (float64) of every snapshot.

    Raises:
        UserError: the activations of a snapshot are constant, all zero, or not finite.
    """
    sizes = moments.norms if scale == "norm" else moments.variances.clamp_min(0).sqrt()
    for label, size, norm, share in zip(
        acts.snapshots.labels, sizes.tolist(), moments.norms.tolist(), moments.shares.tolist(), strict=True
    ):
        # around a mean that is far larger, rounding looks like variance
        if not (math.isfinite(norm) and norm > 0 and math.isfinite(size) and share > CONSTANT):
            raise UserError(
                f"snapshot {label} has activations of mean norm {norm:.4g} at {acts.hook_name}, {share:.2g} of its "
                "square variance: it cannot be rescaled; leave this snapshot out"
            )
    return math.sqrt(acts.d_model) / sizes


def name_constant(moments: Moments, scale: Literal["std", "norm"], acts: Activations) -> None:
    """Name the snapshots with little variance around their mean; warn if the scale makes them count little."""
    shares = zip(acts.snapshots.labels, moments.shares.tolist(), strict=True)
    little = [f"{label} ({share:.0%})" for label, share in shares if share < LITTLE]
    if not little:
        return
    found = (
        f"activations at {acts.hook_name} are mostly a constant vector in {', '.join(little)} (in parentheses: the "
        "variance as a share of the mean squared norm): "
    )
    if scale == "std":
        say(found + "each snapshot is scaled to the same variance, so they count like the others")
    else:
        remedy = "with scale='norm' they count little in the loss; use scale='std', or leave them out"
        warnings.warn(found + remedy, stacklevel=2)


@torch.no_grad()
def centre(sae: CrosscoderTrainingSAE) -> None:
    """Set b_enc so that a token whose activations equal b_dec has pre-activation zero in every feature."""
    if not sae.cfg.apply_b_dec_to_input:
        sae.b_enc.copy_(-(sae.b_dec @ sae.W_enc))


@torch.no_grad()
def search_decoder_norm(sae: CrosscoderTrainingSAE, batch: Float[Tensor, "B S D"], parallel: Parallel = ALONE) -> float:
    """Scale all decoder rows, and the encoder with them, to the norm that reconstructs a batch best.

    A coarse grid from .1 to 5, then a fine one around its best, as in the released code of Ge et al.

    Args:
        sae: with decoder rows of norm 1.
        batch: raw activations.
        parallel: the processes that hold the features of `sae`.
    """
    directions = sae.W_dec.clone()

    def error(norm: float) -> float:
        sae.W_dec.copy_(directions * norm)
        sae.W_enc.copy_(sae.W_dec.T)
        centre(sae)
        flat = sae.process_sae_in(batch[parallel.tokens(len(batch))])
        # summed over all processes, so that all choose the same norm
        return float(parallel.sum_(sae.reconstruction_loss(sae.training_reconstruction(flat), flat)))

    best = min((0.1 * i for i in range(1, 51)), key=error)
    best = min((max(0.01, best - 0.1 + 0.01 * i) for i in range(21)), key=error)
    error(best)
    sae.cfg.decoder_init_norm = best
    return best
