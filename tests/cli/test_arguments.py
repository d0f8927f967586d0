"""Arguments of the command line: which are refused before anything heavy is imported, and what the others stand for."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from crosslens.activations import cache, tokens
from crosslens.causal import attribution
from crosslens.cli import arguments, training_options
from crosslens.cli.app import app
from crosslens.cli.help import SECTIONS, SectionedCommand
from crosslens.cli.training_options import TrainingOptions, check_training, parse_training
from crosslens.crosscoders import TRAINING_ARCHITECTURES
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig as BATCHTOPK
from crosslens.crosscoders import JumpReLUCrosscoderTrainingConfig as JUMPRELU
from crosslens.crosscoders import StandardCrosscoderTrainingConfig as STANDARD
from crosslens.crosscoders import TopKCrosscoderTrainingConfig as TOPK
from crosslens.distributed.devices import Precision
from crosslens.errors import UserError
from crosslens.pipeline.opening import find_snapshots, parse_snapshots
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
    (["harvest", *DATA, "--attention", "spda", "--cache", "{files}/c"], "did you mean 'sdpa'"),
    (["plan", *DATA, "--attention", "sdpa", "--backend", "hooked_transformer"], "sdpa needs --backend bridge"),
    (["plan", *DATA, "--hook", "blocks.1.mlp.hook_in", "--backend", "hooked_transformer"], "name of TransformerBridge"),
    (["plan", *DATA, "--model-dtype", "float64"], "use one of float32, bfloat16, float16"),
    (["plan", *DATA, "--drop-positions", "-1"], "--drop-positions -1 must be at least 0"),
    ([*TRAIN, "--hook", "blocks.1.hook_mlp_out"], "--hook is given 2 times: a crosscoder reads one hook point"),
    (["harvest", *DATA, "--cache", "{files}/text.txt/c"], "text.txt is a file"),
    (["harvest", *DATA], "Missing option '--cache'"),
    ([*TRAIN, "--cache", "{files}/c", "--cache-dtype", "int7"], "int7.*did you mean 'int8'"),
    ([*TRAIN, "--dataset", "{files}/none.txt"], "none.txt does not exist"),
    ([*TRAIN, "--dataset", "{files}/task.ini"], "unsupported file type: use .txt"),
    ([*TRAIN, "--dataset", "{files}"], "is not a regular file"),
    ([*TRAIN, "--sample-by", "page"], "use one of line, paragraph"),
    ([*TRAIN, "--architecture", "topkk"], "did you mean 'topk'"),
    ([*TRAIN, "--backend", "nnsight"], "use one of bridge, hooked_transformer"),
    ([*TRAIN, "--k", "64"], "--k 64 must be at most --d-sae 32"),
    ([*TRAIN, "--d-sae", "0"], "--d-sae 0 must be between 1 and 16,777,216"),
    ([*TRAIN, "--d-sae", "many"], "Invalid value for '--d-sae'"),
    ([*TRAIN, "--lr", "nan"], "--lr nan must be a finite number above 0"),
    ([*TRAIN, "--n-tokens", "100"], "--batch-size 128 must be at most --n-tokens 100"),
    ([*TRAIN, "--training-tokens", "99"], "training_tokens=99 is less than one batch"),
    ([*TRAIN, "--context-size", "1"], "--context-size 1 must be at least 2"),
    ([*TRAIN, "--seed", "4294967296"], "must be between 0 and 4,294,967,295"),
    ([*TRAIN, "--data-parallel", "2"], "--data-parallel 2 does not divide the 1 process of this run"),
    ([*TRAIN, "--device", "tpu"], "--device 'tpu' is unknown"),
    ([*TRAIN, "--run-dir", "{files}/text.txt"], "text.txt is a file"),
    ([*TRAIN, "--run-dir", "{files}"], "contains files but is not a run directory"),
    ([*TRAIN, "--run-dir", "{files}/run", "--lr", "0.5"], "training.lr=0.1, this run has training.lr=0.5"),
    ([*TRAIN, "--run-dir", "{files}/run", "--scale", "std"], "scale=norm, this run has architecture.scale=std"),
    ([*EVOLUTION, "--run-dir", "{files}/run"], "training.lr=0.1, this run has training.lr=5e-05"),
    (BARE, "--d-sae is missing: give the number of features, or a --recipe"),
    (SMALL, "--k 64 must be at most --d-sae 32"),
    ([*SMALL, "--recipe", "evolution"], "--recipe 'evolution' is unknown.*did you mean 'evolution_of_concepts'"),
    ([*EVOLUTION, "--architecture", "topk"], "'topk' contradicts --recipe evolution_of_concepts, which is 'jumprelu'"),
    ([*EVOLUTION, "--k", "4"], r"--k 4 is no setting of 'jumprelu' crosscoders \(--recipe .*\): leave it out\n"),
    ([*EVOLUTION, "--lr-decay", "0.95"], "lr_warm_up=0.1 and lr_decay=0.95 are fractions"),
    ([*EVOLUTION, "--training-tokens", "99"], "training_tokens=99 is less than one batch"),
    ([*TRAIN, "--sparsity", "0.3"], "--sparsity 0.3 is no setting of 'batchtopk'.*or use --architecture jumprelu"),
    ([*TRAIN, "--sparsity-warm-up", "0.3"], "--sparsity-warm-up 0.3 is no setting of 'batchtopk'"),
    ([*TRAIN, "--l1", "2"], "--l1 2.0 is no setting of 'batchtopk'.*or use --architecture standard"),
    ([*SMALL, "--architecture", "jumprelu", "--l1-warm-up", "9"], "--l1-warm-up 9.0 is no setting of 'jumprelu'"),
    (
        [*SMALL, "--architecture", "standard", "--aux", "1"],
        "--aux 1.0 .*--architecture topk or batchtopk",
    ),
    ([*SMALL, "--architecture", "jumprelu", "--sparsity", "-1"], "--sparsity -1.0 must be a finite number, 0 or above"),
    ([*SMALL, "--architecture", "standard", "--l1", "nan"], "--l1 nan must be a finite number, 0 or above"),
    ([*TRAIN, "--aux", "inf"], "--aux inf must be a finite number"),
    ([*TRAIN, "--k-start", "8"], "--k-start 8.0 needs --k-anneal"),
    ([*TRAIN, "--k-anneal", "0.5"], "--k-anneal 0.5 needs --k-start"),
    ([*TRAIN, "--k-start", "64", "--k-anneal", "0.5"], "--k-start 64.0 must be at most --d-sae 32"),
    ([*TRAIN, "--k-start", "0", "--k-anneal", "0.5"], "--k-start 0.0 must be a finite number above 0"),
    ([*TRAIN, "--k-start", "8", "--k-anneal", "1"], "--k-anneal 1 must be a fraction of the steps below 1, or"),
    ([*TRAIN, "--lr-warm-up", "2.5"], "--lr-warm-up 2.5 must be a fraction of the steps below 1, or a number of steps"),
    ([*TRAIN, "--lr-warm-up", "nan"], "--lr-warm-up nan must be a fraction"),
    ([*TRAIN, "--lr-warm-up", "-0.1"], "--lr-warm-up -0.1 must be a fraction"),
    ([*TRAIN, "--lr-warm-up", "0.9"], "lr_warm_up=0.9 and lr_decay=0.2 are fractions .* at most 1 together"),
    ([*TRAIN, "--lr-warm-up", "11", "--training-tokens", "1280"], r"lr_warm_up_steps=11 is not in \[0, 8\]"),
    ([*TRAIN, "--lr-decay", "1.5"], "--lr-decay 1.5 must be a fraction of the steps, between 0 and 1"),
    ([*TRAIN, "--dead-tokens", "0"], "--dead-tokens 0 must be at least 1"),
    ([*TRAIN, "--precision", "fp16"], "use one of float32, tf32, bfloat16"),
    ([*TRAIN, "--precision", "tf32", "--device", "cpu"], "precision='tf32' needs a CUDA device"),
    ([*TRAIN, "--adam-moments", "fp8"], "--adam-moments 'fp8' is unknown: use one of float32, bfloat16"),
    ([*TRAIN, "--scale", "rms"], "--scale 'rms' is unknown: use one of std, norm"),
    ([*TRAIN, "--split", "test"], "--split 'test' is for datasets on the hub, and .*text.txt is a file: leave it out"),
    (["harvest", *DATA, "--cache", "{files}/c", "--split", "test"], "--split 'test' is for datasets on the hub"),
    (["plan", *DATA, "--split", "test"], "--split 'test' is for datasets on the hub"),
    (["plan", *DATA, "--recipe", "evolution_of_concepts", "--k", "4"], "--k 4 is no setting of 'jumprelu'"),
    ([*TRAIN, "--seeds", "0"], "--seeds 0 must be at least 1"),
    (["sweep", *DATA, "--run-dir", "{files}/new", "--d-sae", "8,x", "--k", "2"], "--d-sae '8,x' must be whole numbers"),
    (["sweep", *DATA, "--run-dir", "{files}/new", "--d-sae", "8", "--k", "16"], "--k 16 must be at most --d-sae 8"),
    (["sweep", *DATA, "--run-dir", "{files}/new", "--d-sae", "8", "--k", "2", "--seeds", "1"], "must be at least 2"),
    (["attribute", RUN, "--task", "demo:simple", "--consensus"], "has no consensus of several seeds"),
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
    (["attribute", RUN, "--task", "demo:simple", "--method", "igg"], "did you mean 'ig'"),
    (["attribute", RUN, "--task", "demo:simple", "--baseline", "median"], "use one of zero, mean, patch"),
    (["ablate", RUN, "--task", "demo:simple", "--k", "1,x"], "'1,x' must be whole numbers"),
    (["label", RUN, "--client", "openai", "--model", "m"], "has no examples of features"),
    (["label", "{files}/labelled", "--client", "opnai", "--model", "m"], "did you mean 'openai'"),
    (["label", "{files}/labelled", "--client", "openai", "--model", "m", "--prices", "3"], "must be two numbers"),
    (["report", "{files}/nowhere"], "is not a run directory"),
    (["push", "{files}", "me/repository"], "holds no crosscoder"),
    (["push", RUN, "repository"], "'repository' is not a repository name"),
    (["push", RUN, "me/repository", "--id", "../a"], "--id '../a' is not a path inside a repository"),
    (["status", "{files}"], "is not a run directory"),
    (["status", "{files}/damaged"], "is not valid JSON"),
    (["export", RUN, "--format", "sea"], "--format 'sea' is unknown: use one of sae, json, neuronpedia; did you mean"),
    (["export", RUN, "--format", "sae", "--snapshot", "step1"], "--snapshot 'step1' is unknown: use one of step0"),
    (["export", RUN, "--format", "json", "--snapshot", "step0"], "which holds all snapshots: leave it out"),
    (["export", RUN, "--format", "sae", "--to", "{files}/text.txt/a"], "text.txt is a file"),
    (["diff", RUN, "{files}"], "is not a run directory"),
    (["diff", RUN, "{files}/untrained"], "has no trained crosscoder"),
    (["train", "--config", "{files}/run.toml"], "run.toml cannot be read"),
    (["train", "--config", "{files}/untrained/run.json"], "records no options of `crosslens train`"),
    (["demo", "--out", RUN, "--seed", "1"], "it has seed=0, this run has seed=1"),
    (["trian"], "No such command 'trian'"),
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
        assert told.startswith("Usage: ") or told.count("\n") == 1, told
    assert sorted(files.rglob("*")) == before


def test_help_lists_every_option_once_under_a_heading() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    sectioned = {name: each for name, each in commands.items() if isinstance(each, SectionedCommand)}
    assert {"plan", "harvest", "train", "sweep"} == set(sectioned)
    known = [name for names in SECTIONS.values() for name in names]
    assert len(known) == len(set(known)) and set(known) == {p.name for c in sectioned.values() for p in c.params}
    told = CliRunner().invoke(app, ["train", "--help"]).stdout
    headings = [told.index(f"\n{title}:\n") for title in SECTIONS]
    assert headings == sorted(headings)
    for parameter in sectioned["train"].params:
        assert len(re.findall(rf"^  {parameter.opts[0]}(?![-\w,])", told, re.M)) == 1, parameter.name
    assert told.index("\n  --d-sae") < told.index("\n  --k ") < told.index("\n  --k-start")


def test_choices_are_those_of_the_library() -> None:
    assert {f"{name}_crosscoder" for name in arguments.ARCHITECTURES} == {*TRAINING_ARCHITECTURES}
    assert {*arguments.CACHE_DTYPES} == {*cache.DTYPES}
    assert arguments.METHODS == attribution.METHODS
    assert arguments.RULES == attribution.RULES
    assert arguments.BASELINES == attribution.BASELINES
    assert {*arguments.TEXT_FILES} == {*tokens._BUILDERS}
    assert get_args(Precision) == arguments.PRECISIONS
    for moments in arguments.MOMENTS:
        assert TrainConfig(device="cpu", adam_moments=moments).adam_moments == moments  # type: ignore[arg-type]
    for scale in arguments.SCALES:
        assert STANDARD(d_sae=1, scale=scale).scale == scale
    options = typer.main.get_command(app).commands["train"].params  # type: ignore[attr-defined]
    told = {option.opts[0]: option.help for option in options}
    settings, sparse = TrainConfig(device="cpu"), BATCHTOPK(d_sae=64)
    assert sparse.k == training_options.DEFAULT_K
    for option, default in (
        ("--k", sparse.k),
        ("--aux", sparse.aux_loss_coefficient),
        ("--sparsity", JUMPRELU(d_sae=1).sparsity_coefficient),
        ("--l1", STANDARD(d_sae=1).l1_coefficient),
        ("--batch-size", settings.batch_size),
        ("--lr", settings.lr),
        ("--lr-decay", settings.lr_decay),
        ("--dead-tokens", settings.dead_tokens),
    ):
        assert re.search(rf"Default: (\S+ = )?{default:g}[.;]|Default: {default}[.;]", told[option]), option
    assert f"Default: {training_options.DEFAULT_ARCHITECTURE}." in told["--architecture"]


N_TOKENS = 2570  # not whole batches: 10 steps of 256
SETTINGS = [
    ({"d_sae": 64}, BATCHTOPK(d_sae=64), {}),
    ({"d_sae": 9, "architecture": "topk", "k": 4, "aux": 0.0}, TOPK(d_sae=9, k=4, aux_loss_coefficient=0.0), {}),
    (
        {"d_sae": 9, "k": 4, "k_start": 8.0, "k_anneal": 0.25, "batch_size": 256, "lr_warm_up": 3.0},
        BATCHTOPK(d_sae=9, k=4, k_start=8.0, k_anneal_steps=2),
        {"batch_size": 256, "lr_warm_up_steps": 3},
    ),
    (
        {"d_sae": 9, "architecture": "standard", "l1": 0.4, "l1_warm_up": 3.0, "scale": "norm", "batch_size": 256},
        STANDARD(d_sae=9, l1_coefficient=0.4, l1_warm_up_steps=3, scale="norm"),
        {"batch_size": 256},
    ),
    (
        {"d_sae": 9, "architecture": "jumprelu", "sparsity": 0.1, "sparsity_warm_up": 0.5, "training_tokens": 40960},
        JUMPRELU(d_sae=9, sparsity_coefficient=0.1, sparsity_warm_up_steps=5),
        {"training_tokens": 40960},
    ),
    (
        {"d_sae": 64, "lr": 0.01, "lr_warm_up": 0.1, "lr_decay": 0.5, "dead_tokens": 7, "adam_moments": "bfloat16"},
        BATCHTOPK(d_sae=64),
        {"lr": 0.01, "lr_warm_up": 0.1, "lr_decay": 0.5, "dead_tokens": 7, "adam_moments": "bfloat16"},
    ),
]


@pytest.mark.parametrize(("given", "architecture", "changed"), SETTINGS)
def test_options_become_settings(given: dict[str, Any], architecture: Any, changed: dict[str, Any]) -> None:
    options = TrainingOptions(**given, others={"seed": 3})
    check_training(options, "cpu")
    assert parse_training(options, "cpu", N_TOKENS) == (
        architecture,
        TrainConfig(**{"seed": 3, "device": "cpu", **changed}),
    )


@pytest.mark.parametrize("recipe", training_options.recipes.ARCHITECTURES)
def test_a_recipe_and_options_that_override_it(recipe: str) -> None:
    made: Any = getattr(training_options.recipes, recipe)
    assert made(device="cpu")[0].architecture() == f"{training_options.recipes.ARCHITECTURES[recipe]}_crosscoder"
    options = TrainingOptions(recipe=recipe)
    check_training(options, "cpu")
    assert parse_training(options, "cpu", N_TOKENS) == made(device="cpu")
    small: dict[str, Any] = {"training_tokens": 25_600, "batch_size": 256, "lr": 0.01}
    options = TrainingOptions(recipe=recipe, d_sae=9, scale="std", **small)
    architecture, config = made(d_sae=9, device="cpu", **small)
    found = parse_training(options, "cpu", N_TOKENS)
    assert found == (dataclasses.replace(architecture, scale="std"), config)
    option, coefficient = ("sparsity", "sparsity_coefficient") if "evo" in recipe else ("l1", "l1_coefficient")
    changed, _ = parse_training(TrainingOptions(recipe=recipe, **{option: 0.5}), "cpu", N_TOKENS)
    assert changed == dataclasses.replace(made(device="cpu")[0], **{coefficient: 0.5})


def test_more_warmup_than_steps() -> None:
    options = TrainingOptions(d_sae=9, k=4, k_start=8.0, k_anneal=11.0, batch_size=256)
    check_training(options, "cpu")  # the number of steps is not known yet
    with pytest.raises(UserError, match="--k-anneal 11 exceeds the 10 steps of this run"):
        parse_training(options, "cpu", N_TOKENS)


def test_the_docs_explain_every_setting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`--.*?) \|", page, re.M)
    explained = {option for row in rows for option in re.findall(r"`(--[\w-]+)`", row)}
    fields = {each.name for each in dataclasses.fields(TrainingOptions)} - {"others"}
    assert explained == {f"--{name.replace('_', '-')}" for name in fields}


def test_a_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "GPU_FILES", ())
    with pytest.raises(UserError, match="'cuda' needs CUDA, which is not available"):
        arguments.check_device("--device", "cuda")
    monkeypatch.setattr(arguments, "GPU_FILES", ("/",))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert arguments.check_device("--device", None) is None and arguments.check_device("--device", "cpu") == "cpu"
    with pytest.raises(UserError, match="'cuda' needs CUDA, which is not available"):
        arguments.check_device("--device", "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert arguments.check_device("--device", "cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="'cuda:2' does not exist: there are 2 GPUs"):
        arguments.check_device("--device", "cuda:2")


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
