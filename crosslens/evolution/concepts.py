"""When the concept of a task becomes readable: R2 on paired prompts.

R2 over text (`presence`) asks whether a snapshot's activations predict a feature, and the *context* in which a feature
fires is readable long before what it says there: a feature that stands for "after a noun, and it is plural" is half
predicted by "after a noun". Paired prompts hold the context fixed and flip the concept. For a feature i, a snapshot s
and the pairs of a task, with df_i and dx_s the differences between the two prompts at the same position,

1. the groups of prompts (such as those of one noun, `crosslens.tasks.items.groups`) are dealt into folds;
2. ridge regression without a constant, of df_i on dx_s over all folds but one: `w = (C + lambda I)^-1 c` with
   C = sum dx dx^T, c = sum dx df and lambda = ridge tr(C) / D. A constant would be arbitrary: swapping the two
   prompts of a pair flips both signs;
3. on the fold left out, `R2_is = 1 - sum (df_i - w dx_s)^2 / sum df_i^2`, sums over all folds.

A direction that tells words apart does not pass from the words of some groups to those of another, so that R2 is 0
until the snapshot has the concept itself. With few words of a class it sometimes does pass, by accident: fewer than 8
groups are refused, fewer than 16 warned about.

Birth: the first snapshot from which R2 is at least .7 of its largest, for two in a row, as by other measures (`births`,
where it is half), with an interval from a bootstrap over groups. Two hypotheses are tested:

1. the concept is not readable at any snapshot: one-sided t test over groups of what R2 saves at the best snapshot, with
   a p-value of at least 2^(1 - G), the chance that a direction without meaning has the same sign in all groups; times
   S, for the choice of the snapshot;
2. it is readable from the first snapshot on (`births.date_curves`).

The q-value of a birth is that of the larger of both p-values (Benjamini and Hochberg 1995, over features). With
differences whose signs are flipped at random by group, and with equal snapshots, nothing may be born. How right the
dates are is measured on rules that enter pretraining data at known steps (`benchmarks/planted_rules.py`).

New here. Symbols: n differences, S snapshots, D d_model, A features that differ, G groups.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import t as student

from crosslens.errors import UserError
from crosslens.evolution.births import MIN_R2, date_curves, interval_ends
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.lifecycles import birth_index, check_presence, require_two_snapshots
from crosslens.intervention.prompt_runs import PromptRuns, on_runs
from crosslens.stats import q_values, resample_counts

LEAST_GROUPS, ENOUGH_GROUPS = 8, 16
"""Groups of prompts below which births are refused, and below which a warning says that they may be early."""
PRESENCE = 0.7
"""Share of its largest R2 from which a concept is present: at .5 features of XOR were dated when both classes were
known, of which any nonlinearity holds some, and 46 % of them too early (`benchmarks/planted_rules.py`)."""
RIDGE = 1e-2
_FOLDS = 16
_FEATURES = 256  # at a time when resampling


class ConceptBirths(NamedTuple):
    """The concept of a task in features that differ between its paired prompts."""

    births: pd.DataFrame
    """A row per feature: feature; difference (sum of df^2 / sum of f^2 over both prompts: 1 if a feature is active on
    one prompt of each pair, 0 if it does not tell them apart); n_groups (with a difference); r2 (largest over
    snapshots) and peak (where); birth, birth_step, birth_tokens, birth_low, birth_high (missing if R2 stays below .05;
    S if it never stays there); readable_q and q. Those with most groups first."""
    curves: pd.DataFrame
    """A row per feature and snapshot: feature, snapshot, label, step, r2, r2_low, r2_high."""


@on_runs
@torch.no_grad()
def concept_births(
    runs: PromptRuns,
    *,
    everywhere: bool = False,
    presence: float = PRESENCE,
    min_run: int = 2,
    ridge: float = RIDGE,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> ConceptBirths:
    """Date when each snapshot's activations carry what a feature says about a task, by R2 on paired prompts.

    Args:
        runs: clean runs of a task with its paired prompts; or crosscoder, snapshots and task in its place.
        everywhere: compare the prompts at all positions from the first that differs; otherwise at the last, where the
            answer is predicted.
        presence: the concept is present where R2 is at least this share of its largest.
        min_run: snapshots in a row it must be present for to count as born.
        ridge: penalty on the weights, in units of the mean square of a coordinate of dx.
        n_bootstrap: draws of groups, for intervals.
        seed: seed for the folds and the draws.

    Raises:
        UserError: a single snapshot, prompts without pairs or of fewer than 8 groups, no feature that tells the pairs
            apart in 8 groups, a number out of range.
    """
    crosscoder = runs.crosscoder
    require_two_snapshots("dating concepts", crosscoder.n_snapshots)
    check_presence(presence, min_run)
    if ridge <= 0:
        raise UserError(f"ridge={ridge} must be positive, such as {RIDGE}: without it the fit may have no solution")
    if not runs.paired:
        raise UserError(
            f"task {runs.task.name!r} has no paired prompts (patch_prefix), and a concept is dated by the difference "
            "within a pair: give a task whose items have one"
        )
    _check_groups(runs)
    rows = runs.differences(everywhere=everywhere)
    group = runs.groups[rows.prompts].numpy()
    df = (rows.features - rows.paired_features).double().numpy()
    total = _by_group(df**2, group, runs.n_groups)
    kept = np.flatnonzero((total > 0).sum(0) >= LEAST_GROUPS)
    if not len(kept):
        raise UserError(
            f"no feature tells the pairs of task {runs.task.name!r} apart in {LEAST_GROUPS} groups of prompts: the "
            "dictionary has no feature of this concept at this position"
        )
    df, total = df[:, kept], total[:, kept]
    fold = _deal(runs.n_groups, seed)[group]
    S = crosscoder.n_snapshots

    def error_at(s: int) -> Any:
        left = df - predict(rows.acts[:, s].double().numpy(), df, fold, ridge)
        return _by_group(left**2, group, runs.n_groups)

    read = _Sums(np.stack(runs.each_snapshot(error_at), -1), total)
    size = (rows.features.double().square() + rows.paired_features.double().square()).sum(0).numpy()[kept]
    features = runs.features.numpy()[kept]
    order = np.lexsort((-total.sum(0) / size, -(total > 0).sum(0)))
    table = pd.DataFrame({"feature": features, "difference": total.sum(0) / size, "n_groups": (total > 0).sum(0)})
    table = pd.concat([table, _births(read, presence, min_run, n_bootstrap, seed)], axis=1).iloc[order]
    where = table["birth"].where(table["birth"] < S).fillna(-1).to_numpy(dtype=np.int64)
    dates = snapshot_columns(crosscoder)
    for i, unit in enumerate(("step", "tokens"), start=1):
        found = pd.api.extensions.take(dates[unit].array, where, allow_fill=True)
        table.insert(list(table).index("birth") + i, f"birth_{unit}", found)
    return ConceptBirths(table.reset_index(drop=True), _curves(read, features, order, dates, n_bootstrap, seed))


def predict(
    x: Float64[np.ndarray, "n D"], y: Float64[np.ndarray, "n A"], fold: Int[np.ndarray, " n"], ridge: float
) -> Float64[np.ndarray, "n A"]:
    """Predict y from x by ridge regression without a constant, each row by the fit to the other folds.

    Args:
        x: rows.
        y: what is predicted.
        fold: of every row.
        ridge: penalty in units of the mean square of a coordinate over the rows of the fit.
    """
    D = x.shape[1]
    if len(x) < D:  # the fit lies in the span of the rows, so that coordinates in it do
        x = x @ np.linalg.qr(x.T)[0]
    found, products, shared = np.zeros_like(y), x.T @ x, x.T @ y
    for k in np.unique(fold):
        out = fold == k
        xx, xy = products - x[out].T @ x[out], shared - x[out].T @ y[out]
        penalty = ridge * xx.trace() / D
        if penalty > np.finfo(float).eps * products.trace():  # the other rows may all be 0
            found[out] = x[out] @ cho_solve(cho_factor(xx + penalty * np.eye(len(xx))), xy)
    return found


class _Sums(NamedTuple):
    """Sums of squared errors, and of the squares that they are compared with, by group."""

    error: Float64[np.ndarray, "G A S"]
    total: Float64[np.ndarray, "G A"]

    def resample(self, weights: Float64[np.ndarray, "r G"], ids: Any = slice(None)) -> Float64[np.ndarray, "r a S"]:
        """R2 of some features with every group counted as often as the weights say."""
        total = (weights @ self.total[:, ids])[..., None]
        error = np.tensordot(weights, self.error[:, ids], 1)
        return 1 - np.divide(error, total, out=np.ones_like(error), where=total > 0)

    def curves(self) -> Float64[np.ndarray, "A S"]:
        """R2 over all groups."""
        return self.resample(np.ones((1, len(self.total))))[0]


def _births(read: _Sums, presence: float, min_run: int, n_bootstrap: int, seed: int) -> pd.DataFrame:
    curves, G = read.curves(), len(read.total)
    A, S = curves.shape
    dated = curves.max(1) >= MIN_R2
    born = date_curves(
        curves, read.resample, G, dated, presence=presence, min_run=min_run, n_bootstrap=n_bootstrap, seed=seed
    )
    highest = curves.max(1, keepdims=True)
    birth = birth_index(curves >= np.where(highest > 0, presence * highest, np.inf), min_run)
    peak = curves.argmax(1)
    saved = read.total - np.take_along_axis(read.error, peak[None, :, None], 2)[..., 0]  # (G, A)
    spread = saved.std(0, ddof=1) / G**0.5
    t = np.divide(saved.mean(0), spread, out=np.zeros(A), where=spread > 0)
    readable = np.minimum(S * np.maximum(student.sf(t, G - 1), 0.5 ** (G - 1)), 1.0)
    p = born["p"].to_numpy()
    return pd.DataFrame(
        {
            "r2": highest[:, 0],
            "peak": peak,
            "birth": pd.Series(birth, dtype="Int64").where(pd.Series(dated)),
            "birth_low": born["birth_low"],
            "birth_high": born["birth_high"],
            "readable_q": q_values(readable),
            "q": q_values(np.fmax(np.where(dated, p, 1.0), readable)),
        }
    )


def _curves(
    read: _Sums,
    features: Int[np.ndarray, " A"],
    order: Int[np.ndarray, " A"],
    dates: pd.DataFrame,
    n_bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    """The table of curves, with intervals over groups."""
    G, (A, S) = len(read.total), read.error.shape[1:]
    draws = resample_counts(G, n_bootstrap, seed).astype(float)
    ends = np.empty((2, A, S))
    for ids in np.split(np.arange(A), range(_FEATURES, A, _FEATURES)):
        ends[:, ids] = np.quantile(read.resample(draws, ids), interval_ends(G), axis=0)
    table = pd.DataFrame({"feature": np.repeat(features[order], S), "snapshot": np.tile(np.arange(S), A)})
    for unit in ("label", "step"):
        table[unit] = dates[unit].take(table["snapshot"]).array
    r2 = read.curves()
    return table.assign(r2=r2[order].ravel(), r2_low=ends[0, order].ravel(), r2_high=ends[1, order].ravel())


def _check_groups(runs: PromptRuns) -> None:
    if runs.n_groups >= ENOUGH_GROUPS:
        return
    said = (
        f"the prompts of task {runs.task.name!r} are of {runs.n_groups} groups, such as those of one noun (column "
        f"'group' of a task; {len(runs)} prompts)"
    )
    if runs.n_groups < LEAST_GROUPS:
        raise UserError(
            f"{said}: dating concepts needs {LEAST_GROUPS}, and {ENOUGH_GROUPS} to do it well, because what holds for "
            "few words may hold for another by accident; add prompts with other words"
        )
    warnings.warn(f"{said}: with fewer than {ENOUGH_GROUPS} a concept may seem readable before it is", stacklevel=4)


def _deal(n_groups: int, seed: int) -> Int[np.ndarray, " G"]:
    """The fold of every group."""
    fold = np.empty(n_groups, dtype=int)
    fold[np.random.default_rng(seed).permutation(n_groups)] = np.arange(n_groups) % min(n_groups, _FOLDS)
    return fold


def _by_group(
    values: Float[np.ndarray, "n A"], group: Int[np.ndarray, " n"], n_groups: int
) -> Float64[np.ndarray, "G A"]:
    sums = np.zeros((n_groups, values.shape[1]))
    np.add.at(sums, group, values)
    return sums
