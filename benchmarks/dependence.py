"""What do the results about evolution depend on? Several crosscoders of the demo's middle block.

    frontier   explained variance against L0, for a crosscoder and for one SAE per snapshot with as many parameters
    seed       another training seed: which share of features do both find, and do they date them the same way?
    size       8 and 32 times d_model: does the interval with the most rotation change?
    snapshots  every other snapshot left out: the same features, the same births?
    warmup     a model pretrained with another learning rate warmup: does the interval follow it?

    python benchmarks/dependence.py [--parts frontier,seed] [--steps 400] [--report]

All parts take about 25 minutes on one core. Crosscoders are BatchTopK with k annealed over the first half of the steps.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import pandas as pd
import torch

import crosslens as cl
from crosslens.cli.demo import DemoConfig
from crosslens.evolution.seeds import compare_evolutions, compare_features
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig
from crosslens.training.evaluation import reconstruction_table

HOOK = "blocks.1.hook_resid_post"
PARTS = ("frontier", "seed", "size", "snapshots", "warmup")
K, FEATURES, BATCH = 16, 1024, 1024
FRONTIER = (4, 8, 16, 32)
WARMUPS = (30, 240)  # steps; the first is the demo's
DENSE_STEPS = (0, 16, 32, 48, 64, 96, 128, 176, 224, 272, 336, 448, 640)
PACKAGES = ("crosslens", "torch", "sae-lens", "transformers")


class Bench:
    """Activations and crosscoders of the demo, made on first use.

    Args:
        folder: for the activations.
        n_tokens: activations to train on.
        steps: training steps of every crosscoder.
    """

    def __init__(self, folder: Path, n_tokens: int, steps: int) -> None:
        self.folder, self.n_tokens, self.steps = folder, n_tokens, steps
        self.documents = list(grammar.documents(n_tokens // 20, 1_000_003))
        self._made: dict[Any, cl.crosscoders.Crosscoder] = {}

    def acts(self, snaps: cl.Snapshots, name: str) -> cl.Activations:
        return cl.Activations(snaps, HOOK, self.documents, self.n_tokens, seed=0).cache(self.folder / name)

    def crosscoder(self, acts: cl.Activations, name: str, *, k: int = K, d_sae: int = FEATURES, seed: int = 0) -> Any:
        key = (name, k, d_sae, seed)
        if key not in self._made:
            self._made[key] = cl.train(
                acts,
                cl.BatchTopKCrosscoderTrainingConfig(
                    d_sae=d_sae, k=k, k_start=12 * k, k_anneal_steps=self.steps // 2, topk_threshold_lr=0.02,
                    decoder_init_norm=None,
                ),
                cl.TrainConfig(
                    training_tokens=self.steps * BATCH, batch_size=BATCH, lr=1.5e-3, dead_tokens=50_000, seed=seed,
                    evaluate=False,
                ),
            )  # fmt: skip
        return self._made[key]


def frontier(bench: Bench, snaps: cl.Snapshots) -> pd.DataFrame:
    """L0 and explained variance (mean and minimum over snapshots) by k, for both kinds of dictionary."""
    acts = bench.acts(snaps, "all")
    single = [bench.acts(snaps[[s]], f"only{s}") for s in range(len(snaps))]
    rows: list[dict[str, Any]] = []
    for k in FRONTIER:
        tables = {
            "crosscoder": reconstruction_table(bench.crosscoder(acts, "all", k=k), acts),
            "one SAE per snapshot": pd.concat(
                [reconstruction_table(bench.crosscoder(own, f"only{s}", k=k), own) for s, own in enumerate(single)]
            ),
        }
        for name, table in tables.items():
            variance = table["explained_variance"]
            rows.append(
                {
                    "dictionary": name,
                    "k": k,
                    "L0": table["l0"].mean(),
                    "EV, mean": variance.mean(),
                    "EV, least": variance.min(),
                    "EV, last": variance.iloc[-1],
                    "dead": table["dead_fraction"].mean(),
                }
            )
    return pd.DataFrame(rows)


def compare(
    bench: Bench, acts: cl.Activations, others: dict[str, tuple[cl.crosscoders.Crosscoder, cl.Activations]]
) -> str:
    """Agreement of crosscoders of the same model with the demo's, and summary statistics of each."""
    first = bench.crosscoder(acts, "all")
    agreements = {name: compare_features(first, other, acts, acts_b=own) for name, (other, own) in others.items()}
    table = pd.DataFrame(agreements).T.rename_axis("crosscoder").reset_index()
    return _markdown(table) + "\n\n" + _markdown(compare_evolutions({"the demo's": (first, acts), **others}))


def seed(bench: Bench, snaps: cl.Snapshots) -> str:
    acts = bench.acts(snaps, "all")
    return compare(bench, acts, {"seed 1": (bench.crosscoder(acts, "all", seed=1), acts)})


def size(bench: Bench, snaps: cl.Snapshots) -> str:
    acts = bench.acts(snaps, "all")
    return compare(bench, acts, {"32 times d_model": (bench.crosscoder(acts, "all", d_sae=32 * acts.d_model), acts)})


def snapshots(bench: Bench, snaps: cl.Snapshots) -> str:
    some = sorted({*range(0, len(snaps), 2), len(snaps) - 1})
    few = bench.acts(snaps[some], "few")
    return compare(bench, bench.acts(snaps, "all"), {f"{len(some)} snapshots": (bench.crosscoder(few, "few"), few)})


def warmup(bench: Bench) -> str:
    """Compare two pretraining runs that differ only in the warmup, with closely spaced snapshots."""
    found: dict[str, tuple[cl.crosscoders.Crosscoder, cl.Activations]] = {}
    for steps in WARMUPS:
        snaps = cl.Snapshots.demo(0, config=PretrainingConfig(warmup_steps=steps, snapshot_steps=DENSE_STEPS))
        acts = bench.acts(snaps, f"warmup{steps}")
        found[f"warmup of {steps} steps"] = (bench.crosscoder(acts, f"warmup{steps}"), acts)
    return _markdown(compare_evolutions(found))


def _markdown(table: pd.DataFrame) -> str:
    def show(value: Any) -> str:
        return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

    return measure.markdown(
        table.astype(object).to_dict("records"),
        {str(name): lambda row, name=name: show(row[name]) for name in table.columns},
    )


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="training steps of a crosscoder")
    parser.add_argument("--tokens", type=int, default=80_000, help="activations to train on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="folder for activations; a temporary one by default")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-dependence-…")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    body: list[str] = []
    with _folder(arguments.folder) as folder:
        bench, snaps = Bench(folder, arguments.tokens, arguments.steps), cl.Snapshots.demo(0)
        snaps = snaps[[i for i, step in enumerate(snaps.steps) if step >= DemoConfig().first_step]]
        for part in parts:
            if part == "frontier":
                text = _markdown(frontier(bench, snaps))
            elif part == "warmup":
                text = warmup(bench)
            else:
                text = {"seed": seed, "size": size, "snapshots": snapshots}[part](bench, snaps)
            body.append(f"## {part.capitalize()}\n\n{text}")
            print(body[-1], end="\n\n", flush=True)
    if arguments.report:
        title = "What results about evolution depend on"
        print(measure.write_report("dependence", title, "\n\n".join(body), "cpu", arguments.threads, PACKAGES))


if __name__ == "__main__":
    main()
