"""One analysis by all processes that torchrun started.

Every process runs the same program on the same inputs. Within `together` the items of an `each` are divided among them,
and all of them get all results; `from_first` is for what may differ between them, such as what a run directory holds
while the first one writes to it. Work that is not made of items is divided by `share`, and what is found exchanged by
`gathered`, or by `to_first` where it is large and only written. Outside of it, and in a single process, nothing is
divided.

Results are exchanged as pickles in host memory, whatever the device.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from crosslens.distributed.parallel import join
from crosslens.progress import tqdm

T = TypeVar("T")
U = TypeVar("U")
Slices = TypeVar("Slices", Tensor, Sequence[int], range)

TIMEOUT = timedelta(days=1)
"""For the slowest process. The others need not guess whether it has died: torchrun ends them."""
_GROUP: ContextVar[Any] = ContextVar("group", default=None)


@contextmanager
def together(device: str) -> Generator[None, None, None]:
    """Divide work among the processes that torchrun started, while the block runs.

    Args:
        device: of models and crosscoder, as for `join`.
    """
    parallel, _ = join(device)
    group = None if parallel.alone else dist.new_group(backend="gloo", timeout=TIMEOUT)
    with _using(group):
        yield


def each(function: Callable[[T], U], items: Iterable[T], desc: str = "", unit: str = "snapshot") -> list[U]:
    """Results of a function for every item, in order.

    Each process takes every n-th item. A single item is given to all of them, so that the function can divide its own
    work; what it calls for one of several items works alone.

    Args:
        function: the same in all processes.
        items: the same in all processes.
        desc: what is done, for a progress bar; "" shows none.
        unit: one item, for the bar.
    """
    group, items = _divided(items)
    own = items if group is None else items[dist.get_rank() :: dist.get_world_size()]
    bar = tqdm(own, desc=desc, unit=unit, leave=False) if desc else own
    if group is None:
        return [function(item) for item in bar]
    with _using(None):
        found = [function(item) for item in bar]
    results: list[Any] = [None] * len(items)
    for rank, theirs in enumerate(_exchanged(found, group)):
        results[rank :: dist.get_world_size()] = theirs
    return results


def in_rounds(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """As `each`, with one result of every process at a time, for results that are large."""
    group, items = _divided(items)
    if group is None:
        yield from map(function, items)
        return
    for begin in range(0, len(items), dist.get_world_size()):
        own = items[begin : begin + dist.get_world_size()][dist.get_rank() :][:1]
        with _using(None):
            found = [function(item) for item in own]
        for theirs in _exchanged(found, group):
            yield from theirs


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many work together; 0 and 1 where it works alone."""
    return (0, 1) if _GROUP.get() is None else (dist.get_rank(), dist.get_world_size())


def gathered(found: T) -> list[T]:
    """What every process has found, by `rank_and_size`."""
    group = _GROUP.get()
    return [found] if group is None else _exchanged(found, group)


def to_first(found: T) -> list[T]:
    """What every process has found, by `rank_and_size`, for the first one; the others get their own."""
    group = _GROUP.get()
    if group is None:
        return [found]
    everything: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everything, group=group)
    return everything or [found]


@contextmanager
def alone() -> Generator[None, None, None]:
    """Divide nothing within the block: what each process does there is its own."""
    with _using(None):
        yield


def share(items: Slices) -> Slices:
    """The part of the items that is this process's own: contiguous, in the order of the processes."""
    rank, n = rank_and_size()
    return items[len(items) * rank // n : len(items) * (rank + 1) // n]


def shares(items: Slices) -> list[Slices]:
    """Items in as many parts as processes work together, in order; none is empty."""
    n = max(1, min(len(items), rank_and_size()[1]))
    ends = [len(items) * i // n for i in range(n + 1)]
    return [items[first:last] for first, last in pairwise(ends)]


def from_first(function: Callable[[], T]) -> T:
    """Result of a function that only the first process calls."""
    group = _GROUP.get()
    if group is None:
        return function()
    found: list[Any] = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, group=group)
    return found[0]


def _divided(items: Iterable[T]) -> tuple[Any, list[T]]:
    """The processes that share the items, None if this one has to do all of them; and the items."""
    found = list(items)
    return _GROUP.get() if len(found) > 1 else None, found


@contextmanager
def _using(group: Any) -> Generator[None, None, None]:
    token = _GROUP.set(group)
    try:
        yield
    finally:
        _GROUP.reset(token)


def _exchanged(found: Any, group: Any) -> list[Any]:
    """What every process has found, by rank."""
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found, group=group)
    return everything
