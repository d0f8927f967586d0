"""Which stored token comes when: a uniformly random order of all tokens that is read in runs.

1. When a shard is written, its tokens are stored in a uniformly random order (`stored_order`).
2. In every epoch a random permutation of the multiset {shard i, n_i times} says which shard gives the token at each
   position of the stream, and each shard gives its tokens from first to last. The result is a uniformly random
   permutation of all tokens, and a batch takes one run of rows from every shard.
3. So that epochs differ, each shard first permutes its rows in runs of `RUN`, so that a batch still reads several rows
   at once. Every epoch alone is a uniform permutation. Two epochs are not independent: the tokens of a run, at most
   `RUN` of a batch, meet again in one batch or in two that follow each other.
4. More than `WINDOW` shards are read `WINDOW` at a time, in windows that are drawn anew in every epoch, so that a batch
   does not touch thousands of files. Sequences are put into shards at random, so a window is a random part of the data.

Everything is drawn from (seed, epoch) and nothing else: any position of the stream can be found at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RUN = 32
"""Rows of a shard that stay together in all epochs, at most."""
FEW = 8
"""Shards up to which runs have `RUN // 4` rows: a batch takes many rows from each, which should part again."""
WINDOW = 64
"""Shards that a batch is drawn from, at most."""
_MARK = 1 << 16  # positions between two recorded counts

Indices = NDArray[np.int64]


class Piece(NamedTuple):
    """Consecutive tokens of a batch that come from one shard."""

    shard: int
    rows: Indices
    """Where they are in the shard."""


class Order:
    """The order of the tokens of several shards in every epoch.

    Args:
        counts: number of tokens in each shard.
        seed: seed.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self.counts: Indices = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.n_tokens = int(self.counts.sum())
        self._groups = lru_cache(maxsize=2)(self._draw_groups)
        self._window = lru_cache(maxsize=2)(self._draw_window)  # a batch may lie in two

    def pieces(self, first: int, last: int) -> list[Piece]:
        """The tokens at positions `first` to `last` (exclusive) of the endless stream, grouped by shard.

        Args:
            first: a position, counted over all epochs.
            last: the one after the last.
        """
        return [piece for window, low, high in self._spans(first, last) for piece in window.pieces(low, high)]

    def _spans(self, first: int, last: int) -> Iterator[tuple[_Window, int, int]]:
        """The windows that these positions lie in, and the positions in each."""
        while first < last:
            epoch, place = divmod(first, self.n_tokens)
            _, starts = self._groups(epoch)
            i = int(np.searchsorted(starts, place, side="right")) - 1
            begin, end = (epoch * self.n_tokens + int(starts[j]) for j in (i, i + 1))
            yield self._window(epoch, i), first - begin, min(last, end) - begin
            first = end

    def _draw_groups(self, epoch: int) -> tuple[list[Indices], Indices]:
        """The shards of each window of an epoch, and where the windows begin (and the last one ends)."""
        filled = np.flatnonzero(self.counts)
        n_windows = max(1, -(-len(filled) // WINDOW))
        groups = np.array_split(random(self.seed, epoch).permutation(filled), n_windows)
        return groups, np.cumsum([0, *(int(self.counts[group].sum()) for group in groups)])

    def _draw_window(self, epoch: int, i: int) -> _Window:
        shards = self._groups(epoch)[0][i]
        counts = self.counts[shards]
        labels = np.repeat(np.arange(len(shards), dtype=np.uint8), counts)
        random(self.seed, epoch, i).shuffle(labels)
        run = RUN // 4 if len(self.counts) <= FEW else RUN
        rows = [
            permuted_runs(int(n), run, random(self.seed, epoch, i, int(shard)))
            for shard, n in zip(shards, counts, strict=True)
        ]
        return _Window(shards, labels, rows)


class _Window:
    """The order of some shards in one epoch.

    Args:
        shards: their numbers.
        labels: for every position, which of them gives the token.
        rows: for each of them, its rows in the order in which it gives them.
    """

    def __init__(self, shards: Indices, labels: NDArray[np.uint8], rows: list[NDArray[np.int32]]) -> None:
        self.shards, self.labels, self.rows = shards, labels, rows
        marks = [np.zeros(len(shards), dtype=np.int64)]
        for first in range(0, len(labels) - _MARK + 1, _MARK):
            marks.append(marks[-1] + self._count(first, first + _MARK))
        self.marks = marks

    def _count(self, first: int, last: int) -> Indices:
        return np.bincount(self.labels[first:last], minlength=len(self.shards))

    def pieces(self, first: int, last: int) -> list[Piece]:
        """The tokens at these positions, grouped by shard."""
        mark = first // _MARK
        given = self.marks[mark] + self._count(mark * _MARK, first)
        counts = self._count(first, last)
        return [
            Piece(int(self.shards[k]), self.rows[k][given[k] : given[k] + counts[k]].astype(np.int64))
            for k in np.flatnonzero(counts)
        ]


def stored_order(n: int, seed: int, shard: int) -> Indices:
    """The order in which a shard stores its n tokens: a uniform permutation."""
    return random(seed, -1, shard).permutation(n)


def permuted_runs(n: int, run: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """0 to n - 1 in runs of consecutive numbers that begin at multiples of `run`, the runs in random order."""
    starts = rng.permutation(-(-n // run)).astype(np.int32) * run
    rows = (starts[:, None] + np.arange(run, dtype=np.int32)).ravel()
    return rows[rows < n]


def random(*numbers: int) -> np.random.Generator:
    """A random generator seeded by a few integers."""
    words: Any = [int(number) % 2**64 for number in numbers]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
