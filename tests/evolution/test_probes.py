"""Probes: planted features, sampling against plain loops, the regression against a scikit-learn pipeline."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from crosslens.activations.loader import Activations, LiveActivations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import StandardCrosscoder, StandardCrosscoderConfig
from crosslens.errors import UserError
from crosslens.evolution.probes import (
    _halves,
    _paired_halves,
    _probe_error,
    _same_tokens,
    _samples,
    _with_tokens,
    describe_probes,
    probe_correlation,
    probe_errors,
    probe_parts,
    probe_presence,
)
from crosslens.snapshots.collection import Snapshots

S, D, F = 3, 8, 5


class Given(Activations):
    """Given activations, of which the last fifth is held out."""

    is_cached = True

    def __init__(self, x: torch.Tensor) -> None:
        self.train, self.test = x[: len(x) * 4 // 5], x[len(x) * 4 // 5 :]

    @property
    def n_tokens(self) -> int:
        return len(self.train)

    def batches(self, batch_size: int, *, start: int = 0, epochs: int | None = None) -> Iterator[torch.Tensor]:
        assert (start, epochs) == (0, 1)
        assert batch_size <= len(self.train)
        yield from (batch for batch in self.train.split(batch_size) if len(batch) == batch_size)

    def held_out(self, batch_size: int = 4096) -> Iterator[torch.Tensor]:
        yield from self.test.split(batch_size)


@pytest.fixture(scope="module")
def planted() -> tuple[StandardCrosscoder, Given]:
    """Feature i adds 3 to coordinate i on a share of the tokens, from its birth on.

    The crosscoder reads the last snapshot alone, so its labels are exact. Feature 4 fires on one token in 200.
    """
    generator = torch.Generator().manual_seed(0)
    n = 5000
    shares = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.005])
    on = torch.rand(n, F, generator=generator) < shares
    x = 0.3 * torch.randn(n, S, D, generator=generator)
    births = [0, 1, 2, 2, 0]
    crosscoder = StandardCrosscoder(StandardCrosscoderConfig(d_in=S * D, d_sae=F, n_snapshots=S))
    crosscoder.cfg.metadata.snapshots = [{"label": f"step{s}", "step": s, "tokens": None} for s in range(S)]
    crosscoder.b_enc.data.fill_(-1.5)
    for i, birth in enumerate(births):
        for s in range(S):
            x[:, s, i] += 3.0 * on[:, i] * (s >= birth)
            crosscoder.W_dec_by_snapshot.data[i, s, i] = 3.0 if s >= birth else 0.3
        crosscoder.W_enc_by_snapshot.data[S - 1, i, i] = 1.0
    return crosscoder, Given(x)


def test_planted_features_are_decodable_where_they_exist(planted: Any) -> None:
    table = probe_errors(*planted, min_samples=100)
    first = ["feature", "snapshot", "label", "step", "norm", "probe_error", "n"]
    assert list(table) == [*first, "first_error", "second_error"]
    assert table["probe_error"].to_numpy() == pytest.approx(
        table[["first_error", "second_error"]].mean(axis=1).to_numpy()
    )
    assert (table["first_error"] != table["second_error"]).any()
    assert table["feature"].tolist() == [i for i in range(4) for _ in range(S)]  # feature 4 is too rare
    assert table["snapshot"].tolist() == [0, 1, 2] * 4 and table["label"].tolist() == ["step0", "step1", "step2"] * 4
    assert table["step"].tolist() == [0, 1, 2] * 4
    there = table["norm"] == 1
    assert there.tolist() == [True, True, True, False, True, True, False, False, True, False, False, True]
    assert table.loc[~there, "norm"].to_numpy() == pytest.approx(0.1)
    assert (table.loc[there, "probe_error"] < 0.02).all()
    assert table.loc[~there, "probe_error"].between(0.35, 0.65).all()
    found = probe_correlation(table)
    assert found["pearson"] < -0.95 and found["pearson_high"] < -0.9 and found["n_features"] == 4


def test_n_is_limited_by_the_data(planted: Any) -> None:
    crosscoder, acts = planted
    with torch.no_grad():
        active = (crosscoder.encode(acts.train) > 0).sum(0).tolist()
    table = probe_errors(crosscoder, acts, min_samples=100, n_samples=1000).groupby("feature")["n"].first()
    expected = {i: 4 * (min(1000, 2 * active[i]) // 4) for i in range(4)}
    assert table.to_dict() == expected
    assert expected[0] == 1000 > expected[3] >= 100
    assert set(probe_errors(crosscoder, acts, min_samples=1000, n_samples=1000)["n"]) == {1000}
    few = probe_errors(crosscoder, acts, min_samples=100, max_tokens=1000)
    assert few.groupby("feature")["n"].first().to_dict()[0] <= 1000


def test_a_feature_that_is_always_active_cannot_be_probed(planted: Any) -> None:
    crosscoder, acts = planted
    always = copy.deepcopy(crosscoder)
    always.b_enc.data[2] = 100.0
    assert set(probe_errors(always, acts, min_samples=100)["feature"]) == {0, 1, 3}
    always.b_enc.data[:] = 100.0
    with pytest.raises(UserError, match="no feature is both active and inactive"):
        probe_errors(always, acts, min_samples=100)


def test_the_seed_decides_features_and_halves(planted: Any) -> None:
    options: dict[str, Any] = {"n_features": 2, "min_samples": 100}
    one = probe_errors(*planted, seed=1, **options)
    pd.testing.assert_frame_equal(one, probe_errors(*planted, seed=1, **options))
    others = [probe_errors(*planted, seed=seed, **options) for seed in range(2, 8)]
    assert one["feature"].nunique() == 2
    assert len({tuple(other["feature"].unique()) for other in [one, *others]}) > 1
    assert not all(one["probe_error"].equals(other["probe_error"]) for other in others)
    norms = probe_errors(*planted, min_samples=100).set_index(["feature", "snapshot"])["norm"]
    for other in others:
        assert other["norm"].tolist() == norms.loc[list(zip(other["feature"], other["snapshot"], strict=True))].tolist()


@pytest.mark.parametrize(("per_class", "max_tokens"), [(7, 600), (40, 600), (1000, 600), (40, 25)])
def test_samples_are_the_first_of_each_class(planted: Any, per_class: int, max_tokens: int) -> None:
    crosscoder, acts = planted
    features = [0, 2, 4]
    x, labels, ids = _samples(crosscoder, acts, torch.tensor(features), per_class, max_tokens)
    assert ids is None
    size = min(4096, max_tokens)
    expected: list[list[int]] = []
    tokens: list[torch.Tensor] = []
    have = {(i, label): 0 for i in features for label in (0, 1)}
    for token in acts.train[:size]:
        row: list[int] = []
        with torch.no_grad():
            active = crosscoder.encode(token) > 0
        for i in features:
            label = int(active[i])
            row.append(label if have[i, label] < per_class else -1)
            have[i, label] += 1
        if max(row) >= 0:
            expected.append(row)
            tokens.append(token)
    assert labels.tolist() == expected
    assert torch.equal(x, torch.stack(tokens))


def test_samples_stop_when_every_feature_has_enough(planted: Any) -> None:
    crosscoder, acts = planted
    read: list[int] = []

    class Counted(Given):
        def batches(self, batch_size: int, **options: Any) -> Iterator[torch.Tensor]:
            for batch in super().batches(50, **options):
                read.append(batch_size)
                yield batch

    _samples(crosscoder, Counted(torch.cat([acts.train, acts.test])), torch.tensor([0, 1]), 20, 50_000)
    assert len(read) == 2  # of 50 tokens each; the rarer feature is active on 30 % of them


def test_halves_are_balanced_and_disjoint() -> None:
    labels = np.array([1] * 9 + [0] * 30 + [-1] * 5)
    for per_half, m in ((100, 4), (3, 3)):
        train, test = _halves(labels, per_half, np.random.default_rng(0))
        for indices, y in (train, test):
            assert len(indices) == 2 * m and y.tolist() == labels[indices].tolist() == [0] * m + [1] * m
        assert not set(train[0]) & set(test[0])


@pytest.mark.parametrize(("n", "d", "shift"), [(40, 3, 1.0), (200, 20, 0.3), (60, 50, 0.2)])
def test_the_regression_matches_a_scikit_learn_pipeline(n: int, d: int, shift: float) -> None:
    rng = np.random.default_rng(n)
    y = np.repeat([0, 1], n // 2)
    x, other = (
        np.column_stack([100 + rng.normal(size=(n, d)) * rng.uniform(0.1, 9, d) + shift * y[:, None], np.full(n, 4.0)])
        for _ in range(2)
    )
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000))
    expected = 1 - pipeline.fit(x, y).score(other, y)
    assert _probe_error((x, y), (other, y)) == pytest.approx(expected, abs=1.01 / n)
    assert 0 < expected < 0.6


def test_real_activations(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    snaps = Snapshots.local(tiny_snapshots)
    acts = Activations(snaps, "blocks.1.hook_resid_post", Dataset(tiny_text, 2000, 16, 300))
    crosscoder = StandardCrosscoder(StandardCrosscoderConfig(d_in=3 * 16, d_sae=12, n_snapshots=3))
    generator = torch.Generator().manual_seed(0)
    crosscoder.W_dec.data = torch.randn(12, 48, generator=generator)
    crosscoder.W_enc.data = crosscoder.W_dec.data.T.clone()
    table = probe_errors(crosscoder, acts, n_features=4, min_samples=100)
    assert len(table) == 12 and table["label"].unique().tolist() == ["0", "1", "2"] and table["step"].isna().all()
    assert table["probe_error"].between(0, 0.5).all() and table.groupby("feature")["norm"].max().eq(1).all()


# ---- inactive tokens of the same id


@pytest.mark.parametrize(("B", "n", "V", "seed"), [(40, 3, 5, 0), (100, 6, 30, 1), (9, 2, 1, 2), (30, 4, 30, 3)])
def test_pairs_of_the_same_token_match_plain_loops(B: int, n: int, V: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(B, n, generator=generator) < torch.linspace(0.1, 0.9, n)
    tokens = torch.randint(V, (B,), generator=generator).int()
    found = _same_tokens(active, tokens)
    for i in range(n):
        chosen: dict[int, list[int]] = {0: [], 1: []}
        for token in range(V):
            places: dict[int, list[int]] = {0: [], 1: []}
            for b in range(B):
                if tokens[b] == token:
                    places[int(active[b, i])].append(b)
            m = min(len(places[0]), len(places[1]))
            for label in (0, 1):
                chosen[label] += places[label][:m]
        assert [found[label, :, i].nonzero().flatten().tolist() for label in (0, 1)] == [
            sorted(chosen[0]),
            sorted(chosen[1]),
        ]


@pytest.mark.parametrize(("n", "V", "per_half", "seed"), [(200, 7, 1000, 0), (60, 30, 1000, 1), (300, 4, 11, 2)])
def test_pairs_stay_in_one_half(n: int, V: int, per_half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, tokens = rng.choice([-1, 0, 1], n, p=[0.2, 0.5, 0.3]), rng.integers(V, size=n)
    halves = _paired_halves(labels, tokens, per_half, np.random.default_rng(seed))
    pairs = sum(min(((tokens == t) & (labels == 0)).sum(), ((tokens == t) & (labels == 1)).sum()) for t in range(V))
    used: list[int] = []
    for indices, y in halves:
        assert labels[indices].tolist() == y.tolist() == [0] * (len(y) // 2) + [1] * (len(y) // 2)
        assert len(y) == 2 * min(per_half, pairs // 2)
        assert sorted(tokens[indices[y == 0]]) == sorted(tokens[indices[y == 1]])
        used += indices.tolist()
    assert len(set(used)) == len(used)
    again = _paired_halves(labels, tokens, per_half, np.random.default_rng(seed + 1))
    assert again[0][0].tolist() != halves[0][0].tolist()


def test_a_probe_that_only_reads_words_is_at_chance_against_the_same_word() -> None:
    """With 30 rare words, halves that are not balanced by word would give errors far above .5."""
    rng = np.random.default_rng(0)
    words, x = rng.integers(30, size=400), np.eye(30)
    labels = rng.integers(2, size=400)
    errors = []
    for seed in range(10):
        one, other = ((x[words[i]], y) for i, y in _paired_halves(labels, words, 1000, np.random.default_rng(seed)))
        errors.append(_probe_error(one, other))
    assert np.mean(errors) == pytest.approx(0.5, abs=0.02)


class Words(Given):
    """Activations of given sequences."""

    def __init__(self, x: torch.Tensor, tokens: torch.Tensor) -> None:
        self.x, self.given = x, tokens
        self.train, self.test = (part.flatten(0, 1)[self.keep(t).flatten()] for part, t in ((x, tokens), (x, tokens)))

    block_sequences = 7

    def keep(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens != 0

    def train_tokens(self) -> torch.Tensor:
        return self.given

    def block(self, first: int, last: int) -> torch.Tensor:
        return self.x[first:last]


def test_against_the_same_word_only_the_context_counts() -> None:
    """A feature of one word can be decoded against arbitrary tokens, but not against the same word."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 6, (500, 12), generator=generator).int()
    tokens[:, 0] = 0
    x = 0.1 * torch.randn(500, 12, 2, D, generator=generator)
    x[..., :5] += 3 * torch.nn.functional.one_hot(tokens.long(), 6)[:, :, None, 1:]
    heard = (
        torch.rand(500, 12, generator=generator) < 0.5
    )  # half of the occurrences of word 1 have a component at the last snapshot
    x[..., 1, 6] += 3 * (heard & (tokens == 1))
    chance = torch.rand(500, 12, generator=generator) < 0.5
    x[..., 1, 7] += 1.0 * chance  # noise that the probe cannot use at snapshot 0
    crosscoder = StandardCrosscoder(StandardCrosscoderConfig(d_in=2 * D, d_sae=1, n_snapshots=2))
    crosscoder.W_enc_by_snapshot.data[1, [0, 6], 0] = 1.0
    crosscoder.b_enc.data.fill_(-4.5)
    crosscoder.W_dec_by_snapshot.data[0, :, 0] = 1.0
    acts = Words(x, tokens)
    for negatives, at_first in (("any", 0.3), ("same_token", 0.6)):
        table = probe_errors(crosscoder, acts, min_samples=100, n_samples=800, negatives=negatives)
        errors = table["probe_error"].tolist()
        assert errors[1] < 0.02
        assert (errors[0] < at_first) if negatives == "any" else (0.4 < errors[0] < at_first)
    crosscoder.W_enc_by_snapshot.data[1, 6, 0] = 0.0
    crosscoder.b_enc.data.fill_(-1.5)  # now the word alone decides
    with pytest.raises(UserError, match="none of the 1 features drawn has 100 tokens"):
        probe_errors(crosscoder, acts, min_samples=100, negatives="same_token")


def test_same_token_on_real_activations(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    snaps = Snapshots.local(tiny_snapshots)
    acts = Activations(snaps, "blocks.1.hook_resid_post", Dataset(tiny_text, 2000, 16, 300))
    kept = acts.keep(acts.train_tokens())
    for max_tokens in (10_000, 150):
        x, tokens = zip(*_with_tokens(acts, 100, max_tokens), strict=True)
        assert torch.equal(torch.cat(tokens), acts.train_tokens()[kept])
        assert torch.equal(torch.cat(x), acts.block(0, len(kept))[kept])
        first = int(kept[: -(-max_tokens // int(kept[0].sum()))].sum())  # of the first sequences that are read at once
        assert [len(part) for part in x[:3]] == ([100] * 3 if max_tokens > 150 else [100, first - 100, 100])


def test_live_probes_harvest_no_more_than_they_read(
    tiny_snapshots: Path, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", Dataset(tiny_text, 2000, 16, 300))
    assert not acts.is_cached
    harvested: list[int] = []
    block = LiveActivations.block

    def counted(self: Activations, first: int, last: int, *options: Any) -> torch.Tensor:
        harvested.append(last - first)
        return block(self, first, last, *options)

    monkeypatch.setattr(LiveActivations, "block", counted)
    S, D = acts.n_snapshots, acts.d_model
    crosscoder = StandardCrosscoder(StandardCrosscoderConfig(d_in=S * D, d_sae=4, n_snapshots=S))
    x, labels, _ = _samples(crosscoder, acts, torch.tensor([0, 1]), 20, 150)
    assert harvested == [-(-150 // int(acts.keep(acts.tokens[:1]).sum()))] and len(x) == len(labels) <= 150


def test_errors(planted: Any) -> None:
    for options, message in (
        ({"negatives": "near"}, "negatives='near' is unknown: use 'any' or 'same_token'"),
        ({"n_features": 0}, "n_features=0 must be 1 or more"),
        ({"min_samples": 2}, "min_samples=2 must be 4 or more"),
        ({"n_samples": 100}, "n_samples=100 is less than min_samples=400"),
        ({"min_samples": 5000, "n_samples": 5000}, "no feature is both active and inactive on 2500 of 4000 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            probe_errors(*planted, **options)


# ---- correlation


def _table(norm: Any, error: Any) -> pd.DataFrame:
    norm, error = np.asarray(norm, dtype=float), np.asarray(error, dtype=float)
    features, snapshots = np.indices(norm.shape)
    columns = {"feature": features, "snapshot": snapshots, "norm": norm, "probe_error": error}
    return pd.DataFrame({name: values.ravel() for name, values in columns.items()})


def test_correlations_match_scipy() -> None:
    rng = np.random.default_rng(0)
    norm = rng.uniform(size=(20, 4)).round(1)  # with ties
    table = _table(norm, 0.5 - 0.3 * norm + 0.1 * rng.normal(size=norm.shape))
    for without in ((), (0,), (1, 3)):
        kept = table[~table["snapshot"].isin(without)].sample(frac=1, random_state=1)
        found = probe_correlation(table, without=without, n_bootstrap=200)
        assert found["spearman"] == pytest.approx(spearmanr(kept["norm"], kept["probe_error"]).statistic)
        assert found["pearson"] == pytest.approx(pearsonr(kept["norm"], kept["probe_error"]).statistic)
        assert found["n"] == len(kept) == 20 * (4 - len(without)) and found["n_features"] == 20
        for name in ("spearman", "pearson"):
            assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert probe_correlation(table, seed=3) == probe_correlation(table, seed=3) != probe_correlation(table, seed=4)


def test_the_interval_is_over_features_not_over_rows() -> None:
    """Copies of a feature's points add no evidence: intervals are as wide as with one point per feature."""
    rng = np.random.default_rng(1)
    norm, error = rng.normal(size=(2, 30, 1))
    once, copied = _table(norm, error), _table(np.repeat(norm, 8, 1), np.repeat(error, 8, 1))
    a, b = probe_correlation(once, n_bootstrap=300), probe_correlation(copied, n_bootstrap=300)
    for name in ("spearman", "spearman_low", "spearman_high", "pearson", "pearson_low", "pearson_high"):
        assert a[name] == pytest.approx(b[name])
    assert b["pearson_high"] - b["pearson_low"] > 0.4 and (a["n"], b["n"]) == (30, 240)


def test_the_interval_has_the_stated_coverage() -> None:
    """60 tables of 40 features whose points share a feature's offset; the true correlation is 0."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        norm, error = rng.normal(size=(2, 40, 1)) + 0.3 * rng.normal(size=(2, 40, 5))
        found = probe_correlation(_table(norm, error), n_bootstrap=100, seed=seed)
        covered += found["pearson_low"] < 0 < found["pearson_high"]
    assert 0.85 <= covered / 60 <= 0.99


def test_what_cannot_be_correlated() -> None:
    table = _table([[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.5], [0.5, 0.5]])
    assert math.isnan(probe_correlation(table)["pearson"]) and math.isnan(probe_correlation(table)["spearman_low"])
    with pytest.raises(UserError, match="without=2 is not a snapshot of this table, which has 0, 1"):
        probe_correlation(table, without=(2,))
    for part, without in ((table[table["feature"] == 0], ()), (table, (0, 1))):
        with pytest.raises(UserError, match=r"a correlation needs 2 or more features, the table has [01]"):
            probe_correlation(part, without=without)


# ---- decomposition of the correlation


def _noisy(seed: int, noise: float, n: int = 60, S: int = 6) -> pd.DataFrame:
    """Norms and errors with offsets per feature and per snapshot, and two noisy measurements of each error."""
    rng = np.random.default_rng(seed)
    norm = rng.uniform(size=(n, S))
    truth = 0.4 - 0.3 * norm + 0.1 * rng.normal(size=(n, 1)) + 0.05 * rng.normal(size=(1, S))
    halves = truth + noise * rng.normal(size=(2, n, S))
    table = _table(norm, halves.mean(0))
    return table.assign(
        first_error=halves[0].ravel(), second_error=halves[1].ravel(), truth=truth.ravel(), step=table["snapshot"] * 10
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_match_scipy(seed: int) -> None:
    table = _noisy(seed, 0.1)
    parts = probe_parts(table, n_bootstrap=50).set_index("part")
    assert list(parts.index) == ["all", "trained", "within_features", "within_snapshots", "disattenuated"]
    trained = table[table["snapshot"] > 0].sample(frac=1, random_state=0)
    for part, rows in (("all", table), ("trained", trained)):
        assert parts.loc[part, "spearman"] == pytest.approx(spearmanr(rows["norm"], rows["probe_error"]).statistic)
        assert parts.loc[part, "pearson"] == pytest.approx(pearsonr(rows["norm"], rows["probe_error"]).statistic)
        assert parts.loc[part, "sd_error"] == pytest.approx(np.std(rows["probe_error"].to_numpy()))
        assert parts.loc[part, "n"] == len(rows) and parts.loc[part, "n_features"] == 60
        by_correlation = probe_correlation(table, without=() if part == "all" else (0,), n_bootstrap=50)
        assert parts.loc[part, "pearson_low"] == by_correlation["pearson_low"]
    for part, column in (("within_features", "feature"), ("within_snapshots", "snapshot")):
        norms, errors = [], []
        for _, rows in trained.groupby(column):
            norms += (rows["norm"] - rows["norm"].mean()).tolist()
            errors += (rows["probe_error"] - rows["probe_error"].mean()).tolist()
        assert parts.loc[part, "pearson"] == pytest.approx(pearsonr(norms, errors).statistic)
        assert parts.loc[part, "spearman"] == pytest.approx(spearmanr(norms, errors).statistic)
    alike = pearsonr(trained["first_error"], trained["second_error"]).statistic
    reliability = 2 * alike / (1 + alike)
    assert parts.loc["disattenuated", "reliability"] == pytest.approx(reliability)
    assert parts.loc["disattenuated", "pearson"] == pytest.approx(parts.loc["trained", "pearson"] / reliability**0.5)
    assert parts["reliability"].isna().tolist() == [True] * 4 + [False]
    assert (parts["pearson_low"] < parts["pearson"]).all() and (parts["pearson"] < parts["pearson_high"]).all()
    assert probe_parts(table, without=(), n_bootstrap=20).set_index("part").loc["trained", "n"] == 360


def test_disattenuation_recovers_the_noiseless_correlation() -> None:
    measured, corrected, truth = [], [], []
    for seed in range(10):
        table = _noisy(seed, 0.15, n=200)
        parts = probe_parts(table, without=(), n_bootstrap=2).set_index("part")
        measured.append(parts.loc["all", "pearson"])
        corrected.append(parts.loc["disattenuated", "pearson"])
        truth.append(pearsonr(table["norm"], table["truth"]).statistic)
    assert np.mean(corrected) == pytest.approx(np.mean(truth), abs=0.02)
    assert np.mean(measured) > np.mean(truth) + 0.05


def test_without_defaults_to_the_untrained_snapshots() -> None:
    table = _noisy(0, 0.1)
    unknown = table.assign(step=pd.array([pd.NA] * len(table), dtype="Int64"))
    assert probe_parts(unknown, n_bootstrap=2)["n"].tolist() == [360] * 5
    later = table.assign(step=table["step"] + 5)
    assert probe_parts(later, n_bootstrap=2)["n"].tolist() == [360] * 5
    assert probe_parts(table, n_bootstrap=2)["n"].tolist() == [360, 300, 300, 300, 300]
    with pytest.raises(UserError, match="without=9 is not a snapshot"):
        probe_parts(table, without=(9,))


@pytest.mark.parametrize("seed", [0, 1])
def test_probe_errors_are_compared_with_every_measure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"feature": np.repeat(np.arange(20), 4), "snapshot": np.tile(np.arange(4), 20), "probe_error": rng.random(80)}
    )
    presence = table[["feature", "snapshot"]].assign(
        r2=1 - table["probe_error"] + rng.normal(0, 0.2, 80), within=rng.random(80), strength=rng.random(80)
    )
    presence.loc[presence["feature"] == 3, "within"] = np.nan
    shuffled = presence.sample(frac=1, random_state=seed)
    found = probe_presence(table, shuffled, without=(2,), n_bootstrap=100).set_index(["measure", "part"])
    kept = table.merge(presence).query("snapshot != 2")
    for (measure, part), row in found.iterrows():  # type: ignore[misc]
        column = "strength" if measure == "norm" else measure
        points = kept.dropna(subset=[column])
        means = points.groupby("feature" if part == "within_features" else "snapshot")[[column, "probe_error"]]
        around = points[[column, "probe_error"]] - means.transform("mean")
        assert row["spearman"] == pytest.approx(spearmanr(around[column], around["probe_error"])[0])
        assert row["spearman_low"] < row["spearman"] < row["spearman_high"]
        assert row["n"] == len(points) and row["n_features"] == points["feature"].nunique()
    assert found.loc[("r2", "within_features"), "spearman"] < -0.5
    lines = describe_probes(found.reset_index())
    assert lines[0].startswith("probe error against presence, within features (Spearman): R2 -0.")
    assert len(lines) == 2 and "decoder norm" in lines[1]
