"""Shuffled batches (B, S, D) of activations: the same tokens in every snapshot, computed live or read from a cache.

1. Documents become sequences of `context_size` tokens (SAELens's packing: BOS first, documents separated by BOS).
2. Sequences are permuted once by `seed`; the last ones are held out, the others form blocks.
3. Every epoch visits the blocks in an order drawn from (seed, epoch), and shuffles the positions inside a block by
   (seed, epoch, block). The order depends on nothing else, so training can continue at any batch.
4. A block's activations come from the models, which stop at the hook, or from the cache. A thread makes the next block
   while the current one is in use.

BOS and padding positions are left out (`Dataset(keep_special=True)` keeps them): their activations are outliers that
say nothing about the text. Symbols: N sequences, B tokens, T positions, S snapshots, D d_model.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.activations.cache import (
    ActivationCache,
    DamagedShardError,
    check_dtype,
    check_space,
    describe_rounding,
    free_bytes,
    row_bytes,
)
from crosslens.activations.harvesting import fill, harvest, run_to_hook
from crosslens.activations.plan import Plan, model_bytes, peak_memory, training_bytes
from crosslens.activations.tokens import Dataset, Source, generator, split_sequences, token_sequences
from crosslens.distributed.devices import own_device
from crosslens.distributed.parallel import check_split
from crosslens.errors import UserError
from crosslens.snapshots.collection import KEEP_BYTES, Snapshots
from crosslens.snapshots.hooks import hook_layer
from crosslens.snapshots.settings import ModelSettings

if TYPE_CHECKING:
    from crosslens.crosscoders import CrosscoderTrainingConfig

BLOCK_BYTES = 1 << 30
BLOCK_TOKENS = 1 << 16


class Activations:
    """Activations of one dataset in all snapshots at one hook point.

    Args:
        snapshots: the models, checked at once against each other and the hook point.
        hook_name: TransformerLens name of a residual-stream or block-output hook.
        dataset: a `Dataset`, or its source: hub name, path to text / jsonl / csv / parquet (may be gzipped), tokens
            (`(N, T)` sequences or `(N,)` one long stream), a `datasets` object, DataFrame or Series, or an iterable of
            documents.
        n_tokens: tokens to train on, without the positions that are left out; None takes the whole dataset.
        context_size: tokens per sequence; None takes the models' context, at most 1024. Always T for `(N, T)` tokens.
        seed: seed for every permutation.
        settings: how the models run.

    Attributes:
        dataset: the `Dataset`, with its `context_size` filled in.

    Raises:
        UserError: a number out of range or given twice, snapshots that cannot be compared, no such hook point. Data
            and models are read when they are first needed, so any method may find them missing, damaged, too small
            or not finite.
    """

    waited = 0.0
    """Seconds for which the last stream of batches waited for data."""
    waited_first = 0.0
    """The part of them before its first batch, when nothing else could be done."""

    def __init__(
        self,
        snapshots: Snapshots,
        hook_name: str,
        dataset: Dataset | Source,
        n_tokens: int | None = None,
        context_size: int | None = None,
        *,
        seed: int = 0,
        settings: ModelSettings | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            dataset = Dataset(dataset, n_tokens, context_size)
        else:
            for name, value in (("n_tokens", n_tokens), ("context_size", context_size)):
                if value is None:
                    continue
                if (set_already := getattr(dataset, name)) is not None:
                    raise UserError(f"{name}={value} conflicts with {name}={set_already} of the Dataset: set it once")
                dataset = replace(dataset, **{name: value})
        source, length, longest = dataset.source, dataset.context_size, snapshots.n_ctx
        if isinstance(source, (Tensor, np.ndarray)) and source.ndim == 2:
            length = int(source.shape[1])
        elif length is None:
            length = min(longest, 1024)
        if not 2 <= length <= longest:
            raise UserError(f"context_size={length} is not in [2, {longest}], the models' context")
        # the weights are compared before the first harvest; until then nothing is downloaded
        snapshots.check(hook_name, weights=False)
        settings = settings or ModelSettings()
        self.snapshots = snapshots
        self.hook_name = hook_name
        self.dataset = replace(dataset, context_size=length)
        self.seed = seed
        self.settings = replace(settings, device=own_device(settings.device))
        self._compared = False
        self._cache: ActivationCache | None = None
        self._tokens: Tensor | None = None
        self._n_train = 0

    # ------------------------------------------------------------------ tokens
    @property
    def n_snapshots(self) -> int:
        """S, the number of snapshots."""
        return len(self.snapshots)

    @property
    def d_model(self) -> int:
        """D, the width of the residual stream."""
        return self.snapshots.d_model

    @property
    def tokens(self) -> Int[Tensor, "N T"]:
        """Sequences for training, then those held out; read and tokenised at the first use."""
        if self._tokens is None:
            self._tokens, self._n_train = self._read()
        return self._tokens

    def train_tokens(self) -> Int[Tensor, "N T"]:
        """Sequences that training sees."""
        return self.tokens[: self._n_train]

    def held_out_tokens(self) -> Int[Tensor, "N T"]:
        """Sequences that training never sees."""
        return self.tokens[self._n_train :]

    @property
    def n_tokens(self) -> int:
        """Activations per epoch of training: positions of the training sequences that are kept."""
        return int(self.keep(self.train_tokens()).sum())

    def keep(self, tokens: Int[Tensor, "... T"]) -> Bool[Tensor, "... T"]:
        """Which positions of `tokens` training uses: all but BOS and padding, unless `keep_special`."""
        return self.dataset.keep(tokens, self.snapshots.tokenizer)

    def _read(self) -> tuple[Tensor, int]:
        sequences = token_sequences(self.dataset, self.snapshots.tokenizer)
        lowest, highest = (int(sequences.min()), int(sequences.max())) if sequences.numel() else (0, 0)
        if lowest < 0 or highest >= len(self.snapshots.tokenizer):
            raise UserError(
                f"token id {lowest if lowest < 0 else highest} in {self.dataset.name} is outside the tokenizer's "
                f"vocabulary of {len(self.snapshots.tokenizer)}: was it tokenised with another tokenizer?"
            )
        counts = self.keep(sequences).sum(-1)
        wanted, held_out = self.dataset.n_tokens, self.dataset.n_held_out
        order, n_train = split_sequences(counts, wanted, held_out, self.seed, self.dataset.name)
        return sequences[order], n_train

    # ------------------------------------------------------------------ activations
    def block(self, first: int, last: int, abandoned: Callable[[], bool] | None = None) -> Float[Tensor, "n T S D"]:
        """Activations of the sequences `first` to `last` of `tokens`.

        Args:
            first: first sequence.
            last: the one after the last.
            abandoned: returns True once the result is no longer needed.
        """
        if self._cache is not None:
            return self._cache.read(first, last, self._repair)
        self._compare()
        tokens = self.tokens[first:last]
        return harvest(self.snapshots, tokens, self.hook_name, self.settings, cut=True, abandoned=abandoned)

    def _compare(self) -> None:
        """Compare the weights of the snapshots, once."""
        if not self._compared:
            self.snapshots.check(self.hook_name)
            self._compared = True

    @property
    def block_sequences(self) -> int:
        """Number of sequences that are in memory and shuffled together."""
        per_token = self.n_snapshots * self.d_model * 4
        return max(1, min(BLOCK_TOKENS, BLOCK_BYTES // per_token) // self.tokens.shape[1])

    def batches(
        self, batch_size: int, *, start: int = 0, epochs: int | None = None
    ) -> Generator[Float[Tensor, "B S D"], None, None]:
        """Shuffled batches of raw float32 activations: a SAELens data provider. Closing it ends the background work.

        Args:
            batch_size: B tokens; the rest of an epoch goes into the first batch of the next.
            start: batches to skip; the stream continues as if they had been read.
            epochs: passes over the data, endless when None; an incomplete last batch is dropped.
        """
        self.check_batch(batch_size)
        epoch, skip = divmod(start * batch_size, self.n_tokens)
        left: Tensor | None = None
        # the queue alone would let the thread work two blocks ahead
        wanted, closed = threading.Semaphore(1), threading.Event()
        blocks = PrefetchingIterator(self._shuffled_blocks(epoch, skip, epochs, wanted, closed), prefetch=1)
        waited = first = 0.0
        try:
            while True:
                began = time.perf_counter()
                rows = next(blocks, None)
                if rows is None:
                    return
                wanted.release()
                waited += time.perf_counter() - began
                first = first or waited
                self.waited, self.waited_first = waited, first
                rows = rows if left is None else torch.cat([left, rows])
                whole = len(rows) // batch_size * batch_size
                if whole:  # an empty tensor splits into one empty batch
                    yield from rows[:whole].split(batch_size)
                left = rows[whole:].clone()
                del rows  # while the next block is made, this one would be one too many in memory
        finally:
            closed.set()
            wanted.release()
            blocks.close()

    def check_batch(self, batch_size: int) -> None:
        """Refuse a `batch_size` that is larger than an epoch."""
        if not 0 < batch_size <= self.n_tokens:
            raise UserError(f"batch_size={batch_size} is not in [1, {self.n_tokens}], the activations of one epoch")

    def _shuffled_blocks(
        self, epoch: int, skip: int, epochs: int | None, wanted: threading.Semaphore, closed: threading.Event
    ) -> Iterator[Float[Tensor, "n S D"]]:
        size = self.block_sequences
        counts = [int(c.sum()) for c in self.keep(self.train_tokens()).sum(-1).split(size)]
        while epochs is None or epoch < epochs:
            for block in torch.randperm(len(counts), generator=generator(self.seed, epoch)).tolist():
                if skip >= counts[block]:
                    skip -= counts[block]
                    continue
                wanted.acquire()
                if closed.is_set():
                    return
                first, last = block * size, min((block + 1) * size, self._n_train)
                kept = self.keep(self.tokens[first:last]).flatten().nonzero()[:, 0]
                order = torch.randperm(len(kept), generator=generator(self.seed, epoch, block))
                yield self.block(first, last, closed.is_set).flatten(0, 1)[kept[order[skip:]]]
                skip = 0
            epoch += 1

    def held_out(self, batch_size: int = 4096) -> Iterator[Float[Tensor, "B S D"]]:
        """Activations of the held-out sequences in reading order, in batches of `batch_size` tokens or fewer."""
        for first in range(self._n_train or len(self.train_tokens()), len(self.tokens), self.block_sequences):
            last = min(first + self.block_sequences, len(self.tokens))
            yield from self.block(first, last)[self.keep(self.tokens[first:last])].split(batch_size)

    # ------------------------------------------------------------------ cache
    def cache(
        self, folder: str | Path, dtype: str = "bfloat16", *, evict: bool = False, verify: bool = False
    ) -> Activations:
        """Harvest the activations into a folder, and return the same activations read from there.

        An interrupted harvest continues where it stopped. Several processes, started by torchrun or by hand, may fill
        one folder together; each returns when it is complete. A damaged file is harvested again when it is read.

        Args:
            folder: created if needed; a cache for a different request is rejected.
            dtype: "bfloat16", "float32" or "int8" on disk; batches are float32 in any case.
            evict: afterwards delete the weights that crosslens downloaded to the hub's cache.
            verify: compare the checksums of all files now.

        Raises:
            UserError: a cache for a different request, a full disk, or activations that are not finite.
        """
        path = Path(folder)
        needed = self.tokens.numel() * self.n_snapshots * row_bytes(self.d_model, check_dtype(dtype))
        if not path.exists():
            check_space(path, needed)  # before any download; an existing cache is checked below, once it is read
        shape = self.block_sequences, self.n_snapshots, self.d_model
        cache = ActivationCache(path, self.tokens, *shape, dtype, self.fingerprint())
        if missing := cache.missing(verify=verify):
            check_space(path, cache.needed_bytes(missing))
            self._compare()
            fill(cache, self.snapshots, self.hook_name, missing, self.settings)
            if dtype != "float32":
                tqdm.write(describe_rounding(dtype, self.snapshots.labels, cache.rounding_errors()), file=sys.stderr)
        if evict:
            freed = sum(snapshot.evict() for snapshot in self.snapshots)
            tqdm.write(f"evicted {freed / 2**20:,.0f} MiB of downloaded weights", file=sys.stderr)
        cached = copy.copy(self)
        cached._cache = cache
        return cached

    def _repair(self, shard: int, snapshot: int, error: DamagedShardError) -> None:
        assert self._cache is not None
        warnings.warn(f"{error.path} {error.what}: harvesting it again", stacklevel=2)
        fill(self._cache, self.snapshots, self.hook_name, [(shard, snapshot)], self.settings)

    # ------------------------------------------------------------------ description
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the activations: equal fingerprints give equal activations."""
        return {
            "snapshots": self.snapshots.fingerprints,
            "hook_name": self.hook_name,
            "context_size": self.dataset.context_size,
            "prepend_bos": self.dataset.prepend_bos,
            "backend": self.settings.backend,
            "model_dtype": self.settings.dtype,
        }

    def metadata(self) -> dict[str, Any]:
        """What a crosscoder trained on these activations records about them."""
        return {
            "model_name": self.snapshots.name,
            "hook_name": self.hook_name,
            "dataset_path": self.dataset.name,
            "context_size": self.dataset.context_size,
            "prepend_bos": self.dataset.prepend_bos,
            "keep_special": self.dataset.keep_special,
            "snapshots": [
                {"label": s.label, "step": s.step, "tokens": s.tokens, "fingerprint": s.fingerprint}
                for s in self.snapshots
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """A record for `from_dict`, in types of JSON; of the settings all but the device.

        Raises:
            UserError: the models or the dataset are in memory.
        """
        snapshots, source = self.snapshots.to_dict(), self.dataset.source
        if not isinstance(source, (str, Path)):
            raise UserError("a dataset in memory cannot be recorded; write it to a file to use it in a run directory")
        source = str(Path(source).resolve()) if Path(source).is_file() else str(source)
        settings = asdict(self.settings)
        del settings["device"]
        return {
            "snapshots": snapshots,
            "hook_name": self.hook_name,
            "dataset": asdict(replace(self.dataset, source=source)),
            "seed": self.seed,
            "settings": settings,
        }

    @classmethod
    def from_dict(cls, recorded: dict[str, Any], settings: ModelSettings | None = None) -> Activations:
        """The activations that `to_dict` recorded; `settings` replace the recorded ones."""
        return cls(
            Snapshots.from_dict(recorded["snapshots"]),
            recorded["hook_name"],
            Dataset(**recorded["dataset"]),
            seed=recorded["seed"],
            settings=settings or ModelSettings(**recorded["settings"]),
        )

    def plan(
        self,
        measure: bool = True,
        *,
        training_tokens: int | None = None,
        folder: str | Path = ".",
        dtype: str = "bfloat16",
        architecture: CrosscoderTrainingConfig | None = None,
        batch_size: int = 4096,
        processes: int = 1,
        data_parallel: int = 1,
        adam_moments: str = "float32",
    ) -> Plan:
        """Disk, memory, forward passes and time of training, live or cached, with a recommendation.

        Args:
            measure: time a small forward pass of a snapshot whose weights are on this disk; nothing is downloaded.
            training_tokens: activations to train on; more than an epoch means several passes. None: one pass.
            folder: cache folder.
            dtype: cache dtype.
            architecture: architecture of the crosscoder to train; adds its memory to the plan.
            batch_size: activations per step.
            processes: number of processes that split the crosscoder.
            data_parallel: number of groups of these processes that split the tokens of a batch.
            adam_moments: as in `TrainConfig`.
        """
        check_split(processes, data_parallel, None if architecture is None else architecture.d_sae, batch_size)
        process = peak_memory()
        S, D, T = self.n_snapshots, self.d_model, self.tokens.shape[1]
        downloads = sum(not snapshot.is_on_disk() for snapshot in self.snapshots)
        one_model = model_bytes(self.snapshots[0].config(), hook_layer(self.hook_name))
        fit = one_model * S <= KEEP_BYTES
        block = min(self.block_sequences, len(self.tokens)) * T * S * D * 4
        return Plan(
            n_tokens=self.n_tokens,
            n_sequences=len(self.tokens),
            n_snapshots=S,
            d_model=D,
            forwards=self.tokens.numel() * S,
            passes=max(1.0, (training_tokens or self.n_tokens) / self.n_tokens),
            model_bytes=one_model,
            models_fit=fit,
            loaded_bytes=one_model * (S if fit else 1),
            block_bytes=block,
            cache_bytes=self.tokens.numel() * S * row_bytes(D, check_dtype(dtype)),
            cache_dtype=dtype,
            free_bytes=free_bytes(folder),
            n_downloads=downloads,
            seconds=self._seconds_per_token() * self.tokens.numel() * S if measure else math.nan,
            process_bytes=process,
            training_bytes=0
            if architecture is None
            else training_bytes(
                architecture, S, D, batch_size // data_parallel, processes // data_parallel, adam_moments
            ),
            matrix_bytes=0 if architecture is None else 4 * S * D * architecture.d_sae // (processes // data_parallel),
            processes=processes,
            device=torch.device(self.settings.device).type,
        )

    def _seconds_per_token(self) -> float:
        """Seconds per token in one model; NaN if no weights are on this disk."""
        found = next((snapshot for snapshot in self.snapshots if snapshot.is_on_disk()), None)
        if found is None:
            return math.nan
        ours = self.settings
        model = found.load(ours.device, ours.dtype, ours.backend, hook_layer(self.hook_name))
        probe = self.tokens[: max(1, 2048 // self.tokens.shape[1])]
        out = torch.empty(*probe.shape, self.d_model)
        seconds: list[float] = []
        for _ in range(3):
            began = time.perf_counter()
            run_to_hook(model, probe, self.hook_name, out, ours)
            seconds.append(time.perf_counter() - began)
        return min(seconds) / probe.numel()
