"""Directions of features: how they rotate, and how many dimensions they take up.

1. Cosines between the decoder rows of a feature at all pairs of snapshots, where both rows are long enough to have a
   direction (`min_norm` of the feature's largest). `rotation_per_interval` counts, for every pair of neighbouring
   snapshots, the features that rotate most between the two, and gives the median angle, in degrees, per interval and
   per doubling of training: what is learnt goes with the logarithm of the tokens rather than with their number, and
   snapshots are spaced accordingly, so angles per token would rank the intervals by their length.
2. The null of rotation: how far would a row seem to turn by chance? Each half h of the held-out tokens gives its own
   estimate of all rows together, by least squares without the dictionary's decoder (`half_cosines`):

       w_s^h = argmin_w E_h |x_s - mean_h x_s - sum_i (f_is - mean_h f_is) w_i|^2

   The angle between the two estimates at the *same* snapshot is what sampling alone makes of no rotation; the angle
   between estimates of different halves at *neighbouring* snapshots is to be compared with it. An estimate of one row
   with the others as they are in the dictionary would not do: both halves would inherit what the dictionary did not
   learn of a snapshot, agree too well there, and every feature of two copies of one snapshot would seem to rotate.
   Held-out tokens are fewer than those for training, so the null overstates the noise of the rows.
   `seeds.rotation_of_partners` compares the same feature in two seeds.
   A change of basis that all activations share turns every row. `linear_maps` gives the linear map by which one
   snapshot best predicts the next; the angle that is left after it is a rotation of the feature among the others.
3. Dimensionality, with j over the features present at s, including i:

       D_is = |w_is|^4 / sum_j (w_is . w_js)^2

   is 1 for a feature that is orthogonal to all others, and 1/n for one of n equal ones. The sum over features is at
   most D. Here `w_is = rms(f_i) W_dec[i, s]`; with `w_is = W_dec[i, s]` it is the formula of Elhage et al. (arXiv
   2209.10652), `|W_i|^2 / sum_j (W_i/|W_i| . W_j)^2`, which is for features of equal size: the scale of a row is free
   in a dictionary, as long as its activations shrink as it grows. Since `sum_j (w_i . w_j)^2` is
   `w_i (sum_j w_j^T w_j) w_i^T`, a D x D matrix is enough; no F x F matrix is made.

Ge et al. (arXiv 2509.17196) plot rotation and dimensionality without formulas; the rest is new here.

Symbols: S snapshots (S1 their neighbouring pairs), D d_model, F features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import each, in_rounds
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_columns, snapshot_pairs
from crosslens.evolution.firing import Firing, measure_firing
from crosslens.evolution.held_out import HeldOut, read, sums_by_column
from crosslens.evolution.lifecycles import PRESENCE, check_presence, relative_norms, require_two_snapshots

_BLOCK = 4096  # features at a time
_MIN_ACTIVE = 10  # tokens of a half, from which an estimate of a row is more than noise
_COLUMNS = 64  # of activations at a time
_TINY = torch.finfo(torch.float32).tiny
_TIE = 1e-5  # cosines that differ by less are equal but for rounding


@torch.no_grad()
def rotation(crosscoder: Crosscoder, reference: int = -1, *, min_norm: float = 0.05) -> Float[Tensor, "F S"]:
    """Compare every decoder row with the feature's row at a reference snapshot.

    Args:
        crosscoder: any.
        reference: index of the reference snapshot; the last by default.
        min_norm: rows below this share of the feature's largest norm have no direction. Rows can start equal at all
            snapshots, so without this limit features that were never used would seem not to have rotated.

    Returns:
        Cosines in [-1, 1], NaN where the row or the reference row has no direction.

    Raises:
        UserError: `reference` is out of range.
    """
    rows, S = crosscoder.W_dec_by_snapshot, crosscoder.n_snapshots
    if not -S <= reference < S:
        raise UserError(f"reference={reference} is out of range: give a snapshot index from {-S} to {S - 1}")
    directed = relative_norms(crosscoder.decoder_norms) >= min_norm
    # one snapshot at a time: another (F, S, D) tensor is too much for large crosscoders
    cosines = [cosine_similarity(rows[:, s].float(), rows[:, reference].float(), dim=-1).cpu() for s in range(S)]
    return torch.stack(cosines, 1).masked_fill(~(directed & directed[:, [reference]]), torch.nan)


@torch.no_grad()
def decoder_cosines(
    crosscoder: Crosscoder, features: Int[Tensor, " n"] | None = None, *, min_norm: float = 0.05
) -> Float[Tensor, "n S S"]:
    """Compute the cosines between the decoder rows of each feature at every pair of snapshots.

    Args:
        crosscoder: any.
        features: indices; all features if None.
        min_norm: rows below this share of the feature's largest norm have no direction.

    Returns:
        Cosines in [-1, 1], NaN where either row has no direction. They take n * S * S * 4 bytes.

    Raises:
        UserError: decoder norms that are not finite.
    """
    chosen = torch.arange(crosscoder.cfg.d_sae) if features is None else features
    S = crosscoder.n_snapshots
    out = torch.empty(len(chosen), S, S)
    directed = relative_norms(crosscoder.decoder_norms) >= min_norm
    for ids, block in zip(chosen.split(_BLOCK), out.split(_BLOCK), strict=True):
        rows = normalize(crosscoder.W_dec_by_snapshot[ids.to(crosscoder.W_dec.device)].float(), dim=-1, eps=1e-30)
        both = directed[ids, :, None] & directed[ids, None, :]
        block.copy_((rows @ rows.mT).clamp(-1, 1).cpu().masked_fill(~both, torch.nan))
    return out


class HalfCosines(NamedTuple):
    """Cosines between decoder rows estimated on different halves of the held-out tokens, by `half_cosines`."""

    same: Float[Tensor, "F S"]
    """At the same snapshot: 1 but for the noise of the estimates."""
    next: Float[Tensor, "F S-1"]
    """At a snapshot and the one after it: mean of first half against second, and second against first."""


@torch.no_grad()
def half_cosines(crosscoder: Crosscoder, acts: Activations | HeldOut) -> HalfCosines:
    """Estimate all decoder rows on each half of the held-out tokens, and compare the estimates.

    Args:
        crosscoder: any.
        acts: activations of its snapshots.

    Returns:
        Cosines, NaN for features that are active on fewer than 10 tokens of either half.

    Raises:
        UserError: no activations held out, or those of other snapshots.
    """
    held = read(crosscoder, acts, purpose="Directions")
    (n, F), S, D = held.f.shape, crosscoder.n_snapshots, crosscoder.d_model
    parts = slice(n // 2), slice(n // 2, n)
    same, following = torch.empty(F, S), torch.empty(F, S - 1)
    before: Tensor | None = None
    shared = None if crosscoder.gate_per_snapshot else [_standardised(held.f[part]) for part in parts]

    def rows_at(s: int) -> Float[Tensor, "2 F D"]:
        here = torch.full((2, F, D), torch.nan)
        halves = shared or [_standardised(held.gated(s)[part]) for part in parts]
        for half, (part, (ids, f)) in enumerate(zip(parts, halves, strict=True)):
            x = held.x[s][part].to(held.device)
            here[half, ids] = normalize(_solve(f, x - x.mean(0)), dim=-1, eps=1e-30).cpu()
        return here

    # one snapshot at a time: a (2, F, S, D) tensor is too much for large crosscoders
    for s, here in enumerate(in_rounds(rows_at, range(S))):
        one, other = here
        same[:, s] = (one * other).sum(-1).clamp(-1, 1)
        if before is not None:
            both = (before[0] * other).sum(-1) + (before[1] * one).sum(-1)
            following[:, s - 1] = (both / 2).clamp(-1, 1)
        before = here
    return HalfCosines(same, following)


def _standardised(f: Any) -> tuple[Int[Tensor, " K"], Any]:
    """The features (n, F) that are active often enough, and f of them over its standard deviation and sqrt(n)."""
    n = f.shape[0]
    ids = np.flatnonzero((f > 0).sum(0) >= _MIN_ACTIVE)
    f = f[:, ids].astype(np.float64)
    variance = f.power(2).sum(0) / max(n, 1) - (f.sum(0) / max(n, 1)) ** 2
    scales = 1 / np.sqrt(variance.clip(min=_TINY) * max(n, 1))
    return torch.from_numpy(ids), (f @ scipy.sparse.dia_array((scales[None], 0), shape=(len(ids),) * 2)).astype(
        np.float32
    )


def _solve(
    f: Any, x: Float[Tensor, "n D"], *, ridge: float = 1e-2, tolerance: float = 1e-4, max_steps: int = 30
) -> Float[Tensor, "K D"]:
    """Rows of least squares, up to a factor for each, by conjugate gradients from zero.

    Args:
        f: of the features on half of the tokens, with a variance of 1 / n.
        x: activations around their mean.
        ridge: added to the variance of every feature, as a share of it.
        tolerance: size of the residual, as a share of its size at zero, at which to stop.
        max_steps: at which to stop all the same. Few are needed where there are more tokens than features, because
            features hardly overlap; with fewer tokens rows are not determined, and stopping early damps their noise.
    """
    by_token, by_feature = f.T.tocsc(), f.tocsc()
    columns: list[tuple[Tensor, ...]] = []
    for part in x.split(_COLUMNS, 1):  # what a step reads and writes of some columns stays in the processor's cache
        left = sums_by_column(by_feature, part.contiguous())
        power = left.square().sum(0)
        columns.append((torch.zeros_like(left), left, left.clone(), power, tolerance**2 * power))
    for _ in range(max_steps):
        if not any((power > enough).any() for *_, power, enough in columns):
            break
        for rows, left, step, power, _ in columns:
            seen = sums_by_column(by_token, step)
            seen -= seen.mean(0)  # f has a mean, and its products are to be covariances
            moved = sums_by_column(by_feature, seen).add_(step, alpha=ridge)
            length = power / (step * moved).sum(0).clamp_(min=_TINY)
            rows.addcmul_(step, length)
            left.addcmul_(moved, length, value=-1)
            last = power.clone()
            power.copy_(left.square().sum(0))
            step.mul_(power / last.clamp(min=_TINY)).add_(left)
    return torch.cat([rows for rows, *_ in columns], 1)


@torch.no_grad()
def linear_maps(crosscoder: Crosscoder, acts: Activations | HeldOut, *, ridge: float = 1e-3) -> Float[Tensor, "S1 D D"]:
    """Fit the linear map from the activations of every snapshot to those of the next one.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; the held-out ones are used, scaled as for the crosscoder.
        ridge: added to every variance, as a share of their mean.

    Returns:
        For every pair of neighbours the matrix M of least squares, `x_after - mean ~ (x_before - mean) M`.

    Raises:
        UserError: no activations held out, or those of other snapshots.
    """
    held = read(crosscoder, acts, purpose="Linear maps")
    covariances = held.covariances

    def map_from(s: int) -> Float[Tensor, "D D"]:
        own = covariances[s]
        size = own.diagonal().mean().clamp(min=_TINY)
        return torch.linalg.solve(own + ridge * size * torch.eye(len(own)), held.covariance(s, s + 1)).float()

    return torch.stack(each(map_from, range(crosscoder.n_snapshots - 1)))


def rotation_per_interval(
    crosscoder: Crosscoder,
    alive: Bool[Tensor, " F"] | None = None,
    halves: HalfCosines | None = None,
    maps: Float[Tensor, "S1 D D"] | None = None,
    *,
    min_norm: float = 0.05,
    max_cosine: float = 0.9,
) -> pd.DataFrame:
    """Measure how far features rotate between each pair of neighbouring snapshots, and count those that do.

    Args:
        crosscoder: trained on two snapshots or more.
        alive: features to count, such as `evolve(...).lifecycles()["alive"]`; all with a decoder if None.
        halves: the result of `half_cosines`, for the null.
        maps: the result of `linear_maps`.
        min_norm: rows below this share of the feature's largest norm have no direction.
        max_cosine: a feature rotates if its cosine between two neighbours is below this at least once.

    Returns:
        A row per interval: before, after (indices), from, to (labels), from_step, to_step, from_tokens, to_tokens;
        at_edge (the first or last interval: what rotates most here may rotate more outside of the snapshots); n
        (features with a direction at both ends); median_cosine (of these); angle (median, in degrees), halves_angle and
        null_angle (medians of the angle between estimates on different halves at neighbouring snapshots, and at the
        same one: the geometric mean of the cosines at both ends); beyond_null (share of the features whose halves_angle
        exceeds their null_angle, equal ones counted half; half of them do by chance); mapped_angle (median angle left
        after the linear map from all activations at `before` to those at `after`); doublings (of tokens, or of steps
        where tokens are unknown), angle_per_doubling, null_per_doubling; rotated (features whose largest rotation is
        here); share (of all features that rotate); largest (True in the first row with the largest `rotated`, nowhere
        if no feature rotates). halves_angle, null_angle and beyond_null are NaN without `halves`, mapped_angle
        without `maps`, and doublings for an interval that begins at 0 or without steps.

    Raises:
        UserError: one snapshot only.
    """
    S = crosscoder.n_snapshots
    require_two_snapshots("rotation", S)
    rows = crosscoder.W_dec_by_snapshot.detach()
    directed = relative_norms(crosscoder.decoder_norms) >= min_norm
    if alive is not None:
        directed &= alive[:, None]
    cosines = torch.stack(
        [cosine_similarity(rows[:, s].float(), rows[:, s + 1].float()) for s in range(S - 1)], 1
    ).cpu()
    cosines = cosines.masked_fill(~(directed[:, 1:] & directed[:, :-1]), torch.nan)
    lowest, where = cosines.nan_to_num(torch.inf).min(1)
    rotated = torch.bincount(where[lowest < max_cosine], minlength=S - 1)
    snapshots = snapshot_columns(crosscoder)
    table = pd.DataFrame({"before": np.arange(S - 1), "after": np.arange(1, S)})
    for unit, suffix in (("label", ""), ("step", "_step"), ("tokens", "_tokens")):
        table[f"from{suffix}"] = snapshots[unit].array[:-1]
        table[f"to{suffix}"] = snapshots[unit].array[1:]
    table["at_edge"] = [s in (0, S - 2) for s in range(S - 1)]
    table["n"] = (~cosines.isnan()).sum(0).numpy()
    table["median_cosine"] = np.array([_median(column) for column in cosines.T])
    nothing = torch.full_like(cosines, torch.nan)
    between, null = nothing, nothing
    if halves is not None:
        between = halves.next.masked_fill(cosines.isnan(), torch.nan)
        null = (halves.same[:, :-1].clamp(min=0) * halves.same[:, 1:].clamp(min=0)).sqrt()
        null = null.masked_fill(between.isnan(), torch.nan)
    mapped = nothing
    if maps is not None:
        # one snapshot at a time: another (F, S, D) tensor is too much for large crosscoders
        left = [
            cosine_similarity(rows[:, s].float() @ maps[s].to(rows.device), rows[:, s + 1].float())
            for s in range(S - 1)
        ]
        mapped = torch.stack(left, 1).cpu().clamp(-1, 1).masked_fill(cosines.isnan(), torch.nan)
    of = (("angle", cosines), ("halves_angle", between), ("null_angle", null), ("mapped_angle", mapped))
    for name, values in of:
        table[name] = np.array([_median(column) for column in values.acos().rad2deg().T])
    compared = (~null.isnan()).sum(0)
    beyond = (between < null - _TIE).sum(0) + ((between - null).abs() <= _TIE).sum(0) / 2
    table["beyond_null"] = (beyond / compared).numpy()  # NaN where nothing is compared
    table["doublings"] = _doublings(snapshots)
    for name in ("angle", "null"):
        angle = table["angle" if name == "angle" else "null_angle"]
        table[f"{name}_per_doubling"] = angle / table["doublings"]
    table["rotated"] = rotated.numpy()
    table["share"] = (rotated / rotated.sum()).numpy()
    table["largest"] = (torch.arange(S - 1) == rotated.argmax()).numpy() & bool(rotated.sum())
    return table


def cosines_of_pairs(crosscoder: Crosscoder, alive: Bool[Tensor, " F"]) -> pd.DataFrame:
    """Summarise the cosines between the decoder rows of live features, for every pair of snapshots.

    Args:
        crosscoder: any.
        alive: the features to summarise.

    Returns:
        A row per pair of snapshots: snapshot, other (indices), label, other_label, step, other_step, n (features with a
        direction at both), and mean, median, low and high (quartiles) of their cosines.
    """
    found = decoder_cosines(crosscoder, alive.nonzero().flatten()).numpy()
    one, other = (index.flatten() for index in np.indices((crosscoder.n_snapshots,) * 2))
    table = snapshot_pairs(crosscoder, one, other, ("label", "step"))
    return table.join(pd.DataFrame([_summary(found[:, s, t]) for s, t in zip(one, other, strict=True)]))


def _summary(values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Number of the values that are not NaN, their mean, and quartiles."""
    known = values[~np.isnan(values)].astype(np.float64)
    low, median, high = np.quantile(known, (0.25, 0.5, 0.75)) if len(known) else [np.nan] * 3
    mean = known.mean() if len(known) else np.nan
    return {"n": len(known), "mean": mean, "lower_quartile": low, "median": median, "upper_quartile": high}


def _doublings(snapshots: pd.DataFrame) -> Any:
    """Doublings of training between neighbouring snapshots, NaN where they are unknown or infinite."""
    unit = "tokens" if snapshots["tokens"].notna().all() else "step"
    when = snapshots[unit].to_numpy(dtype=float, na_value=np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.log2(when[1:] / when[:-1])
    return np.where(np.isfinite(found) & (found > 0), found, np.nan)


def _median(values: Tensor) -> float:
    kept = values[~values.isnan()].numpy()
    return float(np.median(kept)) if len(kept) else float("nan")


@torch.no_grad()
def feature_dimensionality(
    crosscoder: Crosscoder, acts: Activations | Firing, *, presence: float = PRESENCE
) -> Float[Tensor, "F S"]:
    """Compute `D_is`, the dimensions each feature takes up at every snapshot.

    Args:
        crosscoder: any.
        acts: activations of its snapshots, or the result of `measure_firing`.
        presence: a feature is present where its norm is at least this share of its largest norm.

    Returns:
        Dimensionalities in [0, 1], NaN where a feature is not present or never fires.

    Raises:
        UserError: activations that are not the crosscoder's.
    """
    present, sizes = _present(crosscoder, acts, presence)

    def at(s: int) -> Float[Tensor, " F"]:
        out, ids = torch.full((len(present),), torch.nan, dtype=torch.float64), present[:, s].nonzero().flatten()
        out[ids] = _dimensionality(_rows(crosscoder, ids, s), sizes[ids])
        return out

    return torch.stack(each(at, range(crosscoder.n_snapshots)), 1)


@torch.no_grad()
def total_dimensionality(
    crosscoder: Crosscoder,
    acts: Activations | Firing,
    *,
    presence: float = PRESENCE,
    seed: int = 0,
    dimensionality: Float[Tensor, "F S"] | None = None,
) -> pd.DataFrame:
    """Sum the dimensionality of the present features at every snapshot, and that of as many random directions.

    Args:
        crosscoder: any.
        acts: activations of its snapshots, or the result of `measure_firing`.
        presence: a feature is present where its norm is at least this share of its largest norm.
        seed: seed for the random directions, which have the same number and norms as the present features.
        dimensionality: the result of `feature_dimensionality`, computed here if None.

    Returns:
        A row per snapshot: snapshot, label, step, tokens, present (number of features), total (the sum of `D_is`),
        share (total / D), random_total, random_share; elhage_total, elhage_share, random_elhage_share: the same by the
        formula of Elhage et al. as they wrote it, without the rms.

    Raises:
        UserError: activations that are not the crosscoder's.
    """
    firing = measure_firing(crosscoder, acts)
    present, sizes = _present(crosscoder, firing, presence)
    D = crosscoder.d_model
    snapshots = snapshot_columns(crosscoder)
    snapshots.insert(0, "snapshot", np.arange(len(snapshots)))
    own = feature_dimensionality(crosscoder, firing, presence=presence) if dimensionality is None else dimensionality

    def totals_at(s: int) -> list[float]:
        ids = present[:, s].nonzero().flatten()
        rows, plain = _rows(crosscoder, ids, s), torch.ones(len(ids), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed + s)
        drawn = torch.cat(
            [torch.randn(len(part), D, generator=generator, dtype=torch.float64).float() for part in ids.split(_BLOCK)]
        ).to(rows.device)
        drawn = normalize(drawn, dim=1) * rows.norm(dim=1, keepdim=True)
        others = (_dimensionality(drawn, sizes[ids]), _dimensionality(rows, plain), _dimensionality(drawn, plain))
        return [float(values.sum()) for values in (own[ids, s], *others)]

    totals = each(totals_at, range(crosscoder.n_snapshots))
    total, random_total, elhage, random_elhage = np.array(totals).T
    return snapshots.assign(
        present=present.sum(0).numpy(),
        total=total,
        share=total / D,
        random_total=random_total,
        random_share=random_total / D,
        elhage_total=elhage,
        elhage_share=elhage / D,
        random_elhage_share=random_elhage / D,
    )


def _present(crosscoder: Crosscoder, acts: Activations | Firing, presence: float) -> tuple[Tensor, Tensor]:
    """Which features are present at which snapshots (F, S), excluding silent ones; and rms(f_i) of each."""
    firing = measure_firing(crosscoder, acts)
    check_presence(presence)
    present = (relative_norms(crosscoder.decoder_norms) >= presence) & (firing.rms > 0)[:, None]
    return present, firing.rms


def _rows(crosscoder: Crosscoder, ids: Int[Tensor, " n"], s: int) -> Float[Tensor, "n D"]:
    """Decoder rows of some features at snapshot s."""
    rows = crosscoder.W_dec_by_snapshot
    return rows[ids.to(rows.device), s].float()


def _dimensionality(rows: Float[Tensor, "n D"], sizes: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`|w_i|^4 / sum_j (w_i . w_j)^2` of `w_i = sizes_i rows_i`, in float64 but for the products of matrices.

    The largest norm is made 1, so that no fourth power of a norm in float32 is too large or too small.
    """
    lengths = rows.norm(dim=1).double().cpu() * sizes
    directions, weights = normalize(rows, dim=1), lengths / lengths.max() if len(lengths) else lengths
    second_moment = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    weighted = directions * weights.to(rows)[:, None]
    for block in weighted.split(_BLOCK):
        second_moment += (block.T @ block).double().cpu()
    moment = second_moment.to(rows)
    # of unit rows; both sides of the quotient have |w_i|^2
    found = [((block @ moment) * block).sum(1).double().cpu() for block in directions.split(_BLOCK)]
    return weights.square() / torch.cat(found) if found else weights
