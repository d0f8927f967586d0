"""The command line: each verb is a thin call of the function of its name, over a run directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosslens.cli.arguments import (
    open_activations,
    open_run,
    parse_architecture,
    parse_numbers,
    parse_snapshots,
    parse_steps,
    parse_task,
)
from crosslens.errors import UserError

if TYPE_CHECKING:
    from crosslens.snapshots.families import Revision

app = typer.Typer(
    name="crosslens",
    help="Watch a language model learn: crosscoders over pretraining snapshots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunArgument = Annotated[Path, typer.Argument(help="Run directory that `crosslens train` made.", metavar="RUN")]
TaskOption = Annotated[
    str,
    typer.Option(
        "--task",
        help="demo:simple, sva:FILE, blimp:UID, blimp:FILE, or FILE (jsonl, csv: columns prefix, correct, wrong).",
    ),
]
SnapshotsOption = Annotated[
    str,
    typer.Option(
        "--snapshots",
        help="Folder with snapshots; a model such as pythia-160m, olmo-1b-0724, olmo2-1b or bloom-1b1 (with --steps); "
        "a hub name with @ and revisions such as org/model@step0,step1000, or their pattern such as "
        "org/model@step{step}; a release such as crosslens-demo; or demo.",
    ),
]
StepsOption = Annotated[
    str | None,
    typer.Option("--steps", help="Steps such as 0,512,143000, revisions, or a set: paper, triplet, log:12, linear:12."),
]
HookOption = Annotated[str, typer.Option("--hook", help="Hook point such as blocks.6.hook_resid_post.")]
DatasetOption = Annotated[str, typer.Option("--dataset", help="Hub name, or a text, jsonl, csv or parquet file.")]
TokensOption = Annotated[int | None, typer.Option("--n-tokens", help="Activations to train on; all when left out.")]
EpochsOption = Annotated[
    int | None, typer.Option("--training-tokens", help="More than --n-tokens means several epochs.")
]
DtypeOption = Annotated[str, typer.Option("--cache-dtype", help="bfloat16, float32 or int8 on disk.")]
ContextOption = Annotated[int | None, typer.Option("--context-size", help="Tokens per sequence.")]
ColumnOption = Annotated[str, typer.Option("--text-column", help="Column of the documents.")]
SampleOption = Annotated[str, typer.Option("--sample-by", help="What a document is in a text file: line or paragraph.")]
ArchitectureOption = Annotated[str, typer.Option("--architecture", help="standard, topk, batchtopk or jumprelu.")]
KOption = Annotated[int, typer.Option("--k", help="Features kept per token (topk, batchtopk).")]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Activations per step.")]
SlicesOption = Annotated[
    int, typer.Option("--data-parallel", help="Groups of processes that split a batch; in a group they split features.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
BackendOption = Annotated[str, typer.Option("--backend", help="bridge or hooked_transformer.")]


@app.command("ls")
def list_what(
    what: Annotated[
        str, typer.Argument(help="A model such as pythia-160m, a folder, releases, or one; families when left out.")
    ] = "",
    steps: StepsOption = None,
) -> None:
    """List the families, the snapshots of one model and which are on this disk, or the releases of crosscoders."""
    from crosslens.snapshots import families

    if what and not Path(what).exists() and "@" not in what and families.match_model(what) is None:
        from crosslens.sharing.registry import describe_releases, list_releases

        if what == "releases" or what in list_releases():
            for line in describe_releases(None if what == "releases" else what):
                typer.echo(line)
            return
    for line in list_snapshots(what, steps) if what else list_families():
        typer.echo(line)


@app.command()
def plan(
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    n_tokens: TokensOption = None,
    training_tokens: EpochsOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    cache: Annotated[Path, typer.Option("--cache", help="Where a cache would lie.")] = Path("."),
    cache_dtype: DtypeOption = "bfloat16",
    d_sae: Annotated[
        int | None, typer.Option("--d-sae", help="Features; with it, memory of training is stated.")
    ] = None,
    architecture: ArchitectureOption = "batchtopk",
    k: KOption = 64,
    batch_size: BatchOption = 4096,
    processes: Annotated[int, typer.Option("--processes", help="That torchrun is to start.")] = 1,
    data_parallel: SlicesOption = 1,
    text_column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    device: DeviceOption = "cpu",
    backend: BackendOption = "bridge",
) -> None:
    """Say what a harvest, and a training, cost, before models are run and weights are downloaded."""
    options: dict[str, Any] = {"text_column": text_column, "sample_by": sample_by, "device": device, "backend": backend}
    acts = open_activations(snapshots, steps, hook, dataset, n_tokens, context_size, **options)
    planned = acts.plan(
        training_tokens=training_tokens,
        folder=cache,
        dtype=cache_dtype,
        architecture=None if d_sae is None else parse_architecture(architecture, d_sae, k),
        batch_size=batch_size,
        processes=processes,
        data_parallel=data_parallel,
    )
    typer.echo(str(planned))


@app.command()
def harvest(
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the activations; made when missing.")],
    n_tokens: TokensOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    cache_dtype: DtypeOption = "bfloat16",
    evict: Annotated[bool, typer.Option("--evict", help="Afterwards delete the weights downloaded for it.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the checksums of what is there.")] = False,
    text_column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    backend: BackendOption = "bridge",
) -> None:
    """Write activations to disk; the same command goes on after an interruption, and may run several times at once."""
    options: dict[str, Any] = {"text_column": text_column, "sample_by": sample_by, "device": device, "backend": backend}
    acts = open_activations(snapshots, steps, hook, dataset, n_tokens, context_size, seed=seed, **options)
    acts.cache(cache, cache_dtype, evict=evict, verify=verify)
    _say(f"{acts.n_tokens:,} tokens x {acts.n_snapshots} snapshots at {hook} in {cache}")


@app.command()
def train(
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Directory of the run; made when missing.")],
    d_sae: Annotated[int, typer.Option("--d-sae", help="Number of features.")],
    architecture: ArchitectureOption = "batchtopk",
    k: KOption = 64,
    n_tokens: TokensOption = None,
    training_tokens: EpochsOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    batch_size: BatchOption = 4096,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 3e-4,
    dead_tokens: Annotated[
        int, typer.Option("--dead-tokens", help="A feature silent for so many activations counts as dead.")
    ] = 10_000_000,
    n_checkpoints: Annotated[int, typer.Option("--n-checkpoints", help="Checkpoints to resume from.")] = 4,
    data_parallel: SlicesOption = 1,
    cache: Annotated[Path | None, typer.Option("--cache", help="Write activations here once, and read them.")] = None,
    cache_dtype: DtypeOption = "bfloat16",
    text_column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    backend: BackendOption = "bridge",
    wandb_project: Annotated[str | None, typer.Option("--wandb-project", help="Log to this W&B project.")] = None,
) -> None:
    """Train a crosscoder, in one process or under torchrun; the same command continues after an interruption."""
    from crosslens.activations.cache import check_dtype
    from crosslens.distributed.parallel import n_processes
    from crosslens.rundir import RunDir
    from crosslens.training.run import claim
    from crosslens.training.run import train as train_crosscoder
    from crosslens.training.trainer import TrainConfig

    architecture_config = parse_architecture(architecture, d_sae, k)
    options: dict[str, Any] = {"text_column": text_column, "sample_by": sample_by, "device": device, "backend": backend}
    acts = open_activations(snapshots, steps, hook, dataset, n_tokens, context_size, seed=seed, **options)
    config = TrainConfig(
        run_dir=run_dir,
        training_tokens=training_tokens,
        batch_size=batch_size,
        lr=lr,
        dead_tokens=dead_tokens,
        n_checkpoints=n_checkpoints,
        data_parallel=data_parallel,
        seed=seed,
        device=device,
        wandb_project=wandb_project,
    )
    if cache is not None:
        check_dtype(cache_dtype)
        if _first():
            claim(acts, architecture_config, config)  # the run directory of another run is refused before the harvest
        acts = acts.cache(cache, cache_dtype)
    planned = acts.plan(
        measure=False,
        training_tokens=training_tokens,
        architecture=architecture_config,
        batch_size=batch_size,
        processes=n_processes(),
        data_parallel=data_parallel,
    )
    steps_to_do = (training_tokens or acts.n_tokens) // batch_size
    _say(f"{steps_to_do:,} steps of {batch_size:,} activations\n{planned.training}")
    crosscoder = train_crosscoder(acts, architecture_config, config)
    timings = RunDir(run_dir).read_json().get("timings", {})
    _say(
        f"{type(crosscoder).__name__} with {d_sae} features saved in {run_dir}: {timings.get('train', 0):,.0f} s, "
        f"{timings.get('tokens_per_second', 0):,.0f} activations a second, "
        f"{timings.get('peak_memory', 0) / 2**30:.2f} GiB of memory"
    )


@app.command()
def evolve(run_dir: RunArgument, device: DeviceOption = "cpu") -> None:
    """Lives, directions and controls of every feature, the phases of training, and probes of some features."""
    import pandas as pd

    from crosslens.evolution.study import study_dynamics, study_evolution, study_probes
    from crosslens.features.tables import feature_tables

    run, crosscoder, acts = open_run(run_dir, device)
    history = study_evolution(crosscoder, acts)
    run.save_tables(history)
    run.save_tables(feature_tables(crosscoder, acts))
    run.save_tables(study_dynamics(crosscoder, acts, accuracy=run.table("accuracy")))
    run.save_tables(study_probes(crosscoder, acts))
    table = history["evolution"]
    counts = ", ".join(f"{count} {name}" for name, count in pd.Series(table["origin"]).value_counts().items())
    typer.echo(f"{int(table['alive'].sum())} live features: {counts}")


@app.command()
def attribute(
    run_dir: RunArgument,
    task: TaskOption,
    method: Annotated[str, typer.Option("--method", help="ig, gradient or exact.")] = "ig",
    rule: Annotated[str, typer.Option("--rule", help="gauss_legendre, midpoint or left.")] = "gauss_legendre",
    steps: Annotated[int, typer.Option("--steps", help="Nodes of the rule.")] = 20,
    baseline: Annotated[str, typer.Option("--baseline", help="zero, mean or patch.")] = "zero",
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Effects of every feature on a task, at every snapshot, on one half of its prompts."""
    import pandas as pd

    from crosslens.causal.attribution import attribute as attribute_effects

    run, crosscoder, acts = open_run(run_dir, device)
    prompts = parse_task(task)
    ie = attribute_effects(
        crosscoder,
        acts.snapshots,
        prompts.split(seed)[0],
        method,
        rule=rule,
        steps=steps,
        baseline=baseline,
        device=device,
        backend=acts.settings.backend,
    )
    run.save_table(f"attribution/{prompts.name}", ie.to_frame(crosscoder.decoder_norms))
    run.save_table(f"attribution/{prompts.name}.snapshots", ie.snapshot_frame())
    accuracy = prompts.accuracy(acts.snapshots, device=device)
    before = run.table("accuracy")
    if before is not None:
        accuracy = pd.concat([pd.DataFrame(before[before["task"] != prompts.name]), accuracy], ignore_index=True)
    run.save_table("accuracy", accuracy)
    for s, label in enumerate(ie.labels):
        top = ", ".join(str(i) for i in ie.top(min(5, int(ie.active[:, s].sum())), s).tolist())
        typer.echo(f"{label:>12}  metric {ie.metric_clean[s]:+8.3f}  completeness {ie.completeness[s]:.2%}  top {top}")


@app.command()
def ablate(
    run_dir: RunArgument,
    task: TaskOption,
    k: Annotated[str, typer.Option("--k", help="Sizes of the feature sets.")] = "1,5,15,50",
    value: Annotated[str, typer.Option("--value", help="zero, mean or patch.")] = "zero",
    n_draws: Annotated[int, typer.Option("--n-draws", help="Draws of random and size-matched features.")] = 20,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Ablate, and keep only, the top features on the other half of the prompts."""
    import pandas as pd

    from crosslens.causal.ablation import ablate as ablate_features
    from crosslens.causal.attribution import Attribution

    run, crosscoder, acts = open_run(run_dir, device)
    prompts = parse_task(task)
    frame, snapshots = (run.table(f"attribution/{prompts.name}{part}") for part in ("", ".snapshots"))
    if frame is None or snapshots is None:
        raise UserError(
            f"{run_dir} has no effects on {prompts.name!r}; run `crosslens attribute {run_dir} --task {task}` first"
        )
    ie = Attribution.from_frames(prompts.name, frame, snapshots, crosscoder.cfg.d_sae)
    sizes = parse_numbers(k, "--k")
    tables = [
        ablate_features(
            crosscoder,
            acts.snapshots,
            prompts.split(seed)[1],
            ie,
            sizes,
            keep=keep,
            value=value,
            n_draws=n_draws,
            seed=seed,
            device=device,
            backend=acts.settings.backend,
        )
        for keep in (False, True)
    ]
    table = pd.concat(tables, ignore_index=True)
    run.save_table(f"ablation/{prompts.name}", table)
    last = table[table["snapshot"] == table["snapshot"].max()]
    for row in last.itertuples():
        typer.echo(
            f"{row.label:>12}  {row.mode:>6} {row.features:>12} {row.k:>4}: {row.metric:+.3f} of {row.clean:+.3f}"
        )


@app.command("label")
def label_run(
    run_dir: Annotated[Path, typer.Argument(help="Run directory with examples of features.", metavar="RUN")],
    client: Annotated[str, typer.Option("--client", help="openai or anthropic, or a server that talks like one.")],
    model: Annotated[str, typer.Option("--model", help="Its name there.")],
    base_url: Annotated[str | None, typer.Option("--base-url", help="Of another server, such as a local one.")] = None,
    features: Annotated[str | None, typer.Option("--features", help="Ids such as 3,17; all when left out.")] = None,
    n_features: Annotated[int | None, typer.Option("--n-features", help="So many of them, drawn at random.")] = None,
    n_examples: Annotated[int, typer.Option("--n-examples", help="Examples shown of each.")] = 7,
    attempts: Annotated[int, typer.Option("--attempts", help="Times to ask where nothing readable came.")] = 1,
    requests_per_minute: Annotated[float, typer.Option("--requests-per-minute", help="Most of them.")] = 50.0,
    workers: Annotated[int, typer.Option("--workers", help="Requests under way at once.")] = 4,
    prices: Annotated[str | None, typer.Option("--prices", help="Of a million tokens in and out, as 3,15.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and ask nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether to go on.")] = False,
) -> None:
    """Name features by a language model; the key comes from OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    from functools import partial

    from crosslens.features.explainers import Rater, check_client
    from crosslens.features.labels import complexity_correlation, label_features
    from crosslens.rundir import RunDir

    run = RunDir.open(run_dir)
    rater = Rater(client, model, base_url, requests_per_minute=requests_per_minute, workers=workers)
    ask = partial(
        label_features,
        run,
        rater,
        features=None if features is None else parse_numbers(features, "--features"),
        n_features=n_features,
        n_examples=n_examples,
        attempts=attempts,
        prices=None if prices is None else _prices(prices),
        seed=seed,
    )
    estimate = ask(dry_run=True).estimate
    typer.echo(str(estimate))
    if dry_run:
        return
    if estimate.requests:
        check_client(rater)
        if not yes:
            typer.confirm("Send them?", abort=True)
    labels = ask()
    counts = ", ".join(f"{count} {status}" for status, count in labels.table["status"].value_counts().items())
    typer.echo(f"{counts}; {labels.tokens_in:,} tokens in, {labels.tokens_out:,} out")
    evolution, table = run.table("evolution"), run.table("labels")
    if evolution is not None and table is not None:
        for row in complexity_correlation(table, evolution, unit="index").to_dict("records"):
            interval = f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            words = f"Spearman {row['spearman']:+.2f} {interval}, {row['n']} features"
            typer.echo(f"complexity and {row['event']}: {words}")


def _prices(text: str) -> tuple[float, float]:
    try:
        into, out = map(float, text.split(","))
    except ValueError:
        raise UserError(
            f"--prices {text!r} must be two numbers, of a million tokens in and out, such as 3,15"
        ) from None
    return into, out


@app.command("report")
def report_run(
    run_dir: Annotated[Path, typer.Argument(help="Run directory that `crosslens train` made.", metavar="RUN")],
    wandb: Annotated[bool, typer.Option("--wandb", help="Add the heat map and all tables to the run on W&B.")] = False,
    wandb_project: Annotated[
        str | None, typer.Option("--wandb-project", help="Do so in this project, for runs trained without W&B.")
    ] = None,
) -> None:
    """Write the pages of a run directory."""
    from crosslens.report import log_report, write_report
    from crosslens.rundir import RunDir

    typer.echo(str(write_report(RunDir.open(run_dir).path)))
    if wandb or wandb_project is not None:
        typer.echo(f"W&B run {log_report(run_dir, project=wandb_project)}")


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="Run directory, or folder of a crosscoder.", metavar="RUN")],
    repository: Annotated[str, typer.Argument(help="Repository on the hub, such as someone/name; made when missing.")],
    sae_id: Annotated[str | None, typer.Option("--id", help="Folder in it; the hook point when left out.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    licence: Annotated[str | None, typer.Option("--licence", help="Of the weights, such as mit.")] = None,
) -> None:
    """Publish a crosscoder on the hub, with a model card."""
    from crosslens.sharing.publishing import push_to_hub

    typer.echo(str(push_to_hub(source, repository, sae_id, private=private, dry_run=dry_run, licence=licence)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory of the demo.")] = Path("runs/demo"),
    seed: SeedOption = 0,
) -> None:
    """Pretrain a tiny model, crosscode its snapshots, and write the report: a few minutes on two cores."""
    from crosslens.cli.demo import run_demo

    summary = run_demo(out, seed)
    typer.echo(f"done in {summary['seconds']:.0f} s; open {out / 'report' / 'index.html'}")


def list_families() -> Iterator[str]:
    """A line per family: its sizes, and what its steps are."""
    from crosslens.snapshots import families

    for name, entry in families.read_table().items():
        yield f"{name}: {', '.join(entry['sizes'])} ({entry['about']})"


def list_snapshots(what: str, steps: str | None = None) -> Iterator[str]:
    """A line per snapshot: label, revision, tokens seen, and whether its weights are on this disk.

    Args:
        what: as `specs.parse_snapshots` takes it.
        steps: of a model of the table, or of a pattern; all when None.

    Raises:
        UserError: no such model, folder, set or step.
    """
    repository, _, pattern = what.partition("@")
    from crosslens.snapshots import families
    from crosslens.snapshots.hub import is_on_disk, list_revisions

    model = None if Path(what).is_dir() else families.match_model(what)
    if model is None and "{step}" in pattern:
        model = families.pattern_model(repository, pattern)
    if model is None:
        for snapshot in parse_snapshots(what, None):
            row = families.Revision(snapshot.label, snapshot.revision or "", snapshot.step, snapshot.tokens)
            yield _line(row, snapshot.is_on_disk())
        return
    repository = model.repository
    for row in model.revisions(parse_steps(steps or "all"), lambda: list_revisions(repository)):
        yield _line(row, is_on_disk(repository, row.revision))


def _line(row: Revision, here: bool) -> str:
    tokens = "" if row.tokens is None else f"{row.tokens:,} tokens"
    return f"{row.label:>12}  {row.revision:>12}  {tokens:>26}  {'on this disk' if here else 'not on this disk'}"


def _first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _say(words: str) -> None:
    """Print a result, once for all processes."""
    if _first():
        typer.echo(words)


def main() -> None:
    """Entry point: a mistake of the user is one line on stderr and exit code 2."""
    # before torch is imported: threads that spin while they wait slow a busy machine down several times over
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        typer.echo(f"crosslens: {error}", err=True)
        sys.exit(2)
    except FloatingPointError as error:
        typer.echo(f"crosslens: {error}", err=True)
        sys.exit(3)
