"""Make the release in the package: the demo's model at half its width, and a crosscoder.

    python scripts/make_release.py [--seed 0] [--out crosslens/sharing]

1. Pretrain the demo's model with d_model 64 (`crosslens.synthetic.pretraining`) and round its weights to float16.
2. Train a BatchTopK crosscoder by the demo's recipe on the rounded snapshots from step 48 on; the others are controls.
3. Round its weights to float16, and evaluate it on held-out tokens.

This writes `sharing/releases/demo/` and `sharing/pretrained.yaml`, about 6 MB, in about three minutes on two CPU cores.
The same seed gives the same bytes on the same machine with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

import crosslens as cl
from crosslens.cli.demo import CPU, DemoConfig
from crosslens.snapshots.snapshot import tokenizer_files
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig, pretrain_demo

RELEASE = "crosslens-demo"
MODEL = PretrainingConfig(d_model=64, d_mlp=256, lr=6e-3)
DEMO = DemoConfig()
HEAD = "# Written by scripts/make_release.py; crosslens/sharing/registry.py documents the keys.\n"


def write_snapshots(folder: Path, seed: int) -> cl.Snapshots:
    """Pretrain the model and write its snapshots in float16."""
    with tempfile.TemporaryDirectory() as temporary:
        made = pretrain_demo(Path(temporary) / "demo", seed, config=MODEL)
        manifest = json.loads((made / "snapshots.json").read_text())
        for row in manifest["snapshots"]:
            target = folder / row["path"]
            target.mkdir(parents=True)
            for file in tokenizer_files(made / row["path"]):
                shutil.copy(file, target)
            config = json.loads((made / row["path"] / "config.json").read_text())
            (target / "config.json").write_text(json.dumps({**config, "dtype": "float16"}, indent=1) + "\n")
            weights = load_file(made / row["path"] / "model.safetensors")
            rounded = {name: tensor.half() for name, tensor in weights.items()}
            save_file(rounded, target / "model.safetensors", {"format": "pt"})
    about = {"name": f"{RELEASE}-seed{seed}", "seed": seed, "snapshots": manifest["snapshots"]}
    (folder / "snapshots.json").write_text(json.dumps(about, indent=1) + "\n")
    return cl.Snapshots.local(folder)


def train_crosscoder(snapshots: cl.Snapshots, seed: int) -> tuple[cl.Activations, cl.crosscoders.Crosscoder]:
    """Train the demo's crosscoder on these snapshots."""
    documents = list(grammar.documents(DEMO.n_documents, seed + 1_000_003))
    acts = cl.Activations(snapshots, DEMO.hook_name, documents, DEMO.n_tokens, seed=seed, settings=CPU)
    architecture = cl.BatchTopKCrosscoderTrainingConfig(d_sae=DEMO.d_sae, k=DEMO.k, topk_threshold_lr=0.02)
    training = cl.TrainConfig(
        training_tokens=DEMO.epochs * DEMO.n_tokens,
        batch_size=DEMO.batch_size,
        lr=DEMO.lr,
        dead_tokens=50_000,
        seed=seed,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as cache:
        return acts, cl.train(acts.cache(cache), architecture, training)


def make(out: Path, seed: int) -> None:
    """Write the release and its registry entry."""
    folder = out / "releases" / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    snapshots = write_snapshots(folder / "snapshots", seed)
    snapshots = snapshots[[s for s, step in enumerate(snapshots.steps) if step >= DEMO.first_step]]
    acts, crosscoder = train_crosscoder(snapshots, seed)
    crosscoder.cfg.metadata.dataset_path = f"crosslens.synthetic.grammar, {DEMO.n_documents} documents"
    crosscoder.to(torch.float16).save(folder / DEMO.hook_name)
    table = cl.evaluate(cl.load(folder / DEMO.hook_name, dtype="float32"), acts)
    # SAELens records the mean over training
    crosscoder.cfg.metadata.l0 = round(float(table["l0"].mean()), 2)
    crosscoder.save(folder / DEMO.hook_name)
    entry = {
        "id": DEMO.hook_name,
        "path": DEMO.hook_name,
        "hook_name": DEMO.hook_name,
        "variance_explained": round(float(table["explained_variance"].mean()), 4),
        "l0": crosscoder.cfg.metadata.l0,
        "config": {"architecture": "batchtopk_crosscoder", "d_sae": DEMO.d_sae, "n_snapshots": len(snapshots)},
    }
    release = {
        RELEASE: {
            "model": snapshots.name,
            "folder": "releases/demo",
            "licence": "MIT",
            "dataset": crosscoder.cfg.metadata.dataset_path,
            "snapshots": {"folder": "releases/demo/snapshots", "trained": snapshots.labels},
            "saes": [entry],
        }
    }
    (out / "pretrained.yaml").write_text(HEAD + yaml.safe_dump(release, sort_keys=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "crosslens" / "sharing")
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)
