"""How many births does a crosscoder show over trained models that have no order?

The demo's model is pretrained from several seeds. A crosscoder over these models, trained and read as the
demo's is, has features of all kinds, and no model comes before another: each birth in it is false.

1. Per draw, as many models as the demo has snapshots, each from a seed of its own, and one crosscoder.
2. Births by each reading, kind of feature and threshold: in the order of the seeds, and the mean over random orders,
   which are all equally good. The spread is that over draws.
3. The threshold up to which births of contextual features stay below 5 %, in the mean over draws.
4. With --runs: which share of the features of a demo's crosscoder have a partner in these, whose models are unrelated.

    python benchmarks/exchangeable.py [--draws 3] [--models 9] [--steps 640] [--folder FOLDER]
        [--runs RUN ...] [--report]

A model takes about a minute on one core and a crosscoder two; with --folder, what is there is not trained again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch

import crosslens as cl
from crosslens.cli.demo import DemoConfig
from crosslens.evolution.births import NAMES, presence_curves
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.held_out import read
from crosslens.evolution.lifecycles import birth_index
from crosslens.evolution.partners import shares_by_kind
from crosslens.evolution.presence import measure_decodability
from crosslens.pipeline.opening import read_run
from crosslens.rundir import RunDir
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig
from crosslens.training.evaluation import reconstruction_table

DEMO = DemoConfig()
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ORDERS = 200
BAR = 0.05
PACKAGES = ("crosslens", "torch", "sae-lens", "transformers")


def models(folder: Path, seeds: range, steps: int) -> cl.Snapshots:
    """The demo's model after a training of some steps, a seed each."""
    config = PretrainingConfig(n_steps=steps, snapshot_steps=(steps,))
    places = {
        f"seed{seed}": cl.synthetic.pretrain_demo(folder / f"model{seed}", seed, config=config, progress=False)
        for seed in seeds
    }
    return cl.Snapshots.of({label: str(place / f"step{steps}") for label, place in places.items()})


def crosscoder(folder: Path, snaps: cl.Snapshots, draw: int) -> tuple[cl.crosscoders.Crosscoder, cl.Activations]:
    """Trained as the demo's is, unless it is in the folder."""
    documents = list(grammar.documents(DEMO.n_documents, draw + 1_000_003))
    acts = cl.Activations(snaps, DEMO.hook_name, documents, DEMO.n_tokens, seed=draw)
    place = folder / f"crosscoder{draw}"
    if not (place / "cfg.json").exists():
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            architecture = cl.BatchTopKCrosscoderTrainingConfig(d_sae=DEMO.d_sae, k=DEMO.k, topk_threshold_lr=0.02)
            config = cl.TrainConfig(
                training_tokens=DEMO.epochs * DEMO.n_tokens, batch_size=DEMO.batch_size, lr=DEMO.lr,
                dead_tokens=50_000, evaluate=False, seed=draw, device="cpu",
            )  # fmt: skip
            cl.train(acts.cache(cache), architecture, config).save(place)
    return cl.load(place, device="cpu"), acts


def births(cc: cl.crosscoders.Crosscoder, acts: cl.Activations, draw: int) -> pd.DataFrame:
    """A row per reading, kind and threshold: features with the reading, shares of them that are born."""
    held, rng = read(cc, acts), np.random.default_rng(draw)
    found = measure_decodability(cc, held)
    curves = presence_curves(cc.decoder_norms, found, (measure_firing(cc, held).rate > 0).numpy())
    orders = np.argsort(rng.random((ORDERS, cc.n_snapshots)), axis=1)
    rows: list[dict] = []
    for measure_name, values in curves.items():
        read_at = values.max(1) > 0
        relative = values / np.where(read_at, values.max(1), 1)[:, None]
        kinds = {"all": read_at, "lexical": read_at & found.lexical, "contextual": read_at & ~found.lexical}
        for threshold in THRESHOLDS:
            present = relative >= threshold
            forward = _emergent(present)
            mean = np.mean([_emergent(present[:, order]) for order in orders], 0)
            for kind, members in kinds.items():
                rows.append(
                    {
                        "draw": draw,
                        "measure": measure_name,
                        "kind": kind,
                        "threshold": threshold,
                        "n": int(members.sum()),
                        "in order": forward[members].mean() if members.any() else np.nan,
                        "any order": mean[members].mean() if members.any() else np.nan,
                    }
                )
    return pd.DataFrame(rows)


def unrelated(run: Path, draw: int, cc: cl.crosscoders.Crosscoder, snaps: cl.Snapshots) -> list[dict]:
    """Shares of the features of a run with a partner in a crosscoder over other models, a row per kind."""
    own, acts = read_run(RunDir(run), "cpu")
    other = cl.Activations(snaps, acts.hook_name, acts.dataset, seed=acts.seed, settings=acts.settings)
    table = RunDir(run).table("lifecycles")
    assert table is not None
    kinds = (
        table[table["measure"] == "r2"].set_index("feature")["kind"].reindex(range(own.cfg.d_sae)).fillna("").tolist()
    )
    pairs = cl.evolution.match(own, cc, acts, acts_b=other)
    return [{"run": run.name, "draw": draw, **row} for row in shares_by_kind(pairs, kinds).to_dict("records")]


def _emergent(present: np.ndarray) -> np.ndarray:
    """Which features are born after the first model."""
    first = birth_index(present, 2)
    return ((first > 0) & (first < present.shape[1])).astype(float)


def describe(table: pd.DataFrame) -> str:
    """Shares of births by threshold, and the thresholds that keep the bar."""
    parts: list[str] = []
    for column in ("any order", "in order"):
        rows: list[dict] = []
        for (name, kind), here in table.groupby(["measure", "kind"], sort=False):
            n = here.groupby("draw")["n"].first()
            row = {"reading": NAMES[str(name)], "kind": kind, "features": f"{n.min()} to {n.max()}"}
            for threshold, cells in here.groupby("threshold"):
                values = cells[column]
                row[f"{threshold:g}"] = f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
            rows.append(row)
        title = "Mean over random orders" if column == "any order" else "In the order of the seeds"
        parts.append(
            f"## {title}\n\n" + measure.markdown(rows, {key: lambda row, key=key: row[key] for key in rows[0]})
        )
    means = table[table["kind"] == "contextual"].groupby(["measure", "threshold"])["any order"].mean()
    for name in ("r2", "within"):
        below = [float(threshold) for threshold in THRESHOLDS if means[name, threshold] <= BAR]
        most = f"{max(below):g}" if below else "none of these"
        parts.append(f"Largest threshold with at most {BAR:.0%} contextual births by {NAMES[name]}: {most}.")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--models", type=int, default=9, help="S, as many as the demo has snapshots")
    parser.add_argument("--steps", type=int, default=PretrainingConfig().n_steps, help="of pretraining")
    parser.add_argument("--folder", type=Path, help="folder for models and crosscoders; a temporary one by default")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run directories of the demo")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-exchangeable-…")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: list[pd.DataFrame] = []
    explained: list[str] = []
    accurate: list[str] = []
    partners: list[dict] = []
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        for draw in range(arguments.draws):
            seeds = range(draw * arguments.models, (draw + 1) * arguments.models)
            snaps = models(folder, seeds, arguments.steps)
            cc, acts = crosscoder(folder, snaps, draw)
            ev = reconstruction_table(cc, acts)["explained_variance"]
            explained.append(f"{ev.mean():.3f} ({ev.min():.3f})")
            right = cl.Task.demo("pp").accuracy(snaps)["accuracy"]
            accurate.append(f"{right.mean():.2f} ({right.min():.2f})")
            found.append(births(cc, acts, draw))
            partners += [row for run in arguments.runs for row in unrelated(run, draw, cc, snaps)]
            print(f"draw {draw}: explained variance {explained[-1]}, accuracy {accurate[-1]}", flush=True)
    body = (
        f"{arguments.draws} draws of {arguments.models} models of {arguments.steps} steps, seeds 0 to "
        f"{arguments.draws * arguments.models - 1}; explained variance (least) {', '.join(explained)}; "
        f"accuracy across a phrase (least) {', '.join(accurate)}. "
        f"Share of the features with a reading that are born; mean over draws (range).\n\n{describe(pd.concat(found))}"
    )
    if partners:
        columns = {name: measure.number(name, ".3f") for name in ("shared", "shared_by_chance", "shared_variance")}
        first = {name: lambda row, name=name: str(row[name]) for name in ("run", "draw", "kind", "live")}
        body += "\n\n## Partners of the demo's features in these crosscoders\n\n"
        body += measure.markdown(partners, {**first, **columns})
    print(body)
    if arguments.report:
        print(measure.write_report("exchangeable", "Births in exchangeable models", body, "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
