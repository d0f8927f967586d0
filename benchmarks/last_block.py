"""Where in the prompt effects sit: the demo's middle block against its last one.

At the last block nothing above the hook moves information between positions, so every effect sits at the last position
and indirect effects are direct logit attribution: a control for what is claimed at the middle block.

    python benchmarks/last_block.py [--seed 0]
"""

from __future__ import annotations

import argparse

import crosslens as cl
from crosslens import grammar
from crosslens.attribution import mean_gradient, quadrature


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    snaps = cl.Snapshots.demo(seed)
    documents = list(grammar.documents(2_000, seed + 1))
    for block in range(1, snaps.n_layers):
        hook = f"blocks.{block}.hook_resid_post"
        acts = cl.Activations(snaps, hook, documents, 40_000, seed=seed)
        config = cl.TrainConfig(batch_size=1024, lr=1.5e-3, dead_tokens=50_000, evaluate=False, training_tokens=80_000)
        cc = cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=512, k=16, decoder_init_norm=None), config)
        runs = cl.PromptRuns(cc, snaps, cl.Task.demo("pp", n=50, seed=seed), paired=True)
        nodes, weights = quadrature("gauss_legendre", 10)
        last, total = 0.0, 0.0
        for batch, run, patch in runs.clean():
            end, start = run.acts[:, :, -1], patch.acts[:, :, -1]
            model = snaps.model(len(snaps) - 1)
            gradient = mean_gradient(runs, model, batch, run, start, end, nodes, weights)
            size = ((end - start) * gradient).sum(-1).abs()
            last, total = last + float(size[:, -1].sum()), total + float(size.sum())
        print(f"{hook}: {last / total:.4%} of the absolute effect sits at the last position")


if __name__ == "__main__":
    main()
