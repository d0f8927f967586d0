"""The command line: each subcommand calls the library function of its name, and works on a run directory."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import crosslens
from crosslens.cli.arguments import (
    ARCHITECTURES,
    ATTENTIONS,
    BACKENDS,
    BASELINES,
    CACHE_DTYPES,
    MAX_FEATURES,
    MAX_SEED,
    METHODS,
    MODEL_DTYPES,
    MOMENTS,
    PRECISIONS,
    RULES,
    SAMPLES,
    SCALES,
    check_coefficient,
    check_dataset,
    check_device,
    check_duration,
    check_export,
    check_folder,
    check_fraction,
    check_hooks,
    check_id,
    check_models,
    check_new_run,
    check_numbers,
    check_one_hook,
    check_positive,
    check_processes,
    check_published,
    check_repository,
    check_run,
    check_split,
    check_tasks,
    check_trained_run,
    choose_label,
    in_range,
    one_of,
    parse_numbers,
    parse_prices,
)
from crosslens.cli.config_file import Context, given_options, read_config
from crosslens.cli.display import Column, Output, counted, is_first, number, percent, size
from crosslens.cli.failures import explain
from crosslens.cli.help import SectionedCommand
from crosslens.cli.training_options import TrainingOptions, check_training, parse_training
from crosslens.errors import UserError
from crosslens.pipeline.opening import (
    find_snapshots,
    list_labels,
    open_run,
    parse_activations,
    parse_settings,
    parse_steps,
)
from crosslens.rundir import RunDir, check_examples
from crosslens.training.recipes import ARCHITECTURES as RECIPES

if TYPE_CHECKING:
    from crosslens.sharing.registry import Release

app = typer.Typer(
    name="crosslens", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _option(name: str, help: str, check: Callable[..., Any] | None = None) -> Any:
    """An option whose value `check` refuses or returns."""
    return typer.Option(name, help=help, callback=None if check is None else lambda value: check(name, value))


_DURATION = "Below 1: a fraction of the steps; from 2: a number of steps."
TrainedArgument = Annotated[
    Path, typer.Argument(help="Run directory written by `crosslens train`.", metavar="RUN", callback=check_trained_run)
]
RunArgument = Annotated[
    Path, typer.Argument(help="Run directory written by `crosslens train`.", metavar="RUN", callback=check_run)
]
SnapshotsOption = Annotated[
    str,
    _option(
        "--snapshots",
        "A folder of snapshots; a model such as pythia-160m, olmo-1b-0724, olmo2-1b or bloom-1b1 (choose with "
        "--steps); a hub repository with revisions such as org/model@step0,step1000, or with a pattern such as "
        "org/model@step{step}; any models of one width, as base=place,chat=place, where a place is a folder, org/model "
        "or org/model@revision; a release such as crosslens-demo; or demo.",
    ),
]
StepsOption = Annotated[
    str | None,
    _option(
        "--steps",
        "Training steps such as 0,512,143000, revisions, or a named set: all, paper, triplet, log:12, linear:12. "
        "Default: paper for Pythia, otherwise all or log:8.",
    ),
]
HooksOption = Annotated[
    list[str],
    _option(
        "--hook", "Hook point, such as blocks.6.hook_resid_post. Repeat it for several from one pass.", check_hooks
    ),
]
HookOption = Annotated[list[str], _option("--hook", "Hook point, such as blocks.6.hook_resid_post.", check_one_hook)]
DatasetOption = Annotated[
    str, _option("--dataset", "A dataset on the hub, or a text, jsonl, csv or parquet file.", check_dataset)
]
TokensOption = Annotated[
    int | None, _option("--n-tokens", "Tokens per epoch of training. Default: the whole dataset.", in_range(1))
]
TrainingTokensOption = Annotated[
    int | None,
    _option(
        "--training-tokens", "Tokens to train on; more than --n-tokens means several epochs. Default: one.", in_range(1)
    ),
]
DtypeOption = Annotated[
    str, _option("--cache-dtype", "Format on disk: bfloat16, float32 or int8.", one_of(*CACHE_DTYPES))
]
ContextOption = Annotated[
    int | None,
    _option("--context-size", "Tokens per sequence. Default: the models' context, at most 1024.", in_range(2)),
]
SplitOption = Annotated[str | None, _option("--split", "Split of a dataset on the hub. Default: train.")]
ColumnOption = Annotated[str, _option("--column", "Column of the dataset that holds the text, or token ids.")]
SampleOption = Annotated[
    str, _option("--sample-by", "A document in a text file is a line or a paragraph.", one_of(*SAMPLES))
]
RecipeOption = Annotated[
    str | None,
    _option(
        "--recipe",
        f"All training settings of a paper: {' or '.join(RECIPES)}. Other options override it; for a small run give at "
        "least --d-sae and --training-tokens.",
        one_of(*RECIPES),
    ),
]
ArchitectureOption = Annotated[
    str | None,
    _option("--architecture", "standard, topk, batchtopk or jumprelu. Default: batchtopk.", one_of(*ARCHITECTURES)),
]
KOption = Annotated[
    int | None, _option("--k", "Active features per token (topk and batchtopk). Default: 64.", in_range(1))
]
BatchOption = Annotated[int | None, _option("--batch-size", "Tokens per training step. Default: 4096.", in_range(1))]
MomentsOption = Annotated[
    str | None,
    _option(
        "--adam-moments",
        "Of the weights: float32, or bfloat16, which takes 12 bytes a weight instead of 16. Default: float32.",
        one_of(*MOMENTS),
    ),
]
ParallelOption = Annotated[
    int,
    _option(
        "--data-parallel",
        "Groups of processes that split the tokens of a batch; the processes in a group split the features.",
        in_range(1),
    ),
]
TasksOption = Annotated[
    list[str],
    _option(
        "--task",
        "A jsonl, csv or parquet file with the columns prefix, correct and wrong; sva:FILE, with clean_prefix, "
        "patch_prefix, clean_answer and patch_answer; blimp:FILE; clams:FILE; or, without a file, blimp:UID, "
        "multiblimp:LANGUAGE, ioi or demo:simple. Repeat it for several tasks.",
        check_tasks,
    ),
]
BaselineOption = Annotated[
    str | None,
    _option(
        "--baseline",
        "What a feature is set to: zero, its mean over the prompts, or patch, its value on the paired prompt. Default: "
        "patch if half of the prompts or more are paired, otherwise zero; for ablate as in attribute.",
        one_of(*BASELINES),
    ),
]
ConsensusOption = Annotated[bool, _option("--consensus", "Only features that most seeds have, after `train --seeds`.")]
SeedOption = Annotated[int, _option("--seed", "Seed of all random numbers.", in_range(0, MAX_SEED))]
DeviceOption = Annotated[
    str | None, _option("--device", "cpu, cuda or cuda:N. Default: cuda if available.", check_device)
]
BackendOption = Annotated[
    str, _option("--backend", "TransformerLens class: bridge or hooked_transformer.", one_of(*BACKENDS))
]


ModelDtypeOption = Annotated[
    str,
    _option(
        "--model-dtype",
        "Of the models: float32, bfloat16 or float16. The error that this causes is printed.",
        one_of(*MODEL_DTYPES),
    ),
]
AttentionOption = Annotated[
    str,
    _option(
        "--attention",
        "eager, or sdpa: faster and in less memory, where the family has it, with a small error, which is printed.",
        one_of(*ATTENTIONS),
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that a model or tokenizer brings with it, which can do whatever you can. Such models "
        "are refused otherwise.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and everything else on stderr.")
]
DropOption = Annotated[
    int,
    _option(
        "--drop-positions",
        "Leave out this many tokens at the start of every sequence and document. 1 for models trained without BOS: the "
        "norm of the first token is then many times that of others (the FAQ shows how to see it).",
        in_range(0),
    ),
]


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"crosslens {crosslens.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def describe(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    __: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,  # `main` reads it
) -> None:
    """Watch a language model learn: crosscoders over pretraining snapshots."""


# ---------------------------------------------------------------------- subcommands
@app.command("ls")
def list_(
    what: Annotated[
        str, typer.Argument(help="A model such as pythia-160m, a folder of snapshots, `releases`, or a release.")
    ] = "",
    steps: StepsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List model families, the snapshots of a model, or releases of crosscoders."""
    _list(Output(as_json), what, steps)


@app.command(cls=SectionedCommand)
def plan(
    snapshots: SnapshotsOption,
    hook: HooksOption,
    dataset: DatasetOption,
    n_tokens: TokensOption = None,
    training_tokens: TrainingTokensOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    cache: Annotated[Path, _option("--cache", "Folder that a cache would be written to.")] = Path("."),
    cache_dtype: DtypeOption = "bfloat16",
    d_sae: Annotated[
        int | None, _option("--d-sae", "Number of features; adds the memory of training.", in_range(1, MAX_FEATURES))
    ] = None,
    recipe: RecipeOption = None,
    architecture: ArchitectureOption = None,
    k: KOption = None,
    batch_size: BatchOption = None,
    adam_moments: MomentsOption = None,
    processes: Annotated[int, _option("--processes", "Processes that torchrun will start.", in_range(1))] = 1,
    data_parallel: ParallelOption = 1,
    split: SplitOption = None,
    column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    drop_positions: DropOption = 0,
    device: DeviceOption = None,
    backend: BackendOption = "bridge",
    model_dtype: ModelDtypeOption = "float32",
    attention: AttentionOption = "eager",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate disk, memory and time of a harvest and of training, without downloading weights."""
    out = Output(as_json)
    check_processes(processes, data_parallel)
    split = check_split(dataset, split)
    options = TrainingOptions(
        recipe=recipe,
        architecture=architecture,
        d_sae=d_sae,
        k=k,
        batch_size=batch_size,
        training_tokens=training_tokens,
        adam_moments=adam_moments,
    )
    trained = d_sae is not None or recipe is not None
    if trained:
        check_training(options, device, n_tokens)
    check_models(backend, attention, hook)
    load = find_snapshots(snapshots, steps, hook)
    from crosslens.evolution import plan_decodability, untrained_steps

    settings = parse_settings(device, backend, dtype=model_dtype, attention=attention)
    acts = parse_activations(
        load,
        hook,
        dataset,
        n_tokens,
        context_size,
        settings=settings,
        trust_remote_code=trust_remote_code,
        column=column,
        split=split,
        sample_by=sample_by,
        drop_positions=drop_positions,
    )
    architecture_config, config = parse_training(options, settings.device, acts.n_tokens) if trained else (None, None)
    planned = acts.plan(
        training_tokens=training_tokens if config is None else config.training_tokens,
        folder=cache,
        dtype=cache_dtype,
        architecture=architecture_config,
        batch_size=(batch_size or 4096) if config is None else config.batch_size,
        adam_moments=adam_moments or "float32",
        processes=processes,
        data_parallel=data_parallel,
    )
    out.say(str(planned))
    evolving: dict[str, float] | None = None
    if architecture_config is not None:
        shape = architecture_config.d_sae, acts.n_snapshots, acts[hook[0]].d_model
        held, seconds = plan_decodability(*shape, acts.dataset.n_held_out)
        evolving = {"bytes": held, "cpu_seconds": seconds}
        out.say(
            f"evolve: {held / 2**30:.2f} GiB of memory and {seconds / 60:.1f} min of one CPU core to read presence; "
            "it also runs whole models"
        )
    untrained = untrained_steps(acts.snapshots.labels, acts.snapshots.steps)
    for line in untrained:
        out.say(line)
    out.end(plan=planned, evolve=evolving, warnings=untrained)


@app.command(cls=SectionedCommand)
def harvest(
    snapshots: SnapshotsOption,
    hook: HooksOption,
    dataset: DatasetOption,
    cache: Annotated[Path, _option("--cache", "Folder for the activations; created if missing.", check_folder)],
    n_tokens: TokensOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    cache_dtype: DtypeOption = "bfloat16",
    evict: Annotated[
        bool,
        _option(
            "--evict", "Delete the weights that this command downloads, those of each snapshot as soon as it is done."
        ),
    ] = False,
    verify: Annotated[bool, _option("--verify", "Compare the checksums of activations on disk.")] = False,
    split: SplitOption = None,
    column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    seed: SeedOption = 0,
    drop_positions: DropOption = 0,
    device: DeviceOption = None,
    backend: BackendOption = "bridge",
    model_dtype: ModelDtypeOption = "float32",
    attention: AttentionOption = "eager",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write activations to disk. Run the same command again to resume; several may run at once."""
    split = check_split(dataset, split)
    check_models(backend, attention, hook)
    load = find_snapshots(snapshots, steps, hook)

    settings = parse_settings(device, backend, dtype=model_dtype, attention=attention)
    acts = parse_activations(
        load,
        hook,
        dataset,
        n_tokens,
        context_size,
        seed=seed,
        settings=settings,
        trust_remote_code=trust_remote_code,
        column=column,
        split=split,
        sample_by=sample_by,
        drop_positions=drop_positions,
    )
    acts.cache(cache, cache_dtype, evict=evict, verify=verify)
    out = Output(as_json)
    out.say(f"{acts.n_tokens:,} tokens x {acts.n_snapshots} snapshots at {' and '.join(hook)} in {cache}")
    out.end(tokens=acts.n_tokens, snapshots=acts.snapshots.labels, hooks=hook, cache=cache)


@app.command(cls=SectionedCommand)
def train(
    context: Context,
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    run_dir: Annotated[Path, _option("--run-dir", "Run directory; created if missing.", check_new_run)],
    d_sae: Annotated[
        int | None, _option("--d-sae", "Number of features; needed without --recipe.", in_range(1, MAX_FEATURES))
    ] = None,
    recipe: RecipeOption = None,
    architecture: ArchitectureOption = None,
    k: KOption = None,
    k_start: Annotated[
        float | None, _option("--k-start", "k at the first step, to fall to --k over --k-anneal.", check_positive)
    ] = None,
    k_anneal: Annotated[float | None, _option("--k-anneal", f"Annealing of k. {_DURATION}", check_duration)] = None,
    aux: Annotated[
        float | None,
        _option(
            "--aux",
            "Coefficient of the auxiliary loss for dead features (topk and batchtopk). Default: 1/32 = 0.03125.",
            check_coefficient,
        ),
    ] = None,
    sparsity: Annotated[
        float | None, _option("--sparsity", "Sparsity coefficient of jumprelu. Default: 0.3.", check_coefficient)
    ] = None,
    sparsity_warm_up: Annotated[
        float | None,
        _option("--sparsity-warm-up", f"Warmup of --sparsity from 0. {_DURATION} Default: none.", check_duration),
    ] = None,
    l1: Annotated[
        float | None, _option("--l1", "Coefficient of the L1 penalty of standard. Default: 2.", check_coefficient)
    ] = None,
    l1_warm_up: Annotated[
        float | None, _option("--l1-warm-up", f"Warmup of --l1 from 0. {_DURATION} Default: none.", check_duration)
    ] = None,
    scale: Annotated[
        str | None,
        _option(
            "--scale",
            "Bring snapshots to the same variance (std) or the same norm (norm). Default: std.",
            one_of(*SCALES),
        ),
    ] = None,
    n_tokens: TokensOption = None,
    training_tokens: TrainingTokensOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    lr: Annotated[float | None, _option("--lr", "Learning rate of Adam. Default: 0.0003.", check_positive)] = None,
    lr_warm_up: Annotated[
        float | None, _option("--lr-warm-up", f"Warmup of --lr from 0. {_DURATION} Default: none.", check_duration)
    ] = None,
    lr_decay: Annotated[
        float | None,
        _option(
            "--lr-decay", "Fraction of the steps, at the end, over which --lr falls. Default: 0.2.", check_fraction
        ),
    ] = None,
    dead_tokens: Annotated[
        int | None,
        _option(
            "--dead-tokens",
            "Tokens without firing after which a feature counts as dead. Default: 10000000; in shorter runs give about "
            "a twentieth of the training tokens.",
            in_range(1),
        ),
    ] = None,
    precision: Annotated[
        str | None,
        _option(
            "--precision",
            "Of large products: float32, tf32 or bfloat16. Default: tf32 on CUDA, float32 on CPUs.",
            one_of(*PRECISIONS),
        ),
    ] = None,
    adam_moments: MomentsOption = None,
    seeds: Annotated[
        int,
        _option(
            "--seeds",
            "Crosscoders to train, from --seed on: the first in the run directory, the others in its folder seeds. "
            "Then says which features they have in common.",
            in_range(1),
        ),
    ] = 1,
    n_checkpoints: Annotated[
        int, _option("--n-checkpoints", "Checkpoints to resume from, evenly spaced.", in_range(0))
    ] = 4,
    data_parallel: ParallelOption = 1,
    cache: Annotated[
        Path | None,
        _option("--cache", "Write the activations to this folder first, or read them from it.", check_folder),
    ] = None,
    cache_dtype: DtypeOption = "bfloat16",
    split: SplitOption = None,
    column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    seed: SeedOption = 0,
    drop_positions: DropOption = 0,
    device: DeviceOption = None,
    backend: BackendOption = "bridge",
    model_dtype: ModelDtypeOption = "float32",
    attention: AttentionOption = "eager",
    trust_remote_code: TrustOption = False,
    wandb_project: Annotated[str | None, _option("--wandb-project", "Log to this W&B project.")] = None,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Take options from this file: a .toml with the names of options as keys, or the run.json of an "
            "earlier run. The command line wins.",
            callback=read_config,
            is_eager=True,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a crosscoder, in one process or under torchrun. Run the same command again to resume.

    The defaults suit long runs. In a small one give --d-sae, --k, --lr and --dead-tokens, and look at the evaluation.
    """
    del config_file  # read by its callback
    out = Output(as_json)
    options = TrainingOptions(
        recipe=recipe,
        architecture=architecture,
        d_sae=d_sae,
        k=k,
        k_start=k_start,
        k_anneal=k_anneal,
        aux=aux,
        sparsity=sparsity,
        sparsity_warm_up=sparsity_warm_up,
        l1=l1,
        l1_warm_up=l1_warm_up,
        scale=scale,
        training_tokens=training_tokens,
        batch_size=batch_size,
        lr=lr,
        lr_warm_up=lr_warm_up,
        lr_decay=lr_decay,
        dead_tokens=dead_tokens,
        precision=precision,
        adam_moments=adam_moments,
        others={
            "run_dir": run_dir,
            "n_checkpoints": n_checkpoints,
            "data_parallel": data_parallel,
            "seed": seed,
            "wandb_project": wandb_project,
        },
    )
    check_training(options, device, n_tokens)
    split = check_split(dataset, split)
    check_models(backend, attention, hook)
    load = find_snapshots(snapshots, steps, hook)
    from crosslens.evolution import describe_doubtful, doubtful_snapshots
    from crosslens.training.run import claim
    from crosslens.training.seeds import train_seeds

    settings = parse_settings(device, backend, dtype=model_dtype, attention=attention)
    acts = parse_activations(
        load,
        hook,
        dataset,
        n_tokens,
        context_size,
        seed=seed,
        settings=settings,
        trust_remote_code=trust_remote_code,
        column=column,
        split=split,
        sample_by=sample_by,
        drop_positions=drop_positions,
    )
    architecture_config, config = parse_training(options, settings.device, acts.n_tokens)
    if is_first():
        # refuse the directory of another run before the harvest
        claim(acts, architecture_config, config, will_be_cached=cache is not None)
        RunDir(run_dir).update(options=given_options(context))
    if cache is not None:
        acts = acts.cache(cache, cache_dtype)
    planned = acts.plan(
        measure=False,
        training_tokens=config.training_tokens,
        architecture=architecture_config,
        batch_size=config.batch_size,
        adam_moments=config.adam_moments,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        data_parallel=data_parallel,
    )
    if is_first() and acts.n_snapshots > 1 and not (RunDir(run_dir).crosscoder / "cfg.json").is_file():
        for line in describe_doubtful(doubtful_snapshots(acts)):
            out.say(line)
    total = (config.training_tokens or acts.n_tokens) // config.batch_size
    memory = replace(planned, cached=cache is not None).training
    out.say(f"{total:,} steps of {config.batch_size:,} tokens\n{memory}")
    trained = train_seeds(acts, architecture_config, config, seeds)
    crosscoder = trained[seed]
    run = RunDir(run_dir)
    timings, evaluation = run.read_json().get("timings", {}), None
    found: dict[str, Any] = {}
    if is_first():
        from crosslens.cli.results import show_training

        evaluation = run.table("evaluation")
        runs = {one: run if one == seed else run.other_seed(one) for one in trained}
        title = f"{type(crosscoder).__name__} with {counted(crosscoder.cfg.d_sae, 'feature')} saved in {run_dir}"
        show_training(out, runs, title)
        if seeds > 1:
            from crosslens.evolution.seeds import save_seeds

            out.say(save_seeds(run_dir, trained, acts))
            found = {"seeds": run.table("seeds")}
    place = shlex.quote(str(run_dir))
    out.say(f"next: crosslens evolve {place} (when features are born)")
    out.say(f"   or crosslens attribute {place} --task ... (which of them a task needs)")
    out.end(run=run_dir, features=crosscoder.cfg.d_sae, timings=timings, evaluation=evaluation, **found)


@app.command(cls=SectionedCommand)
def sweep(
    snapshots: SnapshotsOption,
    hook: HookOption,
    dataset: DatasetOption,
    run_dir: Annotated[Path, _option("--run-dir", "Run directory; created if missing.", check_new_run)],
    d_sae: Annotated[str, _option("--d-sae", "Numbers of features, such as 256,512,1024.", check_numbers)],
    k: Annotated[str, _option("--k", "Numbers of active features per token, such as 4,8,16.", check_numbers)],
    seeds: Annotated[int, _option("--seeds", "Trainings per setting, from --seed on.", in_range(2))] = 2,
    architecture: Annotated[
        str, _option("--architecture", "topk or batchtopk.", one_of("topk", "batchtopk"))
    ] = "batchtopk",
    n_tokens: TokensOption = None,
    training_tokens: TrainingTokensOption = None,
    context_size: ContextOption = None,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    lr: Annotated[float | None, _option("--lr", "Learning rate of Adam. Default: 0.0003.", check_positive)] = None,
    dead_tokens: Annotated[
        int | None,
        _option("--dead-tokens", "Tokens without firing after which a feature counts as dead.", in_range(1)),
    ] = None,
    cache: Annotated[
        Path | None,
        _option("--cache", "Write the activations to this folder first, or read them from it.", check_folder),
    ] = None,
    cache_dtype: DtypeOption = "bfloat16",
    split: SplitOption = None,
    column: ColumnOption = "text",
    sample_by: SampleOption = "line",
    seed: SeedOption = 0,
    drop_positions: DropOption = 0,
    device: DeviceOption = None,
    backend: BackendOption = "bridge",
    model_dtype: ModelDtypeOption = "float32",
    attention: AttentionOption = "eager",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train several numbers of features and k, each from several seeds, and propose one; before `train`."""
    grid_F, grid_k = parse_numbers(d_sae, "--d-sae"), parse_numbers(k, "--k")
    options = TrainingOptions(
        architecture=architecture,
        d_sae=max(grid_F),
        k=max(grid_k),
        training_tokens=training_tokens,
        batch_size=batch_size,
        lr=lr,
        dead_tokens=dead_tokens,
        others={"seed": seed},
    )
    check_training(options, device, n_tokens)
    split = check_split(dataset, split)
    check_models(backend, attention, hook)
    load = find_snapshots(snapshots, steps, hook)
    import dataclasses

    from crosslens.evolution.sweep import choose

    settings = parse_settings(device, backend, dtype=model_dtype, attention=attention)
    acts = parse_activations(
        load,
        hook,
        dataset,
        n_tokens,
        context_size,
        seed=seed,
        settings=settings,
        trust_remote_code=trust_remote_code,
        column=column,
        split=split,
        sample_by=sample_by,
        drop_positions=drop_positions,
    )
    architecture_config, config = parse_training(options, settings.device, acts.n_tokens)
    run = RunDir(run_dir)
    run.hold()
    run.claim({"hook_name": hook[0], "dataset": dataset}, part="sweep")
    if cache is not None:
        acts = acts.cache(cache, cache_dtype)
    choice = choose(
        acts,
        architecture_config,
        dataclasses.replace(config, run_dir=run_dir),
        d_sae=grid_F,
        k=grid_k,
        n_seeds=seeds,
    )
    run.save_table("sweep", choice.table)
    out = Output(as_json)
    columns = [Column("F"), Column("k"), Column("mean EV"), Column("least EV"), Column("dead"), Column("live"),
               Column("in another seed"), Column("their variance", drop=1)]  # fmt: skip
    rows = [
        (
            f"{row['d_sae']:,.0f}", f"{row['k']:g}", number(row["explained_variance"]), number(row["least_explained"]),
            percent(row["dead"]), f"{row['live']:,.0f}", percent(row["agreement"], 0), percent(row["variance"], 0),
        )
        for row in choice.table.to_dict("records")
    ]  # fmt: skip
    out.table(columns, rows, title=f"{counted(len(rows), 'setting')}, each from {seeds} seeds")
    out.say(choice.reason)
    out.end(run=run_dir, settings=choice.table, reason=choice.reason)


@app.command()
def evolve(
    run_dir: TrainedArgument,
    untrained: Annotated[
        bool,
        typer.Option(
            "--untrained/--no-untrained",
            help="Also train a crosscoder on as many models that never trained, with the run's settings, and count "
            "births there: the rate of false births. Takes as long as the run's harvest and training.",
        ),
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Analyse when features form, rotate, split and fade, the phases of training, and probes of some features."""
    from crosslens.cli.results import count_lifecycles, show_evolution
    from crosslens.config import EvolveOptions
    from crosslens.evolution import describe_doubtful
    from crosslens.pipeline import evolve as evolve_run

    tables = evolve_run(RunDir(run_dir), EvolveOptions(untrained=untrained), device=device)
    out, labels = Output(as_json), tables["doubtful"]["label"].tolist()
    show_evolution(out, tables, labels, tables["probe_presence"])
    for line in describe_doubtful(tables["doubtful"]):
        out.say(line)
    if "scaling" not in tables:
        out.say("latent scaling is left out: without a penalty on the decoder it equals the decoder norm")
    counts = {name: tables[name] for name in ("birth_counts", "doubtful")}
    out.end(
        run=run_dir, snapshots=labels, lifecycles=count_lifecycles(tables["lifecycles"]), **counts,
        probes=tables["probe_presence"],
    )  # fmt: skip


@app.command()
def attribute(
    run_dir: TrainedArgument,
    task: TasksOption,
    method: Annotated[
        str,
        _option(
            "--method",
            "removal (what is lost without a feature), both_ends (the mean of that and of what adding it gains), ig "
            "(integrated gradients, whose effects add up), gradient (attribution patching) or exact (ablate features "
            "one by one).",
            one_of(*METHODS),
        ),
    ] = "removal",
    rule: Annotated[
        str, _option("--rule", "Quadrature rule of ig: gauss_legendre, midpoint or left.", one_of(*RULES))
    ] = "gauss_legendre",
    n_nodes: Annotated[int, _option("--n-nodes", "Nodes of the rule, each a backward pass.", in_range(1))] = 20,
    baseline: BaselineOption = None,
    n_exact: Annotated[
        int,
        _option(
            "--n-exact",
            "Ablate this many of the largest effects one by one at every snapshot, to see how far the estimates agree. "
            "0: none.",
            in_range(0),
        ),
    ] = 20,
    consensus: ConsensusOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the effect of every feature on tasks at every snapshot, on the selection half of their prompts."""
    if consensus:
        RunDir(run_dir).consensus()  # refused before the imports below, which take seconds
    from crosslens.cli.results import explain_baseline, show_effects
    from crosslens.config import AttributeOptions
    from crosslens.pipeline import attribute as attribute_run

    options: dict[str, Any] = {"method": method, "rule": rule, "n_nodes": n_nodes, "baseline": baseline}
    options |= {"n_exact": n_exact, "consensus": consensus, "seed": seed}
    out, results = Output(as_json), dict[str, Any]()
    for name, found in attribute_run(RunDir(run_dir), AttributeOptions(task=tuple(task), **options), device=device):
        if baseline is None and (why := explain_baseline(name, found.runs)):
            out.say(why)
        results[name] = show_effects(out, name, found)
    out.end(run=run_dir, tasks=results)


@app.command()
def ablate(
    run_dir: TrainedArgument,
    task: TasksOption,
    k: Annotated[
        str, _option("--k", "Sizes of the sets of top features, such as 1,5,15,50.", check_numbers)
    ] = "1,5,15,50",
    baseline: BaselineOption = None,
    n_draws: Annotated[
        int, _option("--n-draws", "Sets of random and of matched features to compare with.", in_range(1))
    ] = 20,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ablate the top features, and keep only them, on the held-out half of the prompts of tasks."""
    from crosslens.cli.results import show_ablation
    from crosslens.config import AblateOptions
    from crosslens.pipeline import ablate as ablate_run

    options: dict[str, Any] = {"k": tuple(parse_numbers(k, "--k")), "baseline": baseline}
    options |= {"n_draws": n_draws, "seed": seed}
    out, results = Output(as_json), dict[str, Any]()
    for name, found in ablate_run(RunDir(run_dir), AblateOptions(task=tuple(task), **options), device=device):
        results[name] = show_ablation(out, name, found.curves, found.runs)
    out.end(run=run_dir, tasks=results)


@app.command()
def study(
    run_dir: TrainedArgument,
    task: TasksOption,
    k: Annotated[
        int,
        _option("--k", "Features of the sets whose ablation, transfer and additivity are measured.", in_range(3)),
    ] = 15,
    baseline: BaselineOption = None,
    n_exact: Annotated[
        int, _option("--n-exact", "Largest effects to ablate one by one, at every snapshot.", in_range(3))
    ] = 100,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run every causal analysis of tasks: effects, ablation with controls, transfer, additivity, timeline, validation.

    What `attribute` and `ablate` have left is used again. Repeat it after an interruption and it continues.
    """
    from crosslens.cli.results import show_study
    from crosslens.config import StudyOptions
    from crosslens.pipeline import study as study_run

    options: dict[str, Any] = {"k": k, "baseline": baseline, "n_exact": n_exact, "seed": seed}
    run, out, results = RunDir(run_dir), Output(as_json), dict[str, Any]()
    for name, found in study_run(run, StudyOptions(task=tuple(task), **options), device=device):
        results[name] = show_study(out, found, k)
    out.say(f"transfer, additivity, timeline, validation: crosslens report {shlex.quote(str(run_dir))}")
    out.end(run=run_dir, tasks=results)


@app.command("run")
def run_config(
    config: Annotated[
        Path, typer.Argument(help="A .toml file with run_dir and the tables [train], [evolve], [study], [report].")
    ],
) -> None:
    """Go from snapshots to a report in one command. Repeat it after an interruption and it continues.

    The file has run_dir at the top, and a table per command with its options: [train], and where wanted [evolve],
    [study], [label] and [report].
    """
    from crosslens.cli.running import run_commands

    run_commands(config, typer.main.get_command(app))


@app.command()
def status(run_dir: RunArgument, as_json: JsonOption = False) -> None:
    """Say what a run directory holds, what is missing or damaged, and the next command to type."""
    from crosslens.cli.status import inspect_run

    out, found = Output(as_json), inspect_run(run_dir)
    columns = [Column("part", left=True), Column("state", left=True), Column("contents", left=True)]
    out.table(columns, [part[:3] for part in found.parts], title=f"{run_dir}: {found.about}")
    out.say(f"next: {found.next}")
    out.end(run=run_dir, about=found.about, parts=[part._asdict() for part in found.parts], next=found.next)


@app.command()
def export(
    run_dir: TrainedArgument,
    format: Annotated[
        str,
        _option(
            "--format",
            "sae: one snapshot as a folder that sae_lens.SAE.load_from_disk reads; json: all features in one file, "
            "with labels, lifecycles, examples and logit lens; neuronpedia: the features of one snapshot as batch "
            "files of SAEDashboard 0.8. json and neuronpedia need `crosslens evolve` first.",
            one_of("sae", "json", "neuronpedia"),
        ),
    ],
    snapshot: Annotated[
        str | None, _option("--snapshot", "Label of the snapshot, for sae and neuronpedia. Default: the last one.")
    ] = None,
    to: Annotated[
        Path | None,
        _option("--to", "Folder, or for json the file. Default: in the folder exports of the run.", check_export),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a crosscoder or its features in a format of other tools."""
    if format == "json" and snapshot is not None:
        raise UserError(f"--snapshot {snapshot} is not for --format json, which holds all snapshots: leave it out")
    out, labels = Output(as_json), list_labels(run_dir)
    chosen = labels[-1] if snapshot is None else choose_label(labels, snapshot)
    name = "features.json" if format == "json" else f"{format}-{chosen}"
    place = to or run_dir / "exports" / name

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
    sae.save_model(place)
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


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Run directory.", metavar="A", callback=check_trained_run)],
    b: Annotated[Path, typer.Argument(help="Another run directory.", metavar="B", callback=check_trained_run)],
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs: settings, explained variance, and matched features if both have the same snapshots."""
    from crosslens.cli.comparison import read_pairs, show_comparison

    runs = RunDir(a), RunDir(b)
    show_comparison(Output(as_json), *runs, *read_pairs(*runs, device))


@app.command()
def remove(
    run_dir: RunArgument,
    task: Annotated[list[str], _option("--task", "Name of a task, as the report shows it. Repeat it for several.")],
    as_json: JsonOption = False,
) -> None:
    """Delete the tables of tasks from a run; the report then leaves them out."""

    run, out, removed = RunDir(run_dir), Output(as_json), dict[str, list[str]]()
    for name in task:
        removed[name] = run.remove_task(name)
        out.say(f"{name}: {', '.join(removed[name])}")
    out.end(run=run_dir, removed=removed)


@app.command("label")
def label_run(
    run_dir: RunArgument,
    client: Annotated[str | None, _option("--client", "API of the server: openai or anthropic.")] = None,
    model: Annotated[str | None, _option("--model", "Name of the language model on the server.")] = None,
    local: Annotated[
        bool, _option("--local", "Label each feature by the tokens of its examples instead, without a language model.")
    ] = False,
    base_url: Annotated[
        str | None, _option("--base-url", "URL of another server with that API, such as a local one.")
    ] = None,
    features: Annotated[
        str | None, _option("--features", "Feature ids such as 3,17. Default: all.", check_numbers)
    ] = None,
    n_features: Annotated[
        int | None, _option("--n-features", "Label this many of them, drawn at random.", in_range(1))
    ] = None,
    n_examples: Annotated[int, _option("--n-examples", "Examples shown per feature.", in_range(1))] = 7,
    score: Annotated[
        bool,
        typer.Option(
            "--score/--no-score",
            help="Have complexity rated a second time, and judge every label, and as a control another feature's, on "
            "held-out passages: six requests per feature instead of one.",
        ),
    ] = True,
    second_model: Annotated[
        str | None, _option("--second-model", "Model of the second rating. Default: the same, asked once more.")
    ] = None,
    attempts: Annotated[
        int, _option("--attempts", "Requests of each kind until an answer can be parsed.", in_range(1))
    ] = 1,
    requests_per_minute: Annotated[float, _option("--requests-per-minute", "Rate limit.", check_positive)] = 50.0,
    workers: Annotated[int, _option("--workers", "Concurrent requests.", in_range(1))] = 4,
    prices: Annotated[str | None, _option("--prices", "Prices of a million tokens in and out, such as 3,15.")] = None,
    seed: SeedOption = 0,
    dry_run: Annotated[bool, _option("--dry-run", "Estimate the cost without sending a request.")] = False,
    yes: Annotated[bool, _option("--yes", "Do not ask for confirmation.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Label features with a language model, and score the labels.

    The key is read from OPENAI_API_KEY or ANTHROPIC_API_KEY.
    """
    check_examples(RunDir(run_dir))  # before the imports below, which take seconds
    from crosslens.config import LabelOptions

    asked: dict[str, Any] = {"client": client, "model": model, "local": local, "base_url": base_url}
    asked |= {"features": None if features is None else tuple(parse_numbers(features, "--features"))}
    asked |= {"n_features": n_features, "n_examples": n_examples, "score": score, "second_model": second_model}
    asked |= {"attempts": attempts, "requests_per_minute": requests_per_minute, "workers": workers, "seed": seed}
    asked |= {"prices": None if prices is None else parse_prices(prices)}
    options = LabelOptions(**asked)
    from crosslens.features.labels import Estimate, complexity_correlation, describe_labels, summarise_labels
    from crosslens.pipeline import label as label_features

    run, out = RunDir(run_dir), Output(as_json)

    def confirm(estimate: Estimate) -> bool:
        out.say(str(estimate))
        if not dry_run and estimate.requests and not local and not yes:
            typer.confirm("Send them?", abort=True, err=as_json)
        return not dry_run

    labels = label_features(run, options, confirm=confirm)
    estimate = labels.estimate
    if dry_run:
        out.end(run=run_dir, estimate=estimate)
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
    out.end(run=run_dir, estimate=estimate, labels=labels.table, tokens=tokens, scores=scores, complexity=correlations)


@app.command("report")
def report_run(
    run_dir: RunArgument,
    wandb: Annotated[bool, _option("--wandb", "Add heat map and tables to the run on W&B.")] = False,
    wandb_project: Annotated[
        str | None, _option("--wandb-project", "W&B project to add them to, for a run trained without W&B.")
    ] = None,
    consensus: ConsensusOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the HTML report of a run."""
    if consensus:
        RunDir(run_dir).consensus()  # refused before the imports below, which take seconds
    from crosslens.config import ReportOptions
    from crosslens.pipeline import report as write_report

    out = Output(as_json)
    options = ReportOptions(wandb=wandb, wandb_project=wandb_project, consensus=consensus)
    page, logged = write_report(RunDir(run_dir), options)
    out.say(str(page))
    if logged is not None:
        out.say(f"W&B run {logged}")
    out.end(run=run_dir, page=page, wandb=logged)


@app.command()
def push(
    source: Annotated[
        Path, typer.Argument(help="Run directory, or folder of a crosscoder.", metavar="RUN", callback=check_published)
    ],
    repository: Annotated[
        str,
        typer.Argument(
            help="Repository on the hub, such as someone/name; created if missing.", callback=check_repository
        ),
    ],
    sae_id: Annotated[
        str | None, _option("--id", "Folder in the repository. Default: the hook point.", check_id)
    ] = None,
    private: Annotated[bool, _option("--private", "Create a private repository.")] = False,
    dry_run: Annotated[bool, _option("--dry-run", "Show what would be uploaded.")] = False,
    licence: Annotated[str | None, _option("--licence", "Licence of the weights, such as mit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a crosscoder on the Hugging Face hub, with a model card."""
    from crosslens.sharing.publishing import push_to_hub

    out = Output(as_json)
    pushed = push_to_hub(source, repository, sae_id, private=private, dry_run=dry_run, licence=licence)
    out.say(str(pushed))
    out.end(push=pushed)


@app.command()
def demo(
    out: Annotated[Path, _option("--out", "Run directory; created if missing.", check_new_run)] = Path("runs/demo"),
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Pretrain a tiny model, train a crosscoder on its snapshots, and write the report: minutes on two CPU cores."""

    RunDir(out).check_settings({"seed": seed}, part="demo")
    from crosslens.cli.demo import run_demo

    shown, summary = Output(as_json), run_demo(out, seed)
    shown.say(f"done in {summary['seconds']:.0f} s; open {out / 'report' / 'index.html'}")
    shown.end(run=out, summary=summary)


# ---------------------------------------------------------------------- listing
def _list(out: Output, what: str, steps: str | None) -> None:
    """Print families, releases, a release, or snapshots."""
    from crosslens.sharing.registry import find_release, list_releases
    from crosslens.snapshots import families
    from crosslens.snapshots.hub import is_on_disk, list_revisions

    if not what:
        known = families.read_table()
        columns = [Column("family", left=True), Column("sizes", left=True), Column("snapshots", left=True)]
        # the rest of `about`, on how documents end, would fill the terminal
        rows = [(name, _sizes([*entry["sizes"]]), entry["about"].split(". ")[0]) for name, entry in known.items()]
        out.table(columns, rows, note="crosslens ls FAMILY-SIZE lists snapshots, crosslens ls releases crosscoders")
        out.end(families={name: {"sizes": [*entry["sizes"]], "about": entry["about"]} for name, entry in known.items()})
        return
    is_folder = Path(what).is_dir()
    if not is_folder and (what == "releases" or what in list_releases()):
        chosen = None if what == "releases" else what
        found = [find_release(chosen)] if chosen else [*list_releases().values()]
        (_show_release if chosen else _show_releases)(out, *found)
        out.end(releases=found)
        return
    repository, _, pattern = what.partition("@")
    model = None if is_folder else families.match_model(what)
    if "{step}" in pattern and not is_folder:
        model = families.pattern_model(repository, pattern)
    if model is None:
        rows = [
            (families.Revision(each.label, each.revision or "", each.step, each.tokens), each.is_on_disk())
            for each in find_snapshots(what, steps)()
        ]
    else:
        revisions = model.revisions(parse_steps(steps or "all"), lambda: list_revisions(model.repository))
        rows = [(row, is_on_disk(model.repository, row.revision)) for row in revisions]
    revised = any(row.revision for row, _ in rows)
    columns = [Column("snapshot"), *[Column("revision", drop=2)] * revised, Column("trained on")]
    columns.append(Column("on this disk", left=True, drop=1))
    cells = [
        (
            row.label,
            *[row.revision] * revised,
            "" if row.tokens is None else f"{row.tokens:,} tokens",
            "on this disk" if on_disk else "not on this disk",
        )
        for row, on_disk in rows
    ]
    held = sum(on_disk for _, on_disk in rows)
    out.table(columns, cells, note=f"{counted(len(rows), 'snapshot')}, {held:,} on this disk", bare=True)
    out.end(snapshots=[{**row._asdict(), "on_disk": on_disk} for row, on_disk in rows])


def _sizes(sizes: list[str]) -> str:
    """Sizes of a family; those that all exist deduplicated as well are listed once."""
    plain = [one for one in sizes if not one.endswith("-deduped")]
    if len(plain) < len(sizes) and all(f"{one}-deduped" in sizes for one in plain):
        return f"{', '.join(plain)}; each also as SIZE-deduped"
    return ", ".join(sizes)


def _show_releases(out: Output, *releases: Release) -> None:
    release, model, place = (Column(name, left=True) for name in ("release", "model", "place"))
    rows = [(each.name, each.model, f"{len(each.entries):,}", each.place) for each in releases]
    out.table([release, model, Column("crosscoders"), place], rows, note="crosslens ls RELEASE lists its crosscoders")


def _show_release(out: Output, release: Release) -> None:
    columns = [Column("id", left=True), Column("hook", left=True), Column("settings", left=True)]
    rows = [
        (
            entry.id, entry.hook_name or "-", ", ".join(f"{key} {value}" for key, value in entry.config.items()),
            number(entry.variance_explained), number(entry.l0, 1),
        )
        for entry in release.entries.values()
    ]  # fmt: skip
    about = (("licence", release.licence), ("data", release.dataset))
    out.table(
        [*columns, Column("EV"), Column("L0")],
        rows,
        title=f"{release.name}: {release.model}, {release.place}",
        note="; ".join(f"{what}: {said}" for what, said in about if said),
    )


# ---------------------------------------------------------------------- processes
def _show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Write a warning to stderr in one line, without the line of code that raised it."""
    if issubclass(category, UserWarning):
        from tqdm import tqdm

        tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)  # keeps a progress bar whole
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def main() -> None:
    """Run the command line; every failure is one line on stderr, with the exit codes of `failures`."""
    # must precede the import of torch: threads that busy-wait slow down a loaded machine several times over
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except (SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # torch.distributed.checkpoint's own does not derive from Exception
        if debug:
            traceback.print_exc()
        words, code = explain(error)
        typer.echo(f"crosslens: {' '.join(words.split())}", err=True)
        sys.exit(code)
