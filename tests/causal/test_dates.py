"""The dates of features, from tables whose answer is known."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

from crosslens.causal.attribution import attribute
from crosslens.causal.dates import DATES, feature_dates
from crosslens.causal.read_out import read_out
from crosslens.causal.relative import significant
from crosslens.evolution.lifecycles import classify_lifecycles
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import F, make_crosscoder


@pytest.fixture(scope="module")
def found(snaps: Snapshots, task: Task) -> dict[str, Any]:
    runs = PromptRuns(make_crosscoder(snaps, "batchtopk_crosscoder"), snaps, task, paired=True)
    ids = runs.features[:4]
    read = read_out(runs, ids)
    read.loc[read["feature"] == int(ids[0]), "read_out"] = [False, True, True]
    read.loc[read["feature"] == int(ids[1]), "read_out"] = [True, False, False]
    read.loc[read["feature"] == int(ids[2]), "read_out"] = [False, True, False]
    return {"ie": attribute(runs, baseline="patch"), "ids": ids.tolist(), "read": read}


def test_every_date_is_the_first_snapshot_of_two(found: dict[str, Any]) -> None:
    ids, ie = found["ids"], found["ie"]
    decodability = torch.full((F, 3), torch.nan)
    decodability[ids[0]] = torch.tensor([0.1, 0.3, 0.4])
    decodability[ids[1]] = torch.tensor([0.01, 0.02, 0.01])  # too little to be read
    concepts = pd.DataFrame(
        {
            "feature": ids[:3], "birth": pd.array([1, 2, 3], dtype="Int64"), "birth_low": [0, 2, 3],
            "birth_high": [2, 2, 3], "readable_q": [0.01, 0.5, 0.01], "q": [0.02, 0.9, 0.9],
        }
    )  # fmt: skip
    labels = ["before", *ie.labels]
    accuracy = pd.DataFrame({"snapshot": range(4), "label": labels, "accuracy": [0.9, 0.5, 0.8, 0.76]})
    table = feature_dates(
        ie, decodability=decodability, concepts=concepts, read=found["read"], accuracy=accuracy
    ).set_index("feature")
    assert table.index.tolist() == ids
    assert table["context"].tolist() == [1, pd.NA, pd.NA, pd.NA]
    assert table["concept"].tolist() == [1, pd.NA, pd.NA, pd.NA]  # unsure, and never above half for two in a row
    assert (table["concept_low"].iloc[0], table["concept_high"].iloc[0]) == (0, 2)
    assert table["concept_q"].iloc[0] == 0.02
    # present at the first snapshot counts however short, as for other lifecycles
    assert table["read_out"].tolist()[:3] == [1, 0, pd.NA]
    assert table["succeeds"].tolist() == [1] * 4  # the snapshot without effects does not count
    for feature in ids:
        size = ie.effects[feature].abs()
        expected = classify_lifecycles(size[None], 0.1)["birth"][0] if significant(ie)[feature].any() else pd.NA
        assert table.loc[feature, "matters"] is expected or table.loc[feature, "matters"] == expected
    for name in DATES:
        for at, step in zip(table[name], table[f"{name}_step"], strict=True):
            assert (pd.isna(at) and pd.isna(step)) or step == ie.steps[at]


def test_what_is_not_known_is_missing(found: dict[str, Any]) -> None:
    table = feature_dates(found["ie"], decodability=None, concepts=None, read=found["read"], accuracy=None)
    assert table[["context", "concept", "succeeds", "concept_q"]].isna().all().all()
