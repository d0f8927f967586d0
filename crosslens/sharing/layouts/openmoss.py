"""The layout of OpenMOSS's language-model-saes (Ge et al., arXiv 2509.17196).

`config.json` and `sae_weights.safetensors`. With K heads, `h = sum_k (s_k x_k W_E[k] + b_E[k])`,
`f_k = h 1[h |W_D[k]| > exp(log t)]`, `s_k x_hat_k = f_k W_D[k] + b_D[k]`, `s_k = sqrt(D) / average norm`. Files with
`norm_activation: inference` have biases divided by s_k, which leaves the function unchanged only if all s_k are equal
and there is no threshold. If the norms are still in the file, the division is undone, and the crosscoder is loaded as
it was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from crosslens.crosscoders.inspection import MAX_SIZE, check_header, check_scale, read_header
from crosslens.errors import UserError, read_json, shortened
from crosslens.sharing.layouts.layout import Converted, Layout, size, step_of

_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_CONFIGS = ("config.json", "hyperparams.json")
_WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")


def _read(folder: Path) -> Converted:
    config_path = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    weights_path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if config_path is None or weights_path is None:
        raise UserError(f"{folder} must hold {_CONFIGS[0]} and {_WEIGHTS[0]}: download it again")
    config = read_json(config_path, "config of a crosscoder")
    hooks, D, F = _sizes(config_path, config)
    architecture = {"relu": "standard_crosscoder", "jumprelu": "jumprelu_crosscoder"}.get(str(config.get("act_fn")))
    if architecture is None:
        raise UserError(
            f"{config_path}: act_fn={shortened(config.get('act_fn'))} cannot be converted, only relu and jumprelu: "
            "the others select features for each head separately, which no crosscoder here does"
        )
    if config.get("sparsity_include_decoder_norm", True) is not True:
        raise UserError(f"{config_path}: sparsity_include_decoder_norm is off, which no crosscoder here supports")
    if config.get("norm_activation") not in ("dataset-wise", "inference"):
        raise UserError(
            f"{config_path}: norm_activation={shortened(config.get('norm_activation'))} cannot be converted: scales "
            "must be per dataset ('dataset-wise' or 'inference'), not per token or batch"
        )
    K = len(hooks)
    shapes: dict[str, tuple[int, ...]] = {"W_E": (K, D, F), "b_E": (K, F), "W_D": (K, F, D), "b_D": (K, D)}
    if architecture == "jumprelu_crosscoder":
        shapes[_THRESHOLD] = (F,)
    norms = {_NORM + hook: () for hook in hooks}
    has_norms = not norms.keys().isdisjoint(read_header(weights_path))
    if config["norm_activation"] == "dataset-wise" and not has_norms:
        raise UserError(f"{weights_path} lacks the average norms of the activations ({_NORM}*): download it again")
    check_header(weights_path, {**shapes, **(norms if has_norms else {})})
    loaded = {name: tensor.float() for name, tensor in load_file(weights_path).items()}
    scale = torch.ones(K)
    if has_norms:
        scale = torch.stack([math.sqrt(D) / loaded[name] for name in norms])
        check_scale(str(weights_path), scale)
    folded = config["norm_activation"] == "inference"
    biases = {name: loaded[name] * (scale[:, None] if folded else 1) for name in ("b_E", "b_D")}
    state = {
        "W_enc": loaded["W_E"].flatten(0, 1),
        "W_dec": loaded["W_D"].transpose(0, 1).flatten(1, 2),
        "b_enc": biases["b_E"].sum(0),
        "b_dec": biases["b_D"].flatten(),
        "activation_scale": scale,
    }
    if architecture == "jumprelu_crosscoder":
        state["log_threshold"] = loaded[_THRESHOLD]
    snapshots = [{"label": hook, "step": step_of(hook), "tokens": None} for hook in hooks]
    return Converted(architecture, state, {"snapshots": snapshots})


def _sizes(path: Path, config: Mapping[str, Any]) -> tuple[list[str], int, int]:
    """Hook points (one per snapshot), D and F."""
    if config.get("sae_type", "crosscoder") != "crosscoder":
        raise UserError(f"{path}: sae_type={shortened(config['sae_type'])} is not a crosscoder")
    hooks = config.get("hook_points")
    if not isinstance(hooks, list) or not hooks or len(set(map(str, hooks))) < len(hooks):
        raise UserError(f"{path}: hook_points={shortened(hooks)} does not list distinct hook points, one per snapshot")
    D, factor = size(path, config, "d_model"), config.get("expansion_factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor * D <= MAX_SIZE:
        raise UserError(f"{path}: expansion_factor={shortened(factor)} is not a valid positive number")
    return [str(hook) for hook in hooks], D, int(D * factor)


OPENMOSS = Layout(
    description="one with config.json and sae_weights.safetensors",
    files=lambda path: (f"{path}/{_CONFIGS[0]}", f"{path}/{_WEIGHTS[0]}"),
    holds=lambda place: (
        any((place / name).is_file() for name in _CONFIGS) and any((place / name).is_file() for name in _WEIGHTS)
    ),
    read=_read,
)
