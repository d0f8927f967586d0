"""The layouts of crosscoding_through_time and of the code that it grew from.

crosscoding_through_time (Bayazit et al., arXiv 2509.05291): `{k}.pt` and `{k}_cfg.json`. M snapshots share features
`f = relu(sum_m s_m x_m W_enc[m] + b_enc)`, `s_m x_hat_m = f W_dec[:, m] + b_dec[m]`; BatchTopK keeps `f` where
`f_i sum_m |W_dec[i, m]| > threshold`. `estimated_act_norm_list` in the config holds the s_m, which become our scales.
Its `blocks.L.hook_resid_pre` is the output of block L - 1.

ckkissane: `cfg.json` and `cc_weights.pt`, the same function without BatchTopK. The files hold no scales: pass those
used in training, unless they were folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslens.errors import UserError, read_json, shortened
from crosslens.sharing.layouts.layout import Converted, Layout, check_tensors, load_tensors, size, step_of, text
from crosslens.snapshots.hooks import canonical_hook


def _numbered(place: Path) -> tuple[Path, Path]:
    stem = place.name.removesuffix(".pt").removesuffix("_cfg.json")
    return place.with_name(f"{stem}_cfg.json"), place.with_name(f"{stem}.pt")


def _read(config_path: Path, weights_path: Path) -> Converted:
    config = read_json(config_path, "config of a crosscoder")
    D, F = size(config_path, config, "d_in"), size(config_path, config, "dict_size")
    S = size(config_path, {"n_models": 2, **config}, "n_models")  # ckkissane's code always has two models
    shapes = {"W_enc": (S, D, F), "W_dec": (F, S, D), "b_enc": (F,), "b_dec": (S, D)}
    loaded = load_tensors(weights_path)
    gated = "threshold" in loaded
    if gated:
        shapes |= {"threshold": (), "k": ()}
    check_tensors(weights_path, loaded, shapes)
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
        "model_name": text(config, "model_name"),
        "hook_name": canonical_hook(text(config, "hook_point") or "") or None,
        "snapshots": [{"label": label, "step": step_of(label), "tokens": None} for label in labels],
    }
    return Converted("batchtopk_crosscoder" if gated else "standard_crosscoder", state, metadata)


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


CROSSCODING_THROUGH_TIME = Layout(
    description="version_3/20 for version_3/20.pt and version_3/20_cfg.json",
    files=lambda path: (f"{path}_cfg.json", f"{path}.pt"),
    holds=lambda place: not place.is_dir() and all(file.is_file() for file in _numbered(place)),
    read=lambda place: _read(*_numbered(place)),
)
CKKISSANE = Layout(
    description="a folder with cfg.json and cc_weights.pt",
    files=lambda path: (f"{path}/cfg.json", f"{path}/cc_weights.pt"),
    holds=lambda place: (place / "cc_weights.pt").is_file(),
    read=lambda place: _read(place / "cfg.json", place / "cc_weights.pt"),
)
