"""How a crosscoder is trained: `TrainConfig`, and the learning-rate schedule that it describes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from crosslens.config import FREE, TrainingOptions
from crosslens.distributed.devices import choose_precision, find_device
from crosslens.errors import UserError


@dataclass(kw_only=True)
class TrainConfig(TrainingOptions):
    """How and where a crosscoder is trained.

    Raises:
        UserError: a number is out of range, there is less than one batch, warmup and decay exceed the steps, or the
            device cannot compute in `precision`.
    """

    run_dir: Annotated[str | Path | None, FREE] = None
    """Folder for run.json, checkpoints and the crosscoder; None writes nothing to disk."""
    lr_warm_up_steps: int | None = None
    """Number of steps of the warmup; a whole number as `lr_warm_up` sets it, too."""
    resume: Annotated[bool, FREE] = True
    """Continue from the last checkpoint in `run_dir`."""
    seed: int = 0
    """Seed for the initial weights; the order of the data has its own seed in `Activations`."""
    device: Annotated[str, FREE] = field(default_factory=find_device)
    """Device of the crosscoder; CUDA if available."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_precision(self.precision, self.device)
        if self.lr_warm_up > 1:
            self.lr_warm_up, self.lr_warm_up_steps = 0.0, int(self.lr_warm_up)
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
