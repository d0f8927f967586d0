"""Relative effects over snapshots: RelIE and RelDec, which effects are significant, classes, and sign changes.

With x_is >= 0 the size of feature i at snapshot s, a relative size is x_is / sum_s' x_is', a point on the simplex:

    RelIE          x = |IE_is|                        Bayazit et al. (arXiv 2509.05291, section 3)
    share RelIE    x = |IE_is| / sum_j |IE_js|        new here
    RelDec         x = norm of the decoder row

Logits grow in training, and the effects of most features with them, so that RelIE calls most features "emerged". Share
RelIE compares what part of its snapshot's total effect a feature has. Pairwise, x_ib / (x_ia + x_ib) is 0 for features
that act only at snapshot a, 1 only at b. All are NaN if no effect of the feature is significant (Bayazit et al. set .5
and call the feature shared; `min_effect=0` leaves out only features without any effect, as they do).

One rule says which effects count, here and in timelines (`significant`). The effect of feature i at s is a mean over N
prompts of x_n. If it is 0 because each x_n could as well have the opposite sign, as when the answers of a task are
shuffled, then r = |sum x_n| / sqrt(sum x_n^2) has

    P(r >= t)  <=  2 c P(Z >= t),   c = 1 / (4 P(Z >= sqrt(2))) = 3.18,   Z standard normal,

for any number of prompts and any sizes (Bentkus and Dzindzalieta 2015, Bernoulli 21, 1205; a t-test is wrong for
features that are active on a few prompts). These p-values are corrected for the number of features and snapshots
(Benjamini and Hochberg 1995). Prompts count as independent.

The absolute value is taken after averaging over prompts. It hides the sign: a feature can turn from harmful to helpful.
`sign_changes` lists those, and `classify` has a signed class too. Bayazit et al. classify features at two and three
snapshots; centres of mass, signed classes and intervals are new here.

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

from crosslens import stats
from crosslens.errors import UserError
from crosslens.snapshots.lookup import find_snapshot

UNDEFINED = "undefined"
FDR = 0.05  # expected part of the effects called significant that are 0


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
    def n_prompts(self) -> int: ...
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
    """Two-sided p-value of every effect against 0, by the bound above; 1 with a single prompt.

    NaN where the feature is not active. Not corrected for the number of effects.

    Args:
        effects: from `attribute`.
    """
    N = effects.n_prompts
    mean, error = effects.effects.double().cpu(), effects.standard_errors.double().cpu()
    # sum x^2 / N = mean^2 + (N - 1) error^2
    squares = mean.square() + ((N - 1) * error.square() if N > 1 else 0.0)
    r = (N**0.5 * mean.abs() / squares.sqrt()).nan_to_num(0.0)
    bound = 2 * norm.sf(r.numpy()) / (4 * norm.sf(2**0.5))
    return torch.from_numpy(np.minimum(bound, 1.0)).masked_fill(~effects.active.cpu(), torch.nan)


def q_values(effects: Effects) -> Float[Tensor, "F S"]:
    """`p_values` adjusted over all active features and snapshots; NaN where the feature is not active.

    Args:
        effects: from `attribute`.
    """
    return torch.from_numpy(stats.q_values(p_values(effects).numpy()))


def significant(effects: Effects, min_effect: float | None = None, *, fdr: float = FDR) -> Bool[Tensor, "F S"]:
    """Which effects count.

    Args:
        effects: from `attribute`.
        min_effect: None applies the false discovery rate; a number, in logits, takes all |IE| above it instead.
        fdr: expected part of the significant effects that are 0.

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
    """Relative indirect effect `|IE_is| / sum_s' |IE_is'|`; rows sum to 1 or are NaN.

    Args:
        effects: from `attribute`.
        min_effect: a row is NaN if none of its effects counts, as in `significant`.
        fdr: as in `significant`.
        snapshots: compare only these, such as the two or three of a plot.

    Raises:
        UserError: no such snapshot, or as in `significant`.
    """
    return _relative(effects, False, significant(effects, min_effect, fdr=fdr), snapshots)


def share_relie(
    effects: Effects, min_effect: float | None = None, *, fdr: float = FDR, snapshots: Sequence[int] | None = None
) -> Float[Tensor, "F s"]:
    """RelIE of each effect's share of its snapshot's total, `|IE_is| / sum_j |IE_js|`; rows sum to 1 or are NaN.

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
    """`[i, a, b]`: the share of snapshot b in |IE| at a and b; NaN if neither counts.

    This is what Bayazit et al. plot for pairs of snapshots.

    Args:
        effects: from `attribute`.
        min_effect: as in `significant`.
        share: compare shares of the snapshots' totals instead of effects.
        fdr: as in `significant`.

    Raises:
        UserError: as in `significant`.
    """
    matters = significant(effects, min_effect, fdr=fdr)
    sizes = _sizes(effects.effects, share)
    return torch.where(matters[:, None, :] | matters[:, :, None], pairwise_shares(sizes), torch.nan)


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
    """Percentile bootstrap interval of `relie` over prompts, (low, high); NaN where it is.

    Replicates keep the sign of each effect relative to its estimate, `sign(IE_is) IE*_is / sum_s' |IE*_is'|`, so that
    the interval covers 0 where the sign is uncertain. An interval of the absolute value never does.

    Args:
        effects: from `attribute(..., n_bootstrap=200)`.
        level: share of the replicates inside.
        min_effect: as in `relie`.
        share: of `share_relie` instead.
        fdr: as in `relie`.
        snapshots: compare only these.

    Raises:
        UserError: effects without replicates, or a level outside (0, 1).
    """
    where = _indices(effects, snapshots)
    estimate = _relative(effects, share, significant(effects, min_effect, fdr=fdr), snapshots)
    drawn = _replicates(effects)
    sizes = _sizes(drawn.effects, share)[..., where]
    signs = drawn.effects[..., where].sign() * effects.effects[drawn.features][:, where].sign()
    low, high = _quantiles(effects, (shares(sizes) * signs).nan_to_num(0.0), level)
    low, high = (torch.where(estimate.isnan(), torch.nan, bound.to(estimate.dtype)) for bound in (low, high))
    return low, high


def effect_interval(effects: Effects, level: float = 0.95) -> tuple[Float[Tensor, "F S"], Float[Tensor, "F S"]]:
    """Percentile bootstrap interval of the signed effects over prompts, in logits; NaN for features without any.

    Args:
        effects: from `attribute(..., n_bootstrap=200)`.
        level: share of the replicates inside.

    Raises:
        UserError: effects without replicates, or a level outside (0, 1).
    """
    return _quantiles(effects, _replicates(effects).effects, level)


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


def _sizes(values: Float[Tensor, "*R F S"], share: bool) -> Float[Tensor, "*R F S"]:
    sizes = values.abs()
    return (sizes / sizes.sum(-2, keepdim=True)).nan_to_num(0.0) if share else sizes


def _relative(
    effects: Effects, share: bool, counts: Bool[Tensor, "F S"], snapshots: Sequence[int] | None
) -> Float[Tensor, "F s"]:
    where = _indices(effects, snapshots)
    sizes = _sizes(effects.effects, share)[:, where]
    return torch.where(counts[:, where].any(-1, keepdim=True), shares(sizes), torch.nan)


def _replicates(effects: Effects) -> Any:
    if effects.bootstrap is None:
        raise UserError("the effects have no bootstrap replicates: use attribute(..., n_bootstrap=200)")
    return effects.bootstrap


def _quantiles(
    effects: Effects, drawn: Float[Tensor, "R A s"], level: float
) -> tuple[Float[Tensor, "F s"], Float[Tensor, "F s"]]:
    """Central interval of replicates, NaN for features without."""
    check_level(level)
    found = np.full((2, len(effects.effects), drawn.shape[-1]), np.nan)
    found[:, effects.bootstrap.features.numpy()] = stats.interval(drawn.numpy(), level)
    low, high = torch.from_numpy(found).unbind()
    return low, high


def _indices(effects: Effects, snapshots: Sequence[int] | None) -> list[int]:
    chosen = range(len(effects.labels)) if snapshots is None else snapshots
    return [find_snapshot(effects.labels, s) for s in chosen]


def _check_thresholds(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise UserError(f"low={low} and high={high} must satisfy 0 <= low < high <= 1")
