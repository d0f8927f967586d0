"""Which kind of crosscoder finds a narrow change between two snapshots, and which calls what is shared new?

Trains BatchTopK crosscoders on activations where a handful of features is new at the second snapshot, on 1 % of the
tokens (`planted.narrow`): plain; with shared features; with dedicated ones; with the delta term; with several of these.
Also the L1 crosscoder, plain and with shared features at a lower penalty.

    python benchmarks/narrow_change.py --quick              # one seed: two CPU minutes
    python benchmarks/narrow_change.py --out narrow.jsonl --report

Results already in the file are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import measure as measuring
import pandas as pd
import torch
from jaxtyping import Float
from planted.narrow import NarrowChange, NarrowPair
from torch import Tensor
from torch.nn.functional import normalize

import crosslens as cl
from crosslens.crosscoders import Crosscoder
from crosslens.evolution import evolve
from crosslens.training.evaluation import reconstruction_table

SEEDS = (0, 1, 2, 3, 4)
D_SAE, STEPS, BATCH = 256, 3000, 512
EXCLUSIVE, SAME = 0.9, 0.7
"""Settings chosen on seed 10, of penalties .5, 1, 1.5, 2 and 3, 8, 16, 24 and 48 dedicated features, and delta
coefficients .3, 1, 2 and 10."""
SHARED: dict[str, Any] = {"n_shared": 160}
PARTITION: dict[str, Any] = {**SHARED, "shared_penalty": 1.5}
DEDICATED: dict[str, Any] = {"dedicated": {"step1000": 16}}
L1: dict[str, Any] = {"l1_coefficient": 0.4, "l1_warm_up_steps": STEPS // 20}
WEAK: dict[str, Any] = {**L1, "l1_coefficient": 0.1}
DELTA: dict[str, Any] = {"delta_coefficient": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared, penalty 1": SHARED,
    "shared, penalty .5": {**SHARED, "shared_penalty": 0.5},
    "shared": PARTITION,
    "dedicated": DEDICATED,
    "shared and dedicated": PARTITION | DEDICATED,
    "delta": DELTA,
    "shared and delta": PARTITION | DELTA,
    "shared, dedicated and delta": PARTITION | DEDICATED | DELTA,
    "plain, k times 4": {},
    "shared, penalty 1, k times 4": SHARED,
    "L1": L1,
    "L1, a quarter": WEAK,
    "L1, shared, penalty 1": {**L1, **SHARED},
    "L1, a quarter, shared, penalty 1": {**WEAK, **SHARED},
    "L1, shared, penalty .2": {**L1, **SHARED, "shared_penalty": 0.2},
}
SHARES = {"found_norm": "found", "false_norm": "false", "found_r2": "found by R2", "false_r2": "false by R2",
          "any": "has the direction"}  # fmt: skip
NOTES = f"""
Mean over seeds, worst seed in brackets; settings were chosen on seed 10. A feature is *called new* if at least
{EXCLUSIVE:.0%} of its decoder norm is at the second snapshot, or, in the columns "by R2", if `evolve` has it born
there. *Found*: share of the {NarrowChange.n_new} planted features with a feature called new whose direction has a
cosine of {SAME} or more with theirs. *False*: share of the live features that are called new and are near none of
them. *Has the direction*: found, called new or not. *More than plain*: found, less that of the plain BatchTopK
crosscoder of the same seed, mean and standard error over seeds. EV: of held-out activations, mean of both snapshots;
3.7 to 4.1 features are planted per token.
"""


@torch.no_grad()
def scores(crosscoder: Crosscoder, acts: NarrowPair) -> dict[str, float]:
    """What a crosscoder found of the change, and what it calls new that is not."""
    quality, evolution = reconstruction_table(crosscoder, acts), evolve(crosscoder, acts)
    alive, norms = evolution.alive, crosscoder.decoder_norms
    cosines = normalize(crosscoder.W_dec_by_snapshot[:, 1], dim=-1) @ acts.new.T
    by_r2 = torch.from_numpy((evolution.lifecycles("r2")["birth"] == 1).fillna(False).to_numpy(bool))
    found: dict[str, float] = {
        "explained_variance": float(quality["explained_variance"].mean()),
        "l0": float(quality["l0"].mean()),
        "live": int(alive.sum()),
        "any": _found(alive, cosines),
    }
    for name, called in (("norm", norms[:, 1] >= EXCLUSIVE * norms.sum(1)), ("r2", by_r2)):
        called = called & alive
        false = called & (cosines.amax(1) < SAME)
        found |= {f"found_{name}": _found(called, cosines), f"false_{name}": float(false.sum() / alive.sum())}
        found[f"called_{name}"] = int(called.sum())
    return found


def _found(called: Tensor, cosines: Float[Tensor, "F n"]) -> float:
    return float((cosines[called].amax(0) >= SAME).float().mean()) if called.any() else 0.0


def run(variant: str, seed: int, change: NarrowChange, steps: int) -> dict[str, Any]:
    """Train and score."""
    began = time.process_time()
    acts = NarrowPair(change, seed)
    kind: Any = cl.StandardCrosscoderTrainingConfig
    if not variant.startswith("L1"):
        kind = partial(cl.BatchTopKCrosscoderTrainingConfig, k=acts.l0 * (4 if variant.endswith("times 4") else 1))
    config = cl.TrainConfig(
        training_tokens=steps * BATCH, batch_size=BATCH, lr=2e-3, dead_tokens=50_000, scale_tokens=20_000, seed=seed
    )
    crosscoder = cl.train(acts, kind(d_sae=D_SAE, **VARIANTS[variant]), config)
    found = scores(crosscoder, acts)
    return {"variant": variant, "seed": seed, "steps": steps, **found, "cpu": time.process_time() - began}


def table(results: list[dict[str, Any]]) -> str:
    """A row per variant."""
    rows: list[dict[str, Any]] = []
    frame = pd.DataFrame(results)
    plain = frame[frame["variant"] == "plain"].set_index("seed")["found_norm"]
    for variant, group in frame.groupby("variant", sort=False):
        more = (group.set_index("seed")["found_norm"] - plain).dropna()
        worst = {name: (group[name].max if name.startswith("false") else group[name].min)() for name in SHARES}
        error = more.std() / len(more) ** 0.5 if len(more) > 1 else float("nan")
        row = {f"worst_{name}": each for name, each in worst.items()} | {"variant": variant, "seeds": len(group)}
        rows.append(row | {"more": f"{more.mean():+.3f} ± {error:.3f}", **group.mean(numeric_only=True)})

    def share(name: str) -> Any:
        return lambda row: f"{row[name]:.3f} [{row[f'worst_{name}']:.3f}]"

    columns = {"crosscoder": lambda row: row["variant"], **{title: share(name) for name, title in SHARES.items()}}
    columns["more than plain"] = lambda row: row["more"]
    for title, name, form in (("EV", "explained_variance", ".4f"), ("L0", "l0", ".1f"), ("live", "live", ".0f"),
                              ("seeds", "seeds", "d"), ("CPU s", "cpu", ".0f")):  # fmt: skip
        columns[title] = measuring.number(name, form)
    return measuring.markdown(rows, columns)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--variants", default=";".join(VARIANTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    change = NarrowChange()
    for seed in [0] if args.quick else [int(seed) for seed in args.seeds.split(",")]:
        for variant in args.variants.split(";"):
            if any((each["variant"], each["seed"]) == (variant, seed) for each in done):
                continue
            done.append(run(variant, seed, change, STEPS))
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
            print(done[-1], file=sys.stderr)
    body = f"{table(done)}\n{NOTES}"
    print(body)
    if args.report:
        measuring.write_report("narrow-change", "A narrow change", body, "cpu", 1, ("crosslens", "torch", "sae-lens"))


if __name__ == "__main__":
    main()
