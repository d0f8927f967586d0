"""Intervals, q-values and rank correlations: each is written here once.

1. *Bootstrap*: units (features, prompts, groups of documents) are drawn with replacement, as often as there are, and
   the statistic is computed anew for each draw. Its interval is that of the percentiles of the draws, without those
   where it is not defined. `resample` gives the units of each draw, `resample_counts` how often each unit is in it:
   sums over units are then a product of matrices. Both draw from numpy's generator of the given seed.
2. *Jackknife*: the standard error of a statistic from its values without each unit in turn.
3. *p-values* of a sum against 0, by flipping signs (Bentkus and Dzindzalieta 2015).
4. *q-values* (Benjamini and Hochberg 1995), over all p-values that are known, or over families of them (Benjamini and
   Bogomolov 2014).
5. *Rank correlation* (Spearman's), with mean ranks for equal values; over several rows at once, or in draws of a
   bootstrap that are given by how often they have each value.
6. *Wilson's interval* of a share.

Symbols: R draws, n units or values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control, norm, rankdata, t

_PARTS = 20  # parts that draws are computed in: a vectorised statistic holds all of their units


def resample(n: int, draws: int, seed: int | np.random.Generator) -> Int[np.ndarray, "R n"]:
    """The units in each draw of a bootstrap.

    Args:
        n: number of units.
        draws: R.
        seed: seed, or a generator to go on with.
    """
    return np.random.default_rng(seed).integers(n, size=(draws, n))


def resample_counts(n: int, draws: int, seed: int | np.random.Generator) -> Int[np.ndarray, "R n"]:
    """How often each of n units is in each draw of a bootstrap; arguments as of `resample`."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)


def interval(drawn: Any, level: float = 0.95, *, method: str = "linear") -> tuple[Any, Any]:
    """Percentile interval of draws (R, ...), over the first axis; NaN where no draw is defined.

    Args:
        drawn: draws; those that are NaN do not count.
        level: confidence level.
        method: of `np.quantile`; "inverted_cdf" for values between which there are none, such as snapshots.
    """
    drawn = np.asarray(drawn)
    tails = [(1 - level) / 2, (1 + level) / 2]
    if drawn.dtype.kind != "f" or not np.isnan(drawn).any():
        low, high = np.quantile(drawn, tails, axis=0, method=method)  # type: ignore[call-overload]
    else:
        known = ~np.isnan(drawn).all(0)
        found = np.full((2, *drawn.shape[1:]), np.nan)
        if known.any():
            found[:, known] = np.nanquantile(drawn[:, known], tails, axis=0, method=method)  # type: ignore[call-overload]
        low, high = found
    return low, high


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "r n"]], Float[np.ndarray, " r"]],
    n: int,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int | np.random.Generator = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic of n units.

    Args:
        statistic: of the units in some draws, a row of indices each: one value per row.
        n: number of units.
        draws: R.
        level: confidence level.
        seed: as of `resample`.
    """
    picks = resample(n, draws, seed)
    low, high = interval(np.concatenate([statistic(part) for part in np.array_split(picks, _PARTS)]), level)
    return float(low), float(high)


def jackknife_error(without: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, " ..."]:
    """Standard error of a statistic, from its values without each of n units."""
    n = len(without)
    return np.sqrt((n - 1) / n * ((without - without.mean(0)) ** 2).sum(0))


def sign_flip_p(
    total: Float[np.ndarray, " ..."] | float, squares: Float[np.ndarray, " ..."] | float
) -> Float[np.ndarray, " ..."] | float:
    """Two-sided p-value of a sum against 0, if every term could as well have the opposite sign.

    r = |sum x| / sqrt(sum x^2) has P(r >= t) <= 2 c P(Z >= t) with c = 1 / (4 P(Z >= sqrt(2))) = 3.18 and Z standard
    normal, for any number of terms and any sizes (Bentkus and Dzindzalieta 2015, Bernoulli 21, 1205).

    This is not the p-value of a mean over its standard error, and may be much larger. With k terms that are not 0 it is
    at least 2^(1 - k), the chance that all have one sign; and the terms are weighed by their size. Where one group has
    a seventh of all prompts, a mean of 2.5 clustered standard errors has p = .15 or so: the standard error hardly knows
    that group's own variance, and a t test that trusts it rejects too often. The bound is also some 3 times the share
    of all flips that reach the sum, 6 times in that example.

    Args:
        total: sum of the terms.
        squares: sum of their squares; where it is 0 the p-value is 1.
    """
    r = np.abs(total) / np.sqrt(np.where(squares > 0, squares, 1))
    return np.minimum(2 * norm.sf(r) / (4 * norm.sf(2**0.5)), 1.0)


def t_quantile(share: float, units: int) -> float:
    """Quantile of Student's t for a mean over units: `units` - 1 degrees of freedom; NaN with a single one."""
    return float(t.ppf(share, units - 1)) if units > 1 else float("nan")


def q_values(p: Float[np.ndarray, " ..."]) -> Float[np.ndarray, " ..."]:
    """q-values of Benjamini and Hochberg; missing p-values stay missing and do not count."""
    q, known = np.full(np.shape(p), np.nan), np.isfinite(p)
    if known.any():
        q[known] = false_discovery_control(p[known])
    return q


def family_q_values(p: Float[np.ndarray, "F n"]) -> Float[np.ndarray, "F n"]:
    """q-values of the p-values in families, a row each; missing p-values stay missing and do not count.

    A q-value is the smallest level alpha at which this procedure of Benjamini and Bogomolov (2014, JRSS B 76, 297)
    selects the p-value: of m families select R by Benjamini and Hochberg at alpha, on each family's least q-value (its
    p-value by Simes); in each of these select by Benjamini and Hochberg at alpha R / m. Then alpha bounds the expected
    share of the selected families without any effect, and the expected share of false effects, mean over selected
    families. Benjamini and Hochberg over all p-values at once bound neither: where some families have many effects,
    single false ones in many others are few among all.
    """
    known, order = np.isfinite(p), np.argsort(p, axis=1)  # what is missing comes last
    within = np.full(p.shape, np.nan)
    for n in set(known.sum(1).tolist()) - {0}:  # families of one size at a time
        rows = (known.sum(1) == n).nonzero()[0][:, None]
        places = rows, order[rows[:, 0], :n]
        within[places] = false_discovery_control(p[places], axis=1)
    least = np.sort(np.where(known, within, np.inf).min(1, initial=np.inf))
    least = least[np.isfinite(least)]
    m = len(least)
    if not m:
        return within
    # with the r families of the least p-values selected, alpha must be at least m / r times the largest of them, and
    # m / r times the q-value within the family
    later = np.append(np.minimum.accumulate((m * least / np.arange(1, m + 1))[::-1])[::-1], np.inf)
    r = np.searchsorted(least, within[known], side="right")
    within[known] = np.minimum(np.minimum(m * within[known] / np.maximum(r, 1), later[r]), 1.0)
    return within


def correlation(x: Any, y: Any, counts: Any = None) -> Any:
    """Pearson correlation over the last axis, of two vectors a float; NaN where either is constant.

    Args:
        x: (..., n) values.
        y: (..., n) values.
        counts: (..., n) how often each pair counts; once if None.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    varies = _varies(x, counts) & _varies(y, counts)
    if counts is None:
        x, y = (each - each.mean(-1, keepdims=True) for each in (x, y))
        size, shared = np.sqrt((x**2).sum(-1) * (y**2).sum(-1)), (x * y).sum(-1)
    else:
        total = counts.sum(-1, keepdims=True)
        x, y = (each - (each * counts).sum(-1, keepdims=True) / total for each in (x, y))
        size, shared = np.sqrt((counts * x**2).sum(-1) * (counts * y**2).sum(-1)), (counts * x * y).sum(-1)
    found = np.where(varies & (size > 0), shared / np.where(size > 0, size, 1), np.nan)
    return found if found.ndim else float(found)  # a table of arrays without dimensions cannot be written


def rank_correlation(x: Any, y: Any) -> Any:
    """Spearman correlation of x and y (..., n) over the last axis; NaN where either is constant."""
    return correlation(rankdata(x, axis=-1), rankdata(y, axis=-1))


def ranks_in_draws(values: Float[np.ndarray, " n"], counts: Int[np.ndarray, "R n"]) -> Float[np.ndarray, "R n"]:
    """Mean rank of every value in draws that have it `counts` times."""
    _, which = np.unique(values, return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.flatnonzero(np.diff(which[order], prepend=-1))
    times = np.add.reduceat(counts[:, order], starts, axis=1)
    return (times.cumsum(1) - (times - 1) / 2)[:, which]


def _varies(x: Float[np.ndarray, "... n"], counts: Any) -> Any:
    """Whether there are different values; means of equal ones may differ from them by rounding."""
    if counts is None:
        return x.max(-1, initial=-np.inf) > x.min(-1, initial=np.inf)
    return np.where(counts > 0, x, -np.inf).max(-1) > np.where(counts > 0, x, np.inf).min(-1)


def wilson_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share; `successes` may be fractional, because a tie counts as half."""
    z = _normal_quantile((1 + level) / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@cache  # scipy's takes longer than all the rest
def _normal_quantile(share: float) -> float:
    return float(norm.ppf(share))
