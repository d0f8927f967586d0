"""A run at real width from end to end, as a user starts it: forecast against measured disk, memory and time.

Eight snapshots of the true Pythia-160m configuration with random bfloat16 weights stand on a hub on 127.0.0.1, from
which `crosslens harvest --evict` downloads them one at a time. Two hook points are harvested in one pass; then a
crosscoder is trained at the first, in one process and in two, and analysed. Every command is a process of its own.
While it runs, the disk that weights and cache take is sampled; its peak memory is what the system reports at its end.

The weights are random, so nothing is learnt: this shows what fits and how long it takes, not what is found.
`--tiny` takes a small model, to test this program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import measure  # noqa: E402

from tests.hub_server import revision_folder, serve  # noqa: E402

REPO = "EleutherAI/pythia-160m"
STEPS = (0, 1, 8, 64, 512, 4000, 33000, 143000)
# config.json of EleutherAI/pythia-160m
PYTHIA: dict[str, Any] = {
    "vocab_size": 50_304,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PACKAGES = ("crosslens", "torch", "transformer-lens", "transformers", "sae-lens")

# the forecast in numbers; `crosslens plan` prints the same plan in words
FORECAST = """
import json, sys
from dataclasses import replace
from crosslens.activations import Activations, Dataset
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.snapshots import ModelSettings, Snapshots

given = json.loads(sys.argv[1])
data = Dataset(given["dataset"], given["n_tokens"], given["context_size"])
settings = ModelSettings("cpu", given["model_dtype"], batch_tokens=16384, attention=given["attention"])
acts = Activations(Snapshots.pythia("160m", given["steps"]), given["hooks"], data, settings=settings)
options = {"training_tokens": given["training_tokens"], "batch_size": given["batch_size"]}
architecture = BatchTopKCrosscoderTrainingConfig(d_sae=given["d_sae"], k=given["k"])
plan = acts.plan(architecture=architecture, **options)
train = acts[given["hooks"][0]].plan(False, architecture=architecture, **options)
both = acts[given["hooks"][0]].plan(False, architecture=architecture, processes=2, **options)
print(json.dumps({
    "cache": plan.cache_bytes, "files": plan.n_files, "seconds": plan.seconds, "model": plan.model_bytes,
    "harvest": plan.harvest_memory,
    "train": replace(train, cached=True).train_memory,
    "train2": replace(both, cached=True).train_memory,
}))
"""


class Done(NamedTuple):
    """A command that has ended."""

    seconds: float
    peak_bytes: int
    """Of the largest of its processes."""
    weights_bytes: int
    """Most that weights took on the disk meanwhile."""
    cache_bytes: int
    """What the cache took at the end."""
    output: str


def write_origin(folder: Path, args: argparse.Namespace) -> None:
    """The hub's repository: a snapshot for each step, and a tokenizer of single words with each."""
    config = GPTNeoXConfig(**PYTHIA | (TINY if args.tiny else {}))
    words = {f"w{i}": i for i in range(config.vocab_size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w0", eos_token="w0", unk_token="w1")
    for step in args.steps:
        target = revision_folder(folder, REPO, f"step{step}")
        torch.manual_seed(step)
        GPTNeoXForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)


def write_documents(path: Path, n_words: int, vocabulary: int) -> None:
    """Documents of some 300 random words."""
    draw = random.Random(0)
    with path.open("w") as file:
        while n_words > 0:
            size = draw.randint(100, 500)
            text = " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(size))
            file.write(json.dumps({"text": text}) + "\n")
            n_words -= size


def size_of(folder: Path, least: int = 0) -> int:
    """Bytes of the files in a folder; files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except OSError:
            continue
        if not path.is_symlink() and path.is_file() and stat.st_size >= least:
            total += stat.st_size
    return total


def run(command: list[str], home: Path, cache: Path, address: str, threads: int, least: int) -> Done:
    """Run a command, and watch the disk meanwhile; files of `least` bytes are weights."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"CROSSLENS_CACHE": str(home / "crosslens"), "OMP_NUM_THREADS": str(threads)}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "TOKENIZERS_PARALLELISM": "false"}
    for key in ("HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(key, None)
    print("$", *[part if len(part) < 100 else "..." for part in command[1:]], file=sys.stderr)
    over, seen = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.2):
            seen[0] = max(seen[0], size_of(home / "hub", least))

    watcher = threading.Thread(target=watch)
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        over.set()
        watcher.join()
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command[1:5])} failed:\n{text}")
    return Done(seconds, usage.ru_maxrss * 1024, seen[0], size_of(cache), text)


def mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="*", default=list(STEPS))
    parser.add_argument("--hooks", nargs=2, default=["blocks.5.hook_resid_post", "blocks.5.hook_mlp_out"])
    parser.add_argument("--n-tokens", type=int, default=20_000)
    parser.add_argument("--context-size", type=int, default=1024)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--model-dtype", default="float32")
    parser.add_argument("--attention", default="eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--until", choices=("harvest", "train", "evolve"), default="evolve", help="last command")
    parser.add_argument("--tiny", action="store_true", help="a small model, to test this program")
    parser.add_argument("--folder", type=Path, help="keep everything here; by default a temporary folder")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/")
    args = parser.parse_args()
    if args.tiny:
        args.steps, args.hooks = [0, 8, 512], ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"]
        args.n_tokens, args.context_size, args.d_sae, args.k = 3000, 32, 64, 4
        args.batch_size, args.train_steps = 128, 20
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        body = measured(folder, args)
    print(body)
    if args.report:
        print(measure.write_report("real-width", "A run at real width", body, "cpu", args.threads, PACKAGES))


def measured(folder: Path, args: argparse.Namespace) -> str:
    """Run all commands, and put forecast and measurement into tables."""
    origin, home, cache, documents = (folder / part for part in ("origin", "home", "cache", "documents.jsonl"))
    if not origin.exists():
        write_origin(origin, args)
    write_documents(documents, 2 * args.n_tokens + 20_000, (TINY if args.tiny else PYTHIA)["vocab_size"])
    total = args.train_steps * args.batch_size
    weights = min(path.stat().st_size for path in origin.rglob("model.safetensors"))
    python, cross = [sys.executable], [sys.executable, "-m", "crosslens"]
    data = ["--snapshots", "pythia-160m", "--steps", ",".join(map(str, args.steps)), "--dataset", str(documents)]
    data += ["--n-tokens", str(args.n_tokens), "--context-size", str(args.context_size), "--device", "cpu"]
    data += ["--model-dtype", args.model_dtype, "--attention", args.attention]
    hooks = [part for hook in args.hooks for part in ("--hook", hook)]
    shape = ["--d-sae", str(args.d_sae), "--k", str(args.k), "--batch-size", str(args.batch_size)]
    shape += ["--training-tokens", str(total)]
    train = ["train", *data, "--hook", args.hooks[0], *shape, "--cache", str(cache), "--n-checkpoints", "1"]
    given = {key: getattr(args, key) for key in ("n_tokens", "context_size", "model_dtype", "attention", "steps")}
    given |= {"dataset": str(documents), "hooks": args.hooks, "training_tokens": total}
    given |= {"d_sae": args.d_sae, "k": args.k, "batch_size": args.batch_size}

    with serve(origin) as (address, _):

        def start(command: list[str]) -> Done:
            return run(command, home, cache, address, args.threads, weights // 2)

        plan = start([*cross, "plan", *data, *hooks, *shape, "--cache", str(cache)])
        # time can be forecast once weights are on the disk
        first = f"from crosslens.snapshots import Snapshots as S; S.pythia('160m', {args.steps[:1]})[0].fingerprint"
        start([*python, "-c", first])
        forecast = json.loads(start([*python, "-c", FORECAST, json.dumps(given)]).output.splitlines()[-1])
        done = {"harvest": start([*cross, "harvest", *data, *hooks, "--cache", str(cache), "--evict"])}
        if args.until != "harvest":
            done["train, one process"] = start([*cross, *train, "--run-dir", str(folder / "run1")])
            ranks = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "crosslens"]
            done["train, two processes"] = start([*ranks, *train, "--run-dir", str(folder / "run2")])
        if args.until == "evolve":
            done["evolve"] = start([*cross, "evolve", str(folder / "run1"), "--device", "cpu"])
    harvest = done["harvest"]
    rows = [
        ("disk of the cache", mib(forecast["cache"]), mib(harvest.cache_bytes),
         harvest.cache_bytes / forecast["cache"]),
        ("weights on the disk at a time", mib(weights), mib(harvest.weights_bytes), harvest.weights_bytes / weights),
        ("memory of harvesting", mib(forecast["harvest"]), mib(harvest.peak_bytes),
         harvest.peak_bytes / forecast["harvest"]),
        ("forward passes of the harvest, s", f"{forecast['seconds']:,.0f}", f"{harvest.seconds:,.0f} (whole command)",
         harvest.seconds / forecast["seconds"]),
    ]  # fmt: skip
    for name, key in (("train, one process", "train"), ("train, two processes", "train2")):
        if name in done:
            peak = done[name].peak_bytes
            rows.append((f"memory, {name}", mib(forecast[key]), mib(peak), peak / forecast[key]))
    shown = [dict(zip(("what", "plan", "found", "ratio"), row, strict=True)) for row in rows]
    tables = [
        f"Pythia-160m's {'shape, reduced' if args.tiny else 'configuration'}, random, {len(args.steps)} snapshots; "
        f"{args.n_tokens:,} tokens of {args.context_size} at {' and '.join(args.hooks)}, models in {args.model_dtype} "
        f"with {args.attention} attention; F = {args.d_sae:,}, k = {args.k}, {args.train_steps} steps of "
        f"{args.batch_size}.",
        measure.markdown(
            shown,
            {"": lambda r: r["what"], "forecast": lambda r: r["plan"], "measured": lambda r: r["found"],
             "measured / forecast": lambda r: f"{r['ratio']:.2f}"},
        ),
        measure.markdown(
            [{"name": name, **each._asdict()} for name, each in done.items()],
            {"command": lambda r: r["name"], "seconds": lambda r: f"{r['seconds']:,.0f}",
             "largest process": lambda r: mib(r["peak_bytes"]), "weights on disk": lambda r: mib(r["weights_bytes"])},
        ),
        "`crosslens plan`, before anything is downloaded:",
        f"```\n{plan.output.strip()}\n```",
    ]  # fmt: skip
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
