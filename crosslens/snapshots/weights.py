"""Files of weights: their tensors one by one, what type they are stored in, and a checksum of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# masks and tables that follow from the config: older files of a model hold them, newer ones do not
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@functools.cache
def hash_tensors(files: tuple[tuple[Path, int, int], ...]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, by name.

    Args:
        files: path, size and time of change of each file; the latter two let the cache see a change.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        readers: dict[str, Callable[[], Tensor]] = {}
        for path, _, _ in files:
            readers.update(open_weights(path, stack))
        for name in sorted(readers):
            if not name.endswith(_BUFFERS):
                tensor = readers[name]()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_weights(path: Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a file, which stays open and mapped into memory as long as `stack` does."""
    try:
        if path.suffix == ".safetensors":
            file = stack.enter_context(safe_open(path, framework="pt"))
            return {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        # early checkpoints of some families have nothing else; weights_only lets no code in
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: functools.partial(state.get, name) for name in state}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DamagedFileError(path) from error


def stored_dtypes(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[torch.dtype, int]]:
    """Type and size of each floating-point tensor of a file; reads no more of it than it must."""
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
