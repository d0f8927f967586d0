"""The soak: some random faults over a whole analysis, none silent and none raw."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.exhaustive
def test_random_faults_are_survived_or_told(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "faults.py", "--n", "24", "--seed", "7"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ") and "fault" not in line]
    counts = [[int(cell) for cell in row[1:]] for row in rows]
    tried, survived, told, silent, raw, hang = map(sum, zip(*counts, strict=True))
    assert tried == 24 == survived + told and silent == raw == hang == 0, done.stdout + done.stderr[-2000:]
    assert survived and told
