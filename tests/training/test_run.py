"""Training: reproducible and resumable to the bit, on schedule, and stopped before it does harm."""

from __future__ import annotations

import copy
import dataclasses
import functools
import getpass
import itertools
import json
import math
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.optim import CoefficientScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

import crosslens.training.checkpoints
import crosslens.training.run
from crosslens.activations import loader
from crosslens.activations.loader import Activations
from crosslens.activations.mixing import MixedRows
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import (
    ARCHITECTURES,
    BatchTopKCrosscoderTrainingConfig,
    Crosscoder,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
    JumpReLUCrosscoderTrainingConfig,
    StandardCrosscoderTrainingConfig,
    TopKCrosscoderTrainingConfig,
    load,
)
from crosslens.errors import UserError
from crosslens.rundir import RunDir, complete_checkpoints
from crosslens.training import recipes
from crosslens.training.config import TrainConfig, lr_factor
from crosslens.training.evaluation import reconstruction_table
from crosslens.training.initialisation import (
    Moments,
    initialise,
    name_constant,
    search_decoder_norm,
    snapshot_scales,
)
from crosslens.training.run import complete, train
from crosslens.training.trainer import CrosscoderTrainer, guarded_step

T, B, STEPS = 16, 64, 24
ALL: dict[str, Callable[[], CrosscoderTrainingConfig]] = {
    "standard_crosscoder": lambda: StandardCrosscoderTrainingConfig(d_sae=40, l1_coefficient=0.5, l1_warm_up_steps=16),
    "topk_crosscoder": lambda: TopKCrosscoderTrainingConfig(d_sae=40, k=4, k_start=12.0, k_anneal_steps=18),
    "batchtopk_crosscoder": lambda: BatchTopKCrosscoderTrainingConfig(d_sae=40, k=3.5),
    "jumprelu_crosscoder": lambda: JumpReLUCrosscoderTrainingConfig(d_sae=40, sparsity_warm_up_steps=16),
}


def config(**options: Any) -> TrainConfig:
    """More than one epoch, both schedules, dead features after a few steps, no final evaluation."""
    defaults: dict[str, Any] = {
        "batch_size": B, "training_tokens": STEPS * B + 5, "lr": 3e-3, "lr_warm_up": 0.2, "lr_decay": 0.4,
        "dead_tokens": 3 * B, "scale_tokens": 500, "evaluate": False, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**defaults, **options})


@pytest.fixture(scope="module")
def reference(acts: Activations) -> Callable[[str], dict[str, Tensor]]:
    """Weights of an uninterrupted training with `config()`, by architecture; each is trained once."""
    return functools.cache(lambda architecture: weights(train(acts, ALL[architecture](), config())))


def weights(crosscoder: Crosscoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in crosscoder.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


class Interrupted(Exception):
    pass


def breaking(acts: Activations, after: int, error: type[BaseException] = Interrupted) -> Activations:
    """The same activations, but the stream fails after some batches of this process."""
    broken = copy.copy(acts)

    def batches(batch_size: int, *, epochs: int | None = None, **options: Any) -> Iterator[Tensor]:
        for i, batch in enumerate(type(acts).batches(acts, batch_size, epochs=epochs, **options)):
            if epochs is None and i == after:
                raise error
            yield batch

    broken.batches = batches  # type: ignore[method-assign]
    return broken


def fresh(acts: Activations, architecture: CrosscoderTrainingConfig, settings: TrainConfig) -> CrosscoderTrainingSAE:
    return initialise(
        complete(architecture, acts, "cpu"), acts, batch_size=settings.batch_size, scale_tokens=settings.scale_tokens,
        seed=settings.seed,
    )  # fmt: skip


def trainer_of(
    acts: Activations, architecture: CrosscoderTrainingConfig, settings: TrainConfig, **options: Any
) -> CrosscoderTrainer:
    sae = fresh(acts, architecture, settings)
    total = settings.training_tokens or acts.n_tokens
    return CrosscoderTrainer(settings, sae, acts.batches(settings.batch_size), total, **options)


# ---------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("architecture", ALL)
def test_deterministic(acts: Activations, reference: Callable[[str], dict[str, Tensor]], architecture: str):
    expected = reference(architecture)
    torch.rand(5)
    state = torch.random.get_rng_state()
    first = train(acts, ALL[architecture](), config())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(weights(first), expected)
    other = train(acts, ALL[architecture](), config(seed=1, training_tokens=2 * B))
    assert not torch.equal(first.W_dec, other.W_dec)
    assert type(first) is ARCHITECTURES[architecture][0] and not first.training
    assert not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("architecture", ALL)
def test_resumed_equals_uninterrupted(
    acts: Activations, reference: Callable[[str], dict[str, Tensor]], architecture: str, tmp_path: Path
):
    settings = config(run_dir=tmp_path / "run", n_checkpoints=5)
    for after in (7, 9):  # interrupted twice: in the warmups, and later
        with pytest.raises(Interrupted):
            train(breaking(acts, after), ALL[architecture](), settings)
        checkpoints = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
        assert 1 <= len(checkpoints) <= 2 and all(name.startswith("tokens-") for name in checkpoints)
        assert not (tmp_path / "run" / "crosscoder").exists()
    done = max(int(name.removeprefix("tokens-")) for name in checkpoints) // B
    assert 9 <= done < STEPS
    resumed = train(breaking(acts, STEPS - done), ALL[architecture](), settings)  # not a batch more than needed
    assert same(weights(resumed), reference(architecture))
    assert same(weights(load(tmp_path / "run" / "crosscoder")), reference(architecture))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resumed_with_moments_in_bfloat16(
    acts: Activations, reference: Callable[[str], dict[str, Tensor]], tmp_path: Path
):
    architecture = ALL["jumprelu_crosscoder"]
    whole = weights(train(acts, architecture(), config(adam_moments="bfloat16")))
    settings = config(run_dir=tmp_path / "run", n_checkpoints=5, adam_moments="bfloat16")
    with pytest.raises(Interrupted):
        train(breaking(acts, 9), architecture(), settings)
    checkpoint = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    tensors = {name: x for path in checkpoint.glob("*.safetensors") for name, x in load_file(path).items()}
    halved = {name for name, x in tensors.items() if x.dtype == torch.bfloat16}
    assert halved == {f"{name}.{moment}" for name in ("W_enc", "W_dec") for moment in ("exp_avg", "exp_avg_sq")}
    assert same(weights(train(acts, architecture(), settings)), whole)
    assert not same(whole, reference("jumprelu_crosscoder"))


def test_a_steered_coefficient_is_resumed_and_meets_its_target(acts: Activations, tmp_path: Path):
    architecture = dataclasses.replace(ALL["jumprelu_crosscoder"](), target_l0=2.0)
    whole = weights(train(acts, dataclasses.replace(architecture), config()))
    settings = config(run_dir=tmp_path / "run", n_checkpoints=5)
    with pytest.raises(Interrupted):
        train(breaking(acts, 9), dataclasses.replace(architecture), settings)
    assert same(weights(train(acts, dataclasses.replace(architecture), settings)), whole)
    longer = train(acts, dataclasses.replace(architecture), config(training_tokens=500 * B))
    # 24 steps leave L0 far away; so few tokens and features do not allow more than about 4
    assert float(reconstruction_table(longer, acts)["l0"].mean()) == pytest.approx(2, rel=0.15)


def test_the_state_of_the_trainer_comes_back(acts: Activations, tmp_path: Path):
    """Everything that the next step depends on."""
    architecture = ALL["jumprelu_crosscoder"]()
    settings = config(run_dir=tmp_path / "run")
    first = trainer_of(acts, architecture, settings, run=RunDir(tmp_path / "run"))
    for _ in range(10):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    first.save_checkpoint("any name")
    second = trainer_of(acts, architecture, settings, run=RunDir(tmp_path / "run"))
    second.resume()
    assert (second.n_training_steps, second.n_training_samples) == (10, 10 * B)
    assert same(first.sae.state_dict(), second.sae.state_dict())
    assert first.get_coefficients() == second.get_coefficients()
    assert 0 < first.get_coefficients()["sparsity"] < 0.3
    assert [g["lr"] for g in first.optimizer.param_groups] == [g["lr"] for g in second.optimizer.param_groups]
    for name in ("n_forward_passes_since_fired", "act_freq_scores"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.n_frac_active_samples == second.n_frac_active_samples == 10 * B
    assert not list((tmp_path / "run" / "checkpoints").glob("partial-*"))


def test_a_checkpoint_cut_short_leaves_the_one_before(
    acts: Activations,
    reference: Callable[[str], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = config(run_dir=tmp_path / "run", n_checkpoints=5)
    write, calls = crosslens.training.checkpoints.write_state, []

    def cut_short(path: Path, *state: Any) -> None:
        calls.append(path)
        write(path, *state)
        if len(calls) == 3:
            (path / "state.json").unlink()
            raise Interrupted

    monkeypatch.setattr(crosslens.training.checkpoints, "write_state", cut_short)
    with pytest.raises(Interrupted):
        train(acts, ALL["topk_crosscoder"](), settings)
    found = RunDir(tmp_path / "run").last_checkpoint()
    assert found is not None and (found / "state.json").is_file() and calls[2].name.startswith("partial-")
    assert int(found.name.removeprefix("tokens-")) < int(calls[2].name.removeprefix("partial-"))
    monkeypatch.undo()
    resumed = train(acts, ALL["topk_crosscoder"](), settings)
    assert same(weights(resumed), reference("topk_crosscoder"))


@pytest.mark.parametrize("resume", [True, False])
def test_only_what_training_wrote_is_deleted(acts: Activations, tmp_path: Path, resume: bool):
    run = RunDir(tmp_path / "run")
    train(acts, ALL["topk_crosscoder"](), config(run_dir=run.path))
    theirs = [run.checkpoints / name for name in (".DS_Store", "README", "tokens-abc/state.json", "best/weights")]
    if resume:
        (run.crosscoder / "cfg.json").unlink()
    else:
        theirs.append(run.crosscoder / "README.md")
    for name in ("partial-1/state.json", "damaged-tokens-1/state.json"):
        (run.checkpoints / name).parent.mkdir(parents=True)
        (run.checkpoints / name).touch()
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a user's")
    train(acts, ALL["topk_crosscoder"](), config(run_dir=run.path, n_checkpoints=3, resume=resume))
    assert all(path.read_text() == "a user's" for path in theirs)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [".DS_Store", "README", "best", "tokens-abc"]
    assert load(run.crosscoder).cfg.d_sae == 40


def test_nothing_behind_a_link_is_touched(acts: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A link as `checkpoints` is refused at the start, and if it is made while training goes on."""
    run, scratch = RunDir(tmp_path / "run"), tmp_path / "scratch"
    (scratch / "tokens-7").mkdir(parents=True)
    (scratch / "tokens-7" / "state.json").touch()
    (scratch / "others").mkdir()
    settings = config(run_dir=run.path, n_checkpoints=3)
    save = CrosscoderTrainer._save

    def linked(trainer: CrosscoderTrainer, folder: Path) -> None:
        if not folder.exists():
            folder.symlink_to(scratch)
        save(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(CrosscoderTrainer, "_save", linked)
        with pytest.raises(UserError, match="checkpoints is a link to .*scratch"):
            train(acts, ALL["topk_crosscoder"](), settings)
    monkeypatch.setattr(crosslens.training.run, "initialise", None)  # refused before
    with pytest.raises(UserError, match="checkpoints is a link to .*scratch"):
        train(acts, ALL["topk_crosscoder"](), settings)
    assert sorted(path.name for path in scratch.rglob("*")) == ["others", "state.json", "tokens-7"]


def test_a_finished_run_is_loaded_not_trained(acts: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(run_dir=tmp_path / "run", n_checkpoints=2, evaluate=True)
    first = train(acts, ALL["topk_crosscoder"](), settings)
    files = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files == {
        "run.json", "evaluation.parquet", "crosscoder/cfg.json", "crosscoder/sae_weights.safetensors", ".lock",
    }  # fmt: skip
    table = RunDir(tmp_path / "run").table("evaluation")
    assert table is not None and table["label"].tolist() == ["step0", "step10", "step20"]
    assert RunDir(tmp_path / "run").read_json()["timings"]["train"] > 0

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(crosslens.training.run, "initialise", never)
    assert same(weights(train(acts, ALL["topk_crosscoder"](), settings)), weights(first))
    monkeypatch.undo()
    again = train(acts, ALL["topk_crosscoder"](), dataclasses.replace(settings, resume=False))  # replaces the old one
    assert same(weights(again), weights(first)) and same(weights(load(tmp_path / "run" / "crosscoder")), weights(first))


def test_a_damaged_result_is_set_aside_and_trained_again(
    acts: Activations,
    reference: Callable[[str], dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    settings = config(run_dir=tmp_path / "run")
    train(acts, ALL["topk_crosscoder"](), settings)
    weights_file = tmp_path / "run" / "crosscoder" / "sae_weights.safetensors"
    contents = bytearray(weights_file.read_bytes())
    contents[-9] ^= 1
    weights_file.write_bytes(contents)
    again = train(acts, ALL["topk_crosscoder"](), settings)
    assert "is damaged" in (words := capsys.readouterr().err) and "and is trained again" in words
    assert same(weights(again), reference("topk_crosscoder"))


# ---------------------------------------------------------------------- schedules, optimiser, clipping


@pytest.mark.parametrize(
    ("warm_up", "decay", "end", "total"),
    [(0.0, 0.0, 0.0, 4), (0.3, 0.5, 1 / 32, 20), (0.0, 0.2, 0.0, 10), (0.1, 0.2, 1 / 32, 3), (6, 0.4, 0.0, 10)],
)
def test_learning_rates_follow_the_schedule(acts: Activations, warm_up: float, decay: float, end: float, total: int):
    whole = isinstance(warm_up, int)  # steps, not a fraction of them
    settings = config(
        lr=2e-3, lr_decay=decay, lr_end_factor=end, training_tokens=total * B, batch_size=B,
        **{"lr_warm_up_steps" if whole else "lr_warm_up": warm_up},
    )  # fmt: skip
    architecture = JumpReLUCrosscoderTrainingConfig(
        d_sae=8, decoder_init_norm=0.5, jumprelu_threshold_lr_factor=0.25, b_enc_per_snapshot=whole
    )
    trainer = trainer_of(acts, architecture, settings)
    groups = {p.data_ptr(): group for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(groups) == 5  # every parameter, once
    for step in range(total):
        expected = 2e-3
        if warm_up:  # linear from 0
            expected = min(expected, 2e-3 * (step + 1) / (warm_up if whole else warm_up * total))
        if decay and step > total - decay * total:  # linear to the end factor
            share = (total - step) / (decay * total)
            expected = min(expected, 2e-3 * (end + (1 - end) * share))
        for name, parameter in trainer.sae.named_parameters():
            factor = {"log_threshold": 0.25, "b_enc": 3.0 if whole else 1.0}.get(name, 1.0)
            assert groups[parameter.data_ptr()]["lr"] == pytest.approx(factor * expected, rel=1e-12), (step, name)
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1


def test_warmups_of_the_penalties_are_linear(acts: Activations):
    for name, key, value in (("standard_crosscoder", "l1", 0.5), ("jumprelu_crosscoder", "sparsity", 0.3)):
        trainer = trainer_of(acts, ALL[name](), config())
        for step in range(20):
            assert trainer.get_coefficients() == {key: pytest.approx(value * min(1, step / 16))}
            output = trainer.step(next(trainer.data_provider))
            trainer.n_training_steps += 1
            assert (output.losses[f"{key}_loss"].item() == 0) == (step == 0)


def test_steps_are_adams(acts: Activations):
    """Three steps of Adam written out, both groups, from gradients of a copy of the model."""
    settings = config(lr=1e-2, lr_warm_up=0.0, lr_decay=0.0, max_grad_norm=None, adam_beta1=0.8, adam_beta2=0.95)
    architecture = JumpReLUCrosscoderTrainingConfig(d_sae=16, decoder_init_norm=0.5)
    trainer = trainer_of(acts, architecture, settings)
    expected = {name: p.detach().double().clone() for name, p in trainer.sae.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in range(1, 4):
        batch = next(trainer.data_provider)
        gradients = _gradients(trainer, batch)
        for name, g in gradients.items():
            g = g.double()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            rate = 1e-2 * (0.1 if name == "log_threshold" else 1)
            expected[name] -= rate * (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
        trainer.step(batch)
        trainer.n_training_steps += 1
        for name, p in trainer.sae.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-4, atol=1e-6)


def _gradients(trainer: CrosscoderTrainer, batch: Tensor) -> dict[str, Tensor]:
    sae = copy.deepcopy(trainer.sae)
    sae.training_forward_pass(
        TrainStepInput(
            sae_in=batch,
            coefficients=trainer.get_coefficients(),
            dead_neuron_mask=trainer.dead_neurons,
            n_training_steps=trainer.n_training_steps,
            is_logging_step=False,
        )  # fmt: skip
    ).loss.backward()
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("limit", [0.05, 1e6, None])
def test_clipping_leaves_the_thresholds_alone(acts: Activations, limit: float | None, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(acts, ALL["jumprelu_crosscoder"](), config(max_grad_norm=limit))
    trainer.step(next(trainer.data_provider))
    trainer.n_training_steps += 1
    batch = next(trainer.data_provider)
    raw = _gradients(trainer, batch)
    norm = math.sqrt(sum(float(g.double().square().sum()) for name, g in raw.items() if name != "log_threshold"))
    factor = 1.0 if limit is None or norm <= limit else limit / norm
    assert factor < 1 or limit != 0.05
    used: dict[str, Tensor] = {}

    def spy(*_: Any) -> None:
        divisor = getattr(trainer.optimizer, "grad_scale", 1.0)  # fused Adam divides by it
        used.update({name: p.grad / divisor for name, p in trainer.sae.named_parameters() if p.grad is not None})
        assert trainer.encoder_rows.grad is not None and trainer.sae.W_enc.grad is None
        used["W_enc"] = trainer.encoder_rows.grad.T / divisor

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    trainer.step(batch)
    assert bool(raw["log_threshold"].any())
    for name, g in raw.items():
        wanted = g if name == "log_threshold" else g * factor
        torch.testing.assert_close(used[name], wanted, rtol=1e-4, atol=1e-8)


def test_dead_features_are_those_silent_for_dead_tokens(acts: Activations):
    few = 4  # tokens per step, so that a feature often fires on only one of them
    settings = config(batch_size=few, training_tokens=400, dead_tokens=3 * few)
    trainer = trainer_of(acts, ALL["batchtopk_crosscoder"](), settings)
    with torch.no_grad():
        trainer.sae.b_enc[:7] = -1e3
    silent, fired, seen = torch.zeros(40), torch.zeros(40), []
    for _ in range(12):
        seen.append(trainer.dead_neurons.nonzero().flatten().tolist())
        active = trainer.step(next(trainer.data_provider)).feature_acts.to_dense() != 0
        silent = torch.where(active.any(0), torch.zeros(40), silent + few)
        fired += active.sum(0)
        trainer.n_training_steps += 1
        assert trainer.dead_neurons.tolist() == (silent > 3 * few).tolist()
        assert torch.equal(trainer.act_freq_scores, fired)
    assert seen[3] == [] and set(range(7)) <= set(seen[4])
    assert trainer.n_frac_active_samples == 12 * few and bool((fired == 1).any())


# ---------------------------------------------------------------------- before the first step


@pytest.mark.parametrize(
    ("scale", "scale_tokens"),
    [("std", 5 * B + 3), ("norm", 5 * B + 3), ("std", 10**9)],  # the last asks for more than there are
)
def test_scales_of_snapshots(acts: Activations, scale: str, scale_tokens: int):
    settings = config(scale_tokens=scale_tokens)
    sae = fresh(acts, dataclasses.replace(ALL["topk_crosscoder"](), scale=scale), settings)
    rows = torch.cat(list(itertools.islice(acts.batches(B), min(scale_tokens, acts.n_tokens) // B))).double()
    for s in range(3):
        mean = [sum(column) / len(rows) for column in rows[:, s].T.tolist()]
        if scale == "norm":
            size = sum(math.sqrt(sum(v * v for v in row)) for row in rows[:, s].tolist()) / len(rows)
        else:
            squares = (sum((v - m) ** 2 for v, m in zip(row, mean, strict=True)) for row in rows[:, s].tolist())
            size = math.sqrt(sum(squares) / len(rows))
        assert float(sae.activation_scale[s]) == pytest.approx(math.sqrt(16) / size, rel=1e-6)
    scaled = rows * sae.activation_scale[:, None]
    sizes = (
        scaled.norm(dim=-1).mean(0) if scale == "norm" else (scaled - scaled.mean(0)).square().sum(-1).mean(0).sqrt()
    )
    torch.testing.assert_close(sizes, torch.full((3,), 4.0, dtype=torch.float64))


def moments_of(rows: torch.Tensor) -> Moments:
    """Moments of activations (B, S, D), by definition."""
    rows = rows.double()
    norms = rows.norm(dim=-1)
    return Moments(norms.mean(0), norms.square().mean(0), rows.mean(0), rows.float())


def test_a_snapshot_that_is_mostly_its_mean_is_named(acts: Activations, capfd: pytest.CaptureFixture[str]):
    rows = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(0))
    rows[:, 1] += 2.0  # variance 1 of 5
    assert moments_of(rows).variances[1] / moments_of(rows).squares[1] == pytest.approx(0.2, abs=0.02)
    where = rf"mostly a constant vector in {acts.snapshots.labels[1]} \(\d+%\)"
    name_constant(moments_of(rows), "std", acts)
    assert re.search(where + ".* count like the others", capfd.readouterr().err)
    with pytest.warns(UserWarning, match=where + ".* use scale='std', or leave them out"):
        name_constant(moments_of(rows), "norm", acts)
    rows[:, 1] = 3.0
    with pytest.raises(UserError, match=f"snapshot {acts.snapshots.labels[1]} has .* leave this snapshot out"):
        snapshot_scales(moments_of(rows), "std", acts)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("relative", [True, False])
def test_biases_start_at_the_mean_or_at_zero(acts: Activations, architecture: str, relative: bool):
    settings, given = config(scale_tokens=4 * B), ALL[architecture]()
    sae = fresh(acts, dataclasses.replace(given, bias_init="mean", apply_b_dec_to_input=relative), settings)
    rows = torch.cat(list(itertools.islice(acts.batches(B), 4))).double() * sae.activation_scale[:, None]
    mean = rows.mean(0)
    torch.testing.assert_close(sae.b_dec_by_snapshot.detach().double(), mean, rtol=1e-5, atol=1e-6)
    for i in range(40):  # h is 0 for a token at the mean
        read = mean - mean if relative else mean
        h = sae.b_enc[i].item() + sum((read[s] @ sae.W_enc_by_snapshot[s, :, i].double()).item() for s in range(3))
        assert abs(h) < 1e-5
    zero = fresh(acts, dataclasses.replace(ALL[architecture](), bias_init="zero"), settings)
    assert not bool(zero.b_dec.any()) and not bool(zero.b_enc.any())
    unknown = ALL[architecture]()
    unknown.bias_init = "median"  # type: ignore[assignment]
    with pytest.raises(UserError, match="bias_init='median' is unknown; use 'mean' or 'zero'"):
        unknown.__post_init__()
    unknown = ALL[architecture]()
    unknown.scale = "max"  # type: ignore[assignment]
    with pytest.raises(UserError, match="scale='max' is unknown; use 'std' or 'norm'"):
        unknown.__post_init__()


@pytest.mark.parametrize(
    ("architecture", "bias_init"), [("jumprelu_crosscoder", "mean"), ("standard_crosscoder", "zero")]
)
def test_search_decoder_norm_picks_the_best_of_the_grid(acts: Activations, architecture: str, bias_init: str):
    unsearched = dataclasses.replace(ALL[architecture](), decoder_init_norm=1.0, **{"bias_init": bias_init})
    sae = fresh(acts, unsearched, config())
    *_, batch = itertools.islice(acts.batches(B, epochs=1), 500 // B)  # the last one used for the scales
    directions, b_dec = sae.W_dec.detach().clone(), sae.b_dec.detach().clone()
    scaled = (batch * sae.activation_scale[:, None]).flatten(1)

    def error(norm: float) -> float:
        rows = directions * norm
        h = (scaled - b_dec) @ rows.T
        out = b_dec.expand_as(scaled).clone()
        for s in range(3):
            of_snapshot = slice(16 * s, 16 * s + 16)
            f = h.relu() if architecture.startswith("standard") else h * (h * rows[:, of_snapshot].norm(dim=-1) > 0.1)
            out[:, of_snapshot] += f @ rows[:, of_snapshot]
        return float((out - scaled).square().sum())

    coarse = min((i / 10 for i in range(1, 51)), key=error)
    fine = [coarse - 0.1 + 0.01 * i for i in range(21) if coarse - 0.1 + 0.01 * i > 0.005]
    best = search_decoder_norm(sae, batch)
    assert best == pytest.approx(min(fine, key=error), abs=1e-9)
    assert coarse not in (0.1, 5.0)  # an optimum inside the grid
    searched = fresh(acts, dataclasses.replace(unsearched, decoder_init_norm=None), config())
    for found in (sae, searched):
        torch.testing.assert_close(found.W_dec.detach(), directions * best)
        torch.testing.assert_close(found.W_enc, found.W_dec.T)
        assert not bool(found.b_enc.any())  # the encoder reads deviations from b_dec
        assert found.cfg.decoder_init_norm == best


def test_shapes_and_metadata_are_filled_in(acts: Activations):
    given = ALL["topk_crosscoder"]()
    filled = complete(given, acts)
    assert (filled.d_in, filled.n_snapshots, filled.d_model) == (48, 3, 16)
    assert filled.snapshot_labels == ["step0", "step10", "step20"]
    assert filled.metadata.hook_name == "blocks.1.hook_resid_post" and filled.metadata.model_name == "tiny-neox"
    assert [s["fingerprint"] for s in filled.metadata.snapshots] == acts.snapshots.fingerprints
    assert given.d_in == 0 and given.metadata.snapshots is None  # the caller's config is not touched
    assert complete(filled, acts).d_in == 48  # shapes that fit are accepted
    for wrong in ({"d_in": 32, "n_snapshots": 2}, {"d_in": 48, "n_snapshots": 4}, {"d_in": 96, "n_snapshots": 3}):
        with pytest.raises(UserError, match=f"d_in={wrong['d_in']} with n_snapshots={wrong['n_snapshots']} does not"):
            train(acts, dataclasses.replace(given, **wrong), config())


def test_a_silent_snapshot_is_refused(acts: Activations):
    silent = copy.copy(acts)

    def batches(batch_size: int, **options: Any) -> Iterator[Tensor]:
        for batch in type(acts).batches(acts, batch_size, **options):
            yield batch * torch.tensor([1.0, 0.0, 1.0])[:, None]

    silent.batches = batches  # type: ignore[method-assign]
    with pytest.raises(UserError, match="snapshot step10 has activations of mean norm 0 at blocks.1.hook_resid_post"):
        train(silent, ALL["topk_crosscoder"](), config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"lr": -1.0}, "lr=-1.0 must be a finite number above 0"),
        ({"dead_tokens": 0}, "dead_tokens=0 must be at least 1"),
        ({"training_tokens": 63}, "training_tokens=63 is less than one batch of batch_size=64"),
        ({"lr_warm_up": 0.7, "lr_decay": 0.4}, "lr_warm_up=0.7 and lr_decay=0.4 are fractions of the steps"),
        ({"lr_warm_up": -0.1}, "lr_warm_up=-0.1 must be a fraction of the steps below 1"),
        (
            {"lr_warm_up_steps": 15},
            r"lr_warm_up_steps=15 is not in \[0, 14\], the 24 steps of this run less",
        ),
        ({"lr_warm_up_steps": -1}, r"lr_warm_up_steps=-1 is not in \[0, 14\]"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config(**options)
    unknown = config()
    unknown.adam_moments = "float16"  # type: ignore[assignment]
    with pytest.raises(UserError, match="adam_moments='float16' is unknown: use one of float32, bfloat16"):
        unknown.__post_init__()


# ---------------------------------------------------------------------- harm prevented


@pytest.mark.parametrize(
    ("architecture", "value"), [(name, value) for name, value in zip(ALL, [math.inf, math.nan] * 2, strict=True)]
)
def test_a_non_finite_loss_stops_before_the_parameters_change(
    acts: Activations,
    reference: Callable[[str], dict[str, Tensor]],
    architecture: str,
    value: float,
    tmp_path: Path,
):
    poisoned = copy.copy(acts)
    before: dict[str, Tensor] = {}

    def batches(batch_size: int, **options: Any) -> Iterator[Tensor]:
        start = options.get("start", 0)
        for i, batch in enumerate(type(acts).batches(acts, batch_size, **options), start):
            if options.get("epochs") is None and i == 15:
                batch = batch.clone()
                batch[3, 1, 2] = value
                before.update({name: p.detach().clone() for name, p in trainers[0].sae.named_parameters()})
            yield batch

    trainers: list[CrosscoderTrainer] = []
    made = CrosscoderTrainer.__init__

    def watched(self: CrosscoderTrainer, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        trainers.append(self)

    poisoned.batches = batches  # type: ignore[method-assign]
    settings = config(run_dir=tmp_path / "run", n_checkpoints=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrosscoderTrainer, "__init__", watched)
        with pytest.raises(
            FloatingPointError, match=r"not finite at step 15 \(.*non-finite activations of step10\)"
        ) as error:
            train(poisoned, ALL[architecture](), settings)
    assert "step20" not in str(error.value) and "\n" not in str(error.value)
    assert before and all(torch.equal(before[name], p) for name, p in trainers[0].sae.named_parameters())
    # the last checkpoint is complete: with sound data the run ends as if nothing had happened
    assert same(weights(train(acts, ALL[architecture](), settings)), reference(architecture))


def test_the_check_may_come_a_step_late(acts: Activations, tmp_path: Path):
    trainer = trainer_of(acts, ALL["jumprelu_crosscoder"](), config())
    trainer.check_late = True
    batch = next(acts.batches(B))
    trainer.step(batch)
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    spoilt = batch.clone()
    spoilt[3, 1, 2] = math.nan
    for cause in (lambda: trainer.step(batch), lambda: trainer.save_checkpoint("late", tmp_path)):
        trainer.step(spoilt)
        with pytest.raises(FloatingPointError, match="non-finite activations of step10"):
            cause()
        assert all(torch.equal(before[name], p) for name, p in trainer.sae.named_parameters())
    assert not any(tmp_path.iterdir())
    trainer.step(batch)
    assert not any(torch.equal(before[name], p) for name, p in trainer.sae.named_parameters())


def test_a_gradient_that_overflows_under_a_finite_loss_changes_nothing(acts: Activations):
    trainer = trainer_of(acts, ALL["topk_crosscoder"](), config(max_grad_norm=1.0))
    batch = next(acts.batches(B))
    trainer.step(batch)
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    trainer.sae.b_dec.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step"):
        trainer.step(batch)
    assert all(torch.equal(before[name], p) for name, p in trainer.sae.named_parameters())


def test_guarded_step_is_adam_on_divided_gradients_or_nothing():
    """A contract: fused Adam reads `grad_scale` and `found_inf`, which torch documents only for GradScaler."""
    draw = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(5, 3, generator=draw), torch.randn(5, 3, generator=draw)

    def after(divisor: float, skip: bool = False) -> tuple[Tensor, Any]:
        p = nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([p], lr=0.1, eps=1.0, fused=True)  # eps: else the scale of a gradient is lost
        p.grad = gradient.clone()
        guarded_step(optimizer, torch.tensor(divisor), torch.tensor(skip))
        return p.detach(), optimizer.state[p]

    slow = nn.Parameter(start.clone())
    slow.grad = gradient / 3
    torch.optim.Adam([slow], lr=0.1, eps=1.0, foreach=False).step()
    torch.testing.assert_close(after(3.0)[0], slow.detach())
    assert not torch.allclose(after(1.0)[0], slow.detach())
    skipped, state = after(3.0, skip=True)
    assert torch.equal(skipped, start) and not bool(state["exp_avg"].any()) and float(state["step"]) == 0


@pytest.mark.parametrize("warm_up", [0, 7])
def test_a_coefficient_schedule_is_rebuilt_by_stepping_a_new_one(warm_up: int):
    """A contract with SAELens: the value depends on nothing but the number of steps."""
    old, new = CoefficientScheduler(warm_up, 0.3), CoefficientScheduler(warm_up, 0.3)
    for step in range(10):
        assert old.value == pytest.approx(0.3 * min(1, step / warm_up) if warm_up else 0.3)
        old.step()
    for _ in range(10):
        new.step()
    assert (new.value, new.state_dict()) == (old.value, old.state_dict())


def test_a_loss_that_explodes_on_finite_activations(acts: Activations):
    with pytest.raises(FloatingPointError, match="finite activations.*lower lr"):
        train(acts, ALL["standard_crosscoder"](), config(lr=1e25, lr_warm_up=0.0))


def test_the_directory_of_another_run_is_refused(
    acts: Activations, live: Activations, reference: Callable[[str], dict[str, Tensor]], tmp_path: Path
):
    settings = config(run_dir=tmp_path / "run", n_checkpoints=2)
    with pytest.raises(Interrupted):
        train(breaking(acts, 12), ALL["topk_crosscoder"](), settings)

    def contents() -> dict[str, tuple[int, bytes]]:
        return {
            # some versions of filelock open the lock to write, and write nothing
            p.relative_to(tmp_path).as_posix(): (p.stat().st_mtime_ns * (p.name != ".lock"), p.read_bytes())
            for p in tmp_path.rglob("*") if p.is_file()
        }  # fmt: skip

    before = contents()
    assert any("checkpoints" in name for name in before)
    other_text = list(live.dataset.source)  # type: ignore[arg-type]
    other_text[0], other_text[1] = other_text[1], other_text[0]

    def remade(source: Any, n_tokens: int = 1000, seed: int = 0) -> Activations:
        return Activations(live.snapshots, live.hook_name, Dataset(source, n_tokens, T, 200), seed=seed)

    attempts: list[tuple[Activations, CrosscoderTrainingConfig, TrainConfig, str]] = [
        (acts, ALL["batchtopk_crosscoder"](), settings, "architecture.architecture=topk_crosscoder"),
        (acts, dataclasses.replace(ALL["topk_crosscoder"](), **{"k": 5}), settings, "architecture.k=4"),
        *(
            (acts, ALL["topk_crosscoder"](), dataclasses.replace(settings, **{name: value}), f"training.{name}=")
            for name, value in {
                "lr": 1e-3, "seed": 7, "batch_size": 32, "training_tokens": 2000, "lr_warm_up": 0.1, "lr_decay": 0.0,
                "lr_warm_up_steps": 3, "adam_moments": "bfloat16",
                "lr_end_factor": 0.5, "max_grad_norm": None, "dead_tokens": 77, "adam_beta1": 0.5, "adam_beta2": 0.9,
                "scale_tokens": 99, "precision": "bfloat16",
            }.items()
        ),
        (remade(other_text), ALL["topk_crosscoder"](), settings, "tokens_sha256="),
        (remade(live.dataset.source, seed=3), ALL["topk_crosscoder"](), settings, "data_seed=0, .*=3"),
        (remade(live.dataset.source, n_tokens=900), ALL["topk_crosscoder"](), settings, "n_tokens="),
    ]  # fmt: skip
    for data, architecture, other, message in attempts:
        with pytest.raises(UserError, match=message) as caught:
            train(data, architecture, other)
        assert "\n" not in str(caught.value)
        assert contents() == before, message
    assert same(weights(train(acts, ALL["topk_crosscoder"](), settings)), reference("topk_crosscoder"))


# ---------------------------------------------------------------------- what comes out


def test_batchtopk_keeps_about_k_on_held_out_tokens(acts: Activations):
    settings = config(training_tokens=200 * B, lr=6e-3, lr_warm_up=0.0, lr_decay=0.8)
    cc = train(acts, BatchTopKCrosscoderTrainingConfig(d_sae=48, k=4, topk_threshold_lr=0.05), settings)
    x = torch.cat(list(acts.held_out()))
    l0 = float((cc.encode(x) != 0).sum(-1).double().mean())
    assert l0 == pytest.approx(4, rel=0.1)
    error = (cc.decode(cc.encode(x)) - x).square().sum((0, 2))
    assert bool((error < 0.1 * (x - x.mean(0)).square().sum((0, 2))).all())  # and every snapshot is reconstructed


def test_live_activations_train_the_same_crosscoder_as_cached_ones(acts: Activations, live: Activations):
    few = config(training_tokens=6 * B)
    architecture = ALL["batchtopk_crosscoder"]()
    assert same(weights(train(live, architecture, few)), weights(train(acts, architecture, few)))


def test_the_buffer_that_scales_are_measured_on_is_the_one_of_the_training(
    live: Activations, monkeypatch: pytest.MonkeyPatch
):
    """The first batches come out of a live buffer; training goes on with it instead of filling another one."""
    n = live.n_tokens // 2
    few, buffers = config(training_tokens=live.n_tokens // B * B), []
    assert TrainConfig(device="cpu").scale_tokens == loader.SCALE_TOKENS

    def filled(*args: Any) -> MixedRows:
        buffers.append(MixedRows(*args))
        return buffers[-1]

    def trained() -> tuple[dict[str, Tensor], int]:
        buffers.clear()
        acts = Activations(live.snapshots, live.hook_name, live.dataset, seed=live.seed, mixing_tokens=n)
        return weights(train(acts, ALL["topk_crosscoder"](), few)), len(buffers)

    monkeypatch.setattr(loader, "MixedRows", filled)
    once, n_once = trained()
    monkeypatch.setattr("crosslens.training.run.FIRST_BYTES", 0)
    twice, n_twice = trained()
    assert same(once, twice) and (n_once, n_twice) == (1, 2)


def test_without_a_run_directory_nothing_is_written(acts: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    train(acts, ALL["topk_crosscoder"](), config(n_checkpoints=4))
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_the_papers():
    architecture, settings = recipes.evolution_of_concepts(run_dir="r")
    steps = 800_000_000 // 2048
    assert isinstance(architecture, JumpReLUCrosscoderTrainingConfig) and architecture.d_sae == 98_304
    assert (architecture.sparsity_coefficient, architecture.sparsity_warm_up_steps) == (0.3, steps // 10)
    assert (architecture.jumprelu_init_threshold, architecture.jumprelu_window) == (0.1, 4.0)
    assert (architecture.tanh_stretch, architecture.frequency_scale) == (4.0, 0.01)
    assert architecture.jumprelu_threshold_lr_factor == 0.1 and architecture.b_enc_per_snapshot
    assert (architecture.decoder_init, architecture.decoder_init_norm) == ("shared", None)
    assert architecture.bias_init == "zero"
    assert (settings.lr, settings.lr_warm_up, settings.lr_decay, settings.lr_end_factor) == (5e-5, 0.1, 0.2, 1 / 32)
    assert settings.max_grad_norm is None and settings.batch_size == 2048 and settings.run_dir == "r"
    _, released = recipes.evolution_of_concepts(lr_warm_up_steps=5_000)
    assert [lr_factor(step, released, steps) for step in (0, 2499, 4999, steps - 1)] == pytest.approx(
        [1 / 5000, 0.5, 1, 1 / 32], rel=1e-3
    )
    architecture, settings = recipes.crosscoding_through_time()
    steps = 400_000_000 // 4096
    assert isinstance(architecture, StandardCrosscoderTrainingConfig) and architecture.d_sae == 16_384
    assert (architecture.l1_coefficient, architecture.l1_warm_up_steps) == (2.0, steps // 20)
    assert (architecture.decoder_init, architecture.decoder_init_norm) == ("independent", 0.08)
    assert architecture.bias_init == "zero"
    assert (settings.lr, settings.lr_warm_up, settings.lr_decay, settings.lr_end_factor) == (5e-5, 0, 0.2, 0)
    assert (settings.adam_beta1, settings.adam_beta2, settings.max_grad_norm) == (0.9, 0.999, 1.0)
    changed, settings = recipes.crosscoding_through_time(lr=1e-3, training_tokens=819_200, batch_size=4096)
    assert (settings.lr, settings.training_tokens, changed.l1_warm_up_steps) == (1e-3, 819_200, 10)
    with pytest.raises(UserError, match="training_tokens=None: .* or leave it out for the paper's 400,000,000"):
        recipes.crosscoding_through_time(training_tokens=None)


# ---------------------------------------------------------------------- Weights & Biases, SAELens


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: seven bytes, then a LevelDB log (blocks of 32 KiB) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block is padding
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_offline(
    acts: Activations,
    reference: Callable[[str], dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = config(
        run_dir=tmp_path / "run", wandb_project="evolution", wandb_run_name="tiny", wandb_log_frequency=5,
        wandb_eval_frequency=2, n_checkpoints=2, evaluate=True,
    )  # fmt: skip
    cc = train(acts, ALL["batchtopk_crosscoder"](), settings)
    assert same(weights(cc), reference("batchtopk_crosscoder"))  # logging changes nothing
    (log,) = (tmp_path / "run").rglob("run-*.wandb")
    history: list[dict[str, Any]] = []
    recorded: dict[str, Any] = {}
    records = list(wandb_records(log))
    until = time.monotonic() + 120
    while not any(record.WhichOneof("record_type") == "exit" for record in records) and time.monotonic() < until:
        time.sleep(0.2)  # a process of W&B's writes the file, and may lag behind `finish` on a busy machine
        records = list(wandb_records(log))
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name) == ("evolution", "tiny")
            recorded |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.run.config.update}
        elif record.WhichOneof("record_type") == "config":  # W&B may write it on its own
            recorded |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
    # the places of files to upload stay in the log, and are not sent
    sent = {r.WhichOneof("record_type"): r.SerializeToString() for r in records if not r.HasField("artifact")}
    for secret in (str(tmp_path), getpass.getuser(), socket.gethostname(), sys.executable):
        assert len(secret) < 4 or not [kind for kind, text in sent.items() if secret.encode() in text], secret
    assert "batch_size" in recorded, (recorded, [record.WhichOneof("record_type") for record in records])
    assert recorded["batch_size"] == B and recorded["crosscoder"]["k"] == 3.5
    metadata = recorded["crosscoder"]["metadata"]
    assert [s["label"] for s in metadata["snapshots"]] == ["step0", "step10", "step20"]
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert metadata["dataset_path"] == "list of documents of 400"
    logged = [row for row in history if "losses/overall_loss" in row]
    assert [row["_step"] for row in logged] == [4, 9, 14, 19]
    for row in logged:
        for label in ("step0", "step10", "step20"):
            assert row[f"metrics/explained_variance/{label}"] <= 1
            assert row[f"metrics/l0/{label}"] == pytest.approx(3.5)
        assert {"metrics/explained_variance", "metrics/l0", "losses/mse_loss"} <= set(row)
        assert row["losses/auxiliary_reconstruction_loss"] >= 0
    evaluated = [row for row in history if "metrics/held_out/l0" in row]
    assert [row["_step"] for row in evaluated] == [9, 19]
    assert all(f"metrics/held_out/explained_variance/{label}" in evaluated[0] for label in ("step0", "step20"))
    assert any(row.get("evaluation/_type") == "table-file" for row in history)
    assert RunDir(tmp_path / "run").read_json()["wandb_id"] in log.name


def test_nothing_is_logged_unless_asked_for(acts: Activations, monkeypatch: pytest.MonkeyPatch):
    import wandb

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("W&B was called")

    for name in ("init", "log", "finish"):
        monkeypatch.setattr(wandb, name, never)
    train(acts, ALL["topk_crosscoder"](), config(training_tokens=3 * B))


@pytest.mark.parametrize("architecture", ALL)
def test_saelens_own_trainer_trains_a_crosscoder(acts: Activations, architecture: str):
    """An unchanged `SAETrainer` works on three-dimensional batches."""
    sae = fresh(acts, ALL[architecture](), config())
    cfg = SAETrainerConfig(
        total_training_samples=8 * B, train_batch_size_samples=B, lr=1e-3, lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    start = sae.W_dec.detach().clone()
    trainer: SAETrainer[Any, Any] = SAETrainer(cfg, sae, acts.batches(B))
    losses: list[float] = []
    step = trainer.step

    def watched(batch: Tensor) -> Any:
        assert batch.shape == (B, 3, 16)
        output = step(batch)
        losses.append(output.loss.item())
        return output

    trainer.step = watched  # type: ignore[method-assign]
    assert trainer.fit() is sae
    assert len(losses) == 8 and not torch.equal(start, sae.W_dec.detach())
    assert (trainer.n_training_steps, trainer.n_training_samples) == (8, 8 * B)
    assert sae.cfg.metadata.l0 > 0
    log = trainer.build_train_step_log_dict(
        sae.training_forward_pass(
            TrainStepInput(
                sae_in=next(acts.batches(B)),
                coefficients=trainer.get_coefficients(),
                dead_neuron_mask=None,
                n_training_steps=8,
                is_logging_step=True,
            )  # fmt: skip
        ),
        8 * B,
    )
    assert {f"metrics/{name}/{label}" for name in ("explained_variance", "l0") for label in ("step0", "step20")} <= set(
        log
    )
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in log.values())


def test_fit_calls_our_step_optimizer_and_scheduler(acts: Activations, monkeypatch: pytest.MonkeyPatch):
    trainer = trainer_of(acts, ALL["topk_crosscoder"](), config(training_tokens=4 * B))
    calls: list[str] = []
    for owner, name in ((trainer, "step"), (trainer.optimizer, "step"), (trainer.lr_scheduler, "step")):
        original = getattr(owner, name)
        label = type(owner).__name__
        monkeypatch.setattr(owner, name, lambda *a, o=original, n=label: (calls.append(n), o(*a))[1])
    trainer.fit()
    assert calls == ["CrosscoderTrainer", "Adam", "LambdaLR"] * 4
    assert isinstance(trainer.sae, CrosscoderTrainingSAE) and trainer.activation_scaler.scaling_factor is None
