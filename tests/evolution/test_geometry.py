"""Cosines, rotation and dimensionality: plain loops, and cases with known answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import crosslens.evolution.geometry
from crosslens.errors import UserError
from crosslens.evolution.firing import Firing, measure_firing
from crosslens.evolution.geometry import (
    decoder_cosines,
    feature_dimensionality,
    half_cosines,
    linear_maps,
    rotation,
    rotation_per_interval,
    total_dimensionality,
)
from crosslens.evolution.history import evolve
from tests.given import Held, Read, of_norms, of_rows, snapshots_at


def firing_of(rms: Any, S: int) -> Firing:
    """Firing with given root mean squares."""
    rms = torch.as_tensor(rms, dtype=torch.float64)
    rate = (rms > 0).double()
    return Firing(100, rate, rms, rate[:, None].expand(-1, S), rms[:, None].expand(-1, S))


def angles(*degrees: float) -> list[list[float]]:
    """Unit vectors in the plane."""
    return [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees]


@pytest.fixture(params=[4096, 3])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.geometry, "_BLOCK", request.param)


# ---- cosines


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(("F", "S", "D", "seed"), [(7, 3, 4, 0), (10, 5, 2, 1), (1, 2, 6, 2)])
def test_cosines_match_plain_loops(F: int, S: int, D: int, seed: int) -> None:
    norms = torch.rand(F, S, generator=torch.Generator().manual_seed(seed))
    norms[0, 0], norms[-1, 1] = 0.0, 0.02
    cc = of_norms(norms, D=D, seed=seed)
    rows = cc.W_dec.detach().numpy().reshape(F, S, D).astype(float)
    found = decoder_cosines(cc)
    assert found.shape == (F, S, S)
    for i in range(F):
        size = [np.sqrt((rows[i, s] ** 2).sum()) for s in range(S)]
        for s in range(S):
            for t in range(S):
                if min(size[s], size[t]) < 0.05 * max(size):
                    assert found[i, s, t].isnan()
                else:
                    expected = float(rows[i, s] @ rows[i, t]) / (size[s] * size[t])
                    assert float(found[i, s, t]) == pytest.approx(expected, abs=1e-5)
    chosen = torch.tensor([F - 1, 0])
    assert torch.equal(decoder_cosines(cc, chosen).nan_to_num(9), found[chosen].nan_to_num(9))
    assert torch.allclose(found[:, :, -1], rotation(cc), atol=1e-6, equal_nan=True)
    assert decoder_cosines(of_rows(torch.zeros(2, 3, 4))).isnan().all()


# ---- rotation


def slow_rotation(rows: np.ndarray, alive: list[bool], min_norm: float, max_cosine: float) -> dict[str, Any]:
    F, S, _ = rows.shape
    size = np.linalg.norm(rows, axis=-1)
    seen: list[list[float]] = [[] for _ in range(S - 1)]
    rotated = [0] * (S - 1)
    for i in range(F):
        if not alive[i] or size[i].max() == 0:
            continue
        largest, where = max_cosine, None
        for s in range(S - 1):
            if min(size[i, s], size[i, s + 1]) < min_norm * size[i].max():
                continue
            cosine = float(rows[i, s] @ rows[i, s + 1]) / (size[i, s] * size[i, s + 1])
            seen[s].append(cosine)
            if cosine < largest:
                largest, where = cosine, s
        if where is not None:
            rotated[where] += 1
    return {"n": [len(c) for c in seen], "median_cosine": [np.median(c) for c in seen], "rotated": rotated}


@pytest.mark.parametrize("seed", range(4))
def test_every_feature_counts_where_it_rotates_most(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cc = of_norms(torch.rand(40, 5, generator=generator), D=3, seed=seed)
    alive = torch.rand(40, generator=generator) < 0.8
    for min_norm, max_cosine in ((0.05, 0.9), (0.4, 0.0)):
        table = rotation_per_interval(cc, alive, min_norm=min_norm, max_cosine=max_cosine)
        slow = slow_rotation(cc.W_dec_by_snapshot.detach().numpy().astype(float), alive.tolist(), min_norm, max_cosine)
        assert table["n"].tolist() == slow["n"] and table["rotated"].tolist() == slow["rotated"]
        assert table["median_cosine"].tolist() == pytest.approx(slow["median_cosine"], abs=1e-5)
        assert table["share"].tolist() == pytest.approx(np.array(slow["rotated"]) / sum(slow["rotated"]))
        assert table["largest"].tolist().index(True) == int(np.argmax(slow["rotated"]))
        assert table["largest"].sum() == 1


def test_rotation_per_interval_by_hand() -> None:
    rows = [angles(0, 0, 60, 70), angles(0, 5, 90, 90), angles(0, 40, 50, 50), angles(0, 10, 20, 30)]
    table = rotation_per_interval(of_rows(rows, snapshots_at(0, 1, 10, 100)))
    assert table["rotated"].tolist() == [1, 2, 0] and table["largest"].tolist() == [False, True, False]
    assert table["share"].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert table[["before", "after"]].to_numpy().tolist() == [[0, 1], [1, 2], [2, 3]]
    assert table["from"].tolist() == ["step0", "step1", "step10"] and table["to"].tolist()[-1] == "step100"
    assert table["from_step"].tolist() == [0, 1, 10] and table["to_tokens"].tolist() == [7, 70, 700]
    last = rotation_per_interval(of_rows(rows), torch.tensor([False, False, True, True]))
    assert last["rotated"].tolist() == [1, 0, 0] and last["from"].tolist() == ["0", "1", "2"]
    assert last["from_step"].isna().all()


def test_training_is_counted_in_steps_where_tokens_are_not_known_of_all() -> None:
    recorded = snapshots_at(1, 2, 8)
    recorded[1]["tokens"] = None
    found = rotation_per_interval(of_rows([angles(0, 0, 60)] * 2, recorded))
    assert found["doublings"].tolist() == [1, 2]


@pytest.mark.parametrize(("jumprelu", "seed"), [(False, 0), (True, 1), (False, 2)])
def test_halves_are_least_squares_of_all_features(jumprelu: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    F, S, D = 6, 3, 4
    cc = of_norms(torch.rand(F, S, generator=draw) + 0.2, snapshots_at(0, 5, 20), D=D, seed=seed, jumprelu=jumprelu)
    cc.b_dec.data = torch.randn(S * D, generator=draw)
    cc.b_enc.data[5] = -1e3  # silent
    tokens = torch.randint(1, 5, (9, 30), generator=draw)
    held = Read(torch.randn(9, 30, S, D, generator=draw), tokens)
    found = half_cosines(cc, held)
    n = 270
    f, x = cc.encode(held.x).double(), cc.scale(held.x).double()
    rows = np.full((2, F, S, D), np.nan)
    for half, part in enumerate((range(n // 2), range(n // 2, n))):
        for s in range(S):
            gated = cc.snapshot_acts(f.float(), s).double()[list(part)].numpy()
            target = x[list(part), s].numpy()
            often = (gated > 0).sum(0) >= 10
            gated, target = gated - gated.mean(0), target - target.mean(0)
            moments = gated.T @ gated + 1e-2 * np.diag((gated**2).sum(0))
            kept = np.ix_(often, often)
            rows[half, often, s] = np.linalg.solve(moments[kept], (gated.T @ target)[often])
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    same = (rows[0] * rows[1]).sum(-1)
    following = ((rows[0, :, :-1] * rows[1, :, 1:]).sum(-1) + (rows[1, :, :-1] * rows[0, :, 1:]).sum(-1)) / 2
    np.testing.assert_allclose(found.same, same, atol=1e-4)
    np.testing.assert_allclose(found.next, following, atol=1e-4)
    assert found.same[5].isnan().all() and (jumprelu or found.same[:5].isfinite().all())

    table = rotation_per_interval(cc, halves=found)
    alone = rotation_per_interval(cc)
    own = cc.W_dec_by_snapshot.detach().double().numpy()
    own = own / np.linalg.norm(own, axis=-1, keepdims=True)
    turned = np.rad2deg(np.arccos((own[:, :-1] * own[:, 1:]).sum(-1)))
    assert table["angle"].tolist() == pytest.approx(np.median(turned, 0).tolist(), abs=1e-2)
    known = np.isfinite(same[:, :-1] * same[:, 1:])
    null = np.sqrt(same[:, :-1].clip(0) * same[:, 1:].clip(0))
    for name, values in (("halves_angle", following), ("null_angle", null)):
        expected = np.nanmedian(np.rad2deg(np.arccos(values)), 0)
        assert table[name].tolist() == pytest.approx(expected.tolist(), abs=1e-2)
        assert alone[name].isna().all()
    assert table["beyond_null"].tolist() == pytest.approx(
        [(following < null)[known[:, s], s].mean() for s in range(S - 1)]
    )
    assert np.isnan(table["doublings"][0]) and table["doublings"][1] == 2.0  # of 35 to 140 tokens
    assert table["angle_per_doubling"].tolist()[1] == pytest.approx(table["angle"][1] / 2)
    assert table["null_per_doubling"].tolist()[1] == pytest.approx(table["null_angle"][1] / 2)
    pd.testing.assert_frame_equal(table[["n", "rotated", "angle"]], alone[["n", "rotated", "angle"]])


def test_halves_of_what_does_not_turn_agree() -> None:
    """Noise around rows that are equal at all snapshots is no more rotation than between halves of one snapshot."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 1, 16, generator=draw).expand(12, 3, 16)
    cc = of_rows(rows / rows.norm(dim=-1, keepdim=True), snapshots_at(1, 2, 4))
    f = torch.rand(400, 10, 12, generator=draw) * (torch.rand(400, 10, 12, generator=draw) < 0.2)
    x = torch.einsum("ntf,fsd->ntsd", f, cc.W_dec_by_snapshot) + 0.3 * torch.randn(400, 10, 3, 16, generator=draw)
    table = rotation_per_interval(cc, halves=half_cosines(cc, Read(x, torch.ones(400, 10, dtype=torch.long))))
    assert table["angle"].max() < 0.1
    assert (table["null_angle"] > 1).all()
    assert table["halves_angle"].tolist() == pytest.approx(table["null_angle"].tolist(), rel=0.25)
    assert table["at_edge"].all() and table["doublings"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_snapshot_do_not_rotate_whatever_the_dictionary_wrote(seed: int) -> None:
    """Snapshots 0 and 1 are the same, 2 is turned; the rows of the dictionary are wrong in another way at each."""
    draw = torch.Generator().manual_seed(seed)
    F, D = 40, 24
    true = torch.nn.functional.normalize(torch.randn(F, 1, D, generator=draw), dim=-1).expand(F, 3, D).clone()
    true[:, 2] = torch.nn.functional.normalize(true[:, 2] + 0.15 * torch.randn(F, D, generator=draw), dim=-1)
    cc = of_rows(true + 0.05 * torch.randn(F, 3, D, generator=draw), snapshots_at(1, 2, 4))
    f = torch.rand(300, 10, F, generator=draw) * (torch.rand(300, 10, F, generator=draw) < 0.15)
    noise = 0.2 * torch.randn(300, 10, 3, D, generator=draw)
    noise[:, :, 1] = noise[:, :, 0]
    x = torch.einsum("ntf,fsd->ntsd", f, true) + noise
    table = rotation_per_interval(cc, halves=half_cosines(cc, Read(x, torch.ones(300, 10, dtype=torch.long))))
    assert table["beyond_null"][0] == pytest.approx(0.5, abs=0.05)
    assert table["halves_angle"][0] == pytest.approx(table["null_angle"][0], rel=0.05)
    assert table["beyond_null"][1] > 0.9


def test_no_interval_is_marked_if_nothing_rotates() -> None:
    for cc, alive in ((of_rows([angles(0, 5, 9)]), None), (of_rows([angles(0, 90, 0)]), torch.tensor([False]))):
        table = rotation_per_interval(cc, alive)
        assert table["rotated"].tolist() == [0, 0] and not table["largest"].any() and table["share"].isna().all()
    assert table["n"].tolist() == [0, 0] and table["median_cosine"].isna().all()
    with pytest.raises(UserError, match="rotation needs at least 2 snapshots, this crosscoder has 1: train on more"):
        rotation_per_interval(of_rows([angles(0)]))


# ---- dimensionality


def slow_dimensionality(cc: Any, rms: np.ndarray, presence: float) -> np.ndarray:
    rows = cc.W_dec_by_snapshot.detach().numpy().astype(float)
    F, S, _ = rows.shape
    v = np.linalg.norm(rows, axis=-1)
    v = v / v.max(1, keepdims=True)
    out = np.full((F, S), np.nan)
    for s in range(S):
        there = [i for i in range(F) if v[i, s] >= presence and rms[i] > 0]
        for i in there:
            w = rms[i] * rows[i, s]
            out[i, s] = (w @ w) ** 2 / sum((w @ (rms[j] * rows[j, s])) ** 2 for j in there)
    return out


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize(("F", "S", "D", "seed"), [(9, 3, 4, 0), (14, 2, 5, 1), (3, 4, 8, 2)])
def test_dimensionality_matches_the_double_sum(F: int, S: int, D: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cc = of_norms(torch.rand(F, S, generator=generator) + 0.1, D=D, seed=seed)
    rms = torch.rand(F, generator=generator).double() * 3
    rms[1] = 0.0
    for presence in (0.5, 0.9):
        slow = slow_dimensionality(cc, rms.numpy(), presence)
        found = feature_dimensionality(cc, firing_of(rms, S), presence=presence)
        assert found.numpy() == pytest.approx(slow, rel=1e-6, nan_ok=True)  # products are in float32
        table = total_dimensionality(cc, firing_of(rms, S), presence=presence)
        assert table["present"].tolist() == (~np.isnan(slow)).sum(0).tolist()
        assert table["total"].tolist() == pytest.approx(np.nansum(slow, 0).tolist())
        assert (table["share"] * D).tolist() == pytest.approx(table["total"].tolist())
        assert (table["total"] <= D * (1 + 1e-6)).all() and (table["random_total"] <= D * (1 + 1e-6)).all()


def test_dimensionality_of_known_arrangements() -> None:
    axes = torch.eye(4)[:, None]
    assert torch.allclose(
        feature_dimensionality(of_rows(axes), firing_of([1, 5, 0.1, 2], 1)), torch.ones(4, 1).double()
    )
    equal = torch.ones(5, 1, 3)
    assert feature_dimensionality(of_rows(equal), firing_of([1.0] * 5, 1)).flatten().tolist() == pytest.approx(
        [0.2] * 5
    )
    # an antipodal pair shares one dimension, a triangle in the plane two
    pair = feature_dimensionality(of_rows([[[1.0, 0]], [[-1.0, 0]]]), firing_of([2, 2], 1))
    assert pair.flatten().tolist() == pytest.approx([0.5, 0.5])
    triangle = feature_dimensionality(of_rows([[a] for a in angles(0, 120, 240)]), firing_of([1, 1, 1], 1))
    assert triangle.flatten().tolist() == pytest.approx([2 / 3] * 3)


def test_dimensionality_is_invariant_to_the_scale_of_a_feature() -> None:
    generator = torch.Generator().manual_seed(3)
    cc = of_norms(torch.rand(12, 3, generator=generator) + 0.5, D=4)
    x = torch.randn(60, 3, 4, generator=generator)
    before = feature_dimensionality(cc, Held(x))
    factor = torch.logspace(-2, 2, 12)
    cc.W_dec.data *= factor[:, None]
    cc.W_enc.data /= factor
    assert torch.allclose(feature_dimensionality(cc, Held(x)), before, rtol=1e-4, equal_nan=True)
    measured = feature_dimensionality(cc, measure_firing(cc, Held(x)))
    assert torch.allclose(measured, feature_dimensionality(cc, Held(x)), equal_nan=True)


@pytest.mark.usefixtures("_block")
def test_random_directions_have_the_same_number_and_norms() -> None:
    norms = torch.rand(30, 2, generator=torch.Generator().manual_seed(4)) + 0.4
    cc, firing = of_norms(norms, D=6), firing_of(torch.linspace(0.2, 2, 30), 2)
    tables = [total_dimensionality(cc, firing, seed=seed) for seed in range(60)]
    assert tables[0].equals(total_dimensionality(cc, firing, seed=0))
    rng = np.random.default_rng(0)
    for s in range(2):
        v = norms[:, s] / norms.amax(1)
        lengths = (firing.rms * norms[:, s])[v >= 0.4].numpy()
        draws = []
        for _ in range(60):
            w = rng.normal(size=(len(lengths), 6))
            w *= lengths[:, None] / np.linalg.norm(w, axis=1, keepdims=True)
            gram = w @ w.T
            draws.append((np.diag(gram) ** 2 / (gram**2).sum(1)).sum())
        found = [table["random_total"][s] for table in tables]
        assert len(set(found)) > 50
        assert np.mean(found) == pytest.approx(np.mean(draws), abs=4 * np.std(draws) / np.sqrt(30))
    same = total_dimensionality(of_norms(torch.ones(30, 1), D=6), firing_of(torch.ones(30), 1))
    twice = of_rows(of_norms(torch.ones(30, 1), D=6).W_dec_by_snapshot.expand(30, 2, 6))
    table = total_dimensionality(twice, firing_of(torch.ones(30), 2))
    assert table["total"].tolist() == pytest.approx([same["total"][0]] * 2)
    assert table["random_total"][0] != table["random_total"][1]  # every snapshot has its own draws
    assert (tables[0]["random_share"] * 6).tolist() == pytest.approx(tables[0]["random_total"].tolist())
    # without the rms, as Elhage et al. wrote it: |W_i|^2 / sum_j (W_i / |W_i| . W_j)^2
    for s in range(2):
        w = cc.W_dec_by_snapshot[:, s].detach().double().numpy()[(norms[:, s] / norms.amax(1) >= 0.4).numpy()]
        unit = w / np.linalg.norm(w, axis=1, keepdims=True)
        expected = (np.linalg.norm(w, axis=1) ** 2 / ((unit @ w.T) ** 2).sum(1)).sum()
        assert tables[0]["elhage_total"][s] == pytest.approx(expected)
        assert tables[0]["elhage_share"][s] == pytest.approx(expected / 6)
        assert tables[0]["random_elhage_share"][s] <= 1
    alike = total_dimensionality(cc, firing_of(torch.ones(30), 2))
    assert alike["total"].tolist() == pytest.approx(alike["elhage_total"].tolist())


def test_many_features_fit_in_memory() -> None:
    F = 98_304  # F x F numbers would take 39 GB
    cc = of_norms(torch.ones(F, 2), D=8)
    table = total_dimensionality(cc, firing_of(torch.ones(F), 2))
    assert table["share"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3) and table["present"].tolist() == [F, F]


def test_without_present_features_dimensionality_is_zero() -> None:
    cc = of_rows(torch.ones(3, 2, 4), snapshots_at(0, 5))
    table = total_dimensionality(cc, firing_of([0.0] * 3, 2))
    assert table["present"].tolist() == [0, 0] and table["total"].tolist() == [0.0, 0.0]
    assert table["label"].tolist() == ["step0", "step5"] and table["tokens"].tolist() == [0, 35]
    assert feature_dimensionality(cc, firing_of([0.0] * 3, 2)).isnan().all()
    with pytest.raises(UserError, match=r"presence=0 is not in \(0, 1\]"):
        total_dimensionality(cc, firing_of([1.0] * 3, 2), presence=0)
    cc.b_enc.data.fill_(-99)
    held = Held(torch.randn(5, 2, 4))
    assert not evolve(cc, measure_firing(cc, held)).lifecycles()["alive"].any()
    assert total_dimensionality(cc, held)["total"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(2))
def test_maps_are_least_squares_and_take_a_common_turn_away(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    F, D, n = 9, 8, 500
    rows = torch.randn(F, 1, D, generator=draw).expand(F, 3, D).clone()
    turn = torch.linalg.qr(torch.randn(D, D, generator=draw)).Q
    rows[:, 1] = rows[:, 0] @ turn  # all together
    rows[:, 2] = torch.randn(F, D, generator=draw)  # each its own way
    cc = of_rows(rows, snapshots_at(1, 2, 4))
    cc.activation_scale.copy_(torch.tensor([1.0, 0.5, 2.0]))
    x = torch.randn(n, 3, D, generator=draw)
    x[:, 1] = 2 * x[:, 0] @ turn + 3
    held = Read(x[None], torch.ones(1, n, dtype=torch.long))
    maps = linear_maps(cc, held, ridge=1e-6)
    scaled = cc.scale(x).double().numpy()
    scaled = scaled - scaled.mean(0)
    for s in range(2):
        expected = np.linalg.lstsq(scaled[:, s], scaled[:, s + 1], rcond=None)[0]
        np.testing.assert_allclose(maps[s], expected, atol=1e-4)
    table = rotation_per_interval(cc, maps=maps)
    assert table["angle"].min() > 30 and table["mapped_angle"][0] < 0.1 and table["mapped_angle"][1] > 30
    assert rotation_per_interval(cc)["mapped_angle"].isna().all()
