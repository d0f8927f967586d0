"""How well each snapshot alone predicts each feature: decodability, a reading of presence beside the decoder norm.

The decoder norm says what the dictionary writes; decodability says what the model holds. For feature i and snapshot s,
with activations x_s scaled as for training:

1. The documents of the held-out tokens (`Activations.held_out_documents`) are dealt into G groups of about as many
   tokens each, in the order in which they are read, which is random; every other group is in fold A, the rest in B.
   Where documents are not known a sequence counts as one, and where these make fewer than 8 groups a stretch of tokens.
2. On A, ridge regression of f_i on x_s: `w_is = (C_s + lambda_s I)^-1 c_is`, where C_s = Cov_A(x_s),
   c_is = Cov_A(x_s, f_i) and lambda_s = ridge tr(C_s) / D. It predicts the tokens of B, and one fitted on B those of A,
   so that no document is predicted from itself (cross-fitting).
3. `R2_is = 1 - sum (f_i - fhat_is)^2 / sum (f_i - mean f_i)^2` over all tokens, with the mean of the other fold: 1 if
   the snapshot predicts the feature exactly, 0 if no better than the mean, below 0 if worse.
4. *Within-token* R2 asks what the context adds: the means of each token type in the fold that is fitted on are taken
   off x and f first, on both folds. Only tokens whose type occurs there twice or more take part.
5. A feature is *lexical* if most of its variance lies between token types, else *contextual*. The share is
   epsilon^2 = 1 - (SS_within / (n - K)) / (SS_total / (n - 1)) over n tokens of K types, which is 0 on average for a
   feature that does not depend on the token.

The sums of squares are kept by group, so that intervals can be computed by resampling groups (`Decodability.resample`)
without encoding anything again. With many features and few tokens weights of D numbers for every feature would be most
of the work: predictions on B are then made from the tokens of A on which a feature is active,
`fhat_b = sum_a (x_b (C + lambda I)^-1 x_a) f_a`, which is the same. Decodability of this kind is new here;
probes (`probes`) ask the same of single features, by classification.
Symbols: n held-out tokens, b some of them, S snapshots, D d_model, F features, K token types, G groups of documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import in_rounds
from crosslens.errors import UserError
from crosslens.evolution.held_out import HELD_BYTES, HeldOut, batch_tokens, check_activations, read, sums_by_column

RIDGE = 1e-3
GROUPS = 32
_LEAST_GROUPS = 8
_LEAST, _ENOUGH = 4, 20
"""Held-out tokens per dimension: with fewer R2 is not measured, or its births are marked. Intervals of
planted births at 4, 8 and 20 tokens per dimension covered 80, 87 and 93 % (`benchmarks/birth_intervals.py`)."""
_ROUNDING = 1e-9
_PREDICTED = 1 << 22  # features of tokens at a time that are predicted
_GATHERED = 4  # time of a product over active pairs, relative to one of a dense matrix


@dataclass(frozen=True)
class Decodability:
    """Decodability of every feature at every snapshot. NaN for features that are silent on either fold.

    Attributes:
        r2: R2 of tokens in documents that were not fitted on, at most 1.
        within: within-token R2; NaN also if no token type occurs twice.
        between: share of each feature's variance that lies between token types, at most 1; NaN if no type occurs twice.
        n_active: held-out tokens on which each feature is active.
        n_tokens: held-out tokens.
        error: sums of squared errors per group, for r2 (index 0) and within (1).
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
        """R2 with every group of documents counted as often as `weights` says, such as draws of a bootstrap.

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
    crosscoder: Crosscoder, acts: Activations | HeldOut, *, ridge: float = RIDGE, n_groups: int = GROUPS
) -> Decodability:
    """Measure how well every snapshot alone predicts every feature on held-out tokens.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; the held-out ones are used.
        ridge: penalty on the weights, in units of the mean variance of a coordinate.
        n_groups: most groups of documents to resample; there are fewer with few documents.

    Raises:
        UserError: no or too few activations held out, activations of other snapshots, a number out of range.
    """
    if ridge <= 0:
        raise UserError(f"ridge={ridge} must be positive, such as {RIDGE}: without it the fit may have no solution")
    if n_groups < 2:
        raise UserError(f"n_groups={n_groups} must be 2 or more")
    if not isinstance(acts, HeldOut):
        check_tokens(crosscoder, acts, n_groups)
    held = read(crosscoder, acts, purpose="Presence")
    types, groups = _groups(held.acts, n_groups)
    f, fold = held.f, groups % 2
    (n, F), S, G = f.shape, len(held.x), int(groups.max()) + 1
    error, total = np.zeros((2, G, F, S)), np.zeros((2, G, F))
    step = max(1, _PREDICTED // F)
    # around the means of all tokens together, and around those of each type
    for which, of in enumerate((np.zeros_like(types), types)):
        for judged in (0, 1):
            regression = _Regression(f, of, fold != judged, held.device)
            tokens = np.flatnonzero((fold == judged) & regression.known)
            tokens = tokens[np.argsort(groups[tokens], kind="stable")]
            starts = range(0, len(tokens), step)
            parts = [_Part(f, tokens[at : at + step], groups, held.device) for at in starts]
            for part in parts:
                part.add_squares(total[which], regression.around(part.tokens))

            def left_at(s: int, regression: Any = regression, parts: Any = parts) -> Float64[np.ndarray, "G F"]:
                predict, left = regression.fit(held.x[s], ridge), np.zeros((G, F))
                for part in parts:
                    part.add_squares(left, predict(part.tokens))
                return left

            for s, left in enumerate(in_rounds(left_at, range(S))):
                error[which, :, :, s] += left
    active = np.stack([(f[fold == one] > 0).sum(0) for one in (0, 1)])
    silent = (active == 0).any(0)
    error[:, :, silent], total[:, :, silent] = np.nan, np.nan
    r2, within = (_r2(error[i].sum(0), total[i].sum(0)[:, None]) for i in range(2))
    return Decodability(r2, within, _between(f, types), active.sum(0), n, error, total)


def check_tokens(crosscoder: Crosscoder, acts: Activations, n_groups: int = GROUPS) -> None:
    """Refuse activations that `measure_decodability` cannot use, before they are encoded; warn where they are few.

    Raises:
        UserError: too few held-out tokens, or activations of other snapshots.
    """
    check_activations(crosscoder, acts)
    n = int(acts.keep(acts.held_out_tokens()).sum())
    if n < 2 * n_groups:
        raise UserError(
            f"{n} tokens are held out, decodability needs {2 * n_groups} or more: give "
            "Dataset(held_out_tokens=...) of some thousands"
        )
    D = crosscoder.d_model
    if n < _LEAST * D:
        raise UserError(
            f"{n:,} tokens are held out, {n / D:.1f} per dimension: births by R2 need {_LEAST} "
            f"({_LEAST * D:,}), and {_ENOUGH} to be dated well; give Dataset(held_out_tokens={_ENOUGH * D})"
        )
    if n < _ENOUGH * D:
        warnings.warn(
            f"{n:,} tokens are held out, {n / D:.1f} per dimension: with fewer than {_ENOUGH} "
            f"({_ENOUGH * D:,} tokens) births by R2 are dated early or late more often than their intervals say; "
            f"give Dataset(held_out_tokens={_ENOUGH * D})",
            stacklevel=4,
        )


def _groups(acts: Activations, n_groups: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Type of every held-out token, and its group of documents."""
    tokens = acts.held_out_tokens()
    types = tokens[acts.keep(tokens)].numpy()
    n = len(types)
    _, first, document, sizes = np.unique(
        acts.held_out_documents().numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    middle = np.empty(len(sizes))
    middle[order] = sizes[order].cumsum() - sizes[order] / 2
    # a document larger than a group leaves gaps
    found, group = np.unique(middle * n_groups // n, return_inverse=True)
    return types, group[document] if len(found) >= min(n_groups, _LEAST_GROUPS) else np.arange(n) * n_groups // n


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
    matrix, decoder = n_features * n_snapshots * d_model, n_features * d_model
    activations = n_tokens * n_snapshots * d_model
    # encoder and decoder, activations, and squared errors in float64; dense features of a block with what is computed
    # from them; and what analyses hold of one snapshot
    held = 8 * matrix + min(4 * activations, HELD_BYTES) + 16 * GROUPS * n_features * n_snapshots
    held += 8 * batch_tokens(n_features) * n_features + 36 * decoder + 24 * n_tokens * d_model
    held += 24 * 500 * 256 * n_snapshots + (1 << 25)  # draws of births; what the sums themselves need
    # predictions from weights, or from the tokens fitted on, whichever is less
    return held, 4 * activations * min(n_features, n_tokens // 2) / 50e9


def _between(f: Any, types: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " F"]:
    """Share of the variance of every feature (n, F) between types of tokens, epsilon squared."""
    _, number, counts = np.unique(types, return_inverse=True, return_counts=True)
    n, K = len(types), len(counts)
    means = _means_of_types(f, number, counts)
    squares = f.astype(np.float64).power(2).sum(0)
    within, total = squares - means.power(2) @ counts, squares - (means @ counts) ** 2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 1 - (within / (n - K)) / (total / (n - 1))
    return np.where(np.isfinite(found) & (total > 0), found, np.nan)


def _means_of_types(f: Any, number: Int[np.ndarray, " n"], counts: Int[np.ndarray, " K"]) -> Any:
    """Means of features (n, F) over the tokens of each type, a sparse matrix (F, K)."""
    of_type = scipy.sparse.csr_array((1 / counts[number], (number, np.arange(len(number)))), (len(counts), len(number)))
    return (of_type @ f).T.tocsc()


def _r2(error: Any, total: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 1 - error / total
    return np.where(np.isfinite(found), found, np.nan)


class _Part:
    """Features (n, F) of some tokens, which are given in the order of their groups."""

    def __init__(self, f: Any, tokens: Int[np.ndarray, " b"], groups: Int[np.ndarray, " n"], device: Any) -> None:
        active = f[tokens].tocoo()
        self.tokens = tokens
        self.place = tuple(torch.from_numpy(where).long().to(device) for where in active.coords[::-1])
        self.values = torch.from_numpy(active.data).to(device)
        self.groups, sizes = np.unique(groups[tokens], return_counts=True)
        self.sizes = sizes.tolist()

    def add_squares(self, into: Float64[np.ndarray, "G F"], predicted: Float[Tensor, "F b"]) -> None:
        """Add up by group what predictions, which are overwritten, leave of the features, squared."""
        predicted[self.place] -= self.values
        for g, squares in zip(self.groups, predicted.square_().split(self.sizes, 1), strict=True):
            into[g] += squares.sum(1).double().cpu().numpy()


class _Regression:
    """Ridge regressions of all features on one snapshot, around the means of token types: fitted on some tokens, and
    judged on others.

    Args:
        f: (n, F) features.
        types: type of every token.
        fitted: tokens that are fitted on; the means are theirs.
        device: where products are computed.

    Attributes:
        known: (n,) tokens whose type occurs at least twice among those that are fitted on, so that it has a mean.
    """

    def __init__(self, f: Any, types: Int[np.ndarray, " n"], fitted: Bool[np.ndarray, " n"], device: Any) -> None:
        self.f, self.fitted, self.device = f, np.flatnonzero(fitted), device
        seen, self.counts = np.unique(types[fitted], return_counts=True)
        self.number = np.searchsorted(seen, types).clip(max=len(seen) - 1)
        self.known = (seen[self.number] == types) & (self.counts[self.number] > 1)
        self.columns = f[self.fitted].tocsc()
        means = _means_of_types(self.columns, self.number[self.fitted], self.counts).astype(np.float32)
        self.means: Any = means if len(seen) > 1 else means.toarray()  # (F, K)

    def around(self, tokens: Int[np.ndarray, " b"]) -> Float[Tensor, "F b"]:
        """Means of the features over the types of some tokens."""
        means = self.means[:, self.number[tokens]]
        return torch.from_numpy(means if isinstance(means, np.ndarray) else means.toarray()).to(self.device)

    def fit(self, x: Float[Tensor, "n D"], ridge: float) -> Callable[[Any], Float[Tensor, "F b"]]:
        """Fit the regressions, and return what predicts the features of some tokens."""
        number, own = torch.from_numpy(self.number), torch.from_numpy(self.fitted)
        design = x[own].double()  # where the mean is large, little of the sum of squares is variance
        size = design.square().sum()
        counts = torch.from_numpy(self.counts).double()
        means = torch.zeros(len(counts), x.shape[1], dtype=torch.float64).index_add_(0, number[own], design)
        means /= counts[:, None]
        design -= means[number[own]]
        xx = design.T @ design
        if xx.trace() <= _ROUNDING * size:
            return self.around
        penalty = ridge * xx.trace() / len(xx)
        factor = torch.linalg.cholesky(xx + penalty * torch.eye(len(xx), dtype=torch.float64))
        x = (x - means.float()[number]).to(self.device)
        (n, D), F = design.shape, self.f.shape[1]
        if n * D + _GATHERED * self.columns.nnz >= D * F:
            sums = sums_by_column(self.columns.astype(np.float64), design)
            weights = torch.cholesky_solve(sums.T, factor).T.float().to(self.device)
            return lambda tokens: torch.addmm(self.around(tokens), weights, x[tokens].T)
        # of few tokens predict from sum_a (x_b (xx + penalty)^-1 x_a) f_a, over the tokens where a feature is active
        design = torch.cholesky_solve(design.T, factor).T.float().to(self.device)
        number, shares = number.to(self.device), (1 / counts).float().to(self.device)

        def predict(tokens: Any) -> Float[Tensor, "F b"]:
            of = number[tokens]
            # the mean of a type is a sum over its tokens, too
            means = shares if len(shares) == 1 else (number[own][:, None] == of) * shares[of]
            return sums_by_column(self.columns, torch.addmm(means, design, x[tokens].T))

        return predict
