"""What makes more features agree between seeds? And which snapshots resolve the first phase of training?

    agreement  the demo's middle block, nine trained snapshots: F, k, length, learning rate, initialisation, data order,
               auxiliary loss, each trained from several seeds and compared by `cl.evolution.compare_seeds`
    floors     the same for features above a firing rate
    phases     KL of unigrams and bigrams at early snapshots of the demo's model, and the largest part of the fall of
               the bigram KL in one interval

    python benchmarks/seeds.py [--parts agreement,floors] [--folder FOLDER] [--report]

Every training takes about a minute on one core, all of it 45. With --folder, crosscoders that are there are not trained
again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch

import crosslens as cl
from crosslens.cli.demo import DemoConfig
from crosslens.evolution.seeds import consensus_shares, match, match_shares
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig, demo_batches
from crosslens.training.evaluation import reconstruction_table

PARTS = ("agreement", "floors", "phases")
PACKAGES = ("crosslens", "torch", "sae-lens", "transformers")
FLOORS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2)
DEMO = DemoConfig()
EARLY = (2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96)


@dataclass(frozen=True)
class Setting:
    """One way to train, and from how many seeds."""

    d_sae: int = 256
    k: int = 8
    epochs: int = 8
    lr: float = DEMO.lr
    seeds: int = 2
    k_start: int | None = None
    aux: float = 1 / 32
    shared: bool = False
    own_order: bool = False

    @property
    def name(self) -> str:
        more = [f"{self.epochs} epochs", f"lr {self.lr:g}"]
        if self.k_start:
            more.append(f"k from {self.k_start}")
        if self.aux != 1 / 32:
            more.append(f"auxiliary coefficient {self.aux:g}")
        if self.shared:
            more.append("rows equal at the start")
        if self.own_order:
            more.append("each seed its own order")
        return f"F={self.d_sae}, k={self.k}, {', '.join(more)}"


GRID = tuple(Setting(F, k) for F in (128, 256, 512) for k in (4, 8, 16))
CHANGES = (
    Setting(own_order=True),
    Setting(shared=True),
    Setting(k_start=32),
    Setting(aux=1 / 4),
    Setting(lr=1.5e-3),
    Setting(epochs=16),
    Setting(128, 16, epochs=16, lr=1.5e-3, seeds=3),
)
SETTINGS = (*GRID, *CHANGES)


def crosscoders(folder: Path, acts: cl.Activations, setting: Setting) -> list[cl.crosscoders.Crosscoder]:
    """The crosscoders of all seeds, trained unless they are in the folder."""
    found: list[cl.crosscoders.Crosscoder] = []
    for seed in range(setting.seeds):
        place = folder / f"{setting.name}, seed {seed}".replace(" ", "_")
        if not (place / "cfg.json").exists():
            data = acts
            if setting.own_order:
                data = copy.copy(acts)
                data.seed = 1000 + seed  # of the batches: the sequences are already split by the first
            total = DEMO.n_tokens * setting.epochs
            architecture = cl.BatchTopKCrosscoderTrainingConfig(
                d_sae=setting.d_sae,
                k=setting.k,
                k_start=setting.k_start,
                k_anneal_steps=total // DEMO.batch_size // 2 if setting.k_start else 0,
                topk_threshold_lr=0.02,
                aux_loss_coefficient=setting.aux,
                decoder_init="shared" if setting.shared else "independent",
            )
            config = cl.TrainConfig(
                training_tokens=total, batch_size=DEMO.batch_size, lr=setting.lr, dead_tokens=50_000, evaluate=False,
                seed=seed, device="cpu",
            )  # fmt: skip
            cl.train(data, architecture, config).save(place)
        found.append(cl.load(place, device="cpu"))
    return found


def agreement(acts: cl.Activations, setting: Setting, ccs: list[cl.crosscoders.Crosscoder], floor: float) -> dict:
    """A row of the table: means over pairs of seeds in both directions, with the range where it is given."""
    evaluated = [reconstruction_table(cc, acts) for cc in ccs]
    found = cl.evolution.compare_seeds({str(i): cc for i, cc in enumerate(ccs)}, acts, min_rate=floor)
    pairs, shares = found["seeds"], consensus_shares(found["consensus"])
    by_cosine = [
        match_shares(match(a, b, acts, by="decoder", min_rate=floor))["cosine_a"]
        for i, a in enumerate(ccs)
        for b in ccs[i + 1 :]
    ]
    both = {name: pairs[[f"{name}_a", f"{name}_b"]].to_numpy() for name in ("share", "variance", "nearest")}
    row = {
        "setting": setting.name,
        "seeds": len(ccs),
        "rate above": floor,
        "EV": np.mean([table["explained_variance"].mean() for table in evaluated]),
        "least EV": np.mean([table["explained_variance"].min() for table in evaluated]),
        "dead": np.mean([table["dead_fraction"].mean() for table in evaluated]),
        "live": shares["alive"].mean(),
        "partner": f"{both['share'].mean():.3f} ({both['share'].min():.3f} to {both['share'].max():.3f})",
        "of variance": f"{both['variance'].mean():.3f} ({both['variance'].min():.3f} to {both['variance'].max():.3f})",
        "any neighbour": both["nearest"].mean(),
        "by decoder": np.mean(by_cosine),
        "null": pairs["null_a"].mean(),
    }
    for name in ("consensus", "consensus_variance", "unanimous", "unanimous_variance"):
        row[name.replace("_", ", ")] = shares[name].mean() if len(ccs) > 2 else None
    return row


def phases(folder: Path) -> str:
    """Curves at early snapshots, and where the bigram KL falls."""
    steps = tuple(sorted({*PretrainingConfig().snapshot_steps, *EARLY}))
    config = PretrainingConfig(snapshot_steps=steps)
    cl.synthetic.pretrain_demo(folder / "early", 0, config=config, progress=False)
    snaps = cl.Snapshots.local(folder / "early")
    acts = _acts(snaps)
    counts = cl.evolution.count_ngrams(islice(demo_batches(0), config.n_steps), snaps.tokenizer)
    table = cl.evolution.measure_dynamics(snaps, counts, acts.held_out_tokens()).to_frame()
    columns = ["step", "kl1", "kl1_low", "kl1_high", "kl2", "kl2_low", "kl2_high", "loss", "bigram_progress"]
    text = _markdown(pd.DataFrame(table[columns]))
    text += f"\n\nH1 {table['h1'].iloc[0]:.3f}, H2 {table['h2'].iloc[0]:.3f} nats.\n\n"
    progress = table.set_index("step")["bigram_progress"]
    sets = {"the demo's": PretrainingConfig().snapshot_steps, "all of these": steps}
    rows = [{"snapshots": name, **_jump(progress[list(given)])} for name, given in sets.items()]
    return text + _markdown(pd.DataFrame(rows))


def _jump(progress: pd.Series) -> dict:
    rises = progress.diff()
    at = int(np.nanargmax(rises))
    return {"steps": len(progress), "largest rise": float(rises.iloc[at]), "from step": int(progress.index[at - 1]),
            "to step": int(progress.index[at])}  # fmt: skip


def _acts(snaps: cl.Snapshots) -> cl.Activations:
    documents = list(grammar.documents(DEMO.n_documents, 1_000_003))
    return cl.Activations(snaps, DEMO.hook_name, documents, DEMO.n_tokens, seed=0)


def _markdown(table: pd.DataFrame) -> str:
    def show(value: object) -> str:
        if value is None or value != value:  # a consensus needs three seeds
            return ""
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return measure.markdown(
        table.astype(object).to_dict("records"),
        {str(name): lambda row, name=name: show(row[name]) for name in table.columns},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="folder for crosscoders and activations; a temporary one by default"
    )
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-seeds-…")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    body: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        if "agreement" in parts or "floors" in parts:
            every = cl.Snapshots.demo(0)
            acts = _acts(every[[i for i, step in enumerate(every.steps) if step >= DEMO.first_step]]).cache(
                folder / "activations"
            )
        if "agreement" in parts:
            rows = [agreement(acts, each, crosscoders(folder, acts, each), 0.0) for each in SETTINGS]
            body.append(f"## Agreement\n\n{_markdown(pd.DataFrame(rows).drop(columns='rate above'))}")
        if "floors" in parts:
            chosen = [Setting(), Setting(512, 16), CHANGES[-1]]
            rows = [agreement(acts, each, crosscoders(folder, acts, each), f) for each in chosen for f in FLOORS]
            body.append(f"## Floors\n\n{_markdown(pd.DataFrame(rows).drop(columns=['EV', 'least EV', 'dead']))}")
        if "phases" in parts:
            body.append(f"## Phases\n\n{phases(folder)}")
    print("\n\n".join(body))
    if arguments.report:
        title = "Seeds: what makes features agree, and snapshots that resolve the first phase"
        print(measure.write_report("seeds", title, "\n\n".join(body), "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
