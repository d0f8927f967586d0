"""TopK crosscoder: the k features of each token with the largest scores.

1. Score u_i = relu(h_i) * n_i with n_i = sum_s |W_dec[i, s]|.
2. Select the k largest scores of each token; selected features have f_i = relu(h_i). The selection carries no gradient.
   `keep_top` is the readable form; the training step uses `crosslens.crosscoders.kernels.topk`.
3. loss = mean_B sum_s |x_hat_s - x_s|^2 + alpha * V * mean_B |r_hat - r|^2 / mean_B |r - mean r|^2, where r = x - x_hat
   is detached and r_hat is rebuilt from the min(D/2, n_dead) dead features with the largest scores (Gao et al., arXiv
   2406.04093, section A.2, with the residual in the direction the decoder must learn). V = mean_B sum_s |x_s - mean
   x_s|^2, detached, puts both terms in units of the data's variance, so that alpha means the same at every S * D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from crosslens.crosscoders.base import Crosscoder, CrosscoderConfig, CrosscoderTrainingConfig, CrosscoderTrainingSAE
from crosslens.crosscoders.declaration import Architecture
from crosslens.crosscoders.kernels.sparse import CACHED, Acts, Memory, dense_is_faster, reconstruct, squared_error
from crosslens.crosscoders.kernels.topk import (
    Pairs,
    first_largest,
    kth_of_rows,
    marked,
    pairs_of,
    token_top_pairs,
    top_of_tokens,
)
from crosslens.distributed.strategy import ONE_PROCESS, Strategy
from crosslens.errors import UserError


def keep_top(hidden_pre: Float[Tensor, "... F"], ranking: Float[Tensor, "... F"], k: int) -> Float[Tensor, "... F"]:
    """`relu(h)` at the k largest positive entries of `ranking` in the last dimension; of equal ones the earlier."""
    return hidden_pre.relu() * (first_largest(ranking, kth_of_rows(ranking, k), k) & ~(ranking <= 0))


class RankedCrosscoder(Crosscoder):
    """What crosscoders share that keep the features with the largest scores, in training and at inference."""

    @property
    def score_norms(self) -> Float[Tensor, " F"]:
        """`n_i`, the decoder norms summed over snapshots: the score of a feature is `relu(h_i) * n_i`.

        That of a shared feature is divided by its penalty.
        """
        return self.decoder_norms.sum(-1) / self.penalty_factors

    def scores(self, hidden_pre: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """`u_i = relu(h_i) * n_i`, by which features are ranked."""
        return hidden_pre.relu() * self.score_norms


@dataclass(kw_only=True)
class TopKCrosscoderConfig(CrosscoderConfig):
    """Configuration of a `TopKCrosscoder`.

    Args:
        k: features kept per token.

    Raises:
        UserError: k is not an integer from 1 to d_sae.
    """

    k: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_k(self.k, self.d_sae, whole=True)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_crosscoder"


class TopKCrosscoder(RankedCrosscoder):
    """Inference crosscoder that keeps the k highest-scoring features of each token."""

    cfg: TopKCrosscoderConfig

    @override
    def gate(self, hidden_pre: Tensor) -> Tensor:
        return keep_top(hidden_pre, self.scores(hidden_pre), self.cfg.k)


@dataclass(kw_only=True)
class TopKCrosscoderTrainingConfig(CrosscoderTrainingConfig):
    """Configuration of a `TopKCrosscoderTrainingSAE`.

    Args:
        whole_k: of the class: every token gets as many features, so k is an integer.
        k: features kept per token.
        k_start: k at the first step, annealed linearly to `k`; None keeps `k` throughout.
        k_anneal_steps: steps over which k goes from `k_start` to `k`.
        aux_loss_coefficient: alpha, the weight of the auxiliary loss for dead features: the share of the data's
            variance that it counts for when dead features rebuild none of the residual.
        decoder_init_norm: as in all crosscoders, but small by default: features then turn to the data before they
            compete, and fewer die than with the norm that reconstructs a batch best.

    Raises:
        UserError: k or k_start is not in (0, d_sae], or k is not an integer where every token gets as many features.
    """

    whole_k: ClassVar[bool] = True
    k: int = 64
    k_start: float | None = None
    k_anneal_steps: int = 0
    aux_loss_coefficient: float = 1 / 32
    decoder_init_norm: float | None = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_k(self.k, self.d_sae, whole=self.whole_k)
        if self.k_start is not None:
            _check_k(self.k_start, self.d_sae, "k_start")

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_crosscoder"


class TopKCrosscoderTrainingSAE(RankedCrosscoder, CrosscoderTrainingSAE):
    """Training of the TopK crosscoder."""

    cfg: TopKCrosscoderTrainingConfig

    def __init__(
        self, cfg: TopKCrosscoderTrainingConfig, use_error_term: bool = False, strategy: Strategy = ONE_PROCESS
    ) -> None:
        super().__init__(cfg, use_error_term, strategy)
        self.current_k: float = cfg.k

    @override
    def gate(self, hidden_pre: Tensor) -> Tensor:
        with torch.no_grad():
            ranking = self.scores(hidden_pre)
        return self.select(hidden_pre, ranking)

    def select(self, hidden_pre: Tensor, ranking: Tensor) -> Tensor:
        """`relu(hidden_pre)` (B, F) at the entries with the largest `ranking` (B, F), 0 elsewhere."""
        k = round(self.current_k) if self.training else self.cfg.k
        if self.n_own == self.cfg.d_sae:
            return keep_top(hidden_pre, ranking, k)
        norms = self.score_norms
        return token_top_pairs(hidden_pre.flatten(0, -2), norms, k, self.strategy).to_dense().view_as(hidden_pre)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def losses_on_pairs(
        self, flat: Tensor, hidden_pre: Tensor, step_input: TrainStepInput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.current_k = annealed_k(self.cfg, step_input.n_training_steps)
        norms = self.score_norms.detach()
        if self.training:
            pairs = self.select_pairs(hidden_pre, norms)
        else:
            pairs = pairs_of(hidden_pre, self.gate(hidden_pre) != 0)
        dense = dense_is_faster(len(pairs.values) / hidden_pre.numel(), flat.device, self.precision)
        acts = pairs.to_dense() if dense else pairs
        dead = self._dead_acts(hidden_pre, norms, step_input.dead_neuron_mask)
        sae_out, _, rebuilt = reconstruct(
            flat,
            acts,
            self.weights,
            dead=dead,
            strategy=self.strategy,
            precision=self.precision,
            memory=self.free_gradient_memory,
        )
        sae_out = self.hook_sae_recons(sae_out)
        auxiliary = flat.new_zeros(())
        if rebuilt is not None:
            residual = flat - sae_out.detach()
            share = unexplained(residual, rebuilt, self.strategy, self.free_gradient_memory)
            auxiliary = batch_variance(flat, self.strategy) * share
        losses = {
            "mse_loss": self.reconstruction_loss(sae_out, flat),
            "auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * auxiliary,
        }
        return sae_out, pairs.to_sparse(), losses

    def select_pairs(self, hidden_pre: Tensor, norms: Float[Tensor, " F"]) -> Pairs:
        """The pairs of `hidden_pre` (B, F) with the largest scores; `norms` are decoder norms summed over snapshots."""
        return token_top_pairs(hidden_pre, norms, round(self.current_k), self.strategy)

    @override
    def training_gate(self, hidden_pre: Tensor) -> Tensor:
        norms = self.score_norms
        return token_top_pairs(hidden_pre, norms, round(self.current_k), self.strategy).to_dense()

    @torch.no_grad()
    def _dead_acts(self, hidden_pre: Tensor, norms: Tensor, dead: Tensor | None) -> tuple[Tensor, Acts] | None:
        """Ids of the dead features, and the activations of the highest-scoring of them for each token."""
        if dead is None:
            return None
        ids = marked(dead, self.n_dead)
        n_dead = self.strategy.count(len(ids)) // self.strategy.n_data_ranks
        if n_dead == 0:
            return None
        among, norms = hidden_pre.index_select(1, ids), norms[ids]
        count = max(1, min(self.d_model // 2, n_dead))
        if count == n_dead:
            return ids, among.relu_().mul_(norms > 0)
        dense = dense_is_faster(count / n_dead, hidden_pre.device, self.precision)
        if self.n_own == self.cfg.d_sae and (dense or not hidden_pre.is_cuda):
            kept = top_of_tokens(among.relu() * norms, count)
            return ids, among.mul_(kept) if dense else pairs_of(among, kept)
        pairs = token_top_pairs(among, norms, count, self.strategy)
        return ids, pairs.to_dense() if dense else pairs


def annealed_k(cfg: TopKCrosscoderTrainingConfig, step: int) -> float:
    """k at a training step: linear from `k_start` to `k` over `k_anneal_steps`."""
    if cfg.k_start is None or step >= cfg.k_anneal_steps:
        return cfg.k
    return cfg.k_start + (cfg.k - cfg.k_start) * step / cfg.k_anneal_steps


def unexplained(
    residual: Float[Tensor, "B SD"],
    rebuilt: Float[Tensor, "B SD"],
    strategy: Strategy = ONE_PROCESS,
    memory: Memory | None = None,
) -> Tensor:
    """`mean_B |r_hat - r|^2 / mean_B |r - mean r|^2`; 0 if the residual is constant over the batch."""
    variance = batch_variance(residual, strategy)
    error = squared_error(rebuilt, residual, memory, part=1)
    return torch.where(variance > 0, error / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)


@torch.no_grad()
def batch_variance(x: Float[Tensor, "B SD"], strategy: Strategy = ONE_PROCESS) -> Tensor:
    """`mean_B |x - mean_B x|^2`, a scalar, over the tokens of all processes."""
    centre = strategy.mean_data(x.mean(0))
    # blocks of tokens stay in a CPU's cache between the two operations
    rows = len(x) if x.is_cuda else max(1, CACHED // x.shape[1])
    squares = ((block - centre).flatten() for block in x.split(rows))
    return strategy.mean_data(torch.stack([torch.dot(block, block) for block in squares]).sum() / len(x))


def _check_k(k: Any, d_sae: int, name: str = "k", whole: bool = False) -> None:
    if not 0 < k <= d_sae:
        raise UserError(f"{name}={k} is not in (0, d_sae={d_sae}]; choose {name} between 1 and the number of features")
    if whole and not isinstance(k, int):
        raise UserError(f"{name}={k} is not an integer; TopK keeps {name} features of every token, use BatchTopK")


ARCHITECTURE = Architecture(
    title="TopK",
    active="the k largest scores of every token",
    penalty="auxiliary loss for dead features",
    chosen="k, the L0",
    use="you expect many late births, or far more features than dimensions",
    options=("k", "k_start", "k_anneal", "aux"),
    card="TopK crosscoder",
    inference=(TopKCrosscoder, TopKCrosscoderConfig),
    training=(TopKCrosscoderTrainingSAE, TopKCrosscoderTrainingConfig),
    batch_tensors=2.0,
    penalises_decoder=False,
    revives_dead=True,
    denser="a larger k",
)
