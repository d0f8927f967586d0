"""JumpReLU crosscoder: one value per feature, one gate per (feature, snapshot) (Ge et al., arXiv 2509.17196).

g_is = 1[h_i n_is > t_i],  f_is = h_i g_is,  x_hat_s = sum_i f_is W_dec[i, s] + b_dec[s],  t_i = exp(log_threshold_i).

Straight-through gradients (a rectangle of width w around the threshold replaces the derivative of the step):
    df_is/dh_i = g_is,   df_is/dt_i = -(t_i / (w n_is)) 1[|h_i n_is - t_i| < w/2 and h_i n_is > 0],   df_is/dn_is = 0.

loss = mean_{B,S} |x_hat_s - x_s|^2 + lambda * sum_i phi_i (1 + phi_i / frequency_scale),
phi_i = mean_{B,S} tanh(stretch * f_is n_is). The norms have gradients from this penalty and the decoder only.

With `target_l0`, lambda is steered: after every step log lambda grows by .1 log(L0 / target_l0), smoothed over steps,
with L0 the mean over tokens and snapshots of the number of features with f_is > 0, as `evaluate` gives it. With
`l0_coefficient`, c, nothing is steered, and the loss has a term c (L0 / target_l0 - 1)^2 whose gradient moves the
thresholds (Rajamanoharan et al., arXiv 2407.14435): dL0/dt_i = -1/w mean_{B,S} 1[...], of the window above.

With `pre_act_loss_coefficient`, p, dead features have a term p mean_B sum_i max(0, t_i - h_i max_s n_is), which raises
h_i and lowers t_i until a gate opens (Anthropic, *Circuits Updates*, January 2025); norms have no gradient from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor, nn
from typing_extensions import override

from crosslens.crosscoders.base import (
    Crosscoder,
    CrosscoderConfig,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
    positive,
)
from crosslens.crosscoders.declaration import Architecture
from crosslens.crosscoders.kernels.gated import Gates, open_gates, reconstruct_gated
from crosslens.crosscoders.kernels.topk import marked
from crosslens.errors import UserError

_LOG, _DIRECT = "log_threshold", "direct_threshold"
_STEERING = 0.1  # how fast log lambda follows log(L0 / target_l0), per step
_SMOOTHING, _LEAST_L0 = 0.1, 1e-3  # weight of the newest batch; a batch may have no active feature at all


class _JumpReLUGate(Crosscoder):
    """The threshold parameter and the per-snapshot gate, for training and inference."""

    log_threshold: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.log_threshold = nn.Parameter(torch.zeros(self.n_own, dtype=self.dtype, device=self.device))

    @property
    def threshold(self) -> Float[Tensor, " F"]:
        """`t_i`, compared with `h_i n_is`."""
        return self.log_threshold.exp()

    @property
    @override
    def gate_per_snapshot(self) -> bool:
        return True

    @override
    def gate(self, hidden_pre: Tensor) -> Tensor:
        """`h_i` if the gate of any snapshot is open; that of the largest decoder norm opens first."""
        return hidden_pre * (hidden_pre * self.decoder_norms.amax(-1) > self.threshold)

    @override
    def snapshot_acts(self, feature_acts: Tensor, snapshot: int) -> Tensor:
        """`f_is`, with gates recomputed from `f_i`, `n_is` and `t_i`: exact for unedited features."""
        return feature_acts * (feature_acts * self.decoder_norms[:, snapshot] > self.threshold)

    @override
    def decode_without_bias(self, feature_acts: Tensor) -> Tensor:
        decoder = self.W_dec_by_snapshot
        return torch.cat([self.snapshot_acts(feature_acts, s) @ decoder[:, s] for s in range(self.n_snapshots)], dim=-1)


@dataclass(kw_only=True)
class JumpReLUCrosscoderConfig(CrosscoderConfig):
    """Configuration of a `JumpReLUCrosscoder`; its thresholds are saved with the weights."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_crosscoder"


class JumpReLUCrosscoder(_JumpReLUGate):
    """Inference crosscoder with one gate per (feature, snapshot)."""

    cfg: JumpReLUCrosscoderConfig


@dataclass(kw_only=True)
class JumpReLUCrosscoderTrainingConfig(CrosscoderTrainingConfig):
    """Configuration of a `JumpReLUCrosscoderTrainingSAE`.

    Args:
        jumprelu_init_threshold: initial t_i.
        jumprelu_window: w, the width of the rectangle in the straight-through gradient.
        jumprelu_threshold_lr_factor: learning rate of the thresholds relative to that of the other parameters.
        b_enc_per_snapshot: b_enc learns as the sum of one encoder bias per snapshot, as in the released code of Ge et
            al. All of them get the same gradient, and Adam ignores its scale, so the sum moves S times as far: the
            learning rate of b_enc is S times that of the other parameters.
        sparsity_coefficient: lambda, the weight of the penalty; with `target_l0` only where it starts.
        sparsity_warm_up_steps: steps over which lambda grows linearly from 0.
        tanh_stretch: stretch of the tanh in the penalty.
        frequency_scale: value of phi_i at which the quadratic part of the penalty equals the linear part.
        target_l0: number of active features, as a mean over tokens and snapshots, that lambda is steered to; None keeps
            lambda.
        l0_coefficient: c, the weight of (L0 / target_l0 - 1)^2, which then aims at `target_l0` in the place of lambda;
            set sparsity_coefficient=0 to train with this term alone. None: no such term.
        pre_act_loss_coefficient: p, the weight of the loss that brings dead features back; None: no such loss.
        direct_thresholds: t_i itself is trained, not its logarithm, of which a step of Adam changes t_i by a share of
            its value only. It stays positive.

    Raises:
        UserError: jumprelu_init_threshold, jumprelu_window, frequency_scale, l0_coefficient or
            pre_act_loss_coefficient is not positive, target_l0 is not in (0, d_sae], or l0_coefficient without it.
    """

    jumprelu_init_threshold: float = 0.1
    jumprelu_window: float = 4.0
    jumprelu_threshold_lr_factor: float = 0.1
    b_enc_per_snapshot: bool = False
    sparsity_coefficient: float = 0.3
    sparsity_warm_up_steps: int = 0
    tanh_stretch: float = 4.0
    frequency_scale: float = 0.01
    target_l0: float | None = None
    l0_coefficient: float | None = None
    pre_act_loss_coefficient: float | None = None
    direct_thresholds: bool = False
    decoder_init_norm: float | None = None
    decoder_init: Literal["independent", "shared"] = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("jumprelu_init_threshold", "jumprelu_window", "frequency_scale"):
            positive(name, getattr(self, name))
        for name in ("l0_coefficient", "pre_act_loss_coefficient"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.l0_coefficient is not None and self.target_l0 is None:
            raise UserError(f"l0_coefficient={self.l0_coefficient:g} needs target_l0, the L0 that its loss aims at")
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise UserError(f"target_l0={self.target_l0} is not in (0, d_sae={self.d_sae}]: it is a number of features")

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_crosscoder"


class JumpReLUCrosscoderTrainingSAE(_JumpReLUGate, CrosscoderTrainingSAE):
    """Training of the JumpReLU crosscoder.

    Attributes:
        direct_threshold: (F,) t_i, with `direct_thresholds` the parameter in the place of `log_threshold`.
        steered: what `target_l0` adds to log lambda, and the smoothed log(L0 / target_l0), (2,).
    """

    cfg: JumpReLUCrosscoderTrainingConfig
    direct_threshold: nn.Parameter
    steered: Tensor
    backward_reads_hidden_pre = True
    unclipped = (_LOG, _DIRECT)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        with torch.no_grad():
            self.log_threshold.fill_(math.log(self.cfg.jumprelu_init_threshold))
        if self.cfg.direct_thresholds:
            self.direct_threshold = nn.Parameter(
                torch.full_like(self.log_threshold, self.cfg.jumprelu_init_threshold, requires_grad=False)
            )
            del self.log_threshold
        # of training alone: in checkpoints, and not among the weights of a crosscoder, which are assigned to a module
        # on the meta device
        place = "cpu" if self.device.type == "meta" else self.device
        self.register_buffer("steered", torch.zeros(2, dtype=torch.float32, device=place), persistent=False)

    @property
    @override
    def lr_factors(self) -> dict[str, float]:
        factors = dict.fromkeys(self.unclipped, self.cfg.jumprelu_threshold_lr_factor)
        return {**factors, "b_enc": float(self.n_snapshots)} if self.cfg.b_enc_per_snapshot else factors

    @property
    @override
    def threshold(self) -> Float[Tensor, " F"]:
        return self.direct_threshold if self.cfg.direct_thresholds else super().threshold

    @override
    def constrain_(self) -> None:
        super().constrain_()
        if (threshold := dict(self.named_parameters()).get(_DIRECT)) is not None:
            threshold.data.clamp_(min=torch.finfo(threshold.dtype).tiny)

    @override
    def saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().saved(tensors)
        if _DIRECT in found:
            found[_LOG] = found.pop(_DIRECT).detach().log()
        return found

    @override
    def trained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = super().trained(tensors)
        if self.cfg.direct_thresholds:
            found[_DIRECT] = found.pop(_LOG).exp()
        return found

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"sparsity": TrainCoefficientConfig(self.cfg.sparsity_coefficient, self.cfg.sparsity_warm_up_steps)}

    @override
    def losses_on_pairs(
        self, flat: Tensor, hidden_pre: Tensor, step_input: TrainStepInput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        norms, threshold = self.decoder_norms.detach(), self.threshold
        gates = Gates(
            hidden_pre,
            norms,
            threshold.detach(),
            self.cfg.jumprelu_window,
            self.cfg.tanh_stretch,
            self.precision,
        )
        pairs = gates.open_pairs()
        cfg, memory, dead = self.cfg, self.free_gradient_memory, None
        if cfg.pre_act_loss_coefficient is not None and step_input.dead_neuron_mask is not None:
            dead = marked(step_input.dead_neuron_mask, self.n_dead)
        sae_out, phi, low = reconstruct_gated(flat, gates, pairs, self.weights, threshold, self.strategy, memory, dead)
        sae_out = self.hook_sae_recons(sae_out)
        penalty = self.strategy.total_features(self.frequency_penalty(self.strategy.mean_data(phi)))
        acts = self.gate(hidden_pre).detach() if pairs is None else pairs.to_sparse()
        coefficient = step_input.coefficients["sparsity"]
        losses = {"mse_loss": self.reconstruction_loss(sae_out, flat)}
        if cfg.target_l0 is not None:
            n_open = open_gates(gates, pairs, threshold) / (len(flat) * self.n_snapshots)
            l0 = self.strategy.total_features(self.strategy.mean_data(n_open))
            if cfg.l0_coefficient is not None:
                losses["l0_loss"] = cfg.l0_coefficient * (l0 / cfg.target_l0 - 1).square()
            else:
                coefficient = coefficient * self.steered[0].exp()  # a copy: the penalty's gradient needs it
                if self.training:
                    self.steer(l0.detach() / cfg.target_l0)
        losses["sparsity_loss"] = coefficient * penalty
        if cfg.pre_act_loss_coefficient is not None:
            low = self.strategy.total_features(self.strategy.mean_data(low))
            losses["pre_act_loss"] = cfg.pre_act_loss_coefficient * low
        return sae_out, acts, losses

    @torch.no_grad()
    def steer(self, ratio: Float[Tensor, ""]) -> None:
        """Raise or lower lambda by the ratio of the L0 of a batch to `target_l0`."""
        self.steered[1].lerp_(ratio.clamp_min(_LEAST_L0).log(), _SMOOTHING)
        self.steered[0].add_(self.steered[1], alpha=_STEERING)

    def frequency_penalty(self, phi: Float[Tensor, " F"]) -> Tensor:
        """`sum_i phi_i (1 + phi_i / frequency_scale)` of mean activities `phi`, a scalar."""
        return (phi * (1 + phi / self.cfg.frequency_scale) * self.penalty_factors).sum()

    @property
    @override
    def snapshots_averaged(self) -> int:
        return self.n_snapshots


ARCHITECTURE = Architecture(
    title="JumpReLU",
    active="those above the feature's threshold, separately at every snapshot",
    penalty="tanh-quadratic (`cl.recipes.evolution_of_concepts`)",
    chosen="the sparsity coefficient, or the L0 that it is steered to",
    use="features should switch on per snapshot",
    options=("sparsity", "sparsity_warm_up", "target_l0", "l0", "pre_act", "direct_thresholds"),
    card="JumpReLU crosscoder (one gate per feature and snapshot)",
    inference=(JumpReLUCrosscoder, JumpReLUCrosscoderConfig),
    training=(JumpReLUCrosscoderTrainingSAE, JumpReLUCrosscoderTrainingConfig),
    batch_tensors=3.0,  # at the first step, when most gates are open
    extra_columns=8192,
    penalises_decoder=True,
    revives_dead=False,
    denser="a smaller sparsity_coefficient",
)
