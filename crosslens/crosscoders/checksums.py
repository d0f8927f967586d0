"""Checksums of a crosscoder's tensors and of its config: what is loaded is what was saved.

They are kept in `cfg.json`, under `metadata.checksums`: a name and the XXH3 of its bytes for every tensor, and
`cfg.json` itself, as JSON without this entry. SAELens ignores them; files without them load unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from crosslens.errors import UserError, json_checksum

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
KEY = "checksums"
_BLOCK = 1 << 26  # bytes of a tensor on another device that are copied at a time


def tensor_checksum(blocks: Iterable[Tensor]) -> str:
    """The checksum of a tensor from the blocks of its elements in row-major order."""
    digest = xxhash.xxh3_64()
    for block in blocks:
        flat = block.detach().reshape(-1)
        for part in flat.split(max(1, _BLOCK // flat.element_size())):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def config_checksum(config: Mapping[str, Any]) -> str:
    """The checksum of a config as it is read back from JSON, without the checksums in it."""
    contents = json.loads(json.dumps(config))
    contents.get("metadata", {}).pop(KEY, None)
    return json_checksum(contents)


def with_checksum(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose own checksum is right, if it has checksums; for a config that is changed before it is written."""
    metadata = dict(config.get("metadata", {}))
    if KEY not in metadata:
        return dict(config)
    metadata[KEY] = {**metadata[KEY], CONFIG: config_checksum(config)}
    return {**config, "metadata": metadata}


def check_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare the files of a crosscoder with the checksums in its config, if it has any.

    Args:
        folder: folder of the crosscoder, whose tensors have been found to fit the config.
        config: the contents of its `cfg.json`.

    Raises:
        UserError: a file is not what was saved; names the file and the tensor.
    """
    expected = config.get("metadata", {}).get(KEY)
    if expected is None and not _has_lost_checksums(config):
        return
    if not isinstance(expected, dict) or expected.get(CONFIG) != config_checksum(config):
        raise UserError(
            f"{folder / CONFIG} is damaged, or was changed after it was saved: restore it, train or download it again; "
            "or, if the change was meant, load it with verify=False and save it"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if tensor_checksum([file.get_tensor(name)]) != expected.get(name):
                raise UserError(
                    f"{folder / WEIGHTS} is damaged, or belongs to another crosscoder: the checksum of {name} is not "
                    f"that in {CONFIG}; restore it, train or download it again"
                )


def _has_lost_checksums(config: Mapping[str, Any]) -> bool:
    """Whether checksums are where none belong: what is around them was damaged, such as the word "metadata"."""
    others = [part for name, part in config.items() if name != "metadata"]
    return any(isinstance(part, dict) and KEY in part for part in (config, *others))
