"""What the auxiliary loss of dead features does: its weight at the start, and dead features and EV at the end.

1. At the start, for S * D from 128 to 4,096: the auxiliary loss divided by the squared error, where a tenth of the
   features are taken for dead. It must not depend on S * D. With the decoder norm that reconstructs best, the error
   itself is smaller in narrow data, where k random directions explain more; so the default norm is measured, too.
2. After training with several coefficients: explained variance (mean and least over the snapshots), and dead features,
   on held-out activations. Data are planted (two widths), the demo's, and those of a folder of snapshots.

    python benchmarks/auxiliary.py --report
    python benchmarks/auxiliary.py --folder snapshots/english-2l --text agreement.txt --seeds 0 1 2 --report
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from planted.regimes import Planted, Regime
from sae_lens.saes.sae import TrainStepInput

import crosslens as cl
from crosslens.cli.demo import DemoConfig
from crosslens.synthetic import grammar
from crosslens.training.evaluation import reconstruction_table
from crosslens.training.initialisation import initialise
from crosslens.training.run import complete

WIDTHS = ((8, 16), (16, 16), (8, 64), (16, 64), (8, 256), (32, 64), (8, 512), (64, 64))
"""(S, D) with S * D from 128 to 4,096."""
COEFFICIENTS = (0.0, 1 / 32, 1 / 8, 1.0)
F, K, BATCH, STEPS, DEAD_TOKENS = 1024, 16, 512, 600, 25_000
PACKAGES = ("crosslens", "torch", "sae-lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder of snapshots, besides the demo's")
    parser.add_argument("--text", type=Path, help="text for it, one document per line")
    parser.add_argument("--hook", default="blocks.0.hook_resid_post", help="hook point in it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="activations at .* are mostly a constant")
    starts = [at_the_start(planted(S, D, seed), seed) for S, D in WIDTHS for seed in args.seeds]
    print(first := measure.markdown(starts, START_COLUMNS), flush=True)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name, acts in sources(args, seed):
            for coefficient in COEFFICIENTS:
                rows.append({"data": name, "seed": seed, **after_training(acts, coefficient, args.steps, seed)})
                print(rows[-1], flush=True)
    print(second := measure.markdown(means(rows), END_COLUMNS))
    if args.report:
        spread = [row["default"] for row in starts]
        body = (
            f"{first}\n\nLargest ratio divided by the smallest: {max(spread) / min(spread):.3f}.\n\n{second}\n\n"
            f"{F} features, k = {K}, {args.steps} steps of {BATCH} tokens, dead after {DEAD_TOKENS:,} tokens without "
            f"firing; means over seeds {', '.join(map(str, args.seeds))}, the worst seed in brackets."
        )
        print(measure.write_report("auxiliary", "The auxiliary loss", body, "cpu", 1, PACKAGES))


def planted(S: int, D: int, seed: int) -> Planted:
    return Planted(Regime(n_features=256, d_model=D, n_snapshots=S), seed, keep=True)


def architecture(coefficient: float) -> cl.BatchTopKCrosscoderTrainingConfig:
    return cl.BatchTopKCrosscoderTrainingConfig(d_sae=F, k=K, aux_loss_coefficient=coefficient, topk_threshold_lr=0.02)


def at_the_start(acts: cl.Activations, seed: int) -> dict[str, Any]:
    """The losses of the first batch of a fresh crosscoder, a tenth of whose features are taken for dead."""
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[: F // 10]] = True
    batch = next(iter(acts.batches(BATCH)))
    row: dict[str, Any] = {"S": acts.n_snapshots, "D": acts.d_model, "seed": seed}
    for name, norm in (("default", architecture(0.0).decoder_init_norm), ("searched", None)):
        given = dataclasses.replace(architecture(1 / 32), decoder_init_norm=norm)
        sae = initialise(complete(given, acts, "cpu"), acts, batch_size=BATCH, scale_tokens=20_000, seed=seed)
        step = TrainStepInput(batch, {}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
        losses = sae.training_forward_pass(step).losses
        row[name] = losses["auxiliary_reconstruction_loss"].item() / losses["mse_loss"].item()
        flat = sae.process_sae_in(batch)
        row["variance"] = float((flat - flat.mean(0)).square().sum(1).mean())
        row["of_variance"] = losses["auxiliary_reconstruction_loss"].item() / row["variance"]
    return row


def sources(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, cl.Activations]]:
    """The data of one seed, by name."""
    for S, D in ((8, 64), (32, 64)):
        yield f"planted, S·D = {S * D}", planted(S, D, seed)
    demo = DemoConfig()
    documents = list(grammar.documents(demo.n_documents, seed + 1_000_003))
    snaps = cl.Snapshots.demo(seed)
    snaps = snaps[[i for i, step in enumerate(snaps.steps) if step >= demo.first_step]]
    acts = cl.Activations(snaps, demo.hook_name, documents, demo.n_tokens, seed=seed)
    with tempfile.TemporaryDirectory() as cache:
        yield "demo", acts.cache(Path(cache) / "demo")
    if args.folder is not None:
        acts = cl.Activations(cl.Snapshots.local(args.folder), args.hook, args.text, demo.n_tokens, seed=seed)
        with tempfile.TemporaryDirectory() as cache:
            yield args.folder.name, acts.cache(Path(cache) / "folder")


def after_training(acts: cl.Activations, coefficient: float, steps: int, seed: int) -> dict[str, Any]:
    """Explained variance and dead features on held-out activations."""
    config = cl.TrainConfig(
        training_tokens=steps * BATCH,
        batch_size=BATCH,
        lr=1.5e-3,
        dead_tokens=DEAD_TOKENS,
        scale_tokens=20_000,
        evaluate=False,
        seed=seed,
    )
    table = reconstruction_table(cl.train(acts, architecture(coefficient), config), acts)
    ev = table["explained_variance"]
    return {
        "coefficient": coefficient,
        "ev": float(ev.mean()),
        "ev_least": float(ev.min()),
        "dead": float(table["dead_fraction"].iloc[0]),
        "l0": float(table["l0"].mean()),
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per source and coefficient: the mean over seeds, and the worst seed."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["coefficient"]), []).append(row)
    return [
        {
            "data": data,
            "coefficient": coefficient,
            **{name: statistics.fmean(row[name] for row in group) for name in ("ev", "ev_least", "dead", "l0")},
            "worst": min(row["ev"] for row in group),
            "most_dead": max(row["dead"] for row in group),
        }
        for (data, coefficient), group in groups.items()
    ]


START_COLUMNS = {
    "S": measure.number("S", "d"),
    "D": measure.number("D", "d"),
    "seed": measure.number("seed", "d"),
    "variance": measure.number("variance", ".0f"),
    "auxiliary / squared error": measure.number("default", ".4f"),
    "the same, searched norm": measure.number("searched", ".4f"),
    "auxiliary / variance": measure.number("of_variance", ".4f"),
}
END_COLUMNS = {
    "data": lambda row: row["data"],
    "coefficient": measure.number("coefficient", ".4g"),
    "EV": lambda row: f"{row['ev']:.4f} ({row['worst']:.4f})",
    "least EV of a snapshot": measure.number("ev_least", ".4f"),
    "dead": lambda row: f"{row['dead']:.1%} ({row['most_dead']:.1%})",
    "L0": measure.number("l0", ".2f"),
}


if __name__ == "__main__":
    main()
