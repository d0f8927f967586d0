"""One snapshot of a crosscoder as an ordinary SAE of SAELens, for one batch.

A crosscoder's features depend on the activations of all snapshots, but a model has only its own at the hook point. The
features are therefore computed first, from the clean activations of all snapshots, and stored in the view: `encode`
returns them for any activation, `decode` is the snapshot's own decoder in raw space.

    x_hat = f_s W + b,   W = W_dec[:, s] / c_s,   b = b_dec[s] / c_s

It attaches with SAELens's `SAETransformerBridge`; hooks on `hook_sae_acts_post` edit the frozen features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE, SAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from typing_extensions import override

from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.splice import CleanRun
from crosslens.snapshots.lookup import find_snapshot


@torch.no_grad()
def snapshot_view(crosscoder: Crosscoder, snapshot: int, features: Float[Tensor, "B T F"] | CleanRun) -> SnapshotView:
    """A decode-only SAE of one snapshot for a fixed batch.

    Args:
        crosscoder: the crosscoder.
        snapshot: index of the snapshot whose model the view is attached to.
        features: (B, T, F) from `crosscoder.encode` of the batch's clean activations; or a `CleanRun`, so that
            positions that training leaves out keep their clean activation, as in `Splice`.

    Returns:
        The view: `with model.saes(saes=[view], use_error_term=True): model(tokens)`.

    Raises:
        UserError: no such snapshot, or features of the wrong shape.
    """
    s = find_snapshot(crosscoder.cfg.snapshot_labels, snapshot)
    run = features if isinstance(features, CleanRun) else None
    shared = features.features if isinstance(features, CleanRun) else features
    D, F = crosscoder.d_model, crosscoder.cfg.d_sae
    if shared.ndim != 3 or shared.shape[-1] != F:
        raise UserError(
            f"features of shape {tuple(shared.shape)} do not fit this crosscoder: give (B, T, {F}), from its encode of "
            "the activations of (B, T) tokens"
        )
    recorded = crosscoder.cfg.metadata
    metadata = SAEMetadata(
        hook_name=recorded.hook_name, model_name=recorded.model_name, snapshot=crosscoder.cfg.snapshot_labels[s]
    )
    dtype, device = str(crosscoder.dtype).removeprefix("torch."), str(crosscoder.device)
    view = SnapshotView(SnapshotViewConfig(d_in=D, d_sae=F, dtype=dtype, device=device, metadata=metadata))
    # copies, so that changing the view does not change the crosscoder
    zero = shared.new_zeros(1, F)
    view.W_dec.copy_(crosscoder.W_dec_by_snapshot[:, s] / crosscoder.activation_scale[s])
    view.b_dec.copy_(crosscoder.decode_snapshot(zero, s)[0])
    view.features = crosscoder.snapshot_acts(shared, s).detach().clone()
    if run is not None:
        view.left_out = ~run.keep
        view.clean = run.acts[:, :, s].detach().clone()
    return view.eval().requires_grad_(False)


@dataclass(kw_only=True)
class SnapshotViewConfig(SAEConfig):
    """Configuration of a `SnapshotView`."""

    apply_b_dec_to_input: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "snapshot_view"


class SnapshotView(SAE[SnapshotViewConfig]):
    """Frozen features of one batch with the decoder of one snapshot; made by `snapshot_view`.

    Attributes:
        features: (B, T, F) that `encode` returns.
        left_out: (B, T) positions that are not reconstructed.
        clean: (B, T, D) activation that `decode` returns there.
    """

    cfg: SnapshotViewConfig
    features: Float[Tensor, "B T F"]
    left_out: Bool[Tensor, "B T"] | None
    clean: Float[Tensor, "B T D"] | None

    @override
    def initialize_weights(self) -> None:
        F, D = self.cfg.d_sae, self.cfg.d_in
        self.W_dec = nn.Parameter(torch.zeros(F, D, dtype=self.dtype, device=self.device))
        self.b_dec = nn.Parameter(torch.zeros(D, dtype=self.dtype, device=self.device))
        # buffers move to other devices with the view, but are not weights and are not saved
        self.register_buffer("features", torch.zeros(0, 0, F, dtype=self.dtype, device=self.device), persistent=False)
        self.register_buffer("left_out", None, persistent=False)
        self.register_buffer("clean", None, persistent=False)

    @override
    def encode(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "B T F"]:
        """The features of the view's batch, whatever `x` is.

        Raises:
            UserError: `x` has another shape than the activations of that batch.
        """
        expected = (*self.features.shape[:-1], self.cfg.d_in)
        if tuple(x.shape) != expected:
            raise UserError(
                f"activations of shape {tuple(x.shape)} do not match this view's batch, which has shape {expected}: "
                "run the model on its tokens, or make a view of the new batch"
            )
        self.process_sae_in(x)  # calls `hook_sae_input`
        return self.hook_sae_acts_post(self.features)

    @override
    def decode(self, feature_acts: Float[Tensor, "B T F"]) -> Float[Tensor, "B T D"]:
        """Raw reconstruction of this snapshot, linear in the features."""
        decoded = feature_acts @ self.W_dec + self.b_dec
        if self.left_out is not None and self.clean is not None:
            decoded = torch.where(self.left_out[..., None], self.clean.to(decoded), decoded)
        return self.hook_sae_recons(decoded)

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        raise UserError(
            f"a view of one batch cannot be saved to {path}: save the crosscoder, and make the view again when needed"
        )

    @override
    def fold_W_dec_norm(self) -> None:
        raise _fixed("fold_W_dec_norm")

    @override
    def fold_and_get_W_dec_norm(self) -> Tensor:
        raise _fixed("fold_and_get_W_dec_norm")

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        raise _fixed("fold_activation_norm_scaling_factor")

    @override
    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        raise _fixed("fold_activation_whitening")


def _fixed(method: str) -> UserError:
    return UserError(f"{method} is not available: a view's features are fixed, and it has no encoder to fold into")
