"""The numbers of a study, claim by claim, from the tables of finished runs, as one JSON file.

    python benchmarks/english/summary.py runs/english/study --pretraining runs/english/seed0/pretraining.json \
        --accuracy runs/english/accuracy.json --out benchmarks/english/summary.json

A claim has readings: what is measured, its value, the ends of its 95 % interval, and its null, which is what the same
reading gives where the claim is false by construction. Whether a claim is borne out is for a reader to say. Claims
whose tables a run lacks are listed with the command that makes them. `--accuracy` is what `crosslens accuracy --json`
printed of all snapshots, and more runs are more crosscoders of other models, such as a second seed of the pretraining.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from crosslens.cli.display import to_json
from crosslens.evolution.lifecycles import PRESENCE
from crosslens.features import complexity_correlation
from crosslens.rundir import RunDir, write_text
from crosslens.stats import bootstrap, rank_correlation
from crosslens.tables import find_table

GE, BAYAZIT = "Ge et al., 2509.17196", "Bayazit et al., 2509.05291"
TOP = 15
"""Size of the sets of features that are ablated."""


class Reading(NamedTuple):
    """One number of a claim."""

    what: str
    value: Any
    low: Any = None
    high: Any = None
    null: Any = None


class NoTable(Exception):
    """A claim needs a table that the run does not have."""


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, or of this package, and how it is read off a run."""

    text: str
    source: str
    read: Callable[[RunDir], Iterator[Reading]]


CLAIMS: dict[str, Claim] = {}


def claim(name: str, text: str, source: str) -> Callable[[Callable[[RunDir], Iterator[Reading]]], None]:
    """Declare the function that reads a claim."""

    def add(read: Callable[[RunDir], Iterator[Reading]]) -> None:
        CLAIMS[name] = Claim(text, source, read)

    return add


# ---------------------------------------------------------------------- reading tables
def table(run: RunDir, name: str) -> Any:
    """A table of a run.

    Raises:
        NoTable: it is not there.
    """
    found, declared = run.table(name), find_table(name)
    if found is None:
        raise NoTable("" if declared is None else declared.advise())
    return found


def of_tasks(run: RunDir, kind: str, suffix: str = "") -> Iterator[tuple[str, Any]]:
    """Every task with such a table, and the table.

    Raises:
        NoTable: there is none.
    """
    names = [
        name.removeprefix(f"{kind}/").removesuffix(suffix)
        for name in run.table_names()
        if name.startswith(f"{kind}/") and name.endswith(suffix) and (suffix or "." not in name)
    ]
    if not names:
        table(run, f"{kind}/task{suffix}")
    for task in names:
        yield task, table(run, f"{kind}/{task}{suffix}")


def ends(row: Any, name: str) -> tuple[Any, Any, Any]:
    """A value of a row, and the ends of its interval."""
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def at_end(rows: Any, column: str = "snapshot") -> Any:
    """The rows of the last snapshot."""
    return rows[rows[column] == rows[column].max()]


def share(rows: Any) -> tuple[float, float, float]:
    """Mean of a column of truth values, and its interval over the rows."""
    values = rows.to_numpy(dtype=float)
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    return float(values.mean()), *bootstrap(lambda picks: values[picks].mean(1), len(values))


# ---------------------------------------------------------------------- crosscoder
@claim("reconstruction", "The crosscoder explains the activations of all snapshots", BAYAZIT)
def _(run: RunDir) -> Iterator[Reading]:
    rows = table(run, "evaluation")
    yield Reading("least explained variance", rows["explained_variance"].min())
    yield Reading("mean explained variance", rows["explained_variance"].mean())
    yield Reading("L0, mean over snapshots", rows["l0"].mean())
    yield Reading("dead features", rows["dead_fraction"].max())
    yield Reading("least share of the loss recovered", rows["ce_recovered"].min(), null=0)


@claim("seeds", "Another seed finds the same features", BAYAZIT)
def _(run: RunDir) -> Iterator[Reading]:
    pairs, consensus = table(run, "seeds"), table(run, "consensus")
    live = consensus[consensus["alive"].astype(bool)]
    value, low, high = share(live["consensus"])
    yield Reading("live features that most seeds have", value, low, high, pairs["null_a"].mean())
    yield Reading("variance that they write", live.loc[live["consensus"].astype(bool), "variance"].sum())
    for row in table(run, "seeds_births").itertuples():
        of = f"{row.kind}, seeds {row.a} and {row.b}"
        yield Reading(f"features with a partner, {of}", row.shared, null=row.shared_by_chance)
        yield Reading(f"births that the partner has, too, {of}", row.born_too, null=row.born_too_by_chance)
        yield Reading(f"the same, at most a snapshot apart, {of}", row.within_1, null=row.within_1_by_chance)


# ---------------------------------------------------------------------- evolution
@claim("statistics", "Unigrams are learnt first, then bigrams, then features", f"{GE}, phases of training")
def _(run: RunDir) -> Iterator[Reading]:
    dynamics = table(run, "dynamics").drop_duplicates("snapshot")
    for name, words in (("kl1", "unigram"), ("kl2", "bigram")):
        least = dynamics.loc[dynamics[name].idxmin()]
        yield Reading(f"least {words} KL, at {least['label']}", *ends(least, name))
        last = dynamics.iloc[-1]
        yield Reading(f"{words} KL at the end", *ends(last, name))
    for row in table(run, "phases").to_dict("records"):
        yield Reading(f"step of {row['event']}", row["step"], row["step_low"], row["step_high"])
        if pd.notna(row["lead"]):
            resolved = "" if row["resolved"] else ", which these snapshots do not resolve"
            yield Reading(f"lead in {row['event']}{resolved}", row["lead"], row["lead_low"], row["lead_high"], 0)


@claim("dimensionality", "The features come to use more dimensions", f"{GE}, total dimensionality")
def _(run: RunDir) -> Iterator[Reading]:
    for row in table(run, "dimensionality").itertuples():
        yield Reading(f"dimensions used, share of d_model, at {row.label}", row.share, null=row.random_share)


@claim("births", "Features are born during training", f"{GE}, feature evolution")
def _(run: RunDir) -> Iterator[Reading]:
    rows = table(run, "birth_counts")
    for row in rows[rows["threshold"] == PRESENCE].to_dict("records"):
        what = f"{row['measure']}, {row['kind']}"
        yield Reading(
            f"births by {what}, of {row['n']}", row["born"], row["born_low"], row["born_high"], row["born_reversed"]
        )
        yield Reading(f"sure births by {what}", row["sure"], null=row["sure_reversed"])
        yield Reading(f"births by {what} beyond the common trend", row["beyond_trend"], null=0)
        for models in ("untrained", "exchangeable"):
            if pd.notna(row.get(models)):
                yield Reading(f"share of births by {what}", row["born"] / max(row["n"], 1), null=row[models])


@claim("dates_of_births", "Births are spread over training, lexical ones before contextual ones", GE)
def _(run: RunDir) -> Iterator[Reading]:
    lifecycles = table(run, "lifecycles")
    born = lifecycles[(lifecycles["measure"] == "r2") & (lifecycles["origin"] == "emergent")]
    for kind, rows in born.groupby("kind"):
        dates = rows["birth"].to_numpy(dtype=float)
        low, high = bootstrap(lambda picks, dates=dates: dates[picks].mean(1), len(dates))
        yield Reading(f"mean snapshot of birth, {kind}, of {len(dates)}", dates.mean(), low, high)
    for step, n in born["birth_step"].value_counts().sort_index().items():
        yield Reading(f"births at step {step:.0f}", n)


@claim("rotation", "Directions turn early and then settle", f"{GE}, rotation")
def _(run: RunDir) -> Iterator[Reading]:
    for row in table(run, "rotation").to_dict("records"):
        interval = f"{row['from']} to {row['to']}"
        yield Reading(f"median angle, halves, {interval}", row["halves_angle"], null=row["null_angle"])
        yield Reading(f"angle per doubling, {interval}", row["angle_per_doubling"], null=row["null_per_doubling"])
        yield Reading(f"angle left after the common map, {interval}", row["mapped_angle"], null=row.get("seeds_angle"))
        yield Reading(f"features that turn more than the null, {interval}", row["beyond_null"], null=0.5)


@claim("splitting", "Features split", f"{GE}, feature splitting")
def _(run: RunDir) -> Iterator[Reading]:
    for row in table(run, "split_counts").itertuples():
        of = "" if row.features == "all" else f" of {row.features} features"
        what = f"{row.kind}s{of} (null: 95 % of the orders have no more)"
        yield Reading(what, row.n, null=row.most_by_chance)


@claim("probes", "Decoder norms follow what linear probes read (reported: -.87)", f"{GE}, linear probes")
def _(run: RunDir) -> Iterator[Reading]:
    for row in table(run, "probe_presence").itertuples():
        what = f"rank correlation of probe error and {row.measure}, {row.part}"
        yield Reading(what, row.spearman, row.spearman_low, row.spearman_high, 0)


@claim("complexity", "Features that are born later are more complex (reported: .309)", f"{GE}, complexity")
def _(run: RunDir) -> Iterator[Reading]:
    labels, lifecycles = table(run, "labels"), table(run, "lifecycles")
    if "complexity" not in labels or labels["complexity"].isna().all():
        raise NoTable("Complexity is rated by a language model: crosslens label RUN_DIR --client CLIENT --model MODEL")
    for row in complexity_correlation(labels, lifecycles[lifecycles["measure"] == "r2"]).to_dict("records"):
        what = f"rank correlation of complexity and {row['event']}, of {row['n']}"
        yield Reading(what, *ends(row, "spearman"), 0)


@claim("context", "Features that are born later are more complex", f"{GE}, complexity; here, what context adds")
def _(run: RunDir) -> Iterator[Reading]:
    lifecycles = table(run, "lifecycles")
    born = lifecycles[(lifecycles["measure"] == "r2") & (lifecycles["origin"] == "emergent")]
    born = born.dropna(subset=["token_share"])
    births, within = born["birth"].to_numpy(dtype=float), 1 - born["token_share"].to_numpy(dtype=float)
    rng = np.random.default_rng(0)
    shuffled = rank_correlation(rng.permuted(np.tile(births, (1000, 1)), axis=1), within)
    what = f"rank correlation of birth and the share of variance within token types, of {len(born)}"
    low, high = bootstrap(lambda picks: rank_correlation(births[picks], within[picks]), len(born))
    value = rank_correlation(births, within)
    yield Reading(f"{what} (null: 97.5 % of random orders have less)", value, low, high, np.quantile(shuffled, 0.975))


@claim("labels", "Features can be told by a label", f"{GE}, complexity; labels by the tokens of examples")
def _(run: RunDir) -> Iterator[Reading]:
    rows = table(run, "labels").dropna(subset=["local_detection"])
    values, control = (rows[name].to_numpy(dtype=float) for name in ("local_detection", "local_control"))
    low, high = bootstrap(lambda picks: values[picks].mean(1), len(values))
    yield Reading("balanced accuracy of the tokens as a label", values.mean(), low, high, pd.Series(control).mean())


# ---------------------------------------------------------------------- tasks
@claim("accuracy", "The model learns the tasks during training", BAYAZIT)
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in table(run, "accuracy").groupby("task", sort=False):
        rows = rows.sort_values("snapshot")
        for row in (rows.iloc[0], rows.loc[rows["accuracy"].idxmin()], rows.iloc[-1]):
            yield Reading(f"{task} at {row['label']}, {row['n']} items", *ends(row, "accuracy"), 0.5)


def _left(rows: Any, features: str, k: int, mode: str = "ablate") -> Any:
    return rows[(rows["features"] == features) & (rows["k"] == k) & (rows["mode"] == mode)].iloc[0]


def _change(row: Any) -> tuple[float, float, float]:
    """What is left of the metric, as a share of it, with its interval over groups of prompts."""
    value, error = row["metric"] / row["clean"], 1.96 * row["change_se"] / abs(row["clean"])
    return value, value - error, value + error


@claim("few_features", "A small set of features carries a task", f"{GE}, ablation; {BAYAZIT}")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "ablation"):
        rows = at_end(rows)
        k = max(size for size in rows.loc[rows["features"] == "top", "k"] if size <= TOP)
        for control in ("random", "size_matched", "change_matched"):
            what = f"{task}: metric left without the top {k} (null: {control})"
            yield Reading(what, *_change(_left(rows, "top", k)), _change(_left(rows, control, k))[0])
        kept = rows[(rows["mode"] == "keep") & (rows["features"] == "top")]
        for row in (kept.loc[kept["k"].idxmin()], kept.loc[kept["k"].idxmax()]):
            null = row["reconstruction_only"] / row["clean"]
            yield Reading(f"{task}: metric with {row['k']} features alone (null: all)", *_change(row), null)


@claim("ablation_over_training", "The features of the end matter at all snapshots after they form", f"{GE}, ablation")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "ablation"):
        for _, at in rows.groupby("snapshot"):
            k = max(size for size in at.loc[at["features"] == "top", "k"] if size <= TOP)
            top, random = (_left(at, features, k) for features in ("top", "random"))
            loss, error = top["clean"] - top["metric"], 1.96 * top["change_se"]
            what = f"{task} at {top['label']}: logits lost without the top {k}"
            yield Reading(what, loss, loss - error, loss + error, random["clean"] - random["metric"])


@claim("classes", "Features emerge, are maintained, or are discontinued, by RelIE", f"{BAYAZIT}, classes")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "timeline"):
        each = rows.drop_duplicates("feature")
        # a discovery rate of 5 % bounds the mean share of false ones
        yield Reading(f"{task}: features with significant effects", len(each), null=0.05 * len(each))
        for name, n in each["class"].value_counts().items():
            yield Reading(f"{task}: {name}, of {len(each)} features with large effects", n)


@claim("effects", "Effects are significant", f"{BAYAZIT}, RelIE before and after the accuracy rises")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "attribution"):
        for label, at in rows.groupby("label", sort=False):
            n = int(at["significant"].sum())
            yield Reading(f"{task} at {label}: features with a significant effect", n, null=0.05 * n)


@claim("transfer", "Features of one snapshot carry the task at another", f"{BAYAZIT}, ablation over snapshots")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "transfer"):
        own = at_end(rows, "ablated_at")
        last = own.loc[own["selected_at"].idxmax(), "share"]
        for row in own.to_dict("records"):
            what = f"{task}: effect at the end of features chosen at {row['selected_at_label']} (null: of its own)"
            yield Reading(what, row["share"], null=last)


@claim("read_out", "Models can use a feature before they represent it", "this package, causal birth")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "read_out"):
        for row in rows[rows["feature"].isna()].to_dict("records"):
            what = f"{task} at {row['label']}: share of the late effect of late values"
            yield Reading(what, row["share"], row["share_low"], row["share_high"], row["random_share"])


@claim("order_of_dates", "Features are readable before they matter", f"{GE}; {BAYAZIT}")
def _(run: RunDir) -> Iterator[Reading]:
    lifecycles = table(run, "lifecycles")
    read = lifecycles[(lifecycles["measure"] == "r2") & lifecycles["origin"].notna()]
    # what is there from the first snapshot on is readable before all else; what never becomes so, before nothing
    births = read["birth"].astype(float).where(read["origin"] != "initial", -1.0).fillna(math.inf).to_numpy()
    for task, rows in of_tasks(run, "dates"):
        for first in ("context", "concept"):
            both = rows[rows[first].notna() & rows["matters"].notna()]
            if not len(both):
                continue
            earlier = both[first].astype(float) < both["matters"].astype(float)
            # all features of the dictionary that are readable when these begin to matter: what "before" means by chance
            base = [float((births < at).mean()) for at in both["matters"]] if first == "context" else None
            null = None if base is None else sum(base) / len(base)
            yield Reading(f"{task}: features whose {first} is readable before they matter", *share(earlier), null)


@claim("relie", "RelIE tells when a feature acts", f"{BAYAZIT}, Table 7")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "validation", ".summary"):
        for row in rows[rows["kind"] == "within"].to_dict("records"):
            what = f"{task}: {row['measure']} and exact {row['target']}"
            yield Reading(f"rank correlation of {what}", *ends(row, "correlation"), 0)
            if row["measure"] != "snapshot":
                yield Reading(f"the same beyond the number of the snapshot, {what}", *ends(row, "partial"), 0)


@claim("additivity", "Effects of features add up", f"{GE}; {BAYAZIT}, attribution")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "additivity", ".snapshots"):
        row = at_end(rows).iloc[0]
        for name, words in (("interacting", "pairs that interact"), ("deviation", "deviation from the sum")):
            yield Reading(f"{task}: {words}", *ends(row, name))


@claim("completeness", "Effects by integrated gradients add up to the change of the metric", f"{BAYAZIT}, attribution")
def _(run: RunDir) -> Iterator[Reading]:
    for task, rows in of_tasks(run, "completeness"):
        yield Reading(f"{task}: largest error over snapshots", rows["completeness_error"].max(), null=0)


# ---------------------------------------------------------------------- all of it
def summarise(run: RunDir) -> dict[str, Any]:
    """The readings of all claims of a run."""
    found: dict[str, Any] = {}
    for name, each in CLAIMS.items():
        entry: dict[str, Any] = {"claim": each.text, "source": each.source}
        try:
            entry["readings"] = [reading._asdict() for reading in each.read(run)]
        except NoTable as missing:
            entry["missing"] = str(missing)
        found[name] = entry
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of `crosslens run`")
    parser.add_argument("--pretraining", type=Path, help="pretraining.json of the model")
    parser.add_argument("--accuracy", type=Path, help="output of `crosslens accuracy --json`")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("summary.json"))
    args = parser.parse_args()

    others = {name: path for name in ("pretraining", "accuracy") if (path := getattr(args, name)) is not None}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in others.items()}
    runs = {path.name: RunDir.open(path) for path in args.runs}
    for name, run in runs.items():
        about = run.read_json()
        found[name] = {key: about.get(key) for key in ("options", "timings")} | {"claims": summarise(run)}
    write_text(args.out, json.dumps(to_json(found), indent=1, allow_nan=False) + "\n")
    for name in runs:
        for one, entry in found[name]["claims"].items():
            print(
                f"{name}, {one}: {len(entry['readings'])} readings"
                if "readings" in entry
                else f"{name}, {one}: {entry['missing']}"
            )


if __name__ == "__main__":
    main()
