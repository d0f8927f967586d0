"""Represented is not read out: put what a late feature says into every earlier snapshot, and see whether it matters.

A feature can be readable from the activations of a snapshot before the model makes anything of it. For a task with
paired prompts, a feature i, its values f_i on the prompt and f'_i on the paired one (those of the last snapshot L, at
all kept positions), and each snapshot s, the activation at the hook moves by

    (f'_i - f_i) v_is / c_s

and the *effect* is the drop of the metric, logit(correct) - logit(wrong). v_is has the norm of the feature's decoder
row at L, and is

1. *own*: in the direction of its row at s. At s = L this exchanges the feature exactly;
2. *mapped*: its row at L through the rotation that takes the activations of L closest to those of s (orthogonal
   Procrustes over the kept positions of all prompts, centred; directions that they do not span stay as they are);
3. *random*: in a random direction, the control; the root of the mean square over several draws.

Each is given as a share of the effect at L. A feature is *read out* at s where its share by own or by mapped direction
is at least a tenth, above the random one, with a 95 % interval over groups of prompts above 0: the snapshot acts on it
once it is there, whether it is there by itself or not. When it is there by itself is another question
(`evolution.concepts`); the two together make a 2 x 2 per feature and snapshot.

`read_by_last` asks the reverse: do the last snapshot's upper layers find the answer in the activations of an earlier
one? These are mapped by least squares, fitted on one half of the groups of prompts and used on the other.

New here. Symbols: N prompts, S snapshots, D d_model, m features with all of them together as the last, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from crosslens.causal.ablation import standard_error
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.lifecycles import require_two_snapshots
from crosslens.intervention.prompt_runs import Pairs, PromptRuns, check_features, on_runs
from crosslens.stats import interval, resample_counts

READ_OUT = 0.1
"""Least share of the late effect that counts as read out: of rules that a model has not learnt, up to .05 is."""
_DRAWS = 500
_STAY = 1e-3  # weight of leaving a direction as it is, where the prompts hardly say how to turn it


@on_runs
@torch.no_grad()
def read_out(
    runs: PromptRuns, features: Sequence[int] | Int[Tensor, " n"], *, n_random: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Put late values of features into every snapshot, one by one and all together.

    Args:
        runs: clean runs of a task with its paired prompts; or crosscoder, snapshots and task in its place.
        features: ids, such as those with the largest effects at the last snapshot.
        n_random: draws of random directions.
        seed: seed for them.

    Returns:
        A row per feature (missing for all together) and snapshot: feature, snapshot, label, step; effect (own
        direction, logits), effect_se; share, share_low, share_high (of the effect at the last snapshot); mapped_share,
        mapped_share_low, mapped_share_high; random_share; read_out; n_prompts, n_groups. Shares are missing, and
        nothing is read out, where the effect at the last snapshot is within two standard errors of 0.

    Raises:
        UserError: a single snapshot, unknown or repeated features, prompts without pairs, no draws.
    """
    crosscoder = runs.crosscoder
    ids, S = check_features(features, crosscoder.cfg.d_sae), crosscoder.n_snapshots
    require_two_snapshots("reading out", S)
    if not runs.paired:
        raise UserError(
            f"task {runs.task.name!r} has no paired prompts (patch_prefix), and a feature is exchanged with its value "
            "on the paired prompt: give a task whose items have one"
        )
    if n_random < 1:
        raise UserError(f"n_random={n_random} must be 1 or more")
    generator = torch.Generator().manual_seed(seed)
    random = normalize(torch.randn(n_random, len(ids), crosscoder.d_model, generator=generator), dim=-1)
    changes = _late_changes(runs, ids)
    rows = crosscoder.W_dec_by_snapshot[ids.to(crosscoder.device)].float()  # (n, S, D)
    norms = rows[:, -1].norm(dim=-1, keepdim=True)

    def effects_at(s: int) -> tuple[Any, ...]:
        turned = rows[:, -1] @ _rotation(runs, s).to(rows)
        directions = torch.stack([normalize(rows[:, s], dim=-1), normalize(turned, dim=-1), *random.to(rows)])
        effects = _effects(runs, s, changes, norms * directions / crosscoder.activation_scale[s])
        return *effects[:2], np.sqrt((effects[2:].mean(-1) ** 2).mean(0))

    found = runs.each_snapshot(effects_at, desc="Reading out")
    return _table(runs, ids, *(np.stack(parts, 1) for parts in zip(*found, strict=True)))


@on_runs
@torch.no_grad()
def read_by_last(runs: PromptRuns, *, ridge: float = 1e-2) -> pd.DataFrame:
    """Give the last snapshot's upper layers the mapped activations of every snapshot.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        ridge: penalty of the map, in units of the mean variance of a coordinate.

    Returns:
        A row per snapshot: snapshot, label, step, metric (mean over prompts, logits), metric_se, share (of the metric
        with the activations of the last snapshot, mapped likewise), accuracy (share of prompts with a positive metric),
        n_prompts, n_groups.

    Raises:
        UserError: a single snapshot, or prompts of a single group.
    """
    S = runs.crosscoder.n_snapshots
    require_two_snapshots("reading activations of an earlier snapshot", S)
    if runs.n_groups < 2:
        raise UserError(
            f"the prompts of task {runs.task.name!r} are of one group, and the map is fitted on some groups and used "
            "on others: add prompts with other words"
        )
    late = list(runs.at(S - 1))
    even = (runs.groups % 2 == 0).split([len(batch) for batch in late])
    targets = [batch.clean.cpu() for batch in late]
    dates = snapshot_columns(runs.crosscoder)

    def read_at(s: int) -> dict[str, Any]:
        acts = runs.clean_acts(s)
        puts = [batch.clean.cpu().double() for batch in late]
        for half in (False, True):
            fitted = [batch.keep.cpu() & (part != half)[:, None] for batch, part in zip(late, even, strict=True)]
            x, y = (torch.cat([a[k] for a, k in zip(each, fitted, strict=True)]).double() for each in (acts, targets))
            change = _least_squares(x - x.mean(0), y - y.mean(0), ridge)
            for batch, part, a, put in zip(late, even, acts, puts, strict=True):
                used = batch.keep.cpu() & (part == half)[:, None]
                put[used] = (a[used].double() - x.mean(0)) @ change + y.mean(0)
        metrics = [batch.metric(put.to(batch.clean)).cpu() for batch, put in zip(late, puts, strict=True)]
        metric = torch.cat(metrics)
        return {
            "snapshot": s, "label": dates["label"][s], "step": dates["step"][s], "metric": float(metric.mean()),
            "metric_se": standard_error(metric, runs.groups), "accuracy": float((metric > 0).double().mean()),
            "n_prompts": len(runs), "n_groups": runs.n_groups,
        }  # fmt: skip

    table = pd.DataFrame(runs.each_snapshot(read_at, desc="Reading by the last snapshot"))
    table.insert(list(table).index("accuracy"), "share", table["metric"] / table["metric"].iloc[-1])
    return table


def _late_changes(runs: PromptRuns, ids: Int[Tensor, " n"]) -> list[Pairs]:
    """f' - f of the features at the last snapshot, a batch each; features are places in `ids`."""
    place = torch.full((runs.crosscoder.cfg.d_sae,), -1)
    place[ids] = torch.arange(len(ids))
    found: list[Pairs] = []
    for batch in runs.at(runs.crosscoder.n_snapshots - 1):
        (pairs,) = batch.changes("patch")
        columns = place[runs.features].to(pairs.features.device)[pairs.features]
        kept = columns >= 0
        found.append(Pairs(pairs.tokens[kept], columns[kept], -pairs.values[kept]))
    return found


def _rotation(runs: PromptRuns, snapshot: int) -> Float64[Tensor, "D D"]:
    """Q of the orthogonal Procrustes problem, `x_L Q ~ x_s` over the kept positions."""
    last = runs.crosscoder.n_snapshots - 1
    late, here = (_centred(runs, s) for s in (last, snapshot))
    shared = late.T @ here
    eye = torch.eye(len(shared), dtype=shared.dtype)
    u, _, v = torch.linalg.svd(shared + _STAY * torch.linalg.matrix_norm(shared, 2) * eye)
    return u @ v


def _centred(runs: PromptRuns, snapshot: int) -> Float64[Tensor, "n D"]:
    kept = [runs.keep(batch.tokens) for batch in runs.batches]
    x = torch.cat([acts[keep] for acts, keep in zip(runs.clean_acts(snapshot), kept, strict=True)]).double()
    return x - x.mean(0)


def _effects(
    runs: PromptRuns, snapshot: int, changes: Sequence[Pairs], directions: Float[Tensor, "R n D"]
) -> Float64[np.ndarray, "R m N"]:
    """Drop of the metric of every prompt, for each draw of directions: by single features, then all together."""
    found: list[Tensor] = []
    for batch, pairs in zip(runs.at(snapshot), changes, strict=True):
        (B, T), clean = batch.keep.shape, batch.metric(batch.clean)
        # a feature that does not change on a prompt has no effect there, and takes no run
        edits, place = (pairs.features * B + pairs.tokens // T).unique(return_inverse=True)
        effects = clean.new_zeros(len(directions), directions.shape[1] + 1, B)
        for vectors, effect in zip(directions, effects, strict=True):
            changed = pairs.values[:, None] * vectors[pairs.features]
            for first, edit in zip(range(0, len(edits), B), edits.split(B), strict=False):
                feature, prompt = edit // B, edit % B
                inside = (place >= first) & (place < first + B)
                x = batch.clean[prompt]
                x[place[inside] - first, pairs.tokens[inside] % T] += changed[inside]
                effect[feature, prompt] = clean[prompt] - batch.metric(x, prompt)
            together = batch.clean.flatten(0, 1).index_add(0, pairs.tokens, changed).view_as(batch.clean)
            effect[-1] = clean - batch.metric(together)
        found.append(effects.cpu())
    return torch.cat(found, -1).double().numpy()


def _least_squares(x: Float64[Tensor, "n D"], y: Float64[Tensor, "n D"], ridge: float) -> Float64[Tensor, "D D"]:
    """The matrix M of ridge regression, `y ~ x M`."""
    xx = x.T @ x
    penalty = ridge * xx.trace() / len(xx) + torch.finfo(torch.float32).tiny
    return torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype), x.T @ y)


def _table(
    runs: PromptRuns,
    ids: Int[Tensor, " n"],
    own: Float64[np.ndarray, "m S N"],
    mapped: Float64[np.ndarray, "m S N"],
    random: Float64[np.ndarray, "m S"],
) -> pd.DataFrame:
    m, S, _ = own.shape
    members = np.eye(runs.n_groups)[runs.groups.numpy()]  # (N, G)
    counts = resample_counts(runs.n_groups, _DRAWS, 0).T  # (G, draws)
    errors = np.array([[standard_error(torch.from_numpy(own[i, s]), runs.groups) for s in range(S)] for i in range(m)])
    mean = own.mean(-1)
    known = np.abs(mean[:, -1:]) > 2 * errors[:, -1:]
    late = np.where(known, mean[:, -1:], np.nan)  # (m, 1)
    drawn_late = np.where(known, own[:, -1] @ members @ counts, np.nan)[:, None]  # (m, 1, draws)
    columns: dict[str, Any] = {}
    for name, values in (("share", own), ("mapped_share", mapped)):
        low, high = interval(np.moveaxis(values @ members @ counts / drawn_late, -1, 0))
        columns |= {name: values.mean(-1) / late, f"{name}_low": low, f"{name}_high": high}
    columns["random_share"] = random / np.abs(late)
    columns["read_out"] = _is_read(columns, "share") | _is_read(columns, "mapped_share")
    dates = snapshot_columns(runs.crosscoder)
    table = pd.DataFrame({"feature": pd.array([i for i in [*ids.tolist(), None] for _ in range(S)], dtype="Int64")})
    table["snapshot"] = np.tile(np.arange(S), m)
    for unit in ("label", "step"):
        table[unit] = dates[unit].take(table["snapshot"]).array
    columns = {"effect": mean, "effect_se": errors, **columns}
    table = table.assign(**{name: values.ravel() for name, values in columns.items()})
    return table.assign(n_prompts=len(runs), n_groups=runs.n_groups)


def _is_read(columns: dict[str, Any], name: str) -> Bool[np.ndarray, "m S"]:
    with np.errstate(invalid="ignore"):
        return (columns[name] >= np.maximum(READ_OUT, columns["random_share"])) & (columns[f"{name}_low"] > 0)
