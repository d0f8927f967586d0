"""Activations on disk: large files, one per (shard of sequences, snapshot), each in a random order of its tokens.

    manifest.json                  what the cache holds; a request that does not match is rejected
    tokens-00000.safetensors       a shard's tokens (n, T), and the order of its rows (n T,)
    acts-00000-s03.safetensors     the shard's activations at one snapshot, (n T, D)
    harvest.lock                   while the cache is being filled: which process works on what

1. Training sequences and held-out ones are in shards of their own, each about `FILE_BYTES` a snapshot in bfloat16.
   A training shard stores the positions that training uses first, in a uniformly random order, then the others; so a
   run of rows of every shard is a batch of tokens from everywhere (`crosslens.activations.order`). Shards of held-out
   sequences are in reading order. One snapshot is harvested at a time, so a file holds one: a file of several would be
   written once for each of them.
2. The manifest is written first, then the tokens. A folder whose manifest does not match the request is refused, and so
   are activations without a manifest.
3. Every process that fills the cache locks one missing (shard, snapshot) at a time, harvests and writes it. The system
   drops the locks of a process that dies. Two processes that harvest the same pair write identical files.
4. A file is written under a temporary name and renamed, and its size is known, so a file of that size is complete.
5. Activations are stored as float32, as bfloat16, or as int8: whole numbers in [-127, 127] with one float32 scale per
   row, its largest absolute value / 127.
6. The header of a file names the request, shard and snapshot that it belongs to, with the sum of squared rounding
   errors and the sum of squares. A file that belongs elsewhere is refused. `checks` holds a checksum of every `BLOCK`
   rows, which is compared when one of them is first read; a damaged file is harvested again. Files are read, not
   mapped into memory: pages that are mapped would count as memory of the process, and a file cut short would end it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from crosslens.activations.order import RUN, Indices, stored_order
from crosslens.errors import UserError, brief, did_you_mean, first_line, json_checksum, shortened
from crosslens.snapshots.hashes import changed_entry

try:
    import fcntl
except ImportError:  # Windows: processes may do the same work twice, which is harmless
    fcntl = None

FORMAT = 2
Run: TypeAlias = tuple[int, int]
"""Consecutive rows: the first, and how many."""
FILE_BYTES = 512 << 20
"""Size of a file in bfloat16: 20 million tokens of 32 snapshots of width 768 take some 1,900 files."""
BLOCK = RUN
"""Rows of a checksum: what is read at once where rows are permuted in runs."""
HEADER = 4096
"""Bytes of a file's header: the data begin at a page."""


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

    Raises:
        UserError: unknown dtype, a cache for a different request or of an older version, or one without its manifest.
    """

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
    ) -> None:
        check_dtype(dtype)
        self.folder, self.tokens, self.dtype, self.seed = folder, tokens, dtype, seed
        self.n_snapshots, self.d_model = n_snapshots, d_model
        self.n_train = len(tokens) if n_train is None else n_train
        self.kept = torch.ones_like(tokens, dtype=torch.bool) if kept is None else kept
        self._notes: dict[tuple[int, int], dict[str, Any]] = {}  # of files whose header was read
        self._broken: set[tuple[int, int]] = set()
        self._wanted_by: tuple[ActivationCache, ...] = (self,)
        self._held: _Locks | None = None
        self._files: dict[tuple[int, int], _File] = {}
        self._orders: dict[int, str] = {}  # a digest of each shard's order
        self._rows = lru_cache(maxsize=4)(self._read_rows)
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
        with self._locks() as locks:
            locks.wait(0)
            if manifest.exists():  # another process was faster
                return self._compare(read_manifest(manifest), request)
            if orphan := next(self.folder.glob("acts-*"), None):
                raise UserError(
                    f"{self.folder} has activations ({orphan.name}) without a manifest.json that says what they are: "
                    "put it back, or delete the folder and harvest again"
                )
            _remove(self.folder.glob(f"manifest.{'[0-9a-f]' * 32}.tmp"))  # other files may be the user's
            recorded = {**request, "config": self._config, "shard_sequences": shard_sequences, "source": source}
            partial = manifest.with_name(f"manifest.{uuid.uuid4().hex}.tmp")
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
            with self._locks() as locks:
                locks.wait(0)
                for shard in self._missing_tokens():
                    first, last = self.span(shard)
                    if self._tokens_path(shard).exists():
                        warnings.warn(f"{self._tokens_path(shard)} is damaged: writing it again", stacklevel=4)
                    tensors = {"tokens": self.tokens[first:last], "rows": torch.from_numpy(self._order(shard))}
                    write_file(self._tokens_path(shard), {k: v.to(torch.int32) for k, v in tensors.items()}, {})
                self._missing_tokens()

    def _missing_tokens(self) -> list[int]:
        missing: list[int] = []
        for shard in range(self.n_shards):
            first, last = self.span(shard)
            try:
                _, rows = read_tokens(self._tokens_path(shard), (last - first, self.tokens.shape[1]))
            except DamagedShardError:
                missing.append(shard)
                continue
            self._orders[shard] = _digest(rows)
        return missing

    def _read_rows(self, shard: int) -> Indices:
        return read_tokens(self._tokens_path(shard))[1]

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

    def _tokens_path(self, shard: int) -> Path:
        return self.folder / f"tokens-{shard:05d}.safetensors"

    def missing(self, *, verify: bool = False) -> list[tuple[int, int]]:
        """(shard, snapshot) pairs without a complete file, snapshot by snapshot.

        The folder is listed once, and the header of a file is read once in the life of this object.

        Args:
            verify: also compare all checksums, which reads the whole cache.

        Raises:
            UserError: a file belongs to another cache, shard or snapshot.
        """
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)}
        pairs = ((shard, s) for s in range(self.n_snapshots) for shard in range(self.n_shards))
        missing = [pair for pair in pairs if not self._is_good(pair, sizes.get(self.path(*pair).name), verify)]
        for path in (self.path(*pair) for pair in missing):
            if path.name in sizes:
                warnings.warn(f"{path} is damaged: it has to be harvested again", stacklevel=3)
        return missing

    def _is_good(self, pair: tuple[int, int], size: int | None, verify: bool) -> bool:
        if size != self._file_bytes(pair[0]):
            self._forget(pair)
            return False
        if pair in self._broken:
            return False
        try:
            self._read_notes(pair)
            if verify:
                self._open(pair).verify()
        except DamagedShardError:
            self._broken.add(pair)
            return False
        return True

    def _forget(self, pair: tuple[int, int]) -> None:
        self._notes.pop(pair, None)
        self._files.pop(pair, None)

    def _n_rows(self, shard: int) -> int:
        first, last = self.span(shard)
        return (last - first) * self.tokens.shape[1]

    def _file_bytes(self, shard: int) -> int:
        n = self._n_rows(shard)
        return HEADER + n * row_bytes(self.d_model, self.dtype) + 4 * -(-n // BLOCK)

    def needed_bytes(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Disk space that these pairs will take, in bytes."""
        return sum(self._file_bytes(shard) for shard, _ in pairs)

    def rounding_errors(self) -> list[float]:
        """Fraction of each snapshot's squared norm that is lost by rounding."""
        found: list[float] = []
        for s in range(self.n_snapshots):
            parts = [self._read_notes((shard, s)) for shard in range(self.n_shards)]
            error, squares = (sum(part[name] for part in parts) for name in ("squared_error", "squares"))
            found.append(error / squares if squares else 0.0)
        return found

    def _read_notes(self, pair: tuple[int, int]) -> dict[str, Any]:
        """What the header of a file says, once it is known to belong here."""
        if pair not in self._notes:
            path = self.path(*pair)
            notes = read_header(path)[1]
            expected = {"request": self._request, "shard": pair[0], "snapshot": pair[1]}
            if any(notes.get(key) != value for key, value in expected.items()):
                here = all(notes.get(key) == value for key, value in list(expected.items())[1:])
                what = "another cache" if here else f"shard {notes.get('shard')}, snapshot {notes.get('snapshot')}"
                raise UserError(
                    f"{path} holds activations of {shortened(what)}, not what its name says: delete this file, and "
                    "the same harvest makes it again"
                )
            if notes.get("order") != self._orders[pair[0]]:
                raise DamagedShardError(path, "has its rows in another order than the shard of tokens says")
            self._notes[pair] = notes
        return self._notes[pair]

    # ------------------------------------------------------------------ writing
    @contextmanager
    def harvesting(
        self, pairs: list[tuple[int, int]], first: int = 0, others: Sequence[ActivationCache] = ()
    ) -> Generator[Iterator[tuple[int, int]], None, None]:
        """Pairs for this process to harvest, each locked until it calls `release`; pairs locked by others come last.

        Args:
            pairs: what is missing.
            first: index in `pairs` to begin at, so that several processes begin at different snapshots.
            others: caches of the same shards that are filled in the same turns.
        """
        self._wanted_by = (self, *others)
        with self._locks() as locks, closing(self._turns(pairs[first:] + pairs[:first], locks)) as turns:
            self._held = locks
            try:
                yield turns
            finally:
                self._held = None
        for cache in self._wanted_by:
            if fcntl is not None and not cache.missing():
                (cache.folder / "harvest.lock").unlink(missing_ok=True)

    def _turns(self, pairs: list[tuple[int, int]], locks: _Locks) -> Generator[tuple[int, int], None, None]:
        busy: list[tuple[int, int]] = []
        for pair in pairs:
            if locks.take(self._number(pair)):
                yield from self._turn(pair, locks)
            else:
                busy.append(pair)
        for pair in busy:  # another process is harvesting it, and may die
            # not `wait`: this process may be writing pairs that the other one waits for, which is no deadlock
            while not locks.take(self._number(pair)):
                time.sleep(0.02)
            yield from self._turn(pair, locks)

    def _turn(self, pair: tuple[int, int], locks: _Locks) -> Iterator[tuple[int, int]]:
        if all(cache.has(*pair) for cache in self._wanted_by):
            locks.release(self._number(pair))
            return
        yield pair

    def release(self, shard: int, snapshot: int) -> None:
        """Say that a pair of `harvesting` is written; until then no other process takes it."""
        if self._held is not None:
            self._held.release(self._number((shard, snapshot)))

    def has(self, shard: int, snapshot: int) -> bool:
        """Whether a pair has a complete file; its values are not checked."""
        path = self.path(shard, snapshot)
        return self._is_good((shard, snapshot), path.stat().st_size if path.exists() else None, verify=False)

    def _number(self, pair: tuple[int, int]) -> int:
        return 1 + pair[1] * self.n_shards + pair[0]

    def write(self, shard: int, snapshot: int, acts: Float[Tensor, "n T D"]) -> None:
        """Store one shard of one snapshot.

        Raises:
            UserError: the disk is full.
        """
        pair = shard, snapshot
        notes = {"request": self._request, "shard": shard, "snapshot": snapshot, "order": self._orders[shard]}
        write_shard(self.path(*pair), acts.flatten(0, 1), self._rows(shard), self.dtype, notes)
        self._forget(pair)
        self._broken.discard(pair)

    # ------------------------------------------------------------------ reading
    def read(
        self, first: int, last: int, repair: Callable[[int, int, DamagedShardError], None] | None = None
    ) -> Float[Tensor, "n T S D"]:
        """Float32 activations of consecutive sequences, all snapshots.

        Args:
            first: first sequence.
            last: the one after the last.
            repair: harvests a damaged (shard, snapshot) again; without it damage is an error.

        Raises:
            DamagedShardError: a file is missing or damaged.
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
                here.copy_(decode(self.gather(shard, s, chosen, repair))[index].unflatten(0, (-1, T)))
        return out

    def gather(
        self,
        shard: int,
        snapshot: int,
        rows: Rows,
        repair: Callable[[int, int, DamagedShardError], None] | None = None,
    ) -> dict[str, Tensor]:
        """Rows of one file as they are stored: `data` (n, D), and for int8 `scale` (n, 1).

        They may be in the memory of `rows`, which the next call with it overwrites.

        Args:
            shard: which shard.
            snapshot: which snapshot.
            rows: which rows.
            repair: as in `read`.
        """
        pair = shard, snapshot
        try:
            return self._open(pair).gather(rows)
        except DamagedShardError as error:
            self._forget(pair)
            if repair is None:
                raise
            self._broken.add(pair)
            repair(shard, snapshot, error)
        return self._open(pair).gather(rows)

    def _open(self, pair: tuple[int, int]) -> _File:
        file = self._files.get(pair)
        if file is None:
            self._read_notes(pair)
            file = self._files[pair] = _File(self.path(*pair), self._file_bytes(pair[0]))
        return file

    @contextmanager
    def _locks(self) -> Generator[_Locks, None, None]:
        with open(self.folder / "harvest.lock", "wb", opener=_open_no_link) as file:
            yield _Locks(file.fileno())


def _open_no_link(path: str, flags: int) -> int:
    """An opener for files that are written, which fails if the file is a link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _remove(left: Iterable[Path]) -> None:
    """Delete files of a process that was killed; the caller holds the lock, so no one else is using them."""
    for path in left if fcntl is not None else ():
        path.unlink(missing_ok=True)


class _Locks:
    """Locks on single bytes of a file, which the system releases when their process ends, for whatever reason."""

    def __init__(self, file: int) -> None:
        self.file = file

    def take(self, byte: int) -> bool:
        """Lock a byte; False if another process holds it."""
        try:
            self._lock(byte, wait=False)
        except OSError:
            return False
        return True

    def wait(self, byte: int) -> None:
        """Wait until no other process holds a byte, and lock it."""
        self._lock(byte, wait=True)

    def _lock(self, byte: int, *, wait: bool) -> None:
        if fcntl is not None:
            fcntl.lockf(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)

    def release(self, byte: int) -> None:
        if fcntl is not None:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, byte)


class _File:
    """A file of activations. Checksums are compared when rows are first read; it is open only while it is read.

    Args:
        path: the file.
        size: its size, if it is whole.

    Raises:
        DamagedShardError: it is missing, or has another size or another header.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        entries, notes = read_header(path)
        try:
            if path.stat().st_size != size:
                raise DamagedShardError(path, f"has {path.stat().st_size:,} bytes, not {size:,}")
            self.parts = {name: _Part.of(entry) for name, entry in entries.items() if name != "checks"}
            checks = _Part.of(entries["checks"])
            with open(path, "rb") as file:
                self.checks = checks.read(file.fileno(), [(0, checks.shape[0])]).numpy()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error
        if notes.get("checks") != _digest(self.checks):
            raise DamagedShardError(path, "does not match its checksum")
        self.n_rows = self.parts["data"].shape[0]
        self.verified = np.zeros(len(self.checks), dtype=bool)
        self.n_unknown = len(self.checks)

    def verify(self) -> None:
        """Compare the checksums that were not compared before."""
        for first in range(0, self.n_rows, _AT_ONCE):
            self.gather(Rows(np.arange(first, min(first + _AT_ONCE, self.n_rows))))

    def gather(self, rows: Rows) -> dict[str, Tensor]:
        """Some rows of every tensor, in the memory of `rows`."""
        known = not self.n_unknown or bool(self.verified[rows.blocks].all())
        wanted = rows if known else rows.whole_blocks(self.n_rows)
        with self._opened() as file:
            found = {n: part.read(file, wanted.runs, wanted.memory(n, part)) for n, part in self.parts.items()}
        if known:
            return found
        self._verify(rows.blocks, found)
        out = {name: rows.memory(name, part)[0] for name, part in self.parts.items()}
        return {name: torch.index_select(found[name], 0, rows.places, out=out[name]) for name in out}

    def _verify(self, blocks: Indices, found: Mapping[str, Tensor]) -> None:
        """Compare the checksums of these blocks, all of which were read."""
        raw = _bytes_of(found)
        for i, block in enumerate(blocks.tolist()):
            if not self.verified[block]:
                if _check(raw, i) != self.checks[block]:
                    raise DamagedShardError(self.path, "does not match its checksum")
                self.verified[block] = True
                self.n_unknown -= 1

    @contextmanager
    def _opened(self) -> Generator[int, None, None]:
        try:
            file = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise DamagedShardError(self.path, f"cannot be read ({first_line(error)})") from error


class Rows:
    """Rows to read from several files of one shard, one after the other, into the same memory.

    Args:
        rows: their numbers.
    """

    def __init__(self, rows: Indices) -> None:
        self.rows, self.runs, self.blocks = rows, runs_of(rows), np.unique(rows // BLOCK)
        self._memory: dict[str, tuple[Tensor, memoryview]] = {}
        self._whole: Rows | None = None

    def whole_blocks(self, n_rows: int) -> Rows:
        """All rows of the blocks that these rows are in, of a file of `n_rows`."""
        if self._whole is None:
            rows = (self.blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
            self._whole = Rows(rows[rows < n_rows])
        return self._whole

    @cached_property
    def places(self) -> Int[Tensor, " n"]:
        """Where these rows are among those of the whole blocks."""
        return torch.from_numpy(np.searchsorted(self.blocks, self.rows // BLOCK) * BLOCK + self.rows % BLOCK)

    def memory(self, name: str, part: _Part) -> tuple[Tensor, memoryview]:
        """Memory for these rows of a tensor, and its bytes."""
        if name not in self._memory:
            self._memory[name] = part.empty(len(self.rows))
        return self._memory[name]


class _Part(NamedTuple):
    """A tensor in a file."""

    first: int
    """Its first byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Part:
        """As the header describes it."""
        return cls(HEADER + entry["data_offsets"][0], tuple(entry["shape"]), _TYPES[entry["dtype"]])

    def empty(self, n: int) -> tuple[Tensor, memoryview]:
        """Memory for n of its rows, and its bytes."""
        rows = torch.empty(n, *self.shape[1:], dtype=self.dtype)
        return rows, rows.view(torch.uint8).numpy().reshape(-1).data

    def read(self, file: int, runs: Sequence[Run], into: tuple[Tensor, memoryview] | None = None) -> Tensor:
        """Some of its rows, in runs of consecutive ones."""
        out, raw = into or self.empty(sum(n for _, n in runs))
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        at = 0
        for first, n in runs:
            end = at + n * size
            _read(file, raw[at:end], self.first + first * size)
            at = end
        return out


def _read(file: int, into: memoryview, at: int) -> None:
    """Read bytes from a place in a file. A read may be cut short at 2 GiB, or by a signal.

    Raises:
        OSError: the file ends before.
    """
    done = 0
    while done < len(into):
        if _preadv is not None:
            n = _preadv(file, [into[done:]], at + done)
        else:
            os.lseek(file, at + done, os.SEEK_SET)
            part = os.read(file, len(into) - done)
            n = len(part)
            into[done : done + n] = part
        if n == 0:
            raise OSError("the file ends early")
        done += n


_preadv = getattr(os, "preadv", None)  # Windows has none


def runs_of(rows: Indices) -> list[Run]:
    """Row numbers as runs of consecutive ones: the first of each, and how many."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    return list(zip(rows[starts].tolist(), np.diff(starts, append=len(rows)).tolist(), strict=True))


def _view(raw: Tensor, entry: Mapping[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    return raw[HEADER + first : HEADER + last].view(_TYPES[entry["dtype"]]).view(entry["shape"])


def _bytes_of(rows: Mapping[str, Tensor]) -> list[tuple[memoryview, int]]:
    """The bytes of each tensor, by name, and how many of them are a block."""
    ordered = [rows[name] for name in sorted(rows)]
    sizes = [BLOCK * tensor.dtype.itemsize * math.prod(tensor.shape[1:]) for tensor in ordered]
    return [(tensor.view(torch.uint8).numpy().reshape(-1).data, n) for tensor, n in zip(ordered, sizes, strict=True)]


def _check(raw: Sequence[tuple[memoryview, int]], i: int) -> int:
    """The checksum of the i-th block of rows, over all tensors."""
    digest = 0
    for data, size in raw:  # only the last block of a file may have fewer rows
        digest = xxhash.xxh3_64_intdigest(data[i * size : (i + 1) * size], digest)
    return (digest & (2**32 - 1)) - 2**31


def _digest(array: NDArray[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).view(np.uint8).data)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


DTYPES = ("bfloat16", "float32", "int8")

_TYPES = {"I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_dtype(dtype: str) -> str:
    """Return `dtype` if a cache can have it.

    Raises:
        UserError: it cannot.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"dtype={dtype!r} is unknown for a cache; use one of {', '.join(map(repr, DTYPES))}"
            f"{did_you_mean(dtype, DTYPES)}"
        )
    return dtype


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


def row_bytes(d_model: int, dtype: str) -> int:
    """Bytes per position and snapshot."""
    return {"float32": 4 * d_model, "bfloat16": 2 * d_model, "int8": d_model + 4}[dtype]


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


# ---------------------------------------------------------------------- files
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


def recorded_tokens(folder: Path, source: Mapping[str, Any] | None) -> tuple[Int[Tensor, "N T"], int] | None:
    """The tokens of a cache that were made from `source`, and how many sequences are for training.

    None if there is no such cache, it does not say what they were made from, or a file is missing or damaged.
    """
    manifest = folder / "manifest.json"
    if source is None or not manifest.exists():
        return None
    found = read_manifest(manifest)
    if found.get("format") != FORMAT or found.get("source") != json.loads(json.dumps(source)):
        return None
    try:
        n, size, n_train = (found[key] for key in ("n_sequences", "shard_sequences", "n_training_sequences"))
        n_shards = -(-n_train // size) + -(-(n - n_train) // size)
        parts = [read_tokens(folder / f"tokens-{shard:05d}.safetensors")[0] for shard in range(n_shards)]
        tokens = torch.cat(parts)
    except (DamagedShardError, KeyError, TypeError, ZeroDivisionError, RuntimeError):
        return None
    return (tokens, n_train) if len(tokens) == n and _sha256(tokens) == found["tokens"] else None


def read_tokens(path: Path, shape: tuple[int, int] | None = None) -> tuple[Int[Tensor, "n T"], Indices]:
    """The tokens of a shard, and the order of its rows.

    Raises:
        DamagedShardError: the file is missing, damaged, or of another shape.
    """
    tensors, notes = read_header(path)
    try:
        raw = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        tokens, rows = (_view(raw, tensors[name]) for name in ("tokens", "rows"))
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error
    if notes.get("digest") != _digest(raw[HEADER:].numpy()) or (shape is not None and tokens.shape != shape):
        raise DamagedShardError(path, "does not match its checksum")
    return tokens.clone(), rows.long().numpy()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of the tensors in a file, and what `write_file` noted beside them.

    Raises:
        DamagedShardError: the file is missing or its header damaged.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER)
        if len(raw) < HEADER or int.from_bytes(raw[:8], "little") != HEADER - 8:
            raise ValueError("no header of this format")
        entries = json.loads(raw[8:])
        notes = json.loads(entries.pop("__metadata__")["crosslens"])
        if notes.pop("header") != json_checksum([entries, notes]):
            raise ValueError("its header does not match its checksum")
        return entries, notes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedShardError(path, f"cannot be read ({brief(error)})") from error


def write_file(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors in safetensors' format under a temporary name, then rename.

    safetensors' own writer copies every tensor twice, and pads no header to a fixed size.

    Args:
        path: the file.
        tensors: those with larger elements first, so that each is aligned.
        notes: small things to note in the header; a digest of a file without `checks` is added.

    Raises:
        UserError: the disk is full; the temporary file is deleted.
    """
    arrays = {name: tensor.contiguous().view(torch.uint8).numpy() for name, tensor in tensors.items()}
    if "checks" not in tensors:
        digest = xxhash.xxh3_64()
        for array in arrays.values():
            digest.update(array.data)
        notes = {**notes, "digest": digest.hexdigest()}
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + arrays[name].nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    notes = {**notes, "header": json_checksum([entries, notes])}
    header = json.dumps({"__metadata__": {"crosslens": json.dumps(notes)}, **entries}).encode().ljust(HEADER - 8)
    # with locks, only one process writes this file
    partial = path.with_suffix(".tmp" if fcntl is not None else f".{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "wb", opener=_open_no_link) as file:
            file.write((HEADER - 8).to_bytes(8, "little") + header)
            for array in arrays.values():
                file.write(array.data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"the disk is full: {path} could not be written ({first_line(error)}; {free / 2**20:,.1f} MiB free); what "
            "was harvested is kept: free some space, or give a folder on another disk, and run the same command again"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_shard(path: Path, acts: Float[Tensor, "n D"], rows: Indices, dtype: str, notes: Mapping[str, Any]) -> None:
    """Store activations as `dtype`.

    Args:
        path: the file.
        acts: in reading order.
        rows: the order to store them in.
        dtype: "bfloat16", "float32" or "int8".
        notes: what the file belongs to.
    """
    n, D = acts.shape
    tensors: dict[str, Tensor] = {"checks": torch.empty(-(-n // BLOCK), dtype=torch.int32)}
    if dtype == "int8":
        tensors["scale"] = torch.empty(n, 1)
    tensors["data"] = torch.empty(n, D, dtype=getattr(torch, dtype))
    error = squares = 0.0
    for first in range(0, n, _AT_ONCE):
        here = slice(first, first + _AT_ONCE)
        part = acts[torch.from_numpy(rows[here])]
        stored = encode(part, dtype)
        for name, values in stored.items():
            tensors[name][here] = values
        squares += float(part.square().sum(dtype=torch.float64))
        if dtype != "float32":
            error += float((decode(stored) - part).square_().sum(dtype=torch.float64))
    checks, raw = tensors["checks"].numpy(), _bytes_of({k: v for k, v in tensors.items() if k != "checks"})
    for block in range(len(checks)):
        checks[block] = _check(raw, block)
    write_file(path, tensors, {**notes, "squared_error": error, "squares": squares, "checks": _digest(checks)})


_AT_ONCE = 8192


def encode(acts: Float[Tensor, "n D"], dtype: str) -> dict[str, Tensor]:
    """Activations as a file stores them."""
    if dtype != "int8":
        return {"data": acts.to(getattr(torch, dtype))}
    scale = acts.abs().amax(-1, keepdim=True) / 127
    return {"scale": scale, "data": (acts / torch.where(scale > 0, scale, 1.0)).round_().to(torch.int8)}


def decode(stored: Mapping[str, Tensor]) -> Float[Tensor, "*shape D"]:
    """Float32 activations from what `encode` made of them; those stored in float32 are not copied."""
    data = stored["data"].float()
    return data.mul_(stored["scale"]) if "scale" in stored else data


class DamagedShardError(UserError):
    """A file of a cache that is missing or damaged."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}; run the same harvest again: only that file is redone")
        self.path = path
        self.what = what
