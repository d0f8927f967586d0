"""How strongly features are active: a histogram of each one's activations, and a random sample of its active tokens.

1. The histogram has `PER_DOUBLING` bins per factor of two, so that one pass needs no range.
2. Every active token draws a uniform number; the R largest of a feature are kept. The sample is uniform over the tokens
   on which the feature is active.

Random numbers depend on the seed and the sequence only, so the sample does not depend on the size of batches. Memory
does not grow with the number of tokens. Symbols: b sequences, T positions, n features, R sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

PER_DOUBLING = 4
_LOW, _HIGH = -40 * PER_DOUBLING, 40 * PER_DOUBLING  # bins: activations of 2^-40 to 2^40


class ActivationSample:
    """Histograms and samples of n features, collected batch by batch.

    Args:
        n: number of features.
        size: R.
        window: positions on each side of a sampled token whose activations are kept.
        seed: seed of the draw.
    """

    def __init__(self, n: int, size: int, window: int, seed: int = 0) -> None:
        self._n, self._size, self._window, self._seed = n, size, window, seed
        self._counts = np.zeros((n, _HIGH - _LOW), dtype=np.int64)
        self._weakest = np.full(n, -1.0)  # smallest number among R; smaller ones cannot enter
        self._key = np.zeros(0)
        self._where = np.zeros((0, 3), dtype=np.int64)  # feature, sequence, position
        self._around = np.zeros((0, 2 * window + 1), dtype=np.float32)

    def add(self, values: Float[Tensor, "b T n"], at: int) -> None:
        """Count and draw from a few sequences, of which the first has index `at`."""
        active = values > 0
        row, t, feature = (column.cpu().numpy() for column in active.nonzero(as_tuple=True))
        bins = np.floor(PER_DOUBLING * np.log2(values[active].float().cpu().numpy())).clip(_LOW, _HIGH - 1).astype(int)
        np.add.at(self._counts, (feature, bins - _LOW), 1)
        drawn = [np.random.default_rng([self._seed, at + i]).random(m) for i, m in enumerate(np.bincount(row))]
        key = np.concatenate([*drawn, np.zeros(0)])
        enters = key > self._weakest[feature]
        key, row, t, feature = key[enters], row[enters], t[enters], feature[enters]

        def around(new: np.ndarray) -> np.ndarray:
            places = t[new, None] + np.arange(-self._window, self._window + 1)
            inside = (places >= 0) & (places < values.shape[1])
            index = row[new, None], places.clip(0, values.shape[1] - 1), feature[new, None]
            return values[index].float().cpu().numpy() * inside

        self._keep(key, np.stack([feature, at + row, t], 1), around)

    def merge(self, other: ActivationSample) -> None:
        """Add what another one has counted and drawn from other sequences, with the same seed."""
        self._counts += other._counts
        self._keep(other._key, other._where, other._around.__getitem__)

    def _keep(self, key: np.ndarray, where: np.ndarray, around: Callable[[np.ndarray], np.ndarray]) -> None:
        """Keep the largest numbers of each feature; `around` gives the activations around some of the new tokens."""
        keys, where = np.concatenate([self._key, key]), np.concatenate([self._where, where])
        order = np.lexsort((-keys, where[:, 0]))
        owner = where[order, 0]
        rank = np.arange(len(order)) - np.searchsorted(owner, owner)
        kept = order[rank < self._size]
        self._weakest[owner[rank == self._size - 1]] = keys[order[rank == self._size - 1]]
        old = kept < len(self._key)
        held = np.zeros((len(kept), self._around.shape[1]), dtype=np.float32)
        held[old], held[~old] = self._around[kept[old]], around(kept[~old] - len(self._key))
        self._key, self._where, self._around = keys[kept], where[kept], held

    def histogram(self) -> pd.DataFrame:
        """A row per feature and bin that is not empty: feature, bin, count.

        A bin holds activations from 2^(bin / PER_DOUBLING) up to the next one.
        """
        feature, bins = self._counts.nonzero()
        return pd.DataFrame(
            {
                "feature": feature.astype(np.int32),
                "bin": (bins + _LOW).astype(np.int16),
                "count": self._counts[feature, bins],
            }
        )

    def sample(self) -> tuple[pd.DataFrame, np.ndarray]:
        """The sampled tokens and the activations around them.

        Returns:
            A row per token, strongest first: feature, rank, sequence, position, activation; and (rows, W).
        """
        activation = self._around[:, self._window]
        order = np.lexsort((-activation, self._where[:, 0]))
        feature = self._where[order, 0]
        table = pd.DataFrame(
            {
                "feature": feature.astype(np.int32),
                "rank": (np.arange(len(order)) - np.searchsorted(feature, feature)).astype(np.int16),
                "sequence": self._where[order, 1].astype(np.int32),
                "position": self._where[order, 2].astype(np.int32),
                "activation": activation[order],
            }
        )
        return table, self._around[order]
