"""`crosslens run CONFIG.toml`: from snapshots to a report, one command after the other.

The file has the run directory at the top, and a table per command with its options:

    run_dir = "runs/a"

    [train]
    snapshots = "runs/my-model"
    hook = "blocks.1.hook_resid_post"
    dataset = "text.txt.gz"
    d_sae = 1024

    [study]
    task = ["sva:simple_test.json"]

`train`, `evolve` and `report` always run, `study` and `label` where they have a table. All options are checked before
the first command. Repeated after an interruption it continues: `train` resumes, `evolve` is skipped where it was
complete with the same options, `study` makes what is missing, and answers of a language model are kept. `run.json` has
the seconds of each command, summed over repetitions, and the bytes of memory that it took at most.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cyclopts import App

from crosslens.cli.arguments import check_tasks
from crosslens.cli.config_file import parse_toml
from crosslens.cli.help import parse
from crosslens.config import EvolveOptions
from crosslens.errors import UserError, did_you_mean, shortened
from crosslens.rundir import RunDir

VERBS = ("train", "evolve", "study", "label", "report")
ALWAYS = ("train", "evolve", "report")


def run_commands(path: Path, app: App) -> None:
    """Run the commands of a file, but for what is complete.

    Args:
        path: the TOML file.
        app: the program.

    Raises:
        UserError: the file cannot be read, lacks `run_dir` or [train], or names an unknown command or option; and as
            the commands.
    """
    contents = dict(parse_toml(path))
    run_dir = contents.pop("run_dir", None)
    if not isinstance(run_dir, str):
        raise UserError(f'{path} must begin with the run directory, such as run_dir = "runs/a"')
    for verb, table in contents.items():
        if verb not in VERBS or not isinstance(table, dict):
            raise UserError(
                f"{path}: {shortened(verb)!r} is no table of a run: after run_dir, give [{'], ['.join(VERBS)}]"
                f"{did_you_mean(verb, VERBS)}"
            )
    if "train" not in contents:
        raise UserError(f"{path} has no table [train], which says what to train on")
    commands: dict[str, Any] = {}
    for verb in (verb for verb in VERBS if verb in contents or verb in ALWAYS):
        config = ["--config", str(path)] if verb in contents else []
        try:
            commands[verb] = parse(app, [verb, *([] if verb == "train" else [run_dir]), *config])
        except UserError as error:
            raise UserError(f"{path}, [{verb}]: {error}") from error
    if "study" in commands:
        check_tasks(commands["study"].keywords["options"].task)
    from crosslens.activations.plan import peak_memory, reset_peak_memory

    run = RunDir(run_dir)
    for verb, command in commands.items():
        if verb == "evolve" and _is_evolved(run, command.keywords):
            continue
        began = time.perf_counter()
        reset_peak_memory()
        command()
        known = run.read_json()
        taken = {verb: max(peak_memory(), known.get("memory", {}).get(verb, 0))}
        run.update(memory=taken)
        if verb == "evolve":
            run.update(evolved=_evolved(run, command.keywords))
        if verb != "train":  # which records its own
            before = known.get("timings", {}).get(verb, 0)
            run.update(timings={verb: round(before + time.perf_counter() - began, 1)})


def _evolved(run: RunDir, arguments: dict[str, Any]) -> dict[str, str]:
    """What decides the tables of `evolve`: its options, and the crosscoder."""
    return {"options": str(arguments.get("options") or EvolveOptions()), "crosscoder": run.crosscoder_checksums()}


def _is_evolved(run: RunDir, arguments: dict[str, Any]) -> bool:
    """Whether `evolve` was complete with these options; its last table is "probe_parts"."""
    recorded = run.read_json().get("evolved")
    return recorded == _evolved(run, arguments) and "probe_parts" in run.table_names()
