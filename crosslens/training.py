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
from collections.abc import Generator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from crosslens.activations import Activations
from crosslens.crosscoders import (
    Crosscoder,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
)
from crosslens.errors import UserError
from crosslens.evaluation import evaluate, quick_metrics
from crosslens.initialisation import initialise
from crosslens.pretrained import load
from crosslens.rundir import RunDir
from crosslens.trainer import CrosscoderTrainer, TrainConfig


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
    architecture, run = claim(acts, architecture, config)
    total = config.training_tokens or acts.n_tokens
    if run is not None and config.resume and (run.crosscoder / "cfg.json").is_file():
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
        with closing(trainer.data_provider):  # nothing is harvested ahead while the result is evaluated
            trainer.fit()
        trainer.check_finite()
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
        run.update(timings={"train": time.perf_counter() - began, "waited_for_data": acts.waited})
    return crosscoder


def claim(
    acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig
) -> tuple[CrosscoderTrainingConfig, RunDir | None]:
    """Make `config.run_dir` the directory of this training, if there is to be one; `train` begins with it.

    Returns:
        The completed architecture, and the run directory.

    Raises:
        UserError: shapes that contradict the data, or the run directory of another run.
    """
    architecture = complete(architecture, acts, config.device)
    acts.check_batch(config.batch_size)
    if config.run_dir is None:
        return architecture, None
    run = RunDir(config.run_dir)
    run.claim(training_identity(acts, architecture, config, config.training_tokens or acts.n_tokens))
    if isinstance(acts.dataset, (str, Path)):
        run.update(source=acts.to_dict())
    return architecture, run


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
