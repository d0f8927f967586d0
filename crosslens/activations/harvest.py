"""Activations of snapshots at a hook point: the models run as far as the hook, and no further."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.activations.cache import ActivationCache
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook, hook_layer
from crosslens.snapshots.snapshot import LanguageModel

# a cut model serves the thread that prefetches and the one that evaluates, and its hooks are the model's
_CUT_MODELS = threading.RLock()


def harvest(
    snapshots: Snapshots,
    tokens: Int[Tensor, "N T"],
    hook_name: str,
    *,
    device: str = "cpu",
    batch_tokens: int = 16_384,
    backend: str = "bridge",
    only: int | None = None,
    cut: bool = False,
    abandoned: Callable[[], bool] | None = None,
) -> Float[Tensor, "N T S D"]:
    """Activations of all snapshots at a hook point, one snapshot after the other.

    Args:
        snapshots: models of one pretraining run.
        tokens: sequences of equal length.
        hook_name: TransformerLens name such as `blocks.1.hook_resid_post`.
        device: where the models run; the result is on the CPU.
        batch_tokens: tokens per forward pass.
        backend: "bridge" or "hooked_transformer".
        only: harvest this snapshot alone; S is then 1.
        cut: by models without the blocks above the hook, in place of the whole ones that other analyses share.
        abandoned: asked before every forward pass; True ends the harvest with `AbandonedError`.

    Raises:
        UserError: an activation is not finite; snapshot and hook are named.
    """
    chosen = range(len(snapshots)) if only is None else [only]
    out = torch.empty(*tokens.shape, len(chosen), snapshots.d_model)
    n_blocks = hook_layer(hook_name) if cut else None
    for column, s in enumerate(chosen):
        with _CUT_MODELS:
            model = snapshots.model(s, device=device, backend=backend, n_blocks=n_blocks)
            run_to_hook(
                model,
                tokens,
                hook_name,
                out[:, :, column],
                device=device,
                batch_tokens=batch_tokens,
                abandoned=abandoned,
            )
        check_finite(out[:, :, column], snapshots.labels[s], hook_name)
    return out


@torch.no_grad()
def run_to_hook(
    model: LanguageModel,
    tokens: Int[Tensor, "N T"],
    hook_name: str,
    out: Float[Tensor, "N T D"],
    *,
    device: str = "cpu",
    batch_tokens: int = 16_384,
    abandoned: Callable[[], bool] | None = None,
) -> None:
    """Write one model's activations into `out`; a forward pass ends where they are read."""
    name = canonical_hook(hook_name)
    step = max(1, batch_tokens // tokens.shape[1])
    for start in range(0, len(tokens), step):
        if abandoned is not None and abandoned():
            raise AbandonedError

        def keep(activation: Tensor, hook: Any, start: int = start) -> None:
            del hook
            out[start : start + step] = activation
            raise _Reached

        try:
            model.run_with_hooks(tokens[start : start + step].long().to(device), fwd_hooks=[(name, keep)])
        except _Reached:
            continue
        raise AssertionError(f"{name} was not reached")


def fill(
    cache: ActivationCache,
    snapshots: Snapshots,
    hook_name: str,
    pairs: list[tuple[int, int]],
    *,
    device: str = "cpu",
    batch_tokens: int = 16_384,
    backend: str = "bridge",
) -> None:
    """Harvest (shard, snapshot) pairs into a cache, with one model in memory at a time, cut at the hook.

    Processes that torchrun has started begin at different pairs; what another process is at is waited for.

    Args:
        cache: where to.
        snapshots: models of one pretraining run.
        hook_name: where they are read.
        pairs: what is missing, snapshot by snapshot.
        device: where the models run.
        batch_tokens: tokens per forward pass.
        backend: "bridge" or "hooked_transformer".

    Raises:
        UserError: an activation is not finite (snapshot, hook and shard are named), or the disk is full.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    progress = tqdm(total=len(pairs), desc="Harvesting", unit="shard")
    loaded, model = None, None
    with cache.harvesting(pairs, len(pairs) * rank // world) as turns:
        for shard, s in turns:
            if loaded != s:
                loaded, model = s, None
                gc.collect()  # the hooks tie a model's parts into cycles
                model = snapshots[s].load(device, backend=backend, n_blocks=hook_layer(hook_name))
            first, last = cache.span(shard)
            acts = torch.empty(last - first, cache.tokens.shape[1], cache.d_model)
            run_to_hook(model, cache.tokens[first:last], hook_name, acts, device=device, batch_tokens=batch_tokens)
            check_finite(acts, snapshots.labels[s], hook_name, f"shard {shard}", first)
            cache.write(shard, s, acts)
            progress.update()
    progress.close()


def check_finite(acts: Float[Tensor, "n T D"], label: str, hook_name: str, where: str = "", first: int = 0) -> None:
    """Refuse activations with NaN or infinity.

    Args:
        acts: of one snapshot.
        label: of the snapshot.
        hook_name: where they were read.
        where: what part of the data it is, such as "shard 3".
        first: number of the first sequence.

    Raises:
        UserError: names snapshot, hook, part, and the first such sequence and position.
    """
    if not torch.isfinite(acts.sum()):  # an overflow of the sum is not one of the activations
        bad = (~torch.isfinite(acts)).any(-1).nonzero()
        if len(bad):
            sequence, position = bad[0].tolist()
            raise UserError(
                f"snapshot {label} has non-finite activations at {hook_name}{where and f', {where}'} ({len(bad)} "
                f"positions, the first in sequence {first + sequence} at position {position}): leave this snapshot "
                "out, or check its weights"
            )


def special_positions(tokens: Int[Tensor, "... T"], tokenizer: Any) -> Bool[Tensor, "... T"]:
    """Positions whose token is the tokenizer's BOS or padding token."""
    ids = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    special = torch.zeros_like(tokens, dtype=torch.bool)
    for token in ids:
        special |= tokens == token
    return special


class AbandonedError(Exception):
    """Nobody waits for the result any more."""


class _Reached(Exception):
    """The hook point was read: nothing above it is needed."""
