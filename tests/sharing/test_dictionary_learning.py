"""Crosscoders of the science-of-finetuning `dictionary_learning`, compared with its forward pass, written plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from crosslens.crosscoders import load
from crosslens.errors import UserError
from crosslens.sharing import registry
from crosslens.sharing.importers import import_crosscoder
from crosslens.sharing.pretrained import from_pretrained

S, D, F = 3, 4, 11
CROSSCODER, SAE, MIXED, NONE, DECOUPLED = range(1, 6)


def weights(
    seed: int = 0, *, gated: bool = False, normalised: bool = False, code: int | None = CROSSCODER, n: int = S
) -> dict[str, Tensor]:
    """A state dict with the names and shapes of that project."""
    generator = torch.Generator().manual_seed(seed)
    names = {"encoder.weight": (n, D, F), "encoder.bias": (F,), "decoder.weight": (n, F, D), "decoder.bias": (n, D)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    if code is not None:
        state["code_normalization_id"] = torch.tensor(code)
    if gated:
        state |= {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(6.0)}
    if normalised:
        std = torch.rand(n, D, generator=generator) + 0.5
        state |= {
            "activation_mean": torch.randn(n, D, generator=generator) * 3,
            "activation_std": std,
            "target_rms": torch.tensor(1.0),
            "activation_global_scale": 1.0 / (std.square().sum() + 1e-8).sqrt(),
        }
    return state


def forward(x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Features (B, F) and reconstruction (B, S, D), element by element, in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}
    n = len(w["encoder.weight"])
    mean, g = w.get("activation_mean"), w.get("activation_global_scale", torch.tensor(1.0))
    if mean is not None and mean.isnan().any():
        mean = None
    features = torch.zeros(len(x), F, dtype=torch.float64)
    out = torch.zeros(len(x), n, D, dtype=torch.float64)
    for b in range(len(x)):
        y = [x[b, s].double() if mean is None else (x[b, s].double() - mean[s]) * g for s in range(n)]
        for i in range(F):
            h = w["encoder.bias"][i] + sum(y[s] @ w["encoder.weight"][s, :, i] for s in range(n))
            value = max(float(h), 0.0)
            norm = sum(float(w["decoder.weight"][s, i].norm()) for s in range(n))
            kept = "threshold" not in w or value * norm > float(w["threshold"])
            features[b, i] = value if kept else 0.0
        for s in range(n):
            y_hat = sum(features[b, i] * w["decoder.weight"][s, i] for i in range(F)) + w["decoder.bias"][s]
            out[b, s] = y_hat if mean is None else y_hat / (g + 1e-8) + mean[s]
    return features, out


def compare(crosscoder: Any, state: dict[str, Tensor], seed: int = 7) -> None:
    n = len(state["encoder.weight"])
    x = torch.randn(6, n, D, generator=torch.Generator().manual_seed(seed))
    if "activation_mean" in state:
        x = x + state["activation_mean"].nan_to_num()  # around the mean, as activations are
    features, out = forward(x, state)
    assert 0 < int(features.count_nonzero()) < features.numel()
    encoded = crosscoder.encode(x)
    assert torch.equal(encoded > 0, features > 0)
    for found, wanted in ((encoded, features), (crosscoder.decode(encoded), out)):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


class Saved(nn.Module, PyTorchModelHubMixin):
    """A module with these tensors, which huggingface_hub saves as it saves that project's."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def holding(self, state: dict[str, Tensor]) -> Saved:
        for name, tensor in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_buffer(last, tensor)
        return self


def saved(place: Path, state: dict[str, Tensor], form: str, **config: Any) -> Path:
    """Save a state dict as one of: file, folder, compiled, hub."""
    if form == "hub":
        Saved(**config).holding(state).save_pretrained(place)
        return place
    place.mkdir()
    prefix = "_orig_mod." if form == "compiled" else ""
    torch.save({prefix + name: tensor for name, tensor in state.items()}, place / "ae.pt")
    return place if form == "folder" else place / "ae.pt"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["file", "folder", "compiled", "hub"])
def test_same_function(tmp_path: Path, form: str, gated: bool, normalised: bool, seed: int) -> None:
    state = weights(seed, gated=gated, normalised=normalised)
    crosscoder = import_crosscoder(saved(tmp_path / "a", state, form))
    compare(crosscoder, state)
    metadata = crosscoder.cfg.metadata
    assert metadata.imported_from == "dictionary_learning" and metadata.k == (4 if gated else None)
    assert crosscoder.cfg.architecture() == ("batchtopk_crosscoder" if gated else "standard_crosscoder")
    if not normalised:
        assert torch.equal(crosscoder.W_dec_by_snapshot, state["decoder.weight"].transpose(0, 1))
    # saved and loaded it is the same
    assert torch.equal(load(crosscoder.save(tmp_path / "b")).W_enc, crosscoder.W_enc)


def test_two_models_and_half_precision(tmp_path: Path) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in weights(3, n=2).items()}
    crosscoder = import_crosscoder(saved(tmp_path / "a", state, "hub"), hook_name="blocks.13.hook_resid_post")
    compare(crosscoder, state)
    assert crosscoder.dtype == torch.float32 and crosscoder.cfg.metadata.hook_name == "blocks.13.hook_resid_post"


def test_a_normaliser_that_was_never_set_does_nothing(tmp_path: Path) -> None:
    state = weights(gated=True, normalised=True)
    state["activation_mean"] = torch.full((S, D), torch.nan)
    compare(import_crosscoder(saved(tmp_path / "a", state, "file")), state)


@pytest.mark.parametrize("code", [SAE, MIXED, NONE])
def test_the_code_normalisation_of_a_relu_crosscoder_changes_nothing(tmp_path: Path, code: int) -> None:
    state = weights(code=code)
    compare(import_crosscoder(saved(tmp_path / "a", state, "file")), state)


def test_early_files_do_not_say_their_code_normalisation(tmp_path: Path) -> None:
    state = weights(gated=True, code=None)
    with pytest.warns(UserWarning, match="does not say its code_normalization: CROSSCODER is assumed"):
        compare(import_crosscoder(saved(tmp_path / "a", state, "file")), state)
    place = saved(tmp_path / "b", state, "hub", code_normalization="SAE")
    with pytest.raises(UserError, match="selects features by code_normalization SAE"):
        import_crosscoder(place)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        (
            {"code_normalization_id": torch.tensor(SAE)},
            {},
            "selects features by code_normalization SAE; BatchTopK here",
        ),
        (
            {"code_normalization_id": torch.tensor(DECOUPLED), "threshold": torch.ones(S)},
            {},
            "selects features by code_normalization DECOUPLED",
        ),
        ({"code_normalization_id": torch.tensor(9)}, {}, "code_normalization_id=9 is not one of 1 to 5"),
        ({"threshold": torch.tensor(-1.0)}, {}, "has threshold -1, which was never set"),
        ({"threshold": torch.tensor(torch.nan)}, {}, "has threshold nan, which was never set"),
        ({"threshold": torch.ones(F)}, {}, r"threshold has shape \(11,\), the config says \(\)"),
        ({"decoder.weight": torch.ones(2, F, D)}, {}, r"decoder.weight has shape \(2, 11, 4\)"),
        ({"encoder.weight": torch.ones(D, F)}, {}, r"lacks encoder.weight of shape \(S, D, F\)"),
        ({"extra": torch.ones(1)}, {}, "has an unknown tensor 'extra'"),
        ({"activation_global_scale": None}, {}, "lacks activation_global_scale"),
        ({"activation_global_scale": torch.tensor(0.0)}, {}, "activation_scale of snapshot 0 is 0"),
        ({}, {"encoder_layers": [0]}, r"encoder_layers=\[0\] reads some of the layers"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], config: dict[str, Any], message: str
) -> None:
    state = {**weights(gated=True, normalised=True), **changes}
    place = saved(tmp_path / "a", {name: t for name, t in state.items() if t is not None}, "hub", **config)
    with pytest.raises(UserError, match=message):
        import_crosscoder(place)


def test_a_release_whose_repository_is_the_crosscoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    state = weights(gated=True)
    saved(tmp_path / "r", state, "hub")
    mine = {
        "model": "m",
        "folder": "r",
        "conversion_func": "dictionary_learning",
        "saes": [{"id": "a", "path": "."}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"mine": mine}))
    registry.register_release(tmp_path / "r.yaml")
    compare(from_pretrained("mine", "a"), state)
