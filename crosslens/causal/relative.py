"""Relative measures over snapshots: RelIE, RelDec, their classes, their intervals, and the changes of sign they hide.

With x_is >= 0 the size of feature i at snapshot s (|IE_is| for RelIE, the decoder norm for RelDec):

    share       x_is / sum_s' x_is'            a point of the simplex; rows sum to 1
    pairwise    x_ib / (x_ia + x_ib)           0 is only at snapshot a, 1 only at b

Both are NaN where nothing matters (Bayazit et al., arXiv 2509.05291, section 3, put .5 there and call it shared).
The absolute value is taken after averaging over prompts. It hides the sign: a feature can turn from harmful to helpful,
so `sign_changes` lists those, and `classify` puts the signed class beside the other. Bayazit et al. class features at
two and three snapshots; centres of mass, signed classes and intervals are this project's own.

Letters: S snapshots, F features, R bootstrap replicates, A features with an effect on any prompt.
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
    """What this module asks of an `Attribution`."""

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
    """Sizes over snapshots as shares; NaN where all are 0."""
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
        min_effect: a row is NaN where no |IE| is above it, in logits; two standard errors when None (with a single
            prompt there are none, and all is NaN).
        normalised: divide the effects of each snapshot by its clean metric first, for logits grow with training.
        floor: smallest |metric| that is divided by, in logits.
        snapshots: compare these alone, such as the two or three that a plot has room for.

    Raises:
        UserError: no such snapshot, or a floor that is not positive.
    """
    chosen = _chosen(effects, snapshots)
    matters = _matters(effects, min_effect)[:, chosen].any(-1, keepdim=True)
    sizes = _sizes(effects.effects, effects.metric_clean, normalised, floor)[:, chosen]
    return torch.where(matters, shares(sizes), torch.nan)


def pairwise_relie(
    effects: Effects, min_effect: float | None = None, *, normalised: bool = False, floor: float = 0.1
) -> Float[Tensor, "F S S"]:
    """`[i, a, b]`: the share of snapshot b in |IE| at a and b; NaN where neither is above `min_effect`.

    Between two snapshots it is what Bayazit et al. plot for pairs; arguments as in `relie`.

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
        min_effect: as the others in `relie`.
        normalised: the metric is drawn anew with the prompts, too.
        floor: smallest |metric| that is divided by.
        snapshots: compare these alone.

    Raises:
        UserError: effects without replicates, or a level outside (0, 1).
    """
    if effects.bootstrap is None:
        raise UserError("there are no bootstrap replicates: attribute with n_bootstrap=200, say")
    if not 0 < level < 1:
        raise UserError(f"level={level} is not between 0 and 1: 0.95 is usual")
    chosen = _chosen(effects, snapshots)
    share = relie(effects, min_effect, normalised=normalised, floor=floor, snapshots=snapshots)
    sizes = _sizes(effects.bootstrap.effects, effects.bootstrap.metric[:, None], normalised, floor)
    tail = (1 - level) / 2
    quantiles = np.nanquantile(shares(sizes[..., chosen]).numpy(), [tail, 1 - tail], axis=0)
    bounds: list[Tensor] = []
    for values in torch.from_numpy(quantiles).to(share.dtype):
        bound = torch.full_like(share, torch.nan)
        bound[effects.bootstrap.features] = values
        bounds.append(torch.where(share.isnan(), torch.nan, bound))
    return bounds[0], bounds[1]


def sign_changes(effects: Effects, min_z: float = 2.0) -> pd.DataFrame:
    """Where the effect of a feature turns its sign: from one snapshot at which it is sure to the next such one.

    Args:
        effects: from `attribute`.
        min_z: an effect is sure when it exceeds so many of its standard errors.

    Returns:
        A row per change, the surest first: feature, from_snapshot and to_snapshot (indices), from_label, to_label,
        from_ie and to_ie (the effects there, in logits), z (the smaller of the two) and p (two-sided, of the weaker
        one, not corrected for the number of features).
    """
    z = effects.effects / effects.standard_errors
    rows: list[dict[str, Any]] = []
    for feature in ((z > min_z).any(-1) & (z < -min_z).any(-1)).nonzero().flatten().tolist():
        sure = (z[feature].abs() > min_z).nonzero().flatten().tolist()
        for a, b in pairwise(sure):
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
        raise UserError("one snapshot has no course over snapshots: give two or more")
    return share @ (torch.arange(S, dtype=share.dtype, device=share.device) / (S - 1))


def classes(share: Float[Tensor, "F S"], low: float = 0.3, high: float = 0.7) -> np.ndarray:
    """Class of every feature from its shares, as a string.

    "transient" where a single interior snapshot has more than `high`; otherwise by the centre of mass "discontinued"
    (below `low`), "emerged" (above `high`) or "maintained"; "undefined" where the shares are NaN. With two snapshots
    these are the thresholds of Bayazit et al. on the share of the second.

    Args:
        share: of each snapshot, such as `relie` gives it.
        low: centre of mass below which a feature is discontinued.
        high: centre of mass above which it has emerged, and share of one interior snapshot above which it is transient.

    Raises:
        UserError: one snapshot, or thresholds out of order.
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
    """The table of Bayazit et al. for three snapshots, as strings, in this order:

    "A-specific" where A is above `high`, and so for B and C; "A-B-C shared" where all are at least `low`; "A-B shared"
    where two are; else "other"; "undefined" where the shares are NaN.

    Raises:
        UserError: not three snapshots, or thresholds out of order.
    """
    _check_thresholds(low, high)
    if share.shape[-1] != 3 or len(labels) != 3:
        raise UserError(
            f"{share.shape[-1]} snapshots have no 3-way table: choose three, relie(ie, snapshots=[0, 5, 9])"
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
    """Class of every feature from its signed effects, as a string.

    "helpful" or "harmful" where all sure effects (beyond `min_z` standard errors) have one sign, "turns helpful" or
    "turns harmful" where they change it once, "wavers" where more often, "undefined" where none is sure.

    Args:
        effects: from `attribute`.
        min_z: an effect is sure when it exceeds so many of its standard errors.
    """
    z = effects.effects / effects.standard_errors
    signs = torch.where(z.abs() > min_z, z.sign(), 0.0).tolist()

    def name(row: list[float]) -> str:
        sure = [sign for sign in row if sign]
        if not sure:
            return UNDEFINED
        turns = sum(a != b for a, b in pairwise(sure))
        word = "helpful" if sure[-1] > 0 else "harmful"
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
    """Classes of the features that are active on the prompts: a row each.

    Columns: feature, class (of RelIE), centre_of_mass, peak (the snapshot of the largest share, -1 where undefined),
    signed_class, and three_way where there are three snapshots. Arguments as in `relie`, `classes`, `signed_classes`.

    Raises:
        UserError: one snapshot, a floor that is not positive, or low and high that are not shares in order.
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


def _sizes(values: Tensor, metric: Tensor, normalised: bool, floor: float) -> Tensor:
    if not normalised:
        return values.abs()
    if not floor > 0:
        raise UserError(f"floor={floor} must be positive: it keeps effects from being divided by a metric of 0")
    return values.abs() / metric.abs().clamp_min(floor)


def _matters(effects: Effects, min_effect: float | None) -> Bool[Tensor, "F S"]:
    least = 2 * effects.standard_errors if min_effect is None else min_effect
    return effects.effects.abs() > least


def _chosen(effects: Effects, snapshots: Sequence[int] | None) -> list[int]:
    S = len(effects.labels)
    chosen = list(range(S)) if snapshots is None else list(snapshots)
    for s in chosen:
        if not -S <= s < S:
            raise UserError(f"snapshot {s} does not exist: there are {S}, 0 to {S - 1}")
    return chosen


def _check_thresholds(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise UserError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
