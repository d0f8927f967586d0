"""Intervals, q-values and rank correlations against scipy and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr, spearmanr
from scipy.stats import t as student

from crosslens import stats


def test_counts_of_a_draw_are_those_of_its_units() -> None:
    picks = stats.resample(5, 1000, 3)
    assert picks.shape == (1000, 5) and set(picks.flatten().tolist()) == set(range(5))
    counts = stats.resample_counts(5, 1000, 3)
    assert counts.shape == (1000, 5) and (counts.sum(1) == 5).all()
    for drawn in (np.stack([np.bincount(row, minlength=5) for row in picks]), counts):
        np.testing.assert_allclose(drawn.mean(0), 1, atol=0.1)
        np.testing.assert_allclose(drawn.var(0), 4 / 5, atol=0.15)
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(stats.resample(5, 1000, rng), picks)
    assert (stats.resample(5, 1000, rng) != picks).any()  # a generator goes on


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_leave_out_what_is_not_defined(level: float) -> None:
    drawn = np.random.default_rng(0).normal(size=(101, 3))
    drawn[:50, 1], drawn[:, 2] = np.nan, np.nan
    low, high = stats.interval(drawn, level)
    for column, known in ((0, drawn[:, 0]), (1, drawn[50:, 1])):
        tail = (1 - level) / 2
        assert (low[column], high[column]) == pytest.approx(np.quantile(known, [tail, 1 - tail]))
    assert np.isnan(low[2]) and np.isnan(high[2])
    assert stats.interval(drawn[:, 0], level) == (low[0], high[0])
    assert np.isnan(stats.interval(drawn[:, 2], level)).all()
    whole = np.array([0, 1, 1, 1, 4])
    assert [float(end) for end in stats.interval(whole, 0.9, method="inverted_cdf")] == [0, 4]


def test_the_bootstrap_is_that_of_a_loop() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    slow = [np.median([values[i] for i in pick]) for pick in np.random.default_rng(7).integers(40, size=(200, 40))]
    found = stats.bootstrap(lambda picks: np.median(values[picks], axis=1), 40, draws=200, level=0.9, seed=7)
    assert found == pytest.approx(np.quantile(slow, [0.05, 0.95]))


@pytest.mark.parametrize("n", [3, 17])
def test_the_jackknife_error_of_a_mean_is_its_standard_error(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(n, 2))
    without = np.stack([np.delete(values, i, 0).mean(0) for i in range(n)])
    np.testing.assert_allclose(stats.jackknife_error(without), values.std(0, ddof=1) / n**0.5)


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    p = np.array([[0.01, np.nan, 0.04], [0.03, 0.2, np.nan]])
    ordered = [0.01, 0.03, 0.04, 0.2]
    adjusted = [min(ordered[j] * 4 / (j + 1) for j in range(i, 4)) for i in range(4)]
    expected = {value: adjusted[i] for i, value in enumerate(ordered)}
    np.testing.assert_allclose(stats.q_values(p), [[expected.get(value, np.nan) for value in row] for row in p])
    assert np.isnan(stats.q_values(np.full(3, np.nan))).all()


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 4, 12))
    x[0] = np.round(x[0])  # ties
    for found, known in ((stats.correlation(x, y), pearsonr), (stats.rank_correlation(x, y), spearmanr)):
        assert found.tolist() == pytest.approx([known(*row).statistic for row in zip(x, y, strict=True)])
    x[1], y[2] = 0.1, 3e7  # three times .1 is not .3: the mean of equal values is another one
    assert np.isnan(stats.correlation(x, y)).tolist() == [False, True, True, False]
    assert np.isnan(stats.rank_correlation(x, y)).tolist() == [False, True, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_correlations_in_draws_are_those_of_the_drawn_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = np.round(rng.normal(size=12), 1), rng.normal(size=12)
    counts = stats.resample_counts(12, 20, rng)
    counts[-1] = 12 * (np.arange(12) == 3)  # one pair only
    ranks = [stats.ranks_in_draws(values, counts) for values in (x, y)]
    found = {pearsonr: stats.correlation(x, y, counts), spearmanr: stats.correlation(*ranks, counts=counts)}
    for known, values in found.items():
        assert np.isnan(values[-1])
        for row, value in zip(counts[:-1], values, strict=False):
            assert value == pytest.approx(known(x.repeat(row), y.repeat(row)).statistic)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_equals_scipy(level: float) -> None:
    for k, n in ((0, 7), (3, 7), (7, 7), (1, 1), (0, 1), (250, 300)):
        known = binomtest(k, n).proportion_ci(level, "wilson")
        assert stats.wilson_interval(float(k), n, level) == pytest.approx((known.low, known.high), abs=1e-12)
        assert stats.wilson_interval(n / 2, n)[0] == pytest.approx(1 - stats.wilson_interval(n / 2, n)[1])


def test_the_correlation_of_two_vectors_is_a_float() -> None:
    """Tables cannot be written with arrays without dimensions in them."""
    for x, y in (([1, 2, 3], [1, 3, 2]), ([1, 1, 1], [1, 2, 3])):
        assert isinstance(stats.correlation(x, y), float) and isinstance(stats.rank_correlation(x, y), float)
    assert stats.rank_correlation([[1, 2, 3]], [[1, 3, 2]]).shape == (1,)


def slow_bh(p: list[float], alpha: float) -> list[bool]:
    """Benjamini and Hochberg in steps: all p-values up to the largest that is below its rank's level."""
    ordered = sorted(p)
    passing = [value for rank, value in enumerate(ordered, 1) if value <= alpha * rank / len(p)]
    return [bool(passing) and value <= passing[-1] for value in p]


@pytest.mark.parametrize(("F", "S", "seed"), [(1, 1, 0), (6, 3, 1), (40, 9, 2), (15, 32, 3)])
def test_family_q_values_against_the_procedure_at_every_level(F: int, S: int, seed: int) -> None:
    """Families by Simes, then within each; a missing p-value does not count, nor does a family without any."""
    rng = np.random.default_rng(seed)
    p = rng.random((F, S)) ** rng.choice([1, 6], (F, S))
    p[rng.random((F, S)) < 0.2] = np.nan
    q = stats.family_q_values(p)
    np.testing.assert_array_equal(np.isnan(q), np.isnan(p))
    families = [[value for value in row if value == value] for row in p.tolist()]
    known = [row for row in families if row]
    for alpha in (0.001, 0.01, 0.05, 0.2, 0.5):
        simes = [min(sorted(row)[k] * len(row) / (k + 1) for k in range(len(row))) for row in known]
        kept = slow_bh(simes, alpha)
        level = alpha * sum(kept) / max(1, len(known))
        expected = [slow_bh(row, level) if keep else [False] * len(row) for row, keep in zip(known, kept, strict=True)]
        assert (q[np.isfinite(q)] <= alpha).tolist() == [each for row in expected for each in row]
    np.testing.assert_allclose(stats.family_q_values(p[:, :1]), stats.q_values(p[:, :1]))  # families of one


def test_families_without_effects_are_rarely_selected() -> None:
    """Beside families full of effects, Benjamini and Hochberg over all p-values selects many without any."""
    rng = np.random.default_rng(0)
    p = rng.random((400, 32))
    p[:200] *= 1e-6
    assert (stats.family_q_values(p)[200:] <= 0.05).any(1).mean() <= 0.05
    assert (stats.q_values(p)[200:] <= 0.05).any(1).mean() > 0.3
    assert (stats.family_q_values(p)[:200] <= 0.05).all()


@pytest.mark.parametrize("seed", range(3))
def test_sign_flip_p_bounds_all_flips(seed: int) -> None:
    x = np.random.default_rng(seed).exponential(1, 10) - 0.3
    signs = 1 - 2 * ((np.arange(2**10)[:, None] >> np.arange(10)) & 1)
    exact = (np.abs(signs @ x) >= abs(x.sum()) - 1e-9).mean()
    assert exact <= stats.sign_flip_p(x.sum(), (x**2).sum()) <= 1
    assert stats.sign_flip_p(np.zeros(1), np.zeros(1)).tolist() == [1]


def test_sign_flip_p_holds_where_one_group_has_many_prompts_and_a_t_test_does_not() -> None:
    rng, sizes = np.random.default_rng(0), np.append(np.ones(58), 58)
    x = sizes * rng.standard_normal((1000, 59))
    mean = x.sum(1, keepdims=True) / sizes.sum()
    error = np.sqrt(59 / 58 * ((x - mean * sizes) ** 2).sum(1)) / sizes.sum()
    t = 2 * student.sf(np.abs(mean[:, 0]) / error, 58)
    assert (t <= 0.05).mean() > 0.25
    assert (stats.sign_flip_p(x.sum(1), (x**2).sum(1)) <= 0.05).mean() <= 0.05
    # k groups with an effect have one sign by chance
    for k in range(1, 12):
        assert stats.sign_flip_p(np.array(float(k)), np.array(float(k))) >= 0.5 ** (k - 1)


def test_t_quantiles() -> None:
    assert stats.t_quantile(0.975, 5) == pytest.approx(2.77645, abs=1e-4)
    assert stats.t_quantile(0.975, 10**6) == pytest.approx(1.96, abs=1e-3) and np.isnan(stats.t_quantile(0.975, 1))
