"""Does a dictionary recover what was planted? Scores against the ground truth, and a baseline without a crosscoder.

1. Found features are rows (F, S, D) in the scaled space; the planted rows are scaled in the same way.
2. Planted and found features are assigned one to one to maximise the sum of cosines of whole rows (S * D numbers). A
   planted feature is recovered if the cosine of its pair exceeds `min_cosine`. Lifecycles of found features come from
   `evolution.classify_lifecycles`.
3. The baseline trains one dictionary per snapshot and matches their features afterwards (`linked_rows`). Every feature
   is linked to the nearest one of the snapshot before, if that is near enough; several may be linked to one, so splits
   can be found. A chain of links is a found feature. Its row at a snapshot is the decoder row times the mean activation
   there, since the dictionaries have no common scale; it is zero where the chain has no member.

Symbols: S snapshots, D d_model, N planted and F found features.
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
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.lifecycles import classify_lifecycles
from planted.regimes import Planted

NEAR = 0.7  # least cosine of a found feature that is near a planted one
LARGE_ANGLE = 0.3  # radians; the snapshot of smaller planted rotations is not scored


def matched(
    planted: Planted, found: Float[Tensor, "F S D"], scale: Float[Tensor, " S"], *, min_cosine: float = 0.9
) -> pd.DataFrame:
    """Assign a found feature to every planted feature.

    Args:
        planted: the ground truth.
        found: rows of the live features that were found.
        scale: factors by which the dictionary scales the activations of each snapshot.
        min_cosine: a planted feature is recovered if the cosine with its found feature exceeds this.

    Returns:
        A row per planted feature: the columns of `planted.truth`, and feature (row of `found`), cosine (of the two
        rows), recovered, found_birth, found_death; missing if no feature is assigned or it has no such date.

    Raises:
        UserError: no found features, or rows of another shape.
    """
    cosines = _cosines(planted, found, scale)
    pairs = linear_sum_assignment(cosines, maximize=True)
    feature = pd.array([pd.NA] * len(cosines), dtype="Int64")
    feature[pairs[0]] = pairs[1]
    cosine = np.full(len(cosines), np.nan)
    cosine[pairs[0]] = cosines[pairs]
    dates = classify_lifecycles(found.norm(dim=-1))[["birth", "death"]].reindex(feature).reset_index(drop=True)
    return planted.truth.assign(
        feature=feature,
        cosine=cosine,
        recovered=cosine > min_cosine,
        found_birth=dates["birth"].astype("Int64"),
        found_death=dates["death"].astype("Int64"),
    )


def recovery(
    planted: Planted, found: Float[Tensor, "F S D"], scale: Float[Tensor, " S"], *, min_cosine: float = 0.9
) -> dict[str, float]:
    """Score found features against the ground truth; arguments and errors as for `matched`.

    Returns:
        found (number of features), cosine (mean over planted features of the best cosine).
        Shares of planted features, where those not recovered count as missed: recovered; dated (recovered with the
        exact birth); death (of those that die: exact death); rotation (of those that rotate by .3 rad or more: largest
        rotation at the planted snapshot); splits (of pairs that split or merge: both recovered, with the same direction
        exactly where planted).
        Over recovered features only: birth (share with the exact birth), birth_error (mean error in snapshots, of those
        found with a birth), rotation_error (mean error of the angle, in degrees, of those that rotate).
        birth_error_all is birth_error over all assigned features, recovered or not. false_births is the share of found
        features born after the first snapshot that are not near (cosine above .7) a planted feature born there.
        NaN if there are no such features.
    """
    table, cosines = matched(planted, found, scale, min_cosine=min_cosine), _cosines(planted, found, scale)
    rows, truth = planted.rows * scale[:, None], planted.truth
    got, partner = table["recovered"].to_numpy(), table["feature"].fillna(0).to_numpy(dtype=np.int64)
    birth, death = (truth[name].to_numpy(dtype=float, na_value=np.nan) for name in ("birth", "death"))
    error = np.abs(table["found_birth"].to_numpy(dtype=float, na_value=np.nan) - birth)
    died = got & (table["found_death"].to_numpy(dtype=float, na_value=np.nan) == death)
    lifecycles = classify_lifecycles(found.norm(dim=-1))
    born = np.flatnonzero((lifecycles["origin"] == "emergent").to_numpy())
    births = lifecycles["birth"].to_numpy(dtype=float, na_value=np.nan)[born]
    near = (cosines[:, born] > NEAR) & (birth[:, None] == births)
    at = truth["at"].fillna(1).to_numpy(dtype=np.int64)
    rotating = (truth["kind"] == "rotating").to_numpy()
    measured = np.flatnonzero(rotating & got)
    large = np.flatnonzero(rotating & (truth["angle"].to_numpy() >= LARGE_ANGLE))
    angles = [_angles(those, at[measured]) for those in (found[partner[measured]], rows[measured])]
    return {
        "found": len(found),
        "recovered": float(got.mean()),
        "cosine": float(cosines.max(1).mean()),
        "dated": float((error[got] == 0).sum() / len(got)),
        "birth": _mean(error[got] == 0),
        "birth_error": _mean(error[got & np.isfinite(error)]),
        "birth_error_all": _mean(error[np.isfinite(error)]),
        "false_births": _mean(~near.any(0)),
        "death": _mean(died[np.isfinite(death)]),
        "rotation": _mean(got[large] & (_largest_rotation(found[partner[large]]) == at[large])),
        "rotation_error": _mean(np.abs(angles[0] - angles[1])),
        "splits": _splits(planted, rows, found[partner], got),
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
    """Select the decoder rows of the features that fire on the held-out activations."""
    alive = (measure_firing(crosscoder, acts).rate > 0) & (crosscoder.decoder_norms > 0).any(1).cpu()
    return crosscoder.W_dec_by_snapshot[alive].cpu().clone()


@torch.no_grad()
def linked_rows(
    dictionaries: Sequence[Crosscoder], acts: Sequence[Activations], *, min_cosine: float = 0.6
) -> tuple[Float[Tensor, "F S D"], Float[Tensor, " S"]]:
    """Link the features of one dictionary per snapshot into chains.

    Args:
        dictionaries: crosscoders of one snapshot each, in order.
        acts: activations of each snapshot.
        min_cosine: least cosine of two linked decoder rows.

    Returns:
        The chains, and the factors by which the dictionaries scale the activations.
    """
    sizes = [measure_firing(dictionary, held).mean[:, 0] for dictionary, held in zip(dictionaries, acts, strict=True)]
    rows = [
        (dictionary.W_dec.cpu() * size[:, None].float())[size > 0]
        for dictionary, size in zip(dictionaries, sizes, strict=True)
    ]
    scale = torch.cat([dictionary.activation_scale.cpu() for dictionary in dictionaries])
    return link(rows, min_cosine), scale


def link(rows: Sequence[Float[Tensor, "_ D"]], min_cosine: float) -> Float[Tensor, "F S D"]:
    """Link each row to the nearest row of the snapshot before, if that is near enough.

    Every row that no later row is linked to ends a chain; chains may share their beginning.
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
    """Angle between the rows before and at a snapshot, in degrees; 90 if either is zero."""
    here = torch.arange(len(rows))
    cosine = cosine_similarity(rows[here, at - 1], rows[here, at], dim=-1)
    return cosine.clamp(-1, 1).arccos().rad2deg().numpy()


def _largest_rotation(rows: Float[Tensor, "n S D"]) -> np.ndarray:
    """First snapshot after the largest rotation, among snapshots with at least half of the feature's largest norm."""
    present = rows.norm(dim=-1) >= 0.5 * rows.norm(dim=-1).amax(1, keepdim=True)
    cosine = cosine_similarity(rows[:, 1:], rows[:, :-1], dim=-1)
    return cosine.masked_fill(~(present[:, 1:] & present[:, :-1]), torch.inf).argmin(1).numpy() + 1


def _splits(planted: Planted, rows: Tensor, found: Tensor, got: np.ndarray) -> float:
    partner = planted.truth["partner"].fillna(-1).to_numpy(dtype=np.int64)
    first = np.flatnonzero(partner > np.arange(len(partner)))
    if not len(first):
        return float("nan")
    second = partner[first]
    together = [cosine_similarity(those[first], those[second], dim=-1) > NEAR for those in (found, rows)]
    present = rows[first].norm(dim=-1) > 0
    same = ((together[0] == together[1]) | ~present).all(1).numpy()
    return float((same & got[first] & got[second]).mean())


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
