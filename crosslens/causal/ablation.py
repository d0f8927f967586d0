"""Exact ablation: set features to a baseline, or keep only some of them, and run the model.

With f_s the clean features of snapshot s, f0_s their baseline (zero, the mean over the prompts, or the values on the
paired prompt) and gates frozen from the clean run, editing moves the activation at the hook by a linear amount:

    ablate A    x = a_s  - sum_{i in A} (f_is - f0_is) W_dec[i, s] / c_s        (a_s - e_s if error=False)
    keep A      x = decode(f0) + sum_{i in A} (f_is - f0_is) W_dec[i, s] / c_s  (+ e_s if error=True)

1. `set_metrics` runs every (set, prompt) in which anything changes as one edited copy of the prompt. The copies go
   through the model above the hook in full batches, and nothing below it is run again.
2. `draw_sets` gives, for every size k, the top features by effect and three controls, all from outside the top set.
   `random` draws active features. `size_matched` draws, for every feature of the top set, one of about the same size,
   where size is the mean activation times the decoder norm on the prompts that the sets are ablated on.
   `change_matched` draws as many active features as change the activation at the hook as much as the top set does,
   ||Delta|| (`set_changes`): features that differ between a prompt and its pair move it more than others of their size.
3. `ablate` does both at every snapshot: curves over k as in Ge et al. (arXiv 2509.17196), alongside the controls.
4. `faithfulness` puts a curve between nothing edited and everything edited.

The controls and `faithfulness` of ablated sets are new here.

Symbols: B prompts of a batch, P of all, T positions, D d_model, F features, A features active on any prompt, k of a
set, n sets, m features that can be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosslens.causal.attribution import (
    BATCH_TOKENS,
    Attribution,
    clustered_error,
    feature_sizes,
    metrics,
    resolve_baseline,
)
from crosslens.causal.relative import check_level
from crosslens.crosscoders.kernels.topk import row_pointers
from crosslens.distributed.together import each, shares
from crosslens.errors import UserError, did_you_mean
from crosslens.intervention.prompt_runs import BatchAt, Pairs, PromptRuns, check_features, on_runs
from crosslens.printing import Result
from crosslens.snapshots.lookup import find_snapshot
from crosslens.stats import interval

CONTROLS = ("random", "size_matched", "change_matched")
NEIGHBOURS = 10  # a size-matched feature is drawn from this many of the nearest in size
GROWTH = 1.15  # of the sizes that are tried for a change-matched set
_ENTRIES = 1 << 22  # (set, pair) entries looked at together


@dataclass(frozen=True)
class Controls:
    """Feature sets that the top features are compared with.

    Attributes:
        kinds: any of "random", "size_matched" and "change_matched".
        n_draws: sets drawn per control, snapshot and k; the first of many draws are those of few.
        level: share of the draws inside the band.
        seed: seed for the draws.
        allow_fewer: with too few active features for k, use as many as there are instead of raising an error.

    Raises:
        UserError: an unknown control, no draws, or a level outside (0, 1).
    """

    kinds: Sequence[str] = CONTROLS
    n_draws: int = 20
    level: float = 0.95
    seed: int = 0
    allow_fewer: bool = False

    def __post_init__(self) -> None:
        for name in self.kinds:
            if name not in CONTROLS:
                raise UserError(f"control {name!r} is unknown; use any of {CONTROLS}{did_you_mean(name, CONTROLS)}")
        if self.n_draws < 1:
            raise UserError(f"n_draws={self.n_draws} must be at least 1")
        check_level(self.level)


@on_runs
def ablate(
    runs: PromptRuns,
    ie: Attribution,
    k: Sequence[int] = (1, 5, 15, 50),
    *,
    keep: bool = False,
    baseline: str | None = None,
    error: bool | None = None,
    controls: Controls | Sequence[str] = Controls(),
    at: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Ablate, or keep only, the top features of each snapshot by effect, beside random and matched ones.

    Use other prompts than `ie` was measured on: features selected and ablated on the same prompts look better than
    they are. Ablation ranks by signed effect. Keeping ranks by magnitude, because features that oppose the answer are
    part of the mechanism.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        ie: effects that rank the features.
        k: sizes of the feature sets; 0, when keeping, keeps none.
        keep: keep only the set instead of ablating it.
        baseline: what edited features become: "zero", "mean", or "patch", the paired prompt's; None is
            that of `ie`.
        error: keep the error node; None keeps it when ablating, and leaves it out when keeping, where it alone can
            carry most of the metric.
        controls: sets to compare with: `Controls`, or the names of some.
        at: snapshots to work at; all when None.

    Returns:
        A row per (snapshot, features, k), metrics in logits: snapshot, label, step, mode ("ablate", "keep"), baseline,
        error; clean (metric of the model), reconstruction_only (nothing edited, no error node), all_edited (every
        feature edited, error node as in the row), n_active (features active on the prompts); features ("top" or the
        control), k, n_features (in the set: k unless fewer are allowed), size (mean activation times decoder norm,
        summed over the set, mean over draws), moved (change of the activation at the hook, see `set_changes`; mean over
        draws), metric (mean over prompts and draws), metric_se (standard error over groups of prompts), change_se (the
        same of metric - clean, taken prompt by prompt), metric_sd (standard deviation over draws), metric_low and
        metric_high (the band), n_draws, n_prompts, n_groups (of prompts).

    Raises:
        UserError: an unknown option, effects of another crosscoder, no such snapshot, k larger than the active
            features, "patch" with runs that are not paired.
    """
    if not isinstance(controls, Controls):
        controls = Controls(controls)
    least = 0 if keep else 1
    if not k or min(k) < least:
        raise UserError(f"k={list(k)} must be one or more numbers, each at least {least}")
    baseline = resolve_baseline(baseline, runs, ie)
    where = check_effects(runs, ie, at)
    if not controls.allow_fewer:
        for s in where:
            check_k(max(k), ie, s)
    error = (not keep) if error is None else error
    by = "magnitude" if keep else "signed"
    # draw all sets before ablating any, so that a set that cannot be drawn is refused at once
    found = runs.each_snapshot(lambda s: draw_sets(runs, ie, s, k, by=by, controls=controls, baseline=baseline), where)
    drawn = dict(zip(where, found, strict=True))

    def ablate_at(s: int) -> list[dict[str, Any]]:
        kinds = drawn[s]
        common = {
            "snapshot": s,
            "label": runs.snapshots.labels[s],
            "step": runs.snapshots.steps[s],
            **reference_metrics(runs, s, keep=keep, baseline=baseline, error=error),
        }
        clean = set_metrics(runs, s, [runs.features[:0]])[0]
        sets = [ids for kind in kinds for ids in kind.sets]
        found = set_metrics(runs, s, sets, keep=keep, baseline=baseline, error=error)
        rows: list[dict[str, Any]] = []
        for kind, per_set in zip(kinds, found.split([len(kind.sets) for kind in kinds]), strict=True):
            over_draws = per_set.mean(-1)
            many = len(over_draws) > 1
            low, high = interval(over_draws, controls.level) if many else (math.nan, math.nan)
            rows.append(
                {
                    **common,
                    "features": kind.kind,
                    "k": kind.k,
                    "n_features": len(kind.sets[0]),
                    "size": kind.size,
                    "moved": kind.moved,
                    "metric": float(over_draws.mean()),
                    "metric_se": standard_error(per_set.mean(0), runs.groups),
                    "change_se": standard_error(per_set.mean(0) - clean, runs.groups),
                    "metric_sd": float(over_draws.std(correction=1)) if many else math.nan,
                    "metric_low": float(low),
                    "metric_high": float(high),
                    "n_draws": len(over_draws),
                }
            )
        return rows

    rows = runs.each_snapshot(ablate_at, where, desc="Keeping" if keep else "Ablating")
    return Result.of(
        pd.DataFrame([row for of_snapshot in rows for row in of_snapshot]),
        f"{runs.task.name}, features {'kept' if keep else 'ablated'}: metric in logits on {len(runs)} prompts in "
        f"{runs.n_groups} groups",
        ["label", "features", "k", "metric", "clean", "change_se"],
        f"edited features are set to their {baseline} value; change_se: standard error of metric - clean, over groups "
        f"of prompts; controls: means over {controls.n_draws} draws",
    )


def faithfulness(table: pd.DataFrame, floor: float = 0.05) -> Float[np.ndarray, " rows"]:
    """Share of the metric's whole change that each row of an ablation table accounts for.

    The whole change is from nothing edited (the clean metric, or the reconstruction's if the error node is left out) to
    every feature edited. Keeping a set: the share that is left, the faithfulness of Marks et al. (arXiv 2403.19647).
    Ablating it: the share that is removed. 0 is no feature, 1 all of them; above 1 the set does more than all features
    together, because others oppose it.

    Args:
        table: from `ablate` or `transfer_matrix`.
        floor: NaN where the whole change is below this part of its largest size in the table, which would divide by
            noise.
    """
    unedited = np.where(table["error"], table["clean"], table["reconstruction_only"])
    whole = unedited - table["all_edited"].to_numpy()
    whole = np.where(np.abs(whole) >= floor * np.abs(whole).max(), whole, np.nan)
    left = (table["metric"].to_numpy() - table["all_edited"].to_numpy()) / whole
    return np.where(table["mode"] == "keep", left, 1 - left)


@on_runs
@torch.no_grad()
def set_metrics(
    runs: PromptRuns,
    snapshot: int,
    sets: Sequence[Int[Tensor, " _"]] | Int[Tensor, "n k"],
    *,
    keep: bool = False,
    baseline: str | None = None,
    error: bool = True,
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "n P"]:
    """Metric of every prompt, in logits, with each feature set ablated, or kept alone, at one snapshot.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place. Prompts are in the order of
            `runs.batches`.
        snapshot: index of the snapshot.
        sets: n sets of feature ids; they may be empty, and of different sizes.
        keep: keep only the set instead of ablating it.
        baseline: what edited features become: "zero", "mean" or "patch"; None is "patch" if prompts are paired.
        error: keep the error node.
        positions: edit only at these positions, negative ones counted from the end of the prompt; all when None.

    Raises:
        UserError: no such snapshot, feature or position, a feature twice in a set, an unknown baseline, or "patch"
            without paired prompts.
    """
    s = find_snapshot(runs.snapshots.labels, snapshot)
    baseline = resolve_baseline(baseline, runs)
    shortest = min(batch.tokens.shape[1] for batch in runs.batches)
    for position in positions or ():
        if not -shortest <= position < shortest:
            raise UserError(
                f"position {position} is not in [{-shortest}, {shortest - 1}]: the shortest prompt of "
                f"{runs.task.name!r} has {shortest} tokens"
            )
    columns = _columns(runs, sets)
    mean = runs.mean(s).to(runs.crosscoder.device) if baseline == "mean" else None
    edit = _Edit(keep, baseline, error, mean, positions)
    parts = each(
        lambda some: torch.cat([_batch_metrics(part, [columns[i] for i in some], edit) for part in runs.at(s)], -1),
        shares(range(len(columns))),
    )
    return torch.cat(parts)


def _columns(runs: PromptRuns, sets: Sequence[Tensor] | Tensor) -> list[Int[Tensor, " _"]]:
    """The columns of `runs.features` of every set; a feature that is active nowhere changes nothing."""
    F = runs.crosscoder.cfg.d_sae
    column = torch.full((F,), -1).index_copy_(0, runs.features, torch.arange(len(runs.features)))
    found = [column[check_features(ids, F)] if len(ids) else column[:0] for ids in sets]
    return [places[places >= 0] for places in found]


class _Edit(NamedTuple):
    keep: bool
    baseline: str
    error: bool
    mean: Float[Tensor, " A"] | None
    positions: Sequence[int] | None

    def changes(self, part: BatchAt) -> Iterator[Pairs]:
        """Pairs of `f_is - f0_is` at the edited positions."""
        for pairs in part.changes(self.baseline, self.mean):
            if self.positions is None:
                yield pairs
                continue
            T = part.keep.shape[1]
            where = torch.zeros(T, dtype=torch.bool, device=pairs.tokens.device)
            where[list(self.positions)] = True
            inside = where[pairs.tokens % T]
            yield Pairs(pairs.tokens[inside], pairs.features[inside], pairs.values[inside])


def _batch_metrics(part: BatchAt, sets: Sequence[Int[Tensor, " _"]], edit: _Edit) -> Float[Tensor, "n B"]:
    """Metric of every prompt of a batch with every set of columns."""
    B, _ = part.keep.shape
    base = part.clean
    if not edit.error:
        base = torch.where(part.keep[..., None], part.bias + part.moved(part.pairs), base)
    if edit.keep:
        base = base - sum(part.moved(pairs) for pairs in edit.changes(part))
    # versions in which nothing changes keep the metric of the base
    out = metrics(part, base).double().cpu().expand(len(sets), B).clone()
    for pairs in edit.changes(part):
        for first, member in _chunks(part, pairs, sets):
            for version, moved in _moved(part, pairs, member):
                rows = version % B
                found = part.metric(base[rows] + moved if edit.keep else base[rows] - moved, rows)
                out[first + (version // B).cpu(), rows.cpu()] = found.double().cpu()
    return out


def _chunks(
    part: BatchAt, pairs: Pairs, sets: Sequence[Int[Tensor, " _"]]
) -> Iterator[tuple[int, Bool[Tensor, "c A"]]]:
    """Some sets at a time: the number of the first, and which columns are in each."""
    per_chunk = max(1, _ENTRIES // max(1, len(pairs.tokens)))
    for first in range(0, len(sets), per_chunk):
        chunk = sets[first : first + per_chunk]
        member = torch.zeros(len(chunk), len(part.directions), dtype=torch.bool)
        for row, columns in zip(member, chunk, strict=True):
            row[columns] = True
        yield first, member.to(pairs.tokens.device)


def _moved(
    part: BatchAt, pairs: Pairs, member: Bool[Tensor, "c A"]
) -> Iterator[tuple[Int[Tensor, " v"], Float[Tensor, "v T D"]]]:
    """Change of the activation by the pairs of each set, one pass at a time; version = set * B + prompt."""
    B, T = part.keep.shape
    ours = member.any(0)[pairs.features].nonzero().flatten()
    which, place = member[:, pairs.features[ours]].nonzero(as_tuple=True)
    place = ours[place]
    tokens, features, values = pairs.tokens[place], pairs.features[place], pairs.values[place]
    # sorted by set, then by token: the pairs of a version are adjacent
    versions, which = (which * B + tokens // T).unique_consecutive(return_inverse=True)
    per_pass = max(1, BATCH_TOKENS // T)
    for first in range(0, len(versions), per_pass):
        block = versions[first : first + per_pass]
        ends = torch.tensor([first, first + len(block)], device=which.device)
        inside = slice(*torch.searchsorted(which, ends).tolist())
        starts = row_pointers((which[inside] - first) * T + tokens[inside] % T, len(block) * T)[:-1]
        moved = embedding_bag(features[inside], part.directions, starts, mode="sum", per_sample_weights=values[inside])
        yield block, moved.view(len(block), T, -1)


class FeatureSets(NamedTuple):
    """Sets of one kind and one size.

    Attributes:
        kind: "top", or the control.
        k: requested number of features.
        sets: feature ids.
        size: mean activation times decoder norm, summed over a set; mean over the sets.
        moved: change of the activation at the hook, see `set_changes`; mean over the sets.
    """

    kind: str
    k: int
    sets: list[Int[Tensor, " k"]]
    size: float
    moved: float


def draw_sets(
    runs: PromptRuns,
    ie: Attribution,
    snapshot: int,
    ks: Sequence[int],
    *,
    by: str = "signed",
    controls: Controls = Controls(),
    baseline: str | None = None,
) -> list[FeatureSets]:
    """For every k, the top features of a snapshot and the draws of each control.

    Args:
        runs: clean runs of the prompts that the sets are ablated on.
        ie: effects that rank the features.
        snapshot: index of the snapshot.
        ks: sizes of the sets; 0 gives the empty set alone, without controls.
        by: as in `Attribution.top`.
        controls: what to draw.
        baseline: what edited features become, as in `ablate`.

    Raises:
        UserError: too few active features, unless fewer are allowed.
    """
    baseline = resolve_baseline(baseline, runs, ie)
    sizes = feature_sizes(runs, snapshot)
    active = runs.active[:, snapshot].nonzero().flatten()
    found: list[FeatureSets] = []
    for k in ks:
        if not k:
            found.append(FeatureSets("top", 0, [active[:0]], 0.0, 0.0))
            continue
        top = ie.top(min(k, int(ie.active[:, snapshot].sum())) if controls.allow_fewer else k, snapshot, by=by)
        kinds: dict[str, list[Tensor]] = {"top": [top]}
        pool = active[~torch.isin(active, top)]
        for name in controls.kinds:
            if len(pool) < len(top) and not controls.allow_fewer:
                raise UserError(
                    f"{name} sets of k={k} need as many active features outside the set, and {runs.task.name!r} has "
                    f"{len(pool)} at {runs.snapshots.labels[snapshot]}: use a smaller k, leave out {name!r}, or "
                    "Controls(allow_fewer=True)"
                )
            rng = np.random.default_rng((controls.seed, snapshot, k, CONTROLS.index(name)))
            if name in ("random", "change_matched"):
                drawn = max(controls.n_draws, NEIGHBOURS)  # so that few draws are the first of many
                orders = [pool[torch.from_numpy(rng.permutation(len(pool)))] for _ in range(drawn)]
                n = len(top) if name == "random" else _matching(runs, snapshot, top, orders[:NEIGHBOURS], baseline)
                kinds[name] = [order[:n] for order in orders[: controls.n_draws]]
            else:
                kinds[name] = list(size_matched(top, pool, sizes, controls.n_draws, rng))
        for name, sets in kinds.items():
            size = float(torch.stack([sizes[ids].sum() for ids in sets]).mean())
            moved = float(set_changes(runs, snapshot, sets, baseline).mean())
            found.append(FeatureSets(name, k, sets, size, moved))
    return found


@torch.no_grad()
def _matching(
    runs: PromptRuns, snapshot: int, top: Int[Tensor, " k"], orders: Sequence[Int[Tensor, " m"]], baseline: str
) -> int:
    """How many features, in these orders, change the activation most nearly as much as the top ones do.

    Sizes are tried in rising order, up to the first that changes it twice as much: no feature at all is nearer. What a
    set changes is that of the one before it in its order, and that of the features that it has more.
    """
    columns = torch.stack(_columns(runs, orders))
    mean = runs.mean(snapshot).to(runs.crosscoder.device) if baseline == "mean" else None
    parts = [(part, pairs) for part in runs.at(snapshot) for pairs in part.changes(baseline, mean)]
    sums = [part.clean.new_zeros(len(orders) * len(part), *part.clean.shape[1:]) for part, _ in parts]
    norms = [part.clean.new_zeros(len(each), dtype=torch.float64) for (part, _), each in zip(parts, sums, strict=True)]
    target = float(set_changes(runs, snapshot, [top], baseline))
    sizes, distances, moved = [0], [target], 0.0
    while moved < 2 * target and sizes[-1] < columns.shape[1]:
        sizes.append(min(columns.shape[1], max(sizes[-1] + 1, round(sizes[-1] * GROWTH))))
        added = columns[:, sizes[-2] : sizes[-1]]
        for (part, pairs), total, norm in zip(parts, sums, norms, strict=True):
            for first, member in _chunks(part, pairs, list(added)):
                for version, change in _moved(part, pairs, member):
                    rows = first * len(part) + version
                    total[rows] += change
                    norm[rows] = total[rows].flatten(1).norm(dim=1).double()
        moved = float(sum(norm.sum() for norm in norms)) / len(orders) / len(runs)
        distances.append(abs(moved - target))
    return sizes[int(np.argmin(distances))]


@on_runs
@torch.no_grad()
def set_changes(
    runs: PromptRuns, snapshot: int, sets: Sequence[Int[Tensor, " _"]], baseline: str | None = None
) -> Float[Tensor, " n"]:
    """How much setting each feature set to the baseline changes the activation at the hook, in raw units.

    The norm of the change, sum_i (f_is - f0_is) W_dec[i, s] / c_s, over all positions of a prompt together; mean over
    prompts. The model does not run.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        snapshot: index of the snapshot.
        sets: n sets of feature ids; they may be empty, and of different sizes.
        baseline: as in `set_metrics`.

    Raises:
        UserError: as in `set_metrics`.
    """
    s = find_snapshot(runs.snapshots.labels, snapshot)
    baseline = resolve_baseline(baseline, runs)
    columns = _columns(runs, sets)
    mean = runs.mean(s).to(runs.crosscoder.device) if baseline == "mean" else None
    total = torch.zeros(len(sets), dtype=torch.float64)
    for part in runs.at(s):
        for pairs in part.changes(baseline, mean):
            for first, chunk in _chunks(part, pairs, columns):
                for version, moved in _moved(part, pairs, chunk):
                    norms = moved.flatten(1).norm(dim=1).double().cpu()
                    total.index_add_(0, first + (version // len(part)).cpu(), norms)
    return total / len(runs)


def size_matched(
    top: Int[Tensor, " k"],
    others: Int[Tensor, " m"],
    sizes: Float[Tensor, " F"],
    n_draws: int,
    rng: np.random.Generator,
) -> Int[Tensor, "n _"]:
    """For every feature of `top`, in random order, draw one of its `NEIGHBOURS` nearest in log size not yet drawn.

    With fewer others than features, a set is all of the others.
    """
    count = min(len(top), len(others))
    logs = np.log(sizes.clamp_min(1e-12).numpy())
    distance = np.abs(logs[others.numpy()][None] - logs[top.numpy()][:, None])
    # the rest of a set can take at most count - 1 of the nearest
    nearest = others.numpy()[distance.argsort(-1)[:, : NEIGHBOURS + count]]
    drawn = np.empty((n_draws, count), dtype=np.int64)
    for row_of_set in drawn:
        for i, row in enumerate(rng.permutation(nearest)[:count]):
            # no feature twice in a set
            row_of_set[i] = rng.choice(row[~np.isin(row, row_of_set[:i])][:NEIGHBOURS])
    return torch.from_numpy(drawn)


def active_features(runs: PromptRuns, snapshot: int, baseline: str) -> Bool[Tensor, " F"]:
    """Features that an edit can change: active on any prompt or, for "patch", on any paired prompt."""
    active = runs.active[:, snapshot]
    return active | runs.active_paired[:, snapshot] if baseline == "patch" else active


def reference_metrics(runs: PromptRuns, snapshot: int, *, keep: bool, baseline: str, error: bool) -> dict[str, Any]:
    """Columns that all rows of a snapshot share: how it was edited, and the metrics to compare with."""
    nothing = runs.features[:0]
    return {
        "mode": "keep" if keep else "ablate",
        "baseline": baseline,
        "error": error,
        "clean": float(set_metrics(runs, snapshot, [nothing]).mean()),
        "reconstruction_only": float(set_metrics(runs, snapshot, [nothing], error=False).mean()),
        "all_edited": float(set_metrics(runs, snapshot, [runs.features], baseline=baseline, error=error).mean()),
        "n_active": int(active_features(runs, snapshot, baseline).sum()),
        "n_prompts": len(runs),
        "n_groups": runs.n_groups,
    }


def standard_error(values: Float[Tensor, " P"], groups: Int[Tensor, " P"]) -> float:
    """Standard error of the mean over prompts, by their groups; NaN with a single group."""
    sizes = groups.bincount().double()
    return float(clustered_error(torch.zeros_like(sizes).index_add_(0, groups, values.double()), sizes))


def check_k(k: int, ie: Attribution, snapshot: int) -> None:
    """Refuse more features than are active on the prompts of the effects.

    Raises:
        UserError: k is too large.
    """
    active = int(ie.active[:, snapshot].sum())
    if k > active:
        raise UserError(
            f"k={k} is more than the {active} features that are active on {ie.task!r} at {ie.labels[snapshot]}: "
            f"use k up to {active}"
        )


def check_effects(runs: PromptRuns, ie: Attribution, at: Sequence[int] | None = None) -> list[int]:
    """Indices of the snapshots to work at, all when `at` is None; counted from the left.

    Raises:
        UserError: effects of other snapshots or of another number of features, or no such snapshot.
    """
    crosscoder, snapshots = runs.crosscoder, runs.snapshots
    if ie.labels != snapshots.labels or len(ie.effects) != crosscoder.cfg.d_sae:
        raise UserError(
            f"the effects cover {len(ie.effects)} features at snapshots {', '.join(ie.labels)}, but the crosscoder has "
            f"{crosscoder.cfg.d_sae} at {', '.join(snapshots.labels)}: attribute with this crosscoder first"
        )
    return list(range(len(snapshots))) if at is None else [find_snapshot(snapshots.labels, s) for s in at]
