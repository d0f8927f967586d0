"""Planted ground truth: synthetic activations of many snapshots, made of features with known lifecycles.

A regime and a seed determine the ground truth:

1. Directions are a SAELens `FeatureDictionary`. A quarter of the features (by default) is present from the first
   snapshot, the others are born at a random snapshot; some die, at the earliest two snapshots after their birth.
2. Strength is .75 at birth and grows to 1 over two snapshots; it is 0 before the birth and from the death on.
3. A *rotating* feature changes its direction at one snapshot. A *splitting* pair shares its direction before a snapshot
   and has two directions from it on; a *merging* pair has two directions before and one from it on.
4. Token b activates feature i with value f_bi at all snapshots (by a SAELens `ActivationGenerator`: firing
   probabilities, magnitudes, groups of correlated features). x_bs = g_s (sum_i f_bi strength_is direction_is + noise),
   with g_s the scale of snapshot s.

`Planted` is an `Activations`, so crosscoders train on it, and all analyses that only read activations run on it.
Symbols: B tokens, S snapshots, D d_model, N planted features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    LowRankCorrelationMatrix,
    random_firing_probabilities,
)
from torch import Tensor
from typing_extensions import override

from crosslens.activations.tokens import generator
from crosslens.errors import UserError
from planted.drawn import Drawn

_TOKENS = 2_000_000  # per training step, for the metadata only


@dataclass(frozen=True)
class Regime:
    """What is planted, and how hard it is to find.

    Attributes:
        n_features: N.
        d_model: D.
        n_snapshots: S.
        initial: share of features present from the first snapshot.
        dying: share of features that die.
        rotating: share of features that rotate, at one snapshot and by up to `max_angle` radians.
        max_angle: largest rotation.
        splitting: share of features in pairs that split.
        merging: share of features in pairs that merge.
        split_angle: angle between the directions of such a pair where they differ, in radians.
        firing: smallest and largest firing probability.
        amplitude_sd: standard deviation of the values around 1.
        noise: standard deviation of the noise in every coordinate.
        correlation: correlation between the Gaussians behind the features of one group; 0 makes features independent.
        group_size: features per group.
        scales: smallest and largest scale of a snapshot; the scales are spread between them in random order.
    """

    n_features: int = 256
    d_model: int = 64
    n_snapshots: int = 8
    initial: float = 0.25
    dying: float = 0.15
    rotating: float = 0.3
    max_angle: float = 0.8
    splitting: float = 0.0
    merging: float = 0.0
    split_angle: float = 1.2
    firing: tuple[float, float] = (0.01, 0.07)
    amplitude_sd: float = 0.3
    noise: float = 0.05
    correlation: float = 0.0
    group_size: int = 8
    scales: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.n_snapshots < 5:
            raise UserError(f"n_snapshots={self.n_snapshots} is too few to plant a lifecycle: give 5 or more")
        if not 0 <= self.initial <= 1:
            raise UserError(f"initial={self.initial} is not in [0, 1]")
        shares = self.dying + self.rotating + self.splitting + self.merging
        if not 0 <= shares <= 1:
            raise UserError(
                f"dying, rotating, splitting and merging add up to {shares:.2f}, but each feature has only one kind: "
                "reduce the sum to 1 or less"
            )
        if not 0 < self.firing[0] <= self.firing[1] < 1:
            raise UserError(f"firing={self.firing} is not a range of probabilities: give two in (0, 1), smaller first")
        if not 0 <= self.correlation < 1:
            raise UserError(f"correlation={self.correlation} is not in [0, 1)")


REGIMES = {
    "easy": Regime(),
    "crowded": Regime(d_model=32, initial=0.4, firing=(0.005, 0.035), noise=0.1, scales=(0.3, 10.0)),
    "entangled": Regime(splitting=0.15, merging=0.1, max_angle=1.2, correlation=0.5, noise=0.1, scales=(0.3, 10.0)),
}
"""Easy; crowded: three to seven features per dimension at every snapshot; entangled: correlated firing and splits."""


class Planted(Drawn):
    """An endless stream of activations of a regime; the ground truth is in `rows` and `truth`.

    Args:
        regime: what is planted.
        seed: seed for the ground truth and the activations.
        n_tokens: activations per epoch; every epoch is different.
        n_held_out: activations to evaluate on.
        keep: hold every batch in memory once it is drawn, 4 B S D bytes each, to train several times on one truth.

    Attributes:
        rows: (N, S, D), scale times strength times direction: what a feature of value 1 adds at each snapshot.
        truth: a row per planted feature: kind (steady, dying, rotating, splitting, merging), birth, death, at (the
            snapshot of its rotation, split or merger), angle, partner, firing (probability); missing if not applicable.
    """

    def __init__(
        self,
        regime: Regime,
        seed: int = 0,
        *,
        n_tokens: int = 1_000_000,
        n_held_out: int = 20_000,
        keep: bool = False,
    ) -> None:
        super().__init__("planted", seed, n_tokens, n_held_out)
        self.regime = regime
        self.kept: dict[tuple[int, int], Tensor] | None = {} if keep else None
        rng = np.random.default_rng(seed)
        self.truth = _lifecycles(regime, rng)
        low, high = regime.scales
        self.scales = torch.from_numpy(rng.permutation(np.geomspace(low, high, regime.n_snapshots))).float()
        directions = _directions(regime, self.truth, seed)
        self.rows: Float[Tensor, "N S D"] = (
            directions * (_strength(self.truth, regime.n_snapshots) * self.scales)[..., None]
        )
        self.source = ActivationGenerator(
            regime.n_features,
            torch.tensor(self.truth["firing"].to_numpy(), dtype=torch.float32),
            std_firing_magnitudes=regime.amplitude_sd,
            correlation_matrix=_groups(regime) if regime.correlation else None,
        )
        self.members = list(range(regime.n_snapshots))
        self.whole: Planted | None = None
        self.name_snapshots(self.members, _TOKENS)

    def only(self, snapshot: int) -> Planted:
        """The same activations at one snapshot; batches kept in memory are shared."""
        part = Planted.__new__(Planted)
        part.__dict__.update(self.__dict__)
        part.whole = self.whole or self
        part.members = [self.members[snapshot]]
        part.rows, part.scales = self.rows[:, [snapshot]], self.scales[[snapshot]]
        part.name_snapshots(part.members, _TOKENS)
        return part

    @property
    @override
    def n_snapshots(self) -> int:
        return len(self.members)

    @property
    @override
    def d_model(self) -> int:
        return self.regime.d_model

    @property
    def l0(self) -> float:
        """Mean number of active features per token, of those present at one of the snapshots or more."""
        there = (self.rows.norm(dim=-1) > 0).any(1).numpy()
        return float(self.truth["firing"][there].sum())

    @override
    def activations(self, n: int, index: int) -> Float[Tensor, "B S D"]:
        if self.kept is None:
            return self.draw(n, index)[1]
        if (n, index) not in self.kept:
            self.kept[n, index] = (self.whole or self).draw(n, index)[1]
        kept = self.kept[n, index]
        return kept if self.whole is None else kept[:, self.members]

    def draw(self, n: int, index: int) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B S D"]]:
        """Draw feature values and activations of n tokens; they depend on seed, n and index only."""
        with torch.random.fork_rng(devices=[]):
            # SAELens draws from torch's global generator
            torch.manual_seed(generator(self.seed, index).initial_seed())
            values = self.source.sample(n)
        # a generator per snapshot, so that `only` draws the same noise
        noise = [torch.randn(n, self.d_model, generator=generator(self.seed, index, s)) for s in self.members]
        x = (values @ self.rows.flatten(1)).unflatten(1, self.rows.shape[1:])
        return values, x + self.regime.noise * self.scales[:, None] * torch.stack(noise, 1)


def _lifecycles(regime: Regime, rng: np.random.Generator) -> pd.DataFrame:
    """Draw the table of planted features."""
    N, S = regime.n_features, regime.n_snapshots
    pairs = {kind: 2 * round(getattr(regime, kind) * N / 2) for kind in ("splitting", "merging")}
    single = {kind: round(getattr(regime, kind) * N) for kind in ("dying", "rotating")}
    kinds = [kind for kind, count in (pairs | single).items() for _ in range(count)]
    kind = np.array(kinds + ["steady"] * (N - len(kinds)), dtype=object)
    # leave two snapshots on either side of the change
    latest = np.select([np.isin(kind, list(pairs)), kind != "steady"], [S - 4, S - 3], S - 1)
    birth = np.where(rng.random(N) < regime.initial, 0, rng.integers(1, latest + 1))
    end = np.where(np.isin(kind, list(pairs)), S - 1, S)
    happens = rng.integers(np.minimum(birth + 2, end - 1), end)
    angle = np.where(kind == "rotating", rng.uniform(0, regime.max_angle, N), regime.split_angle)
    partner = np.arange(N)
    paired = np.flatnonzero(np.isin(kind, list(pairs)))
    first, second = paired[::2], paired[1::2]
    partner[first], partner[second] = second, first
    birth[second], happens[second] = birth[first], happens[first]
    probabilities = random_firing_probabilities(N, regime.firing[1], regime.firing[0], seed=int(rng.integers(2**31)))
    order = rng.permutation(N)  # so that groups of correlated features mix the kinds
    place = np.argsort(order)

    def where(values: Any, valid: Any) -> pd.Series:
        return pd.Series(values, dtype="Int64").where(valid)

    table = pd.DataFrame(
        {
            "kind": kind,
            "birth": birth,
            "death": where(happens, kind == "dying"),
            "at": where(happens, ~np.isin(kind, ["dying", "steady"])),
            "angle": np.where(np.isin(kind, ["dying", "steady"]), np.nan, angle),
            "partner": where(place[partner], np.isin(kind, list(pairs))),
        }
    )
    table = table.iloc[order].reset_index(drop=True)
    return table.assign(firing=probabilities.double().numpy())


def _strength(truth: pd.DataFrame, S: int) -> Float[Tensor, "N S"]:
    """.75, .875 and 1 from the birth on (1 for features born at the first snapshot); 0 from the death on."""
    birth, death = truth["birth"].to_numpy(), truth["death"].fillna(S).to_numpy(dtype=np.int64)
    age = np.arange(S) - birth[:, None]
    grown = np.where(birth[:, None] == 0, 1.0, np.clip(0.75 + age / 8, 0, 1))
    return torch.from_numpy(np.where((age < 0) | (np.arange(S) >= death[:, None]), 0.0, grown)).float()


def _directions(regime: Regime, truth: pd.DataFrame, seed: int) -> Float[Tensor, "N S D"]:
    """Unit direction of every feature at every snapshot."""
    N, S, D = regime.n_features, regime.n_snapshots, regime.d_model
    base = FeatureDictionary(N, D, initializer=None, seed=seed).feature_vectors.detach().clone()
    aside = FeatureDictionary(N, D, initializer=None, seed=seed + 2**31).feature_vectors.detach().clone()
    partner = torch.from_numpy(truth["partner"].fillna(-1).to_numpy(dtype=np.int64))
    second = (partner >= 0) & (partner < torch.arange(N))
    base[second], aside[second] = base[partner[second]], aside[partner[second]]
    aside -= (aside * base).sum(1, keepdim=True) * base
    aside /= aside.norm(dim=1, keepdim=True)
    # the features of a pair rotate by half the angle each, in opposite directions
    angle = torch.tensor(truth["angle"].fillna(0.0).to_numpy(), dtype=torch.float32)
    angle = torch.where(partner < 0, angle, torch.where(second, -angle / 2, angle / 2))
    rotated = angle.cos()[:, None] * base + angle.sin()[:, None] * aside
    at = torch.from_numpy(truth["at"].fillna(S).to_numpy(dtype=np.int64))
    later = torch.arange(S) >= at[:, None]
    merging = torch.tensor((truth["kind"] == "merging").to_numpy())
    return torch.where((later ^ merging[:, None])[..., None], rotated[:, None], base[:, None])


def _groups(regime: Regime) -> LowRankCorrelationMatrix:
    """Correlations that arise because features i of one group i // group_size share a Gaussian."""
    N = regime.n_features
    group = torch.arange(N) // regime.group_size
    factor = torch.nn.functional.one_hot(group).float() * regime.correlation**0.5
    return LowRankCorrelationMatrix(factor, torch.full((N,), 1 - regime.correlation))
