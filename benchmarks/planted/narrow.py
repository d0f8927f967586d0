"""A narrow change between two snapshots: a handful of features that only the second has, on few of the tokens.

1. N features are common to both snapshots: random directions, firing probabilities between `firing`, of a random
   magnitude. The second snapshot turns each direction by `drift`, as any training does.
2. On a share `narrow` of the tokens, each of `n_new` more features is active with probability one half at the second
   snapshot, `strength` times as large as a common one; the first snapshot has nothing there.
3. Noise of both snapshots is independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import override

from crosslens.activations.tokens import generator
from planted.drawn import Drawn

_TYPES, _LENGTH = 200, 20  # of tokens; tokens in a sequence


@dataclass(frozen=True, kw_only=True)
class NarrowChange:
    """Settings of the change; see the module."""

    n_features: int = 192
    d_model: int = 64
    n_new: int = 8
    narrow: float = 0.01
    strength: float = 1.0
    firing: tuple[float, float] = (0.003, 0.06)
    drift: float = 0.1
    noise: float = 0.05


class NarrowPair(Drawn):
    """An endless stream of activations before and after a narrow change.

    Args:
        change: what is planted.
        seed: seed for the ground truth and the activations.
        n_tokens: activations per epoch; every epoch is different.
        n_held_out: activations to evaluate on.

    Attributes:
        rows: (N, 2, D), directions of the common features.
        new: (n_new, D), unit directions of the new ones at the second snapshot.
    """

    def __init__(self, change: NarrowChange, seed: int = 0, *, n_tokens: int = 1_000_000, n_held_out: int = 40_000):
        super().__init__("narrow change", seed, n_tokens, n_held_out)
        self.change = change
        draw = generator(seed, 1 << 20)
        N, D = change.n_features, change.d_model
        before = normalize(torch.randn(N, D, generator=draw), dim=-1)
        aside = normalize(torch.randn(N, D, generator=draw), dim=-1)
        self.rows: Float[Tensor, "N 2 D"] = torch.stack([before, normalize(before + change.drift * aside, dim=-1)], 1)
        self.new: Float[Tensor, "n D"] = normalize(torch.randn(change.n_new, D, generator=draw), dim=-1)
        low, high = change.firing
        self.probabilities = low * (high / low) ** torch.rand(N, generator=draw)
        self.name_snapshots([0, 1])

    @property
    @override
    def n_snapshots(self) -> int:
        return 2

    @property
    @override
    def d_model(self) -> int:
        return self.change.d_model

    @property
    def l0(self) -> float:
        """Mean number of active features per token at the second snapshot."""
        return float(self.probabilities.sum()) + self.change.n_new * self.change.narrow / 2

    @override
    def held_out_tokens(self) -> Int[Tensor, "N T"]:
        """Random tokens, which say nothing about features."""
        return torch.randint(_TYPES, (self.n_held_out // _LENGTH, _LENGTH), generator=generator(self.seed, 1 << 21))

    @override
    def keep(self, tokens: Int[Tensor, "... T"]) -> Bool[Tensor, "... T"]:
        return torch.ones_like(tokens, dtype=torch.bool)

    @override
    def activations(self, n: int, index: int) -> Float[Tensor, "B 2 D"]:
        draw = generator(self.seed, index)
        values = (torch.rand(n, self.change.n_features, generator=draw) < self.probabilities).float()
        values *= 1 + 0.3 * torch.randn(values.shape, generator=draw).clamp(-3, 3)
        inside = torch.rand(n, 1, generator=draw) < self.change.narrow
        added = (inside & (torch.rand(n, self.change.n_new, generator=draw) < 0.5)).float() * self.change.strength
        added *= 1 + 0.3 * torch.randn(added.shape, generator=draw).clamp(-3, 3)
        x = torch.einsum("bf,fsd->bsd", values, self.rows)
        x[:, 1] += added @ self.new
        return x + self.change.noise * torch.randn(x.shape, generator=draw)
