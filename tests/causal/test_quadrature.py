"""Rules of quadrature against integrals that are known, and what an estimator refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from crosslens.causal.attribution import RULES, Estimator, quadrature
from crosslens.errors import UserError


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 64])
def test_gauss_legendre_is_exact_to_its_degree(steps: int) -> None:
    nodes, weights = quadrature("gauss_legendre", steps)
    for degree in range(2 * steps):
        integral = sum(w * a**degree for a, w in zip(nodes, weights, strict=True))
        assert math.isclose(integral, 1 / (degree + 1), rel_tol=1e-10)
    beyond = sum(w * a ** (2 * steps) for a, w in zip(nodes, weights, strict=True))
    assert steps > 3 or abs(beyond - 1 / (2 * steps + 1)) > 1e-6


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_midpoint_and_left_have_their_nodes(steps: int) -> None:
    assert quadrature("midpoint", steps)[0] == [(2 * i + 1) / (2 * steps) for i in range(steps)]
    assert quadrature("left", steps)[0] == [1 - i / steps for i in range(steps)]
    for rule in ("midpoint", "left"):
        assert quadrature(rule, steps)[1] == [1 / steps] * steps


def test_left_counts_from_the_clean_run_and_leaves_out_the_baseline() -> None:
    np.testing.assert_allclose(quadrature("left", 10)[0], [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("rule", RULES)
def test_rules_converge_to_the_mean(rule: str) -> None:
    """The mean of exp over [0, 1] is e - 1."""
    errors = [
        abs(sum(w * math.exp(a) for a, w in zip(*quadrature(rule, n), strict=True)) - (math.e - 1)) for n in (4, 16, 64)
    ]
    order = {"gauss_legendre": None, "midpoint": 2, "left": 1}[rule]
    if order is None:
        assert max(errors) < 1e-8
    else:
        for coarse, fine in zip(errors, errors[1:], strict=False):
            assert coarse / fine == pytest.approx(4**order, rel=0.15)


def test_an_estimator_says_how_it_estimates() -> None:
    assert str(Estimator()) == "ig (gauss_legendre, 20 steps), zero baseline, joint error"
    assert str(Estimator("gradient", baseline="patch")) == "gradient, patch baseline, joint error"
    assert str(Estimator(rule="left", steps=10, threshold=0.1)).endswith("joint error, threshold 0.1")
    assert Estimator("exact", rule="midpoint", steps=5) == Estimator("exact", rule=None, steps=None)
    assert Estimator("gradient").nodes() == ([1.0], [1.0])
    assert Estimator(rule="left", steps=2).nodes() == ([1.0, 0.5], [0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "igg"}, "method='igg' is unknown; use one of .*did you mean 'ig'"),
        ({"rule": "gauss"}, "rule='gauss' is unknown"),
        ({"rule": None}, "rule=None is unknown"),
        ({"method": "exact", "rule": "gauss"}, "rule='gauss' is unknown"),
        ({"baseline": "none"}, "baseline='none' is unknown"),
        ({"error": "gone"}, "error='gone' is unknown"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": -3}, "steps=-3 must be at least 1"),
        ({"steps": None}, "steps=None must be at least 1"),
        ({"threshold": -1.0}, "threshold=-1.0 must be at least 0"),
        ({"threshold": math.nan}, "threshold=nan must be at least 0"),
        ({"method": "exact", "threshold": 0.1}, "threshold=0.1 is of effects at one position"),
    ],
)
def test_mistakes_are_told_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        Estimator(**options)
    assert "\n" not in str(error.value)
