"""Integrated gradients at every snapshot: their cost against a lower bound, and their agreement with exact ablation.

    python benchmarks/attribution.py --snapshots english-2l --task nounpp_train.json --text sentences.txt.gz
    python benchmarks/attribution.py --snapshots english-2l --task nounpp_train.json --crosscoder runs/a/crosscoder
    python benchmarks/attribution.py --snapshots english-2l --task simple_train.json --text s.txt --json out.json

SNAPSHOTS is a folder of snapshots, TASK has minimal pairs in the format of feature-circuits (or is written as for
`crosslens attribute`, such as `demo:pp`), and TEXT is the text to train a small crosscoder on (about 40 CPU seconds) if
none is given. It measures, over all snapshots of the crosscoder:

- *floor*: `nodes` forward and backward passes through the model above the hook, with as many rows at a time, and
  nothing else; and the same through the modules of transformers, without TransformerLens's hooks (GPT-NeoX only);
- *ig*: `attribute` from crosscoder, snapshots and task, clean runs included; and with clean runs given, as for the
  second method on a task;
- *gradient*: the same with a single node, at the clean run;
- *unavoidable*: what the effects of `crosslens attribute` need and nothing else: the models up to the hook on the
  prompts and their paired prompts, encoded; above it the metric of both, and two forward and backward passes for every
  prompt;
- *removal*: these effects, with standard errors, p-values and 200 replicates; and with effects by position;
- *naive loop*: one prompt, one feature, one node at a time through the whole model, measured on a sample and
  extrapolated to all active features.

A round runs each but the naive loop once, in rotated order; figures are medians over the rounds, ratios are taken
within a round. Models are loaded before. With one thread seconds are CPU seconds, otherwise wall seconds. Then effects
are compared with exact ablation: the rank correlation over the 100 features with the largest effect, at every snapshot.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM

import crosslens as cl
from crosslens.causal.attribution import BATCH_TOKENS, END_NODES, Estimator, attribute, quadrature
from crosslens.crosscoders import Crosscoder
from crosslens.intervention.prompt_runs import BatchAt, PromptRuns
from crosslens.intervention.splice import spliced_logits
from crosslens.pipeline.opening import parse_tasks
from crosslens.snapshots.hooks import hook_layer
from crosslens.snapshots.settings import ModelSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", required=True, help="folder of snapshots")
    parser.add_argument("--task", required=True, help="minimal pairs: JSON lines with clean_prefix, clean_answer, ...")
    parser.add_argument("--text", help="sentences to train a crosscoder on, one per line; may be .gz")
    parser.add_argument("--crosscoder", help="folder of a crosscoder of these snapshots, instead of --text")
    parser.add_argument("--hook", help="hook point of a new crosscoder; the output of a middle block by default")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=10, help="nodes of the integral")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--exact-prompts", type=int, default=200, help="prompts on which effects are compared; 0 for none"
    )
    parser.add_argument("--naive-sample", type=int, default=200, help="passes of the naive loop that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    snaps = cl.Snapshots.local(arguments.snapshots)
    crosscoder = cl.load(arguments.crosscoder) if arguments.crosscoder else small_crosscoder(snaps, arguments)
    crosscoder.to(arguments.device)
    snaps = snaps[[snaps.labels.index(label) for label in crosscoder.cfg.snapshot_labels]]
    (task,) = parse_tasks([arguments.task if ":" in arguments.task else f"sva:{arguments.task}"])
    task = first_prompts(task, snaps, arguments.prompts)
    for s in range(len(snaps)):
        snaps.model(s, ModelSettings(arguments.device))
    setting = {
        "snapshots": len(snaps),
        "d_model": snaps.d_model,
        "layers": snaps.n_layers,
        "hook": crosscoder.cfg.metadata.hook_name,
        "features": crosscoder.cfg.d_sae,
        "prompts": len(task),
        "nodes": arguments.nodes,
        "threads": arguments.threads,
        "machine": measure.machine(arguments.device),
    }
    print(", ".join(f"{name} {value}" for name, value in setting.items()), "\n")
    cost = measured_cost(crosscoder, snaps, task, arguments)
    print(cost_table(cost), "\n")
    figures: dict[str, Any] = {"setting": setting, "cost": cost}
    if arguments.exact_prompts:
        figures["agreement"] = agreement(
            crosscoder, snaps, first_prompts(task, snaps, arguments.exact_prompts), arguments.nodes
        )
        print(agreement_table(figures["agreement"]))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


def small_crosscoder(snaps: cl.Snapshots, arguments: argparse.Namespace) -> Crosscoder:
    """A crosscoder of 1,024 features, 32 a token, trained for a minute."""
    if arguments.text is None:
        sys.exit("give --text to train a crosscoder on, or --crosscoder")
    opened = gzip.open if arguments.text.endswith(".gz") else open
    with opened(arguments.text, "rt", encoding="utf-8") as file:
        text = [line.strip() for _, line in zip(range(10_000), file, strict=False)]
    hook = arguments.hook or f"blocks.{(snaps.n_layers - 1) // 2}.hook_resid_post"
    architecture = cl.BatchTopKCrosscoderTrainingConfig(d_sae=1024, k=32, decoder_init_norm=None)
    training = cl.TrainConfig(training_tokens=120_000, batch_size=1024, lr=1.5e-3, dead_tokens=50_000, evaluate=False)
    with tempfile.TemporaryDirectory() as folder:
        acts = cl.Activations(snaps, hook, text, 60_000, context_size=32).cache(folder)
        return cl.train(acts, architecture, training)


def first_prompts(task: cl.Task, snaps: cl.Snapshots, n: int) -> cl.Task:
    """The first n items that the tokenizer can use."""
    usable = task.prompts(snaps.tokenizer, max_length=snaps.n_ctx).usable[:n]
    return cl.Task.from_items(task.name, [task.items[prompt.item] for prompt in usable])


# ---------------------------------------------------------------------- cost
def measured_cost(
    crosscoder: Crosscoder, snaps: cl.Snapshots, task: cl.Task, arguments: argparse.Namespace
) -> dict[str, Any]:
    device, nodes = arguments.device, arguments.nodes
    runs, ig = PromptRuns(crosscoder, snaps, task), Estimator("ig", n_nodes=nodes)
    calls: dict[str, Callable[[], Any]] = {
        "floor": lambda: floor(runs, nodes, bridge_logits),
        "ig": lambda: attribute(crosscoder, snaps, task, ig),
        "ig, clean runs given": lambda: attribute(runs, ig),
        "gradient, clean runs given": lambda: attribute(runs, "gradient"),
        "clean runs": lambda: PromptRuns(crosscoder, snaps, task).features,  # the models run at first use
        "unavoidable": lambda: unavoidable(crosscoder, snaps, task),
        "removal": lambda: attribute(crosscoder, snaps, task, n_bootstrap=200),
        "removal, by position": lambda: attribute(crosscoder, snaps, task, n_bootstrap=200, positions=True),
    }
    if snaps[0].config().model_type == "gpt_neox" and runs.hook_name.endswith("hook_resid_post") and device == "cpu":
        calls["floor of transformers"] = lambda: floor(runs, nodes, transformers_logits)
    timings = measure.alternate(calls, arguments.rounds, 1 if arguments.rounds > 1 else 0, device)
    seconds = {name: [getattr(each, clock(device)) for each in timing] for name, timing in timings.items()}
    per_pass, passes = naive_loop(runs, nodes, arguments.naive_sample)
    out: dict[str, Any] = {
        name: {
            "seconds": statistics.median(each),
            "of_floor": statistics.median(a / b for a, b in zip(each, seconds["floor"], strict=True)),
            "of_unavoidable": statistics.median(a / b for a, b in zip(each, seconds["unavoidable"], strict=True)),
            "prompts_per_second": len(runs) * len(snaps) / statistics.median(each),
            "peak_mb": peak_mb(calls[name], device) if name in ("ig", "clean runs") else None,
        }
        for name, each in seconds.items()
    }
    total = per_pass * passes
    out["naive loop, extrapolated"] = {
        "seconds": total,
        "of_floor": total / out["floor"]["seconds"],
        "prompts_per_second": len(runs) * len(snaps) / total,
        "peak_mb": None,
        "passes": passes,
        "measured_passes": arguments.naive_sample,
    }
    return out


Logits = Callable[[PromptRuns, int, BatchAt, Tensor, Tensor], Tensor]


def floor(runs: PromptRuns, nodes: int, logits: Logits) -> None:
    """`nodes` forward and backward passes above the hook for every prompt and snapshot, and nothing else."""
    for s in range(len(runs.snapshots)):
        for part in runs.at(s):
            rows = torch.arange(len(part), device=part.clean.device).repeat(nodes)
            for chunk in rows.split(max(1, BATCH_TOKENS // part.clean.shape[1])):
                x = part.clean[chunk].requires_grad_()
                torch.autograd.grad(logits(runs, s, part, x, chunk)[:, :2].sum(), x)


def unavoidable(crosscoder: Crosscoder, snaps: cl.Snapshots, task: cl.Task) -> None:
    """The passes of effects by removal."""
    runs = PromptRuns(crosscoder, snaps, task)
    for s in range(len(snaps)):
        for part in runs.at(s):
            for x in (part.clean, part.clean if part.patch is None else part.patch):
                for rows in torch.arange(len(part), device=x.device).split(max(1, BATCH_TOKENS // x.shape[1])):
                    with torch.no_grad():
                        part.metric(x[rows], rows)
    floor(runs, END_NODES, bridge_logits)


def bridge_logits(runs: PromptRuns, s: int, part: BatchAt, x: Tensor, rows: Tensor) -> Tensor:
    del runs, s
    return part.upper.logits(x, rows)


def transformers_logits(runs: PromptRuns, s: int, part: BatchAt, x: Tensor, rows: Tensor) -> Tensor:
    """The modules of a GPT-NeoX above the hook, called one after the other."""
    del part, rows
    model, T = plain_model(str(runs.snapshots[s].folder())), x.shape[1]
    positions = torch.arange(T)[None]
    mask = torch.full((T, T), -math.inf).triu(1)[None, None]
    rotary = model.gpt_neox.rotary_emb(x, position_ids=positions)
    for layer in model.gpt_neox.layers[hook_layer(runs.hook_name) :]:
        x = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return model.lm_head(model.gpt_neox.final_layer_norm(x[:, -1]))


@functools.cache
def plain_model(folder: str) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return loaded.eval().requires_grad_(False)


def naive_loop(runs: PromptRuns, n_nodes: int, sample: int) -> tuple[float, int]:
    """Seconds of one pass for one prompt, feature and node, and how many passes there would be."""
    A, passes = len(runs.features), 0
    jobs: list[tuple[int, BatchAt, int, int]] = []
    for s in range(len(runs.snapshots)):
        for part in runs.at(s):
            pairs = next(part.changes("zero"))
            active = (pairs.tokens // part.clean.shape[1] * A + pairs.features).unique()
            passes += len(active) * n_nodes
            jobs.append((s, part, int(active[0]) // A, int(active[0]) % A))
    nodes, _ = quadrature("gauss_legendre", n_nodes)
    sampled = [jobs[i * len(jobs) // sample % len(jobs)] for i in range(sample)]
    one_pass(runs, *sampled[0], nodes[0])
    seconds = measure.timed(
        lambda: [one_pass(runs, *job, nodes[i % n_nodes]) for i, job in enumerate(sampled)], runs.settings.device
    )
    return getattr(seconds, clock(runs.settings.device)) / sample, passes


def one_pass(runs: PromptRuns, s: int, part: BatchAt, prompt: int, column: int, alpha: float) -> float:
    """Effect of one feature on one prompt at one point of the path: the whole model, forward and backward."""
    crosscoder, clean, T = runs.crosscoder, part.clean[prompt], part.clean.shape[1]
    inside = part.pairs.tokens // T == prompt
    places = part.pairs.tokens[inside] % T, runs.features.to(clean.device)[part.pairs.features[inside]]
    features = torch.zeros(T, crosscoder.cfg.d_sae, device=clean.device).index_put_(places, part.pairs.values[inside])
    error = clean - crosscoder.decode_snapshot(features, s)
    scaled = (alpha * features).requires_grad_()
    x = torch.where(part.keep[prompt, :, None], crosscoder.decode_snapshot(scaled, s) + alpha * error, clean)
    tokens = part.prompts.tokens[prompt : prompt + 1].to(runs.settings.device)
    logits = spliced_logits(
        runs.snapshots.model(s, runs.settings), tokens, runs.hook_name, x[None], part.keep[prompt][None]
    )[0, -1]
    metric = logits[part.prompts.correct[prompt]] - logits[part.prompts.wrong[prompt]]
    (gradient,) = torch.autograd.grad(metric, scaled)
    return float((features * gradient)[:, runs.features[column]].sum())


def clock(device: str) -> str:
    return "cpu" if torch.get_num_threads() == 1 and device == "cpu" else "wall"


def peak_mb(call: Callable[[], Any], device: str) -> float | None:
    """Peak memory of a call above what is resident before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
        call()
        after: int | None = torch.cuda.max_memory_allocated(device)
    else:
        measure.return_freed_memory()
        before = measure.reset_resident_peak()
        call()
        after = measure.resident("VmHWM")
    return None if before is None or after is None else (after - before) / 1e6


def cost_table(cost: dict[str, Any]) -> str:
    rows = [{"name": name, **figures} for name, figures in cost.items()]
    return measure.markdown(
        rows,
        {
            "": lambda row: row["name"],
            "seconds": lambda row: f"{row['seconds']:,.1f}",
            "of the floor": lambda row: f"{row['of_floor']:,.2f}",
            "of the unavoidable passes": lambda row: (
                f"{row['of_unavoidable']:,.2f}" if "removal" in row["name"] else ""
            ),
            "prompts × snapshots per second": lambda row: f"{row['prompts_per_second']:,.1f}",
            "peak memory, MB": lambda row: "" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
        },
    )


# ---------------------------------------------------------------------- agreement
def agreement(crosscoder: Crosscoder, snaps: cl.Snapshots, task: cl.Task, nodes: int) -> list[dict[str, Any]]:
    """Rank correlation of estimates with exact ablation, among the 100 features of the largest estimate."""
    runs = PromptRuns(crosscoder, snaps, task)
    ig = attribute(runs, Estimator("ig", n_nodes=nodes), positions=True)
    gradient = attribute(runs, "gradient")
    n = min(100, int(ig.active.sum(0).min()))
    largest = torch.stack([ig.top(n, s, by="magnitude") for s in range(len(snaps))])
    exact = attribute(runs, "exact", features=largest.unique())
    assert ig.positions is not None
    last = ig.positions.shares().query("position == 0")["share"].tolist()
    rows: list[dict[str, Any]] = []
    for s, features in enumerate(largest):
        theirs = exact.effects[features, s]
        rows.append(
            {
                "snapshot": snaps.labels[s],
                "metric": float(ig.metric_clean[s]),
                "ig": float(spearmanr(ig.effects[features, s], theirs).statistic),
                "gradient": float(spearmanr(gradient.effects[features, s], theirs).statistic),
                "ig_completeness": float(ig.completeness[s]),
                "gradient_completeness": float(gradient.completeness[s]),
                "last_position": last[s],
                "features": n,
                "prompts": len(runs),
            }
        )
    return rows


def agreement_table(rows: list[dict[str, Any]]) -> str:
    head = f"Against exact ablation, {rows[0]['features']} largest features, {rows[0]['prompts']} prompts:\n\n"
    return head + measure.markdown(
        rows,
        {
            "snapshot": lambda row: row["snapshot"],
            "metric": lambda row: f"{row['metric']:+.3f}",
            "Spearman, ig": lambda row: f"{row['ig']:.3f}",
            "Spearman, gradient": lambda row: f"{row['gradient']:.3f}",
            "completeness error, ig": lambda row: f"{row['ig_completeness']:.3%}",
            "completeness error, gradient": lambda row: f"{row['gradient_completeness']:.1%}",
            "share at the last position": lambda row: f"{row['last_position']:.1%}",
        },
    )


if __name__ == "__main__":
    main()
