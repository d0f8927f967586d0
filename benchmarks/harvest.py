"""Speed, waiting time and memory of harvesting, live and from a cache, against full forward passes.

A random model of Pythia-70m's shape at S snapshots, hooked at half its depth. Three tables:

1. Tokens per second (counted once per snapshot) and bytes per token. *full forward* is the obvious hand-written code:
   `run_with_cache(tokens, names_filter=hook)` on each of S whole models, which are in memory already, or are loaded one
   after the other as for a cache. Contestants alternate; ratios are of CPU seconds within a round (of wall seconds with
   more threads, or on CUDA).
2. The fraction of its time that a training loop waits for data. Its step takes a set multiple of the time needed to
   harvest its batch; it sleeps, like a loop whose work is on an accelerator.
3. Peak memory of a process that harvests into a cache and then reads it, at several S.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from tokenizers import Tokenizer, models
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosslens.activations import cache
from crosslens.activations.harvesting import run_to_hooks
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import hook_layer
from crosslens.snapshots.settings import ModelSettings

SHAPE = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
VOCABULARY = 50_304
HOOK = "blocks.2.hook_resid_post"
SECOND = "blocks.2.hook_mlp_out"
PACKAGES = ("crosslens", "torch", "transformer-lens", "transformers", "safetensors")


def write_snapshots(folder: Path, n: int) -> Snapshots:
    """S random models of Pythia-70m's shape, and a tokenizer of its size."""
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **SHAPE)
    for seed in range(n):
        target = folder / f"step{seed}"
        if not target.exists():
            torch.manual_seed(seed)
            GPTNeoXForCausalLM(config).save_pretrained(target)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w0", eos_token="w0").save_pretrained(folder / "tokenizer")
    return Snapshots.local(folder)[:n]


def settings(args: argparse.Namespace) -> ModelSettings:
    return ModelSettings(args.device, batch_tokens=args.batch_tokens)


def activations_of(snapshots: Snapshots, n_tokens: int, args: argparse.Namespace) -> Activations:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (n_tokens // args.context_size, args.context_size), generator=draw)
    return Activations(snapshots, HOOK, Dataset(tokens, held_out_tokens=0), settings=settings(args))


# ---------------------------------------------------------------------- speed
def speed(snapshots: Snapshots, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    acts = activations_of(snapshots, args.tokens, args)
    S, D, N = len(snapshots), acts.d_model, acts.tokens.numel()
    step = max(1, args.batch_tokens // args.context_size)

    @torch.no_grad()
    def full(loading: bool = False) -> None:
        out = torch.empty(*acts.tokens.shape, S, D)
        for s in range(S):
            model = snapshots[s].load(args.device) if loading else snapshots.model(s, settings(args))
            for first in range(0, len(acts.tokens), step):
                batch = acts.tokens[first : first + step].long().to(args.device)
                _, cache = model.run_with_cache(batch, names_filter=HOOK, return_cache_object=False)
                out[first : first + step, :, s] = cache[HOOK].cpu()

    def live() -> None:
        acts.block(0, len(acts.tokens))

    def write(dtype: str) -> Callable[[], None]:
        def run() -> None:
            acts.cache(folder / dtype, dtype)

        run.before = lambda: shutil.rmtree(folder / dtype, ignore_errors=True)  # type: ignore[attr-defined]
        return run

    def read(dtype: str) -> Callable[[], None]:
        def run() -> None:
            cached = kept[dtype]
            cached.store._files.clear()  # pyright: ignore[reportPrivateUsage] (checksums are part of it)
            cached.block(0, len(acts.tokens))

        return run

    def one_pass(*names: str) -> Callable[[], None]:
        """Models in memory, cut at the hook point; the last two rows of the table differ by the second hook point."""
        outs = {name: torch.empty(*acts.tokens.shape, D) for name in names}

        def run() -> None:
            for s in range(S):
                run_to_hooks(snapshots.model(s, settings(args), hook_layer(HOOK)), acts.tokens, outs, settings(args))

        return run

    kept = {dtype: acts.cache(folder / f"kept-{dtype}", dtype) for dtype in args.dtypes}
    calls: dict[str, Callable[[], None]] = {"full forward": full, "full forward, loading": partial(full, True)}
    calls["live"] = live
    calls |= {f"cache, loading and writing {dtype}": write(dtype) for dtype in args.dtypes}
    calls |= {f"cache, reading {dtype}": read(dtype) for dtype in args.dtypes}
    calls |= {"one hook point": one_pass(HOOK), "two hook points": one_pass(HOOK, SECOND)}
    for s in range(S):  # only "loading" contestants load models in the timed part
        snapshots.model(s, settings(args)), snapshots.model(s, settings(args), hook_layer(HOOK))
    timings = measure.alternate(calls, args.rounds, args.warm_up, args.device)
    clock = "cpu" if args.threads == 1 and args.device == "cpu" else "wall"
    rows: list[dict[str, Any]] = []
    for name, times in timings.items():
        seconds = [getattr(each, clock) for each in times]
        ratios = [getattr(base, clock) / own for base, own in zip(timings["full forward"], seconds, strict=True)]
        row: dict[str, Any] = {"name": name, "rate": N * S / statistics.median(seconds)}
        row |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        if name.startswith("cache"):
            files = (folder / f"kept-{name.split()[-1]}").glob("acts-*")
            row["bytes"] = sum(path.stat().st_size for path in files) / (N * S)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------- waiting
def waiting(snapshots: Snapshots, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fraction of a loop's time spent in `next(batches)`, without the first block, for several speeds of the loop."""
    size = 256
    rows: list[dict[str, Any]] = []
    acts = activations_of(snapshots, args.waiting_tokens, args)
    acts._mixing_tokens = args.waiting_tokens // 2  # pyright: ignore[reportPrivateUsage] (harvests during the epoch)
    began = time.perf_counter()
    n_batches = len(list(acts.batches(size, epochs=1)))
    own = (time.perf_counter() - began) / n_batches
    for factor in args.step:
        stream = acts.batches(size)
        began = time.perf_counter()
        for _ in range(n_batches):
            next(stream)
            time.sleep(factor * own)
        total = time.perf_counter() - began
        stream.close()
        first = acts.waited_first
        share = (acts.waited - first) / (total - first)
        rows.append({"factor": factor, "step": factor * own * 1e3, "share": share, "first": first})
    return rows


# ---------------------------------------------------------------------- memory
def peak_memory(n_snapshots: int, root: str, folder: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of harvesting into a cache and of reading it, above the start, with files of one size in bytes."""
    measure.return_freed_memory()
    torch.set_num_threads(args.threads)
    cache.FILE_BYTES = args.block_mb << 20
    acts = activations_of(Snapshots.local(root)[:n_snapshots], args.memory_tokens, args)
    _ = acts.fingerprint(), acts.tokens
    found: dict[str, float] = {"S": n_snapshots}
    before = measure.reset_resident_peak() or 0
    cached = acts.cache(Path(folder) / f"memory-{n_snapshots}")
    found["write"] = ((measure.resident("VmHWM") or 0) - before) / 2**20
    before = measure.reset_resident_peak() or 0
    for _ in cached.batches(64, epochs=1):  # small, because batches grow with S
        pass
    found["read"] = ((measure.resident("VmHWM") or 0) - before) / 2**20
    return found


# ---------------------------------------------------------------------- tables
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snapshots", type=int, default=4, help="S")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the table of speed")
    parser.add_argument("--waiting-tokens", type=int, default=4096, help="tokens of the table of waiting")
    parser.add_argument(
        "--memory-tokens", type=int, default=8192, help="tokens of the table of memory: several blocks at every S"
    )
    parser.add_argument("--context-size", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "int8"], help="types of the caches")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--step", type=float, nargs="*", default=[0.5, 2.0], help="time of a step / of its data")
    parser.add_argument("--memory", type=int, nargs="*", default=[1, 2, 4], help="S of the table of memory")
    parser.add_argument("--block-mb", type=int, default=4, help="size of a file in the table of memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        root, folder = Path(name) / "models", Path(name) / "caches"
        folder.mkdir()
        snapshots = write_snapshots(root, max([args.snapshots, *args.memory]))[: args.snapshots]
        # first: its processes are forked, and this one must not have run a model
        memory = [measure.in_child(peak_memory, S, str(root), str(folder), args) for S in args.memory]
        rows = speed(snapshots, folder, args)
        waits = waiting(snapshots, args) if args.step else []
    number = measure.number
    body = "\n\n".join(
        [
            f"Pythia-70m's shape, random, at {HOOK}; S = {args.snapshots}, {args.tokens:,} tokens of "
            f"{args.context_size} at {args.batch_tokens:,} a forward pass, {args.rounds} rounds.",
            measure.markdown(
                rows,
                {
                    "": lambda row: row["name"],
                    "tokens/s": number("rate", ",.0f"),
                    "of full forward": number("ratio", ".2f"),
                    "lowest": number("low", ".2f"),
                    "highest": number("high", ".2f"),
                    "bytes/token": number("bytes", ".0f"),
                },
            ),
            measure.markdown(
                waits,
                {
                    "step / harvesting its data": number("factor", ".2f"),
                    "step, ms": number("step", ".0f"),
                    "share waiting after the first block": number("share", ".2%"),
                    "first block, s": number("first", ".2f"),
                },
            ),
            f"Peak memory above the start, MiB; {args.memory_tokens:,} tokens in files of {args.block_mb} MiB:",
            measure.markdown(
                memory,
                {"S": number("S", "d"), "harvesting": number("write", ".0f"), "reading": number("read", ".0f")},
            ),
        ]
    )
    print(body)
    if args.report:
        path = measure.write_report("harvest", "Harvesting", body, args.device, args.threads, PACKAGES)
        print(path)


if __name__ == "__main__":
    main()
