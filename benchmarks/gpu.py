"""What `gpu.sh` measures besides the other benchmarks, each for a section of its report.

python benchmarks/gpu.py products    # the encoder's product in every precision, next to the library's
python benchmarks/gpu.py profile     # the longest kernels of training steps, and the time between kernels
python benchmarks/gpu.py runs        # activations from a cache to the device, and whole trainings next to SAELens
python benchmarks/gpu.py report      # joins the sections
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import measure
import peers
import torch
from contestants import Crosslens, CrosslensTF32, Setting
from sae_lens import SAETrainer
from tokenizers import Tokenizer, models
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import crosslens as cl
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders.kernels.products import product
from crosslens.snapshots.settings import ModelSettings
from crosslens.training.trainer import CrosscoderTrainer

PACKAGES = ("crosslens", "torch", "triton", "sae-lens", "transformer-lens", "transformers", "numpy")
LONGEST = 10  # kernels in the table


class Size(NamedTuple):
    """Shape of the runs and the profile, and their length."""

    S: int
    D: int
    F: int
    B: int
    k: int
    tokens: int
    context_size: int
    steps: int


SIZE = Size(S=8, D=768, F=32_768, B=4096, k=64, tokens=98_304, context_size=256, steps=60)
TINY = Size(S=2, D=16, F=128, B=32, k=4, tokens=1024, context_size=16, steps=8)
PAPER = (4096, 32 * 768, 98_304)  # B, S * D, F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["products", "profile", "runs", "report"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a test")
    parser.add_argument("--trace", help="file for a Chrome trace of the profile")
    parser.add_argument("--parts", type=Path, help="folder of the sections that `report` joins")
    parser.add_argument("--folder", type=Path, help="folder of the report")
    parser.add_argument("--command", help="what the report names as its command")
    args = parser.parse_args()
    size = TINY if args.tiny else SIZE
    if args.section == "products":
        shapes = [(size.B, size.S * size.D, size.F), *([] if args.tiny else [PAPER])]
        print(products_table(shapes, args.device))
    elif args.section == "profile":
        print(profile_tables(size, args.device, args.trace))
    elif args.section == "runs":
        print(runs_tables(size, args.device))
    else:
        print(write_report(args))


# ---------------------------------------------------------------------- products
def products_table(shapes: list[tuple[int, int, int]], device: str) -> str:
    """Time of the three kinds of dense products of a step, in every precision; weights have a row per feature."""
    rows: list[dict[str, Any]] = []
    for B, N, F in shapes:
        x, W, f = (torch.randn(*size, device=device) for size in ((B, N), (F, N), (B, F)))
        for name, a, b in (("x W_enc", x, W.T), ("f W_dec", f, W), ("f' e", f.T, x)):
            calls: dict[str, Callable[[], Any]] = {
                precision: partial(product, a, b, precision)  # type: ignore[arg-type]
                for precision in (["float32", "tf32", "bfloat16"] if x.is_cuda else ["float32", "bfloat16"])
            }
            if x.is_cuda:
                calls["tf32 of the library"] = partial(measure.with_tf32, torch.mm, a, b)
            for precision, seconds in measure.alternate(calls, 3, 1, device).items():
                wall = statistics.median(s.wall for s in seconds)
                rows.append(
                    {"shape": f"{B},{N},{F}", "product": name, "precision": precision, "ms": 1e3 * wall,
                     "tflops": 2e-12 * B * N * F / wall}
                )  # fmt: skip
        del x, W, f, a, b, calls
    columns = {"B, S D, F": lambda r: r["shape"], "product": lambda r: r["product"], "in": lambda r: r["precision"]}
    return measure.markdown(
        rows, {**columns, "ms": measure.number("ms", ".2f"), "TFLOP/s": measure.number("tflops", ".1f")}
    )


# ---------------------------------------------------------------------- profile
def profile_tables(size: Size, device: str, trace: str | None) -> str:
    """For BatchTopK and JumpReLU: the longest kernels, and the share of time in which the device has nothing to do."""
    contestant_class: type[Crosslens] = CrosslensTF32 if device.startswith("cuda") else Crosslens
    sections: list[str] = []
    for architecture in ("batchtopk", "jumprelu"):
        setting = Setting(architecture, size.S, size.D, size.F, size.B, k=size.k, device=device)
        contestant = contestant_class(setting)
        batches = [torch.randn(size.B, size.S, size.D, device=device) for _ in range(3)]
        if architecture == "jumprelu":
            contestant.set_gates(batches[0], window=max(0.06, 2 * size.k / size.F))
        for x in batches:
            contestant.step(x)
        n_steps = min(5, size.steps)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
        measure.synchronise(device)
        with profile(activities=activities) as recorded:
            for i in range(n_steps):
                contestant.step(batches[i % len(batches)])
            measure.synchronise(device)
        if trace and architecture == "batchtopk":
            recorded.export_chrome_trace(trace)
        sections.append(_profile_table(architecture, recorded, n_steps, device))
        del contestant
    shape = f"S, D, F, B = {size.S}, {size.D}, {size.F}, {size.B}"
    return f"{shape}; {contestant_class.precision}.\n\n" + "\n\n".join(sections)


def _profile_table(architecture: str, recorded: Any, n_steps: int, device: str) -> str:
    on_device = DeviceType.CUDA if device.startswith("cuda") else DeviceType.CPU
    events = [
        e
        for e in recorded.events()
        # operations that call others, and ranges that the optimiser names, are no kernels
        if e.device_type == on_device and not e.cpu_children and not getattr(e, "is_user_annotation", False)
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, gaps, reached = 0.0, [], spans[0][0]
    for start, end in spans:
        if start > reached:
            gaps.append(start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    by_name: dict[str, list[float]] = {}
    for e in events:
        by_name.setdefault(e.name, []).append(e.time_range.end - e.time_range.start)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    rows = [
        {"name": name.replace("|", "/")[:100], "calls": len(times) / n_steps, "ms": sum(times) / n_steps / 1e3,
         "share": sum(times) / total}
        for name, times in longest
    ]  # fmt: skip
    table = measure.markdown(
        rows,
        {
            "kernel": lambda r: f"`{r['name']}`",
            "calls a step": measure.number("calls", ".1f"),
            "ms a step": measure.number("ms", ".3f"),
            "share of the time": measure.number("share", ".1%"),
        },
    )
    return (
        f"**{architecture}**: {total / n_steps / 1e3:.2f} ms a step under the profiler, {len(events) / n_steps:.0f} "
        f"kernels; nothing runs for {1 - busy / total:.1%} of it ({len(gaps) / n_steps:.0f} gaps, the longest "
        f"{max(gaps, default=0) / 1e3:.2f} ms).\n\n{table}"
    )


# ---------------------------------------------------------------------- data and whole runs
@contextlib.contextmanager
def cached_activations(size: Size, device: str) -> Iterator[Any]:
    """A cache of the activations of small random models, harvested on the device."""
    words = 64
    config = GPTNeoXConfig(
        vocab_size=words, hidden_size=size.D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * size.D,
        max_position_embeddings=size.context_size, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(size.S):
            torch.manual_seed(seed)
            GPTNeoXForCausalLM(config).save_pretrained(folder / "models" / f"step{seed}")
        raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w0", eos_token="w0")
        tokenizer.save_pretrained(folder / "models" / "tokenizer")
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, words, (size.tokens // size.context_size, size.context_size), generator=draw)
        acts = cl.Activations(
            cl.Snapshots.local(folder / "models"),
            "blocks.0.hook_resid_post",
            Dataset(tokens, held_out_tokens=size.context_size),
            settings=ModelSettings(device),
        )
        yield acts.cache(folder / "cache")


def runs_tables(size: Size, device: str) -> str:
    """Gigabytes of float32 activations a second from the cache to the device, and tokens a second of whole runs."""
    with cached_activations(size, device) as acts:
        rows = [read_epoch(acts, size, device) for _ in range(2)]
        reading = measure.markdown(
            rows,
            {
                "epoch": lambda r: f"{rows.index(r) + 1}",
                "GB": measure.number("gb", ".2f"),
                "s": measure.number("seconds", ".2f"),
                "GB/s": measure.number("rate", ".2f"),
                "waiting for the cache": measure.number("waited", ".0%"),
            },
        )
        runs = [train_crosslens(acts, size, device), train_saelens(acts, size, device)]
        training = measure.markdown(
            runs,
            {
                "trainer": lambda r: r["name"],
                "tokens/s": measure.number("rate", ",.0f"),
                "s": measure.number("seconds", ".1f"),
                "waiting for data": measure.number("waited", ".0%"),
            },
        )
    what = f"{size.steps} steps of B = {size.B} tokens, BatchTopK, S, D, F = {size.S}, {size.D}, {size.F}, k = {size.k}"
    return f"`Activations.batches(device=...)`:\n\n{reading}\n\n{what}, from the cache:\n\n{training}"


def read_epoch(acts: Any, size: Size, device: str) -> dict[str, float]:
    """One epoch from the cache to the device."""
    n_bytes = 0
    began = time.perf_counter()
    for x in acts.batches(size.B, epochs=1, device=device):
        n_bytes += x.numel() * x.element_size()
    measure.synchronise(device)
    seconds = time.perf_counter() - began
    return {"gb": n_bytes / 1e9, "seconds": seconds, "rate": n_bytes / seconds / 1e9, "waited": acts.waited / seconds}


def train_crosslens(acts: Any, size: Size, device: str) -> dict[str, Any]:
    """`crosslens.train`, timed from its first step."""
    architecture = cl.BatchTopKCrosscoderTrainingConfig(d_sae=size.F, k=size.k)
    training = cl.TrainConfig(
        batch_size=size.B, training_tokens=size.steps * size.B, scale_tokens=size.B, device=device, evaluate=False
    )
    with timed_fit(CrosscoderTrainer) as found:
        cl.train(acts, architecture, training)
    return {"name": "crosslens", **rated(found, acts, size)}


def train_saelens(acts: Any, size: Size, device: str) -> dict[str, Any]:
    """SAELens's trainer on the same activations, concatenated; one scale, because its speed does not depend on it."""
    setting = Setting("batchtopk", size.S, size.D, size.F, size.B, k=size.k, steps=size.steps, device=device)
    trainer = peers.SAELens(setting).trainer
    stream = acts.batches(size.B, device=device)
    trainer.data_provider = (x.flatten(1) for x in stream)
    with contextlib.closing(stream), timed_fit(SAETrainer) as found:
        trainer.fit()
    return {"name": "saelens", **rated(found, acts, size)}


@contextlib.contextmanager
def timed_fit(trainer: type[SAETrainer[Any, Any]]) -> Iterator[dict[str, float]]:
    """The seconds of the trainer's `fit`: without its initialisation."""
    found: dict[str, float] = {}
    fit = trainer.fit

    def timed(self: Any) -> Any:
        measure.synchronise(self.cfg.device)
        began = time.perf_counter()
        trained = fit(self)
        measure.synchronise(self.cfg.device)
        found["seconds"] = time.perf_counter() - began
        return trained

    with mock.patch.object(trainer, "fit", timed):
        yield found


def rated(found: dict[str, float], acts: Any, size: Size) -> dict[str, float]:
    seconds = found["seconds"]
    return {"seconds": seconds, "rate": size.steps * size.B / seconds, "waited": acts.waited / seconds}


# ---------------------------------------------------------------------- report
def write_report(args: argparse.Namespace) -> Path:
    """One dated report of the sections in a folder: NN.title, and NN.md, in order."""
    sections: list[str] = []
    for title in sorted(args.parts.glob("*.title")):
        body = title.with_suffix(".md").read_text().strip()
        text = body if "|---" in body or "```" in body else f"```\n{body}\n```"
        sections.append(f"## {title.read_text().strip()}\n\n{text}")
    body = "\n\n".join(sections)
    return measure.write_report(
        "gpu", "On a CUDA device", body, args.device, torch.get_num_threads(), PACKAGES, args.command, args.folder
    )


if __name__ == "__main__":
    main()
