"""Relative effects over snapshots: RelIE and RelDec, their classes and intervals, and the sign changes they hide.

With x_is >= 0 the size of feature i at snapshot s (|IE_is| for RelIE, the decoder norm for RelDec):

    share       x_is / sum_s' x_is'            a point on the simplex; rows sum to 1
    pairwise    x_ib / (x_ia + x_ib)           0: only at snapshot a, 1: only at b

Both are NaN if no effect is large enough (Bayazit et al., arXiv 2509.05291, section 3, set .5 there and call the
feature shared). The absolute value is taken after averaging over prompts. It hides the sign: a feature can turn from
harmful to helpful. `sign_changes` lists those, and `classify` has a signed class too. Bayazit et al. classify features
at two and three snapshots; centres of mass, signed classes and intervals are new here.

Symbols: S snapshots, F features, R bootstrap replicates, A features with an effect on any prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import norm
from torch import Tensor

from crosslens.errors import UserError

UNDEFINED = "undefined"


@runtime_checkable
class Effects(Protocol):
    """The part of an `Attribution` that this module reads."""

    @property
    def labels(self) -> list[str]: ...
    @property
    def effects(self) -> Tensor: ...
    @property
    def standard_errors(self) -> Tensor: ...
    @property
    def metric_clean(self) -> Tensor: ...
    @property
    def active(self) -> Tensor: ...
    @property
    def bootstrap(self) -> Any: ...


def shares(sizes: Float[Tensor, "*R F S"]) -> Float[Tensor, "*R F S"]:
    """Normalise sizes over snapshots to sum to 1; NaN where all are 0."""
    return sizes / sizes.sum(-1, keepdim=True)


def pairwise_shares(sizes: Float[Tensor, "F S"]) -> Float[Tensor, "F S S"]:
    """`[i, a, b]` is the share of snapshot b in the sum of a and b; NaN where both are 0."""
    return sizes[:, None, :] / (sizes[:, None, :] + sizes[:, :, None])


def relie(
    effects: Effects,
    min_effect: float | None = None,
    *,
    normalised: bool = False,
    floor: float = 0.1,
    snapshots: Sequence[int] | None = None,
) -> Float[Tensor, "F S"]:
    """Relative indirect effect `|IE_is| / sum_s' |IE_is'|`; rows sum to 1 or are NaN.

    Args:
        effects: from `attribute`.
        min_effect: a row is NaN if no |IE| is larger, in logits; None is two standard errors (with a single prompt
            there are none, and all rows are NaN).
        normalised: divide the effects of each snapshot by its clean metric first, because logits grow with training.
        floor: smallest |metric| to divide by, in logits.
        snapshots: compare only these, such as the two or three of a plot.

    Raises:
        UserError: no such snapshot, or a floor that is not positive.
    """
    where = _indices(effects, snapshots)
    matters = _matters(effects, min_effect)[:, where].any(-1, keepdim=True)
    sizes = _sizes(effects.effects, effects.metric_clean, normalised, floor)[:, where]
    return torch.where(matters, shares(sizes), torch.nan)


def pairwise_relie(
    effects: Effects, min_effect: float | None = None, *, normalised: bool = False, floor: float = 0.1
) -> Float[Tensor, "F S S"]:
    """`[i, a, b]`: the share of snapshot b in |IE| at a and b; NaN if neither is above `min_effect`.

    This is what Bayazit et al. plot for pairs of snapshots; arguments as in `relie`.

    Raises:
        UserError: a floor that is not positive.
    """
    matters = _matters(effects, min_effect)
    sizes = _sizes(effects.effects, effects.metric_clean, normalised, floor)
    return torch.where(matters[:, None, :] | matters[:, :, None], pairwise_shares(sizes), torch.nan)


def reldec(decoder_norms: Float[Tensor, "F S"]) -> Float[Tensor, "F S"]:
    """Relative decoder norm `n_is / sum_s' n_is'` of `decoder_norms`; NaN where all are 0."""
    return shares(decoder_norms.detach())


def relie_interval(
    effects: Effects,
    level: float = 0.95,
    min_effect: float | None = None,
    *,
    normalised: bool = False,
    floor: float = 0.1,
    snapshots: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "F S"], Float[Tensor, "F S"]]:
    """Percentile bootstrap interval of `relie` over prompts, (low, high); NaN where it is.

    Args:
        effects: from `attribute(..., n_bootstrap=200)`.
        level: share of the replicates inside.
        min_effect: as in `relie`.
        normalised: as in `relie`; the metric is resampled with the prompts.
        floor: smallest |metric| to divide by, in logits.
        snapshots: compare only these.

    Raises:
        UserError: effects without replicates, or a level outside (0, 1).
    """
    if effects.bootstrap is None:
        raise UserError("the effects have no bootstrap replicates: use attribute(..., n_bootstrap=200)")
    check_level(level)
    where = _indices(effects, snapshots)
    share = relie(effects, min_effect, normalised=normalised, floor=floor, snapshots=snapshots)
    sizes = _sizes(effects.bootstrap.effects, effects.bootstrap.metric[:, None], normalised, floor)
    tail = (1 - level) / 2
    quantiles = np.nanquantile(shares(sizes[..., where]).numpy(), [tail, 1 - tail], axis=0)
    bounds: list[Tensor] = []
    for values in torch.from_numpy(quantiles).to(share.dtype):
        bound = torch.full_like(share, torch.nan)
        bound[effects.bootstrap.features] = values
        bounds.append(torch.where(share.isnan(), torch.nan, bound))
    return bounds[0], bounds[1]


def sign_changes(effects: Effects, min_z: float = 2.0) -> pd.DataFrame:
    """Where the effect of a feature changes sign, from one snapshot with a significant effect to the next such one.

    Args:
        effects: from `attribute`.
        min_z: an effect is significant if it exceeds this many standard errors.

    Returns:
        A row per change, the most significant first: feature, from_snapshot and to_snapshot (indices), from_label,
        to_label, from_ie and to_ie (the effects there, in logits), z (the smaller of the two) and p (two-sided, of the
        smaller z, not corrected for the number of features).
    """
    z = effects.effects / effects.standard_errors
    rows: list[dict[str, Any]] = []
    for feature in ((z > min_z).any(-1) & (z < -min_z).any(-1)).nonzero().flatten().tolist():
        significant = (z[feature].abs() > min_z).nonzero().flatten().tolist()
        for a, b in pairwise(significant):
            if z[feature, a] * z[feature, b] < 0:
                weaker = min(abs(float(z[feature, a])), abs(float(z[feature, b])))
                rows.append(
                    {
                        "feature": feature,
                        "from_snapshot": a,
                        "to_snapshot": b,
                        "from_label": effects.labels[a],
                        "to_label": effects.labels[b],
                        "from_ie": float(effects.effects[feature, a]),
                        "to_ie": float(effects.effects[feature, b]),
                        "z": weaker,
                        "p": 2 * float(norm.sf(weaker)),
                    }
                )
    columns = ("feature", "from_snapshot", "to_snapshot", "from_label", "to_label", "from_ie", "to_ie", "z", "p")
    table = pd.DataFrame(rows, columns=list(columns))
    return table.sort_values("z", ascending=False, ignore_index=True)


def centre_of_mass(share: Float[Tensor, "F S"]) -> Float[Tensor, " F"]:
    """Mean snapshot index, in [0, 1], weighted by the shares; with two snapshots the share of the second."""
    S = share.shape[-1]
    if S < 2:
        raise UserError("a centre of mass needs at least 2 snapshots, but there is only 1: give more snapshots")
    return share @ (torch.arange(S, dtype=share.dtype, device=share.device) / (S - 1))


def classes(share: Float[Tensor, "F S"], low: float = 0.3, high: float = 0.7) -> np.ndarray:
    """Class of every feature by its shares, as a string.

    "transient" if a single interior snapshot has more than `high`; otherwise by the centre of mass "discontinued"
    (below `low`), "emerged" (above `high`) or "maintained"; "undefined" if the shares are NaN. With two snapshots these
    are the thresholds of Bayazit et al. on the share of the second.

    Args:
        share: share of each snapshot, as from `relie`.
        low: centre of mass below which a feature is discontinued.
        high: centre of mass above which it has emerged, and share of one interior snapshot above which it is transient.

    Raises:
        UserError: a single snapshot, or thresholds out of order.
    """
    _check_thresholds(low, high)
    centre = centre_of_mass(share)
    transient = (share[:, 1:-1] > high).any(-1)
    names = np.where((centre < low).cpu().numpy(), "discontinued", "maintained").astype(object)
    names[(centre > high).cpu().numpy()] = "emerged"
    names[transient.cpu().numpy()] = "transient"
    names[centre.isnan().cpu().numpy()] = UNDEFINED
    return names


def three_way_classes(
    share: Float[Tensor, "F S"], labels: Sequence[str] = ("A", "B", "C"), low: float = 0.3, high: float = 0.7
) -> np.ndarray:
    """Classes of Bayazit et al. for three snapshots, as strings. The first that applies:

    "A-specific" if A is above `high`, and likewise B and C; "A-B-C shared" if all are at least `low`; "A-B shared" if
    two are; "other"; "undefined" if the shares are NaN.

    Raises:
        UserError: not three snapshots, or thresholds out of order.
    """
    _check_thresholds(low, high)
    if share.shape[-1] != 3 or len(labels) != 3:
        raise UserError(
            f"three-way classes need 3 snapshots, not {share.shape[-1]}: use relie(ie, snapshots=[0, 5, 9])"
        )

    def name(row: list[float]) -> str:
        if row[0] != row[0]:
            return UNDEFINED
        for label, value in zip(labels, row, strict=True):
            if value > high:
                return f"{label}-specific"
        present = [label for label, value in zip(labels, row, strict=True) if value >= low]
        return f"{'-'.join(present)} shared" if len(present) > 1 else "other"

    return np.array([name(row) for row in share.tolist()], dtype=object)


def signed_classes(effects: Effects, min_z: float = 2.0) -> np.ndarray:
    """Class of every feature by its signed effects, as a string.

    "helpful" or "harmful" if all significant effects (beyond `min_z` standard errors) have one sign, "turns helpful" or
    "turns harmful" if it changes once, "wavers" if it changes more often, "undefined" if no effect is significant.

    Args:
        effects: from `attribute`.
        min_z: an effect is significant if it exceeds this many standard errors.
    """
    z = effects.effects / effects.standard_errors
    signs = torch.where(z.abs() > min_z, z.sign(), 0.0).tolist()

    def name(row: list[float]) -> str:
        significant = [sign for sign in row if sign]
        if not significant:
            return UNDEFINED
        turns = sum(a != b for a, b in pairwise(significant))
        word = "helpful" if significant[-1] > 0 else "harmful"
        return word if not turns else f"turns {word}" if turns == 1 else "wavers"

    return np.array([name(row) for row in signs], dtype=object)


def classify(
    effects: Effects,
    min_effect: float | None = None,
    *,
    normalised: bool = False,
    floor: float = 0.1,
    low: float = 0.3,
    high: float = 0.7,
    min_z: float = 2.0,
) -> pd.DataFrame:
    """Classes of the features that are active on the prompts: a row per feature.

    Columns: feature, class (of RelIE), centre_of_mass, peak (the snapshot with the largest share, -1 if undefined),
    signed_class and, with three snapshots, three_way. Arguments as in `relie`, `classes`, `signed_classes`.

    Raises:
        UserError: a single snapshot, a floor that is not positive, or low and high that are not shares in order.
    """
    share = relie(effects, min_effect, normalised=normalised, floor=floor)
    kept = effects.active.any(-1)
    peak = torch.where(share.isnan().any(-1), -1, share.nan_to_num(0.0).argmax(-1))
    columns: dict[str, Any] = {
        "feature": kept.nonzero().flatten().numpy(),
        "class": classes(share[kept], low, high),
        "centre_of_mass": centre_of_mass(share)[kept].numpy(),
        "peak": peak[kept].numpy(),
        "signed_class": signed_classes(effects, min_z)[kept.numpy()],
    }
    if len(effects.labels) == 3:
        columns["three_way"] = three_way_classes(share[kept], effects.labels, low, high)
    return pd.DataFrame(columns)


def check_level(level: float) -> None:
    """Refuse the level of an interval that is outside (0, 1).

    Raises:
        UserError: it is.
    """
    if not 0 < level < 1:
        raise UserError(f"level={level} must be between 0 and 1; 0.95 is usual")


def _sizes(values: Tensor, metric: Tensor, normalised: bool, floor: float) -> Tensor:
    if not normalised:
        return values.abs()
    if not floor > 0:
        raise UserError(f"floor={floor} must be positive, so that no effect is divided by a metric of 0")
    return values.abs() / metric.abs().clamp_min(floor)


def _matters(effects: Effects, min_effect: float | None) -> Bool[Tensor, "F S"]:
    least = 2 * effects.standard_errors if min_effect is None else min_effect
    return effects.effects.abs() > least


def _indices(effects: Effects, snapshots: Sequence[int] | None) -> list[int]:
    S = len(effects.labels)
    indices = list(range(S)) if snapshots is None else list(snapshots)
    for s in indices:
        if not -S <= s < S:
            raise UserError(f"snapshot {s} is not in [{-S}, {S - 1}]: there are {S} snapshots")
    return indices


def _check_thresholds(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise UserError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
