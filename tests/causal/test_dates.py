"""The dates of features, from tables whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from crosslens.causal.attribution import Attribution, attribute
from crosslens.causal.dates import DATES, feature_dates
from crosslens.causal.read_out import read_out
from crosslens.causal.relative import significant
from crosslens.evolution.lifecycles import classify_lifecycles
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import make_crosscoder


@pytest.fixture(scope="module")
def found(snaps: Snapshots, task: Task) -> dict[str, Any]:
    runs = PromptRuns(make_crosscoder(snaps, "batchtopk_crosscoder"), snaps, task, paired=True)
    ids = runs.features[:4]
    return {"ie": attribute(runs, baseline="patch"), "ids": ids.tolist(), "read": read_out(runs, ids)}


def births(features: list[int], low: list[Any], at: list[Any], high: list[Any]) -> pd.DataFrame:
    columns = {"birth_low": low, "birth": at, "birth_high": high}
    table = pd.DataFrame({name: pd.array(values, dtype="Int64") for name, values in columns.items()})
    return table.assign(feature=features, readable_q=[0.01, 0.5, 0.01], q=[0.02, 0.9, 0.9])


def dates(table: pd.DataFrame, name: str) -> list[tuple[Any, ...]]:
    """(low, at, high) of every feature; None if missing."""
    columns = table[[f"{name}_low", name, f"{name}_high"]].astype(object)
    return [tuple(None if pd.isna(value) else int(value) for value in row) for row in columns.to_numpy()]


def test_births_are_taken_as_they_are(found: dict[str, Any]) -> None:
    ids, ie = found["ids"], found["ie"]
    text = births(ids[:3], [0, None, 1], [1, None, None], [2, None, 3]).drop(columns=["q", "readable_q"])
    concepts = births(ids[:3], [0, 2, 2], [1, 2, 3], [2, 2, 3])
    table = feature_dates(ie, births=text, concepts=concepts, read=found["read"], accuracy=None)
    assert table["feature"].tolist() == ids
    assert dates(table, "context") == [(0, 1, 2), (None,) * 3, (1, None, 3), (None,) * 3]
    # not readable for sure; and never above half for two in a row
    assert dates(table, "concept") == [(0, 1, 2), (None,) * 3, (2, None, 3), (None,) * 3]
    assert table["concept_q"].tolist()[0] == 0.02 and table["concept_q"].isna().tolist() == [False, True, False, True]
    for name in DATES:
        for at, step in zip(table[name], table[f"{name}_step"], strict=True):
            assert (pd.isna(at) and pd.isna(step)) or step == ie.steps[at]


def test_read_out_begins_between_the_ends_of_the_shares(found: dict[str, Any]) -> None:
    """The random share, where it is above a tenth, is the threshold; the better of both ways counts."""
    read, ids = found["read"].copy(), found["ids"]
    rows = {
        "read_out": [[False, True, True], [True, False, False], [False, True, False], [False, False, False]],
        "share_low": [[-0.1, 0.05, 0.3], [0.2, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        "share_high": [[0.05, 0.2, 0.9], [0.4, 0.1, 0.1], [0.09, 0.3, 0.05], [0.0, 0.0, 0.0]],
        "mapped_share_low": [[0.0, 0.0, 0.0]] * 3 + [[-0.3, -0.3, 0.1]],
        "mapped_share_high": [[0.0, 0.0, 0.0]] * 3 + [[-0.1, 0.2, 0.2]],
        "random_share": [[0.0, 0.0, 0.0], [0.0, 0.2, 0.2], [0.0, 0.0, 0.0], [0.0, 0.15, np.nan]],
    }
    for name, values in rows.items():
        for feature, row in zip(ids, values, strict=True):
            read.loc[read["feature"] == feature, name] = row
    table = feature_dates(found["ie"], births=None, concepts=None, read=read, accuracy=None)
    # present at the first snapshot counts however short, as for other lifecycles
    assert dates(table, "read_out") == [(1, 1, 2), (0, 0, 0), (3, None, 3), (1, None, 3)]


def test_effects_matter_from_a_tenth_of_the_largest(found: dict[str, Any]) -> None:
    ids, ie = found["ids"], found["ie"]
    table = feature_dates(ie, births=None, concepts=None, read=found["read"], accuracy=None).set_index("feature")
    for feature in ids:
        size = ie.effects[feature].abs()
        expected = classify_lifecycles(size[None], 0.1)["birth"][0] if significant(ie)[feature].any() else pd.NA
        assert table.loc[feature, "matters"] is expected or table.loc[feature, "matters"] == expected
    planted = with_effects(ie, ids[0], [0.02, -0.3, 1.0], [0.01, 0.05, 0.02])
    unsure = with_effects(ie, ids[0], [0.02, -0.12, 1.0], [0.01, 0.05, 0.02])
    silent = replace(planted, p=torch.ones_like(planted.p))
    for effects, wanted in ((planted, (1, 1, 1)), (unsure, (1, 1, 2)), (silent, (None,) * 3)):
        table = feature_dates(effects, births=None, concepts=None, read=found["read"], accuracy=None)
        assert dates(table, "matters")[0] == wanted


def with_effects(ie: Attribution, feature: int, effects: list[float], errors: list[float]) -> Attribution:
    found = replace(ie, effects=ie.effects.clone(), standard_errors=ie.standard_errors.clone(), p=ie.p.clone())
    found = replace(found, n_groups=1000, active=ie.active.index_fill(0, torch.tensor(feature), True))
    found.effects[feature], found.standard_errors[feature] = torch.tensor(effects), torch.tensor(errors)
    found.p[feature] = 1e-9
    return found


def test_intervals_of_effects_hold_the_true_date(found: dict[str, Any]) -> None:
    """Effects that rise past a tenth of the largest, with errors: at least 95 % of the intervals hold the date."""
    rng, inside, ie = np.random.default_rng(0), 0, found["ie"]
    for _ in range(400):
        start = int(rng.integers(3))
        true = np.array([0.3 if s >= start else 0.0 for s in range(2)] + [1.0])
        error = np.array([0.1, 0.1, 0.1])
        effects = with_effects(ie, found["ids"][0], list(true + error * rng.normal(size=3)), list(error))
        table = feature_dates(effects, births=None, concepts=None, read=found["read"], accuracy=None)
        low, _, high = dates(table, "matters")[0]
        inside += low <= start <= high
    assert inside >= 380


def test_the_model_succeeds_at_once_for_all_features(found: dict[str, Any]) -> None:
    ie = found["ie"]
    accuracy = pd.DataFrame(
        {
            "label": ["before", *ie.labels], "accuracy": [0.9, 0.5, 0.8, 0.76],
            "accuracy_low": [0.8, 0.4, 0.7, 0.76], "accuracy_high": [1, 0.76, 0.9, 0.8],
        }
    )  # fmt: skip
    table = feature_dates(ie, births=None, concepts=None, read=found["read"], accuracy=accuracy)
    assert dates(table, "succeeds") == [(0, 1, 2)] * 4  # the snapshot without effects does not count


def test_what_is_not_known_is_missing(found: dict[str, Any]) -> None:
    table = feature_dates(found["ie"], births=None, concepts=None, read=found["read"], accuracy=None)
    for name in ("context", "concept", "succeeds"):
        assert dates(table, name) == [(None,) * 3] * 4
    assert table["concept_q"].isna().all()
