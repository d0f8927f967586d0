"""Directions of features: how they rotate, and how many dimensions they take up.

1. Cosines between the decoder rows of a feature at all pairs of snapshots, where both rows are long enough to have a
   direction (`min_norm` of the feature's largest). `rotation_per_interval` counts, for every pair of neighbouring
   snapshots, the features that rotate most between the two.
2. Dimensionality (after Elhage et al., arXiv 2209.10652, weighted by how active features are). With
   `w_is = rms(f_i) W_dec[i, s]` and j over the features present at s, including i,

       D_is = |w_is|^4 / sum_j (w_is . w_js)^2

   is 1 for a feature that is orthogonal to all others, and 1/n for one of n equal ones. The sum over features is at
   most D. Since `sum_j (w_i . w_j)^2 = w_i (sum_j w_j^T w_j) w_i^T`, a D x D matrix is enough; no F x F matrix is made.

Ge et al. (arXiv 2509.17196) plot rotation and dimensionality without formulas; the counts per interval, this form of
`D_is` and the comparison with random directions are new here.

Symbols: S snapshots, D d_model, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.evolution.lifecycles import (
    Firing,
    check_presence,
    measure_firing,
    relative_norms,
    require_two_snapshots,
    snapshot_columns,
)

_BLOCK = 4096  # features at a time


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


def rotation_per_interval(
    crosscoder: Crosscoder, alive: Bool[Tensor, " F"] | None = None, *, min_norm: float = 0.05, max_cosine: float = 0.9
) -> pd.DataFrame:
    """Count the features that rotate between each pair of neighbouring snapshots.

    Args:
        crosscoder: trained on two snapshots or more.
        alive: features to count, such as `evolve(...)["alive"]`; all with a decoder if None.
        min_norm: rows below this share of the feature's largest norm have no direction.
        max_cosine: a feature rotates if its cosine between two neighbours is below this at least once.

    Returns:
        A row per interval: before, after (indices), from, to (labels), from_step, to_step, from_tokens, to_tokens; n
        (features with a direction at both ends); median_cosine (of these); rotated (features whose largest rotation is
        here); share (of all features that rotate); largest (True in the first row with the largest `rotated`,
        nowhere if no feature rotates).

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
        [torch.nn.functional.cosine_similarity(rows[:, s].float(), rows[:, s + 1].float()) for s in range(S - 1)], 1
    ).cpu()
    cosines = cosines.masked_fill(~(directed[:, 1:] & directed[:, :-1]), torch.nan)
    lowest, where = cosines.nan_to_num(torch.inf).min(1)
    rotated = torch.bincount(where[lowest < max_cosine], minlength=S - 1)
    snapshots = snapshot_columns(crosscoder)
    table = pd.DataFrame({"before": np.arange(S - 1), "after": np.arange(1, S)})
    for unit, suffix in (("label", ""), ("step", "_step"), ("tokens", "_tokens")):
        table[f"from{suffix}"] = snapshots[unit].array[:-1]
        table[f"to{suffix}"] = snapshots[unit].array[1:]
    table["n"] = (~cosines.isnan()).sum(0).numpy()
    table["median_cosine"] = np.array([_median(column) for column in cosines.T])
    table["rotated"] = rotated.numpy()
    table["share"] = (rotated / rotated.sum()).numpy()
    table["largest"] = (torch.arange(S - 1) == rotated.argmax()).numpy() & bool(rotated.sum())
    return table


def _median(values: Tensor) -> float:
    kept = values[~values.isnan()].numpy()
    return float(np.median(kept)) if len(kept) else float("nan")


@torch.no_grad()
def feature_dimensionality(
    crosscoder: Crosscoder, acts: Activations | Firing, *, presence: float = 0.5
) -> Float[Tensor, "F S"]:
    """Compute `D_is`, the dimensions each feature takes up at every snapshot, exactly and in float64.

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
    out = torch.full(present.shape, torch.nan, dtype=torch.float64)
    for s in range(crosscoder.n_snapshots):
        ids, rows = present[:, s].nonzero().flatten(), crosscoder.W_dec_by_snapshot[:, s]
        out[ids, s] = _dimensionality(partial(_weighted, rows, ids, sizes))
    return out


@torch.no_grad()
def total_dimensionality(
    crosscoder: Crosscoder, acts: Activations | Firing, *, presence: float = 0.5, seed: int = 0
) -> pd.DataFrame:
    """Sum the dimensionality of the present features at every snapshot, and that of as many random directions.

    Args:
        crosscoder: any.
        acts: activations of its snapshots, or the result of `measure_firing`.
        presence: a feature is present where its norm is at least this share of its largest norm.
        seed: seed for the random directions, which have the same number and norms as the present features.

    Returns:
        A row per snapshot: snapshot, label, step, tokens, present (number of features), total (the sum of `D_is`),
        share (total / D), random_total, random_share.

    Raises:
        UserError: activations that are not the crosscoder's.
    """
    present, sizes = _present(crosscoder, acts, presence)
    D = crosscoder.d_model
    snapshots = snapshot_columns(crosscoder)
    snapshots.insert(0, "snapshot", np.arange(len(snapshots)))
    totals: list[list[float]] = []
    for s in range(crosscoder.n_snapshots):
        ids, rows = present[:, s].nonzero().flatten(), crosscoder.W_dec_by_snapshot[:, s]
        totals.append(
            [float(_dimensionality(partial(_weighted, rows, ids, sizes, seed)).sum()) for seed in (None, seed + s)]
        )
    total, random_total = np.array(totals).T
    return snapshots.assign(
        present=present.sum(0).numpy(),
        total=total,
        share=total / D,
        random_total=random_total,
        random_share=random_total / D,
    )


def _present(crosscoder: Crosscoder, acts: Activations | Firing, presence: float) -> tuple[Tensor, Tensor]:
    """Which features are present at which snapshots (F, S), excluding silent ones; and rms(f_i) of each."""
    firing = measure_firing(crosscoder, acts)
    check_presence(presence)
    present = (relative_norms(crosscoder.decoder_norms) >= presence) & (firing.rms > 0)[:, None]
    return present, firing.rms


def _weighted(
    rows: Float[Tensor, "F D"], ids: Int[Tensor, " n"], sizes: Float[Tensor, " F"], seed: int | None = None
) -> Iterator[Float[Tensor, "b D"]]:
    """Yield blocks of `rms(f_i) W_dec[i, s]` in float64; with a seed, random vectors of the same norms."""
    generator = torch.Generator().manual_seed(seed or 0)
    for part in ids.split(_BLOCK):
        block = rows[part.to(rows.device)].cpu().double() * sizes[part, None]
        if seed is not None:
            drawn = torch.randn(block.shape, generator=generator, dtype=block.dtype)
            block = normalize(drawn, dim=1) * block.norm(dim=1, keepdim=True)
        yield block


def _dimensionality(blocks: Callable[[], Iterator[Float[Tensor, "b D"]]]) -> Float[Tensor, " n"]:
    """`|w_i|^4 / sum_j (w_i . w_j)^2` of all rows, which `blocks` yields twice so that they are never all in memory."""
    second_moment: Tensor | float = 0.0
    for block in blocks():
        second_moment = second_moment + block.mT @ block
    found = [block.square().sum(1).square() / ((block @ second_moment) * block).sum(1) for block in blocks()]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)
