"""Commands at the same time, read-only runs, and processes without a launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crosslens.config import CacheOptions, CrosscoderOptions, ModelOptions, SourceOptions, TrainingOptions
from crosslens.distributed.devices import check_launcher, rank_and_world
from crosslens.errors import UserError
from crosslens.pipeline.opening import open_run
from crosslens.pipeline.training import train
from crosslens.rundir import RunDir
from crosslens.training.logging import check_wandb

HOLD = "import sys; from crosslens.rundir import RunDir; RunDir(sys.argv[1]).hold(); print('held', flush=True); input()"


def test_a_training_holds_its_directory_from_its_claim_on(
    tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two in one new directory the second is refused while the first still harvests."""
    (tmp_path / "text.txt").write_text("\n".join(tiny_text))
    source = SourceOptions(
        snapshots=str(tiny_snapshots), hook=("blocks.0.hook_resid_post",), dataset=str(tmp_path / "text.txt"),
        n_tokens=1000, context_size=16,
    )  # fmt: skip
    run, training = RunDir(tmp_path / "run"), TrainingOptions(batch_size=128, evaluate=False)
    from crosslens.activations.loader import Activations, LiveActivations

    harvest, refused = LiveActivations.cache, []

    def cache(self: Activations, *arguments: Any, **options: Any) -> Activations:
        program = [sys.executable, "-c", HOLD, str(run.path)]
        refused.append(subprocess.run(program, capture_output=True, text=True, input="\n").stderr)
        return harvest(self, *arguments, **options)

    monkeypatch.setattr(LiveActivations, "cache", cache)
    train(
        run, source, CrosscoderOptions(d_sae=32, k=4), training,
        models=ModelOptions(device="cpu"), cache=CacheOptions(cache=tmp_path / "cache"),
    )  # fmt: skip
    assert "another process is writing the run" in refused[0]


def test_remove_waits_for_nobody(run: RunDir) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        program = [sys.executable, "-m", "crosslens", "remove", str(run.path), "--task", "tiny"]
        done = subprocess.run(program, capture_output=True, text=True)
        holder.communicate("\n")
    assert done.returncode == 2 and "another process is writing the run" in done.stderr


def test_a_run_is_read_without_writing(run: RunDir) -> None:
    before = sorted(run.path.rglob("*"))
    _, crosscoder, acts = open_run(run.path, "cpu")
    assert crosscoder.n_snapshots == acts.n_snapshots
    assert sorted(run.path.rglob("*")) == before


def test_a_mode_that_wandb_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE='ofline' in the environment is unknown: use online, .*'offline'"):
        check_wandb()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is in the environment, and is no number from 1: unset it"),
        ({"WORLD_SIZE": "0"}, "is no number from 1"),
        ({"RANK": "-1"}, "RANK='-1' is in the environment, and is no number from 0"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE='x'"),
        ({"RANK": "1"}, "RANK=1 in the environment does not fit WORLD_SIZE=1: unset both"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "nothing has started 2 processes .*: use torchrun"),
    ],
)
def test_variables_of_a_launcher_that_is_not_there(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_world() == (0, 1)
    check_launcher()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launcher()
