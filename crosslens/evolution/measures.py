"""Measures that `evolve` takes in its pass over the held-out tokens, each with one table.

    @measure(Table("longest", "feature", "evolve", {"feature": Column("Number of the feature."), ...}))
    class LongestRuns:
        def __init__(self, crosscoder: Crosscoder, acts: Activations) -> None: ...
        def add(self, block: Block) -> None: ...
        def result(self) -> pd.DataFrame: ...

A measure is taken once its class is in a file of `crosslens.evolution`; nothing else has to name it. One in another
program is taken in the evolutions that this program runs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import pandas as pd

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.evolution.held_out import Block
from crosslens.tables import Table, declare


@runtime_checkable
class Measuring(Protocol):
    """An accumulator of `held_out.read` that ends with a table."""

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        ...

    def result(self) -> pd.DataFrame:
        """The table."""
        ...


Start: TypeAlias = Callable[[Crosscoder, Activations], Measuring | None]
AnyStart = TypeVar("AnyStart", bound=Start)
_STARTS: dict[str, Start] = {}


def measure(table: Table | str) -> Callable[[AnyStart], AnyStart]:
    """Take a measure in every `evolve`.

    Args:
        table: its table; the name if `crosslens.tables` declares it.

    Returns:
        A decorator for a class with `add` and `result`, or for a function that makes one, of a crosscoder and
        activations of its snapshots; None where the measure means nothing.
    """
    name = table if isinstance(table, str) else declare(table).name

    def add(start: AnyStart) -> AnyStart:
        _STARTS[name] = start
        return start

    return add


def start_measures(crosscoder: Crosscoder, acts: Activations) -> dict[str, Measuring]:
    """The accumulators of all measures that mean something for a crosscoder, by the names of their tables."""
    _load()
    started = {name: start(crosscoder, acts) for name, start in _STARTS.items()}
    return {name: each for name, each in started.items() if each is not None}


@cache
def _load() -> None:
    package = importlib.import_module("crosslens.evolution")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
