"""What all crosscoders share: parameters, per-snapshot scales, encode and decode, and the training step.

A crosscoder is a SAELens SAE over the concatenated activations of S snapshots of one model (Ge et al., arXiv
2509.17196; Bayazit et al., arXiv 2509.05291). Symbols: B tokens, S snapshots, D d_model, F features.

1. Input: raw activations x (..., S, D), or flat (..., S D).
2. Scale each snapshot, c_s x_s (`activation_scale`). The scale is part of the model and is never folded into the
   weights: folding would change the decoder norms n_is = |W_dec[i, s]|, which TopK selection and JumpReLU gates read.
3. Encode: h = sum_s (c_s x_s) W_enc[s] + b_enc, then f = gate(h), one value per feature for all snapshots. With
   `apply_b_dec_to_input` the encoder reads c_s x_s - b_dec[s].
4. Decode: x_hat_s = (sum_i f_is W_dec[i, s] + b_dec[s]) / c_s, with f_is = f_i for every architecture but JumpReLU,
   whose gate is per snapshot.
5. Train in the scaled space. `training_forward_pass` works on active pairs; tests compare its loss and every gradient
   with plain dense autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from crosslens.crosscoders.checksums import CONFIG, WEIGHTS, config_checksum, tensor_checksum
from crosslens.crosscoders.kernels.products import encoder_product
from crosslens.crosscoders.kernels.sparse import Memory, Weights, change_error, hidden_pre_in, squared_error
from crosslens.crosscoders.partition import Partition, check_partition, penalty_factors
from crosslens.distributed.devices import Precision
from crosslens.distributed.strategy import ONE_PROCESS, Strategy
from crosslens.errors import UserError
from crosslens.printing import as_html
from crosslens.rundir import share

DRAWN = 1 << 22  # random numbers drawn at a time; a multiple of 16 rows, because torch draws in groups of 16


@dataclass(kw_only=True)
class CrosscoderConfig(SAEConfig, ABC):
    """Configuration shared by all crosscoders.

    Args:
        d_sae: number of features F.
        n_snapshots: number of snapshots S; `train` sets it from the data.
        d_in: S * D; `train` sets it from the data. 0: not known yet.
        dtype: dtype of the parameters (`activation_scale` stays float32).
        device: device of the parameters.
        metadata: where the activations came from; `metadata.snapshots` lists label, step and tokens of each snapshot.
        apply_b_dec_to_input: the encoder reads the deviation of scaled activations from b_dec, as in SAELens.
        n_shared: number of features with one decoder row for all snapshots (`crosslens.crosscoders.partition`).
        shared_penalty: what sparsity costs a shared feature, relative to others: the factor of its penalty; where
            features are ranked, its score is divided by it. None: 1.
        dedicated: number of features whose rows are zero but at one snapshot, by its label, or at several, by labels
            joined with "+".

    Raises:
        UserError: d_sae or n_snapshots is not positive, d_in is not a multiple of n_snapshots, shared and dedicated
            features that do not fit, or an option of SAELens that crosscoders do not support.
    """

    d_in: int = 0
    n_snapshots: int = 1
    apply_b_dec_to_input: bool = False
    n_shared: int = 0
    shared_penalty: float | None = None
    dedicated: dict[str, int] = field(default_factory=dict)
    # an SAEMetadata; a dictionary while SAELens loads a config
    metadata: Any = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("d_sae", self.d_sae)
        positive("n_snapshots", self.n_snapshots)
        if self.d_in < 0 or self.d_in % self.n_snapshots:
            raise UserError(
                f"d_in={self.d_in} is not a multiple of n_snapshots={self.n_snapshots}; "
                "d_in is n_snapshots * d_model; leave both out and train() sets them"
            )
        known = bool(self.d_in) and isinstance(self.metadata, SAEMetadata)
        check_partition(self.n_shared, self.dedicated, self.d_sae, self.snapshot_labels if known else None)
        if self.shared_penalty is not None:
            positive("shared_penalty", self.shared_penalty)
            if not self.n_shared:
                raise UserError(f"shared_penalty={self.shared_penalty:g} needs n_shared, the number of shared features")
        for name, only in (
            ("normalize_activations", "none"),
            ("reshape_activations", "none"),
        ):
            if getattr(self, name) != only:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is not available for crosscoders, where each snapshot has its own "
                    f"activation_scale; leave it at {only!r}"
                )

    @property
    def d_model(self) -> int:
        """D, the width of one snapshot."""
        return self.d_in // self.n_snapshots

    @property
    def snapshot_labels(self) -> list[str]:
        """Labels of the snapshots from the metadata, else their indices."""
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
        activation_scale: (S,) c_s, float32 whatever the dtype of the parameters.
    """

    cfg: CrosscoderConfig
    b_enc: nn.Parameter
    activation_scale: Tensor

    @override
    def initialize_weights(self) -> None:
        S, D, F = self.cfg.n_snapshots, self.cfg.d_model, self.n_own
        zeros: Callable[..., Tensor] = partial(torch.zeros, dtype=self.dtype, device=self.device)
        # W_enc (SD, F) has the memory layout of (F, SD): a feature is a row of both, and gradients need no copy
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

    def _repr_html_(self) -> str:
        scale = ", ".join(f"{value:.3g}" for value in self.activation_scale.tolist())
        about = {
            "features": f"{self.cfg.d_sae:,}",
            "snapshots": ", ".join(self.cfg.snapshot_labels),
            "width of one": f"{self.d_model:,}",
            "hook point": self.cfg.metadata.hook_name or "not recorded",
            "activation scale": scale,
            "parameters": f"{sum(p.numel() for p in self.parameters()):,}",
        }
        return as_html(type(self).__name__, about)

    # ------------------------------------------------------------------ shapes and views
    @property
    def n_own(self) -> int:
        """Number of features whose weights are here: all F, unless several processes train them."""
        return self.own.stop - self.own.start

    @property
    def own(self) -> slice:
        """The features whose weights are here, among all F."""
        return slice(0, self.cfg.d_sae)

    @property
    def penalty_factors(self) -> Float[Tensor, " F"] | float:
        """What sparsity costs each feature: 1, unless shared features have a penalty of their own."""
        factor = self.cfg.shared_penalty
        return 1.0 if factor is None else penalty_factors(self.cfg.n_shared, factor, self.own, self.b_enc)

    @property
    def gate_per_snapshot(self) -> bool:
        """Whether each snapshot has its own gate, so that `snapshot_acts` differs between snapshots."""
        return False

    @property
    def n_snapshots(self) -> int:
        """S, the number of snapshots."""
        return self.cfg.n_snapshots

    @property
    def d_model(self) -> int:
        """D, the width of one snapshot."""
        return self.cfg.d_model

    @property
    def W_enc_by_snapshot(self) -> Float[Tensor, "S D F"]:
        """View of `W_enc` with one (D, F) matrix per snapshot."""
        return rearrange(self.W_enc, "(s d) f -> s d f", s=self.n_snapshots)

    @property
    def W_dec_by_snapshot(self) -> Float[Tensor, "F S D"]:
        """View of `W_dec` with one row of D per (feature, snapshot)."""
        return rearrange(self.W_dec, "f (s d) -> f s d", s=self.n_snapshots)

    @property
    def b_dec_by_snapshot(self) -> Float[Tensor, "S D"]:
        """View of `b_dec` with one row of D per snapshot."""
        return rearrange(self.b_dec, "(s d) -> s d", s=self.n_snapshots)

    @property
    def decoder_norms(self) -> Float[Tensor, "F S"]:
        """`n_is = |W_dec[i, s]|` in the scaled space: how strongly feature i exists at snapshot s."""
        return self.W_dec_by_snapshot.norm(dim=-1)

    @override
    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        # SAELens's own way to reshape activations that are not flat
        super().turn_off_forward_pass_hook_z_reshaping()
        self.reshape_fn_in = partial(rearrange, pattern="... s d -> ... (s d)")
        self.reshape_fn_out = partial(_by_snapshot, n_snapshots=self.cfg.n_snapshots)

    # ------------------------------------------------------------------ encode and decode
    @abstractmethod
    def gate(self, hidden_pre: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """Feature activations from pre-activations `hidden_pre`: which features are kept, and their value."""

    def snapshot_acts(self, feature_acts: Float[Tensor, "... F"], snapshot: int) -> Float[Tensor, "... F"]:
        """`f_is`, the activations at one snapshot (an index); equal to `feature_acts` if the gate is shared."""
        del snapshot
        return feature_acts

    def by_snapshot(self, x: Tensor) -> Float[Tensor, "... S D"]:
        """Activations `x`, given as (..., S, D) or flat (..., S D), as (..., S, D).

        Input whose last two dimensions are (S, D) is taken as it is; other input is flat if its last dimension is S D.
        The two are ambiguous only for S = 1, where (..., 1, D) is not flat.

        Raises:
            UserError: `x` has neither shape.
        """
        S, D = self.n_snapshots, self.d_model
        if tuple(x.shape[-2:]) == (S, D):
            return x
        if x.shape[-1:] != (S * D,):
            raise UserError(
                f"activations of shape {tuple(x.shape)} do not fit this crosscoder: give (..., n_snapshots, d_model) = "
                f"(..., {S}, {D}), or flat (..., {S * D})"
            )
        return rearrange(x, "... (s d) -> ... s d", s=S)

    def scale(self, x: Float[Tensor, "... S D"]) -> Float[Tensor, "... S D"]:
        """Raw activations `x` in the space the crosscoder is trained in, `c_s * x_s`."""
        return x * self.activation_scale[:, None]

    def unscale(self, x: Float[Tensor, "... S D"]) -> Float[Tensor, "... S D"]:
        """The inverse of `scale`."""
        return (x / self.activation_scale[:, None]).to(self.dtype)

    @override
    def process_sae_in(self, sae_in: Tensor) -> Float[Tensor, "... SD"]:
        """What the encoder reads of raw activations: scaled, and less b_dec with `apply_b_dec_to_input`.

        Args:
            sae_in: (..., S, D) or flat (..., S D).

        Raises:
            UserError: `sae_in` has neither shape.
        """
        # SAELens also normalises here, which a crosscoder's config rules out
        x = self.by_snapshot(sae_in)
        if self.cfg.apply_b_dec_to_input:
            x = torch.addcmul(-self.b_dec_by_snapshot, x, self.activation_scale[:, None])
        else:
            x = self.scale(x)
        return self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))

    def hidden_pre(self, flat: Float[Tensor, "... SD"]) -> Float[Tensor, "... F"]:
        """Pre-activations `h` of the result of `process_sae_in`."""
        return self.hook_sae_acts_pre(encoder_product(flat, self.W_enc, self.b_enc))

    @override
    def encode(self, x: Float[Tensor, "... S D"] | Float[Tensor, "... SD"]) -> Float[Tensor, "... F"]:
        """Features of raw activations `x`, given as (..., S, D) or flat (..., S D).

        Raises:
            UserError: `x` has neither shape.
        """
        return self.hook_sae_acts_post(self.gate(self.hidden_pre(self.process_sae_in(x))))

    def decode_without_bias(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... SD"]:
        """`sum_i f_is W_dec[i, s]`, snapshots concatenated."""
        return feature_acts @ self.W_dec

    def decode_flat(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... SD"]:
        """Reconstruction from `feature_acts` in the scaled space, snapshots concatenated."""
        return self.decode_without_bias(feature_acts) + self.b_dec

    @override
    def decode(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... S D"]:
        """Raw reconstruction of every snapshot from `feature_acts`."""
        flat = self.hook_sae_recons(self.decode_flat(feature_acts))
        return self.unscale(self.reshape_fn_out(flat, self.d_head))

    @override
    def forward(self, x: Tensor) -> Float[Tensor, "... S D"]:
        """Raw reconstruction of raw activations `x`, given as (..., S, D) or flat (..., S D).

        Raises:
            UserError: `x` has neither shape.
        """
        return super().forward(self.by_snapshot(x))

    def decode_snapshot(
        self, snapshot_acts: Float[Tensor, "... F"], snapshot: int, bias: bool = True
    ) -> Float[Tensor, "... D"]:
        """Raw reconstruction of one snapshot, linear in `f_is`.

        Args:
            snapshot_acts: `f_is`, from the method `snapshot_acts`.
            snapshot: index of the snapshot.
            bias: add the decoder bias; False to decode a difference of features.
        """
        decoded = snapshot_acts @ self.W_dec_by_snapshot[:, snapshot]
        if bias:
            decoded = decoded + self.b_dec_by_snapshot[snapshot]
        return (decoded / self.activation_scale[snapshot]).to(self.dtype)

    # ------------------------------------------------------------------ float32 scale, saving, no folding
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # `.to(bfloat16)` rounds every buffer: put the float32 scales and thresholds back
        kept = dict(self.named_buffers(recurse=False))
        out = super()._apply(*args, **kwargs)
        for name, before in kept.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return out

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # safetensors stores no strides
        # SAELens's loaders cast every tensor to the requested dtype; the metadata keeps the exact values
        self.cfg.metadata.activation_scale = self.activation_scale.tolist()
        self.cfg.metadata.checksums = {name: tensor_checksum([tensor]) for name, tensor in state_dict.items()}
        self.cfg.metadata.checksums[CONFIG] = config_checksum(self.cfg.to_dict())

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        loaded, exact = state_dict["activation_scale"], self.cfg.metadata.activation_scale
        # a float32 scale is exact, and newer than the metadata in a trainer's checkpoint
        if exact is not None and loaded.dtype != torch.float32:
            state_dict["activation_scale"] = torch.tensor(exact, dtype=torch.float32, device=loaded.device)
        state_dict["W_enc"] = state_dict["W_enc"].T.contiguous().T  # loaders assign tensors; keep our layout

    def save(self, path: str | Path) -> Path:
        """Write the inference crosscoder to `cfg.json` and `sae_weights.safetensors` in a folder.

        Args:
            path: folder, created if missing.

        Returns:
            The folder. `crosslens.load(path)` and SAELens's `SAE.load_from_disk(path)` read it.
        """
        self.save_model(path)
        share(Path(path) / WEIGHTS)
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


def _by_snapshot(flat: Tensor, d_head: int | None, n_snapshots: int) -> Tensor:
    del d_head  # SAELens passes the head width of hook_z, which crosscoders do not have
    return rearrange(flat, "... (s d) -> ... s d", s=n_snapshots)


def positive(name: str, value: float) -> None:
    if value <= 0:
        raise UserError(f"{name}={value} must be positive")


def _never_folded(method: str) -> UserError:
    return UserError(
        f"{method} is not available: folding per-snapshot scales or norms into a crosscoder changes its decoder norms "
        "and its gates; encode and decode already take and return raw activations"
    )


@dataclass(kw_only=True)
class CrosscoderTrainingConfig(CrosscoderConfig, TrainingSAEConfig, ABC):
    """Configuration shared by all crosscoders in training.

    Args:
        decoder_init_norm: initial norm of every decoder row (feature, snapshot); W_enc starts as W_dec transposed.
            None: `train` chooses the norm that reconstructs a batch best (Ge et al.).
        apply_b_dec_to_input: the encoder reads the deviation of scaled activations from b_dec, which moves with it.
            True, unlike in both papers: the gradients of W_enc are then free of the mean activation.
        bias_init: "mean" initialises b_dec to the mean scaled activation of each snapshot, and b_enc so that features
            read the deviation from it; "zero" initialises both to 0. `train` computes the mean from the data.
        decoder_init: "independent" draws a row per (feature, snapshot); "shared" draws one row per feature and uses it
            at every snapshot.
        scale: how `train` chooses the scale c_s of each snapshot's activations a_s. "std": sqrt(D / E|a_s - mean|^2),
            so that all snapshots have the same variance. "norm": sqrt(D) / E|a_s|, as in both papers; a snapshot whose
            norm is mostly its mean then counts little in the loss, and its decoder rows come out small.
        delta_coefficient: weight of the squared error of the change from each snapshot to the next, beside that of the
            activations; after Delta-Crosscoder (arXiv 2603.04426), for a narrow change between two snapshots.

    Raises:
        UserError: an unknown option, a decoder_init_norm that is not positive, or a delta_coefficient below 0.
    """

    decoder_init_norm: float | None = 0.1
    apply_b_dec_to_input: bool = True
    bias_init: Literal["mean", "zero"] = "mean"
    decoder_init: Literal["independent", "shared"] = "independent"
    scale: Literal["std", "norm"] = "std"
    delta_coefficient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta_coefficient < 0:
            raise UserError(f"delta_coefficient={self.delta_coefficient:g} must be 0 or more")
        for name, options in (
            ("bias_init", ("mean", "zero")),
            ("decoder_init", ("independent", "shared")),
            ("scale", ("std", "norm")),
        ):
            if getattr(self, name) not in options:
                known = " or ".join(repr(option) for option in options)
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; use {known}")
        if self.decoder_init_norm is not None:
            positive("decoder_init_norm", self.decoder_init_norm)


class CrosscoderTrainingSAE(Crosscoder, TrainingSAE[Any], ABC):
    """A crosscoder in training.

    Args:
        cfg: its configuration.
        use_error_term: add the reconstruction error to the output, as SAELens does.
        strategy: how this process takes part in the step; with several processes it holds only some of the features.

    Attributes:
        precision: of the large dense products of the training step; the trainer sets it from `TrainConfig`.
        gradient_memory: (2, F, S * D), where a step writes the gradients of W_dec and of W_enc transposed, and before
            that h and the gradient of the reconstruction. The trainer sets it on a CPU, where new memory of that size
            costs more time than the sums. A step must then be followed by its backward pass before the next one.
        n_dead: number of dead features in the input of the next step; None, unless the trainer knows it, so that the
            host need not wait for a GPU.
        backward_reads_hidden_pre: whether the backward pass needs h.
        unclipped: names of parameters whose gradients are neither clipped nor counted in the norm that clips others.
    """

    cfg: CrosscoderTrainingConfig
    backward_reads_hidden_pre = False
    unclipped: tuple[str, ...] = ()

    def __init__(
        self, cfg: CrosscoderTrainingConfig, use_error_term: bool = False, strategy: Strategy = ONE_PROCESS
    ) -> None:
        self.strategy = strategy  # first: it decides the shapes of the weights
        self.precision: Precision = "float32"
        self.gradient_memory: Memory | None = None
        self.n_dead: int | None = None
        super().__init__(cfg, use_error_term)

    @property
    @override
    def own(self) -> slice:
        return self.strategy.features(self.cfg.d_sae)

    @property
    def partition(self) -> Partition:
        """Which of the features here are constrained."""
        return Partition.of(self.cfg.n_shared, self.cfg.dedicated, self.cfg.snapshot_labels, self.own)

    def constrain_gradients_(self) -> None:
        """Project the gradients of a step on what shared and dedicated features allow; call it after `backward`."""
        assert self.W_dec.grad is not None
        assert self.W_enc.grad is not None
        S, partition = self.n_snapshots, self.partition
        partition.project_(self.W_dec.grad.unflatten(1, (S, -1)), tie=True)
        partition.project_(self.W_enc.grad.T.unflatten(1, (S, -1)), tie=False)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Make the rows of shared features equal, and those of dedicated ones zero; call it after a change of weights.

        After a step of the optimiser on constrained gradients this changes rounding at most.
        """
        S, partition = self.n_snapshots, self.partition
        partition.tie_(self.W_dec.unflatten(1, (S, -1)))
        for rows in (self.W_dec, self.W_enc.T):
            partition.project_(rows.unflatten(1, (S, -1)), tie=False)

    @property
    def lr_factors(self) -> dict[str, float]:
        """Learning rates relative to `TrainConfig.lr`, by the name of the parameter; 1 for all others."""
        return {}

    @property
    def weights(self) -> Weights:
        """The parameters that the kernels work on: `x W_enc + b_enc` and `f W_dec + b_dec`.

        With `apply_b_dec_to_input` the kernels receive x - b_dec and reconstruct it. The values of both biases are then
        what they are for b_dec = 0, and their gradients carry those of b_dec.
        """
        if not self.cfg.apply_b_dec_to_input:
            return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        b_enc = _MovingBias.apply(self.b_enc, self.b_dec, self.W_enc.detach(), self.strategy)
        return Weights(self.W_enc, b_enc, self.W_dec, self.b_dec - self.b_dec.detach())  # type: ignore[arg-type]

    @property
    def free_gradient_memory(self) -> Memory | None:
        """`gradient_memory`, unless it holds gradients."""
        return self.gradient_memory if self.W_dec.grad is None and self.W_enc.grad is None else None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        S, D = self.cfg.n_snapshots, self.cfg.d_model
        drawn = 1 if self.cfg.decoder_init == "shared" else S
        rows = drawn_rows(self.cfg.d_sae, drawn * D, self.own, self.dtype)
        rows = rearrange(rows.to(self.device), "f (s d) -> f s d", d=D)
        rows = rows / rows.norm(dim=-1, keepdim=True) * (self.cfg.decoder_init_norm or 1.0)
        with torch.no_grad():
            self.W_dec.copy_(rearrange(rows.expand(-1, S, D), "f s d -> f (s d)"))
            self.constrain_()
            self.W_enc.copy_(self.W_dec.T)

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "... S D"] | Float[Tensor, "... SD"]
    ) -> tuple[Float[Tensor, "... F"], Float[Tensor, "... F"]]:
        hidden_pre = self.hidden_pre(self.process_sae_in(x))
        return self.hook_sae_acts_post(self.gate(hidden_pre)), hidden_pre

    @override
    def decode_flat(self, feature_acts: Float[Tensor, "... F"]) -> Float[Tensor, "... SD"]:
        """Scaled reconstruction by the features of all processes, which call this together with the same tokens."""
        return self.strategy.sum_features_(self.decode_without_bias(feature_acts)) + self.b_dec

    def relative(self, decoded: Float[Tensor, "... SD"]) -> Float[Tensor, "... SD"]:
        """Reconstruction of what `process_sae_in` returns, from what the features decode to without b_dec."""
        return decoded if self.cfg.apply_b_dec_to_input else decoded + self.b_dec

    @torch.no_grad()
    def training_reconstruction(self, flat: Float[Tensor, "B SD"]) -> Float[Tensor, "B SD"]:
        """Reconstruction of what `process_sae_in` returns by the features of all processes, gated as in training."""
        acts = self.training_gate(self.hidden_pre(flat))
        return self.relative(self.strategy.sum_features_(self.decode_without_bias(acts)))

    def training_gate(self, hidden_pre: Float[Tensor, "B F"]) -> Float[Tensor, "B F"]:
        """The features that the gate keeps in training, among those of all processes."""
        return self.gate(hidden_pre)

    @property
    def snapshots_averaged(self) -> int:
        """What the sums over snapshots in the reconstruction losses are divided by."""
        return 1

    def reconstruction_loss(self, sae_out: Float[Tensor, "B SD"], sae_in: Float[Tensor, "B SD"]) -> Tensor:
        """`mean_B sum_s |x_hat_s - x_s|^2` in the scaled space, over `snapshots_averaged`."""
        return squared_error(sae_out, sae_in, self.free_gradient_memory) / self.snapshots_averaged

    def delta_loss(self, sae_out: Float[Tensor, "B SD"], sae_in: Float[Tensor, "B SD"]) -> Tensor:
        """`mean_B sum_s |(x_hat_s+1 - x_hat_s) - (x_s+1 - x_s)|^2` in the scaled space, over `snapshots_averaged`."""
        return change_error(sae_out, sae_in, self.n_snapshots) / self.snapshots_averaged

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Loss of a batch of raw activations (B, S, D) or (B, S D).

        `sae_in` and `sae_out` of the output are flat and scaled, and relative to b_dec with `apply_b_dec_to_input`.
        With `gradient_memory`, `hidden_pre` of the output may be empty.

        In `eval()` mode features are gated as at inference.

        Raises:
            UserError: the parameters are in half precision.
        """
        check_trainable(self.dtype)
        with torch.no_grad():
            flat = self.process_sae_in(step_input.sae_in)
            reused = None if self.backward_reads_hidden_pre else hidden_pre_in(self.free_gradient_memory, len(flat))
            product = encoder_product(flat, self.W_enc, self.b_enc, self.precision, reused)
            hidden_pre = self.hook_sae_acts_pre(product)
        sae_out, feature_acts, losses = self.losses_on_pairs(flat, hidden_pre, step_input)  # relative to b_dec
        if self.cfg.delta_coefficient:
            losses["delta_loss"] = self.cfg.delta_coefficient * self.delta_loss(sae_out, flat)
        if reused is not None:
            hidden_pre = hidden_pre.new_empty(0, self.cfg.d_sae)
        # computed now, not passed as callables: the optimiser's step changes the gates
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

    @abstractmethod
    def losses_on_pairs(
        self, flat: Float[Tensor, "B SD"], hidden_pre: Float[Tensor, "B F"], step_input: TrainStepInput
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstruction, features (B, F; dense or COO) and losses, computed on active pairs if that is faster."""

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        # only SAELens's own `training_forward_pass` calls this; ours has all terms from `losses_on_pairs`
        raise NotImplementedError

    @torch.no_grad()
    def snapshot_metrics(self, flat: Tensor, sae_out: Tensor, feature_acts: Tensor) -> dict[str, Any]:
        """Explained variance and L0 per snapshot, by the name they are logged under."""
        S = self.n_snapshots
        if self.gate_per_snapshot:
            acts = feature_acts.to_dense()
            active = torch.stack([self.snapshot_acts(acts, s).count_nonzero().float() for s in range(S)])
        else:
            active = n_active(feature_acts).float().expand(S).clone()
        l0 = self.strategy.sum_features_(active) / len(flat)
        explained = explained_variance(flat, sae_out, S)
        labels = self.cfg.snapshot_labels[:S]
        return {
            **{f"explained_variance/{label}": explained[s] for s, label in enumerate(labels)},
            **{f"l0/{label}": l0[s] for s, label in enumerate(labels)},
        }

    def saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of this training by name, as those of a trained crosscoder."""
        return dict(tensors)

    def trained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a trained crosscoder by name, as those of this training."""
        return dict(tensors)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        as_trained = self.saved(state_dict)
        state_dict.clear()
        state_dict.update(as_trained)
        super().process_state_dict_for_saving_inference(state_dict)
        self.cfg.metadata.checksums[CONFIG] = config_checksum(self.cfg.get_inference_sae_cfg_dict())

    @override
    def save(self, path: str | Path) -> Path:
        self.save_inference_model(path)
        share(Path(path) / WEIGHTS)
        return Path(path)

    def to_inference(self) -> Crosscoder:
        """The inference crosscoder over the same parameters (shared, not copied)."""
        config = self.cfg.get_inference_sae_cfg_dict()
        config["metadata"]["activation_scale"] = self.activation_scale.tolist()
        state_dict = self.saved({**self.state_dict(), "W_enc": self.W_enc.detach()})
        crosscoder = SAE.from_dict({**config, "device": "meta"})
        crosscoder.load_state_dict(state_dict, assign=True)
        crosscoder.requires_grad_(False)
        # copies nothing on the same device and dtype, but tells SAELens where the parameters are
        crosscoder.to(device=self.device, dtype=self.dtype)
        assert isinstance(crosscoder, Crosscoder)
        return crosscoder.eval()


class _MovingBias(torch.autograd.Function):
    """`b_enc`, with the gradient that `(x - b_dec) W_enc + b_enc` has for b_dec: `-W_enc db_enc`."""

    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, b_dec: Tensor, W_enc: Tensor, strategy: Strategy) -> Tensor:
        del b_dec
        ctx.W_enc, ctx.strategy = W_enc, strategy
        return b_enc.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        return g, ctx.strategy.sum_features_(-(ctx.W_enc @ g)), None, None


def check_trainable(dtype: torch.dtype | str) -> None:
    """Refuse parameters in half precision, where most of Adam's updates would be lost in rounding."""
    name = str(dtype).removeprefix("torch.")
    if name in ("float16", "bfloat16"):
        raise UserError(
            f"dtype={name!r} is not available in training: small updates would be lost in rounding; keep "
            "dtype='float32' and choose TrainConfig(precision='bfloat16') for fast products"
        )


@torch.no_grad()
def explained_variance(flat: Float[Tensor, "B SD"], sae_out: Float[Tensor, "B SD"], n_snapshots: int) -> Tensor:
    """`1 - E|x_hat - x|^2 / E|x - mean x|^2` of each snapshot over a batch, (S,)."""
    error = (sae_out - flat).unflatten(1, (n_snapshots, -1))
    variance = flat.var(0, correction=0).unflatten(0, (n_snapshots, -1)).sum(-1)
    return 1 - torch.linalg.vector_norm(error, dim=(0, 2)).square() / (len(flat) * variance)


def n_active(feature_acts: Float[Tensor, "B F"]) -> Tensor:
    """Number of active pairs in the features of a batch, dense or COO."""
    return (feature_acts.values() if feature_acts.is_sparse else feature_acts).count_nonzero()


def drawn_rows(n: int, width: int, keep: slice, dtype: torch.dtype) -> Float[Tensor, "rows width"]:
    """The rows `keep` of `torch.randn(n, width)`, drawn in blocks: the same for every number of processes."""
    size = max(1, DRAWN // (16 * width)) * 16
    parts = [torch.empty(0, width, dtype=dtype)]
    for first in range(0, keep.stop, size):
        rows = torch.randn(min(size, n - first), width, dtype=dtype)
        parts.append(rows[max(0, keep.start - first) : max(0, keep.stop - first)])
    return torch.cat(parts)
