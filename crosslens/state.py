"""The state of a training on disk: all that its next step depends on, loadable by another number of processes.

state.json                 activations seen, schedules, Adam's count of steps
shard-*.safetensors        the tensors, a file for each and for each process that owns rows of it, as
                           torch.distributed.checkpoint writes them without pickle
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard

if TYPE_CHECKING:
    from crosslens.parallel import Parallel
    from crosslens.trainer import CrosscoderTrainer

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
