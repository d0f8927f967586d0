"""How time and memory of every verb grow: five sizes of each dimension, an exponent, and a picture.

    python benchmarks/growth.py [--report] [--only evolve] [--quick]

Everything is small and random: GPT-NeoX snapshots of two layers, TopK crosscoders, planted held-out activations. A
measurement varies one of S snapshots, D d_model, F features, tokens, prompts and leaves the others as they are. It runs
in a process of its own, once to warm up (at the smallest size) and then `--rounds` times; seconds are CPU seconds, the
least of the rounds, with one thread. Memory is the kernel's peak less what the process held before.

The exponent is the slope of log(seconds) over log(size) through the largest three sizes: at the smaller ones fixed
costs hide the growth. What grows faster than 1.15 is named, with the reason where it is known.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import evolution
import measure
import numpy as np
import report as report_benchmark
import torch
from contestants import Crosslens, Setting
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

import crosslens as cl
from crosslens.activations import Activations, Dataset
from crosslens.causal import attribute
from crosslens.crosscoders import TopKCrosscoder, TopKCrosscoderConfig
from crosslens.evolution import evolve, plan_decodability
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.report import write_report
from crosslens.snapshots import ModelSettings

BASE = {"S": 8, "D": 128, "F": 2048, "tokens": 4096, "prompts": 64}
SIZES = {
    "S": (8, 12, 16, 24, 32),
    "D": (64, 128, 256, 384, 512),
    "F": (1024, 2048, 4096, 8192, 16_384),
    "tokens": (2048, 4096, 8192, 16_384, 32_768),
    "prompts": (32, 64, 128, 256, 512),
}
VOCABULARY, LENGTH, K = 512, 16, 16
HOOK = "blocks.0.hook_resid_post"
LINEAR = 1.15
Calls = Iterator[Callable[[], Any]]


class Verb(NamedTuple):
    """What is measured.

    Attributes:
        dimensions: what it may grow with.
        make: a context with the call to measure, for some sizes.
        reasons: by dimension, why it grows faster than linearly.
    """

    dimensions: tuple[str, ...]
    make: Callable[..., Any]
    reasons: dict[str, str]


# ---------------------------------------------------------------------- what is measured
def snapshots(folder: Path, S: int, D: int) -> cl.Snapshots:
    """S random models of width D with two layers."""
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=D, num_hidden_layers=2,
                           num_attention_heads=4, intermediate_size=4 * D)  # fmt: skip
    for seed in range(S):
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(config).save_pretrained(folder / f"step{seed}")
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    raw.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="w0", eos_token="w0").save_pretrained(folder / "tokenizer")
    return cl.Snapshots.local(folder)


@contextmanager
def harvest(folder: Path, S: int, D: int, tokens: int, **_: int) -> Calls:
    """Fill a cache, models loaded from disk."""
    ids = torch.randint(1, VOCABULARY, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    data, models = Dataset(ids, held_out_tokens=0), snapshots(folder, S, D)
    yield lambda: Activations(models, HOOK, data, settings=ModelSettings("cpu")).cache(tempfile.mkdtemp(dir=folder))


@contextmanager
def train_step(folder: Path, S: int, D: int, F: int, tokens: int, **_: int) -> Calls:
    """One step of BatchTopK; `tokens` are those of a batch."""
    del folder
    stepper = Crosslens(Setting("batchtopk", S, D, F, tokens // 4, K))
    x = torch.randn(tokens // 4, S, D, generator=torch.Generator().manual_seed(0))
    yield lambda: stepper.step(x)


@contextmanager
def analyse(folder: Path, S: int, D: int, F: int, tokens: int, **_: int) -> Calls:
    """`evolve`, and all of its tables; `tokens` are held out."""
    del folder
    acts = evolution.planted(S, D, tokens)
    crosscoder = evolution.make(acts, F)
    yield lambda: evolve(crosscoder, acts).tables()


@contextmanager
def effects(folder: Path, S: int, D: int, F: int, prompts: int, **_: int) -> Calls:
    """Effects of all features on a task, and by position, with the clean runs and the loading of the models."""
    models = snapshots(folder, S, D)
    torch.manual_seed(0)
    crosscoder = TopKCrosscoder(TopKCrosscoderConfig(d_in=S * D, d_sae=F, n_snapshots=S, k=K)).requires_grad_(False)
    crosscoder.W_dec.normal_()
    crosscoder.W_enc.normal_()
    crosscoder.cfg.metadata.hook_name, crosscoder.cfg.metadata.prepend_bos = HOOK, True
    draw = np.random.default_rng(0)
    words = [" ".join(f"w{i}" for i in draw.integers(1, VOCABULARY, LENGTH)) for _ in range(2 * prompts)]
    items = [
        {"prefix": one, "patch_prefix": other, "correct": f" w{2 * i % 500 + 1}", "wrong": f" w{2 * i % 500 + 2}"}
        for i, (one, other) in enumerate(zip(words[::2], words[1::2], strict=True))
    ]
    task, settings = cl.Task.from_items("random", items), ModelSettings("cpu")

    def call() -> Any:
        fresh = cl.Snapshots.local(folder)  # the others keep their models in memory
        return attribute(PromptRuns(crosscoder, fresh, task, settings=settings), positions=True, n_bootstrap=200)

    del models
    yield call


@contextmanager
def pages(folder: Path, S: int, F: int, **_: int) -> Calls:
    """The report of a run with three tasks."""
    run = report_benchmark.make_run(folder / "run", F, S, 3)
    yield lambda: write_report(run.path)


VERBS = {
    "harvest": Verb(("S", "D", "tokens"), harvest, {"D": "models have 12 D^2 weights per layer"}),
    "train step": Verb(("S", "D", "F", "tokens"), train_step, {}),
    "evolve": Verb(
        ("S", "D", "F", "tokens"), analyse,
        {
            "D": "covariances, maps and factors are of D x D numbers: D^2 a token and D^3 a snapshot",
            "F": "pairs of neighbours: every feature is compared with every other one, F^2",
            "tokens": "with fewer tokens than 2 F, R2 is predicted from tokens: tokens^2 (then tokens x F)",
        },
    ),
    "attribute": Verb(("S", "D", "F", "prompts"), effects, {"D": "models have 12 D^2 weights per layer"}),
    "report": Verb(("S", "F"), pages, {}),
}  # fmt: skip


# ---------------------------------------------------------------------- measuring
def measure_one(verb: str, sizes: dict[str, int], rounds: int) -> dict[str, float]:
    """CPU seconds and bytes of one call."""
    torch.set_num_threads(1)
    measure.return_freed_memory()
    with tempfile.TemporaryDirectory() as folder, VERBS[verb].make(Path(folder), **sizes) as call:
        before = measure.reset_resident_peak()
        seconds = [measure.timed(call, "cpu").cpu for _ in range(rounds)]
        after = measure.resident("VmHWM")
    return {"seconds": min(seconds), "bytes": 0 if before is None or after is None else after - before}


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Exponent through the largest three sizes; NaN where a value is 0."""
    last = slice(-3, None)
    if min(values[last]) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes[last]), np.log(values[last]), 1)[0])


def grow(verb: str, dimension: str, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One row of the table."""
    found = [measure.in_child(measure_one, verb, {**BASE, dimension: size}, rounds) for size in sizes]
    row: dict[str, Any] = {"verb": verb, "dimension": dimension, "sizes": list(sizes)}
    for quantity in ("seconds", "bytes"):
        row[quantity] = [each[quantity] for each in found]
        row[f"{quantity}_exponent"] = slope(sizes, row[quantity])
    if verb == "evolve":
        every = [{**BASE, dimension: size} for size in sizes]
        row["forecast"] = [plan_decodability(one["F"], one["S"], one["D"], one["tokens"])[0] for one in every]
    return row


# ---------------------------------------------------------------------- table and picture
def table(rows: list[dict[str, Any]]) -> str:
    def at_ends(key: str, form: Callable[[float], str]) -> Callable[[Any], str]:
        return lambda row: f"{form(row[key][0])} to {form(row[key][-1])}"

    def why(row: Any) -> str:
        steep = [name for name in ("seconds", "bytes") if row[f"{name}_exponent"] > LINEAR]
        reason = VERBS[row["verb"]].reasons.get(row["dimension"], "not explained")
        return f"{', '.join(steep)}: {reason}" if steep else ""

    return measure.markdown(
        rows,
        {
            "verb": lambda row: row["verb"],
            "grows with": lambda row: f"{row['dimension']}, {row['sizes'][0]:,} to {row['sizes'][-1]:,}",
            "CPU seconds": at_ends("seconds", lambda x: f"{x:.2f}"),
            "exponent": lambda row: f"{row['seconds_exponent']:.2f}",
            "memory, MB": at_ends("bytes", lambda x: f"{x / 1e6:.0f}"),
            "exponent of memory": lambda row: f"{row['bytes_exponent']:.2f}",
            "faster than linear": why,
        },
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over sizes, a panel for each dimension, with a line of slope 1 for the eye."""
    import matplotlib.pyplot as plt

    names = [name for name in SIZES if any(row["dimension"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3.2), sharey=True, squeeze=False)
    colours = dict(zip(VERBS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    what = {"S": "snapshots S", "D": "d_model D", "F": "features F", "tokens": "tokens", "prompts": "prompts"}
    for axis, name in zip(axes[0], names, strict=True):
        for row in rows:
            if row["dimension"] == name:
                axis.loglog(row["sizes"], row["seconds"], "o-", color=colours[row["verb"]], markersize=4)
        sizes = np.array(SIZES[name], float)
        axis.loglog(sizes, 0.05 * sizes / sizes[0], ":", color="grey")
        axis.set_xlabel(what[name])
        axis.set_xticks(SIZES[name], [f"{size:,}" for size in SIZES[name]], fontsize=7)
        axis.minorticks_off()
    axes[0][0].set_ylabel("CPU seconds")
    lines = [plt.Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours.values()]
    lines.append(plt.Line2D([], [], color="grey", linestyle=":"))
    figure.legend(lines, [*colours, "linear"], ncols=len(lines), loc="upper center", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=VERBS, default=list(VERBS), help="verbs; all by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the smallest three sizes, once")
    parser.add_argument("--json", type=Path, help="file for the figures; those that it has are not measured again")
    parser.add_argument("--picture", type=Path, help="file for the picture, a PNG")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-growth-…")
    arguments = parser.parse_args()
    there = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    known = {(row["verb"], row["dimension"], tuple(row["sizes"])): row for row in there}
    rows: list[dict[str, Any]] = []
    for verb in arguments.only:
        for dimension in VERBS[verb].dimensions:
            sizes = SIZES[dimension][:3] if arguments.quick else SIZES[dimension]
            if found := known.get((verb, dimension, sizes)):
                rows.append(found)
                continue
            rows.append(grow(verb, dimension, sizes, 1 if arguments.quick else arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    base = ", ".join(f"{name} = {size:,}" for name, size in BASE.items())
    body = f"What does not vary is {base}.\n\n{table(rows)}"
    print(body)
    if arguments.picture:
        draw(rows, arguments.picture)
    if arguments.report:
        packages = ("crosslens", "torch", "transformer-lens", "scipy", "pandas")
        print(measure.write_report("growth", "Growth of time and memory", body, "cpu", 1, packages))


if __name__ == "__main__":
    main()
