"""Crosscoders in the layouts of other projects, compared with direct implementations of their forward passes."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from crosslens.crosscoders import load
from crosslens.errors import UserError
from crosslens.sharing import registry
from crosslens.sharing.importers import import_crosscoder
from crosslens.sharing.pretrained import from_pretrained

S, D, F = 3, 4, 11
SCALE = [2.0862, 1.1974, 0.8227]
HOOKS = ["step0", "step512", "step143000"]


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def code_weights(gated: bool, seed: int = 0, n: int = S) -> dict[str, Tensor]:
    W_enc, W_dec, b_enc, b_dec = draw(seed, (n, D, F), (F, n, D), (F,), (n, D))
    state = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    return {**state, "k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(6.0)} if gated else state


def code_config(**changes: Any) -> dict[str, Any]:
    return {
        "seed": 124,
        "dict_size": F,
        "d_in": D,
        "n_models": S,
        "enc_dtype": "fp32",
        "model_name": "EleutherAI/pythia-1b",
        "revision_list": "step512-step2000-main",
        "hook_point": "blocks.9.hook_resid_pre",
        "device": "cuda:0",
        "estimated_act_norm_list": SCALE,
        **changes,
    }


def write_code(folder: Path, state: dict[str, Any], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "20.pt")
    (folder / "20_cfg.json").write_text(json.dumps(config, indent=4))
    return folder / "20"


def code_forward(x: Tensor, state: dict[str, Tensor], scale: list[float]) -> tuple[Tensor, Tensor]:
    """Features and raw reconstruction of (B, S, D), element by element, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    n = len(scale)
    features = torch.zeros(len(x), F, dtype=torch.float64)
    out = torch.zeros(len(x), n, D, dtype=torch.float64)
    for b in range(len(x)):
        scaled = [x[b, m].double() * scale[m] for m in range(n)]
        for i in range(F):
            h = w["b_enc"][i] + sum(scaled[m] @ w["W_enc"][m, :, i] for m in range(n))
            value = max(float(h), 0.0)
            if "threshold" in w:
                norm = sum(float(w["W_dec"][i, m].pow(2).sum().sqrt()) for m in range(n))
                value = value if value * norm > float(w["threshold"]) else 0.0
            features[b, i] = value
        for m in range(n):
            out[b, m] = (sum(features[b, i] * w["W_dec"][i, m] for i in range(F)) + w["b_dec"][m]) / scale[m]
    return features, out


def compare(crosscoder: Any, wanted: tuple[Tensor, Tensor], x: Tensor) -> None:
    features = crosscoder.encode(x)
    assert 0 < int(wanted[0].count_nonzero()) < wanted[0].numel()
    torch.testing.assert_close(features.double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(crosscoder.decode(features).double(), wanted[1], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- crosscoding_through_time


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gated", [False, True])
def test_crosscoding_through_time(tmp_path: Path, gated: bool, seed: int) -> None:
    state = code_weights(gated, seed)
    place = write_code(tmp_path / "version_3", state, code_config())
    crosscoder = import_crosscoder(place)
    [x] = draw(7, (6, S, D))
    compare(crosscoder, code_forward(x, state, SCALE), x)
    assert crosscoder.cfg.architecture() == ("batchtopk_crosscoder" if gated else "standard_crosscoder")
    # kept apart: the decoder is what was trained
    assert torch.equal(crosscoder.W_dec_by_snapshot, state["W_dec"])
    assert crosscoder.activation_scale.tolist() == pytest.approx(SCALE)
    metadata = crosscoder.cfg.metadata
    assert metadata.hook_name == "blocks.8.hook_resid_post" and metadata.model_name == "EleutherAI/pythia-1b"
    assert crosscoder.cfg.snapshot_labels == ["step512", "step2000", "main"]
    assert [row["step"] for row in metadata.snapshots] == [512, 2000, None]
    assert metadata.imported_from == "crosscoding_through_time"
    # saved and loaded it is the same
    assert torch.equal(load(crosscoder.save(tmp_path / "ours")).encode(x), crosscoder.encode(x))
    for name in ("20.pt", "20_cfg.json"):
        assert torch.equal(import_crosscoder(place.with_name(name)).W_enc, crosscoder.W_enc)


def test_revisions_of_olmo_are_joined_otherwise(tmp_path: Path) -> None:
    revisions = "step1000-tokens2B_step2000-tokens4B_main"
    config = code_config(model_name="allenai/OLMo-1B-0724-hf", revision_list=revisions)
    crosscoder = import_crosscoder(write_code(tmp_path, code_weights(False), config))
    assert crosscoder.cfg.snapshot_labels == ["step1000-tokens2B", "step2000-tokens4B", "main"]
    assert [row["step"] for row in crosscoder.cfg.metadata.snapshots] == [1000, 2000, None]


def test_half_precision_becomes_float32_and_given_scales_replace_others(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in code_weights(False).items()}
    place = write_code(tmp_path, state, code_config(estimated_act_norm_list=None))
    crosscoder = import_crosscoder(place)
    assert crosscoder.dtype == torch.float32 and crosscoder.activation_scale.tolist() == [1, 1, 1]
    [x] = draw(3, (4, S, D))
    compare(import_crosscoder(place, activation_scale=SCALE), code_forward(x, state, SCALE), x)
    with pytest.raises(UserError, match="2 values of activation_scale for 3 snapshots"):
        import_crosscoder(place, activation_scale=[1.0, 2.0])


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_are_none(tmp_path: Path, value: float) -> None:
    place = write_code(tmp_path, code_weights(False), code_config(estimated_act_norm_list=[1.0, value, 1.0]))
    with pytest.raises(UserError, match="activation_scale of snapshot 1 is .*, which must be positive and finite"):
        import_crosscoder(place)


# ---------------------------------------------------------------------- ckkissane


def test_ckkissane(tmp_path: Path) -> None:
    state = code_weights(False, seed=4, n=2)
    config = {"dict_size": F, "d_in": D, "enc_dtype": "fp32", "hook_point": "blocks.14.hook_resid_pre", "seed": 49}
    folder = tmp_path / "blocks.14.hook_resid_pre"
    folder.mkdir()
    torch.save(state, folder / "cc_weights.pt")
    (folder / "cfg.json").write_text(json.dumps(config))
    [x] = draw(8, (5, 2, D))
    for scale in ([1.0, 1.0], [0.25, 0.3]):
        given = None if scale[0] == 1 else scale
        crosscoder = import_crosscoder(folder, activation_scale=given, model_name="gemma-2-2b")
        compare(crosscoder, code_forward(x, state, scale), x)
    assert crosscoder.cfg.metadata.hook_name == "blocks.13.hook_resid_post"
    assert crosscoder.cfg.metadata.model_name == "gemma-2-2b" and crosscoder.cfg.snapshot_labels == ["0", "1"]


# ---------------------------------------------------------------------- openmoss


def moss_state(act_fn: str, seed: int = 0) -> dict[str, Tensor]:
    W_E, b_E, W_D, b_D, threshold = draw(seed, (S, D, F), (S, F), (S, F, D), (S, D), (F,))
    W_D = W_D * torch.tensor([0.2, 1.0, 2.0])[:, None, None]  # so that gates differ between snapshots
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(1.5 + k) for k, hook in enumerate(HOOKS)}
    state = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": b_D, **norms}
    return {**state, "activation_function.log_jumprelu_threshold": threshold} if act_fn == "jumprelu" else state


def moss_config(**changes: Any) -> dict[str, Any]:
    return {
        "sae_type": "crosscoder",
        "hook_points": HOOKS,
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "dtype": "torch.float32",
        **changes,
    }


def write_moss(folder: Path, state: dict[str, Tensor], config: dict[str, Any], nested: bool = False) -> Path:
    weights = folder / "checkpoints" / "final.safetensors" if nested else folder / "sae_weights.safetensors"
    weights.parent.mkdir(parents=True)
    save_file(state, weights, {"version": "2.0"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moss_forward(x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Features of each head (B, S, F) and raw reconstruction (B, S, D), head by head, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    scale = [math.sqrt(D) / float(w[f"dataset_average_activation_norm.{hook}"]) for hook in HOOKS]
    h = sum(x[:, k].double() * scale[k] @ w["W_E"][k] + w["b_E"][k] for k in range(S))
    assert isinstance(h, Tensor)
    features, out = [], []
    for k in range(S):
        norm = w["W_D"][k].norm(dim=-1)
        z = h * norm
        if "activation_function.log_jumprelu_threshold" in w:
            z = z * (z > w["activation_function.log_jumprelu_threshold"].exp())
        else:
            z = z.clamp_min(0)
        features.append(z / norm)
        out.append((features[-1] @ w["W_D"][k] + w["b_D"][k]) / scale[k])
    return torch.stack(features, 1), torch.stack(out, 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu"])
def test_openmoss(tmp_path: Path, act_fn: str, seed: int) -> None:
    state = moss_state(act_fn, seed)
    crosscoder = import_crosscoder(write_moss(tmp_path / "a", state, moss_config(act_fn=act_fn), nested=seed == 1))
    [x] = draw(9, (6, S, D))
    features, out = moss_forward(x, state)
    encoded = crosscoder.encode(x)
    by_snapshot = torch.stack([crosscoder.snapshot_acts(encoded, s) for s in range(S)], 1)
    torch.testing.assert_close(by_snapshot.double(), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(crosscoder.decode(encoded).double(), out, rtol=1e-5, atol=1e-5)
    if act_fn == "jumprelu":
        assert (features > 0).any(1).sum() > (features > 0).all(1).sum()
    assert crosscoder.cfg.snapshot_labels == HOOKS
    assert [row["step"] for row in crosscoder.cfg.metadata.snapshots] == [0, 512, 143000]
    norms = crosscoder.decoder_norms
    torch.testing.assert_close(norms, state["W_D"].norm(dim=-1).T)


def test_openmoss_with_folded_biases_is_loaded_as_it_was_trained(tmp_path: Path) -> None:
    state = moss_state("jumprelu")
    factors = torch.stack([math.sqrt(D) / state[f"dataset_average_activation_norm.{hook}"] for hook in HOOKS])
    folded = {**state, "b_E": state["b_E"] / factors[:, None], "b_D": state["b_D"] / factors[:, None]}
    crosscoder = import_crosscoder(write_moss(tmp_path / "a", folded, moss_config(norm_activation="inference")))
    [x] = draw(2, (6, S, D))
    torch.testing.assert_close(
        crosscoder.decode(crosscoder.encode(x)).double(), moss_forward(x, state)[1], rtol=1e-5, atol=1e-5
    )
    # without the norms there is nothing to undo: what the files compute, with scales of 1
    bare = {name: tensor for name, tensor in folded.items() if "norm" not in name}
    crosscoder = import_crosscoder(write_moss(tmp_path / "b", bare, moss_config(norm_activation="inference")))
    ones = {f"dataset_average_activation_norm.{hook}": torch.tensor(math.sqrt(D)) for hook in HOOKS}
    torch.testing.assert_close(
        crosscoder.decode(crosscoder.encode(x)).double(), moss_forward(x, {**bare, **ones})[1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "topk"}, "act_fn=topk cannot be converted, only relu and jumprelu"),
        ({"norm_activation": "token-wise"}, "norm_activation=token-wise cannot be converted"),
        ({"sparsity_include_decoder_norm": False}, "sparsity_include_decoder_norm is off"),
        ({"sae_type": "lorsa"}, "sae_type=lorsa is not a crosscoder"),
        ({"hook_points": ["a", "a"]}, "does not list distinct hook points"),
        ({"hook_points": "step0"}, "does not list distinct hook points"),
        ({"d_model": 5}, "W_D has shape"),
        ({"d_model": "4"}, "d_model='4' is not a whole number"),
        ({"expansion_factor": -1}, "expansion_factor=-1 is not a valid positive number"),
        ({"expansion_factor": 1e300}, "expansion_factor=1e\\+300 is not a valid positive number"),
        ({"act_fn": "relu"}, "log_jumprelu_threshold' is not a tensor of this architecture"),
    ],
)
def test_openmoss_that_is_not_converted(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_moss(tmp_path / "a", moss_state("jumprelu"), moss_config(**changes))
    with pytest.raises(UserError, match=message):
        import_crosscoder(folder)


def test_norms_that_were_never_set_are_refused(tmp_path: Path) -> None:
    state = moss_state("jumprelu")
    state["dataset_average_activation_norm.step512"] = torch.tensor(0.0)
    with pytest.raises(UserError, match="activation_scale of snapshot 1 is inf"):
        import_crosscoder(write_moss(tmp_path / "a", state, moss_config()))
    without = {name: tensor for name, tensor in state.items() if "norm" not in name}
    with pytest.raises(UserError, match="lacks the average norms"):
        import_crosscoder(write_moss(tmp_path / "b", without, moss_config()))


# ---------------------------------------------------------------------- what is refused


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of a file has run",))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**code_weights(False), "x": _Evil()}, "holds more than tensors, which is unsafe to load"),
        ({**code_weights(False), "W_up": torch.ones(2)}, "has an unknown tensor 'W_up'"),
        ({"W_enc": torch.ones(S, D, F)}, "lacks W_dec"),
        ({**code_weights(False), "b_enc": torch.ones(F + 1)}, r"b_enc has shape \(12,\), the config says \(11,\)"),
        ({**code_weights(False), "b_enc": torch.ones(1).expand(F)}, "b_enc is larger than its stored data"),
        ({**code_weights(False), "b_enc": torch.ones(F, dtype=torch.int)}, "b_enc has dtype torch.int32"),
        ([torch.ones(2)], "is not a state_dict of tensors"),
        ({"W_enc": "text"}, "is not a state_dict of tensors"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, state: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        import_crosscoder(write_code(tmp_path, state, code_config()))
    assert "has run" not in capsys.readouterr().out


def test_files_that_claim_more_data_than_they_hold(tmp_path: Path) -> None:
    place = write_code(tmp_path, code_weights(False), code_config())
    weights = place.with_suffix(".pt")
    whole = weights.read_bytes()
    with zipfile.ZipFile(weights) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="is compressed, which torch.save never does"):
        import_crosscoder(place)
    weights.write_bytes(pickle.dumps({"W_enc": 1}))
    with pytest.raises(UserError, match=r"is not a torch.save file of torch 1\.6 or later"):
        import_crosscoder(place)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"is not a torch.save file|cannot be loaded"):
        import_crosscoder(place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dict_size": 10**12}, "dict_size=1000000000000 is not a whole number"),
        ({"dict_size": True}, "dict_size=True is not a whole number"),
        ({"n_models": 2}, r"W_dec has shape \(11, 3, 4\), the config says \(11, 2, 4\)"),
        ({"revision_list": "step1-step2"}, "does not name 3 distinct snapshots"),
        ({"revision_list": "main-main-main"}, "does not name 3 distinct snapshots"),
        ({"revision_list": 3}, "does not name 3 distinct snapshots"),
        ({"estimated_act_norm_list": [1.0]}, "does not list 3 numbers"),
        ({"estimated_act_norm_list": ["a", "b", "c"]}, "does not list 3 numbers"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_crosscoder(write_code(tmp_path, code_weights(False), code_config(**changes)))


def test_folders_without_a_crosscoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no crosscoder of a known layout"):
        import_crosscoder(tmp_path)
    with pytest.raises(UserError, match="layout 'openmos' is unknown: .* did you mean 'openmoss'"):
        import_crosscoder(tmp_path, "openmos")
    with pytest.raises(UserError, match="cannot be read as config"):
        import_crosscoder(tmp_path / "20", "crosscoding_through_time")


@pytest.mark.parametrize("layout", ["crosscoding_through_time", "ckkissane", "openmoss"])
def test_releases_of_other_layouts(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    if layout == "openmoss":
        path = write_moss(tmp_path / "r" / "x", moss_state("jumprelu"), moss_config())
    else:
        path = write_code(tmp_path / "r", code_weights(True), code_config())
        if layout == "ckkissane":
            path.mkdir()
            path.with_suffix(".pt").rename(path / "cc_weights.pt")
            (tmp_path / "r" / "20_cfg.json").rename(path / "cfg.json")
    saes = [{"id": "a", "path": path.name, "config": {"d_sae": F}}]
    mine = {"model": "m", "folder": "r", "conversion_func": layout, "saes": saes}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"mine": mine}))
    registry.register_release(tmp_path / "r.yaml")
    loaded = from_pretrained("mine", "a", dtype="float64")
    assert loaded.cfg.metadata.imported_from == layout and loaded.dtype == torch.float64
    with pytest.raises(UserError, match="dtype='float8' is unknown"):
        from_pretrained("mine", "a", dtype="float8")
