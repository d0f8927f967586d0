"""Do the causal claims hold up? Agreement with exact effects, calibration, and which measure says when a feature acts.

    python benchmarks/causes.py --demo runs/demo0 --seed 0 --demo runs/demo1 --seed 1
    python benchmarks/causes.py --run runs/e2l --task sva:simple_test.json

RUN is a run directory with a trained crosscoder; for `--demo` its snapshots are the demo's with the seed of the same
position, and its tasks simple, pp and subj_rel. For every task, on one half of its prompts:

- *agreement*: Spearman correlation of the effects by each method with exact ablation of the `--exact` features with the
  largest |IE| by that method: removed from the clean run, and the mean of removed and added; at the last snapshot, and
  the lowest of all;
- *significant*: share of the active features and snapshots, with the answers as they are and shuffled;
- *validation*: correlation of each measure with exact effects at every snapshot, on the other half (`validate`);
- *exact*: seconds for exact effects of all features with |IE| > 0, per 200 features, 10 snapshots and 120 prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import crosslens as cl
from crosslens.activations import Activations
from crosslens.causal import Attribution, attribute, exact_effects, significant, validate
from crosslens.causal.attribution import rank_correlation
from crosslens.evolution import measure_decodability
from crosslens.intervention.prompt_runs import PromptRuns, needs_pairs
from crosslens.pipeline.opening import parse_tasks
from crosslens.rundir import RunDir
from crosslens.snapshots import ModelSettings

METHODS = ("removal", "gradient", "both_ends", "ig")
DEMO_TASKS = ("simple", "pp", "subj_rel")
CPU = ModelSettings(device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="append", default=[], help="run directory of the demo")
    parser.add_argument("--seed", action="append", type=int, default=[], help="its seed")
    parser.add_argument("--run", action="append", default=[], help="another run directory")
    parser.add_argument("--task", action="append", default=[], help="task of the other runs, as in crosslens attribute")
    parser.add_argument("--baseline", help="by default that of crosslens attribute")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--exact", type=int, default=100)
    parser.add_argument("--shuffles", type=int, default=3)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name, crosscoder, acts, tasks, seed in settings(arguments):
        decodability = torch.from_numpy(measure_decodability(crosscoder, acts).r2)
        for task in tasks:
            row = measure_task(crosscoder, acts.snapshots, task, decodability, seed, arguments)
            found[f"{name} {task.name}"] = row
            print(f"{name} {task.name}: {json.dumps(row)}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


def settings(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, Activations, list[cl.Task], int]]:
    """Name, crosscoder, activations and tasks of every run."""
    for path, seed in zip(arguments.demo, arguments.seed, strict=True):
        source = RunDir.open(path).read_json()["source"]
        tasks = [cl.Task.demo(name, n=arguments.prompts, seed=seed) for name in DEMO_TASKS]
        yield f"demo {seed}", cl.load(f"{path}/crosscoder"), Activations.from_dict(source, CPU), tasks, seed
    for path in arguments.run:
        source = RunDir.open(path).read_json()["source"]
        tasks = []
        for task in parse_tasks(arguments.task):
            drawn = random.Random(0).sample(task.items, min(len(task), 2 * arguments.prompts))
            tasks.append(replace(task, items=tuple(drawn), duplicates=0, same_prompt=0))
        yield Path(path).name, cl.load(f"{path}/crosscoder"), Activations.from_dict(source, CPU), tasks, 0


def measure_task(
    crosscoder: Any, snaps: cl.Snapshots, task: cl.Task, decodability: Any, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    baseline = arguments.baseline

    first, second = task.split(seed)
    runs = PromptRuns(crosscoder, snaps, first, paired=needs_pairs(baseline), settings=CPU)

    def run(part: cl.Task) -> PromptRuns:
        return PromptRuns(crosscoder, snaps, part, paired=runs.paired, settings=CPU)

    effects = {name: attribute(runs, name, baseline=baseline) for name in METHODS}
    ie = effects["removal"]
    row: dict[str, Any] = {"prompts": len(runs), "agreement": agreement(runs, effects, baseline, arguments.exact)}
    row["completeness"] = round(float(effects["ig"].completeness.max()), 6)
    row["significant"] = round(float(significant(ie)[ie.active].double().mean()), 4)
    row["shuffled"] = [shuffled(run, first, baseline, draw) for draw in range(arguments.shuffles)]
    summary = validate(run(second), ie, baseline=baseline, decodability=decodability, seed=seed).summary
    row["features"] = int(summary["n_features"].iloc[0])
    row["validation"] = {
        f"{each['kind']} {each['target']} {each['measure']}": [
            round(float(each[name]), 3) for name in ("correlation", "correlation_low", "correlation_high")
        ]
        for each in summary.to_dict("records")
    }
    features = ie.effects[:, -1].abs().topk(min(200, int((ie.effects[:, -1] != 0).sum()))).indices
    began = time.perf_counter()
    exact_effects(runs, len(snaps) - 1, features, baseline)
    seconds = time.perf_counter() - began
    row["exact seconds"] = round(seconds * 200 / len(features) * 10 * 120 / len(runs), 1)
    return row


def agreement(
    runs: PromptRuns, effects: dict[str, Attribution], baseline: str | None, n: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """By method and kind of exact effect: correlation at the last snapshot, and the lowest."""
    found: dict[str, dict[str, list[float]]] = {name: {"removed": [], "both": []} for name in effects}
    for s in range(len(runs.snapshots)):
        tops = {name: each.top(min(n, int(each.active[:, s].sum())), s, "magnitude") for name, each in effects.items()}
        every = torch.cat(list(tops.values())).unique()
        removed, added = (exact_effects(runs, s, every, baseline, end) for end in ("clean", "baseline"))
        for name, top in tops.items():
            place = torch.searchsorted(every, top)
            for kind, exact in (("removed", removed), ("both", (removed + added) / 2)):
                value = rank_correlation(effects[name].effects[top, s].numpy(), exact[place].numpy())
                found[name][kind].append(value)
    return {
        name: {kind: (round(values[-1], 3), round(min(values), 3)) for kind, values in kinds.items()}
        for name, kinds in found.items()
    }


def shuffled(run: Any, task: cl.Task, baseline: str | None, draw: int) -> float:
    """Share of active features and snapshots that are significant when answers are swapped at random."""
    rng = random.Random(draw)
    items = [
        replace(item, correct=item.wrong, wrong=item.correct) if rng.random() < 0.5 else item for item in task.items
    ]
    null = attribute(run(replace(task, items=tuple(items))), baseline=baseline)
    return round(float(significant(null)[null.active].double().mean()), 4)


if __name__ == "__main__":
    main()
