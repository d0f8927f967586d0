"""A layout in which another project saves crosscoders, and what reading any of them needs.

To add a layout, write a module with a `Layout` and name it in `crosslens.sharing.layouts`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosslens.crosscoders.inspection import MAX_SIZE
from crosslens.errors import UserError, brief, shortened


class Converted(NamedTuple):
    """A crosscoder in the terms of this package."""

    architecture: str
    """Its name, such as "batchtopk_crosscoder"."""
    state: dict[str, Tensor]
    """Parameters and buffers, `activation_scale` among them."""
    metadata: dict[str, Any]
    """What the files say of model, hook point and snapshots."""


class Layout(NamedTuple):
    """How the crosscoders of another project are saved."""

    description: str
    """Its files, for the message that no layout was recognised."""
    files: Callable[[str], tuple[str, str]]
    """Config and weights of the crosscoder at a path in a repository."""
    holds: Callable[[Path], bool]
    """Whether a path is a crosscoder of this layout."""
    read: Callable[[Path], Converted]
    """Read the crosscoder at a path."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a `torch.save` file, memory-mapped and not read yet."""
    try:
        # the older format and compressed entries can claim any size and make torch allocate it
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not a torch.save file of torch 1.6 or later: save or download it again")
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path} is compressed, which torch.save never does: save its tensors again")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, which is unsafe to load: save only its state_dict") from error
    except Exception as error:
        # zipfile, pickle and torch each raise their own exceptions for damaged files
        raise UserError(f"{path} cannot be loaded ({brief(error)}); download it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} is not a state_dict of tensors: save only the state_dict of the crosscoder")
    return {str(name): value for name, value in loaded.items()}


def check_tensors(
    path: Path, loaded: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], whole: Sequence[str] = ("k",)
) -> None:
    """Refuse other names or shapes than expected, tensors without data, and numbers that are whole but in `whole`."""
    for name in sorted({*shapes, *loaded}):
        if name not in loaded:
            raise UserError(f"{path} lacks {name}: is it in another layout?")
        if name not in shapes:
            raise UserError(f"{path} has an unknown tensor {shortened(name)!r}: is it in another layout?")
        tensor = loaded[name]
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, the config says {shapes[name]}")
        # strides of zero make a large tensor out of one stored number
        if tensor.is_sparse or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} is larger than its stored data: save it again")
        if name not in whole and not tensor.is_floating_point():
            raise UserError(f"{path}: {name} has dtype {tensor.dtype}, but must be floating point")


def size(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise UserError(f"{path}: {key}={shortened(repr(value))} is not a whole number from 1 to {MAX_SIZE:,}")
    return value


def text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    return value if isinstance(value, str) else None


def step_of(label: str) -> int | None:
    match = re.search(r"step_?(\d{1,12})", label)
    return int(match[1]) if match else None
