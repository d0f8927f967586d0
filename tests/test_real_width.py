"""`benchmarks/real_width.py` on a small model: every command, the eviction, and the forecasts that do not depend on
speed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.exhaustive
def test_every_command_runs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/real_width.py", "--tiny", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in done.stdout.splitlines()
        if len(cells := line.split("|")) > 3
    }
    assert 0.85 < float(rows["disk of the cache"][-1]) < 1.15
    assert 0.9 < float(rows["weights on the disk at a time"][-1]) < 1.1  # of one snapshot
    assert {"harvest", "train, one process", "train, two processes", "evolve"} <= rows.keys()
    assert re.search(r"snapshots +3 x d_model 32 at 2 hook points, .*3 to be downloaded", done.stdout), done.stdout
