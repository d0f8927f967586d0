"""What every crosscoder in training shares: its config, the fast step, and the dense reference of that step.

A start with equal rows in all snapshots, of the norm that reconstructs a batch best, is that of Ge et al. (arXiv
2509.17196).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import mse_loss
from typing_extensions import override

from crosslens.crosscoders.base import Crosscoder, CrosscoderConfig, positive
from crosslens.crosscoders.sparse import Precision, encoder_product
from crosslens.errors import UserError
from crosslens.parallel import ALONE, Parallel

DRAWN = 1 << 22  # numbers drawn at a time; a multiple of 16 rows, for torch draws in groups of 16


@dataclass(kw_only=True)
class CrosscoderTrainingConfig(CrosscoderConfig, TrainingSAEConfig, ABC):
    """Configuration shared by all crosscoders in training.

    Args:
        decoder_init_norm: norm of every decoder row (feature, snapshot) at the start; W_enc starts as W_dec transposed.
            None lets `train` choose the norm that reconstructs a batch best.
        bias_init: "mean" starts b_dec at the mean scaled activation of each snapshot, and b_enc so that features read
            the deviation from it; "zero" starts both at 0. The mean needs data: `train` sets it.
        decoder_init: "independent" draws a row per (feature, snapshot); "shared" starts a feature's snapshots equal.
        encoder_precision: of the encoder product in the training step; the parameters and all other sums stay in
            `dtype`. "tf32" (CUDA) and "bfloat16" are faster and change the result: rounding moves features across the
            gate, and parameters drift by some per cent from a float32 run.

    Raises:
        UserError: an unknown option, "tf32" without CUDA, or a decoder_init_norm that is not positive.
    """

    decoder_init_norm: float | None = 0.1
    bias_init: Literal["mean", "zero"] = "mean"
    decoder_init: Literal["independent", "shared"] = "independent"
    encoder_precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, options in (
            ("bias_init", ("mean", "zero")),
            ("decoder_init", ("independent", "shared")),
            ("encoder_precision", ("float32", "tf32", "bfloat16")),
        ):
            if getattr(self, name) not in options:
                known = " or ".join(repr(option) for option in options)
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use {known}")
        if self.encoder_precision == "tf32" and not self.device.startswith("cuda"):
            raise UserError(
                f"encoder_precision='tf32' needs a CUDA device, not device={self.device!r}; use 'float32' or 'bfloat16'"
            )
        if self.decoder_init_norm is not None:
            positive("decoder_init_norm", self.decoder_init_norm)


class CrosscoderTrainingSAE(Crosscoder, TrainingSAE[Any], ABC):
    """A crosscoder in training.

    `training_forward_pass` works on active pairs (`sparse`); `dense_forward_pass` is the same loss in plain autograd,
    the readable reference that every gradient is compared with.

    Args:
        cfg: its configuration.
        use_error_term: add what is not reconstructed to the output, as SAELens does.
        parallel: processes that share the features.
    """

    cfg: CrosscoderTrainingConfig

    def __init__(self, cfg: CrosscoderTrainingConfig, use_error_term: bool = False, parallel: Parallel = ALONE) -> None:
        self.parallel = parallel  # before the weights, of which it says which are here
        super().__init__(cfg, use_error_term)

    @property
    @override
    def n_own(self) -> int:
        return self.cfg.d_sae // self.parallel.n_shares

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        S, D = self.cfg.n_snapshots, self.cfg.d_model
        drawn = 1 if self.cfg.decoder_init == "shared" else S
        rows = drawn_rows(self.cfg.d_sae, drawn * D, self.parallel.features(self.cfg.d_sae), self.dtype)
        rows = rows.to(self.device).unflatten(1, (drawn, D))
        rows = rows / rows.norm(dim=-1, keepdim=True) * (self.cfg.decoder_init_norm or 1.0)
        with torch.no_grad():
            self.W_dec.copy_(rows.expand(-1, S, D).flatten(1))
            self.W_enc.copy_(self.W_dec.T)

    @override
    def encode_with_hidden_pre(self, x: Float[Tensor, "... S D"]) -> tuple[Tensor, Tensor]:
        hidden_pre = self.hidden_pre(self.process_sae_in(x))
        return self.hook_sae_acts_post(self.gate(hidden_pre)), hidden_pre

    def training_acts(self, hidden_pre: Float[Tensor, "B F"]) -> Tensor:
        """What the losses see: the features (B, F), or (B, S, F) where every snapshot has its own gate."""
        return self.gate(hidden_pre)

    def shared_acts(self, acts: Tensor) -> Float[Tensor, "B F"]:
        """One value per feature from what `training_acts` returned."""
        return acts

    def decode_training(self, acts: Tensor) -> Float[Tensor, "B SD"]:
        """Scaled reconstruction from what `training_acts` returned."""
        return self.decode_flat(acts)

    @torch.no_grad()
    def rebuilt(self, flat: Float[Tensor, "B SD"]) -> Float[Tensor, "B SD"]:
        """Scaled reconstruction of scaled activations by the features of all processes, gated as in training."""
        decoded = self.decode_flat(self.selected(self.hidden_pre(flat)))
        return decoded if self.parallel.alone else self.parallel.sum_features_(decoded - self.b_dec) + self.b_dec

    def selected(self, hidden_pre: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """The features that the gate of training keeps, among those of all processes."""
        return self.gate(hidden_pre)

    def reconstruction_loss(self, sae_out: Float[Tensor, "B SD"], sae_in: Float[Tensor, "B SD"]) -> Tensor:
        """`mean_B sum_s |x_hat_s - x_s|^2` in the scaled space."""
        return mse_loss(sae_out, sae_in, reduction="sum") / len(sae_in)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Loss of one batch of raw activations (B, S, D); losses, `sae_in` and `sae_out` are in the scaled space.

        In `eval()` mode features pass the gate of inference, and nothing but the loss is computed.
        """
        if not self.training:
            return self.dense_forward_pass(step_input)
        flat = self.process_sae_in(step_input.sae_in)
        with torch.no_grad():
            product = encoder_product(flat, self.W_enc, self.b_enc, self.cfg.encoder_precision)
            hidden_pre = self.hook_sae_acts_pre(product)
        sae_out, feature_acts, losses = self.losses_on_pairs(flat, hidden_pre, step_input)
        return self._output(step_input, flat, hidden_pre, sae_out, feature_acts, losses)

    @abstractmethod
    def losses_on_pairs(
        self, flat: Float[Tensor, "B SD"], hidden_pre: Float[Tensor, "B F"], step_input: TrainStepInput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction, features (B, F; dense or COO) and losses, computed on active pairs where that is faster."""

    def dense_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The same step in plain, dense autograd: the reference."""
        flat = self.process_sae_in(step_input.sae_in)
        hidden_pre = self.hidden_pre(flat)
        acts = self.training_acts(hidden_pre)
        feature_acts = self.hook_sae_acts_post(self.shared_acts(acts))
        sae_out = self.hook_sae_recons(self.decode_training(acts))
        scaled_input = dataclasses.replace(step_input, sae_in=flat)
        losses = {
            "mse_loss": self.reconstruction_loss(sae_out, flat),
            **self.calculate_aux_loss(scaled_input, acts, hidden_pre, sae_out),
        }
        return self._output(step_input, flat, hidden_pre, sae_out, feature_acts, losses)

    def _output(
        self,
        step_input: TrainStepInput,
        flat: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
        feature_acts: Tensor,
        losses: dict[str, Tensor],
    ) -> TrainStepOutput:
        # at once, and not as callables for later: the optimiser's step changes the gates
        logged = step_input.is_logging_step
        return TrainStepOutput(
            sae_in=flat,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics=self.snapshot_metrics(flat, sae_out, feature_acts) if logged else {},
        )

    @override
    @abstractmethod
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The loss terms besides reconstruction, by the name they are logged under."""

    @torch.no_grad()
    def snapshot_metrics(self, flat: Tensor, sae_out: Tensor, feature_acts: Tensor) -> dict[str, Any]:
        """Explained variance and L0 per snapshot, by the name they are logged under."""
        S = self.n_snapshots
        error = (sae_out - flat).square().unflatten(-1, (S, -1)).sum((0, 2))
        variance = (flat - flat.mean(0)).square().unflatten(-1, (S, -1)).sum((0, 2))
        acts = feature_acts.to_dense()
        labels = self.cfg.snapshot_labels[:S]
        active = torch.stack([self.snapshot_acts(acts, s).count_nonzero().float() for s in range(S)])
        l0 = self.parallel.sum_features_(active) / len(flat)
        return {
            **{f"explained_variance/{label}": 1 - error[s] / variance[s] for s, label in enumerate(labels)},
            **{f"l0/{label}": l0[s] for s, label in enumerate(labels)},
        }

    @override
    def save(self, path: str | Path) -> Path:
        self.save_inference_model(path)
        return Path(path)

    def to_inference(self) -> Crosscoder:
        """The inference crosscoder over the same parameters (shared, not copied)."""
        config = self.cfg.get_inference_sae_cfg_dict()
        state_dict = self.state_dict()
        self.process_state_dict_for_saving_inference(state_dict)
        state_dict["W_enc"] = self.W_enc.detach()  # the parameter itself, not the copy that is saved
        crosscoder = SAE.from_dict({**config, "device": "meta"})
        crosscoder.load_state_dict(state_dict, assign=True)
        crosscoder.requires_grad_(False)
        # `.to` on the same device and dtype copies nothing; it tells SAELens where the parameters are.
        crosscoder.to(device=self.device, dtype=self.dtype)
        assert isinstance(crosscoder, Crosscoder)
        return crosscoder.eval()


def drawn_rows(n: int, width: int, keep: slice, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    """The rows `keep` of `torch.randn(n, width)`, drawn in blocks: the same for every number of processes."""
    size = max(1, DRAWN // (16 * width)) * 16
    parts = [torch.empty(0, width, dtype=dtype)]
    for first in range(0, keep.stop, size):
        rows = torch.randn(min(size, n - first), width, dtype=dtype)
        parts.append(rows[max(0, keep.start - first) : max(0, keep.stop - first)])
    return torch.cat(parts)
