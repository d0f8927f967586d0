"""Features that split, merge, or replace one another.

A crosscoder can represent a split in two ways, and each has its own function:

1. `splits`: two features share their direction up to a snapshot and differ from it on. Until then the model writes two
   concepts as one. This takes one active feature per token, so a sparse dictionary prefers it. The reverse is a merger.
2. `replacements`: feature i dies at about the snapshot where j is born, the last row of i and the first row of j have
   the same direction, and both are active on the same tokens. A feature with several successors has split; several
   features with one successor have merged. This takes two active features per token.

Both look for pairs in blocks and never keep an F x F matrix. Both definitions are new here.
Symbols: B tokens, S snapshots, D d_model, F features.
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
from crosslens.evolution.history import evolve
from crosslens.evolution.lifecycles import (
    held_out_features,
    measure_firing,
    relative_norms,
    require_two_snapshots,
    snapshot_columns,
)

_BLOCK = 2048  # features at a time
_PAIRS = 1 << 26  # tokens times pairs of features at a time


@torch.no_grad()
def replacements(
    crosscoder: Crosscoder,
    acts: Activations,
    lifecycles: pd.DataFrame | None = None,
    *,
    max_gap: int = 1,
    min_cosine: float = 0.7,
    min_overlap: float = 0.5,
) -> pd.DataFrame:
    """Find pairs of features where the second replaces the first, with the same direction and on the same tokens.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        lifecycles: of `evolve(crosscoder, acts).lifecycles("norm")`, which is computed here if None: that one row
            takes over from another is a matter of the dictionary.
        max_gap: most snapshots between the death of the first and the birth of the second, in either order.
        min_cosine: least cosine between the predecessor's row at its last snapshot and the successor's at its birth.
        min_overlap: how much more often both are active together than by chance, relative to the most their firing
            rates allow: `(p_ij / min(p_i, p_j) - max(p_i, p_j)) / (1 - max(p_i, p_j))` (Loevinger's H). It is 1 if the
            rarer feature is active only where the other is, and 0 by chance.

    Returns:
        A row per pair: predecessor, successor, death (of the predecessor), death_step, birth (of the successor),
        birth_step, cosine, overlap, successors (of the predecessor), predecessors (of the successor), and kind: "split"
        with several successors, "merger" with several predecessors, "split and merger", otherwise "replacement".

    Raises:
        UserError: one snapshot only, max_gap below 0, lifecycles without firing rates, activations that are not the
            crosscoder's.
    """
    if max_gap < 0:
        raise UserError(f"max_gap={max_gap} must be 0 or more snapshots")
    if lifecycles is None:
        lifecycles = evolve(crosscoder, measure_firing(crosscoder, acts)).lifecycles("norm")
    rate = torch.tensor(lifecycles["firing_rate"].to_numpy(dtype=float))
    if len(rate) != crosscoder.cfg.d_sae or rate.isnan().any():
        raise UserError(
            "lifecycles lack the firing rates of this crosscoder's features: give those of evolve(crosscoder, acts)"
        )
    found = _candidates(crosscoder, lifecycles, max_gap, min_cosine)
    overlap = _overlap(crosscoder, acts, found[0], rate)
    pairs, cosine = found[0][overlap >= min_overlap], found[1][overlap >= min_overlap]
    steps = snapshot_columns(crosscoder)["step"]
    death, birth = (lifecycles[name].to_numpy(dtype=float, na_value=-1).astype(int) for name in ("death", "birth"))
    table = pd.DataFrame({"predecessor": pairs[:, 0].numpy(), "successor": pairs[:, 1].numpy()})
    for name, dates, members in (("death", death, "predecessor"), ("birth", birth, "successor")):
        table[name] = dates[table[members]]
        table[f"{name}_step"] = steps.take(table[name]).array
    table["cosine"], table["overlap"] = cosine.numpy(), overlap[overlap >= min_overlap].numpy()
    table["successors"] = table.groupby("predecessor")["successor"].transform("size")
    table["predecessors"] = table.groupby("successor")["predecessor"].transform("size")
    several, joined = table["successors"] > 1, table["predecessors"] > 1
    table["kind"] = np.select(
        [several & joined, several, joined], ["split and merger", "split", "merger"], "replacement"
    )
    return table.sort_values(["death", "predecessor", "successor"], ignore_index=True)


@torch.no_grad()
def splits(
    crosscoder: Crosscoder,
    alive: Bool[Tensor, " F"] | None = None,
    *,
    presence: float = 0.5,
    together: float = 0.9,
    apart: float = 0.7,
) -> pd.DataFrame:
    """Find pairs of features that share their direction up to a snapshot and differ from it on, or the reverse.

    Only snapshots where both are present count. A pair splits if its cosine is at least `together` at the first of
    them, below `apart` at the last, and crosses the midpoint of the two thresholds exactly once; it merges if the same
    holds backwards. All pairs are compared, which takes F * F * S * D multiplications.

    Args:
        crosscoder: trained on two snapshots or more.
        alive: features to compare, such as `evolve(...).lifecycles()["alive"]`; all with a decoder if None.
        presence: a feature is present where its norm is at least this share of its largest norm.
        together: two rows whose cosine is at least this have the same direction.
        apart: two rows whose cosine is below this have different directions.

    Returns:
        A row per pair: feature, partner (the larger index), kind ("split" or "merger"), at (first snapshot after the
        change), at_step, at_tokens, cosine_before and cosine_after (at the first and the last snapshot where both are
        present).

    Raises:
        UserError: one snapshot only, or thresholds out of order.
    """
    S = crosscoder.n_snapshots
    require_two_snapshots("splitting", S)
    if not -1 <= apart <= together <= 1:
        raise UserError(f"apart={apart} and together={together} must satisfy -1 <= apart <= together <= 1")
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
    # where only one of the two is present, keep the state of the snapshot before, so that it does not count as a change
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
    crosscoder: Crosscoder, lifecycles: pd.DataFrame, max_gap: int, min_cosine: float
) -> tuple[Int[Tensor, "n 2"], Float[Tensor, " n"]]:
    """(predecessor, successor) pairs whose dates and directions match, and their cosines."""
    death, birth = (
        torch.tensor(lifecycles[name].to_numpy(dtype=float, na_value=np.nan)) for name in ("death", "birth")
    )
    pairs: list[Tensor] = [torch.empty(0, 2, dtype=torch.int64)]
    cosines: list[Tensor] = [torch.empty(0)]
    for d in range(1, crosscoder.n_snapshots):
        dying = (death == d).nonzero().flatten()
        # features present at the first snapshot are not born there
        for b in range(max(1, d - max_gap), min(crosscoder.n_snapshots - 1, d + max_gap) + 1):
            born = (birth == b).nonzero().flatten()
            after = _directions(crosscoder, born, b)
            for part in dying.split(_BLOCK):
                cosine = (_directions(crosscoder, part, d - 1) @ after.T).cpu()
                fit = ((cosine >= min_cosine) & (part[:, None] != born)).nonzero()
                pairs.append(torch.stack([part[fit[:, 0]], born[fit[:, 1]]], 1))
                cosines.append(cosine[fit[:, 0], fit[:, 1]])
    return torch.cat(pairs), torch.cat(cosines)


def _overlap(
    crosscoder: Crosscoder, acts: Activations, pairs: Int[Tensor, "n 2"], rate: Float[Tensor, " F"]
) -> Float[Tensor, " n"]:
    """Loevinger's H of pairs of features on the held-out tokens."""
    joint, n = torch.zeros(len(pairs), dtype=torch.float64), 0
    if not len(pairs):
        return joint
    for _, features in held_out_features(crosscoder, acts, "Splits"):
        active = (features > 0).cpu()
        n += len(active)
        size = max(1, _PAIRS // len(active))
        counts = [(active[:, part[:, 0]] & active[:, part[:, 1]]).sum(0) for part in pairs.split(size)]
        joint += torch.cat(counts)
    low, high = rate[pairs].aminmax(dim=1)
    return (joint / n / low - high) / (1 - high)


def _neighbours(crosscoder: Crosscoder, present: Bool[Tensor, "F S"], min_cosine: float) -> Int[Tensor, "n 2"]:
    """Pairs of features that are present with the same direction at some snapshot, the smaller index first."""
    found: list[Tensor] = [torch.empty(0, 2, dtype=torch.int64)]
    for s in range(crosscoder.n_snapshots):
        ids = present[:, s].nonzero().flatten()
        for start in range(0, len(ids), _BLOCK):
            part, others = ids[start : start + _BLOCK], ids[start:]
            left, right = (_directions(crosscoder, i, s) for i in (part, others))
            fit = (left @ right.T >= min_cosine).cpu().nonzero()
            fit = fit[fit[:, 1] > fit[:, 0]]
            found.append(torch.stack([part[fit[:, 0]], others[fit[:, 1]]], 1))
    return torch.unique(torch.cat(found), dim=0)


def _directions(crosscoder: Crosscoder, ids: Int[Tensor, " n"], s: int) -> Float[Tensor, "n D"]:
    """Unit decoder rows of some features at snapshot s."""
    rows = crosscoder.W_dec_by_snapshot
    return normalize(rows[ids.to(rows.device), s].float(), dim=-1)
