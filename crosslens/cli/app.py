"""The command line: each command calls the function of the pipeline of its name, and prints what it returns.

cyclopts reads the options from the classes in `crosslens.config`. What is not in them is here: run directories,
`--json`, `--config`.
"""

from __future__ import annotations

import math
import os
import select
import shlex
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter

import crosslens.config
from crosslens.cli.arguments import check_published, check_tasks, choose_label, open_trained
from crosslens.cli.config_file import fill
from crosslens.cli.display import Column, Output, counted, number, percent, size
from crosslens.cli.failures import explain
from crosslens.cli.help import Help, parse
from crosslens.config import (
    AblateOptions,
    AccuracyOptions,
    AttributeOptions,
    CacheOptions,
    ConnectOptions,
    CrosscoderOptions,
    EvolveOptions,
    Format,
    HarvestOptions,
    LabelOptions,
    ModelOptions,
    PlanOptions,
    ReportOptions,
    SeedsOptions,
    SourceOptions,
    SteerOptions,
    StudyOptions,
    SweepOptions,
    TraceOptions,
    TrainingOptions,
)
from crosslens.distributed.devices import check_device, is_first, rank_and_world
from crosslens.errors import UserError, check_file_name, check_inside, visible
from crosslens.pipeline.opening import list_labels, open_run
from crosslens.rundir import RunDir, check_examples, check_no_link, check_writable, share

DIVIDED = {"harvest", "train", "evolve", "attribute", "ablate", "study"}
"""Commands that several processes of torchrun do together."""

_RUN_GROUP = Group("Run directory and output", sort_key=9)
app = App(
    name="crosslens",
    help="Watch a language model learn: crosscoders over pretraining snapshots.",
    help_epilogue="These are the options that most runs need; --help-all lists the others, too. --debug shows the "
    "traceback of a failure. `crosslens --install-completion` completes commands and options in your shell.",
    version=f"crosslens {crosslens.__version__}",
    help_flags=["--help", "--help-all"],
    help_format="markdown",
    version_flags=["--version"],
    config=(lambda *of_command: fill(app, *of_command),),
    default_parameter=Parameter(negative=(), allow_repeating=True),  # of an option that is repeated the last counts
    group_parameters=_RUN_GROUP,
    result_action="return_value",
)
app.register_install_completion_command(add_to_startup=True)

TrainedRun = Annotated[Path, Parameter(name="RUN", help="Run directory written by `crosslens train`.")]
NewRun = Annotated[Path, Parameter(name="--run-dir", help="Run directory; created if missing.")]
Json = Annotated[bool, Parameter(name="--json", help="Print one JSON object on stdout, and everything else on stderr.")]
Device = Annotated[str | None, Parameter(help="cpu, cuda or cuda:N. Default: cuda if available.")]
Config = Annotated[
    Path | None,
    Parameter(
        help="Take options from this file: a .toml with the names of options as keys, or the run.json of an earlier "
        "run. The command line wins.",
    ),
]


# ---------------------------------------------------------------------- before and with training
@app.command(name="ls")
def list_(what: str = "", /, *, steps: str | None = None, json: Json = False) -> None:
    """List model families, the snapshots of a model, releases of crosscoders, or formats of tasks.

    Args:
        what: A model such as pythia-160m, a folder of snapshots, `releases`, a release, or `tasks`.
        steps: Training steps such as 0,512,143000, revisions, or a named set: all, paper, triplet, log:12, linear:12.
    """
    from crosslens.cli.listing import list_snapshots

    list_snapshots(Output(json), what, steps)


@app.command
def accuracy(*, options: AccuracyOptions, models: ModelOptions | None = None, json: Json = False) -> None:
    """Measure how often snapshots prefer the correct answers of tasks, before anything is trained."""
    check_tasks(options.task)
    from crosslens.pipeline.accuracy import accuracy
    from crosslens.tasks import describe_accuracy

    out, results = Output(json), dict[str, Any]()
    for name, table in accuracy(options, models):
        for line in describe_accuracy(table):
            out.say(line)
        results[name] = table
    out.end(tasks=results)


@app.command
def plan(
    *,
    source: SourceOptions,
    crosscoder: CrosscoderOptions | None = None,
    training: TrainingOptions | None = None,
    models: ModelOptions | None = None,
    cache: CacheOptions | None = None,
    options: PlanOptions | None = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Estimate disk, memory and time of a harvest and of training, without downloading weights."""
    del config
    from crosslens.pipeline.planning import plan

    found, out = plan(source, crosscoder, training, models=models, cache=cache, options=options), Output(json)
    out.say(str(found.plan))
    null: dict[str, float] | None = None
    for verb, forecast in found.forecasts.items():
        time = "time not measured" if math.isnan(forecast.seconds) else f"about {forecast.seconds / 60:.1f} min"
        out.say(f"{verb}: {time} in one process here, {forecast.memory / 2**30:.2f} GiB of memory")
    if (steps := found.steps) is not None:
        out.say(
            f"train: {steps.n:,} steps of {steps.tokens:,} tokens take {steps.low / 60:.1f} min if no feature dies and "
            f"{steps.high / 60:.1f} if a third do, since their auxiliary loss takes time; the forecast is half-way, as "
            "how many will die is not known; as much for every further seed"
        )
        passes = max(found.plan.passes, 1)
        null = {
            "forward_tokens": found.plan.forwards * passes,
            "seconds": found.plan.seconds * passes,
            "bytes": found.plan.live_bytes,
        }
        time = f", about {null['seconds']:,.0f} s" if math.isfinite(null["seconds"]) else ""
        out.say(
            f"evolve --untrained or --null: another training each, live and with nothing on disk: "
            f"{null['forward_tokens']:,.0f} tokens through models{time}, {null['bytes'] / 2**30:.2f} GiB of memory for "
            "models and activations, and the training steps"
        )
    for line in found.untrained:
        out.say(line)
    out.end(
        plan=found.plan,
        forecasts={verb: forecast._asdict() for verb, forecast in found.forecasts.items()},
        steps=None if steps is None else steps._asdict(),
        null=null,
        warnings=found.untrained,
    )


@app.command
def harvest(
    *,
    source: SourceOptions,
    options: HarvestOptions,
    models: ModelOptions | None = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write activations to disk. Run the same command again to resume; several may run at once."""
    del config
    from crosslens.pipeline.harvesting import harvest

    acts, out, folder = harvest(source, options, models), Output(json), options.cache
    labels, hooks = acts.snapshots.labels, list(source.hook)
    out.say(f"{acts.n_tokens:,} tokens x {len(labels)} snapshots at {' and '.join(hooks)} in {folder}")
    out.end(tokens=acts.n_tokens, snapshots=labels, hooks=hooks, cache=folder)


@app.command
def train(
    *,
    run_dir: NewRun,
    source: SourceOptions,
    crosscoder: CrosscoderOptions | None = None,
    training: TrainingOptions | None = None,
    models: ModelOptions | None = None,
    cache: CacheOptions | None = None,
    seeds: SeedsOptions | None = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a crosscoder, in one process or under torchrun. Run the same command again to resume.

    The defaults suit long runs. In a small one give --d-sae, --k, --lr and --dead-tokens, and look at the evaluation.
    """
    del config  # `fill` has read it
    from crosslens.pipeline.training import train

    out, run = Output(json), RunDir(run_dir)
    trained = train(
        run, source, crosscoder or CrosscoderOptions(), training, models=models, cache=cache, seeds=seeds, say=out.say
    )
    made, found = next(iter(trained.crosscoders.values())), dict[str, Any]()
    if is_first():
        from crosslens.cli.results import show_training

        runs = {one: run if one == source.seed else run.other_seed(one) for one in trained.crosscoders}
        show_training(out, runs, f"{type(made).__name__} with {counted(made.cfg.d_sae, 'feature')} saved in {run_dir}")
        found = {"timings": run.read_json().get("timings", {}), "evaluation": run.table("evaluation")}
        if trained.agreement:
            out.say(trained.agreement)
            found["seeds"] = run.table("seeds")
    place = shlex.quote(str(run_dir))
    out.say(f"next: crosslens evolve {place} (when features are born)")
    out.say(f"   or crosslens attribute {place} --task ... (which of them a task needs)")
    out.end(run=run_dir, features=made.cfg.d_sae, **found)


@app.command
def sweep(
    *,
    run_dir: NewRun,
    source: SourceOptions,
    grid: SweepOptions,
    training: TrainingOptions | None = None,
    models: ModelOptions | None = None,
    cache: CacheOptions | None = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train several numbers of features and k, each from several seeds, and propose one; before `train`.

    It runs d_sae × k × seeds trainings, one after the other in one process, on one hook point. The architecture must
    have a k (not jumprelu or standard), and lr and the other options are the same for all. Nothing outside the grid is
    looked at. With two seeds, the range of the agreement is most of its uncertainty: settings within it are equal.
    """
    del config
    from crosslens.pipeline.sweeping import sweep

    choice, out = sweep(RunDir(run_dir), source, grid, training, models=models, cache=cache), Output(json)
    columns = [Column("F"), Column("k"), Column("mean EV"), Column("least EV"), Column("dead"), Column("live"),
               Column("in another seed"), Column("their variance", drop=1)]  # fmt: skip
    rows = [
        (
            f"{row['d_sae']:,.0f}", f"{row['k']:g}", number(row["explained_variance"]), number(row["least_explained"]),
            percent(row["dead"]), f"{row['live']:,.0f}", percent(row["agreement"], 0), percent(row["variance"], 0),
        )
        for row in choice.table.to_dict("records")
    ]  # fmt: skip
    out.table(columns, rows, title=f"{counted(len(rows), 'setting')}, each from {grid.seeds} seeds")
    out.say(choice.reason)
    out.end(run=run_dir, settings=choice.table, reason=choice.reason)


# ---------------------------------------------------------------------- analyses of a run
@app.command
def evolve(
    path: TrainedRun,
    /,
    *,
    options: EvolveOptions | None = None,
    device: Device = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Analyse when features form, rotate, split and fade, the phases of training, and probes of some features."""
    del config
    run = open_trained(path)
    check_device(device)
    from crosslens.cli.results import count_lifecycles, show_evolution
    from crosslens.pipeline.evolving import evolve

    tables, out = evolve(run, options, device=device), Output(json)
    show_evolution(out, tables, path)
    labels = tables["doubtful"]["label"].tolist()
    counts = {name: tables[name] for name in ("birth_counts", "doubtful")}
    out.end(
        run=path, snapshots=labels, lifecycles=count_lifecycles(tables["lifecycles"]), **counts,
        probes=tables["probe_presence"],
    )  # fmt: skip


@app.command
def attribute(path: TrainedRun, /, *, options: AttributeOptions, device: Device = None, json: Json = False) -> None:
    """Estimate the effect of every feature on tasks at every snapshot, on the selection half of their prompts."""
    run = open_trained(path)
    check_tasks(options.task)
    check_device(device)
    if options.consensus:
        run.consensus()  # refused before the imports below, which take seconds
    from crosslens.cli.results import show_effects
    from crosslens.pipeline.studying import attribute

    out, results = Output(json), dict[str, Any]()
    for name, found in attribute(run, options, device=device):
        results[name] = show_effects(out, name, found, run)
    out.say(f"all effects, with intervals: crosslens report {shlex.quote(str(path))}")
    out.end(run=path, tasks=results)


@app.command
def ablate(path: TrainedRun, /, *, options: AblateOptions, device: Device = None, json: Json = False) -> None:
    """Ablate the top features, and keep only them, on the held-out half of the prompts of tasks."""
    run = open_trained(path)
    check_tasks(options.task)
    check_device(device)
    from crosslens.cli.results import show_ablation
    from crosslens.pipeline.studying import ablate

    out, results = Output(json), dict[str, Any]()
    for name, found in ablate(run, options, device=device):
        results[name] = show_ablation(out, name, found.curves, found.runs)
    out.end(run=path, tasks=results)


@app.command
def study(
    path: TrainedRun,
    /,
    *,
    options: StudyOptions,
    device: Device = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Run every causal analysis of tasks: effects, ablation with controls, transfer, additivity, timeline, validation.

    What `attribute` and `ablate` have left is used again. Repeat it after an interruption and it continues.
    """
    del config
    run = open_trained(path)
    check_tasks(options.task)
    check_device(device)
    from crosslens.cli.results import show_study
    from crosslens.pipeline.studying import study

    out, results = Output(json), dict[str, Any]()
    for name, found in study(run, options, device=device):
        results[name] = show_study(out, found, options.k)
    out.say(f"transfer, additivity, timeline, validation: crosslens report {shlex.quote(str(path))}")
    out.end(run=path, tasks=results)


@app.command
def trace(
    path: TrainedRun, /, *prompts: str, options: TraceOptions | None = None, device: Device = None, json: Json = False
) -> None:
    """Trace prompts through all snapshots: next tokens, which features fire, which matter and since when.

    One prompt has no error bars: its effects are sizes. `crosslens report` draws them on the page Prompts.

    Args:
        prompts: Texts, each in quotes.
    """
    run = open_trained(path)
    check_device(device)
    from crosslens.cli.prompts import show_trace
    from crosslens.pipeline.tracing import trace

    found, out = trace(run, prompts, options, device=device), Output(json)
    show_trace(out, found, run)
    out.say(f"word by word: crosslens report {shlex.quote(str(path))} (page Prompts)")
    frames = {name: getattr(found, name) for name in ("prompts", "predictions", "features", "tokens")}
    out.end(run=path, snapshots=found.labels, error_bars=None, **frames)


@app.command
def steer(path: TrainedRun, /, *prompts: str, options: SteerOptions, device: Device = None, json: Json = False) -> None:
    """Continue prompts with features turned up or down, beside what the model writes otherwise.

    Args:
        prompts: Texts, each in quotes.
    """
    run = open_trained(path)
    check_device(device)
    from crosslens.cli.prompts import show_steered
    from crosslens.pipeline.steering import steer

    out, rows = Output(json), [*steer(run, prompts, options, device=device)]
    show_steered(out, rows, run)
    out.end(run=path, steered=rows)


@app.command
def connect(path: TrainedRun, /, *, options: ConnectOptions, device: Device = None, json: Json = False) -> None:
    """Find which features of an earlier hook point make the features of a run fire, on the prompts of tasks."""
    run = open_trained(path)
    open_trained(options.lower)
    check_tasks(options.task)
    check_device(device)
    from crosslens.cli.results import show_edges
    from crosslens.pipeline.connecting import connect

    out, results = Output(json), dict[str, Any]()
    for name, table in connect(run, options, device=device):
        show_edges(out, name, table, run, RunDir(options.lower))
        results[name] = table
    out.say(f"at every snapshot: crosslens report {shlex.quote(str(path))} (pages of tasks), or --json")
    out.end(run=path, edges=results)


@app.command
def run(config: Annotated[Path, Parameter(name="CONFIG.toml")], /) -> None:
    """Go from snapshots to a report in one command. Repeat it after an interruption and it continues.

    The file has run_dir at the top, and a table per command with its options: [train], and where wanted [evolve],
    [study], [label] and [report].

    Args:
        config: A .toml file with run_dir and the tables [train], [evolve], [study], [label], [report].
    """
    from crosslens.cli.running import run_commands

    run_commands(config, app)


@app.command
def status(path: TrainedRun, /, *, json: Json = False) -> None:
    """Say what a run directory holds, what is missing or damaged, and the next command to type."""
    RunDir.open(path).read_json()
    from crosslens.cli.status import inspect_run

    out, found = Output(json), inspect_run(path)
    columns = [Column("part", left=True), Column("state", left=True), Column("contents", left=True)]
    out.table(columns, [part[:3] for part in found.parts], title=f"{path}: {found.about}")
    out.say(f"next: {found.next}")
    out.end(run=path, about=found.about, parts=[part._asdict() for part in found.parts], next=found.next)


@app.command
def export(
    run_dir: TrainedRun,
    /,
    *,
    format: Format,
    snapshot: str | None = None,
    to: Path | None = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write a crosscoder or its features in a format of other tools.

    Args:
        format: sae: one snapshot as a folder that sae_lens.SAE.load_from_disk reads; json: all features in one file,
            with labels, lifecycles, examples and logit lens; neuronpedia: the features of one snapshot as batch files
            of SAEDashboard 0.8. json and neuronpedia need `crosslens evolve` first.
        snapshot: Label of the snapshot, for sae and neuronpedia. Default: the last one.
        to: Folder, or for json the file. Default: in the folder exports of the run.
    """
    open_trained(run_dir)
    check_device(device)
    check_writable(run_dir if to is None else to.parent)

    if format == "json" and snapshot is not None:
        raise UserError(f"--snapshot {snapshot} is not for --format json, which holds all snapshots: leave it out")
    out, labels = Output(json), list_labels(run_dir)
    chosen = labels[-1] if snapshot is None else choose_label(labels, snapshot)
    name = "features.json" if format == "json" else f"{format}-{chosen}"
    place = to or run_dir / "exports" / check_file_name(name, "without --to the export")
    if to is None:
        check_no_link(place, run_dir)

    if format == "json":
        from crosslens.sharing.feature_files import write_features

        path = write_features(RunDir(run_dir), place)
        out.say(f"{path}: features at {counted(len(labels), 'snapshot')}, {size(path.stat().st_size)}")
        out.end(run=run_dir, format=format, files=[path])
        return
    _, crosscoder, acts = open_run(run_dir, device)
    if format == "neuronpedia":
        from crosslens.sharing.feature_files import write_neuronpedia

        files = write_neuronpedia(RunDir(run_dir), place, chosen, len(acts.held_out_tokens()))
        out.say(
            f"{place}: {counted(crosscoder.cfg.d_sae, 'feature')} at {chosen} in {counted(len(files), 'batch file')}"
        )
        out.end(run=run_dir, format=format, snapshot=chosen, files=files)
        return
    from crosslens.sharing import export_sae

    sae = export_sae(crosscoder, acts, chosen)
    for path in sae.save_model(place):
        share(Path(path))
    metadata = sae.cfg.metadata
    names = ("explained_variance", "crosscoder_explained_variance", "l0", "crosscoder_l0", "feature_agreement")
    measured_values = {name: getattr(metadata, name) for name in names}
    columns = [Column("on held-out tokens", left=True), Column("EV"), Column("L0")]
    rows = [
        (who, number(measured_values[f"{part}explained_variance"]), number(measured_values[f"{part}l0"], 1))
        for who, part in (("SAE", ""), ("crosscoder", "crosscoder_"))
    ]
    out.table(columns, rows, title=f"{place}: a JumpReLU SAE of {counted(crosscoder.cfg.d_sae, 'feature')} at {chosen}")
    out.say(f"features are active on the same tokens with a mean F1 of {number(metadata.feature_agreement, 2)}")
    out.say(f'load it with sae_lens.SAE.load_from_disk("{place}")')
    out.end(run=run_dir, format=format, snapshot=chosen, folder=place, **measured_values)


@app.command
def diff(
    a: Annotated[Path, Parameter(name="A", help="Run directory.")],
    b: Annotated[Path, Parameter(name="B", help="Another run directory.")],
    /,
    *,
    device: Device = None,
    json: Json = False,
) -> None:
    """Compare two runs: settings, explained variance, and matched features if both have the same snapshots."""
    runs = open_trained(a), open_trained(b)
    check_device(device)
    from crosslens.cli.comparison import read_pairs, show_comparison

    show_comparison(Output(json), *runs, *read_pairs(*runs, device))


@app.command
def remove(path: TrainedRun, /, *, task: tuple[str, ...], json: Json = False) -> None:
    """Delete the tables of tasks from a run; the report then leaves them out.

    Args:
        task: Name of a task, as the report shows it. Repeat it for several.
    """
    run, out, removed = RunDir.open(path), Output(json), dict[str, list[str]]()
    with run.writing():
        for name in task:
            removed[name] = run.remove_task(name)
            out.say(f"{name}: {', '.join(removed[name])}")
    out.end(run=path, removed=removed)


@app.command
def label(
    path: TrainedRun,
    /,
    *,
    options: LabelOptions | None = None,
    dry_run: bool = False,
    yes: bool = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Label features with a language model, and score the labels.

    The key is read from OPENAI_API_KEY or ANTHROPIC_API_KEY.

    Args:
        dry_run: Estimate the cost without sending a request.
        yes: Do not ask for confirmation.
    """
    del config
    options = options or LabelOptions()  # refuses
    check_examples(RunDir.open(path))  # before the imports below, which take seconds
    from crosslens.features.labels import Estimate, complexity_correlation, describe_labels, summarise_labels
    from crosslens.pipeline.labelling import label

    run, out = RunDir(path), Output(json)

    def confirm(estimate: Estimate) -> bool:
        out.say(str(estimate))
        if not dry_run and estimate.requests and not options.local and not yes:
            sys.stderr.write("Send them? [y/N] ")
            sys.stderr.flush()
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                sys.stderr.write("nothing was sent\n")
                sys.exit(1)
        return not dry_run

    labels = label(run, options, confirm=confirm)
    estimate = labels.estimate
    if dry_run:
        out.end(run=path, estimate=estimate)
        return
    counts = ", ".join(f"{count} {status}" for status, count in labels.table["status"].value_counts().items())
    out.say(f"{counts}; {labels.tokens_in:,} tokens in, {labels.tokens_out:,} out")
    if labels.detections:
        out.say(f"detections: {', '.join(f'{count} {status}' for status, count in labels.detections.items())}")
    lifecycles, table = run.table("lifecycles"), run.table("labels")
    for line in [] if table is None else describe_labels(table):
        out.say(line)
    correlations: list[dict[str, Any]] = []
    if lifecycles is not None and table is not None and table["complexity"].notna().any():
        from crosslens.report.tables import by_measure

        correlations = complexity_correlation(table, by_measure(lifecycles), unit="index").to_dict("records")
        for row in correlations:
            interval = f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            words = f"Spearman {row['spearman']:+.2f} {interval}, {row['n']} features"
            out.say(f"complexity and {row['event']}: {words}")
    tokens = {"in": labels.tokens_in, "out": labels.tokens_out}
    scores = None if table is None else summarise_labels(table)
    out.end(run=path, estimate=estimate, labels=labels.table, tokens=tokens, scores=scores, complexity=correlations)


@app.command
def report(
    path: TrainedRun, /, *, options: ReportOptions | None = None, config: Config = None, json: Json = False
) -> None:
    """Write the HTML report of a run."""
    del config
    run = RunDir.open(path)
    run.read_json()
    if options and options.consensus:
        run.consensus()  # refused before the imports below, which take seconds
    from crosslens.pipeline.reporting import report

    out = Output(json)
    page, logged = report(run, options)
    out.say(str(page))
    if logged is not None:
        out.say(f"W&B run {logged}")
    out.end(run=path, page=page, wandb=logged)


@app.command
def push(
    source: Annotated[Path, Parameter(name="RUN", help="Run directory, or folder of a crosscoder.")],
    repository: str,
    /,
    *,
    id: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    licence: str | None = None,
    json: Json = False,
) -> None:
    """Publish a crosscoder on the Hugging Face hub, with a model card.

    Args:
        repository: Repository on the hub, such as someone/name; created if missing.
        id: Folder in the repository. Default: the hook point.
        private: Create a private repository.
        dry_run: Show what would be uploaded.
        licence: Licence of the weights, such as mit.
    """
    from crosslens.sharing.repositories import check_repository

    check_published(source)
    check_repository(repository)
    if id is not None:
        check_inside(id, "--id")
    from crosslens.sharing.publishing import push_to_hub

    out = Output(json)
    pushed = push_to_hub(source, repository, id, private=private, dry_run=dry_run, licence=licence)
    out.say(str(pushed))
    out.end(push=pushed)


@app.command
def demo(*, out: Path = Path("runs/demo"), seed: Annotated[int, crosslens.config.SEED] = 0, json: Json = False) -> None:
    """Pretrain a tiny model, train a crosscoder on its snapshots, and write the report: minutes on two CPU cores.

    Args:
        out: Run directory; created if missing.
        seed: Seed of all random numbers.
    """
    RunDir(out).check_settings({"seed": seed}, part="demo")
    from crosslens.cli.demo import run_demo

    shown, summary = Output(json), run_demo(out, seed)
    shown.say(f"done in {summary['seconds']:.0f} s; open {out / 'report' / 'index.html'}")
    shown.end(run=out, summary=summary)


# ---------------------------------------------------------------------- processes
def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Write a warning to stderr in one line, without the line of code that raised it."""
    if issubclass(category, UserWarning):
        from crosslens.progress import say

        say(f"warning: {' '.join(str(message).split())}")
    else:
        sys.stderr.write(visible(warnings.formatwarning(message, category, *where[:2])))


def main() -> None:
    """Run the command line; every failure is one line on stderr, with the exit codes of `failures`."""
    # must precede the import of torch: threads that busy-wait slow down a loaded machine several times over
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug, everything = "--debug" in sys.argv, "--help-all" in sys.argv
    try:
        app.help_formatter = Help(all=everything)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            words = [each for each in sys.argv[1:] if each != "--debug"]
            command = parse(app, words)
            if "TORCHELASTIC_RUN_ID" in os.environ and not {*words[:1]} & DIVIDED and rank_and_world()[1] > 1:
                raise UserError(
                    f"crosslens {' '.join(words[:1])} runs in one process: start it without torchrun, which is for "
                    f"{', '.join(sorted(DIVIDED))}"
                )
            command()
        sys.stdout.flush()
        sys.exit(0)
    except (SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # torch.distributed.checkpoint's own does not derive from Exception
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more on exit
            sys.exit(1)  # quietly, as rich does with a page of help
        if debug:
            sys.stderr.write(visible(traceback.format_exc()))
        words, code = explain(error)
        sys.stderr.write(f"crosslens: {visible(' '.join(words.split()))}\n")
        sys.exit(code)


def _nobody_reads() -> bool:
    """Whether what read the output has ended, as `head` does."""
    if not hasattr(select, "poll"):  # on Windows, where a pipe fails in another way
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are always told
    return bool(output.poll(0))
