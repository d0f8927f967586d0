"""The dates of a feature, in the order in which they come: five different questions that "when" can mean.

1. *context readable*: R2 over text reaches half of its largest (`evolution.presence`). The activations tell where the
   feature fires, which may be long before they tell what it says there.
2. *concept readable*: R2 on the task's paired prompts reaches .7 of its largest (`evolution.concepts`).
3. *read out*: the snapshot acts on the feature's late value once that is put in (`read_out`).
4. *matters*: the effect, |IE|, reaches a tenth of its largest (`attribution`), if one of them is significant.
5. *model succeeds*: accuracy on the task reaches .75, half-way between chance and perfect.

Each is the first snapshot from which this holds for two in a row, or until the end. They are dates of different
readings with different errors, so that their order is not given by definition: it is what there is to look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from crosslens.causal.attribution import Attribution
from crosslens.causal.relative import significant
from crosslens.evolution.births import MIN_R2
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
"""Share of a feature's largest effect from which it matters."""
RUN = 2
"""Snapshots in a row for which something holds to have begun."""
_SURE = 0.05


def feature_dates(
    ie: Attribution,
    *,
    decodability: Float[Tensor, "F S"] | None,
    concepts: pd.DataFrame | None,
    read: pd.DataFrame,
    accuracy: pd.DataFrame | None,
) -> pd.DataFrame:
    """The five dates of some features.

    Args:
        ie: effects on the task.
        decodability: R2 of every feature at every snapshot over text.
        concepts: the births of `evolution.concept_births`.
        read: the result of `read_out`, whose features are dated.
        accuracy: of the task, as from `Task.accuracy`; snapshots without effects are left out.

    Returns:
        A row per feature: feature; context, concept, read_out, matters, succeeds (index of the snapshot; missing if
        that never holds or is not known) and <date>_step; concept_q (that the concept is born after the first
        snapshot), concept_low and concept_high (95 % interval of that date).
    """
    S, ids = len(ie.labels), read["feature"].dropna().astype(int).unique()
    single = pd.DataFrame(read.sort_values("snapshot"))
    by_feature: Mapping[int, Any] = {} if concepts is None else concepts.set_index("feature").to_dict("index")
    counted = significant(ie).numpy()
    succeeds = None
    if accuracy is not None:
        values = accuracy.drop_duplicates("label").set_index("label")["accuracy"].reindex(ie.labels)
        succeeds = _first(values.to_numpy(dtype=float) >= SUCCESS)
    rows: list[dict[str, Any]] = []
    for feature in ids.tolist():
        row: dict[str, Any] = {"feature": feature}
        if decodability is not None:
            r2 = np.nan_to_num(decodability[feature].numpy()).clip(0)
            row["context"] = _first(r2 >= 0.5 * r2.max()) if r2.max() >= MIN_R2 else None
        concept = by_feature.get(feature)
        if concept is not None and concept["readable_q"] <= _SURE and not pd.isna(concept["birth"]):
            row["concept"] = int(concept["birth"]) if concept["birth"] < S else None
            row |= {f"concept_{end}": concept[f"birth_{end}"] for end in ("low", "high")}
            row["concept_q"] = concept["q"]
        row["read_out"] = _first(single.loc[single["feature"] == feature, "read_out"].to_numpy(dtype=bool))
        size = np.abs(ie.effects[feature].numpy())
        row["matters"] = _first(size >= MATTERS * size.max()) if counted[feature].any() else None
        row["succeeds"] = succeeds
        rows.append(row)
    columns = [*DATES, "concept_low", "concept_high"]
    table = pd.DataFrame(rows).reindex(columns=["feature", *columns, "concept_q"])
    steps = pd.array(ie.steps, dtype="Int64")
    for name in columns:
        table[name] = table[name].astype("Int64")
    for name in DATES:
        where = table[name].fillna(-1).to_numpy(dtype=np.int64)
        table.insert(list(table).index(name) + 1, f"{name}_step", pd.api.extensions.take(steps, where, allow_fill=True))
    table["concept_q"] = table["concept_q"].astype(float)
    return table


def _first(holds: Any) -> int | None:
    """The first snapshot from which something holds; None if there is none."""
    found = int(birth_index(np.asarray(holds), RUN))
    return found if found < len(holds) else None
