"""What the demo finds, seed by seed: the table of docs/demo.md, from finished runs.

    for seed in 0 1 2 3 4; do crosslens demo --seed $seed --out runs/demo-$seed; done
    python benchmarks/demo_seeds.py runs/demo-0 runs/demo-1 runs/demo-2 runs/demo-3 runs/demo-4 [--report]

A run takes about six minutes on one core. Shares of a metric are of the clean one at the last snapshot. With --births
the births are counted anew, by the version at hand, from the crosscoders of the runs; nothing else is read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import measure
import pandas as pd

from crosslens.evolution.lifecycles import PRESENCE
from crosslens.pipeline.nulls import births_without_history
from crosslens.pipeline.opening import read_run
from crosslens.rundir import RunDir

PACKAGES = ("crosslens", "torch", "sae-lens", "transformers")
TASKS = ("simple", "pp", "subj_rel")
TOP = 15
SHOWN = (0.3, PRESENCE, 0.5, 0.7)


def rows(folder: Path) -> dict[str, str]:
    """The cells of one run, by row."""
    run, summary = RunDir(folder), json.loads((folder / "summary.json").read_text())
    ev = summary["explained_variance"]
    found = {
        "explained variance, mean over snapshots (least)": f"{sum(ev) / len(ev):.3f} ({min(ev):.3f})",
        "held-out L0; dead features": f"{summary['l0']:.1f}; {summary['dead_fraction']:.1%}",
    }
    counts = run.table("birth_counts")
    assert counts is not None
    found |= births(counts)
    probes = run.table("probe_presence")
    assert probes is not None
    probes = probes[probes["part"] == "within_features"].set_index("measure")
    for name, title in (("r2", "R²"), ("norm", "decoder norm")):
        values = [probes[column][name] for column in ("spearman", "spearman_low", "spearman_high")]
        found[f"probe error and {title} over the snapshots of a feature"] = "{:.2f} ({:.2f} to {:.2f})".format(*values)
    lead = summary["phases"]["statistics_lead"]
    found["largest lead of bigrams over features, at (interval)"] = (
        f"{lead['lead']:.2f}, {lead['label']} ({lead['low_step']} to {lead['high_step']})" if lead["label"] else "none"
    )
    for task in TASKS[1:]:
        right = summary["accuracy"][task]
        found[f"accuracy, {task}: first, least, last snapshot"] = f"{right[0]:.2f}, {min(right):.2f}, {right[-1]:.2f}"
    splits = run.table("split_counts")
    assert splits is not None
    found["splits, mergers, replacements (mean by chance)"] = ", ".join(
        f"{row['n']} ({row['by_chance']:.1f})" for row in splits[splits["features"] == "all"].to_dict("records")
    )
    for task in TASKS:
        one = summary["ablation"][task]
        clean = one["clean"]
        found[f"{task}: metric with the top 15 exchanged; set to zero; 15 random; as much change"] = (
            f"{one['top_k'] / clean:.0%}; {one['zeroed_k'] / clean:.0%}; {one['random_k'] / clean:.0%}; "
            f"{one['change_matched_k'] / clean:.0%}"
        )
    one = summary["ablation"]["pp"]
    found["pp: metric with the top 100 of all active features alone, the others exchanged"] = (
        f"{one['keep_k'] / one['clean']:.0%} of {one['n_active']}"
    )
    found["reconstruction only, of the clean metric: simple, pp, subj_rel"] = ", ".join(
        f"{summary['ablation'][task]['reconstruction_only'] / summary['ablation'][task]['clean']:.0%}" for task in TASKS
    )
    share = summary["transfer_to_last"]["pp"]
    steps = [int(label.removeprefix("step")) for label in summary["snapshots"]]
    found["pp: top 15 chosen at steps 128, 336, 640, exchanged at the last: share of the effect of all"] = ", ".join(
        f"{share[steps.index(step)]:.2f}" for step in (128, 336, 640)
    )
    found["pp: two exchanged together, deviation from the sum"] = f"{summary['additivity']['pp']['deviation']:.0%}"
    for name in ("removal", "ig"):
        found[f"rank agreement of effects by {name} with exchanges of single features: simple, pp, subj_rel"] = (
            ", ".join(f"{summary['spearman_ie_exact'][task][name]:.2f}" for task in TASKS)
        )
    found["completeness error of ig, most"] = f"{max(summary['completeness_error']):.2%}"
    for target in ("effect", "share"):
        for name in ("relie", "share_relie", "decodability", "snapshot", "reldec"):
            values = [summary["validation"][task][target][name][0] for task in TASKS if summary["validation"][task]]
            found[f"exact {target} and {name}: simple, pp, subj_rel"] = ", ".join(f"{v:.2f}" for v in values)
    found |= _beyond_the_index(run)
    found["readable at the first snapshot: of the top 15 of pp, of all"] = _base_rate(run)
    return found


def _beyond_the_index(run: RunDir) -> dict[str, str]:
    """What each measure says of exact effects beyond the snapshot's index, by row."""
    tables = [table for task in TASKS if (table := run.table(f"validation/{task}.summary")) is not None]
    found: dict[str, str] = {}
    for target in ("effect", "share"):
        for name in ("relie", "share_relie", "decodability", "reldec"):
            wanted = f"kind == 'within' and target == '{target}' and measure == '{name}'"
            cells = [f"{value:.2f}" for table in tables for value in table.query(wanted)["partial"]]
            found[f"exact {target} and {name}, beyond the index: simple, pp, subj_rel"] = ", ".join(cells)
    return found


def births(counts: pd.DataFrame) -> dict[str, str]:
    """The cells about births of one run, by row."""
    found: dict[str, str] = {}
    shown = ", ".join(f"{threshold:g}"[1:] for threshold in SHOWN)
    for measure_name, name in (("r2", "R²"), ("norm", "decoder norm")):
        here = counts[(counts["measure"] == measure_name) & (counts["kind"] == "all")].set_index("threshold")
        cells = [f"{int(here['born'][t])}/{int(here['born_reversed'][t])}" for t in SHOWN]
        found[f"born / born with the snapshots reversed, by {name} at {shown}"] = ", ".join(cells)
    at = counts[(counts["measure"] == "r2") & (counts["threshold"] == PRESENCE)].set_index("kind")
    found[f"born by R² at {PRESENCE}, 95 % interval"] = (
        f"{at['born_low']['all']:.0f} to {at['born_high']['all']:.0f} of {int(at['n']['all'])}"
    )
    found["of them beyond the common trend; lexical, contextual"] = (
        f"{int(at['beyond_trend']['all'])}; {int(at['born']['lexical'])} of {int(at['n']['lexical'])}, "
        f"{int(at['born']['contextual'])} of {int(at['n']['contextual'])}"
    )
    return found


def births_anew(folder: Path) -> dict[str, str]:
    """The same, counted from the crosscoder."""
    crosscoder, acts = read_run(RunDir(folder), "cpu")
    return births(births_without_history(crosscoder, acts))


def _base_rate(run: RunDir) -> str:
    """How many of the features with the largest effects at the end are initial, beside all."""
    lifecycles, effects = run.table("lifecycles"), run.table("attribution/pp")
    assert lifecycles is not None and effects is not None
    read = lifecycles[(lifecycles["measure"] == "r2") & lifecycles["origin"].notna()].set_index("feature")
    last = effects[effects["snapshot"] == effects["snapshot"].max()]
    top = [feature for feature in last.nlargest(TOP, "ie")["feature"] if feature in read.index]
    initial = read["origin"] == "initial"
    return f"{int(initial[top].sum())} of {len(top)}, {int(initial.sum())} of {len(initial)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories of the demo")
    parser.add_argument("--births", action="store_true", help="only births, counted anew")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-demo-…")
    arguments = parser.parse_args()
    found = {str(folder): (births_anew if arguments.births else rows)(folder) for folder in arguments.runs}
    names = list(next(iter(found.values())))
    table = [{"": name, **{run: cells[name] for run, cells in found.items()}} for name in names]
    body = measure.markdown(table, {key: lambda row, key=key: row[key] for key in table[0]})
    print(body)
    if arguments.report:
        print(measure.write_report("demo", "The demo, seed by seed", body, "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
