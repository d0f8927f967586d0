"""Faults of another kind: what is around an analysis is hostile, stale or lost, and nothing may be silently wrong.

`faults.py` breaks files at random moments, `mutations.py` their contents. Here every case changes one thing that a
command finds, and runs one command on it:

    links          a part of the run, or of a cache, is a link to a folder of somebody else
    changed        config, tokenizer, text, tasks or weights changed since the command before
    code           models, tokenizers and datasets bring code, and the terminal answers yes
    sizes          numbers that no model has
    words          names that transformers does not know, and values of other types
    options        a finished or an interrupted training is continued with another option
    names          files, folders, labels and tasks whose names are patterns, paths or control sequences
    environment    variables of launchers, W&B, terminals and locales
    signals        SIGINT, SIGTERM, SIGHUP, or a reader that goes away
    stray          files of others in every folder
    lost           inputs are gone
    permissions    folders that may only be read
    crosscoders    crosscoders with wrong numbers, and no checksums
    beside         two commands at once

Afterwards:

    same        status 0, and the results are those of the undisturbed analysis (also after repeating what was stopped)
    recorded    status 0, other results, and the tables, the run or the cache name what differs
    told        one line, and a status of 2, 3 or 4
    refused     what needs nothing that is hostile was refused
    silent      status 0, and other results
    raw         a traceback, several lines of error, "failed unexpectedly", or a control sequence on the terminal
    hang        it did not end within two minutes
    outside     something that is not the command's own was written or deleted, or foreign code ran

    python benchmarks/hostile.py [--quick] [--classes links,names] [--part 1/4] [--matrix] [--report]

`--quick` runs three cases of every class. `--matrix` prints what becomes of a change between every two commands. Run
with another version's package on PYTHONPATH, the same program says which classes that version does not survive.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # before they are imported

import measure
import torch
from faults import DATA, MODEL, PACKAGES, SECONDS, Ended, Started, results, wait

import crosslens as cl
from crosslens.cli.app import main as command_line
from crosslens.rundir import RunDir
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import pretrain_demo

OUTCOMES = ("same", "recorded", "told", "refused", "silent", "raw", "hang", "outside")
GOOD = ("same", "recorded", "told")
READING = ("status", "export", "diff")
"""Commands that only read a run."""
TASK = "--task task.jsonl"
COMMANDS = {
    "harvest": f"harvest {DATA} --cache cache",
    "train": (
        f"train {DATA} --cache cache --run-dir run --d-sae 24 --k 4 --training-tokens 4000 --batch-size 100 --lr 0.003 "
        "--dead-tokens 500 --n-checkpoints 8"
    ),
    "evolve": "evolve run",
    "attribute": f"attribute run {TASK}",
    "ablate": f"ablate run {TASK} --k 1,4",
    "study": f"study run {TASK} --ablate-k 1,4 --keep-k 0,4 --k 3 --n-draws 1 --n-draws-last 2 --n-exact 4 "
    "--n-validated 3 --n-bootstrap 5 --n-pairs 3",
    "label": "label run --local",
    "trace": "trace run --file prompts.txt",
    "report": "report run",
    "steer": "steer run farmers --feature 3 --factor 3 --length 4 --temperature 2 --loss-tokens 64",
    "export": "export run --format sae --to out/sae",
    "status": "status run",
    "diff": "diff run run",
    "plan": f"plan {DATA} --d-sae 24 --k 4 --batch-size 100",
    "remove": "remove run --task task",
    "ls": "ls models",
}
COMMANDS["lower"] = (
    COMMANDS["train"].replace("resid_post", "resid_pre").replace("--cache cache --run-dir run", "--run-dir lower")
)
COMMANDS["connect"] = f"connect run --lower lower {TASK} --n-edges 3"
LIVE = COMMANDS["live"] = COMMANDS["train"].replace("--cache cache ", "")
STAGES = (
    "harvest", "live", "train", "evolve", "attribute", "ablate", "study", "label", "trace", "steer", "lower", "connect",
    "report",
)  # fmt: skip
"""In this order, but that a live training leaves nothing to the others; those that are not here need all of them, and
leave nothing that is compared. `lower` is a training at an earlier hook point."""
AFTER = {"export": "report", "status": "report", "diff": "report", "remove": "report"}
_CAPSET = 126  # of x86-64
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Prepare = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One hostile situation."""

    kind: str
    name: str
    stage: str
    """Which command runs; it finds what those before it have left."""
    prepare: Prepare = lambda _: None
    more: str = ""
    """Options after those of the command."""
    command: tuple[str, ...] | None = None
    """Instead of the command of the stage."""
    environment: dict[str, str] = field(default_factory=dict)
    state: str | None = None
    """The state it runs on, if it is not what the stage starts from."""
    stop: str = ""
    """A signal, at a random moment; the command is repeated afterwards."""
    beside: tuple[str, ...] | None = None
    """A command that runs at the same time."""
    read_only: bool = False
    """Nothing but the folder out may be written."""
    own: str = ""
    """A folder that the command is to write, besides those that all write."""
    works: bool = False
    """Only success is right, because nothing that the command needs is missing."""
    told: bool = False
    """Only a refusal is right, because what is asked for is not what there was."""


# ---------------------------------------------------------------------- running commands
def start(
    command: tuple[str, ...], folder: Path, environment: dict[str, str] | None = None, read_only: bool = False
) -> Started:
    """Start a command in a fork, with a terminal that says yes to everything."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    process = os.fork()
    if process:
        os.close(writer)
        return Started(process, reader)
    status = 1
    try:  # nothing may return to what the parent does next
        os.setsid()
        yes = os.memfd_create("yes")
        os.write(yes, b"y\n" * 1000)
        os.lseek(yes, 0, os.SEEK_SET)
        os.dup2(yes, 0)
        sys.stdin = os.fdopen(0)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.chdir(folder)
        os.environ.update(environment or {})
        if read_only:  # root may write everywhere, unless it gives its capabilities up
            ctypes.CDLL(None).syscall(_CAPSET, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        sys.argv = ["crosslens", *command]
        command_line()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def is_raw(ended: Ended) -> bool:
    """Whether a user would see more than a line of error, or a terminal more than text."""
    lines = [line for line in ended.said.splitlines() if line.startswith("crosslens: ")]
    control = _CONTROL.search(ended.said.replace("\r", ""))
    unexpected = "Traceback" in ended.said or "failed unexpectedly" in ended.said
    said = len(lines) == 1 or "Error: No such" in ended.said  # of an earlier version
    return unexpected or control is not None or (ended.status not in (0, 1, 130) and not said)


def shows_control(report: Path) -> bool:
    """Whether a page has characters that would move a cursor, or change the direction of writing."""
    return any(_CONTROL.search(path.read_text().replace("\r", "")) for path in report.glob("*.html") if path.is_file())


def digest(folder: Path, own: tuple[str, ...] = ()) -> dict[str, str]:
    """Names and contents of everything in a folder, but for what belongs to the command."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in own or path.name.endswith(".lock"):
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[name] = "folder"
    return found


def recorded(folder: Path, stage: str) -> dict[str, Any]:
    """What the results of a stage say that they were made with, by table; all others under an empty name."""
    if stage == "harvest":
        return {"": json.loads((folder / "cache" / "manifest.json").read_text())}
    run = RunDir(folder / "run")
    made_with = getattr(run, "made_with", lambda _: {})
    return {"": run.read_json().get("identity"), **{name: made_with(name) for name in run.table_names()}}


def outcome(case: Case, states: Path, expected: dict[str, dict[str, str]], rng: random.Random) -> tuple[str, str]:
    """Run a case; its outcome, and what was said."""
    place = states / "case"  # always the same: runs record absolute paths
    shutil.rmtree(place, ignore_errors=True)
    folder = place / "work"
    shutil.copytree(states / (case.state or AFTER.get(case.stage, case.stage)), folder, symlinks=True)
    victim = place / "outside"
    (victim / "tokens-5").mkdir(parents=True)
    (victim / "assets").mkdir()
    for name in ("index.html", "cfg.json", "tokens-5/state.json", "precious.txt", "task.parquet", "sae_weights"):
        (victim / name).write_text("precious")
    before_all = recorded(states / f"after {case.stage}", case.stage) if case.stage in STAGES else {}
    case.prepare(folder)
    if case.read_only:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        (folder / "out").chmod(0o777)
    own = ("run", "cache", "out", case.own)
    before = digest(victim), digest(folder, own)
    command = case.command or (*COMMANDS[case.stage].split(), *case.more.split())
    ended = _run(case, command, folder, rng)
    if digest(victim) != before[0] or digest(folder, own) != before[1]:
        return "outside", ended.said
    if ended.status is None:
        return "hang", ended.said
    if case.stop or case.beside:
        if is_raw(ended) and ended.status != -signal.SIGKILL:
            return "raw", ended.said
        ended = wait(start(command, folder))
        if ended.status:
            return ("raw" if is_raw(ended) else "silent" if not case.beside else "told"), ended.said
    if is_raw(ended) or (ended.status or 0) < 0 or shows_control(folder / "run" / "report"):
        return "raw", ended.said
    if ended.status:
        return ("refused" if case.works else "told"), ended.said
    if case.stage not in STAGES:
        return ("silent" if case.told else "same"), ended.said
    found = results(_stage(case.stage), folder)
    if expected[case.stage].items() <= found.items():  # later commands may have left more
        return ("silent" if case.told else "same"), ended.said
    differ = [name for name, value in expected[case.stage].items() if found.get(name) != value]
    now = recorded(folder, case.stage)
    named = all(now.get(name, now[""]) != before_all.get(name, before_all[""]) for name in differ if name in found)
    return "recorded" if named and differ == [name for name in differ if name in found] else "silent", ended.said


def _stage(stage: str) -> str:
    return {"harvest": "harvest", "live": "train", "train": "train", "report": "report"}.get(stage, "tables")


def _run(case: Case, command: tuple[str, ...], folder: Path, rng: random.Random) -> Ended:
    if case.beside:
        first, second = start(command, folder), start(case.beside, folder)
        both = [wait(first), wait(second)]
        return next((each for each in both if each.status is None or is_raw(each)), both[0])
    started = start(command, folder, case.environment, case.read_only)
    if case.stop == "reader":
        os.close(started.pipe)
        return wait(Started(started.process, os.open(os.devnull, os.O_RDONLY)))
    if case.stop:
        time.sleep(rng.uniform(0, 2))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process, getattr(signal, case.stop))
        ended = wait(started)
        # a process that a signal ends says nothing, which is right
        return Ended(0, ended.said) if ended.status is not None and ended.status < 0 else ended
    return wait(started, SECONDS)


# ---------------------------------------------------------------------- changes
def config(change: Callable[[dict[str, Any]], Any], which: str = "*") -> Prepare:
    """Change the config.json of models."""

    def prepare(folder: Path) -> None:
        for path in (folder / "models").glob(f"{which}/config.json"):
            contents = json.loads(path.read_text())
            change(contents)
            path.write_text(json.dumps(contents))

    return prepare


def entry(name: str, value: Any, which: str = "*") -> Prepare:
    return config(lambda contents: contents.update({name: value}), which)


def rotary(contents: dict[str, Any]) -> None:
    contents["rotary_pct"] = 1.0
    if isinstance(contents.get("rope_parameters"), dict):
        contents["rope_parameters"] |= {"partial_rotary_factor": 1.0, "rope_theta": 77.0}


def tokenizer(folder: Path) -> None:
    """Exchange two words."""
    for path in (folder / "models").rglob("tokenizer.json"):
        contents = json.loads(path.read_text())
        vocabulary = contents["model"]["vocab"]
        one, other = [word for word in vocabulary if word.isalpha()][5:7]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(contents))


def text(folder: Path) -> None:
    lines = (folder / "text.txt").read_text().splitlines()
    (folder / "text.txt").write_text("\n".join(reversed(lines)))


def task(folder: Path) -> None:
    lines = (folder / "task.jsonl").read_text().splitlines()
    (folder / "task.jsonl").write_text("\n".join(lines[:-3]))


def weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = sorted((folder / "models").glob("*/model.safetensors"))[-1]
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, path, {"format": "pt"})


def crosscoder(change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """Change the config of the crosscoder, without checksums."""

    def prepare(folder: Path) -> None:
        path = folder / "run" / "crosscoder" / "cfg.json"
        contents = json.loads(path.read_text())
        contents["metadata"].pop("checksums", None)
        change(contents)
        path.write_text(json.dumps(contents))

    return prepare


def run_json(change: dict[str, Any]) -> Prepare:
    """Change entries of run.json, with a checksum that is right."""

    def prepare(folder: Path) -> None:
        run = RunDir(folder / "run")
        run.write_json({**run.read_json(), **change})

    return prepare


def items(prefix: str) -> Prepare:
    """Change the first item of the tasks."""

    def prepare(folder: Path) -> None:
        first, *others = (folder / "task.jsonl").read_text().splitlines()
        first = json.dumps({**json.loads(first), "prefix": prefix})
        (folder / "task.jsonl").write_text("\n".join([first, *others]))

    return prepare


def broken_weights(value: float) -> Prepare:
    def prepare(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        crosscoder(lambda _: None)(folder)
        path = folder / "run" / "crosscoder" / "sae_weights.safetensors"
        tensors = load_file(path)
        tensors["W_dec"][0, 0] = value
        save_file(tensors, path, {"format": "pt"})

    return prepare


def link(part: str, target: str = "../outside") -> Prepare:
    """Put a link where a part of the run is."""

    def prepare(folder: Path) -> None:
        path = folder / part
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(folder / target, path.parent))

    return prepare


def lose(*parts: str) -> Prepare:
    def prepare(folder: Path) -> None:
        for part in parts:
            for path in list(folder.glob(part)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def stray(part: str, name: str) -> Prepare:
    """A file or folder (with a slash) of somebody else."""

    def prepare(folder: Path) -> None:
        place = folder / part
        place.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (place / name).mkdir()
            (place / name / "notes").write_text("precious")
        else:
            (place / name).write_text("precious")

    return prepare


def code(what: str) -> Prepare:
    """Code that would write into the folder, in the way that transformers and datasets find it."""

    def prepare(folder: Path) -> None:
        mark = f"open({str(folder / 'ran')!r}, 'w').write('code')\n"
        for place in (path.parent for path in list((folder / "models").glob("*/config.json"))):
            (place / "evil.py").write_text(
                mark + "from transformers import *\nclass Evil(GPTNeoXConfig): pass\n"
                "class EvilModel(GPTNeoXForCausalLM): pass\nclass EvilTokenizer(PreTrainedTokenizerFast): pass\n"
            )
            contents = json.loads((place / "config.json").read_text())
            if what in ("config", "model type"):
                contents["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.EvilModel"}
            if what == "model type":
                contents["model_type"] = "evil"
            if what == "model":
                contents["auto_map"] = {"AutoModelForCausalLM": "evil.EvilModel"}
            (place / "config.json").write_text(json.dumps(contents))
            if what == "pickle":
                import pickle

                class Run:
                    def __reduce__(self) -> Any:
                        return exec, (mark,)

                (place / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Run()}))
                (place / "model.safetensors").unlink()
        for path in (folder / "models").rglob("tokenizer_config.json") if what.startswith("tokenizer") else ():
            (path.parent / "evil.py").write_text(
                mark + "from transformers import *\nclass EvilTokenizer(PreTrainedTokenizerFast): pass\n"
            )
            contents = json.loads(path.read_text())
            contents |= {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
            if what == "tokenizer class":
                contents |= {"tokenizer_class": "EvilTokenizer"}
            path.write_text(json.dumps(contents))
        if what == "dataset":
            (folder / "text").mkdir()
            (folder / "text" / "text.py").write_text(mark)
            (folder / "text" / "data.txt").write_text("the cat\n" * 999)

    return prepare


def every(*steps: Prepare) -> Prepare:
    def prepare(folder: Path) -> None:
        for step in steps:
            step(folder)

    return prepare


CHANGES: dict[str, Prepare] = {
    "heads": entry("num_attention_heads", 4),
    "activation": entry("hidden_act", "relu"),
    "eps": entry("layer_norm_eps", 0.2),
    "residual": config(lambda c: c.update(use_parallel_residual=not c.get("use_parallel_residual", True))),
    "rope": config(rotary),
    "tokenizer": tokenizer,
    "text": text,
    "task": task,
    "weights": weights,
    "dtype in config": entry("torch_dtype", "bfloat16"),
    "attention in config": entry("_attn_implementation", "sdpa"),
}
_ALL = (
    "harvest", "train", "evolve", "attribute", "ablate", "study", "label", "trace", "connect", "report", "export",
    "steer",
)  # fmt: skip
READS = {  # which command finds what
    **dict.fromkeys(CHANGES, _ALL), "text": _ALL,
    "task": ("attribute", "ablate", "study", "label", "connect", "report"),
}  # fmt: skip
PAIRS = (  # what was made before, by which the changed input is found
    ("harvest", "harvest", "train"), ("harvest", "train", "evolve"), ("train", "train", "evolve"),
    ("train", "evolve", "evolve"), ("train", "attribute", "attribute"), ("evolve", "evolve", "attribute"),
    ("evolve", "attribute", "attribute"), ("attribute", "attribute", "ablate"), ("attribute", "ablate", "ablate"),
    ("attribute", "study", "ablate"), ("ablate", "ablate", "study"), ("ablate", "study", "study"),
    ("study", "study", "label"), ("evolve", "label", "report"), ("label", "label", "trace"),
    ("study", "trace", "trace"), ("trace", "trace", "steer"), ("trace", "steer", "steer"),
    ("steer", "steer", "lower"), ("lower", "connect", "connect"),
    ("connect", "connect", "report"), ("connect", "report", "report"), ("report", "report", "after report"),
    ("report", "export", "after report"),
)  # fmt: skip
"""After which command, before which command, and the state that the second runs on."""
SETTINGS = {
    "dtype": {"harvest": "--model-dtype bfloat16", "train": "--model-dtype bfloat16"},
    "attention": {"harvest": "--attention sdpa", "train": "--attention sdpa"},
    "seed": {
        "harvest": "--seed 3", "train": "--seed 3", "evolve": "--seed 3", "attribute": "--seed 3",
        "ablate": "--seed 3", "study": "--seed 3", "label": "--seed 3", "steer": "--seed 3",
    },
}  # fmt: skip
OPTIONS = (
    "--model-dtype bfloat16", "--attention sdpa", "--cache-dtype int8", "--seed 5", "--d-sae 32", "--k 3",
    "--architecture topk", "--scale norm", "--aux 0.5", "--topk-threshold-lr 0.5", "--lr 0.001", "--batch-size 50",
    "--training-tokens 3000", "--dead-tokens 99", "--lr-warm-up 0.1", "--lr-decay 0.1", "--lr-end-factor 0.5",
    "--max-grad-norm 0.1", "--adam-moments bfloat16", "--adam-beta1 0.5", "--adam-beta2 0.5", "--scale-tokens 500",
    "--precision bfloat16", "--n-tokens 1500", "--context-size 16", "--drop-positions 1", "--column other",
    "--sample-by paragraph", "--steps 2,4", "--hook blocks.1.hook_resid_post",
)  # fmt: skip
_HOSTILE = ("\x1b]0;owned\x07", "\x1b[2J", "\u202egnp.exe", "a\rb", "tab\there", "x\x00y"[:1] + "\x9b31m")


def changed(what: str, second: str, state: str) -> Case:
    """An input that changed before a command; those that leave no table have to refuse it, if it decides anything."""
    told = second == "export" and not what.endswith("in config")
    return Case("changed", what, second, CHANGES[what], state=state, told=told)


def cases() -> Iterator[Case]:
    """All cases."""
    # links
    for part in ("run/checkpoints", "run/report", "run/seeds", "run/attribution", "run/crosscoder.partial",
                 "run/ablation", "run/damaged-crosscoder", "run/sweep"):  # fmt: skip
        for stage in ("train", "evolve", "attribute", "ablate", "report"):
            state = "interrupted" if stage == "train" and part != "run/crosscoder.partial" else None
            yield Case("links", f"{part} is a link", stage, link(part), state=state)
    for part in ("concepts", "read_out", "dates", "exact", "zeroing", "prompts", "completeness", "own"):
        yield Case("links", f"run/{part} is a link", "study", link(f"run/{part}"))
    for part in ("run/evolution.parquet", "run/accuracy.parquet", "run/run.json", "run/report/index.html"):
        for stage in ("evolve", "attribute", "report"):
            moved = every(_moved(part), link(part, "../outside/moved"))
            # evolve reads the accuracy that attribute leaves, so it runs before that
            yield Case("links", f"{part} is a link", stage, moved, state="attribute" if stage == "evolve" else "report")
    inside = COMMANDS["harvest"].replace("--cache cache", "--cache run/activations")
    yield Case(
        "links",
        "a cache in the run is a link",
        "harvest",
        link("run/activations"),
        command=(*inside.split(),),
        state="evolve",
    )
    # changed inputs
    for _, second, state in PAIRS:
        for what in CHANGES:
            if second in READS[what]:
                yield changed(what, second, state)
    # code
    for what in ("config", "model type", "model", "tokenizer", "tokenizer class", "pickle"):
        for stage in ("harvest", "train", "evolve", "attribute", "plan"):
            yield Case("code", f"{what} brings code", stage, code(what), state="harvest" if stage == "plan" else None)
    for stage in ("harvest", "plan"):
        words = COMMANDS[stage].replace("text.txt", "./text")
        yield Case("code", "a folder with a script as dataset", stage, code("dataset"), command=(*words.split(),),
                   state="harvest", told=True)  # fmt: skip
    # sizes
    for name, value in (
        ("num_hidden_layers", 10**9), ("num_labels", 10**9), ("hidden_size", 10**12), ("vocab_size", 10**18),
        ("max_position_embeddings", 10**15), ("num_attention_heads", 10**12), ("intermediate_size", 10**30),
        ("num_hidden_layers", 10**30),
    ):  # fmt: skip
        for stage in ("harvest", "plan", "attribute"):
            yield Case("sizes", f"{name}={value:.0e}", stage, entry(name, value),
                       state="harvest" if stage == "plan" else None)  # fmt: skip
    for more in (
        "--training-tokens 1e30",
        "--n-tokens 1e30",
        "--batch-size 1e30",
        "--dead-tokens 1e300",
        "--d-sae 1e12",
    ):
        yield Case("sizes", more, "train", more=more, told=True)
    for name, value in (("step", 10**30), ("tokens", 10**40), ("step", -(10**25))):
        for stage in ("harvest", "ls"):
            yield Case("sizes", f"{name}={value:.0e}", stage, _manifest(name, value), state="harvest")
    # words
    for name, value in (
        ("hidden_act", "no-such-activation"), ("model_type", "no-such-type"), ("rope_scaling", {"rope_type": "odd"}),
        ("rope_parameters", {"rope_type": "odd"}), ("_attn_implementation", "odd"), ("attn_implementation", "odd"),
        ("_attn_implementation", "someone/kernel"),
        ("torch_dtype", "odd"), ("hidden_size", "wide"), ("num_attention_heads", 0), ("num_hidden_layers", -1),
        ("layer_norm_eps", "small"), ("architectures", "odd"), ("quantization_config", {"quant_method": "odd"}),
        ("vocab_size", 1.5),
    ):  # fmt: skip
        for stage in ("harvest", "plan", "attribute"):
            yield Case(
                "words", f"{name}={value}", stage, entry(name, value), state="harvest" if stage == "plan" else None
            )
        yield Case("words", f"{name}={value}", "live", entry(name, value))
    for name, change in {
        "of a newer version": {"crosslens": "99.0.0"}, "with a list": {"identity": [1]}, "with a number": {"source": 5},
        "with times in a list": {"timings": []},
    }.items():  # fmt: skip
        for stage in ("status", "evolve", "attribute", "report", "export"):
            yield Case("words", f"run.json {name}", stage, run_json(change), told=True)
    half = "the \ud800 cat"
    yield Case("words", "half of a character in a task", "attribute", items(half), told=True)
    for command in (("trace", "run", half), ("steer", "run", half, "--feature", "3", "--factor", "3"),
                    ("report", "run", "--title", half), ("remove", "run", "--task", half), ("ls", half),
                    ("evolve", "run", "--null", half)):  # fmt: skip
        yield Case("words", f"half of a character: {command[0]}", "status", command=command, told=True)
    # options on a continued training
    for more in OPTIONS:
        yield Case("options", f"{more}, finished", "train", more=more, state="evolve", told=True)
        if more.startswith("--cache"):  # which a live training does not have
            continue
        yield Case("options", f"{more}, interrupted", "train", state="interrupted live", told=True,
                   command=(*LIVE.split(), *more.split()))  # fmt: skip
    yield from _names()
    yield from _environment()
    # signals
    for stop in ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "reader"):
        for stage in ("harvest", "train", "evolve", "attribute", "report"):
            yield Case("signals", stop, stage, stop=stop)
    # stray files
    for name in (".DS_Store", "README", "tokens-abc/", "tokens-12", "partial/", ".nfs0001", "lost+found/"):
        yield Case("stray", f"{name} in checkpoints", "train", stray("run/checkpoints", name), state="interrupted")
        for part, stage in (
            ("run", "evolve"), ("run/attribution", "ablate"), ("cache", "train"), ("models", "harvest"),
            ("run/crosscoder", "evolve"), ("run/report", "report"), ("models/tokenizer", "attribute"),
        ):  # fmt: skip
            yield Case("stray", f"{name} in {part}", stage, stray(part, name))
    # lost inputs
    for name, parts in {
        "the models": ("models",), "a snapshot": ("models/step4",), "the text": ("text.txt",), "the cache": ("cache",),
        "the tasks": ("task.jsonl",), "the tokenizer": ("models/tokenizer*", "models/*/tokenizer*"),
        "run.json": ("run/run.json",), "the crosscoder": ("run/crosscoder",), "a manifest": ("cache/manifest.json",),
    }.items():  # fmt: skip
        for stage in ("train", "evolve", "attribute", "report", "export", "status"):
            yield Case("lost", f"{name}", stage, lose(*parts))
    for name in ("encoder", "lifecycles"):
        for stage in ("attribute", "study", "trace"):
            if (name, stage) != ("lifecycles", "attribute"):
                yield Case("lost", f"the table {name}", stage, lose(f"run/{name}.parquet"), told=True)
    # permissions
    for stage in ("evolve", "attribute", "report", "status", "export", "diff", "train", "remove", "harvest"):
        yield Case("permissions", "read only", stage, read_only=True, prepare=_writable("out"), works=stage in READING)
    # crosscoders
    changes: dict[str, Prepare] = {
        "NaN": broken_weights(float("nan")), "infinity": broken_weights(float("inf")),
        "k=-1": crosscoder(lambda c: c.update(k=-1)), "k=0": crosscoder(lambda c: c.update(k=0)),
        "k=10**6": crosscoder(lambda c: c.update(k=10**6)), "k='four'": crosscoder(lambda c: c.update(k="four")),
        "an unknown entry": crosscoder(lambda c: c.update(gate="odd")),
        "n_snapshots=4": crosscoder(lambda c: c.update(n_snapshots=4)),
        "scale": crosscoder(lambda c: c["metadata"].update(activation_scale=[1.0, -1.0, 1.0])),
        "apply_b_dec_to_input='no'": crosscoder(lambda c: c.update(apply_b_dec_to_input="no")),
        "device=5": crosscoder(lambda c: c.update(device=5)),
        "hook_name=5": crosscoder(lambda c: c["metadata"].update(hook_name=5)),
        "hook_name='odd'": crosscoder(lambda c: c["metadata"].update(hook_name="odd")),
        "prepend_bos='no'": crosscoder(lambda c: c["metadata"].update(prepend_bos="no")),
        "snapshots without labels": crosscoder(lambda c: c["metadata"].update(snapshots=[{"step": 1}] * 3)),
        "metadata is a list": crosscoder(lambda c: c.update(metadata=[])),
    }  # fmt: skip
    for name, prepare in changes.items():
        for stage in ("evolve", "attribute", "export"):
            yield Case("crosscoders", name, stage, prepare, told=True)
    # beside each other
    train = COMMANDS["train"].split()
    other = [*train[: train.index("--k")], "--k", "3", *train[train.index("--k") + 2 :]]
    for name, beside in {
        "status": "status run", "report": "report run", "diff": "diff run run", "remove": "remove run --task task",
        "ablate": COMMANDS["ablate"], "evolve": "evolve run", "export": COMMANDS["export"],
    }.items():  # fmt: skip
        for stage in ("train", "evolve", "attribute", "report"):
            # what is removed is not there to be compared afterwards, and evolve reads the accuracy, if it is there
            compared, words = ("status" if name in ("remove", "evolve") else stage), tuple(COMMANDS[stage].split())
            state = "attribute" if stage == "evolve" else "report"
            yield Case(
                "beside", f"{name} beside {stage}", compared, beside=tuple(beside.split()), state=state, command=words
            )
    for state in ("harvest", "train"):
        yield Case("beside", "another training in the same new folder", "train", beside=tuple(other), state=state)


def _moved(part: str) -> Prepare:
    """Somebody has put the file elsewhere, where it is not ours any more."""

    def prepare(folder: Path) -> None:
        path = folder / part
        shutil.copy(path, folder.parent / "outside" / "moved") if path.is_file() else None

    return prepare


def _manifest(name: str, value: int) -> Prepare:
    def prepare(folder: Path) -> None:
        rows: list[dict[str, Any]] = [{"label": f"step{n}", "path": f"step{n}", "step": n} for n in (2, 4, 6)]
        rows[-1][name] = value
        (folder / "models" / "snapshots.json").write_text(json.dumps({"snapshots": rows}))

    return prepare


def _writable(name: str) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o777)

    return prepare


def _hostile_tokens(before: tuple[str, ...]) -> Prepare:
    """Every word begins by renaming the terminal and ends by writing from right to left; then some commands run."""

    def renamed(word: str) -> str:
        return f"\x1b]0;{word}\u202e" if word.isalpha() else word

    def prepare(folder: Path) -> None:
        for path in (folder / "models").rglob("tokenizer.json"):
            contents = json.loads(path.read_text())
            contents["model"]["vocab"] = {renamed(word): n for word, n in contents["model"]["vocab"].items()}
            path.write_text(json.dumps(contents))
        for name in ("text.txt", "prompts.txt"):
            lines = (folder / name).read_text().splitlines()
            (folder / name).write_text("\n".join(" ".join(map(renamed, line.split())) for line in lines))
        items = [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]
        items = [{key: " ".join(map(renamed, text.split())) for key, text in item.items()} for item in items]
        (folder / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
        for stage in before:
            if stage not in ("live", "study"):
                wait(start(tuple(COMMANDS[stage].split()), folder))

    return prepare


def _names() -> Iterator[Case]:
    harvest = COMMANDS["harvest"]

    def data(name: str, decoy: str) -> Prepare:
        def prepare(folder: Path) -> None:
            (folder / "text.txt").rename(folder / name)
            (folder / decoy).write_text("\n".join(grammar.documents(300, 9)))

        return prepare

    decoys = {
        "data[1].txt": "data1.txt", "a*b.txt": "axb.txt", "w?y.txt": "way.txt", "[abc].txt": "a.txt",
        "{x}.txt": "x.txt", "a::b.txt": "a", "**.txt": "all.txt",
    }  # fmt: skip
    for name, decoy in decoys.items():
        for stage in ("harvest", "plan"):
            words = COMMANDS[stage].split()
            words[words.index("text.txt")] = name
            yield Case("names", f"--dataset {name}", stage, data(name, decoy), command=tuple(words), state="harvest")

    def relabelled(label: str, trained: bool = True) -> Prepare:
        def prepare(folder: Path) -> None:
            rows = [{"label": f"step{n}", "path": f"step{n}", "step": n} for n in (2, 4)]
            rows.append({"label": label, "path": "step6", "step": 6})
            (folder / "models" / "snapshots.json").write_text(json.dumps({"snapshots": rows}))
            if trained:
                wait(start(tuple(LIVE.split()), folder))

        return prepare

    for label in ("x/../../../outside/X", "/abs", "..", *_HOSTILE, "a" * 300, "CON", "ümlaut"):
        yield Case("names", f"label {label[:30]!r}", "status", relabelled(label, trained=False),
                   command=(*LIVE.split(),), state="train")  # fmt: skip
        for stage in ("export", "status", "report"):
            command = ("export", "run", "--format", "sae") if stage == "export" else None
            yield Case("names", f"label {label[:30]!r}", "status" if stage == "report" else stage, relabelled(label),
                       command=("report", "run") if stage == "report" else command, state="train")  # fmt: skip

    def task_named(name: str) -> Prepare:
        def prepare(folder: Path) -> None:
            shutil.copy(folder / "task.jsonl", folder / f"{name}.jsonl")

        return prepare

    for stage in ("evolve", "attribute", "label", "trace", "steer", "report", "export"):
        before = STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES
        yield Case("names", "tokens with control characters", "status", _hostile_tokens(before), state="harvest",
                   command=(*COMMANDS[stage].split(),))  # fmt: skip
    for name in ("\x1b[2J", "\u202etxt", "a b", "-x", "[1]", "con"):
        yield Case("names", f"task {name!r}", "remove", task_named(name), state="attribute",
                   command=("attribute", "run", "--task", f"./{name}.jsonl"))  # fmt: skip
    for name in ("a\nb", 'quote"s', "\u202erun", "-run", "r" * 300, "ru n", "%s"):
        words = harvest.split()
        yield Case("names", f"--cache {name[:20]!r}", "plan", command=(*words[:-1], name), state="harvest", own=name)
    for name in ("..", "run/../../outside/new"):
        yield Case("names", f"status {name[:20]!r}", "plan", state="harvest", command=("status", name))
    for words in (("report", "run", "--title", "\x1b]0;x\x07"), ("remove", "run", "--task", "\x1b[2J"),
                  ("remove", "run", "--task", "../../outside/precious"), ("status", "\x1b[2J"),
                  ("export", "run", "--format", "sae", "--snapshot", "\x1b[2J"),
                  ("evolve", "run", "--null", "\x1b[2J")):  # fmt: skip
        yield Case("names", " ".join(words).encode("unicode_escape").decode(), "status", command=words)


def _environment() -> Iterator[Case]:
    settings: dict[str, dict[str, str]] = {
        "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
        "RANK alone": {"RANK": "1"},
        "a launcher's, without one": {"WORLD_SIZE": "2", "RANK": "0"},
        "WORLD_SIZE=two": {"WORLD_SIZE": "two"},
        "WORLD_SIZE=0": {"WORLD_SIZE": "0"},
        "RANK=-1": {"RANK": "-1"},
        "LOCAL_WORLD_SIZE=x": {"LOCAL_WORLD_SIZE": "x"},
        "WANDB_MODE=odd": {"WANDB_MODE": "odd"},
        "COLUMNS=0": {"COLUMNS": "0"},
        "COLUMNS=x": {"COLUMNS": "x"},
        "LANG=C": {"LANG": "C", "LC_ALL": "C"},
        "TMPDIR is gone": {"TMPDIR": "/no/such/place"},
        "HOME is gone": {"HOME": "/no/such/place"},
        "CROSSLENS_CACHE is a file": {"CROSSLENS_CACHE": "/dev/null"},
        "CUDA_VISIBLE_DEVICES": {"CUDA_VISIBLE_DEVICES": "7"},
        "TERM=dumb": {"TERM": "dumb"},
    }
    for name, variables in settings.items():
        for stage in ("harvest", "train", "evolve", "report"):
            more = "--wandb-project x" if "WANDB_MODE" in variables and stage in ("train", "report") else ""
            more += " --wandb" if more and stage == "report" else ""
            yield Case("environment", name, stage, environment=variables, more=more)


# ---------------------------------------------------------------------- all of them
def undisturbed(states: Path) -> dict[str, dict[str, str]]:
    """Run every command once, and keep what it starts from in `states/<stage>`; returns its results."""
    work = states / "case" / "work"
    work.mkdir(parents=True)
    pretrain_demo(work / "models", 0, config=MODEL, progress=False)
    (work / "text.txt").write_text("\n".join(grammar.documents(300, 1)))
    items = [{"prefix": item.prefix, "correct": item.correct, "wrong": item.wrong, "patch_prefix": item.patch_prefix}
             for item in cl.tasks.Task.demo("simple").items[:40]]  # fmt: skip
    (work / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
    (work / "prompts.txt").write_text("\n".join(item["prefix"] for item in items[:2]))
    expected: dict[str, dict[str, str]] = {}
    for stage in STAGES:
        shutil.copytree(work, states / stage, symlinks=True)
        if stage == "train":
            _interrupted(COMMANDS["train"], states, "interrupted")
            _interrupted(LIVE, states, "interrupted live")
        ended = wait(start(tuple(COMMANDS[stage].split()), work))
        if ended.status and "No such" in ended.said:  # an earlier version, which has no such command
            print(f"without {stage}: {' '.join(ended.said.split())}", flush=True)
            continue
        if ended.status:
            raise SystemExit(f"{stage} does not run undisturbed: {ended.said}")
        expected[stage] = results(_stage(stage), work)
        shutil.copytree(work, states / f"after {stage}", symlinks=True)
        if stage == "live":
            shutil.rmtree(work / "run")
    for name in COMMANDS.keys() - {*STAGES}:  # a case of a command that is refused as it is would say nothing
        ended = wait(start(tuple(COMMANDS[name].split()), work))
        if ended.status:
            raise SystemExit(f"{name} does not run undisturbed: {ended.said}")
    return expected


def _interrupted(command: str, states: Path, name: str) -> None:
    """A training that was killed after its first checkpoint."""
    folder, aside = states / "case" / "work", states / name
    started = start(tuple(command.split()), folder)
    while not any((folder / "run" / "checkpoints").glob("tokens-*")):
        time.sleep(0.001)
    os.killpg(started.process, signal.SIGKILL)
    wait(started)
    if (folder / "run" / "crosscoder").exists():
        raise SystemExit("the training was not interrupted in time")
    shutil.copytree(folder, aside, symlinks=True)
    shutil.rmtree(folder / "run")


def matrix(states: Path, expected: dict[str, dict[str, str]]) -> str:
    """What becomes of every change between every two commands."""
    rows: list[dict[str, str]] = []
    for first, second, state in PAIRS:
        row = {"between": f"{first} and {second}"}
        for what in CHANGES:
            case = changed(what, second, state)
            row[what] = outcome(case, states, expected, random.Random(0))[0] if second in READS[what] else "-"
        for what, options in SETTINGS.items():
            case = Case("changed", what, second, more=options.get(second, ""), state=state)
            row[what] = outcome(case, states, expected, random.Random(0))[0] if second in options else "-"
        print(row, flush=True)
        rows.append(row)
    columns = ("between", *CHANGES, *SETTINGS)
    return measure.markdown(rows, {name: (lambda row, name=name: row[name]) for name in columns})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="")
    parser.add_argument("--part", default="1/1", help="the first of four parts: 1/4")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="also what is said where all is well")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    arguments = parser.parse_args()
    every_case = list(cases())
    kinds = list(dict.fromkeys(case.kind for case in every_case))
    wanted = arguments.classes.split(",") if arguments.classes else kinds
    chosen = [case for case in every_case if case.kind in wanted]
    if arguments.quick:
        chosen = [case for kind in wanted for case in random.Random(arguments.seed).sample(
            [case for case in chosen if case.kind == kind], 3)]  # fmt: skip
    part, parts = map(int, arguments.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    if arguments.list:
        for case in chosen:
            print(f"{case.kind}: {case.name}: {case.stage} {case.more}".encode("unicode_escape").decode())
        print(f"{len(chosen)} cases")
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        states = Path(temporary)
        expected = undisturbed(states)
        known = {*expected, *COMMANDS.keys() - {*STAGES}}
        if arguments.matrix:
            body = matrix(states, expected)
        else:
            for i, case in enumerate(chosen):
                if case.stage not in known:
                    continue
                found, said = outcome(case, states, expected, random.Random(f"{arguments.seed} {i}"))
                counts[case.kind, found] += 1
                if found not in GOOD or arguments.verbose:
                    words = said.strip()[-700:].encode("unicode_escape").decode().replace("\\n", "\n    ")
                    name = f"{case.kind}: {case.name}".encode("unicode_escape").decode()
                    print(f"\n{found}: {name}: {case.stage}\n    {words}", flush=True)
            rows = [
                {"class": kind, "cases": sum(counts[kind, each] for each in OUTCOMES)}
                | {each: counts[kind, each] for each in OUTCOMES}
                for kind in wanted
            ]
            columns: dict[str, Callable[[dict], str]] = {
                name: (lambda row, name=name: str(row[name])) for name in ("class", "cases", *OUTCOMES)
            }
            body = f"{len(chosen)} cases.\n\n{measure.markdown(rows, columns)}"
    print(body)
    if arguments.report:
        print(measure.write_report("hostile", "Hostile surroundings", body, "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
