"""Where the rows of a batch come from: a cache, memory, or models by way of a buffer (`activations.mixing`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.cache import ActivationCache
from crosslens.activations.files import Rows as FileRows
from crosslens.activations.files import Stored, stored_types
from crosslens.activations.order import Order, Piece

Types: TypeAlias = dict[str, tuple[int, torch.dtype]]
"""Width and type of the tensors that a row is stored as."""


@runtime_checkable
class Rows(Protocol):
    """The tokens of an endless stream, each as a row (S, D)."""

    types: Types
    """As they are stored."""
    divisible: bool
    """Whether processes that need the same batch should read a part of it each."""
    together: bool
    """Whether processes read together: then each has to read all batches that another one reads."""

    def read(self, first: int, last: int, rows: slice, out: Stored) -> None:
        """Write some rows of the batch of positions `first` to `last` into `out`.

        Args:
            first: position in the endless stream; where models run, at best the one where the batch before ended.
            last: the position after the last.
            rows: which rows.
            out: for these rows: `types` as they are stored, or float32 `data` (n, S, D) alone.
        """


class CachedRows:
    """Rows of a cache.

    Args:
        cache: complete.
        order: of its training shards.
    """

    divisible, together = True, False

    def __init__(self, cache: ActivationCache, order: Order) -> None:
        self.cache, self.order = cache, order
        self.types = stored_types(cache.d_model, cache.dtype)

    def read(self, first: int, last: int, rows: slice, out: Stored) -> None:
        """As `Rows.read`."""
        for piece, place in cut(self.order.pieces(first, last), rows):
            chosen = FileRows(piece.rows)
            for s in range(self.cache.n_snapshots):
                stored = self.cache.gather(piece.shard, s, chosen)
                if "scale" in stored and "scale" not in out:
                    torch.mul(stored["data"], stored["scale"], out=out["data"][place, s])
                    continue
                for name, values in stored.items():
                    out[name][place, s] = values  # widens in the same pass


class HeldRows:
    """Rows that are all in memory, in the order of a cache.

    Args:
        order: the order of a cache of these tokens.
        fill: returns them, called before the first batch.
        d_model: D.
        together: whether processes fill the memory together.
    """

    divisible = False

    def __init__(
        self, order: Order, fill: Callable[[], Float[Tensor, "N S D"]], d_model: int, together: bool = False
    ) -> None:
        self.order, self.fill, self.together = order, fill, together
        self.types: Types = {"data": (d_model, torch.float32)}
        self.starts = np.cumsum([0, *order.counts])
        self.buffer: Tensor | None = None

    def read(self, first: int, last: int, rows: slice, out: Stored) -> None:
        """As `Rows.read`."""
        if self.buffer is None:
            self.buffer = self.fill()
        pieces = self.order.pieces(first, last)
        places = np.concatenate([self.starts[piece.shard] + piece.rows for piece in pieces])[rows]
        torch.index_select(self.buffer, 0, torch.from_numpy(places), out=out["data"])


def cut(pieces: list[Piece], rows: slice) -> Iterator[tuple[Piece, slice]]:
    """The parts of pieces that some rows of a batch come from, and where they go among these rows."""
    at = -rows.start
    for piece in pieces:
        n = len(piece.rows)
        low, high = max(0, -at), min(n, rows.stop - rows.start - at)
        if low < high:
            yield Piece(piece.shard, piece.rows[low:high]), slice(at + low, at + high)
        at += n
