"""Is what was planted found again? Scores of a dictionary against the truth, and the baseline without a crosscoder.

Found features are rows (F, S, D) in the scaled space, as the truth is when its rows are scaled alike. Planted and found
features are assigned one to one, for the largest sum of cosines of whole rows (S * D numbers); a planted feature is
recovered when the cosine of its pair exceeds `min_cosine`. Lives are classified by `evolution.classify`.

The baseline trains one dictionary per snapshot and matches afterwards (`linked_rows`): every feature is linked to the
nearest one of the snapshot before, where that is near enough; several may descend from one, so that splits can be told.
A chain of links is a found feature. Its row at a snapshot is the decoder row times the mean activation there, for the
dictionaries have no scale in common; it is zero where the chain has no member.

Letters: S snapshots, D d_model, N planted and F found features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.lifecycles import classify, firing_rates, measure_firing
from crosslens.planted.regimes import Planted

FALSE = 0.7  # a found feature is near a planted one from this cosine on
TURN = 0.3  # radians from which the snapshot of a planted turn is asked for


def matched(
    planted: Planted, found: Float[Tensor, "F S D"], scale: Float[Tensor, " S"], *, min_cosine: float = 0.9
) -> pd.DataFrame:
    """The truth, a row per planted feature, beside the found feature it is assigned to.

    Args:
        planted: the truth.
        found: rows of the live features that were found.
        scale: what activations of each snapshot were multiplied by where these were found.
        min_cosine: from which a planted feature counts as recovered.

    Returns:
        The columns of `planted.truth`, and feature (row of `found`), cosine (of the two rows), recovered,
        claimed_birth, claimed_death; missing where nothing is assigned (fewer found than planted) or claimed.

    Raises:
        UserError: no found features, or rows of another shape.
    """
    cosines = _cosines(planted, found, scale)
    pairs = linear_sum_assignment(cosines, maximize=True)
    feature = pd.array([pd.NA] * len(cosines), dtype="Int64")
    feature[pairs[0]] = pairs[1]
    cosine = np.full(len(cosines), np.nan)
    cosine[pairs[0]] = cosines[pairs]
    life = classify(found.norm(dim=-1))[["birth", "death"]].reindex(feature).reset_index(drop=True)
    return planted.truth.assign(
        feature=feature,
        cosine=cosine,
        recovered=cosine > min_cosine,
        claimed_birth=life["birth"].astype("Int64"),
        claimed_death=life["death"].astype("Int64"),
    )


def recovery(
    planted: Planted, found: Float[Tensor, "F S D"], scale: Float[Tensor, " S"], *, min_cosine: float = 0.9
) -> dict[str, float]:
    """Scores of found features; arguments and errors are those of `matched`.

    Returns:
        found (how many features), cosine (mean over planted features of the best cosine); then shares of planted
        features, which count those that are not recovered as missed: recovered; dated (recovered, with the exact
        birth); death (of those that die: with the exact death); turn (of those that turn by .3 rad or more: the largest
        turn lies at the planted snapshot); partings (of pairs that split or merge: both recovered, and apart exactly
        where they should be). Of the recovered alone: birth (share with the exact birth), birth_error (mean distance in
        snapshots, where a birth is claimed), rotation_error (mean over those that turn of the distance of found and
        planted angle, in degrees). birth_error_all is birth_error of all that are assigned, recovered or not.
        false_births: of found features that claim a birth after the first snapshot, the share that no planted feature
        born at that snapshot is near to (cosine above .7).
        NaN where nothing of the kind is planted, recovered, or claimed.
    """
    table, cosines = matched(planted, found, scale, min_cosine=min_cosine), _cosines(planted, found, scale)
    rows, truth = planted.rows * scale[:, None], planted.truth
    got, partner = table["recovered"].to_numpy(), table["feature"].fillna(0).to_numpy(dtype=np.int64)
    birth, death = (truth[name].to_numpy(dtype=float, na_value=np.nan) for name in ("birth", "death"))
    apart = np.abs(table["claimed_birth"].to_numpy(dtype=float, na_value=np.nan) - birth)
    died = got & (table["claimed_death"].to_numpy(dtype=float, na_value=np.nan) == death)
    life = classify(found.norm(dim=-1))
    born = np.flatnonzero((life["origin"] == "emergent").to_numpy())
    claimed = life["birth"].to_numpy(dtype=float, na_value=np.nan)[born]
    near = (cosines[:, born] > FALSE) & (birth[:, None] == claimed)
    at = truth["at"].fillna(1).to_numpy(dtype=np.int64)
    turning = (truth["kind"] == "turning").to_numpy()
    turns, sharp = np.flatnonzero(turning & got), np.flatnonzero(turning & (truth["angle"].to_numpy() >= TURN))
    angles = [_angles(those, at[turns]) for those in (found[partner[turns]], rows[turns])]
    return {
        "found": len(found),
        "recovered": float(got.mean()),
        "cosine": float(cosines.max(1).mean()),
        "dated": float((apart[got] == 0).sum() / len(got)),
        "birth": _mean(apart[got] == 0),
        "birth_error": _mean(apart[got & np.isfinite(apart)]),
        "birth_error_all": _mean(apart[np.isfinite(apart)]),
        "false_births": _mean(~near.any(0)),
        "death": _mean(died[np.isfinite(death)]),
        "turn": _mean(got[sharp] & (_largest_turn(found[partner[sharp]]) == at[sharp])),
        "rotation_error": _mean(np.abs(angles[0] - angles[1])),
        "partings": _partings(planted, rows, found[partner], got),
    }


def _cosines(planted: Planted, found: Float[Tensor, "F S D"], scale: Float[Tensor, " S"]) -> Float64[np.ndarray, "N F"]:
    if found.ndim != 3 or not len(found) or found.shape[1:] != planted.rows.shape[1:]:
        raise UserError(
            f"found features of shape {tuple(found.shape)}: give (F, S, D) = (1 or more, "
            f"{planted.n_snapshots}, {planted.d_model})"
        )
    rows = planted.rows * scale[:, None]
    return (normalize(rows.flatten(1), dim=1) @ normalize(found.flatten(1), dim=1).T).double().numpy()


@torch.no_grad()
def crosscoder_rows(crosscoder: Crosscoder, acts: Activations) -> Float[Tensor, "F S D"]:
    """Decoder rows of the features that fire on the held-out activations."""
    alive = (firing_rates(crosscoder, acts) > 0) & (crosscoder.decoder_norms > 0).any(1).cpu()
    return crosscoder.W_dec_by_snapshot[alive].cpu().clone()


@torch.no_grad()
def linked_rows(
    dictionaries: Sequence[Crosscoder], acts: Sequence[Activations], *, min_cosine: float = 0.6
) -> tuple[Float[Tensor, "F S D"], Float[Tensor, " S"]]:
    """Chains of the features of one dictionary per snapshot, and the scales of the snapshots.

    Args:
        dictionaries: crosscoders of one snapshot each, in order.
        acts: activations of each snapshot.
        min_cosine: of two decoder rows that are linked.
    """
    sizes = [measure_firing(dictionary, held).mean[:, 0] for dictionary, held in zip(dictionaries, acts, strict=True)]
    rows = [
        (dictionary.W_dec.cpu() * size[:, None].float())[size > 0]
        for dictionary, size in zip(dictionaries, sizes, strict=True)
    ]
    scale = torch.cat([dictionary.activation_scale.cpu() for dictionary in dictionaries])
    return link(rows, min_cosine), scale


def link(rows: Sequence[Float[Tensor, "_ D"]], min_cosine: float) -> Float[Tensor, "F S D"]:
    """Chains of rows over snapshots: each row continues the nearest of the snapshot before, if that is near enough.

    Every row that none continues ends a chain; chains may share their beginning.
    """
    S, D = len(rows), rows[0].shape[1]
    unit = [normalize(those, dim=1) for those in rows]
    before: list[Tensor] = [torch.full((len(rows[0]),), -1)]
    for s in range(1, S):
        if not len(rows[s - 1]) or not len(rows[s]):
            before.append(torch.full((len(rows[s]),), -1))
            continue
        cosine, nearest = (unit[s] @ unit[s - 1].T).max(1)
        before.append(torch.where(cosine >= min_cosine, nearest, -1))
    chains: list[Tensor] = []
    for last in range(S):
        continued = before[last + 1] if last + 1 < S else torch.empty(0, dtype=torch.int64)
        members = torch.ones(len(rows[last]), dtype=torch.bool)
        members[continued[continued >= 0]] = False
        ids = members.nonzero().flatten()
        chain = torch.zeros(len(ids), S, D)
        for s in range(last, -1, -1):
            real = ids >= 0
            chain[real, s] = rows[s][ids[real]]
            ids = torch.where(real, before[s][ids.clamp(min=0)] if len(before[s]) else ids, -1)
        chains.append(chain)
    return torch.cat(chains)


def _angles(rows: Float[Tensor, "n S D"], at: np.ndarray) -> np.ndarray:
    """Angle between the rows before and at a snapshot, in degrees; 90 where either is zero."""
    here = torch.arange(len(rows))
    cosine = cosine_similarity(rows[here, at - 1], rows[here, at], dim=-1)
    return cosine.clamp(-1, 1).arccos().rad2deg().numpy()


def _largest_turn(rows: Float[Tensor, "n S D"]) -> np.ndarray:
    """First snapshot after the largest turn; only snapshots at which the feature is half as strong as ever count."""
    present = rows.norm(dim=-1) >= 0.5 * rows.norm(dim=-1).amax(1, keepdim=True)
    cosine = cosine_similarity(rows[:, 1:], rows[:, :-1], dim=-1)
    return cosine.masked_fill(~(present[:, 1:] & present[:, :-1]), torch.inf).argmin(1).numpy() + 1


def _partings(planted: Planted, rows: Tensor, found: Tensor, got: np.ndarray) -> float:
    partner = planted.truth["partner"].fillna(-1).to_numpy(dtype=np.int64)
    first = np.flatnonzero(partner > np.arange(len(partner)))
    if not len(first):
        return float("nan")
    second = partner[first]
    together = [cosine_similarity(those[first], those[second], dim=-1) > FALSE for those in (found, rows)]
    there = rows[first].norm(dim=-1) > 0
    same = ((together[0] == together[1]) | ~there).all(1).numpy()
    return float((same & got[first] & got[second]).mean())


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
