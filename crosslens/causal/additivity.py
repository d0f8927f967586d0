"""Do effects of single features add up? Exact joint ablation of pairs against the sum of exact single ablations.

An attribution gives one number per feature, and sums of them are read as the effect of sets. That holds as far as the
model is additive in the features, which no completeness of the attribution shows. For pairs {i, j} among the top
features of a snapshot, with m the metric:

    single_i = m(clean) - m(i edited)     joint_ij = m(clean) - m(i and j edited)     deviation = joint - sum of both

All are exact, with the error node kept, and averaged over prompts before they are compared. Per snapshot:

    correlation    Pearson, of joint effects and sums over the pairs
    deviation      sum over pairs |joint - sum| / sum over pairs |sum|: 0 if effects add up

The intervals are percentiles of bootstrap replicates that draw prompts and pairs anew, both with replacement; pairs
with a feature in common are drawn as if they were independent. Both measures are this project's own.

Letters: P prompts, n features, m pairs, R replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from crosslens.causal.ablation import check_effects, check_k, check_level, judging_runs, set_metrics
from crosslens.causal.attribution import Attribution
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task

REPLICATES = 1000


@dataclass(frozen=True)
class Additivity:
    """Pairs of features ablated together, beside the sum of both alone.

    Attributes:
        pairs: a row per snapshot and pair, effects in logits: snapshot, label, step, feature_a, feature_b, effect_a,
            effect_b, sum (of both), joint, deviation (joint - sum).
        summary: a row per snapshot: snapshot, label, step, value, k (features the pairs are of), n_pairs, n_prompts;
            correlation and deviation (no unit), each with _low and _high, its bootstrap interval. A correlation is NaN
            where all pairs have the same effect, a deviation where no feature has any.
    """

    pairs: pd.DataFrame
    summary: pd.DataFrame


def pair_additivity(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    ie: Attribution,
    k: int = 30,
    n_pairs: int = 200,
    *,
    value: str = "zero",
    at: Sequence[int] | None = None,
    level: float = 0.95,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "bridge",
    runs: PromptRuns | None = None,
) -> Additivity:
    """Ablate pairs among the top features of each snapshot, and each of them alone.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: prompts on which effects are measured.
        ie: effects whose k largest in magnitude are paired.
        k: features to pair.
        n_pairs: pairs drawn without replacement; all k (k - 1) / 2 when there are fewer.
        value: what edited features become: "zero", "mean", or "patch", the paired prompt's.
        at: snapshots to do it at; all when None.
        level: of the intervals.
        seed: of the pairs and replicates.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".
        runs: clean runs of the task to use again.

    Raises:
        UserError: an unknown option, effects or runs of something else, no such snapshot, k larger than the active
            features, fewer than three features or pairs.
    """
    if k < 3 or n_pairs < 3:
        raise UserError(f"k={k} and n_pairs={n_pairs} must be at least 3, or there is nothing to correlate")
    check_level(level)
    where = check_effects(crosscoder, snapshots, ie, at)
    for s in where:
        check_k(k, ie, s)
    runs = judging_runs(crosscoder, snapshots, task, value, device, backend, runs)
    tables: list[pd.DataFrame] = []
    rows: list[dict[str, Any]] = []
    for s in tqdm(where, desc=f"Pairs of {task.name}", unit="snapshot", leave=False):
        rng = np.random.default_rng((seed, s))
        features = ie.top(k, s, by="magnitude")
        every = np.array(list(combinations(range(k), 2)))
        pairs = every[np.sort(rng.permutation(len(every))[:n_pairs])]
        sets = [features[:0], *features[:, None], *features[torch.from_numpy(pairs)]]
        metric = set_metrics(runs, s, sets, value=value).numpy()
        effects = metric[:1] - metric[1:]
        single, joint = effects[:k].mean(-1), effects[k:].mean(-1)
        place = {"snapshot": s, "label": snapshots.labels[s], "step": snapshots.steps[s]}
        total = single[pairs].sum(-1)
        tables.append(
            pd.DataFrame(
                {
                    **{name: [entry] * len(pairs) for name, entry in place.items()},
                    "feature_a": features.numpy()[pairs[:, 0]],
                    "feature_b": features.numpy()[pairs[:, 1]],
                    "effect_a": single[pairs[:, 0]],
                    "effect_b": single[pairs[:, 1]],
                    "sum": total,
                    "joint": joint,
                    "deviation": joint - total,
                }
            )
        )
        found = {
            "correlation": correlation(total[None], joint[None]),
            "deviation": relative_deviation(total[None], joint[None]),
        }
        row = {**place, "value": value, "k": k, "n_pairs": len(pairs), "n_prompts": len(runs)}
        for (name, estimate), drawn in zip(found.items(), _replicates(effects, pairs, rng), strict=True):
            low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
            row |= {name: float(estimate[0]), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return Additivity(pd.concat(tables, ignore_index=True), pd.DataFrame(rows))


def correlation(total: Float[np.ndarray, "R m"], joint: Float[np.ndarray, "R m"]) -> Float[np.ndarray, " R"]:
    """Pearson, of each row; NaN where one is constant."""
    total, joint = (each - each.mean(-1, keepdims=True) for each in (total, joint))
    with np.errstate(invalid="ignore"):
        return (total * joint).sum(-1) / np.sqrt((total**2).sum(-1) * (joint**2).sum(-1))


def relative_deviation(total: Float[np.ndarray, "R m"], joint: Float[np.ndarray, "R m"]) -> Float[np.ndarray, " R"]:
    """`sum |joint - total| / sum |total|`, of each row; NaN where all is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(joint - total).sum(-1) / np.abs(total).sum(-1)


def _replicates(
    effects: Float[np.ndarray, "n_and_m P"], pairs: Int[np.ndarray, "m 2"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Correlation and deviation on prompts and pairs drawn with replacement."""
    P, m = effects.shape[1], len(pairs)
    weights = rng.multinomial(P, np.full(P, 1 / P), size=REPLICATES) / P
    means = weights @ effects.T
    single, joint = means[:, :-m], means[:, -m:]
    drawn = rng.integers(m, size=(REPLICATES, m))
    total = np.take_along_axis(single[:, pairs].sum(-1), drawn, 1)
    joint = np.take_along_axis(joint, drawn, 1)
    return correlation(total, joint), relative_deviation(total, joint)
