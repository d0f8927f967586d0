"""Exact ablation: zero, mean or patch a set of features at all positions, or keep only that set.

With the gates of the clean run frozen, editing the features A of snapshot s moves its activation by a linear amount:

    ablate A    x = a_s  - sum_{i in A} (f_is - f'_is) W_dec[i, s] / c_s        (a_s - e_s if error=False)
    keep A      x = decode(f') + sum_{i in A} (f_is - f'_is) W_dec[i, s] / c_s  (+ e_s if error=True)

f' is zero, the mean over the prompts, or the paired prompt's features. Many sets run as one batch.

Controls: `random` draws as many active features; `size_matched` draws, for every feature of the set, one of about the
same size (mean activation times decoder norm on these prompts) from outside the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.attribution import BASELINES, BATCH_TOKENS, Attribution, spliced_metric
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError, did_you_mean
from crosslens.runs import PromptRuns
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task

CONTROLS = ("random", "size_matched")
NEIGHBOURS = 10  # size-matched features are drawn from so many of the nearest in size


@torch.no_grad()
def set_metrics(
    runs: PromptRuns,
    snapshot: int,
    sets: Int[Tensor, "n k"],
    *,
    keep: bool = False,
    value: str = "zero",
    error: bool = True,
) -> Float[Tensor, "n P"]:
    """Metric of every prompt when each feature set is ablated, or is all that is kept, at one snapshot.

    Args:
        runs: clean runs of the task's prompts.
        snapshot: index of the snapshot.
        sets: n sets of k feature ids each.
        keep: keep only the set instead of ablating it.
        value: what edited features become: "zero", "mean" or "patch".
        error: keep the error node.
    """
    crosscoder = runs.crosscoder
    model = runs.snapshots.model(snapshot, device=runs.device, backend=runs.backend)
    mean = runs.mean_features(snapshot) if value == "mean" else None
    directions = crosscoder.W_dec_by_snapshot[:, snapshot] / crosscoder.activation_scale[snapshot]
    out: list[Tensor] = []
    for batch, run, patch in runs.clean():
        f = run.snapshot_acts(crosscoder, snapshot)
        f0 = runs.baseline(value, snapshot, run, patch, mean)
        clean = run.acts[:, :, snapshot]
        decoded = crosscoder.decode_snapshot(f, snapshot)
        base = crosscoder.decode_snapshot(f0, snapshot) if keep else decoded
        if error:
            base = base + (clean - decoded) if keep else clean
        change = (f - f0) if keep else (f0 - f)
        per_pass = max(1, BATCH_TOKENS // run.tokens.numel())
        rows: list[Tensor] = []
        for chunk in sets.split(per_pass):
            moved = torch.einsum("btnk,nkd->nbtd", change[:, :, chunk], directions[chunk])
            rows.append(spliced_metric(runs, model, batch, run, base + moved))
        out.append(torch.cat(rows).double().cpu())
    return torch.cat(out, -1)


def exact_effects(
    runs: PromptRuns, snapshot: int, features: Int[Tensor, " n"], value: str = "zero"
) -> Float[Tensor, " n"]:
    """What the metric loses, on average, when each feature alone is edited: the exact effect, in logits.

    Args:
        runs: clean runs of the task's prompts.
        snapshot: index of the snapshot.
        features: ids of the features.
        value: what each becomes: "zero", "mean" or "patch"; the baseline of the attribution it is compared with.
    """
    nothing = torch.empty(1, 0, dtype=torch.long)
    clean = set_metrics(runs, snapshot, nothing).mean()
    return clean - set_metrics(runs, snapshot, features[:, None], value=value).mean(-1)


def ablate(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    ie: Attribution,
    k: Sequence[int] = (1, 5, 15, 50),
    *,
    keep: bool = False,
    value: str = "zero",
    error: bool | None = None,
    controls: Sequence[str] = CONTROLS,
    n_draws: int = 20,
    at: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "bridge",
    runs: PromptRuns | None = None,
) -> pd.DataFrame:
    """Ablate, or keep only, the top features of each snapshot by their effect, beside random and size-matched ones.

    Give a `task` with other prompts than `ie` was measured on: features chosen and judged on the same prompts flatter
    themselves. Ablation ranks by signed effect; keeping ranks by magnitude, for the features that oppose the answer
    belong to what is kept.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: prompts on which the metric is measured.
        ie: effects that rank the features.
        k: sizes of the feature sets; sizes beyond the active features are cut to all of them.
        keep: keep only the set instead of ablating it.
        value: what edited features become: "zero", "mean", or "patch", the paired prompt's.
        error: keep the error node; None keeps it when ablating and leaves it out when keeping, where it alone can carry
            most of the metric.
        controls: any of "random" and "size_matched".
        n_draws: sets drawn per control.
        at: snapshots to do it at; all when None.
        seed: of the draws.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".
        runs: clean runs of the task to use again.

    Returns:
        A row per (snapshot, features, k): mean metric over prompts (and draws), its standard deviation over draws, the
        clean metric, and that of the reconstruction alone.
    """
    for name in controls:
        if name not in CONTROLS:
            raise UserError(f"control {name!r} is unknown; use any of {CONTROLS}{did_you_mean(name, CONTROLS)}")
    if value not in BASELINES:
        raise UserError(f"value={value!r} is unknown; use one of {BASELINES}{did_you_mean(value, BASELINES)}")
    if not k or min(k) < 1 or n_draws < 1:
        raise UserError(f"k={list(k)} and n_draws={n_draws} must be positive")
    if len(ie.labels) != len(snapshots):
        raise UserError(
            f"the effects are of {len(ie.labels)} snapshots, {len(snapshots)} are given; attribute these first"
        )
    error = (not keep) if error is None else error
    if runs is None:
        runs = PromptRuns(crosscoder, snapshots, task, device=device, backend=backend, paired=value == "patch")
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    where = range(len(snapshots)) if at is None else at
    for s in tqdm(where, desc=f"{'Keeping' if keep else 'Ablating'} {task.name}", unit="snapshot", leave=False):
        common = {
            "snapshot": s,
            "label": snapshots.labels[s],
            "step": snapshots.steps[s],
            "mode": "keep" if keep else "ablate",
            "value": value,
            "error": error,
            "clean": _mean(runs, s, torch.empty(1, 0, dtype=torch.long)),
            "reconstruction_only": _mean(runs, s, torch.empty(1, 0, dtype=torch.long), error=False),
        }
        size = feature_sizes(runs, s)
        active = (size > 0).nonzero().flatten()
        for wanted in k:
            count = min(wanted, int(ie.active[:, s].sum()))
            top = ie.top(count, s, by="magnitude" if keep else "signed")
            sets = {"top": top[None]}
            if "random" in controls:
                count = min(count, len(active))
                sets["random"] = torch.stack(
                    [active[torch.from_numpy(rng.permutation(len(active))[:count])] for _ in range(n_draws)]
                )
            if "size_matched" in controls:
                sets["size_matched"] = _size_matched(top, size, active, n_draws, rng)
            for name, chosen in sets.items():
                per_set = set_metrics(runs, s, chosen, keep=keep, value=value, error=error).mean(-1)
                rows.append(
                    {
                        **common,
                        "features": name,
                        "k": wanted,
                        "metric": float(per_set.mean()),
                        "metric_sd": float(per_set.std(correction=1)) if len(per_set) > 1 else math.nan,
                        "n_draws": len(per_set),
                    }
                )
    return pd.DataFrame(rows)


def feature_sizes(runs: PromptRuns, snapshot: int) -> Float[Tensor, " F"]:
    """Mean of `f_is` over the prompts' positions times the decoder norm: how much room a feature takes."""
    return runs.mean_features(snapshot).cpu() * runs.crosscoder.decoder_norms[:, snapshot].detach().cpu()


def _size_matched(
    top: Tensor, size: Tensor, active: Tensor, n_draws: int, rng: np.random.Generator
) -> Int[Tensor, "n k"]:
    others = active[~torch.isin(active, top)].numpy()
    count = min(len(top), len(others))
    if not count:
        return top[None]
    distance = np.abs(np.log(size[others].numpy())[None] - np.log(size[top].clamp_min(1e-12).numpy())[:, None])
    nearest = others[distance.argsort(-1)]
    drawn: list[list[int]] = []
    for _ in range(n_draws):
        chosen: list[int] = []
        for row in rng.permutation(nearest)[:count]:
            # a feature stands in a set once: edits of a set add up
            free = row[~np.isin(row, chosen)][:NEIGHBOURS]
            chosen.append(int(rng.choice(free)))
        drawn.append(chosen)
    return torch.tensor(drawn)


def _mean(runs: PromptRuns, snapshot: int, sets: Tensor, error: bool = True) -> float:
    return float(set_metrics(runs, snapshot, sets, error=error).mean())
