"""The dates of a feature, in the order in which they come: five different questions that "when" can mean.

1. *context readable*: R2 over text reaches .4 of its largest (`evolution.presence`). The activations tell where the
   feature fires, which may be long before they tell what it says there.
2. *concept readable*: R2 on the task's paired prompts reaches .7 of its largest (`evolution.concepts`).
3. *read out*: the snapshot acts on the feature's late value once that is put in (`read_out`).
4. *matters*: the effect, |IE|, reaches a tenth of its largest (`attribution`), if one of them is significant.
5. *model succeeds*: accuracy on the task reaches .75, half-way between chance and perfect.

Each is the first snapshot from which this holds for two in a row, or until the end. They are dates of different
readings with different errors, so that their order is not given by definition: it is what there is to look at.

Each has an interval of about 95 %. Of the first two it is that of a bootstrap (`births`, `concepts`). The others
compare a value with a threshold at every snapshot: their dates are no earlier than where the upper end of the value's
95 % interval reaches it, and no later than where the lower end does. Values and intervals are those of `read_out` (over
groups of prompts), of `attribution` (the same; the threshold has the error of the largest effect) and of
`Task.accuracy` (over items).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from crosslens.causal.attribution import Attribution
from crosslens.causal.read_out import READ_OUT
from crosslens.causal.relative import effect_interval, significant
from crosslens.evolution.lifecycles import birth_index

DATES = {
    "context": "context readable",
    "concept": "concept readable",
    "read_out": "read out",
    "matters": "matters",
    "succeeds": "model succeeds",
}
"""Name of each date in tables, and in words."""
SUCCESS = 0.75
MATTERS = 0.1
"""Share of its largest |IE| from which a feature matters."""
RUN = 2
"""Snapshots in a row for which something holds to have begun."""
_SURE = 0.05
_ENDS = ("", "_low", "_high")


def feature_dates(
    ie: Attribution,
    *,
    births: pd.DataFrame | None,
    concepts: pd.DataFrame | None,
    read: pd.DataFrame,
    accuracy: pd.DataFrame | None,
) -> pd.DataFrame:
    """The five dates of some features.

    Args:
        ie: effects on the task.
        births: lifecycles by R2 over text, as from `Evolution.lifecycles`: feature, birth, birth_low, birth_high.
        concepts: the births of `evolution.concept_births`.
        read: the result of `read_out`, whose features are dated.
        accuracy: of the task, as from `Task.accuracy`; snapshots without effects are left out.

    Returns:
        A row per feature: feature; for each of context, concept, read_out, matters and succeeds the date (index of the
        snapshot; missing if that never holds or is not known), <date>_step, <date>_low and <date>_high (95 % interval;
        S for never); concept_q (that the concept is born after the first snapshot).
    """
    S, ids = len(ie.labels), read["feature"].dropna().astype(int).unique()
    readable = None if concepts is None else pd.DataFrame(concepts[concepts["readable_q"] <= _SURE])
    found: dict[str, pd.DataFrame] = {
        "context": _births(births, ids),
        "concept": _births(readable, ids),
        "read_out": _dates(*_read_out(read, ids)),
        "matters": _dates(*_matters(ie, ids)),
        "succeeds": _dates(*_succeeds(accuracy, ie.labels, len(ids))),
    }
    table, steps = pd.DataFrame({"feature": ids}), pd.array(ie.steps, dtype="Int64")
    for name, dates in found.items():
        at = dates[""].where(dates[""] < S).astype("Int64")
        table[name] = at
        table[f"{name}_step"] = pd.api.extensions.take(steps, at.fillna(-1).to_numpy(dtype=int), allow_fill=True)
        for end in _ENDS[1:]:
            table[f"{name}{end}"] = dates[end].astype("Int64")
    q = np.nan if readable is None else readable.set_index("feature")["q"].reindex(ids).to_numpy(dtype=float)
    return table.assign(concept_q=q)


def _births(births: pd.DataFrame | None, ids: Int[np.ndarray, " m"]) -> pd.DataFrame:
    """Births that are known already, with their intervals."""
    known = pd.DataFrame({"feature": []}) if births is None else births
    known = known.set_index("feature").reindex(index=ids, columns=[f"birth{end}" for end in _ENDS])
    return known.set_axis(list(_ENDS), axis=1).reset_index(drop=True).astype("Int64")


def _dates(holds: Bool[np.ndarray, "m S"], may: Bool[np.ndarray, "m S"], must: Bool[np.ndarray, "m S"]) -> pd.DataFrame:
    """Where something begins to hold, may hold, and surely holds; all missing if it never may."""
    dates = [birth_index(each, RUN) for each in (holds, may | holds, must & holds)]
    table = pd.DataFrame(dict(zip(_ENDS, dates, strict=True)), dtype="Int64")
    return table.where(pd.Series((may | holds).any(1)))


def _read_out(read: pd.DataFrame, ids: Int[np.ndarray, " m"]) -> tuple[Any, Any, Any]:
    columns = ["read_out", "random_share", *(f"{way}{end}" for way in ("share", "mapped_share") for end in _ENDS[1:])]
    wide = read.dropna(subset="feature").pivot(index="feature", columns="snapshot", values=columns).loc[ids]
    value = {name: wide[name].to_numpy(dtype=float) for name in columns}
    least = np.fmax(READ_OUT, value["random_share"])
    may, must = ((value[f"share{end}"] >= least) | (value[f"mapped_share{end}"] >= least) for end in ("_high", "_low"))
    return value["read_out"].astype(bool), may, must


def _matters(ie: Attribution, ids: Int[np.ndarray, " m"]) -> tuple[Any, Any, Any]:
    size, width = (each[ids].abs().numpy() for each in (ie.effects, effect_interval(ie)[1] - ie.effects))
    peak = size.argmax(1, keepdims=True)
    least, error = (MATTERS * np.take_along_axis(each, peak, 1) for each in (size, width))
    width = np.hypot(width, error)
    counts = significant(ie)[ids].any(-1, keepdim=True).numpy()
    return counts & (size >= least), counts & (size + width >= least), counts & (size - width >= least)


def _succeeds(accuracy: pd.DataFrame | None, labels: list[str], n: int) -> tuple[Any, Any, Any]:
    """The same for all features."""
    names = ["accuracy", "accuracy_high", "accuracy_low"]
    values = np.full((len(labels), 3), np.nan)
    if accuracy is not None:
        values = accuracy.drop_duplicates("label").set_index("label")[names].reindex(labels).to_numpy(dtype=float)
    at, may, must = (np.broadcast_to(column >= SUCCESS, (n, len(labels))) for column in values.T)
    return at, may, must
