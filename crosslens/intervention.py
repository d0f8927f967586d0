"""Splicing: the block output of one snapshot, rewritten through the crosscoder, with the gates of the clean run.

For a batch of tokens the features come once from the clean activations of *all* snapshots (`clean_run`) and are frozen.
For snapshot s the block output becomes

    with the error node      a_s + (f'_s - f_s) W_dec[:, s] / c_s      (nothing edited: the clean activation)
    without it               (f'_s W_dec[:, s] + b_dec[s]) / c_s

where f_s are the clean features as snapshot s gates them, and f'_s the edited ones. Edits act on f_s through the linear
decoder, never through a gate computed anew. Positions that training leaves out (BOS, padding) keep their clean
activation in every splice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.crosscoders import Crosscoder
from crosslens.hooks import canonical_hook


@dataclass(frozen=True)
class CleanRun:
    """One batch of tokens as all snapshots see it.

    Attributes:
        tokens: (B, T).
        acts: (B, T, S, D) raw activations at the hook.
        features: (B, T, F), zero at positions that are left out.
        keep: (B, T) positions that are spliced.
    """

    tokens: Int[Tensor, "B T"]
    acts: Float[Tensor, "B T S D"]
    features: Float[Tensor, "B T F"]
    keep: Bool[Tensor, "B T"]

    def snapshot_acts(self, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "B T F"]:
        """`f_is` of the clean run at one snapshot."""
        return crosscoder.snapshot_acts(self.features, snapshot)


@torch.no_grad()
def clean_run(
    crosscoder: Crosscoder,
    tokens: Int[Tensor, "B T"],
    acts: Float[Tensor, "B T S D"],
    keep: Bool[Tensor, "B T"],
) -> CleanRun:
    """Encode clean activations of all snapshots; features of positions that are left out are zero."""
    return CleanRun(tokens, acts, crosscoder.encode(acts) * keep[..., None], keep)


def replace_at(replacement: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]) -> Callable[[Tensor, Any], Tensor]:
    """A hook function that puts `replacement` at the kept positions and leaves the others clean."""

    def hook(activation: Tensor, hook: Any) -> Tensor:
        del hook  # TransformerLens passes the hook point by this name
        return torch.where(keep[..., None], replacement.to(activation.dtype), activation)

    return hook


def spliced_logits(
    model: Any,
    tokens: Int[Tensor, "B T"],
    hook_name: str,
    replacement: Float[Tensor, "B T D"],
    keep: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T V"]:
    """Logits of a model whose activation at the hook is replaced at the kept positions.

    Args:
        model: TransformerBridge or HookedTransformer.
        tokens: the batch.
        hook_name: as in `Activations`.
        replacement: what the block puts out instead, raw; may carry gradients.
        keep: positions that are replaced.
    """
    hooks = [(canonical_hook(hook_name), replace_at(replacement, keep))]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")
