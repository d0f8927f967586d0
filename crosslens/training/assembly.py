"""A crosscoder whose features several processes own, written as the one file that SAELens reads, block by block.

safetensors: 8 bytes with the length of a JSON header, the header with type, shape and place of every tensor, then the
tensors. Rank 0 writes; the owners of the other features send it theirs, some rows at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crosslens.crosscoders import CrosscoderTrainingSAE

BLOCK_BYTES = 1 << 28
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


def save_whole(sae: CrosscoderTrainingSAE, folder: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` of the inference crosscoder; all processes call this.

    Args:
        sae: of which this process owns some features.
        folder: made when missing; rank 0 writes.
    """
    sae.cfg.metadata.activation_scale = sae.activation_scale.tolist()
    if sae.parallel.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cfg.json").write_text(json.dumps(sae.cfg.get_inference_sae_cfg_dict()))
        file = os.open(folder / "sae_weights.safetensors", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            _write_all(sae, file)
            os.fsync(file)
        finally:
            os.close(file)
    elif sae.parallel.part == 0:
        for name, tensor in _rows(sae).items():
            for block in _strips(tensor, sae.cfg.d_sae) if name == "W_enc" else _blocks(tensor):
                dist.send(block.contiguous(), 0)
    sae.parallel.barrier()


def _rows(sae: CrosscoderTrainingSAE) -> dict[str, Tensor]:
    """The tensors with a row for each feature that this process owns; of `W_enc` the transposed."""
    rows = {name: p.detach() for name, p in sae.named_parameters() if name != "b_dec"}
    return {**rows, "W_enc": sae.W_enc.detach().T}


def _write_all(sae: CrosscoderTrainingSAE, file: int) -> None:
    rows = _rows(sae)
    tensors = {**sae.state_dict(), **rows}
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
    for name, tensor in tensors.items():
        at = 8 + len(text) + header[name]["data_offsets"][0]
        in_order = _strips_of_all if name == "W_enc" else _blocks_of_all
        for part in in_order(sae, tensor) if name in rows else [tensor]:
            _write(file, part, at)
            at += part.numel() * part.element_size()


def _blocks_of_all(sae: CrosscoderTrainingSAE, own: Tensor) -> Iterator[Tensor]:
    """Rows of all processes in order, some at a time."""
    for owner in range(sae.parallel.n_shares):
        for block in _blocks(own):
            if owner:
                block = torch.empty_like(block, memory_format=torch.contiguous_format)
                dist.recv(block, owner)
            yield block


def _strips_of_all(sae: CrosscoderTrainingSAE, own: Tensor) -> Iterator[Tensor]:
    """Rows of `W_enc` with the features of all processes, some at a time."""
    n = len(own)
    for mine in _strips(own, sae.cfg.d_sae):
        strip = mine.new_empty(len(mine), sae.cfg.d_sae)
        strip[:, :n] = mine
        for owner in range(1, sae.parallel.n_shares):
            theirs = torch.empty_like(mine)
            dist.recv(theirs, owner)
            strip[:, owner * n : (owner + 1) * n] = theirs
        yield strip


def _strips(rows: Tensor, n_features: int) -> Iterator[Tensor]:
    """Rows of `W_enc`, some at a time, from its transposed: (d, F / n)."""
    for columns in rows.split(max(1, BLOCK_BYTES // (n_features * rows.element_size())), dim=1):
        yield columns.T.contiguous()


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    size = max(1, BLOCK_BYTES // max(1, rows[0].numel() * rows.element_size()))
    yield from rows.split(size)


def _write(file: int, tensor: Tensor, at: int) -> None:
    here = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    data = here.view(torch.uint8).numpy().data
    while len(data):  # the kernel writes at most 2 GiB at once
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
