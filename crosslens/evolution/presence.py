"""How well each snapshot alone predicts each feature: decodability, a reading of presence beside the decoder norm.

The decoder norm says what the dictionary writes; decodability says what the model holds. For feature i and snapshot s,
with activations x_s scaled as for training:

1. The held-out sequences are cut into two halves, the first A and the second B.
2. On A, ridge regression of f_i on x_s: `w_is = (C_s + lambda_s I)^-1 c_is`, where C_s = Cov_A(x_s),
   c_is = Cov_A(x_s, f_i) and lambda_s = ridge tr(C_s) / D.
3. On B, `R2_is = 1 - sum (f_i - fhat_is)^2 / sum (f_i - mean_A f_i)^2`: 1 if the snapshot predicts the feature exactly,
   0 if no better than the mean of A, below 0 if worse.
4. *Within-token* R2 asks what the context adds: the means of each token type in A are taken off x and f first, on both
   halves. Only tokens whose type occurs twice or more in A take part.
5. A feature is *lexical* if most of its variance lies between token types, else *contextual*. The share is
   epsilon^2 = 1 - (SS_within / (N - K)) / (SS_total / (N - 1)) over N tokens of K types, which is 0 on average for a
   feature that does not depend on the token.

The sums of squares of B are kept for groups of sequences, so that intervals can be computed by resampling groups
(`Decodability.resample`) without encoding anything again. Activations are read once. The sums take S D F numbers in
float64, which two sets of S D F weights in float32 take the place of, a snapshot at a time. Decodability of this kind
is new here; probes (`probes`) ask the same of single features, by classification.
Symbols: B tokens, S snapshots, D d_model, F features, K token types, G groups of sequences.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.held_out import Block, batch_tokens, check_activations, read

RIDGE = 1e-3
GROUPS = 32
_LEAST, _ENOUGH = 4, 20
"""Held-out tokens per dimension: with fewer R2 is not measured, or its births are marked. Intervals of
planted births at 4, 8 and 20 tokens per dimension covered 85, 95 and 99 % (`benchmarks/birth_intervals.py`)."""
_ROUNDING = 1e-9
_JUDGED = 512  # tokens at a time whose features are predicted


@dataclass(frozen=True)
class Decodability:
    """Decodability of every feature at every snapshot. NaN for features that are silent on either half.

    Attributes:
        r2: R2 on the second half, at most 1.
        within: within-token R2; NaN also if no token type occurs twice in the first half.
        between: share of each feature's variance that lies between token types, at most 1; NaN if no type occurs twice.
        n_active: held-out tokens on which each feature is active.
        n_tokens: held-out tokens.
        error: sums of squared errors per group of the second half, for r2 (index 0) and within (1).
        total: sums of squares that they are divided by.
    """

    r2: Float64[np.ndarray, "F S"]
    within: Float64[np.ndarray, "F S"]
    between: Float64[np.ndarray, " F"]
    n_active: Int[np.ndarray, " F"]
    n_tokens: int
    error: Float64[np.ndarray, "2 G F S"] = field(repr=False)
    total: Float64[np.ndarray, "2 G F"] = field(repr=False)

    @property
    def lexical(self) -> Any:
        """Which features have most of their variance between token types (F,); False where that is unknown."""
        return self.between > 0.5

    def curves(self, measure: str) -> Float64[np.ndarray, "F S"]:
        """R2 by name.

        Args:
            measure: "r2" or "within".
        """
        return {"r2": self.r2, "within": self.within}[measure]

    def resample(
        self, measure: str, weights: Float64[np.ndarray, "n G"], features: Any = slice(None)
    ) -> Float64[np.ndarray, "n f S"]:
        """R2 with every group of sequences counted as often as `weights` says, such as draws of a bootstrap.

        Args:
            measure: "r2" or "within".
            weights: how often each group counts in every draw.
            features: which features, as an index or a slice.
        """
        which = ("r2", "within").index(measure)
        error, total = self.error[which][:, features], self.total[which][:, features]
        return _r2(np.tensordot(weights, error, 1), (weights @ total)[..., None])


@torch.no_grad()
def measure_decodability(
    crosscoder: Crosscoder, acts: Activations, *, ridge: float = RIDGE, n_groups: int = GROUPS
) -> Decodability:
    """Measure how well every snapshot alone predicts every feature on held-out tokens.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; the held-out ones are used, half to fit and half to judge.
        ridge: penalty on the weights, in units of the mean variance of a coordinate.
        n_groups: G, groups of sequences to resample. With fewer than 4 G sequences, stretches of tokens count as
            sequences.

    Raises:
        UserError: no or too few activations held out, activations of other snapshots, a number out of range.
    """
    check_activations(crosscoder, acts)
    sums = DecodabilitySums(crosscoder, acts, ridge=ridge, n_groups=n_groups)
    read(crosscoder, acts, sums, purpose="Presence")
    return sums.result()


class DecodabilitySums:
    """The accumulator of `measure_decodability`: fits on the first half, and judges on the second as it comes."""

    def __init__(
        self, crosscoder: Crosscoder, acts: Activations, *, ridge: float = RIDGE, n_groups: int = GROUPS
    ) -> None:
        if ridge <= 0:
            raise UserError(f"ridge={ridge} must be positive, such as {RIDGE}: without it the fit may have no solution")
        if n_groups < 2:
            raise UserError(f"n_groups={n_groups} must be 2 or more")
        types, units = _positions(acts, 4 * n_groups)
        unit_ids, where = np.unique(units, return_inverse=True)
        if len(types) < 2 * n_groups:
            raise UserError(
                f"{len(types)} tokens are held out, decodability needs {2 * n_groups} or more: give "
                "Dataset(held_out_tokens=...) of some thousands"
            )
        D = crosscoder.d_model
        if len(types) < _LEAST * D:
            raise UserError(
                f"{len(types):,} tokens are held out, {len(types) / D:.1f} per dimension: births by R2 need {_LEAST} "
                f"({_LEAST * D:,}), and {_ENOUGH} to be dated well; give Dataset(held_out_tokens={_ENOUGH * D})"
            )
        if len(types) < _ENOUGH * D:
            warnings.warn(
                f"{len(types):,} tokens are held out, {len(types) / D:.1f} per dimension: with fewer than {_ENOUGH} "
                f"({_ENOUGH * D:,} tokens) births by R2 are dated early or late more often than their intervals say; "
                f"give Dataset(held_out_tokens={_ENOUGH * D})",
                stacklevel=4,
            )
        # first half, and n_groups groups of the second, all of the same number of units up to one
        edges = np.linspace(len(unit_ids) // 2, len(unit_ids), n_groups + 1).round().astype(int)
        bounds = np.searchsorted(where, edges)  # (G + 1,) first tokens
        self.split, self.n = int(bounds[0]), len(types)
        self.group = np.searchsorted(bounds, np.arange(self.n), side="right") - 1  # -1 for the first half
        # number the token types of the first half; the others are -1
        seen, counts = np.unique(types[: self.split], return_counts=True)
        numbers = np.full(int(types.max()) + 1, -1)
        numbers[seen] = np.arange(len(seen))
        self.number = numbers[types]
        F, S = crosscoder.cfg.d_sae, crosscoder.n_snapshots
        self.ridge, self.fits = ridge, list[_Fit]()
        self.half = _FirstHalf(crosscoder, counts)
        self.error, self.total = np.zeros((2, n_groups, F, S)), np.zeros((2, n_groups, F))
        self.active = np.zeros((2, F), dtype=np.int64)

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        first, cut = block.first, min(max(self.split - block.first, 0), len(block))
        fitted = block.pairs.tokens < cut
        for half, inside in enumerate((fitted, ~fitted)):
            self.active[half] += block.count(inside).numpy().astype(np.int64)
        if cut:
            self.half.add(block, self.number[first : first + cut])
        if cut == len(block):
            return
        self.fits = self.fits or self.half.fit(self.ridge)
        for start in range(cut, len(block), _JUDGED):
            part = slice(start, min(start + _JUDGED, len(block)))
            tokens = slice(first + part.start, first + part.stop)
            for which, fit in enumerate(self.fits):
                fit.judge(
                    block.scaled[part], block.features[part], self.number[tokens], self.group[tokens],
                    self.error[which], self.total[which],
                )  # fmt: skip

    def result(self) -> Decodability:
        """R2 on the second half."""
        silent = (self.active == 0).any(0)
        self.error[:, :, silent], self.total[:, :, silent] = np.nan, np.nan
        r2, within = (_r2(self.error[i].sum(0), self.total[i].sum(0)[:, None]) for i in range(2))
        return Decodability(r2, within, self.half.between(), self.active.sum(0), self.n, self.error, self.total)


def plan_decodability(n_features: int, n_snapshots: int, d_model: int, n_tokens: int) -> tuple[int, float]:
    """Estimate what `measure_decodability` needs on a CPU, before anything is trained.

    Args:
        n_features: F.
        n_snapshots: S.
        d_model: D.
        n_tokens: held-out tokens.

    Returns:
        Bytes of memory, with the crosscoder and without the process itself; and seconds of one core at 50 GFLOP/s.
    """
    matrix = n_features * n_snapshots * d_model
    block = batch_tokens(n_features)
    # encoder and decoder, sums in float64, two sets of weights; features of a block with what is computed from them;
    # activations of a block, and means of token types, of which there are fewer than half as many as tokens
    held = 24 * matrix + 16 * block * n_features + 12 * (block + n_tokens // 5) * n_snapshots * d_model
    return held, 4 * matrix * n_tokens / 50e9


def _positions(acts: Activations, n_units: int) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Token id and sequence of every held-out activation, in reading order.

    Fewer than `n_units` sequences are cut into stretches of equal length.
    """
    tokens = acts.held_out_tokens()
    kept = acts.keep(tokens)
    N, T = tokens.shape
    sequence = torch.arange(N)[:, None].expand(N, T)
    if n_units > N:
        length = max(1, N * T // n_units)
        sequence = torch.arange(N)[:, None] * T + torch.arange(T) // length
    return tokens[kept].numpy(), sequence[kept].numpy()


def _r2(error: Any, total: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 1 - error / total
    return np.where(np.isfinite(found), found, np.nan)


class _FirstHalf:
    """Sums over the first half, in float64: of x, f and their products, and of x and f for every token type."""

    def __init__(self, crosscoder: Crosscoder, counts: Int[np.ndarray, " K"]) -> None:
        S, D, F = crosscoder.n_snapshots, crosscoder.d_model, crosscoder.cfg.d_sae
        self.device, self.counts, self.n = crosscoder.W_dec.device, counts, int(counts.sum())
        self.xx = torch.zeros(S, D, D, dtype=torch.float64)
        # a matrix per snapshot: each can go once it is used
        self.fx = [torch.zeros(F, D, dtype=torch.float64) for _ in range(S)]
        self.squares = np.zeros(F)
        self.type_x = torch.zeros(len(counts), S, D, dtype=torch.float64)
        self.type_f: Any = scipy.sparse.csr_array((len(counts), F))

    def add(self, block: Block, number: Int[np.ndarray, " b"]) -> None:
        """Add the first tokens of a block, given the number of their types."""
        x, (tokens, features, values) = block.scaled[: len(number)], block.pairs
        inside = tokens < len(number)
        # one snapshot at a time, in float64: where the mean is large, little of the sum of squares is variance
        for s in range(x.shape[1]):
            rows = x[:, s].double()
            self.xx[s] += (rows.T @ rows).cpu()
            self.fx[s] += block.sum_by_feature(block.scaled[:, s], values * inside).cpu()
        self.type_x.index_add_(0, torch.from_numpy(number), x.double().cpu())
        kept = values[inside].double().cpu().numpy()
        where = number[tokens[inside].cpu().numpy()], features[inside].cpu().numpy()
        self.squares += np.bincount(where[1], kept**2, len(self.squares))
        self.type_f = self.type_f + scipy.sparse.coo_array((kept, where), shape=self.type_f.shape).tocsr()

    def fit(self, ridge: float) -> list[_Fit]:
        """Fit both regressions; the sums of products are used up."""
        S = len(self.xx)
        x_mean, f_mean = self.type_x.sum(0) / self.n, torch.from_numpy(self.type_f.sum(0)) / self.n
        weights: list[list[Tensor]] = [[], []]  # (D, F) each, as the sums go
        for s in range(S):
            products, self.fx[s] = self.fx[s], torch.empty(0)
            total = self.type_x[:, s].sum(0)
            xx, fx = self.xx[s] - total.outer(x_mean[s]), products - f_mean.outer(total)
            weights[0].append(_ridge(xx, fx, ridge, self.xx[s]).to(self.device))
            of_types = self.type_x[:, s] / torch.from_numpy(self.counts)[:, None]  # means
            xx = self.xx[s] - self.type_x[:, s].T @ of_types
            fx = products.sub_(torch.from_numpy(self.type_f.T @ of_types.numpy()))
            weights[1].append(_ridge(xx, fx, ridge, self.xx[s]).to(self.device))
        # types that occur once say nothing about a mean: they are left out
        again = np.flatnonzero(self.counts > 1)
        place = np.full(len(self.counts) + 1, -1)  # the last is that of types that the first half does not have
        place[again] = np.arange(len(again))
        counts = self.counts[again]
        type_x = (self.type_x[again] / torch.from_numpy(counts)[:, None, None]).float()
        shares = scipy.sparse.dia_array((1 / counts[None], 0), shape=(len(counts), len(counts)))
        type_f = (shares @ self.type_f[again]).tocsr().astype(np.float32)
        return [
            _Fit(weights[0], x_mean[None].float(), f_mean[None].float().numpy()),
            _Fit(weights[1], type_x, type_f, place),
        ]

    def between(self) -> Float64[np.ndarray, " F"]:
        """Share of every feature's variance between token types (epsilon squared)."""
        K, squares = len(self.counts), self.squares
        within = squares - (self.type_f**2).T @ (1 / self.counts)
        total = squares - self.type_f.sum(0) ** 2 / self.n
        with np.errstate(invalid="ignore", divide="ignore"):
            found = 1 - (within / (self.n - K)) / (total / (self.n - 1))
        return np.where(np.isfinite(found) & (total > 0), found, np.nan)


@dataclass(frozen=True)
class _Fit:
    """Weights (D, F) of every snapshot, and the means that x and f are compared with: one row, or one per token type.

    `place` maps the number of a type to its row, or to -1 if it has none.
    """

    weights: list[Tensor]
    x_means: Float[Tensor, "K S D"]
    f_means: Any
    place: Int[np.ndarray, " n"] | None = None

    def judge(
        self,
        x: Float[Tensor, "B S D"],
        features: Float[Tensor, "B F"],
        number: Int[np.ndarray, " B"],
        group: Int[np.ndarray, " B"],
        error: Float64[np.ndarray, "G F S"],
        total: Float64[np.ndarray, "G F"],
    ) -> None:
        """Add the squared errors, and the squares that they are compared with, of some tokens of the second half."""
        if self.place is None:
            rows = np.zeros(len(x), dtype=int)
        else:
            rows = self.place[number]
            kept = torch.from_numpy(np.flatnonzero(rows >= 0)).to(x.device)
            x, features, group, rows = x[kept], features[kept], group[rows >= 0], rows[rows >= 0]
        if not len(rows):
            return
        means = self.f_means[rows]
        means = torch.from_numpy(means if isinstance(means, np.ndarray) else means.toarray()).to(features.device)
        around = features - means
        # groups are of tokens in a row
        groups, sizes = np.unique(group, return_counts=True)
        for g, part in zip(groups, around.split(sizes.tolist()), strict=True):
            total[g] += part.square().sum(0).double().cpu().numpy()
        x = x - self.x_means[rows].to(x.device)
        for s, weights in enumerate(self.weights):
            left = torch.addmm(around, x[:, s], weights, alpha=-1).square_()
            for g, part in zip(groups, left.split(sizes.tolist()), strict=True):
                error[g, :, s] += part.sum(0).double().cpu().numpy()


def _ridge(
    xx: Float64[Tensor, "D D"], fx: Float64[Tensor, "F D"], ridge: float, uncentred: Float64[Tensor, "D D"]
) -> Float[Tensor, "D F"]:
    """`(xx + ridge tr(xx) / D)^-1 fx^T` in float32; zero where xx is nothing but the rounding of `uncentred`."""
    if xx.trace() <= _ROUNDING * uncentred.trace():
        return torch.zeros(fx.shape[::-1])
    factor = torch.linalg.cholesky(xx + ridge * xx.trace() / len(xx) * torch.eye(len(xx), dtype=xx.dtype))
    return torch.cholesky_solve(fx.T, factor).float()
