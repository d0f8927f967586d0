"""Checks of what follows a command: run directories, folders of crosscoders, tasks, labels.

They read small files alone, and import neither torch nor pandas, transformers or SAELens, which take seconds: a wrong
argument is reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosslens.errors import UserError, did_you_mean, read_json
from crosslens.rundir import RunDir
from crosslens.tasks import formats


def open_trained(path: Path) -> RunDir:
    """Refuse a run directory without a trained crosscoder, or without a record of its activations."""
    run = RunDir.open(path)
    if run.read_json().get("source") is None:
        raise UserError(f"{path} does not record where its activations came from: use the Python functions instead")
    check_crosscoder(run.crosscoder, f"{path} has no trained crosscoder: run its `crosslens train` command again")
    return run


def check_published(path: Path) -> None:
    """Refuse what is neither a run directory nor the folder of a crosscoder."""
    folder = RunDir(path).crosscoder if RunDir(path).exists() else path
    check_crosscoder(folder, f"{path} holds no crosscoder: give a run directory, or a folder that `save` wrote")


def check_crosscoder(folder: Path, otherwise: str) -> None:
    """Refuse a folder without the two files of a crosscoder, or with a config that is not JSON."""
    if not all((folder / name).is_file() for name in ("cfg.json", "sae_weights.safetensors")):
        raise UserError(otherwise)
    read_json(folder / "cfg.json", "config of a crosscoder")


def check_tasks(values: Sequence[Any]) -> None:
    """Refuse tasks that do not exist, and files of another format."""
    for value in values:
        formats.check(value, "--task")


def choose_label(labels: Sequence[str], text: str) -> str:
    """The --snapshot option, if it is a label of a run."""
    if text not in labels:
        raise UserError(f"--snapshot {text!r} is unknown: use one of {', '.join(labels)}{did_you_mean(text, labels)}")
    return text
