"""Stability across runs: match features of two crosscoders and compare their lifecycles.

1. `match_features` pairs the features of two crosscoders by the cosine of their decoders over the snapshots they share.
2. `compare_features` reports the share of features with a partner and how often partners have the same lifecycle, for
   crosscoders that differ in seed, dictionary size, or choice of snapshots.
3. `compare_evolutions` tabulates summary statistics of several crosscoders. This also works for different models, such
   as two warmups, whose features cannot be matched.

These comparisons are new here.

Symbols: S snapshots, D d_model, F and G features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.geometry import rotation_per_interval, total_dimensionality
from crosslens.evolution.lifecycles import Firing, classify_lifecycles, evolve, measure_firing, snapshot_columns

_BLOCK = 4096  # features at a time
HUNGARIAN = 4096  # most features for which `match_features` defaults to the optimal assignment


def match_features(
    a: Crosscoder,
    b: Crosscoder,
    *,
    alive_a: Bool[Tensor, " F"] | None = None,
    alive_b: Bool[Tensor, " G"] | None = None,
    method: str | None = None,
) -> pd.DataFrame:
    """Pair the features of two crosscoders by the cosine of their decoders over the snapshots they share.

    Args:
        a: a crosscoder.
        b: another crosscoder of the same model, with another seed, size, or choice of snapshots.
        alive_a: features of `a` to match, such as `evolve(...)["alive"]`; all with a decoder if None.
        alive_b: the same for `b`.
        method: "hungarian", the assignment with the largest sum of cosines; "mutual", pairs that are each other's
            nearest neighbour, for any number of features; None uses "hungarian" up to 4,096 features.

    Returns:
        A row per pair: feature (of `a`), partner (of `b`), cosine; by descending cosine. No feature occurs twice.

    Raises:
        UserError: no common snapshot, different d_model, nothing to match, an unknown method.
    """
    if method not in (None, "hungarian", "mutual"):
        raise UserError(f"method={method!r} is unknown: use 'hungarian', 'mutual', or None")
    at_a, at_b = shared_snapshots(a, b)
    (ids_a, rows_a), (ids_b, rows_b) = (
        _unit_rows(crosscoder, at, alive, name)
        for crosscoder, at, alive, name in ((a, at_a, alive_a, "first"), (b, at_b, alive_b, "second"))
    )
    if method is None:
        method = "hungarian" if max(len(ids_a), len(ids_b)) <= HUNGARIAN else "mutual"
    if method == "hungarian":
        cosines = rows_a @ rows_b.T
        i, j = (torch.from_numpy(index) for index in linear_sum_assignment(cosines.numpy(), maximize=True))
        cosine = cosines[i, j]
    else:
        i, j, cosine = _mutual(rows_a, rows_b)
    table = pd.DataFrame({"feature": ids_a[i].numpy(), "partner": ids_b[j].numpy(), "cosine": cosine.numpy()})
    return table.sort_values("cosine", ascending=False, ignore_index=True, kind="stable")


def compare_features(
    a: Crosscoder,
    b: Crosscoder,
    *,
    alive_a: Bool[Tensor, " F"] | None = None,
    alive_b: Bool[Tensor, " G"] | None = None,
    method: str | None = None,
    min_cosine: float = 0.7,
    presence: float = 0.5,
    min_run: int = 2,
) -> dict[str, float]:
    """Compare the features of two crosscoders: the share found by both, and whether their lifecycles agree.

    Lifecycles are classified on the snapshots that both crosscoders have.

    Args:
        a: a crosscoder.
        b: another crosscoder of the same model.
        alive_a: features of `a` to match; all with a decoder if None.
        alive_b: the same for `b`.
        method: as in `match_features`.
        min_cosine: two features whose cosine is at least this are the same feature.
        presence: a feature is present where its norm is at least this share of its largest norm.
        min_run: snapshots in a row a feature must be present for to count as born.

    Returns:
        snapshots (in common), matched (pairs), share_a and share_b (of the features of each), median_cosine (of the
        matched), same_origin, same_fate, and for pairs that both have a birth: same_birth, birth_within_1 (snapshots),
        and same_birth_by_chance, the value of same_birth if partners were shuffled. NaN if there is no pair.

    Raises:
        UserError: as `match_features` and `classify_lifecycles`.
    """
    shared = shared_snapshots(a, b)
    S = len(shared[0])
    if S < 2:
        raise UserError(f"the crosscoders have {S} snapshot in common: comparing lifecycles needs at least 2")
    pairs = match_features(a, b, alive_a=alive_a, alive_b=alive_b, method=method)
    kept = pairs.loc[pairs["cosine"] >= min_cosine]
    left, right = (
        classify_lifecycles(crosscoder.decoder_norms.detach().cpu()[:, at], presence, min_run=min_run)
        .iloc[kept[name]]
        .reset_index(drop=True)
        for crosscoder, at, name in ((a, shared[0], "feature"), (b, shared[1], "partner"))
    )
    births = np.stack([table["birth"].to_numpy(dtype=float, na_value=np.nan) for table in (left, right)])
    births = births[:, np.isfinite(births).all(0)].astype(int)
    apart = np.abs(births[0] - births[1])
    frequencies = [np.bincount(dates, minlength=S) / max(1, len(dates)) for dates in births]
    return {
        "snapshots": S,
        "matched": len(kept),
        "share_a": len(kept) / len(_live(a, shared[0], alive_a)),
        "share_b": len(kept) / len(_live(b, shared[1], alive_b)),
        "median_cosine": float(np.median(kept["cosine"])) if len(kept) else float("nan"),
        "same_origin": _mean((left["origin"] == right["origin"]).to_numpy()),
        "same_fate": _mean((left["fate"] == right["fate"]).to_numpy()),
        "same_birth": _mean(apart == 0),
        "birth_within_1": _mean(apart <= 1),
        "same_birth_by_chance": float(frequencies[0] @ frequencies[1]) if len(apart) else float("nan"),
    }


def compare_evolutions(
    crosscoders: Mapping[str, tuple[Crosscoder, Activations | Firing]], *, presence: float = 0.5, min_run: int = 2
) -> pd.DataFrame:
    """Tabulate summary statistics of several crosscoders, to see whether they depend on size, snapshots, or seed.

    Args:
        crosscoders: by name, each with the activations of its own snapshots or the result of `measure_firing`.
        presence: a feature is present where its norm is at least this share of its largest norm.
        min_run: snapshots in a row a feature must be present for to count as born.

    Returns:
        A row per crosscoder: name, snapshots, features, alive; initial, emergent, never, transient (shares of live
        features); median_birth (step, of emergent features); rotation_from, rotation_to (labels of the interval where
        most features rotate), rotation_from_step, rotation_to_step, rotation_share (of all features that rotate);
        dimensionality_first, dimensionality_least, dimensionality_last (shares of D). Steps are missing if none are
        recorded, the interval if no feature rotates.

    Raises:
        UserError: no crosscoder, or as `evolve`.
    """
    if not crosscoders:
        raise UserError("crosscoders is empty: give one or more by name")
    rows: list[dict[str, Any]] = []
    for name, (crosscoder, acts) in crosscoders.items():
        firing = measure_firing(crosscoder, acts)
        table = evolve(crosscoder, firing, presence=presence, min_run=min_run)
        live = table[table["alive"]]
        intervals = rotation_per_interval(crosscoder, torch.tensor(table["alive"].to_numpy()))
        most = intervals.loc[intervals["largest"]]
        share = total_dimensionality(crosscoder, firing, presence=presence)["share"].to_numpy()
        row: dict[str, Any] = {
            "name": name,
            "snapshots": crosscoder.n_snapshots,
            "features": len(table),
            "alive": len(live),
            **{origin: _mean((live["origin"] == origin).to_numpy()) for origin in ("initial", "emergent", "never")},
            "transient": _mean((live["fate"] == "transient").to_numpy()),
            "median_birth": live.loc[live["origin"] == "emergent", "birth_step"].astype("Float64").median(),
        }
        for column in ("from", "to", "from_step", "to_step", "share"):
            row[f"rotation_{column}"] = next(iter(most[column]), None)
        row |= {"dimensionality_first": share[0], "dimensionality_least": share.min(), "dimensionality_last": share[-1]}
        rows.append(row)
    return pd.DataFrame(rows)


def shared_snapshots(a: Crosscoder, b: Crosscoder) -> tuple[list[int], list[int]]:
    """Indices of the snapshots that two crosscoders have in common, by weights if recorded, otherwise by label.

    Raises:
        UserError: no common snapshot, or different d_model.
    """
    if a.d_model != b.d_model:
        raise UserError(
            f"the crosscoders have d_model {a.d_model} and {b.d_model}: only crosscoders of one model can be matched"
        )
    names: list[list[str]] = []
    for crosscoder in (a, b):
        recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
        labels = snapshot_columns(crosscoder)["label"].tolist()
        names.append(
            [row.get("fingerprint") or label for row, label in zip(recorded or [{}] * len(labels), labels, strict=True)]
        )
    pairs = [(names[0].index(name), s) for s, name in enumerate(names[1]) if name in names[0]]
    if not pairs:
        raise UserError(
            f"the crosscoders have no snapshot in common ({', '.join(snapshot_columns(a)['label'])} and "
            f"{', '.join(snapshot_columns(b)['label'])}; equal labels have different weights): use compare_evolutions "
            "for different models"
        )
    return [i for i, _ in pairs], [j for _, j in pairs]


def _live(crosscoder: Crosscoder, at: list[int], alive: Tensor | None) -> Int[Tensor, " n"]:
    """Live features with a decoder at one of the snapshots or more."""
    real = (crosscoder.decoder_norms.detach()[:, at] > 0).any(1).cpu()
    return (real if alive is None else real & alive).nonzero().flatten()


def _unit_rows(
    crosscoder: Crosscoder, at: list[int], alive: Tensor | None, name: str
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n E"]]:
    """Features to match, and their decoders over the given snapshots as unit vectors."""
    ids = _live(crosscoder, at, alive)
    if not len(ids):
        raise UserError(f"the {name} crosscoder has no live feature to match: train it longer or with a larger k")
    rows = crosscoder.W_dec_by_snapshot.detach()[:, at].flatten(1).float().cpu()
    return ids, normalize(rows[ids], dim=1)


def _mutual(rows_a: Float[Tensor, "n E"], rows_b: Float[Tensor, "m E"]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs that are each other's nearest neighbour (the first in a tie), and their cosines."""
    best_b = torch.full((len(rows_b),), -torch.inf)
    nearest_a, nearest_b = torch.empty(len(rows_a), dtype=torch.int64), torch.zeros(len(rows_b), dtype=torch.int64)
    for start in range(0, len(rows_a), _BLOCK):
        cosines = rows_a[start : start + _BLOCK] @ rows_b.T
        nearest_a[start : start + _BLOCK] = cosines.argmax(1)
        value, index = cosines.max(0)
        closer = value > best_b
        best_b[closer], nearest_b[closer] = value[closer], index[closer] + start
    i = (nearest_b[nearest_a] == torch.arange(len(rows_a))).nonzero().flatten()
    return i, nearest_a[i], best_b[nearest_a[i]]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
