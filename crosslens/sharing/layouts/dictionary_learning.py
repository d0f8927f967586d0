"""The layout of CrossCoder and BatchTopKCrossCoder of the science-of-finetuning `dictionary_learning`.

A file of `torch.save` (`ae.pt`), or a folder from the hub with `config.json` and `model.safetensors`. S layers share
features: `f = relu(sum_s y_s W_enc[s] + b_enc)`, `y_hat_s = f W_dec[s] + b_dec[s]`; BatchTopK keeps `f` where
`f_i v_i > threshold`, and v_i is the code normalisation: the sum over layers of |W_dec[s, i]| (CROSSCODER), or another
norm of the decoder. With a mean m and a standard deviation in the file, `y = g (x - m)` and
`x_hat = y_hat / (g + 1e-8) + m`, where `g` is one number for all layers.

Here the same function has scale g for every snapshot; m moves into the biases, and the 1e-8 into decoder and
threshold, which it multiplies by the same number close to 1.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from posixpath import normpath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from crosslens.crosscoders.inspection import read_header
from crosslens.errors import UserError, read_json, shortened
from crosslens.sharing.layouts.layout import Converted, Layout, check_tensors, load_tensors

_CONFIG, _WEIGHTS, _SAVED = "config.json", "model.safetensors", "ae.pt"
_COMPILED = "_orig_mod."
_NORMALISATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""Numbered from 1, as in the files."""
_EPSILON = 1e-8


def _read(place: Path) -> Converted:
    weights, loaded, config = _load(place)
    if "encoder.weight" not in loaded or loaded["encoder.weight"].dim() != 3:
        raise UserError(f"{weights} lacks encoder.weight of shape (S, D, F): is it in another layout?")
    S, D, F = loaded["encoder.weight"].shape
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (S, D, F),
        "encoder.bias": (F,),
        "decoder.weight": (S, F, D),
        "decoder.bias": (S, D),
    }
    optional: dict[str, tuple[int, ...]] = {
        "code_normalization_id": (),
        "k": (),
        "threshold": (S,) if _normalisation(weights, loaded, config) == "DECOUPLED" else (),
        "target_rms": (),
        "activation_mean": (S, D),
        "activation_std": (S, D),
        "activation_global_scale": (),
    }
    whole = ("k", "code_normalization_id")
    check_tensors(weights, loaded, {**shapes, **{n: s for n, s in optional.items() if n in loaded}}, whole=whole)
    _check_layers(place, config, S)
    gated = "threshold" in loaded
    if gated:
        _check_gate(weights, loaded, config)
    w = {name: tensor.double() for name, tensor in loaded.items()}
    scale, mean = _normaliser(weights, w, S, D)
    rounded = scale / (scale + _EPSILON) if "activation_mean" in w else 1.0
    state = {
        "W_enc": w["encoder.weight"].flatten(0, 1),
        "W_dec": w["decoder.weight"].transpose(0, 1).flatten(1, 2) * rounded,
        "b_enc": w["encoder.bias"] - scale * torch.einsum("sd,sdf->f", mean, w["encoder.weight"]),
        "b_dec": (w["decoder.bias"] * rounded + scale * mean).flatten(),
        "activation_scale": torch.full((S,), scale, dtype=torch.float64),
    }
    if gated:
        state["threshold"] = w["threshold"] * rounded
    metadata: dict[str, Any] = {"snapshots": [{"label": str(s), "step": None, "tokens": None} for s in range(S)]}
    if "k" in loaded:
        metadata["k"] = int(loaded["k"])
    architecture = "batchtopk_crosscoder" if gated else "standard_crosscoder"
    return Converted(architecture, {name: tensor.float() for name, tensor in state.items()}, metadata)


def _load(place: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The file of the weights, its tensors by the names that modules have before they are compiled, and the config."""
    config: dict[str, Any] = {}
    weights = place
    if place.is_dir():
        hub = (place / _WEIGHTS).is_file()
        weights = place / (_WEIGHTS if hub else _SAVED)
        if hub and (place / _CONFIG).is_file():
            config = read_json(place / _CONFIG, "config of a crosscoder")
    if weights.suffix == ".safetensors":
        read_header(weights)  # refuses a damaged file before anything is read
        loaded = load_file(weights)
    else:
        loaded = load_tensors(weights)
    return weights, {name.replace(_COMPILED, ""): tensor for name, tensor in loaded.items()}, config


def _normalisation(path: Path, loaded: dict[str, Tensor], config: dict[str, Any]) -> str:
    """Name of the code normalisation; files of early versions do not have it."""
    if (number := loaded.get("code_normalization_id")) is None:
        return str(config.get("code_normalization", _NORMALISATIONS[0])).upper()
    if number.dim() or not 1 <= int(number) <= len(_NORMALISATIONS):
        raise UserError(f"{path}: code_normalization_id={shortened(number.tolist())} is not one of 1 to 5")
    return _NORMALISATIONS[int(number) - 1]


def _check_layers(place: Path, config: dict[str, Any], S: int) -> None:
    """Refuse crosscoders that read other layers than they write."""
    for name in ("encoder_layers", "encoder_layers_indices"):
        if config.get(name) not in (None, list(range(S))):
            raise UserError(
                f"{place / _CONFIG}: {name}={json.dumps(config[name])} reads some of the layers, and every crosscoder "
                f"here reads all {S} that it reconstructs"
            )


def _check_gate(path: Path, loaded: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Refuse gates that no architecture here has."""
    name = _normalisation(path, loaded, config)
    if name != "CROSSCODER":
        raise UserError(
            f"{path} selects features by code_normalization {name}; BatchTopK here selects them by the sum of their "
            "decoder norms (CROSSCODER), and converts no other"
        )
    if "code_normalization_id" not in loaded and "code_normalization" not in config:
        warnings.warn(f"{path} does not say its code_normalization: CROSSCODER is assumed, the default", stacklevel=4)
    if not float(loaded["threshold"]) >= 0:
        raise UserError(
            f"{path} has threshold {float(loaded['threshold']):g}, which was never set: it is learnt in training, so "
            "save the crosscoder after more steps"
        )


def _normaliser(path: Path, w: dict[str, Tensor], S: int, D: int) -> tuple[float, Tensor]:
    """The scale g and the mean m; 1 and 0 where the file has none."""
    mean, std = w.get("activation_mean"), w.get("activation_std")
    if mean is None or std is None or mean.isnan().any() or std.isnan().any():
        w.pop("activation_mean", None)
        return 1.0, torch.zeros(S, D, dtype=torch.float64)
    if "activation_global_scale" not in w:
        raise UserError(f"{path} has activation_mean but lacks activation_global_scale: save it again")
    return float(w["activation_global_scale"]), mean


DICTIONARY_LEARNING = Layout(
    description="a .pt file of dictionary_learning, or a folder with its config.json and model.safetensors",
    files=lambda path: (normpath(f"{path}/{_CONFIG}"), normpath(f"{path}/{_WEIGHTS}")),  # "." is the repository itself
    holds=lambda place: (
        place.is_file()
        and place.suffix in (".pt", ".safetensors")
        or (place / _WEIGHTS).is_file()
        or (place / _SAVED).is_file()
    ),
    read=_read,
)
