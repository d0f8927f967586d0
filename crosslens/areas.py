"""Ablation curves in one number each: how necessary the top features are, and how sufficient.

A curve gives the share of the metric's whole change (see `change_shares`) over the size k of the set: the share that
ablating k features removes, or that keeping k alone leaves. With A features active on the prompts it runs from 0 at
k = 0 to 1 at k = A, both by definition; the measured sizes lie between. The area under it by the trapezoidal rule, on

    u = log(1 + k) / log(1 + A)    "log": the first features weigh most
    u = k / A                      "linear": the mean share over all sizes

is 1 if the first feature does all that all features do, and lies near 0 if only the whole will do. A curve that
overshoots, because features that oppose the answer come last, can have an area above 1. These areas are this project's
own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.integrate import trapezoid

from crosslens.ablation import change_shares
from crosslens.errors import UserError, did_you_mean

AXES = ("log", "linear")


def curve_areas(table: pd.DataFrame, axis: str = "log", floor: float = 0.05) -> pd.DataFrame:
    """Necessity and sufficiency: the area under every curve of an ablation table.

    Args:
        table: from `ablate`; tables of both modes, other values, or with and without the error node can be joined.
        axis: "log" or "linear", the axis of k.
        floor: as in `change_shares`.

    Returns:
        A row per snapshot, kind of set and way of editing: snapshot, label, step, quantity ("necessity" of ablating,
        "sufficiency" of keeping), value, error, features; area (no unit); area_low and area_high, the areas under the
        edges of the band over draws (NaN for a single set): as wide as if a draw kept its rank at every k; n_sizes and
        k_max, how many sizes were measured, and the largest; n_active (A), axis. The area is NaN where the whole change
        is too small to divide by.

    Raises:
        UserError: an unknown axis, or a table that is not of `ablate`.
    """
    if axis not in AXES:
        raise UserError(f"axis={axis!r} is unknown; use one of {AXES}{did_you_mean(axis, AXES)}")
    if missing := [name for name in ("all_edited", "n_features", "metric_low") if name not in table]:
        raise UserError(f"the table lacks {', '.join(missing)}: give one that this release's `ablate` made")
    table = table.reset_index(drop=True)
    shares = {
        edge: pd.Series(change_shares(table.assign(metric=table[column]), floor))
        for edge, column in (("area", "metric"), ("low", "metric_low"), ("high", "metric_high"))
    }
    rows: list[dict[str, Any]] = []
    keys = ["snapshot", "label", "step", "mode", "value", "error", "features"]
    for _, curve in table.groupby(keys, sort=False, dropna=False):
        # cut sets can be equal at several k
        curve = curve.sort_values("k").drop_duplicates("n_features")
        sizes, n_active = np.asarray(curve["n_features"], dtype=float), int(curve["n_active"].iloc[0])
        found = {
            edge: area(sizes, share[curve.index].to_numpy(dtype=float), n_active, axis)
            for edge, share in shares.items()
        }
        rows.append(
            {
                **{key: curve[key].iloc[0] for key in keys if key != "mode"},
                "quantity": "sufficiency" if curve["mode"].iloc[0] == "keep" else "necessity",
                "area": found["area"],
                "area_low": min(found["low"], found["high"]),
                "area_high": max(found["low"], found["high"]),
                "n_sizes": len(curve),
                "k_max": int(sizes.max()),
                "n_active": n_active,
                "axis": axis,
            }
        )
    return pd.DataFrame(rows)


def area(sizes: Float[np.ndarray, " n"], shares: Float[np.ndarray, " n"], n_active: int, axis: str = "log") -> float:
    """Area under one curve from (0, 0) through its points to (n_active, 1), where 1 on the axis is n_active."""
    inside = sizes < n_active
    k = np.concatenate([[0.0], sizes[inside], [n_active]])
    y = np.concatenate([[0.0], shares[inside], [1.0]])
    u = np.log1p(k) / np.log1p(n_active) if axis == "log" else k / n_active
    return float(trapezoid(y, u))
