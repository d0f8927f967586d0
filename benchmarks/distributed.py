"""Training in several processes: time, memory and communication, the error of plan(), and growth of memory.

Starts torchrun on this machine for every number of processes, with one thread each. On a machine with as many cores
as processes, the time of a step should fall nearly as 1 / n, except for communication.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import markdown, number, resident, return_freed_memory, write_report
from torch import Tensor

import crosslens.distributed.parallel
from crosslens.activations.plan import peak_memory, training_bytes
from crosslens.crosscoders import TRAINING_ARCHITECTURES
from crosslens.distributed.parallel import join
from crosslens.distributed.strategy import ONE_PROCESS
from crosslens.training.config import TrainConfig
from crosslens.training.initialisation import search_decoder_norm
from crosslens.training.trainer import CrosscoderTrainer

MIB = 2**20
# of one H100: dense TF32 and memory; of its links: NVLink inside a machine, 400 Gb/s between machines; at 60 and 80 %
GPU = {"flops": 0.6 * 495e12, "memory": 0.8 * 3.35e12, "near": 0.8 * 450e9, "far": 0.8 * 50e9}


def batches(B: int, S: int, D: int, n_directions: int, k: int) -> Iterator[Tensor]:
    """Sums of k of some random directions: activations that a dictionary can represent."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n_directions, S * D, generator=draw), dim=1) * math.sqrt(S * D / k)
    while True:
        chosen = torch.randint(0, n_directions, (B, k), generator=draw)
        yield torch.nn.functional.embedding_bag(chosen, rows, mode="sum").view(B, S, D)


def worker(task: dict[str, Any]) -> None:
    """One process: train, and write the measurements."""
    torch.set_num_threads(1)
    parallel, device = join("cpu", task["data_parallel"])
    exchanged = {"bytes": 0, "calls": 0, "seconds": 0.0}

    def counted(does: Any, x: Any, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = does(x, *arguments, **options)
        exchanged["seconds"] += time.perf_counter() - began
        tensors = x if isinstance(x, list) else [x]
        exchanged["bytes"] += sum(t.numel() * t.element_size() for t in tensors)
        exchanged["calls"] += 1
        return result

    distributed: Any = crosslens.distributed.parallel.dist
    for name in ("all_reduce", "all_gather"):
        setattr(distributed, name, partial(counted, getattr(distributed, name)))
    S, D, F, B = task["shape"]
    sae_class, config_class = TRAINING_ARCHITECTURES[f"{task['architecture']}_crosscoder"]
    options = {"k": task["k"]} if "topk" in task["architecture"] else {}
    data = batches(B, S, D, F // 2, task["k"])
    next(data)
    before = peak_memory()
    cfg: Any = config_class(d_sae=F, d_in=S * D, n_snapshots=S, **options)
    torch.manual_seed(0)
    sae: Any = sae_class(cfg, strategy=ONE_PROCESS if parallel.alone else parallel)  # type: ignore[call-arg]
    if cfg.decoder_init_norm is None:
        search_decoder_norm(sae, next(data), parallel)
    settings = TrainConfig(batch_size=B, lr=1e-3, dead_tokens=3 * B, device=device)
    trainer = CrosscoderTrainer(settings, sae, data, 1000 * B, parallel=parallel)
    seconds, losses = [], []
    for step in range(task["steps"]):
        batch = next(data)
        if step == task["warm_up"]:
            exchanged.update(bytes=0, calls=0, seconds=0.0)
        began = time.perf_counter()
        losses.append(float(trainer.step(batch).loss.detach()))
        seconds.append(time.perf_counter() - began)
        trainer.n_training_steps += 1
    state = [t for values in trainer.optimizer.state.values() for t in values.values()]
    timed = task["steps"] - task["warm_up"]
    result = {
        "ms": 1000 * statistics.median(seconds[task["warm_up"] :]),
        "held": sum(t.numel() * t.element_size() for t in (*sae.parameters(), *state)),
        "before": before,
        "peak": peak_memory(),
        "predicted": before + training_bytes(cfg, S, D, B // parallel.n_data_ranks, parallel.n_feature_ranks),
        "exchanged": exchanged["bytes"] / timed,
        "calls": exchanged["calls"] / timed,
        "exchange_ms": 1000 * exchanged["seconds"] / timed,
        "losses": losses,
    }
    Path(task["folder"], f"{parallel.rank}.json").write_text(json.dumps(result))


def measured(task: dict[str, Any], processes: int) -> dict[str, Any]:
    """One row of the table: the slowest and largest of the processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [__file__, "--worker", json.dumps({**task, "folder": folder})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{processes} processes failed:\n{done.stderr[-2000:]}")
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
    largest = {key: max(rank[key] for rank in ranks) for key in ranks[0] if key != "losses"}
    return {**task, **largest, "processes": processes, "losses": ranks[0]["losses"]}


def growth(steps: int) -> list[dict[str, Any]]:
    """Resident memory during a long training of a small crosscoder."""
    S, D, F, B = 3, 32, 512, 256
    sae_class, config_class = TRAINING_ARCHITECTURES["batchtopk_crosscoder"]
    cfg: Any = config_class(d_sae=F, d_in=S * D, n_snapshots=S, k=8)
    sae: Any = sae_class(cfg)  # type: ignore[arg-type]
    data = batches(B, S, D, F // 2, 8)
    settings = TrainConfig(batch_size=B, lr=1e-3, dead_tokens=3 * B, device="cpu")
    trainer = CrosscoderTrainer(settings, sae, data, steps * B)
    rows = []
    for step in range(1, steps + 1):
        trainer.maybe_reset_sparsity()
        trainer.step(next(data))
        trainer.n_training_steps += 1
        if step in {steps // 100, steps // 10, *(steps * i // 4 for i in range(1, 5))}:
            return_freed_memory()
            rows.append({"step": step, "resident": resident("VmRSS") or 0})
    return rows


def projected(name: str, D: int, machines: int) -> dict[str, Any]:
    """Estimate of a step with 8 GPUs per machine, from operations and bytes; not measured."""
    B, S, F, k = 4096, 32, 98_304, 64
    n, wide = 8 * machines, S * D
    encoder = 2 * B * wide * F / n / GPU["flops"]
    pairs = 3 * k * B * wide * 4 / n / GPU["memory"]
    adam = 7 * 4 * 2 * wide * F / n / GPU["memory"]
    sent = 2 * (n - 1) / n * B * wide * 4
    return {
        "model": name,
        "gpus": n,
        "memory": 16 * 2 * wide * F / n / 1e9,
        "batch": B * wide * 4 / 1e9,
        "compute": 1000 * (encoder + pairs + adam),
        "traffic": sent / 1e9,
        "exchange": 1000 * sent / GPU["near" if machines == 1 else "far"],
    }


def main() -> None:
    """Measure, print, and write a report when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--architectures", nargs="+", default=["batchtopk", "topk", "standard", "jumprelu"])
    parser.add_argument("--shape", type=int, nargs=4, default=[4, 128, 8192, 1024], metavar=("S", "D", "F", "B"))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--data-parallel", type=int, default=1, help="groups of processes that split the tokens")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--growth", type=int, default=10_000, metavar="STEPS", help="0: skip")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    rows = []
    for architecture in options.architectures:
        task = {"architecture": architecture, "shape": options.shape, "k": options.k, "steps": options.steps}
        task |= {"data_parallel": options.data_parallel, "warm_up": 4}
        for processes in options.processes:
            row = measured(task, processes)
            first = next((r for r in rows if r["architecture"] == architecture), row)
            row["differs"] = max(abs(a / b - 1) for a, b in zip(row["losses"], first["losses"], strict=True))
            row["error"] = 100 * (row["predicted"] / row["peak"] - 1)
            rows.append(row)
            print(f"{architecture}, {processes}: {row['ms']:.0f} ms, {row['peak'] / MIB:.0f} MiB", file=sys.stderr)
    S, D, F, B = options.shape
    mib = lambda key: lambda row: f"{row[key] / MIB:.1f}"  # noqa: E731
    body = f"S = {S}, D = {D}, F = {F}, B = {B}, k = {options.k}; "
    body += f"{options.data_parallel} group{'s' * (options.data_parallel > 1)} of processes by tokens.\n\n"
    body += markdown(
        rows,
        {
            "architecture": lambda row: row["architecture"],
            "processes": number("processes", "d"),
            "ms a step": number("ms", ".0f"),
            "weights and Adam, MiB": mib("held"),
            "peak, MiB": mib("peak"),
            "of it before training": mib("before"),
            "plan says, MiB": mib("predicted"),
            "off by, %": number("error", "+.1f"),
            "exchanged a step, MiB": mib("exchanged"),
            "in calls": number("calls", ".0f"),
            "ms of it": number("exchange_ms", ".1f"),
            "largest difference of a loss": number("differs", ".1e"),
        },
    )
    if options.growth:
        body += f"\n\n## Memory over {options.growth:,} steps\n\n"
        body += markdown(growth(options.growth), {"step": number("step", ","), "resident, MiB": mib("resident")})
    body += (
        "\n\n## On paper\n\nF = 98,304, S = 32, B = 4096, k = 64, float32 with TF32 products on H100s; nothing here "
    )
    body += "is measured.\n\n"
    body += markdown(
        [projected(name, D, machines) for name, D in (("160M", 768), ("6.9B", 4096)) for machines in (1, 8)],
        {
            "model": lambda row: row["model"],
            "GPUs": number("gpus", "d"),
            "weights, gradients, Adam, GB a GPU": number("memory", ".1f"),
            "a (B, S D) array, GB": number("batch", ".2f"),
            "products, pairs, Adam, ms": number("compute", ".1f"),
            "sent by a GPU a step, GB": number("traffic", ".2f"),
            "ms of it": number("exchange", ".1f"),
        },
    )
    print(body)
    if options.report:
        print(write_report("distributed", "Training in several processes", body, "cpu", 1, ["torch", "crosslens"]))


if __name__ == "__main__":
    main()
