"""Measures that `evolve` takes of the held-out activations, each with one table.

    @measure(Table("longest", "feature", "evolve", {"feature": Column("Number of the feature."), ...}))
    def longest_runs(held: HeldOut) -> pd.DataFrame: ...

A measure is taken once its function is in a file of `crosslens.evolution`; nothing else has to name it. One in another
program is taken in the evolutions that this program runs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TypeAlias, TypeVar

import pandas as pd

from crosslens.evolution.held_out import HeldOut
from crosslens.tables import Table, declare

Measure: TypeAlias = Callable[[HeldOut], pd.DataFrame | None]
AnyMeasure = TypeVar("AnyMeasure", bound=Measure)
_MEASURES: dict[str, Measure] = {}


def measure(table: Table | str) -> Callable[[AnyMeasure], AnyMeasure]:
    """Take a measure in every `evolve`.

    Args:
        table: its table; the name if `crosslens.tables` declares it.

    Returns:
        A decorator for a function of held-out activations and their features that returns the table; None where the
        measure means nothing for a crosscoder.
    """
    name = table if isinstance(table, str) else declare(table).name

    def add(function: AnyMeasure) -> AnyMeasure:
        _MEASURES[name] = function
        return function

    return add


def take_measures(held: HeldOut) -> dict[str, pd.DataFrame]:
    """The tables of all measures that mean something for a crosscoder, by name."""
    _load()
    found = {name: function(held) for name, function in _MEASURES.items()}
    return {name: table for name, table in found.items() if table is not None}


@cache
def _load() -> None:
    package = importlib.import_module("crosslens.evolution")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
