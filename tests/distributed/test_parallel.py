"""Several processes train the same crosscoder as one: losses, gradients, weights and files; with half the memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException

import crosslens.training.checkpoints
from crosslens.activations.loader import Activations
from crosslens.crosscoders import TRAINING_ARCHITECTURES, TopKCrosscoderTrainingConfig, load
from crosslens.crosscoders.architectures.topk import unexplained
from crosslens.crosscoders.base import drawn_rows
from crosslens.crosscoders.kernels import sparse
from crosslens.crosscoders.kernels.topk import Pairs, batch_top_pairs, token_top_pairs
from crosslens.distributed.parallel import ALONE, Parallel, join, n_processes
from crosslens.distributed.strategy import ONE_PROCESS, Strategy
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.training.checkpoints import save_whole
from crosslens.training.config import TrainConfig
from crosslens.training.evaluation import evaluate, quick_metrics
from crosslens.training.initialisation import initialise
from crosslens.training.run import complete, train
from crosslens.training.trainer import CrosscoderTrainer
from tests.ranks import run_ranks
from tests.training.test_lost_runs import history
from tests.training.test_run import ALL, B, config

STEPS = 20
pytestmark = pytest.mark.usefixtures("one_thread")
EXHAUSTIVE = pytest.mark.exhaustive


def settings(**options: Any) -> TrainConfig:
    return config(**{"training_tokens": STEPS * B, "max_grad_norm": 0.5, "dead_tokens": B, **options})


def trainer_of(
    acts: Activations, architecture: Any, parallel: Parallel, run: RunDir | None = None, **options: Any
) -> Any:
    sae = initialise(complete(architecture, acts), acts, batch_size=B, scale_tokens=500, seed=0, parallel=parallel)
    return CrosscoderTrainer(settings(**options), sae, acts.batches(B), STEPS * B, run=run, parallel=parallel)


def train_until(trainer: Any, acts: Activations, until: int) -> list[dict[str, float]]:
    """Losses of the steps before step `until`."""
    losses = []
    trainer.data_provider = acts.batches(B, start=trainer.n_training_steps)
    while trainer.n_training_steps < until:
        output = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        losses.append({"loss": output.loss.item(), **{name: x.item() for name, x in output.losses.items()}})
    return losses


def state_of(trainer: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    state = {name: p.detach().clone() for name, p in trainer.trained.items()}
    state |= {name: buffer.clone() for name, buffer in trainer.sae.named_buffers()}
    return {**state, "since_fired": trainer.n_forward_passes_since_fired.clone(), "fired": trainer.act_freq_scores}


def whole(states: list[dict[str, Tensor]], n_feature_ranks: int) -> dict[str, Tensor]:
    """The states of all ranks joined along features; what they hold alike must be equal to the bit."""
    joint: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if name in ("b_dec", "activation_scale", "threshold", "steered"):
            assert all(torch.equal(first, state[name]) for state in states), name
            joint[name] = first
        else:
            groups = range(0, len(states), n_feature_ranks)  # one for each data-parallel rank
            joined = [torch.cat([state[name] for state in states[i : i + n_feature_ranks]]) for i in groups]
            assert all(torch.equal(joined[0], other) for other in joined), name
            joint[name] = joined[0]
    return joint


def close(a: dict[str, Tensor], b: dict[str, Tensor], within: float = 1e-5) -> None:
    assert set(a) == set(b)
    for name in a:
        scale = float(b[name].float().abs().max()) + 1e-12
        assert float((a[name] - b[name]).abs().max()) <= within * scale, name


# ---------------------------------------------------------------------- one trajectory


def first_gradients(acts: Activations, architecture: Any, parallel: Parallel) -> dict[str, Tensor]:
    """Gradients of the first batch, with a third of the features dead, averaged over all tokens."""
    sae = initialise(complete(architecture, acts), acts, batch_size=B, scale_tokens=500, seed=0, parallel=parallel)
    batch = next(acts.batches(B))[parallel.tokens(B)]
    dead = (torch.arange(sae.cfg.d_sae) % 3 == 0)[parallel.features(sae.cfg.d_sae)]
    coefficients = {"l1": 0.5, "sparsity": 0.3}
    sae.training_forward_pass(TrainStepInput(batch, coefficients, dead, 0, False)).loss.backward()
    named = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    named["W_enc"] = named["W_enc"].T
    return {name: parallel.sum_data_(grad.contiguous()) / parallel.n_data_ranks for name, grad in named.items()}


PARTITION: dict[str, Any] = {
    "n_shared": 15, "shared_penalty": 0.5, "delta_coefficient": 0.4, "dedicated": {"step10": 7}
}  # fmt: skip
"""The first group of dedicated features lies in two halves of the dictionary."""
VARIANTS: dict[str, Callable[[], Any]] = {
    "steered": lambda: dataclasses.replace(ALL["jumprelu_crosscoder"](), target_l0=5.0),
    "aimed": lambda: dataclasses.replace(
        ALL["jumprelu_crosscoder"](), target_l0=5.0, l0_coefficient=0.5, pre_act_loss_coefficient=0.3,
        direct_thresholds=True,
    ),
    "partitioned": lambda: dataclasses.replace(ALL["batchtopk_crosscoder"](), **PARTITION),
}  # fmt: skip
GRIDS = [
    *((name, 2, 1, "library") for name in ALL),
    *((name, 4, 2, "pairs") for name in ("batchtopk_crosscoder", "jumprelu_crosscoder")),
    ("partitioned", 4, 2, "pairs"),
    *(pytest.param(name, 4, 2, "pairs", marks=EXHAUSTIVE) for name in ("steered", "aimed")),
    *(pytest.param(name, *grid, "pairs", marks=EXHAUSTIVE) for name in ALL for grid in ((2, 1), (4, 1), (2, 2))),
    *(pytest.param(name, 4, 2, "pairs", marks=EXHAUSTIVE) for name in ("standard_crosscoder", "topk_crosscoder")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "world", "data_parallel", "way"), GRIDS)
def test_several_processes_are_one(
    acts: Activations, tmp_path: Path, architecture: str, world: int, data_parallel: int, way: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """On active pairs, as for large dictionaries, and as the library chooses for a small one."""
    if way == "pairs":
        monkeypatch.setitem(sparse.DENSE_ABOVE, "cpu", 2.0)

    def trajectory(parallel: Parallel) -> Any:
        made = {**ALL, **VARIANTS}[architecture]
        gradients = first_gradients(acts, made(), parallel)
        trainer = trainer_of(acts, made(), parallel)
        silent = (torch.arange(40) % 4 == 0)[parallel.features(40)]
        with torch.no_grad():
            trainer.sae.b_enc[silent] = -1e3
        losses = train_until(trainer, acts, STEPS)
        return {"gradients": gradients, "losses": losses, "state": state_of(trainer)}

    def body(rank: int) -> Any:
        del rank
        parallel, device = join("cpu", data_parallel)
        sizes = parallel.n_feature_ranks, parallel.n_data_ranks
        assert device == "cpu" and sizes == (world // data_parallel, data_parallel)
        return trajectory(parallel)

    alone, together = trajectory(ALONE), run_ranks(world, tmp_path, body)
    for rank in together:
        assert rank["losses"] == together[0]["losses"]
        for a, b in zip(rank["losses"], alone["losses"], strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9)
    for name in ("gradients", "state"):
        close(whole([rank[name] for rank in together], world // data_parallel), alone[name])
    if "topk" in architecture:
        assert sum(loss["auxiliary_reconstruction_loss"] > 0 for loss in alone["losses"]) > 0.8 * STEPS


@pytest.mark.parametrize("dense_above", [0.0, 2.0])
def test_more_dead_features_than_the_auxiliary_loss_takes(
    acts: Activations, tmp_path: Path, dense_above: float, monkeypatch: pytest.MonkeyPatch
):
    """The strongest dead features are selected among those of both processes; one has many, the other one."""
    monkeypatch.setitem(sparse.DENSE_ABOVE, "cpu", dense_above)
    dead = torch.arange(40) < 23
    dead[30] = True

    def gradients(parallel: Parallel) -> dict[str, Tensor]:
        architecture = TopKCrosscoderTrainingConfig(d_sae=40, k=3, aux_loss_coefficient=1.0)
        sae = initialise(complete(architecture, acts), acts, batch_size=B, scale_tokens=500, seed=0, parallel=parallel)
        batch = next(acts.batches(B))
        assert int(dead.sum()) > sae.d_model // 2
        output = sae.training_forward_pass(TrainStepInput(batch, {}, dead[parallel.features(40)], 0, False))
        output.losses["auxiliary_reconstruction_loss"].backward()
        return {"dec": sae.W_dec.grad, "enc": sae.W_enc.grad.T.contiguous(), "b_enc": sae.b_enc.grad}  # type: ignore

    def body(rank: int) -> Any:
        del rank
        parallel, _ = join("cpu")
        return gradients(parallel)

    close(whole(run_ranks(2, tmp_path, body), 2), gradients(ALONE))


def test_memory_of_each_process_halves(acts: Activations, tmp_path: Path):
    """Parameters and optimiser state with a row per feature, to the byte."""

    def held(parallel: Parallel) -> int:
        trainer = trainer_of(acts, ALL["jumprelu_crosscoder"](), parallel)
        train_until(trainer, acts, 2)
        own = [p for p in trainer.sae.parameters() if p is not trainer.sae.b_dec]
        moments = [
            tensor
            for name, p in trainer.trained.items()
            if name != "b_dec"
            for key, tensor in trainer.optimizer.state[p].items()
            if key != "step"
        ]
        return sum(t.untyped_storage().nbytes() for t in (*own, *moments))

    def body(rank: int) -> Any:
        del rank
        parallel, _ = join("cpu")
        return held(parallel)

    alone = held(ALONE)
    assert alone == 3 * 4 * (2 * 40 * 3 * 16 + 2 * 40)  # value and two moments; W_enc, W_dec, b_enc, log_threshold
    assert [2 * own for own in run_ranks(2, tmp_path, body)] == [alone, alone]


@pytest.mark.parametrize("limit", [0.5, None])
def test_a_non_finite_step_of_one_process_changes_none(acts: Activations, tmp_path: Path, limit: float | None):
    """The loss of one process is not finite, or only the gradients of its features."""

    def body(rank: int) -> Any:
        parallel, _ = join("cpu")
        trainer = trainer_of(acts, ALL["standard_crosscoder"](), parallel)
        trainer.config.max_grad_norm = limit
        train_until(trainer, acts, 2)
        before = state_of(trainer)
        if rank == 1:
            if limit:
                trainer.sae.W_dec.register_hook(lambda gradient: gradient * math.nan)
            else:
                trainer.get_coefficients = lambda: {"l1": math.inf}
        with pytest.raises(FloatingPointError, match="is not finite at step 2"):
            train_until(trainer, acts, 3)
        trained = [name for name in before if name in trainer.trained]
        return [torch.equal(before[name], trainer.trained[name]) for name in trained]

    assert all(all(same) and len(same) == 4 for same in run_ranks(2, tmp_path, body))


# ---------------------------------------------------------------------- how good it is

NUMBERS = ["explained_variance", "explained_variance_per_token", "l0", "dead_fraction"]
LOSSES = ["ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "kl"]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "data_parallel"), [(2, 1), pytest.param(4, 2, marks=EXHAUSTIVE)])
def test_all_processes_evaluate_what_one_does(acts: Activations, tmp_path: Path, world: int, data_parallel: int):
    """Explained variance, L0, dead features and the losses of spliced models, of all architectures.

    TopK is annealed, and evaluated in the middle of it, with the k of inference; two processes split three snapshots.
    """

    def tables(parallel: Parallel) -> Any:
        found = []
        for architecture in ALL:
            trainer = trainer_of(acts, ALL[architecture](), parallel)
            train_until(trainer, acts, 10)
            trainer.sae.eval()
            table = evaluate(trainer.sae, acts, n_tokens=100, parallel=parallel)
            if parallel.alone:
                table = evaluate(trainer.sae.to_inference(), acts, n_tokens=100)
            found.append([table[name].tolist() for name in (*NUMBERS, *LOSSES)])
        return found

    def body(rank: int) -> Any:
        del rank
        return tables(join("cpu", data_parallel)[0])

    alone, together = tables(ALONE), run_ranks(world, tmp_path, body)
    assert all(repr(rank) == repr(together[0]) for rank in together)
    for architecture, expected, found in zip(ALL, alone, together[0], strict=True):
        for name, a, b in zip((*NUMBERS, *LOSSES), expected, found, strict=True):
            assert b == pytest.approx(a, abs=1e-5, nan_ok=True), (architecture, name)
    of_topk = dict(zip(NUMBERS, alone[list(ALL).index("topk_crosscoder")][:4], strict=True))
    assert of_topk["l0"] == pytest.approx([4.0] * 3) and min(of_topk["explained_variance"]) > 0.08


def test_the_bar_counts_the_features_of_all_processes(acts: Activations, tmp_path: Path):
    """With features and tokens split; explained variance is that of the process's own tokens."""

    def measured(parallel: Parallel) -> Any:
        trainer = trainer_of(acts, ALL["batchtopk_crosscoder"](), parallel)
        with torch.no_grad():
            trainer.sae.b_enc[: trainer.sae.n_own // 4] = -1e3
        batch = next(acts.batches(B))
        for _ in range(4):  # the same tokens, so that the same features fire
            silent = int((trainer.n_forward_passes_since_fired > 1).sum())  # of this process, before the last step
            output = trainer.step(batch)
            trainer.n_training_steps += 1
        found = trainer.measure(output)
        return [found.l0, found.dead_fraction, *found.explained_variance], silent

    def body(rank: int) -> Any:
        del rank
        return measured(join("cpu", 2)[0])

    together, silent = zip(*run_ranks(4, tmp_path, body), strict=True)
    assert {rank[0] for rank in together} == {3.5} and len({rank[1] for rank in together}) == 1
    assert together[0][1] == pytest.approx((silent[0] + silent[1]) / 40) and together[0][1] >= 0.25
    assert together[0] == together[1] and together[2] == together[3] and together[0][2:] != together[2][2:]


def test_the_largest_of_a_token_over_processes_rank_nan_first(tmp_path: Path) -> None:
    nan = math.nan
    scores = torch.tensor([[nan, 1, 2, 5, 3, 4], [nan, 1, 2, 0, nan, 3], [1, 6, 2, 5, 3, 4]])

    def body(rank: int) -> list[list[float]]:
        own = scores[:, 3 * rank : 3 * rank + 3].topk(2, dim=-1).values
        kth, allowed = join("cpu", 1)[0].kth_per_token(own)
        kept = torch.minimum(torch.as_tensor(allowed).flatten(), ((own >= kth) | own.isnan()).sum(-1))
        return [kth.flatten().tolist(), kept.tolist()]

    assert run_ranks(2, tmp_path, body) == [[[5, math.inf, 5], [1, 1, 1]], [[5, math.inf, 5], [1, 1, 1]]]


@pytest.mark.slow
def test_held_out_metrics_are_logged_by_two_processes(
    acts: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those after the last step are those of the finished crosscoder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = settings(
        run_dir=tmp_path / "run", wandb_project="evolution", wandb_log_frequency=10, wandb_eval_frequency=2
    )

    def body(rank: int) -> int:
        train(acts, ALL["topk_crosscoder"](), options)
        return rank

    run_ranks(2, tmp_path, body)
    (log,) = (tmp_path / "run").rglob("run-*.wandb")
    (row,) = [row for row in history(log) if "metrics/held_out/l0" in row]
    expected = quick_metrics(load(tmp_path / "run" / "crosscoder"), acts)
    assert row["_step"] == STEPS - 1
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------- which scores are the largest


def slow_kth(values: Tensor, k: int) -> tuple[float, int]:
    ordered = sorted(values.tolist(), reverse=True)
    return ordered[k - 1], k - sum(v > ordered[k - 1] for v in ordered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])
def test_kth_largest_is_that_of_sorting(dtype: torch.dtype, coarse: bool):
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        values = torch.rand(200, generator=draw, dtype=torch.float64) * 10.0 ** (seed - 3)
        values = ((values * 10).round() if coarse else values).to(dtype)
        for k in (1, 2, 77, 199, 200):
            for strategy in (ALONE, ONE_PROCESS):
                kth, tied = strategy.kth_largest(values, k)
                assert (kth.item(), int(tied)) == slow_kth(values, k) and kth.dtype == dtype


def test_kth_largest_ranks_infinity_and_nan_first():
    values = torch.tensor([1.0, math.inf, 3.0, 0.0])
    assert [ALONE.kth_largest(values, k)[0].item() for k in (1, 2, 3, 4)] == [math.inf, 3.0, 1.0, 0.0]
    assert ALONE.kth_largest(torch.tensor([1.0, math.nan, math.inf]), 1)[0].isnan()


SELECTIONS = [(12, 16, 6, 0), (7, 24, 3, 1), (9, 16, 6, 2), (5, 32, 1, 3), (8, 16, 15, 4)]


def scores(n_tokens: int, n_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Small integers, so that most scores are tied; some features can never be kept."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randint(-4, 5 if seed % 2 else 3, (n_tokens, n_features), generator=draw).float()
    norms = torch.randint(0 if seed == 2 else 1, 3, (n_features,), generator=draw).float()
    return h, norms


@pytest.mark.parametrize(("world", "data_parallel"), [pytest.param(2, 1, marks=EXHAUSTIVE), (4, 1), (4, 2)])
def test_processes_select_what_one_selects(tmp_path: Path, world: int, data_parallel: int):
    """Ties, tokens with fewer than k positive scores, and processes with fewer than k features."""

    def block(parallel: Parallel, h: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        columns = parallel.features(h.shape[1])
        return h[parallel.tokens(len(h)), columns], norms[columns]

    def body(rank: int) -> Any:
        del rank
        found = []
        parallel, _ = join("cpu", data_parallel)
        for n_tokens, n_features, k, seed in SELECTIONS:
            h, norms = scores(n_tokens * data_parallel, n_features, seed)
            own, own_norms = block(parallel, h, norms)
            pairs, kept = batch_top_pairs(own, own_norms, k * len(h), parallel)
            assert torch.equal(kept, pairs.values * own_norms[pairs.features])
            found.append([pairs.to_dense(), token_top_pairs(own, own_norms, k, parallel).to_dense()])
        return found

    together = run_ranks(world, tmp_path, body)
    n_ranks = world // data_parallel
    for i, (n_tokens, n_features, k, seed) in enumerate(SELECTIONS):
        h, norms = scores(n_tokens * data_parallel, n_features, seed)
        expected = [batch_top_pairs(h, norms, k * len(h))[0], token_top_pairs(h, norms, k)]
        for j, pairs in enumerate(expected):
            groups = [together[d * n_ranks : (d + 1) * n_ranks] for d in range(data_parallel)]
            rows = [torch.cat([rank[i][j] for rank in group], 1) for group in groups]
            assert isinstance(pairs, Pairs) and torch.equal(torch.cat(rows), pairs.to_dense()), (i, j)
        assert int((expected[0].to_dense() > 0).sum()) == min(k * len(h), int((h * norms > 0).sum()))


def test_the_variance_of_a_residual_is_that_of_all_tokens(tmp_path: Path):
    residual, rebuilt = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0)).unbind()

    def body(rank: int) -> Any:
        del rank
        parallel, _ = join("cpu", 2)
        own = parallel.tokens(12)
        return parallel.mean_data(unexplained(residual[own], rebuilt[own], parallel))

    expected = unexplained(residual, rebuilt)
    assert all(x.item() == pytest.approx(expected.item(), rel=1e-6) for x in run_ranks(2, tmp_path, body))


@pytest.mark.parametrize(("n", "width"), [(40, 48), (33, 5), (100, 7), (64, 1)])
def test_any_number_of_processes_draws_the_same_rows(n: int, width: int, monkeypatch: pytest.MonkeyPatch):
    def drawn(keep: slice) -> Tensor:
        torch.manual_seed(3)
        return drawn_rows(n, width, keep, torch.float32)

    torch.manual_seed(3)
    at_once = torch.randn(n, width)
    assert torch.equal(drawn(slice(0, n)), at_once)
    monkeypatch.setattr("crosslens.crosscoders.base.DRAWN", 16 * width)  # sixteen rows at a time
    rows = drawn(slice(0, n))
    same = (n * width - 16) // width  # torch draws the last sixteen numbers of a block again
    assert torch.equal(rows[:same], at_once[:same])
    for keep in (slice(0, 7), slice(7, 20), slice(20, n)):
        assert torch.equal(drawn(keep), rows[keep])


# ---------------------------------------------------------------------- on disk


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "saved_by", "worlds"),
    [
        ("jumprelu_crosscoder", 2, [1]),
        ("batchtopk_crosscoder", 1, [1, 2]),
        pytest.param("jumprelu_crosscoder", 1, [1, 2, 4], marks=EXHAUSTIVE),
        pytest.param("batchtopk_crosscoder", 2, [1, 2, 4], marks=EXHAUSTIVE),
    ],
)
def test_another_number_of_processes_loads_a_checkpoint(
    acts: Activations, tmp_path: Path, architecture: str, saved_by: int, worlds: list[int]
):
    run = RunDir(tmp_path / "run")
    run.write_json({})

    def saves(rank: int = 0) -> int:
        parallel, _ = join("cpu")
        trainer = trainer_of(acts, ALL[architecture](), parallel, run)
        train_until(trainer, acts, 6)
        trainer.save_checkpoint("sixth")
        return rank

    def continues(rank: int = 0) -> Any:
        del rank
        parallel, _ = join("cpu")
        trainer = trainer_of(acts, ALL[architecture](), parallel, run)
        trainer.resume()
        assert trainer.n_training_steps == 6
        losses = train_until(trainer, acts, 12)
        return {"losses": losses, "state": state_of(trainer)}

    uninterrupted = trainer_of(acts, ALL[architecture](), ALONE)
    losses = train_until(uninterrupted, acts, 12)[6:]
    saves() if saved_by == 1 else run_ranks(saved_by, tmp_path, saves)
    for world in worlds:
        ranks = [continues()] if world == 1 else run_ranks(world, tmp_path, continues)
        for a, b in zip(ranks[0]["losses"], losses, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9)
        state = whole([rank["state"] for rank in ranks], world)
        close(state, state_of(uninterrupted))
        if saved_by == world == 1:
            assert all(torch.equal(state[name], x) for name, x in state_of(uninterrupted).items())


def test_copies_of_a_feature_round_its_moments_alike(acts: Activations, tmp_path: Path):
    """Two groups of two processes: the groups hold the same features, the processes of a group different ones."""

    def body(rank: int = 0) -> Any:
        del rank
        parallel, _ = join("cpu", 2)
        trainer = trainer_of(acts, ALL["topk_crosscoder"](), parallel, adam_moments="bfloat16")
        losses = train_until(trainer, acts, 12)
        moments = {
            f"{name}.{moment}": trainer.optimizer.state[p][moment]
            for name, p in trainer.trained.items() if name != "b_dec" for moment in ("exp_avg", "exp_avg_sq")
        }  # fmt: skip
        return {"loss": losses[-1]["loss"], "state": {**state_of(trainer), **moments}}

    alone = trainer_of(acts, ALL["topk_crosscoder"](), ALONE, adam_moments="bfloat16")
    expected = train_until(alone, acts, 12)[-1]["loss"]
    ranks = run_ranks(4, tmp_path, body)
    joint = whole([rank["state"] for rank in ranks], 2)  # asserts that copies are equal to the bit
    assert joint["W_dec.exp_avg"].dtype == torch.bfloat16 and joint["W_dec.exp_avg"].shape == (40, 48)
    assert ranks[0]["loss"] == pytest.approx(expected, rel=0.05)


def test_a_resumed_run_makes_the_checkpoints_of_one_that_was_never_stopped(acts: Activations, tmp_path: Path) -> None:
    """Also that after the very token at which it was stopped, which comes a step later."""
    run = RunDir(tmp_path / "run")
    run.write_json({})
    begun = trainer_of(acts, ALL["topk_crosscoder"](), ALONE, run, n_checkpoints=3)
    planned = list(begun.checkpoint_thresholds)
    train_until(begun, acts, 1)
    begun.n_training_samples = planned[1]
    begun.save_checkpoint("stopped")
    resumed = trainer_of(acts, ALL["topk_crosscoder"](), ALONE, run, n_checkpoints=3)
    assert resumed.resume() and resumed.n_training_samples == planned[1]
    assert len(planned) == 3 and resumed.checkpoint_thresholds == planned[1:]


@pytest.mark.parametrize("damage", ["cut", "missing", "bit"])
def test_no_process_resumes_from_a_damaged_checkpoint(acts: Activations, tmp_path: Path, damage: str):
    run = RunDir(tmp_path / "run")
    run.write_json({})

    def body(rank: int) -> list[int]:
        parallel, _ = join("cpu")
        trainer = trainer_of(acts, ALL["batchtopk_crosscoder"](), parallel, run)
        train_until(trainer, acts, 2)
        trainer.save_checkpoint("second")
        if rank == 0:
            shard = sorted((run.checkpoints / f"tokens-{2 * B}").glob("*.safetensors"))[0]
            contents = shard.read_bytes()
            changed = contents[:-1] + bytes([contents[-1] ^ 1]) if damage == "bit" else contents[:-1]
            shard.unlink() if damage == "missing" else shard.write_bytes(changed)
        parallel.barrier()
        return [int(trainer_of(acts, ALL["batchtopk_crosscoder"](), parallel, run).resume())]

    assert run_ranks(2, tmp_path, body) == [[0], [0]]
    assert [path.name for path in run.checkpoints.iterdir()] == [f"damaged-tokens-{2 * B}"]


@pytest.mark.parametrize("architecture", ALL)
def test_the_file_of_several_is_the_file_of_one(
    acts: Activations, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
):
    """In blocks of three rows, so that each process sends several, the last one smaller."""
    monkeypatch.setattr(crosslens.training.checkpoints, "BLOCK_BYTES", 3 * 3 * 16 * 4)
    cfg = complete(ALL[architecture](), acts)
    drawn = TRAINING_ARCHITECTURES[architecture][0]

    def made(strategy: Strategy) -> Any:
        torch.manual_seed(0)
        sae = drawn(cfg, strategy=strategy)  # type: ignore[arg-type, call-arg]
        with torch.no_grad():
            sae.b_dec.copy_(torch.arange(48.0))
            sae.b_enc.copy_(torch.arange(40.0)[strategy.features(40)])
            sae.activation_scale.copy_(torch.tensor([0.1, 0.2, 0.3]))
            if architecture == "batchtopk_crosscoder":
                sae.threshold.fill_(0.7)
        return sae

    def body(rank: int) -> int:
        parallel, _ = join("cpu")
        save_whole(made(parallel), tmp_path / "several", parallel)
        return rank

    made(ONE_PROCESS).to_inference().save(tmp_path / "one")
    run_ranks(2, tmp_path, body)
    save_whole(made(ONE_PROCESS), tmp_path / "streamed", ALONE)
    one, cfg_of_one = load_file(tmp_path / "one" / "sae_weights.safetensors"), (tmp_path / "one" / "cfg.json")
    for folder in ("several", "streamed"):
        file = load_file(tmp_path / folder / "sae_weights.safetensors")
        assert set(file) == set(one) and all(torch.equal(file[name], one[name]) for name in one)
        assert json.loads((tmp_path / folder / "cfg.json").read_text()) == json.loads(cfg_of_one.read_text())
    x = next(acts.held_out(8))
    several, single = load(tmp_path / "several"), load(tmp_path / "one")
    assert torch.equal(several.decode(several.encode(x)), single.decode(single.encode(x)))


@pytest.mark.slow
@pytest.mark.parametrize("data_parallel", [1, pytest.param(2, marks=EXHAUSTIVE)])
def test_train_in_two_processes(acts: Activations, tmp_path: Path, data_parallel: int):
    def body(rank: int) -> Any:
        options = settings(run_dir=tmp_path / "run", data_parallel=data_parallel, n_checkpoints=2, evaluate=True)
        first = train(acts, ALL["batchtopk_crosscoder"](), options)
        assert n_processes() == 2
        again = train(acts, ALL["batchtopk_crosscoder"](), options)  # finished, so this loads it
        if rank:
            assert [p.shape for p in first.parameters()] == [p.shape for p in again.parameters()]
            assert first.device.type == again.device.type == "meta"
            return []
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
        return [p.detach() for p in first.parameters()]

    first, _ = run_ranks(2, tmp_path, body)
    alone = train(acts, ALL["batchtopk_crosscoder"](), settings())
    close(dict(enumerate(first)), dict(enumerate(alone.parameters())))  # type: ignore[arg-type]
    run = RunDir(tmp_path / "run")
    files = {p.relative_to(run.path).as_posix() for p in run.path.rglob("*") if p.is_file()}
    expected = {"run.json", "evaluation.parquet", "crosscoder/cfg.json", "crosscoder/sae_weights.safetensors", ".lock"}
    assert files == expected
    assert run.read_json()["processes"] == 2
    assert load(run.crosscoder).cfg.metadata.num_dead_features == alone.cfg.metadata.num_dead_features
    table, expected = run.table("evaluation"), evaluate(load(run.crosscoder), acts)
    assert table is not None and list(table.columns) == list(expected.columns)
    for name in (*NUMBERS, *LOSSES):
        assert table[name].tolist() == pytest.approx(expected[name].tolist(), abs=1e-5, nan_ok=True), name
    assert load(run.crosscoder).cfg.metadata.l0 == pytest.approx(alone.cfg.metadata.l0)


@pytest.mark.slow
def test_killed_together_and_resumed(acts: Activations, tmp_path: Path):
    """Both processes are killed between two checkpoints; the final weights are those of an uninterrupted pair."""
    whole_run, run = settings(run_dir=tmp_path / "whole"), settings(run_dir=tmp_path / "run", n_checkpoints=6)
    step = CrosscoderTrainer.step

    def trains(options: TrainConfig, until: int) -> Any:
        def body(rank: int) -> int:
            def stepping(self: CrosscoderTrainer, batch: Tensor) -> Any:
                if self.n_training_steps == until:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, batch)

            CrosscoderTrainer.step = stepping  # type: ignore[method-assign]
            train(acts, ALL["batchtopk_crosscoder"](), options)
            return rank

        return body

    with pytest.raises(ProcessExitedException):
        run_ranks(2, tmp_path, trains(run, 12))
    assert RunDir(tmp_path / "run").last_checkpoint() is not None
    run_ranks(2, tmp_path, trains(run, -1))
    run_ranks(2, tmp_path, trains(whole_run, -1))
    files = [load_file(tmp_path / name / "crosscoder" / "sae_weights.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[1])


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_with_a_checkpoint(acts: Activations, tmp_path: Path):
    run = settings(run_dir=tmp_path / "run", n_checkpoints=0)

    def body(rank: int) -> int:
        step = CrosscoderTrainer._step

        def stepping(self: CrosscoderTrainer, batch: Tensor) -> Any:
            if rank == 1 and self.n_training_steps == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch)

        CrosscoderTrainer._step = stepping  # type: ignore[method-assign]
        with pytest.raises(SystemExit) as stopped:
            train(acts, ALL["topk_crosscoder"](), run)
        assert stopped.value.code == 0
        return rank

    run_ranks(2, tmp_path, body)
    found = RunDir(tmp_path / "run").last_checkpoint()
    assert found is not None and found.name == f"tokens-{8 * B}"  # the step during which the signal came, completed
    assert not (tmp_path / "run" / "crosscoder").exists()


def test_what_several_processes_refuse(acts: Activations, tmp_path: Path):
    def body(rank: int) -> Any:
        said = []
        for architecture, options in (
            (TopKCrosscoderTrainingConfig(d_sae=40, k=3), {}),
            (TopKCrosscoderTrainingConfig(d_sae=41, k=3), {"run_dir": tmp_path / f"a{rank}"}),
            (TopKCrosscoderTrainingConfig(d_sae=40, k=3), {"run_dir": tmp_path / "b", "data_parallel": 3}),
            (
                TopKCrosscoderTrainingConfig(d_sae=40, k=3),
                {"run_dir": tmp_path / f"c{rank}", "data_parallel": 2, "batch_size": 63},
            ),
            (TopKCrosscoderTrainingConfig(d_sae=40, k=3), {"run_dir": tmp_path / "taken"}),
        ):
            with pytest.raises(UserError) as error:
                train(acts, architecture, settings(**options))
            said.append(str(error.value))
        return "\n".join(said).encode()

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("irreplaceable")
    first, second = (bytes(said).decode().splitlines() for said in run_ranks(2, tmp_path, _as_tensor(body)))
    assert "give a run_dir" in first[0]
    assert first[1] == "d_sae=41 cannot be split over 2 processes by features: use 40 or 42"
    assert "data_parallel=3 does not divide the 2 processes" in first[2]
    assert first[3] == "batch_size=63 cannot be split over 2 processes by tokens: use 62 or 64"
    assert first[:4] == second[:4]
    assert not (tmp_path / "a0").exists()  # refused before the directory was claimed
    assert (
        "contains files but is not a run directory" in first[4]
        and second[4] == "rank 0 stopped with an error; see its message"
    )


def _as_tensor(body: Any) -> Any:
    return lambda rank: list(body(rank))
