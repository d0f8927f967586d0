"""RelIE and related measures against plain loops, and the classes against the tables they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crosslens.causal.attribution import Bootstrap
from crosslens.causal.relative import (
    centre_of_mass,
    classes,
    classify,
    effect_interval,
    p_values,
    pairwise_relie,
    pairwise_shares,
    q_values,
    reldec,
    relie,
    relie_interval,
    share_relie,
    shares,
    sign_changes,
    signed_classes,
    significant,
    three_way_classes,
)
from crosslens.errors import UserError
from crosslens.stats import resample_counts, sign_flip_p, t_quantile


@dataclass
class Given:
    """Given effects of `n_groups` groups of prompts; every feature is active, standard errors are `se`."""

    effects: Tensor
    se: float = 0.5
    n_groups: int = 100
    bootstrap: Any = None
    errors: Tensor | None = None
    given_p: Tensor | None = None

    @property
    def labels(self) -> list[str]:
        return [f"s{i}" for i in range(self.effects.shape[1])]

    @property
    def standard_errors(self) -> Tensor:
        return torch.full_like(self.effects, self.se) if self.errors is None else self.errors

    @property
    def p(self) -> Tensor:
        """Of groups of one prompt each, of these means and standard errors."""
        if self.given_p is not None:
            return self.given_p
        G = self.n_groups
        squares = self.effects.double().square() / G + (G - 1) / G * self.standard_errors.double().nan_to_num().square()
        return torch.from_numpy(sign_flip_p(self.effects.double().numpy(), squares.numpy()))

    @property
    def active(self) -> Tensor:
        return torch.ones_like(self.effects, dtype=torch.bool)


def drawn(F: int, S: int, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    return Given(1.5 * torch.randn(F, S, generator=generator, dtype=torch.float64))


def of_prompts(x: np.ndarray, R: int = 0) -> Given:
    """Effects of prompts (N, F, S), each its own group, with replicates."""
    N = len(x)
    errors = torch.from_numpy(x.std(0, ddof=1) / math.sqrt(N))
    given = Given(torch.from_numpy(x.mean(0)), n_groups=N, errors=errors)
    if R:
        drawn = np.tensordot(resample_counts(N, R, 0) / N, x, 1)
        given.bootstrap = Bootstrap(torch.arange(x.shape[1]), torch.from_numpy(drawn), torch.zeros(R, x.shape[2]))
    return given


# ---------------------------------------------------------------------- significance
def tail(t: float) -> float:
    """P(Z >= t)."""
    return 0.5 * math.erfc(t / math.sqrt(2))


def adjusted(p: list[float]) -> list[float]:
    """q-values of Benjamini and Hochberg: the least p n / rank among those at least as large."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    q = [0.0] * len(p)
    least = 1.0
    for rank in range(len(p), 0, -1):
        i = order[rank - 1]
        least = min(least, p[i] * len(p) / rank)
        q[i] = least
    return q


def selected(p: list[list[float]], alpha: float) -> list[list[bool]]:
    """Benjamini and Bogomolov in steps: features by Simes, then snapshots within each at a stricter level."""
    simes = [min(sorted(row)[k] * len(row) / (k + 1) for k in range(len(row))) for row in p]
    kept = [q <= alpha for q in adjusted(simes)]
    level = alpha * sum(kept) / len(p)
    return [[keep and q <= level for q in adjusted(row)] for keep, row in zip(kept, p, strict=True)]


@pytest.mark.parametrize(("N", "F", "S", "seed"), [(2, 3, 2, 0), (9, 6, 3, 1), (60, 20, 5, 2)])
def test_significance_against_loops_over_prompts(N: int, F: int, S: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (N, F, S)) * (rng.random((N, F, S)) < 0.5) + rng.normal(0, 0.6, (F, S))
    given = of_prompts(x)
    expected = []
    for i in range(F):
        for s in range(S):
            r = abs(sum(x[:, i, s])) / math.sqrt(sum(v * v for v in x[:, i, s]))
            expected.append(min(1.0, 2 * tail(r) / (4 * tail(math.sqrt(2)))))
    assert p_values(given).flatten().tolist() == pytest.approx(expected, rel=1e-6)
    for fdr in (0.01, 0.05, 0.4):
        assert significant(given, fdr=fdr).tolist() == selected(p_values(given).tolist(), fdr)
        assert (q_values(given) <= fdr).tolist() == significant(given, fdr=fdr).tolist()
    assert significant(given, 0.3).tolist() == (given.effects.abs() > 0.3).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_p_values_bound_the_exact_test_that_flips_every_sign(seed: int) -> None:
    """All 2^N signs: the share of sums at least as large is never above the p-value, whatever the sizes."""
    rng = np.random.default_rng(seed)
    N = 10
    signs = 1 - 2 * ((np.arange(2**N)[:, None] >> np.arange(N)) & 1)
    x = np.stack([rng.normal(0.7, 1, (N, 4)), rng.exponential(1, (N, 4)), rng.random((N, 4)) < 0.4], -1)
    given = of_prompts(x)
    sums = np.abs(np.einsum("rn,nfs->rfs", signs, x))
    exact = (sums >= np.abs(x.sum(0)) - 1e-9).mean(0)
    p = p_values(given).numpy()
    assert (p >= exact - 1e-9).all() and (p < 0.1).any()


def test_few_shuffled_effects_and_most_planted_ones_are_significant() -> None:
    """Effects of 120 prompts: at 1,800 features and snapshots, dense or on a few prompts, a fifth of them planted."""
    rng = np.random.default_rng(0)
    N, F, S = 120, 200, 9
    on = rng.random((N, F, S)) < rng.choice([0.05, 0.3, 1.0], F)[:, None]
    sizes = rng.exponential(1, (N, F, S)) * on
    null = sizes * rng.choice([-1, 1], (N, F, S))
    assert significant(of_prompts(null)).double().mean() <= 0.05
    planted = rng.random((F, S)) < 0.2
    x = np.where(planted, rng.normal(0.6, 1, (N, F, S)), null)
    found = significant(of_prompts(x)).numpy()
    assert found[planted].mean() >= 0.9
    assert found[~planted].sum() <= 0.05 * found.sum()


def test_a_feature_on_two_prompts_is_not_significant_and_nor_is_one_prompt() -> None:
    """By chance, three equal effects have one sign in every fourth case."""
    x = np.zeros((40, 1, 2))
    x[:3, 0, 0], x[:, 0, 1] = 1.0, 1.0
    given = of_prompts(x)
    assert significant(given).tolist() == [[False, True]]
    one = Given(torch.tensor([[3.0, 1.0]]), se=math.nan, n_groups=1)
    assert p_values(one).tolist() == [[1, 1]] and relie(one).isnan().all()
    assert relie(one, 0.5).tolist() == [[0.75, 0.25]]
    for wrong, message in (({"fdr": 5}, "fdr=5 must be between 0 and 1"), ({"min_effect": -1}, "min_effect=-1 must")):
        with pytest.raises(UserError, match=message):
            significant(given, **wrong)


# ---------------------------------------------------------------------- relative effects
SHAPES = [(1, 2, 0), (40, 2, 1), (40, 3, 2), (25, 7, 3)]


@pytest.mark.parametrize("min_effect", [None, 0.7])
@pytest.mark.parametrize(("F", "S", "seed"), SHAPES)
def test_relie_against_loops(F: int, S: int, seed: int, min_effect: float | None) -> None:
    given = drawn(F, S, seed)
    found, of_shares = relie(given, min_effect), share_relie(given, min_effect)
    pairs, share_pairs = (pairwise_relie(given, min_effect, share=share) for share in (False, True))
    counts = significant(given, min_effect).tolist()
    raw = [[abs(float(given.effects[i, s])) for s in range(S)] for i in range(F)]
    total = [sum(raw[i][s] for i in range(F) if counts[i][s]) for s in range(S)]
    for i in range(F):
        share = [raw[i][s] / total[s] if counts[i][s] else 0.0 for s in range(S)]
        for sizes, each, pair in ((raw[i], found, pairs), (share, of_shares, share_pairs)):
            for s in range(S):
                sizes = [size if counts[i][t] else 0.0 for t, size in enumerate(sizes)]
                expected = sizes[s] / sum(sizes) if any(counts[i]) else math.nan
                assert float(each[i, s]) == pytest.approx(expected, nan_ok=True)
                for t in range(S):
                    expected = sizes[t] / (sizes[s] + sizes[t]) if counts[i][s] or counts[i][t] else math.nan
                    assert float(pair[i, s, t]) == pytest.approx(expected, nan_ok=True)


def test_shares_undo_the_growth_of_logits() -> None:
    """Effects that all grow tenfold: by RelIE every feature emerges, by share none does."""
    before = torch.tensor([[4.0], [-2.0], [1.0]])
    given = Given(torch.cat([before, 10 * before], -1), se=0.01)
    assert classes(relie(given)).tolist() == ["emerged"] * 3
    assert classes(share_relie(given)).tolist() == ["maintained"] * 3
    silent = Given(torch.tensor([[0.0, 3.0], [0.0, 1.0]]), se=0.01)
    assert share_relie(silent).tolist() == [[0, 1], [0, 1]]  # no feature has an effect at the first


@pytest.mark.parametrize("S", [2, 3, 9, 32])
def test_copies_of_a_snapshot_have_no_class_but_maintained(S: int) -> None:
    """Effects at copies are equal; so are those of features without an effect, which have no class."""
    rng = np.random.default_rng(S)
    sizes = np.where(np.arange(200) < 100, rng.choice([-1, 1], 200) * rng.uniform(0.8, 1.2, 200), 0)
    x = rng.normal(sizes, 1.0, (60, 200))
    given = of_prompts(np.repeat(x[:, :, None], S, 2))
    found = classes(share_relie(given))
    assert set(found) == {"maintained", "undefined"} and (found == "maintained").sum() >= 90
    assert set(classify(given)["relie_class"]) == {"maintained", "undefined"}


def test_relie_of_some_snapshots() -> None:
    given = drawn(30, 6, 4)
    found, counts = relie(given, snapshots=[5, 1]), significant(given)
    for i in range(30):
        sizes = given.effects[i, [5, 1]].abs()
        sizes = sizes * counts[i, [5, 1]]
        expected = sizes / sizes.sum()  # NaN if neither counts
        torch.testing.assert_close(found[i], expected, equal_nan=True)
    for wrong in ([6], [-7], [0, 99]):
        with pytest.raises(UserError, match=r"is not in \[-6, 5\]: there are 6 snapshots"):
            relie(given, snapshots=wrong)


def test_features_without_effect_are_nan_and_undefined_not_shared() -> None:
    """The paper's code sets .5 where all effects are 0, and calls the feature shared."""
    given = Given(torch.tensor([[0.0, 0.0, 0.0], [0.9, -0.8, 0.7], [3.0, 0.0, 0.0]]))
    found = relie(given)
    assert found[:2].isnan().all() and found[2].tolist() == [1, 0, 0]
    assert pairwise_relie(given)[0].isnan().all()
    assert classes(found).tolist() == ["undefined", "undefined", "discontinued"]
    assert three_way_classes(found).tolist() == ["undefined", "undefined", "A-specific"]
    assert signed_classes(given).tolist() == ["undefined", "undefined", "helpful"]
    assert relie(given, 0.0)[0].isnan().all() and not relie(given, 0.0)[1:].isnan().any()


def test_reldec_and_pairwise_of_norms() -> None:
    norms = torch.tensor([[1.0, 3.0, 4.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    found = reldec(norms)
    assert found[0].tolist() == [0.125, 0.375, 0.5] and found[1].isnan().all() and found[2].tolist() == [1, 0, 0]
    # what the paper plots of three snapshots: (2 of 1 and 2, 3 of 2 and 3, 3 of 1 and 3)
    pairs = pairwise_shares(norms)
    assert [float(pairs[0, a, b]) for a, b in ((0, 1), (1, 2), (0, 2))] == pytest.approx([3 / 4, 4 / 7, 4 / 5])
    assert pairs[1].isnan().all() and float(pairs[2, 0, 1]) == 0 and pairs[2, 1, 2].isnan()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("level", "G", "S", "seed"), [(0.95, 100, 4, 0), (0.5, 12, 2, 1), (0.9, 30, 7, 2)])
def test_interval_against_loops(level: float, G: int, S: int, seed: int, share: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.choice([0, 0.3, -3.0], (12, S)), 1.0, (G, 12, S))
    given = of_prompts(x, 60)
    low, high = relie_interval(given, level, share=share)
    counts, drawn = significant(given).tolist(), given.bootstrap.effects
    wide = t_quantile((1 + level) / 2, G) * math.sqrt(G / (G - 1))

    def signed(effects: Tensor, i: int, s: int) -> float:
        """|IE|, negative where the sign is not that of the estimate; as a share of the snapshot's total."""
        size = float(effects[i, s] * given.effects[i, s].sign())
        if not share:
            return size
        kept = [float(effects[j, s] * given.effects[j, s].sign()) for j in range(12) if counts[j][s]]
        return size / sum(kept) if kept else 0.0

    assert sum(map(any, counts)) > 0 and any(not all(row) for row in counts if any(row))
    for i in range(12):
        if not any(counts[i]):
            assert low[i].isnan().all() and high[i].isnan().all()
            continue
        y = [signed(given.effects, i, s) for s in range(S)]
        each = [[signed(effects, i, s) for s in range(S)] for effects in drawn]
        excess = [
            max(0.0, 1 - 0.4 * float(np.std([row[s] for row in each])) * math.sqrt(G / (G - 1)) / y[s]) if y[s] else 0.0
            for s in range(S)
        ]
        for s in range(S):
            ends = []
            for others in ([0.0] * S, excess):
                weights = [1.0 if counts[i][t] else others[t] for t in range(S)]
                total = sum(w * v for w, v in zip(weights, y, strict=True))
                linear = [row[s] - y[s] / total * sum(w * v for w, v in zip(weights, row, strict=True)) for row in each]
                error = wide * float(np.std(linear)) / total
                ends += [y[s] / total - error, y[s] / total + error]
            expected = [max(-1, min(ends)), min(1, max(ends))]
            assert [float(low[i, s]), float(high[i, s])] == pytest.approx(expected, abs=1e-9)
    for name, end in zip(("low", "high"), relie_interval(given, level, snapshots=[1, 0]), strict=True):
        assert end.shape == (12, 2), name
    with pytest.raises(UserError, match="no bootstrap replicates"):
        relie_interval(Given(torch.ones(3, 2)))
    with pytest.raises(UserError, match="level=95 must be between 0 and 1"):
        relie_interval(given, 95)


@pytest.mark.parametrize("kind", ["last", "transient", "step", "ramp"])
def test_intervals_cover_and_noise_stays_out(kind: str) -> None:
    """A feature that acts at few of 32 snapshots, beside null ones; version 0.2 covered 4 % and read .2 for 1."""
    rng = np.random.default_rng(3)
    N, F, S = 60, 120, 32
    course = {
        "last": np.arange(S) == S - 1,
        "transient": np.arange(S) == S // 2,
        "step": np.arange(S) >= S // 2,
        "ramp": np.linspace(0, 1, S),
    }[kind] * np.ones(S)
    mean = np.zeros((F, S))
    mean[: F // 2] = 6 / math.sqrt(N) * course
    given = of_prompts(rng.normal(mean, 1, (N, F, S)), 200)
    truth, found = torch.from_numpy(course / course.sum()), relie(given)
    kept = ~found.isnan().any(-1)
    assert kept[: F // 2].double().mean() >= 0.9 and kept[F // 2 :].double().mean() <= 0.05
    low, high = relie_interval(given)
    covered = (low <= truth) & (truth <= high)
    assert covered[: F // 2][kept[: F // 2]].double().mean() >= 0.92
    if kind != "ramp":
        expected = {"last": "emerged", "step": "emerged", "transient": "transient"}[kind]
        assert (classes(found[: F // 2][kept[: F // 2]]) == expected).mean() >= 0.95


def test_effect_interval_is_of_t_for_the_number_of_groups() -> None:
    given = Given(torch.tensor([[2.0, -1.0]], dtype=torch.float64), se=0.5, n_groups=5)
    low, high = effect_interval(given)
    assert low[0].tolist() == pytest.approx([2 - 2.7764 * 0.5, -1 - 2.7764 * 0.5], rel=1e-4)
    assert high[0].tolist() == pytest.approx([2 + 2.7764 * 0.5, -1 + 2.7764 * 0.5], rel=1e-4)


def test_interval_covers_zero_where_the_sign_is_uncertain() -> None:
    """No interval of the absolute value does."""
    rng = np.random.default_rng(1)
    given = Given(torch.tensor([[2.0, 0.1]], dtype=torch.float64), se=0.3)
    replicates = given.effects + torch.from_numpy(rng.normal(0, 0.3, (400, 1, 2)))
    given.bootstrap = Bootstrap(torch.tensor([0]), replicates, torch.zeros(400, 2))
    low, high = relie_interval(given)
    assert low[0, 0] > 0 and low[0, 1] < 0 < high[0, 1]
    assert effect_interval(given)[0][0, 1] < 0 < effect_interval(given)[1][0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_sign_changes_against_loops(seed: int) -> None:
    given = drawn(50, 5, seed)
    counts, q = significant(given), q_values(given)
    expected = []
    for i in range(50):
        last = None
        for s in range(5):
            value = float(given.effects[i, s])
            if not counts[i, s]:
                continue
            if last is not None and value * last[1] < 0:
                least = min(abs(value), abs(last[1]))
                expected.append((i, last[0], s, least, max(float(q[i, s]), float(q[i, last[0]]))))
            last = (s, value)
    table = sign_changes(given)
    assert len(expected) > 5 and len(table) == len(expected)
    assert table["least"].is_monotonic_decreasing
    columns = ("feature", "from_snapshot", "to_snapshot", "least", "q")
    found = sorted(zip(*(table[name] for name in columns), strict=True))
    for ours, theirs in zip(found, sorted(expected), strict=True):
        assert tuple(ours) == pytest.approx(theirs)
    row = table.iloc[0]
    assert row["from_ie"] == float(given.effects[row["feature"], row["from_snapshot"]])
    assert row["to_label"] == f"s{row['to_snapshot']}"
    assert sign_changes(given, 1e3).empty and len(sign_changes(given, 0.0)) > len(table)


def test_two_snapshots_are_classified_by_the_share_of_the_second() -> None:
    second = torch.tensor([0.0, 0.29, 0.31, 0.5, 0.69, 0.71, 1.0])
    share = torch.stack([1 - second, second], -1)
    expected = ["discontinued"] * 2 + ["maintained"] * 3 + ["emerged"] * 2
    assert classes(share).tolist() == expected
    assert centre_of_mass(share).tolist() == pytest.approx(second.tolist())
    assert classes(share, low=0.1, high=0.4).tolist() == ["discontinued", *["maintained"] * 2, *["emerged"] * 4]


def test_many_snapshots_are_classified_by_the_centre_of_mass() -> None:
    share = torch.tensor(
        [
            [0.8, 0.2, 0.0, 0.0, 0.0],  # centre .05
            [0.0, 0.0, 0.0, 0.5, 0.5],  # centre .875
            [0.2, 0.2, 0.2, 0.2, 0.2],  # centre .5
            [0.1, 0.0, 0.8, 0.0, 0.1],  # a single interior share
            [0.0, 0.75, 0.25, 0.0, 0.0],  # the same, though its centre lies below .3
            [0.0, 0.0, 0.0, 0.0, 1.0],  # the end is no interior
            [0.4, 0.0, 0.0, 0.0, 0.6],
            [math.nan] * 5,
        ]
    )
    expected = [
        "discontinued",
        "emerged",
        "maintained",
        "transient",
        "transient",
        "emerged",
        "maintained",
        "undefined",
    ]
    assert classes(share).tolist() == expected
    with pytest.raises(UserError, match="low=0.7 and high=0.3 must satisfy"):
        classes(share, 0.7, 0.3)
    with pytest.raises(UserError, match="a centre of mass needs at least 2 snapshots, but there is only 1"):
        classes(torch.ones(4, 1))


def test_three_way_table_of_the_paper() -> None:
    table = {
        (0.8, 0.1, 0.1): "A-specific",
        (0.1, 0.8, 0.1): "B-specific",
        (0.05, 0.2, 0.75): "C-specific",
        (0.34, 0.33, 0.33): "A-B-C shared",
        (0.3, 0.3, 0.4): "A-B-C shared",
        (0.6, 0.4, 0.0): "A-B shared",
        (0.0, 0.5, 0.5): "B-C shared",
        (0.65, 0.05, 0.3): "A-C shared",
        (0.6, 0.2, 0.2): "other",
        (0.7, 0.15, 0.15): "other",
    }
    share = torch.tensor(list(table), dtype=torch.float64)
    assert three_way_classes(share).tolist() == list(table.values())
    assert three_way_classes(share[:1], ["4B", "33B", "3T"]).tolist() == ["4B-specific"]
    assert three_way_classes(share[8:9], high=0.55).tolist() == ["A-specific"]
    with pytest.raises(UserError, match="three-way classes need 3 snapshots, not 2"):
        three_way_classes(share[:, :2])


def test_signed_classes() -> None:
    given = Given(
        torch.tensor(
            [
                [2.0, 3.0, 0.1],
                [-2.0, -0.5, -3.0],
                [-2.0, 0.4, 3.0],
                [2.0, 2.0, -3.0],
                [2.0, -2.0, 3.0],
                [0.9, -0.9, 0.2],
            ]
        )
    )
    expected = ["helpful", "harmful", "turns helpful", "turns harmful", "wavers", "undefined"]
    assert signed_classes(given).tolist() == expected
    assert signed_classes(given, 2.5).tolist() == [
        "helpful",
        "harmful",
        "helpful",
        "harmful",
        "helpful",
        "undefined",
    ]


def test_classes_in_one_table() -> None:
    given = Given(torch.tensor([[-3.0, 0.1, 4.0], [0.1, 5.0, 0.1], [0.0, 0.0, 0.0]]))
    table = classify(given)
    share = given.effects.abs() * significant(given)
    share = share / share.sum(0)
    assert table["feature"].tolist() == [0, 1, 2]
    assert table["class"].tolist() == classes(share_relie(given)).tolist() == ["maintained", "transient", "undefined"]
    assert table["relie_class"].tolist() == ["maintained", "transient", "undefined"]
    assert table["signed_class"].tolist() == ["turns helpful", "helpful", "undefined"]
    assert table["peak"].tolist() == [0, 1, -1]  # the first of equal ones
    assert table["three_way"].tolist() == ["s0-s2 shared", "s1-specific", "undefined"]
    assert table["centre_of_mass"][0] == pytest.approx(float((share[0, 1] / 2 + share[0, 2]) / share[0].sum()))
    assert "three_way" not in classify(drawn(5, 4, 0))


def test_shares_of_many_replicates() -> None:
    sizes = torch.rand(6, 5, 3)
    torch.testing.assert_close(shares(sizes).sum(-1), torch.ones(6, 5))
