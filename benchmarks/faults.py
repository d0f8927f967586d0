"""Random faults at random moments of a whole analysis: what is survived, what is told, and what is neither.

A tiny analysis is run once undisturbed: harvest, train, evolve, attribute, ablate, report. Then, n times, one command
is run again on a copy of what it starts from, with one fault:

    kill        kill -9 at a random moment
    full        no file may grow beyond a random size, as on a full disk (Linux's RLIMIT_FSIZE)
    flip        a random bit of a random file that the command may read is flipped
    truncate    such a file is cut at a random place
    missing     such a file is deleted
    race        the command runs twice at the same time

Afterwards the command is run once more without a fault (for flip, truncate and missing: on the damaged files, after
deleting what a message told to delete), and its results are compared with the undisturbed ones.

    survived    the results are those of the undisturbed run, to the bit of every weight and table
    told        the command ended with one line and an exit code of 2, 3 or 4
    silent      it ended with status 0, and the results differ
    raw         a traceback, or more than one line of error
    hang        it did not end within two minutes

    python benchmarks/faults.py --n 500 [--seed 0] [--kinds kill,flip] [--report]

Commands run in forks of one process that has imported the library, about a second each.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import pandas as pd
import torch

import crosslens as cl
from crosslens.cli.app import main as command_line
from crosslens.rundir import RunDir
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig, pretrain_demo

KINDS = ("kill", "full", "flip", "truncate", "missing", "race")
OUTCOMES = ("survived", "told", "silent", "raw", "hang")
PACKAGES = ("crosslens", "torch", "sae-lens", "transformers")
SECONDS = 120
MODEL = PretrainingConfig(
    n_layers=2, d_model=16, n_heads=2, d_mlp=32, batch_size=4, n_steps=6, warmup_steps=2, snapshot_steps=(2, 4, 6)
)
DATA = "--snapshots models --hook blocks.0.hook_resid_post --dataset text.txt --n-tokens 2000 --context-size 32"
TASK = "run --task demo:simple"
COMMANDS = {
    "harvest": f"harvest {DATA} --cache cache",
    "train": (
        f"train {DATA} --cache cache --run-dir run --d-sae 24 --k 4 --training-tokens 4000 --batch-size 100 --lr 0.003 "
        "--dead-tokens 500 --n-checkpoints 8"
    ),
    "evolve": "evolve run",
    "attribute": f"attribute {TASK}",
    "ablate": f"ablate {TASK} --k 1,4",
    "report": "report run",
}
STAGES = tuple(COMMANDS)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (None: it did not end), and what it wrote to stderr."""

    status: int | None
    said: str

    @property
    def raw(self) -> bool:
        """Whether a user would see more than a line of error."""
        lines = [line for line in self.said.splitlines() if line.startswith("crosslens: ")]
        return "Traceback" in self.said or (self.status not in (0, -signal.SIGKILL) and len(lines) != 1)


# ---------------------------------------------------------------------- running commands
@dataclass(frozen=True)
class Started:
    """A process, and the pipe that it writes to: a pipe is not a file, so it is never full."""

    process: int
    pipe: int


def start(stage: str, folder: Path, largest: int | None = None) -> Started:
    """Start a command in a fork."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    process = os.fork()
    if process:
        os.close(writer)
        return Started(process, reader)
    status = 1
    try:  # nothing may return to what the parent does next
        os.setsid()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.chdir(folder)
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.argv = ["crosslens", *COMMANDS[stage].split()]
        command_line()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(started: Started, seconds: float = SECONDS) -> Ended:
    """Wait for a command, and kill it if it does not end."""
    until, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < until:
        done, code = os.waitpid(started.process, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.0 if done else 0.01)
    if status is None:
        os.killpg(started.process, signal.SIGKILL)
        os.waitpid(started.process, 0)
    with os.fdopen(started.pipe, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return Ended(status, said)


def run(stage: str, folder: Path, largest: int | None = None) -> Ended:
    """Run a command to its end."""
    return wait(start(stage, folder, largest))


# ---------------------------------------------------------------------- what a command leaves
def results(stage: str, folder: Path) -> dict[str, str]:
    """Digests of the results of a command; files that cannot be read are named as such."""
    found: dict[str, str] = {}
    if stage == "harvest":
        files = sorted((folder / "cache").glob("*.safetensors"))
        return {path.name: _sha256(path.read_bytes()) for path in files}
    if stage == "report":
        files = sorted((folder / "run" / "report").rglob("*.csv")) + sorted((folder / "run" / "report").glob("*.html"))
        return {path.name: _sha256(_without_times(path.read_bytes())) for path in files}
    if stage == "train":
        try:
            state = cl.load(folder / "run" / "crosscoder", "cpu").state_dict()
        except cl.UserError as error:
            return {"crosscoder": str(error)}
        found = {
            name: hashlib.sha256(x.float().contiguous().numpy().tobytes()).hexdigest() for name, x in state.items()
        }
    record = RunDir(folder / "run")
    for name in record.table_names():
        try:
            table = record.table(name)
        except cl.UserError as error:
            found[name] = str(error)
        else:
            assert table is not None
            found[name] = _sha256(pd.util.hash_pandas_object(table.astype(str)).to_numpy().tobytes())
    return found


def _sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _without_times(page: bytes) -> bytes:
    return re.sub(rb"<dt>(Timings|Created|Command)</dt>.*?</div>", b"", page, flags=re.DOTALL)


def inputs(stage: str, folder: Path) -> list[Path]:
    """Files that a command may read, and that the library wrote."""
    places = {"harvest": ["cache"], "train": ["cache", "run"]}.get(stage, ["run"])
    files = [path for place in places for path in (folder / place).rglob("*") if path.is_file()]
    return sorted(
        path for path in files if "report" not in path.parts and path.suffix != ".lock" and path.stat().st_size
    )


# ---------------------------------------------------------------------- one trial
def trial(kind: str, stage: str, states: Path, expected: dict[str, str], seconds: float, rng: random.Random) -> str:
    """One fault; returns the outcome, with what was said after a colon where it matters."""
    with tempfile.TemporaryDirectory(dir=states) as temporary:
        folder = Path(temporary) / "work"
        shutil.copytree(states / stage, folder, symlinks=True)
        if kind in ("flip", "truncate", "missing"):
            return _damaged(kind, stage, folder, expected, rng)
        if kind == "kill":
            started = start(stage, folder)
            time.sleep(rng.uniform(0, 1.1 * seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(started.process, signal.SIGKILL)
            first = wait(started)
        elif kind == "full":
            first = run(stage, folder, largest=int(2 ** rng.uniform(6, 17)))
        else:
            running = [start(stage, folder) for _ in range(2)]
            both = [wait(each) for each in running]
            first = next((each for each in both if each.raw or each.status is None), both[0])
        if first.status is None:
            return "hang"
        if first.raw:
            return f"raw: {stage}: {first.said[-1500:]}"
        again = run(stage, folder)
        if again.status is None:
            return "hang"
        if again.raw:
            return f"raw: {stage} again: {again.said[-1500:]}"
        if again.status:
            return f"silent: {stage} again ended with {again.status}: {again.said[-300:]}"
        return (
            "survived"
            if results(stage, folder) == expected
            else f"silent: {stage}: {_difference(stage, folder, expected)}"
        )


def _damaged(kind: str, stage: str, folder: Path, expected: dict[str, str], rng: random.Random) -> str:
    path = rng.choice(inputs(stage, folder))
    contents = bytearray(path.read_bytes())
    at = rng.randrange(len(contents))
    if kind == "flip":
        contents[at] ^= 1 << rng.randrange(8)
        path.write_bytes(contents)
    elif kind == "truncate":
        path.write_bytes(contents[:at])
    else:
        path.unlink()
    where = f"{kind} {path.relative_to(folder)} at {at}"
    ended = run(stage, folder)
    if ended.status is None:
        return "hang"
    if ended.raw:
        return f"raw: {stage}, {where}: {ended.said[-1500:]}"
    if ended.status:
        return "told"
    found = results(stage, folder)
    if found == expected:
        return "survived"
    if stage == "report" and "damaged" in "".join(p.read_text() for p in (folder / "run" / "report").glob("*.html")):
        return "told"
    if kind == "missing" and stage == "report":
        return "told"  # the page names the command that makes what is missing
    changed = [name for name in expected if found.get(name) != expected[name]]
    own = path.relative_to(folder / "run").with_suffix("").as_posix() if path.is_relative_to(folder / "run") else ""
    if changed == [own] and not (folder / "run" / f"{own}.parquet").exists():
        return "survived"  # a table that the command neither reads nor writes is missing, as it was
    if changed == [own] and "is damaged" in found.get(own, ""):
        return "survived"  # the same, damaged: who reads it is told
    return f"silent: {stage}, {where}: {changed} differ; {ended.said[-300:]}"


def _difference(stage: str, folder: Path, expected: dict[str, str]) -> str:
    found = results(stage, folder)
    return ", ".join(name for name in {*found, *expected} if found.get(name) != expected.get(name))


# ---------------------------------------------------------------------- all of them
def undisturbed(states: Path) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """Run every command once, and keep what it starts from in `states/<stage>`; returns its results and seconds."""
    work = states / "work"
    work.mkdir()
    pretrain_demo(work / "models", 0, config=MODEL, progress=False)
    (work / "text.txt").write_text("\n".join(grammar.documents(300, 1)))
    expected: dict[str, dict[str, str]] = {}
    seconds: dict[str, float] = {}
    for stage in STAGES:
        shutil.copytree(work, states / stage, symlinks=True)
        began = time.monotonic()
        ended = run(stage, work)
        if ended.status:
            raise SystemExit(f"{stage} does not run undisturbed: {ended.said}")
        seconds[stage] = time.monotonic() - began
        expected[stage] = results(stage, work)
    return expected, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    arguments = parser.parse_args()
    kinds, stages = arguments.kinds.split(","), arguments.stages.split(",")
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore")
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        states = Path(temporary)
        expected, seconds = undisturbed(states)
        print({stage: round(took, 1) for stage, took in seconds.items()}, flush=True)
        for i in range(arguments.n):
            rng = random.Random(f"{arguments.seed} {i}")
            kind, stage = rng.choice(kinds), rng.choice(stages)
            if not inputs(stage, states / stage) and kind in ("flip", "truncate", "missing"):
                stage = "train"
            outcome, _, words = trial(kind, stage, states, expected[stage], seconds[stage], rng).partition(": ")
            counts[kind, outcome] += 1
            if outcome not in ("survived", "told"):
                print(f"\n{i} {kind} {outcome}: {words}", flush=True)
    rows = [
        {"fault": kind, "tried": sum(counts[kind, outcome] for outcome in OUTCOMES)}
        | {outcome: counts[kind, outcome] for outcome in OUTCOMES}
        for kind in kinds
    ]
    columns: dict[str, Callable[[dict], str]] = {
        name: (lambda row, name=name: str(row[name])) for name in ("fault", "tried", *OUTCOMES)
    }
    body = f"Seed {arguments.seed}, {arguments.n} faults.\n\n{measure.markdown(rows, columns)}"
    print(body)
    if arguments.report:
        print(measure.write_report("faults", "Random faults", body, "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
