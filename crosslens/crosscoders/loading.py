"""Load a saved crosscoder.

`sae_lens.SAE.load_from_disk` reads the same files; here they are validated first (`crosslens.crosscoders.inspection`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from sae_lens import SAE

from crosslens.crosscoders.base import Crosscoder
from crosslens.crosscoders.checksums import CONFIG, check_files
from crosslens.crosscoders.inspection import DTYPES, check_scale, inspect_crosscoder
from crosslens.distributed.devices import find_device
from crosslens.errors import UserError, brief


def load(path: str | Path, device: str | None = None, dtype: str | None = None, *, verify: bool = True) -> Crosscoder:
    """Load a crosscoder that `save` wrote.

    Args:
        path: folder with `cfg.json` and `sae_weights.safetensors`.
        device: torch device; None: CUDA if available.
        dtype: dtype of the parameters; None: as saved.
        verify: compare the files with their checksums, where they have them.

    Raises:
        UserError: the folder holds no crosscoder, or its files are damaged or inconsistent.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{path} holds no crosscoder (no {CONFIG}); give the folder that `save` wrote")
    if dtype is not None:
        as_dtype(dtype)
    config = inspect_crosscoder(folder)
    if verify:
        check_files(folder, config)
    try:
        loaded = SAE.load_from_disk(folder, device=device or find_device(), dtype=dtype)
    except UserError:
        raise
    except Exception as error:
        # safetensors, json and torch raise different exceptions for damaged files
        raise UserError(f"{path} cannot be loaded ({brief(error)}); train or download it again") from error
    assert isinstance(loaded, Crosscoder)  # its architecture was inspected
    check_scale(str(path), loaded.activation_scale)
    if config.get("metadata", {}).get("checksums") is None:  # what crosslens saves was finite
        for name, values in loaded.state_dict().items():  # thresholds are buffers
            if not torch.isfinite(values).all():
                raise UserError(f"{path}: {name} has values that are not finite; train or download it again")
    return loaded.eval().requires_grad_(False)


def as_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"dtype={name!r} is unknown: use one of {', '.join(DTYPES)}")
    return getattr(torch, name)
