"""A shard of activations in a file of safetensors' format, of which any rows can be read and checked.

    header    `HEADER` bytes: tensors, and in `__metadata__` notes as JSON, with a checksum of both
    checks    a checksum of every `BLOCK` rows
    scale     int8 only: one float32 per row, its largest absolute value / 127
    data      (n, D) float32, bfloat16, or int8: whole numbers in [-127, 127]

1. `write_shard` rounds the rows and notes the sum of squared rounding errors and the sum of squares.
2. A file is written under a temporary name and renamed, and its size is known, so a file of that size is complete.
3. `ShardFile.gather` reads rows in runs, and compares a checksum when a row of its block is first read. Files are read,
   not mapped into memory as safetensors does: mapped pages would count as memory of the process, and a file cut short
   would end it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import safetensors.torch
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from crosslens.activations.order import RUN, Indices
from crosslens.errors import UserError, brief, did_you_mean, first_line, json_checksum

DTYPES = ("bfloat16", "float32", "int8")
BLOCK = RUN
"""Rows of a checksum: what is read at once where rows are permuted in runs."""
HEADER = 4096
"""Bytes of a file's header: the data begin at a page."""

Stored: TypeAlias = dict[str, Tensor]
"""Rows as a file has them: `data` (..., D), and for int8 `scale` (..., 1)."""
Run: TypeAlias = tuple[int, int]
"""Consecutive rows: the first, and how many."""

_AT_ONCE = 8192
_TYPES = {torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DamagedShardError(UserError):
    """A file of a cache that is missing or damaged."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}; run the same harvest again: only that file is redone")
        self.path = path
        self.what = what


# ---------------------------------------------------------------------- types and sizes
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


def row_bytes(d_model: int, dtype: str) -> int:
    """Bytes per position and snapshot."""
    return {"float32": 4 * d_model, "bfloat16": 2 * d_model, "int8": d_model + 4}[dtype]


def file_bytes(n_rows: int, d_model: int, dtype: str) -> int:
    """Bytes of a file."""
    return HEADER + n_rows * row_bytes(d_model, dtype) + 4 * -(-n_rows // BLOCK)


def stored_types(d_model: int, dtype: str) -> dict[str, tuple[int, torch.dtype]]:
    """Width and type of a row's tensors, in their order in a file: those with larger elements first."""
    data = {"data": (d_model, getattr(torch, dtype))}
    return {"scale": (1, torch.float32), **data} if dtype == "int8" else data


def encode(acts: Float[Tensor, "n D"], dtype: str) -> Stored:
    """Activations as a file stores them."""
    if dtype != "int8":
        return {"data": acts.to(getattr(torch, dtype))}
    scale = acts.abs().amax(-1, keepdim=True) / 127
    return {"scale": scale, "data": (acts / torch.where(scale > 0, scale, 1.0)).round_().to(torch.int8)}


def decode(stored: Mapping[str, Tensor]) -> Float[Tensor, "*shape D"]:
    """Float32 activations from what `encode` made of them; those stored in float32 are not copied."""
    data = stored["data"].float()
    return data.mul_(stored["scale"]) if "scale" in stored else data


# ---------------------------------------------------------------------- writing
def write_shard(path: Path, acts: Float[Tensor, "n D"], rows: Indices, dtype: str, notes: Mapping[str, Any]) -> None:
    """Store activations as `dtype`.

    Args:
        path: the file.
        acts: in reading order.
        rows: the order to store them in.
        dtype: "bfloat16", "float32" or "int8".
        notes: what the file belongs to.

    Raises:
        UserError: the disk is full.
    """
    n, D = acts.shape
    stored = {name: torch.empty(n, width, dtype=kind) for name, (width, kind) in stored_types(D, dtype).items()}
    error = squares = 0.0
    for first in range(0, n, _AT_ONCE):
        here = slice(first, first + _AT_ONCE)
        part = acts[torch.from_numpy(rows[here])]
        encoded = encode(part, dtype)
        for name, values in encoded.items():
            stored[name][here] = values
        squares += float(part.square().sum(dtype=torch.float64))
        if dtype != "float32":
            error += float((decode(encoded) - part).square_().sum(dtype=torch.float64))
    raw = _bytes_of(stored)
    checks = np.array([_check(raw, block) for block in range(-(-n // BLOCK))], dtype=np.int32)
    notes = {**notes, "squared_error": error, "squares": squares, "checks": digest(checks)}
    write_file(path, {"checks": torch.from_numpy(checks), **stored}, notes)


def write_tokens(
    path: Path, tokens: Int[Tensor, "n T"], rows: Indices, chosen: Bool[Tensor, "n T"] | None = None
) -> None:
    """Store the tokens of a shard, the order of its rows, and which positions are of chosen roles, if any are."""
    tensors = {"tokens": tokens.to(torch.int32), "rows": torch.from_numpy(rows).to(torch.int32)}
    if chosen is not None:
        tensors["chosen"] = chosen.to(torch.int8)
    write_file(path, tensors, {"digest": digest(*(tensor.numpy() for tensor in tensors.values()))})


def write_file(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write tensors in safetensors' format under a temporary name, then rename; one process at a time.

    safetensors' own writer copies every tensor twice, and pads no header to a fixed size.

    Args:
        path: the file.
        tensors: those with larger elements first, so that each is aligned.
        notes: small things to note in the header.

    Raises:
        UserError: the disk is full; the temporary file is deleted.
    """
    arrays = [tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors.values()]
    entries = _entries({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    notes = {**notes, "header": json_checksum([entries, notes])}
    header = json.dumps({"__metadata__": {"crosslens": json.dumps(notes)}, **entries}).encode().ljust(HEADER - 8)
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb", opener=_open_no_link) as file:
            file.write((HEADER - 8).to_bytes(8, "little") + header)
            for array in arrays:
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


def _open_no_link(path: str, flags: int) -> int:
    """An opener for files that are written, which fails if the file is a link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _entries(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> dict[str, Any]:
    """The header's entries of tensors that follow one another."""
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        first, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    return entries


# ---------------------------------------------------------------------- reading
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


def read_tokens(
    path: Path, shape: tuple[int, int] | None = None
) -> tuple[Int[Tensor, "n T"], Indices, Bool[Tensor, "n T"] | None]:
    """What `write_tokens` stored.

    Raises:
        DamagedShardError: the file is missing, damaged, or of another shape.
    """
    _, notes = read_header(path)
    try:
        raw = path.read_bytes()
        tensors = safetensors.torch.load(raw)
        tokens, rows, chosen = tensors["tokens"], tensors["rows"].long().numpy(), tensors.get("chosen")
    except (OSError, KeyError, SafetensorError) as error:
        raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error
    if notes.get("digest") != xxhash.xxh3_64_hexdigest(memoryview(raw)[HEADER:]) or tokens.shape != (
        shape or tokens.shape
    ):
        raise DamagedShardError(path, "does not match its checksum")
    return tokens, rows, None if chosen is None else chosen.bool()


class ShardFile:
    """A file of activations that is open only while it is read.

    Args:
        path: the file.
        n_rows: how many rows it must have.
        d_model: D.
        dtype: "bfloat16", "float32" or "int8".

    Attributes:
        notes: what `write_shard` was given to note, the squared error and the sum of squares.

    Raises:
        DamagedShardError: it is missing, damaged, or has other tensors.
    """

    def __init__(self, path: Path, n_rows: int, d_model: int, dtype: str) -> None:
        self.path, self.n_rows = path, n_rows
        n_blocks = -(-n_rows // BLOCK)
        types = stored_types(d_model, dtype)
        shapes = {"checks": (torch.int32, (n_blocks,))}
        shapes |= {name: (kind, (n_rows, width)) for name, (width, kind) in types.items()}
        expected, (entries, self.notes) = _entries(shapes), read_header(path)
        if entries != expected:
            raise DamagedShardError(path, f"does not have {n_rows:,} rows of {d_model} numbers in {dtype}")
        try:
            checks = np.fromfile(path, dtype=np.int32, count=n_blocks, offset=HEADER)
        except OSError as error:
            raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error
        if self.notes.get("checks") != digest(checks):
            raise DamagedShardError(path, "does not match its checksum")
        self.size = file_bytes(n_rows, d_model, dtype)
        self.parts = {name: _Part(HEADER + expected[name]["data_offsets"][0], *types[name]) for name in types}
        self.checks = checks
        self.verified = np.zeros(n_blocks, dtype=bool)
        self.n_unknown = n_blocks

    def verify(self) -> None:
        """Compare the checksums that were not compared before."""
        for first in range(0, self.n_rows, _AT_ONCE):
            self.gather(Rows(np.arange(first, min(first + _AT_ONCE, self.n_rows))))

    def gather(self, rows: Rows) -> Stored:
        """Some rows of every tensor, in the memory of `rows`.

        Raises:
            DamagedShardError: a checksum differs, or the file cannot be read.
        """
        known = not self.n_unknown or bool(self.verified[rows.blocks].all())
        wanted = rows if known else rows.whole_blocks(self.n_rows)
        try:
            with open(self.path, "rb", buffering=0) as file:
                if (size := os.fstat(file.fileno()).st_size) != self.size:  # it may have been cut short since
                    raise DamagedShardError(self.path, f"has {size:,} bytes, not {self.size:,}")
                found = {name: part.read(file, wanted, name) for name, part in self.parts.items()}
        except OSError as error:
            raise DamagedShardError(self.path, f"cannot be read ({first_line(error)})") from error
        if known:
            return found
        self._verify(rows.blocks, found)
        out = {name: rows.memory(name, part)[0] for name, part in self.parts.items()}
        return {name: torch.index_select(found[name], 0, rows.places, out=out[name]) for name in out}

    def _verify(self, blocks: Indices, found: Stored) -> None:
        """Compare the checksums of these blocks, all of which were read."""
        raw = _bytes_of(found)
        for i, block in enumerate(blocks.tolist()):
            if not self.verified[block]:
                if _check(raw, i) != self.checks[block]:
                    raise DamagedShardError(self.path, "does not match its checksum")
                self.verified[block] = True
                self.n_unknown -= 1


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
            tensor = torch.empty(len(self.rows), part.width, dtype=part.dtype)
            self._memory[name] = tensor, tensor.view(torch.uint8).numpy().reshape(-1).data
        return self._memory[name]


class _Part(NamedTuple):
    """A tensor in a file: its first byte, and the width and type of a row."""

    first: int
    width: int
    dtype: torch.dtype

    def read(self, file: FileIO, rows: Rows, name: str) -> Tensor:
        """Some of its rows, in their memory."""
        out, raw = rows.memory(name, self)
        size, at = self.width * self.dtype.itemsize, 0
        for first, n in rows.runs:
            end = at + n * size
            _read(file, raw[at:end], self.first + first * size)
            at = end
        return out


def _read(file: FileIO, into: memoryview, at: int) -> None:
    """Read bytes from a place in a file. A read may be cut short at 2 GiB, or by a signal.

    Raises:
        OSError: the file ends before.
    """
    file.seek(at)
    while len(into):
        n = file.readinto(into)
        if not n:
            raise OSError("the file ends early")
        into = into[n:]


def runs_of(rows: Indices) -> list[Run]:
    """Row numbers as runs of consecutive ones: the first of each, and how many."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
    return list(zip(rows[starts].tolist(), np.diff(starts, append=len(rows)).tolist(), strict=True))


# ---------------------------------------------------------------------- checksums
def _bytes_of(rows: Mapping[str, Tensor]) -> list[tuple[memoryview, int]]:
    """The bytes of each tensor, by name, and how many of them are a block."""
    ordered = [rows[name] for name in sorted(rows)]
    return [(x.view(torch.uint8).numpy().reshape(-1).data, BLOCK * x.dtype.itemsize * x.shape[1]) for x in ordered]


def _check(raw: Iterable[tuple[memoryview, int]], i: int) -> int:
    """The checksum of the i-th block of rows, over all tensors."""
    found = 0
    for data, size in raw:  # only the last block of a file may have fewer rows
        found = xxhash.xxh3_64_intdigest(data[i * size : (i + 1) * size], found)
    return (found & (2**32 - 1)) - 2**31


def digest(*arrays: NDArray[Any]) -> str:
    """The XXH3 of arrays, one after the other."""
    found = xxhash.xxh3_64()
    for array in arrays:
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
