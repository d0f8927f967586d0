"""Mutated files of every kind: refused in one line, repaired and told, or harmless."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark_runs import benchmark_counts


@pytest.mark.exhaustive
def test_mutated_files_are_told(tmp_path: Path):
    rows, said = benchmark_counts("mutations.py", "--n", "20", "--seed", "7", cwd=tmp_path)
    assert len(rows) > 15, said
    for tried, same, other, told, raw, silent, hang in rows.values():
        assert raw == silent == hang == 0 and tried == same + other + told, said
        assert tried >= 20
    sealed = ("cfg.json", "weights", "cache manifest", "cache tokens", "checkpoint state", "table", "run.json")
    assert all(rows[kind][2] == 0 < rows[kind][3] for kind in sealed), said  # none is read as something else
