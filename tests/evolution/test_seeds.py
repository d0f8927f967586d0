"""Matching against all permutations, agreement against plain loops, summaries against their parts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import crosslens.evolution.seeds
from crosslens.errors import UserError
from crosslens.evolution.geometry import rotation_per_interval, total_dimensionality
from crosslens.evolution.lifecycles import classify_lifecycles, evolve, measure_firing
from crosslens.evolution.seeds import compare_evolutions, compare_features, match_features, shared_snapshots
from tests.given import Held, of_norms, of_rows, snapshots_at


def cosines(a: Any, b: Any) -> np.ndarray:
    """Cosines of whole decoders, one pair of features at a time."""
    left, right = (cc.W_dec.detach().numpy().astype(float) for cc in (a, b))
    return np.array([[x @ y / np.sqrt((x @ x) * (y @ y)) for y in right] for x in left])


def pairs_of(table: pd.DataFrame) -> set[tuple[int, int]]:
    return set(zip(table["feature"], table["partner"], strict=True))


# ---- matching


@pytest.mark.parametrize(("F", "G", "seed"), [(5, 5, 0), (4, 6, 1), (6, 3, 2)])
def test_hungarian_is_the_best_of_all_assignments(F: int, G: int, seed: int) -> None:
    a, b = of_norms(torch.ones(F, 3), D=2, seed=seed), of_norms(torch.ones(G, 3), D=2, seed=seed + 50)
    table, c = match_features(a, b), cosines(a, b)
    n = min(F, G)
    assert len(table) == n and table["feature"].is_unique and table["partner"].is_unique
    assert table["cosine"].tolist() == pytest.approx([c[i, j] for i, j in table[["feature", "partner"]].to_numpy()])
    assert table["cosine"].is_monotonic_decreasing
    if F <= G:
        best = max(sum(c[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(G), F))
    else:
        best = max(sum(c[i, j] for j, i in enumerate(order)) for order in itertools.permutations(range(F), G))
    assert table["cosine"].sum() == pytest.approx(best)


@pytest.mark.parametrize("block", [4096, 3])
@pytest.mark.parametrize("seed", range(4))
def test_mutual_pairs_are_each_others_nearest(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.seeds, "_BLOCK", block)
    a, b = of_norms(torch.rand(11, 2) + 0.1, D=3, seed=seed), of_norms(torch.rand(8, 2) + 0.1, D=3, seed=seed + 50)
    c = cosines(a, b)
    slow = {(i, int(c[i].argmax())) for i in range(11) if int(c[:, c[i].argmax()].argmax()) == i}
    table = match_features(a, b, method="mutual")
    assert pairs_of(table) == slow and len(slow) >= 2
    assert table["cosine"].tolist() == pytest.approx([c[i, j] for i, j in table[["feature", "partner"]].to_numpy()])


@pytest.mark.parametrize("method", ["hungarian", "mutual", None])
def test_a_shuffled_copy_is_found_again(method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.seeds, "HUNGARIAN", 10)  # so that None chooses mutual
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(30, generator=generator)
    rows = torch.randn(30, 4, 8, generator=generator)
    a, b = of_rows(rows), of_rows((rows + 0.1 * torch.randn(30, 4, 8, generator=generator))[order])
    table = match_features(a, b, method=method)
    assert pairs_of(table) == {(int(i), j) for j, i in enumerate(order)}
    assert table["cosine"].min() > 0.97


def test_only_live_features_are_matched() -> None:
    a = of_norms([[1, 1], [1, 1], [0, 0], [1, 1]])
    alive = torch.tensor([True, False, True, True])
    for method in ("hungarian", "mutual"):
        assert pairs_of(match_features(a, a, alive_a=alive, method=method)) == {(0, 0), (3, 3)}
        assert pairs_of(match_features(a, a, alive_b=alive, method=method)) == {(0, 0), (3, 3)}
    with pytest.raises(UserError, match="the second crosscoder has no live feature to match"):
        match_features(a, a, alive_b=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(UserError, match="method='best' is unknown: use 'hungarian', 'mutual', or None"):
        match_features(a, a, method="best")


def test_only_common_snapshots_are_compared() -> None:
    rows = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    a = of_rows(rows, snapshots_at(0, 1, 10, 100))
    other = rows[:, [1, 3]].clone()
    b = of_rows(torch.cat([torch.randn(6, 1, 5), other], 1), snapshots_at(5, 1, 100))
    assert shared_snapshots(a, b) == ([1, 3], [1, 2])
    table = match_features(a, b)
    assert pairs_of(table) == {(i, i) for i in range(6)} and table["cosine"].tolist() == pytest.approx([1.0] * 6)


def test_snapshots_with_different_weights_are_not_common() -> None:
    def recorded(*fingerprints: str) -> list[dict[str, Any]]:
        return [{**row, "fingerprint": f} for row, f in zip(snapshots_at(0, 1), fingerprints, strict=True)]

    a, b = of_norms(torch.ones(3, 2), recorded("x", "y")), of_norms(torch.ones(3, 2), recorded("x", "z"))
    assert shared_snapshots(a, b) == ([0], [0])
    with pytest.raises(UserError, match="have 1 snapshot in common: comparing lifecycles needs at least 2"):
        compare_features(a, b)
    with pytest.raises(UserError, match="no snapshot in common .* equal labels have different weights"):
        match_features(a, of_norms(torch.ones(3, 2), recorded("p", "q")))
    with pytest.raises(UserError, match="have d_model 4 and 5: only crosscoders of one model can be matched"):
        match_features(a, of_norms(torch.ones(3, 2), D=5))


# ---- agreement


def test_agreement_by_hand() -> None:
    norms = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]]
    a = of_norms(norms, D=64)
    rows = a.W_dec_by_snapshot.clone()
    rows[1, 1] *= 0.1  # is born one snapshot later
    rows[4, 2] = rows[
        4, 1
    ]  # dies one snapshot later: another direction in one of four snapshots, still the same feature
    rows[0] = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))  # is another feature
    b = of_rows(torch.cat([rows, torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(8))]))
    found = compare_features(a, b)
    assert found["snapshots"] == 4 and found["matched"] == 4
    assert found["share_a"] == pytest.approx(4 / 5) and found["share_b"] == pytest.approx(4 / 7)
    assert found["same_origin"] == 1.0 and found["same_fate"] == 1.0
    # births 1, 2, (never), 0 against 2, 2, (never), 0
    assert found["same_birth"] == pytest.approx(2 / 3) and found["birth_within_1"] == 1.0
    assert found["same_birth_by_chance"] == pytest.approx((1 * 0 + 1 * 2 + 1 * 1) / 9)
    strict = compare_features(a, b, min_cosine=0.999999)
    assert strict["matched"] == 2  # 2 and 3 are copies
    assert compare_features(a, b, min_run=1)["same_birth"] == pytest.approx(3 / 4)
    nothing = compare_features(a, b, alive_a=torch.tensor([True, False, False, False, False]))
    assert nothing["matched"] == 0 and math.isnan(nothing["same_birth"]) and math.isnan(nothing["median_cosine"])


@pytest.mark.parametrize("seed", range(3))
def test_agreement_matches_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(25, 5, generator=generator)
    a = of_norms(norms, D=16, seed=seed)
    noise = torch.randn(25, 5, 16, generator=generator) * 0.12
    b = of_rows(a.W_dec_by_snapshot + noise * torch.linspace(0, 3, 25)[:, None, None])
    found = compare_features(a, b, min_cosine=0.6, presence=0.4, min_run=1)
    tables = [classify_lifecycles(cc.decoder_norms, 0.4, min_run=1) for cc in (a, b)]
    kept = [row for row in match_features(a, b).to_dict("records") if row["cosine"] >= 0.6]
    assert 5 < len(kept) < 25 and found["matched"] == len(kept)
    assert found["median_cosine"] == pytest.approx(np.median([row["cosine"] for row in kept]))
    partners = [(tables[0].iloc[row["feature"]], tables[1].iloc[row["partner"]]) for row in kept]
    for name in ("origin", "fate"):
        assert found[f"same_{name}"] == pytest.approx(np.mean([x[name] == y[name] for x, y in partners]))
    births = [(x["birth"], y["birth"]) for x, y in partners if x["birth"] is not pd.NA and y["birth"] is not pd.NA]
    assert found["same_birth"] == pytest.approx(np.mean([x == y for x, y in births]))
    assert found["birth_within_1"] == pytest.approx(np.mean([abs(x - y) <= 1 for x, y in births]))
    chance = np.mean([x == y for x, _ in births for _, y in births])
    assert found["same_birth_by_chance"] == pytest.approx(chance)
    assert 0 < found["same_birth"] < 1


# ---- several crosscoders


def test_summaries_match_their_parts() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 4, 6, generator=generator)
    wide = of_norms(torch.rand(30, 4, generator=generator), snapshots_at(0, 1, 10, 100), D=6, seed=1)
    narrow = of_norms(torch.rand(9, 4, generator=generator), snapshots_at(0, 1, 10, 100), D=6, seed=2)
    narrow.b_enc.data[0] = -99
    still = of_rows(torch.ones(3, 2, 6), None)
    table = compare_evolutions(
        {"32x": (wide, Held(x)), "8x": (narrow, measure_firing(narrow, Held(x))), "still": (still, Held(x[:, :2]))}
    ).set_index("name")
    assert table["features"].tolist() == [30, 9, 3] and table["snapshots"].tolist() == [4, 4, 2]
    assert table["alive"].tolist() == [30, 8, 3]
    for name, cc in (("32x", wide), ("8x", narrow)):
        row, life = table.loc[name], evolve(cc, Held(x))
        live = life[life["alive"]]
        assert row["alive"] == len(live)
        for origin in ("initial", "emergent", "never"):
            assert row[origin] == pytest.approx((live["origin"] == origin).mean())
        assert row["transient"] == pytest.approx((live["fate"] == "transient").mean())
        assert row["median_birth"] == np.median([b for b in live.loc[live["origin"] == "emergent", "birth_step"]])
        intervals = rotation_per_interval(cc, torch.tensor(life["alive"].to_numpy()))
        point = intervals[intervals["largest"]].iloc[0]
        for column in ("from", "to", "from_step", "to_step", "share"):
            assert row[f"rotation_{column}"] == point[column]
        share = total_dimensionality(cc, Held(x))["share"].tolist()
        assert [row[f"dimensionality_{k}"] for k in ("first", "least", "last")] == [share[0], min(share), share[-1]]
    assert table.loc["still", ["rotation_from", "rotation_to_step", "rotation_share", "median_birth"]].isna().all()
    with pytest.raises(UserError, match="crosscoders is empty"):
        compare_evolutions({})
