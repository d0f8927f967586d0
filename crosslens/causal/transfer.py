"""Does what matters at one snapshot matter at another? The features of the largest effect at s, ablated at s'.

Entry (s, s') of the matrix is what ablating, or keeping only, the top k features of snapshot s does to the metric of
snapshot s'. The diagonal judges every snapshot by its own features. Where row s falls short of the diagonal of column
s', the model has come to use other features; where it does not, the old ones serve on. All sets of a column are judged
together, on the clean activations that all snapshots share. The matrix is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from crosslens.causal.ablation import (
    active_features,
    change_shares,
    check_effects,
    check_k,
    judging_runs,
    reference_metrics,
    set_metrics,
    standard_error,
)
from crosslens.causal.attribution import Attribution
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task


def transfer_matrix(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    ie: Attribution,
    k: int = 15,
    *,
    keep: bool = False,
    value: str = "zero",
    error: bool | None = None,
    at: Sequence[int] | None = None,
    device: str = "cpu",
    backend: str = "bridge",
    runs: PromptRuns | None = None,
) -> pd.DataFrame:
    """Ablate, or keep only, the top k features of every snapshot at every snapshot.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: prompts on which the metric is measured; others than those of `ie`.
        ie: effects that choose the features, by signed effect for ablating, by magnitude for keeping.
        k: features of a set.
        keep: keep only the set instead of ablating it.
        value: what edited features become: "zero", "mean", or "patch", the paired prompt's.
        error: keep the error node; None keeps it when ablating and leaves it out when keeping.
        at: snapshots to choose and to judge at; all when None.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".
        runs: clean runs of the task to use again.

    Returns:
        A row per pair of snapshots: chosen, judged (indices), chosen_label, judged_label, chosen_step, judged_step;
        mode, value, error, clean, reconstruction_only, all_edited, n_active as in `ablate`, at the judged snapshot; k,
        k_active (how many of the set are active there), shared (how many are in its own set too); metric and metric_se
        (logits, over prompts); share of the whole change (see `change_shares`).
        `table.pivot(index="chosen", columns="judged", values="share")` is the matrix.

    Raises:
        UserError: an unknown option, effects or runs of something else, no such snapshot, k larger than the active
            features.
    """
    if k < 1:
        raise UserError(f"k={k} must be at least 1")
    where = check_effects(crosscoder, snapshots, ie, at)
    for s in where:
        check_k(k, ie, s)
    error = (not keep) if error is None else error
    runs = judging_runs(crosscoder, snapshots, task, value, device, backend, runs)
    sets = [ie.top(k, s, by="magnitude" if keep else "signed") for s in where]
    rows: list[dict[str, Any]] = []
    for judged, own in zip(tqdm(where, desc=f"Judging {task.name}", unit="snapshot", leave=False), sets, strict=True):
        common = reference_metrics(runs, judged, keep=keep, value=value, error=error)
        active = active_features(runs, judged, value)
        found = set_metrics(runs, judged, sets, keep=keep, value=value, error=error)
        for chosen, ids, metric in zip(where, sets, found, strict=True):
            rows.append(
                {
                    "chosen": chosen,
                    "judged": judged,
                    "chosen_label": snapshots.labels[chosen],
                    "judged_label": snapshots.labels[judged],
                    "chosen_step": snapshots.steps[chosen],
                    "judged_step": snapshots.steps[judged],
                    **common,
                    "k": k,
                    "k_active": int(active[ids].sum()),
                    "shared": int(torch.isin(ids, own).sum()),
                    "metric": float(metric.mean()),
                    "metric_se": standard_error(metric),
                }
            )
    table = pd.DataFrame(rows).sort_values(["chosen", "judged"], ignore_index=True)
    return table.assign(share=change_shares(table))
