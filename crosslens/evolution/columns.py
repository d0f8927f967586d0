"""Columns that many tables share: labels, steps and tokens of snapshots, and values with a column per snapshot.

Symbols: S snapshots, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from crosslens.crosscoders import Crosscoder


def snapshot_columns(crosscoder: Crosscoder) -> pd.DataFrame:
    """label, step and tokens of the crosscoder's snapshots from its metadata; labels default to indices."""
    recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
    if not recorded:
        recorded = [{"label": str(s)} for s in range(crosscoder.n_snapshots)]
    columns: dict[str, Any] = {"label": [str(row["label"]) for row in recorded]}
    for unit in ("step", "tokens"):
        columns[unit] = pd.array([row.get(unit) for row in recorded], dtype="Int64")
    return pd.DataFrame(columns)


def snapshot_pairs(crosscoder: Crosscoder, one: Any, other: Any, units: tuple[str, ...]) -> pd.DataFrame:
    """snapshot and other (indices), then each of `units` for both, such as label and other_label."""
    snapshots = snapshot_columns(crosscoder)
    table = pd.DataFrame({"snapshot": one, "other": other})
    for unit in units:
        table[unit], table[f"other_{unit}"] = snapshots[unit].array[one], snapshots[unit].array[other]
    return table


def per_feature(labels: list[str], **values: Float[Tensor, "F S"]) -> pd.DataFrame:
    """A row per feature: feature, then <name>/<label> for each of the values and snapshots.

    Args:
        labels: S names of the snapshots.
        values: by name.
    """
    columns: dict[str, Any] = {"feature": np.arange(len(next(iter(values.values()))))}
    for name, each in values.items():
        columns |= {f"{name}/{label}": each[:, s].numpy() for s, label in enumerate(labels)}
    return pd.DataFrame(columns)
