"""The JSON of features, against plain loops over tokens, and the logit lens against the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_views import make_crosscoder

from crosslens.activations import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.feature_data import direct_logits, export_features
from crosslens.snapshots import Snapshots

F, S, D = 24, 3, 16


@pytest.fixture(scope="module")
def acts(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    snapshots = Snapshots.local(tiny_snapshots)
    return Activations(snapshots, "blocks.1.hook_resid_post", tiny_text, 600, 16, held_out_tokens=300)


@pytest.fixture(scope="module")
def crosscoder(acts: Activations) -> Crosscoder:
    made = make_crosscoder("jumprelu_crosscoder")
    norms = torch.cat(list(acts.held_out())).norm(dim=-1).mean(0)
    made.activation_scale.copy_(D**0.5 / norms)
    return made


def test_densities_and_examples_in_loops(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
    ids = [5, 0, 17, 9]
    path = export_features(crosscoder, acts, tmp_path / "deep" / "f.json", features=ids, n_examples=3, window=2)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["format", "crosscoder", "data", "snapshots", "features"]
    assert found["format"] == "crosslens-features/1" and list(path.parent.iterdir()) == [path]
    assert found["snapshots"] == [{"label": f"step{n}", "step": n, "tokens": None} for n in (0, 10, 20)]
    assert found["data"]["tokens"] == len(torch.cat(list(acts.held_out())))
    assert [row["feature"] for row in found["features"]] == ids
    tokens = acts.held_out_tokens()
    first = len(acts.tokens) - len(tokens)
    values = crosscoder.encode(acts.block(first, len(acts.tokens)))
    names = acts.snapshots.tokenizer.convert_ids_to_tokens
    for row in found["features"]:
        i = row["feature"]
        fired, total, best = [0] * S, 0, {}
        for n in range(len(tokens)):
            for t in range(tokens.shape[1]):
                if tokens[n, t] == 0:
                    continue
                total += 1
                value = float(values[n, t, i])
                for s in range(S):
                    fired[s] += bool(crosscoder.snapshot_acts(values[n, t], s)[i] != 0)
                if value > best.get(n, (0.0, 0))[0]:
                    best[n] = (value, t)
        assert row["density"] == pytest.approx([count / total for count in fired], abs=1e-5)
        assert row["decoder_norm"] == pytest.approx(crosscoder.decoder_norms[i].tolist(), abs=1e-4)
        ranked = sorted(best.items(), key=lambda item: -item[1][0])[:3]
        assert row["max_activation"] == pytest.approx(ranked[0][1][0] if ranked else 0.0, abs=1e-4)
        assert [example["sequence"] for example in row["examples"]] == [n for n, _ in ranked]
        for example, (n, (value, t)) in zip(row["examples"], ranked, strict=True):
            assert example["position"] == t and example["activations"][example["peak"]] == pytest.approx(
                value, abs=1e-4
            )
            begin, end = max(0, t - 2), min(tokens.shape[1], t + 3)
            assert example["tokens"] == [names(int(token)) for token in tokens[n, begin:end]]
            assert len(example["activations"]) == end - begin
    assert any(len(set(row["density"])) > 1 for row in found["features"])


def test_the_logit_lens_is_what_the_model_adds(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
    """On top of a residual whose norm the row hardly changes, the model's own final norm and unembedding agree."""
    model: Any = acts.snapshots.model(2)
    residual = 100 * torch.randn(1, 1, D, generator=torch.Generator().manual_seed(0))
    scale = residual.std(unbiased=False)
    for i in (3, 11):
        row = crosscoder.W_dec_by_snapshot[i, 2] / crosscoder.activation_scale[2]
        row = row - (row @ (residual[0, 0] - residual.mean())) * (residual[0, 0] - residual.mean()) / (D * scale**2)
        added = [model.unembed(model.ln_final(residual + step * row))[0, 0] for step in (1e-1, -1e-1)]
        slope = (added[0] - added[1]) / 0.2 * scale
        lens = direct_logits(model, row[None])[0]
        torch.testing.assert_close(lens, slope - slope.mean(), rtol=1e-2, atol=1e-2)
    path = export_features(crosscoder, acts, tmp_path / "f.json", features=[3], n_logits=4)
    [row] = json.loads(path.read_text(encoding="utf-8"))["features"]
    names = acts.snapshots.tokenizer.convert_ids_to_tokens
    for s, lens in enumerate(row["logit_lens"]):
        raw = crosscoder.W_dec_by_snapshot[3, s] / crosscoder.activation_scale[s]
        logits = direct_logits(acts.snapshots.model(s), raw[None])[0]
        order = logits.argsort(descending=True).tolist()
        assert [word for word, _ in lens["positive"]] == [names(t) for t in order[:4]]
        assert [word for word, _ in lens["negative"]] == [names(t) for t in order[::-1][:4]]
        assert [value for _, value in lens["positive"]] == pytest.approx(logits[order[:4]].tolist(), abs=1e-4)


def test_mistakes(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"feature 24 is not in \[0, 23\]"):
        export_features(crosscoder, acts, tmp_path / "f.json", features=[1, 24])
    with pytest.raises(UserError, match="window=-1 must be 0 or more"):
        export_features(crosscoder, acts, tmp_path / "f.json", window=-1)
    two = Activations(acts.snapshots[:2], acts.hook_name, acts.dataset, 500, 16)
    with pytest.raises(UserError, match="trained on 3 snapshots, 2 are given"):
        export_features(crosscoder, two, tmp_path / "f.json")
    assert not list(tmp_path.iterdir())
