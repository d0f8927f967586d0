"""Activations on disk: large files, one per (shard of sequences, snapshot), each in a random order of its tokens.

    manifest.json                  what the cache holds; a request that does not match is rejected
    tokens-00000.safetensors       a shard's tokens (n, T), and the order of its rows (n T,)
    acts-00000-s03.safetensors     the shard's activations at one snapshot, (n T, D); `crosslens.activations.files`
    harvest*.lock                  while the cache is being filled: which process works on what

1. Training sequences and held-out ones are in shards of their own, each about `FILE_BYTES` a snapshot in bfloat16.
   A training shard stores the positions that training uses first, in a uniformly random order, then the others; so a
   run of rows of every shard is a batch of tokens from everywhere (`crosslens.activations.order`). Shards of held-out
   sequences are in reading order. One snapshot is harvested at a time, so a file holds one: a file of several would be
   written once for each of them.
2. The manifest is written first, then the tokens. A folder whose manifest does not match the request is refused, and so
   are activations without a manifest.
3. Every process that fills the cache locks one missing (shard, snapshot) at a time, harvests and writes it (`turns`).
   The system drops the locks of a process that dies. Two processes that harvest the same pair write identical files.
4. A file notes the request, shard and snapshot that it belongs to. One that belongs elsewhere is refused; a damaged one
   is harvested again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.activations.files import (
    DamagedShardError,
    Rows,
    ShardFile,
    Stored,
    check_dtype,
    decode,
    digest,
    file_bytes,
    read_tokens,
    row_bytes,
    write_shard,
    write_tokens,
)
from crosslens.activations.order import Indices, stored_order
from crosslens.activations.tokens import Found
from crosslens.errors import UserError, brief, json_checksum, shortened
from crosslens.snapshots.hashes import changed_entry

FORMAT = 2
FILE_BYTES = 512 << 20
"""Size of a file in bfloat16: 20 million tokens of 32 snapshots of width 768 take some 1,900 files."""


class ActivationCache:
    """A folder of shards; `missing` lists what is still to be harvested.

    Args:
        folder: created if needed.
        tokens: (N, T) sequences: those for training, then those held out.
        shard_sequences: sequences per shard; an existing cache keeps its own.
        n_snapshots: S.
        d_model: D.
        dtype: "bfloat16", "float32" or "int8".
        fingerprint: everything else that decides the activations; compared with an existing manifest.
        n_train: number of sequences for training; None: all.
        kept: positions that training uses; None: all.
        seed: seed for the order of rows.
        source: what the tokens were made from, for `recorded_tokens`.
        chosen: positions of the roles that were asked for, for `recorded_tokens`; None if none were.

    Attributes:
        repair: harvests a damaged (shard, snapshot) again; without it damage is an error.

    Raises:
        UserError: unknown dtype, a cache for a different request or of an older version, or one without its manifest.
    """

    repair: Callable[[int, int, DamagedShardError], None] | None = None

    def __init__(
        self,
        folder: Path,
        tokens: Int[Tensor, "N T"],
        shard_sequences: int,
        n_snapshots: int,
        d_model: int,
        dtype: str,
        fingerprint: Mapping[str, Any],
        *,
        n_train: int | None = None,
        kept: Bool[Tensor, "N T"] | None = None,
        seed: int = 0,
        source: Mapping[str, Any] | None = None,
        chosen: Bool[Tensor, "N T"] | None = None,
    ) -> None:
        check_dtype(dtype)
        self.folder, self.tokens, self.dtype, self.seed = folder, tokens, dtype, seed
        self.n_snapshots, self.d_model, self._chosen = n_snapshots, d_model, chosen
        self.n_train = len(tokens) if n_train is None else n_train
        self.kept = torch.ones_like(tokens, dtype=torch.bool) if kept is None else kept
        self._files: dict[tuple[int, int], ShardFile] = {}
        self._broken: set[tuple[int, int]] = set()
        self._orders: dict[int, str] = {}  # a digest of each shard's order
        self._rows = lru_cache(maxsize=4)(lambda shard: read_tokens(_tokens_path(self.folder, shard))[1])
        # not part of the request, whose digest is in every file: earlier versions did not record it
        self._config = fingerprint.get("config")
        request = {
            "format": FORMAT,
            **{key: value for key, value in fingerprint.items() if key != "config"},
            "dtype": dtype,
            "tokens": _sha256(tokens),
            "n_sequences": len(tokens),
            "n_training_sequences": self.n_train,
            "n_training_tokens": int(self.kept[: self.n_train].sum()),
            "training_positions": _sha256(self.kept[: self.n_train]),
        }
        self.size = self._claim(request, shard_sequences, source)
        self._request = hashlib.sha256(json.dumps([request, self.size], sort_keys=True).encode()).hexdigest()
        self._complete_tokens()

    @property
    def n_training_shards(self) -> int:
        """Number of shards of training sequences; they come first."""
        return -(-self.n_train // self.size)

    @property
    def n_shards(self) -> int:
        """Number of all shards."""
        return self.n_training_shards + -(-(len(self.tokens) - self.n_train) // self.size)

    # ------------------------------------------------------------------ manifest and tokens
    def _claim(self, request: dict[str, Any], shard_sequences: int, source: Mapping[str, Any] | None) -> int:
        """Write the manifest, or compare an existing one; return the sequences per shard."""
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            return self._compare(read_manifest(manifest), request)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            if manifest.exists():  # another process was faster
                return self._compare(read_manifest(manifest), request)
            if orphan := next(self.folder.glob("acts-*.safetensors"), None):
                raise UserError(
                    f"{self.folder} has activations ({orphan.name}) without a manifest.json that says what they are: "
                    "put it back, or delete the folder and harvest again"
                )
            recorded = {**request, "config": self._config, "shard_sequences": shard_sequences, "source": source}
            partial = manifest.with_suffix(".tmp")
            partial.write_text(json.dumps({"checksum": json_checksum(recorded), **recorded}, indent=1))
            os.replace(partial, manifest)
        return shard_sequences

    def _compare(self, found: dict[str, Any], request: dict[str, Any]) -> int:
        if found.get("format") != FORMAT:
            raise UserError(
                f"{self.folder} is a cache of format {shortened(found.get('format'))}, which this version cannot read "
                f"(it reads format {FORMAT}): delete the folder, or give another one, and harvest again"
            )
        for key, value in request.items():
            if found.get(key) != value:
                raise UserError(
                    f"{self.folder} is a cache for a different request: it has {key}={shortened(found.get(key))}, this "
                    f"request has {key}={shortened(value)}; choose another folder, or delete this one"
                )
        if changed := changed_entry(found.get("config"), self._config or []):
            key, before, now = changed
            raise UserError(
                f"{self.folder} is a cache for other models: it has {key}={shortened(before)} in their config, they "
                f"have {key}={shortened(now)} now; choose another folder, or delete this one"
            )
        size = found.get("shard_sequences")
        if not isinstance(size, int) or size < 1:
            raise _damaged_manifest(self.folder / "manifest.json", f"shard_sequences={shortened(size)}")
        return size

    def _complete_tokens(self) -> None:
        """Write the shards of tokens that are missing or damaged."""
        if self._missing_tokens():
            with self.lock():
                for shard in self._missing_tokens():
                    path, (first, last) = _tokens_path(self.folder, shard), self.span(shard)
                    if path.exists():
                        warnings.warn(f"{path} is damaged: writing it again", stacklevel=4)
                    order = self._order(shard)
                    write_tokens(
                        path, self.tokens[first:last], order, None if self._chosen is None else self._chosen[first:last]
                    )
                    self._orders[shard] = digest(order)

    def _missing_tokens(self) -> list[int]:
        missing: list[int] = []
        for shard in range(self.n_shards):
            first, last = self.span(shard)
            try:
                _, rows, _ = read_tokens(_tokens_path(self.folder, shard), (last - first, self.tokens.shape[1]))
                self._orders[shard] = digest(rows)
            except DamagedShardError:
                missing.append(shard)
        return missing

    def _order(self, shard: int) -> Indices:
        """The order in which a shard stores its positions."""
        first, last = self.span(shard)
        if first >= self.n_train:
            return np.arange((last - first) * self.tokens.shape[1])
        kept = self.kept[first:last].flatten().numpy()
        places = np.flatnonzero(kept)
        return np.concatenate([places[stored_order(len(places), self.seed, shard)], np.flatnonzero(~kept)])

    # ------------------------------------------------------------------ what is there
    def span(self, shard: int) -> tuple[int, int]:
        """First and last (exclusive) sequence of a shard."""
        if shard < self.n_training_shards:
            return shard * self.size, min((shard + 1) * self.size, self.n_train)
        first = self.n_train + (shard - self.n_training_shards) * self.size
        return first, min(first + self.size, len(self.tokens))

    def training_counts(self) -> list[int]:
        """Number of positions that training uses, of every shard of training sequences."""
        spans = map(self.span, range(self.n_training_shards))
        return [int(self.kept[first:last].sum()) for first, last in spans]

    def path(self, shard: int, snapshot: int) -> Path:
        """File of one shard at one snapshot."""
        return self.folder / f"acts-{shard:05d}-s{snapshot:02d}.safetensors"

    def lock(self, part: str = "") -> FileLock:
        """The lock for writing manifest and tokens, or a part of the activations; any thread may release it."""
        return FileLock(self.folder / f"harvest{part}.lock", thread_local=False)

    def remove_locks(self) -> None:
        """Delete the files of locks once nothing is missing; who waits for one finds its pair complete."""
        for path in self.folder.glob("harvest*.lock") if not self.missing() else ():
            path.unlink(missing_ok=True)

    def missing(self, *, verify: bool = False) -> list[tuple[int, int]]:
        """(shard, snapshot) pairs without a complete file, snapshot by snapshot.

        The folder is listed once, and the header of a file is read once in the life of this object.

        Args:
            verify: also compare all checksums, which reads the whole cache.

        Raises:
            UserError: a file belongs to another cache, shard or snapshot.
        """
        # activations alone: another process may remove a lock or rename a partial file between its listing and its stat
        entries = (entry for entry in os.scandir(self.folder) if entry.name.endswith(".safetensors"))
        sizes = {entry.name: entry.stat().st_size for entry in entries}
        pairs = ((shard, s) for s in range(self.n_snapshots) for shard in range(self.n_shards))
        missing = [pair for pair in pairs if not self._is_good(pair, sizes.get(self.path(*pair).name), verify)]
        for path in (self.path(*pair) for pair in missing):
            if path.name in sizes:
                warnings.warn(f"{path} is damaged: it has to be harvested again", stacklevel=3)
        return missing

    def has(self, shard: int, snapshot: int) -> bool:
        """Whether a pair has a complete file; its values are not checked."""
        path = self.path(shard, snapshot)
        return self._is_good((shard, snapshot), path.stat().st_size if path.exists() else None)

    def _is_good(self, pair: tuple[int, int], size: int | None, verify: bool = False) -> bool:
        if size != self._file_bytes(pair[0]):
            self._files.pop(pair, None)
            return False
        if pair in self._broken:
            return False
        try:
            file = self._open(pair)
            if verify:
                file.verify()
        except DamagedShardError:
            self._broken.add(pair)
            return False
        return True

    def _n_rows(self, shard: int) -> int:
        first, last = self.span(shard)
        return (last - first) * self.tokens.shape[1]

    def _file_bytes(self, shard: int) -> int:
        return file_bytes(self._n_rows(shard), self.d_model, self.dtype)

    def needed_bytes(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Disk space that these pairs will take, in bytes."""
        return sum(self._file_bytes(shard) for shard, _ in pairs)

    def rounding_errors(self) -> list[float]:
        """Fraction of each snapshot's squared norm that is lost by rounding."""
        found: list[float] = []
        for s in range(self.n_snapshots):
            parts = [self._open((shard, s)).notes for shard in range(self.n_shards)]
            error, squares = (sum(part[name] for part in parts) for name in ("squared_error", "squares"))
            found.append(error / squares if squares else 0.0)
        return found

    # ------------------------------------------------------------------ writing and reading
    def _notes(self, pair: tuple[int, int]) -> dict[str, Any]:
        """What the file of a pair notes about where it belongs."""
        shard, snapshot = pair
        return {"request": self._request, "shard": shard, "snapshot": snapshot, "order": self._orders[shard]}

    def write(self, shard: int, snapshot: int, acts: Float[Tensor, "n T D"]) -> None:
        """Store one shard of one snapshot.

        Raises:
            UserError: the disk is full.
        """
        pair = shard, snapshot
        write_shard(self.path(*pair), acts.flatten(0, 1), self._rows(shard), self.dtype, self._notes(pair))
        self._files.pop(pair, None)
        self._broken.discard(pair)

    def read(self, first: int, last: int) -> Float[Tensor, "n T S D"]:
        """Float32 activations of consecutive sequences, all snapshots.

        Args:
            first: first sequence.
            last: the one after the last.

        Raises:
            DamagedShardError: a file is missing or damaged, and there is no `repair`.
        """
        T = self.tokens.shape[1]
        out = torch.empty(last - first, T, self.n_snapshots, self.d_model)
        for shard in range(self.n_shards):
            begin, end = self.span(shard)
            low, high = max(first, begin), min(last, end)
            if low >= high:
                continue
            places = np.empty(self._n_rows(shard), dtype=np.int64)  # the row of every position
            places[self._rows(shard)] = np.arange(len(places))
            rows = places[(low - begin) * T : (high - begin) * T]
            if 4 * len(rows) < len(places):
                ordered, inverse = np.unique(rows, return_inverse=True)
            else:  # training shards have no order: it is faster to read all
                ordered, inverse = np.arange(len(places)), rows
            chosen, index = Rows(ordered), torch.from_numpy(inverse)
            for s in range(self.n_snapshots):
                here = out[low - first : high - first, :, s]
                here.copy_(decode(self.gather(shard, s, chosen))[index].unflatten(0, (-1, T)))
        return out

    def gather(self, shard: int, snapshot: int, rows: Rows) -> Stored:
        """Rows of one file as they are stored, in the memory of `rows`, which the next call with it overwrites.

        Raises:
            DamagedShardError: as `read`.
        """
        pair = shard, snapshot
        try:
            return self._open(pair).gather(rows)
        except DamagedShardError as error:
            self._files.pop(pair, None)
            if self.repair is None:
                raise
            self._broken.add(pair)
            self.repair(shard, snapshot, error)
        return self._open(pair).gather(rows)

    def _open(self, pair: tuple[int, int]) -> ShardFile:
        """The file of a pair, once it is known to belong here."""
        if pair not in self._files:
            path, expected = self.path(*pair), self._notes(pair)
            file = ShardFile(path, self._n_rows(pair[0]), self.d_model, self.dtype)
            other = {key for key, value in expected.items() if file.notes.get(key) != value}
            if other & {"request", "shard", "snapshot"}:
                what = f"shard {file.notes.get('shard')}, snapshot {file.notes.get('snapshot')}"
                if not other & {"shard", "snapshot"}:
                    what = "another cache"
                raise UserError(
                    f"{path} holds activations of {shortened(what)}, not what its name says: delete this file, and "
                    "the same harvest makes it again"
                )
            if other:
                raise DamagedShardError(path, "has its rows in another order than the shard of tokens says")
            self._files[pair] = file
        return self._files[pair]


# ---------------------------------------------------------------------- several processes
def turns(
    caches: Sequence[ActivationCache], pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], FileLock]]:
    """Pairs for this process to harvest, each with its lock, which is to be released when the pair is written.

    Pairs that other processes have locked come last: they are harvested by them, unless they die.

    Args:
        caches: caches of the same shards, which are filled in the same turns.
        pairs: what any of them lacks.
    """
    busy: list[tuple[int, int]] = []
    for wait, queue in ((False, pairs), (True, busy)):
        for pair in queue:
            lock = caches[0].lock("-{:05d}-s{:02d}".format(*pair))
            try:
                lock.acquire(blocking=wait, poll_interval=0.02)
            except Timeout:
                busy.append(pair)
                continue
            if all(cache.has(*pair) for cache in caches):
                lock.release()
            else:
                yield pair, lock


# ---------------------------------------------------------------------- sizes
def check_space(folder: Path, needed: int) -> None:
    """Refuse to start when the disk has less than `needed` bytes free.

    Raises:
        UserError: names the space needed and the space free.
    """
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**20:,.1f} MiB more and the disk has {free / 2**20:,.1f} MiB free: free some "
            "space, ask for fewer tokens or for dtype='int8', or give a folder on another disk"
        )


def free_bytes(folder: str | Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def describe_rounding(dtype: str, labels: Sequence[str], errors: Sequence[float]) -> str:
    """The rounding error of a cache, in one line.

    Args:
        dtype: cache dtype.
        labels: snapshot labels.
        errors: fraction of each snapshot's squared norm that is lost.
    """
    worst = max(range(len(errors)), key=lambda s: errors[s])
    mean = sum(errors) / len(errors)
    return (
        f"{dtype} loses {mean:.2e} of the squared norm by rounding on average, at most {errors[worst]:.2e} "
        f"({labels[worst]})"
    )


def shard_sequences(n_sequences: int, context_size: int, d_model: int, batch_sequences: int = 1) -> int:
    """Sequences per shard, the same for every dtype of the cache, and whole forward passes where they fit.

    Args:
        n_sequences: sequences for training.
        context_size: T.
        d_model: D.
        batch_sequences: sequences of a forward pass.
    """
    most = max(1, FILE_BYTES // (context_size * row_bytes(d_model, "bfloat16")))
    even = -(-n_sequences // max(1, -(-n_sequences // most)))
    passes = min(-(-even // batch_sequences), most // batch_sequences)
    return max(1, passes * batch_sequences if passes else min(even, most))


# ---------------------------------------------------------------------- manifest and tokens
def read_manifest(path: Path) -> dict[str, Any]:
    """What a cache's manifest records.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise _damaged_manifest(path, brief(error)) from error
    checksum = found.pop("checksum", None)  # caches of older releases have none
    if checksum is not None and checksum != json_checksum(found):
        raise _damaged_manifest(path, "its contents do not have the checksum in it")
    return found


def _damaged_manifest(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}); delete the folder {path.parent} and harvest again")


def recorded_tokens(folder: Path, source: Mapping[str, Any] | None) -> Found | None:
    """The sequences of a cache that were made from `source`.

    None if there is no such cache, it does not say what they were made from, or a file is missing or damaged.
    """
    manifest = folder / "manifest.json"
    if source is None or not manifest.exists():
        return None
    found = read_manifest(manifest)
    recorded = found.get("source")
    if found.get("format") != FORMAT or not isinstance(recorded, dict):
        return None
    # what earlier versions cached had no conversations, so no template either
    ours = {key: value for key, value in source.items() if key != "chat_template" or key in recorded}
    if recorded != json.loads(json.dumps(ours)):
        return None
    try:
        n, size, n_train = (found[key] for key in ("n_sequences", "shard_sequences", "n_training_sequences"))
        n_shards = -(-n_train // size) + -(-(n - n_train) // size)
        parts = [read_tokens(_tokens_path(folder, shard)) for shard in range(n_shards)]
        tokens = torch.cat([part[0] for part in parts])
    except (DamagedShardError, KeyError, TypeError, ZeroDivisionError, RuntimeError):
        return None
    chosen = [part[2] for part in parts if part[2] is not None]
    if len(tokens) != n or _sha256(tokens) != found["tokens"]:
        return None
    return Found(tokens, n_train, torch.cat(chosen) if chosen else None)


def _tokens_path(folder: Path, shard: int) -> Path:
    return folder / f"tokens-{shard:05d}.safetensors"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
