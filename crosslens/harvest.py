"""Activations of all snapshots at a hook point, one snapshot after the other; and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.errors import UserError
from crosslens.hooks import canonical_hook, hook_layer
from crosslens.snapshots import Snapshots


@torch.no_grad()
def harvest(
    snapshots: Snapshots,
    tokens: Int[Tensor, "N T"],
    hook_name: str,
    *,
    device: str = "cpu",
    batch_tokens: int = 16_384,
    backend: str = "bridge",
    only: int | None = None,
) -> Float[Tensor, "N T S D"]:
    """Activations of all snapshots at a hook point, one snapshot after the other; only blocks up to the hook are run.

    Args:
        snapshots: models of one pretraining run.
        tokens: sequences of equal length.
        hook_name: TransformerLens name such as `blocks.1.hook_resid_post`.
        device: where the models run; the result is on the CPU.
        batch_tokens: tokens per forward pass.
        backend: "bridge" or "hooked_transformer".
        only: harvest this snapshot alone; S is then 1.

    Raises:
        UserError: an activation is not finite; snapshot and hook are named.
    """
    chosen = range(len(snapshots)) if only is None else [only]
    name, layer = canonical_hook(hook_name), hook_layer(hook_name)
    out = torch.empty(*tokens.shape, len(chosen), snapshots.d_model)
    step = max(1, batch_tokens // tokens.shape[1])
    for column, s in enumerate(chosen):
        model = snapshots.model(s, device=device, backend=backend)
        for start in range(0, len(tokens), step):
            batch = tokens[start : start + step].long().to(device)
            _, cache = model.run_with_cache(batch, names_filter=name, stop_at_layer=layer, return_cache_object=False)
            out[start : start + step, :, column] = cache[name].float().cpu()
        if not torch.isfinite(out[:, :, column]).all():
            raise UserError(
                f"snapshot {snapshots.labels[s]} has non-finite activations at {hook_name}: leave this snapshot out, "
                "or check its weights"
            )
    return out


def special_positions(tokens: Int[Tensor, "... T"], tokenizer: Any) -> Bool[Tensor, "... T"]:
    """Positions whose token is the tokenizer's BOS or padding token."""
    ids = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    special = torch.zeros_like(tokens, dtype=torch.bool)
    for token in ids:
        special |= tokens == token
    return special


@dataclass(frozen=True)
class Plan:
    """What a harvest costs, before anything is run.

    Attributes:
        n_tokens: tokens per snapshot for training, special positions left out.
        n_sequences: sequences for training and held-out evaluation.
        n_snapshots: S.
        d_model: D.
        forwards: tokens through a model, summed over snapshots, for one pass over the data.
        live_bytes: memory of one block of activations while training live.
        cache_bytes: disk space of the cache in bfloat16; twice that in float32.
        seconds: estimate for one pass from a measured forward of the first snapshot, NaN when not measured.
    """

    n_tokens: int
    n_sequences: int
    n_snapshots: int
    d_model: int
    forwards: int
    live_bytes: int
    cache_bytes: int
    seconds: float

    def __str__(self) -> str:
        estimate = "not measured" if math.isnan(self.seconds) else f"about {self.seconds:,.0f} s"
        return "\n".join(
            [
                f"tokens      {self.n_tokens:,} in {self.n_sequences:,} sequences",
                f"snapshots   {self.n_snapshots} x d_model {self.d_model}",
                f"forwards    {self.forwards:,} tokens for one pass over the data, {estimate}",
                f"memory      {self.live_bytes / 2**20:,.0f} MiB of activations at a time",
                f"cache       {self.cache_bytes / 2**20:,.0f} MiB on disk in bfloat16, if cached",
            ]
        )
