"""Quality for time: explained variance at a fixed L0 against training time, next to other trainers.

    python benchmarks/training_run.py                    # crosslens, the dense reference, SAELens
    python benchmarks/training_run.py --peers --report   # and the peers from PyPI; writes a report
    python benchmarks/training_run.py --json             # the points of the curves, one line each
    python benchmarks/training_run.py --peers --lrs 5e-4 1e-3 2e-3 4e-3 8e-3 --seeds 0 1 2   # the best of each
    python benchmarks/training_run.py --folder DIR --text FILE --hook blocks.0.hook_resid_post

All contestants train side by side: each takes every batch in turn (in rotated order), so the data, their order and the
number of steps are the same, and whatever slows the machine down slows all of them. Only steps are timed. With several
learning rates every contestant is trained at each of them with the first seed, and continues with the others at the
one that gave the largest EV. Without `--folder` the data are those of the demo, whose model is pretrained at the first
use; activations are harvested once and cached.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
LR_DECAY = 0.2  # of the steps
ARCHITECTURE = {"topk_threshold_lr": THRESHOLD_PACE}
K_START, K_ANNEAL = 4.0, 0.5  # of "annealed": in units of k, and of the steps

NOTES = """
All contestants receive the same activations, of all snapshots concatenated, each scaled as in crosslens (to the same
variance), in the same order. The other libraries receive them minus their mean, where crosslens starts its decoder
bias; what they reconstruct is compared with the same. k, batch size, number of steps, schedule (no warm-up, a linear
fall over the last 20 % of the steps), Adam, gradient clipping (sparsify has none), the window for dead features and
the learning rate of thresholds are the same; initial weights, normalisation, constraints on the decoder and auxiliary
losses are each library's own. EV is 1 - E|x_hat - x|^2 / E|x - mean x|^2 of a snapshot in the scaled space, averaged
over snapshots, on held-out tokens, computed by the same function for all. *EV*: features selected as in training
(sparsify k per token, the others k per token on average over a batch); mean over the seeds of the initial weights and
of the order of the data. *least EV*: of any snapshot and seed. *by threshold*: features selected by the learnt
threshold, as at inference; sparsify and the dense reference have none. *to the common EV*: seconds until the EV that
every contestant reaches in the end. *annealed*: k falls from 4 k to k over the first half of the steps. *bfloat16
moments*: Adam's moments take 4 bytes per weight, not 8.
"""


class Run(NamedTuple):
    """One training."""

    name: str
    lr: float
    seed: int


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    acts = activations(args)
    steps = args.tokens // args.batch_size
    setting = Setting(
        "batchtopk", acts.n_snapshots, acts.d_model, args.d_sae, args.batch_size, k=args.k, steps=steps,
        lr_decay=LR_DECAY, dead_tokens=DEAD_TOKENS,
    )  # fmt: skip
    rates = {name: args.lrs for name in trainers(args)}
    points: list[dict[str, Any]] = []
    for i, seed in enumerate(args.seeds):
        base = crosscoder(dataclasses.replace(setting, seed=seed), acts)
        runs = {
            Run(name, lr, seed): build(name, dataclasses.replace(setting, lr=lr, seed=seed), base)
            for name, lrs in rates.items()
            for lr in lrs
        }
        found = train(runs, base, acts, setting, first=i * steps, args=args)
        if args.json:
            print("\n".join(map(json.dumps, found)), flush=True)
        points += found
        rates = {name: [best] for name, best in best_rates(points).items()}
    if not args.json:
        print(tables(points))
    if args.report:
        name = "training-run" if args.folder is None else f"training-run-{args.folder.name}"
        snapshots = f"Snapshots: steps {', '.join(map(str, acts.snapshots.steps))}, at `{acts.hook_name}`; d_model"
        body = f"{snapshots} {acts.d_model}.\n\n{tables(points)}\n{NOTES}"
        path = measure.write_report(name, "Quality for time", body, "cpu", args.threads, PACKAGES)
        print(path, file=sys.stderr)


def arguments() -> argparse.Namespace:
    demo = DemoConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also the peers from PyPI that are installed")
    parser.add_argument("--trainers", nargs="+", metavar="NAME", help="only these; by default all")
    parser.add_argument("--folder", type=Path, help="snapshots step0/, step1000/, ... instead of the demo's")
    parser.add_argument("--text", type=Path, help="with --folder: the text, a document per line")
    parser.add_argument("--hook", default=demo.hook_name, help="hook point (default: %(default)s)")
    parser.add_argument(
        "--untrained",
        action="store_true",
        help="keep the first snapshots: step 0, and of the demo those before step 48",
    )
    parser.add_argument("--tokens", type=int, default=2 * demo.n_tokens, help="activations to train on, each")
    parser.add_argument("--batch-size", type=int, default=demo.batch_size)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lrs", type=float, nargs="+", default=[demo.lr], help="learning rates to choose from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and order of the data")
    parser.add_argument("--points", type=int, default=N_POINTS, help="of each curve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "crosslens-benchmark",
        help="where the activations are kept (380 MB for the demo's)",
    )
    parser.add_argument("--json", action="store_true", help="the points of the curves instead of the tables")
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    args = parser.parse_args()
    if (args.folder is None) != (args.text is None):
        parser.error("--folder and --text go together")
    return args


def activations(args: argparse.Namespace) -> cl.Activations:
    """The activations, from a cache for all runs."""
    demo = DemoConfig()
    if args.folder is None:
        name, snaps, first = "demo", cl.Snapshots.demo(0), demo.first_step
        text: Any = list(grammar.documents(demo.n_documents, 1_000_003))
    else:
        name, snaps, text, first = args.folder.name, cl.Snapshots.local(args.folder), args.text, 1
    if not args.untrained:
        snaps = snaps[[i for i, step in enumerate(snaps.steps) if step is None or step >= first]]
    acts = cl.Activations(snaps, args.hook, text, demo.n_tokens)
    return acts.cache(args.cache / f"{name}-{len(snaps)}-{args.hook}")


def trainers(args: argparse.Namespace) -> list[str]:
    """Names of the contestants."""
    names = ["crosslens", "crosslens, annealed", "crosslens, bfloat16 moments", "dense", *peers.BY_NAME]
    absent = peers.missing() if args.peers else {name: "" for name in peers.PACKAGES}
    for reason in filter(None, absent.values()):
        print(reason, file=sys.stderr)
    names = [name for name in names if name not in absent]
    unknown = set(args.trainers or ()) - set(names)
    if unknown:
        raise SystemExit(f"--trainers: {', '.join(sorted(unknown))} not among {', '.join(names)}")
    return args.trainers or names


def build(name: str, setting: Setting, base: CrosscoderTrainingSAE) -> Contestant:
    """A contestant; those of crosslens start as `base`."""
    if name in peers.BY_NAME:
        return peers.BY_NAME[name](setting)
    annealed = {"k_start": K_START * setting.k, "k_anneal_steps": int(K_ANNEAL * setting.steps)}
    sae: Any = type(base)(dataclasses.replace(base.cfg, **(annealed if name == "crosslens, annealed" else {})))
    sae.load_state_dict(base.state_dict())
    kinds: dict[str, type[Crosslens]] = {"dense": Dense, "crosslens, bfloat16 moments": CrosslensMoments}
    return kinds.get(name, Crosslens)(setting, sae)


def crosscoder(setting: Setting, acts: cl.Activations) -> CrosscoderTrainingSAE:
    """A crosscoder initialised as by `train`."""
    architecture = cl.BatchTopKCrosscoderTrainingConfig(d_sae=setting.F, k=setting.k, **ARCHITECTURE)
    return initialise(
        complete(architecture, acts, setting.device),
        acts,
        batch_size=setting.B,
        scale_tokens=100_000,
        seed=setting.seed,
    )


def train(
    runs: Mapping[Run, Contestant],
    base: CrosscoderTrainingSAE,
    acts: cl.Activations,
    setting: Setting,
    first: int,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Points of the curves: the quality of each contestant after some steps and seconds.

    Args:
        runs: the contestants.
        base: crosslens before training, for the scales and the mean of the data.
        acts: the data.
        setting: of all.
        first: batches of the data to skip, so that every seed has another order.
        args: of the command line.
    """
    scale, mean = base.activation_scale.clone(), base.b_dec.detach().clone()
    held_out = torch.cat(list(acts.held_out()))
    spent = dict.fromkeys(runs, measure.Seconds(0.0, 0.0))
    marks = {round(setting.steps * i / args.points) for i in range(1, args.points + 1)}
    points: list[dict[str, Any]] = []
    for step, raw in enumerate(acts.batches(setting.B, start=first)):
        if step in marks:
            for run, contestant in runs.items():
                points.append(
                    {
                        "benchmark": "training_run",
                        "date": datetime.date.today().isoformat(),
                        "threads": args.threads,
                        **run._asdict(),
                        "step": step,
                        "cpu_s": spent[run].cpu,
                        "wall_s": spent[run].wall,
                        **quality(contestant, held_out, scale, mean),
                    }
                )
            print(f"step {step} of {setting.steps}", file=sys.stderr)
        if step == setting.steps:
            break
        flat = (raw * scale[:, None]).flatten(1) - mean
        for run in measure.rotated(runs, step):
            contestant = runs[run]
            took = measure.timed(lambda c=contestant, x=flat if contestant.flat else raw: c.step(x), "cpu")
            spent[run] = measure.Seconds(spent[run].cpu + took.cpu, spent[run].wall + took.wall)
    return points


@torch.no_grad()
def quality(contestant: Contestant, held_out: Tensor, scale: Tensor, mean: Tensor) -> dict[str, float | None]:
    """Explained variance (mean and least over snapshots), L0 and dead features on held-out activations (N, S, D)."""
    result: dict[str, float | None] = {"ev_threshold": None, "l0_threshold": None}
    for by_threshold in (False, True) if contestant.has_threshold else (False,):
        target, error, fired, active = [], [], torch.zeros(contestant.setting.F), 0.0
        for raw in held_out.split(contestant.setting.B):
            x = raw * scale[:, None]
            centred = x.flatten(1) - mean
            features = contestant.encode(centred if contestant.flat else raw, by_threshold)
            x_hat = contestant.decode(features) + (mean if contestant.flat else 0)
            target.append(x)
            error.append((x_hat.view_as(x) - x).square().sum(-1))
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


def curves(points: Sequence[dict[str, Any]]) -> dict[Run, list[dict[str, Any]]]:
    """The points of every run, in order."""
    found: dict[Run, list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault(Run(point["name"], point["lr"], point["seed"]), []).append(point)
    return found


def best_rates(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of every contestant with the largest final EV for the first seed."""
    last = {run: curve[-1]["ev"] for run, curve in curves(points).items() if run.seed == points[0]["seed"]}
    # an EV that is NaN is the smallest
    ordered = sorted(last, key=lambda run: last[run] if last[run] == last[run] else float("-inf"))
    return {run.name: run.lr for run in ordered}


def tables(points: Sequence[dict[str, Any]]) -> str:
    """What each contestant reaches at its best learning rate, and where there are several, what it reaches at each."""
    rows = summary(points)
    text = measure.markdown(rows, COLUMNS)
    lrs = sorted({point["lr"] for point in points})
    if len(lrs) == 1:
        return text
    last = {run: curve[-1] for run, curve in curves(points).items()}
    seed = points[0]["seed"]
    by_rate = [
        {"name": row["name"]}
        | {f"{lr:g}": last[run]["ev"] for lr in lrs if (run := Run(row["name"], lr, seed)) in last}
        for row in rows
    ]
    columns = {"trainer": lambda r: r["name"]} | {f"{lr:g}": measure.number(f"{lr:g}", ".4f") for lr in lrs}
    return f"{text}\n\nEV by learning rate, seed {seed}:\n\n{measure.markdown(by_rate, columns)}"


def summary(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every contestant at its best learning rate: means over the seeds of the last points of its curves."""
    best = best_rates(points)
    chosen = {run: curve for run, curve in curves(points).items() if run.lr == best[run.name]}
    common = {
        seed: min(curve[-1]["ev"] for run, curve in chosen.items() if run.seed == seed)
        for seed in {run.seed for run in chosen}
    }
    rows: list[dict[str, Any]] = []
    for name, lr in sorted(best.items(), key=lambda item: [run.name for run in chosen].index(item[0])):
        of_seed = {run.seed: curve for run, curve in chosen.items() if run.name == name}
        last = [curve[-1] for curve in of_seed.values()]
        row = {key: None if last[0][key] is None else statistics.fmean(p[key] for p in last) for key in MEANS}
        row |= {"name": name, "lr": lr, "step": last[0]["step"], "ev_least": min(p["ev_least"] for p in last)}
        row["evs"] = ", ".join(f"{p['ev']:.4f}" for p in last)
        row["ms"] = 1e3 * row["cpu_s"] / row["step"]
        row["to_common"] = statistics.fmean(reached(curve, common[seed]) for seed, curve in of_seed.items())
        rows.append(row)
    return rows


MEANS = ("cpu_s", "wall_s", "ev", "l0", "ev_threshold", "l0_threshold", "dead_fraction")


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
    "learning rate": measure.number("lr", "g"),
    "steps": measure.number("step", "d"),
    "CPU s": measure.number("cpu_s", ".1f"),
    "wall s": measure.number("wall_s", ".1f"),
    "CPU ms a step": measure.number("ms", ".0f"),
    "EV": measure.number("ev", ".4f"),
    "each seed": lambda r: r["evs"],
    "least EV": measure.number("ev_least", ".4f"),
    "L0": measure.number("l0", ".1f"),
    "EV by threshold": measure.number("ev_threshold", ".4f"),
    "L0 by threshold": measure.number("l0_threshold", ".1f"),
    "dead": measure.number("dead_fraction", ".1%"),
    "CPU s to the common EV": measure.number("to_common", ".1f"),
}


if __name__ == "__main__":
    main()
