"""What every crosscoder shares: the flat parameters, the per-snapshot scale, and the edges where shapes are 3-D.

A crosscoder is a SAELens SAE over the concatenated activations of S snapshots of one model (Ge et al., arXiv
2509.17196; Bayazit et al., arXiv 2509.05291). Letters: B tokens, S snapshots, D d_model, F features.

    x       (..., S, D)   raw activations, at every public edge
    c       (S,)          activation_scale; the model is trained on c_s * x_s
    h       (..., F)      sum_s (c_s x_s) W_enc[s] + b_enc
    f       (..., F)      gate(h), one value per feature, shared by the snapshots
    x_hat_s (..., D)      (sum_i f_is W_dec[i, s] + b_dec[s]) / c_s

`f_is` is `f_i` for every architecture but JumpReLU, whose gate is per snapshot. Decoder norms `n_is = |W_dec[i, s]|`
live in the scaled space. The scale is applied once, inside `encode` and `decode`, and is never folded into the weights:
folding would change decoder norms, and with them TopK selection and JumpReLU gates.

What every crosscoder in training shares: its config, the fast step, and the dense reference of that step.

A start with equal rows in all snapshots, of the norm that reconstructs a batch best, is that of Ge et al. (arXiv
2509.17196).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from typing_extensions import override

from crosslens.crosscoders.kernels.sparse import Precision, encoder_product
from crosslens.distributed.parallel import ALONE, Parallel
from crosslens.errors import UserError

T_CROSSCODER = TypeVar("T_CROSSCODER", bound="Crosscoder")


@dataclass(kw_only=True)
class CrosscoderConfig(SAEConfig, ABC):
    """Configuration shared by all crosscoders.

    Args:
        d_sae: number of features F.
        n_snapshots: number of snapshots S; `train` fills it in from the data.
        d_in: S * D; `train` fills it in from the data, 0 means not known yet.
        dtype: dtype of the parameters (`activation_scale` stays float32).
        device: device of the parameters.
        metadata: where the activations came from; `metadata.snapshots` lists label, step and tokens of each snapshot.
        apply_b_dec_to_input: False; an option of SAELens that crosscoders do not have.

    Raises:
        UserError: d_sae or n_snapshots not positive, a d_in that is no multiple of n_snapshots, or an option of SAELens
            that crosscoders do not have.
    """

    d_in: int = 0
    n_snapshots: int = 1
    apply_b_dec_to_input: bool = False
    # an SAEMetadata; while SAELens loads a config it is a dictionary for a moment
    metadata: Any = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("d_sae", self.d_sae)
        positive("n_snapshots", self.n_snapshots)
        if self.d_in < 0 or self.d_in % self.n_snapshots:
            raise UserError(
                f"d_in={self.d_in} is not a multiple of n_snapshots={self.n_snapshots}; "
                "d_in is n_snapshots * d_model, leave both out and train() fills them in"
            )
        for name, only in (
            ("normalize_activations", "none"),
            ("apply_b_dec_to_input", False),
            ("reshape_activations", "none"),
        ):
            if getattr(self, name) != only:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not available for crosscoders: each snapshot has its own "
                    f"activation_scale; leave it at {only!r}"
                )

    @property
    def d_model(self) -> int:
        """D, the width of one snapshot's activations."""
        return self.d_in // self.n_snapshots

    @property
    def snapshot_labels(self) -> list[str]:
        """Labels of the snapshots, from the metadata, or their indices."""
        recorded = self.metadata.snapshots or []
        return [str(s["label"]) for s in recorded] or [str(s) for s in range(self.n_snapshots)]


class Crosscoder(SAE[Any], ABC):
    """A trained crosscoder: `encode` raw activations, `decode` features, read `decoder_norms`.

    Attributes:
        cfg: its configuration.
        W_enc: (S * D, F) encoder.
        b_enc: (F,) encoder bias.
        W_dec: (F, S * D) decoder.
        b_dec: (S * D,) decoder bias, in the scaled space.
        activation_scale: (S,) c_s, in float32 whatever the type of the parameters.
    """

    cfg: CrosscoderConfig
    b_enc: nn.Parameter
    activation_scale: Tensor

    @override
    def initialize_weights(self) -> None:
        S, D, F = self.cfg.n_snapshots, self.cfg.d_model, self.n_own
        zeros: Callable[..., Tensor] = partial(torch.zeros, dtype=self.dtype, device=self.device)
        # (SD, F) in the memory layout of (F, SD): a feature is a row in both matrices, and its gradient needs no copy
        self.W_enc = nn.Parameter(zeros(F, S * D).T)
        self.W_dec = nn.Parameter(zeros(F, S * D))
        self.b_enc = nn.Parameter(zeros(F))
        self.b_dec = nn.Parameter(zeros(S * D))
        self.register_buffer("activation_scale", torch.ones(S, dtype=torch.float32, device=self.device))

    @override
    def extra_repr(self) -> str:
        labels = self.cfg.snapshot_labels
        of = f"snapshots {labels[0]} ... {labels[-1]} ({len(labels)})"
        sizes = f"{self.cfg.d_sae} features, {of}, d_model {self.d_model}"
        return f"{sizes}, {self.cfg.metadata.hook_name}" if self.cfg.metadata.hook_name else sizes

    # ------------------------------------------------------------------ shapes and views
    @property
    def n_own(self) -> int:
        """Features whose weights are here: all F, unless several processes train them (`Parallel`)."""
        return self.cfg.d_sae

    @property
    def gate_per_snapshot(self) -> bool:
        """Whether `snapshot_acts` differs between snapshots; else one gate serves all."""
        return False

    @property
    def n_snapshots(self) -> int:
        """S, the number of snapshots."""
        return self.cfg.n_snapshots

    @property
    def d_model(self) -> int:
        """D, the width of one snapshot's activations."""
        return self.cfg.d_model

    @property
    def W_enc_by_snapshot(self) -> Float[Tensor, "S D F"]:
        """View of `W_enc` with one (D, F) matrix per snapshot."""
        return self.W_enc.unflatten(0, (self.n_snapshots, self.d_model))

    @property
    def W_dec_by_snapshot(self) -> Float[Tensor, "F S D"]:
        """View of `W_dec` with one row of D per (feature, snapshot)."""
        return self.W_dec.unflatten(1, (self.n_snapshots, self.d_model))

    @property
    def b_dec_by_snapshot(self) -> Float[Tensor, "S D"]:
        """View of `b_dec` with one row of D per snapshot."""
        return self.b_dec.unflatten(0, (self.n_snapshots, self.d_model))

    @property
    def decoder_norms(self) -> Float[Tensor, "F S"]:
        """`n_is = |W_dec[i, s]|` in the scaled space: how strongly feature i exists at snapshot s."""
        return self.W_dec_by_snapshot.norm(dim=-1)

    @override
    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        # SAELens's own seam for activations that are not flat.
        super().turn_off_forward_pass_hook_z_reshaping()
        self.reshape_fn_in = partial(torch.flatten, start_dim=-2)
        self.reshape_fn_out = partial(_unflatten, shape=(self.cfg.n_snapshots, self.cfg.d_model))

    # ------------------------------------------------------------------ encode and decode
    @abstractmethod
    def gate(self, hidden_pre: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """Feature activations from pre-activations `hidden_pre`: which features are kept, and their value."""

    def snapshot_acts(self, feature_acts: Float[Tensor, "... F"], snapshot: int) -> Float[Tensor, "... F"]:
        """`f_is`: what `feature_acts` contribute at the index `snapshot`. Equal to `f` where the gate is shared."""
        del snapshot
        return feature_acts

    def scale(self, x: Float[Tensor, "... S D"]) -> Float[Tensor, "... S D"]:
        """Raw activations `x` to the space the crosscoder is trained in, `c_s * x_s`.

        Raises:
            UserError: the last two dimensions of `x` are not (n_snapshots, d_model).
        """
        if tuple(x.shape[-2:]) != (self.n_snapshots, self.d_model):
            raise UserError(
                f"activations of shape {tuple(x.shape)} do not fit this crosscoder: the last two dimensions must be "
                f"(n_snapshots, d_model) = ({self.n_snapshots}, {self.d_model})"
            )
        return x * self.activation_scale[:, None]

    def unscale(self, x: Float[Tensor, "... S D"]) -> Float[Tensor, "... S D"]:
        """The inverse of `scale`: raw activations from scaled ones `x`."""
        return (x / self.activation_scale[:, None]).to(self.dtype)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "... S D"]) -> Float[Tensor, "... SD"]:
        # SAELens subtracts a decoder bias and normalises here; a crosscoder's config rules both out
        return self.hook_sae_input(self.reshape_fn_in(self.scale(sae_in).to(self.dtype)))

    def hidden_pre(self, flat: Float[Tensor, "... SD"]) -> Float[Tensor, "... F"]:
        """Pre-activations `h` of scaled activations `flat`."""
        return self.hook_sae_acts_pre(encoder_product(flat, self.W_enc, self.b_enc))

    @override
    def encode(self, x: Float[Tensor, "... S D"]) -> Float[Tensor, "... F"]:
        """Features of raw activations `x`.

        Raises:
            UserError: the last two dimensions of `x` are not (n_snapshots, d_model).
        """
        return self.hook_sae_acts_post(self.gate(self.hidden_pre(self.process_sae_in(x))))

    def decode_flat(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... SD"]:
        """Reconstruction from `feature_acts` in the scaled space, snapshots concatenated."""
        return feature_acts @ self.W_dec + self.b_dec

    @override
    def decode(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... S D"]:
        """Raw reconstruction of every snapshot from features `feature_acts`."""
        flat = self.hook_sae_recons(self.decode_flat(feature_acts))
        return self.unscale(self.reshape_fn_out(flat, self.d_head))

    def decode_snapshot(
        self, snapshot_acts: Float[Tensor, "... F"], snapshot: int, bias: bool = True
    ) -> Float[Tensor, "... D"]:
        """Raw reconstruction of one snapshot, linear in `f_is`.

        Args:
            snapshot_acts: `f_is`, as `snapshot_acts` gives them.
            snapshot: index of the snapshot.
            bias: add the decoder bias; False decodes a difference of features.
        """
        decoded = snapshot_acts @ self.W_dec_by_snapshot[:, snapshot]
        if bias:
            decoded = decoded + self.b_dec_by_snapshot[snapshot]
        return (decoded / self.activation_scale[snapshot]).to(self.dtype)

    # ------------------------------------------------------------------ float32 scale, saving, no folding
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # `.to(bfloat16)` rounds every buffer; the scale must survive it, so the float32 values are put back.
        kept = self.activation_scale
        out = super()._apply(*args, **kwargs)
        if self.activation_scale.dtype != torch.float32:
            self.activation_scale = kept.to(self.activation_scale.device)
        return out

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors stores no strides
        # SAELens's loaders cast every tensor to the requested dtype; the metadata keeps the exact values.
        self.cfg.metadata.activation_scale = self.activation_scale.tolist()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        loaded, exact = state_dict["activation_scale"], self.cfg.metadata.activation_scale
        # a float32 scale is as it was saved, and the metadata may be older than it (a checkpoint of a live trainer)
        if exact is not None and loaded.dtype != torch.float32:
            state_dict["activation_scale"] = torch.tensor(exact, dtype=torch.float32, device=loaded.device)
        state_dict["W_enc"] = state_dict["W_enc"].T.contiguous().T  # loaders assign tensors: keep the layout

    def save(self, path: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` of the inference crosscoder into a folder.

        Args:
            path: folder, made when missing.

        Returns:
            The folder; `crosslens.load(path)` and SAELens's `SAE.load_from_disk(path)` read it.
        """
        self.save_model(path)
        return Path(path)

    @override
    def fold_W_dec_norm(self) -> None:
        raise _never_folded("fold_W_dec_norm")

    @override
    def fold_and_get_W_dec_norm(self) -> Tensor:
        raise _never_folded("fold_and_get_W_dec_norm")

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise _never_folded("fold_activation_norm_scaling_factor")

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        raise _never_folded("fold_activation_whitening")


def _unflatten(x: Tensor, d_head: int | None, shape: tuple[int, int]) -> Tensor:
    del d_head  # SAELens passes the head width of hook_z; crosscoders have none
    return x.unflatten(-1, shape)


def positive(name: str, value: float) -> None:
    if value <= 0:
        raise UserError(f"{name}={value} must be positive")


def _never_folded(method: str) -> UserError:
    return UserError(
        f"{method} is not available: folding per-snapshot scales or norms into a crosscoder changes its decoder norms "
        "and its gates; encode and decode already take and return raw activations"
    )


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
