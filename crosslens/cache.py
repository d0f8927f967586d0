"""Activations on disk: one file per (shard of sequences, snapshot), so that one snapshot at a time is in memory.

    manifest.json                  what the cache is for; another request is refused
    tokens-00000.safetensors       int32 tokens of a shard (n, T)
    acts-00000-s03.safetensors     activations of the shard at one snapshot (n, T, D), with their checksum

Every file is written under a temporary name and renamed, so that a file that is there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crosslens.errors import UserError, first_line, shortened

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ActivationCache:
    """A folder of shards; `missing` tells what is still to be harvested.

    Args:
        folder: made when missing.
        tokens: (N, T) sequences, in the order in which they are read.
        shard_sequences: sequences per shard.
        n_snapshots: S.
        d_model: D.
        dtype: "bfloat16" or "float32".
        fingerprint: what else decides the activations; compared with the manifest of an existing cache.

    Raises:
        UserError: unknown dtype, or the folder holds the cache of another request.
    """

    def __init__(
        self,
        folder: Path,
        tokens: Tensor,
        shard_sequences: int,
        n_snapshots: int,
        d_model: int,
        dtype: str,
        fingerprint: dict[str, Any],
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r} is unknown for a cache; use one of {', '.join(map(repr, DTYPES))}")
        self.folder, self.tokens, self.size = folder, tokens, shard_sequences
        self.n_snapshots, self.d_model, self.dtype = n_snapshots, d_model, DTYPES[dtype]
        self.n_shards = -(-len(tokens) // shard_sequences)
        self._verified: set[Path] = set()
        request = {
            "format": FORMAT,
            **fingerprint,
            "dtype": dtype,
            "shard_sequences": shard_sequences,
            "n_sequences": len(tokens),
            "tokens": hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest(),
        }
        self._claim(request)

    def _claim(self, request: dict[str, Any]) -> None:
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            try:
                found: dict[str, Any] = dict(json.loads(manifest.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{manifest} is damaged ({error}); delete the folder {self.folder} and harvest again"
                ) from error
            for key, value in request.items():
                if found.get(key) != value:
                    raise UserError(
                        f"{self.folder} is the cache of another request: its {key} is {shortened(found.get(key))}, "
                        f"asked for is {shortened(value)}; give another folder, or delete this one"
                    )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard in range(self.n_shards):
            first, last = self.span(shard)
            self._write(self.folder / f"tokens-{shard:05d}.safetensors", self.tokens[first:last])
        partial = manifest.with_suffix(".tmp")
        partial.write_text(json.dumps(request, indent=1))
        os.replace(partial, manifest)

    def span(self, shard: int) -> tuple[int, int]:
        """First and last (excluded) sequence of a shard."""
        return shard * self.size, min((shard + 1) * self.size, len(self.tokens))

    def path(self, shard: int, snapshot: int) -> Path:
        """File of one shard at one snapshot."""
        return self.folder / f"acts-{shard:05d}-s{snapshot:02d}.safetensors"

    def missing(self) -> list[tuple[int, int]]:
        """(shard, snapshot) pairs that are not on disk, snapshot by snapshot."""
        pairs = ((shard, s) for s in range(self.n_snapshots) for shard in range(self.n_shards))
        return [pair for pair in pairs if not self.path(*pair).exists()]

    def write(self, shard: int, snapshot: int, acts: Float[Tensor, "n T D"]) -> None:
        """Store one shard of one snapshot."""
        self._write(self.path(shard, snapshot), acts.to(self.dtype))

    def _write(self, path: Path, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"data": tensor}, partial, metadata={"crc32": _checksum(tensor)})
        os.replace(partial, path)

    def read(self, first: int, last: int) -> Float[Tensor, "n T S D"]:
        """Float32 activations of a run of sequences, all snapshots."""
        out = torch.empty(last - first, self.tokens.shape[1], self.n_snapshots, self.d_model)
        for shard in range(first // self.size, -(-last // self.size)):
            begin, end = self.span(shard)
            low, high = max(first, begin), min(last, end)
            for s in range(self.n_snapshots):
                out[low - first : high - first, :, s] = self._load(shard, s)[low - begin : high - begin]
        return out

    def _load(self, shard: int, snapshot: int) -> Tensor:
        path = self.path(shard, snapshot)
        remedy = f"delete {path.name} and harvest again: only that file is made anew"
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor("data")
                if path not in self._verified and file.metadata()["crc32"] != _checksum(tensor):
                    raise UserError(f"{path} does not match its checksum; {remedy}")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); {remedy}") from error
        self._verified.add(path)
        return tensor


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.view(torch.uint8).numpy().data):08x}"
