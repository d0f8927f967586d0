"""Training: SAELens's trainer with per-snapshot scales, parameter groups, a stop at a non-finite loss, and resume.

`train(acts, architecture, config)` fills the architecture's shapes and metadata in from the data, estimates one
activation scale per snapshot on the first tokens (c_s = sqrt(D) / mean |a_s|), trains, and returns the inference
crosscoder. With a `run_dir` it writes checkpoints, resumes from the last whole one, and saves the result there.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from crosslens.activations import Activations
from crosslens.crosscoders import (
    Crosscoder,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
    JumpReLUCrosscoderTrainingConfig,
)
from crosslens.errors import UserError
from crosslens.evaluation import evaluate, quick_metrics
from crosslens.initialisation import initialise
from crosslens.pretrained import load
from crosslens.rundir import RunDir


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
        resume: continue from the last checkpoint in `run_dir`.
        evaluate: measure EV, L0, CE and KL per snapshot on held-out tokens at the end (`run_dir` or W&B).
        seed: of the initial weights; the order of the data has its own seed in `Activations`.
        device: of the crosscoder.
        wandb_project: log to this Weights & Biases project; None does not log. WANDB_MODE=offline works.
        wandb_run_name: name of the W&B run.
        wandb_log_frequency: steps between logged losses and metrics.
        wandb_eval_frequency: logged steps between held-out evaluations.
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
    n_checkpoints: int = 0
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


def train(acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig | None = None) -> Crosscoder:
    """Train a crosscoder on the activations of all snapshots.

    Args:
        acts: where the activations come from, live or cached.
        architecture: one of the four training configs; shapes and metadata are filled in from `acts`.
        config: how to train.

    Returns:
        The inference crosscoder, in eval mode, without gradients.

    Raises:
        UserError: shapes that contradict the data, a silent snapshot, a run directory of another run.
        FloatingPointError: the loss is not finite; the last checkpoint is intact.
    """
    config = config or TrainConfig()
    architecture = complete(architecture, acts, config.device)
    acts.check_batch(config.batch_size)
    total = config.training_tokens or acts.n_tokens
    run = RunDir(config.run_dir) if config.run_dir is not None else None
    if run is not None:
        run.claim(training_identity(acts, architecture, config, total))
        if isinstance(acts.dataset, (str, Path)):
            run.update(source=acts.to_dict())
        if config.resume and (run.crosscoder / "cfg.json").is_file():
            return load(run.crosscoder, device=config.device)
    began = time.perf_counter()
    sae = initialise(
        architecture, acts, batch_size=config.batch_size, scale_tokens=config.scale_tokens, seed=config.seed
    )
    trainer = CrosscoderTrainer(config, sae, iter(()), total, evaluator=partial(_evaluator, acts), run=run)
    if run is not None and config.resume:
        trainer.resume()
    trainer.data_provider = acts.batches(config.batch_size, start=trainer.n_training_steps)
    with _wandb_run(config, sae, run):
        trainer.fit()
        crosscoder = sae.to_inference()
        table = evaluate(crosscoder, acts) if config.evaluate and (run or config.wandb_project) else None
        _log_final(config, table)
    if run is not None:
        if table is not None:
            run.save_table("evaluation", table)
        crosscoder.save(run.path / "crosscoder.partial")
        shutil.rmtree(run.crosscoder, ignore_errors=True)  # of a run that was trained anew with resume=False
        os.replace(run.path / "crosscoder.partial", run.crosscoder)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
        run.update(timings={"train": time.perf_counter() - began})
    return crosscoder


def complete(
    architecture: CrosscoderTrainingConfig, acts: Activations, device: str = "cpu"
) -> CrosscoderTrainingConfig:
    """The architecture with d_in, n_snapshots, device and metadata filled in from the data.

    Raises:
        UserError: shapes that were given by hand and contradict the data.
    """
    S, D = acts.n_snapshots, acts.d_model
    if architecture.d_in not in (0, S * D) or (architecture.d_in and architecture.n_snapshots != S):
        raise UserError(
            f"d_in={architecture.d_in} with n_snapshots={architecture.n_snapshots} does not fit the data: "
            f"{S} snapshots of d_model {D} make d_in={S * D}; leave both out and they are filled in"
        )
    metadata = copy.deepcopy(architecture.metadata)
    for key, value in acts.metadata().items():
        metadata[key] = value
    return dataclasses.replace(architecture, d_in=S * D, n_snapshots=S, device=device, metadata=metadata)


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
        thresholds = [p for name, p in sae.named_parameters() if name == "log_threshold"]
        self.clipped = [p for name, p in sae.named_parameters() if name != "log_threshold"]
        groups: list[dict[str, Any]] = [{"params": self.clipped, "lr": config.lr}]
        if thresholds:
            assert isinstance(sae.cfg, JumpReLUCrosscoderTrainingConfig)
            groups.append({"params": thresholds, "lr": config.lr * sae.cfg.jumprelu_threshold_lr_factor})
        self.optimizer = Adam(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), fused=True)
        self.lr_scheduler = LambdaLR(
            self.optimizer, partial(lr_factor, config=config, total_steps=self.cfg.total_training_steps)
        )

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on raw activations (B, S, D)."""
        self.sae.train()
        self.n_training_samples += batch.shape[0]
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
        if not torch.isfinite(output.loss):
            raise FloatingPointError(_non_finite(output, batch, self))
        output.loss.backward()
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.clipped, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        self._count_firings(output.feature_acts)
        return output

    @torch.no_grad()
    def _count_firings(self, feature_acts: Tensor) -> None:
        if feature_acts.is_sparse:
            active = feature_acts.indices()[1][feature_acts.values() > 0]
            fired = torch.bincount(active, minlength=feature_acts.shape[1])
        else:
            fired = feature_acts.count_nonzero(0)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[fired > 0] = 0
        self.act_freq_scores += fired
        self.n_frac_active_samples += len(feature_acts)

    @override
    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """Write a checkpoint under a temporary name, rename it, and only then drop the one before."""
        if self.run is None:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
            return
        partial_path = self.run.checkpoints / f"partial-{checkpoint_name}"
        shutil.rmtree(partial_path, ignore_errors=True)
        super().save_checkpoint(partial_path.name, base_path, wandb_aliases)
        # SAELens checkpoints before it counts the step that it has just made
        whole = self.run.checkpoints / f"tokens-{self.n_training_samples}"
        shutil.rmtree(whole, ignore_errors=True)
        os.replace(partial_path, whole)
        for other in self.run.checkpoints.iterdir():
            if other != whole:
                shutil.rmtree(other)

    def resume(self) -> None:
        """Continue from the last whole checkpoint of the run directory, if there is one."""
        assert self.run is not None
        whole = self.run.last_checkpoint()
        if whole is None:
            return
        self.sae.load_weights_from_checkpoint(whole)
        self.load_trainer_state(whole)
        self.n_training_steps = self.n_training_samples // self.config.batch_size
        for scheduler in self.coefficient_schedulers.values():
            # SAELens restores the step of a warmup, but not the value that belongs to it
            scheduler.current_step -= 1
            scheduler.step()
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]


def lr_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate at a step relative to `lr`: linear warmup, flat, linear decay to `lr_end_factor`."""
    warm_up, decay = config.lr_warm_up * total_steps, config.lr_decay * total_steps
    rising = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    left = (total_steps - step) / decay if decay else 1.0
    return min(rising, config.lr_end_factor + (1 - config.lr_end_factor) * max(0.0, min(1.0, left)))


def training_identity(
    acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig, total: int
) -> dict[str, Any]:
    """What makes two training runs the same run; a run directory holds one."""
    details = {key: value for key, value in architecture.to_dict().items() if key not in ("metadata", "device")}
    kept = (
        *("batch_size", "lr", "lr_warm_up", "lr_decay", "lr_end_factor", "adam_beta1", "adam_beta2", "max_grad_norm"),
        *("dead_tokens", "scale_tokens", "seed"),
    )
    return {
        **acts.metadata(),
        "architecture": details,
        "training": {**{name: getattr(config, name) for name in kept}, "training_tokens": total},
        "data_seed": acts.seed,
        "n_tokens": acts.n_tokens,
        "tokens_sha256": hashlib.sha256(acts.tokens.contiguous().numpy().tobytes()).hexdigest(),
    }


def _non_finite(output: TrainStepOutput, batch: Tensor, trainer: CrosscoderTrainer) -> str:
    bad = (~torch.isfinite(batch)).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    labels = trainer.sae.cfg.snapshot_labels
    cause = f"non-finite activations of {', '.join(labels[s] for s in bad)}" if bad else "finite activations"
    losses = ", ".join(f"{name} {value.item():.4g}" for name, value in output.losses.items())
    return (
        f"the loss is not finite at step {trainer.n_training_steps} ({losses}; {cause}); training stopped before the "
        "parameters changed, the last checkpoint is intact: lower lr, or leave the snapshot out"
    )


def _evaluator(acts: Activations, sae: CrosscoderTrainingSAE, *_: Any) -> dict[str, Any]:
    return quick_metrics(sae.to_inference(), acts)


@contextmanager
def _wandb_run(config: TrainConfig, sae: CrosscoderTrainingSAE, run: RunDir | None) -> Generator[None, None, None]:
    if config.wandb_project is None:
        yield
        return
    import wandb

    recorded = run.read_json().get("wandb_id") if run is not None and run.exists() else None
    started = wandb.init(
        project=config.wandb_project,
        name=config.wandb_run_name,
        id=recorded,
        resume="allow" if recorded else None,
        dir=None if run is None else str(run.path),
        config={**dataclasses.asdict(config), "run_dir": None, "crosscoder": sae.cfg.to_dict()},
    )
    if run is not None:
        run.update(wandb_id=started.id)
    try:
        yield
    finally:
        wandb.finish()


def _log_final(config: TrainConfig, table: pd.DataFrame | None) -> None:
    if config.wandb_project is None or table is None:
        return
    import wandb

    wandb.log({"evaluation": wandb.Table(dataframe=table)})
