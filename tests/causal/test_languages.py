"""Overlap between languages on given effects, and chance against permutations."""

from __future__ import annotations

import dataclasses
import math
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
    """Given effects, of features with random sizes."""
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
        agreement=zero,
        sizes=torch.rand(F, S, generator=torch.Generator().manual_seed(F)) + 0.1,
        active=torch.ones(F, S, dtype=torch.bool) if active is None else active,
        n_prompts=2,
        n_groups=2,
        p=torch.ones(effects.shape),
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
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
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


def redraw(chosen: set[int], candidates: list[int], sizes: list[float], draw: random.Random) -> set[int]:
    """Replace each feature by one of the ten candidates nearest in log size, in random order, none twice."""
    found: set[int] = set()
    for i in draw.sample(sorted(chosen), len(chosen)):
        near = sorted(candidates, key=lambda j: abs(math.log(sizes[j]) - math.log(sizes[i])))
        found.add(draw.choice([j for j in near if j not in found][:10]))
    return found


@pytest.mark.exhaustive
def test_chance_equals_slow_draws_of_the_same_sizes() -> None:
    effects = {language: each for language, each in drawn(40, 1, seed=3).items() if language != "de"}
    en, fr = effects.values()
    k = 12
    a, b = top(en, 0, k), top(fr, 0, k)
    both = [i for i in range(40) if en.active[i, 0] and fr.active[i, 0]]
    assert a - set(both) and b - set(both), "the test needs features of a single language"
    draw = random.Random(0)
    overlaps: list[int] = []
    jaccards: list[float] = []
    for _ in range(3_000):
        one, other = (
            redraw(chosen & set(both), both, each.sizes[:, 0].tolist(), draw) for chosen, each in ((a, en), (b, fr))
        )
        overlaps.append(len(one & other))
        jaccards.append(overlaps[-1] / (len(a) + len(b) - overlaps[-1]))
    (row,) = compare_languages(effects, k, n_draws=3_000).itertuples()
    assert row.expected == pytest.approx(np.mean(overlaps), abs=0.1)
    assert row.expected_jaccard == pytest.approx(np.mean(jaccards), abs=0.01)
    assert row.p == pytest.approx(np.mean([size >= row.shared for size in overlaps]), abs=0.04)
    for level in (0.5, 0.9):
        (found,) = compare_languages(effects, k, level=level, n_draws=3_000).itertuples()
        expected = np.quantile(overlaps, [(1 - level) / 2, (1 + level) / 2])
        assert [found.expected_low, found.expected_high] == pytest.approx(expected, abs=1) and found.level == level
    assert 0.02 < row.p < 0.98 and row.n_draws == 3_000
    (again,) = compare_languages(effects, k, seed=1).itertuples()
    (same,) = compare_languages(effects, k, seed=1).itertuples()
    assert again == same


def test_features_that_are_large_in_both_languages_overlap_by_chance() -> None:
    """Sets are the largest features: beyond random draws, but what their sizes let expect."""
    sizes = torch.linspace(5, 0, 100).exp()[:, None]
    g = torch.Generator().manual_seed(0)
    effects = {name: of_effects(sizes * (0.5 + torch.rand(100, 1, generator=g))) for name in ("en", "fr")}
    effects = {name: dataclasses.replace(each, sizes=sizes) for name, each in effects.items()}
    (row,) = compare_languages(effects, 10).itertuples()
    assert row.expected > 3 and row.p > 0.01  # unmatched draws would share 10 * 10 / 100 = 1


@pytest.mark.exhaustive
def test_the_number_of_languages_by_chance_equals_slow_draws() -> None:
    effects = drawn(40, 1, seed=5)
    k = 12
    table = count_languages(effects, k, n_draws=3_000)
    sets = [top(each, 0, k) for each in effects.values()]
    pools = [each.active[:, 0].nonzero().flatten().tolist() for each in effects.values()]
    sizes = [each.sizes[:, 0].tolist() for each in effects.values()]
    draw, n = random.Random(0), 3_000
    served = np.zeros(4)
    for _ in range(n):
        redrawn = [redraw(*each, draw) for each in zip(sets, pools, sizes, strict=True)]
        for i in range(40):
            served[sum(i in each for each in redrawn)] += 1 / n
    assert table["expected"].tolist() == pytest.approx(served[1:].tolist(), abs=0.25)
    assert table["features"].tolist() == [sum(sum(i in c for c in sets) == m for i in range(40)) for m in (1, 2, 3)]
    assert table["share"].sum() == pytest.approx(1)
    assert (table["n_languages"] * table["expected"]).sum() == pytest.approx(sum(map(len, sets)))


def test_shared_features_and_their_signs_are_found() -> None:
    """Ten of fifty features carry both languages, one with opposite signs: far beyond chance."""
    g = torch.Generator().manual_seed(1)
    strong = torch.zeros(50, 2)
    strong[:10, 1] = 10 + torch.rand(10, generator=g)
    en = of_effects(strong + torch.randn(50, 2, generator=g))
    strong[0] *= -1
    fr = of_effects(strong + torch.randn(50, 2, generator=g))
    before, after = compare_languages({"en": en, "fr": fr}, 10).itertuples()
    assert (after.shared, after.same_sign, after.jaccard) == (10, 9, 1.0) and after.p < 0.005
    assert after.expected < 5 and before.p > 0.05
    helpful = compare_languages({"en": en, "fr": fr}, 5, by="signed")
    assert helpful["n"].tolist() == [5, 5] and helpful["same_sign"].equals(helpful["shared"])


def test_features_without_effect_are_in_no_set() -> None:
    en, fr = torch.zeros(6, 2), torch.zeros(6, 2)
    en[:2, 1] = fr[1:3, 1] = 1.0
    table = compare_languages({"en": of_effects(en), "fr": of_effects(fr)}, 4)
    assert table[["n", "n_other", "shared"]].to_numpy().tolist() == [[0, 0, 0], [2, 2, 1]]
    # any two of the six features in either language: all but the draws of two among the other four
    assert table["p"].tolist() == pytest.approx([1.0, 1 - 6 / 15], abs=0.08)
    assert table["jaccard"].isna().tolist() == [True, False] == table["expected_jaccard"].isna().tolist()
    assert count_languages({"en": of_effects(en), "fr": of_effects(fr)}, 4)["share"].isna().sum() == 2


def test_languages_without_a_common_active_feature() -> None:
    active = torch.tensor([[True], [True], [False], [False]])
    one, other = of_effects(torch.ones(4, 1) * active, active), of_effects(torch.ones(4, 1) * ~active, ~active)
    (row,) = compare_languages({"en": one, "fr": other}, 2).itertuples()
    assert (row.shared, row.candidates, row.expected, row.expected_low, row.expected_high, row.p, row.jaccard) == (
        0,
        0,
        0,
        0,
        0,
        1,
        0,
    )


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
