"""Splits and replacements: the definitions in plain loops, and cases with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import crosslens.evolution.splitting
from crosslens.activations.loader import Activations
from crosslens.errors import UserError
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.history import evolve
from crosslens.evolution.lifecycles import classify_lifecycles
from crosslens.evolution.splitting import JointActivity, replacements, split_counts, splits
from crosslens.snapshots.collection import Snapshots
from tests.given import Held, of_norms, of_rows, snapshots_at


@pytest.fixture(params=[2048, 2], autouse=True)
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.splitting, "_BLOCK", request.param)
    monkeypatch.setattr(crosslens.evolution.splitting, "_PAIRS", request.param * 10)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


# ---- replacements


def slow_replacements(cc: Any, x: torch.Tensor, gap: int, min_cosine: float, min_overlap: float) -> pd.DataFrame:
    rows = cc.W_dec_by_snapshot.numpy().astype(float)
    active = np.stack([cc.encode(token).numpy() > 0 for token in x])
    p = active.mean(0)
    life = classify_lifecycles(cc.decoder_norms.masked_fill(torch.tensor(p == 0)[:, None], 0.0)).to_dict("records")
    found = []
    for i, first in enumerate(life):
        for j, second in enumerate(life):
            if i == j or pd.isna(first["death"]) or second["origin"] != "emergent":
                continue
            if abs(first["death"] - second["birth"]) > gap:
                continue
            c = cosine(rows[i, first["death"] - 1], rows[j, second["birth"]])
            low, high = sorted((p[i], p[j]))
            h = ((active[:, i] & active[:, j]).mean() / low - high) / (1 - high)
            if c >= min_cosine and h >= min_overlap:
                found.append((i, j, first["death"], second["birth"], c, h))
    return pd.DataFrame(found, columns=["predecessor", "successor", "death", "birth", "cosine", "overlap"])


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_replacements_match_the_definition_in_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    F, S, D = 40, 6, 3
    there = torch.zeros(F, S)
    for i in range(F):  # one lifecycle each, a third of them from the start
        born = int(torch.randint(0, 4, (), generator=generator)) if i % 3 else 0
        there[i, born : born + int(torch.randint(1, 5, (), generator=generator))] = 1.0
    cc = of_norms(there, D=D, seed=seed)
    cc.W_enc.data = torch.randn(S * D, F, generator=generator)
    cc.b_enc.data = torch.randn(F, generator=generator) - 1
    cc.b_enc.data[4] = -99
    x = torch.randn(50, S, D, generator=generator)
    sizes = []
    for gap, min_cosine, min_overlap in ((1, 0.5, 0.2), (0, 0.0, -1.0), (2, 0.7, 0.1)):
        table = replacements(cc, Held(x), max_gap=gap, min_cosine=min_cosine, min_overlap=min_overlap)
        slow = slow_replacements(cc, x, gap, min_cosine, min_overlap).sort_values(["death", "predecessor", "successor"])
        sizes.append(len(slow))
        for column in slow:
            assert table[column].tolist() == pytest.approx(slow[column].tolist(), rel=1e-4), column
        for row in table.to_dict("records"):
            n_next = sum(slow["predecessor"] == row["predecessor"])
            n_before = sum(slow["successor"] == row["successor"])
            assert (row["successors"], row["predecessors"]) == (n_next, n_before)
            words = [word for word, n in (("split", n_next), ("merger", n_before)) if n > 1]
            assert row["kind"] == (" and ".join(words) or "replacement")
    assert min(sizes) > 2 and 4 not in set(table["predecessor"]) | set(table["successor"])


def test_a_split_a_merger_and_a_replacement() -> None:
    """Features 0 -> 1, 2 (a split at 2); 3, 4 -> 5 (a merger at 3); 6 -> 7; 8 -> 9 on other tokens."""
    axes = torch.eye(8)
    present = {
        0: (0, 2),
        1: (2, 5),
        2: (2, 5),
        3: (0, 3),
        4: (0, 3),
        5: (3, 5),
        6: (0, 2),
        7: (3, 5),
        8: (0, 2),
        9: (2, 5),
    }
    direction = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 3, 9: 3}
    rows = torch.zeros(10, 5, 8)
    for i, (born, died) in present.items():
        rows[i, born:died] = axes[direction[i]]
    cc = of_rows(rows, snapshots_at(0, 1, 10, 100, 1000))
    # eight inputs at the first snapshot decide which features are active
    inputs = {0: (0, 1), 1: (0,), 2: (1,), 3: (2,), 4: (3,), 5: (2, 3), 6: (4,), 7: (4,), 8: (5,), 9: (6,)}
    cc.W_enc.data.zero_()
    for i, on in inputs.items():
        for k in on:
            cc.W_enc.data[k, i] = 1.0
    x = torch.zeros(80, 5, 8)
    x[torch.arange(80), 0, torch.arange(80) % 8] = 1.0
    table = replacements(cc, Held(x))
    found = {(r["predecessor"], r["successor"]): r["kind"] for r in table.to_dict("records")}
    assert found == {
        (0, 1): "split", (0, 2): "split", (3, 5): "merger", (4, 5): "merger", (6, 7): "replacement",
    }  # fmt: skip
    assert table["death_step"].tolist() == [10, 10, 10, 100, 100] and table["birth_step"].tolist() == [
        10,
        10,
        100,
        100,
        100,
    ]
    assert table["overlap"].tolist() == pytest.approx([1.0] * 5)
    assert len(replacements(cc, Held(x), max_gap=0)) == 4  # 6 dies at 2, 7 is born at 3
    assert len(replacements(cc, Held(x), min_overlap=-1.0)) == 6


def test_there_are_no_replacements_without_deaths(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    table = replacements(of_norms(torch.ones(4, 3)), Held(torch.randn(9, 3, 4)))
    assert table.empty and {"predecessor", "successor", "kind", "death_step"} <= set(table)
    with pytest.raises(UserError, match="max_gap=-1 must be 0 or more snapshots"):
        replacements(of_norms(torch.ones(4, 3)), Held(torch.randn(9, 3, 4)), max_gap=-1)
    with pytest.raises(UserError, match="at least 2 snapshots"):
        replacements(of_norms(torch.ones(4, 1)), Held(torch.randn(9, 1, 4)))
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", tiny_text, 500, 16)
    other = [{**row, "fingerprint": "0" * 64} for row in acts.metadata()["snapshots"]]
    with pytest.raises(UserError, match="lifecycles lack the firing rates of this crosscoder"):
        of_norm = evolve(of_norms(torch.ones(4, 3))).lifecycles()
        replacements(of_norms(torch.ones(4, 3)), Held(torch.randn(9, 3, 4)), of_norm)
    with pytest.raises(UserError, match="trained on other weights"):
        replacements(of_norms(torch.ones(4, 3), other, D=16), acts)


# ---- splits


def slow_splits(cc: Any, alive: list[bool], presence: float, together: float, apart: float) -> list[tuple]:
    rows = cc.W_dec_by_snapshot.numpy().astype(float)
    F, S, _ = rows.shape
    size = np.linalg.norm(rows, axis=-1)
    found = []
    for i in range(F):
        for j in range(i + 1, F):
            if not (alive[i] and alive[j]):
                continue
            common = [s for s in range(S) if min(size[i, s] / size[i].max(), size[j, s] / size[j].max()) >= presence]
            c = [cosine(rows[i, s], rows[j, s]) for s in common]
            if not c:
                continue
            close = [value >= (together + apart) / 2 for value in c]
            changes = [k for k in range(1, len(c)) if close[k] != close[k - 1]]
            if len(changes) != 1:
                continue
            if c[0] >= together and c[-1] < apart:
                found.append((i, j, "split", common[changes[0]]))
            elif c[0] < apart and c[-1] >= together:
                found.append((i, j, "merger", common[changes[0]]))
    return found


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_splits_match_the_definition_in_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cc = of_norms(torch.rand(24, 5, generator=generator) + 0.3, D=2, seed=seed)
    alive = torch.rand(24, generator=generator) < 0.9
    for presence, together, apart in ((0.5, 0.9, 0.7), (0.3, 0.6, 0.6)):
        slow = slow_splits(cc, alive.tolist(), presence, together, apart)
        assert len({row[2] for row in slow}) == 2
        table = splits(cc, alive, presence=presence, together=together, apart=apart)
        assert [tuple(row) for row in table[["feature", "partner", "kind", "at"]].to_numpy()] == slow


def test_a_split_and_a_merger_by_hand() -> None:
    axes = torch.eye(6)
    rows = torch.zeros(6, 4, 6)
    rows[0], rows[1], rows[2], rows[3], rows[4] = axes[0], axes[0], axes[1], axes[2], axes[3]
    rows[1, 2:] = axes[4]  # splits from 0 at snapshot 2
    rows[3, 3:] = axes[1]  # merges with 2 at snapshot 3
    rows[5, 1:] = axes[3]  # is born as a copy of 4 and stays it
    table = splits(of_rows(rows, snapshots_at(0, 1, 10, 100)))
    assert table[["feature", "partner", "kind", "at"]].to_numpy().tolist() == [[0, 1, "split", 2], [2, 3, "merger", 3]]
    assert table["at_step"].tolist() == [10, 100] and table["at_tokens"].tolist() == [70, 700]
    assert table["cosine_before"].tolist() == [1.0, 0.0] and table["cosine_after"].tolist() == [0.0, 1.0]
    cc = of_rows(rows)
    assert len(splits(cc, torch.tensor([True, False, True, True, True, True]))) == 1
    assert splits(of_rows(torch.eye(4)[:, None].expand(4, 3, 4))).empty
    assert splits(cc, torch.tensor(evolve(cc).lifecycles()["alive"].to_numpy()) & False).empty
    with pytest.raises(UserError, match="splitting needs at least 2 snapshots, this crosscoder has 1"):
        splits(of_rows(torch.ones(2, 1, 3)))
    with pytest.raises(UserError, match="apart=0.9 and together=0.8 must satisfy"):
        splits(cc, together=0.8, apart=0.9)


# ---- by chance


def pairs_of_rows(cosines: np.ndarray) -> Any:
    """Pairs 2i, 2i + 1 of features whose rows have these cosines (n, S), and nothing in common with other pairs."""
    n, S = cosines.shape
    rows = torch.zeros(2 * n, S, 2 * n)
    for i in range(n):
        rows[2 * i, :, 2 * i] = 1
        rows[2 * i + 1, :, 2 * i] = torch.from_numpy(cosines[i]).float()
        rows[2 * i + 1, :, 2 * i + 1] = torch.from_numpy(np.sqrt(1 - cosines[i] ** 2)).float()
    return of_rows(rows, snapshots_at(*range(S)))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_chance_is_that_of_the_same_pairs_in_other_orders(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.splitting, "_DRAWS", 12)
    rng = np.random.default_rng(seed)
    cc = pairs_of_rows(np.clip(rng.normal(0.8, 0.15, (25, 5)), -1, 1))
    cc.W_dec.data *= torch.from_numpy(rng.choice([0.2, 1.0, 1.0], (50, 5))).float().repeat_interleave(50, 1)
    lexical = rng.random(50) < 0.6
    table, rows = split_counts(cc, lexical=lexical, seed=seed)
    pd.testing.assert_frame_equal(table, splits(cc))
    words = {0: "contextual", 1: "mixed", 2: "lexical"}

    def kinds_of(table: pd.DataFrame) -> list[str]:
        return [words[int(lexical[i]) + int(lexical[j])] for i, j in table[["feature", "partner"]].to_numpy()]

    drawn = np.random.default_rng(seed)
    shuffled: list[pd.DataFrame] = []
    for _ in range(12):
        order = drawn.permutation(5)
        shuffled.append(splits(of_rows(cc.W_dec_by_snapshot[:, torch.from_numpy(order)], snapshots_at(*range(5)))))
    assert [(row["kind"], row["features"]) for row in rows] == [
        (kind, features) for kind in ("split", "merger") for features in ("all", "lexical", "contextual", "mixed")
    ]
    for row in rows:
        count = lambda table, row=row: sum(  # noqa: E731
            kind == row["kind"] and row["features"] in ("all", features)
            for kind, features in zip(table["kind"], kinds_of(table), strict=True)
        )
        assert row["n"] == count(table)
        by_chance = [count(one) for one in shuffled]
        assert row["by_chance"] == pytest.approx(np.mean(by_chance))
        assert row["most_by_chance"] == pytest.approx(np.quantile(by_chance, 0.95))
    assert split_counts(cc, seed=seed)[1] == [row for row in rows if row["features"] == "all"]


def test_pairs_without_order_do_not_exceed_chance_and_planted_splits_do() -> None:
    rng, exceed = np.random.default_rng(0), 0
    for seed in range(20):
        cc = pairs_of_rows(np.clip(rng.normal(0.8, 0.2, (30, 6)), -1, 1))
        exceed += sum(row["n"] > row["most_by_chance"] for row in split_counts(cc, seed=seed)[1])
    assert exceed <= 4  # of 40, at 5 %
    planted = np.where(np.arange(8) < rng.integers(1, 8, (15, 1)), 0.97, 0.3)
    rows = {row["kind"]: row for row in split_counts(pairs_of_rows(planted))[1]}
    assert rows["split"]["n"] == 15 > 2 * rows["split"]["most_by_chance"] and rows["merger"]["n"] == 0


@torch.no_grad()
def test_replacements_by_chance_have_their_births_permuted() -> None:
    generator = torch.Generator().manual_seed(1)
    F, S = 40, 6
    rows = torch.nn.functional.normalize(torch.randn(F, 1, 3, generator=generator).expand(F, S, 3), dim=-1).clone()
    births = torch.randint(0, S, (F,), generator=generator)
    rows *= ((torch.arange(S) >= births[:, None]) & (torch.arange(S) < births[:, None] + 3))[..., None]
    cc, acts = of_rows(rows, snapshots_at(*range(S))), Held(torch.randn(400, S, 3, generator=generator))
    firing = measure_firing(cc, acts)
    life = classify_lifecycles(cc.decoder_norms).assign(firing_rate=firing.rate)
    joint = JointActivity(cc, acts, life, min_overlap=0.2)
    (found,), table = joint.counts(seed=3), joint.table()
    pd.testing.assert_frame_equal(table, replacements(cc, acts, life, min_overlap=0.2))
    assert found["n"] == len(table) > 0
    every = replacements(cc, acts, life, min_overlap=0.2, max_gap=S)
    birth = life["birth"].to_numpy(dtype=float, na_value=-1).astype(int)
    born, rng = np.flatnonzero(birth > 0), np.random.default_rng(3)
    counts = []
    for _ in range(200):
        drawn = birth.copy()
        drawn[born] = rng.permutation(birth[born])
        counts.append(sum(abs(row["death"] - drawn[row["successor"]]) <= 1 for row in every.to_dict("records")))
    assert found["by_chance"] == pytest.approx(np.mean(counts))
    assert found["most_by_chance"] == pytest.approx(np.quantile(counts, 0.95))
