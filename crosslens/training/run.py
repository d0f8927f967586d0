"""`train`: from activations to a crosscoder, with a run directory from which an interrupted run resumes.

1. Fill in the architecture's shapes and metadata from the data, and claim the run directory.
2. Initialise the crosscoder (`crosslens.training.initialisation`); resume from the last complete checkpoint, if any.
3. Train (`crosslens.training.trainer`), write checkpoints, and save the inference crosscoder.
4. Evaluate it on held-out activations (`crosslens.training.evaluation`), and say how good it is.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from sae_lens import SAE
from torch import Tensor

from crosslens.activations.loader import FIRST_BYTES, SHUFFLED, Activations
from crosslens.activations.plan import peak_memory
from crosslens.config import decisive
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingConfig, CrosscoderTrainingSAE, load
from crosslens.crosscoders.base import check_trainable
from crosslens.crosscoders.checksums import CONFIG, WEIGHTS, check_files
from crosslens.crosscoders.inspection import inspect_crosscoder
from crosslens.distributed.devices import choose_precision, find_device
from crosslens.distributed.parallel import Parallel, check_split, join, n_processes
from crosslens.errors import UserError
from crosslens.progress import say
from crosslens.rundir import RunDir, all_checkpoints, delete, without_paths
from crosslens.training.checkpoints import save_whole
from crosslens.training.config import TrainConfig, check_warm_up
from crosslens.training.continuation import check_source, open_source, source_digest
from crosslens.training.evaluation import evaluate, quick_metrics
from crosslens.training.initialisation import first_batches, initialise, uninitialised
from crosslens.training.logging import wandb_run
from crosslens.training.progress import Measured, quality_table, warn_if_poor
from crosslens.training.trainer import CrosscoderTrainer, StoppedError

Batches: TypeAlias = Generator[Tensor, None, None]

_ROUNDING = (
    "a cache rounds activations, so repeat the command with or without --cache and with --cache-dtype as at first "
    "(live activations are those of a cache in float32)"
)
_ORDER = (
    "a cache gives the tokens in another order than live models do, so repeat the command with or without --cache (in "
    "Python Activations.cache) as at first"
)


def train(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig | None = None,
    *,
    init_from: Crosscoder | str | Path | None = None,
) -> Crosscoder:
    """Train a crosscoder on the activations of all snapshots.

    Args:
        acts: live or cached activations.
        architecture: one of the four training configs; shapes and metadata are filled in from `acts`.
        config: how to train.
        init_from: start from the weights of this crosscoder, or the one in this folder or run directory, which may have
            fewer features and fewer snapshots (`crosslens.training.continuation`).

    Returns:
        The inference crosscoder, in eval mode, without gradients. With several processes (torchrun), rank 0 returns it
        on the CPU; the others return it on the meta device, without weights.

    Raises:
        UserError: shapes that contradict the data, a snapshot whose activations are zero or not finite, an `init_from`
            that cannot be continued, or the run directory of another run.
        FloatingPointError: the loss is not finite; the last checkpoint is intact.
    """
    config = config or TrainConfig()
    if n_processes() > 1 and config.run_dir is None:
        raise UserError(
            f"run_dir=None, but {n_processes()} processes train this crosscoder and none of them holds all of it; "
            "give a run_dir that all of them can access"
        )
    source = None if init_from is None else open_source(init_from)
    parallel, device = join(config.device, config.data_parallel)
    with ExitStack() as logging:
        with parallel.first() as first:
            if first and config.run_dir is not None:
                logging.enter_context(RunDir(config.run_dir).writing())
        trained = _fit(acts, architecture, dataclasses.replace(config, device=device), parallel, logging, source)
        if not isinstance(trained, RunDir):
            crosscoder = trained
        elif parallel.alone:
            crosscoder = load(trained.crosscoder, device=device)
        else:  # the whole crosscoder may not fit on a GPU, nor into memory once per process
            crosscoder = load(trained.crosscoder, device="cpu") if parallel.rank == 0 else _without_weights(trained)
        if _is_evaluated(config) and parallel.rank == 0:
            _evaluate(crosscoder, acts, architecture, config)
    return crosscoder


def _fit(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig,
    parallel: Parallel,
    logging: ExitStack,
    source: Crosscoder | None,
) -> Crosscoder | RunDir:
    """Train; return the run directory that the crosscoder was saved in, or without one the crosscoder."""
    check_split(n_processes(), config.data_parallel, architecture.d_sae, config.batch_size)
    finished = False
    with parallel.first() as first:
        if first:
            architecture, run = claim(acts, architecture, config, source=source)
            if run is not None and not config.resume:
                _delete_checkpoints(run)
            finished = run is not None and config.resume and _is_whole(run)
        else:
            architecture, run = _claimed(acts, architecture, config, source)
    if run is not None and parallel.count(int(finished)):  # rank 0 decides; on a network others may not see it yet
        if parallel.rank == 0:
            say(f"{run.path} holds this crosscoder: it is loaded, not trained again")
        return run
    began = time.perf_counter()
    trainer, batches = _trainer(acts, architecture, config, run, parallel, source)
    sae, trainer.data_provider = trainer.sae, batches
    trainer.cfg.logger.log_to_wandb = _start_wandb(config, sae, run, parallel, logging)
    resumed, started = trainer.n_training_samples, time.perf_counter()
    # closing ends the prefetching before the evaluation
    with closing(batches), _checkpoint_at_sigterm(trainer):
        trainer.fit()
        trainer.check_finite()
        if run is not None and trainer.n_training_samples > resumed:
            trainer.save_checkpoint("final")  # writing the result takes time, and may fail
    rate = (trainer.n_training_samples - resumed) / (time.perf_counter() - started)
    if trainer.last_measured is not None and parallel.rank == 0 and not _is_evaluated(config):
        labels = sae.cfg.snapshot_labels
        warn_if_poor(
            labels, trainer.last_measured, architecture, config.dead_tokens, config.training_tokens or acts.n_tokens
        )
    if run is None:
        return sae.to_inference()
    partial_path = run.path / "crosscoder.partial"
    with parallel.first() as first:
        if first:
            delete(partial_path, run.path)  # left by a process that was killed
    if parallel.alone:
        sae.to_inference().save(partial_path)
    else:
        save_whole(sae, partial_path, parallel)
    with parallel.first() as first:
        if first:
            if run.crosscoder.is_dir():  # of an earlier run, with resume=False; what others put there is kept
                for path in (path for path in run.crosscoder.iterdir() if path.name not in (CONFIG, WEIGHTS)):
                    os.replace(path, partial_path / path.name)
            delete(run.crosscoder, run.path)
            os.replace(partial_path, run.crosscoder)
            delete(run.path / "evaluation.parquet", run.path)
            _delete_checkpoints(run)
            seconds = {"train": time.perf_counter() - began, "waited_for_data": acts.waited}
            run.update(
                timings={**seconds, "tokens_per_second": rate, "peak_memory": peak_memory()}, processes=n_processes()
            )
    if config.evaluate and not parallel.alone:  # while the processes hold it; a single one loads what was saved
        sae.eval()
        table = evaluate(sae, acts, parallel=parallel)
        with parallel.first() as first:
            if first:
                run.save_table("evaluation", table)
    return run


def _delete_checkpoints(run: RunDir) -> None:
    """Delete all checkpoints, and their folder if nothing else is in it."""
    for checkpoint in all_checkpoints(run.checkpoints):
        delete(checkpoint, run.path)
    with suppress(OSError):
        run.checkpoints.rmdir()


def _is_whole(run: RunDir) -> bool:
    """Whether a run directory holds its crosscoder; a damaged one is set aside, and told."""
    if not (run.crosscoder / "cfg.json").is_file():
        return False
    try:
        check_files(run.crosscoder, inspect_crosscoder(run.crosscoder))
    except UserError as error:
        aside = run.crosscoder.with_name("damaged-crosscoder")
        delete(aside, run.path)
        os.replace(run.crosscoder, aside)
        say(f"{error}; it is now in {aside}, and is trained again")
        return False
    return True


def _trainer(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig,
    run: RunDir | None,
    parallel: Parallel,
    source: Crosscoder | None,
) -> tuple[CrosscoderTrainer, Batches]:
    """A trainer that continues from the last checkpoint, or else one at the start, and its batches from there on."""

    def made(sae: CrosscoderTrainingSAE) -> CrosscoderTrainer:
        total = config.training_tokens or acts.n_tokens
        evaluator = partial(_evaluator, acts, parallel)
        return CrosscoderTrainer(config, sae, iter(()), total, evaluator=evaluator, run=run, parallel=parallel)

    found = parallel.rank == 0 and run is not None and config.resume and run.last_checkpoint() is not None
    if parallel.count(int(found)):  # rank 0 decides, as above
        trainer = made(uninitialised(architecture, parallel))
        if trainer.resume():
            return trainer, _batches(acts, config, parallel, start=trainer.n_training_steps)
        del trainer
        if parallel.rank == 0:
            say("no checkpoint can be read: training starts again from the first token")
    first, batches = _first(acts, config, parallel)
    sae = initialise(
        architecture,
        acts,
        batch_size=config.batch_size,
        scale_tokens=config.scale_tokens,
        seed=config.seed,
        parallel=parallel,
        first=first,
        source=source,
    )
    return made(sae), batches


def _batches(acts: Activations, config: TrainConfig, parallel: Parallel, start: int = 0) -> Batches:
    return acts.batches(config.batch_size, start=start, device=config.device, parallel=parallel, whole=False)


def _first(acts: Activations, config: TrainConfig, parallel: Parallel) -> tuple[deque[Tensor] | None, Batches]:
    """The first batches, for the scales, if they are kept for training; and all batches of the training.

    The models fill a buffer before the first live batch. If training opened the stream again they would fill it again,
    so one process goes on with the stream that the scales were measured on. Caches, and a buffer that holds the whole
    epoch, are not filled twice.
    """
    n = first_batches(acts, config.batch_size, config.scale_tokens)
    n_bytes = n * config.batch_size * acts.n_snapshots * acts.d_model * 4
    stream = _batches(acts, config, parallel)
    if not parallel.alone or acts.data_order == SHUFFLED or n_bytes > FIRST_BYTES:
        return None, stream
    first = deque(batch.to("cpu", copy=True) for batch in islice(stream, n))
    return first, _continued(first, stream, config.device)


def _continued(first: deque[Tensor], stream: Batches, device: str | None) -> Batches:
    """The first batches, each of which is let go of once it has been used, and the rest of a stream."""
    with closing(stream):
        while first:
            yield first.popleft().to(device)
        yield from stream


@contextmanager
def _checkpoint_at_sigterm(trainer: CrosscoderTrainer) -> Generator[None, None, None]:
    """On SIGTERM, which batch schedulers send before SIGKILL, write a checkpoint and exit with status 0."""
    if trainer.run is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, trainer.request_stop)
    try:
        yield
    except StoppedError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers may repeat it
        saved = "there is nothing to save yet"
        if trainer.n_training_samples:
            trainer.save_checkpoint("stopped")
            saved = f"a checkpoint is in {trainer.run.checkpoints}; run the same call to continue"
        if trainer.parallel.rank == 0:
            done = f"{trainer.n_training_samples:,} activations"
            print(f"stopped by SIGTERM after {done}: {saved}", file=sys.stderr)  # noqa: T201
        raise SystemExit(0) from None
    except BaseException:
        signal.signal(signal.SIGTERM, before)
        raise
    signal.signal(signal.SIGTERM, before)


def claim(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig,
    *,
    cache_dtype: str | None = None,
    source: Crosscoder | None = None,
) -> tuple[CrosscoderTrainingConfig, RunDir | None]:
    """Complete the architecture and make `config.run_dir`, if given, the directory of this training.

    Args:
        acts: activations to train on.
        architecture: one of the four training configs.
        config: how to train.
        cache_dtype: of the cache that they will be read from, if they are live still: its order and rounding are not
            those of live activations.
        source: whose weights the training starts from.

    Returns:
        The completed architecture, and the run directory or None.

    Raises:
        UserError: shapes that contradict the data, a source that cannot be continued, or the run directory of another
            run.
    """
    architecture, run = _claimed(acts, architecture, config, source)
    if run is None:
        return architecture, None
    identity = training_identity(acts, architecture, config, config.training_tokens or acts.n_tokens, cache_dtype)
    if source is not None:
        identity["init_from"] = source_digest(source)
    run.claim(identity, hints={"data_order": _ORDER, "cache_dtype": _ROUNDING})
    try:
        run.update(source=acts.to_dict())
    except UserError as error:
        say(f"the command line cannot read {run.path}: {error}")
    return architecture, run


def _claimed(
    acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig, source: Crosscoder | None
) -> tuple[CrosscoderTrainingConfig, RunDir | None]:
    """The result of `claim`, without claiming: for processes other than the one that claimed."""
    acts.check_batch(config.batch_size)
    check_warm_up(config, (config.training_tokens or acts.n_tokens) // config.batch_size)
    run = None if config.run_dir is None else RunDir(config.run_dir)
    architecture = complete(architecture, acts, config.device)
    if source is not None:
        check_source(source, architecture)
    return architecture, run


def complete(
    architecture: CrosscoderTrainingConfig, acts: Activations, device: str | None = None
) -> CrosscoderTrainingConfig:
    """The architecture with d_in, n_snapshots and metadata filled in from the data.

    Args:
        architecture: one of the four training configs.
        acts: the data.
        device: device of the crosscoder; None: CUDA if available.

    Raises:
        UserError: given shapes contradict the data, or the parameters would be in half precision.
    """
    check_trainable(architecture.dtype)
    S, D = acts.n_snapshots, acts.d_model
    if architecture.d_in not in (0, S * D) or (architecture.d_in and architecture.n_snapshots != S):
        raise UserError(
            f"d_in={architecture.d_in} with n_snapshots={architecture.n_snapshots} does not fit the data: "
            f"{S} snapshots of d_model {D} have d_in={S * D}; leave both out and they are filled in"
        )
    metadata = copy.deepcopy(architecture.metadata)
    for key, value in acts.metadata().items():
        metadata[key] = value
    return dataclasses.replace(
        architecture, d_in=S * D, n_snapshots=S, device=device or find_device(), metadata=metadata
    )


def training_identity(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig,
    total: int,
    cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Everything that must be equal for two training runs to share a run directory.

    Args:
        acts: activations to train on.
        architecture: complete, see `complete`.
        config: how to train.
        total: activations to train on.
        cache_dtype: of the cache that they are or will be read from; None: they are live.
    """
    cache_dtype = cache_dtype or acts.cache_dtype
    details = {key: value for key, value in architecture.to_dict().items() if key not in ("metadata", "device")}
    return {
        **acts.metadata(),
        "architecture": details,
        "training": {
            **decisive(config),
            "precision": choose_precision(config.precision, config.device),
            "training_tokens": total,
        },
        "models": decisive(acts.settings, live=cache_dtype is None),
        "cache_dtype": cache_dtype or "float32",  # live activations are those of a cache in float32
        "data_seed": acts.seed,
        "data_order": acts.data_order if cache_dtype is None else SHUFFLED,
        "n_tokens": acts.n_tokens,
        "tokens_sha256": acts.tokens_sha256,
    }


def _without_weights(run: RunDir) -> Crosscoder:
    """The crosscoder of a run on the meta device."""
    empty = SAE.from_dict({**json.loads((run.crosscoder / "cfg.json").read_text()), "device": "meta"})
    assert isinstance(empty, Crosscoder)
    return empty.eval()


def _evaluator(acts: Activations, parallel: Parallel, sae: CrosscoderTrainingSAE, *_: Any) -> dict[str, Any]:
    return quick_metrics(sae, acts, parallel)


def _is_evaluated(config: TrainConfig) -> bool:
    """Whether held-out metrics are measured at the end, because they have somewhere to go."""
    return config.evaluate and (config.run_dir is not None or config.wandb_project is not None)


def _evaluate(
    crosscoder: Crosscoder, acts: Activations, architecture: CrosscoderTrainingConfig, config: TrainConfig
) -> None:
    """Evaluate a crosscoder, unless its run directory holds the result; write, show and log it."""
    run = None if config.run_dir is None else RunDir(config.run_dir)
    table = None if run is None else run.table("evaluation")
    if table is None:
        table = evaluate(crosscoder, acts)
        if run is not None:
            run.save_table("evaluation", table)
    _log_final(config, table)
    n_tokens = int(acts.keep(acts.held_out_tokens()).sum())
    say(quality_table(table, crosscoder.cfg.d_sae, n_tokens))
    measured = Measured(
        table["explained_variance"].tolist(), float(table["l0"].mean()), float(table["dead_fraction"].iloc[0])
    )
    labels = table["label"].tolist()
    warn_if_poor(labels, measured, architecture, config.dead_tokens, config.training_tokens or acts.n_tokens)


def _start_wandb(
    config: TrainConfig, sae: CrosscoderTrainingSAE, run: RunDir | None, parallel: Parallel, logging: ExitStack
) -> bool:
    """Start the W&B run, or continue that of a run directory, until `logging` closes; return whether to log."""
    if config.wandb_project is None:
        return False
    recorded = {**dataclasses.asdict(config), "run_dir": None, "crosscoder": sae.cfg.to_dict()}
    logging.enter_context(
        wandb_run(
            config.wandb_project,
            run=run,
            name=config.wandb_run_name,
            config=without_paths(recorded),
            disabled=parallel.rank > 0,  # all processes compute metrics, rank 0 logs them
        )
    )
    return True


def _log_final(config: TrainConfig, table: pd.DataFrame) -> None:
    if config.wandb_project is None:
        return
    import wandb

    if wandb.run is not None:
        wandb.log({"evaluation": wandb.Table(dataframe=table)})
