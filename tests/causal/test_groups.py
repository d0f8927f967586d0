"""Standard errors, p-values and replicates over groups of prompts, against loops, and their rate of false effects."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from crosslens.causal.attribution import Estimator, attribute, clustered_error
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import sign_flip_p
from crosslens.tasks.items import Item, groups
from crosslens.tasks.task import Task
from tests.plain_model import make_crosscoder

NOUNS = ("cat", "dog", "king", "child")
ITEMS = [
    {"prefix": prefix, "correct": "sees", "wrong": "likes", "group": a}
    for a, b in itertools.product(NOUNS, NOUNS)
    for prefix in (f"the {a} near the {b}", f"{a} {b}", f"the {b} sees a {a} near a {b}")
]


def slow_error(x: list[float], group: list[int]) -> float:
    """Standard error of a mean over groups, term by term."""
    mean, residuals = sum(x) / len(x), defaultdict(float)
    for value, g in zip(x, group, strict=True):
        residuals[g] += value - mean
    G = len(residuals)
    return math.sqrt(G / (G - 1) * sum(r * r for r in residuals.values())) / len(x)


@pytest.mark.parametrize(("N", "G", "seed"), [(6, 6, 0), (40, 7, 1), (90, 30, 2)])
def test_clustered_errors_against_loops(N: int, G: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.concatenate([np.arange(G), rng.integers(0, G, N - G)]))
    x = rng.normal(1, 1, (N, 3)) + rng.normal(0, 1, (G, 3))[group]
    sums = torch.zeros(G, 3, dtype=torch.float64).index_add_(0, torch.from_numpy(group), torch.from_numpy(x))
    found = clustered_error(sums, torch.from_numpy(np.bincount(group)).double())
    assert found.tolist() == pytest.approx([slow_error(x[:, i].tolist(), group.tolist()) for i in range(3)])
    if N == G:
        assert found.tolist() == pytest.approx((x.std(0, ddof=1) / math.sqrt(N)).tolist())
    assert clustered_error(sums.sum(0, keepdim=True), torch.tensor([float(N)])).isnan().all()


def test_effects_over_groups_against_loops(snaps: Snapshots) -> None:
    """The same prompts, once with the noun's group and once each its own: equal effects, other errors."""
    cc = make_crosscoder(snaps, "standard_crosscoder")
    some = ITEMS[:-5]  # groups of different sizes
    runs = PromptRuns(cc, snaps, Task.from_items("some", some), batch_size=7, paired=False)
    order = torch.cat([batch.index for batch in runs.batches]).tolist()
    assert runs.groups.tolist() == groups([Item(**some[i]) for i in order])
    how = Estimator("ig", n_nodes=2)
    with pytest.warns(UserWarning, match="43 prompts of 'some' are of 4 groups.*fewer than 20"):
        found = attribute(runs, how, n_bootstrap=50, seed=3)
    assert found.n_groups == 4 and set(found.snapshot_frame()["n_groups"]) == {4}
    each = []  # effects of single prompts
    for i in order:
        one = Task.from_items("one", [some[i]])
        each.append(attribute(cc, snaps, one, how, baseline="zero").effects[:, 2].double())
    group, x = runs.groups.tolist(), torch.stack(each)
    torch.testing.assert_close(found.effects[:, 2].double(), x.mean(0), rtol=1e-4, atol=1e-6)
    sums = [[sum(x[n, i] for n in range(len(x)) if group[n] == g) for g in range(4)] for i in range(x.shape[1])]
    for i in range(x.shape[1]):
        expected = slow_error(x[:, i].tolist(), group)
        assert float(found.standard_errors[i, 2]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
        p = sign_flip_p(np.asarray(float(sum(sums[i]))), np.asarray(float(sum(v * v for v in sums[i]))))
        assert float(found.p[i, 2]) == pytest.approx(float(p), rel=1e-3)
    kept = found.bootstrap
    assert kept is not None
    counts = np.random.default_rng(3).multinomial(4, [1 / 4] * 4, size=50)
    for r in (0, 17, 49):
        drawn = [n for g in range(4) for _ in range(counts[r, g]) for n in range(len(x)) if group[n] == g]
        expected = x[drawn].mean(0)[kept.features]
        torch.testing.assert_close(kept.effects[r, :, 2].double(), expected, rtol=1e-3, atol=1e-6)


def test_groups_of_items() -> None:
    pair = "a", "b"
    items = [
        Item("x", *pair, "y"),
        Item("y", *pair, "x"),  # the same pair
        Item("x", "c", "d", "y"),  # other answers after it
        Item("z", *pair),
        Item("u", *pair, group="noun"),
        Item("v", *pair, group="noun"),
    ]
    assert groups(items) == [0, 0, 0, 1, 2, 2]


def shuffled(N: int, G: int, F: int, S: int, by_group: bool, rng: np.random.Generator) -> np.ndarray:
    """Effects (N, F, S) of a task whose answers are swapped at random, prompt by prompt or a group at a time.

    Swapping the answers of a prompt turns the sign of the metric, and with it that of every effect.
    """
    group = np.arange(N) % G
    of_group = rng.normal(0, 1, (G, F, S)) + rng.normal(1, 1, (F, S))
    x = of_group[group] + rng.normal(0, 0.5, (N, F, S))
    flips = rng.choice([-1, 1], G)[group] if by_group else rng.choice([-1, 1], N)
    return x * flips[:, None, None]


@pytest.mark.parametrize("by_group", [True, False])
@pytest.mark.parametrize(("N", "G", "S"), [(60, 10, 2), (120, 30, 9)])
def test_few_effects_are_significant_where_answers_are_shuffled(N: int, G: int, S: int, by_group: bool) -> None:
    rate = {"groups": [], "prompts": []}
    for seed in range(40):
        x = shuffled(N, G, 20, S, by_group, np.random.default_rng(seed))
        sums = np.stack([x[np.arange(N) % G == g].sum(0) for g in range(G)])
        for unit, each in (("groups", sums), ("prompts", x)):
            rate[unit].append(sign_flip_p(each.sum(0), (each**2).sum(0)) <= 0.05)
    assert np.mean(rate["groups"]) <= 0.05
    assert not by_group or np.mean(rate["prompts"]) > 0.1  # what groups are for
