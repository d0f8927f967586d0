"""R2 on paired prompts: every definition in plain loops, and what it must not see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from crosslens.errors import UserError
from crosslens.evolution.births import interval_ends
from crosslens.evolution.concepts import _births, _by_group, _curves, _deal, _Sums, concept_births, predict
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import resample_counts
from crosslens.tasks.items import Item
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, Slow, make_crosscoder


def slow_predictions(x: np.ndarray, y: np.ndarray, fold: np.ndarray, ridge: float) -> np.ndarray:
    """Row by row, by the normal equations in full."""
    found = np.zeros_like(y)
    for i in range(len(x)):
        rows = [j for j in range(len(x)) if fold[j] != fold[i]]
        C = sum(np.outer(x[j], x[j]) for j in rows)
        c = sum(np.outer(x[j], y[j]) for j in rows)
        lam = ridge * np.trace(C) / x.shape[1]
        found[i] = x[i] @ np.linalg.solve(C + lam * np.eye(x.shape[1]), c)
    return found


@pytest.mark.parametrize(("n", "D", "A", "folds", "seed"), [(30, 4, 3, 5, 0), (12, 20, 2, 4, 1), (40, 7, 1, 16, 2)])
def test_predictions_are_those_of_the_normal_equations(n: int, D: int, A: int, folds: int, seed: int) -> None:
    """With more rows than dimensions, and with fewer."""
    rng = np.random.default_rng(seed)
    x, y, fold = rng.normal(size=(n, D)), rng.normal(size=(n, A)), rng.integers(folds, size=n)
    np.testing.assert_allclose(predict(x, y, fold, 0.01), slow_predictions(x, y, fold, 0.01), atol=1e-9)


def test_swapping_the_prompts_of_pairs_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    x, y, fold = rng.normal(size=(30, 6)), rng.normal(size=(30, 2)), np.arange(30) % 5
    sign = rng.choice([-1, 1], (30, 1))
    np.testing.assert_allclose(predict(sign * x, sign * y, fold, 0.01), sign * predict(x, y, fold, 0.01), atol=1e-12)


def test_without_a_difference_nothing_is_predicted() -> None:
    assert not predict(np.zeros((8, 3)), np.ones((8, 2)), np.arange(8) % 4, 0.01).any()


def test_every_group_is_in_one_fold() -> None:
    for G in (8, 16, 50):
        fold = _deal(G, 3)
        assert np.bincount(fold).tolist() == np.bincount(np.arange(G) % min(G, 16)).tolist()


def sums(r2: np.ndarray, G: int, per_group: int, seed: int, *, flip: bool = False) -> _Sums:
    """Sums of cross-fitted errors of planted differences.

    Features A have differences of +-1; at snapshot s the activation holds each with variance `r2[a, s]` of its own
    variance, in D = A + 4 dimensions. `flip` draws the signs of a group's differences anew.
    """
    rng = np.random.default_rng(seed)
    A, S = r2.shape
    group = np.repeat(np.arange(G), per_group)
    y = rng.choice([-1.0, 1.0], (len(group), A))
    fold, errors = _deal(G, seed)[group], []
    for s in range(S):
        x = np.concatenate([y * np.sqrt(r2[:, s]), np.zeros((len(y), 4))], 1)
        x = x + np.sqrt(np.concatenate([1 - r2[:, s], np.ones(4)])) * rng.normal(size=x.shape)
        seen = y * rng.choice([-1.0, 1.0], (G, A))[group] if flip else y
        errors.append(_by_group((seen - predict(x, seen, fold, 0.01)) ** 2, group, G))
    return _Sums(np.stack(errors, -1), _by_group(y**2, group, G))


def slow_r2(read: _Sums, a: int, s: int, counts: Any) -> float:
    """Of the groups, each as often as counted."""
    total = sum(n * read.total[g, a] for g, n in enumerate(counts))
    return 1 - sum(n * read.error[g, a, s] for g, n in enumerate(counts)) / total if total > 0 else 0.0


def slow_birth(curve: list[float], presence: float, min_run: int) -> int:
    S, highest = len(curve), max(curve)
    present = [highest > 0 and value >= presence * highest for value in curve]
    return next((s for s in range(S) if all(present[s : s + min_run]) or (s == 0 and present[0])), S)


def slow_q(p: list[float]) -> list[float]:
    """Benjamini and Hochberg: the least level at which a hypothesis is rejected."""
    order = sorted(p)
    return [min(order[k] * len(p) / (k + 1) for k in range(len(p)) if order[k] >= each) for each in p]


@pytest.mark.parametrize(
    ("G", "A", "S", "presence", "min_run", "seed"), [(8, 5, 6, 0.7, 2, 0), (19, 7, 4, 0.5, 1, 1), (12, 4, 9, 0.9, 3, 2)]
)
def test_births_are_those_of_plain_loops(G: int, A: int, S: int, presence: float, min_run: int, seed: int) -> None:
    """Every column, on curves that rise, fall and stay at 0."""
    rng = np.random.default_rng(seed)
    curves = rng.uniform(-0.3, 0.9, (A, S)) * (rng.random((A, S)) < 0.7)
    curves[0], curves[1] = -0.02, np.linspace(0, 0.9, S)
    total = rng.exponential(size=(G, A))
    total[:2, 2] = 0
    read = _Sums(total[..., None] * (1 - curves + 0.3 * rng.normal(size=(G, A, S))), total)
    draws = resample_counts(G, 60, seed)
    found, everything = _births(read, presence, min_run, 60, seed), [1] * G
    p: list[float] = []
    readable: list[float] = []
    for a in range(A):
        curve = [slow_r2(read, a, s, everything) for s in range(S)]
        row, peak = found.iloc[a], int(np.argmax(curve))
        assert row["r2"] == pytest.approx(max(curve)) and row["peak"] == peak
        saved = [read.total[g, a] - read.error[g, a, peak] for g in range(G)]
        readable.append(min(1.0, S * max(ttest_1samp(saved, 0, alternative="greater").pvalue, 2.0 ** (1 - G))))
        if max(curve) < 0.05:
            assert row[["birth", "birth_low", "birth_high"]].isna().all()
            p.append(1.0)
            continue
        assert row["birth"] == slow_birth(curve, presence, min_run)
        drawn = [[max(0.0, slow_r2(read, a, s, counts)) for s in range(S)] for counts in draws]
        births = sorted(slow_birth(one, presence, min_run) for one in drawn)
        for end, share in zip(("low", "high"), interval_ends(G), strict=True):
            assert row[f"birth_{end}"] == births[max(0, int(np.ceil(share * 60 - 1e-9)) - 1)]
        kept = [[slow_r2(read, a, s, [g != out for g in range(G)]) for s in range(S)] for out in range(G)]
        margins = [presence * max(one) - one[0] for one in kept]
        error = ((G - 1) / G * sum((m - np.mean(margins)) ** 2 for m in margins)) ** 0.5
        p.append(float(student.sf((presence * max(curve) - max(0, curve[0])) / error, G - 1)))
    assert found["readable_q"].tolist() == pytest.approx(slow_q(readable))
    assert found["q"].tolist() == pytest.approx(slow_q([max(pair) for pair in zip(p, readable, strict=True)]))
    ids = np.arange(A)
    dates = pd.DataFrame({"label": [str(s) for s in range(S)], "step": range(S)})
    table = _curves(read, ids, ids[::-1], dates, 60, seed).set_index(["feature", "snapshot"])
    for a, s in ((0, 0), (1, S - 1), (2, 1)):
        drawn = [slow_r2(read, a, s, counts) for counts in draws]
        expected = [slow_r2(read, a, s, everything), *np.quantile(drawn, interval_ends(G))]
        assert table.loc[(a, s), ["r2", "r2_low", "r2_high"]].tolist() == pytest.approx(expected)


def test_a_planted_concept_is_dated_where_it_begins() -> None:
    curves = np.zeros((6, 10))
    for a, start in enumerate((0, 2, 4, 6, 8)):
        curves[a, start:] = 0.9
    found = _births(sums(curves, 20, 20, 0), 0.5, 2, 200, 0)
    assert found["birth"].tolist()[:5] == [0, 2, 4, 6, 8]
    assert (found["birth_low"][:5] <= found["birth"][:5]).all() and (
        found["birth_high"][:5] >= found["birth"][:5]
    ).all()
    assert (found["q"][1:5] < 0.01).all() and found["q"][0] > 0.5 and found["q"][5] > 0.05
    assert (found["readable_q"][:5] < 0.01).all() and found["readable_q"][5] > 0.05


@pytest.mark.parametrize("G", [8, 20])
def test_differences_that_are_flipped_by_group_have_no_births(G: int) -> None:
    """And neither do features that no snapshot holds: at most the 5 % that q-values allow, here none of 40 draws."""
    curves = np.zeros((12, 8))
    curves[:6, 3:] = 0.9
    for seed in range(40):
        found = _births(sums(curves, G, 15, seed, flip=True), 0.5, 2, 50, seed)
        assert not ((found["q"] <= 0.05) & (found["birth"] > 0)).any()


def test_equal_snapshots_have_no_births() -> None:
    one = sums(np.full((5, 1), 0.8), 16, 20, 0)
    found = _births(_Sums(np.repeat(one.error, 6, 2), one.total), 0.5, 2, 100, 0)
    assert (found["birth"] == 0).all() and (found["q"] > 0.3).all()


@pytest.mark.parametrize("seed", range(5))
def test_differences_of_other_pairs_are_not_read(seed: int) -> None:
    """Each pair's features beside the activations of another pair: nothing is readable, let alone born."""
    rng = np.random.default_rng(seed)
    G, per_group, A, S, D = 16, 12, 10, 6, 12
    group = np.repeat(np.arange(G), per_group)
    y = rng.normal(size=(len(group), A))
    x = rng.normal(size=(S, len(group), D))
    x[3:, :, :A] += 3 * y
    y, fold = rng.permutation(y), _deal(G, seed)[group]
    error = np.stack([_by_group((y - predict(one, y, fold, 0.01)) ** 2, group, G) for one in x], -1)
    found = _births(_Sums(error, _by_group(y**2, group, G)), 0.7, 2, 50, seed)
    assert (found["readable_q"] > 0.05).all() and not ((found["birth"] > 0) & (found["q"] <= 0.05)).any()


def pairs(n_groups: int, n: int = 45) -> Task:
    """Paired prompts of the test model's words; some differ before their last token, and lengths differ."""
    nouns, ends = ("cat", "dog", "king", "child", "house", "bread"), ("", " sees the", " near the house")
    places = [(a, b, end) for a in nouns for b in nouns for end in ends if a < b]
    return Task.from_items(
        "pairs",
        [
            Item(f"the {a}{end}", "sees", "likes", f"the {b}{end}", group=str(i % n_groups))
            for i, (a, b, end) in enumerate(places[:n])
        ],
    )


@pytest.mark.parametrize(
    ("architecture", "everywhere"),
    [("standard_crosscoder", False), ("jumprelu_crosscoder", True), ("topk_crosscoder", True)],
)
def test_curves_are_those_of_plain_runs(snaps: Snapshots, architecture: str, everywhere: bool) -> None:
    cc, task = make_crosscoder(snaps, architecture), pairs(8)
    found = concept_births(cc, snaps, task, everywhere=everywhere, n_bootstrap=20)
    items: list[Any] = [
        {"prefix": i.prefix, "correct": "sees", "wrong": "likes", "patch_prefix": i.patch_prefix} for i in task.items
    ]
    rows: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    deal = _deal(8, 0)
    for n, item in enumerate(items):
        clean, patch = Slow(snaps, cc, item), Slow(snaps, cc, {**item, "prefix": item["patch_prefix"]})
        T = clean.tokens.shape[1]
        differ = [t for t in range(T) if clean.tokens[0, t] != patch.tokens[0, t]]
        for t in range(min(differ), T) if everywhere else [T - 1]:
            f, g = (torch.stack(run.f).amax(0)[t].double().numpy() for run in (clean, patch))
            rows.append((n % 8, (clean.acts - patch.acts)[t].double().numpy(), f, g))
    group = np.array([row[0] for row in rows])
    x, f, g = (np.stack([row[i] for row in rows]) for i in (1, 2, 3))
    df = f - g
    kept = [i for i in range(df.shape[1]) if len({h for h, d in zip(group, df[:, i], strict=True) if d != 0}) >= 8]
    assert sorted(found.births["feature"]) == kept and len(kept) > 2
    wide = found.curves.pivot(index="feature", columns="snapshot", values="r2")
    predicted = [slow_predictions(x[:, s], df[:, kept], deal[group], 0.01) for s in range(len(snaps))]
    for at, i in enumerate(kept):
        difference = (df[:, i] ** 2).sum() / ((f[:, i] ** 2).sum() + (g[:, i] ** 2).sum())
        row = found.births.set_index("feature").loc[i]
        assert row["difference"] == pytest.approx(difference, rel=1e-4)
        for s in range(len(snaps)):
            error = (df[:, i] - predicted[s][:, at]) ** 2
            assert wide.loc[i, s] == pytest.approx(1 - error.sum() / (df[:, i] ** 2).sum(), abs=2e-3)
        assert row["r2"] == pytest.approx(wide.loc[i].max())
        assert row["peak"] == int(np.argmax(wide.loc[i]))
    assert found.births["n_groups"].is_monotonic_decreasing
    assert (found.curves["r2_low"] <= found.curves["r2_high"]).all()
    assert found.curves["label"].tolist()[: len(snaps)] == list(snaps.labels)


def test_equal_models_have_no_births(snaps: Snapshots) -> None:
    """The last snapshot's activations in place of all; what is readable is so from the first on."""
    runs = PromptRuns(make_crosscoder(snaps, "batchtopk_crosscoder"), snaps, pairs(16), paired=True)
    for part in runs._clean.acts:
        part[:] = part[-1:].clone()
    found = concept_births(runs)
    wide = found.curves.pivot(index="feature", columns="snapshot", values="r2").to_numpy()
    np.testing.assert_allclose(wide, wide[:, :1].repeat(len(snaps), 1), atol=1e-9)
    known = found.births["birth"].dropna()
    assert len(known) and (known == 0).all()


def test_dates_have_steps_and_tokens(snaps: Snapshots) -> None:
    found = concept_births(make_crosscoder(snaps, "topk_crosscoder"), snaps, pairs(12), presence=0.1).births
    order = found[["n_groups", "difference"]]
    assert (
        order.equals(order.sort_values(["n_groups", "difference"], ascending=False)) and order["n_groups"].nunique() > 1
    )
    born = found[found["birth"].notna() & (found["birth"] < len(snaps))]
    assert len(born) and born["birth_step"].tolist() == [snaps.steps[int(s)] for s in born["birth"]]


def test_too_few_groups_are_refused_or_warned_about(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    with pytest.raises(UserError, match=r"of 7 groups.*45 prompts.*needs 8, and 16 to do it well"):
        concept_births(cc, snaps, pairs(7))
    with pytest.warns(UserWarning, match="fewer than 16"):
        concept_births(cc, snaps, pairs(15))


def test_what_cannot_be_dated_is_refused(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    single = Task.from_items("single", [{**item, "patch_prefix": None} for item in ITEMS])
    with pytest.raises(UserError, match="no paired prompts"):
        concept_births(cc, snaps, single)
    with pytest.raises(UserError, match="ridge=0"):
        concept_births(cc, snaps, pairs(16), ridge=0)
    with pytest.raises(UserError, match=r"presence=2"):
        concept_births(cc, snaps, pairs(16), presence=2)
    with pytest.raises(UserError, match="without paired prompts"):
        PromptRuns(cc, snaps, pairs(16), paired=False).differences()
    silent = make_crosscoder(snaps, "batchtopk_crosscoder")
    silent.threshold.fill_(1e9)
    with pytest.raises(UserError, match="no feature tells the pairs"):
        concept_births(silent, snaps, pairs(16))
