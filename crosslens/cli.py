"""The command line: each verb is a thin call of the function of its name, over a run directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosslens.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from crosslens.activations import Activations
    from crosslens.crosscoders import Crosscoder
    from crosslens.rundir import RunDir
    from crosslens.snapshots import Snapshots
    from crosslens.tasks import Task

app = typer.Typer(
    name="crosslens",
    help="Watch a language model learn: crosscoders over pretraining snapshots.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")

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
        help="Folder with snapshots, pythia-160m (with --steps), a hub name with @ and revisions such as "
        "org/model@step0,step1000, or demo.",
    ),
]
StepsOption = Annotated[
    str | None, typer.Option("--steps", help="Steps such as 0,512,143000, or 'paper' for the 32 of the paper.")
]
HookOption = Annotated[str, typer.Option("--hook", help="Hook point such as blocks.6.hook_resid_post.")]
DatasetOption = Annotated[str, typer.Option("--dataset", help="Hub name, or a text, jsonl, csv or parquet file.")]
TokensOption = Annotated[int | None, typer.Option("--n-tokens", help="Activations to train on; all when left out.")]
ContextOption = Annotated[int | None, typer.Option("--context-size", help="Tokens per sequence.")]
ColumnOption = Annotated[str, typer.Option("--text-column", help="Column of the documents.")]
SampleOption = Annotated[str, typer.Option("--sample-by", help="What a document is in a text file: line or paragraph.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
BackendOption = Annotated[str, typer.Option("--backend", help="bridge or hooked_transformer.")]


@app.command("ls")
def list_snapshots(
    what: Annotated[str, typer.Argument(help="A folder, pythia-160m, or demo; families when left out.")] = "",
    steps: StepsOption = "all",
) -> None:
    """List the families, or the snapshots of one model."""
    from crosslens import families

    if not what:
        for family in families.FAMILIES.values():
            typer.echo(f"{family.name}: {', '.join(family.sizes)} (steps {family.steps_in_words})")
        return
    if what.startswith("pythia-"):
        for label, revision, _, tokens in families.pythia_revisions(what.removeprefix("pythia-"), _steps(steps)):
            typer.echo(f"{label:>12}  {revision:>12}  {tokens:>16,} tokens")
        return
    for snapshot in parse_snapshots(what, None):
        tokens = "" if snapshot.tokens is None else f"{snapshot.tokens:>16,} tokens"
        typer.echo(f"{snapshot.label:>12}  {snapshot.revision or '':>12}  {tokens}")


@app.command()
def plan(
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    n_tokens: TokensOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    text_column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    device: DeviceOption = "cpu",
) -> None:
    """Say what a harvest costs, before anything is run."""
    from crosslens.activations import Activations

    acts = Activations(
        parse_snapshots(snapshots, steps),
        hook,
        dataset,
        n_tokens,
        context_size,
        text_column=text_column,
        sample_by=sample_by,
        device=device,
    )
    typer.echo(str(acts.plan()))


@app.command()
def train(
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Directory of the run; made when missing.")],
    d_sae: Annotated[int, typer.Option("--d-sae", help="Number of features.")],
    architecture: Annotated[
        str, typer.Option("--architecture", help="standard, topk, batchtopk or jumprelu.")
    ] = "batchtopk",
    k: Annotated[int, typer.Option("--k", help="Features kept per token (topk, batchtopk).")] = 64,
    n_tokens: TokensOption = None,
    training_tokens: Annotated[
        int | None, typer.Option("--training-tokens", help="More than --n-tokens means several epochs.")
    ] = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Activations per step.")] = 4096,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 3e-4,
    dead_tokens: Annotated[
        int, typer.Option("--dead-tokens", help="A feature silent for so many activations counts as dead.")
    ] = 10_000_000,
    n_checkpoints: Annotated[int, typer.Option("--n-checkpoints", help="Checkpoints to resume from.")] = 4,
    cache: Annotated[Path | None, typer.Option("--cache", help="Write activations here once, and read them.")] = None,
    text_column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    backend: BackendOption = "bridge",
    wandb_project: Annotated[str | None, typer.Option("--wandb-project", help="Log to this W&B project.")] = None,
) -> None:
    """Train a crosscoder; the same command continues after an interruption."""
    from crosslens import crosscoders
    from crosslens.activations import Activations
    from crosslens.trainer import TrainConfig
    from crosslens.training import train as train_crosscoder

    if architecture not in ARCHITECTURES:
        raise UserError(
            f"--architecture {architecture!r} is unknown; use one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    options: dict[str, Any] = {"k": k} if architecture in ("topk", "batchtopk") else {}
    config_class = crosscoders.TRAINING_ARCHITECTURES[f"{architecture}_crosscoder"][1]
    acts = Activations(
        parse_snapshots(snapshots, steps),
        hook,
        dataset,
        n_tokens,
        context_size,
        text_column=text_column,
        sample_by=sample_by,
        seed=seed,
        device=device,
        backend=backend,
    )
    config = TrainConfig(
        run_dir=run_dir,
        training_tokens=training_tokens,
        batch_size=batch_size,
        lr=lr,
        dead_tokens=dead_tokens,
        n_checkpoints=n_checkpoints,
        seed=seed,
        device=device,
        wandb_project=wandb_project,
    )
    architecture_config = config_class(d_sae=d_sae, **options)
    crosscoder = train_crosscoder(acts if cache is None else acts.cache(cache), architecture_config, config)
    typer.echo(f"{type(crosscoder).__name__} with {d_sae} features saved in {run_dir}")


@app.command()
def evolve(run_dir: RunArgument, device: DeviceOption = "cpu") -> None:
    """Date every feature: birth, peak, origin, fate; and probe some of them."""
    import pandas as pd

    from crosslens.evolution import evolve as evolve_features
    from crosslens.probing import probe

    run, crosscoder, acts = open_run(run_dir, device)
    table = evolve_features(crosscoder, acts)
    run.save_table("evolution", table)
    run.save_table("probe", probe(crosscoder, acts))
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

    from crosslens.attribution import attribute as attribute_effects

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
        backend=acts.backend,
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

    from crosslens.ablation import ablate as ablate_features
    from crosslens.attribution import Attribution

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
            backend=acts.backend,
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


@app.command()
def report(run_dir: RunArgument) -> None:
    """Write the page of a run directory."""
    from crosslens.report import write_report
    from crosslens.rundir import RunDir

    typer.echo(str(write_report(RunDir.open(run_dir).path)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory of the demo.")] = Path("runs/demo"),
    seed: SeedOption = 0,
) -> None:
    """Pretrain a tiny model, crosscode its snapshots, and write the report: a few minutes on two cores."""
    from crosslens.demo import run_demo

    summary = run_demo(out, seed)
    typer.echo(f"done in {summary['seconds']:.0f} s; open {out / 'report' / 'index.html'}")


def parse_snapshots(spec: str, steps: str | None) -> Snapshots:
    """Snapshots from what a user types: a folder, a Pythia name, `org/model@revision,revision`, or demo."""
    from crosslens.snapshots import Snapshots

    if spec == "demo":
        return Snapshots.demo()
    if Path(spec).is_dir():
        return Snapshots.local(spec)
    if spec.startswith("pythia-"):
        return Snapshots.pythia(spec.removeprefix("pythia-"), steps=_steps(steps or "paper"))
    repository, at, revisions = spec.partition("@")
    if at and revisions:
        return Snapshots.from_hub(repository, revisions.split(","))
    raise UserError(
        f"--snapshots {spec!r} is no folder and no known model; give a folder, pythia-160m, "
        "org/model@revision,revision, or demo"
    )


def parse_task(spec: str) -> Task:
    """A task from what a user types: KIND:WHAT, as in the error below, or a file."""
    from crosslens.tasks import Task

    kind, _, rest = spec.partition(":")
    if kind == "demo":
        return Task.demo(rest)
    if kind == "sva":
        return Task.sva(rest)
    if kind == "blimp":
        return Task.blimp(rest)
    if kind == "clams":
        return Task.clams(rest)
    if kind == "multiblimp":
        language, _, phenomenon = rest.partition(":")
        return Task.multiblimp(language, phenomenon or None)
    if kind == "ioi":
        return Task.ioi(rest or None)
    if not Path(spec).is_file():
        raise UserError(
            f"--task {spec!r} is no file and no task; give demo:simple, sva:FILE, blimp:UID, clams:FILE, "
            "multiblimp:LANGUAGE, ioi, or a file"
        )
    return Task.local(spec)


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} must be whole numbers separated by commas, such as 0,512,143000") from None


def _steps(text: str | None) -> Any:
    return text if text is None or text.isalpha() else parse_numbers(text, "--steps")


def open_run(path: Path, device: str) -> tuple[RunDir, Crosscoder, Activations]:
    """The run in a directory: its crosscoder, and the activations it was trained on."""
    from crosslens.activations import Activations
    from crosslens.pretrained import load
    from crosslens.rundir import RunDir

    run = RunDir.open(path)
    source = run.read_json().get("source")
    if source is None:
        raise UserError(f"{path} does not record where its activations came from; use the functions from Python")
    return run, load(run.crosscoder, device=device), Activations.from_dict(source, device=device)


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


if __name__ == "__main__":
    main()
