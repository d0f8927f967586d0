"""Activations on disk: one file per (shard of sequences, snapshot), so one snapshot at a time is in memory.

    manifest.json                  what the cache holds; a request that does not match is rejected
    tokens-00000.safetensors       int32 tokens of a shard (n, T)
    acts-00000-s03.safetensors     activations of the shard at one snapshot (n, T, D), with their checksum
    harvest.lock                   while the cache is being filled: which process works on what

1. The manifest and the tokens are written first. A folder whose manifest does not match the request is refused.
2. Every process that fills the cache locks one missing (shard, snapshot) at a time, harvests and writes it. The system
   drops the locks of a process that dies. Two processes that harvest the same pair write identical files.
3. A file is written under a temporary name and renamed, so a file that exists is complete.
4. Activations are stored as float32, as bfloat16, or as int8: whole numbers in [-127, 127] with one float32 scale per
   position (n, T, 1), its largest absolute value / 127. The metadata of a file holds a checksum of its tensors, the sum
   of squared rounding errors and the sum of squares.
5. The checksum is compared when a file is first read; a damaged file is harvested again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crosslens.errors import UserError, did_you_mean, first_line, shortened

try:
    import fcntl
except ImportError:  # Windows: processes may do the same work twice, which is harmless
    fcntl = None

FORMAT = 1


class ActivationCache:
    """A folder of shards; `missing` lists what is still to be harvested.

    Args:
        folder: created if needed.
        tokens: (N, T) sequences, in reading order.
        shard_sequences: sequences per shard.
        n_snapshots: S.
        d_model: D.
        dtype: "bfloat16", "float32" or "int8".
        fingerprint: everything else that decides the activations; compared with an existing manifest.

    Raises:
        UserError: unknown dtype, or the folder holds a cache for a different request.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Tensor,
        shard_sequences: int,
        n_snapshots: int,
        d_model: int,
        dtype: str,
        fingerprint: dict[str, Any],
    ) -> None:
        check_dtype(dtype)
        self.folder, self.tokens, self.size = folder, tokens, shard_sequences
        self.n_snapshots, self.d_model, self.dtype = n_snapshots, d_model, dtype
        self.n_shards = -(-len(tokens) // shard_sequences)
        self._verified: set[Path] = set()
        self._broken: set[Path] = set()
        self._claim(
            {
                "format": FORMAT,
                **fingerprint,
                "dtype": dtype,
                "shard_sequences": shard_sequences,
                "n_sequences": len(tokens),
                "tokens": hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest(),
            }
        )

    def _claim(self, request: dict[str, Any]) -> None:
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            self._compare(manifest, request)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locks() as locks:
            locks.wait(0)
            if manifest.exists():  # another process was faster
                self._compare(manifest, request)
                return
            _remove(self.folder.glob("*.tmp"))
            for shard in range(self.n_shards):
                first, last = self.span(shard)
                write_tensors(self._tokens_path(shard), {"data": self.tokens[first:last].contiguous()})
            partial = manifest.with_name(f"manifest.{uuid.uuid4().hex}.tmp")
            partial.write_text(json.dumps(request, indent=1))
            os.replace(partial, manifest)

    def _compare(self, manifest: Path, request: dict[str, Any]) -> None:
        try:
            found: dict[str, Any] = dict(json.loads(manifest.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{manifest} is damaged ({error}); delete the folder {self.folder} and harvest again"
            ) from error
        for key, value in request.items():
            if found.get(key) != value:
                raise UserError(
                    f"{self.folder} is a cache for a different request: it has {key}={shortened(found.get(key))}, this "
                    f"request has {key}={shortened(value)}; choose another folder, or delete this one"
                )

    # ------------------------------------------------------------------ what is there
    def span(self, shard: int) -> tuple[int, int]:
        """First and last (exclusive) sequence of a shard."""
        return shard * self.size, min((shard + 1) * self.size, len(self.tokens))

    def path(self, shard: int, snapshot: int) -> Path:
        """File of one shard at one snapshot."""
        return self.folder / f"acts-{shard:05d}-s{snapshot:02d}.safetensors"

    def _tokens_path(self, shard: int) -> Path:
        return self.folder / f"tokens-{shard:05d}.safetensors"

    def missing(self, *, verify: bool = False) -> list[tuple[int, int]]:
        """(shard, snapshot) pairs without a complete file, snapshot by snapshot.

        Args:
            verify: also compare all checksums, which reads the whole cache.
        """
        pairs = ((shard, s) for s in range(self.n_snapshots) for shard in range(self.n_shards))
        return [pair for pair in pairs if not self._is_good(self.path(*pair), verify)]

    def _is_good(self, path: Path, verify: bool) -> bool:
        if not verify or path in self._verified:
            return is_whole(path)
        try:
            read_tensors(path)
        except DamagedShardError:
            self._broken.add(path)
            return False
        self._verified.add(path)
        return True

    def needed_bytes(self, pairs: list[tuple[int, int]]) -> int:
        """Disk space that these pairs will take, in bytes."""
        sequences = sum(last - first for first, last in (self.span(shard) for shard, _ in pairs))
        return sequences * self.tokens.shape[1] * row_bytes(self.d_model, self.dtype) + 512 * len(pairs)

    def rounding_errors(self) -> list[float]:
        """Fraction of each snapshot's squared norm that is lost by rounding."""
        found: list[float] = []
        for s in range(self.n_snapshots):
            parts = [read_rounding(self.path(shard, s)) for shard in range(self.n_shards)]
            total = Rounding(sum(part.squared_error for part in parts), sum(part.squares for part in parts))
            found.append(total.squared_error / total.squares if total.squares else 0.0)
        return found

    # ------------------------------------------------------------------ writing
    @contextmanager
    def harvesting(
        self, pairs: list[tuple[int, int]], first: int = 0
    ) -> Generator[Iterator[tuple[int, int]], None, None]:
        """Pairs for this process to harvest, each locked while it works on it; pairs locked by others come last.

        Args:
            pairs: what is missing.
            first: index in `pairs` to begin at, so that several processes begin at different snapshots.
        """
        with self._locks() as locks, closing(self._turns(pairs[first:] + pairs[:first], locks)) as turns:
            yield turns
        if fcntl is not None and not self.missing():
            (self.folder / "harvest.lock").unlink(missing_ok=True)

    def _turns(self, pairs: list[tuple[int, int]], locks: _Locks) -> Generator[tuple[int, int], None, None]:
        busy: list[tuple[int, int]] = []
        for pair in pairs:
            if locks.take(self._number(pair)):
                yield from self._turn(pair, locks)
            else:
                busy.append(pair)
        for pair in busy:  # another process is harvesting it, and may die
            locks.wait(self._number(pair))
            yield from self._turn(pair, locks)

    def _turn(self, pair: tuple[int, int], locks: _Locks) -> Iterator[tuple[int, int]]:
        path = self.path(*pair)
        try:
            if not is_whole(path) or path in self._broken:
                _remove(self.folder.glob(f"{path.stem}.*.tmp"))
                yield pair
        finally:
            locks.release(self._number(pair))

    def _number(self, pair: tuple[int, int]) -> int:
        return 1 + pair[1] * self.n_shards + pair[0]

    def write(self, shard: int, snapshot: int, acts: Float[Tensor, "n T D"]) -> None:
        """Store one shard of one snapshot.

        Raises:
            UserError: the disk is full.
        """
        path = self.path(shard, snapshot)
        write_shard(path, acts, self.dtype)
        self._verified.discard(path)
        self._broken.discard(path)

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
        out = torch.empty(last - first, self.tokens.shape[1], self.n_snapshots, self.d_model)
        for shard in range(first // self.size, -(-last // self.size)):
            begin, end = self.span(shard)
            low, high = max(first, begin), min(last, end)
            for s in range(self.n_snapshots):
                here = out[low - first : high - first, :, s]
                try:
                    here.copy_(self._load(shard, s, low - begin, high - begin))
                except DamagedShardError as error:
                    if repair is None:
                        raise
                    self._broken.add(error.path)
                    repair(shard, s, error)
                    here.copy_(self._load(shard, s, low - begin, high - begin))
        return out

    def _load(self, shard: int, snapshot: int, low: int, high: int) -> Tensor:
        path = self.path(shard, snapshot)
        tensors = read_tensors(path, verify=path not in self._verified)
        self._verified.add(path)
        return decode({name: tensor[low:high] for name, tensor in tensors.items()})

    @contextmanager
    def _locks(self) -> Generator[_Locks, None, None]:
        with open(self.folder / "harvest.lock", "wb") as file:
            yield _Locks(file.fileno())


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


DTYPES = ("bfloat16", "float32", "int8")

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


def write_tensors(path: Path, tensors: dict[str, Tensor], rounding: Rounding | None = None) -> None:
    """Write tensors under a temporary name, then rename.

    Raises:
        UserError: the disk is full; the temporary file is deleted.
    """
    notes = {"crc32": _checksum(tensors), **({} if rounding is None else rounding._asdict())}
    # a single entry: safetensors writes several in random order, and equal shards must be equal files
    metadata = {"crosslens": json.dumps(notes)}
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(save(tensors, metadata))
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


def write_shard(path: Path, acts: Float[Tensor, "n T D"], dtype: str) -> Rounding:
    """Store activations as `dtype`, and return the rounding error."""
    if dtype == "int8":
        scale = acts.abs().amax(-1, keepdim=True) / 127
        data = (acts / torch.where(scale > 0, scale, 1.0)).round_().to(torch.int8)
        tensors = {"data": data, "scale": scale.contiguous()}
    else:
        tensors = {"data": acts.to(getattr(torch, dtype)).contiguous()}
    error = 0.0 if dtype == "float32" else float((decode(tensors) - acts).square_().sum(dtype=torch.float64))
    rounding = Rounding(error, float(acts.square().sum(dtype=torch.float64)))
    write_tensors(path, tensors, rounding)
    return rounding


def decode(tensors: dict[str, Tensor]) -> Float[Tensor, "n T D"]:
    """Float32 activations from the tensors of a file."""
    data = tensors["data"].float()
    return data.mul_(tensors["scale"]) if "scale" in tensors else data


def read_tensors(path: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DamagedShardError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if verify and _notes(file)["crc32"] != _checksum(tensors):
                raise DamagedShardError(path, "does not match its checksum")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, DamagedShardError):
            raise
        raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error
    return tensors


def read_rounding(path: Path) -> Rounding:
    """The rounding error that a file records."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = _notes(file)
        return Rounding(notes["squared_error"], notes["squares"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error


def _notes(file: Any) -> dict[str, Any]:
    """The metadata that `write_tensors` stored."""
    return json.loads(file.metadata()["crosslens"])


def is_whole(path: Path) -> bool:
    """Whether a file exists and is as long as its header says; its values are not checked."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


class Rounding(NamedTuple):
    """The error of storing activations in fewer bits."""

    squared_error: float
    """Sum of squared differences between stored and harvested values."""
    squares: float
    """Sum of squares of the harvested values."""


class DamagedShardError(UserError):
    """A file of a cache that is missing or damaged."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}; run the same harvest again: only that file is redone")
        self.path = path
        self.what = what
