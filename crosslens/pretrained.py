"""Trained crosscoders from a folder or the hub, through SAELens's own loaders."""

from __future__ import annotations

from pathlib import Path

from sae_lens import SAE

from crosslens.crosscoders import ARCHITECTURES, Crosscoder
from crosslens.errors import UserError, first_line


def load(path: str | Path, device: str = "cpu", dtype: str | None = None) -> Crosscoder:
    """A crosscoder that `save` wrote.

    Args:
        path: folder with `cfg.json` and `sae_weights.safetensors`.
        device: where to put it.
        dtype: of the parameters; as saved when None.

    Raises:
        UserError: no crosscoder in this folder, or its files are damaged.
    """
    folder = Path(path)
    if not (folder / "cfg.json").is_file():
        raise UserError(f"{path} holds no crosscoder (no cfg.json); give the folder that `save` wrote")
    try:
        loaded = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{path} is of an architecture that crosslens does not know: {error}; known are {', '.join(ARCHITECTURES)}"
        ) from error
    except Exception as error:
        # safetensors, json and torch each have their own exceptions for damaged files
        raise UserError(f"{path} cannot be loaded ({first_line(error)}); train or download it again") from error
    return _as_crosscoder(loaded, str(path))


def from_pretrained(release: str, sae_id: str, device: str = "cpu", dtype: str = "float32") -> Crosscoder:
    """A crosscoder from the hub, laid out as SAELens has it (`<sae_id>/cfg.json` and the weights).

    Args:
        release: hub repository.
        sae_id: folder inside it.
        device: where to put it.
        dtype: of the parameters.
    """
    return _as_crosscoder(SAE.from_pretrained(release, sae_id, device=device, dtype=dtype), f"{release}/{sae_id}")


def _as_crosscoder(loaded: object, name: str) -> Crosscoder:
    if not isinstance(loaded, Crosscoder):
        raise UserError(f"{name} is a {type(loaded).__name__}, not a crosscoder; load it with sae_lens.SAE")
    return loaded.eval().requires_grad_(False)
