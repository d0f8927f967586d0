"""Quadrature rules against known integrals, and the options of an estimator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from crosslens.causal.attribution import RULES, Estimator, quadrature
from crosslens.errors import UserError


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20, 64])
def test_gauss_legendre_is_exact_to_its_degree(n: int) -> None:
    nodes, weights = quadrature("gauss_legendre", n)
    for degree in range(2 * n):
        integral = sum(w * a**degree for a, w in zip(nodes, weights, strict=True))
        assert math.isclose(integral, 1 / (degree + 1), rel_tol=1e-10)
    beyond = sum(w * a ** (2 * n) for a, w in zip(nodes, weights, strict=True))
    assert n > 3 or abs(beyond - 1 / (2 * n + 1)) > 1e-6


@pytest.mark.parametrize("n", [1, 4, 10])
def test_midpoint_and_left_have_their_nodes(n: int) -> None:
    assert quadrature("midpoint", n)[0] == [(2 * i + 1) / (2 * n) for i in range(n)]
    assert quadrature("left", n)[0] == [1 - i / n for i in range(n)]
    for rule in ("midpoint", "left"):
        assert quadrature(rule, n)[1] == [1 / n] * n


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


def test_estimators_as_text() -> None:
    assert str(Estimator()) == "removal, default baseline, error node moved too"
    assert str(Estimator("ig", baseline="zero")) == "ig (gauss_legendre, 20 nodes), zero baseline, error node moved too"
    assert str(Estimator("ig", error="frozen")) == "ig (gauss_legendre, 20 nodes), default baseline, error node kept"
    assert str(Estimator("gradient", baseline="patch")) == "gradient, patch baseline, error node moved too"
    assert str(Estimator("ig", rule="left", n_nodes=10, threshold=0.1)).endswith("error node moved too, threshold 0.1")
    assert Estimator("exact", rule="midpoint", n_nodes=5) == Estimator("exact", rule=None, n_nodes=None)
    assert Estimator("gradient").nodes() == ([1.0], [1.0])
    # the mean of a function over the tenth at the clean run, and over those at both ends
    for method, ends in (("removal", [(0.9, 1.0)]), ("both_ends", [(0.0, 0.1), (0.9, 1.0)])):
        nodes, weights = Estimator(method).nodes()
        assert sum(weights) == pytest.approx(1)
        for power in range(4):
            mean = [(b ** (power + 1) - a ** (power + 1)) / (power + 1) / (b - a) for a, b in ends]
            found = sum(w * x**power for x, w in zip(nodes, weights, strict=True))
            assert found == pytest.approx(sum(mean) / len(mean))
    assert Estimator("ig", rule="left", n_nodes=2).nodes() == ([1.0, 0.5], [0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "igg"}, "method='igg' is unknown; use one of .*did you mean 'ig'"),
        ({"method": "ig", "rule": "gauss"}, "rule='gauss' is unknown"),
        ({"n_nodes": 5}, "rule=None and n_nodes=5 belong to method='ig', not to 'removal'"),
        ({"method": "exact", "rule": "gauss"}, "rule='gauss' is unknown"),
        ({"baseline": "none"}, "baseline='none' is unknown"),
        ({"error": "gone"}, "error='gone' is unknown"),
        ({"method": "ig", "n_nodes": 0}, "n_nodes=0 must be at least 1"),
        ({"method": "ig", "n_nodes": -3}, "n_nodes=-3 must be at least 1"),
        ({"threshold": -1.0}, "threshold=-1.0 must be at least 0"),
        ({"threshold": math.nan}, "threshold=nan must be at least 0"),
        ({"method": "exact", "threshold": 0.1}, "threshold=0.1 applies to effects at one position"),
    ],
)
def test_errors_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Estimator(**options)
    assert "\n" not in str(error.value)
