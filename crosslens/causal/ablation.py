"""Feature sets to ablate: the top ones by effect, and as many others to compare them with.

`random` draws active features. `size_matched` draws, for every feature of the set, one of about the same size from
outside the set; the size is the mean activation times the decoder norm on the prompts that the sets are judged on.

Letters: F features, k of a set, n sets, m features that can be drawn.

Exact ablation: zero, mean or patch a set of features, or keep only that set, and run the model.

With f_s the clean features of snapshot s, f'_s what they become (zero, their mean over the prompts, or their values on
the paired prompt) and gates frozen from the clean run, editing moves the activation at the hook by a linear amount:

    ablate A    x = a_s  - sum_{i in A} (f_is - f'_is) W_dec[i, s] / c_s        (a_s - e_s if error=False)
    keep A      x = decode(f') + sum_{i in A} (f_is - f'_is) W_dec[i, s] / c_s  (+ e_s if error=True)

Every (set, prompt) in which anything changes is one version of the prompt; versions go through the model above the hook
in full batches, and nothing below it is run again.

`ablate` makes curves over the size of the set, as Ge et al. (arXiv 2509.17196) do, beside random and size-matched sets
(see `feature_sets`). These controls, and `change_shares`, are this project's own.

Letters: B prompts of a batch, P of all, T positions, D d_model, A features active on any prompt, n sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag
from tqdm.auto import tqdm

from crosslens.causal.attribution import BASELINES, BATCH_TOKENS, Attribution, metrics
from crosslens.crosscoders import Crosscoder
from crosslens.crosscoders.kernels.sparse import row_pointers
from crosslens.errors import UserError, did_you_mean
from crosslens.intervention.prompt_runs import BatchAt, Pairs, PromptRuns, check_features
from crosslens.intervention.splice import check_snapshot
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task

CONTROLS = ("random", "size_matched")
NEIGHBOURS = 10  # size-matched features are drawn from so many of the nearest in size


class FeatureSets(NamedTuple):
    """Sets of one kind and one size.

    Attributes:
        kind: "top", or the control.
        k: size that was asked for.
        sets: feature ids.
        size: of the features, summed over a set; mean over the sets.
    """

    kind: str
    k: int
    sets: list[Int[Tensor, " k"]]
    size: float


def draw_sets(
    runs: PromptRuns,
    ie: Attribution,
    snapshot: int,
    ks: Sequence[int],
    *,
    by: str = "signed",
    controls: Sequence[str] = CONTROLS,
    n_draws: int = 20,
    seed: int = 0,
    cut: bool = False,
) -> list[FeatureSets]:
    """For every k the top features of a snapshot, and the draws of each control.

    Args:
        runs: clean runs of the prompts that the sets are judged on.
        ie: effects that rank the features.
        snapshot: index of the snapshot.
        ks: sizes of the sets.
        by: as in `Attribution.top`.
        controls: any of "random" and "size_matched".
        n_draws: sets per control and k; the first of many draws are those of few.
        seed: of the draws.
        cut: sets for which there are too few features have as many as there are.

    Raises:
        UserError: too few active features, unless cut.
    """
    sizes = feature_sizes(runs, snapshot)
    active = runs.active[:, snapshot].nonzero().flatten()
    found: list[FeatureSets] = []
    for k in ks:
        top = ie.top(min(k, int(ie.active[:, snapshot].sum())) if cut else k, snapshot, by=by)
        kinds: dict[str, list[Tensor]] = {"top": [top]}
        for name in controls:
            pool = active if name == "random" else active[~torch.isin(active, top)]
            if len(pool) < len(top) and not cut:
                raise UserError(
                    f"{name} sets of k={k} need as many active features{'' if name == 'random' else ' outside the set'}"
                    f", and {runs.task.name!r} has {len(pool)} at {runs.snapshots.labels[snapshot]}: use a smaller k, "
                    f"leave out {name!r}, or cut=True"
                )
            rng = np.random.default_rng((seed, snapshot, k, CONTROLS.index(name)))
            if name == "random":
                kinds[name] = [pool[torch.from_numpy(rng.permutation(len(pool))[: len(top)])] for _ in range(n_draws)]
            else:
                kinds[name] = list(size_matched(top, pool, sizes, n_draws, rng))
        for name, sets in kinds.items():
            size = float(torch.stack([sizes[ids].sum() for ids in sets]).mean())
            found.append(FeatureSets(name, k, sets, size))
    return found


def size_matched(
    top: Int[Tensor, " k"],
    others: Int[Tensor, " m"],
    sizes: Float[Tensor, " F"],
    n_draws: int,
    rng: np.random.Generator,
) -> Int[Tensor, "n _"]:
    """For every feature of `top`, in random order, one of the `NEIGHBOURS` nearest in log size that are still free.

    Where there are fewer others than features, sets are of all others.
    """
    count = min(len(top), len(others))
    distance = np.abs(np.log(sizes[others].numpy())[None] - np.log(sizes[top].clamp_min(1e-12).numpy())[:, None])
    # the rest of a set takes at most count - 1 of the nearest
    nearest = others.numpy()[distance.argsort(-1)[:, : NEIGHBOURS + count]]
    drawn = np.empty((n_draws, count), dtype=np.int64)
    for chosen in drawn:
        for i, row in enumerate(rng.permutation(nearest)[:count]):
            # a feature stands in a set once
            chosen[i] = rng.choice(row[~np.isin(row, chosen[:i])][:NEIGHBOURS])
    return torch.from_numpy(drawn)


def feature_sizes(runs: PromptRuns, snapshot: int) -> Float[Tensor, " F"]:
    """Mean of `f_is` over the prompts' positions times the decoder norm: how much room a feature takes."""
    return runs.mean_features(snapshot).cpu() * runs.crosscoder.decoder_norms[:, snapshot].detach().cpu()


def check_controls(controls: Sequence[str]) -> None:
    """Refuse a control that there is not."""
    for name in controls:
        if name not in CONTROLS:
            raise UserError(f"control {name!r} is unknown; use any of {CONTROLS}{did_you_mean(name, CONTROLS)}")


def check_k(k: int, ie: Attribution, snapshot: int) -> None:
    """Refuse more features than are active on the prompts that the effects were measured on."""
    active = int(ie.active[:, snapshot].sum())
    if k > active:
        raise UserError(
            f"k={k} is more than the {active} features that are active on {ie.task!r} at {ie.labels[snapshot]}: "
            f"use k up to {active}"
        )


def check_effects(crosscoder: Crosscoder, snapshots: Snapshots, ie: Attribution, at: Sequence[int] | None) -> list[int]:
    """The snapshots to work at, counted from the left.

    Raises:
        UserError: effects of other snapshots or of another number of features, or no such snapshot.
    """
    if ie.labels != snapshots.labels:
        raise UserError(
            f"the effects are of {len(ie.labels)} snapshots ({', '.join(ie.labels)}), {len(snapshots)} are given "
            f"({', '.join(snapshots.labels)}); attribute these first"
        )
    if len(ie.effects) != crosscoder.cfg.d_sae:
        raise UserError(
            f"the effects are of {len(ie.effects)} features, the crosscoder has {crosscoder.cfg.d_sae}; "
            "attribute with this crosscoder first"
        )
    return list(range(len(snapshots))) if at is None else [check_snapshot(crosscoder, s) for s in at]


_ENTRIES = 1 << 22  # (set, pair) entries looked at together


@torch.no_grad()
def set_metrics(
    runs: PromptRuns,
    snapshot: int,
    sets: Sequence[Int[Tensor, " _"]] | Int[Tensor, "n k"],
    *,
    keep: bool = False,
    value: str = "zero",
    error: bool = True,
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "n P"]:
    """Metric of every prompt, in logits, when each feature set is ablated, or is all that is kept, at one snapshot.

    Args:
        runs: clean runs of the task's prompts; the prompts' order is that of `runs.batches`.
        snapshot: index of the snapshot.
        sets: n sets of feature ids; they may be empty, and of different sizes.
        keep: keep only the set instead of ablating it.
        value: what edited features become: "zero", "mean" or "patch".
        error: keep the error node.
        positions: edit at these positions alone, negative ones counted from the end of the prompt; all when None.

    Raises:
        UserError: no such snapshot, feature or position, a feature twice in a set, an unknown value, or "patch"
            without paired prompts.
    """
    s = check_snapshot(runs.crosscoder, snapshot)
    _check_value(value, runs)
    shortest = min(batch.tokens.shape[1] for batch in runs.batches)
    for position in positions or ():
        if not -shortest <= position < shortest:
            raise UserError(
                f"position {position} is not in [{-shortest}, {shortest - 1}]: the shortest prompt of "
                f"{runs.task.name!r} has {shortest} tokens"
            )
    F = runs.crosscoder.cfg.d_sae
    column = torch.full((F,), -1).index_copy_(0, runs.features, torch.arange(len(runs.features)))
    columns: list[Tensor] = []
    for ids in sets:
        places = column[check_features(ids, F)] if len(ids) else column[:0]
        columns.append(places[places >= 0])  # a feature that is active nowhere changes nothing
    mean = runs.mean(s).to(runs.crosscoder.device) if value == "mean" else None
    edit = _Edit(keep, value, error, mean, positions)
    return torch.cat([_batch_metrics(part, columns, edit) for part in runs.at(s)], -1)


class _Edit(NamedTuple):
    keep: bool
    value: str
    error: bool
    mean: Float[Tensor, " A"] | None
    positions: Sequence[int] | None

    def changes(self, part: BatchAt) -> Iterator[Pairs]:
        """`f_is - f'_is` at the positions that are edited."""
        for pairs in part.changes(self.value, self.mean):
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
    # versions in which nothing changes have the metric of the base
    out = metrics(part, base).double().cpu().expand(len(sets), B).clone()
    for pairs in edit.changes(part):
        per_chunk = max(1, _ENTRIES // max(1, len(pairs.tokens)))
        for first in range(0, len(sets), per_chunk):
            chunk = sets[first : first + per_chunk]
            member = torch.zeros(len(chunk), len(part.directions), dtype=torch.bool)
            for row, columns in zip(member, chunk, strict=True):
                row[columns] = True
            for version, moved in _moved(part, pairs, member.to(pairs.tokens.device)):
                rows = version % B
                found = part.metric(base[rows] + moved if edit.keep else base[rows] - moved, rows)
                out[first + (version // B).cpu(), rows.cpu()] = found.double().cpu()
    return out


def _moved(
    part: BatchAt, pairs: Pairs, member: Bool[Tensor, "c A"]
) -> Iterator[tuple[Int[Tensor, " v"], Float[Tensor, "v T D"]]]:
    """How far the pairs of each set move each prompt: versions, numbered set * B + prompt, a passful at a time."""
    B, T = part.keep.shape
    ours = member.any(0)[pairs.features].nonzero().flatten()
    which, place = member[:, pairs.features[ours]].nonzero(as_tuple=True)
    place = ours[place]
    tokens, features, values = pairs.tokens[place], pairs.features[place], pairs.values[place]
    # sorted by set, and by token inside it: the pairs of a version are next to one another
    versions, which = (which * B + tokens // T).unique_consecutive(return_inverse=True)
    per_pass = max(1, BATCH_TOKENS // T)
    for first in range(0, len(versions), per_pass):
        block = versions[first : first + per_pass]
        ends = torch.tensor([first, first + len(block)], device=which.device)
        inside = slice(*torch.searchsorted(which, ends).tolist())
        starts = row_pointers((which[inside] - first) * T + tokens[inside] % T, len(block) * T)[:-1]
        moved = embedding_bag(features[inside], part.directions, starts, mode="sum", per_sample_weights=values[inside])
        yield block, moved.view(len(block), T, -1)


def exact_effects(
    runs: PromptRuns, snapshot: int, features: Int[Tensor, " n"], value: str = "zero"
) -> Float[Tensor, " n"]:
    """What the metric loses, on average, when each feature alone is edited: the exact effect, in logits.

    Args:
        runs: clean runs of the task's prompts.
        snapshot: index of the snapshot.
        features: ids of the features.
        value: what each becomes: "zero", "mean" or "patch"; the baseline of the attribution it is compared with.

    Raises:
        UserError: as `set_metrics`.
    """
    found = set_metrics(runs, snapshot, [features[:0], *features[:, None]], value=value).mean(-1)
    return found[0] - found[1:]


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
    positions: Sequence[int] | None = None,
    controls: Sequence[str] = CONTROLS,
    n_draws: int = 20,
    level: float = 0.95,
    cut: bool = False,
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
        k: sizes of the feature sets.
        keep: keep only the set instead of ablating it.
        value: what edited features become: "zero", "mean", or "patch", the paired prompt's.
        error: keep the error node; None keeps it when ablating and leaves it out when keeping, where it alone can carry
            most of the metric.
        positions: edit at these positions alone, negative ones counted from the end of the prompt; all when None.
        controls: any of "random" and "size_matched".
        n_draws: sets drawn per control, snapshot and k; the first of many draws are those of few.
        level: share of the draws inside the band.
        cut: sets for which there are too few active features have as many as there are, instead of being refused.
        at: snapshots to do it at; all when None.
        seed: of the draws.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".
        runs: clean runs of the task to use again.

    Returns:
        A row per (snapshot, features, k), metrics in logits: snapshot, label, step, mode ("ablate", "keep"), value,
        error; clean (metric of the model), reconstruction_only (nothing edited, no error node), all_edited (every
        feature edited, error node as in the row), n_active (features active on the prompts); features ("top" or the
        control), k, n_features (in the set: k unless cut), size (mean activation times decoder norm, summed over the
        set, mean over draws), metric (mean over prompts and draws), metric_se (standard error over prompts), metric_sd
        (standard deviation over draws), metric_low and metric_high (the band), n_draws.

    Raises:
        UserError: an unknown option, effects or runs of something else, no such snapshot or position, k larger than the
            active features.
    """
    check_controls(controls)
    if not k or min(k) < 1 or n_draws < 1:
        raise UserError(f"k={list(k)} and n_draws={n_draws} must be positive")
    check_level(level)
    where = check_effects(crosscoder, snapshots, ie, at)
    if not cut:
        for s in where:
            check_k(max(k), ie, s)
    error = (not keep) if error is None else error
    runs = judging_runs(crosscoder, snapshots, task, value, device, backend, runs)
    # all sets are drawn before any is judged: what cannot be drawn is told at once
    by = "magnitude" if keep else "signed"
    drawn = [draw_sets(runs, ie, s, k, by=by, controls=controls, n_draws=n_draws, seed=seed, cut=cut) for s in where]
    rows: list[dict[str, Any]] = []
    progress = tqdm(where, desc=f"{'Keeping' if keep else 'Ablating'} {task.name}", unit="snapshot", leave=False)
    for s, kinds in zip(progress, drawn, strict=True):
        common = {
            "snapshot": s,
            "label": snapshots.labels[s],
            "step": snapshots.steps[s],
            **reference_metrics(runs, s, keep=keep, value=value, error=error, positions=positions),
        }
        sets = [ids for kind in kinds for ids in kind.sets]
        found = set_metrics(runs, s, sets, keep=keep, value=value, error=error, positions=positions)
        for kind, per_set in zip(kinds, found.split([len(kind.sets) for kind in kinds]), strict=True):
            over_draws = per_set.mean(-1)
            many = len(over_draws) > 1
            low, high = np.quantile(over_draws, [(1 - level) / 2, (1 + level) / 2]) if many else (math.nan, math.nan)
            rows.append(
                {
                    **common,
                    "features": kind.kind,
                    "k": kind.k,
                    "n_features": len(kind.sets[0]),
                    "size": kind.size,
                    "metric": float(over_draws.mean()),
                    "metric_se": standard_error(per_set.mean(0)),
                    "metric_sd": float(over_draws.std(correction=1)) if many else math.nan,
                    "metric_low": float(low),
                    "metric_high": float(high),
                    "n_draws": len(over_draws),
                }
            )
    return pd.DataFrame(rows)


def reference_metrics(
    runs: PromptRuns, snapshot: int, *, keep: bool, value: str, error: bool, positions: Sequence[int] | None = None
) -> dict[str, Any]:
    """What all rows of a snapshot share: how it was edited, and the metrics that others are measured against."""
    nothing = runs.features[:0]
    edited = set_metrics(runs, snapshot, [runs.features], value=value, error=error, positions=positions)
    return {
        "mode": "keep" if keep else "ablate",
        "value": value,
        "error": error,
        "clean": float(set_metrics(runs, snapshot, [nothing]).mean()),
        "reconstruction_only": float(set_metrics(runs, snapshot, [nothing], error=False).mean()),
        "all_edited": float(edited.mean()),
        "n_active": int(active_features(runs, snapshot, value).sum()),
    }


def change_shares(table: pd.DataFrame, floor: float = 0.05) -> Float[np.ndarray, " rows"]:
    """Share of the metric's whole change that each row of an ablation table accounts for.

    The whole change is between nothing edited (clean, or the reconstruction alone where the error node is left out) and
    every feature edited. Ablating: the share of it that is removed; keeping: the share that is left. 0 is no feature, 1
    all of them; beyond 1 a set does more than all, for others oppose it.

    Args:
        table: from `ablate` or `transfer_matrix`.
        floor: NaN where the whole change is below this part of its largest size in the table: it would divide by noise.
    """
    unedited = np.where(table["error"], table["clean"], table["reconstruction_only"])
    whole = unedited - table["all_edited"].to_numpy()
    whole = np.where(np.abs(whole) >= floor * np.abs(whole).max(), whole, np.nan)
    left = (table["metric"].to_numpy() - table["all_edited"].to_numpy()) / whole
    return np.where(table["mode"] == "keep", left, 1 - left)


def active_features(runs: PromptRuns, snapshot: int, value: str) -> Bool[Tensor, " F"]:
    """Features that an edit can change: active on any prompt, or for "patch" on any paired prompt."""
    active = runs.active[:, snapshot]
    return active | runs.active_paired[:, snapshot] if value == "patch" else active


def standard_error(values: Float[Tensor, " P"]) -> float:
    """Of the mean over prompts; NaN of a single one."""
    return float(values.std(correction=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def judging_runs(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    value: str,
    device: str,
    backend: str,
    runs: PromptRuns | None,
) -> PromptRuns:
    """The given runs, or new ones, of the prompts that features are judged on.

    Raises:
        UserError: an unknown value, runs of something else, or without the paired prompts that "patch" needs.
    """
    _check_value(value, runs)
    if runs is None:
        return PromptRuns(crosscoder, snapshots, task, device=device, backend=backend, paired=value == "patch")
    if not runs.are_of(crosscoder, snapshots, task):
        raise UserError(f"the given runs are not of this crosscoder, these snapshots and {task.name!r}: leave them out")
    return runs


def check_level(level: float) -> None:
    """Refuse a share of the draws that is none."""
    if not 0 < level < 1:
        raise UserError(f"level={level} must be between 0 and 1; 0.95 is usual")


def _check_value(value: str, runs: PromptRuns | None) -> None:
    if value not in BASELINES:
        raise UserError(f"value={value!r} is unknown; use one of {BASELINES}{did_you_mean(value, BASELINES)}")
    if value == "patch" and runs is not None and not runs.paired:
        raise UserError("the given runs lack the paired prompts of value='patch': make PromptRuns(..., paired=True)")
