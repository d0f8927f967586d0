"""Traces against `attribute`, and against plain transformers, one prompt and snapshot at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import crosslens as cl
from crosslens.causal.tracing import Trace, trace
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.items import Item
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, Slow, make_crosscoder

PAIRS = [(item["prefix"], item["patch_prefix"]) for item in ITEMS]


@pytest.fixture(scope="module", params=["batchtopk_crosscoder", "jumprelu_crosscoder"])
def crosscoder(request: pytest.FixtureRequest, snaps: Snapshots) -> Crosscoder:
    return make_crosscoder(snaps, request.param)


def effects(found: Trace, prompt: int) -> torch.Tensor:
    """(F, S)."""
    rows = found.features[found.features["prompt"] == prompt]
    made = torch.zeros(F, len(found.labels), dtype=torch.float64)
    made[rows["feature"].tolist(), rows["snapshot"].tolist()] = torch.tensor(rows["effect"].tolist(), dtype=made.dtype)
    return made


@pytest.mark.filterwarnings("ignore:the 1 prompts of")
def test_effects_and_metrics_are_those_of_attribute(crosscoder: Crosscoder, snaps: Snapshots) -> None:
    single = [Item(item["prefix"], item["correct"], item["wrong"]) for item in ITEMS]
    paired = [
        Item(one.prefix, one.correct, one.wrong, item["patch_prefix"]) for one, item in zip(single, ITEMS, strict=True)
    ]
    found = trace(crosscoder, snaps, [*single, *paired])  # of several lengths, with and without a pair
    for i, item in enumerate([*single, *paired]):
        expected = cl.attribute(crosscoder, snaps, Task.from_items("one", [item]), positions=True)
        assert (effects(found, i) - expected.effects).abs().max() < 1e-6
        assert expected.effects.abs().max() > 1e-3
        rows = found.prompts[found.prompts["prompt"] == i]
        for column, values in (("metric", expected.metric_clean), ("metric_baseline", expected.metric_baseline)):
            assert np.abs(rows[column] - values.numpy()).max() < 1e-6
        if item.patch_prefix is not None:
            assert np.abs(rows["paired_metric"] - expected.metric_baseline.numpy()).max() < 1e-5
        # by position
        tokens = found.tokens[(found.tokens["prompt"] == i) & (found.tokens["effect"] != 0)]
        words = expected.prompt(0).merge(tokens, on=["snapshot", "position", "feature"], suffixes=("", "_traced"))
        assert len(words) == len(expected.prompt(0)) == len(tokens)
        assert (words["effect"] - words["effect_traced"]).abs().max() < 1e-6
        assert (words["token"] == words["token_traced"]).all()


@torch.no_grad()
def test_predictions_and_activations_are_those_of_plain_transformers(crosscoder: Crosscoder, snaps: Snapshots) -> None:
    found = trace(crosscoder, snaps, [item["prefix"] for item in ITEMS], ("likes", "sees"))
    vocabulary = snaps.tokenizer.get_vocab()
    for i, item in enumerate(ITEMS):
        slow = Slow(snaps, crosscoder, item)
        for s, model in enumerate(slow.models):
            logits = model(slow.tokens).logits[0, -1].double()
            values, tokens = logits.softmax(-1).topk(5)
            rows = found.predictions[(found.predictions["prompt"] == i) & (found.predictions["snapshot"] == s)]
            assert rows["token"].tolist() == [snaps.tokenizer.decode([token]) for token in tokens]
            assert np.abs(rows["probability"] - values.numpy()).max() < 1e-6
            row = found.prompts[(found.prompts["prompt"] == i) & (found.prompts["snapshot"] == s)].iloc[0]
            assert row["metric"] == pytest.approx(
                float(logits[vocabulary["likes"]] - logits[vocabulary["sees"]]), abs=1e-5
            )
            assert row["wrong_probability"] == pytest.approx(float(logits.softmax(-1)[vocabulary["sees"]]), abs=1e-6)
            fired = found.tokens[(found.tokens["prompt"] == i) & (found.tokens["snapshot"] == s)]
            wide = torch.zeros_like(slow.f[s])
            wide[fired["position"].tolist(), fired["feature"].tolist()] = torch.tensor(fired["activation"].tolist())
            assert (wide - slow.f[s]).abs().max() < 1e-5


@torch.no_grad()
def test_answers_that_are_not_given_are_what_the_last_model_says(crosscoder: Crosscoder, snaps: Snapshots) -> None:
    pairs = [*PAIRS, ("cat sees", "fish near")]  # which the last model continues differently
    differ: list[bool] = []
    found = trace(crosscoder, snaps, [*(text for text, _ in pairs), *pairs])
    for i, (text, other) in enumerate(pairs):
        logits = [
            Slow(snaps, crosscoder, {**ITEMS[0], "prefix": one})
            .models[-1](torch.tensor([[0, *snaps.tokenizer(one)["input_ids"]]]))
            .logits[0, -1]
            for one in (text, other)
        ]
        first, second = logits[0].topk(2).indices.tolist()
        row = found.prompts[found.prompts["prompt"] == i].iloc[0]
        assert [row["correct"], row["wrong"], row["given"]] == [
            *map(snaps.tokenizer.decode, ([first], [second])),
            False,
        ]
        then = int(logits[1].argmax())
        row = found.prompts[found.prompts["prompt"] == i + len(pairs)].iloc[0]
        differ.append(then != first)
        expected = [first, second if then == first else then]
        assert [row["correct"], row["wrong"]] == [snaps.tokenizer.decode([token]) for token in expected]
        assert row["paired"] == other and pd.isna(found.prompts["paired"].iloc[0])
    assert any(differ) and not all(differ)


def test_a_feature_matters_from_a_tenth_of_its_largest_effect(crosscoder: Crosscoder, snaps: Snapshots) -> None:
    lifecycles: Any = pd.DataFrame({"feature": range(F), "measure": "r2", "birth": pd.array([1] * F, dtype="Int64")})
    share = torch.rand(F, 3, generator=torch.Generator().manual_seed(0))
    found = trace(crosscoder, snaps, "the cat", ("sees", "likes"), lifecycles=lifecycles, encoder_share=share)
    assert (found.features["readable"] == 1).all()
    for row in found.features.to_dict("records"):
        size = effects(found, 0)[row["feature"]].abs().tolist()
        large = [each >= 0.1 * max(size) > 0 for each in size]
        first = next((s for s in range(3) if all(large[s : s + 2]) or (s == 0 and large[0])), None)
        assert (None if pd.isna(row["matters"]) else row["matters"]) == first
        later = float(share[row["feature"], row["snapshot"] + 1 :].sum())
        assert row["read_later"] == pytest.approx(later, abs=1e-6) and row["mostly_later"] == (row["read_later"] > 0.5)
    top = found.top(n=5)
    assert len(top) == 5 and top["matters"].is_monotonic_increasing
    sizes = effects(found, 0).abs().amax(1)
    assert set(top["feature"]) == set(sizes.topk(5).indices.tolist())
    assert "nothing here is significant" in found._repr_html_()


@pytest.mark.parametrize(
    ("prompts", "answers", "words"),
    [
        ([], None, "no prompts are given"),
        ("", None, "is empty"),
        ("the cat", ("sees", ""), "two texts"),
        ("the cat", ("sees", "sees"), "the answers are the same tokens"),
        ("the cat " * 20, None, "longer than 32 tokens"),
        ([("the cat", "the cat sees")], None, "has 3 and 4 tokens"),
        ([("the cat", "the cat sees")], ("sees", "likes"), "a different number of tokens"),
    ],
)
def test_prompts_are_refused(snaps: Snapshots, prompts: Any, answers: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        trace(make_crosscoder(snaps, "topk_crosscoder"), snaps, prompts, answers)
