"""Features that split, merge, or take over from one another.

A crosscoder can tell of a split in two ways, and each has its function:

1. `successions`: feature i dies at about the snapshot at which j is born, the last row of i and the first of j point
   the same way, and both are active on the same tokens. A feature with several successors has split; several with one
   successor have merged.
2. `partings`: two features, each with a life of its own, share their direction up to a snapshot and not from it on: the
   model writes two concepts as one, until it tells them apart. This costs one active feature per token, the former two,
   so it is what a sparse dictionary prefers. The reverse is a merger.

Pairs are found in blocks; no F x F matrix is kept. Both definitions are this project's own. Letters: B tokens, S
snapshots, D d_model, F features.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.lifecycles import (
    Firing,
    classify,
    held_out_features,
    measure_firing,
    relative_norms,
    snapshot_columns,
)

_BLOCK = 2048  # features at a time
_PAIRS = 1 << 26  # tokens times pairs of features at a time


@torch.no_grad()
def successions(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    firing: Firing | None = None,
    presence: float = 0.5,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
    max_gap: int = 1,
    min_cosine: float = 0.7,
    min_overlap: float = 0.5,
) -> pd.DataFrame:
    """Pairs of features of which the second takes over from the first: one direction, the same tokens, life after life.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        firing: what `measure_firing` made of them; measured here when None.
        presence: share of a feature's largest norm from which it counts as present.
        min_run: snapshots in a row from which presence counts as a birth.
        min_firing_rate: features that fire on no larger share of the held-out tokens are dead.
        max_gap: snapshots that may lie between the death of the one and the birth of the other, in either order.
        min_cosine: least cosine of the predecessor's row at its last snapshot with the successor's at its birth.
        min_overlap: how much oftener both are active together than by chance, relative to the most that is possible at
            their firing rates: `(p_ij / min(p_i, p_j) - max(p_i, p_j)) / (1 - max(p_i, p_j))` (Loevinger's H), 1 where
            the rarer of the two is active only where the other is, 0 by chance.

    Returns:
        A row per pair: predecessor, successor, death (of the predecessor), death_step, birth (of the successor),
        birth_step, cosine, overlap, successors (of the predecessor), predecessors (of the successor), and kind: "split"
        with several successors, "merger" with several predecessors, "split and merger", else "succession".

    Raises:
        UserError: one snapshot only, a threshold out of range, activations that are not the crosscoder's.
    """
    if max_gap < 0:
        raise UserError(f"max_gap={max_gap} is not possible: give 0 or more snapshots")
    norms = crosscoder.decoder_norms.detach().cpu()
    classify(norms[:1], presence, min_run=min_run)  # thresholds are refused before anything is read
    if firing is None:
        firing = measure_firing(crosscoder, acts)
    life = classify(norms.masked_fill((firing.rate <= min_firing_rate)[:, None], 0.0), presence, min_run=min_run)
    found = _candidates(crosscoder, life, max_gap, min_cosine)
    overlap = _overlap(crosscoder, acts, found, firing.rate)
    pairs, cosine = found[0][overlap >= min_overlap], found[1][overlap >= min_overlap]
    steps = snapshot_columns(crosscoder)["step"]
    death, birth = (life[name].to_numpy(dtype=float, na_value=-1).astype(int) for name in ("death", "birth"))
    table = pd.DataFrame({"predecessor": pairs[:, 0].numpy(), "successor": pairs[:, 1].numpy()})
    for name, dates, members in (("death", death, "predecessor"), ("birth", birth, "successor")):
        table[name] = dates[table[members]]
        table[f"{name}_step"] = steps.take(table[name]).array
    table["cosine"], table["overlap"] = cosine.numpy(), overlap[overlap >= min_overlap].numpy()
    table["successors"] = table.groupby("predecessor")["successor"].transform("size")
    table["predecessors"] = table.groupby("successor")["predecessor"].transform("size")
    splits, mergers = table["successors"] > 1, table["predecessors"] > 1
    table["kind"] = np.select(
        [splits & mergers, splits, mergers], ["split and merger", "split", "merger"], "succession"
    )
    return table.sort_values(["death", "predecessor", "successor"], ignore_index=True)


@torch.no_grad()
def partings(
    crosscoder: Crosscoder,
    alive: Bool[Tensor, " F"] | None = None,
    *,
    presence: float = 0.5,
    together: float = 0.9,
    apart: float = 0.7,
) -> pd.DataFrame:
    """Pairs of features that share their direction up to a snapshot and not from it on, or the reverse.

    Only snapshots at which both are present count. A pair splits when its cosine is `together` or more at the first of
    them, less than `apart` at the last, and passes the middle of the two once; it merges when that holds backwards.
    Every pair of features is looked at: F * F * S * D multiplications, in blocks.

    Args:
        crosscoder: trained on two snapshots or more.
        alive: features to look at, such as `evolve(...)["alive"]`; all with a decoder when None.
        presence: share of a feature's largest norm from which it counts as present.
        together: least cosine of two rows of one direction.
        apart: cosine below which two rows have directions of their own.

    Returns:
        A row per pair: feature, partner (the larger index), kind ("split" or "merger"), at (first snapshot of the new
        state), at_step, at_tokens, cosine_before and cosine_after (at the first and last snapshot at which both are
        present).

    Raises:
        UserError: one snapshot only, or thresholds that are out of order.
    """
    S = crosscoder.n_snapshots
    if S < 2:
        raise UserError(f"partings need at least 2 snapshots, this crosscoder has {S}: train on more")
    if not -1 <= apart <= together <= 1:
        raise UserError(
            f"apart={apart}, together={together} are no cosines in order: give -1 <= apart <= together <= 1"
        )
    present = relative_norms(crosscoder.decoder_norms) >= presence
    if alive is not None:
        present &= alive[:, None]
    pairs = _neighbours(crosscoder, present, together)
    rows = crosscoder.W_dec_by_snapshot
    both = present[pairs[:, 0]] & present[pairs[:, 1]]
    columns = [
        cosine_similarity(rows[pairs[:, 0].to(rows.device), s].float(), rows[pairs[:, 1].to(rows.device), s].float())
        for s in range(S)
    ]
    cosines = torch.stack(columns, 1).cpu()
    first, last = both.int().argmax(1), S - 1 - both.flip(1).int().argmax(1)
    here = torch.arange(len(pairs))
    before, after = cosines[here, first], cosines[here, last]
    # snapshots at which only one is present take the state of the one before, so that they are no change
    close = cosines >= (together + apart) / 2
    for s in range(1, S):
        close[:, s] = torch.where(both[:, s] | (s <= first), close[:, s], close[:, s - 1])
    inside = torch.arange(1, S) > first[:, None]
    changes = (close[:, 1:] != close[:, :-1]) & inside
    split, merger = (before >= together) & (after < apart), (before < apart) & (after >= together)
    kept = (changes.sum(1) == 1) & (split | merger)
    at = (changes[kept].int().argmax(1) + 1).numpy()
    table = pd.DataFrame({"feature": pairs[kept, 0].numpy(), "partner": pairs[kept, 1].numpy()})
    table["kind"] = np.where(split[kept].numpy(), "split", "merger")
    table["at"] = at
    snapshots = snapshot_columns(crosscoder)
    for unit in ("step", "tokens"):
        table[f"at_{unit}"] = snapshots[unit].take(at).array
    table["cosine_before"], table["cosine_after"] = before[kept].numpy(), after[kept].numpy()
    return table


def _candidates(
    crosscoder: Crosscoder, life: pd.DataFrame, max_gap: int, min_cosine: float
) -> tuple[Int[Tensor, "n 2"], Float[Tensor, " n"]]:
    """(predecessor, successor) whose dates and directions fit, and their cosines."""
    death, birth = (torch.tensor(life[name].to_numpy(dtype=float, na_value=np.nan)) for name in ("death", "birth"))
    rows = crosscoder.W_dec_by_snapshot
    pairs: list[Tensor] = [torch.empty(0, 2, dtype=torch.int64)]
    cosines: list[Tensor] = [torch.empty(0)]
    for d in range(1, crosscoder.n_snapshots):
        dying = (death == d).nonzero().flatten()
        # a birth at the first snapshot is none: the feature was there
        for b in range(max(1, d - max_gap), min(crosscoder.n_snapshots - 1, d + max_gap) + 1):
            born = (birth == b).nonzero().flatten()
            after = normalize(rows[born.to(rows.device), b].float(), dim=-1)
            for part in dying.split(_BLOCK):
                cosine = (normalize(rows[part.to(rows.device), d - 1].float(), dim=-1) @ after.T).cpu()
                fit = ((cosine >= min_cosine) & (part[:, None] != born)).nonzero()
                pairs.append(torch.stack([part[fit[:, 0]], born[fit[:, 1]]], 1))
                cosines.append(cosine[fit[:, 0], fit[:, 1]])
    return torch.cat(pairs), torch.cat(cosines)


def _overlap(
    crosscoder: Crosscoder, acts: Activations, found: tuple[Tensor, Tensor], rate: Float[Tensor, " F"]
) -> Float[Tensor, " n"]:
    """Loevinger's H of pairs of features on the held-out tokens."""
    pairs = found[0]
    joint, n = torch.zeros(len(pairs), dtype=torch.float64), 0
    if not len(pairs):
        return joint
    for _, features in held_out_features(crosscoder, acts):
        active = (features > 0).cpu()
        n += len(active)
        size = max(1, _PAIRS // len(active))
        counts = [(active[:, part[:, 0]] & active[:, part[:, 1]]).sum(0) for part in pairs.split(size)]
        joint += torch.cat(counts)
    low, high = rate[pairs].aminmax(dim=1)
    return (joint / n / low - high) / (1 - high)


def _neighbours(crosscoder: Crosscoder, present: Bool[Tensor, "F S"], min_cosine: float) -> Int[Tensor, "n 2"]:
    """Pairs of features that are present with one direction at some snapshot, the smaller index first."""
    rows = crosscoder.W_dec_by_snapshot
    found: list[Tensor] = [torch.empty(0, 2, dtype=torch.int64)]
    for s in range(crosscoder.n_snapshots):
        ids = present[:, s].nonzero().flatten()
        for start in range(0, len(ids), _BLOCK):
            part, others = ids[start : start + _BLOCK], ids[start:]
            left, right = (normalize(rows[i.to(rows.device), s].float(), dim=-1) for i in (part, others))
            fit = (left @ right.T >= min_cosine).cpu().nonzero()
            fit = fit[fit[:, 1] > fit[:, 0]]
            found.append(torch.stack([part[fit[:, 0]], others[fit[:, 1]]], 1))
    return torch.unique(torch.cat(found), dim=0)
