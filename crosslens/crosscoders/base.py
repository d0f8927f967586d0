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
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from typing_extensions import override

from crosslens.crosscoders.sparse import encoder_product
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
