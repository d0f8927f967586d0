"""Batches of live activations that are mixed over more sequences than fit into a batch: a buffer in host memory.

1. Each epoch visits the training sequences in a random order, in chunks. A chunk is harvested as soon as its tokens fit
   into the buffer.
2. `UNIT` tokens at a time are drawn from the buffer, uniformly and without replacement, until it and the epoch are
   empty. Every token comes once per epoch.
3. The schedule, which token is in which slot and which slots are drawn, depends on the seed, the epoch and the sizes
   only. To continue at a position it is replayed without models; then the chunks that still have tokens in the buffer
   are harvested again. The last tokens of a chunk of n are drawn after some ln(n) times the buffer's size, so that
   takes the forward passes of up to 10 buffers.

A buffer that holds all training tokens needs no schedule: `rows.HeldRows` gives the order of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.files import Stored
from crosslens.activations.order import Indices, random
from crosslens.progress import tqdm

UNIT = 1024
"""Tokens that are drawn at once."""
CHUNKS = 4
"""Least number of chunks that a buffer holds."""

_bar = partial(tqdm, desc="Filling the buffer", leave=False, delay=2)

Harvest: TypeAlias = Callable[[Indices], Float[Tensor, "n S D"]]
"""Activations of the kept positions of some training sequences."""


class Fill(NamedTuple):
    """A chunk of sequences enters the buffer."""

    sequences: Indices
    slots: Indices
    """Where each of their kept tokens goes."""


class Draw(NamedTuple):
    """Tokens leave the buffer."""

    slots: Indices


class Schedule:
    """Which sequences enter a buffer when, and which of its slots each batch reads.

    Args:
        counts: kept tokens of each training sequence.
        capacity: slots.
        seed: seed.
        most: sequences of a chunk, at most.
    """

    def __init__(self, counts: Indices, capacity: int, seed: int, most: int) -> None:
        self.counts, self.capacity, self.seed = counts, capacity, seed
        longest = max(1, int(counts.max()))
        self.chunk = max(1, min(most, capacity // (CHUNKS * longest)))

    def epoch(self, epoch: int) -> Iterator[Fill | Draw]:
        """The events of one epoch. The buffer is empty before and after it."""
        rng = random(self.seed, epoch)
        order = rng.permutation(len(self.counts))
        chunks = [order[first : first + self.chunk] for first in range(0, len(order), self.chunk)]
        free, used = np.arange(self.capacity), np.empty(self.capacity, dtype=np.int64)
        n_free, n_used, i = self.capacity, 0, 0
        while i < len(chunks) or n_used:
            while i < len(chunks) and (n := int(self.counts[chunks[i]].sum())) <= n_free:
                slots = free[n_free - n : n_free].copy()
                used[n_used : n_used + n] = slots
                n_free, n_used = n_free - n, n_used + n
                yield Fill(chunks[i], slots)
                i += 1
            n = min(UNIT, n_used)
            places = rng.choice(n_used, n, replace=False)
            slots = used[places].copy()
            yield Draw(slots)
            # the last used slots move to the places of those that were drawn
            kept = np.setdiff1d(np.arange(n_used - n, n_used), places, assume_unique=True)
            used[places[places < n_used - n]] = used[kept]
            free[n_free : n_free + n] = slots
            n_free, n_used = n_free + n, n_used - n


class MixedRows:
    """Batches drawn from a buffer that holds a part of the data.

    Args:
        schedule: what enters and leaves the buffer.
        harvest: runs the models.
        width: (S, D).
        together: whether it does so with other processes, which all have to read the same batches.
    """

    divisible = False

    def __init__(self, schedule: Schedule, harvest: Harvest, width: tuple[int, int], together: bool = False) -> None:
        self.schedule, self.harvest, self.together = schedule, harvest, together
        self.types = {"data": (width[1], torch.float32)}
        self.buffer = torch.empty(schedule.capacity, *width)
        self.n_tokens = int(schedule.counts.sum())
        self._at = -1  # the position of the next token
        self._left: Indices = np.empty(0, dtype=np.int64)  # slots that were drawn and not yet read
        self._events: Iterator[Fill | Draw] = iter(())
        self._bar = _bar(disable=True)

    def read(self, first: int, last: int, rows: slice, out: Stored) -> None:
        """As `Rows.read`."""
        if first != self._at:
            self._seek(first)
        while self._at < last:
            if not len(self._left):
                self._advance()
                continue
            n = min(len(self._left), last - self._at)
            slots, self._left = self._left[:n], self._left[n:]
            begin = self._at - first  # row of the first of them in the batch
            low, high = max(rows.start, begin), min(rows.stop, begin + n)
            if low < high:
                own = torch.from_numpy(slots[low - begin : high - begin])
                torch.index_select(self.buffer, 0, own, out=out["data"][low - rows.start : high - rows.start])
            self._at += n

    def _advance(self) -> None:
        """To the next draw."""
        event = next(self._events, None)
        if event is None:
            self._events = self.schedule.epoch(self._at // self.n_tokens)
            return
        if isinstance(event, Draw):
            self._bar.close()
            self._left = event.slots
            return
        if self._at % self.n_tokens == 0 and self._bar.disable:  # an epoch fills the whole buffer before its first draw
            self._bar = _bar(total=self.schedule.capacity, unit=" tokens", unit_scale=True)
        self.buffer[torch.from_numpy(event.slots)] = self.harvest(event.sequences)
        self._bar.update(len(event.slots))

    def _seek(self, position: int) -> None:
        """Bring the buffer into the state that it has before the token at `position`."""
        epoch, place = divmod(position, self.n_tokens)
        self._events, self._at = self.schedule.epoch(epoch), position - place
        self._left = np.empty(0, dtype=np.int64)
        filled: list[Fill] = []
        owner = np.full(self.schedule.capacity, -1)  # the chunk whose token is in a slot
        while self._at < position:
            event = next(self._events)
            if isinstance(event, Fill):
                owner[event.slots] = len(filled)
                filled.append(event)
                continue
            n = min(len(event.slots), position - self._at)
            owner[event.slots[:n]] = -1
            self._left, self._at = event.slots[n:], self._at + n
        wanted = np.unique(owner[owner >= 0]).tolist()
        for i in _bar(wanted, unit="chunk"):
            here = np.flatnonzero(owner[filled[i].slots] == i)
            rows = self.harvest(filled[i].sequences)[torch.from_numpy(here)]
            self.buffer[torch.from_numpy(filled[i].slots[here])] = rows
