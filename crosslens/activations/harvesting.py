"""Activations of snapshots at one or several hook points; the models run up to the deepest hook and no further.

1. A forward pass ends when the last of its hook points was read: `run_to_hooks`. Each activation is copied to the host
   while the device goes on.
2. `harvest` gives the activations of all snapshots in memory; `fill` writes them into caches, with one model in memory
   at a time, all hook points in one pass. A thread writes a shard while the model runs on the next.
3. `harvest_together` splits the forward passes of live activations over processes, which exchange the results. The
   passes are those of one process, so the activations are, too.
4. `rounding_error` says what another dtype or attention than float32 and eager does to the activations.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from crosslens.activations.cache import ActivationCache, turns
from crosslens.distributed.devices import rank_and_world
from crosslens.distributed.parallel import TIMEOUT, Parallel
from crosslens.distributed.together import in_rounds
from crosslens.errors import UserError
from crosslens.progress import tqdm
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook, hook_layer
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.snapshot import LanguageModel, Snapshot

# the prefetching thread and the evaluation share cut models, and hooks are attached to the model itself
_CUT_MODELS = threading.RLock()

SCORE_BYTES = 1 << 30
"""Attention scores of a forward pass with eager attention, at most: as float32, twice, as most families hold them."""

_CPU_TOKENS = 4096
_M_MMAP_THRESHOLD = -3  # from malloc.h
_MAPPED_BYTES = 4 << 20
_HEAP_BYTES = 32 << 20  # the largest block that glibc comes to keep by itself


def pass_sequences(n_positions: int, n_heads: int, settings: ModelSettings) -> int:
    """Sequences of a forward pass: of `batch_tokens` tokens, or as many as have scores of `SCORE_BYTES`.

    Args:
        n_positions: T.
        n_heads: heads of attention.
        settings: tokens of a forward pass, and attention.
    """
    n = settings.batch_tokens // n_positions
    if settings.attention == "eager":
        n = min(n, SCORE_BYTES // (8 * n_heads * n_positions**2))
    return max(1, n)


def forward_sequences(n_positions: int, n_heads: int, settings: ModelSettings) -> int:
    """Sequences that run at a time: `pass_sequences`, which also lays out the data, or 4,096 tokens on a CPU.

    A CPU gains nothing from larger passes, and gets their memory from the system anew each time: a small model takes up
    to twice as long.

    Args:
        n_positions: T.
        n_heads: heads of attention.
        settings: device, tokens of a forward pass, and attention.
    """
    n = pass_sequences(n_positions, n_heads, settings)
    return n if torch.device(settings.device).type != "cpu" else min(n, max(1, _CPU_TOKENS // n_positions))


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
    out = torch.empty(*tokens.shape, len(chosen), snapshots.hook_width(hook_name))
    n_blocks = hook_layer(hook_name) if cut else None

    def harvest_one(s: int) -> Float[Tensor, "N T D"]:
        acts = torch.empty(*tokens.shape, out.shape[-1])
        with _CUT_MODELS:
            model = snapshots.model(s, settings, n_blocks)
            run_to_hooks(model, tokens, {hook_name: acts}, settings, abandoned)
        check_finite(acts, snapshots.labels[s], hook_name)
        return acts

    for column, acts in enumerate(in_rounds(harvest_one, chosen)):
        out[:, :, column] = acts
    return out


class Together(NamedTuple):
    """Processes that harvest together, in a thread of their own beside the training."""

    rank: int
    n: int
    group: Any

    @classmethod
    @contextmanager
    def of(cls, parallel: Parallel) -> Generator[Together | None, None, None]:
        """All processes, each of which enters and leaves; None for a single one."""
        if parallel.alone:
            yield None
            return
        # threads of one process must not share a group; activations are exchanged on the host
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        try:
            yield cls(parallel.rank, parallel.n_ranks, group)
        finally:
            dist.destroy_process_group(group)  # pyright: ignore[reportArgumentType]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of them."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return bool(found)

    def exchange(self, rows: Tensor, cuts: Sequence[int]) -> None:
        """Complete the rows: process r has those from `cuts[r]` to `cuts[r + 1]`."""
        for rank, (first, last) in enumerate(pairwise(cuts)):
            if first < last:
                dist.broadcast(rows[first:last], rank, self.group)


def harvest_together(
    snapshots: Snapshots,
    tokens: Int[Tensor, "N T"],
    hook_name: str,
    settings: ModelSettings,
    together: Together,
    abandoned: Callable[[], bool],
) -> Float[Tensor, "N T S D"]:
    """As `harvest` with `cut`, in n processes: each runs 1/n of the passes of the models, of neighbouring snapshots.

    Args:
        snapshots: models of one pretraining run.
        tokens: sequences of equal length, the same in all processes.
        hook_name: the hook point.
        settings: how the models run.
        together: the processes; all of them call this.
        abandoned: called before the first pass; True in any process ends the harvest in all with `AbandonedError`.
    """
    (N, T), S = tokens.shape, len(snapshots)
    if together.any(abandoned()):
        raise AbandonedError
    config: Any = snapshots[0].config()
    size = pass_sequences(T, config.num_attention_heads, settings)
    out = torch.empty(S * N, T, snapshots.hook_width(hook_name))
    starts = [*(s * N + first for s in range(S) for first in range(0, N, size)), S * N]
    cuts = [starts[rank * (len(starts) - 1) // together.n] for rank in range(together.n + 1)]
    first, last = cuts[together.rank], cuts[together.rank + 1]
    for s in range(first // N, -(-last // N)):
        begin, end = max(first, s * N), min(last, (s + 1) * N)
        with _CUT_MODELS:
            model = snapshots.model(s, settings, hook_layer(hook_name))
            run_to_hooks(model, tokens[begin - s * N : end - s * N], {hook_name: out[begin:end]}, settings)
    together.exchange(out, cuts)
    for s, acts in enumerate(out.split(N)):  # by all, so that all end with the same message
        check_finite(acts, snapshots.labels[s], hook_name)
    return rearrange(out, "(S N) T D -> N T S D", S=S)


@torch.no_grad()
def run_to_hooks(
    model: LanguageModel,
    tokens: Int[Tensor, "N T"],
    outs: Mapping[str, Float[Tensor, "N T _"]],
    settings: ModelSettings,
    abandoned: Callable[[], bool] | None = None,
) -> None:
    """Write one model's activations at several hook points; each forward pass stops at the deepest.

    Args:
        model: whole, or cut at the deepest hook or above.
        tokens: sequences of equal length.
        outs: the tensor to fill for each hook point, on the host; each has its own width. A copy from a GPU does not
            hold up the next forward pass if the tensor is in pinned memory (`host_tensor`).
        settings: device and attention, and tokens of a forward pass (see `forward_sequences`).
        abandoned: called before every forward pass; True ends the harvest with `AbandonedError`.

    Raises:
        UserError: a hook point that the model lacks, or whose activation is no vector for each position, or of another
            width.
    """
    places: dict[str, list[Tensor]] = {}
    for name, out in outs.items():
        places.setdefault(canonical_hook(name), []).append(out)
    on_gpu = torch.device(settings.device).type == "cuda" and torch.cuda.is_available()
    copies = torch.cuda.Stream(settings.device) if on_gpu else None
    step = forward_sequences(tokens.shape[1], model.cfg.n_heads, settings)
    for start in range(0, len(tokens), step):
        if abandoned is not None and abandoned():
            raise AbandonedError
        left = {*places}

        def keep(name: str, activation: Tensor, hook: Any, start: int = start, left: set[str] = left) -> None:
            del hook  # TransformerLens passes the hook point by this name
            flat = _as_vectors(name, activation, places[name])
            for out in places[name]:
                here = out[start : start + step]
                if copies is None:
                    here.copy_(flat)
                    continue
                copies.wait_stream(torch.cuda.current_stream(flat.device))
                with torch.cuda.stream(copies):
                    here.copy_(flat, non_blocking=here.is_pinned() and here.is_contiguous())
                flat.record_stream(copies)
            left.discard(name)
            if not left:
                raise _Reached

        hooks = [(name, partial(keep, name)) for name in places]
        try:
            model.run_with_hooks(tokens[start : start + step].long().to(settings.device), fwd_hooks=hooks)
        except _Reached:
            continue
        raise _not_reached(model, min(left))
    if copies is not None:
        copies.synchronize()


def _as_vectors(name: str, activation: Tensor, outs: Sequence[Tensor]) -> Float[Tensor, "n T D"]:
    """The activation as one vector for each position: heads are put side by side."""
    if name.endswith("attn.hook_z") and activation.ndim == 4:
        activation = activation.flatten(2)
    width = outs[0].shape[-1]
    if activation.ndim != 3 or activation.shape[-1] != width:
        raise UserError(
            f"{name} has activations of shape {tuple(activation.shape)}, where (B, T, {width}) is needed: choose "
            "another hook point"
        )
    return activation


def _not_reached(model: Any, name: str) -> UserError:
    block = "".join(name.split(".")[1:2]) or "0"  # a crosscoder's config may name anything
    return UserError(
        f"{type(model).__name__} never reached hook point {name}: choose another, such as "
        f"'blocks.{block}.hook_resid_post', or attention='eager', which has all that are inside attention"
    )


def host_tensor(*shape: int, device: str) -> Tensor:
    """An uninitialised float32 tensor on the host, in pinned memory if it is to be filled from a GPU."""
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return torch.empty(*shape, pin_memory=on_gpu)


def rounding_error(
    snapshot: Snapshot, tokens: Int[Tensor, "N T"], widths: Mapping[str, int], settings: ModelSettings
) -> dict[str, float]:
    """Relative squared error of a snapshot's activations against float32 and eager attention, for each hook point.

    `sum((a - a32)²) / sum(a32²)` over tokens and dimensions. One model at a time is in memory.

    Args:
        snapshot: its weights are downloaded if needed.
        tokens: a few sequences.
        widths: width of each hook point.
        settings: the dtype and attention to judge.
    """
    n_blocks = max(map(hook_layer, widths))
    found: list[dict[str, Tensor]] = []
    for ours in (settings, replace(settings, dtype="float32", attention="eager")):
        model = snapshot.load(ours.device, ours.dtype, ours.backend, n_blocks, attention=ours.attention)
        outs = {name: torch.empty(*tokens.shape, width) for name, width in widths.items()}
        run_to_hooks(model, tokens, outs, ours)
        found.append(outs)
        del model
        gc.collect()  # hooks make reference cycles of a model's parts
    given, exact = found
    return {
        name: float((given[name] - exact[name]).double().square().sum() / exact[name].double().square().sum())
        for name in widths
    }


def describe_error(settings: ModelSettings, label: str, n_tokens: int, errors: Mapping[str, float]) -> str:
    """The error of a dtype and attention, in one line."""
    parts = ", ".join(f"{error:.1e} at {name}" for name, error in errors.items())
    return (
        f"models in {settings.dtype} with {settings.attention} attention: squared error relative to float32 and eager "
        f"{parts} ({label}, {n_tokens:,} tokens)"
    )


def fill(
    caches: Mapping[str, ActivationCache],
    snapshots: Snapshots,
    pairs: Sequence[tuple[int, int]],
    settings: ModelSettings,
    *,
    evict: bool = False,
) -> int:
    """Harvest (shard, snapshot) pairs into the caches of several hook points, with one model in memory at a time.

    Snapshot by snapshot: its weights are downloaded and hashed, refused if they equal those of another snapshot, and
    run; a thread writes a shard while the model runs on the next. Processes started by torchrun begin at different
    pairs, and wait for the pairs that another process works on.

    Args:
        caches: the caches to fill, of the same shards, keyed by hook point.
        snapshots: models of one pretraining run.
        pairs: what any of them lacks.
        settings: how the models run.
        evict: delete the weights that crosslens downloaded as soon as their snapshot is complete, so that those of one
            snapshot are on the disk (of as many as there are processes, if there are several).

    Returns:
        Bytes of weights that were deleted.

    Raises:
        UserError: an activation is not finite (the message names snapshot, hook and shard), equal snapshots, or the
            disk is full.
    """
    rank, world = rank_and_world()
    pairs = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    start = len(pairs) * rank // world
    first = next(iter(caches.values()))
    freed = 0
    if evict:  # what an interrupted harvest left
        freed = sum(snapshots.evict(s) for s in set(range(len(snapshots))) - {s for _, s in pairs})

    def write(shard: int, s: int, outs: Mapping[str, Tensor], lock: FileLock) -> None:
        for name, acts in outs.items():
            check_finite(acts, snapshots.labels[s], name, f"shard {shard}", first.span(shard)[0])
            caches[name].write(shard, s, acts)
        lock.release()

    def leave(s: int) -> int:
        complete = evict and all(c.has(shard, s) for c in caches.values() for shard in range(c.n_shards))
        return snapshots.evict(s) if complete else 0

    loaded, model = None, None
    written: Future[None] | None = None  # one shard is written while the next is harvested, so two are in memory
    with (
        large_blocks_mapped(),
        ExitStack() as locks,
        ThreadPoolExecutor(1, "crosslens-writer") as writer,
        tqdm(total=len(pairs), desc="Harvesting", unit="shard", leave=False) as progress,
    ):
        for (shard, s), lock in turns([*caches.values()], pairs[start:] + pairs[:start]):
            locks.callback(lock.release)  # after an error, too
            if loaded != s:
                if written is not None:
                    written.result()
                if loaded is not None:
                    freed += leave(loaded)
                loaded, model = s, None
                gc.collect()  # hooks make reference cycles of a model's parts
                snapshots.check_arrival(s)
                n_blocks = max(map(hook_layer, caches))
                model = snapshots[s].load(
                    settings.device, settings.dtype, settings.backend, n_blocks, attention=settings.attention
                )
            begin, end = first.span(shard)
            tokens = first.tokens[begin:end]
            outs = {
                name: host_tensor(*tokens.shape, cache.d_model, device=settings.device)
                for name, cache in caches.items()
                if not cache.has(shard, s)
            }
            run_to_hooks(model, tokens, outs, settings)
            if written is not None:
                written.result()
            written = writer.submit(write, shard, s, outs, lock)
            del outs
            progress.update()
        if written is not None:
            written.result()
        if loaded is not None:
            freed += leave(loaded)
    for cache in caches.values():
        cache.remove_locks()
    return freed


@contextmanager
def large_blocks_mapped() -> Generator[None, None, None]:
    """Let glibc map large blocks by themselves, so that they are given back to the system once they are freed.

    glibc soon keeps blocks of up to 32 MiB in its heap, where those of a forward pass leave gaps of other sizes than
    the next pass needs: the heap of a harvest grows by a quarter. Another C library, or a threshold that the user set,
    is left alone.
    """
    if platform.libc_ver()[0] != "glibc" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    try:
        yield
    finally:  # training allocates the same sizes in every step, and would wait for new pages
        libc.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)


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
    """The hook points were read; the rest of the model need not run."""
