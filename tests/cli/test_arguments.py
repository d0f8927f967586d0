"""Arguments of the command line: which are refused before anything heavy is imported, and what the others stand for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from cyclopts import App

from crosslens import config
from crosslens.activations import files as cache_files
from crosslens.activations import tokens
from crosslens.causal import attribution
from crosslens.cli.app import app, main
from crosslens.cli.help import parse
from crosslens.config import CrosscoderOptions, ModelOptions, SourceOptions, TrainingOptions
from crosslens.crosscoders import DECLARATIONS
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig as BATCHTOPK
from crosslens.crosscoders import JumpReLUCrosscoderTrainingConfig as JUMPRELU
from crosslens.crosscoders import StandardCrosscoderTrainingConfig as STANDARD
from crosslens.crosscoders import TopKCrosscoderTrainingConfig as TOPK
from crosslens.distributed import devices
from crosslens.errors import UserError
from crosslens.pipeline.opening import find_snapshots, parse_snapshots
from crosslens.pipeline.training import check_training, make_architecture, make_config, recipe_training
from crosslens.rundir import RunDir
from crosslens.training import recipes
from crosslens.training.config import TrainConfig

PROGRAM = """
import contextlib, io, json, sys
from crosslens.cli.app import main

answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["crosslens", *arguments]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            main()
        except SystemExit as stop:
            answers.append([stop.code, told.getvalue()])
    heavy = {"torch", "pandas", "numpy", "transformers", "sae_lens", "transformer_lens", "plotly"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
print(json.dumps(answers))
"""
DATA = ["--snapshots", "{snapshots}", "--hook", "blocks.1.hook_resid_post", "--dataset", "{files}/text.txt"]
BARE = ["train", *DATA, "--run-dir", "{files}/new"]
SMALL = [*BARE, "--d-sae", "32", "--batch-size", "128"]
TRAIN = [*SMALL, "--k", "4"]
EVOLUTION = [*SMALL, "--recipe", "evolution_of_concepts"]
RUN = "{files}/run"
WRONG = [
    (["ls", "pythia-15m"], "pythia has no size '15m'.*did you mean"),
    (["ls", "nowhere"], "is neither a folder nor a known model"),
    (["ls", "base=./gone"], "'base': there is no folder './gone', and it is no name of a repository"),
    (["ls", "base=a,base=b"], "has a label twice: give each model its own"),
    (["ls", "base=a,org/b"], "mixes forms: give label=place,label=place"),
    (["ls", "runs/lr=1"], "is neither a folder nor a known model"),
    (["ls", "base=a,chat=b", "--steps", "sft"], "has no snapshot sft; it has base, chat"),
    (["ls", "pythia-14m", "--steps", "0,3"], "the nearest are 2 and 4"),
    (["ls", "pythia-14m", "--steps", "log:1"], "log:1 asks for 1 of 154 steps"),
    (["ls", "olmo-1b", "--steps", "triplet"], "olmo-1b has no step set 'triplet'"),
    (["ls", "{snapshots}", "--steps", "7"], "has no snapshot 7; it has step0, step10, step20"),
    (["plan", *DATA, "--snapshots", "crosslens-dem"], "did you mean 'crosslens-demo'"),
    (["plan", *DATA, "--snapshots", "org/model@a,b", "--steps", "1"], "contradicts 'org/model@a,b'"),
    (["plan", *DATA, "--snapshots", "a/b/c@step1"], "'a/b/c' is not a repository name"),
    (["plan", *DATA, "--snapshots", "crosslens-demo", "--steps", "49"], "has no snapshot 49"),
    (["plan", *DATA, "--processes", "0"], "--processes 0 must be at least 1"),
    (["harvest", *DATA, "--hook", "blocks.1.resid", "--cache", "{files}/c"], "is not supported"),
    (["harvest", *DATA, "--hook", "blocks.7.hook_resid_post", "--cache", "{files}/c"], "blocks, 0 to 2"),
    (["harvest", *DATA, "--hook", "blocks.1.hook_resid_post", "--cache", "{files}/c"], "is given twice"),
    (["harvest", *DATA, "--attention", "spda", "--cache", "{files}/c"], 'Did you mean "sdpa"'),
    (["plan", *DATA, "--attention", "sdpa", "--backend", "hooked_transformer"], "sdpa needs --backend bridge"),
    (["plan", *DATA, "--hook", "blocks.1.mlp.hook_in", "--backend", "hooked_transformer"], "name of TransformerBridge"),
    (
        ["plan", *DATA, "--model-dtype", "float64"],
        '"float64" for --model-dtype. Choose from: "float32", "bfloat16", "float16"',
    ),
    (["plan", *DATA, "--drop-positions", "-1"], "--drop-positions -1 must be at least 0"),
    ([*TRAIN, "--hook", "blocks.1.hook_mlp_out"], "--hook is given 2 times: a crosscoder reads one hook point"),
    (["harvest", *DATA, "--cache", "{files}/text.txt/c"], "text.txt is a file"),
    (["harvest", *DATA], "--cache is missing: Folder for the activations"),
    ([*TRAIN, "--cache", "{files}/c", "--cache-dtype", "int7"], 'int7.*Did you mean "int8"'),
    ([*TRAIN, "--dataset", "{files}/none.txt"], "none.txt does not exist"),
    ([*TRAIN, "--dataset", "user/name/part"], "user/name/part does not exist: give an existing file, or a hub name"),
    ([*TRAIN, "--dataset", "{files}/task.ini"], "unsupported file type: use .txt"),
    ([*TRAIN, "--dataset", "{files}"], "is not a regular file"),
    ([*TRAIN, "--sample-by", "page"], 'Choose from: "line", "paragraph"'),
    ([*TRAIN, "--architecture", "topkk"], 'Did you mean "topk"'),
    ([*TRAIN, "--backend", "nnsight"], 'Choose from: "bridge", "hooked_transformer"'),
    ([*TRAIN, "--k", "64"], "--k 64 must be at most --d-sae 32"),
    ([*TRAIN, "--d-sae", "0"], "--d-sae 0 must be between 1 and 16,777,216"),
    ([*TRAIN, "--d-sae", "many"], "--d-sae many must be a whole number"),
    ([*TRAIN, "--lr", "nan"], "--lr nan must be a finite number above 0"),
    ([*TRAIN, "--n-tokens", "100"], "--batch-size 128 must be at most --n-tokens 100"),
    ([*TRAIN, "--training-tokens", "99"], "--training-tokens 99 is less than one batch of --batch-size"),
    ([*TRAIN, "--context-size", "1"], "--context-size 1 must be at least 2"),
    ([*TRAIN, "--seed", "4294967296"], "must be between 0 and 4,294,967,295"),
    ([*TRAIN, "--data-parallel", "2"], "--data-parallel 2 does not divide the 1 process of this run"),
    ([*TRAIN, "--device", "tpu"], "--device tpu is unknown: use cpu, cuda"),
    ([*TRAIN, "--run-dir", "{files}/text.txt"], "text.txt is a file"),
    ([*TRAIN, "--run-dir", "{files}"], "contains files but is not a run directory"),
    ([*TRAIN, "--run-dir", "{files}/run", "--lr", "0.5"], "training.lr=0.1, this run has training.lr=0.5"),
    ([*TRAIN, "--run-dir", "{files}/run", "--scale", "std"], "scale=norm, this run has architecture.scale=std"),
    ([*EVOLUTION, "--run-dir", "{files}/run"], "training.lr=0.1, this run has training.lr=5e-05"),
    (BARE, "--d-sae is missing: give the number of features, or a --recipe"),
    (SMALL, "--k 64 must be at most --d-sae 32"),
    ([*SMALL, "--recipe", "evolution"], '"evolution" for --recipe.*Did you mean "evolution_of_concepts"'),
    (
        [*EVOLUTION, "--architecture", "topk"],
        "--architecture topk contradicts --recipe evolution_of_concepts, which is 'jumprelu'",
    ),
    ([*EVOLUTION, "--k", "4"], r"--k 4 is no setting of 'jumprelu' crosscoders \(--recipe .*\): leave it out\n"),
    ([*EVOLUTION, "--lr-decay", "0.95"], "--lr-warm-up 0.1 and --lr-decay 0.95 are fractions"),
    ([*EVOLUTION, "--training-tokens", "99"], "--training-tokens 99 is less than one batch of --batch-size"),
    ([*TRAIN, "--sparsity", "0.3"], "--sparsity 0.3 is no setting of 'batchtopk'.*or use --architecture jumprelu"),
    ([*TRAIN, "--sparsity-warm-up", "0.3"], "--sparsity-warm-up 0.3 is no setting of 'batchtopk'"),
    ([*TRAIN, "--l1", "2"], "--l1 2 is no setting of 'batchtopk'.*or use --architecture standard"),
    ([*SMALL, "--architecture", "jumprelu", "--l1-warm-up", "9"], "--l1-warm-up 9 is no setting of 'jumprelu'"),
    (
        [*SMALL, "--architecture", "standard", "--aux", "1"],
        "--aux 1 is no setting of 'standard'.*or use --architecture batchtopk",
    ),
    ([*SMALL, "--architecture", "jumprelu", "--sparsity", "-1"], "--sparsity -1 must be a finite number, 0 or above"),
    ([*SMALL, "--architecture", "standard", "--l1", "nan"], "--l1 nan must be a finite number, 0 or above"),
    ([*TRAIN, "--aux", "inf"], "--aux inf must be a finite number"),
    ([*TRAIN, "--k-start", "8"], "--k-start 8 needs --k-anneal"),
    ([*TRAIN, "--k-anneal", "0.5"], "--k-anneal 0.5 needs --k-start"),
    ([*TRAIN, "--k-start", "64", "--k-anneal", "0.5"], "--k-start 64 must be at most --d-sae 32"),
    ([*TRAIN, "--k-start", "0", "--k-anneal", "0.5"], "--k-start 0 must be a finite number above 0"),
    ([*TRAIN, "--k-start", "8", "--k-anneal", "1"], "--k-anneal 1 must be a fraction of the steps below 1, or"),
    ([*TRAIN, "--lr-warm-up", "2.5"], "--lr-warm-up 2.5 must be a fraction of the steps below 1, or a number of steps"),
    ([*TRAIN, "--lr-warm-up", "nan"], "--lr-warm-up nan must be a fraction"),
    ([*TRAIN, "--lr-warm-up", "-0.1"], "--lr-warm-up -0.1 must be a fraction"),
    ([*TRAIN, "--lr-warm-up", "0.9"], "--lr-warm-up 0.9 and --lr-decay 0.2 are fractions .* at most 1 together"),
    ([*TRAIN, "--lr-warm-up", "11", "--training-tokens", "1280"], r"lr_warm_up_steps=11 is not in \[0, 8\]"),
    ([*TRAIN, "--lr-decay", "1.5"], "--lr-decay 1.5 must be a fraction of the steps, between 0 and 1"),
    ([*TRAIN, "--dead-tokens", "0"], "--dead-tokens 0 must be at least 1"),
    ([*TRAIN, "--precision", "fp16"], '"fp16" for --precision. Choose from: "float32", "tf32", "bfloat16"'),
    ([*TRAIN, "--precision", "tf32", "--device", "cpu"], "precision='tf32' needs a CUDA device"),
    ([*TRAIN, "--adam-moments", "fp8"], '"fp8" for --adam-moments. Choose from: "float32", "bfloat16"'),
    ([*TRAIN, "--scale", "rms"], '"rms" for --scale. Choose from: "std", "norm"'),
    ([*TRAIN, "--split", "test"], "--split test is for datasets on the hub, and .*text.txt is a file: leave it out"),
    (["harvest", *DATA, "--cache", "{files}/c", "--split", "test"], "--split test is for datasets on the hub"),
    (["plan", *DATA, "--split", "test"], "--split test is for datasets on the hub"),
    (["plan", *DATA, "--recipe", "evolution_of_concepts", "--k", "4"], "--k 4 is no setting of 'jumprelu'"),
    ([*TRAIN, "--seeds", "0"], "--seeds 0 must be at least 1"),
    (["sweep", *DATA, "--run-dir", "{files}/new", "--d-sae", "8,x", "--k", "2"], "--d-sae 8,x must be whole numbers"),
    (["sweep", *DATA, "--run-dir", "{files}/new", "--d-sae", "8", "--k", "16"], "--k 16 must be at most --d-sae 8"),
    (["sweep", *DATA, "--run-dir", "{files}/new", "--d-sae", "8", "--k", "2", "--seeds", "1"], "must be at least 2"),
    (["attribute", RUN, "--task", "demo:simple", "--consensus"], "no consensus of several seeds; .* with --seeds 3"),
    (["report", RUN, "--consensus"], "has no consensus of several seeds"),
    (["evolve", "{files}"], "is not a run directory"),
    (["evolve", "{files}/untrained"], "has no trained crosscoder"),
    (["evolve", "{files}/unrecorded"], "does not record where its activations came from"),
    (["evolve", "{files}/damaged"], "is not valid JSON"),
    (["attribute", RUN, "--task", "demo:simpel"], "did you mean 'simple'"),
    (["attribute", RUN, "--task", "{files}/none.json"], "there is no file '.*none.json'"),
    (["attribute", RUN, "--task", "sva:{files}/none.json"], "there is no file '.*none.json'"),
    (["attribute", RUN, "--task", "clams:fr"], "there is no file 'fr'"),
    (["attribute", RUN, "--task", "{files}/sva.jsonl"], "sva.jsonl, line 1: the key 'prefix' .*use --task sva:FILE"),
    (["ablate", RUN, "--task", "sva:{files}/sentences.csv"], "sentences.csv, line 2: .*use --task blimp:FILE"),
    (["attribute", RUN, "--task", "blimp:{files}/sva.jsonl"], "'sentence_good' is missing; this is the SVA format"),
    (["attribute", RUN, "--task", "clams:{files}/text.txt"], "text.txt, line 1: 'a b c' is not 'True' or 'False'"),
    (["attribute", RUN, "--task", "multiblimp:French"], "does not name a language, such as fra"),
    (["attribute", RUN, "--task", "{files}/text.txt"], "unsupported file type: give one of .jsonl"),
    (["attribute", RUN, "--task", "demo:simple", "--method", "igg"], 'Did you mean "ig"'),
    (["attribute", RUN, "--task", "demo:simple", "--baseline", "median"], 'Choose from: "zero", "mean", "patch"'),
    (["ablate", RUN, "--task", "demo:simple", "--k", "1,x"], "--k 1,x must be whole numbers"),
    (["label", RUN, "--client", "openai", "--model", "m"], "has no examples of features"),
    (["label", "{files}/labelled", "--client", "opnai", "--model", "m"], 'Did you mean "openai"'),
    (["label", "{files}/labelled", "--client", "openai", "--model", "m", "--prices", "3"], "must be two numbers"),
    (["report", "{files}/nowhere"], "is not a run directory"),
    (["push", "{files}", "me/repository"], "holds no crosscoder"),
    (["push", RUN, "repository"], "'repository' is not a repository name"),
    (["push", RUN, "me/repository", "--id", "../a"], "--id '../a' is not a path inside a repository"),
    (["status", "{files}"], "is not a run directory"),
    (["status", "{files}/damaged"], "is not valid JSON"),
    (["export", RUN, "--format", "sea"], 'Choose from: "sae", "json", "neuronpedia". Did you mean "sae"'),
    (["export", RUN, "--format", "sae", "--snapshot", "step1"], "--snapshot 'step1' is unknown: use one of step0"),
    (["export", RUN, "--format", "json", "--snapshot", "step0"], "which holds all snapshots: leave it out"),
    (["export", RUN, "--format", "sae", "--to", "{files}/text.txt/a"], "text.txt is a file"),
    (["diff", RUN, "{files}"], "is not a run directory"),
    (["diff", RUN, "{files}/untrained"], "has no trained crosscoder"),
    (["train", "--config", "{files}/run.toml"], "run.toml cannot be read"),
    (["train", "--config", "{files}/untrained/run.json"], "records no options of `crosslens train`"),
    (["demo", "--out", RUN, "--seed", "1"], "it has seed=0, this run has seed=1"),
    (["trian"], 'Unknown command "trian". Did you mean "train"'),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets and run directories, right and wrong."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("text.txt", "task.ini"):
        (folder / name).write_text("a b c\n")
    sva = {"clean_prefix": "The cats", "clean_answer": " are", "patch_answer": " is"}
    (folder / "sva.jsonl").write_text(json.dumps(sva) + "\n")
    (folder / "sentences.csv").write_text("sentence_good,sentence_bad\nhe is,he are\n")
    identity = {"training": {"lr": 0.1}, "architecture": {"scale": "norm"}}
    source = {"seed": 0, "snapshots": {"snapshots": [{"label": "step0"}]}}
    recorded = {"source": source, "demo": {"seed": 0}, "identity": identity}
    runs = {"run": recorded, "untrained": recorded, "unrecorded": {}, "damaged": "", "labelled": {}}
    for name, contents in runs.items():
        (folder / name / "crosscoder").mkdir(parents=True)
        (folder / name / "run.json").write_text(json.dumps(contents) if contents != "" else "{half")
    (folder / "run" / "crosscoder" / "cfg.json").write_text("{}")
    (folder / "run" / "crosscoder" / "sae_weights.safetensors").touch()
    (folder / "labelled" / "examples.parquet").touch()
    return folder


def test_wrong_arguments_are_refused_before_anything_heavy_is_imported(files: Path, tiny_snapshots: Path) -> None:
    before = sorted(files.rglob("*"))
    commands = [[part.format(files=files, snapshots=tiny_snapshots) for part in arguments] for arguments, _ in WRONG]
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    for (command, message), (code, told) in zip(WRONG, answers, strict=True):
        assert code == 2 and re.search(message, told), (command, told)
        assert told.count("\n") == 1, told
    assert sorted(files.rglob("*")) == before


CLASSES = [each for each in vars(config).values() if dataclasses.is_dataclass(each)]
UNLIMITED = {
    *(
        "snapshots",
        "hook",
        "column",
        "split",
        "wandb_project",
        "dynamics_steps",
        "wandb_run_name",
        "cache",
        "task",
        "model",
        "drop_roles",
        "keep_roles",
        "base_url",
    ),
    *("second_model", "title", "steps", "null", "pair", "file", "init_from", "lower"),
    *("answers", "factor", "add", "at"),  # checked together, in their classes
}


@pytest.mark.parametrize("options", CLASSES)
def test_every_option_has_a_sentence_and_a_limit_or_a_type(options: Any) -> None:
    told = {each.name: each.parameter.help for each in arguments_of(options)}
    assert all(help and help.rstrip(") ").endswith(".") for help in told.values()), told
    for name, (choices, validators) in config._limits(options).items():
        kind = str(get_type_hints(options)[name])
        assert choices or validators or "bool" in kind or name in UNLIMITED, name


def arguments_of(options: Any) -> list[Any]:
    """What cyclopts reads from a class."""

    def command(*, options: Any = None) -> None: ...

    command.__annotations__["options"] = options | None
    command.__kwdefaults__ = {"options": None}
    found = App(default_command=command).assemble_argument_collection(parse_docstring=True)
    return [each for each in found if not each.children]


def shown(*words: str) -> str:
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told), pytest.raises(SystemExit) as stop:
        patch.setenv("COLUMNS", "1000")
        patch.setattr(sys, "argv", ["crosslens", *words])
        main()
    assert not stop.value.code
    return told.getvalue()


def test_help_shows_what_most_runs_need_and_help_all_the_rest() -> None:
    brief, whole = (
        re.findall(r"^[ *]*(--[\w-]+)", shown("train", option), re.M) for option in ("--help", "--help-all")
    )
    assert len(brief) == len(set(brief)) <= 14 and len(whole) == len(set(whole)) > 50
    assert {"--snapshots", "--hook", "--dataset", "--run-dir", "--d-sae", "--k", "--lr", "--dead-tokens"} <= {*brief}
    told = shown("train", "--help-all")
    titles = ("Data", "Crosscoder", "Training", "Models and processes", "Run directory and output")
    headings = [re.search(rf"^ *{title} *$", told, re.M) for title in titles]
    assert all(headings) and [found.start() for found in headings if found] == sorted(
        found.start() for found in headings if found
    )
    for verb in ("plan", "harvest", "sweep", "evolve", "attribute", "ablate", "study", "label", "report", "export"):
        assert {*re.findall(r"^[ *]*(--[\w-]+)", shown(verb, "--help"), re.M)} < {
            *re.findall(r"^[ *]*(--[\w-]+)", shown(verb, "--help-all"), re.M),
            "--help",
        }


def test_completion_knows_commands_options_and_choices() -> None:
    script = app.generate_completion(shell="bash")
    assert all(word in script for word in ("attribute", "--architecture", "jumprelu", "--topk-threshold-lr"))


def test_choices_are_those_of_the_library() -> None:
    assert get_args(config.Architecture) == tuple(config.ARCHITECTURES)
    for name, options in config.ARCHITECTURES.items():
        declared = DECLARATIONS[f"{name}_crosscoder"]
        assert declared.options == options and declared.default == (name == config.DEFAULT_ARCHITECTURE)
        fields = {each.name for each in dataclasses.fields(declared.training[1])}
        assert {option for option, field in config.FIELDS.items() if field in fields} == {*options}
    assert {*get_args(config.CacheDtype)} == {*cache_files.DTYPES}
    assert get_args(config.Method) == attribution.METHODS
    assert get_args(config.Rule) == attribution.RULES
    assert get_args(config.Baseline) == attribution.BASELINES
    assert {*config.TEXT_FILES} == {*tokens._BUILDERS}
    assert {*get_args(config.Recipe)} == {*config.RECIPES}
    for scale in get_args(config.Scale):
        assert STANDARD(d_sae=1, scale=scale).scale == scale
    told = {each.name: each.parameter.help for each in arguments_of(CrosscoderOptions)}
    sparse = BATCHTOPK(d_sae=64)
    assert sparse.k == config.DEFAULT_K
    for option, default in (
        ("--k", sparse.k),
        ("--aux", sparse.aux_loss_coefficient),
        ("--topk-threshold-lr", sparse.topk_threshold_lr),
        ("--sparsity", JUMPRELU(d_sae=1).sparsity_coefficient),
        ("--l1", STANDARD(d_sae=1).l1_coefficient),
    ):
        assert re.search(rf"Default: (\S+ = )?{default:g}\.", told[option]), option
    assert f"Default: {config.DEFAULT_ARCHITECTURE}." in told["--architecture"]


TYPICAL = {
    "--d-sea 32": "Unknown option: --d-sea. Did you mean --d-sae?",
    "--d-sae many": "--d-sae many must be a whole number",
    "--d-sae 32 --k 64": "--k 64 must be at most --d-sae 32",
    "--d-sae 32 --architecture topkk": 'Invalid value "topkk" for --architecture. Choose from: '
    + ", ".join(f'"{name}"' for name in config.ARCHITECTURES)
    + '. Did you mean "topk"?',
    "--d-sae 32 --architecture standard --k 4": "--k 4 is no setting of 'standard' crosscoders: leave it out, or use "
    f"--architecture {' or '.join(config.architectures_with('k'))}",
    "--d-sae 64 --lr fast": 'Invalid value for --lr: unable to convert "fast" into float.',
    "--d-sae 64 --lr -1": "--lr -1 must be a finite number above 0",
    "--d-sae 64 --lr-warm-up 1": "--lr-warm-up 1 must be a fraction of the steps below 1, or a number of steps from 2",
    "--d-sae 64 --training-tokens 100": "--training-tokens 100 is less than one batch of --batch-size 4096",
    "--d-sae 64 --dataset gone.txt": "--dataset gone.txt does not exist: give an existing file, or a hub name such as "
    "user/name",
    "--d-sae 64 --device tpu": "--device tpu is unknown: use cpu, cuda, or cuda:1 for the second GPU",
}


@pytest.mark.parametrize("typed", TYPICAL)
def test_a_typical_mistake_in_full(typed: str) -> None:
    needed = "train --snapshots demo --hook blocks.1.hook_resid_post --dataset user/name --run-dir new"
    with pytest.raises(UserError) as found:
        parse(app, [*needed.split(), *typed.split()])
    assert str(found.value) == TYPICAL[typed]
    with pytest.raises(UserError, match="^--snapshots is missing: A folder of snapshots$"):
        parse(app, ["train", "--run-dir", "new"])


def test_numbers_as_people_write_them() -> None:
    def read(*words: str) -> Any:
        return parse(app, ["plan", "--snapshots", "a", "--hook", "b", "--dataset", "c", *words]).keywords

    assert read("--training-tokens", "2e7")["training"].training_tokens == 20_000_000
    assert read("--training-tokens", "20_000_000")["training"].training_tokens == 20_000_000
    assert read("--batch-size", "1", "--batch-size", "2")["training"].batch_size == 2  # the last counts
    for text in ("2.5", "2e-1", "nan", "1e999", "ten"):
        with pytest.raises(UserError, match=f"--batch-size {text} must be a whole number"):
            read("--batch-size", text)


def test_limits_hold_in_python_too() -> None:
    for made, told in (
        (lambda: TrainingOptions(lr=0), "lr=0 must be a finite number above 0"),
        (lambda: config.AblateOptions(task=("ioi",), k=(0, 5)), "must be at least 1"),
        (lambda: TrainConfig(lr_warm_up=1, device="cpu"), "lr_warm_up=1 must be a fraction of the steps below 1, or"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            made()
    program = "from crosslens.config import TrainingOptions as T; T(precision='fp16')"  # without the tests' type checks
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "precision='fp16' is unknown: use one of float32, tf32, bfloat16" in done.stderr


N_TOKENS = 2570  # not whole batches: 10 steps of 256
SETTINGS = [
    ({"d_sae": 64}, {}, BATCHTOPK(d_sae=64), {}),
    ({"d_sae": 9, "architecture": "topk", "k": 4, "aux": 0.0}, {}, TOPK(d_sae=9, k=4, aux_loss_coefficient=0.0), {}),
    (
        {"d_sae": 9, "k": 4, "k_start": 8.0, "k_anneal": 0.25},
        {"batch_size": 256, "lr_warm_up": 3.0},
        BATCHTOPK(d_sae=9, k=4, k_start=8.0, k_anneal_steps=2),
        {"batch_size": 256, "lr_warm_up_steps": 3},
    ),
    (
        {"d_sae": 9, "architecture": "standard", "l1": 0.4, "l1_warm_up": 3.0, "scale": "norm"},
        {"batch_size": 256},
        STANDARD(d_sae=9, l1_coefficient=0.4, l1_warm_up_steps=3, scale="norm"),
        {"batch_size": 256},
    ),
    (
        {"d_sae": 9, "architecture": "jumprelu", "sparsity": 0.1, "sparsity_warm_up": 0.5},
        {"training_tokens": 40960},
        JUMPRELU(d_sae=9, sparsity_coefficient=0.1, sparsity_warm_up_steps=5),
        {"training_tokens": 40960},
    ),
    (
        {"d_sae": 64},
        {"lr": 0.01, "lr_warm_up": 0.1, "lr_decay": 0.5, "dead_tokens": 7, "adam_moments": "bfloat16"},
        BATCHTOPK(d_sae=64),
        {"lr": 0.01, "lr_warm_up": 0.1, "lr_decay": 0.5, "dead_tokens": 7, "adam_moments": "bfloat16"},
    ),
]
SOURCE = SourceOptions(snapshots="demo", hook=("blocks.1.hook_resid_post",), dataset="user/name", seed=3)


def made_of(crosscoder: CrosscoderOptions, training: TrainingOptions) -> tuple[Any, TrainConfig]:
    check_training(None, SOURCE, crosscoder, training, ModelOptions(device="cpu"))
    made = make_config(training, "cpu", seed=3)
    return make_architecture(crosscoder, made, N_TOKENS), made


@pytest.mark.parametrize(("crosscoder", "training", "architecture", "changed"), SETTINGS)
def test_options_become_settings(
    crosscoder: dict[str, Any], training: dict[str, Any], architecture: Any, changed: dict[str, Any]
) -> None:
    found = made_of(CrosscoderOptions(**crosscoder), TrainingOptions(**training))
    assert found == (architecture, TrainConfig(**{"seed": 3, "device": "cpu", **changed}))


@pytest.mark.parametrize("recipe", config.RECIPES)
def test_a_recipe_and_options_that_override_it(recipe: Any) -> None:
    made, of_recipe = getattr(recipes, recipe), recipe_training(recipe)
    assert made(device="cpu")[0].architecture() == f"{config.RECIPES[recipe]['architecture']}_crosscoder"
    found = made_of(CrosscoderOptions(recipe=recipe), TrainingOptions(**of_recipe))
    assert found == made(device="cpu", seed=3)
    small: dict[str, Any] = {"training_tokens": 25_600, "batch_size": 256, "lr": 0.01}
    architecture, expected = made(d_sae=9, device="cpu", seed=3, **small)
    words = ["--d-sae", "9", "--scale", "std", "--training-tokens", "25600", "--batch-size", "256", "--lr", "0.01"]
    asked = parse(app, ["plan", "--snapshots", "a", "--hook", "b", "--dataset", "c", "--recipe", recipe, *words])
    found = made_of(asked.keywords["crosscoder"], asked.keywords["training"])
    assert found == (dataclasses.replace(architecture, scale="std"), expected)
    option, coefficient = ("sparsity", "sparsity_coefficient") if "evo" in recipe else ("l1", "l1_coefficient")
    changed, _ = made_of(CrosscoderOptions(recipe=recipe, **{option: 0.5}), TrainingOptions(**of_recipe))
    assert changed == dataclasses.replace(made(device="cpu")[0], **{coefficient: 0.5})


def test_more_warmup_than_steps() -> None:
    crosscoder, training = CrosscoderOptions(d_sae=9, k=4, k_start=8.0, k_anneal=11.0), TrainingOptions(batch_size=256)
    # the number of steps is not known before the data are
    check_training(None, SOURCE, crosscoder, training, ModelOptions(device="cpu"))
    with pytest.raises(UserError, match="--k-anneal 11 exceeds the 10 steps of this run"):
        made_of(crosscoder, training)


def test_the_docs_explain_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`--.*?) \|", page, re.M)
    explained = {option.removeprefix("--") for row in rows for option in re.findall(r"`(--[\w-]+)`", row)}
    names = {each.name for cls in (CrosscoderOptions, TrainingOptions) for each in dataclasses.fields(cls)}
    assert {name.replace("-", "_") for name in explained} <= names
    assert {each.name for each in dataclasses.fields(CrosscoderOptions)} - {"topk_threshold_lr"} <= {
        name.replace("-", "_") for name in explained
    }


def test_a_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "GPU_FILES", ())
    with pytest.raises(UserError, match="'cuda' needs CUDA, which is not available"):
        devices.check_device("cuda")
    monkeypatch.setattr(devices, "GPU_FILES", ("/",))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    devices.check_device(None), devices.check_device("cpu")
    with pytest.raises(UserError, match="'cuda' needs CUDA, which is not available"):
        devices.check_device("cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    devices.check_device("cuda:1")
    with pytest.raises(UserError, match="'cuda:2' does not exist: there are 2 GPUs"):
        devices.check_device("cuda:2")


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        (None, ["step0", "step10", "step20"]),
        ("all", ["step0", "step10", "step20"]),
        ("10,20", ["step10", "step20"]),
        ("20,0", ["step0", "step20"]),  # in the order of training
        ("step10,20", ["step10", "step20"]),
        ("step10", ["step10"]),
        ("linear:2", ["step0", "step20"]),
        ("log:3", ["step0", "step10", "step20"]),
    ],
)
def test_some_snapshots_of_a_folder(tiny_snapshots: Path, steps: str | None, labels: list[str]) -> None:
    found = parse_snapshots(str(tiny_snapshots), steps)
    assert found.labels == labels and found.steps == [int(label[4:]) for label in labels]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("10,30", "'10,30': tiny-neox has no snapshot 30; it has step0, step10, step20"),
        ("paper", "'paper': tiny-neox has no snapshot paper; it has step0, step10, step20"),
        ("log:4", "log:4 asks for 4 of 3 steps"),
    ],
)
def test_steps_that_a_folder_does_not_have(tiny_snapshots: Path, steps: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_snapshots(str(tiny_snapshots), steps)


def test_a_release_by_name() -> None:
    assert parse_snapshots("crosslens-demo", None).steps[0] == 48  # those that its crosscoder was trained on
    assert parse_snapshots("crosslens-demo", "0,640").labels == ["step0", "step640"]
    assert parse_snapshots("crosslens-demo", "48,640").labels == ["step48", "step640"]


def test_revisions_of_a_repository() -> None:
    found = parse_snapshots("org/model@step0,step10", None)
    assert found.labels == ["step0", "step10"] and found[1].revision == "step10"


def test_any_models(tiny_snapshots: Path) -> None:
    spec = f"first={tiny_snapshots / 'step0'},last={tiny_snapshots / 'step20'},hub=org/model,old=org/model@step1"
    found = parse_snapshots(spec, None)
    assert found.labels == ["first", "last", "hub", "old"]
    assert [s.revision for s in found] == [None, None, "main", "step1"]
    assert parse_snapshots(spec, "first,last").labels == ["first", "last"]
    find_snapshots(spec, None, ["blocks.2.hook_resid_post"])
    with pytest.raises(UserError, match="hook_name='blocks.3.hook_resid_post' does not exist: the model has 3 blocks"):
        find_snapshots(spec, None, ["blocks.3.hook_resid_post"])


@pytest.mark.parametrize(
    "options",
    [
        SourceOptions(snapshots="a", hook=("blocks.0.hook_resid_post",), dataset="user/name"), TrainingOptions(),
        CrosscoderOptions(d_sae=8, k=2), ModelOptions(), config.SeedsOptions(), config.PlanOptions(),
        config.SweepOptions(d_sae=(8,), k=(2,)), config.EvolveOptions(), config.LabelOptions(local=True),
        config.AttributeOptions(task=("a",)), config.AblateOptions(task=("a",)), config.StudyOptions(task=("a",)),
        config.SteerOptions(feature=(1,), factor=1.0), config.ConnectOptions(lower=Path("a"), task=("a",)),
    ],
    ids=lambda options: type(options).__name__,
)  # fmt: skip
def test_numbers_that_nothing_has_are_refused(options: Any) -> None:
    numbers = {
        each.name: str(each.type) for each in dataclasses.fields(options) if re.search(r"\bint\b", str(each.type))
    }
    assert numbers
    for name, kind in numbers.items():
        several = "tuple" in kind
        for value in (10**30, -(10**30)):
            with pytest.raises(UserError, match=r"must be|seed") as caught:
                dataclasses.replace(options, **{name: (value,) if several else value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["sae", "neuronpedia"])
@pytest.mark.parametrize(
    "label",
    ["x/../../../X", "/X", "..\\X", "\x1b[2J", "\x1b]0;owned\x07", "\u202egnp.exe", "a\nb", "a\u2028b", "a" * 300],
)
def test_an_export_is_named_after_no_path_and_no_control_sequence(label: str, format: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "above" / "run")
    run.write_json({"source": {"snapshots": {"snapshots": [{"label": label}]}}})
    run.crosscoder.mkdir()
    (run.crosscoder / "cfg.json").write_text("{}")
    (run.crosscoder / "sae_weights.safetensors").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"without --to the export '.*(remove|at most 100)") as caught:
        parse(app, ["export", str(run.path), "--format", format])()
    assert str(caught.value).isprintable() and sorted(tmp_path.rglob("*")) == before
