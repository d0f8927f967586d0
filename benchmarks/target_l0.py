"""JumpReLU that aims at an L0 (`target_l0`) against BatchTopK with k equal to that, on the activations of any run.

    python benchmarks/target_l0.py RUN --targets 8,16,32 --seeds 0,1,2 --report
    python benchmarks/target_l0.py RUN --targets 16 --seeds 0 --kinds all

RUN is a run directory whose models and text are still there, such as that of the demo; number of features, steps and
learning rate are given here. Explained variance and L0 are those of held-out tokens, means over snapshots.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import measure
import pandas as pd
import torch

import crosslens as cl
from crosslens.crosscoders import CrosscoderTrainingConfig
from crosslens.pipeline.opening import open_run
from crosslens.training.evaluation import reconstruction_table

QUADRATIC = {"l0_coefficient": 1.0, "sparsity_coefficient": 0.0, "jumprelu_window": 1.0}
DIRECT = {"direct_thresholds": True, "jumprelu_threshold_lr_factor": 1.0}
JUMPRELU: dict[str, dict[str, Any]] = {
    "steered": {},
    "steered, pre-activation loss": {"pre_act_loss_coefficient": 0.03},
    "steered, thresholds themselves": DIRECT,
    "steered, both": {"pre_act_loss_coefficient": 0.03, **DIRECT},
    "quadratic": {**QUADRATIC, **DIRECT},
    "quadratic, pre-activation loss": {**QUADRATIC, **DIRECT, "pre_act_loss_coefficient": 0.03},
}
KINDS = ("BatchTopK", "steered, pre-activation loss")


def architecture(kind: str, target: float, d_sae: int) -> CrosscoderTrainingConfig:
    """The crosscoder of a kind that keeps `target` features."""
    if kind == "BatchTopK":
        return cl.BatchTopKCrosscoderTrainingConfig(d_sae=d_sae, k=target)
    return cl.JumpReLUCrosscoderTrainingConfig(d_sae=d_sae, target_l0=target, **JUMPRELU[kind])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="of the activations, in the report")
    parser.add_argument("--targets", default="8,16,32")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--kinds", choices=("main", "all"), default="main")
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    acts = open_run(args.run, None)[2]
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    for kind in KINDS if args.kinds == "main" else ("BatchTopK", *JUMPRELU):
        for target in map(float, args.targets.split(",")):
            for seed in map(int, args.seeds.split(",")):
                if any((row["kind"], row["target"], row["seed"]) == (kind, target, seed) for row in rows):
                    continue
                began = time.process_time()
                config = cl.TrainConfig(
                    training_tokens=args.steps * args.batch_size, batch_size=args.batch_size, lr=args.lr,
                    dead_tokens=args.steps * args.batch_size // 20, seed=seed,
                )  # fmt: skip
                found = reconstruction_table(cl.train(acts, architecture(kind, target, args.d_sae), config), acts)
                rows.append(
                    {
                        "kind": kind, "target": target, "seed": seed, "l0": float(found["l0"].mean()),
                        "ev": float(found["explained_variance"].mean()),
                        "least": float(found["explained_variance"].min()),
                        "dead": float(found["dead_fraction"].iloc[0]), "cpu": time.process_time() - began,
                    }
                )  # fmt: skip
                print(rows[-1], file=sys.stderr)
                if args.out:
                    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = pd.DataFrame(rows).groupby(["kind", "target"], sort=False)
    means = [
        {"kind": kind, "off": (group["l0"] / target - 1).abs().max(), **group.mean(numeric_only=True)}
        for (kind, target), group in groups
    ]
    columns = {"crosscoder": lambda row: row["kind"]} | {
        title: measure.number(name, form)
        for title, name, form in (
            ("target", "target", "g"),
            ("L0", "l0", ".2f"),
            ("furthest off", "off", ".1%"),
            ("EV", "ev", ".4f"),
            ("least EV", "least", ".4f"),
            ("dead", "dead", ".1%"),
            ("CPU s", "cpu", ".0f"),
        )  # fmt: skip
    }
    table = measure.markdown(means, columns)
    print(table)
    if args.report:
        name = args.name or args.run.name
        body = f"Activations of {name}; F = {args.d_sae}, {args.steps} steps; means over seeds {args.seeds}.\n\n{table}"
        packages = ("crosslens", "torch", "sae-lens")
        measure.write_report(f"target-l0-{name}", f"JumpReLU at a given L0, {name}", body, "cpu", 1, packages)


if __name__ == "__main__":
    main()
