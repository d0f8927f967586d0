"""Training: SAELens's trainer with per-snapshot scales, parameter groups, a stop at a non-finite loss, and resume.

`train(acts, architecture, config)` fills the architecture's shapes and metadata in from the data, estimates one
activation scale per snapshot on the first tokens (c_s = sqrt(D) / mean |a_s|), trains, and returns the inference
crosscoder. With a `run_dir` it writes checkpoints, resumes from the last whole one, and saves the result there.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE

from crosslens.activations.loader import Activations
from crosslens.activations.plan import peak_memory
from crosslens.crosscoders import (
    Crosscoder,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
    load,
)
from crosslens.distributed.parallel import Parallel, check_split, join, n_processes
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.training.assembly import save_whole
from crosslens.training.evaluation import evaluate, quick_metrics
from crosslens.training.initialisation import initialise
from crosslens.training.logging import wandb_run
from crosslens.training.trainer import CrosscoderTrainer, StoppedError, TrainConfig, discard


def train(acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig | None = None) -> Crosscoder:
    """Train a crosscoder on the activations of all snapshots.

    Args:
        acts: where the activations come from, live or cached.
        architecture: one of the four training configs; shapes and metadata are filled in from `acts`.
        config: how to train.

    Returns:
        The inference crosscoder, in eval mode, without gradients. Of several processes, which torchrun has started, the
        first returns it, on the CPU; the others return its outline on the meta device, without weights.

    Raises:
        UserError: shapes that contradict the data, a silent snapshot, a run directory of another run.
        FloatingPointError: the loss is not finite; the last checkpoint is intact.
    """
    config = config or TrainConfig()
    if n_processes() > 1 and config.run_dir is None:
        raise UserError(
            f"{n_processes()} processes train one crosscoder, and none of them holds all of it: give a run_dir, a "
            "folder that all of them see"
        )
    parallel, device = join(config.device, config.data_parallel)
    with ExitStack() as logging:
        trained = _fit(acts, architecture, dataclasses.replace(config, device=device), parallel, logging)
        if not isinstance(trained, RunDir):
            crosscoder = trained
        elif parallel.alone:
            crosscoder = load(trained.crosscoder, device=device)
        else:  # all of it may fit into no GPU, and not as often as there are processes into a machine
            crosscoder = load(trained.crosscoder, device="cpu") if parallel.rank == 0 else _outline(trained)
        if config.evaluate and parallel.rank == 0:
            _evaluate(crosscoder, acts, config)
    return crosscoder


def _fit(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig,
    parallel: Parallel,
    logging: ExitStack,
) -> Crosscoder | RunDir:
    """Train, and save where there is a run directory: that, or the crosscoder."""
    check_split(n_processes(), config.data_parallel, architecture.d_sae, config.batch_size)
    finished = False
    with parallel.first() as mine:
        if mine:
            architecture, run = claim(acts, architecture, config)
            if run is not None and not config.resume:
                for checkpoint in run.checkpoints.glob("*"):
                    discard(checkpoint)
            finished = run is not None and config.resume and (run.crosscoder / "cfg.json").is_file()
        else:
            architecture, run = _claimed(acts, architecture, config)
    if run is not None and parallel.count(int(finished)):  # rank 0 has seen it: on a network others may not yet
        return run
    began = time.perf_counter()
    sae = initialise(
        architecture,
        acts,
        batch_size=config.batch_size,
        scale_tokens=config.scale_tokens,
        seed=config.seed,
        parallel=parallel,
    )
    total = config.training_tokens or acts.n_tokens
    evaluator = partial(_evaluator, acts) if parallel.alone else None  # several hold no whole crosscoder yet
    trainer = CrosscoderTrainer(config, sae, iter(()), total, evaluator=evaluator, run=run)
    if run is not None and config.resume:
        trainer.resume()
    trainer.data_provider = acts.batches(config.batch_size, start=trainer.n_training_steps)
    trainer.cfg.logger.log_to_wandb = _start_wandb(config, sae, run, logging)
    resumed, started = trainer.n_training_samples, time.perf_counter()
    # nothing is harvested ahead while the result is evaluated
    with closing(trainer.data_provider), _checkpoint_at_sigterm(trainer):
        trainer.fit()
        trainer.check_finite()
        if run is not None and trainer.n_training_samples > resumed:
            trainer.save_checkpoint("final")  # to write the result takes time, and may fail
    rate = (trainer.n_training_samples - resumed) / (time.perf_counter() - started)
    if run is None:
        return sae.to_inference()
    partial_path = run.path / "crosscoder.partial"
    if parallel.alone:
        sae.to_inference().save(partial_path)
    else:
        save_whole(sae, partial_path)
    with parallel.first() as mine:
        if mine:
            shutil.rmtree(run.crosscoder, ignore_errors=True)  # of a run that was trained anew with resume=False
            os.replace(partial_path, run.crosscoder)
            (run.path / "evaluation.parquet").unlink(missing_ok=True)
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            seconds = {"train": time.perf_counter() - began, "waited_for_data": acts.waited}
            run.update(
                timings={**seconds, "tokens_per_second": rate, "peak_memory": peak_memory()}, processes=n_processes()
            )
    return run


@contextmanager
def _checkpoint_at_sigterm(trainer: CrosscoderTrainer) -> Generator[None, None, None]:
    """On SIGTERM, which batch schedulers send before they kill, write a checkpoint and exit with status 0."""
    if trainer.run is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, trainer.request_stop)
    try:
        yield
    except StoppedError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # impatient schedulers repeat it
        saved = "there is nothing to save yet"
        if trainer.n_training_samples:
            trainer.save_checkpoint("stopped")
            saved = f"a checkpoint is in {trainer.run.checkpoints}; the same call goes on from there"
        if trainer.parallel.rank == 0:
            done = f"{trainer.n_training_samples:,} activations"
            print(f"stopped by SIGTERM after {done}: {saved}", file=sys.stderr)  # noqa: T201
        raise SystemExit(0) from None
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    signal.signal(signal.SIGTERM, before)


def claim(
    acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig
) -> tuple[CrosscoderTrainingConfig, RunDir | None]:
    """Make `config.run_dir` the directory of this training, if there is to be one; `train` begins with it.

    Returns:
        The completed architecture, and the run directory.

    Raises:
        UserError: shapes that contradict the data, or the run directory of another run.
    """
    architecture, run = _claimed(acts, architecture, config)
    if run is None:
        return architecture, None
    run.claim(training_identity(acts, architecture, config, config.training_tokens or acts.n_tokens))
    if isinstance(acts.dataset.source, (str, Path)):
        run.update(source=acts.to_dict())
    return architecture, run


def _claimed(
    acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig
) -> tuple[CrosscoderTrainingConfig, RunDir | None]:
    """What `claim` returns, when it has been called, perhaps by another process."""
    acts.check_batch(config.batch_size)
    run = None if config.run_dir is None else RunDir(config.run_dir)
    return complete(architecture, acts, config.device), run


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


def _outline(run: RunDir) -> Crosscoder:
    """The crosscoder of a run without its weights."""
    outline = SAE.from_dict({**json.loads((run.crosscoder / "cfg.json").read_text()), "device": "meta"})
    assert isinstance(outline, Crosscoder)
    return outline.eval()


def _evaluator(acts: Activations, sae: CrosscoderTrainingSAE, *_: Any) -> dict[str, Any]:
    return quick_metrics(sae.to_inference(), acts)


def _evaluate(crosscoder: Crosscoder, acts: Activations, config: TrainConfig) -> None:
    """Evaluate a crosscoder where the result is kept, unless that has been done."""
    run = None if config.run_dir is None else RunDir(config.run_dir)
    table = None if run is None else run.table("evaluation")
    if table is None and (run is not None or config.wandb_project):
        table = evaluate(crosscoder, acts)
        if run is not None:
            run.save_table("evaluation", table)
    _log_final(config, table)


def _start_wandb(config: TrainConfig, sae: CrosscoderTrainingSAE, run: RunDir | None, logging: ExitStack) -> bool:
    """Start the W&B run, which ends with `logging`, or continue that of a run directory; whether to log at all."""
    if config.wandb_project is None:
        return False
    recorded = {**dataclasses.asdict(config), "run_dir": None, "crosscoder": sae.cfg.to_dict()}
    logging.enter_context(
        wandb_run(
            config.wandb_project,
            run=run,
            name=config.wandb_run_name,
            config=recorded,
            disabled=sae.parallel.rank > 0,  # all take part in what is logged, one logs it
        )
    )
    return True


def _log_final(config: TrainConfig, table: pd.DataFrame | None) -> None:
    if config.wandb_project is None or table is None:
        return
    import wandb

    if wandb.run is not None:
        wandb.log({"evaluation": wandb.Table(dataframe=table)})
