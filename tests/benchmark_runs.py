"""Benchmarks that count outcomes, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def benchmark_counts(program: str, *arguments: str, cwd: Path) -> tuple[dict[str, list[int]], str]:
    """The rows of the table that a program prints, by their first cell, and all that it said."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / program, *arguments],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    rows = {row[0].strip(): [int(cell) for cell in row[1:]] for row in lines}
    return rows, done.stdout + done.stderr[-2000:]
