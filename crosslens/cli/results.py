"""The results of `train`, `evolve`, `attribute` and `ablate` as tables for a terminal, and as values for --json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from crosslens.causal import Study
from crosslens.causal.ablation import CONTROLS
from crosslens.causal.dates import DATES
from crosslens.causal.relative import significant
from crosslens.cli.display import Column, Output, counted, measured, number, percent, size
from crosslens.cli.prompts import feature_names
from crosslens.evolution import describe_doubtful
from crosslens.evolution.births import NAMES, describe_reversed
from crosslens.evolution.lifecycles import PRESENCE, count_origins
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.pipeline import Attributed, summarise_study
from crosslens.rundir import RunDir
from crosslens.tasks import MIN_ITEMS, describe_items, list_counts

_TOP = 5
BASELINES = {"zero": "zero", "mean": "their mean", "patch": "their values on the paired prompts"}


def show_training(out: Output, runs: Mapping[int, RunDir], title: str) -> None:
    """Print how good the crosscoders of a training are, and what they took, a row per seed.

    Args:
        out: where to print.
        runs: the run directory of each seed.
        title: a line above the table.
    """
    columns = [
        Column("seed"), Column("mean EV"), Column("first EV", drop=2), Column("last EV", drop=2),
        Column("lowest EV", left=True), Column("L0"), Column("dead"), Column("CE recovered", drop=1),
        Column("CE added", drop=3), Column("time"), Column("speed", drop=4), Column("memory", drop=4),
    ]  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for seed, run in runs.items():
        timings, table = run.read_json().get("timings", {}), run.table("evaluation")
        assert table is not None  # `train` writes it
        ev, ce = table["explained_variance"], table["ce_spliced"] - table["ce_clean"]
        rows.append(
            (
                str(seed), number(ev.mean()), number(ev.iloc[0]), number(ev.iloc[-1]),
                f"{number(ev.min())} ({table.loc[ev.idxmin(), 'label']})", number(table["l0"].mean(), 1),
                percent(table["dead_fraction"].max()), percent(table["ce_recovered"].min()),
                number(ce.max(), sign=True), f"{timings.get('train', 0):,.0f} s",
                f"{timings.get('tokens_per_second', 0):,.0f} tokens/s", size(timings.get("peak_memory", 0)),
            )
        )  # fmt: skip
    out.table(
        columns,
        rows,
        title=title,
        note="on held-out tokens. EV: explained variance, over snapshots; CE added: by the reconstruction, in nats, at "
        "the worst snapshot; CE recovered: the lowest share",
    )


def count_lifecycles(lifecycles: pd.DataFrame) -> list[dict[str, Any]]:
    """How many live features have which origin, by every measure of presence."""
    rows: list[dict[str, Any]] = []
    for measure, table in lifecycles.groupby("measure", sort=False):
        counts, live = count_origins(table), int(table["alive"].sum())
        rows.append({"measure": measure, "features": len(table), "live": live, **counts})
    return rows


def show_evolution(out: Output, tables: Mapping[str, pd.DataFrame], run: Path) -> None:
    """Print how many features are born, what speaks against the number, and where the rest is.

    Args:
        out: where to print.
        tables: of `pipeline.evolve`.
        run: the run directory.
    """
    counts, labels = tables["birth_counts"], tables["doubtful"]["label"].tolist()
    (row,) = counts.query("measure == 'r2' and kind == 'all' and threshold == @PRESENCE").to_dict("records")
    nulls = {"untrained": "models that never trained", "exchangeable": "models of other seeds"}
    known = [f"in {words} {percent(row[name])} of the features are" for name, words in nulls.items() if name in row]
    false = "; ".join(known) or "false births were not measured: --untrained or --null does"
    between = lambda name: f"{row[f'{name}_low']:.0f} to {row[f'{name}_high']:.0f}"  # noqa: E731
    out.say(
        f"{row['born']:,} (95% interval {between('born')}) of {row['n']:,} live features are born between {labels[0]} "
        f"and {labels[-1]}: {NAMES['r2']} reaches {PRESENCE}; {row['beyond_trend']:,} ({between('beyond_trend')}) of "
        f"them exceed the common trend; with the snapshots reversed {row['born_reversed']:,} "
        f"({between('born_reversed')}) are born ({false})"
    )
    for line in [*describe_reversed(counts), *describe_doubtful(tables["doubtful"])]:
        out.say(line)
    if "scaling" not in tables:
        out.say("latent scaling is left out: without a penalty on the decoder it equals the decoder norm")
    place = shlex.quote(str(run))
    out.say(f"other measures and thresholds, lifecycles, phases, probes: crosslens report {place}, or --json")


def show_effects(out: Output, name: str, found: Attributed, run: RunDir) -> dict[str, Any]:
    """Print effects on a task at every snapshot, and the accuracy on it; return the values.

    Args:
        out: where to print.
        name: of the task.
        found: the results of `attribute`.
        run: for the names of features.
    """
    names = feature_names(run)
    ie, accuracy, runs = found.effects, found.accuracy, found.runs
    snapshots, table = (found.tables[f"attribution/{name}{part}"] for part in (".snapshots", ""))
    later = set[tuple[int, int]]()
    if "mostly_later" in table:
        marked = table.loc[table["mostly_later"], ["feature", "snapshot"]]
        later = {(int(feature), int(s)) for feature, s in marked.itertuples(index=False)}
    sure = significant(ie)
    complete, exact = ie.estimator.method == "ig", bool(snapshots["agreement"].notna().any())
    columns = [
        Column("snapshot"), Column("accuracy"), Column("95% interval", drop=3), Column("metric"),
        *[Column("completeness", drop=2)] * complete, *[Column("agreement with exact", drop=1)] * exact,
        Column("active"), Column("largest effects of features", left=True),
    ]  # fmt: skip
    rows: list[tuple[str, ...]] = []
    values: list[dict[str, Any]] = []
    of_label = accuracy.set_index("label").to_dict("index")
    for s, row in enumerate(snapshots.to_dict("records")):
        right = of_label[row["label"]]
        active = int(ie.active[:, s].sum())
        top: list[dict[str, Any]] = [
            {
                "feature": i,
                "effect": float(ie.effects[i, s]),
                "significant": bool(sure[i, s]),
                "mostly_later": (i, s) in later,
            }
            for i in (ie.top(min(_TOP, active), s, by="magnitude").tolist() if active else [])
        ]
        rows.append(
            (
                row["label"], percent(right["accuracy"]),
                _interval(right["accuracy_low"], right["accuracy_high"], ".1%"),
                number(row["metric_clean"], sign=True),
                *[percent(float(ie.completeness[s]), 2)] * complete, *[number(row["agreement"], 2, sign=True)] * exact,
                f"{active:,}",
                ", ".join(
                    f"{one['feature']}:{one['effect']:+.3f}{'*' * one['significant']}{'†' * one['mostly_later']}"
                    for one in top
                ),
            )
        )  # fmt: skip
        values.append(
            {
                **row, "completeness": ie.completeness[s],
                **{name: right[name] for name in ("accuracy", "accuracy_low", "accuracy_high")},
                "accuracy_n": right["n"], "top": top,
            }
        )  # fmt: skip
    significance = (
        "* significant (false discovery rate 5%)" if sure.any() else
        f"none significant over features and snapshots (false discovery rate 5%, {counted(len(runs), 'prompt')}; with "
        "more, smaller effects become significant)"
    )  # fmt: skip
    if later:
        significance += "; † more than half of the feature is read from later snapshots"
    out.say(describe_items(accuracy))
    for largest in values[-1]["top"][:1]:
        word = names.get(largest["feature"], "")
        out.say(
            f"{name}: the largest effect at {values[-1]['label']} is {largest['effect']:+.3f} logits, of feature "
            f"{largest['feature']}{f' {word}' * bool(word)} ({'' if largest['significant'] else 'not '}significant), "
            f"where the metric is "
            f"{number(values[-1]['metric_clean'], sign=True)}: an estimate on {counted(len(runs), 'prompt')} of the "
            "selection half, which `crosslens ablate` tests on the other half"
        )
    out.table(
        columns,
        rows,
        title=f"{name}, effects by {ie.estimator}, on the selection half: {_count(runs)}",
        note="metric: logit of the correct answer minus that of the wrong one; accuracy: of all items; effects: in "
        f"logits, positive for what supports the correct answer, {significance}",
    )
    return {"items": accuracy["n"].iloc[0], "prompts": len(runs), "left_out": runs.left_out, "snapshots": values}


def _count(runs: PromptRuns) -> str:
    few = f" (fewer than {MIN_ITEMS}: standard errors are rough)" if len(runs) < MIN_ITEMS else ""
    without = f"; {sum(runs.left_out.values())} left out ({list_counts(runs.left_out)})" if runs.left_out else ""
    return f"{len(runs)} prompts in {counted(runs.n_groups, 'group')}{few}{without}"


def show_ablation(out: Output, name: str, table: pd.DataFrame, runs: PromptRuns) -> dict[str, Any]:
    """Print what ablations do to a task at the last snapshot; return the values of all snapshots.

    Args:
        out: where to print.
        name: of the task.
        table: ablation curves.
        runs: the prompts of the held-out half.
    """
    last = pd.DataFrame(table[table["snapshot"] == table["snapshot"].max()])
    first = last.iloc[0]
    rows = [
        (
            row["mode"], str(row["features"]).replace("_", "-"), f"{row['k']:,}", number(row["metric"], sign=True),
            percent(row["metric"] / row["clean"] if row["clean"] > 0 else None, 0),
            measured(row["metric"] - row["clean"], row["change_se"], sign=True), f"{row['n_draws']:,}",
            number(row["metric_sd"]),
        )
        for row in last.to_dict("records")
    ]  # fmt: skip
    out.table(
        [Column("", left=True), Column("features", left=True), Column("k"), Column("metric"), Column("of clean"),
         Column("change"), Column("draws", drop=2), Column("their sd", drop=1)],
        rows,
        title=f"{name}, metric on the held-out half: {_count(runs)}; at {first['label']}, where it is "
        f"{number(first['clean'], sign=True)} and {first['n_active']:,} features are active",
        note=f"features are set to {BASELINES[str(first['baseline'])]}; change: from the clean metric, prompt by "
        "prompt, ± its standard error "
        f"over {counted(int(first['n_groups']), 'group')} of prompts; their sd: standard deviation of "
        "the metric over draws. keep: without the error node",
    )  # fmt: skip
    return {"prompts": len(runs), "left_out": runs.left_out, "curves": table}


def show_study(out: Output, study: Study, k: int) -> dict[str, Any]:
    """Print what a task loses without its top features, beside the controls; return the summary.

    Args:
        out: where to print.
        study: the results of a task.
        k: number of features; fewer where fewer are active.
    """
    summary = summarise_study(study, k)
    k, metrics = summary["k"], {name: number(value, sign=True) for name, value in summary["ablation"].items()}
    controls = [f"{k} {kind.replace('_', '-')} ones {metrics[f'{kind}_k']}" for kind in CONTROLS]
    zeroed = f"; with the top {k} set to zero {metrics['zeroed_k']}" if "zeroed_k" in metrics else ""
    out.say(
        f"{study.task}: {metrics['clean']} at {study.ie.labels[-1]}, {metrics['top_k']} without the top {k} features "
        f"(set to {BASELINES[study.ie.estimator.baseline or 'zero']}); without {' or '.join(controls)}{zeroed}. On the "
        f"held-out half; estimates agree with exact effects by {number(summary['spearman_ie_exact']['removal'], 2)} "
        "(Spearman)"
    )
    dates = study.tables.get(f"dates/{study.task}")
    if dates is not None and len(dates):
        show_dates(out, dates, study)
    return {**summary, "tables": sorted(study.tables)}


def show_dates(out: Output, dates: pd.DataFrame, study: Study) -> None:
    """Print when the top features of a task begin, by each reading.

    Args:
        out: where to print.
        dates: the table dates/<task>.
        study: the results of the task.
    """
    labels, parts = study.ie.labels, list[str]()
    for name, words in DATES.items():
        known = dates[name].dropna().sort_values()
        at = labels[int(known.iloc[(len(known) - 1) // 2])] if len(known) else "never"
        few = "" if len(known) in (0, len(dates)) or name == "succeeds" else f" ({len(known)} of {len(dates)})"
        parts.append(f"{words} {at}{few}")
    out.say(
        f"{study.task}: when, for the {len(dates)} features with the largest effects (median): {', '.join(parts)}. A "
        "feature's context is readable before its concept is; that is read on paired prompts"
    )


def show_edges(out: Output, name: str, table: pd.DataFrame, run: RunDir, lower: RunDir) -> None:
    """Print the edges into features at the last snapshot.

    Args:
        out: where to print.
        name: of the task.
        table: of `causal.connect_features`.
        run: for the names of features.
        lower: for those of the features of the earlier hook point.
    """
    if table.empty:
        out.say(f"{name}: none of these features fires on the prompts, so nothing leads to them")
        return
    names, below = feature_names(run), feature_names(lower)
    last: pd.DataFrame = table.loc[table["snapshot"] == table["snapshot"].max()]
    first = last.iloc[0]
    out.table(
        [Column("feature", left=True), Column("reads"), Column("from", left=True), Column("edge")],
        [
            (
                f"{row['feature']} {names.get(row['feature'], '')}".rstrip(), number(row["part"], 2, sign=True),
                f"{row['from_feature']} {below.get(row['from_feature'], '')}".rstrip(),
                measured(row["edge"], row["edge_se"], sign=True),
            )
            for row in last.to_dict("records")
        ],
        title=f"{name}, edges from {first['from_hook']} at {first['label']}: "
        f"{counted(int(first['n_prompts']), 'prompt')} in {counted(int(first['n_groups']), 'group')}",
        note="reads: what the feature reads from this snapshot where it fires; edge: how much of it goes when the "
        "lower feature is set to zero, to first order, ± its standard error over groups of prompts; those shown are "
        "the largest at any snapshot",
    )  # fmt: skip


def _interval(low: float, high: float, spec: str) -> str:
    return f"[{low:{spec}}, {high:{spec}}]"
