"""Do effects of single features add up? Exact joint ablation of pairs against the sum of exact single ablations.

An attribution gives one number per feature, and sums of them are read as the effect of a set. That assumes that the
model is additive in the features, which completeness does not show. For pairs {i, j} among the top features of a
snapshot, with m the metric:

    single_i = m(clean) - m(i edited)     joint_ij = m(clean) - m(i and j edited)     deviation = joint - sum of both

All are exact, with the error node kept, and averaged over prompts before they are compared. Per snapshot:

    interacting    share of the pairs whose |deviation| exceeds half of the smaller |single effect|: 0 if effects add up
    deviation      sum over pairs |joint - sum| / sum over pairs |sum|: 0 if effects add up

A correlation of joint effects and sums says little: it is near 1 as soon as some features have much larger effects than
others. Intervals are percentiles of bootstrap replicates that resample groups of prompts and pairs, with replacement;
pairs that share a feature are treated as independent. Both measures are new here.

Symbols: P prompts, n features, m pairs, R replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from crosslens.causal.ablation import check_effects, check_k, set_metrics
from crosslens.causal.attribution import Attribution, resolve_baseline
from crosslens.causal.relative import check_level
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns, on_runs
from crosslens.stats import interval, resample, resample_counts

REPLICATES = 1000


@dataclass(frozen=True)
class Additivity:
    """Effects of pairs of features ablated together, beside the sum of their single effects.

    Attributes:
        pairs: a row per snapshot and pair, effects in logits: snapshot, label, step, feature_a, feature_b, effect_a,
            effect_b, sum (of both), joint, deviation (joint - sum), interacting, baseline.
        summary: a row per snapshot: snapshot, label, step, baseline, k (features that were paired), n_pairs, n_prompts,
            n_groups; interacting and deviation (no unit), each with its bootstrap interval, _low and _high. The
            deviation is NaN if no feature has an effect.
    """

    pairs: pd.DataFrame
    summary: pd.DataFrame


@on_runs
def pair_additivity(
    runs: PromptRuns,
    ie: Attribution,
    k: int = 30,
    n_pairs: int = 200,
    *,
    baseline: str | None = None,
    at: Sequence[int] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Additivity:
    """Ablate pairs among the top features of each snapshot, and each of them alone.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        ie: effects that rank the features, by magnitude.
        k: features to pair.
        n_pairs: pairs drawn without replacement; all k (k - 1) / 2 if there are fewer.
        baseline: what edited features become: "zero", "mean", or "patch", the paired prompt's; None is
            that of `ie`.
        at: snapshots to work at; all when None.
        level: confidence level of the intervals.
        seed: seed for the pairs and replicates.

    Raises:
        UserError: an unknown option, effects of another crosscoder, no such snapshot, k larger than the active
            features, fewer than three features or pairs, "patch" with runs that are not paired.
    """
    if k < 3 or n_pairs < 3:
        raise UserError(f"k={k} and n_pairs={n_pairs} must be at least 3 for an interval")
    check_level(level)
    baseline = resolve_baseline(baseline, runs, ie)
    where = check_effects(runs, ie, at)
    for s in where:
        check_k(k, ie, s)

    def ablate_at(s: int) -> tuple[pd.DataFrame, dict[str, Any]]:
        rng = np.random.default_rng((seed, s))
        features = ie.top(k, s, by="magnitude")
        every = np.array(list(combinations(range(k), 2)))
        pairs = every[np.sort(rng.permutation(len(every))[:n_pairs])]
        sets = [features[:0], *features[:, None], *features[torch.from_numpy(pairs)]]
        metric = set_metrics(runs, s, sets, baseline=baseline).numpy()
        effects = metric[:1] - metric[1:]
        single, joint = effects[:k].mean(-1), effects[k:].mean(-1)
        place = {"snapshot": s, "label": runs.snapshots.labels[s], "step": runs.snapshots.steps[s]}
        total = single[pairs].sum(-1)
        table = pd.DataFrame(
            {
                **{name: [entry] * len(pairs) for name, entry in place.items()},
                "feature_a": features.numpy()[pairs[:, 0]],
                "feature_b": features.numpy()[pairs[:, 1]],
                "effect_a": single[pairs[:, 0]],
                "effect_b": single[pairs[:, 1]],
                "sum": total,
                "joint": joint,
                "deviation": joint - total,
                "interacting": interacting(single[pairs], joint),
                "baseline": baseline,
            }
        )
        found = {
            "interacting": interacting(single[pairs], joint).mean(keepdims=True),
            "deviation": relative_deviation(total[None], joint[None]),
        }
        row = {**place, "baseline": baseline, "k": k, "n_pairs": len(pairs), "n_prompts": len(runs)}
        row["n_groups"] = runs.n_groups
        for (name, estimate), drawn in zip(
            found.items(), _replicates(effects, pairs, runs.groups.numpy(), rng), strict=True
        ):
            low, high = interval(drawn, level)
            row |= {name: float(estimate[0]), f"{name}_low": low, f"{name}_high": high}
        return table, row

    tables, rows = zip(*runs.each_snapshot(ablate_at, where, desc="Pairs"), strict=True)
    return Additivity(pd.concat(tables, ignore_index=True), pd.DataFrame(rows))


def interacting(single: Float[np.ndarray, "*R m 2"], joint: Float[np.ndarray, "*R m"]) -> Bool[np.ndarray, "*R m"]:
    """Whether the deviation of each pair from the sum exceeds half of its smaller single effect."""
    return np.abs(joint - single.sum(-1)) > 0.5 * np.abs(single).min(-1)


def relative_deviation(total: Float[np.ndarray, "R m"], joint: Float[np.ndarray, "R m"]) -> Float[np.ndarray, " R"]:
    """`sum |joint - total| / sum |total|` of each row; NaN where both sums are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(joint - total).sum(-1) / np.abs(total).sum(-1)


def _replicates(
    effects: Float[np.ndarray, "n_and_m P"],
    pairs: Int[np.ndarray, "m 2"],
    groups: Int[np.ndarray, " P"],
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Share of interacting pairs, and deviation, on groups of prompts and pairs resampled with replacement."""
    m = len(pairs)
    weights = resample_counts(int(groups.max()) + 1, REPLICATES, rng)[:, groups]
    means = weights @ effects.T / weights.sum(1, keepdims=True)
    single, joint = means[:, :-m], means[:, -m:]
    drawn = resample(m, REPLICATES, rng)
    both = np.take_along_axis(single[:, pairs], drawn[..., None], 1)
    joint = np.take_along_axis(joint, drawn, 1)
    return interacting(both, joint).mean(-1), relative_deviation(both.sum(-1), joint)
