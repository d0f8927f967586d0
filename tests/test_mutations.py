"""Mutated files of every kind: refused in one line, repaired and told, or harmless."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.exhaustive
def test_mutated_files_are_told(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "mutations.py", "--n", "20", "--seed", "7"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    rows = {row[0].strip(): [int(cell) for cell in row[1:]] for row in lines}
    assert len(rows) > 15, done.stdout + done.stderr[-2000:]
    for tried, same, other, told, raw, silent, hang in rows.values():
        assert raw == silent == hang == 0 and tried == same + other + told, done.stdout
        assert tried >= 20
    sealed = ("cfg.json", "weights", "cache manifest", "cache tokens", "checkpoint state", "table", "run.json")
    assert all(rows[kind][2] == 0 < rows[kind][3] for kind in sealed), done.stdout  # none is read as something else
