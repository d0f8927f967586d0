"""Planted births with the traps that a reading of presence can fall into, and scores of the readings.

Every feature has its own orthogonal direction, and one of these kinds (`KINDS`):

- `initial`, `lexical`: there at every snapshot; a contextual feature, and one that depends on the token only.
- `sudden`, `lexical_sudden`: absent, then there from one snapshot to the next.
- `slow`: the share of variance along its direction that it explains grows over five snapshots.
- `hidden`: written with the same strength at all snapshots, but drowned by noise along its direction before its birth.
  Its decoder norm need not change, what can be decoded does.
- `faint`: written at .4 of its strength before some snapshot, but with little noise. Its decoder norm changes by more
  than half, what can be decoded hardly does: it is not born.

A trap (`Trap`) adds an untrained first snapshot, isotropic random vectors of the tokens in all directions; snapshots
that are mostly mean; or no births at all. The truth is not what was planted but what can be decoded: R2 of the best
linear prediction of every feature's values from each snapshot on many tokens, and the lifecycle of this curve.

`judge_births` trains nothing: it matches the features of a given crosscoder with planted ones by the correlation of
their activations, and compares the births found by each measure with the true ones.
Symbols: B tokens, S snapshots, D d_model, N planted features, F found features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from typing_extensions import override

from crosslens.activations.tokens import generator
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.births import date_births, presence_curves
from crosslens.evolution.held_out import held_out_features
from crosslens.evolution.lifecycles import PRESENCE, birth_index
from crosslens.evolution.presence import measure_decodability
from planted.drawn import Drawn

KINDS = ("initial", "lexical", "sudden", "lexical_sudden", "slow", "hidden", "faint")
UNBORN = ("initial", "lexical", "faint")
_NOISE = 0.05
_TYPES = 48  # token types
_LENGTH = 20  # tokens in a sequence
_TRUE_TOKENS = 100_000


@dataclass(frozen=True)
class Trap:
    """What makes births hard to read.

    Attributes:
        n_each: features of each kind.
        d_model: D, at least the number of features and 16 more.
        n_snapshots: S.
        untrained: the first snapshot is an untrained model.
        mean_share: share of the squared norm that is mean at half of the snapshots, in [0, 1).
        births: plant births; otherwise every feature is of a kind that is not born.
    """

    n_each: int = 8
    d_model: int = 80
    n_snapshots: int = 8
    untrained: bool = False
    mean_share: float = 0.0
    births: bool = True

    def __post_init__(self) -> None:
        if self.n_snapshots < 8:
            raise UserError(f"n_snapshots={self.n_snapshots} is too few for a slow birth: give 8 or more")
        if self.d_model < len(KINDS) * self.n_each + 16:
            raise UserError(
                f"d_model={self.d_model} is too small for {len(KINDS)} x n_each={self.n_each} features with directions "
                f"of their own: give {len(KINDS) * self.n_each + 16} or more"
            )
        if not 0 <= self.mean_share < 1:
            raise UserError(f"mean_share={self.mean_share} is not in [0, 1)")


TRAPS = {
    "plain": Trap(),
    "untrained": Trap(untrained=True),
    "mostly_mean": Trap(mean_share=0.85),
    "no_births": Trap(births=False),
}


class PlantedTraps(Drawn):
    """An endless stream of activations of a trap, with tokens for the held-out ones.

    Args:
        trap: what is planted.
        seed: seed for the ground truth and the activations.
        n_tokens: activations per epoch; every epoch is different.
        n_held_out: activations to evaluate on, in sequences of 20.

    Attributes:
        kinds: kind of every planted feature.
        at: snapshot of its planted change; 0 for features that do not change.
    """

    chunk = 4000  # whole sequences

    def __init__(self, trap: Trap, seed: int = 0, *, n_tokens: int = 1_000_000, n_held_out: int = 20_000) -> None:
        super().__init__("planted traps", seed, n_tokens, n_held_out // _LENGTH * _LENGTH)
        self.trap = trap
        rng, draw = np.random.default_rng(seed), generator(seed)
        kinds = KINDS if trap.births else UNBORN
        n = len(KINDS) * trap.n_each
        self.kinds = np.array([kinds[i % len(kinds)] for i in range(n)])
        S, D = trap.n_snapshots, trap.d_model
        self.at = np.where(np.isin(self.kinds, ("initial", "lexical")), 0, rng.integers(2, S - 1, n))
        self.lexical = np.char.startswith(self.kinds.astype(str), "lexical")
        self.probability = torch.from_numpy(rng.uniform(0.03, 0.1, n)).float()
        self.types = torch.rand(n, _TYPES, generator=draw) < 0.08  # of lexical features
        self.types[torch.arange(n), torch.randint(0, _TYPES, (n,), generator=draw)] = True
        self.directions = torch.linalg.qr(torch.randn(D, D, generator=draw))[0]
        self.embedding = torch.randn(_TYPES, D, generator=draw)
        self.mean = torch.randn(S, D, generator=draw)
        self.strength, self.noise = self._schedules()
        self.name_snapshots(range(S))

    def _schedules(self) -> tuple[Float[Tensor, "N S"], Float[Tensor, "N S"]]:
        """Strength of every feature, and standard deviation of the noise along its direction."""
        S, at = self.trap.n_snapshots, self.at[:, None]
        s = np.arange(S)
        strength, noise = np.ones((len(self.at), S)), np.full((len(self.at), S), _NOISE)
        kinds = self.kinds[:, None]
        strength = np.where(np.isin(kinds, ("sudden", "lexical_sudden")) & (s < at), 0.0, strength)
        strength = np.where((kinds == "faint") & (s < at), 0.4, strength)
        # R2 = strength^2 variance / (strength^2 variance + noise^2), from about 0 to .9 around the planted snapshot
        variance = (self.probability * 1.09 - self.probability**2).double().numpy()[:, None]
        target = np.clip(0.45 + 0.9 * (s - at + 0.5) / 5, 0.01, 0.9)
        grown = np.sqrt(target / (1 - target) * 4 * _NOISE**2 / variance)
        strength = np.where(kinds == "slow", grown, strength)
        noise = np.where(kinds == "slow", 2 * _NOISE, noise)
        noise = np.where((kinds == "hidden") & (s < at), 0.5, noise)
        return torch.from_numpy(strength).float(), torch.from_numpy(noise).float()

    @property
    @override
    def n_snapshots(self) -> int:
        return self.trap.n_snapshots

    @property
    @override
    def d_model(self) -> int:
        return self.trap.d_model

    @override
    def activations(self, n: int, index: int) -> Float[Tensor, "B S D"]:
        return self.draw(n, index)[2]

    @override
    def held_out_tokens(self) -> Int[Tensor, "N T"]:
        return torch.cat([self.draw(n, i)[0] for i, n in self.chunks()]).view(-1, _LENGTH)

    @override
    def keep(self, tokens: Int[Tensor, "... T"]) -> Bool[Tensor, "... T"]:
        return torch.ones_like(tokens, dtype=torch.bool)

    def held_out_values(self) -> Float[Tensor, "B N"]:
        """Values of the planted features on the held-out tokens."""
        return torch.cat([self.draw(n, i)[1] for i, n in self.chunks()])

    def draw(self, n: int, index: int) -> tuple[Int[Tensor, " B"], Float[Tensor, "B N"], Float[Tensor, "B S D"]]:
        """Tokens, feature values and activations; they depend on seed, n and index only."""
        draw = generator(self.seed, index)
        N, S, D = len(self.kinds), self.n_snapshots, self.d_model
        # frequent and rare types
        tokens = (torch.rand(n, generator=draw) ** 1.5 * _TYPES).long()
        active = torch.rand(n, N, generator=draw) < self.probability
        lexical = torch.from_numpy(self.lexical)
        active = torch.where(lexical, self.types[:, tokens].T, active)
        values = active * (1 + 0.3 * torch.randn(n, N, generator=draw)).clamp(min=0.1)
        noise = torch.full((S, D), _NOISE)
        noise[:, :N] = self.noise.T
        along = torch.randn(n, S, D, generator=draw) * noise
        along[..., :N] += values[:, None] * self.strength.T
        if self.trap.untrained:
            along[:, 0] = self.embedding[tokens] + 0.3 * torch.randn(n, D, generator=draw)
        if self.trap.mean_share:
            variance = torch.tensor([2.0 if self.trap.untrained and s == 0 else self._variance(s) for s in range(S)])
            share = self.trap.mean_share
            size = (share / (1 - share) * variance).sqrt() * (torch.arange(S) % 2)
            along += torch.nn.functional.normalize(self.mean, dim=1) * size[:, None]
        return tokens, values, along @ self.directions.T

    def _variance(self, s: int) -> float:
        """Squared distance of activations from their mean, expected without the correlations of lexical features."""
        p = torch.where(torch.from_numpy(self.lexical), self.types.float().mean(1), self.probability)
        N, D = len(self.kinds), self.d_model
        signal = (self.strength[:, s] ** 2 * (p * 1.09 - p**2)).sum()
        return float(signal + (self.noise[:, s] ** 2).sum() + (D - N) * _NOISE**2)

    def truth(self) -> Float64[np.ndarray, "N S"]:
        """R2 of the best linear prediction of every feature's values from every snapshot."""
        S, D, N = self.n_snapshots, self.d_model, len(self.kinds)
        sums = torch.zeros(S, D + N, D + N, dtype=torch.float64)
        means = torch.zeros(S, D + N, dtype=torch.float64)
        chunks = _TRUE_TOKENS // 4000
        for i in range(chunks):
            _, values, x = self.draw(4000, -1_000_000 - i)
            both = torch.cat([x, values[:, None].expand(-1, S, -1)], 2).double().transpose(0, 1)
            sums += both.mT @ both
            means += both.sum(1)
        n = 4000 * chunks
        covariance = sums / n - means[:, :, None] * means[:, None, :] / n**2
        cross = covariance[:, :D, D:]
        # one at a time: in PyTorch 2.13 with several threads, batches of large matrices fail or hang
        solved = [torch.linalg.solve(both[:D, :D], other) for both, other in zip(covariance, cross, strict=True)]
        explained = (cross * torch.stack(solved)).sum(1)
        return (explained / covariance[:, D:, D:].diagonal(dim1=1, dim2=2)).T.numpy()


@torch.no_grad()
def judge_births(
    crosscoder: Crosscoder,
    traps: PlantedTraps,
    *,
    presence: float = PRESENCE,
    min_run: int = 2,
    min_correlation: float = 0.9,
) -> pd.DataFrame:
    """Compare the births found by decoder norm and by R2 with the true ones.

    Args:
        crosscoder: trained on `traps`.
        traps: the ground truth.
        presence: a feature is present where a measure is at least this share of its largest value.
        min_run: snapshots in a row a feature must be present for to count as born.
        min_correlation: least correlation of activations between a planted feature and the one found for it.

    Returns:
        A row per planted feature that is found: kind, feature, correlation, birth (true; 0 if not born), norm and r2
        (births found; S if there is none), birth_low, birth_high, q.
    """
    values = traps.held_out_values().double()
    parts = [features for _, features in held_out_features(crosscoder, traps)]
    found = torch.cat(parts).cpu().double()
    one, other = ((v - v.mean(0)) / v.std(0).clamp(min=1e-12) for v in (values, found))
    correlation = (one.T @ other / (len(values) - 1)).numpy()
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    kept = correlation[rows, columns] >= min_correlation
    rows, columns = rows[kept], columns[kept]
    decodability = measure_decodability(crosscoder, traps)
    curves = presence_curves(crosscoder.decoder_norms, decodability, (found > 0).any(0).numpy())
    dates = date_births(decodability, "r2", curves["r2"].max(1) > 0, presence=presence, min_run=min_run).iloc[columns]
    true = traps.truth()[rows].clip(0)
    birth = birth_index(true / true.max(1, keepdims=True) >= presence, min_run)
    table = pd.DataFrame({"kind": traps.kinds[rows], "feature": columns, "correlation": correlation[rows, columns]})
    table["birth"] = birth
    for measure in ("norm", "r2"):
        relative = curves[measure][columns] / np.maximum(curves[measure][columns].max(1, keepdims=True), 1e-30)
        table[measure] = birth_index(relative >= presence, min_run)
    for name in ("birth_low", "birth_high", "q"):
        table[name] = dates[name].to_numpy(dtype=float, na_value=np.nan)
    return table


def score_births(judged: pd.DataFrame) -> dict[str, float]:
    """Score the births of `judge_births`, over the planted features that are found.

    Returns:
        found and born (numbers of features). By measure, norm and r2: exact/<measure> (share of the truly born with the
        exact date), false/<measure> (share of the features said to be born that are not) and false_rate/<measure>
        (share of the features that are not born but said to be). covered (share of the truly born whose interval
        contains the true birth), and false_sure (share of false births among those with q up to .05). NaN where there
        are no such features.
    """
    born = judged["birth"] > 0
    scores: dict[str, float] = {"found": float(len(judged)), "born": float(born.sum())}
    for measure in ("norm", "r2"):
        said = judged[measure] > 0
        scores[f"exact/{measure}"] = float((judged[measure] == judged["birth"])[born].mean()) if born.any() else np.nan
        scores[f"false/{measure}"] = float((~born)[said].mean()) if said.any() else 0.0
        scores[f"false_rate/{measure}"] = float(said[~born].mean()) if (~born).any() else np.nan
    inside = judged["birth"].between(judged["birth_low"], judged["birth_high"])
    scores["covered"] = float(inside[born].mean()) if born.any() else np.nan
    sure = judged["q"] <= 0.05
    scores["false_sure"] = float((~born)[sure].mean()) if sure.any() else 0.0
    return scores
