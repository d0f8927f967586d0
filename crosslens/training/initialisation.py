"""Initialise a crosscoder: a scale per snapshot, biases at the mean, and decoder norms with the least error.

On the first activations of the data:

1. c_s = sqrt(D) / mean |a_s|, kept in the model as `activation_scale`.
2. `bias_init="mean"`: b_dec[s] = mean of c_s a_s, and b_enc = -sum_s b_dec[s] W_enc[s], so that features read and write
   deviations from the mean. Otherwise every feature has to represent part of the mean, and a reconstruction from no
   features is near zero, where layer normalisation makes a spliced model's output meaningless.
3. `decoder_init_norm=None`: the norm of all decoder rows with the least reconstruction error, by grid search (Ge et
   al., arXiv 2509.17196).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import TRAINING_ARCHITECTURES, CrosscoderTrainingConfig, CrosscoderTrainingSAE
from crosslens.crosscoders.strategy import ONE_PROCESS
from crosslens.distributed.parallel import ALONE, Parallel
from crosslens.errors import UserError


def initialise(
    architecture: CrosscoderTrainingConfig,
    acts: Activations,
    *,
    batch_size: int,
    scale_tokens: int,
    seed: int,
    parallel: Parallel = ALONE,
) -> CrosscoderTrainingSAE:
    """A crosscoder ready to train.

    Args:
        architecture: with shapes and metadata filled in.
        acts: the data.
        batch_size: activations processed at a time.
        scale_tokens: activations used to estimate scales and means.
        seed: seed for the weights.
        parallel: the processes that train it; together they start from the weights that one process would start from.

    Raises:
        UserError: the activations of a snapshot are all zero, or not finite.
    """
    searched = architecture.decoder_init_norm is None
    if searched:
        architecture = dataclasses.replace(architecture, decoder_init_norm=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae_class: Any = TRAINING_ARCHITECTURES[architecture.architecture()][0]
        strategy = ONE_PROCESS if parallel.alone else parallel
        sae: CrosscoderTrainingSAE = sae_class(architecture, strategy=strategy)
    norms, means, batch = first_moments(acts, batch_size, scale_tokens)
    for label, norm in zip(acts.snapshots.labels, norms.tolist(), strict=True):
        if not (math.isfinite(norm) and norm > 0):
            raise UserError(
                f"snapshot {label} has mean activation norm {norm} at {acts.hook_name}: it cannot be rescaled; leave "
                "this snapshot out"
            )
    scale = math.sqrt(acts.d_model) / norms
    sae.activation_scale.copy_(scale)
    with torch.no_grad():
        if architecture.bias_init == "mean":
            sae.b_dec.copy_((means * scale[:, None]).flatten())
        if searched:
            search_decoder_norm(sae, batch.to(sae.device), parallel)
        else:
            centre(sae)
    return sae


def first_moments(
    acts: Activations, batch_size: int, n_tokens: int
) -> tuple[Float[Tensor, " S"], Float[Tensor, "S D"], Float[Tensor, "B S D"]]:
    """Mean norm and mean of the raw activations of each snapshot (float64), and one batch of them."""
    n_batches = max(1, min(n_tokens, acts.n_tokens) // batch_size)
    norms = torch.zeros(acts.n_snapshots, dtype=torch.float64)
    means = torch.zeros(acts.n_snapshots, acts.d_model, dtype=torch.float64)
    stream = acts.batches(batch_size, epochs=1)
    batch = torch.empty(0, acts.n_snapshots, acts.d_model)
    for _, batch in zip(range(n_batches), stream, strict=False):
        norms += batch.double().norm(dim=-1).mean(0)
        means += batch.double().mean(0)
    return norms / n_batches, means / n_batches, batch


@torch.no_grad()
def centre(sae: CrosscoderTrainingSAE) -> None:
    """Set b_enc so that a token whose activations equal b_dec has pre-activation zero in every feature."""
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
