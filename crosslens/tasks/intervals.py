"""Intervals of shares. Torch is not needed."""

from __future__ import annotations

from functools import cache

from scipy.stats import norm


def wilson_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; `successes` may be fractional, because a tie counts as half."""
    z = _quantile((1 + level) / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@cache  # scipy's takes longer than all the rest
def _quantile(share: float) -> float:
    return float(norm.ppf(share))
