"""Reading shuffled batches from a cache at real width: CPU seconds, bytes, memory, files, sequences in a batch.

A synthetic cache of as many files as 20 million tokens have, each smaller, so that a batch reads as many runs of rows
from as many files; all of it is in the page cache. Beside it version 0.1's path: a file per (block, snapshot), blocks
of 1 GiB, shuffled inside. Every process is measured: with "all tokens" each needs the whole batch (they split the
features), with "own tokens" a part of it (they split the tokens); version 0.1 read everything in each. Checksums are
compared when a row is read for the first time, so the first epoch is measured apart; here it opens all files, too,
which takes thousands of batches of a cache of that size. Batches are measured again after some epochs.

"the least" is what no path can do without: system calls that read each run of rows, and widening them into a buffer in
shared memory, with fixed places, no checksums and no waiting; each process does its part.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.multiprocessing as mp
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from crosslens.activations.cache import ActivationCache, shard_sequences
from crosslens.activations.feed import feed
from crosslens.activations.files import HEADER, row_bytes
from crosslens.activations.order import Order, stored_order
from crosslens.activations.plan import distinct_sequences
from crosslens.activations.rows import CachedRows
from crosslens.distributed.parallel import ALONE, join

PACKAGES = ("crosslens", "torch", "numpy", "safetensors", "xxhash")
TARGET = 20_000_000  # tokens
OLD_BLOCK = 1 << 30
LEAST = "the least"
WARM = 3  # epochs for each process: each compares the checksums of what it reads itself, a part of every epoch


# ---------------------------------------------------------------------- the caches
def open_cache(folder: Path, args: argparse.Namespace) -> ActivationCache:
    """The cache, one sequence a shard; filled if it is new."""
    n = -(-TARGET // args.context_size)
    n_shards = -(-n // shard_sequences(n, args.context_size, args.d_model))
    tokens = torch.zeros(n_shards, args.context_size, dtype=torch.int32)
    cache = ActivationCache(folder, tokens, 1, args.snapshots, args.d_model, args.dtype, {})
    noise = torch.randn(args.context_size, args.d_model, generator=torch.Generator().manual_seed(0))
    for shard, s in cache.missing():
        cache.write(shard, s, noise.roll(shard * args.snapshots + s, 0)[None])
    return cache


def old_blocks(folder: Path, args: argparse.Namespace) -> int:
    """Files of version 0.1: (n, T, D) of one block and snapshot; returns the tokens in a block."""
    S, D, T = args.snapshots, args.d_model, args.context_size
    n = max(1, OLD_BLOCK // (4 * S * D * T))
    folder.mkdir(exist_ok=True)
    noise = torch.randn(n, T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    for block in range(args.old_blocks):
        for s in range(S):
            path = folder / f"acts-{block:05d}-s{s:02d}.safetensors"
            if not path.exists():
                save_file({"data": noise.roll(block * S + s, 1).contiguous()}, path)
    return n * T


def old_batches(folder: Path, n: int, args: argparse.Namespace) -> Iterator[Tensor]:
    """Version 0.1's path: read a block, permute its tokens, split it, and join what is left over with the next."""
    S, D, B = args.snapshots, args.d_model, args.batch_size
    left: Tensor | None = None
    draw = torch.Generator().manual_seed(0)
    while True:
        for block in torch.randperm(args.old_blocks, generator=draw).tolist():
            out = torch.empty(n // args.context_size, args.context_size, S, D)
            for s in range(S):
                with safe_open(folder / f"acts-{block:05d}-s{s:02d}.safetensors", framework="pt") as file:
                    out[:, :, s].copy_(file.get_tensor("data").float())
            rows = out.flatten(0, 1)[torch.randperm(n, generator=draw)]
            rows = rows if left is None else torch.cat([left, rows])
            whole = len(rows) // B * B
            yield from rows[:whole].split(B)
            left = rows[whole:].clone()


# ---------------------------------------------------------------------- one process
def consume(rank: int, way: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """CPU and wall seconds, bytes and memory of one process for each batch."""
    torch.set_num_threads(1)
    if way == "version 0.1":
        stream: Any = old_batches(folder / "old", old_blocks(folder / "old", args), args)
    else:
        cache = open_cache(folder / "new", args)
        parallel = ALONE if args.world == 1 else join("cpu", args.world if way == "own tokens" else 1)[0]
        rows = CachedRows(cache, Order(cache.training_counts(), 0))
        spans = ((i * args.batch_size, (i + 1) * args.batch_size) for i in range(10**9))
        shape = (args.batch_size, args.snapshots, args.d_model)
        stream = feed(
            rows, spans, shape, torch.device("cpu"), parallel, way == "all tokens", threading.Event(), lambda _: None
        )
    with closing(stream):
        first = spend(stream, args.batches)  # version 0.2: with checksums
        for _ in range(WARM * args.world * args.batches if way != "version 0.1" else 0):
            next(stream)
        later = spend(stream, args.batches)
    return {"rank": rank, **{f"first {k}": v for k, v in first.items()}, **later, "memory": peak()}


def least(rank: int, buffer: Tensor, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of one process to read and widen its part of each batch."""
    torch.set_num_threads(1)
    cache = open_cache(folder / "new", args)
    size = row_bytes(args.d_model, args.dtype)
    n = args.batch_size // cache.n_training_shards
    stored = torch.empty(n, args.d_model, dtype=getattr(torch, args.dtype))
    raw = stored.view(torch.uint8).numpy().reshape(-1).data
    spent = {"read": 0.0, "widen": 0.0}
    wall = 0.0
    for batch in range(args.batches + 1):
        if batch == 1:  # the first brings the buffer's pages into being
            spent, wall = dict.fromkeys(spent, 0.0), time.perf_counter()
        for shard in range(rank, cache.n_training_shards, args.world):
            for s in range(args.snapshots):
                began = time.thread_time()
                with open(cache.path(shard, s), "rb", buffering=0) as file:
                    os.preadv(file.fileno(), [raw], HEADER + batch * n % (args.context_size - n) * size)
                middle = time.thread_time()
                buffer[shard * n : (shard + 1) * n, s].copy_(stored)
                spent["read"] += middle - began
                spent["widen"] += time.thread_time() - middle
    cpu = {name: seconds / args.batches for name, seconds in spent.items()}
    wall = (time.perf_counter() - wall) / args.batches
    nothing = {"first cpu": float("nan"), "bytes": size * n * len(range(rank, cache.n_training_shards, args.world))}
    nothing["bytes"] *= args.snapshots
    return {"rank": rank, **cpu, "cpu": sum(cpu.values()), "wall": wall, "memory": peak(), **nothing}


def hash_rate() -> float:
    """Bytes a second of the checksum, in blocks of 48 KiB that are not in the processor's cache."""
    data = np.random.default_rng(0).integers(0, 256, 256 << 20, dtype=np.uint8).data
    began = time.process_time()
    for first in range(0, len(data), 48 << 10):
        xxhash.xxh3_64_intdigest(data[first : first + (48 << 10)], 0)
    return len(data) / (time.process_time() - began)


def spend(stream: Any, n: int) -> dict[str, float]:
    cpu, wall, read = time.process_time(), time.perf_counter(), characters()
    for _ in range(n):
        batch = next(stream)
        del batch
    return {
        "cpu": (time.process_time() - cpu) / n,
        "wall": (time.perf_counter() - wall) / n,
        "bytes": (characters() - read) / n,
    }


def characters() -> int:
    """Bytes that this process has read from files, by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def peak() -> float:
    return float(measure.resident("VmHWM") or 0)


def run(way: str, world: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All processes together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    args.world = world
    args.buffer = torch.empty(args.batch_size, args.snapshots, args.d_model).share_memory_() if way == LEAST else None
    with tempfile.TemporaryDirectory() as results:
        mp.start_processes(_enter, (world, port, way, folder, args, results), nprocs=world, start_method="fork")
        parts = [torch.load(Path(results) / f"{rank}.pt") for rank in range(world)]
    names = ("cpu", "first cpu", "bytes", "memory", *(("read", "widen") if way == LEAST else ()))
    total = {name: sum(part[name] for part in parts) for name in names}
    args.buffer = None
    return {"way": way, "world": world, **total, "wall": max(part["wall"] for part in parts)}


def _enter(rank: int, world: int, port: int, way: str, folder: Path, args: argparse.Namespace, results: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    found = least(rank, args.buffer, folder, args) if way == LEAST else consume(rank, way, folder, args)
    torch.save(found, Path(results) / f"{rank}.pt")


# ---------------------------------------------------------------------- sequences
def sequences(args: argparse.Namespace) -> dict[str, float]:
    """Distinct sequences in batches of a cache of 20 million tokens: the order alone, without activations."""
    T, B = args.context_size, args.batch_size
    n = -(-TARGET // T)
    size = shard_sequences(n, T, args.d_model)
    counts = [min(size, n - first) for first in range(0, n, size)]
    order = Order([count * T for count in counts], 0)
    owner = [stored_order(count * T, 0, i) // T + i * size for i, count in enumerate(counts)]
    began = time.perf_counter()
    order.pieces(0, B)
    found = [
        len(np.unique(np.concatenate([owner[p.shard][p.rows] for p in order.pieces(i * B, (i + 1) * B)])))
        for i in range(50)
    ]
    return {
        "files": 1 + len(counts) * (args.snapshots + 1),
        "least": min(found),
        "mean": float(np.mean(found)),
        "expected": distinct_sequences(np.full(n, T), B),
        "start": time.perf_counter() - began,
        "bytes": n * T * args.snapshots * row_bytes(args.d_model, args.dtype),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=32, help="S")
    parser.add_argument("--d-model", type=int, default=768, help="D")
    parser.add_argument("--context-size", type=int, default=1024, help="T")
    parser.add_argument("--batch-size", type=int, default=4096, help="B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, default=14, help="batches measured, twice; 14 are an epoch by default")
    parser.add_argument("--old-blocks", type=int, default=2, help="blocks of version 0.1's cache")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="where the caches are; kept if given")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(exist_ok=True)
        cache = open_cache(folder / "new", args)
        n_files = len(list((folder / "new").glob("*.safetensors"))) + 1
        old_tokens = old_blocks(folder / "old", args)
        rows: list[Any] = []
        for world in args.processes:
            for way in ("all tokens", *(["own tokens"] if world > 1 else []), LEAST):
                rows.append(run(way, world, folder, args))
                print(rows[-1], flush=True)
        rows.append(run("version 0.1", 1, folder, args))
        old = rows[-1]
        rows += [
            {**old, "world": n, **{k: n * old[k] for k in ("cpu", "first cpu", "memory")}} for n in args.processes[1:]
        ]
        found = sequences(args)
    number = measure.number
    S, D, T, B = args.snapshots, args.d_model, args.context_size, args.batch_size
    old_files = (-(-TARGET // old_tokens)) * (S + 1) + 1
    body = "\n\n".join(
        [
            f"S = {S}, D = {D}, context {T}, B = {B}, {args.dtype} in the page cache; one thread a process; sums over "
            "all processes. Version 0.1 in more than one process is computed: each did the same work.",
            measure.markdown(
                rows,
                {
                    "path": lambda row: row["way"],
                    "processes": number("world", "d"),
                    "CPU s a batch": number("cpu", ".3f"),
                    "first epoch (checksums)": lambda row: (
                        "" if np.isnan(row["first cpu"]) else f"{row['first cpu']:.3f}"
                    ),
                    "wall s a batch": number("wall", ".3f"),
                    "MB read a batch": lambda row: (
                        "mapped" if row["way"] == "version 0.1" else f"{row['bytes'] / 1e6:.0f}"
                    ),
                    "peak memory, GB": lambda row: f"{row['memory'] / 1e9:.2f}",
                },
            ),
            "The least, CPU s a batch to read and to widen: "
            + "; ".join(f"{r['world']} processes {r['read']:.3f} + {r['widen']:.3f}" for r in rows if r["way"] == LEAST)
            + f". A batch is {4 * B * S * D / 1e6:.0f} MB in float32. Checksums run at {hash_rate() / 1e9:.1f} GB/s.",
            f"Files: {n_files:,} here ({cache.tokens.numel():,} tokens); at 20 million tokens "
            f"({found['bytes'] / 1e9:,.0f} GB) {found['files']:,}, version 0.1 {old_files:,}.",
            f"Sequences in a batch of {B:,} at 20 million tokens: {found['mean']:,.0f} on average over 50 batches, at "
            f"least {found['least']:,}; sampling without replacement gives {found['expected']:,.0f}; version 0.1 "
            f"{old_tokens // T}. Finding the first batch's order took {found['start']:.1f} s.",
        ]
    )
    print(body)
    if args.report:
        print(measure.write_report("loader", "Batches from a cache", body, "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
