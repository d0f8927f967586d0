"""A trained run directory to analyse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crosslens.activations.loader import Activations
from crosslens.cli.app import app
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.training.config import TrainConfig
from crosslens.training.run import train
from tests.conftest import VERBS, WORDS

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="session")
def trained(tiny_snapshots: Path, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a small crosscoder, whose activations are cached."""
    folder = tmp_path_factory.mktemp("pipeline")
    text = folder / "text.txt"
    text.write_text("\n".join(tiny_text))
    acts = Activations(
        Snapshots.local(tiny_snapshots), HOOK, text, 2000, 16, settings=ModelSettings(device="cpu")
    ).cache(folder / "cache", "float32")
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=32, k=6)
    train(acts, architecture, TrainConfig(run_dir=folder / "run", batch_size=128, lr=1e-2, device="cpu"))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDir:
    """A copy of the trained run, to write in."""
    shutil.copytree(trained, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture(scope="session")
def train_upper(
    tiny_snapshots: Path, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], RunDir]:
    """Trains a crosscoder of 32 features, k of a token active, from the command line, one block above `trained`."""

    def train_one(k: int) -> RunDir:
        folder = tmp_path_factory.mktemp("upper")
        (folder / "text.txt").write_text("\n".join(tiny_text))
        words = (
            f"train --run-dir {folder / 'run'} --snapshots {tiny_snapshots} --hook blocks.1.hook_resid_post "
            f"--dataset {folder / 'text.txt'} --context-size 16 --n-tokens 2000 --training-tokens 4096 "
            f"--batch-size 256 --d-sae 32 --k {k} --device cpu"
        )
        app(words.split())
        return RunDir.open(folder / "run")

    return train_one


@pytest.fixture
def paired_words(tmp_path: Path) -> str:
    """Items of a task with paired prompts in a file, of all words as groups, in two languages."""
    rows = [
        {
            "prefix": f"the {word} near the {other}",
            "patch_prefix": f"the {other} near the {word}",
            "correct": f" {VERBS[0]}",
            "wrong": f" {VERBS[1]}",
            "group": word,
            "language": ("one", "two")[i % 2],
        }
        for i, word in enumerate(WORDS)
        for other in WORDS[i + 1 : i + 5]
    ]
    path = tmp_path / "tiny.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)
