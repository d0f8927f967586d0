"""The cost of harvesting, before anything runs: disk, memory, forward passes and time, live or from a cache.

*Live* runs all models again in every pass over the data: best for a single pass, if the models fit into memory
together. *Cached* runs each model once, by itself, and every pass reads the disk. Cached batches are mixed over all of
the data, live ones over a buffer in host memory.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from transformers import AutoModelForCausalLM

from crosslens.activations.files import BLOCK, HEADER, row_bytes
from crosslens.activations.mixing import CHUNKS
from crosslens.activations.order import WINDOW
from crosslens.crosscoders import DECLARATIONS, CrosscoderTrainingConfig
from crosslens.errors import UserError, brief
from crosslens.snapshots.snapshot import cut_config

READ_BYTES_PER_SECOND = 200e6
"""A slow disk, for the estimate of a pass over the cache."""
STORING_SECONDS, READING_SECONDS = 25e-9, 8e-9
"""Of one number of a cache, on one core: rounded, checked and written; read, checked and widened."""
_BATCHES = 3


def model_bytes(config: Any, n_blocks: int, dtype: str = "float32", trust_remote_code: bool = False) -> int:
    """Memory in bytes of a bridge with the first blocks of this transformers configuration.

    Raises:
        UserError: transformers cannot make a model of it.
    """
    if (in_memory := getattr(config, "parameter_bytes", None)) is not None:  # of a HookedTransformer
        return in_memory
    cut_config(config, n_blocks)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # words and values that transformers does not know raise anything
        raise UserError(
            f"transformers cannot make the model that its config.json describes ({type(error).__name__}: "
            f"{brief(error)}): correct the file"
        ) from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # TransformerLens splits a joint query-key-value matrix into three and keeps both
    return getattr(torch, dtype).itemsize * (
        sum(sizes.values()) + sum(size for name, size in sizes.items() if "query_key_value" in name)
    )


WORKSPACE = 48 << 20  # what the sums themselves need, and what the allocator keeps for blocks of other sizes
# copies of one weight matrix on the host while a checkpoint is written from a GPU: the matrix, and two of it as the
# bytes of a file (measured on a CPU, where they take the place of the gradients)
_CHECKPOINT_COPIES = 3


def training_bytes(
    architecture: CrosscoderTrainingConfig,
    n_snapshots: int,
    d_model: int,
    batch_size: int,
    n_feature_ranks: int = 1,
    adam_moments: str = "float32",
) -> int:
    """Memory in bytes of one process that trains a crosscoder in float32: weights, gradients, Adam, and a step.

    All of it is on the device of the crosscoder. CUDA's own context and the libraries of the GPU are not counted.

    Args:
        architecture: d_sae and the gate.
        n_snapshots: S.
        d_model: D.
        batch_size: tokens per step in this process.
        n_feature_ranks: number of processes that split the features.
        adam_moments: as in `TrainConfig`.
    """
    wide, F = n_snapshots * d_model, architecture.d_sae / n_feature_ranks
    # in units of 4 bytes: value, gradient and two moments of each parameter
    held = (3 if adam_moments == "bfloat16" else 4) * 2 * wide * F + 4 * 2 * F
    declared = DECLARATIONS[architecture.architecture()]
    step = batch_size * (declared.batch_tensors * F + declared.extra_columns + 6 * wide) + wide * F
    return int(4 * (held + step)) + WORKSPACE


# of a forward pass by a bridge: bytes of each of the B H T^2 attention scores, in float32 and in half precision (most
# families take the softmax in float32 there, too), and tensors of the MLP's width at its densest. Other families: as
# Llama's. Found with torch's profiler; a test compares them
_PASSES = {"gpt_neox": (8, 4, 3), "gpt2": (8, 4, 5), "bloom": (12, 12, 6)}
_PASS = (8, 9, 4)


def pass_bytes(config: Any, n_sequences: int, n_positions: int, dtype: str, attention: str) -> int:
    """Memory in bytes of one forward pass, besides the model: at its densest, in attention or in the MLP of a block.

    Args:
        config: of transformers.
        n_sequences: sequences of the pass.
        n_positions: T.
        dtype: of the model.
        attention: "eager" or "sdpa".
    """
    D, size = int(config.hidden_size), getattr(torch, dtype).itemsize
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * D
    full, half, n_wide = _PASSES.get(config.model_type, _PASS)
    if attention == "eager":
        score = full if size == 4 else half
        in_attention = score * config.num_attention_heads * n_positions + size * 15 * D
    else:  # the mask has a byte for each pair of positions
        in_attention = n_positions + size * 10 * D
    in_mlp = size * (4 * D + n_wide * width)
    return int(n_sequences * n_positions * max(in_attention, in_mlp))


LOGIT_BYTES = 1 << 30
"""What the logits of a pass may take: with a vocabulary of 50,000 those of 4,096 tokens would take 800 MB a copy."""
_LOGIT_COPIES = 3  # clean and spliced, and what a model makes meanwhile
EVALUATED_TOKENS = 8192
_CHUNK = 4096  # tokens that are encoded and decoded at a time


def logit_sequences(n_vocabulary: int, n_positions: int) -> int:
    """Sequences of T = `n_positions` tokens in a pass of whole models, whose logits are held in several copies."""
    return max(1, min(_CHUNK // n_positions, LOGIT_BYTES // (_LOGIT_COPIES * 4 * n_vocabulary * n_positions)))


def logit_bytes(n_vocabulary: int, n_positions: int) -> int:
    """Memory in bytes for the logits of such a pass."""
    return _LOGIT_COPIES * 4 * n_vocabulary * n_positions * logit_sequences(n_vocabulary, n_positions)


def evaluation_bytes(d_sae: float, wide: int, n_positions: int, running_bytes: int) -> int:
    """Memory in bytes for evaluating a crosscoder after training, besides its weights: the largest of its parts.

    Args:
        d_sae: features of one process.
        wide: S D, the width of its input.
        n_positions: T.
        running_bytes: the models in memory, and a pass of one of them.
    """
    # pre-activations and features; decoded, in float64 the error and its square
    reconstruct = max(_CHUNK, n_positions) * (2 * 4 * d_sae + (2 * 4 + 2 * 8) * wide)
    return int(max(EVALUATED_TOKENS, n_positions) * 4 * wide + max(reconstruct, running_bytes)) + WORKSPACE


def cache_bytes(n_positions: int, n_files: int, n_snapshots: int, d_model: int, dtype: str) -> int:
    """Disk space of a cache in bytes: activations and their checksums, tokens and the order of rows, and headers.

    Args:
        n_positions: positions of all sequences.
        n_files: number of files.
        n_snapshots: S.
        d_model: D.
        dtype: of the cache.
    """
    return int(n_positions * (n_snapshots * (row_bytes(d_model, dtype) + 4 / BLOCK) + 8)) + n_files * HEADER


def order_bytes(n_tokens: int, n_snapshots: int, shard_tokens: int) -> int:
    """Memory for the order of the tokens of a cache: a label and a row of each in the window that is being read, and
    the checksums of its files."""
    return int(min(n_tokens, WINDOW * shard_tokens) * (1 + 4 + n_snapshots * (4 + 1) / BLOCK))


def distinct_sequences(counts: NDArray[np.int64], n_tokens: int) -> float:
    """Expected number of sequences that n tokens come from, drawn without replacement from all.

    Args:
        counts: tokens of each sequence.
        n_tokens: n.
    """
    total = int(counts.sum())
    n = min(n_tokens, total)
    left = total - counts
    # C(N - c, n) / C(N, n), the probability that none of the c tokens of a sequence is drawn
    log_none = gammaln(left + 1) - gammaln(np.maximum(left - n, 0) + 1) - gammaln(total + 1) + gammaln(total - n + 1)
    return float(np.where(left < n, 1.0, -np.expm1(np.minimum(log_none, 0.0))).sum())


def buffered_sequences(counts: NDArray[np.int64], capacity: int, n_tokens: int) -> float:
    """The same of n tokens drawn from a full mixing buffer of `capacity` tokens; see `crosslens.activations.mixing`.

    A sequence of c tokens, after which t tokens were drawn, has some c exp(-t / m) left in a buffer that holds m on
    average, and one enters for every c tokens that are drawn. Chunks enter once there is space for all of one.
    """
    held = capacity if capacity >= counts.sum() else capacity * (1 - 0.5 / CHUNKS)
    n, c = min(n_tokens, held), max(1.0, float(counts.mean()))
    left = c * np.exp(-np.arange(0, 40 * held, c)[: len(counts)] / held)
    expected = float((1 - (1 - n / held) ** left).sum())
    return min(expected, distinct_sequences(counts, n_tokens))


def clock(device: str) -> float:
    """Now, in seconds, for durations: CPU seconds where one thread of a CPU computes, which other programs do not
    stretch."""
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def product_rate(device: str) -> float:
    """Operations per second of a product of two matrices of 1,024 rows, in float32: the best of three."""
    x, seconds = torch.randn(1024, 1024, device=device), list[float]()
    for _ in range(4):
        began = clock(device)
        float((x @ x)[0, 0])  # waits for a GPU
        seconds.append(clock(device) - began)
    return 2 * 1024**3 / min(seconds[1:])


NANOSECOND = 100
"""Operations of a product while one thread of a CPU passes over memory for a nanosecond, as measured on an AMD EPYC."""


def encoding_operations(d_sae: int, wide: int) -> float:
    """Operations for encoding a token of width S D = `wide`: a product, and the gate's passes over its result."""
    return d_sae * (2 * wide + 25 * NANOSECOND)


def evaluation_operations(n_held_out: int, d_sae: int, n_snapshots: int, d_model: int, n_vocabulary: int) -> float:
    """Operations for evaluating a crosscoder after training, besides passes of models: held-out tokens are encoded and
    decoded, and predictions compared."""
    wide = n_snapshots * d_model
    reconstruct = n_held_out * (encoding_operations(d_sae, wide) + 2 * d_sae * wide)
    return reconstruct + 12 * NANOSECOND * n_snapshots * EVALUATED_TOKENS * n_vocabulary


def resident_memory() -> int:
    """Memory of this process now, in bytes; where that is not reported its peak."""
    return _status("VmRSS") or peak_memory()


def _status(name: str) -> int:
    """Bytes by their name in Linux's status of this process; 0 if there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def peak_memory() -> int:
    """Peak memory of this process so far, or since `reset_peak_memory`, in bytes; 0 if it is not reported."""
    if found := _status("VmHWM"):  # `ru_maxrss` is inherited from the parent process
        return found
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory() -> None:
    """Begin to measure `peak_memory` anew, where the system allows it; otherwise it stays that of the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass(frozen=True)
class Plan:
    """The cost of a harvest, before anything runs.

    Attributes:
        n_tokens: tokens to train on per snapshot, special positions left out.
        n_sequences: sequences for training and held-out evaluation.
        n_snapshots: S.
        d_model: D.
        forwards: tokens run through a model in one pass over the data, summed over snapshots.
        passes: passes over the data during training.
        model_bytes: one model, cut at the hook.
        models_fit: whether the models of all snapshots fit into `allowed_bytes` together.
        allowed_bytes: memory of the device that they may take: half of it.
        loaded_bytes: models in memory together while training is live, on the device.
        pass_bytes: the forward pass of a model, on the device.
        batch_bytes: one batch of float32 activations of all snapshots in one process.
        order_bytes: the order of a cache's tokens, and the checksums of the files that are being read.
        mixing_tokens: tokens in the buffer that live batches are drawn from.
        mixing_bytes: this buffer in float32, a chunk of sequences on its way into it, and held-out activations and
            first batches that are kept.
        held_out_bytes: of these, the held-out activations, which every analysis keeps in memory.
        harvest_bytes: host memory for filling a cache, besides model and forward pass: a shard of one snapshot.
        n_files: files of the cache.
        batch_sequences: expected number of sequences in a batch, cached and live.
        cache_bytes: disk space of the cache.
        cache_dtype: dtype of the cache.
        free_bytes: free disk space.
        n_downloads: snapshots whose weights are not on this disk yet.
        seconds: estimate for one pass of all models, from a timed forward pass of one; NaN when not measured.
        process_seconds: CPU seconds of the process so far: importing libraries, and reading the tokens.
        process_bytes: memory of the process: libraries, and the tokens it has read.
        training_bytes: further memory for training on the device, per process; 0 without an architecture.
        matrix_bytes: encoder or decoder of one process; 0 without an architecture.
        n_held_out: tokens that are held out.
        whole_share: time of a pass of a whole model over that of one up to the hook point, by the numbers of weights
            that a token is multiplied with.
        whole_bytes: the whole models that analyses keep in memory, on the device; 0 without an architecture.
        evaluation_bytes: further memory for evaluating the crosscoder after training, per process; 0 without an
            architecture. A single process has let go of gradients and Adam by then. Models up to the hook point, which
            stay if training was live, are not counted.
        processes: number of processes that split the crosscoder.
        device: where models and crosscoder are, such as "cpu" or "cuda"; on CPUs host and device are one memory.
        cached: whether training reads a cache; None: as recommended.
        hook_names: if there are several, the hook points. Disk, files, `harvest_bytes` and `seconds` are for all of
            them, the rest is for training at the widest.
    """

    n_tokens: int
    n_sequences: int
    n_held_out: int
    n_snapshots: int
    d_model: int
    forwards: int
    passes: float
    model_bytes: int
    models_fit: bool
    allowed_bytes: int
    loaded_bytes: int
    pass_bytes: int
    batch_bytes: int
    order_bytes: int
    mixing_tokens: int
    mixing_bytes: int
    held_out_bytes: int
    harvest_bytes: int
    n_files: int
    batch_sequences: tuple[float, float]
    cache_bytes: int
    cache_dtype: str
    free_bytes: int
    n_downloads: int
    seconds: float
    process_seconds: float
    process_bytes: int
    training_bytes: int
    matrix_bytes: int
    whole_share: float
    whole_bytes: int
    evaluation_bytes: int
    processes: int
    device: str = "cpu"
    cached: bool | None = None
    hook_names: tuple[str, ...] = ()

    @property
    def live_bytes(self) -> int:
        """Memory for training live, host and device together: the models, a forward pass, the mixing buffer, and three
        batches."""
        return self._live_device + self._live_host

    @property
    def cached_bytes(self) -> int:
        """Memory for training from a cache: three batches (in use, ready, and being read), and the order."""
        return _BATCHES * self.batch_bytes + self.order_bytes

    @property
    def _live_device(self) -> int:
        return self.loaded_bytes + self.pass_bytes

    @property
    def _live_host(self) -> int:
        return self.mixing_bytes + _BATCHES * self.batch_bytes

    @property
    def recommendation(self) -> tuple[str, str]:
        """ "live" or "cached", and the reason."""
        if self.passes <= 1 and self.models_fit:
            reason = "one pass over the data, and the models fit into memory together"
            return "live", f"{reason}; with a cache, evolve and other seeds need not run them again"
        reason = f"{self.passes:.3g} passes over the data, and live would run the models in each"
        if not self.models_fit:
            reason = "the models do not fit into memory together, and live would reload each for every block"
        if self.cache_bytes > self.free_bytes:
            return "live", f"the disk is too full for a cache, which would be faster ({reason})"
        return "cached", reason

    @property
    def _live(self) -> bool:
        """Whether the memory of training is that of live models."""
        return self.recommendation[0] == "live" if self.cached is None else not self.cached

    @property
    def host_memory(self) -> int:
        """Peak host memory of each process while it trains, in bytes; without an architecture, of activations alone."""
        total = self.process_bytes + self._activations
        return total + (self._checkpoint if self._has_gpu else self._models + self.training_bytes)

    @property
    def harvest_memory(self) -> int:
        """Peak memory of a process that fills a cache, host and device together, in bytes."""
        return self.process_bytes + self.model_bytes + self.pass_bytes + self.harvest_bytes

    @property
    def train_memory(self) -> int:
        """Peak memory of each process that trains and then evaluates, host and device together, in bytes."""
        evaluation = self.process_bytes + self.held_out_bytes + self.evaluation_bytes
        # models up to the hook point stay beside whole ones
        return max(self.host_memory + self.device_memory, evaluation + (self.loaded_bytes if self._live else 0))

    @property
    def device_memory(self) -> int:
        """Peak GPU memory of each process while it trains, in bytes; 0 on CPUs."""
        return self._models + self.training_bytes + 2 * self.batch_bytes if self._has_gpu else 0

    @property
    def _has_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def _checkpoint(self) -> int:
        """Host memory for writing a checkpoint from a GPU."""
        return _CHECKPOINT_COPIES * self.matrix_bytes

    @property
    def _activations(self) -> int:
        """Host memory for activations while training."""
        return self._live_host if self._live else self.cached_bytes + self.held_out_bytes

    @property
    def _models(self) -> int:
        """Memory for running models while training."""
        return self._live_device if self._live else 0

    @property
    def training(self) -> str:
        """The memory of training and its parts, in words."""
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        step = f"{_mib(self.training_bytes)} for weights, gradients, Adam and a step"
        program = f"{_mib(self.process_bytes)} for the program"
        if not self._has_gpu:
            activations = f"{_mib(self._models + self._activations)} for activations"
            return f"training    {_mib(self.host_memory)} of memory{each}: {step}, {activations}, {program}"
        models = f", {_mib(self._models)} for models" if self._models else ""
        return (
            f"training    {_mib(self.device_memory)} of GPU memory{each}: {step}{models}; {_mib(self.host_memory)} of "
            f"host memory: {_mib(self._activations)} for activations, {_mib(self._checkpoint)} for writing "
            f"checkpoints, {program}"
        )

    def __str__(self) -> str:
        unknown = "not measured" if not self.n_downloads else "not measured: no weights are downloaded yet"
        estimate = unknown if math.isnan(self.seconds) else f"about {self.seconds:,.0f} s"
        reading = self.cache_bytes / READ_BYTES_PER_SECOND
        way, reason = self.recommendation
        live = f"{_mib(self.live_bytes)} of memory"
        if self._has_gpu:
            live = f"{_mib(self._live_device)} of GPU memory, {_mib(self._live_host)} of host memory"
        host = "host memory" if self._has_gpu else "memory"
        harvest = f"{_mib(self.model_bytes + self.pass_bytes + self.harvest_bytes)} of memory"
        if self._has_gpu:
            device = self.model_bytes + self.pass_bytes
            harvest = f"{_mib(device)} of GPU memory, {_mib(self.harvest_bytes)} of host memory"
        there = "all are on this disk" if not self.n_downloads else f"{self.n_downloads} to be downloaded"
        several = f" at {len(self.hook_names)} hook points, of which a training reads one" if self.hook_names else ""
        lines = [
            f"tokens      {self.n_tokens:,} in {self.n_sequences:,} sequences",
            f"snapshots   {self.n_snapshots} x d_model {self.d_model}{several}; {there}",
            f"forwards    {self.forwards:,} tokens for one pass over the data, {estimate}",
            f"live        {live} ({_mib(self.allowed_bytes)} allowed for all models); they run once per pass, "
            f"{self.passes:.3g} planned; a batch comes from about "
            f"{self.batch_sequences[1]:,.0f} sequences, drawn from a buffer of {self.mixing_tokens:,} tokens",
            f"cached      {_mib(self.cached_bytes)} of {host}, {_mib(self.cache_bytes)} on disk in {self.cache_dtype} "
            f"({_mib(self.free_bytes)} free), {self.n_files:,} files; harvesting takes {harvest}; reading takes about "
            f"{reading:,.0f} s per pass; a batch comes from about {self.batch_sequences[0]:,.0f} sequences",
            f"recommended {way}: {reason}",
        ]
        if self.training_bytes:
            total = self.evaluation_bytes + self.process_bytes + self.held_out_bytes
            if self._live:
                total += self.loaded_bytes  # models up to the hook point stay beside whole ones
            memory = "memory of host and GPU" if self._has_gpu else "memory"
            lines += [self.training, f"evaluation  {_mib(total)} of {memory} afterwards, when it runs whole models"]
        return "\n".join(lines)


def join_plans(hook_names: Sequence[str], plans: Sequence[Plan], deepest: int) -> Plan:
    """The plan of one harvest that fills the caches of several hook points.

    Args:
        hook_names: the hook points.
        plans: one for each.
        deepest: which of them needs the most blocks; its forward pass reads the others on the way.
    """
    widest = max(plans, key=lambda plan: plan.d_model)
    models = plans[deepest]
    return replace(
        widest,
        model_bytes=models.model_bytes,
        models_fit=models.models_fit,
        loaded_bytes=models.loaded_bytes,
        pass_bytes=models.pass_bytes,
        seconds=models.seconds,
        harvest_bytes=sum(plan.harvest_bytes for plan in plans),
        n_files=sum(plan.n_files for plan in plans),
        cache_bytes=sum(plan.cache_bytes for plan in plans),
        hook_names=tuple(hook_names),
    )


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
