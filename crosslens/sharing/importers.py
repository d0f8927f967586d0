"""Convert crosscoders of other projects; activation scales stay separate and are never folded into the weights.

crosscoding_through_time (Bayazit et al., arXiv 2509.05291): `{k}.pt` and `{k}_cfg.json`. M snapshots share features
`f = relu(sum_m s_m x_m W_enc[m] + b_enc)`, `s_m x_hat_m = f W_dec[:, m] + b_dec[m]`; BatchTopK keeps `f` where
`f_i sum_m |W_dec[i, m]| > threshold`. `estimated_act_norm_list` in the config holds the s_m, which become our scales.
Its `blocks.L.hook_resid_pre` is the output of block L - 1.

ckkissane: `cfg.json` and `cc_weights.pt`, the same function without BatchTopK. The files hold no scales: pass those
used in training, unless they were folded into the weights.

openmoss (Ge et al., arXiv 2509.17196, OpenMOSS code): `config.json` and `sae_weights.safetensors`. With K heads,
`h = sum_k (s_k x_k W_E[k] + b_E[k])`, `f_k = h 1[h |W_D[k]| > exp(log t)]`, `s_k x_hat_k = f_k W_D[k] + b_D[k]`, `s_k =
sqrt(D) / average norm`. Files with `norm_activation: inference` have biases divided by s_k, which leaves the function
unchanged only if all s_k are equal and there is no threshold. If the norms are still in the file, the division is
undone, and the crosscoder is loaded as it was trained.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file
from torch import Tensor

from crosslens.crosscoders import ARCHITECTURES, Crosscoder
from crosslens.crosscoders.inspection import MAX_SIZE, check_header, check_scale, read_header
from crosslens.errors import UserError, brief, did_you_mean, read_json, shortened
from crosslens.sharing.registry import LAYOUTS
from crosslens.snapshots.hooks import canonical_hook

_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_OPENMOSS_CONFIGS = ("config.json", "hyperparams.json")
_OPENMOSS_WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")


def import_crosscoder(
    path: str | Path,
    layout: str | None = None,
    *,
    activation_scale: Sequence[float] | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> Crosscoder:
    """Load a crosscoder trained by another project; `save` it to load it faster next time.

    Args:
        path: folder with the files; for crosscoding_through_time the folder and file number, such as `version_3/20`.
        layout: "crosscoding_through_time", "ckkissane" or "openmoss"; None recognises it by the files.
        activation_scale: scale of each snapshot, instead of those in the files.
        model_name: recorded if the files do not name the model.
        hook_name: recorded if the files do not name the hook point.

    Returns:
        A standard, BatchTopK or JumpReLU crosscoder for inference, in float32.

    Raises:
        UserError: files are missing, damaged, contradict each other, or need an architecture that does not exist here.
    """
    place = Path(path).expanduser()
    layout = layout or _recognise(place)
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}{did_you_mean(layout, LAYOUTS)}")
    if layout == "openmoss":
        architecture, state, metadata = _read_openmoss(place)
    elif layout == "ckkissane":
        architecture, state, metadata = _read_code(place / "cfg.json", place / "cc_weights.pt")
    else:
        config, weights = _numbered(place)
        architecture, state, metadata = _read_code(config, weights)
    if activation_scale is not None:
        if len(activation_scale) != len(state["activation_scale"]):
            raise UserError(
                f"{len(activation_scale)} values of activation_scale for {len(state['activation_scale'])} snapshots: "
                "give one per snapshot"
            )
        state["activation_scale"] = torch.tensor(activation_scale, dtype=torch.float32)
    check_scale(str(path), state["activation_scale"])
    given = {"model_name": model_name, "hook_name": hook_name}
    metadata = {**metadata, "imported_from": layout, **{k: v for k, v in given.items() if not metadata.get(k) and v}}
    return _make(architecture, state, metadata)


def layout_files(layout: str, path: str) -> list[str]:
    """Paths of a crosscoder's files in a repository, the config first."""
    if layout == "openmoss":
        return [f"{path}/{_OPENMOSS_CONFIGS[0]}", f"{path}/{_OPENMOSS_WEIGHTS[0]}"]
    if layout == "ckkissane":
        return [f"{path}/cfg.json", f"{path}/cc_weights.pt"]
    return [f"{path}_cfg.json", f"{path}.pt"]


def _recognise(place: Path) -> str:
    if place.is_dir():
        if (place / "cc_weights.pt").is_file():
            return "ckkissane"
        if any((place / name).is_file() for name in _OPENMOSS_CONFIGS):
            return "openmoss"
    elif all(file.is_file() for file in _numbered(place)):
        return "crosscoding_through_time"
    raise UserError(
        f"{place} holds no crosscoder of a known layout: give a folder with cfg.json and cc_weights.pt, one with "
        "config.json and sae_weights.safetensors, or version_3/20 for version_3/20.pt and version_3/20_cfg.json"
    )


def _numbered(place: Path) -> tuple[Path, Path]:
    stem = place.name.removesuffix(".pt").removesuffix("_cfg.json")
    return place.with_name(f"{stem}_cfg.json"), place.with_name(f"{stem}.pt")


def _make(architecture: str, state: dict[str, Tensor], metadata: Mapping[str, Any]) -> Crosscoder:
    sae_class, config_class = ARCHITECTURES[architecture]
    (d_in, d_sae), S = state["W_enc"].shape, len(state["activation_scale"])
    cfg = config_class(d_in=d_in, d_sae=d_sae, n_snapshots=S, device="meta", metadata=SAEMetadata(**metadata))
    crosscoder = sae_class(cfg)
    crosscoder.process_state_dict_for_loading(state)
    crosscoder.load_state_dict(state, assign=True)
    return crosscoder.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)


def _read_code(config_path: Path, weights_path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    config = read_json(config_path, "config of a crosscoder")
    D, F = _size(config_path, config, "d_in"), _size(config_path, config, "dict_size")
    S = _size(config_path, {"n_models": 2, **config}, "n_models")  # ckkissane's code always has two models
    shapes = {"W_enc": (S, D, F), "W_dec": (F, S, D), "b_enc": (F,), "b_dec": (S, D)}
    loaded = _load_tensors(weights_path)
    gated = "threshold" in loaded
    if gated:
        shapes |= {"threshold": (), "k": ()}
    _check_tensors(weights_path, loaded, shapes)
    state = {name: loaded[name].float() for name in shapes if name != "k"}
    state = {
        **state,
        "W_enc": state["W_enc"].flatten(0, 1),
        "W_dec": state["W_dec"].flatten(1, 2),
        "b_dec": state["b_dec"].flatten(),
        "activation_scale": _listed_scales(config_path, config.get("estimated_act_norm_list"), S),
    }
    labels = _revisions(config_path, config, S)
    metadata = {
        "model_name": _text(config, "model_name"),
        "hook_name": canonical_hook(_text(config, "hook_point") or "") or None,
        "snapshots": [{"label": label, "step": _step(label), "tokens": None} for label in labels],
    }
    return ("batchtopk_crosscoder" if gated else "standard_crosscoder"), state, metadata


def _load_tensors(path: Path) -> dict[str, Tensor]:
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


def _check_tensors(path: Path, loaded: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
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
        if name != "k" and not tensor.is_floating_point():
            raise UserError(f"{path}: {name} has dtype {tensor.dtype}, but must be floating point")


def _listed_scales(path: Path, scales: Any, S: int) -> Tensor:
    if scales is None:
        return torch.ones(S)
    if not isinstance(scales, list) or len(scales) != S or any(type(c) not in (int, float) for c in scales):
        raise UserError(f"{path}: estimated_act_norm_list={shortened(scales)} does not list {S} numbers")
    return torch.tensor(scales, dtype=torch.float32)


def _revisions(path: Path, config: Mapping[str, Any], S: int) -> list[str]:
    """Labels from `revision_list`, which is joined by "_" for OLMo, whose revisions contain "-", and else by "-"."""
    joined = config.get("revision_list")
    if joined is None:
        return [str(s) for s in range(S)]
    if isinstance(joined, str):
        joined = joined.split("_" if "olmo" in str(config.get("model_name")).lower() else "-")
    if not isinstance(joined, list) or len(joined) != S or len(set(map(str, joined))) < S:
        raise UserError(f"{path}: revision_list={shortened(joined)} does not name {S} distinct snapshots")
    return [str(label) for label in joined]


def _read_openmoss(folder: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    config_path = next((folder / name for name in _OPENMOSS_CONFIGS if (folder / name).is_file()), None)
    weights_path = next((folder / name for name in _OPENMOSS_WEIGHTS if (folder / name).is_file()), None)
    if config_path is None or weights_path is None:
        raise UserError(f"{folder} must hold {_OPENMOSS_CONFIGS[0]} and {_OPENMOSS_WEIGHTS[0]}: download it again")
    config = read_json(config_path, "config of a crosscoder")
    hooks, D, F = _openmoss_sizes(config_path, config)
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
    return architecture, state, {"snapshots": [{"label": h, "step": _step(h), "tokens": None} for h in hooks]}


def _openmoss_sizes(path: Path, config: Mapping[str, Any]) -> tuple[list[str], int, int]:
    """Hook points (one per snapshot), D and F."""
    if config.get("sae_type", "crosscoder") != "crosscoder":
        raise UserError(f"{path}: sae_type={shortened(config['sae_type'])} is not a crosscoder")
    hooks = config.get("hook_points")
    if not isinstance(hooks, list) or not hooks or len(set(map(str, hooks))) < len(hooks):
        raise UserError(f"{path}: hook_points={shortened(hooks)} does not list distinct hook points, one per snapshot")
    D, factor = _size(path, config, "d_model"), config.get("expansion_factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor * D <= MAX_SIZE:
        raise UserError(f"{path}: expansion_factor={shortened(factor)} is not a valid positive number")
    return [str(hook) for hook in hooks], D, int(D * factor)


def _size(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise UserError(f"{path}: {key}={shortened(repr(value))} is not a whole number from 1 to {MAX_SIZE:,}")
    return value


def _text(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    return value if isinstance(value, str) else None


def _step(label: str) -> int | None:
    match = re.search(r"step_?(\d{1,12})", label)
    return int(match[1]) if match else None
