"""What a training run writes to disk: checkpoints of its state, and the crosscoder at the end.

A checkpoint holds everything that the next step depends on. Any number of processes can load it.

state.json                 activations seen, the learning-rate schedule, Adam's step count, and a checksum of these
shard-*.safetensors        the tensors: a file per tensor and per process that holds rows of it, written by
                           torch.distributed.checkpoint, without pickle
checksums-*.json           the checksums of the files that one process wrote

1. Write the checkpoint to `partial-<activations>`, `state.json` last.
2. Rename it to `tokens-<activations>`.
3. Only then delete older checkpoints, but for the previous one: it is used if the last one turns out to be damaged.
   Whatever else is in the folder is left alone.

The crosscoder of several processes becomes the single file that SAELens reads, block by block: rank 0 writes, and the
other processes send their features a few rows at a time, so no process needs memory for all of it. (The consolidation
of torch.distributed.checkpoint needs twice a process's weights in memory and the file twice on disk, and it writes
scalars, such as a learnt threshold, as 0.)
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard

from crosslens.crosscoders import CrosscoderTrainingSAE
from crosslens.crosscoders.checksums import CONFIG, WEIGHTS, tensor_checksum, with_checksum
from crosslens.distributed.parallel import Parallel
from crosslens.errors import first_line, json_checksum
from crosslens.rundir import (
    all_checkpoints,
    check_no_link,
    complete_checkpoints,
    delete,
    file_checksum,
    inspect_checkpoint,
)

BLOCK_BYTES = 1 << 28
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_checkpoint(
    folder: Path,
    n_samples: int,
    rows: dict[str, Tensor],
    copies: dict[str, Tensor],
    numbers: dict[str, Any],
    parallel: Parallel,
) -> None:
    """Write a checkpoint, then delete all but the one before; all processes call this.

    Args:
        folder: checkpoint folder of a run, on a file system that all processes see.
        n_samples: activations seen so far; they name the checkpoint.
        rows: tensors with a row per feature that this process holds.
        copies: tensors that all processes hold alike.
        numbers: everything else, as JSON.
        parallel: the processes.

    Raises:
        UserError: the folder has become a link.
    """
    run = folder.parent
    partial_path, whole = folder / f"partial-{n_samples}", folder / f"tokens-{n_samples}"
    with parallel.first() as first:
        if first:
            check_no_link(folder, run)
            delete(partial_path, run)
            partial_path.mkdir(parents=True)
    write_state(partial_path, rows, copies, numbers, parallel)
    with parallel.first() as first:
        if first:
            delete(whole, run)
            os.replace(partial_path, whole)
            sync_folder(folder)
            before = [p for p in complete_checkpoints(folder) if p != whole][-1:]
            for other in all_checkpoints(folder):
                if other not in (whole, *before):
                    delete(other, run)


def write_state(
    folder: Path, rows: dict[str, Tensor], copies: dict[str, Tensor], numbers: dict[str, Any], parallel: Parallel
) -> None:
    """Write the state of a training run into a folder; see `save_checkpoint`."""
    tensors = _sharded(rows, copies, parallel)
    # one file per tensor, because the writer builds a whole file in memory
    files = {name: i for i, name in enumerate(sorted(tensors), start=1)}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _without_warning_of_one_process():
        dcp.save(tensors, storage_writer=writer, no_dist=parallel.alone)
    own = sorted(folder.glob(f"shard-{parallel.rank + 1:05d}-*.safetensors"))
    _write_json(folder / f"checksums-{parallel.rank:05d}.json", {path.name: file_checksum(path) for path in own})
    parallel.barrier()
    if parallel.rank == 0:
        _write_json(folder / "state.json", {**numbers, "checksum": json_checksum(numbers)})
        sync_folder(folder)


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    with path.open("w") as file:
        file.write(json.dumps(contents, indent=1))
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path, rows: dict[str, Tensor], copies: dict[str, Tensor], parallel: Parallel) -> dict[str, Any]:
    """Fill `rows` and `copies` in place from a checkpoint, whatever number of processes wrote it; return `numbers`.

    Raises:
        DamagedCheckpointError: in all processes, if one of them cannot read a file; tensors may have changed.
    """
    expected = {name: tensor.numel() * parallel.n_feature_ranks for name, tensor in rows.items()}
    expected |= {name: tensor.numel() for name, tensor in copies.items()}
    numbers, damage = _inspected(folder, expected, parallel)
    if parallel.count(int(bool(damage))):
        raise DamagedCheckpointError(damage or "another process cannot read it")
    with _without_warning_of_one_process():
        dcp.load(
            _sharded(rows, copies, parallel),
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=parallel.alone,
        )
    return numbers


def _inspected(folder: Path, expected: dict[str, int], parallel: Parallel) -> tuple[dict[str, Any], str]:
    """The contents of `state.json`, and what is wrong with the checkpoint, if anything.

    torch.distributed.checkpoint does not notice the missing file of one of several processes: it leaves the rows as
    they are.

    Args:
        folder: the checkpoint.
        expected: number of elements of every tensor.
        parallel: the processes.
    """
    numbers, damage = inspect_checkpoint(folder, parallel.rank, parallel.n_ranks)
    if damage:
        return {}, damage
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # a file that no checksum belongs to can raise anything
        return {}, first_line(error)
    for name, size in expected.items():
        chunks: Any = getattr(stored.get(name), "chunks", ())
        if sum(math.prod(chunk.sizes) for chunk in chunks) != size:
            return {}, f"a file with {name} is missing"
    return numbers, ""


class DamagedCheckpointError(Exception):
    """A checkpoint that cannot be read; the message says why."""


def set_aside(folder: Path) -> None:
    """Rename a checkpoint, so that it is no longer taken for one; the next checkpoint replaces it."""
    aside = folder.with_name(f"damaged-{folder.name}")
    delete(aside, folder.parent.parent)
    os.replace(folder, aside)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sharded(rows: dict[str, Tensor], copies: dict[str, Tensor], parallel: Parallel) -> dict[str, Any]:
    if parallel.mesh is None:
        return {**rows, **copies}
    place = [Replicate(), Shard(0)]
    return {**{name: DTensor.from_local(tensor, parallel.mesh, place) for name, tensor in rows.items()}, **copies}


@contextmanager
def _without_warning_of_one_process() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_whole(sae: CrosscoderTrainingSAE, folder: Path, parallel: Parallel) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` of the inference crosscoder; all processes call this.

    A safetensors file is 8 bytes with the length of a JSON header, the header with the dtype, shape and position of
    every tensor, and the tensors.

    Args:
        sae: with the features that this process holds.
        folder: created if missing; rank 0 writes.
        parallel: the processes.
    """
    sae.cfg.metadata.activation_scale = sae.activation_scale.tolist()
    if parallel.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / WEIGHTS, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            sae.cfg.metadata.checksums = _write_all(sae, file, parallel.n_feature_ranks)
            os.fsync(file)
        finally:
            os.close(file)
        (folder / CONFIG).write_text(json.dumps(with_checksum(sae.cfg.get_inference_sae_cfg_dict())))
    elif parallel.data_rank == 0:
        for name, tensor in _feature_rows(sae).items():
            for block in _columns(tensor, sae.cfg.d_sae) if name == "W_enc" else _blocks(tensor):
                dist.send(block.contiguous(), 0)
    parallel.barrier()


def _feature_rows(sae: CrosscoderTrainingSAE) -> dict[str, Tensor]:
    """The tensors with a row per feature of this process; `W_enc` is transposed."""
    rows = {name: p.detach() for name, p in sae.named_parameters() if name != "b_dec"}
    return sae.saved({**rows, "W_enc": sae.W_enc.detach().T})


def _write_all(sae: CrosscoderTrainingSAE, file: int, n_ranks: int) -> dict[str, str]:
    """Write all tensors; returns their checksums."""
    rows = _feature_rows(sae)
    tensors = {**sae.saved(sae.state_dict()), **rows}
    shapes = {name: [sae.cfg.d_sae, *t.shape[1:]] if name in rows else list(t.shape) for name, t in tensors.items()}
    shapes["W_enc"].reverse()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = math.prod(shapes[name]) * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shapes[name], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
    os.truncate(file, 8 + len(text) + end)
    checksums: dict[str, str] = {}
    for name, tensor in tensors.items():
        blocks: Iterable[Tensor] = [tensor]
        if name in rows:
            blocks = (_received_columns if name == "W_enc" else _received_blocks)(tensor, sae.cfg.d_sae, n_ranks)
        checksums[name] = tensor_checksum(_written(file, 8 + len(text) + header[name]["data_offsets"][0], blocks))
    return checksums


def _written(file: int, at: int, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The blocks, each written behind the one before."""
    for block in blocks:
        _write(file, block, at)
        yield block
        at += block.numel() * block.element_size()


def _received_blocks(own: Tensor, d_sae: int, n_ranks: int) -> Iterator[Tensor]:
    """The rows of all ranks in order, a block at a time."""
    del d_sae
    for rank in range(n_ranks):
        for block in _blocks(own):
            if rank:
                block = torch.empty_like(block, memory_format=torch.contiguous_format)
                dist.recv(block, rank)
            yield block


def _received_columns(own: Tensor, d_sae: int, n_ranks: int) -> Iterator[Tensor]:
    """Rows of `W_enc` with the features of all ranks, a block at a time."""
    n = len(own)
    for mine in _columns(own, d_sae):
        joined = mine.new_empty(len(mine), d_sae)
        joined[:, :n] = mine
        for rank in range(1, n_ranks):
            theirs = torch.empty_like(mine)
            dist.recv(theirs, rank)
            joined[:, rank * n : (rank + 1) * n] = theirs
        yield joined


def _columns(rows: Tensor, d_sae: int) -> Iterator[Tensor]:
    """Rows of `W_enc` from its transpose (F / n, S D), a block at a time."""
    for columns in rows.split(max(1, BLOCK_BYTES // (d_sae * rows.element_size())), dim=1):
        yield columns.T.contiguous()


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    size = max(1, BLOCK_BYTES // max(1, rows[0].numel() * rows.element_size()))
    yield from rows.split(size)


def _write(file: int, tensor: Tensor, at: int) -> None:
    on_cpu = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    data = on_cpu.view(torch.uint8).numpy().data
    while len(data):  # the kernel writes at most 2 GiB at once
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
