"""Training on a GPU: as on a CPU, without waiting. Each test has a pretended GPU, and with `-m gpu` a real one.

`test_exactness` compares loss and gradients of a step with the dense reference, and with a CPU.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import LiveTensors
from crosslens.activations.loader import Activations
from crosslens.crosscoders import (
    BatchTopKCrosscoderTrainingConfig,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
    JumpReLUCrosscoderTrainingConfig,
    StandardCrosscoderTrainingConfig,
    TopKCrosscoderTrainingConfig,
)
from crosslens.crosscoders.kernels.products import product
from crosslens.crosscoders.kernels.topk import batch_top_pairs, pairs_above, token_top_pairs
from crosslens.rundir import RunDir
from crosslens.training.config import TrainConfig
from crosslens.training.evaluation import reconstruction_table
from crosslens.training.initialisation import initialise
from crosslens.training.run import complete, train
from crosslens.training.trainer import CrosscoderTrainer
from tests.pretend_cuda import Pretended, Real

B, F, STEPS = 64, 40, 24
ARCHITECTURES: list[CrosscoderTrainingConfig] = [
    StandardCrosscoderTrainingConfig(d_sae=F, l1_coefficient=0.5),
    TopKCrosscoderTrainingConfig(d_sae=F, k=4, k_start=12.0, k_anneal_steps=18),
    BatchTopKCrosscoderTrainingConfig(d_sae=F, k=3.5),
    JumpReLUCrosscoderTrainingConfig(d_sae=F, sparsity_warm_up_steps=16),
]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.architecture())


def config(device: str = "cuda", **options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "batch_size": B, "training_tokens": STEPS * B, "lr": 3e-3, "lr_warm_up": 0.2, "lr_decay": 0.4,
        "dead_tokens": 3 * B, "scale_tokens": 500, "evaluate": False, "device": device, "precision": "float32",
    }  # fmt: skip
    return TrainConfig(**{**defaults, **options})


def started(architecture: CrosscoderTrainingConfig, acts: Activations, settings: TrainConfig) -> CrosscoderTrainingSAE:
    completed = complete(architecture, acts, settings.device)
    return initialise(completed, acts, batch_size=B, scale_tokens=500, seed=0)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.isfinite().all()
    assert float((found.cpu() - wanted.cpu()).abs().max()) <= tolerance * float(wanted.abs().max())


# ---------------------------------------------------------------------- single steps


@each_architecture
def test_steps_equal_those_of_a_cpu(architecture: CrosscoderTrainingConfig, acts: Activations, gpu: Pretended | Real):
    """From the same parameters and Adam state, step by step: rounding does not add up to another selection."""
    slow = CrosscoderTrainer(config("cpu"), started(architecture, acts, config("cpu")), iter(()), STEPS * B)
    fast = CrosscoderTrainer(config(), started(architecture, acts, config()), iter(()), STEPS * B)
    for step, x in zip(range(8), acts.batches(B), strict=False):
        before = {name: p.detach().clone() for name, p in slow.trained.items()}
        found, wanted = fast.step(x), slow.step(x)
        assert found.loss.device.type == "cuda"
        close(found.loss, wanted.loss.detach(), 1e-5)
        for name, value in wanted.losses.items():
            close(found.losses[name], value.detach(), 1e-5 if float(value) else 1.0)
        kept = found.feature_acts.to_dense().cpu() != 0
        assert torch.equal(kept, wanted.feature_acts.to_dense() != 0)
        for name, p in fast.trained.items():
            moved = slow.trained[name].detach() - before[name]
            close(p.detach().cpu() - before[name], moved, 1e-2 if step == 0 else 1e-3)  # Adam's first step is a sign
            close(p.detach(), slow.trained[name].detach(), 1e-5)
            with torch.no_grad():
                p.copy_(slow.trained[name])
        assert torch.equal(fast.n_forward_passes_since_fired.cpu(), slow.n_forward_passes_since_fired)
        for trainer in (fast, slow):
            trainer.n_training_steps += 1
    assert not gpu.real or torch.cuda.max_memory_allocated() > 0


@pytest.mark.parametrize("seed", range(3))
def test_selection_equals_that_of_a_cpu(seed: int, gpu: Pretended | Real):
    del gpu
    draw = torch.Generator().manual_seed(seed)
    h, norms = torch.randn(96, 256, generator=draw), torch.rand(256, generator=draw)
    if seed == 1:
        h, norms = h.mul(2).round(), norms.mul(2).round()  # many ties, and decoder rows of norm zero
    if seed == 2:
        h[5, 7] = torch.nan
    for select in (
        lambda h, n: batch_top_pairs(h, n, 900)[0],
        lambda h, n: token_top_pairs(h, n, 11),
        lambda h, n: pairs_above(h, n),
    ):
        wanted, found = select(h, norms), select(h.to("cuda"), norms.to("cuda"))
        for part in ("tokens", "features", "values", "rows"):
            got = getattr(found, part)
            assert got.device.type == "cuda"
            torch.testing.assert_close(got.cpu(), getattr(wanted, part), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(64, 96, 80), (129, 1000, 257), (512, 4096, 1024)])
@pytest.mark.parametrize(("precision", "rounding"), [("float32", 2**-23), ("tf32", 2**-10), ("bfloat16", 2**-8)])
@pytest.mark.gpu
def test_products_round_no_more_than_they_say(
    precision: Any, rounding: float, shape: tuple[int, int, int], layout: str
):
    """|error| <= 2 r |a| @ |b|, one rounding r of each operand, and what float32 sums add."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    draw = torch.Generator().manual_seed(shape[0])
    a, b = torch.randn(shape[0], shape[1], generator=draw), torch.randn(shape[1], shape[2], generator=draw)
    b = b.T.contiguous().T if layout == "columns" else b
    before = torch.backends.cuda.matmul.allow_tf32
    found = product(a.cuda(), b.cuda(), precision).cpu().double()
    assert torch.backends.cuda.matmul.allow_tf32 == before
    size, error = a.double().abs() @ b.double().abs(), (found - a.double() @ b.double()).abs()
    assert bool((error <= (2 * rounding + shape[1] * 2**-23) * size).all())
    if precision != "float32":
        assert float((error / size).max()) > 2**-18  # it did round


# ---------------------------------------------------------------------- waiting and memory


@each_architecture
def test_nothing_of_the_size_of_a_batch_of_features_is_kept(
    architecture: CrosscoderTrainingConfig, acts: Activations, gpu: Pretended | Real
):
    del gpu
    trainer = CrosscoderTrainer(config(), started(architecture, acts, config()), iter(()), STEPS * B)
    for _, x in zip(range(3), acts.batches(B), strict=False):
        with LiveTensors(acts.n_snapshots, F, B) as live:
            output = trainer.step(x)
        trainer.n_training_steps += 1
        del x
    gc.collect()
    assert live.peak_bf > 0
    assert not [True for storage, is_bf in live.alive.values() if is_bf and storage() is not None]
    assert output.loss.isfinite()


@each_architecture
def test_the_host_waits_at_most_three_times_a_step(
    architecture: CrosscoderTrainingConfig, acts: Activations, gpu: Pretended | Real
):
    trainer = CrosscoderTrainer(config(), started(architecture, acts, config()), iter(()), STEPS * B)
    counts: list[list[str]] = []
    for _, x in zip(range(8), acts.batches(B), strict=False):
        counts.append(gpu.waits(lambda x=x: trainer.step(x)))
        trainer.n_training_steps += 1
    assert max(map(len, counts[2:])) <= 3, "\n".join(max(counts, key=len))


# ---------------------------------------------------------------------- whole trainings


@each_architecture
def test_training_reconstructs_as_well_as_on_a_cpu(
    architecture: CrosscoderTrainingConfig, acts: Activations, gpu: Pretended | Real, tmp_path: Path
):
    on_cpu, on_gpu = (
        train(acts, copy.deepcopy(architecture), config(device, run_dir=tmp_path / device, evaluate=device == "cuda"))
        for device in ("cpu", "cuda")
    )
    assert on_gpu.W_dec.device.type == "cuda"
    assert RunDir(tmp_path / "cuda").table("evaluation") is not None
    found, wanted = (reconstruction_table(cc, acts)["explained_variance"].mean() for cc in (on_gpu, on_cpu))
    assert abs(found - wanted) < (0.03 if gpu.real else 1e-6)  # a GPU's sums have another order, and training amplifies


@each_architecture
def test_resuming_restores_everything(
    architecture: CrosscoderTrainingConfig, acts: Activations, gpu: Pretended | Real, tmp_path: Path
):
    del gpu
    settings = config(run_dir=tmp_path)
    first = CrosscoderTrainer(
        settings, started(architecture, acts, settings), iter(()), STEPS * B, run=RunDir(tmp_path)
    )
    for _, x in zip(range(6), acts.batches(B), strict=False):
        first.step(x)
        first.n_training_steps += 1
    first.save_checkpoint("tokens")
    torch.randn(3)
    second = CrosscoderTrainer(
        settings, started(architecture, acts, settings), iter(()), STEPS * B, run=RunDir(tmp_path)
    )
    second.resume()
    assert second.n_training_samples == 6 * B and second.n_training_steps == 6
    assert torch.equal(second.n_forward_passes_since_fired, first.n_forward_passes_since_fired)
    for name, wanted in first.trained.items():
        found = second.trained[name]
        assert found.device.type == "cuda" and torch.equal(found, wanted)
        before, after = first.optimizer.state[wanted], second.optimizer.state[found]
        assert set(before) == set(after)
        for key, value in before.items():
            assert after[key].device == value.device and after[key].dtype == value.dtype
            assert torch.equal(after[key], value)
    x = next(acts.batches(B, start=6))
    losses = [float(trainer.step(x).loss) for trainer in (first, second)]
    assert abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0])


def test_the_order_of_the_data_does_not_depend_on_the_device(
    acts: Activations, gpu: Pretended | Real, monkeypatch: pytest.MonkeyPatch
):
    del gpu
    seen: dict[str, list[Tensor]] = {"cpu": [], "cuda": []}
    step = CrosscoderTrainer.step
    for device, batches in seen.items():

        def record(self: CrosscoderTrainer, x: Tensor, batches: list[Tensor] = batches) -> Any:
            batches.append(x.cpu().clone())
            return step(self, x)

        monkeypatch.setattr(CrosscoderTrainer, "step", record)
        train(acts, BatchTopKCrosscoderTrainingConfig(d_sae=F, k=3.5), config(device))
    assert len(seen["cuda"]) == STEPS and all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))
