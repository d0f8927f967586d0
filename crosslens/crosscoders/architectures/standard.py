"""Standard crosscoder: ReLU and a decoder-norm-weighted L1 penalty (Bayazit et al., arXiv 2509.05291).

f = relu(h);  loss = mean_B[ sum_s |x_hat_s - x_s|^2 + lambda * sum_i f_i n_i ],  n_i = sum_s |W_dec[i, s]|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from crosslens.crosscoders.base import Crosscoder, CrosscoderConfig, CrosscoderTrainingConfig, CrosscoderTrainingSAE
from crosslens.crosscoders.declaration import Architecture
from crosslens.crosscoders.kernels.sparse import dense_is_faster, reconstruct
from crosslens.crosscoders.kernels.topk import density, pairs_above


@dataclass(kw_only=True)
class StandardCrosscoderConfig(CrosscoderConfig):
    """Configuration of a `StandardCrosscoder`; see `CrosscoderConfig` for the fields."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "standard_crosscoder"


class StandardCrosscoder(Crosscoder):
    """Inference crosscoder with a ReLU gate."""

    cfg: StandardCrosscoderConfig

    @override
    def gate(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu()


@dataclass(kw_only=True)
class StandardCrosscoderTrainingConfig(CrosscoderTrainingConfig):
    """Configuration of a `StandardCrosscoderTrainingSAE`.

    Args:
        l1_coefficient: lambda, the weight of the penalty `sum_i f_i n_i`.
        l1_warm_up_steps: steps over which lambda grows linearly from 0.
    """

    l1_coefficient: float = 2.0
    l1_warm_up_steps: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "standard_crosscoder"


class StandardCrosscoderTrainingSAE(CrosscoderTrainingSAE):
    """Training of the L1 crosscoder."""

    cfg: StandardCrosscoderTrainingConfig

    @override
    def gate(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu()

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

    @override
    def losses_on_pairs(
        self, flat: Tensor, hidden_pre: Tensor, step_input: TrainStepInput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        zero = torch.zeros_like(hidden_pre[0])
        dense = dense_is_faster(density(hidden_pre, zero), hidden_pre.device, self.precision)
        acts = hidden_pre.relu() if dense else pairs_above(hidden_pre, zero)
        norms = self.decoder_norms.detach()
        sae_out, weighted, _ = reconstruct(
            flat,
            acts,
            self.weights,
            norms,
            strategy=self.strategy,
            precision=self.precision,
            memory=self.free_gradient_memory,
        )
        assert weighted is not None
        sae_out = self.hook_sae_recons(sae_out)
        penalty = (weighted * self.penalty_factors).sum()
        losses = {
            "mse_loss": self.reconstruction_loss(sae_out, flat),
            "l1_loss": step_input.coefficients["l1"] * self.strategy.total_features(penalty),
        }
        return sae_out, acts if isinstance(acts, Tensor) else acts.to_sparse(), losses


ARCHITECTURE = Architecture(
    title="Standard",
    active="all that are positive",
    penalty="L1, weighted by decoder norms (`cl.recipes.crosscoding_through_time`)",
    chosen="the L1 coefficient",
    use="you compare with work that used it",
    options=("l1", "l1_warm_up"),
    card="ReLU crosscoder (L1 weighted by decoder norms)",
    inference=(StandardCrosscoder, StandardCrosscoderConfig),
    training=(StandardCrosscoderTrainingSAE, StandardCrosscoderTrainingConfig),
    batch_tensors=4.5,  # at the first step, when half of the features are active
    penalises_decoder=True,
    revives_dead=False,
    denser="a smaller l1_coefficient",
)
