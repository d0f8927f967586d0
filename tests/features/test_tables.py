"""Feature tables and JSON against plain loops over tokens, and the logit lens against the model itself."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    PreTrainedTokenizerFast,
)

from crosslens.activations.loader import Activations, DatasetActivations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.held_out import batch_tokens
from crosslens.features.activations import ActivationSample
from crosslens.features.examples import collect_examples
from crosslens.features.tables import direct_logits, export_features, feature_tables, nearest_features, token_texts
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from tests.intervention.test_view import make_crosscoder
from tests.snapshots.test_family_models import write_tokenizer

F, S, D = 24, 3, 16


@pytest.fixture(scope="module")
def acts(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    snapshots = Snapshots.local(tiny_snapshots)
    return Activations(snapshots, "blocks.1.hook_resid_post", Dataset(tiny_text, 600, 16, 300))


@pytest.fixture(scope="module")
def crosscoder(acts: Activations) -> Crosscoder:
    made = make_crosscoder("jumprelu_crosscoder")
    norms = torch.cat(list(acts.held_out())).norm(dim=-1).mean(0)
    made.activation_scale.copy_(D**0.5 / norms)
    return made


def test_densities_and_examples_match_plain_loops(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
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
    tokenizer = acts.snapshots.tokenizer
    texts = token_texts(tokenizer, range(len(tokenizer)))
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
            assert example["tokens"] == [texts[int(token)] for token in tokens[n, begin:end]]
            assert len(example["activations"]) == end - begin
    assert any(len(set(row["density"])) > 1 for row in found["features"])


def test_the_exported_lens_is_that_of_the_rows(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
    path = export_features(crosscoder, acts, tmp_path / "f.json", features=[3], n_logits=4)
    [row] = json.loads(path.read_text(encoding="utf-8"))["features"]
    tokenizer = acts.snapshots.tokenizer
    texts = token_texts(tokenizer, range(len(tokenizer)))
    for s, lens in enumerate(row["logit_lens"]):
        raw = crosscoder.W_dec_by_snapshot[3, s] / crosscoder.activation_scale[s]
        logits = direct_logits(acts.snapshots.model(s), raw[None])[0]
        order = logits.argsort(descending=True).tolist()
        assert [word for word, _ in lens["positive"]] == [texts[int(t)] for t in order[:4]]
        assert [word for word, _ in lens["negative"]] == [texts[int(t)] for t in order[::-1][:4]]
        assert [value for _, value in lens["positive"]] == pytest.approx(logits[order[:4]].tolist(), abs=1e-4)


SIZES = {"vocab_size": 20, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": D}
LLAMA = {**SIZES, "intermediate_size": 32, "pad_token_id": 0}
FAMILIES = {
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=32),
    "bloom": BloomConfig(vocab_size=20, n_head=2, n_layer=2, hidden_size=D),
    "olmo": OlmoConfig(**LLAMA),
    "olmo2": Olmo2Config(**LLAMA),
    "llama": LlamaConfig(**LLAMA),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_lens_matches_the_model(tmp_path: Path, family: str) -> None:
    """Where the row hardly changes the residual's norm. Final norms have a bias, no gain, or no mean."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in (0, 1):
            made = AutoModelForCausalLM.from_config(FAMILIES[family])
            for parameter in made.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            made.save_pretrained(tmp_path / f"step{step}")
        residual, row = 100 * torch.randn(1, 1, D), torch.randn(D)
    write_tokenizer(tmp_path / "tokenizer")
    model: Any = Snapshots.local(tmp_path).model(1)
    centred = residual[0, 0] - (0 if "RMS" in str(model.cfg.normalization_type) else residual.mean())
    scale = centred.square().mean().sqrt()
    row = row - (row @ centred) * centred / centred.square().sum()
    with torch.no_grad():
        added = [model.unembed(model.ln_final(residual + step * row))[0, 0] for step in (1e-1, -1e-1)]
        slope = (added[0] - added[1]) / 0.2 * scale
        torch.testing.assert_close(direct_logits(model, row[None])[0], slope - slope.mean(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("architecture", ["jumprelu_crosscoder", "batchtopk_crosscoder"])
def test_tables_match_plain_loops(acts: Activations, architecture: str) -> None:
    cc = make_crosscoder(architecture)
    cc.cfg.metadata.snapshots = [{"label": s.label, "step": s.step, "tokens": s.tokens} for s in acts.snapshots]
    tables = feature_tables(cc, acts, n_examples=4, window=3, n_logits=2, n_nearest=3, n_samples=5, context=6)
    assert list(tables) == [
        "examples", "example_tokens", "example_contexts", "samples", "sample_tokens", "activations", "passages",
        "held_out_tokens", "lens", "nearest",
    ]  # fmt: skip
    tokens = acts.held_out_tokens()
    x = acts.block(len(acts.tokens) - len(tokens), len(acts.tokens))
    values = cc.encode(x)
    keep = acts.keep(tokens)
    scaled, W = cc.scale(x).double(), cc.W_enc_by_snapshot.double()
    texts = token_texts(acts.snapshots.tokenizer, range(len(acts.snapshots.tokenizer)))
    examples, around = tables["examples"], tables["example_tokens"]
    for i in range(F):
        best: list[tuple[float, int, int]] = []
        for n in range(len(tokens)):
            strongest = max(range(tokens.shape[1]), key=lambda t: float(values[n, t, i]) if keep[n, t] else -1.0)
            if float(values[n, strongest, i]) > 0 and keep[n, strongest]:
                best.append((float(values[n, strongest, i]), n, strongest))
        best = sorted(best, key=lambda one: -one[0])[:4]
        rows = examples[examples["feature"] == i]
        assert rows["rank"].tolist() == list(range(len(best)))
        for (value, n, t), row in zip(best, rows.to_dict("records"), strict=True):
            assert (row["sequence"], row["position"]) == (n, t) and row["activation"] == pytest.approx(value, rel=1e-5)
            expected = float(cc.threshold[i]) if "jumprelu" in architecture else 0.0  # pyright: ignore
            assert row["threshold"] == pytest.approx(expected)
            for s in range(S):
                usual = torch.stack([scaled[m, u, s] @ W[s, :, i] for m in range(len(x)) for u in range(x.shape[1])
                                     if keep[m, u]]).mean()  # fmt: skip
                read = float(scaled[n, t, s] @ W[s, :, i] - usual)
                assert row[f"read/step{10 * s}"] == pytest.approx(read, abs=1e-4)
            part = around[(around["feature"] == i) & (around["rank"] == row["rank"])]
            places = list(range(max(0, t - 3), min(tokens.shape[1], t + 4)))
            assert part["position"].tolist() == places
            assert part["token"].tolist() == [texts[int(tokens[n, u])] for u in places]
            shown = [float(values[n, u, i]) if keep[n, u] else 0.0 for u in places]
            assert part["activation"].tolist() == pytest.approx(shown, rel=1e-5)
            far = tables["example_contexts"].query(f"feature == {i} and rank == {row['rank']}")
            away = [u for u in range(max(0, t - 6), min(tokens.shape[1], t + 7)) if abs(u - t) > 3]
            assert far["position"].tolist() == away
            assert far["token"].tolist() == [texts[int(tokens[n, u])] for u in away]
        if len(best) == 4 and i > 3:
            break  # plain loops are slow
    assert isinstance(around["token"].dtype, pd.CategoricalDtype)
    lens = tables["lens"]
    for i, s in ((0, 0), (5, 2), (23, 1)):
        raw = cc.W_dec_by_snapshot[i, s] / cc.activation_scale[s]
        logits = direct_logits(acts.snapshots.model(s), raw[None])[0]
        order = logits.argsort(descending=True).tolist()
        part = lens[(lens["feature"] == i) & (lens["snapshot"] == s)]
        assert part["rank"].tolist() == [0, 1]
        assert part["promoted"].tolist() == [texts[t] for t in order[:2]]
        assert part["suppressed"].tolist() == [texts[t] for t in order[::-1][:2]]
        assert part["promoted_logit"].tolist() == pytest.approx(logits[order[:2]].tolist(), abs=1e-4)
        assert part["suppressed_logit"].tolist() == pytest.approx(logits[order[::-1][:2]].tolist(), abs=1e-4)


@pytest.mark.parametrize("size", [3, 40])
def test_samples_and_histograms_match_plain_loops(size: int) -> None:
    """The sample does not depend on batches, holds the largest draws, and is uniform over active tokens."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(9, 11, 6, generator=generator).relu() * torch.rand(6, generator=generator)
    values[..., 2] = 0
    values[3] = 0
    found = ActivationSample(6, size, window=2, seed=1)
    for begin in range(0, 9, 2):
        found.add(values[begin : begin + 2], begin)
    whole = ActivationSample(6, size, window=2, seed=1)
    whole.add(values, 0)
    table, around = found.sample()
    pd.testing.assert_frame_equal(table, whole.sample()[0])
    merged, rest = (ActivationSample(6, size, window=2, seed=1) for _ in range(2))
    merged.add(values[:4], 0)
    rest.add(values[4:], 4)
    merged.merge(rest)
    pd.testing.assert_frame_equal(merged.sample()[0], table)
    pd.testing.assert_frame_equal(merged.histogram(), whole.histogram())
    np.testing.assert_array_equal(merged.sample()[1], around)
    histogram = found.histogram()
    pd.testing.assert_frame_equal(histogram, whole.histogram())
    drawn: dict[int, list[tuple[float, float, int, int]]] = {i: [] for i in range(6)}
    for n in range(9):
        numbers = np.random.default_rng([1, n]).random(int((values[n] > 0).sum())).tolist()
        for t in range(11):
            for i in range(6):
                if values[n, t, i] > 0:
                    drawn[i].append((numbers.pop(0), float(values[n, t, i]), n, t))
    for i in range(6):
        largest = sorted(sorted(drawn[i], reverse=True)[:size], key=lambda one: -one[1])
        rows = table[table["feature"] == i]
        assert rows["rank"].tolist() == list(range(len(largest)))
        assert list(zip(rows["activation"], rows["sequence"], rows["position"], strict=True)) == [
            (value, n, t) for _, value, n, t in largest
        ]
        for at, (_, _, n, t) in zip(rows.index, largest, strict=True):
            padded = torch.nn.functional.pad(values[n, :, i], (2, 2))
            assert around[at].tolist() == padded[t : t + 5].tolist()
        bins = histogram[histogram["feature"] == i]
        counts = Counter(math.floor(4 * math.log2(value)) for _, value, _, _ in drawn[i])
        assert dict(zip(bins["bin"], bins["count"], strict=True)) == counts


def test_nearest_features_match_plain_loops(crosscoder: Crosscoder) -> None:
    ids, cosines = nearest_features(crosscoder, 3)
    rows = crosscoder.W_dec.double()
    for i in range(F):
        exact = {j: float(rows[i] @ rows[j] / rows[i].norm() / rows[j].norm()) for j in range(F) if j != i}
        order = sorted(exact, key=lambda j: -exact[j])[:3]
        assert ids[i].tolist() == order and cosines[i].tolist() == pytest.approx([exact[j] for j in order], abs=1e-5)
    assert nearest_features(crosscoder, 99)[0].shape == (F, F - 1)


def test_examples_do_not_depend_on_the_blocks(
    acts: Activations, crosscoder: Crosscoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = torch.tensor([5, 0, 17, 9])
    whole, density, highest = collect_examples(crosscoder, acts, index, 4, 2)
    monkeypatch.setattr(DatasetActivations, "block_sequences", 3)
    monkeypatch.setattr("crosslens.features.examples.batch_tokens", lambda d_sae: batch_tokens(d_sae) and 33)
    monkeypatch.setattr("crosslens.features.examples._ENTRIES", 100)
    parts, density_, highest_ = collect_examples(crosscoder, acts, index, 4, 2)
    for name in ("values", "sequences", "positions", "activations", "read"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(density_, density)
    torch.testing.assert_close(highest_, highest)


@pytest.mark.parametrize(
    ("decoder", "texts"),
    [
        (decoders.ByteLevel(), {"\u0120the": " the", "the": "the", "\u010a": "\n", "\u00e2\u013d": "\u00e2\u013d"}),
        (decoders.Metaspace(), {"\u2581chat": " chat", "chat": "chat"}),
        (decoders.WordPiece(), {"the": " the", "##s": "##s"}),
        (None, {"the": " the", ".": " ."}),
    ],
)
def test_tokens_for_display(decoder: Any, texts: dict[str, str]) -> None:
    """Spaces stand before tokens whether tokenizers write them into tokens or between words."""
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(texts)}, unk_token="the"))
    if decoder is not None:
        tokenizer.decoder = decoder
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    assert list(token_texts(whole, range(len(texts))).values()) == list(texts.values())


def test_a_run_directory_keeps_the_tables(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    found = feature_tables(crosscoder, acts, n_examples=2, n_logits=3)
    run.save_tables(found)
    for name, table in found.items():
        kept = run.table(name)
        assert kept is not None
        pd.testing.assert_frame_equal(kept, table, check_categorical=False, check_dtype=False)
    with pytest.raises(UserError, match="n_nearest=-1 must be 0 or more"):
        feature_tables(crosscoder, acts, n_nearest=-1)
    nothing = feature_tables(crosscoder, acts, n_examples=0, n_logits=0, n_nearest=0, n_samples=0, n_passages=0)
    assert [name for name, table in nothing.items() if not table.empty] == ["activations"]


def test_mistakes(acts: Activations, crosscoder: Crosscoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"feature 24 is not in \[0, 23\]"):
        export_features(crosscoder, acts, tmp_path / "f.json", features=[1, 24])
    with pytest.raises(UserError, match="window=-1 must be 0 or more"):
        export_features(crosscoder, acts, tmp_path / "f.json", window=-1)
    two = Activations(acts.snapshots[:2], acts.hook_name, acts.dataset.source, 500, 16)
    with pytest.raises(UserError, match="trained on 3 snapshots, but 2 were given"):
        export_features(crosscoder, two, tmp_path / "f.json")
    assert not list(tmp_path.iterdir())
