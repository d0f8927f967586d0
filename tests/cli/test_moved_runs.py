"""A run that was copied elsewhere speaks of its own place."""

from __future__ import annotations

from pathlib import Path

from crosslens.cli.status import inspect_run
from crosslens.rundir import RunDir


def test_the_next_command_names_the_copy(tmp_path: Path) -> None:
    for place in ("--run-dir /old/place", "--run-dir=/old/place"):
        run = RunDir(tmp_path / "copy")
        run.write_json({"command": ["crosslens", "train", "--lr", "0.1", *place.split()], "identity": {}})
        assert inspect_run(run.path).next.endswith(str(run.path)) and "/old/place" not in inspect_run(run.path).next
