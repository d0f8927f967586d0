"""Validation of the measures against one feature, snapshot and replicate at a time."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from crosslens.causal import validation
from crosslens.causal.attribution import Attribution, attribute
from crosslens.causal.relative import significant
from crosslens.causal.validation import pair_correlation, partial_correlation, validate, within_correlation
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import F, as_if_of, make_crosscoder, slow_runs


def slow_within(x: np.ndarray, y: np.ndarray) -> float:
    found: list[Any] = [spearmanr(a, b)[0] for a, b in zip(x, y, strict=True) if np.ptp(a) and np.ptp(b)]
    return float(np.mean(found))


def slow_pairs(x: np.ndarray, y: np.ndarray) -> float:
    found: list[Any] = []
    for a, b in pairwise(range(x.shape[1])):
        shares = [[row[b] / (row[a] + row[b]) if row[a] + row[b] else 0.5 for row in each] for each in (x, y)]
        if np.ptp(shares[0]) and np.ptp(shares[1]):
            found.append(spearmanr(shares[0], shares[1])[0])
    return float(np.mean(found))


@pytest.mark.parametrize(("n", "S", "seed"), [(3, 2, 0), (12, 5, 1), (40, 3, 2)])
def test_correlations_equal_loops(n: int, S: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.random((n, S)), rng.random((n, S))
    x[0], x[1, 0], y[1, 0], y[2] = 0.0, 0.0, 0.0, 0.3  # constant, equal and silent
    if n > 3:
        assert within_correlation(x, y) == pytest.approx(slow_within(x, y))
    assert pair_correlation(x, y) == pytest.approx(slow_pairs(x, y))
    draws = rng.integers(n, size=(4, n))
    for r, found in enumerate(pair_correlation(x[draws], y[draws])):
        assert found == pytest.approx(slow_pairs(x[draws[r]], y[draws[r]]), nan_ok=True)
    assert within_correlation(x[2:], x[2:]) == pytest.approx(1) and pair_correlation(x, x) == pytest.approx(1)
    # only the order of ratios matters, not their size: this is the validation with x_b / x_a
    factor = rng.random((n, 1)) + 0.1
    assert pair_correlation(x * factor, y) == pytest.approx(pair_correlation(x, y))


@pytest.fixture(scope="module")
def runs(snaps: Snapshots, task: Task) -> PromptRuns:
    return PromptRuns(make_crosscoder(snaps, "jumprelu_crosscoder"), snaps, task, paired=False)


@pytest.fixture(scope="module")
def ie(runs: PromptRuns) -> Attribution:
    """Errors as if of 400 prompts."""
    found = attribute(runs, "gradient")
    return as_if_of(found, 400)


def test_exact_effects_and_measures_equal_plain_splices(
    runs: PromptRuns, ie: Attribution, snaps: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "REPLICATES", 40)
    cc = runs.crosscoder
    decodability = torch.rand(F, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.1
    decodability[5] = math.nan
    found = validate(runs, ie, decodability=decodability, max_features=9)
    table = found.effects
    kept = significant(ie).any(-1).nonzero().flatten().tolist()
    assert len(kept) > 9
    largest = sorted(kept, key=lambda i: -float(ie.effects[i].abs().max()))[:9]
    assert table["feature"].unique().tolist() == sorted(largest)
    slow = slow_runs(snaps, cc)
    for row in table[table["snapshot"] == 2].itertuples():
        drops = [run.metric(2) - run.without(2, row.feature, torch.zeros_like(run.f[2])) for run in slow]
        assert row.exact == pytest.approx(float(torch.stack(drops).mean()), abs=1e-4)
        assert row.ie == float(ie.effects[row.feature, 2])
    wide: dict[str, Any] = {
        name: table.pivot(index="feature", columns="snapshot", values=name).to_numpy()
        for name in table.columns[4:]
        if name != "baseline"
    }
    assert set(table["baseline"]) == {"zero"}
    ids = sorted(largest)
    sizes = ie.effects.abs() * significant(ie)
    totals = sizes.sum(0)
    norms = cc.decoder_norms.detach()
    np.testing.assert_allclose(wide["reldec"], (norms / norms.sum(-1, keepdim=True))[ids], rtol=1e-5)
    exact = np.abs(wide["exact"])
    targets = {"effect": exact, "share": exact / exact.sum(0)}
    measures = {
        "relie": sizes[ids].numpy(),
        "share_relie": (sizes / totals)[ids].nan_to_num().numpy(),
        "reldec": wide["reldec"],
        "decodability": np.maximum(wide["decodability"], 0),
    }
    measures["snapshot"] = np.tile(np.arange(3.0), (9, 1))
    assert len(found.summary) == 2 * 2 * 5
    for row in found.summary.to_dict("records"):
        x, y = measures[row["measure"]], targets[row["target"]]
        known = ~np.isnan(x).any(-1)
        expected = {"within": slow_within, "pairs": slow_pairs}[row["kind"]](x[known], y[known])
        assert row["n_features"] == 9
        if (row["kind"], row["measure"]) == ("pairs", "snapshot"):  # the same for all features
            assert np.isnan(row["correlation"])
            continue
        assert row["correlation"] == pytest.approx(expected, abs=1e-6)
        assert row["correlation_low"] <= row["correlation_high"]
        partial = slow_partial(x[known], y[known]) if row["kind"] == "within" else math.nan
        assert row["partial"] == pytest.approx(partial, abs=1e-6, nan_ok=True)


def slow_partial(x: np.ndarray, y: np.ndarray) -> float:
    """Over features, the correlation of what ranks of both are not linear in the snapshot's; by least squares."""
    found = []
    for row, target in zip(x, y, strict=True):
        z = np.stack([np.ones(len(row)), np.arange(len(row))], 1)
        left = [v - z @ np.linalg.lstsq(z, v, rcond=None)[0] for v in (rankdata(row), rankdata(target))]
        if min(np.abs(each).max() for each in left) > 1e-9:
            found.append(np.corrcoef(*left)[0, 1])
    return float(np.mean(found)) if found else math.nan


@pytest.mark.parametrize(("n", "S", "seed"), [(5, 4, 0), (20, 9, 1), (3, 32, 2)])
def test_partial_correlation_against_least_squares(n: int, S: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (np.round(rng.normal(size=(n, S)) + 0.3 * np.arange(S), 1) for _ in range(2))
    assert float(partial_correlation(x, y)) == pytest.approx(slow_partial(x, y))
    index = np.tile(np.arange(float(S)), (n, 1))
    assert np.isnan(partial_correlation(index, y))


def test_what_only_grows_predicts_nothing_beyond_the_snapshot() -> None:
    """The control: a measure and an effect that both rise over training, and have nothing else in common."""
    rng = np.random.default_rng(0)
    x, y = (np.arange(9) + rng.normal(0, 2, (300, 9)) for _ in range(2))
    assert within_correlation(x, y) > 0.4 and abs(partial_correlation(x, y)) < 0.05
    own = rng.normal(0, 2, (300, 9))
    assert partial_correlation(np.arange(9) + own, np.arange(9) + own + rng.normal(0, 1, (300, 9))) > 0.6


def test_a_measure_that_knows_the_effects_is_found(runs: PromptRuns, ie: Attribution) -> None:
    """Decodability that equals the exact effects has a correlation of 1."""
    first = validate(runs, ie)
    exact = torch.zeros(F, 3, dtype=torch.float64)
    for row in first.effects.to_dict("records"):
        exact[row["feature"], row["snapshot"]] = abs(row["exact"])
    table = validate(runs, ie, decodability=exact).summary
    told = table[(table["measure"] == "decodability") & (table["target"] == "effect")]
    assert told["correlation"].tolist() == pytest.approx([1, 1]) and told["correlation_low"].tolist() == pytest.approx(
        [1, 1]
    )


def test_errors_are_one_line(runs: PromptRuns, ie: Attribution) -> None:
    nothing = dataclasses.replace(ie, p=torch.ones_like(ie.p))
    cases: list[tuple[Attribution, dict[str, Any], str]] = [
        (ie, {"level": 2}, "level=2 must be between 0 and 1"),
        (ie, {"max_features": 2}, "max_features=2 must be at least 3"),
        (ie, {"decodability": torch.zeros(4, 3)}, r"decodability has shape \(4, 3\), not \(features, snapshots\)"),
        (ie, {"baseline": "patch"}, "needs the paired prompts"),
        (nothing, {}, "no feature has a significant effect on 'tiny': give more prompts"),
    ]
    for effects, options, message in cases:
        with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
            validate(runs, effects, **options)
