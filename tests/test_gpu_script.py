"""`benchmarks/gpu.sh` on a CPU: every program that it starts, its report, and what it says of a part that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "Tests": "passed",
    "Large products": "| TFLOP/s |",
    "Training step": "| encoder product |",
    "Training step, paper's shape": "| encoder product |",
    "Profile of training steps": "**jumprelu**",
    "From the cache to the device, and whole runs": "| saelens |",
    "Density from which dense products are faster": "| 0.2 |",
}


def run(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "REPORTS": str(folder)}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "--device", "cpu", "--tiny"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def sections(folder: Path) -> dict[str, str]:
    """Text of the report's sections, by title without its seconds."""
    (report,) = folder.glob("*-gpu-*.md")
    head, *parts = report.read_text().split("\n## ")
    assert "- Command: `bash benchmarks/gpu.sh --device cpu --tiny`" in head
    return {part.split("\n")[0].rsplit(": ", 1)[0]: part for part in parts}


@pytest.mark.exhaustive
def test_every_part_runs(tmp_path: Path):
    done = run(tmp_path, sys.executable)
    assert done.returncode == 0, done.stderr[-3000:]
    found = sections(tmp_path)
    assert list(found) == list(SECTIONS)
    for title, expected in SECTIONS.items():
        assert expected in found[title], found[title]
        assert "FAILED" not in found[title]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_failing_part_is_named_and_the_others_run(tmp_path: Path):
    """With an interpreter that does nothing but write the report, and fails where density is measured."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase "$*" in\n*report*) exec {sys.executable} "$@" ;;\n'
        "*density*) echo no memory >&2; exit 3 ;;\nesac\necho did nothing\n"
    )
    python.chmod(0o755)
    done = run(tmp_path, str(python))
    assert done.returncode == 1
    assert "failed: Density from which dense products are faster (3)" in done.stderr
    found = sections(tmp_path)
    assert list(found) == list(SECTIONS)
    assert "FAILED with status 3" in found["Density from which dense products are faster"]
    assert "no memory" in found["Density from which dense products are faster"]
    assert "did nothing" in found["Training step"] and "FAILED" not in found["Training step"]
