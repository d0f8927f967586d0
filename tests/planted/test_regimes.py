"""Planted features: lifecycles, directions and activations match the regime and its table."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from planted.regimes import REGIMES, Planted, Regime

from crosslens.errors import UserError
from crosslens.evolution.lifecycles import classify_lifecycles

SMALL = Regime(n_features=40, d_model=16, n_snapshots=6, splitting=0.2, merging=0.2, rotating=0.2, scales=(0.5, 4.0))


def scale_of(planted: Planted) -> torch.Tensor:
    """sqrt(D) / mean norm, as crosscoders scale."""
    x = torch.cat(list(planted.held_out()))
    return math.sqrt(planted.d_model) / x.norm(dim=-1).mean(0)


# ---- the truth


@pytest.mark.parametrize("name", [*REGIMES, "small"])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_match_the_table(name: str, seed: int) -> None:
    regime = SMALL if name == "small" else REGIMES[name]
    planted = Planted(regime, seed)
    N, S = regime.n_features, regime.n_snapshots
    assert planted.rows.shape == (N, S, regime.d_model) and len(planted.truth) == N
    assert sorted(planted.scales.tolist()) == pytest.approx(np.geomspace(*regime.scales, S).tolist())
    strength = planted.rows.norm(dim=-1) / planted.scales
    for i, row in enumerate(planted.truth.to_dict("records")):
        dead = S if pd.isna(row["death"]) else row["death"]
        assert 0 <= row["birth"] < S and (row["kind"] == "dying") == (dead < S)
        assert row["kind"] == "steady" or row["birth"] + 2 <= min(dead, S - 1)
        for s in range(S):
            age = s - row["birth"]
            grown = 1.0 if not row["birth"] else {0: 0.75, 1: 0.875}.get(age, 1.0)
            assert float(strength[i, s]) == pytest.approx(grown if age >= 0 and s < dead else 0.0, abs=1e-6)
        unit = (planted.rows[i] / planted.rows[i].norm(dim=-1, keepdim=True)).nan_to_num(0.0)
        at = S if pd.isna(row["at"]) else int(row["at"])
        for s in range(row["birth"] + 1, dead):
            cosine = float(unit[s] @ unit[s - 1])
            angle = row["angle"] / (1 if row["kind"] == "rotating" else 2) if s == at else 0.0
            assert cosine == pytest.approx(math.cos(angle), abs=1e-5)
        if row["kind"] in ("splitting", "merging"):
            other = planted.truth.iloc[int(row["partner"])]
            assert other["partner"] == i and other["birth"] == row["birth"] and other["at"] == at
            assert row["birth"] + 2 <= at <= S - 2
            theirs = planted.rows[int(row["partner"])] / planted.rows[int(row["partner"])].norm(dim=-1, keepdim=True)
            for s in range(row["birth"], S):
                one = (s < at) == (row["kind"] == "splitting")
                assert float(unit[s] @ theirs[s]) == pytest.approx(
                    1.0 if one else math.cos(regime.split_angle), abs=1e-5
                )
    kinds = planted.truth["kind"].value_counts()
    for kind in ("dying", "rotating", "splitting", "merging"):
        assert kinds.get(kind, 0) == pytest.approx(getattr(regime, kind) * N, abs=1)
    assert (planted.truth["birth"] == 0).mean() == pytest.approx(regime.initial, abs=0.2)
    assert planted.truth["firing"].between(*regime.firing).all() and planted.truth["firing"].nunique() == N


@pytest.mark.parametrize("name", REGIMES)
def test_lifecycles_of_the_planted_rows_match_the_table(name: str) -> None:
    planted = Planted(REGIMES[name], 0, n_held_out=4096)
    life = classify_lifecycles((planted.rows * scale_of(planted)[:, None]).norm(dim=-1))
    assert life["birth"].tolist() == planted.truth["birth"].tolist()
    assert life["death"].equals(planted.truth["death"])


def test_the_regimes_are_as_hard_as_documented() -> None:
    crowded, entangled = Planted(REGIMES["crowded"]), Planted(REGIMES["entangled"])
    assert ((crowded.rows.norm(dim=-1) > 0).sum(0) > 2 * crowded.d_model).all()
    for planted in (crowded, entangled):
        norms = torch.cat(list(planted.held_out())).norm(dim=-1).mean(0)
        assert norms.max() / norms.min() > 10
    values = (entangled.draw(20_000, 0)[0] > 0).double().numpy()
    correlation = np.corrcoef(values.T)
    group = np.arange(256) // 8
    same = (group[:, None] == group) & ~np.eye(256, dtype=bool)
    assert correlation[same].mean() > 0.1 and abs(correlation[group[:, None] != group].mean()) < 0.01
    assert values.mean(0) == pytest.approx(entangled.truth["firing"].to_numpy(), abs=0.01)


# ---- the activations


def test_activations_are_values_times_rows_plus_noise() -> None:
    planted = Planted(SMALL, 3, n_tokens=640, n_held_out=5000)
    values, x = planted.draw(3000, 7)
    assert values.shape == (3000, 40) and x.shape == (3000, 6, 16)
    assert values[values > 0].mean() == pytest.approx(1.0, abs=0.05) and values[values > 0].std() == pytest.approx(
        0.3, abs=0.05
    )
    assert (values > 0).double().mean(0).numpy() == pytest.approx(planted.truth["firing"].to_numpy(), abs=0.02)
    noise = x - torch.einsum("bi,isd->bsd", values, planted.rows)
    assert noise.std((0, 2)).tolist() == pytest.approx((SMALL.noise * planted.scales).tolist(), rel=0.03)
    assert noise[:, 0].flatten().numpy() @ noise[:, 1].flatten().numpy() == pytest.approx(0.0, abs=20)
    assert torch.equal(planted.draw(3000, 7)[1], x) and not torch.equal(planted.draw(3000, 8)[1], x)
    assert not torch.equal(Planted(SMALL, 4).draw(3000, 7)[1], x)
    torch.manual_seed(1)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    planted.draw(5, 0)
    assert torch.equal(torch.rand(3), drawn)  # the global generator is unchanged
    one = planted.only(4)
    assert torch.equal(one.draw(3000, 7)[1], x[:, [4]]) and one.snapshots.labels == ["step4000"]
    assert (one.n_snapshots, one.d_model, planted.n_snapshots) == (1, 16, 6)
    assert planted.l0 == pytest.approx(float((values > 0).double().sum(1).mean()), rel=0.1)
    there = planted.rows[:, 0].norm(dim=-1) > 0
    assert planted.only(0).l0 == pytest.approx(float(planted.truth["firing"][there.numpy()].sum()))
    assert planted.only(0).l0 < planted.l0


def test_batches_and_held_out_activations() -> None:
    planted = Planted(SMALL, 0, n_tokens=640, n_held_out=5000)
    first = [batch for batch in planted.batches(64, epochs=1)]
    assert len(first) == 10 and first[0].shape == (64, 6, 16) and not torch.equal(first[0], first[1])
    second = planted.batches(64, start=10)
    assert not any(torch.equal(next(second), batch) for batch in first)  # every epoch is different
    assert torch.equal(next(planted.batches(64, start=3)), first[3])
    held = [torch.cat(list(planted.held_out(size))) for size in (100, 4096, 10_000)]
    assert held[0].shape == (5000, 6, 16) and torch.equal(held[0], held[1]) and torch.equal(held[1], held[2])
    assert [len(b) for b in planted.held_out(3000)] == [3000, 1096, 904]
    keeping = Planted(SMALL, 0, n_tokens=640, n_held_out=5000, keep=True)
    part, alone = keeping.only(2), planted.only(2)
    for _ in range(2):  # drawn, then from memory
        for one, other in ((part, alone), (keeping, planted), (keeping.only(2).only(0), alone)):
            for start in (3, 0):
                assert torch.equal(next(one.batches(64, start=start)), next(other.batches(64, start=start)))
            assert torch.equal(torch.cat(list(one.held_out(300))), torch.cat(list(other.held_out(300))))
    assert next(keeping.batches(64, start=3)) is next(keeping.batches(64, start=3)) and planted.kept is None
    assert keeping.kept is not None and sorted({n for n, _ in keeping.kept}) == [64, 904, 4096]
    row = planted.metadata()["snapshots"][2]
    assert row == {"label": "step2000", "step": 2000, "tokens": 4_000_000_000}


def test_impossible_regimes_are_refused() -> None:
    for change, message in (
        ({"n_snapshots": 4}, "n_snapshots=4 is too few to plant a lifecycle: give 5 or more"),
        ({"rotating": 0.9}, "dying, rotating, splitting and merging add up to 1.05"),
        ({"initial": 1.5}, r"initial=1.5 is not in \[0, 1\]"),
        ({"firing": (0.2, 0.1)}, r"firing=\(0.2, 0.1\) is not a range of probabilities"),
        ({"correlation": 1.0}, r"correlation=1.0 is not in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            replace(Regime(), **change)
