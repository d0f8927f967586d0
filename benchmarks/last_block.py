"""Where in the prompt effects sit: the demo's middle block against its last one.

At the last block nothing above the hook moves information between positions, so every effect sits at the last position
and indirect effects are direct logit attribution: a control for what is claimed at the middle block.

    python benchmarks/last_block.py [--seed 0]
"""

from __future__ import annotations

import argparse

import crosslens as cl
from crosslens.cli.demo import DemoConfig
from crosslens.synthetic import grammar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    snaps = cl.Snapshots.demo(seed)
    snaps = snaps[[i for i, step in enumerate(snaps.steps) if step >= DemoConfig().first_step]]
    documents = list(grammar.documents(2_000, seed + 1))
    for block in range(1, snaps.n_layers):
        hook = f"blocks.{block}.hook_resid_post"
        acts = cl.Activations(snaps, hook, documents, 40_000, seed=seed)
        config = cl.TrainConfig(batch_size=1024, lr=1.5e-3, dead_tokens=50_000, evaluate=False, training_tokens=80_000)
        cc = cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=512, k=16, decoder_init_norm=None), config)
        task = cl.Task.demo("pp", n=50, seed=seed)
        ie = cl.attribute(cc, snaps, task, cl.causal.Estimator("ig", n_nodes=10, baseline="patch"), positions=True)
        row = ie.positions.shares().query("position == 0").iloc[-1]
        print(f"{hook}: {row['share']:.4%} of the absolute effect sits at the last position")


if __name__ == "__main__":
    main()
