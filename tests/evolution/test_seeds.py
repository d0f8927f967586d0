"""Matching against all permutations and plain correlations, consensus and agreement against plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import crosslens.evolution.seeds
from crosslens.activations.loader import Activations
from crosslens.errors import UserError
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.geometry import rotation_per_interval, total_dimensionality
from crosslens.evolution.history import evolve
from crosslens.evolution.lifecycles import classify_lifecycles
from crosslens.evolution.seeds import (
    add_consensus,
    compare_evolutions,
    compare_features,
    compare_seeds,
    consensus,
    consensus_shares,
    describe_seeds,
    match,
    match_shares,
    rotation_of_partners,
    shared_snapshots,
)
from tests.given import Held, Read, of_norms, of_rows, snapshots_at


def drawn(F: int, seed: int, *, S: int = 2, D: int = 6) -> Any:
    """A crosscoder whose features fire now and then."""
    made = of_norms(torch.rand(F, S, generator=torch.Generator().manual_seed(seed)) + 0.2, D=D, seed=seed + 50)
    made.b_enc.data[:] = -0.5
    return made


def held(n: int = 60, S: int = 2, D: int = 6, seed: int = 0) -> Held:
    return Held(torch.randn(n, S, D, generator=torch.Generator().manual_seed(seed)))


def features_of(crosscoder: Any, acts: Held) -> np.ndarray:
    """(N, F) activations in float64."""
    return crosscoder.encode(acts.x).double().numpy()


def correlations(a: Any, b: Any, acts: Held) -> np.ndarray:
    """Correlations of all pairs of features, one pair at a time; NaN where a feature never fires."""
    left, right = features_of(a, acts), features_of(b, acts)
    with np.errstate(invalid="ignore"):
        return np.array([[np.corrcoef(x, y)[0, 1] for y in right.T] for x in left.T])


def cosines(a: Any, b: Any) -> np.ndarray:
    """Cosines of whole decoders, one pair of features at a time."""
    left, right = (cc.W_dec.detach().numpy().astype(float) for cc in (a, b))
    return np.array([[x @ y / np.sqrt((x @ x) * (y @ y)) for y in right] for x in left])


def variances(crosscoder: Any, acts: Held) -> np.ndarray:
    """Shares of the features in the variance that they write."""
    f = features_of(crosscoder, acts)
    written = [f[:, i].var() * float((row.double() ** 2).sum()) for i, row in enumerate(crosscoder.W_dec)]
    return np.array(written) / sum(written)


def pairs_of(table: pd.DataFrame) -> set[tuple[int, int]]:
    paired = table.dropna(subset=["feature", "partner"])
    return set(zip(paired["feature"].astype(int), paired["partner"].astype(int), strict=True))


# ---- matching


@pytest.mark.parametrize(("F", "G", "seed"), [(5, 5, 0), (4, 6, 1), (6, 3, 2)])
@pytest.mark.parametrize("by", ["activation", "decoder"])
def test_the_assignment_is_the_best_of_all(F: int, G: int, seed: int, by: str) -> None:
    a, b, acts = drawn(F, seed), drawn(G, seed + 10), held(seed=seed)
    table = match(a, b, acts, by=by)
    r, c = correlations(a, b, acts), cosines(a, b)
    n, wanted = min(F, G), r if by == "activation" else c
    pairs = pairs_of(table)
    assert len(pairs) == n and len(table) == F + G - n
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == n
    ranges = (range(G), F) if F <= G else (range(F), G)
    best = max(
        sum(wanted[i, j] if F <= G else wanted[j, i] for i, j in enumerate(order))
        for order in itertools.permutations(*ranges)
    )
    assert sum(wanted[i, j] for i, j in pairs) == pytest.approx(best)
    va, vb, fa, fb = variances(a, acts), variances(b, acts), features_of(a, acts), features_of(b, acts)
    for row in table.to_dict("records"):
        i, j = row["feature"], row["partner"]
        if not pd.isna(i):
            assert row["nearest"] == pytest.approx(r[i].max())
            assert row["variance"] == pytest.approx(va[i])
            assert row["firing_rate"] == pytest.approx((fa[:, i] > 0).mean())
        if not pd.isna(j):
            assert row["partner_nearest"] == pytest.approx(r[:, j].max())
            assert row["partner_variance"] == pytest.approx(vb[j])
            assert row["partner_firing_rate"] == pytest.approx((fb[:, j] > 0).mean())
        if not pd.isna(i) and not pd.isna(j):
            assert row["correlation"] == pytest.approx(r[i, j], abs=1e-6)
            assert row["cosine"] == pytest.approx(c[i, j], abs=1e-6)
        else:
            assert math.isnan(row["correlation"]) and math.isnan(row["cosine"])
    assert table["variance"].sum() == pytest.approx(1) and table["partner_variance"].sum() == pytest.approx(1)
    assert table["correlation" if by == "activation" else "cosine"].dropna().is_monotonic_decreasing


@pytest.mark.parametrize("block", [1024, 3])
@pytest.mark.parametrize("seed", range(3))
def test_mutual_pairs_are_each_others_nearest(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.seeds, "_BLOCK", block)
    a, b, acts = drawn(11, seed), drawn(8, seed + 50), held(seed=seed)
    r = correlations(a, b, acts)
    slow = {(i, int(r[i].argmax())) for i in range(11) if int(r[:, r[i].argmax()].argmax()) == i}
    table = match(a, b, acts, method="mutual")
    assert pairs_of(table) == slow and len(slow) >= 2
    found = table.dropna(subset=["correlation"])
    assert found["correlation"].tolist() == pytest.approx(
        [r[i, j] for i, j in found[["feature", "partner"]].to_numpy()]
    )


@pytest.mark.parametrize("method", ["assignment", "mutual", None])
def test_features_are_found_by_their_tokens_not_their_directions(
    method: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crosslens.evolution.seeds, "ASSIGNED", 10)  # so that None chooses mutual
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    a, acts = drawn(30, 1, D=16), held(200, D=16)
    b = drawn(30, 2, D=16)  # other decoders
    b.W_enc.data = a.W_enc[:, order] + 0.02 * torch.randn(32, 30, generator=torch.Generator().manual_seed(3))
    table = match(a, b, acts, method=method)
    assert pairs_of(table) == {(int(i), j) for j, i in enumerate(order)}
    assert table["correlation"].min() > 0.8 and table["cosine"].abs().median() < 0.3
    assert table["null"].max() < 0.7, "permuted tokens match nothing"
    shares = match_shares(table)
    assert shares["share_a"] == shares["share_b"] == 1 and shares["null_a"] == 0 and shares["cosine_a"] < 0.2
    by_decoder = match_shares(match(a, b, acts, by="decoder", method=method))
    assert by_decoder["share_a"] < 0.3


def test_the_null_permutes_the_tokens_of_the_second() -> None:
    a, b, acts = drawn(6, 1), drawn(5, 2), held(40)
    table = match(a, b, acts, seed=3)
    order = np.random.default_rng(3).permutation(40)
    f, g = features_of(a, acts), features_of(b, acts)[order]
    r = np.array([[np.corrcoef(x, y)[0, 1] for y in g.T] for x in f.T])
    best = max(itertools.permutations(range(6), 5), key=lambda rows: sum(r[i, j] for j, i in enumerate(rows)))
    expected = {i: r[i, j] for j, i in enumerate(best)}
    found = table.dropna(subset=["null"]).set_index("feature")["null"].to_dict()
    assert found == pytest.approx(expected)


def test_only_live_features_are_matched() -> None:
    a, acts = drawn(5, 1), held(50)
    a.b_enc.data[1] = -99  # never fires
    a.W_enc.data[:, 2] = 0
    a.b_enc.data[2] = 1.7  # always the same
    a.W_dec.data[3] = 0  # writes nothing
    rates = (features_of(a, acts) > 0).mean(0)
    assert pairs_of(match(a, a, acts)) == {(0, 0), (4, 4)}
    rarer = 0 if rates[0] < rates[4] else 4
    floor = float(rates[[0, 4]].min())
    assert pairs_of(match(a, a, acts, min_rate=floor)) == {(4 - rarer, 4 - rarer)}
    assert len(match(a, a, acts, max_tokens=7)) <= 2
    assert match(a, a, acts, max_tokens=7)["firing_rate"].max() * 7 % 1 == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="no feature fires on more than 0.99 of the 50 held-out tokens: train longer"):
        match(a, a, acts, min_rate=0.99)
    for options, message in (
        ({"method": "best"}, "method='best' is unknown: use 'assignment', 'mutual', or None"),
        ({"by": "name"}, "by='name' is unknown: use 'activation' or 'decoder'"),
        ({"min_rate": 1}, r"min_rate=1 is not in \[0, 1\): it is a share of tokens"),
    ):
        with pytest.raises(UserError, match=message):
            match(a, a, acts, **options)


class Named(Held):
    """Held-out activations of given tokens."""

    def __init__(self, x: torch.Tensor, tokens: torch.Tensor) -> None:
        super().__init__(x)
        self.own = tokens

    def held_out_tokens(self) -> torch.Tensor:
        return self.own


def test_crosscoders_of_other_snapshots_are_compared_on_the_same_tokens() -> None:
    rows = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(40, 5, 5, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(40).view(4, 10)
    a = of_rows(rows, snapshots_at(0, 1, 10, 100))
    other = rows[:, [1, 3]].clone()
    b = of_rows(torch.cat([0.01 * rows[:, :1], other], 1), snapshots_at(5, 1, 100))
    assert shared_snapshots(a, b) == ([1, 3], [1, 2])
    seen_a, seen_b = Named(x[:, :4], tokens), Named(x[:, [4, 1, 3]], tokens)
    table = match(a, b, seen_a, acts_b=seen_b)
    f, g = a.encode(x[:, :4]).double().numpy(), b.encode(x[:, [4, 1, 3]]).double().numpy()
    assert pairs_of(table) == {(i, i) for i in range(6)}
    for row in table.to_dict("records"):
        assert row["cosine"] == pytest.approx(1)
        assert row["correlation"] == pytest.approx(np.corrcoef(f[:, row["feature"]], g[:, row["partner"]])[0, 1])
    with pytest.raises(UserError, match="acts and acts_b hold out different tokens"):
        match(a, b, seen_a, acts_b=Named(x[:, [4, 1, 3]], tokens + 1))
    apart = of_rows(torch.cat([0.01 * rows[:, :1], other], 1), snapshots_at(5, 6, 7))
    assert match(a, apart, seen_a, acts_b=seen_b)["cosine"].isna().all()
    with pytest.raises(UserError, match="no snapshot in common"):
        match(a, apart, seen_a, acts_b=seen_b, by="decoder")


def test_snapshots_with_different_weights_are_not_common() -> None:
    def recorded(*fingerprints: str) -> list[dict[str, Any]]:
        return [{**row, "fingerprint": f} for row, f in zip(snapshots_at(0, 1), fingerprints, strict=True)]

    a, b = of_norms(torch.ones(3, 2), recorded("x", "y")), of_norms(torch.ones(3, 2), recorded("x", "z"))
    assert shared_snapshots(a, b) == ([0], [0])
    with pytest.raises(UserError, match="have 1 snapshot in common: comparing lifecycles needs at least 2"):
        compare_features(a, b, held())
    with pytest.raises(UserError, match="no snapshot in common .* equal labels have different weights"):
        shared_snapshots(a, of_norms(torch.ones(3, 2), recorded("p", "q")))
    with pytest.raises(UserError, match="have d_model 4 and 5: only crosscoders of one model can be matched"):
        shared_snapshots(a, of_norms(torch.ones(3, 2), D=5))


@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_shares_match_plain_loops(threshold: float) -> None:
    a, b, acts = drawn(20, 4), drawn(14, 5), held(80)
    b.W_enc.data[:, :6] = a.W_enc[:, :6] + 0.1 * torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    table = match(a, b, acts)
    found, r = match_shares(table, threshold), correlations(a, b, acts)
    pairs = [(i, j) for i, j in pairs_of(table) if r[i, j] >= threshold]
    assert 3 < len(pairs) < 14
    assert (found["live_a"], found["live_b"]) == (20, 14)
    assert found["share_a"] == pytest.approx(len(pairs) / 20) and found["share_b"] == pytest.approx(len(pairs) / 14)
    assert found["variance_a"] == pytest.approx(sum(variances(a, acts)[i] for i, _ in pairs))
    assert found["variance_b"] == pytest.approx(sum(variances(b, acts)[j] for _, j in pairs))
    assert found["nearest_a"] == pytest.approx(np.mean(r.max(1) >= threshold))
    assert found["nearest_b"] == pytest.approx(np.mean(r.max(0) >= threshold))
    assert found["median_cosine"] == pytest.approx(np.median([cosines(a, b)[i, j] for i, j in pairs]), abs=1e-6)


# ---- consensus


@pytest.mark.parametrize("n", [2, 3, 4])
def test_consensus_matches_plain_loops(n: int) -> None:
    acts, generator = held(100, D=8, seed=1), torch.Generator().manual_seed(n)
    common = torch.randn(16, 12, generator=generator)
    ccs: list[Any] = []
    for m in range(n):
        cc = drawn(12, 20 + m, D=8)
        cc.W_enc.data = common + torch.linspace(0, 1.2, 12) * torch.randn(16, 12, generator=generator)
        ccs.append(cc)
    ccs[0].b_enc.data[5] = -99
    table = consensus({f"seed{m}": cc for m, cc in enumerate(ccs)}, acts, 0.6)
    assert len(table) == 12 * n and table["of"].unique().tolist() == [n]
    for m in range(n):
        mine = table[table["crosscoder"] == f"seed{m}"].set_index("feature")
        n_seeds = dict.fromkeys(range(12), 1)
        total = dict.fromkeys(range(12), 0.0)
        for other in range(n):
            if other != m:
                first, second = sorted((m, other))
                for row in match(ccs[first], ccs[second], acts).dropna(subset=["correlation"]).to_dict("records"):
                    i = row["feature"] if first == m else row["partner"]
                    n_seeds[i] += row["correlation"] >= 0.6
                    total[i] += row["correlation"]
                    own = mine.loc[i]
                    assert own[f"partner/seed{other}"] == (row["partner"] if first == m else row["feature"])
                    assert own[f"correlation/seed{other}"] == pytest.approx(row["correlation"])
        for i in range(12):
            if m == 0 and i == 5:
                assert not mine.loc[i, "alive"] and mine.loc[i, "n_seeds"] == 0 and not mine.loc[i, "consensus"]
                assert math.isnan(mine.loc[i, "correlation"]) and mine.loc[i, "variance"] == 0
                continue
            assert mine.loc[i, "n_seeds"] == n_seeds[i] and mine.loc[i, "consensus"] == (n_seeds[i] > n / 2)
            assert mine.loc[i, "correlation"] == pytest.approx(total[i] / (n - 1))
        assert mine["variance"].to_numpy() == pytest.approx(variances(ccs[m], acts))
        assert mine[f"partner/seed{m}"].isna().all() and mine[f"correlation/seed{m}"].isna().all()
    assert table["consensus"].any() and not table.loc[table["alive"], "consensus"].all()
    shares = consensus_shares(table).set_index("crosscoder")
    for name, mine in table.groupby("crosscoder"):
        live = mine[mine["alive"]]
        row = shares.loc[name]
        assert row["alive"] == len(live) and row["of"] == n
        assert row["consensus"] == pytest.approx(live["consensus"].mean())
        assert row["unanimous"] == pytest.approx((live["n_seeds"] == n).mean())
        assert row["consensus_variance"] == pytest.approx(live.loc[live["consensus"], "variance"].sum())
        assert row["unanimous_variance"] == pytest.approx(live.loc[live["n_seeds"] == n, "variance"].sum())


def test_consensus_can_be_added_to_tables() -> None:
    acts = held()
    found = consensus([drawn(8, 1), drawn(8, 1), drawn(8, 2)], acts)
    first = found[found["crosscoder"] == "0"]
    assert (first["n_seeds"] >= 2).all() and first["consensus"].all()
    third = found[found["crosscoder"] == "2"]
    table = pd.DataFrame({"feature": [3, 1, 3], "ie": [0.1, 0.2, 0.3]}, index=[5, 6, 7])
    marked = add_consensus(table, third)
    by_feature = third.set_index("feature")
    assert marked["feature"].tolist() == [3, 1, 3] and marked["ie"].tolist() == [0.1, 0.2, 0.3]
    for name in ("n_seeds", "consensus"):
        assert marked[name].tolist() == [by_feature.loc[i, name] for i in (3, 1, 3)]
    pd.testing.assert_frame_equal(add_consensus(marked, third), marked)
    only = add_consensus(table, third.assign(consensus=third["feature"] == 3), only=True)
    assert only["ie"].tolist() == [0.1, 0.3]
    for wrong, message in (
        ((table.drop(columns="feature"), third), "the table has no column 'feature' but ie"),
        ((table, found), r"found is about several crosscoders \(0, 1, 2\)"),
        ((table.assign(feature=[3, 1, 9]), third), "feature 9 is not among the 8 of the consensus"),
    ):
        with pytest.raises(UserError, match=message):
            add_consensus(*wrong)
    with pytest.raises(UserError, match="a consensus needs at least 2 crosscoders, but there is only 1"):
        consensus([drawn(8, 1)], acts)
    with pytest.raises(UserError, match=r"threshold=0 is not in \(0, 1\]"):
        consensus([drawn(8, 1), drawn(8, 2)], acts, 0)


def test_a_trained_crosscoder_is_read_with_its_inference_gate(acts: Activations) -> None:
    from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
    from crosslens.training import TrainConfig, train

    config = TrainConfig(training_tokens=800, batch_size=100, scale_tokens=400, evaluate=False, device="cpu")
    crosscoder = train(acts, BatchTopKCrosscoderTrainingConfig(d_sae=24, k=3), config)
    table = match(crosscoder, crosscoder, acts)
    x = torch.cat(list(acts.held_out()))
    f = crosscoder.encode(x)
    live = (f.std(0) > 0).nonzero().flatten().tolist()
    assert pairs_of(table) == {(i, i) for i in live} and table["correlation"].min() == pytest.approx(1)
    found = table.set_index("feature")["firing_rate"]
    assert [found[i] for i in live] == pytest.approx([float((f[:, i] > 0).double().mean()) for i in live])


# ---- rotation of pairs


@pytest.mark.parametrize("seed", range(3))
def test_rotation_of_partners_matches_plain_loops(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a = of_norms(torch.rand(8, 4, generator=draw) + 0.1, snapshots_at(1, 2, 4, 8), D=5, seed=seed)
    b = of_norms(torch.rand(9, 4, generator=draw) + 0.1, snapshots_at(1, 2, 4, 8), D=5, seed=seed + 10)
    a.W_dec_by_snapshot.data[3, 2] *= 0.01  # has no direction there
    partners = [(0, 4), (3, 1), (5, 8), (6, 2), (7, 7)]
    pairs = pd.DataFrame(partners, columns=["feature", "partner"]).assign(correlation=[0.9, 0.8, 0.7, 0.95, 0.69])
    pairs = pd.concat([pairs, pd.DataFrame({"feature": [1], "partner": [pd.NA], "correlation": [np.nan]})])
    table = rotation_of_partners(a, b, pairs)

    def angle(u: torch.Tensor, v: torch.Tensor) -> float:
        return math.degrees(math.acos(float(u @ v / u.norm() / v.norm())))

    for s, row in enumerate(table.to_dict("records")):
        kept = [(i, j) for i, j in partners[:4] if i != 3 or s == 0]
        one = [angle(a.W_dec_by_snapshot[i, s], a.W_dec_by_snapshot[i, s + 1]) for i, _ in kept]
        other = [angle(b.W_dec_by_snapshot[j, s], b.W_dec_by_snapshot[j, s + 1]) for _, j in kept]
        apart = [angle(a.W_dec_by_snapshot[i, s + 1], b.W_dec_by_snapshot[j, s + 1]) for i, j in kept]
        assert (row["before"], row["after"], row["n"]) == (s, s + 1, len(kept))
        assert (row["from"], row["to"]) == (f"step{2**s}", f"step{2 ** (s + 1)}")
        assert row["angle_a"] == pytest.approx(np.median(one), abs=1e-2)
        assert row["angle_b"] == pytest.approx(np.median(other), abs=1e-2)
        assert row["apart"] == pytest.approx(np.median(apart), abs=1e-2)
        ranks = np.argsort(np.argsort([one, other], 1), 1)
        assert row["spearman"] == pytest.approx(np.corrcoef(ranks)[0, 1])
    nothing = rotation_of_partners(a, b, pairs, 0.99)
    assert (nothing["n"] == 0).all() and nothing[["angle_a", "apart", "spearman"]].isna().all(axis=None)
    with pytest.raises(UserError, match="rotation needs at least 2"):
        one = [of_norms(torch.ones(3, 1), snapshots_at(1), D=5) for _ in range(2)]
        rotation_of_partners(*one, pairs)


# ---- lifecycles of pairs


def test_agreement_of_lifecycles_by_hand() -> None:
    norms = [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]]
    a, acts = of_norms(norms, D=64), held(60, S=4, D=64)
    rows = a.W_dec_by_snapshot.clone()
    rows[1, 1] *= 0.1  # is born one snapshot later
    rows[4, 2] = rows[4, 1]  # dies one snapshot later
    b = of_rows(torch.cat([rows, torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(8))]))
    b.W_enc.data[:, :5] = a.W_enc  # fire on the same tokens
    b.W_enc.data[:, 0] *= -1  # but for one
    found = compare_features(a, b, acts, by="norm")
    assert found["snapshots"] == 4 and found["matched"] == 4
    assert found["share_a"] == pytest.approx(4 / 5) and found["share_b"] == pytest.approx(4 / 7)
    assert found["same_origin"] == 1.0 and found["same_fate"] == 1.0
    # births 1, 2, (never), 0 against 2, 2, (never), 0
    assert found["same_birth"] == pytest.approx(2 / 3) and found["birth_within_1"] == 1.0
    assert found["same_birth_by_chance"] == pytest.approx((1 * 0 + 1 * 2 + 1 * 1) / 9)
    assert compare_features(a, b, acts, by="norm", min_run=1)["same_birth"] == pytest.approx(3 / 4)
    b.W_enc.data *= -1
    nothing = compare_features(a, b, acts, by="norm", threshold=0.9)
    assert nothing["matched"] == 1 and nothing["same_birth"] == 1  # the one that was turned before
    b.W_enc.data[:, 0] *= -1
    nothing = compare_features(a, b, acts, by="norm", threshold=0.9)
    assert nothing["matched"] == 0 and math.isnan(nothing["same_birth"]) and math.isnan(nothing["median_cosine"])


@pytest.mark.parametrize("seed", range(3))
def test_agreement_of_lifecycles_matches_plain_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, acts = of_norms(torch.rand(25, 5, generator=generator), D=16, seed=seed), held(80, S=5, D=16, seed=seed)
    noise = torch.randn(25, 5, 16, generator=generator) * 0.12
    b = of_rows(a.W_dec_by_snapshot + noise * torch.linspace(0, 3, 25)[:, None, None])
    found = compare_features(a, b, acts, by="norm", threshold=0.6, presence=0.4, min_run=1)
    tables = [classify_lifecycles(cc.decoder_norms, 0.4, min_run=1) for cc in (a, b)]
    kept = [row for row in match(a, b, acts).to_dict("records") if row["correlation"] >= 0.6]
    assert 5 < len(kept) < 25 and found["matched"] == len(kept)
    partners = [(tables[0].iloc[row["feature"]], tables[1].iloc[row["partner"]]) for row in kept]
    for name in ("origin", "fate"):
        assert found[f"same_{name}"] == pytest.approx(np.mean([x[name] == y[name] for x, y in partners]))
    births = [(x["birth"], y["birth"]) for x, y in partners if x["birth"] is not pd.NA and y["birth"] is not pd.NA]
    assert found["same_birth"] == pytest.approx(np.mean([x == y for x, y in births]))
    assert found["birth_within_1"] == pytest.approx(np.mean([abs(x - y) <= 1 for x, y in births]))
    chance = np.mean([x == y for x, _ in births for _, y in births])
    assert found["same_birth_by_chance"] == pytest.approx(chance)
    assert 0 < found["same_birth"] < 1


def test_lifecycles_of_pairs_are_by_r2_unless_asked_otherwise() -> None:
    x = torch.randn(40, 20, 4, 6, generator=torch.Generator().manual_seed(3))
    acts = Read(x, torch.ones(40, 20, dtype=torch.long))
    a = of_norms(torch.rand(12, 4, generator=torch.Generator().manual_seed(4)), D=6, seed=4)
    b = of_rows(a.W_dec_by_snapshot.flip(1))  # norms backwards
    b.W_enc.data[:] = a.W_enc  # fires on the same tokens
    found = compare_features(a, b, acts)
    assert found["share_a"] == 1 and found["same_origin"] == found["same_fate"] == found["same_birth"] == 1
    assert compare_features(a, b, acts, by="norm")["same_origin"] < 1
    with pytest.raises(UserError, match="by='rank' is unknown"):
        compare_features(a, b, acts, by="rank")
    tables = compare_seeds({"0": a, "1": b}, acts)
    assert tables["seeds_births"]["same_birth"].dropna().eq(1).all() and "born there too" in describe_seeds(tables)
    with pytest.warns(UserWarning, match="births are not compared between seeds: 20 tokens are held out"):
        few = compare_seeds({"0": a, "1": b}, Read(x[:1], torch.ones(1, 20, dtype=torch.long)))
    assert "seeds_births" not in few and "born there too" not in describe_seeds(few)


# ---- several crosscoders


def test_summaries_match_their_parts() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(10, 20, 4, 6, generator=generator)
    wide = of_norms(torch.rand(30, 4, generator=generator), snapshots_at(0, 1, 10, 100), D=6, seed=1)
    narrow = of_norms(torch.rand(9, 4, generator=generator), snapshots_at(0, 1, 10, 100), D=6, seed=2)
    narrow.b_enc.data[0] = -99
    still = of_rows(torch.ones(3, 2, 6), None)
    held, of_two = Read(x, torch.ones(10, 20, dtype=torch.long)), measure_firing(still, Held(x[:, :, :2].flatten(0, 1)))
    table = compare_evolutions(
        {"32x": (wide, held), "8x": (narrow, measure_firing(narrow, held)), "still": (still, of_two)}
    ).set_index("name")
    assert table["features"].tolist() == [30, 9, 3] and table["snapshots"].tolist() == [4, 4, 2]
    assert table["alive"].tolist() == [30, 8, 3]
    for name, cc in (("32x", wide), ("8x", narrow)):
        evolution = evolve(cc, held if name == "32x" else measure_firing(cc, held))
        row, life = table.loc[name], evolution.lifecycles()
        assert row["measure"] == evolution.measures[0] == ("r2" if name == "32x" else "norm")
        assert row["alive"] == life["alive"].sum()
        live = life[life["origin"].notna()]
        for origin in ("initial", "emergent", "never"):
            assert row[origin] == pytest.approx((live["origin"] == origin).mean())
        assert row["transient"] == pytest.approx((live["fate"] == "transient").mean())
        assert row["median_birth"] == np.median([b for b in live.loc[live["origin"] == "emergent", "birth_step"]])
        intervals = rotation_per_interval(cc, torch.tensor(life["alive"].to_numpy()))
        point = intervals[intervals["largest"]].iloc[0]
        for column in ("from", "to", "from_step", "to_step", "share"):
            assert row[f"rotation_{column}"] == point[column]
        share = total_dimensionality(cc, held)["share"].tolist()
        assert [row[f"dimensionality_{k}"] for k in ("first", "least", "last")] == [share[0], min(share), share[-1]]
    assert table.loc["still", ["rotation_from", "rotation_to_step", "rotation_share", "median_birth"]].isna().all()
    with pytest.raises(UserError, match="crosscoders is empty"):
        compare_evolutions({})
