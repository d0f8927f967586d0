"""`attribute`, `ablate` and `study`: what the features of a run do for tasks.

`study` is the whole analysis of a task (`crosslens.causal.analyses`); `attribute` and `ablate` are its cheap first
parts, and a study builds on what they have left. Prompts are split into a selection half, which features are chosen on,
and a held-out half, which they are tested on. A run records the split of every task: another seed, or a file with other
items, would test features on the prompts that they were chosen on, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from crosslens.causal.ablation import Controls
from crosslens.causal.analyses import Study, ablation_table, effect_tables, known_effects
from crosslens.causal.analyses import study as study_task
from crosslens.causal.attribution import Attribution, Estimator, check_statistics
from crosslens.causal.attribution import attribute as attribute_effects
from crosslens.config import AblateOptions, AttributeOptions, StudyOptions, decisive
from crosslens.distributed.together import from_first, together
from crosslens.errors import UserError, json_checksum, shortened
from crosslens.intervention.prompt_runs import PromptRuns, needs_pairs
from crosslens.pipeline.opening import (
    encoder_shares,
    evolved_table,
    items_digest,
    open_consensus,
    parse_tasks,
    read_run,
    working,
)
from crosslens.rundir import RunDir
from crosslens.tables import task_of

if TYPE_CHECKING:
    from crosslens.snapshots import ModelSettings, Snapshots
    from crosslens.tasks import Task


_OTHERS = ("task", "seed")  # what a study records besides its sizes


class Attributed(NamedTuple):
    """Effects on a task."""

    effects: Attribution
    """On the selection half."""
    tables: dict[str, pd.DataFrame]
    """By their names in the run directory."""
    accuracy: pd.DataFrame
    """Of all items, as `Task.accuracy`."""
    runs: PromptRuns
    """The prompts of the selection half."""


class Ablated(NamedTuple):
    """Ablation curves of a task."""

    curves: pd.DataFrame
    """The table ablation/<task>."""
    runs: PromptRuns
    """The prompts of the held-out half."""


def attribute(run: RunDir, options: AttributeOptions, *, device: str | None = None) -> Iterator[tuple[str, Attributed]]:
    """Estimate the effect of every feature on tasks at every snapshot, on the selection half of their prompts.

    Args:
        run: with a trained crosscoder.
        options: the tasks, and how effects are estimated.
        device: of models and crosscoder; CUDA if available.

    Yields:
        Name and results of every task; its tables are saved by then.

    Raises:
        UserError: an unknown task or option, no consensus of seeds where it is asked for, a task without
            usable prompts, or a dataset or tokenizer that changed since training.
    """
    kept = open_consensus(run.path) if options.consensus else None
    ig, by_word = options.method == "ig", options.method != "exact"  # which edits a feature at all positions at once
    estimator = Estimator(
        options.method, options.rule if ig else None, options.n_nodes if ig else None, options.baseline
    )
    with ExitStack() as stack:
        stack.enter_context(working(run))
        crosscoder, acts = read_run(run, device, reads_text=False, allow_changed_data=options.allow_changed_data)
        stack.enter_context(together(acts.settings.device))
        shares = encoder_shares(run, crosscoder.cfg.d_sae, acts.snapshots.labels)
        for spec, task in zip(options.task, parse_tasks(options.task), strict=True):
            _note(run, "attribute", task, options)
            selection, _ = task.split(options.seed)
            runs = PromptRuns(
                crosscoder, acts.snapshots, selection, paired=needs_pairs(options.baseline), settings=acts.settings
            )
            check_statistics(task.name, len(runs))
            ie = attribute_effects(runs, estimator, positions=by_word, n_exact=options.n_exact, n_bootstrap=200)
            if kept is not None:
                ie = ie.among(kept)
            tables = effect_tables(ie, crosscoder, shares)
            if ig:
                tables[f"completeness/{task.name}"] = tables[f"attribution/{task.name}.snapshots"]
            run.save_tables(tables)
            accuracy = measure_accuracy(run, task, acts.snapshots, acts.settings)
            _record(run, task, spec, options.seed, {})
            yield task.name, Attributed(ie, tables, accuracy, runs)


def ablate(run: RunDir, options: AblateOptions, *, device: str | None = None) -> Iterator[tuple[str, Ablated]]:
    """Ablate the top features, and keep only them, on the held-out half of the prompts of tasks.

    Args:
        run: with effects on the tasks, from `attribute`.
        options: the tasks, sizes of sets and draws.
        device: of models and crosscoder; CUDA if available.

    Yields:
        Name and results of every task; its table is saved by then.

    Raises:
        UserError: a task without effects, or with another split than that of its effects; sets larger than the
            features that are active.
    """
    with ExitStack() as stack:
        stack.enter_context(working(run))
        tasks = parse_tasks(options.task)
        for spec, task in zip(options.task, tasks, strict=True):
            if run.table(f"attribution/{task.name}") is None:
                raise UserError(
                    f"{run.path} has no effects on {task.name!r}; run `crosslens attribute {run.path} --task {spec}` "
                    "first"
                )
            check_split(run, task, options.seed)
        crosscoder, acts = read_run(run, device, reads_text=False, allow_changed_data=options.allow_changed_data)
        stack.enter_context(together(acts.settings.device))
        effects = {task.name: known_effects(task.name, _tables(run, task), crosscoder) for task in tasks}
        for task in tasks:
            ie = effects[task.name]
            assert ie is not None
            _note(run, "ablate", task, options, effects=_effects_made_with(run, task))
            _, held_out = task.split(options.seed)
            paired = needs_pairs(options.baseline or ie.estimator.baseline)
            runs = PromptRuns(crosscoder, acts.snapshots, held_out, paired=paired, settings=acts.settings)
            check_statistics(task.name, len(runs))
            controls = Controls(n_draws=options.n_draws, seed=options.seed)
            curves = ablation_table(runs, ie, options.k, [0, *options.k], controls, options.baseline)
            run.save_table(f"ablation/{task.name}", curves)
            run.update(studied={task.name: {**_studied(run, task), "ablation": True}})
            yield task.name, Ablated(curves, runs)


def study(run: RunDir, options: StudyOptions, *, device: str | None = None) -> Iterator[tuple[str, Study]]:
    """Run every causal analysis of tasks: effects, ablation with controls, transfer, additivity, timeline, validation,
    dates, and languages where the items are of several.

    A study that was interrupted continues after the analyses that are complete, and one after `attribute` and `ablate`
    takes their tables. One with other sizes begins anew, with the effects that are there.

    Args:
        run: with a trained crosscoder; after `evolve` readability is validated beside the effects, and effects of
            features that are read from later snapshots are marked.
        options: the tasks, numbers of features and draws.
        device: of models and crosscoder; CUDA if available.

    Yields:
        Name and results of every task; its tables are saved by then.

    Raises:
        UserError: as `crosslens.causal.study`; or another split than that of the effects that are there.
    """
    sizes = json.loads(json.dumps({name: value for name, value in decisive(options).items() if name not in _OTHERS}))
    with ExitStack() as stack:
        stack.enter_context(working(run))
        tasks = parse_tasks(options.task)
        for task in tasks:
            if run.table(f"attribution/{task.name}.snapshots") is not None:
                check_split(run, task, options.seed)
        crosscoder, acts = read_run(run, device, reads_text=False, allow_changed_data=options.allow_changed_data)
        stack.enter_context(together(acts.settings.device))
        lifecycles = evolved_table(run, "lifecycles")
        for spec, task in zip(options.task, tasks, strict=True):
            known, studied = from_first(lambda task=task: (_tables(run, task), _studied(run, task)))
            if studied.get("sizes") != sizes:
                kinds = ("attribution/", "prompts/", *["ablation/"] * bool(studied.get("ablation")))
                known = {name: table for name, table in known.items() if name.startswith(kinds)}
            _record(run, task, spec, options.seed, {"sizes": sizes, "ablation": True})
            of_others = from_first(lambda task=task: _effects_made_with(run, task, by=("attribute",)))
            _note(run, "study", task, options, effects=of_others if f"attribution/{task.name}" in known else None)
            accuracy = from_first(lambda: run.table("accuracy"))
            if accuracy is None or task.name not in set(accuracy["task"]):
                accuracy = measure_accuracy(run, task, acts.snapshots, acts.settings)
            yield (
                task.name,
                study_task(
                    crosscoder,
                    acts.snapshots,
                    task,
                    baseline=options.baseline,
                    decodability=_decodability(run, crosscoder.cfg.d_sae, acts.snapshots.labels),
                    encoder_share=encoder_shares(run, crosscoder.cfg.d_sae, acts.snapshots.labels),
                    births=None if lifecycles is None else pd.DataFrame(lifecycles[lifecycles["measure"] == "r2"]),
                    sizes=options,
                    seed=options.seed,
                    settings=acts.settings,
                    accuracy=pd.DataFrame(accuracy[accuracy["task"] == task.name]),
                    known=known,
                    save=run.save_tables,
                ),
            )


def measure_accuracy(run: RunDir, task: Task, snapshots: Snapshots, settings: ModelSettings) -> pd.DataFrame:
    """Measure the accuracy on a task, and replace its rows in the table "accuracy"; returns the new rows."""
    measured, before = task.accuracy(snapshots, settings=settings), run.table("accuracy")
    others = None if before is None else pd.DataFrame(before[before["task"] != task.name])
    together = measured if others is None else pd.concat([others, measured], ignore_index=True)
    run.save_table("accuracy", together, keeps=others is not None and len(others) > 0)
    return measured


def check_split(run: RunDir, task: Task, seed: int) -> None:
    """Refuse a task whose items or split are not those that its effects in the run were estimated on.

    Raises:
        UserError: the seed or the items differ; runs of before version 0.3 do not record them.
    """
    of_table = run.made_with(f"attribution/{task.name}").get("split")
    recorded, wanted = of_table or run.read_json().get("splits", {}).get(task.name), _split(task, seed)
    if recorded is None or all(recorded[key] == wanted[key] for key in recorded.keys() & wanted.keys()):
        return
    if recorded["seed"] == wanted["seed"] or recorded["items"] != wanted["items"]:
        raise UserError(
            f"the task {task.name!r} has other items than when its effects in {run.path} were estimated, so features "
            f"would be tested on prompts that they were chosen on: restore the file, or `crosslens remove {run.path} "
            f"--task {shortened(task.name)}` and start again"
        )
    raise UserError(
        f"seed {seed} splits the prompts of {task.name!r} otherwise than seed {recorded['seed']}, which its effects in "
        f"{run.path} were estimated with, so features would be tested on prompts that they were chosen on: use --seed "
        f"{recorded['seed']}, or repeat `crosslens attribute` with --seed {seed}"
    )


def _split(task: Task, seed: int) -> dict[str, object]:
    """What decides the halves of a task's prompts."""
    groups = [task.answers, *(item.group for item in task.items)]
    return {"seed": seed, "items": items_digest(task), "groups": json_checksum(groups)}


def _note(
    run: RunDir,
    verb: str,
    task: Task,
    options: AttributeOptions | AblateOptions | StudyOptions,
    effects: dict[str, Any] | None = None,
) -> None:
    """What the tables of a task are made with: the options of the command, the split of the prompts, and the options of
    the command that has left the effects they are made of."""
    made = {key: value for key, value in decisive(options).items() if key != "task"}
    run.note(**{verb: made}, split=_split(task, options.seed), effects=effects)


def _effects_made_with(run: RunDir, task: Task, by: Sequence[str] = ("attribute", "study")) -> dict[str, Any] | None:
    """The options of the command that has left the effects on a task, if it is one of these."""
    made = run.made_with(f"attribution/{task.name}")
    return next((made[verb] for verb in by if verb in made), None)


def _record(run: RunDir, task: Task, spec: str | Task, seed: int, studied: dict[str, Any]) -> None:
    """Write down what was asked for, how the prompts are split, and which analyses belong to the effects."""
    spelling = {task.name: spec} if isinstance(spec, str) else {}
    run.update(tasks=spelling, splits={task.name: _split(task, seed)}, studied={task.name: studied})


def _studied(run: RunDir, task: Task) -> dict[str, Any]:
    """Which analyses of a task belong to its effects: the sizes of the study, and whether ablations do."""
    return run.read_json().get("studied", {}).get(task.name, {})


def _tables(run: RunDir, task: Task) -> dict[str, pd.DataFrame]:
    """All tables of a task in a run directory."""
    found = {name: run.table(name) for name in run.table_names() if task_of(name) == task.name}
    return {name: table for name, table in found.items() if table is not None}


def _decodability(run: RunDir, d_sae: int, labels: Sequence[str]) -> Tensor | None:
    """R² (F, S) of every feature at every snapshot from the table "evolution", where `evolve` has made it."""
    table = run.table("evolution")
    if table is None or "r2" not in table:
        return None
    wide = table.pivot(index="feature", columns="snapshot", values="r2")
    return torch.tensor(wide.to_numpy(dtype=float)) if wide.shape == (d_sae, len(labels)) else None
