"""Planted ground truth: does a crosscoder find features whose births, turns, splits and deaths are known?

Every architecture, and one dictionary per snapshot matched afterwards, on activations in which the truth is planted
(`crosslens.planted`), scored by `crosslens.recovery`. All get the same number of features, steps and activations, and
the true number of active features where they have a k; the per-snapshot dictionaries that of their own snapshot.

    python benchmarks/planted_truth.py --json planted.json                 # three regimes, three seeds, five methods
    python benchmarks/planted_truth.py --quick                             # one seed of the easy regime, fewer steps
    python benchmarks/planted_truth.py --regime easy --method batchtopk --seeds 0

Results that the JSON file holds are not computed again. Settings were chosen on seed 10; the table is of others.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import crosslens as cl
from crosslens.crosscoders import CrosscoderTrainingConfig
from crosslens.planted import REGIMES, Planted
from crosslens.recovery import crosscoder_rows, linked_rows, recovery

FEATURES_PER_PLANTED = 2
COLUMNS = {
    "explained_variance": "EV", "l0": "L0", "found": "live", "recovered": "recovered", "cosine": "cosine",
    "birth": "birth exact, of these", "dated": "with exact birth", "birth_error": "birth error",
    "false_births": "false births", "death": "deaths", "turn": "turns", "rotation_error": "rotation error",
    "partings": "splits, mergers", "seconds": "CPU s",
}  # fmt: skip
METHODS = ("batchtopk", "topk", "standard", "jumprelu", "per_snapshot")


def architecture(method: str, acts: Planted, steps: int) -> CrosscoderTrainingConfig:
    """The settings of a method on some activations; chosen on seed 10."""
    d_sae = FEATURES_PER_PLANTED * acts.regime.n_features
    if method == "standard":
        return cl.StandardCrosscoderTrainingConfig(d_sae=d_sae, l1_coefficient=2.0, l1_warm_up_steps=steps // 20)
    if method == "jumprelu":
        return cl.JumpReLUCrosscoderTrainingConfig(
            d_sae=d_sae, sparsity_coefficient=0.3, sparsity_warm_up_steps=steps // 10
        )
    annealed: dict[str, Any] = {"k_start": 6 * acts.l0, "k_anneal_steps": steps // 2, "decoder_init_norm": None}
    if method == "topk":
        return cl.TopKCrosscoderTrainingConfig(d_sae=d_sae, k=round(acts.l0), **annealed)
    return cl.BatchTopKCrosscoderTrainingConfig(d_sae=d_sae, k=acts.l0, **annealed)


def fit(method: str, acts: Planted, steps: int, batch_size: int, seed: int) -> cl.Crosscoder:
    """A crosscoder of one method, trained on `steps` batches."""
    lr = {"standard": 1e-3, "jumprelu": 1e-3}.get(method, 1e-3)
    config = cl.TrainConfig(
        training_tokens=steps * batch_size,
        batch_size=batch_size,
        lr=lr,
        dead_tokens=50_000,
        scale_tokens=20_000,
        evaluate=False,
        seed=seed,
    )
    return cl.train(acts, architecture(method, acts, steps), config)


@torch.no_grad()
def quality(crosscoder: cl.Crosscoder, acts: Planted) -> tuple[float, float]:
    """Explained variance, averaged over snapshots, and L0 on the held-out activations."""
    x = torch.cat(list(acts.held_out()))
    features = crosscoder.encode(x)
    error = (crosscoder.decode(features) - x).square().sum((0, 2))
    variance = (x - x.mean(0)).square().sum((0, 2))
    return float((1 - error / variance).mean()), float(features.count_nonzero() / len(x))


def measure(method: str, regime: str, seed: int, steps: int, batch_size: int) -> dict[str, Any]:
    """One run: train, score."""
    began, planted = time.process_time(), Planted(REGIMES[regime], seed)
    if method == "per_snapshot":
        parts = [planted.only(s) for s in range(planted.n_snapshots)]
        dictionaries = [fit(method, part, steps, batch_size, seed) for part in parts]
        qualities = [quality(dictionary, part) for dictionary, part in zip(dictionaries, parts, strict=True)]
        ev, l0 = (sum(values) / len(values) for values in zip(*qualities, strict=True))
        rows, scale = linked_rows(dictionaries, parts)
    else:
        crosscoder = fit(method, planted, steps, batch_size, seed)
        ev, l0 = quality(crosscoder, planted)
        rows, scale = crosscoder_rows(crosscoder, planted), crosscoder.activation_scale
    scores = recovery(planted, rows, scale)
    run = {"method": method, "regime": regime, "seed": seed, "steps": steps, "batch_size": batch_size}
    seconds = time.process_time() - began
    result = {**run, "explained_variance": ev, "l0": l0, **scores, "seconds": seconds}
    return {name: None if value != value else value for name, value in result.items()}  # strict JSON knows no NaN


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per regime and method, the mean over seeds, and the worst seed of `recovered`."""
    names = list(COLUMNS.values())
    lines = ["| regime | method | seeds | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 3)]
    groups = {
        (regime, method): [run for run in results if (run["regime"], run["method"]) == (regime, method)]
        for regime in REGIMES
        for method in METHODS
    }
    for (regime, method), runs in groups.items():
        if not runs:
            continue
        cells = [regime, method, str(len(runs))]
        for column in COLUMNS:
            cells.append(_cell(column, [run[column] for run in runs if run[column] is not None]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: str, values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if column in ("found", "seconds"):
        return f"{mean:.0f}"
    if column in ("l0", "rotation_error", "birth_error"):
        return f"{mean:.2f}"
    if column in ("explained_variance", "cosine"):
        return f"{mean:.3f}"
    worst = (max if column == "false_births" else min)(values)
    return f"{mean:.1%} ({worst:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--json", type=Path, help="results are kept here, one by one")
    parser.add_argument("--quick", action="store_true", help="seed 0 of the easy regime, 1500 steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.regime, arguments.seeds, arguments.steps = ["easy"], [0], 1500
    path: Path | None = arguments.json
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path is not None and path.exists() else []
    for regime in arguments.regime:
        for seed in arguments.seeds:
            for method in arguments.method:
                wanted = (method, regime, seed, arguments.steps, arguments.batch_size)
                if any(
                    tuple(r[k] for k in ("method", "regime", "seed", "steps", "batch_size")) == wanted for r in results
                ):
                    continue
                results.append(measure(*wanted))
                if path is not None:
                    partial = path.with_name(path.name + ".tmp")
                    partial.write_text(json.dumps(results, indent=1))
                    os.replace(partial, path)
    print(table(results))


if __name__ == "__main__":
    main()
