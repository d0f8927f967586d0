"""Arguments of the command line: which are refused before anything heavy is imported, and what the others stand for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from crosslens.activations import cache, tokens
from crosslens.causal import attribution
from crosslens.cli import arguments
from crosslens.cli.arguments import parse_snapshots
from crosslens.crosscoders import TRAINING_ARCHITECTURES
from crosslens.errors import UserError
from crosslens.tasks import corpora

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
TRAIN = ["train", *DATA, "--run-dir", "{files}/new", "--d-sae", "32", "--k", "4", "--batch-size", "128"]
RUN = "{files}/run"
WRONG = [
    (["ls", "pythia-15m"], "pythia has no size '15m'.*did you mean"),
    (["ls", "nowhere"], "is neither a folder nor a known model"),
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
    (["evolve", "{files}"], "is not a run directory"),
    (["evolve", "{files}/untrained"], "has no trained crosscoder"),
    (["evolve", "{files}/unrecorded"], "does not record where its activations came from"),
    (["evolve", "{files}/damaged"], "is not valid JSON"),
    (["attribute", RUN, "--task", "demo:simpel"], "did you mean 'simple'"),
    (["attribute", RUN, "--task", "{files}/none.json"], "there is no file '.*none.json'"),
    (["attribute", RUN, "--task", "sva:{files}/none.json"], "there is no file '.*none.json'"),
    (["attribute", RUN, "--task", "clams:fr"], "there is no file 'fr'"),
    (["attribute", RUN, "--task", "multiblimp:French"], "does not name a paradigm or language"),
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
    (["demo", "--out", RUN, "--seed", "1"], "it has seed=0, this run has seed=1"),
    (["trian"], "No such command 'trian'"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets and run directories, right and wrong."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("text.txt", "task.ini"):
        (folder / name).write_text("a b c\n")
    recorded = {"source": {"seed": 0}, "demo": {"seed": 0}, "identity": {"training": {"lr": 0.1}}}
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


def test_choices_are_those_of_the_library() -> None:
    assert {f"{name}_crosscoder" for name in arguments.ARCHITECTURES} == {*TRAINING_ARCHITECTURES}
    assert {*arguments.CACHE_DTYPES} == {*cache.DTYPES}
    assert arguments.METHODS == attribution.METHODS
    assert arguments.RULES == attribution.RULES
    assert arguments.BASELINES == attribution.BASELINES
    assert {*arguments.TEXT_FILES} == {*tokens._BUILDERS}
    assert {*arguments.TASK_FILES} == {*corpora.FILES}


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
    assert len(parse_snapshots("crosslens-demo", None)) == 10
    assert parse_snapshots("crosslens-demo", "48,640").labels == ["step48", "step640"]


def test_revisions_of_a_repository() -> None:
    found = parse_snapshots("org/model@step0,step10", None)
    assert found.labels == ["step0", "step10"] and found[1].revision == "step10"
