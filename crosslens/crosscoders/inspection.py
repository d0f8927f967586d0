"""Validate the files of a crosscoder before loading it.

1. Read the config (`cfg.json`) and check the type and range of every value that is used.
2. Compute the shapes that it implies, on the meta device.
3. Compare them with the header of the safetensors file.

Only then is memory allocated, no more than the file is long. No code from a file is ever run: no pickle, and no class
names other than the registered architectures.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError, safe_open

from crosslens.crosscoders.checksums import CONFIG, WEIGHTS
from crosslens.crosscoders.metadata import Metadata, SnapshotEntry, fits, in_words
from crosslens.crosscoders.registration import ARCHITECTURES
from crosslens.errors import UserError, brief, check_regular, did_you_mean, read_json, shortened

MAX_HEADER = 2**20
MAX_SIZE = 2**31 - 1
_FLOATS = ("F16", "BF16", "F32", "F64")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a safetensors file, without reading the data.

    Raises:
        UserError: the file is missing or damaged.
    """
    check_regular(path, "file of weights")
    try:
        with path.open("rb") as file:
            first = file.read(8)
        if len(first) == 8 and struct.unpack("<Q", first)[0] > MAX_HEADER:
            raise UserError(f"{path} cannot be loaded: its header is longer than {MAX_HEADER:,} bytes")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be loaded ({brief(error)}); train or download it again") from error


def inspect_crosscoder(folder: Path) -> dict[str, Any]:
    """The config of the crosscoder in a folder, after checking it and the weights.

    Raises:
        UserError: no crosscoder, an unknown architecture, values of a wrong type or size, or weights with other names,
            shapes or dtypes.
    """
    config = inspect_config(folder / CONFIG)
    check_header(folder / WEIGHTS, expected_shapes(folder / CONFIG, config))
    return config


def inspect_config(path: Path) -> dict[str, Any]:
    """The config of a crosscoder, with values of the right types.

    Raises:
        UserError: as in `inspect_crosscoder`.
    """
    config = read_json(path, "config of a crosscoder")
    architecture = config.get("architecture")
    if architecture not in tuple(ARCHITECTURES):
        known = SAE_CLASS_REGISTRY.get(architecture) if isinstance(architecture, str) else None
        if known is not None:
            raise UserError(f"{path.parent} is a {known[0].__name__}, not a crosscoder; load it with sae_lens.SAE")
        raise UserError(
            f"{path.parent} has an unknown architecture: {shortened(repr(architecture))}; "
            f"known are {', '.join(ARCHITECTURES)}{did_you_mean(architecture, ARCHITECTURES)}"
        )
    for name in ("d_in", "d_sae", "n_snapshots"):
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise UserError(f"{path}: {name}={shortened(repr(value))} is not an integer from 1 to {MAX_SIZE:,}")
    if config.get("dtype", "float32") not in DTYPES:
        raise UserError(f"{path}: dtype={shortened(repr(config['dtype']))} is not one of {', '.join(DTYPES)}")
    k = config.get("k", 1)
    if type(k) not in (int, float) or not 0 < k <= config["d_sae"]:
        raise UserError(f"{path}: k={shortened(repr(k))} is not a number from 1 to d_sae={config['d_sae']}")
    config_class = ARCHITECTURES[architecture][1]
    known = {field.name for field in fields(config_class)} | {"architecture", "training"}
    if unknown := sorted(config.keys() - known - {"sae_lens_version"}):
        raise UserError(
            f"{path} has an unknown entry {shortened(repr(unknown[0]))}; it was written by another program or a newer "
            "version: remove the entry, or update crosslens"
        )
    _check_types(path, config, config_class)
    _check_metadata(path, config.get("metadata", {}), config["n_snapshots"])
    return config


def expected_shapes(path: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a crosscoder with this config, without allocating memory."""
    # torch fails on a matrix of more than 2^63 bytes, even on the meta device
    if config["d_in"] * config["d_sae"] > 2**40:
        raise UserError(f"{path}: d_in={config['d_in']:,} by d_sae={config['d_sae']:,} is larger than any file")
    sae_class, config_class = ARCHITECTURES[config["architecture"]]
    try:
        cfg = config_class.from_dict({**config, "device": "meta", "dtype": "float32"})
        cfg.device = "meta"
        state = sae_class(cfg).state_dict()
    except UserError as error:
        raise UserError(f"{path}: {brief(error)}") from error
    except Exception as error:
        # values of a wrong type can raise anything
        raise UserError(f"{path} is not a config of a crosscoder ({brief(error)}); download it again") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_header(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a safetensors file with other names, shapes or dtypes than expected.

    Raises:
        UserError: names the first difference.
    """
    found = read_header(path)
    for name in sorted({*expected, *found}):
        if name not in found:
            raise UserError(f"{path} cannot be loaded: {shortened(name)} is missing; download it again")
        if name not in expected:
            raise UserError(f"{path} cannot be loaded: {shortened(repr(name))} is not a tensor of this architecture")
        dtype, shape = found[name]
        if shape != expected[name]:
            raise UserError(f"{path} cannot be loaded: {name} has shape {shape}, the config says {expected[name]}")
        if dtype not in _FLOATS:
            raise UserError(f"{path} cannot be loaded: {name} has dtype {dtype}, allowed are {', '.join(_FLOATS)}")


def _check_types(path: Path, values: dict[str, Any], declared: type, where: str = "") -> None:
    """Refuse a value of another type than a class declares for the field of its name."""
    for name, kind in get_type_hints(declared).items():
        if name in values and not fits(values[name], kind):
            raise UserError(
                f"{path}: {where}{name}={shortened(repr(values[name]))} is not of type {in_words(kind)}; download it "
                "again"
            )


def _check_metadata(path: Path, metadata: Any, n_snapshots: int) -> None:
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: metadata is a {type(metadata).__name__}, not an object")
    for name in metadata:
        # they become attributes of an object and must not replace its methods
        if name.startswith("_") or hasattr(SAEMetadata, name):
            raise UserError(f"{path}: metadata has a key {shortened(repr(name))}, which is reserved: rename it")
    release = metadata.get("sae_lens_version", "6")
    major = re.match(r"([0-9]{1,9})(\.|$)", release) if isinstance(release, str) else None
    if major is None or int(major[1]) < 6:
        raise UserError(f"{path}: sae_lens_version={shortened(repr(release))} is not a release from 6 on")
    recorded = metadata.get("snapshots")
    if recorded and not (isinstance(recorded, list) and len(recorded) == n_snapshots):
        raise UserError(f"{path}: metadata.snapshots does not list the {n_snapshots} snapshots; download it again")
    for row in recorded or []:
        if not fits(row, SnapshotEntry):
            raise UserError(
                f"{path}: {shortened(row)} in metadata.snapshots is not a snapshot: give a label (string), and "
                "optionally step and tokens (integers)"
            )
    _check_types(path, metadata, Metadata, "metadata.")
    scale = metadata.get("activation_scale")
    if scale is not None and not (len(scale) == n_snapshots and all(map(_is_scale, scale))):
        raise UserError(
            f"{path}: metadata.activation_scale={shortened(scale)} is not a list of {n_snapshots} positive numbers"
        )


def check_scale(where: str, scale: torch.Tensor) -> None:
    """Refuse scales that are not positive and finite.

    Raises:
        UserError: names the first such scale.
    """
    for s, value in enumerate(scale.tolist()):
        if not _is_scale(value):
            raise UserError(f"{where}: activation_scale of snapshot {s} is {value}, which must be positive and finite")


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
