"""Feature sets to ablate: the top ones by effect, and as many others to compare them with.

`random` draws active features. `size_matched` draws, for every feature of the set, one of about the same size from
outside the set; the size is the mean activation times the decoder norm on the prompts that the sets are judged on.

Letters: F features, k of a set, n sets, m features that can be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslens.attribution import Attribution
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError, did_you_mean
from crosslens.intervention import check_snapshot
from crosslens.runs import PromptRuns
from crosslens.snapshots import Snapshots

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
