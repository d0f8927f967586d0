"""SAELens's trainer with a faster step, parameter groups, a guard against a non-finite loss, and whole checkpoints.

The state of a training on disk: all that its next step depends on, loadable by another number of processes.

state.json                 activations seen, schedules, Adam's count of steps
shard-*.safetensors        the tensors, a file for each and for each process that owns rows of it, as
                           torch.distributed.checkpoint writes them without pickle
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from crosslens.crosscoders import CrosscoderTrainingSAE, JumpReLUCrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.rundir import RunDir

if TYPE_CHECKING:
    from crosslens.distributed.parallel import Parallel
    from crosslens.training.trainer import CrosscoderTrainer


@dataclass(kw_only=True)
class TrainConfig:
    """How a crosscoder is trained.

    Args:
        run_dir: where run.json, checkpoints and the crosscoder are written; None keeps nothing on disk.
        training_tokens: activations to train on; more than the data holds means several epochs. None: one epoch.
        batch_size: B, activations per step.
        lr: learning rate after the warmup.
        lr_warm_up: share of the steps over which the learning rate grows linearly from 0.
        lr_decay: share of the steps, at the end, over which it falls linearly.
        lr_end_factor: what it falls to, relative to `lr`.
        adam_beta1: first-moment decay of Adam.
        adam_beta2: second-moment decay of Adam.
        max_grad_norm: gradients are clipped to this global norm (thresholds excepted); None does not clip.
        dead_tokens: a feature that has not fired for so many activations counts as dead and joins the auxiliary loss.
        scale_tokens: activations on which the scale of each snapshot is estimated.
        n_checkpoints: checkpoints besides the final one, evenly spaced; only with a `run_dir`.
        data_parallel: groups of torchrun's processes among which the tokens of a batch are split; in a group, features.
        resume: continue from the last checkpoint in `run_dir`.
        evaluate: measure EV, L0, CE and KL per snapshot on held-out tokens at the end (`run_dir` or W&B).
        seed: of the initial weights; the order of the data has its own seed in `Activations`.
        device: of the crosscoder.
        wandb_project: log to this Weights & Biases project; None does not log. WANDB_MODE=offline works.
        wandb_run_name: name of the W&B run.
        wandb_log_frequency: steps between logged losses and metrics.
        wandb_eval_frequency: logged steps between held-out evaluations.

    Raises:
        UserError: a number that is not positive, less than one batch, or warmup and decay beyond the steps there are.
    """

    run_dir: str | Path | None = None
    training_tokens: int | None = None
    batch_size: int = 4096
    lr: float = 3e-4
    lr_warm_up: float = 0.0
    lr_decay: float = 0.2
    lr_end_factor: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float | None = 1.0
    dead_tokens: int = 10_000_000
    scale_tokens: int = 100_000
    n_checkpoints: int = 4
    data_parallel: int = 1
    resume: bool = True
    evaluate: bool = True
    seed: int = 0
    device: str = "cpu"
    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_log_frequency: int = 10
    wandb_eval_frequency: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "lr", "dead_tokens", "scale_tokens", "wandb_log_frequency", "wandb_eval_frequency"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        if self.training_tokens is not None and self.training_tokens < self.batch_size:
            raise UserError(
                f"training_tokens={self.training_tokens} is less than one batch of batch_size={self.batch_size}"
            )
        if not (self.lr_warm_up >= 0 and self.lr_decay >= 0 and self.lr_warm_up + self.lr_decay <= 1):
            raise UserError(
                f"lr_warm_up={self.lr_warm_up} and lr_decay={self.lr_decay} are shares of the steps: "
                "not negative, and at most 1 together"
            )


class CrosscoderTrainer(SAETrainer[Any, Any]):
    """SAELens's trainer with its public seams used: `step`, `optimizer`, `lr_scheduler`, `save_checkpoint`.

    Its own step always clips at 1.0, and its schedulers end at zero; the recipes of both papers need more.
    """

    def __init__(
        self,
        config: TrainConfig,
        sae: CrosscoderTrainingSAE,
        data_provider: Iterator[Tensor],
        total: int,
        evaluator: Any = None,
        run: RunDir | None = None,
    ) -> None:
        logger = LoggingConfig(
            log_to_wandb=config.wandb_project is not None,
            log_weights_to_wandb=False,
            wandb_project=config.wandb_project or "",
            run_name=config.wandb_run_name,
            wandb_log_frequency=config.wandb_log_frequency,
            eval_every_n_wandb_logs=config.wandb_eval_frequency,
        )
        sae.to(config.device)
        super().__init__(
            SAETrainerConfig(
                total_training_samples=total // config.batch_size * config.batch_size,
                train_batch_size_samples=config.batch_size,
                lr=config.lr,
                lr_end=config.lr,
                device=config.device,
                dead_feature_window=max(1, config.dead_tokens // config.batch_size),
                n_checkpoints=config.n_checkpoints if run is not None else 0,
                checkpoint_path=None if run is None else str(run.checkpoints),
                logger=logger,
            ),
            sae,
            data_provider,
            evaluator,
        )
        self.config = config
        self.run = run
        self.parallel = sae.parallel
        self.stop = False
        self._agreed: Tensor | None = None
        self._busy = False
        self._saved = -1  # activations seen at the last checkpoint
        self.act_freq_scores = torch.zeros(sae.n_own, device=config.device)
        self.n_forward_passes_since_fired = torch.zeros(sae.n_own, device=config.device)
        self.check_late = sae.device.type != "cpu"
        self._unchecked: tuple[TrainStepOutput, Tensor, Tensor] | None = None
        thresholds = {name: p for name, p in sae.named_parameters() if name == "log_threshold"}
        self.unclipped = list(thresholds.values())
        # the encoder as fused Adam wants it: contiguous, a feature a row, in the same memory
        self.encoder_rows = nn.Parameter(sae.W_enc.detach().T)
        others = {name: p for name, p in sae.named_parameters() if name not in ("log_threshold", "W_enc")}
        self.clipped = [self.encoder_rows, *others.values()]
        self.trained = {"W_enc": self.encoder_rows, **others, **thresholds}
        """What the optimiser changes, by name and in its order; the encoder as (F, S D)."""
        groups: list[dict[str, Any]] = [{"params": self.clipped, "lr": config.lr}]
        if self.unclipped:
            assert isinstance(sae.cfg, JumpReLUCrosscoderTrainingConfig)
            groups.append({"params": self.unclipped, "lr": config.lr * sae.cfg.jumprelu_threshold_lr_factor})
        self.optimizer = Adam(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), fused=True)
        self.lr_scheduler = LambdaLR(
            self.optimizer, partial(lr_factor, config=config, total_steps=self.cfg.total_training_steps)
        )

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on raw activations (B, S, D); `hidden_pre` of its output is empty, to save memory.

        Of several processes each is given the whole batch, and takes its tokens.

        Raises:
            FloatingPointError: the loss is not finite; no parameter has changed.
            StoppedError: `stop` was set, in any process.
        """
        self._check()
        self._busy = True
        try:
            output = self._step(batch)
        finally:
            self._busy = False
        if not self.check_late:
            self._check()
        return output

    def _check(self) -> None:
        self.check_finite()
        if bool(self._agreed) if self._agreed is not None else self.stop:
            raise StoppedError

    def _step(self, batch: Tensor) -> TrainStepOutput:
        self.sae.train()
        self.n_training_samples += batch.shape[0]
        batch = batch[self.parallel.tokens(len(batch))]
        output = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch.to(self.sae.device),
                dead_neuron_mask=self.dead_neurons,
                coefficients=self.get_coefficients(),
                n_training_steps=self.n_training_steps,
                is_logging_step=self.cfg.logger.log_to_wandb
                and (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0,
            )
        )
        output.loss.backward()
        assert self.sae.W_enc.grad is not None
        self.encoder_rows.grad, self.sae.W_enc.grad = self.sae.W_enc.grad.T, None
        self._mean_gradients(output)
        # two seams that torch.amp uses: fused Adam divides gradients by `grad_scale`, and skips all if `found_inf`
        spoilt = ~torch.isfinite(output.loss.detach())
        spoilt |= ~torch.isfinite(self._clip(self.config.max_grad_norm or math.inf))
        for threshold in self.unclipped:
            spoilt |= ~torch.isfinite(threshold.grad.sum()) if threshold.grad is not None else False
        if not self.parallel.alone:
            # of one mind: what spoils the step of one process would spoil the others', and all stop together
            flags = torch.stack([spoilt.float(), torch.full_like(spoilt, self.stop, dtype=torch.float32)])
            spoilt, self._agreed = self.parallel.sum_(flags) > 0
        self.optimizer.found_inf = spoilt.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        self._count_firings(output.feature_acts)
        # SAELens's `fit` holds on to the last output during the next step, and nothing reads this (B, F) tensor
        output.hidden_pre = output.hidden_pre.new_empty(0, self.sae.cfg.d_sae)
        self._unchecked = output, batch, spoilt
        return output

    def check_finite(self) -> None:
        """Stop if the last step's loss, or the norm that its gradient is clipped by, was not finite.

        That step has changed no parameter. A look at the loss makes the host wait for a GPU, so there (`check_late`) it
        is taken one step later.
        """
        if self._unchecked is None:
            return
        output, batch, spoilt = self._unchecked
        self._unchecked = None
        if spoilt:
            raise FloatingPointError(_non_finite(output, batch, self))

    def request_stop(self, *_: Any) -> None:
        """End the training where a checkpoint can go on: a signal handler.

        Raises:
            StoppedError: at once, where this process waits for data; else the next `step` raises it, in all processes.
        """
        self.stop = True
        if self.parallel.alone and not self._busy:
            raise StoppedError

    @torch.no_grad()
    def _clip(self, max_norm: float) -> Tensor:
        if self.parallel.n_shares == 1:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.clipped if p.grad is not None], foreach=True)
        else:  # b_dec is the same in all processes
            parts = [p.grad for p in self.clipped if p.grad is not None and p is not self.sae.b_dec]
            assert self.sae.b_dec.grad is not None
            square = self.parallel.sum_features_(torch.nn.utils.get_total_norm(parts, foreach=True).square())
            norm = (square + self.sae.b_dec.grad.square().sum()).sqrt()
        divisor = ((norm + 1e-6) / max_norm).clamp_min(1.0)
        self.optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
        for threshold in self.unclipped:
            if threshold.grad is not None:
                threshold.grad.mul_(divisor)  # thresholds are not clipped: undoes the division
        return norm

    @torch.no_grad()
    def _mean_gradients(self, output: TrainStepOutput) -> None:
        """Average gradients and losses over the processes that split the tokens."""
        if self.parallel.n_slices == 1:
            return
        for parameter in self.trained.values():
            if parameter.grad is not None:
                self.parallel.sum_data_(parameter.grad).div_(self.parallel.n_slices)
        output.losses = {name: self.parallel.mean_data(value.detach()) for name, value in output.losses.items()}
        output.loss = torch.stack(list(output.losses.values())).sum()

    @torch.no_grad()
    def _count_firings(self, feature_acts: Tensor) -> None:
        if feature_acts.is_sparse:
            active = feature_acts.indices()[1][feature_acts.values() > 0]
            fired = torch.bincount(active, minlength=feature_acts.shape[1])
        else:
            fired = feature_acts.count_nonzero(0)
        self.parallel.sum_data_(fired)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(fired > 0, 0)
        self.act_freq_scores += fired
        self.n_frac_active_samples += len(feature_acts) * self.parallel.n_slices

    # ------------------------------------------------------------------ what is logged is of all features
    @property
    @override
    def feature_sparsity(self) -> Tensor:
        return self.parallel.of_features(super().feature_sparsity).flatten()

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        logged = super().maybe_reset_sparsity()
        if logged:  # SAELens makes room for all features
            self.act_freq_scores = self.act_freq_scores.new_zeros(self.sae.n_own)
        return logged

    @override
    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        self.sae.cfg.metadata.num_dead_features = int(self.parallel.sum_features_(self.dead_neurons.sum()))

    @override
    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        logged = super().build_train_step_log_dict(output, n_training_samples)
        parts = torch.tensor(
            [logged["metrics/l0"], logged["sparsity/dead_features"], logged["sparsity/mean_passes_since_fired"]],
            dtype=torch.float64,
            device=self.sae.device,
        )
        l0, dead, silent = self.parallel.sum_features_(parts).tolist()
        return {
            **logged,
            "metrics/l0": l0,
            "sparsity/dead_features": int(dead),
            "sparsity/mean_passes_since_fired": silent / self.parallel.n_shares,
        }

    @override
    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """Write a checkpoint under a temporary name, rename it, and only then drop the one before."""
        self.check_finite()
        if self.run is None:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
            return
        if self._saved == self.n_training_samples:
            return  # nothing has happened since: what is there is whole
        self._busy = True
        try:
            self._save(self.run.checkpoints)
        finally:
            self._busy = False
        self._saved = self.n_training_samples

    def _save(self, folder: Path) -> None:
        partial_path, whole = (folder / f"{kind}-{self.n_training_samples}" for kind in ("partial", "tokens"))
        with self.parallel.first() as mine:
            if mine:
                shutil.rmtree(partial_path, ignore_errors=True)
                partial_path.mkdir(parents=True)
        save_state(self, partial_path)
        with self.parallel.first() as mine:
            if mine:
                discard(whole)
                os.replace(partial_path, whole)
                sync_folder(folder)
                for other in folder.iterdir():
                    if other != whole:
                        discard(other)

    def resume(self) -> None:
        """Continue from the last whole checkpoint of the run directory, if there is one."""
        assert self.run is not None
        found = self.run.last_checkpoint() if self.parallel.rank == 0 else None
        # rank 0 says which: on a network, others may not see it yet, or still see the one before
        samples = self.parallel.count(0 if found is None else int(found.name.removeprefix("tokens-")))
        if not samples:
            return
        load_state(self, self.run.checkpoints / f"tokens-{samples}")
        self._saved = samples
        # SAELens checkpoints before it counts the step that it has just made
        self.n_training_steps = self.n_training_samples // self.config.batch_size
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]


class StoppedError(Exception):
    """The training was asked to stop; the state of the trainer is that after a whole step."""


def lr_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate at a step relative to `lr`: linear warmup, flat, linear decay to `lr_end_factor`."""
    warm_up, decay = config.lr_warm_up * total_steps, config.lr_decay * total_steps
    rising = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    left = (total_steps - step) / decay if decay else 1.0
    return min(rising, config.lr_end_factor + (1 - config.lr_end_factor) * max(0.0, min(1.0, left)))


def _non_finite(output: TrainStepOutput, batch: Tensor, trainer: CrosscoderTrainer) -> str:
    bad = (~torch.isfinite(batch)).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    labels = trainer.sae.cfg.snapshot_labels
    cause = f"non-finite activations of {', '.join(labels[s] for s in bad)}" if bad else "finite activations"
    losses = ", ".join(f"{name} {value.item():.4g}" for name, value in output.losses.items())
    what = "gradient" if torch.isfinite(output.loss) else "loss"
    return (
        f"the {what} is not finite at step {trainer.n_training_steps} ({losses}; {cause}); training stopped before the "
        "parameters changed, the last checkpoint is intact: lower lr, or leave the snapshot out"
    )


_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(trainer: CrosscoderTrainer, folder: Path) -> None:
    """Write the state of a trainer into a folder; all processes call this.

    Args:
        trainer: after at least one step.
        folder: on a file system that all processes see.
    """
    adam = {name: trainer.optimizer.state[p] for name, p in trainer.trained.items()}
    rows, copies = _tensors(trainer, adam)
    placed = _placed(rows, copies, trainer.sae.parallel)
    # a file per tensor: the writer makes the bytes of a whole file in memory
    files = {name: i for i, name in enumerate(sorted(placed), start=1)}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _no_word_of_one_process():
        dcp.save(placed, storage_writer=writer, no_dist=trainer.sae.parallel.alone)
    if trainer.sae.parallel.rank == 0:
        numbers = {
            "n_training_samples": trainer.n_training_samples,
            "n_frac_active_samples": trainer.n_frac_active_samples,
            "adam_steps": float(adam["b_dec"]["step"]),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficients": {name: s.state_dict() for name, s in trainer.coefficient_schedulers.items()},
        }
        with (folder / "state.json").open("w") as file:
            file.write(json.dumps(numbers, indent=1))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)


def load_state(trainer: CrosscoderTrainer, folder: Path) -> None:
    """Put a trainer into the state that was saved, by however many processes."""
    adam = {
        name: {moment: torch.empty_like(p, requires_grad=False) for moment in _MOMENTS}
        for name, p in trainer.trained.items()
    }
    rows, copies = _tensors(trainer, adam)
    placed = _placed(rows, copies, trainer.sae.parallel)
    with _no_word_of_one_process():
        dcp.load(placed, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=trainer.sae.parallel.alone)
    for name, buffer in trainer.sae.named_buffers():
        buffer.copy_(copies[name].view_as(buffer))
    torch.set_rng_state(copies["rng"])
    numbers = json.loads((folder / "state.json").read_text())
    trainer.n_training_samples = numbers["n_training_samples"]
    trainer.n_frac_active_samples = numbers["n_frac_active_samples"]
    steps = torch.tensor(float(numbers["adam_steps"]), device=trainer.sae.device)
    state = {i: {"step": steps.clone(), **moments} for i, moments in enumerate(adam.values())}
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state})
    trainer.lr_scheduler.load_state_dict(numbers["lr_scheduler"])
    for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for name, value in numbers["coefficients"].items():
        scheduler = trainer.coefficient_schedulers[name]
        scheduler.load_state_dict(value)
        # SAELens restores the step of a warmup, but not the value that belongs to it
        scheduler.current_step -= 1
        scheduler.step()


def discard(folder: Path) -> None:
    """Delete a checkpoint, first of all what makes it one; what cannot be deleted stays."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk before anything else is done, where the system knows how."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _tensors(
    trainer: CrosscoderTrainer, adam: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors with a row per feature, and those that every process has alike."""
    rows = {"since_fired": trainer.n_forward_passes_since_fired, "fired": trainer.act_freq_scores}
    copies = {"rng": torch.get_rng_state()}
    copies |= {name: buffer.detach().clone().view(-1) for name, buffer in trainer.sae.named_buffers()}
    for name, parameter in trainer.trained.items():
        kind = copies if name == "b_dec" else rows
        kind[name] = parameter.detach()
        for moment in _MOMENTS:
            kind[f"{name}.{moment}"] = adam[name][moment]
    return rows, copies


@contextmanager
def _no_word_of_one_process() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _placed(rows: dict[str, Tensor], copies: dict[str, Tensor], parallel: Parallel) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves: the rows of several processes are parts of one tensor."""
    if parallel.mesh is None:
        return {**rows, **copies}
    place = [Replicate(), Shard(0)]
    return {**{name: DTensor.from_local(tensor, parallel.mesh, place) for name, tensor in rows.items()}, **copies}
