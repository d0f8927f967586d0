"""Shuffled batches (B, S, D) of activations: the same tokens in every snapshot, computed live or read from a cache.

`Activations` is what training and analyses read. The models compute `LiveActivations`; `CachedActivations` come from a
cache; others, such as those drawn from a known truth, subclass it. Activations at several hook points share tokens,
and one pass of the models fills the caches of all: `acts[name]` has the batches of one of them.

1. Documents become sequences of `context_size` tokens (SAELens's packing: BOS first, documents separated by BOS).
2. Sequences are permuted once by `seed`; the last ones are held out.
3. From a cache every epoch is a uniformly random permutation of all training tokens (`crosslens.activations.order`).
   Live, it is one drawn from a buffer of `mixing_tokens` (`crosslens.activations.mixing`), and the cache's own where
   the buffer holds all of them. The order depends on the seed and the position only, so training can continue at any
   batch, with any number of processes.
4. A thread makes the next batch while the current one is in use, and brings it to the device
   (`crosslens.activations.feed`).

BOS and padding positions are left out (`Dataset(keep_special=True)` keeps them): their activations are outliers that
say nothing about the text. Symbols: N sequences, B tokens, T positions, S snapshots, D d_model.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from crosslens.activations.cache import (
    ActivationCache,
    check_space,
    describe_rounding,
    free_bytes,
    recorded_tokens,
    shard_sequences,
)
from crosslens.activations.feed import feed
from crosslens.activations.files import DamagedShardError, check_dtype, row_bytes
from crosslens.activations.harvesting import (
    Together,
    describe_error,
    fill,
    forward_sequences,
    harvest,
    harvest_together,
    pass_sequences,
    rounding_error,
    run_to_hooks,
)
from crosslens.activations.identity import chosen_roles, data_digest, source_identity
from crosslens.activations.mixing import MixedRows, Schedule
from crosslens.activations.order import Order, stored_order
from crosslens.activations.plan import (
    EVALUATED_TOKENS,
    Plan,
    buffered_sequences,
    cache_bytes,
    clock,
    distinct_sequences,
    evaluation_bytes,
    join_plans,
    logit_bytes,
    model_bytes,
    order_bytes,
    pass_bytes,
    resident_memory,
    training_bytes,
)
from crosslens.activations.rows import CachedRows, HeldRows, Rows
from crosslens.activations.tokens import Dataset, Sequences, Source
from crosslens.distributed.devices import model_memory, own_device
from crosslens.distributed.parallel import ALONE, Parallel, check_split
from crosslens.errors import UserError, did_you_mean
from crosslens.printing import as_html
from crosslens.progress import say, tqdm
from crosslens.rundir import check_cache
from crosslens.snapshots.checks import check_known
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import check_hooks, hook_layer
from crosslens.snapshots.settings import ModelSettings

if TYPE_CHECKING:
    from crosslens.crosscoders import CrosscoderTrainingConfig

BLOCK_BYTES = 1 << 30
BLOCK_TOKENS = 1 << 16
_JUDGED_TOKENS = 2048
"""Tokens for the error of the models' dtype and attention."""
HELD_OUT_BYTES = 1 << 30
"""Held-out activations of no more than this are kept when models make them."""
MIXING_BYTES = 4 << 30
"""Host memory of the default mixing buffer. It is the same on every machine, because the order depends on it."""

FIRST_BYTES = 1 << 30
"""The first batches of a live training, which its scales are measured on, are kept for training up to this size."""
SCALE_TOKENS = 100_000
"""Tokens of these batches: the default of `TrainConfig.scale_tokens`."""

SHUFFLED = "shuffled"
"""The order of data of which every batch may hold every token."""


_Made = TypeVar("_Made")


class Activations:
    """Activations of the same tokens in all snapshots: what training and analyses read.

    `Activations(...)` gives those of one dataset at one or several hook points, computed live; see `LiveActivations`
    for its arguments. With several, `acts["blocks.6.hook_resid_post"]` gives the activations at one, to train on;
    `cache` and `plan` are for all of them together.

    This class has no state and no constructor. Other activations subclass it and provide what is read of them: training
    reads `batches`, `n_tokens` and `metadata`, most analyses `held_out` and `snapshots`.

    Args:
        snapshots: the models, checked at once against each other and the hook points.
        hook_name: TransformerLens name of a hook point of the residual stream, of the output or the heads of attention,
            or of the input or output of an MLP (`crosslens.snapshots.hooks`); or a list of names.
        dataset: a `Dataset`, or its source: hub name, path to text / jsonl / csv / parquet (may be gzipped), tokens
            (`(N, T)` sequences or `(N,)` one long stream), a `datasets` object, DataFrame or Series, or an iterable of
            documents.
        n_tokens: tokens to train on, without the positions that are left out; None takes the whole dataset.
        context_size: tokens per sequence; None takes the models' context, at most 1024. Always T for `(N, T)` tokens.
        seed: seed for every permutation.
        settings: how the models run.
        mixing_tokens: tokens in the buffer that live batches are drawn from, in float32; None: as many as 4 GiB hold.

    Attributes:
        dataset: the `Dataset`, with its `context_size` and `separator` filled in.
        hook_names: the hook points.

    Raises:
        UserError: a number out of range or given twice, snapshots that cannot be compared, no such hook point. Data
            and models are read when they are first needed, so any method may find them missing, damaged, too small
            or not finite.
    """

    snapshots: Snapshots
    dataset: Dataset
    settings: ModelSettings
    seed: int
    hook_names: tuple[str, ...]
    cache_dtype: str | None = None
    """The format on disk; None if they are not read from a cache."""
    data_order: str = SHUFFLED
    """What decides the order of the tokens besides seed and data."""
    plan: Callable[..., Plan]
    """The cost of training on them: `DatasetActivations.plan`."""
    waited = 0.0
    """Seconds for which the last stream of batches waited for data."""
    waited_first = 0.0
    """The part of them before its first batch, when nothing else could be done."""

    def __new__(cls: type[_Made], *args: Any, **options: Any) -> _Made:
        """As `pathlib.Path` does, the class itself makes one of its implementations."""
        del args, options
        made: Any = LiveActivations if cls is Activations else cls
        return object.__new__(made)

    @property
    def hook_name(self) -> str:
        """The hook point.

        Raises:
            UserError: there are several.
        """
        first, *others = self.hook_names
        if others:
            raise UserError(
                f"these activations have {1 + len(others)} hook points, and a crosscoder reads one: choose it, "
                f"for instance acts[{first!r}]"
            )
        return first

    def _repr_html_(self) -> str:
        labels = self.snapshots.labels
        about = {
            "snapshots": f"{len(labels)} of {self.snapshots.name}, {labels[0]} to {labels[-1]}",
            "hook points": ", ".join(self.hook_names),
            "read from": "a cache on disk" if self.is_cached else "the models, as they run",
            "seed": self.seed,
        }
        return as_html(f"activations of {self.snapshots.name}", about)

    @property
    def n_snapshots(self) -> int:
        """S, the number of snapshots."""
        return len(self.snapshots)

    @property
    def d_model(self) -> int:
        """D, the width of the residual stream."""
        return self.snapshots.hook_width(self.hook_name)

    @property
    def n_tokens(self) -> int:
        """Activations per epoch of training: positions of the training sequences that are kept."""
        raise NotImplementedError

    @property
    def tokens(self) -> Int[Tensor, "N T"]:
        """Sequences for training, then those held out; read and tokenised at the first use."""
        raise NotImplementedError

    @property
    def tokens_sha256(self) -> str:
        """sha256 of `tokens`, by which a run knows its data again."""
        return hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest()

    def train_tokens(self) -> Int[Tensor, "N T"]:
        """Sequences that training sees."""
        raise NotImplementedError

    def held_out_tokens(self) -> Int[Tensor, "N T"]:
        """Sequences that training never sees."""
        raise NotImplementedError

    def keep(self, tokens: Int[Tensor, "... T"]) -> Bool[Tensor, "... T"]:
        """Which positions of `tokens` training uses, as `Dataset.keep` says."""
        raise NotImplementedError

    def held_out_documents(self) -> Int[Tensor, " n"]:
        """Number of the document of every held-out token, in reading order; of its sequence where that is not known."""
        return self.keep(self.held_out_tokens()).nonzero()[:, 0]

    @property
    def is_cached(self) -> bool:
        """Whether activations are read from a cache."""
        return self.cache_dtype is not None

    @property
    def block_sequences(self) -> int:
        """Number of sequences whose activations, of all snapshots, are at most 1 GiB; in whole forward passes."""
        raise NotImplementedError

    def block(self, first: int, last: int) -> Float[Tensor, "n T S D"]:
        """Activations of the sequences `first` to `last` of `tokens`.

        Args:
            first: first sequence.
            last: the one after the last.
        """
        raise NotImplementedError

    def held_out(self, batch_size: int = 4096) -> Iterator[Float[Tensor, "B S D"]]:
        """Activations of the held-out sequences in reading order, in batches of `batch_size` tokens or fewer."""
        raise NotImplementedError

    def batches(
        self,
        batch_size: int,
        *,
        start: int = 0,
        epochs: int | None = None,
        device: str | torch.device = "cpu",
        parallel: Parallel = ALONE,
        whole: bool = True,
    ) -> Generator[Float[Tensor, "B S D"], None, None]:
        """Shuffled batches of raw float32 activations: a SAELens data provider. Closing it ends the background work.

        Processes that are given as `parallel` read together, each a part of every batch, and must read the same
        batches and as many; live, each runs a part of the forward passes. On CPUs the batches of a cache are then in
        shared memory, and valid until the next is asked for.

        Args:
            batch_size: B tokens; the rest of an epoch goes into the first batch of the next.
            start: batches to skip; the stream continues as if they had been read.
            epochs: passes over the data, endless when None; an incomplete last batch is dropped.
            device: where batches are wanted; the next one travels there while one is in use.
            parallel: the processes that read together.
            whole: all tokens of a batch; False: those that `Parallel.tokens` gives this process.
        """
        raise NotImplementedError

    def check_batch(self, batch_size: int) -> None:
        """Refuse a `batch_size` that is larger than an epoch."""
        if not 0 < batch_size <= self.n_tokens:
            raise UserError(f"batch_size={batch_size} is not in [1, {self.n_tokens}], the activations of one epoch")

    def metadata(self) -> dict[str, Any]:
        """What a crosscoder trained on these activations records about them."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A record for `from_dict`, in types of JSON; of the settings all but the device.

        Raises:
            UserError: the models or the dataset are in memory.
        """
        raise NotImplementedError

    def __getitem__(self, hook_name: str) -> Activations:
        """The activations at one of the hook points; they share the tokens.

        Raises:
            UserError: not one of them.
        """
        raise NotImplementedError

    def cache(
        self, folder: str | Path, dtype: str = "bfloat16", *, evict: bool = False, verify: bool = False
    ) -> Activations:
        """Harvest the activations into a folder, and return the same activations read from there.

        A cache that is complete needs neither the dataset nor the models. An interrupted harvest continues where it
        stopped. Several processes, started by torchrun or by hand, may fill one folder together; each returns when it
        is complete. A damaged file is harvested again when it is read. With several hook points, each has its own
        folder of its name inside this one, and one pass of the models fills all; activations at one of them are read
        from there, too.

        Args:
            folder: created if needed; a cache for a different request is rejected.
            dtype: "bfloat16", "float32" or "int8" on disk; batches are float32 in any case.
            evict: delete the weights that crosslens downloaded to the hub's cache, those of each snapshot as soon as it
                is harvested: the disk then holds one at a time, or one for each process.
            verify: compare the checksums of all files now.

        Raises:
            UserError: a cache for a different request, a link within a run directory, a full disk, or activations that
                are not finite.
        """
        raise NotImplementedError

    @staticmethod
    def from_dict(recorded: dict[str, Any], settings: ModelSettings | None = None) -> Activations:
        """The activations that `to_dict` recorded; `settings` replace the recorded ones.

        If they were read from a cache that is still there, they are again, and neither dataset nor models are needed.
        """
        acts = LiveActivations(
            Snapshots.from_dict(recorded["snapshots"]),
            recorded["hook_name"],
            Dataset(**recorded["dataset"]),
            seed=recorded["seed"],
            settings=settings or ModelSettings(**recorded["settings"]),
            mixing_tokens=recorded.get("mixing_tokens"),
        )
        folder, dtype = recorded.get("cache") or (None, "")
        if folder is None:
            return acts
        if not (Path(folder) / "manifest.json").is_file():
            say(f"the cache {folder} is gone, and the models run instead, without its rounding")
            return acts
        try:
            return acts.cache(folder, dtype)
        except UserError as error:
            say(f"the cache {folder} is not used, and the models run instead: {error}")
            return acts


class DatasetActivations(Activations):
    """What live and cached activations share: the dataset, what they are, a cache and a plan of them.

    Args: as `LiveActivations`; `sequences` are those of the dataset.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        hook_names: tuple[str, ...],
        sequences: Sequences,
        settings: ModelSettings,
        mixing_tokens: int | None,
    ) -> None:
        self.snapshots, self.hook_names, self.settings = snapshots, hook_names, settings
        self.sequences, self.dataset, self.seed = sequences, sequences.dataset, sequences.seed
        self._mixing_tokens = mixing_tokens
        self._parts: dict[str, Activations] = {}

    @override
    def __getitem__(self, hook_name: str) -> Activations:
        if hook_name not in self.hook_names:
            raise UserError(
                f"these activations have no hook point {hook_name!r}: choose {' or '.join(map(repr, self.hook_names))}"
                f"{did_you_mean(hook_name, self.hook_names)}"
            )
        if len(self.hook_names) == 1:
            return self
        if hook_name not in self._parts:
            self._parts[hook_name] = self._live(hook_name)
        return self._parts[hook_name]

    def _live(self, hook_name: str | Sequence[str]) -> LiveActivations:
        """Live activations at some of the hook points, of the same sequences."""
        options: dict[str, Any] = {"settings": self.settings, "mixing_tokens": self._mixing_tokens}
        live = LiveActivations(self.snapshots, hook_name, self.dataset, seed=self.seed, **options)
        live.sequences = self.sequences
        return live

    # ------------------------------------------------------------------ tokens
    @property
    @override
    def tokens(self) -> Int[Tensor, "N T"]:
        return self.sequences.tokens

    @override
    def train_tokens(self) -> Int[Tensor, "N T"]:
        return self.tokens[: self.sequences.n_train]

    @override
    def held_out_tokens(self) -> Int[Tensor, "N T"]:
        return self.tokens[self.sequences.n_train :]

    @property
    @override
    def n_tokens(self) -> int:
        return int(self.sequences.counts.sum())

    @override
    def keep(self, tokens: Int[Tensor, "... T"]) -> Bool[Tensor, "... T"]:
        return self.sequences.keep(tokens)

    @override
    def held_out_documents(self) -> Int[Tensor, " n"]:
        return self.sequences.held_out_documents()[self.keep(self.held_out_tokens())]

    # ------------------------------------------------------------------ activations
    def _rows(self, closed: threading.Event, parallel: Parallel) -> AbstractContextManager[Rows]:
        """Where batches come from; `closed` is set when the consumer has enough."""
        raise NotImplementedError

    @override
    def batches(
        self,
        batch_size: int,
        *,
        start: int = 0,
        epochs: int | None = None,
        device: str | torch.device = "cpu",
        parallel: Parallel = ALONE,
        whole: bool = True,
    ) -> Generator[Float[Tensor, "B S D"], None, None]:
        self.check_batch(batch_size)
        closed = threading.Event()
        self.waited = self.waited_first = 0.0

        def waited(seconds: float) -> None:
            self.waited += seconds
            self.waited_first = self.waited_first or seconds

        last = None if epochs is None else epochs * self.n_tokens // batch_size
        steps = itertools.count(start) if last is None else range(start, last)
        spans = ((step * batch_size, (step + 1) * batch_size) for step in steps)
        shape = (batch_size, self.n_snapshots, self.d_model)
        with self._rows(closed, parallel) as rows:
            yield from feed(rows, spans, shape, torch.device(device), parallel, whole, closed, waited)

    @override
    def held_out(self, batch_size: int = 4096) -> Iterator[Float[Tensor, "B S D"]]:
        for first in range(self.sequences.n_train, len(self.tokens), self.block_sequences):
            yield from self._held_out(first).split(batch_size)

    def _held_out(self, first: int) -> Float[Tensor, "B S D"]:
        """Activations of a block of held-out sequences."""
        last = min(first + self.block_sequences, len(self.tokens))
        return self.block(first, last)[self.keep(self.tokens[first:last])]

    @property
    @override
    def block_sequences(self) -> int:
        per_token = self.n_snapshots * self.d_model * 4
        most = max(1, min(BLOCK_TOKENS, BLOCK_BYTES // per_token) // self.tokens.shape[1])
        return most // self._pass_sequences * self._pass_sequences or most

    @property
    def mixing_tokens(self) -> int:
        """Tokens in the buffer that live batches are drawn from; all of an epoch if there are no more."""
        default = max(MIXING_BYTES // (4 * self.n_snapshots * self.d_model), self.tokens.shape[1])
        return min(self._mixing_tokens or default, self.n_tokens)

    @property
    def _pass_sequences(self) -> int:
        """Sequences in a forward pass."""
        return pass_sequences(self.tokens.shape[1], self._n_heads, self.settings)

    @property
    def _n_heads(self) -> int:
        config: Any = self.snapshots[0].config()
        return config.num_attention_heads

    @property
    def _shard_sequences(self) -> int:
        return shard_sequences(self.sequences.n_train, self.tokens.shape[1], self.d_model, self._pass_sequences)

    def _shards(self) -> list[tuple[int, int]]:
        """First and last sequence of the shards that a new cache has."""
        n, size = self.sequences.n_train, self._shard_sequences
        return [(first, min(first + size, n)) for first in range(0, n, size)]

    def _held_out_bytes(self) -> int:
        return int(self.keep(self.held_out_tokens()).sum()) * self.n_snapshots * self.d_model * 4

    # ------------------------------------------------------------------ cache
    @override
    def cache(
        self, folder: str | Path, dtype: str = "bfloat16", *, evict: bool = False, verify: bool = False
    ) -> Activations:
        path = Path(folder)
        places = {name: path / name for name in self.hook_names}
        if len(places) == 1 and not (path / self.hook_name / "manifest.json").is_file():
            places = {self.hook_name: path}
        for place in places.values():
            check_cache(place)
        source = source_identity(self.dataset, self.snapshots.tokenizer, self.seed)
        for place in places.values():
            if self.sequences.found is None:
                self.sequences.found = recorded_tokens(place, source)
        if not any(place.exists() for place in places.values()):  # an existing cache is checked once it is read
            widths = map(self.snapshots.hook_width, places)
            row = sum(row_bytes(width, check_dtype(dtype)) for width in widths)
            check_space(path, self.tokens.numel() * self.n_snapshots * row)  # before any download
        size = min(self._live(name)._shard_sequences for name in places)  # one pass of a shard fills all
        caches = {name: self._live(name)._open(place, size, dtype, source) for name, place in places.items()}
        if len({cache.size for cache in caches.values()}) > 1:
            raise UserError(
                f"the caches in {path} have shards of different lengths, so one pass cannot fill them: give another "
                "folder"
            )
        freed = 0
        missing = {name: cache.missing(verify=verify) for name, cache in caches.items()}
        pairs = {pair for found in missing.values() for pair in found}
        every = next(iter(caches.values())).n_shards * self.n_snapshots
        if len(pairs) < every and os.environ.get("RANK", "0") == "0":
            rest = "resuming" if pairs else "nothing is harvested"
            say(f"{path} holds {every - len(pairs):,} of {every:,} shards already: {rest}")
        if pairs:
            check_space(path, sum(caches[name].needed_bytes(found) for name, found in missing.items()))
            check_known(self.snapshots)
            self._say_error(min(s for _, s in pairs))
            freed = fill(caches, self.snapshots, sorted(pairs), self.settings, evict=evict)
            for name, cache in caches.items() if dtype != "float32" else ():
                where = f"{name}: " if len(caches) > 1 else ""
                line = describe_rounding(dtype, self.snapshots.labels, cache.rounding_errors())
                say(f"{where}{line}")
        if evict:
            freed += sum(snapshot.evict() for snapshot in self.snapshots)
            say(f"evicted {freed / 2**20:,.0f} MiB of downloaded weights")
        parts = {name: CachedActivations(self._live(name), cache) for name, cache in caches.items()}
        if len(parts) == 1:
            return parts[self.hook_name]
        several = self._live(self.hook_names)
        several._parts.update(parts)
        return several

    def _open(self, path: Path, size: int, dtype: str, source: dict[str, Any] | None) -> ActivationCache:
        """The cache of this hook point, as far as it is filled."""
        return ActivationCache(
            path,
            self.tokens,
            size,
            self.n_snapshots,
            self.d_model,
            dtype,
            self.fingerprint(),
            n_train=self.sequences.n_train,
            kept=self.keep(self.tokens),
            seed=self.seed,
            source=source,
            chosen=self.sequences.chosen,
        )

    def _say_error(self, s: int) -> None:
        """Print what the models' dtype and attention do to the activations of a snapshot, unless they are exact."""
        ours = self.settings
        if (ours.dtype, ours.attention) == ("float32", "eager") or os.environ.get("RANK", "0") != "0":
            return
        self.snapshots.check_arrival(s)
        widths = {name: self.snapshots.hook_width(name) for name in self.hook_names}
        tokens = self.tokens[: max(1, min(_JUDGED_TOKENS, ours.batch_tokens) // self.tokens.shape[1])]
        errors = rounding_error(self.snapshots[s], tokens, widths, ours)
        label = self.snapshots.labels[s]
        say(describe_error(ours, label, tokens.numel(), errors))

    # ------------------------------------------------------------------ description
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the activations: equal fingerprints give equal activations."""
        return {
            "snapshots": [snapshot.origin for snapshot in self.snapshots],
            "config": self.snapshots.config_entries,
            "hook_name": self.hook_name,
            "context_size": self.dataset.context_size,
            "prepend_bos": self.dataset.prepend_bos,
            "backend": self.settings.backend,
            "model_dtype": self.settings.dtype,
            "attention": self.settings.attention,
            **self._trusted(),
        }

    def _trusted(self) -> dict[str, Any]:
        """That code of the snapshots may run; nothing if not, as in caches and runs of earlier versions."""
        return {"trust_remote_code": True} if self.snapshots.trust_remote_code else {}

    @override
    def metadata(self) -> dict[str, Any]:
        return {
            "model_name": self.snapshots.name,
            "hook_name": self.hook_name,
            "dataset_path": self.dataset.name,
            "context_size": self.dataset.context_size,
            "prepend_bos": self.dataset.prepend_bos,
            "keep_special": self.dataset.keep_special,
            "separator": self.dataset.separator,
            "drop_positions": self.dataset.drop_positions,
            **chosen_roles(self.dataset),
            "snapshots": [
                {"label": s.label, "step": s.step, "tokens": s.tokens, "fingerprint": s.fingerprint}
                for s in self.snapshots
            ],
            "config": self.snapshots.config_entries,
            "tokenizer": self.snapshots.tokenizer_digest,
            **self._trusted(),
        }

    @override
    def to_dict(self) -> dict[str, Any]:

        snapshots, source = self.snapshots.to_dict(), self.dataset.source
        if isinstance(source, Mapping):
            source = {_place(name): weight for name, weight in source.items()}
        elif isinstance(source, (str, Path)):
            source = _place(source)
        else:
            raise UserError("a dataset in memory cannot be recorded; write it to a file to use it in a run directory")
        settings = asdict(self.settings)
        del settings["device"]
        return {
            "snapshots": snapshots,
            "hook_name": self.hook_name,
            "dataset": asdict(replace(self.dataset, source=source)),
            "data": data_digest(source),
            "seed": self.seed,
            "mixing_tokens": self._mixing_tokens,
            "settings": settings,
            "cache": None,
        }

    @override
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
        check_dtype(dtype)
        if len(self.hook_names) > 1:
            options: dict[str, Any] = {"training_tokens": training_tokens, "folder": folder, "dtype": dtype}
            options |= {"architecture": architecture, "batch_size": batch_size, "processes": processes}
            options |= {"data_parallel": data_parallel, "adam_moments": adam_moments}
            deepest = max(self.hook_names, key=hook_layer)
            plans = [self._live(name).plan(measure and name == deepest, **options) for name in self.hook_names]
            return join_plans(self.hook_names, plans, self.hook_names.index(deepest))
        seconds, process = time.process_time(), resident_memory()
        S, D, T = self.n_snapshots, self.d_model, self.tokens.shape[1]
        downloads = sum(not snapshot.is_on_disk() for snapshot in self.snapshots)
        config, ours = self.snapshots[0].config(), self.settings
        trusted = self.snapshots[0].trust_remote_code
        n, held, size = len(self.train_tokens()), len(self.held_out_tokens()), self._shard_sequences
        n_pass = min(forward_sequences(T, self._n_heads, ours), max(n, held))
        one_pass = pass_bytes(config, n_pass, T, ours.dtype, ours.attention)
        one_model = model_bytes(config, hook_layer(self.hook_name), ours.dtype, trusted)
        allowed = model_memory(self.settings.device)
        fit = one_model * S <= allowed
        files = (len(self._shards()) + -(-held // size)) * (S + 1)
        chunk = min(self.block_sequences, n) * T * S * D * 4
        own = batch_size // data_parallel
        filled_once = processes == 1 and self.mixing_tokens < self.n_tokens
        first = min(SCALE_TOKENS, self.n_tokens) * S * D * 4 if filled_once else 0
        held_out = self._held_out_bytes()
        kept_out = held_out if held_out <= HELD_OUT_BYTES else 0
        kept = kept_out + (first if first <= FIRST_BYTES else 0)
        loaded = one_model * (S if fit else 1)
        matrix, models, evaluation, whole_share = 0, 0, 0, math.nan
        if architecture is not None:
            share = data_parallel / processes
            matrix = int(4 * S * D * architecture.d_sae * share)
            whole_config = self.snapshots[0].config()  # the other one was cut
            whole = model_bytes(whole_config, whole_config.num_hidden_layers, ours.dtype, trusted)
            whole_share = _share(config, whole, one_model, getattr(torch, ours.dtype).itemsize)
            # every process runs the models of some snapshots
            models = whole * (-(-S // processes) if whole * S <= allowed else 1)
            weights = matrix * (2 if processes == 1 else 8)  # of two matrices: values, gradients and two moments
            n_evaluated = min(n_pass, max(1, EVALUATED_TOKENS // T))
            evaluated = pass_bytes(whole_config, n_evaluated, T, ours.dtype, ours.attention)
            running = models + max(evaluated, logit_bytes(config.vocab_size, T))
            evaluation = weights + evaluation_bytes(architecture.d_sae * share, S * D, T, running)
        return Plan(
            n_tokens=self.n_tokens,
            n_sequences=len(self.tokens),
            n_held_out=held_out // (4 * S * D),
            n_snapshots=S,
            d_model=D,
            forwards=self.tokens.numel() * S,
            passes=max(1.0, (training_tokens or self.n_tokens) / self.n_tokens),
            model_bytes=one_model,
            models_fit=fit,
            allowed_bytes=allowed,
            loaded_bytes=loaded,
            pass_bytes=one_pass,
            batch_bytes=min(own, self.n_tokens) * S * D * 4,
            order_bytes=order_bytes(self.n_tokens, S, size * T),
            mixing_tokens=self.mixing_tokens,
            mixing_bytes=self.mixing_tokens * S * D * 4 + chunk + kept,
            held_out_bytes=kept_out,
            # a shard is written while the next is harvested, a fifth of which is there by then on a CPU with a fast
            # disk, and all of it with a slow one or a GPU: a third
            harvest_bytes=min(size, max(n, held)) * T * (16 * D // 3 + row_bytes(D, dtype)),
            n_files=1 + files,
            batch_sequences=(
                distinct_sequences(self.sequences.counts, batch_size),
                buffered_sequences(self.sequences.counts, self.mixing_tokens, batch_size),
            ),
            cache_bytes=cache_bytes(self.tokens.numel(), files, S, D, dtype),
            cache_dtype=dtype,
            free_bytes=free_bytes(folder),
            n_downloads=downloads,
            seconds=self._seconds_per_token() * self.tokens.numel() * S if measure else math.nan,
            process_seconds=seconds,
            process_bytes=process,
            training_bytes=0
            if architecture is None
            else training_bytes(
                architecture, S, D, batch_size // data_parallel, processes // data_parallel, adam_moments
            ),
            matrix_bytes=matrix,
            whole_share=whole_share,
            whole_bytes=models,
            evaluation_bytes=evaluation,
            processes=processes,
            device=torch.device(self.settings.device).type,
        )

    def _seconds_per_token(self) -> float:
        """Seconds per token in one model; NaN if no weights are on this disk."""
        found = next((snapshot for snapshot in self.snapshots if snapshot.is_on_disk()), None)
        if found is None:
            return math.nan
        ours = self.settings
        n_blocks = hook_layer(self.hook_name)
        model = found.load(ours.device, ours.dtype, ours.backend, n_blocks, attention=ours.attention)
        probe = self.tokens[: forward_sequences(self.tokens.shape[1], self._n_heads, ours)]
        seconds: list[float] = []
        for _ in range(3):
            # a new array each time, as in training, where its pages are not in memory yet either
            out = torch.empty(*probe.shape, self.d_model)
            began = clock(ours.device)
            run_to_hooks(model, probe, {self.hook_name: out}, ours)
            seconds.append(clock(ours.device) - began)
        return sorted(seconds)[1] / probe.numel()


def _share(config: Any, whole: int, cut: int, itemsize: int) -> float:
    """Weights that a whole model multiplies a token with over those of one that is cut, from their bytes; NaN if the
    cut one has no block."""
    unembedding = itemsize * config.vocab_size * config.hidden_size
    embeddings = unembedding * (1 if config.tie_word_embeddings else 2)  # cut models have both, too
    return (whole - embeddings + unembedding) / (cut - embeddings) if cut > embeddings else math.nan


def _place(source: str | Path) -> str:
    """A file as an absolute path; the name of a dataset on the hub as it is."""
    return str(Path(source).resolve()) if Path(source).is_file() else str(source)


class LiveActivations(DatasetActivations):
    """Activations that the models compute when they are needed. Their arguments are those of `Activations`."""

    def __init__(
        self,
        snapshots: Snapshots,
        hook_name: str | Sequence[str],
        dataset: Dataset | Source,
        n_tokens: int | None = None,
        context_size: int | None = None,
        *,
        seed: int = 0,
        settings: ModelSettings | None = None,
        mixing_tokens: int | None = None,
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
        if mixing_tokens is not None and mixing_tokens < length:
            raise UserError(f"mixing_tokens={mixing_tokens} must be at least {length}, the tokens of a sequence")
        # the weights are compared before the first harvest; until then nothing is downloaded
        names = (hook_name,) if isinstance(hook_name, str) else tuple(hook_name)
        settings = settings or ModelSettings()
        check_hooks(names, settings.backend)
        for name in names:
            snapshots.check(name, weights=False)
        dataset = replace(dataset, context_size=length, separator=dataset.separator or snapshots.separator)
        settings = replace(settings, device=own_device(settings.device))
        super().__init__(snapshots, names, Sequences(dataset, snapshots, seed), settings, mixing_tokens)
        self._compared = False
        self._held: Tensor | None = None
        self._kept: dict[int, Tensor] = {}

    @property
    @override
    def data_order(self) -> str:
        return f"a live buffer of {self.mixing_tokens} tokens" if self._is_mixed else SHUFFLED

    @property
    def _is_mixed(self) -> bool:
        """Whether the buffer holds a part of an epoch only."""
        return self.mixing_tokens < self.n_tokens

    @override
    def block(self, first: int, last: int) -> Float[Tensor, "n T S D"]:
        self._compare()
        return harvest(self.snapshots, self.tokens[first:last], self.hook_name, self.settings, cut=True)

    def _compare(self) -> None:
        """Compare the weights of the snapshots, once."""
        if not self._compared:
            self.snapshots.check(self.hook_name)
            self._say_error(0)
            self._compared = True

    @override
    def held_out(self, batch_size: int = 4096) -> Iterator[Float[Tensor, "B S D"]]:
        """As `Activations.held_out`.

        An analysis reads them many times. If they take no more than `HELD_OUT_BYTES` they are kept in memory, and the
        models run once.
        """
        for x in super().held_out(batch_size):
            yield x.clone() if self._kept else x  # what is kept must not change

    @override
    def _held_out(self, first: int) -> Float[Tensor, "B S D"]:
        if first in self._kept:
            return self._kept[first]
        x = super()._held_out(first)
        if self._held_out_bytes() <= HELD_OUT_BYTES:
            self._kept[first] = x
        return x

    @override
    @contextmanager
    def _rows(self, closed: threading.Event, parallel: Parallel) -> Generator[Rows, None, None]:
        with Together.of(parallel) as together:

            def run(sequences: Int[Tensor, " n"]) -> Float[Tensor, "K S D"]:
                """Activations of the kept positions of some sequences."""
                self._compare()
                tokens, ours = self.tokens[sequences], self.settings
                if together is None:
                    acts = harvest(self.snapshots, tokens, self.hook_name, ours, cut=True, abandoned=closed.is_set)
                else:
                    acts = harvest_together(self.snapshots, tokens, self.hook_name, ours, together, closed.is_set)
                return acts[self.keep(tokens)]

            def hold() -> Float[Tensor, "N S D"]:
                """Activations of all training sequences; those that an earlier stream has filled are used again."""
                lacking = self._held is None
                if lacking if together is None else together.any(lacking):  # some may have filled theirs by themselves
                    self._held = self._harvest_all(run)
                assert self._held is not None
                return self._held

            if self._is_mixed:
                schedule = Schedule(self.sequences.counts, self.mixing_tokens, self.seed, self.block_sequences)
                width = (self.n_snapshots, self.d_model)
                yield MixedRows(schedule, lambda n: run(torch.from_numpy(n)), width, together is not None)
            else:
                counts = [int(self.sequences.counts[first:last].sum()) for first, last in self._shards()]
                yield HeldRows(Order(counts, self.seed), hold, self.d_model, together is not None)

    def _harvest_all(self, run: Callable[[Tensor], Tensor]) -> Float[Tensor, "N S D"]:
        """Activations of all training sequences, in the forward passes and in the order of a cache."""
        out = torch.empty(self.n_tokens, self.n_snapshots, self.d_model)
        block, at = self.block_sequences, 0
        with tqdm(
            total=len(out), desc="Running the models", unit=" tokens", unit_scale=True, leave=False, delay=2
        ) as bar:
            for shard, (first, last) in enumerate(self._shards()):
                n = int(self.sequences.counts[first:last].sum())
                places = np.empty(n, dtype=np.int64)
                places[stored_order(n, self.seed, shard)] = np.arange(at, at + n)
                at, done = at + n, 0
                for begin in range(first, last, block):
                    kept = run(torch.arange(begin, min(begin + block, last)))
                    out[torch.from_numpy(places[done : done + len(kept)])] = kept
                    done += len(kept)
                    bar.update(len(kept))
        return out


class CachedActivations(DatasetActivations):
    """Activations that are read from a cache.

    Args:
        live: the same, computed live.
        cache: complete; a file that turns out to be damaged is harvested again.
    """

    def __init__(self, live: LiveActivations, cache: ActivationCache) -> None:
        super().__init__(live.snapshots, live.hook_names, live.sequences, live.settings, live._mixing_tokens)
        self.store, self.cache_dtype = cache, cache.dtype
        cache.repair = self._repair
        self._cached_rows = CachedRows(cache, Order(cache.training_counts(), self.seed))

    @override
    def block(self, first: int, last: int) -> Float[Tensor, "n T S D"]:
        return self.store.read(first, last)

    @override
    def _rows(self, closed: threading.Event, parallel: Parallel) -> AbstractContextManager[Rows]:
        return nullcontext(self._cached_rows)

    def _repair(self, shard: int, snapshot: int, error: DamagedShardError) -> None:
        warnings.warn(f"{error.path} {error.what}: harvesting it again", stacklevel=2)
        fill({self.hook_name: self.store}, self.snapshots, [(shard, snapshot)], self.settings)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "cache": [str(self.store.folder.resolve()), self.store.dtype]}
