"""Overlap between languages on given effects, and chance against permutations."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from crosslens.causal.attribution import Attribution, Estimator
from crosslens.causal.languages import compare_languages, count_languages
from crosslens.errors import UserError

LANGUAGES = ("en", "fr", "de")


def of_effects(effects: Tensor, active: Tensor | None = None) -> Attribution:
    F, S = effects.shape
    zero = torch.zeros(S, dtype=torch.float64)
    return Attribution(
        task="given",
        labels=[f"step{s}" for s in range(S)],
        steps=list(range(S)),
        estimator=Estimator(),
        effects=effects.double(),
        standard_errors=torch.ones(F, S, dtype=torch.float64),
        error_effect=zero,
        metric_clean=zero,
        metric_baseline=zero,
        completeness=zero,
        active=torch.ones(F, S, dtype=torch.bool) if active is None else active,
        n_prompts=2,
    )


def drawn(F: int = 30, S: int = 3, seed: int = 0) -> dict[str, Attribution]:
    """Random effects; about two thirds of the features are active in each language, and some have no effect."""
    g = torch.Generator().manual_seed(seed)
    made: dict[str, Attribution] = {}
    for language in LANGUAGES:
        active = torch.rand(F, S, generator=g) < 0.7
        effects = torch.randn(F, S, generator=g) * active * (torch.rand(F, S, generator=g) < 0.9)
        made[language] = of_effects(effects, active)
    return made


def top(each: Attribution, s: int, k: int) -> set[int]:
    """The k active features with the largest effect, by sorting; those without effect are left out."""
    listed = [(abs(float(each.effects[i, s])), i) for i in range(len(each.effects)) if each.active[i, s]]
    return {i for size, i in sorted(listed, reverse=True)[:k] if size > 0}


@pytest.mark.parametrize("k", [1, 7, 14])
@pytest.mark.parametrize("seed", [0, 1])
def test_overlap_equals_set_operations(k: int, seed: int) -> None:
    effects = drawn(seed=seed)
    table = compare_languages(effects, k)
    assert len(table) == 3 * 3
    for row in table.itertuples():
        one, other, s = effects[str(row.language)], effects[str(row.other)], int(row.snapshot)
        a, b = top(one, s, k), top(other, s, k)
        assert (row.n, row.n_other, row.shared) == (len(a), len(b), len(a & b))
        assert row.same_sign == sum(float(one.effects[i, s] * other.effects[i, s]) > 0 for i in a & b)
        assert row.jaccard == pytest.approx(len(a & b) / len(a | b))
        both = {i for i in range(30) if one.active[i, s] and other.active[i, s]}
        assert row.candidates == len(both)
        assert (row.in_candidates, row.other_in_candidates) == (len(a & both), len(b & both))
        assert (row.label, row.step, row.k) == (f"step{s}", s, k)
    assert list(zip(table["language"], table["other"], strict=True))[:3] == [("en", "fr"), ("en", "de"), ("fr", "de")]


def test_chance_equals_permutations() -> None:
    """Permute the labels of the features that are active in both languages."""
    effects = {language: each for language, each in drawn(40, 1, seed=3).items() if language != "de"}
    en, fr = effects.values()
    k = 12
    (row,) = compare_languages(effects, k).itertuples()
    a, b = top(en, 0, k), top(fr, 0, k)
    both = [i for i in range(40) if en.active[i, 0] and fr.active[i, 0]]
    assert a - set(both) and b - set(both), "the test needs features of a single language"
    draw = random.Random(0)
    sizes: list[int] = []
    jaccards: list[float] = []
    for _ in range(20_000):
        renamed = dict(zip(both, draw.sample(both, len(both)), strict=True))
        moved = {renamed.get(i, i) for i in b}
        sizes.append(len(a & moved))
        jaccards.append(len(a & moved) / len(a | moved))
    n = len(sizes)
    assert row.expected == pytest.approx(sum(sizes) / n, abs=0.03)
    assert row.expected_jaccard == pytest.approx(sum(jaccards) / n, abs=0.003)
    assert row.p == pytest.approx(sum(size >= row.shared for size in sizes) / n, abs=0.012)
    for level in (0.3, 0.5, 0.9, 0.99):
        tails = [(1 - level) / 2, (1 + level) / 2]
        (found,) = compare_languages(effects, k, level=level).itertuples()
        assert [found.low, found.high] == np.quantile(sizes, tails, method="inverted_cdf").tolist()
        assert found.level == level
    assert 0.02 < row.p < 0.98


def test_the_number_of_languages_by_chance_equals_permutations() -> None:
    """Permute the set of every language among the features that are active in the same languages."""
    effects = drawn(40, 1, seed=5)
    k = 12
    table = count_languages(effects, k)
    sets = [top(each, 0, k) for each in effects.values()]
    strata: dict[tuple[bool, ...], list[int]] = {}
    for i in range(40):
        strata.setdefault(tuple(bool(each.active[i, 0]) for each in effects.values()), []).append(i)
    assert len(strata) > 5
    rng, n = np.random.default_rng(0), 20_000
    served = np.zeros((n, 40), dtype=int)  # languages of every feature in every draw
    for ids in sets:
        for members in strata.values():
            in_set = np.array([i in ids for i in members])
            served[:, members] += rng.permuted(np.tile(in_set, (n, 1)), axis=1)
    assert table["expected"].tolist() == pytest.approx([(served == m).sum() / n for m in (1, 2, 3)], abs=0.05)
    assert table["features"].tolist() == [sum(sum(i in c for c in sets) == m for i in range(40)) for m in (1, 2, 3)]
    assert table["share"].sum() == pytest.approx(1)
    assert (table["n_languages"] * table["expected"]).sum() == pytest.approx(sum(map(len, sets)))


def test_both_null_models_agree_for_two_languages() -> None:
    effects = {language: each for language, each in drawn(seed=2).items() if language != "fr"}
    overlap, counts = compare_languages(effects, 6), count_languages(effects, 6)
    two = counts[counts["n_languages"] == 2]
    assert two["features"].tolist() == overlap["shared"].tolist()
    assert two["expected"].tolist() == pytest.approx(overlap["expected"].tolist())


def test_shared_features_and_their_signs_are_found() -> None:
    """Ten of fifty features carry both languages, one with opposite signs: far beyond chance."""
    g = torch.Generator().manual_seed(1)
    strong = torch.zeros(50, 2)
    strong[:10, 1] = 10 + torch.rand(10, generator=g)
    en = of_effects(strong + torch.randn(50, 2, generator=g))
    strong[0] *= -1
    fr = of_effects(strong + torch.randn(50, 2, generator=g))
    before, after = compare_languages({"en": en, "fr": fr}, 10).itertuples()
    assert (after.shared, after.same_sign, after.jaccard) == (10, 9, 1.0) and after.p < 1e-9
    assert (after.expected, after.low, after.high) == (2.0, 0, 4) and before.p > 0.05
    helpful = compare_languages({"en": en, "fr": fr}, 5, by="signed")
    assert helpful["n"].tolist() == [5, 5] and helpful["same_sign"].equals(helpful["shared"])


def test_features_without_effect_are_in_no_set() -> None:
    en, fr = torch.zeros(6, 2), torch.zeros(6, 2)
    en[:2, 1] = fr[1:3, 1] = 1.0
    table = compare_languages({"en": of_effects(en), "fr": of_effects(fr)}, 4)
    assert table[["n", "n_other", "shared"]].to_numpy().tolist() == [[0, 0, 0], [2, 2, 1]]
    assert table["p"].tolist() == pytest.approx([1.0, 1 - 6 / 15])  # all but the draws of two among the other four
    assert table["jaccard"].isna().tolist() == [True, False] == table["expected_jaccard"].isna().tolist()
    assert count_languages({"en": of_effects(en), "fr": of_effects(fr)}, 4)["share"].isna().sum() == 2


def test_languages_without_a_common_active_feature() -> None:
    active = torch.tensor([[True], [True], [False], [False]])
    one, other = of_effects(torch.ones(4, 1) * active, active), of_effects(torch.ones(4, 1) * ~active, ~active)
    (row,) = compare_languages({"en": one, "fr": other}, 2).itertuples()
    assert (row.shared, row.candidates, row.expected, row.low, row.high, row.p, row.jaccard) == (0, 0, 0, 0, 0, 1, 0)


def test_errors_are_one_line() -> None:
    effects = drawn()
    with pytest.raises(UserError, match=r"effects of 1 language\(s\) are given: give those on the same task"):
        compare_languages({"en": effects["en"]})
    with pytest.raises(
        UserError, match=r"the effects in 'fr' cover 30 features at step0, step1, those in 'en' cover 30"
    ):
        count_languages({"en": effects["en"], "fr": drawn(S=2)["fr"]})
    with pytest.raises(UserError, match="attribute all with one crosscoder"):
        compare_languages({"en": effects["en"], "fr": drawn(F=31)["fr"]})
    with pytest.raises(UserError, match="k=31 is not in"):
        compare_languages(effects, 31)
    with pytest.raises(UserError, match="by='size' is unknown"):
        compare_languages(effects, 3, by="size")
    with pytest.raises(UserError, match="level=1 must be between 0 and 1"):
        compare_languages(effects, 3, level=1)
    unknown = {name: dataclasses.replace(each, steps=[None] * 3) for name, each in effects.items()}
    assert compare_languages(unknown, 3)["step"].isna().all()
