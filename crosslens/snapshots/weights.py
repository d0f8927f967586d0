"""Files of weights: their tensors one by one, their dtypes, and a checksum."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from crosslens.errors import check_regular

# masks and tables that follow from the config: older files contain them, newer ones do not
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@functools.cache
def hash_tensors(files: tuple[tuple[Path, int, int], ...]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, sorted by name.

    Args:
        files: path, size and modification time of each file; size and time make a changed file a new cache key.
    """
    with contextlib.ExitStack() as stack:
        readers: dict[str, Callable[[], Tensor]] = {}
        for path, _, _ in files:
            readers.update(open_weights(path, stack))
        return hash_named(readers)


def hash_named(readers: Mapping[str, Callable[[], Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of the tensors that functions read, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(readers):
        if not name.endswith(_BUFFERS):
            tensor = readers[name]()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_weights(path: Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a file, which stays open and memory-mapped until `stack` closes."""
    check_regular(path, "file of weights")
    try:
        if path.suffix == ".safetensors":
            file = stack.enter_context(safe_open(path, framework="pt"))
            return {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        # early snapshots of some families have no other format; weights_only executes no code
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: functools.partial(state.get, name) for name in state}
    except Exception as error:  # zipfile, pickle, torch and safetensors each raise their own for damaged files
        raise DamagedFileError(path) from error


def stored_dtypes(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[torch.dtype, int]]:
    """Dtype and size of each floating-point tensor of a file; the values are not read."""
    for name, read in open_weights(path, stack).items():
        if not name.endswith(_BUFFERS):
            tensor = read()
            if tensor.is_floating_point():
                yield tensor.dtype, tensor.numel()


class DamagedFileError(Exception):
    """A file of weights that cannot be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path
