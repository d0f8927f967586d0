"""What harvesting costs, before anything is run: disk, memory, model forwards, time; and which of two ways is better.

*Live*, every pass over the data runs all models again: right for one pass, and where the models fit into memory
together. *Cached*, each model runs once, alone, and every pass reads the disk.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from crosslens.snapshots.snapshot import cut_config

if TYPE_CHECKING:
    from crosslens.crosscoders import CrosscoderTrainingConfig

READ_BYTES_PER_SECOND = 200e6
"""A slow disk, for the estimate of a pass over the cache."""


def model_bytes(config: Any, n_blocks: int) -> int:
    """Memory of a float32 bridge of this configuration (of transformers) with its first blocks alone."""
    cut_config(config, n_blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # where queries, keys and values are one matrix, TransformerLens holds the three beside it
    return 4 * (sum(sizes.values()) + sum(size for name, size in sizes.items() if "query_key_value" in name))


# measured: arrays (B, F) of a step at its densest, which for the last two is the first one, and columns besides
_BATCH_TENSORS = {
    "topk_crosscoder": (2.0, 0),
    "batchtopk_crosscoder": (2.0, 0),
    "standard_crosscoder": (4.5, 0),
    "jumprelu_crosscoder": (3.0, 8192),
}
_WORKSPACE = 48 << 20


def training_bytes(
    architecture: CrosscoderTrainingConfig, n_snapshots: int, d_model: int, batch_size: int, n_shares: int = 1
) -> int:
    """Memory of one process for training a crosscoder in float32: weights, gradients, Adam's moments, and a step.

    Args:
        architecture: d_sae and the gate.
        n_snapshots: S.
        d_model: D.
        batch_size: tokens of a step that this process sees.
        n_shares: processes among which the features are split.
    """
    wide, F = n_snapshots * d_model, architecture.d_sae / n_shares
    held = 4 * (2 * wide * F + 2 * F)  # value, gradient, and two moments of each parameter
    factor, columns = _BATCH_TENSORS[architecture.architecture()]
    step = batch_size * (factor * F + columns + 6 * wide) + wide * F
    return int(4 * (held + step)) + _WORKSPACE


def peak_memory() -> int:
    """The most memory that this program has held so far, in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` begins with that of the program which started this one
        lines = status.read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Plan:
    """What a harvest costs, before anything is run.

    Attributes:
        n_tokens: tokens per snapshot for training, special positions left out.
        n_sequences: sequences for training and held-out evaluation.
        n_snapshots: S.
        d_model: D.
        forwards: tokens through a model, summed over snapshots, for one pass over the data.
        passes: passes over the data that training takes.
        model_bytes: one float32 model, cut at the hook.
        models_fit: whether the models of all snapshots are kept in memory together.
        block_bytes: one block of activations of all snapshots in float32.
        live_bytes: memory while training live: the models that are kept, and three blocks (the one in use, the one
            that is made meanwhile, and its shuffled copy).
        cached_bytes: memory while training from a cache, three blocks; harvesting it takes less, one model and a shard.
        cache_bytes: disk space of the cache.
        cache_dtype: its type.
        free_bytes: free disk space there.
        n_downloads: snapshots whose weights are not on this disk yet.
        seconds: estimate for one pass of all models, from a measured forward of one snapshot; NaN when not measured.
        process_bytes: memory of the program itself and its libraries, with the tokens that it has read.
        training_bytes: what training takes besides, in each process; 0 when no architecture was named.
        processes: among which the crosscoder is split.
    """

    n_tokens: int
    n_sequences: int
    n_snapshots: int
    d_model: int
    forwards: int
    passes: float
    model_bytes: int
    models_fit: bool
    block_bytes: int
    live_bytes: int
    cached_bytes: int
    cache_bytes: int
    cache_dtype: str
    free_bytes: int
    n_downloads: int
    seconds: float
    process_bytes: int
    training_bytes: int
    processes: int

    @property
    def recommendation(self) -> tuple[str, str]:
        """ "live" or "cached", and the reason."""
        if self.passes <= 1 and self.models_fit:
            return "live", "one pass over the data, and the models fit into memory together"
        reason = f"{self.passes:.3g} passes over the data, of which all but the first would run the models again"
        if not self.models_fit:
            reason = "the models do not fit into memory together, and live would load each again for every block"
        if self.cache_bytes > self.free_bytes:
            return "live", f"the disk has no room for a cache, which would be quicker ({reason})"
        return "cached", reason

    @property
    def memory(self) -> int:
        """Bytes that each process holds at the most while it trains; without an architecture, for activations alone."""
        activations = self.live_bytes if self.recommendation[0] == "live" else self.cached_bytes
        return self.process_bytes + activations + self.training_bytes

    @property
    def training(self) -> str:
        """What the memory of training is made of, in words."""
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        activations = self.memory - self.process_bytes - self.training_bytes
        return (
            f"training    {_mib(self.memory)} of memory{each}: {_mib(self.training_bytes)} for weights, gradients, "
            f"Adam and a step, {_mib(activations)} for activations, {_mib(self.process_bytes)} for the program"
        )

    def __str__(self) -> str:
        unknown = "not measured" if not self.n_downloads else "not measured, for nothing is downloaded yet"
        estimate = unknown if math.isnan(self.seconds) else f"about {self.seconds:,.0f} s"
        reading = self.cache_bytes / READ_BYTES_PER_SECOND
        way, reason = self.recommendation
        there = "all are on this disk" if not self.n_downloads else f"{self.n_downloads} to be downloaded"
        lines = [
            f"tokens      {self.n_tokens:,} in {self.n_sequences:,} sequences",
            f"snapshots   {self.n_snapshots} x d_model {self.d_model}; {there}",
            f"forwards    {self.forwards:,} tokens for one pass over the data, {estimate}",
            f"live        {_mib(self.live_bytes)} of memory; the models run once a pass, {self.passes:.3g} planned",
            f"cached      {_mib(self.cached_bytes)} of memory, {_mib(self.cache_bytes)} on disk in {self.cache_dtype} "
            f"({_mib(self.free_bytes)} free); reading it takes some {reading:,.0f} s a pass",
            f"better      {way}: {reason}",
        ]
        if self.training_bytes:
            lines.append(self.training)
        return "\n".join(lines)


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
