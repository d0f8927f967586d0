"""From rows in a cache or a buffer to batches on the device of the training, one ahead of the consumer.

1. A thread makes the next batch while the current one is in use. Its buffers are used again once nobody refers to a
   batch any more: a new buffer of hundreds of MiB costs more than what is written into it.
2. On CPUs activations are widened to float32 while they are copied out of the cache, in one pass. Processes on one
   host that need the same tokens fill one buffer in shared memory together, each its part of the rows.
3. For a GPU they stay as they are stored: they are copied into pinned memory, travel to the device asynchronously, and
   are widened there. Processes that need the same tokens read a part of the rows each, and gather the others on the
   device.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from crosslens.activations.files import Stored, decode
from crosslens.activations.harvesting import AbandonedError
from crosslens.activations.rows import Rows
from crosslens.distributed.parallel import Parallel

SHARED_MEMORY = Path("/dev/shm")


def feed(
    rows: Rows,
    spans: Iterator[tuple[int, int]],
    shape: tuple[int, int, int],
    device: torch.device,
    parallel: Parallel,
    whole: bool,
    closed: threading.Event,
    waited: Callable[[float], None],
) -> Generator[Float[Tensor, "B S D"], None, None]:
    """Batches of float32 activations; closing it ends the background work.

    Args:
        rows: where they come from.
        spans: first and last position of each batch.
        shape: (B, S, D) of a whole batch.
        device: where batches are wanted.
        parallel: the processes that read together.
        whole: whether each process needs all tokens, or those of its group alone.
        closed: set when the consumer has enough.
        waited: called with the seconds that the consumer waited for each batch.
    """
    own = slice(0, shape[0]) if whole else parallel.tokens(shape[0])
    n, width = own.stop - own.start, shape[1:]
    team = _Team(parallel, whole)
    team.share &= rows.divisible
    buffers: list[Tensor] | None = None
    if device.type == "cuda":
        part = team.part(n)
        source: _Widened | _Pinned = _Pinned(rows, -(-n // team.n) if team.share else n, n, width[0])
    else:
        buffers = _shared(team, (n, *width)) if team.share else None
        team.share = buffers is not None
        part = team.part(n)
        source = _Widened(rows, part, (n, *width), buffers)
    mine = slice(own.start + part.start, own.start + part.stop)
    wanted = threading.Semaphore(1)
    n_wanted, n_begun = 1, 0

    def made() -> Iterator[Any]:
        nonlocal n_begun
        while True:
            wanted.acquire()
            if closed.is_set() or (span := next(spans, None)) is None:
                return
            n_begun += 1
            yield source.make(*span, mine)

    def arrived() -> Iterator[Any]:
        nonlocal n_wanted
        while True:
            began = time.perf_counter()
            item = next(ahead, None)
            if item is None:
                return
            if buffers is not None:
                team.meet()  # before any process goes on to the buffer that another may still use
            n_wanted += 1
            wanted.release()
            waited(time.perf_counter() - began)
            yield item
            del item  # so that its buffer can be used again

    # the queue alone would let the thread work two batches ahead
    ahead = PrefetchingIterator(made(), prefetch=1)
    try:
        yield from source.deliver(arrived(), device, team)
    finally:
        closed.set()
        wanted.release()
        ahead.close()
        # other processes may have begun the batch that this one did not, and wait to be told that it is not needed
        if rows.together and n_begun < n_wanted and (span := next(spans, None)) is not None:
            with suppress(AbandonedError):
                source.make(*span, mine)


# ---------------------------------------------------------------------- processes
class _Team:
    """The processes that need the same tokens.

    Args:
        parallel: all processes.
        whole: whether all of them need all tokens.
    """

    def __init__(self, parallel: Parallel, whole: bool) -> None:
        self.parallel = parallel
        self.n = parallel.n_ranks if whole else parallel.n_feature_ranks
        self.rank = parallel.rank if whole else parallel.feature_rank
        self.group = None if whole else parallel.feature_group
        self.share = self.n > 1
        """Whether each reads a part of the rows; otherwise each reads all of them."""

    def part(self, n: int) -> slice:
        """The rows that this process reads, of n; a part may be one row shorter, or empty."""
        if not self.share:
            return slice(0, n)
        size = -(-n // self.n)
        return slice(min(n, self.rank * size), min(n, (self.rank + 1) * size))

    def agree(self, value: Any) -> list[Any]:
        """The values of all of them."""
        found: list[Any] = [None] * self.n
        dist.all_gather_object(found, value, group=self.group)
        return found

    def meet(self) -> None:
        """Wait for the others."""
        if self.share:
            dist.barrier(group=self.group)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all of them."""
        found = rows.new_empty(self.n * len(rows), *rows.shape[1:])
        # its successor is missing from older releases
        dist.all_gather_into_tensor(found, rows, group=self.group)  # pyright: ignore[reportDeprecated]
        return found


def _shared(team: _Team, shape: tuple[int, ...]) -> list[Tensor] | None:
    """Two buffers that all processes of a team map; None if they are on several hosts, or shared memory is too small.

    Two are enough: a process fills a buffer again after it has got the next batch, and so after all have asked for it.
    """
    n_bytes = 4 * int(np.prod(shape))
    hosts = team.agree((socket.gethostname(), _boot()))
    if any(host != hosts[0] for host in hosts) or not SHARED_MEMORY.is_dir():
        return None
    name: str | None = None
    if team.rank == 0:
        with suppress(OSError):
            file, name = tempfile.mkstemp(prefix="crosslens-", dir=SHARED_MEMORY)
            try:
                os.posix_fallocate(file, 0, 2 * n_bytes)  # memory that is not there would end a process without a word
            except OSError:
                os.unlink(name)
                name = None
            finally:
                os.close(file)
    name = team.agree(name)[0]
    if name is None:
        return None
    buffers = torch.from_file(name, shared=True, size=2 * n_bytes // 4, dtype=torch.float32).view(2, *shape)
    team.meet()
    if team.rank == 0:
        os.unlink(name)
    return list(buffers)


def _boot() -> str:
    """What tells two hosts, or two containers with shared memory of their own, of one name apart."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat(SHARED_MEMORY).st_dev}"
    return ""


# ---------------------------------------------------------------------- on CPUs
class _Widened:
    """Float32 batches in host memory.

    Args:
        rows: where they come from.
        part: the rows that this process fills.
        shape: of a batch.
        shared: buffers that several processes fill together, used in turn; None: own ones, used again when free.
    """

    def __init__(self, rows: Rows, part: slice, shape: tuple[int, ...], shared: list[Tensor] | None) -> None:
        self.rows, self.part, self.shape, self.shared = rows, part, shape, shared
        self.free: list[NDArray[np.float32]] = []
        self.made = 0

    def make(self, first: int, last: int, mine: slice) -> Tensor:
        """The next batch; with shared buffers only this process's part of it."""
        batch = self._buffer() if self.shared is None else self.shared[self.made % len(self.shared)]
        self.made += 1
        if mine.stop > mine.start:
            self.rows.read(first, last, mine, {"data": batch[self.part]})
        return batch

    def _buffer(self) -> Tensor:
        base = self.free.pop() if self.free else np.empty(self.shape, dtype=np.float32)
        view = base.view()
        # the tensor holds the view; when nobody holds the tensor, the buffer is free again
        weakref.finalize(view, self.free.append, base).atexit = False
        return torch.from_numpy(view)

    def deliver(self, batches: Iterator[Tensor], device: torch.device, team: _Team) -> Iterator[Tensor]:
        """Whole batches. Those in shared memory are valid until the next is asked for."""
        del team
        for batch in batches:
            yield batch if device.type == "cpu" else batch.to(device)
            del batch


# ---------------------------------------------------------------------- on GPUs
class _Pinned:
    """Batches on a GPU, by way of pinned memory.

    Args:
        rows: where they come from.
        n: rows of its buffers, the same in all processes.
        needed: rows that it needs.
        n_snapshots: S.
    """

    def __init__(self, rows: Rows, n: int, needed: int, n_snapshots: int) -> None:
        self.rows, self.n, self.needed, self.n_snapshots = rows, n, needed, n_snapshots
        self.free: list[Stored] = []

    def make(self, first: int, last: int, mine: slice) -> Stored:
        """This process's rows of the next batch, as they are stored; the rest of a buffer is not needed."""
        buffer = self.free.pop() if self.free else self._new()
        self.rows.read(first, last, mine, buffer)
        return buffer

    def _new(self) -> Stored:
        pin = torch.cuda.is_available()
        return {
            name: torch.empty(self.n, self.n_snapshots, width, dtype=dtype, pin_memory=pin)
            for name, (width, dtype) in self.rows.types.items()
        }

    def deliver(self, batches: Iterator[Stored], device: torch.device, team: _Team) -> Iterator[Tensor]:
        """Float32 batches on the device; the next one travels while one is in use."""
        real = torch.cuda.is_available()
        side = torch.cuda.Stream(device) if real else None
        ahead: tuple[Tensor, Stored, Any, Any] | None = None
        for buffer in batches:
            with nullcontext() if side is None else torch.cuda.stream(side):
                stored = {name: rows.to(device, non_blocking=True) for name, rows in buffer.items()}
                sent = None if side is None else side.record_event()
                if team.share:
                    stored = {name: team.gather(rows)[: self.needed] for name, rows in stored.items()}
                batch = decode(stored)
                done = None if side is None else side.record_event()
                del stored
            if ahead is not None:
                yield self._arrived(ahead, device)
            ahead = batch, buffer, sent, done
        if ahead is not None:
            yield self._arrived(ahead, device)

    def _arrived(self, sent: tuple[Tensor, Stored, Any, Any], device: torch.device) -> Tensor:
        """A batch that the device's current stream may use; its pinned memory is free again."""
        batch, buffer, copied, done = sent
        if copied is not None:
            copied.synchronize()
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            batch.record_stream(current)
        self.free.append(buffer)
        return batch
