"""Quality for time: explained variance at a fixed L0 against training time, on the demo's activations.

    python benchmarks/training_run.py                    # crosslens, the dense reference, SAELens
    python benchmarks/training_run.py --peers --report   # and the peers from PyPI; writes a report
    python benchmarks/training_run.py --json             # the points of the curves, one line each

All contestants train side by side: each takes every batch in turn (in rotated order), so the data, their order and the
number of steps are the same, and whatever slows the machine down slows all of them. Only steps are timed. The demo's
model is pretrained at the first use and its activations are harvested once, a minute each; both are cached.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import peers
import torch
from contestants import THRESHOLD_PACE, Contestant, Crosslens, CrosslensMoments, Dense, Setting
from torch import Tensor

import crosslens as cl
from crosslens.cli.demo import DemoConfig
from crosslens.crosscoders import CrosscoderTrainingSAE
from crosslens.synthetic import grammar
from crosslens.training.initialisation import initialise
from crosslens.training.run import complete

PACKAGES = ("crosslens", "torch", "sae-lens", "eai-sparsify", "dictionary-learning")
DEAD_TOKENS = 50_000  # as in the demo
N_POINTS = 8  # of each curve

NOTES = """
All contestants receive the activations of the demo's model (output of the middle block, ten snapshots concatenated,
each scaled as in crosslens) in the same order. k, batch size, number of steps, learning rate and schedule, the window
for dead features and the learning rate of thresholds are the same; initial weights, normalisation and auxiliary losses
are each library's own. EV is 1 - E|x_hat - x|^2 / E|x - mean x|^2 of a snapshot in the scaled space, averaged over
snapshots, on held-out tokens, computed by the same function for all. *EV*: features selected as in training (sparsify
k per token, the others k per token on average over a batch). *by threshold*: features selected by the learnt
threshold, as at inference; the dense reference and sparsify have none. *to the common EV*: seconds until the EV that
every contestant reaches in the end. *annealed*: k falls from 12 k to k over the first half of the steps, as in the
demo. *bfloat16 moments*: Adam's moments take 4 bytes per weight, not 8.
"""


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    acts = activations(args)
    steps = args.tokens // args.batch_size
    setting = Setting(
        "batchtopk", acts.n_snapshots, acts.d_model, args.d_sae, args.batch_size, k=args.k, lr=args.lr, steps=steps,
        lr_decay=0.2, dead_tokens=DEAD_TOKENS, seed=args.seed,
    )  # fmt: skip
    contestants = build(setting, acts, args)
    points = train(contestants, acts, setting, args.threads)
    rows = summary(points)
    table = measure.markdown(rows, COLUMNS)
    print("\n".join(map(json.dumps, points)) if args.json else table)
    if args.report:
        body = f"{table}\n{NOTES}"
        path = measure.write_report("training-run", "Quality for time", body, "cpu", args.threads, PACKAGES)
        print(path, file=sys.stderr)


def arguments() -> argparse.Namespace:
    demo = DemoConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also the peers from PyPI that are installed")
    parser.add_argument("--tokens", type=int, default=320_000, help="activations to train on, each")
    parser.add_argument("--batch-size", type=int, default=demo.batch_size)
    parser.add_argument("--d-sae", type=int, default=demo.d_sae)
    parser.add_argument("--k", type=int, default=demo.k)
    parser.add_argument("--lr", type=float, default=demo.lr, help="of all contestants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "crosslens-benchmark",
        help="where the activations are kept (420 MB)",
    )
    parser.add_argument("--json", action="store_true", help="the points of the curves instead of the table")
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    return parser.parse_args()


def activations(args: argparse.Namespace) -> cl.Activations:
    """The demo's activations, from a cache for all runs."""
    demo = DemoConfig()
    snaps = cl.Snapshots.demo(args.seed)
    documents = list(grammar.documents(demo.n_documents, args.seed + 1_000_003))
    acts = cl.Activations(snaps, demo.hook_name, documents, demo.n_tokens, seed=args.seed)
    return acts.cache(args.cache / f"demo-seed{args.seed}")


def build(setting: Setting, acts: cl.Activations, args: argparse.Namespace) -> dict[str, Contestant]:
    """The contestants by name; all use the scales of crosslens, the first."""
    annealed = {"k_start": 12.0 * setting.k, "k_anneal_steps": setting.steps // 2}
    contestants: dict[str, Contestant] = {
        "crosslens": Crosslens(setting, crosscoder(setting, acts)),
        "crosslens, annealed": Crosslens(setting, crosscoder(setting, acts, **annealed)),
        "crosslens, bfloat16 moments": CrosslensMoments(setting, crosscoder(setting, acts)),
        "dense": Dense(setting, crosscoder(setting, acts)),
        "saelens": peers.SAELens(setting),
    }
    if args.peers:
        absent = peers.missing()
        for reason in absent.values():
            print(reason, file=sys.stderr)
        contestants |= {c.name: c(setting) for c in (peers.DictionaryLearning, peers.Sparsify) if c.name not in absent}
    return contestants


def crosscoder(setting: Setting, acts: cl.Activations, **options: Any) -> CrosscoderTrainingSAE:
    """A crosscoder initialised as by `train`."""
    architecture = cl.BatchTopKCrosscoderTrainingConfig(
        d_sae=setting.F, k=setting.k, topk_threshold_lr=THRESHOLD_PACE, decoder_init_norm=None, **options
    )
    return initialise(
        complete(architecture, acts, setting.device),
        acts,
        batch_size=setting.B,
        scale_tokens=100_000,
        seed=setting.seed,
    )


def train(
    contestants: Mapping[str, Contestant], acts: cl.Activations, setting: Setting, threads: int
) -> list[dict[str, Any]]:
    """Points of the curves: the quality of each contestant after some steps and seconds."""
    first = contestants["crosslens"]
    assert isinstance(first, Crosslens)
    scale = first.sae.activation_scale.clone()
    held_out = torch.cat(list(acts.held_out()))
    spent = dict.fromkeys(contestants, measure.Seconds(0.0, 0.0))
    marks = {round(setting.steps * i / N_POINTS) for i in range(1, N_POINTS + 1)}
    points: list[dict[str, Any]] = []
    for step, raw in enumerate(acts.batches(setting.B)):
        if step in marks:
            for name, contestant in contestants.items():
                points.append(
                    {
                        "benchmark": "training_run",
                        "date": datetime.date.today().isoformat(),
                        "threads": threads,
                        "name": name,
                        "step": step,
                        "cpu_s": spent[name].cpu,
                        "wall_s": spent[name].wall,
                        **quality(contestant, held_out, scale),
                    }
                )
            print(f"step {step} of {setting.steps}", file=sys.stderr)
        if step == setting.steps:
            break
        flat = (raw * scale[:, None]).flatten(1)
        for name in measure.rotated(contestants, step):
            contestant = contestants[name]
            took = measure.timed(lambda c=contestant, x=flat if contestant.flat else raw: c.step(x), "cpu")
            spent[name] = measure.Seconds(spent[name].cpu + took.cpu, spent[name].wall + took.wall)
    return points


@torch.no_grad()
def quality(contestant: Contestant, held_out: Tensor, scale: Tensor) -> dict[str, float | None]:
    """Explained variance (mean and least over snapshots), L0 and dead features on held-out activations (N, S, D)."""
    result: dict[str, float | None] = {"ev_threshold": None, "l0_threshold": None}
    for by_threshold in (False, True) if contestant.has_threshold else (False,):
        target, error, fired, active = [], [], torch.zeros(contestant.setting.F), 0.0
        for raw in held_out.split(contestant.setting.B):
            x = raw * scale[:, None]
            features = contestant.encode(x.flatten(1) if contestant.flat else raw, by_threshold)
            target.append(x)
            error.append((contestant.decode(features).view_as(x) - x).square().sum(-1))
            fired += features.count_nonzero(0)
            active += float(features.count_nonzero())
        x = torch.cat(target)
        ev = 1 - torch.cat(error).mean(0) / (x - x.mean(0)).square().sum(-1).mean(0)
        if by_threshold:
            result |= {"ev_threshold": float(ev.mean()), "l0_threshold": active / len(x)}
        else:
            result |= {"ev": float(ev.mean()), "ev_least": float(ev.amin()), "l0": active / len(x)}
            result["dead_fraction"] = float((fired == 0).float().mean())
    return result


def summary(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last point of every curve, and the time at which it reached the EV that all of them reach."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        curves.setdefault(point["name"], []).append(point)
    common = min(curve[-1]["ev"] for curve in curves.values())
    return [
        {**curve[-1], "ms": 1e3 * curve[-1]["cpu_s"] / curve[-1]["step"], "to_common": reached(curve, common)}
        for curve in curves.values()
    ]


def reached(curve: list[dict[str, Any]], ev: float) -> float:
    """CPU seconds at which a curve first reaches an explained variance, linear between its points."""
    before = {"cpu_s": 0.0, "ev": 0.0}
    for point in curve:
        if point["ev"] >= ev:
            fraction = (ev - before["ev"]) / (point["ev"] - before["ev"])
            return before["cpu_s"] + fraction * (point["cpu_s"] - before["cpu_s"])
        before = point
    return float("nan")


COLUMNS = {
    "trainer": lambda r: r["name"],
    "steps": measure.number("step", "d"),
    "CPU s": measure.number("cpu_s", ".1f"),
    "wall s": measure.number("wall_s", ".1f"),
    "CPU ms a step": measure.number("ms", ".0f"),
    "EV": measure.number("ev", ".4f"),
    "least EV": measure.number("ev_least", ".4f"),
    "L0": measure.number("l0", ".1f"),
    "EV by threshold": measure.number("ev_threshold", ".4f"),
    "L0 by threshold": measure.number("l0_threshold", ".1f"),
    "dead": measure.number("dead_fraction", ".1%"),
    "CPU s to the common EV": measure.number("to_common", ".1f"),
}


if __name__ == "__main__":
    main()
