"""Do the intervals of births hold the true births? Planted traps, over the number of held-out tokens per dimension.

    python benchmarks/birth_intervals.py [--seeds 8] [--report]

Features are those that were planted (`planted.PlantedTraps`), so that nothing but the reading of R2 can err. The truth
is the birth by R2 on 100,000 tokens. Printed are the shares of births in their 95 % interval, dated exactly, and
early and late, beside the share of features that are not born and seem to be.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import measure
import numpy as np
import pandas as pd
import torch
from planted.traps import PlantedTraps, Trap

from crosslens.crosscoders import StandardCrosscoder, StandardCrosscoderConfig
from crosslens.evolution.births import date_births
from crosslens.evolution.held_out import hold
from crosslens.evolution.lifecycles import PRESENCE, birth_index
from crosslens.evolution.presence import Decodability, measure_decodability

PER_DIMENSION = (4, 8, 20, 25, 100)


def read(traps: PlantedTraps) -> Decodability:
    """R2 of the planted features themselves."""
    values = traps.held_out_values()
    S, D = traps.n_snapshots, traps.d_model
    crosscoder = StandardCrosscoder(StandardCrosscoderConfig(d_in=S * D, d_sae=values.shape[1], n_snapshots=S))
    crosscoder.requires_grad_(False)
    blocks = values.split([len(x) for x in traps.held_out()])
    return measure_decodability(crosscoder, hold(crosscoder, traps, zip(traps.held_out(), blocks, strict=True)))


def judge(seed: int, per_dimension: int, truth: np.ndarray) -> dict[str, Any]:
    """Shares of one draw, given the R2 of the best predictions."""
    trap = Trap()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few tokens are the point
        traps = PlantedTraps(trap, seed, n_held_out=per_dimension * trap.d_model)
        found = read(traps)
    S = trap.n_snapshots
    true = birth_index(truth / truth.max(1, keepdims=True) >= PRESENCE, 2)
    curves = np.nan_to_num(found.r2).clip(0)
    known = curves.max(1) >= 0.05
    dated = date_births(found, "r2", known, presence=PRESENCE)
    read_at = birth_index(curves / curves.max(1, keepdims=True).clip(1e-9) >= PRESENCE, 2)
    low, high = (dated[f"birth_{end}"].to_numpy(dtype=float, na_value=np.nan) for end in ("low", "high"))
    born = known & (true > 0) & (true < S)
    unborn = known & (true == 0)
    return {
        "tokens per dimension": per_dimension,
        "seed": seed,
        "covered": float(((low <= true) & (true <= high))[born].mean()),
        "exact": float((read_at == true)[born].mean()),
        "early": float((read_at < true)[born].mean()),
        "late": float((read_at > true)[born].mean()),
        "false births": float(((read_at > 0) & (read_at < S))[unborn].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-birth-intervals-…")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        truth = PlantedTraps(Trap(), seed).truth()
        rows += [judge(seed, per, truth) for per in PER_DIMENSION]
    table = pd.DataFrame(rows).groupby("tokens per dimension").mean().drop(columns="seed")
    print(table.round(3).to_string())
    if arguments.report:
        columns = {str(name): measure.number(str(name), ".3f") for name in table.columns}
        columns = {table.index.name: measure.number(table.index.name, ".0f"), **columns}
        body = f"{arguments.seeds} seeds.\n\n{measure.markdown(table.reset_index().to_dict('records'), columns)}"
        threads = torch.get_num_threads()
        print(
            measure.write_report("birth-intervals", "Intervals of births", body, "cpu", threads, ("crosslens", "torch"))
        )


if __name__ == "__main__":
    main()
