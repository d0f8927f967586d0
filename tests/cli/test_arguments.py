"""What is typed on the command line, turned into snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosslens.cli.arguments import parse_snapshots
from crosslens.errors import UserError


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (None, ["step0", "step10", "step20"]),
        ("all", ["step0", "step10", "step20"]),
        ("10,20", ["step10", "step20"]),
        ("20,0", ["step0", "step20"]),  # in the order of training
        ("step10,20", ["step10", "step20"]),
        ("step10", ["step10"]),
        ("linear:2", ["step0", "step20"]),
        ("log:3", ["step0", "step10", "step20"]),
    ],
)
def test_some_snapshots_of_a_folder(tiny_snapshots: Path, steps: str | None, labels: list[str]) -> None:
    found = parse_snapshots(str(tiny_snapshots), steps)
    assert found.labels == labels and found.steps == [int(label[4:]) for label in labels]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("10,30", "'10,30': tiny-neox has no snapshot 30; it has step0, step10, step20"),
        ("paper", "'paper': tiny-neox has no snapshot paper; it has step0, step10, step20"),
        ("log:4", "log:4 asks for 4 of 3 steps"),
    ],
)
def test_steps_that_a_folder_does_not_have(tiny_snapshots: Path, steps: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_snapshots(str(tiny_snapshots), steps)


def test_a_release_by_name() -> None:
    assert len(parse_snapshots("crosslens-demo", None)) == 10
    assert parse_snapshots("crosslens-demo", "48,640").labels == ["step48", "step640"]


def test_revisions_and_steps_contradict() -> None:
    with pytest.raises(UserError, match="--steps 10 beside 'org/model@step0,step10', which names revisions already"):
        parse_snapshots("org/model@step0,step10", "10")
