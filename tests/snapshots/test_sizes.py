"""Sizes that no model has are refused before anything is built of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 9_999), ("num_labels", 10**9), ("hidden_size", 10**12),
        ("vocab_size", 10**30), ("hidden_size", -(10**12)),
        ("max_position_embeddings", 10**15), ("some_new_entry", 10**30), ("nested", {"factor": [1, 10**40]}),
    ],
)  # fmt: skip
def test_a_config_of_impossible_sizes(tiny_snapshots: Path, tmp_path: Path, name: str, value: Any) -> None:
    shutil.copytree(tiny_snapshots, tmp_path / "models")
    path = tmp_path / "models" / "step10" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(UserError, match=r"snapshot 'step10': .*config.json: .* is more than .*, which no model has"):
        Snapshots.local(tmp_path / "models")["step10"].config()


@pytest.mark.parametrize("row", [{"step": 10**30}, {"tokens": -(10**25)}])
def test_a_list_of_snapshots_with_impossible_steps(tiny_snapshots: Path, tmp_path: Path, row: dict[str, int]) -> None:
    shutil.copytree(tiny_snapshots, tmp_path / "models")
    rows = [{"label": "a", "path": "step0", **row}]
    (tmp_path / "models" / "snapshots.json").write_text(json.dumps({"snapshots": rows}))
    with pytest.raises(UserError, match="a step is more than 9,007,199,254,740,992"):
        Snapshots.local(tmp_path / "models")
