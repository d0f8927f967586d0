"""How a crosscoder is trained: `TrainConfig`, and the learning-rate schedule that it describes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crosslens.distributed.devices import Precision, choose_precision, find_device
from crosslens.errors import UserError


@dataclass(kw_only=True)
class TrainConfig:
    """How a crosscoder is trained.

    Args:
        run_dir: folder for run.json, checkpoints and the crosscoder; None writes nothing to disk.
        training_tokens: activations to train on; more than the data holds means several epochs. None: one epoch.
        batch_size: B, activations per step.
        lr: learning rate after the warmup.
        lr_warm_up: fraction of the steps over which the learning rate rises linearly from 0.
        lr_warm_up_steps: number of steps of this rise, which replaces `lr_warm_up`; None uses the fraction.
        lr_decay: fraction of the steps, at the end, over which it falls linearly.
        lr_end_factor: final learning rate relative to `lr`.
        adam_beta1: first-moment decay of Adam.
        adam_beta2: second-moment decay of Adam.
        precision: of the large dense products: "float32", "tf32" (CUDA, with Triton) or "bfloat16". Parameters and sums
            stay in float32. The faster ones change the result: rounding moves features across the gate, and parameters
            drift a few per cent from a float32 run. None: tf32 on CUDA, float32 on CPUs.
        adam_moments: dtype of Adam's two moments of the weight matrices. "bfloat16" halves their memory, 8 of 16 bytes
            per weight; they are rounded stochastically (`crosslens.training.adam`).
        max_grad_norm: global norm that gradients are clipped to (except those of thresholds); None does not clip.
        dead_tokens: activations without firing after which a feature counts as dead and joins the auxiliary loss.
        scale_tokens: activations used to estimate the scale of each snapshot.
        n_checkpoints: evenly spaced checkpoints besides the final one; only with a `run_dir`.
        data_parallel: groups of torchrun's processes that split the tokens of a batch; each group splits the features.
        resume: continue from the last checkpoint in `run_dir`.
        evaluate: measure EV, L0, CE and KL per snapshot on held-out tokens at the end (`run_dir` or W&B).
        seed: seed for the initial weights; the order of the data has its own seed in `Activations`.
        device: device of the crosscoder; CUDA if available.
        wandb_project: log to this Weights & Biases project; None does not log. WANDB_MODE=offline works.
        wandb_run_name: name of the W&B run.
        wandb_log_frequency: steps between logged losses and metrics.
        wandb_eval_frequency: logged steps between held-out evaluations.

    Raises:
        UserError: a number is not positive, there is less than one batch, warmup and decay exceed the steps, or the
            device cannot compute in `precision`.
    """

    run_dir: str | Path | None = None
    training_tokens: int | None = None
    batch_size: int = 4096
    lr: float = 3e-4
    lr_warm_up: float = 0.0
    lr_warm_up_steps: int | None = None
    lr_decay: float = 0.2
    lr_end_factor: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    precision: Precision | None = None
    adam_moments: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: float | None = 1.0
    dead_tokens: int = 10_000_000
    scale_tokens: int = 100_000
    n_checkpoints: int = 4
    data_parallel: int = 1
    resume: bool = True
    evaluate: bool = True
    seed: int = 0
    device: str = field(default_factory=find_device)
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
        choose_precision(self.precision, self.device)
        if self.adam_moments not in ("float32", "bfloat16"):
            raise UserError(f"adam_moments={self.adam_moments!r} is unknown; use 'float32' or 'bfloat16'")
        if not (self.lr_warm_up >= 0 and self.lr_decay >= 0 and self.lr_warm_up + self.lr_decay <= 1):
            raise UserError(
                f"lr_warm_up={self.lr_warm_up} and lr_decay={self.lr_decay} are fractions of the steps: "
                "not negative, and at most 1 together"
            )
        if self.training_tokens is not None:
            check_warm_up(self, self.training_tokens // self.batch_size)


def check_warm_up(config: TrainConfig, total_steps: int) -> None:
    """Refuse a number of warmup steps that does not leave room for the decay.

    Raises:
        UserError: the number is negative, or larger than the steps without the decay.
    """
    longest = math.floor((1 - config.lr_decay) * total_steps + 1e-9)
    if config.lr_warm_up_steps is not None and not 0 <= config.lr_warm_up_steps <= longest:
        raise UserError(
            f"lr_warm_up_steps={config.lr_warm_up_steps} is not in [0, {longest}], the {total_steps} steps of this run "
            f"less lr_decay={config.lr_decay}; train on more activations, or use lr_warm_up, a fraction"
        )


def lr_factor(step: int, config: TrainConfig, total_steps: int) -> float:
    """Learning rate at a step relative to `lr`: linear warmup, constant, linear decay to `lr_end_factor`."""
    warm_up, decay = config.lr_warm_up * total_steps, config.lr_decay * total_steps
    if config.lr_warm_up_steps is not None:
        warm_up = config.lr_warm_up_steps
    rising = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    left = (total_steps - step) / decay if decay else 1.0
    return min(rising, config.lr_end_factor + (1 - config.lr_end_factor) * max(0.0, min(1.0, left)))
