"""Several seeds: each is what `train` gives for it, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig, load
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.training import TrainConfig, train, train_seeds

pytestmark = pytest.mark.filterwarnings("ignore:the crosscoder explains less")
ARCHITECTURE = BatchTopKCrosscoderTrainingConfig(d_sae=24, k=3)


def settings(seed: int, run_dir: Path | None = None) -> TrainConfig:
    return TrainConfig(
        training_tokens=600, batch_size=100, scale_tokens=400, evaluate=False, device="cpu", seed=seed, run_dir=run_dir
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_seed_is_trained_as_by_itself(acts: Activations, tmp_path: Path, on_disk: bool) -> None:
    run = tmp_path / "run" if on_disk else None
    found = train_seeds(acts, ARCHITECTURE, settings(5, run), n_seeds=3)
    assert list(found) == [5, 6, 7]
    for seed, crosscoder in found.items():
        alone = train(acts, ARCHITECTURE, settings(seed))
        assert all(torch.equal(a, b) for a, b in zip(crosscoder.parameters(), alone.parameters(), strict=True))
    assert not torch.equal(found[5].W_dec, found[6].W_dec)
    if run is None:
        return
    assert RunDir(run).read_json()["seed"] == 5
    places = {5: RunDir(run), 6: RunDir(run).other_seed(6), 7: RunDir(run).other_seed(7)}
    for seed, place in places.items():
        assert place.read_json()["seed"] == seed
        assert torch.equal(load(place.crosscoder, device="cpu").W_dec, found[seed].W_dec)


def test_a_run_gets_more_seeds_and_keeps_those_it_has(acts: Activations, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train(acts, ARCHITECTURE, settings(0, run.path))
    written = (run.crosscoder / "sae_weights.safetensors").stat().st_mtime_ns
    train_seeds(acts, ARCHITECTURE, settings(0, run.path), n_seeds=2)
    assert (run.crosscoder / "sae_weights.safetensors").stat().st_mtime_ns == written
    # an unfinished seed is trained, the others are not
    other = run.other_seed(1)
    weights = (other.crosscoder / "sae_weights.safetensors").read_bytes()
    (other.crosscoder / "cfg.json").unlink()
    again = train_seeds(acts, ARCHITECTURE, settings(0, run.path), n_seeds=2)
    assert (run.crosscoder / "sae_weights.safetensors").stat().st_mtime_ns == written
    assert (other.crosscoder / "sae_weights.safetensors").read_bytes() == weights and len(again) == 2
    with pytest.raises(UserError, match="n_seeds=0 must be 1 or more"):
        train_seeds(acts, ARCHITECTURE, settings(0), n_seeds=0)
