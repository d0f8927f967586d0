"""A trained run directory to analyse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from crosslens.activations.loader import Activations
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.training.config import TrainConfig
from crosslens.training.run import train

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
