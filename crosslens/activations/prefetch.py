"""One item ahead: a thread makes the next item while the present one is being used."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Items of an iterator, each made in the background while the one before it is in use; an iterator itself.

    At most one item is made ahead, so that memory holds two. An error in the thread is raised where the item would have
    come. `close` ends the thread as soon as what makes the items allows.

    Args:
        make: gives the iterator; called in the thread, with a function that tells whether anybody still waits.

    Attributes:
        waited: seconds for which items were waited for.
        waited_first: those of them that the first item took, for which nothing could be done meanwhile.
    """

    def __init__(self, make: Callable[[Callable[[], bool]], Iterator[T]]) -> None:
        self.waited = self.waited_first = 0.0
        self._made: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._asked = threading.Semaphore(1)
        self._closed = threading.Event()
        self._first = True
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name="crosslens-prefetch")
        self._thread.start()

    def _run(self, make: Callable[[Callable[[], bool]], Iterator[T]]) -> None:
        try:
            items = make(self._closed.is_set)
            while True:
                self._asked.acquire()
                if self._closed.is_set():
                    return
                self._made.put((next(items),))
        except StopIteration:
            self._made.put(None)
        except BaseException as error:  # raised again where it can be dealt with
            self._made.put(error)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        made = self._made.get()
        seconds = time.perf_counter() - began
        self.waited += seconds
        if self._first:
            self._first, self.waited_first = False, seconds
        if isinstance(made, tuple):
            self._asked.release()
            return made[0]
        self._made.put(made)  # for whoever asks again
        if made is None:
            raise StopIteration
        raise made

    def close(self) -> None:
        """End the thread, and wait until it has."""
        self._closed.set()
        self._asked.release()
        self._thread.join()
