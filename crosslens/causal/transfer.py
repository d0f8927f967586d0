"""Transfer between snapshots: the top features of snapshot s, ablated at snapshot s'.

Entry (s, s') of the matrix is the effect on the metric of snapshot s' of ablating, or keeping only, the top k features
of snapshot s. On the diagonal each snapshot has its own features. If row s falls short of the diagonal in column s',
the model at s' uses other features than at s; otherwise it still relies on the features of s. The matrix is new here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from crosslens.causal.ablation import (
    active_features,
    check_effects,
    check_k,
    faithfulness,
    reference_metrics,
    set_metrics,
    standard_error,
)
from crosslens.causal.attribution import Attribution, resolve_baseline
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns, on_runs


@on_runs
def transfer_matrix(
    runs: PromptRuns,
    ie: Attribution,
    k: int = 15,
    *,
    keep: bool = False,
    baseline: str | None = None,
    error: bool | None = None,
    at: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Ablate, or keep only, the top k features of every snapshot at every snapshot.

    Args:
        runs: clean runs of a task, of other prompts than `ie`; or crosscoder, snapshots and task in its place.
        ie: effects that rank the features, by signed effect for ablating, by magnitude for keeping.
        k: features of a set.
        keep: keep only the set instead of ablating it.
        baseline: what edited features become: "zero", "mean", or "patch", the paired prompt's; None is
            that of `ie`.
        error: keep the error node; None keeps it when ablating and leaves it out when keeping.
        at: snapshots to select and to ablate at; all when None.

    Returns:
        A row per pair of snapshots: selected_at, ablated_at (indices), selected_at_label, ablated_at_label,
        selected_at_step, ablated_at_step; mode, baseline, error, clean, reconstruction_only, all_edited, n_active,
        n_prompts, n_groups as in `ablate`, at the snapshot of the ablation; k, k_active (how many of the set are active
        there), shared (how many are in that snapshot's own set too); metric and metric_se (logits, over groups of
        prompts); share of the whole change (see `faithfulness`).
        `table.pivot(index="selected_at", columns="ablated_at", values="share")` is the matrix.

    Raises:
        UserError: an unknown option, effects of another crosscoder, no such snapshot, k larger than the active
            features, "patch" with runs that are not paired.
    """
    if k < 1:
        raise UserError(f"k={k} must be at least 1")
    baseline = resolve_baseline(baseline, runs, ie)
    where = check_effects(runs, ie, at)
    for s in where:
        check_k(k, ie, s)
    error = (not keep) if error is None else error
    snapshots = runs.snapshots
    sets = [ie.top(k, s, by="magnitude" if keep else "signed") for s in where]

    def ablate_at(s: int) -> list[dict[str, Any]]:
        own, rows = sets[where.index(s)], list[dict[str, Any]]()
        common = reference_metrics(runs, s, keep=keep, baseline=baseline, error=error)
        active = active_features(runs, s, baseline)
        found = set_metrics(runs, s, sets, keep=keep, baseline=baseline, error=error)
        for selected, ids, metric in zip(where, sets, found, strict=True):
            rows.append(
                {
                    "selected_at": selected,
                    "ablated_at": s,
                    "selected_at_label": snapshots.labels[selected],
                    "ablated_at_label": snapshots.labels[s],
                    "selected_at_step": snapshots.steps[selected],
                    "ablated_at_step": snapshots.steps[s],
                    **common,
                    "k": k,
                    "k_active": int(active[ids].sum()),
                    "shared": int(torch.isin(ids, own).sum()),
                    "metric": float(metric.mean()),
                    "metric_se": standard_error(metric, runs.groups),
                }
            )
        return rows

    rows = runs.each_snapshot(ablate_at, where, desc="Transfer")
    table = pd.DataFrame([row for of_snapshot in rows for row in of_snapshot]).sort_values(
        ["selected_at", "ablated_at"], ignore_index=True
    )
    return table.assign(share=faithfulness(table))
