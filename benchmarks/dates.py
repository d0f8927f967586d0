"""Which date of a feature comes first? The order of the dates that `study` gives, over features of several runs.

    crosslens demo --seed 0 --out RUN0
    crosslens demo --seed 1 --out RUN1
    python benchmarks/dates.py RUN0 RUN1 ... > report.md

For each pair of dates: how many features with both have the first one earlier, at the same snapshot or later; how many
surely so, with 95 % intervals that do not overlap; and the mean difference in snapshots, with an interval from a
bootstrap over pairs of a run and a task, all features of which are drawn together. Beside the dates of
`crosslens.causal.dates` stands the snapshot from which share RelIE is half of its largest, which has no interval.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from typing import Any

import measure
import numpy as np
import pandas as pd

from crosslens.causal.attribution import Attribution
from crosslens.causal.dates import DATES, feature_dates
from crosslens.evolution.lifecycles import birth_index
from crosslens.rundir import RunDir
from crosslens.stats import bootstrap

RELIE = {"relie": "share RelIE, half"}


def dates_of(path: str) -> list[pd.DataFrame]:
    """The dates of the top features of all tasks of a run, from its tables."""
    run = RunDir(path)
    lifecycles: Any = run.table("lifecycles")
    births, accuracy = lifecycles[lifecycles["measure"] == "r2"], run.table("accuracy")
    found: list[pd.DataFrame] = []
    for name in run.table_names():
        if not name.startswith("dates/"):
            continue
        task = name.removeprefix("dates/")
        names = "attribution/{}", "attribution/{}.snapshots", "concepts/{}", "read_out/{}"
        effects, snapshots, concepts, read = (run.table(each.format(task)) for each in names)
        assert effects is not None and snapshots is not None and read is not None and accuracy is not None
        ie = Attribution.from_frames(task, effects, snapshots, len(births))
        table = feature_dates(
            ie, births=births, concepts=concepts, read=read, accuracy=accuracy[accuracy["task"] == task]
        )
        share = effects.pivot(index="feature", columns="snapshot", values="share_relie").loc[table["feature"]]
        values = np.nan_to_num(share.to_numpy(dtype=float))
        at = birth_index(values >= np.maximum(values.max(1, keepdims=True), 1e-30) / 2, 2)
        found.append(
            table.assign(relie=pd.Series(at, dtype="Int64").where(at < values.shape[1]), cell=f"{path}: {task}")
        )
    return found


def compare(table: pd.DataFrame, a: str, b: str, words: dict[str, str]) -> dict[str, Any]:
    """One pair of dates."""
    both: Any = table[table[a].notna() & table[b].notna()]
    later = (both[b] - both[a]).to_numpy(dtype=float)
    cells = pd.factorize(both["cell"])[0]
    sums, sizes = np.bincount(cells, later), np.bincount(cells)
    low, high = bootstrap(lambda picks: sums[picks].sum(1) / sizes[picks].sum(1), len(sums))
    row = {
        "first": words[a], "second": words[b], "features": len(both), "earlier": int((later > 0).sum()),
        "same": int((later == 0).sum()), "later": int((later < 0).sum()), "surely earlier": None, "surely later": None,
        "mean difference": f"{later.mean():.2f} [{low:.2f}, {high:.2f}]",
    }  # fmt: skip
    if "relie" not in (a, b):
        row["surely earlier"] = int((both[f"{a}_high"] < both[f"{b}_low"]).sum())
        row["surely later"] = int((both[f"{b}_high"] < both[f"{a}_low"]).sum())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories with studied tasks")
    table = pd.concat([each for path in parser.parse_args().runs for each in dates_of(path)], ignore_index=True)
    words = {**DATES, **RELIE}
    rows = [compare(table, a, b, words) for a, b in combinations(words, 2)]
    print(f"{len(table)} features of {table['cell'].nunique()} pairs of a run and a task\n")
    print(measure.markdown(rows, {name: measure.number(name, "") for name in rows[0]}))


if __name__ == "__main__":
    main()
