"""What a run found, in five sentences with links to their figures and controls, and what its numbers do not carry.

`find` reads the tables that the figures show; a sentence whose table is missing is left out. `warn` names values
outside the range in which the conclusions hold, and the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from crosslens.report.chart import Frame, feature_names, shortened, task_pages
from crosslens.report.figures.ablation import SET_TO
from crosslens.report.tables import MEASURES, Tables, by_measure, main_measure

# the same as where training, tasks and the sweep warn
MIN_EV, MAX_DEAD, MIN_ITEMS = 0.7, 0.2, 20
MIN_RECOVERED = 0.9
MAX_COMPLETENESS = 0.05
RECONSTRUCTED = 0.8, 1.2  # of the clean metric
CHANCE, LEARNT = 0.5, 0.9
_BIRTHS = ("shared", "born_too", "born_too_by_chance", "same_birth", "same_birth_by_chance")
_BOUND = 6  # names in a list
_TASK_WIDTH = 150  # of a task with its snapshots and its number of items


@dataclass(frozen=True)
class Finding:
    """A sentence and (name, link) of its figure, its control and its tasks."""

    text: str
    links: list[tuple[str, str]]


def warn(tables: Tables) -> list[Finding]:
    """Values that do not carry the conclusions, with what is acceptable."""
    found: list[Finding] = []
    pages = task_pages(tables["tasks"])

    def add(text: str, task: str | None = None) -> None:
        found.append(Finding(text, [] if task is None else [(f"Task {task}", pages[task])]))

    evaluation = tables.get("evaluation", "explained_variance", "dead_fraction", "label")
    if evaluation is not None:
        poor = evaluation[~(evaluation["explained_variance"] >= MIN_EV)]
        if values := _listed(f"{row.label} ({row.explained_variance:.2f})" for row in poor.itertuples()):
            add(
                f"Explained variance is too low at {values}: what is said of features there is about a part of the "
                f"activations. Acceptable: {MIN_EV:g} or more."
            )
        recovered = evaluation.reindex(columns=["label", "ce_recovered"])
        lost = recovered[recovered["ce_recovered"] < MIN_RECOVERED]
        if values := _listed(f"{row.label} ({row.ce_recovered:.1%})" for row in lost.itertuples()):
            add(
                f"The reconstruction recovers too little of the loss that zeros would cost at {values}: it misses "
                f"directions that the model uses. Acceptable: {MIN_RECOVERED:.0%} or more."
            )
        dead = float(evaluation["dead_fraction"].max())
        if dead > MAX_DEAD:
            add(
                f"{dead:.0%} of the features are dead: the dictionary is larger than the training could use, and "
                f"counts of features depend on its size. Acceptable: {MAX_DEAD:.0%} or less."
            )
    accuracy = tables.get("accuracy", "task", "n")
    if accuracy is not None:
        sizes = accuracy.groupby("task", sort=False)["n"].max()
        for task, n in sizes[sizes < MIN_ITEMS].items():
            add(
                f"Task {task} has {int(n)} items, too few for means over tasks or for ranking features. Acceptable: "
                f"{MIN_ITEMS} or more.",
                str(task),
            )
    errors = tables.get("completeness/*", "completeness_error", "task", "label")
    if errors is not None and errors["completeness_error"].max() > MAX_COMPLETENESS:
        worst = errors.loc[errors["completeness_error"].idxmax()]
        add(
            f"The effects of {worst['task']} at {worst['label']} miss the change of the metric by "
            f"{worst['completeness_error']:.0%}. Acceptable: {MAX_COMPLETENESS:.0%} or less.",
            str(worst["task"]),
        )
    for task in tables.tasks("ablation"):
        rows = tables.get(f"ablation/{task}", "clean", "reconstruction_only", "snapshot", "label")
        if rows is None:
            continue
        last = rows.loc[rows["snapshot"].idxmax()]
        share = float(last["reconstruction_only"] / last["clean"]) if last["clean"] else np.nan
        if not RECONSTRUCTED[0] <= share <= RECONSTRUCTED[1]:
            low, high = RECONSTRUCTED
            add(
                f"With the reconstruction alone, {task} at {last['label']} has {share:.0%} of its metric: the features "
                f"do not hold what the model uses. Acceptable: {low:.0%} to {high:.0%}.",
                task,
            )
    return found


def find(tables: Tables, drawn: set[str]) -> list[Finding]:
    """What the run found: what is learnt when, how well it is described, what is born, what acts, what recurs.

    Args:
        tables: of the run.
        drawn: names of the CSV files of the figures that were drawn.
    """
    parts = (_learnt, _described, _born, _acts, _recurs)
    return [found for part in parts if (found := part(tables, drawn)) is not None]


def _learnt(tables: Tables, drawn: set[str]) -> Finding | None:
    accuracy = tables.get("accuracy", "task", "snapshot", "label", "accuracy", "accuracy_low", "n")
    if accuracy is None:
        return None
    above: list[str] = []
    missed: list[str] = []
    named: list[str] = []
    for task, rows in accuracy[accuracy["n"] >= MIN_ITEMS].groupby("task", sort=False):
        named.append(str(task))
        rows = rows.sort_values("snapshot")
        n, end = f"n = {int(rows['n'].max()):,}", f"{rows['accuracy'].iloc[-1]:.1%}"
        since, learnt = _first_kept(rows, rows["accuracy_low"] > CHANCE), _first_kept(rows, rows["accuracy"] >= LEARNT)
        if since is None:
            missed.append(f"{shortened(task, 60)} ({end}, {n})")
        else:
            reached = f"{end} at the end" if learnt is None else f"at least {LEARNT:.0%} from {learnt} on"
            above.append(f"{shortened(task, 60)} from {since} on ({reached}, {n})")
    if not named:
        return None
    sentences: list[str] = []
    if above:
        sentences.append(f"The model answers more items correctly than chance on {_listed(above, _TASK_WIDTH)}.")
    if missed:
        which = "it" if above else "the model"
        sentences.append(f"At the end, {which} is not above chance on {_listed(missed, _TASK_WIDTH)}.")
    links = _links(drawn, "index", {"accuracy": "Figure, with chance and intervals"})
    pages = task_pages(tables["tasks"])
    links += [(task, pages[task]) for task in named[:_BOUND]]
    return Finding(" ".join(sentences), links)


def _first_kept(rows: Frame, holds: Any) -> str | None:
    """Label of the first snapshot from which a condition holds until the last."""
    kept = np.minimum.accumulate(holds.to_numpy(dtype=bool)[::-1])[::-1]
    return str(rows["label"].iloc[int(kept.argmax())]) if kept.any() else None


def _described(tables: Tables, drawn: set[str]) -> Finding | None:
    evaluation = tables.get("evaluation", "explained_variance", "label")
    if evaluation is None:
        return None
    ev = evaluation["explained_variance"]
    text = (
        f"The crosscoder explains {ev.mean():.1%} of the variance on held-out tokens on average, and "
        f"{ev.min():.1%} at {evaluation.loc[ev.idxmin(), 'label']}, the least"
    )
    if "ce_recovered" in evaluation and evaluation["ce_recovered"].notna().any():
        text += (
            f"; spliced into the model, its reconstruction recovers at least {evaluation['ce_recovered'].min():.1%} of "
            "the loss that zeros would cost"
        )
    names = {"explained-variance": "Figure", "cross-entropy": "Control: loss with zeros instead"}
    return Finding(f"{text}.", _links(drawn, "index", names))


def _born(tables: Tables, drawn: set[str]) -> Finding | None:
    lifecycles = tables.get("lifecycles", "measure", "origin")
    if lifecycles is None:
        return None
    read = by_measure(lifecycles).dropna(subset=["origin"])
    if read.empty:
        return None
    measure, born = main_measure(lifecycles), int((read["origin"] == "emergent").sum())
    text = f"By {MEASURES[measure]}, {born:,} of {len(read):,} features are born after the first snapshot"
    evolution = tables.get("evolution", "snapshot", "label")
    if born and "birth" in read and evolution is not None:
        dates = read.loc[read["origin"] == "emergent", "birth"].astype(int).value_counts()
        label = dict(zip(evolution["snapshot"], evolution["label"], strict=True)).get(dates.index[0])
        text += f", with the most at {label} ({dates.iloc[0]:,})" * (label is not None)
    counts = tables.get("birth_counts", "measure", "kind", "threshold", "born", "born_reversed")
    if counts is not None:
        from crosslens.evolution.births import NULLS, describe_reversed
        from crosslens.evolution.lifecycles import PRESENCE

        at = counts[(counts["measure"] == measure) & (counts["kind"] == "all") & (counts["threshold"] == PRESENCE)]
        if len(at):
            row = at.iloc[0]
            if np.isfinite(row.get("born_low", np.nan)):
                text += f" (95% interval of the count: {row['born_low']:,.0f} to {row['born_high']:,.0f})"
            text += f"; counted from the last snapshot backwards, {row['born_reversed']:,}"
            if np.isfinite(row.get("born_reversed_low", np.nan)):
                text += f" ({row['born_reversed_low']:,.0f} to {row['born_reversed_high']:,.0f})"
            text += " are (features that fade, or noise)"
            false = [(row[name], models) for name, models in NULLS.items() if np.isfinite(row.get(name, np.nan))]
            text += "".join(f", in {models} {share:.1%}" for share, models in false)
            text += "; false births were not measured" * (not false)
        unlikely = "".join(f". {line[0].upper()}{line[1:]}" for line in describe_reversed(counts))
        text += unlikely.replace("R2", MEASURES["r2"])
    names = {"evolution-map": "Figure", "birth-counts": "Control: births reversed in time"}
    return Finding(f"{text}.", _links(drawn, "evolution", names))


def _acts(tables: Tables, drawn: set[str]) -> Finding | None:
    found: list[tuple[float, str, Frame]] = []
    for task in tables.tasks("ablation"):
        rows = tables.get(f"ablation/{task}", "snapshot", "mode", "features", "k", "metric", "clean")
        if rows is None:
            continue
        rows = rows[(rows["snapshot"] == rows["snapshot"].max()) & (rows["mode"] == "ablate")]
        sizes = sorted(set(rows.loc[rows["features"] == "top", "k"]) & set(rows.loc[rows["features"] == "random", "k"]))
        if sizes:
            k = min(sizes, key=lambda size: abs(size - 15))
            rows = rows[rows["k"] == k].groupby("features").first()
            found.append((float(rows.loc["top", "clean"]), task, rows))
    if not found:
        return None
    clean, task, rows = max(found, key=lambda each: each[0])
    top, random = rows.loc["top"], rows.loc["random"]
    to = SET_TO[str(top.get("baseline", ""))]
    text = (
        f"On {task} at {top['label']}, setting the {int(top['k'])} features with the largest effects to {to} "
        f"takes the metric from {clean:.2f} to {_signed(top['metric'])} logits, "
        f"{int(random['k'])} random active ones to {_signed(random['metric'])}"
    )
    if "size_matched" in rows.index:
        matched = rows.loc["size_matched"]
        text += f", {int(matched['k'])} active ones of about their size to {_signed(matched['metric'])}"
    if "change_matched" in rows.index and {"moved", "n_features"} <= set(rows):
        matched = rows.loc["change_matched"]
        text += (
            f", {int(matched['n_features'])} active ones that together change the activation by "
            f"{matched['moved'] / top['moved']:.0%} of what those do to {_signed(matched['metric'])}"
        )
    zeroing = tables.get(f"zeroing/{task}", "snapshot", "features", "k", "metric")
    if zeroing is not None:
        zeroed = zeroing[(zeroing["snapshot"] == zeroing["snapshot"].max()) & (zeroing["features"] == "top")].iloc[0]
        text += f"; setting the top {int(zeroed['k'])} to zero leaves {_signed(zeroed['metric'])}"
    effects = tables.get(f"attribution/{task}", "feature", "snapshot", "ie", "relie")
    if effects is not None:
        last = effects[effects["snapshot"] == effects["snapshot"].max()]
        best = last.loc[last["ie"].idxmax()]
        text += Markup("; the largest effect there is that of {}").format(_feature(int(best["feature"]), tables))
        if not effects["relie"].notna().any():
            text += ", but no single effect is significant (false discovery rate 5%)"
    page = task_pages(tables["tasks"])[task].removesuffix(".html")
    name = page.removeprefix("task-")
    links = _links(drawn, page, {f"ie-{name}": "Figure", f"ablate-size-{name}": "Control: random features"})
    return Finding(text + ".", links)  # an f-string would make text of the link


def _feature(feature: int, tables: Tables) -> Markup:
    """A feature as a link to its page, with its label or top token in quotation marks."""
    name = feature_names(tables["names"])(feature).removeprefix(str(feature)).strip()
    link = Markup('<a href="feature.html#{0}">feature {0}</a>').format(feature)
    return link + (f" (“{name}”)" if name else "")


def _recurs(tables: Tables, drawn: set[str]) -> Finding | None:
    consensus, pairs = tables["consensus"], tables["seeds"]
    if consensus is None or pairs is None:
        if tables["lifecycles"] is None:
            return None
        text = "One seed was trained, so it is not known which of these features another training would find again."
        return Finding(text, [("What to run", "index.html#seeds")])
    live = consensus[consensus["alive"].astype(bool)]
    kept = live[live["consensus"].astype(bool)]
    text = (
        f"Most of {int(consensus['of'].max())} seeds have {len(kept):,} of {len(live):,} live features, which write "
        f"{kept['variance'].sum():.0%} of the variance; with permuted tokens "
        f"{pairs['null_a'].mean():.1%} have a partner"
    )
    unrelated = tables.get("unrelated", "kind", "shared")
    other = {} if unrelated is None else unrelated.set_index("kind")["shared"].to_dict()
    if other:
        text += f", in a crosscoder over unrelated models {other['all']:.0%}"
    births = tables.get("seeds_births", "kind", *_BIRTHS)
    if births is None:
        if "contextual" in other:
            text += f" (contextual ones: {other['contextual']:.0%})"
    else:
        means = births.groupby("kind")[list(_BIRTHS)].mean()
        if "contextual" in means.index:
            text += f". Of contextual features {means['shared']['contextual']:.0%} have a partner in another seed"
            if "contextual" in other:
                text += f", in a crosscoder over unrelated models {other['contextual']:.0%}"
        row = means.loc["all"]
        if np.isfinite(row["born_too"]):
            text += (
                f". Of features that are born and have a partner {row['born_too']:.0%} are born there too (by chance "
                f"{row['born_too_by_chance']:.0%})"
            )
        if np.isfinite(row["same_birth"]):
            text += (
                f", {row['same_birth']:.0%} of these at the same snapshot (by chance {row['same_birth_by_chance']:.0%})"
            )
    names = {"seeds": "Figure", "seeds-births": "Births in other seeds", "seeds-rate": "Control: by firing rate"}
    return Finding(f"{text}.", _links(drawn, "index", names))


def _links(drawn: set[str], page: str, names: dict[str, str]) -> list[tuple[str, str]]:
    """(name, link) of those figures of a page that were drawn."""
    return [(name, f"{page}.html#figure-{id}") for id, name in names.items() if f"{id}.csv" in drawn]


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _listed(parts: Any, width: int = 60) -> str:
    """A list in words; long ones are cut, and so are long parts."""
    names = [shortened(part, width) for part in parts]
    return ", ".join(names[:_BOUND]) + (f" and {len(names) - _BOUND} more" if len(names) > _BOUND else "")
