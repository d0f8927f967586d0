"""RelIE and related measures against plain loops, and the classes against the tables they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from crosslens.causal.attribution import Bootstrap
from crosslens.causal.relative import (
    centre_of_mass,
    classes,
    classify,
    pairwise_relie,
    pairwise_shares,
    reldec,
    relie,
    relie_interval,
    shares,
    sign_changes,
    signed_classes,
    three_way_classes,
)
from crosslens.errors import UserError


@dataclass
class Given:
    """Given effects; every feature is active, standard errors are `se`."""

    effects: Tensor
    se: float = 0.5
    metric_clean: Tensor = field(default_factory=lambda: torch.zeros(0))
    bootstrap: Any = None

    @property
    def labels(self) -> list[str]:
        return [f"s{i}" for i in range(self.effects.shape[1])]

    @property
    def standard_errors(self) -> Tensor:
        return torch.full_like(self.effects, self.se)

    @property
    def active(self) -> Tensor:
        return torch.ones_like(self.effects, dtype=torch.bool)


def drawn(F: int, S: int, seed: int) -> Given:
    generator = torch.Generator().manual_seed(seed)
    effects = 1.5 * torch.randn(F, S, generator=generator, dtype=torch.float64)
    return Given(effects, metric_clean=torch.randn(S, generator=generator, dtype=torch.float64))


SHAPES = [(1, 2, 0), (40, 2, 1), (40, 3, 2), (25, 7, 3)]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("min_effect", [None, 0.7])
@pytest.mark.parametrize(("F", "S", "seed"), SHAPES)
def test_relie_against_loops(F: int, S: int, seed: int, min_effect: float | None, normalised: bool) -> None:
    given = drawn(F, S, seed)
    found = relie(given, min_effect, normalised=normalised, floor=0.3)
    pairs = pairwise_relie(given, min_effect, normalised=normalised, floor=0.3)
    least = 2 * given.se if min_effect is None else min_effect
    for i in range(F):
        raw = [abs(float(given.effects[i, s])) for s in range(S)]
        size = [x / max(abs(float(given.metric_clean[s])), 0.3) if normalised else x for s, x in enumerate(raw)]
        for s in range(S):
            expected = size[s] / sum(size) if any(x > least for x in raw) else math.nan
            assert float(found[i, s]) == pytest.approx(expected, nan_ok=True)
            for t in range(S):
                expected = size[t] / (size[s] + size[t]) if raw[s] > least or raw[t] > least else math.nan
                assert float(pairs[i, s, t]) == pytest.approx(expected, nan_ok=True)


def test_relie_of_some_snapshots() -> None:
    given = drawn(30, 6, 4)
    found = relie(given, snapshots=[5, 1])
    for i in range(30):
        sizes = given.effects[i, [5, 1]].abs()
        expected = sizes / sizes.sum() if bool((sizes > 1).any()) else torch.full_like(sizes, math.nan)
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
    assert relie(given, 0.0)[0].isnan().all()
    one_prompt = Given(torch.tensor([[3.0, 1.0]]), se=math.nan)
    assert relie(one_prompt).isnan().all()
    assert relie(one_prompt, 0.5).tolist() == [[0.75, 0.25]]


def test_small_metrics_are_divided_by_the_floor() -> None:
    given = Given(torch.tensor([[0.02, 2.0]]), se=0.001, metric_clean=torch.tensor([1e-6, 4.0]))
    assert relie(given, normalised=True)[0].tolist() == pytest.approx([0.2 / 0.7, 0.5 / 0.7])
    assert relie(given, normalised=True, floor=0.01)[0].tolist() == pytest.approx([2 / 2.5, 0.5 / 2.5])
    with pytest.raises(UserError, match="floor=0 must be positive"):
        relie(given, normalised=True, floor=0)


def test_reldec_and_pairwise_of_norms() -> None:
    norms = torch.tensor([[1.0, 3.0, 4.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    found = reldec(norms)
    assert found[0].tolist() == [0.125, 0.375, 0.5] and found[1].isnan().all() and found[2].tolist() == [1, 0, 0]
    # what the paper plots of three snapshots: (2 of 1 and 2, 3 of 2 and 3, 3 of 1 and 3)
    pairs = pairwise_shares(norms)
    assert [float(pairs[0, a, b]) for a, b in ((0, 1), (1, 2), (0, 2))] == pytest.approx([3 / 4, 4 / 7, 4 / 5])
    assert pairs[1].isnan().all() and float(pairs[2, 0, 1]) == 0 and pairs[2, 1, 2].isnan()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_interval_against_one_relie_per_replicate(level: float, normalised: bool) -> None:
    given = drawn(12, 4, 5)
    rng = np.random.default_rng(0)
    features = torch.tensor([1, 4, 7, 11])
    R = 60
    effects = given.effects[features] + torch.from_numpy(rng.normal(0, 0.4, (R, 4, 4)))
    metric = given.metric_clean + torch.from_numpy(rng.normal(0, 0.2, (R, 4)))
    given.bootstrap = Bootstrap(features, effects, metric)
    low, high = relie_interval(given, level, normalised=normalised)
    share = relie(given, normalised=normalised)
    assert torch.equal(low.isnan(), high.isnan())
    for i in range(12):
        if i not in features or share[i].isnan().any():
            assert low[i].isnan().all()
            continue
        each = []
        for r in range(R):
            size = effects[r, features.tolist().index(i)].abs()
            size = size / metric[r].abs().clamp_min(0.1) if normalised else size
            each.append((size / size.sum()).tolist())
        for s in range(4):
            values = [row[s] for row in each]
            expected = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
            assert [float(low[i, s]), float(high[i, s])] == pytest.approx(expected.tolist())
    some = relie_interval(given, level, normalised=normalised, snapshots=[3, 1])
    alone = Given(given.effects[:, [3, 1]], metric_clean=given.metric_clean[[3, 1]])
    alone.bootstrap = Bootstrap(features, effects[..., [3, 1]], metric[:, [3, 1]])
    for ours, theirs in zip(some, relie_interval(alone, level, normalised=normalised), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    with pytest.raises(UserError, match="no bootstrap replicates"):
        relie_interval(drawn(3, 2, 0))
    with pytest.raises(UserError, match="level=95 must be between 0 and 1"):
        relie_interval(given, 95)


@pytest.mark.parametrize("seed", range(4))
def test_sign_changes_against_loops(seed: int) -> None:
    given = drawn(50, 5, seed)
    expected = []
    for i in range(50):
        last = None
        for s in range(5):
            z = float(given.effects[i, s]) / given.se
            if abs(z) <= 2:
                continue
            if last is not None and z * last[1] < 0:
                expected.append((i, last[0], s, min(abs(z), abs(last[1]))))
            last = (s, z)
    table = sign_changes(given)
    assert len(expected) > 5 and len(table) == len(expected)
    assert table["z"].is_monotonic_decreasing
    found = sorted(zip(table["feature"], table["from_snapshot"], table["to_snapshot"], table["z"], strict=True))
    for ours, theirs in zip(found, sorted(expected), strict=True):
        assert tuple(ours) == pytest.approx(theirs)
    row = table.iloc[0]
    assert row["from_ie"] == float(given.effects[row["feature"], row["from_snapshot"]])
    assert row["to_label"] == f"s{row['to_snapshot']}"
    assert row["p"] == pytest.approx(2 * (1 - norm.cdf(row["z"])), rel=1e-3)
    assert sign_changes(given, min_z=1e3).empty


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
    assert signed_classes(given, min_z=5).tolist() == [
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
    assert table["feature"].tolist() == [0, 1, 2]
    assert table["class"].tolist() == ["maintained", "transient", "undefined"]
    assert table["signed_class"].tolist() == ["turns helpful", "helpful", "undefined"]
    assert table["peak"].tolist() == [2, 1, -1]
    assert table["three_way"].tolist() == ["s0-s2 shared", "s1-specific", "undefined"]
    assert table["centre_of_mass"][0] == pytest.approx((0.1 * 0.5 + 4) / 7.1)
    assert "three_way" not in classify(drawn(5, 4, 0))


def test_shares_of_many_replicates() -> None:
    sizes = torch.rand(6, 5, 3)
    torch.testing.assert_close(shares(sizes).sum(-1), torch.ones(6, 5))
