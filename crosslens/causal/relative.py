"""Relative effects over snapshots: RelIE and RelDec, which effects are significant, classes, and sign changes.

With x_is >= 0 the size of feature i at snapshot s, a relative size is x_is / sum_s' x_is', a point on the simplex:

    RelIE          x = |IE_is|                        Bayazit et al. (arXiv 2509.05291, section 3)
    share RelIE    x = |IE_is| / sum_j |IE_js|        new here
    RelDec         x = norm of the decoder row

Logits grow in training, and the effects of most features with them, so that RelIE calls most features "emerged". Share
RelIE compares what part of its snapshot's total effect a feature has. Pairwise, x_ib / (x_ia + x_ib) is 0 for features
that act only at snapshot a, 1 only at b.

Only significant effects enter: all others count as 0, also in the sums over features and snapshots. Else the noise of
many snapshots at which a feature does nothing outweighs the one at which it acts. The price is that small effects are
missed, so that the centre of mass of a feature that grows slowly is read too late. Without a significant effect a
feature has no relative effects (NaN) and no class. `min_effect=0` lets every effect enter, as Bayazit et al. do, except
that they set .5 where all are 0, and call the feature shared.

One rule says which effects are significant, here and in timelines. Prompts with a word in common are not independent,
so the units are *groups* of prompts (`crosslens.tasks.groups`). The effect of feature i at s is a sum over G groups. If
it is 0 because each group's term could as well have the opposite sign, as when answers are swapped, its p-value is that
of `stats.sign_flip_p`, for any number of groups; a t-test is wrong for features that are active on a few prompts. These
are corrected for the number of features, and of snapshots within a feature (`stats.family_q_values`): of the features
that have a class, 5 % have no effect.

Intervals (`relie_interval`) do not depend on which effects happened to be significant. An effect that is not may be 0
or small, and the data do not say which, so the interval reaches from the lower end of one estimate to the upper end of
another: in the first, effects that are not significant enter the sum with what exceeds .4 of their standard error, in
the second with 0. Each end is t standard errors from its estimate. `benchmarks/calibration.py` has the coverage.

The absolute value is taken after averaging over prompts. It hides the sign: a feature can turn from harmful to helpful.
`sign_changes` lists those, and `classify` has a signed class too. Bayazit et al. classify features at two and three
snapshots; significance, centres of mass, signed classes and intervals are new here.

Symbols: S snapshots, F features, R bootstrap replicates, A features with an effect on any prompt, G groups of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslens import stats
from crosslens.errors import UserError
from crosslens.snapshots.lookup import find_snapshot

UNDEFINED = "undefined"
FDR = 0.05  # expected part of the features called significant that have no effect
EXCESS = 0.4  # standard errors by which an effect that is not significant must exceed 0 to enter an interval


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
    def p(self) -> Tensor: ...
    @property
    def n_groups(self) -> int: ...
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


def p_values(effects: Effects) -> Float[Tensor, "F S"]:
    """Two-sided p-value of every effect against 0, by flipping the signs of groups; 1 with a single group.

    NaN where the feature is not active. Not corrected for the number of effects.

    Args:
        effects: from `attribute`.
    """
    return effects.p.double().cpu().masked_fill(~effects.active.cpu(), torch.nan)


def q_values(effects: Effects) -> Float[Tensor, "F S"]:
    """`p_values` adjusted for all active features, and the snapshots of each (Benjamini and Bogomolov 2014).

    NaN where the feature is not active.

    Args:
        effects: from `attribute`.
    """
    return torch.from_numpy(stats.family_q_values(p_values(effects).numpy()))


def significant(effects: Effects, min_effect: float | None = None, *, fdr: float = FDR) -> Bool[Tensor, "F S"]:
    """Which effects count.

    Args:
        effects: from `attribute`.
        min_effect: None applies the false discovery rate; a number, in logits, takes all |IE| above it instead; 0 is
            the papers' own.
        fdr: expected part of the features with significant effects that have none, and of the significant effects of a
            feature that are 0.

    Raises:
        UserError: fdr outside (0, 1), or a negative min_effect.
    """
    if min_effect is not None:
        if not min_effect >= 0:
            raise UserError(f"min_effect={min_effect} must be at least 0 logits, or None for significant effects")
        return (effects.effects.abs() > min_effect).cpu()
    if not 0 < fdr < 1:
        raise UserError(f"fdr={fdr} must be between 0 and 1; 0.05 is usual")
    return q_values(effects) <= fdr  # NaN is not


def relie(
    effects: Effects, min_effect: float | None = None, *, fdr: float = FDR, snapshots: Sequence[int] | None = None
) -> Float[Tensor, "F s"]:
    """Relative indirect effect `|IE_is| / sum_s' |IE_is'|` of the significant effects; rows sum to 1 or are NaN.

    Args:
        effects: from `attribute`.
        min_effect: effects that do not count, as in `significant`, are 0; a row is NaN if none counts. 0 gives RelIE
            as in Bayazit et al.
        fdr: as in `significant`.
        snapshots: compare only these, such as the two or three of a plot.

    Raises:
        UserError: no such snapshot, or as in `significant`.
    """
    return _relative(effects, False, significant(effects, min_effect, fdr=fdr), snapshots)


def share_relie(
    effects: Effects, min_effect: float | None = None, *, fdr: float = FDR, snapshots: Sequence[int] | None = None
) -> Float[Tensor, "F s"]:
    """RelIE of each effect's share of its snapshot's total, `|IE_is| / sum_j |IE_js|`, of the significant effects.

    Rows sum to 1 or are NaN.

    Args:
        effects: from `attribute`.
        min_effect: as in `significant`.
        fdr: as in `significant`.
        snapshots: as in `relie`.

    Raises:
        UserError: as in `relie`.
    """
    return _relative(effects, True, significant(effects, min_effect, fdr=fdr), snapshots)


def pairwise_relie(
    effects: Effects, min_effect: float | None = None, *, share: bool = False, fdr: float = FDR
) -> Float[Tensor, "F S S"]:
    """`[i, a, b]`: the share of snapshot b in |IE| at a and b, 0 or 1 if one of them counts; NaN if neither does.

    With `min_effect=0` this is what Bayazit et al. plot for pairs of snapshots.

    Args:
        effects: from `attribute`.
        min_effect: as in `significant`.
        share: compare shares of the snapshots' totals instead of effects.
        fdr: as in `significant`.

    Raises:
        UserError: as in `significant`.
    """
    return pairwise_shares(_sizes(effects, share, significant(effects, min_effect, fdr=fdr)))


def reldec(decoder_norms: Float[Tensor, "F S"]) -> Float[Tensor, "F S"]:
    """Relative decoder norm `n_is / sum_s' n_is'` of `decoder_norms`; NaN where all are 0."""
    return shares(decoder_norms.detach())


def relie_interval(
    effects: Effects,
    level: float = 0.95,
    min_effect: float | None = None,
    *,
    share: bool = False,
    fdr: float = FDR,
    snapshots: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "F s"], Float[Tensor, "F s"]]:
    """Interval of `relie`, (low, high), between -1 and 1; NaN where it is.

    With y_s = |IE_s|, or the share of its snapshot's total, and w_s the weight of snapshot s in the sum, an estimate is
    R_s = y_s / sum_s' w_s' y_s'. Its standard error is that of its linear part over bootstrap replicates y*,
    (y*_s - R_s sum_s' w_s' y*_s') / sum_s' w_s' y_s', where effects keep their sign relative to the estimate, so that
    the interval covers 0 where the sign is uncertain. An interval of the absolute value never does. The weights are 1
    for significant effects, and for the others 0 in one estimate and the part of y_s that exceeds .4 of its standard
    error in the other; the interval holds those of both, of t quantiles for the number of groups.

    Args:
        effects: from `attribute(..., n_bootstrap=200)`.
        level: confidence level.
        min_effect: as in `relie`.
        share: of `share_relie` instead.
        fdr: as in `relie`.
        snapshots: compare only these.

    Raises:
        UserError: effects without replicates, or a level outside (0, 1).
    """
    check_level(level)
    if effects.bootstrap is None:
        raise UserError("the effects have no bootstrap replicates: use attribute(..., n_bootstrap=200)")
    where, G = _indices(effects, snapshots), effects.n_groups
    counts = significant(effects, min_effect, fdr=fdr)
    ids, drawn = effects.bootstrap.features, effects.bootstrap.effects.double()
    drawn = drawn * effects.effects[ids].sign()
    sizes = effects.effects.abs().double().cpu()
    if share:
        total, of_drawn = (sizes * counts).sum(0), (drawn * counts[ids]).sum(1, keepdim=True)
        sizes, drawn = (sizes / total).masked_fill(total == 0, 0.0), (drawn / of_drawn).masked_fill(total == 0, 0.0)
    y, drawn, counts = sizes[ids][:, where], drawn[..., where], counts[ids][:, where]
    # the spread of means of resampled groups lacks the degree of freedom of the mean
    scale = (G / (G - 1)) ** 0.5 if G > 1 else float("nan")
    width = stats.t_quantile((1 + level) / 2, G) * scale
    excess = ((y - EXCESS * scale * drawn.std(0, correction=0)) / y).clamp_min(0).nan_to_num(0.0)
    ends: list[tuple[Tensor, Tensor]] = []
    for others in (torch.zeros_like(y), excess):
        weights = torch.where(counts, 1.0, others)
        total = (weights * y).sum(-1, keepdim=True)
        estimate = y / total
        error = width * ((drawn - estimate * (weights * drawn).sum(-1, keepdim=True)) / total).std(0, correction=0)
        ends.append((estimate - error, estimate + error))
    undefined = ~counts.any(-1, keepdim=True)
    low, high = (torch.full((len(effects.effects), len(where)), torch.nan, dtype=torch.float64) for _ in range(2))
    low[ids] = torch.minimum(*(least for least, _ in ends)).clamp(-1, 1).masked_fill(undefined, torch.nan)
    high[ids] = torch.maximum(*(most for _, most in ends)).clamp(-1, 1).masked_fill(undefined, torch.nan)
    return low, high


def effect_interval(effects: Effects, level: float = 0.95) -> tuple[Float[Tensor, "F S"], Float[Tensor, "F S"]]:
    """Interval of the effects, in logits: t standard errors on either side, for the number of groups.

    NaN for features that are active at no snapshot, and with a single group.

    Args:
        effects: from `attribute`.
        level: confidence level.

    Raises:
        UserError: a level outside (0, 1).
    """
    check_level(level)
    width = stats.t_quantile((1 + level) / 2, effects.n_groups) * effects.standard_errors
    width = width.masked_fill(~effects.active.any(-1, keepdim=True), torch.nan)
    return effects.effects - width, effects.effects + width


def sign_changes(effects: Effects, min_effect: float | None = None, *, fdr: float = FDR) -> pd.DataFrame:
    """Where the effect of a feature changes sign, from one snapshot with a significant effect to the next such one.

    Args:
        effects: from `attribute`.
        min_effect: as in `significant`.
        fdr: as in `significant`.

    Returns:
        A row per change, the largest first: feature, from_snapshot and to_snapshot (indices), from_label, to_label,
        from_ie and to_ie (the effects there, in logits), least (the smaller |IE| of the two) and q (the larger
        `q_values` of the two).

    Raises:
        UserError: as in `significant`.
    """
    counts, q = significant(effects, min_effect, fdr=fdr), q_values(effects)
    rows: list[dict[str, Any]] = []
    up, down = counts & (effects.effects > 0), counts & (effects.effects < 0)
    for feature in (up.any(-1) & down.any(-1)).nonzero().flatten().tolist():
        for a, b in pairwise(counts[feature].nonzero().flatten().tolist()):
            before, after = (float(effects.effects[feature, s]) for s in (a, b))
            if before * after < 0:
                rows.append(
                    {
                        "feature": feature,
                        "from_snapshot": a,
                        "to_snapshot": b,
                        "from_label": effects.labels[a],
                        "to_label": effects.labels[b],
                        "from_ie": before,
                        "to_ie": after,
                        "least": min(abs(before), abs(after)),
                        "q": float(q[feature, [a, b]].max()),
                    }
                )
    columns = ("feature", "from_snapshot", "to_snapshot", "from_label", "to_label", "from_ie", "to_ie", "least", "q")
    table = pd.DataFrame(rows, columns=list(columns))
    return table.sort_values("least", ascending=False, ignore_index=True)


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


def signed_classes(effects: Effects, min_effect: float | None = None, *, fdr: float = FDR) -> np.ndarray:
    """Class of every feature by its signed effects, as a string.

    "helpful" or "harmful" if all significant effects have one sign, "turns helpful" or "turns harmful" if it changes
    once, "wavers" if it changes more often, "undefined" if no effect is significant. Arguments as in `significant`.
    """
    counts = significant(effects, min_effect, fdr=fdr)
    signs = torch.where(counts, effects.effects.sign(), 0.0).tolist()

    def name(row: list[float]) -> str:
        kept = [sign for sign in row if sign]
        if not kept:
            return UNDEFINED
        turns = sum(a != b for a, b in pairwise(kept))
        word = "helpful" if kept[-1] > 0 else "harmful"
        return word if not turns else f"turns {word}" if turns == 1 else "wavers"

    return np.array([name(row) for row in signs], dtype=object)


def classify(
    effects: Effects, min_effect: float | None = None, *, fdr: float = FDR, low: float = 0.3, high: float = 0.7
) -> pd.DataFrame:
    """Classes of the features that are active on the prompts: a row per feature.

    Columns: feature; class, centre_of_mass and peak (the snapshot with the largest value, -1 if undefined), all of
    share RelIE; relie_class (of RelIE), signed_class and, with three snapshots, three_way (of RelIE, as in Bayazit et
    al.).

    Args:
        effects: from `attribute`.
        min_effect: as in `significant`.
        fdr: as in `significant`.
        low: as in `classes`.
        high: as in `classes`.

    Raises:
        UserError: a single snapshot, or low and high that are not shares in order.
    """
    share, raw = (find(effects, min_effect, fdr=fdr) for find in (share_relie, relie))
    kept = effects.active.any(-1)
    peak = torch.where(share.isnan().any(-1), -1, share.nan_to_num(0.0).argmax(-1))
    columns: dict[str, Any] = {
        "feature": kept.nonzero().flatten().numpy(),
        "class": classes(share[kept], low, high),
        "centre_of_mass": centre_of_mass(share)[kept].numpy(),
        "peak": peak[kept].numpy(),
        "relie_class": classes(raw[kept], low, high),
        "signed_class": signed_classes(effects, min_effect, fdr=fdr)[kept.numpy()],
    }
    if len(effects.labels) == 3:
        columns["three_way"] = three_way_classes(raw[kept], effects.labels, low, high)
    return pd.DataFrame(columns)


def check_level(level: float) -> None:
    """Refuse the level of an interval that is outside (0, 1).

    Raises:
        UserError: it is.
    """
    if not 0 < level < 1:
        raise UserError(f"level={level} must be between 0 and 1; 0.95 is usual")


def _sizes(effects: Effects, share: bool, counts: Bool[Tensor, "F S"]) -> Float[Tensor, "F S"]:
    """|IE|, or its share of the snapshot's total, where it counts; 0 elsewhere."""
    sizes = torch.where(counts, effects.effects.abs().cpu(), 0.0)
    return (sizes / sizes.sum(0)).nan_to_num(0.0) if share else sizes


def _relative(
    effects: Effects, share: bool, counts: Bool[Tensor, "F S"], snapshots: Sequence[int] | None
) -> Float[Tensor, "F s"]:
    return shares(_sizes(effects, share, counts)[:, _indices(effects, snapshots)])


def _indices(effects: Effects, snapshots: Sequence[int] | None) -> list[int]:
    chosen = range(len(effects.labels)) if snapshots is None else snapshots
    return [find_snapshot(effects.labels, s) for s in chosen]


def _check_thresholds(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise UserError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
