"""One file of activations: written whole or not at all, checked when it is read, in one of three types.

    float32    as they are
    bfloat16   rounded to 8 bits of mantissa
    int8       (n, T, D) whole numbers in [-127, 127] with one float32 scale per position (n, T, 1): its largest
               absolute value / 127

The metadata of a file holds a checksum of its tensors, and what rounding cost: sum of squared errors, sum of squares.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crosslens.errors import UserError, did_you_mean, first_line

DTYPES = ("bfloat16", "float32", "int8")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_dtype(dtype: str) -> str:
    """The type of a cache, if there is one of this name.

    Raises:
        UserError: there is none.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"dtype={dtype!r} is unknown for a cache; use one of {', '.join(map(repr, DTYPES))}"
            f"{did_you_mean(dtype, DTYPES)}"
        )
    return dtype


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin where the disk cannot hold what is to come.

    Raises:
        UserError: names what is needed and what is free.
    """
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 2**20:,.1f} MiB more and the disk has {free / 2**20:,.1f} MiB free: free some "
            "space, ask for fewer tokens or for dtype='int8', or give a folder on another disk"
        )


def free_bytes(folder: str | Path) -> int:
    """Free space of the disk that a folder lies on, or will lie on."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def describe_rounding(dtype: str, labels: Sequence[str], errors: Sequence[float]) -> str:
    """What storing activations in fewer bits cost, in one line.

    Args:
        dtype: of the cache.
        labels: of the snapshots.
        errors: of each, the share of the squared norm that was rounded away.
    """
    worst = max(range(len(errors)), key=lambda s: errors[s])
    mean = sum(errors) / len(errors)
    return (
        f"{dtype} rounds away {mean:.2e} of the squared norm on average, at most {errors[worst]:.2e} ({labels[worst]})"
    )


def row_bytes(d_model: int, dtype: str) -> int:
    """Bytes of one position of one snapshot."""
    return {"float32": 4 * d_model, "bfloat16": 2 * d_model, "int8": d_model + 4}[dtype]


def write_tensors(path: Path, tensors: dict[str, Tensor], rounding: Rounding | None = None) -> None:
    """Write tensors under a temporary name, and rename.

    Raises:
        UserError: the disk is full; nothing is left behind.
    """
    notes = {"crc32": _checksum(tensors), **({} if rounding is None else rounding._asdict())}
    # one entry, for safetensors writes several in a random order, and equal shards shall be equal files
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
            "was harvested stays: free some space, or give a folder on another disk, and run the same command again"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_shard(path: Path, acts: Float[Tensor, "n T D"], dtype: str) -> Rounding:
    """Store activations as `dtype`, and return what that rounded away."""
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
    """Float32 activations of what a file holds."""
    data = tensors["data"].float()
    return data.mul_(tensors["scale"]) if "scale" in tensors else data


def read_tensors(path: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DamagedShardError: missing, truncated, or not what was written.
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
    """What rounding cost, as the file records it."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = _notes(file)
        return Rounding(notes["squared_error"], notes["squares"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedShardError(path, f"cannot be read ({first_line(error)})") from error


def _notes(file: Any) -> dict[str, Any]:
    """What `write_tensors` noted beside the tensors."""
    return json.loads(file.metadata()["crosslens"])


def is_whole(path: Path) -> bool:
    """Whether a file is there and as long as its header says; its numbers are not looked at."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 2 <= length <= size - 8:
                return False
            header = json.loads(file.read(length))
        return size == 8 + length + max(e["data_offsets"][1] for name, e in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _checksum(tensors: dict[str, Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].contiguous().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


class Rounding(NamedTuple):
    """What storing activations in fewer bits cost; sums over numbers."""

    squared_error: float
    """Sum of squared differences between what is stored and what was harvested."""
    squares: float
    """Sum of the squares of what was harvested."""


class DamagedShardError(UserError):
    """A file of a cache that is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} {what}; run the same harvest again: only that file is made anew")
        self.path = path
        self.what = what
