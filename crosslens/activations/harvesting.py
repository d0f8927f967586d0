"""Activations of snapshots at a hook point; the models run up to the hook and no further."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.activations.cache import ActivationCache
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook, hook_layer
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.snapshot import LanguageModel

# the prefetching thread and the evaluation share cut models, and hooks are attached to the model itself
_CUT_MODELS = threading.RLock()


def harvest(
    snapshots: Snapshots,
    tokens: Int[Tensor, "N T"],
    hook_name: str,
    settings: ModelSettings | None = None,
    *,
    only: int | None = None,
    cut: bool = False,
    abandoned: Callable[[], bool] | None = None,
) -> Float[Tensor, "N T S D"]:
    """Activations of all snapshots at a hook point, one snapshot after the other.

    Args:
        snapshots: models of one pretraining run.
        tokens: sequences of equal length.
        hook_name: TransformerLens name such as `blocks.1.hook_resid_post`.
        settings: how the models run; the result is on the CPU, in float32.
        only: harvest this snapshot alone; S is then 1.
        cut: use models without the blocks above the hook instead of the whole ones that other analyses share.
        abandoned: called before every forward pass; True ends the harvest with `AbandonedError`.

    Raises:
        UserError: an activation is not finite; the message names snapshot and hook.
    """
    settings = settings or ModelSettings()
    chosen = range(len(snapshots)) if only is None else [only]
    out = torch.empty(*tokens.shape, len(chosen), snapshots.d_model)
    n_blocks = hook_layer(hook_name) if cut else None
    for column, s in enumerate(chosen):
        with _CUT_MODELS:
            model = snapshots.model(s, settings, n_blocks)
            run_to_hook(model, tokens, hook_name, out[:, :, column], settings, abandoned)
        check_finite(out[:, :, column], snapshots.labels[s], hook_name)
    return out


@torch.no_grad()
def run_to_hook(
    model: LanguageModel,
    tokens: Int[Tensor, "N T"],
    hook_name: str,
    out: Float[Tensor, "N T D"],
    settings: ModelSettings,
    abandoned: Callable[[], bool] | None = None,
) -> None:
    """Write one model's activations into `out`; each forward pass stops at the hook."""
    name = canonical_hook(hook_name)
    step = max(1, settings.batch_tokens // tokens.shape[1])
    for start in range(0, len(tokens), step):
        if abandoned is not None and abandoned():
            raise AbandonedError

        def keep(activation: Tensor, hook: Any, start: int = start) -> None:
            del hook
            out[start : start + step] = activation
            raise _Reached

        try:
            model.run_with_hooks(tokens[start : start + step].long().to(settings.device), fwd_hooks=[(name, keep)])
        except _Reached:
            continue
        raise AssertionError(f"{name} was not reached")


def fill(
    cache: ActivationCache,
    snapshots: Snapshots,
    hook_name: str,
    pairs: list[tuple[int, int]],
    settings: ModelSettings,
) -> None:
    """Harvest (shard, snapshot) pairs into a cache, with one model in memory at a time, cut at the hook.

    Processes started by torchrun begin at different pairs, and wait for the pairs that another process works on.

    Args:
        cache: the cache to fill.
        snapshots: models of one pretraining run.
        hook_name: the hook point.
        pairs: what is missing, snapshot by snapshot.
        settings: how the models run.

    Raises:
        UserError: an activation is not finite (the message names snapshot, hook and shard), or the disk is full.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    progress = tqdm(total=len(pairs), desc="Harvesting", unit="shard")
    loaded, model = None, None
    with cache.harvesting(pairs, len(pairs) * rank // world) as turns:
        for shard, s in turns:
            if loaded != s:
                loaded, model = s, None
                gc.collect()  # hooks make reference cycles of a model's parts
                model = snapshots[s].load(settings.device, settings.dtype, settings.backend, hook_layer(hook_name))
            first, last = cache.span(shard)
            acts = torch.empty(last - first, cache.tokens.shape[1], cache.d_model)
            run_to_hook(model, cache.tokens[first:last], hook_name, acts, settings)
            check_finite(acts, snapshots.labels[s], hook_name, f"shard {shard}", first)
            cache.write(shard, s, acts)
            progress.update()
    progress.close()


def check_finite(acts: Float[Tensor, "n T D"], label: str, hook_name: str, where: str = "", first: int = 0) -> None:
    """Refuse activations with NaN or infinity.

    Args:
        acts: activations of one snapshot.
        label: snapshot label.
        hook_name: the hook point.
        where: part of the data, such as "shard 3".
        first: index of the first sequence.

    Raises:
        UserError: names the snapshot, the hook, the part, and the first bad sequence and position.
    """
    if not torch.isfinite(acts.sum()):  # the sum alone may overflow
        bad = (~torch.isfinite(acts)).any(-1).nonzero()
        if len(bad):
            sequence, position = bad[0].tolist()
            raise UserError(
                f"snapshot {label} has non-finite activations at {hook_name}{where and f', {where}'} ({len(bad)} "
                f"positions, the first in sequence {first + sequence} at position {position}): leave this snapshot "
                "out, or check its weights"
            )


class AbandonedError(Exception):
    """The result is no longer needed."""


class _Reached(Exception):
    """The hook point was read; the rest of the model need not run."""
