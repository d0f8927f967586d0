"""What training tells: the bar against loops over tokens, the table, warnings, and what a resumed run says."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

import crosslens.progress
import crosslens.training.progress
import crosslens.training.run
from crosslens.activations.loader import Activations
from crosslens.crosscoders import CrosscoderTrainingConfig
from crosslens.progress import say
from crosslens.rundir import RunDir, complete_checkpoints
from crosslens.training.progress import Measured, quality_table, warn_if_poor
from crosslens.training.run import train
from crosslens.training.trainer import CrosscoderTrainer
from tests.training.test_run import (
    ALL,
    STEPS,
    B,
    Interrupted,
    breaking,
    config,
    reference,
    same,
    trainer_of,
    weights,
)

__all__ = ["reference"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------- the bar


@pytest.mark.parametrize("architecture", ALL)
def test_measured_in_loops_over_tokens(acts: Activations, architecture: str):
    trainer = trainer_of(acts, ALL[architecture](), config(dead_tokens=3 * B))
    with torch.no_grad():
        trainer.sae.b_enc[:5] = -1e3
    silent = [0] * 40
    for step in range(1, 9):
        batch, before = next(trainer.data_provider), copy.deepcopy(trainer.sae)
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        found = trainer.measure(output)
        x, x_hat = (t.detach().double().view(B, 3, 16) for t in (output.sae_in, output.sae_out))
        # the trainer's output has no dense features
        repeated = before.train().training_forward_pass(
            TrainStepInput(batch, dict.fromkeys(("l1", "sparsity"), 0.0), None, step - 1, False)
        )
        features = repeated.feature_acts.detach().to_dense().tolist()
        for s in range(3):
            mean = sum(row for row in x[:, s]) / B
            error = sum(float((x_hat[b, s] - x[b, s]).square().sum()) for b in range(B))
            spread = sum(float((x[b, s] - mean).square().sum()) for b in range(B))
            assert found.explained_variance[s] == pytest.approx(1 - error / spread, abs=1e-5)
        assert found.l0 == pytest.approx(sum(value != 0 for row in features for value in row) / B)
        silent = [0 if any(row[i] != 0 for row in features) else n + 1 for i, n in enumerate(silent)]
        window = min(3, step // 2)  # steps: `dead_tokens`, or half of the training so far
        assert (
            found.dead_fraction == pytest.approx(sum(n > window for n in silent) / 40) and found.dead_fraction >= 1 / 8
        )


def test_the_host_waits_once_for_a_measurement(acts: Activations, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(acts, ALL["batchtopk_crosscoder"](), config())
    output = trainer.step(next(trainer.data_provider))
    waits: list[str] = []
    for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(Tensor, name)

        def counted(x: Tensor, *args: Any, original: Any = original, name: str = name) -> Any:
            waits.append(name)
            return original(x, *args)

        monkeypatch.setattr(Tensor, name, counted)
    trainer.measure(output)
    assert waits == ["tolist"]


@pytest.mark.parametrize("seconds", [0.0, 0.3, 7.0])
def test_the_bar_is_drawn_once_a_second(
    acts: Activations, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float
):
    """Measuring makes the host wait for a GPU. `seconds`: of a step, by a clock that only steps advance."""
    now, at = 0.0, []
    step, measure = CrosscoderTrainer.step, CrosscoderTrainer.measure

    def stepping(self: CrosscoderTrainer, batch: Tensor) -> Any:
        nonlocal now
        now += seconds
        return step(self, batch)

    def measuring(self: CrosscoderTrainer, output: Any) -> Measured:
        at.append(self.n_training_steps)
        return measure(self, output)

    monkeypatch.setattr(crosslens.training.progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(CrosscoderTrainer, "step", stepping)
    monkeypatch.setattr(CrosscoderTrainer, "measure", measuring)
    monkeypatch.setattr(crosslens.progress, "EVERY", -math.inf)  # a line for each, although this is no terminal
    trainer = trainer_of(acts, ALL["topk_crosscoder"](), config(training_tokens=12 * B))
    trainer.fit()
    assert at == {0.0: [12], 0.3: [4, 8, 12, 12], 7.0: [*range(1, 13), 12]}[seconds]
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "EV" in line]
    assert len(lines) >= len({*at})  # the last step is measured twice, but the bar is gone when it closes
    numbers = re.search(r"768/768 .* tokens/s, EV (\S+), L0 (\S+), dead (\S+)%\]", lines[-1])
    measured = trainer.last_measured
    assert numbers is not None and measured is not None
    assert float(numbers[1]) == pytest.approx(sum(measured.explained_variance) / 3, abs=5e-4)
    assert float(numbers[2]) == pytest.approx(measured.l0, abs=0.05)
    assert float(numbers[3]) == pytest.approx(100 * measured.dead_fraction, abs=0.05)


# ---------------------------------------------------------------------- the table and the warnings


def table_of(n: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": [f"step{143_000 * s // max(1, n - 1)}" for s in range(n)],
            "explained_variance": [0.5 + s / (2 * n) for s in range(n)],
            "l0": 12.345,
            "dead_fraction": 0.03,
            "ce_recovered": [math.nan, *(0.9 + s / (20 * n) for s in range(1, n))],
        }
    )


@pytest.mark.parametrize("n", [1, 3, 32])
def test_the_table_has_a_line_per_snapshot(n: int):
    lines = quality_table(table_of(n), 1000, 4321).splitlines()
    assert lines[0] == "on 4,321 held-out tokens:"
    assert lines[1].split() == ["snapshot", "EV", "L0", "CE", "recovered"]
    for s in range(n):
        label, explained, l0, recovered = lines[2 + s].split()
        assert label == table_of(n)["label"][s] and l0 == "12.3"
        assert float(explained) == pytest.approx(0.5 + s / (2 * n), abs=5e-4)
        assert recovered == ("-" if s == 0 else f"{90 + 5 * s / n:.1f}%")
    assert lines[2 + n].startswith(f"mean EV {0.5 + (n - 1) / (4 * n):.3f}; 30 of 1,000 features (3.0%) are dead")
    assert lines[3 + n].startswith("CE recovered is - where")
    assert len(lines) == n + 4 and max(map(len, lines)) < 100


def test_without_gaps_the_table_needs_no_note():
    assert "is - where" not in quality_table(table_of(3).fillna(0.5), 1000, 4321)


def said(explained: list[float], dead: float, architecture: CrosscoderTrainingConfig, dead_tokens: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = [f"step{i}" for i in range(len(explained))]
        warn_if_poor(labels, Measured(explained, 4.0, dead), architecture, dead_tokens, 1000)
    return [str(warning.message) for warning in caught]


def test_warnings_name_the_snapshots_and_a_remedy():
    topk, jumprelu, l1 = (ALL[f"{name}_crosscoder"]() for name in ("topk", "jumprelu", "standard"))
    assert said([0.7, 0.9], 0.2, topk, 500) == []
    (poor,) = said([0.063, 0.9, math.nan], 0.2, topk, 500)
    assert "explains less than 70% of the variance of step0 (0.06), step2 (nan)." in poor
    assert "leave them out; otherwise try more training tokens, or a larger k" in poor
    (many,) = said([0.1] * 32, 0.0, jumprelu, 500)
    assert "step5 (0.10) and 26 more" in many and "step6" not in many and "a smaller sparsity_coefficient" in many
    (dead,) = said([0.9], 0.313, topk, 500)
    assert dead.startswith("31% of the features are dead")
    assert "a smaller d_sae (now 40), or a smaller dead_tokens (now 500), so that the auxiliary loss acts" in dead
    (never,) = said([0.9], 0.313, topk, 10_000_000)
    assert "10,000,000 is no less than the 1,000 tokens of this training, so the auxiliary loss never acted" in never
    assert "a smaller l1_coefficient" in said([0.9], 0.3, l1, 500)[0]  # and no auxiliary loss
    for architecture, scale in ((topk, "std"), (jumprelu, "norm")):
        architecture.scale = scale  # type: ignore[assignment]
        assert ('try scale="std"' in said([0.1], 0.0, architecture, 500)[0]) == (scale == "norm")
    assert len(said([0.1], 0.9, topk, 500)) == 2


def test_labels_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    say("a\x1b]0;owned\x07 and \u202egnp.exe\n  x\x9b2J 0.528")
    assert capsys.readouterr().err == "a\\u001b]0;owned\\u0007 and \\u202egnp.exe\n  x\\u009b2J 0.528\n"


def test_the_last_lines_of_a_training(
    acts: Activations, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(crosslens.progress, "EVERY", -math.inf)
    settings = config(run_dir=tmp_path / "run", evaluate=True, training_tokens=4 * B)  # far too short
    with pytest.warns(UserWarning, match=r"less than 70% of the variance of step0 \("):
        train(acts, ALL["batchtopk_crosscoder"](), settings)
    first = capsys.readouterr().err
    table = RunDir(tmp_path / "run").table("evaluation")
    assert table is not None
    n_tokens = int(acts.keep(acts.held_out_tokens()).sum())
    assert first.endswith(quality_table(table, 40, n_tokens) + "\n") and "tokens/s, EV" in first
    with pytest.warns(UserWarning, match="less than 70%"):
        train(acts, ALL["batchtopk_crosscoder"](), settings)
    again = capsys.readouterr().err
    assert f"{tmp_path / 'run'} holds this crosscoder: it is loaded, not trained again" in again
    assert again.endswith(quality_table(table, 40, n_tokens) + "\n") and "tokens/s" not in again


def test_without_evaluation_the_last_batch_is_judged(acts: Activations):
    with pytest.warns(UserWarning, match=r"less than 70% of the variance of step0 \(0\.\d\d\), step10"):
        train(acts, ALL["topk_crosscoder"](), config(training_tokens=STEPS // 2 * B))


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("architecture", ["jumprelu_crosscoder", "batchtopk_crosscoder"])
def test_resuming_is_told_and_initialises_nothing(
    acts: Activations,
    reference: Callable[[str], dict[str, Tensor]],
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Scales, means, biases and the searched decoder norm come from the checkpoint."""
    settings, expected = config(run_dir=tmp_path / "run", n_checkpoints=2), reference(architecture)
    with pytest.raises(Interrupted):
        train(breaking(acts, 12), ALL[architecture](), settings)
    assert "resuming from" not in capsys.readouterr().err

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("initialised again")

    monkeypatch.setattr(crosslens.training.run, "initialise", never)
    trainers: list[CrosscoderTrainer] = []
    resume = CrosscoderTrainer.resume
    monkeypatch.setattr(CrosscoderTrainer, "resume", lambda self: (trainers.append(self), resume(self))[1])
    resumed = train(breaking(acts, STEPS), ALL[architecture](), settings)
    assert same(weights(resumed), expected)
    line = re.search(r"resuming from the checkpoint at ([\d,]+) of 1,536 tokens", capsys.readouterr().err)
    assert line is not None
    done = int(line[1].replace(",", ""))
    assert 0 < done < STEPS * B and done % B == 0
    sae = trainers[0].sae
    given = ALL[architecture]().decoder_init_norm
    found = sae.cfg.decoder_init_norm
    assert isinstance(found, float) and (found == given if given is not None else found not in (0.1, 1.0))
    assert sae.W_enc.stride() == (1, 48) and sae.cfg.device == "cpu" and sae.device.type == "cpu"


DAMAGES = [
    *("a shard is cut", "a shard is missing", "a bit of a shard", "state.json is cut", "a digit of state.json"),
    *("state.json is nested", "checksums are nested"),
]


def damaged(checkpoint: Path, damage: str) -> str:
    """Damage a checkpoint; returns the name of the file."""
    path = checkpoint / "state.json" if "state" in damage else sorted(checkpoint.glob("*.safetensors"))[3]
    if damage == "checksums are nested":
        path = checkpoint / "checksums-00000.json"
    contents = bytearray(path.read_bytes())
    if damage == "a shard is missing":
        path.unlink()
    elif "nested" in damage:
        path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif "bit" in damage:
        contents[-5] ^= 1
        path.write_bytes(contents)
    elif "digit" in damage:
        at = contents.index(b'"adam_steps": ') + 14
        contents[at : at + 1] = b"2" if contents[at : at + 1] == b"1" else b"1"
        path.write_bytes(contents)
    else:
        path.write_bytes(contents[:-20])
    return path.name


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(
    acts: Activations, reference: Callable[[str], dict[str, Tensor]], tmp_path: Path, damage: str
):
    settings = config(run_dir=tmp_path / "run", n_checkpoints=6)
    with pytest.raises(Interrupted):
        train(breaking(acts, 15), ALL["topk_crosscoder"](), settings)
    before, last = complete_checkpoints(tmp_path / "run" / "checkpoints")
    done, latest = (int(path.name.removeprefix("tokens-")) // B for path in (before, last))
    assert latest - done <= STEPS // 6 + 1 < done  # the second and the third of those written
    name = damaged(last, damage)
    left = STEPS - done
    with pytest.warns(UserWarning, match=re.escape(f"the checkpoint {last} is damaged ({name}: ")):
        resumed = train(breaking(acts, left), ALL["topk_crosscoder"](), settings)
    assert same(weights(resumed), reference("topk_crosscoder"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_without_an_undamaged_checkpoint_training_starts_again(
    acts: Activations,
    reference: Callable[[str], dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    settings = config(run_dir=tmp_path / "run", n_checkpoints=6)
    with pytest.raises(Interrupted):
        train(breaking(acts, 15), ALL["batchtopk_crosscoder"](), settings)
    for checkpoint in complete_checkpoints(tmp_path / "run" / "checkpoints"):
        damaged(checkpoint, "a bit of a shard")
    with pytest.warns(UserWarning, match="is damaged .* and is not used"):
        again = train(acts, ALL["batchtopk_crosscoder"](), settings)
    words = capsys.readouterr().err
    assert "training starts again from the first token" in words and "resuming" not in words
    assert same(weights(again), reference("batchtopk_crosscoder"))
