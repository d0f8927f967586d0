"""Which measure says at which snapshots a feature acts? Exact ablation at every snapshot, as in Bayazit et al.

For features i with a significant effect, D_is is the exact effect at snapshot s: the drop of the metric when the
feature alone is ablated. The metric is logit(correct) - logit(wrong), which is also the log-probability ratio of the
answers. D_is is measured on other prompts than the effects that select the features. Four measures are compared with
it:

    relie           |IE_is|                       share_relie     |IE_is| / sum_j |IE_js|
    reldec          norm of the decoder row       decodability    R2 of the feature, predicted from snapshot s alone

(effects that are not significant count as 0), and the index of the *snapshot* alone: most effects grow in training, and
so does most else, so that any measure that grows predicts them. They are compared against two targets: the *effect*
|D_is|, and its *share* of the snapshot's total, |D_is| / sum_j |D_js|, which does not grow with the model's logits.
Three correlations, all Spearman's:

    within    over the snapshots of one feature, mean over features: when does this feature act?
    partial   as within, beyond the snapshot: the correlation of what is left of the ranks of both after their linear
              fit to the index, (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))
    pairs     over features, of x_b / (x_a + x_b) at consecutive snapshots a and b, mean over these pairs: which
              features grow here? This is the validation of Bayazit et al. (arXiv 2509.05291), who use x_b / x_a

Intervals are percentiles of bootstrap replicates that resample features. The first two correlations, decodability,
shares and intervals are new here.

Symbols: n features, S snapshots, R replicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.causal.ablation import check_effects
from crosslens.causal.attribution import Attribution, exact_effects, resolve_baseline
from crosslens.causal.relative import check_level, relie, share_relie, significant
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns, on_runs
from crosslens.stats import bootstrap, rank_correlation

REPLICATES = 1000
Correlation = Callable[[np.ndarray, np.ndarray], Any]


@dataclass(frozen=True)
class Validation:
    """Exact effects of features at every snapshot, and how well each measure predicts them.

    Attributes:
        effects: a row per feature and snapshot: feature, snapshot, label, step, exact (effect on the metric when the
            feature alone is ablated, in logits), ie, relie, share_relie, reldec and, if given, decodability; baseline
            (what the ablated feature becomes).
        summary: a row per kind ("within", "pairs"), target ("effect", "share") and measure, "snapshot" among them:
            correlation with its bootstrap interval correlation_low and correlation_high; of kind "within", partial
            (beyond the snapshot's index) with partial_low and partial_high; level, n_features, baseline. NaN with fewer
            than three features, or where a measure does not vary.
    """

    effects: pd.DataFrame
    summary: pd.DataFrame


@on_runs
def validate(
    runs: PromptRuns,
    ie: Attribution,
    *,
    baseline: str | None = None,
    decodability: Float[Tensor, "F S"] | None = None,
    max_features: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Validation:
    """Ablate every significant feature at every snapshot, one by one, and compare the measures with its effects.

    Args:
        runs: clean runs of other prompts of the task than `ie`; or crosscoder, snapshots and task in its place.
        ie: effects on the task.
        baseline: what an ablated feature becomes; None is that of `ie`.
        decodability: R2 of every feature at every snapshot, as from `evolution.measure_decodability(...).r2`.
        max_features: of more significant features, those with the largest |IE| at any snapshot are ablated.
        level: confidence level of the intervals.
        seed: seed for the replicates.

    Raises:
        UserError: a single snapshot, effects of another crosscoder, no significant effect, an unknown baseline, "patch"
            without paired prompts, decodability of another shape, max_features below 3, a level outside (0, 1).
    """
    check_level(level)
    baseline = resolve_baseline(baseline, runs, ie)
    check_effects(runs, ie)
    S = len(ie.labels)
    if S < 2:
        raise UserError("validation compares snapshots, but there is only 1: give more snapshots")
    if max_features < 3:
        raise UserError(f"max_features={max_features} must be at least 3 for a correlation")
    if decodability is not None and decodability.shape != ie.effects.shape:
        raise UserError(
            f"decodability has shape {tuple(decodability.shape)}, not (features, snapshots) = "
            f"{tuple(ie.effects.shape)}: measure it for this crosscoder"
        )
    counts = significant(ie)
    candidates = counts.any(-1).nonzero().flatten()
    if not len(candidates):
        raise UserError(f"no feature has a significant effect on {ie.task!r}: give more prompts, or another task")
    order = ie.effects[candidates].abs().amax(-1).argsort(descending=True, stable=True)
    features = candidates[order[:max_features]].sort().values
    by_snapshot = runs.each_snapshot(lambda s: exact_effects(runs, s, features, baseline), desc="Validating")
    exact = torch.stack(by_snapshot, -1)
    norms = runs.crosscoder.decoder_norms.detach().cpu().double()
    columns = {
        "exact": exact,
        "ie": ie.effects[features],
        "relie": relie(ie)[features],
        "share_relie": share_relie(ie)[features],
        "reldec": (norms / norms.sum(-1, keepdim=True))[features],
    }
    # shares within a feature are in the order of the sizes that they are shares of
    sizes = ie.effects.abs() * counts
    measures = {
        "relie": sizes[features],
        "share_relie": (sizes / sizes.sum(0))[features].nan_to_num(0.0),
        "reldec": norms[features],
        "snapshot": torch.arange(S).expand(len(features), S),
    }
    if decodability is not None:
        columns["decodability"] = decodability[features]
        measures["decodability"] = decodability[features].clamp_min(0)
    targets = {"effect": exact.abs(), "share": (exact.abs() / exact.abs().sum(0)).nan_to_num(0.0)}
    table = pd.DataFrame(
        {
            "feature": features.repeat_interleave(S).numpy(),
            "snapshot": np.tile(np.arange(S), len(features)),
            "label": list(ie.labels) * len(features),
            "step": pd.array(list(ie.steps) * len(features), dtype="Int64"),
            **{name: values.double().flatten().numpy() for name, values in columns.items()},
            "baseline": baseline,
        }
    )
    rows: list[dict[str, Any]] = []
    for kind, correlate in (("within", within_correlation), ("pairs", pair_correlation)):
        for target, y in targets.items():
            for measure, x in measures.items():
                estimate, low, high = _interval(correlate, x.double().numpy(), y.double().numpy(), seed, level)
                found: dict[str, Any] = {"kind": kind, "target": target, "measure": measure, "correlation": estimate}
                found |= {"correlation_low": low, "correlation_high": high}
                beyond = (np.nan, np.nan, np.nan)
                if kind == "within" and measure != "snapshot":
                    beyond = _interval(partial_correlation, x.double().numpy(), y.double().numpy(), seed, level)
                rows.append(found | dict(zip(("partial", "partial_low", "partial_high"), beyond, strict=True)))
    summary = pd.DataFrame(rows).assign(level=level, n_features=len(features), baseline=baseline)
    return Validation(table, summary)


def within_correlation(x: Float[np.ndarray, "*R n S"], y: Float[np.ndarray, "*R n S"]) -> Float[np.ndarray, "*R"]:
    """Spearman correlation over snapshots, mean over the features for which it is defined."""
    return _mean(rank_correlation(x, y))


def partial_correlation(x: Float[np.ndarray, "*R n S"], y: Float[np.ndarray, "*R n S"]) -> Float[np.ndarray, "*R"]:
    """`within_correlation` beyond the snapshot's index; without features whose ranks are all explained by it."""
    index = np.broadcast_to(np.arange(x.shape[-1]), x.shape)
    xy, xz, yz = rank_correlation(x, y), rank_correlation(x, index), rank_correlation(y, index)
    left = np.sqrt(np.clip(1 - xz**2, 0, 1) * np.clip(1 - yz**2, 0, 1))
    known = left > 1e-6  # else both parts are rounding
    return _mean(np.where(known, (xy - xz * yz) / np.where(known, left, 1), np.nan))


def pair_correlation(x: Float[np.ndarray, "*R n S"], y: Float[np.ndarray, "*R n S"]) -> Float[np.ndarray, "*R"]:
    """Spearman correlation over features of x_b / (x_a + x_b), mean over consecutive snapshots; 1/2 if both are 0."""
    found = [rank_correlation(_growth(x, a, b), _growth(y, a, b)) for a, b in pairwise(range(x.shape[-1]))]
    return _mean(np.stack(found, -1))


def _growth(x: Float[np.ndarray, "*R n S"], a: int, b: int) -> Float[np.ndarray, "*R n"]:
    total = x[..., a] + x[..., b]
    return np.where(total > 0, x[..., b] / np.where(total > 0, total, 1), 0.5)


def _mean(values: Float[np.ndarray, "*R n"]) -> Float[np.ndarray, "*R"]:
    """Mean of the values that are defined; NaN if none is."""
    defined = ~np.isnan(values)
    count = defined.sum(-1)
    return np.where(count > 0, np.where(defined, values, 0).sum(-1) / np.maximum(count, 1), np.nan)


def _interval(
    correlate: Correlation, x: Float[np.ndarray, "n S"], y: Float[np.ndarray, "n S"], seed: int, level: float
) -> tuple[float, float, float]:
    """A correlation over the features for which `x` is known, with its bootstrap interval."""
    known = ~np.isnan(x).any(-1)
    x, y = x[known], y[known]
    if len(x) < 3:
        return np.nan, np.nan, np.nan
    ends = bootstrap(lambda picks: correlate(x[picks], y[picks]), len(x), draws=REPLICATES, level=level, seed=seed)
    return (float(correlate(x, y)), *ends)
