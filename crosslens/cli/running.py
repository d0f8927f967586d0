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

`train`, `evolve` and `report` always run, `study` and `label` where they have a table. All names of options are checked
before the first command. Repeated after an interruption it continues: `train` resumes, `evolve` is skipped where it was
complete with the same options, `study` makes what is missing, and answers of a language model are kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslens.cli.config_file import parse_toml, word
from crosslens.errors import UserError, did_you_mean, read_json, shortened
from crosslens.rundir import RunDir

VERBS = ("train", "evolve", "study", "label", "report")
ALWAYS = ("train", "evolve", "report")


def read_commands(path: Path, commands: Mapping[str, Any]) -> tuple[Path, dict[str, list[str]]]:
    """The run directory and the arguments of every command that a file asks for, in order.

    Args:
        path: the TOML file.
        commands: the commands of the program by name, as click has them.

    Raises:
        UserError: the file cannot be read, lacks `run_dir` or [train], or names an unknown command or option.
    """
    contents = dict(parse_toml(path))
    run_dir = contents.pop("run_dir", contents.pop("run-dir", None))
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
    found: dict[str, list[str]] = {}
    for verb in VERBS:
        if verb in contents or verb in ALWAYS:
            options = _arguments(path, verb, contents.get(verb, {}), commands[verb])
            found[verb] = ["--run-dir", run_dir, *options] if verb == "train" else [run_dir, *options]
    return Path(run_dir), found


def _arguments(path: Path, verb: str, table: Mapping[str, Any], command: Any) -> list[str]:
    """The options in a table as they would be typed."""
    known = {each.opts[0].removeprefix("--"): each for each in command.params if each.opts[0].startswith("--")}
    for name in ("run-dir", "config", "json", "help"):
        known.pop(name, None)
    arguments: list[str] = []
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in known:
            raise UserError(
                f"{path}: {shortened(key)!r} in [{verb}] is no option of `crosslens {verb}`{did_you_mean(name, known)}"
            )
        option = known[name]
        if isinstance(value, bool) and getattr(option, "is_flag", False):
            arguments += [*option.opts[:1]] if value else [*option.secondary_opts[:1]]
            continue
        words = [word(path, key, part) for part in (value if isinstance(value, list) else [value])]
        if getattr(option, "multiple", False):
            arguments += [part for each in words for part in (f"--{name}", each)]
        else:
            arguments += [f"--{name}", ",".join(words)]
    return arguments


def run_commands(path: Path, group: Any) -> Path:
    """Run the commands of a file, but for what is complete; returns the run directory.

    Args:
        path: the TOML file.
        group: the program, as click has it.

    Raises:
        UserError: as `read_commands`, and as the commands.
    """
    from crosslens.cli.arguments import check_tasks

    run_dir, commands = read_commands(path, group.commands)
    study = commands.get("study", [])
    if "study" in commands and "--task" not in study:
        raise UserError(f'{path}: [study] needs task = ["..."]')
    check_tasks("--task", [after for option, after in zip(study, study[1:], strict=False) if option == "--task"])
    run = RunDir(run_dir)
    for verb, arguments in commands.items():
        if verb == "evolve" and _is_evolved(run, arguments):
            continue
        group.main([verb, *arguments], prog_name="crosslens", standalone_mode=False)
        if verb == "evolve":
            run.update(evolved=_evolved(run, arguments))
    return run_dir


def _evolved(run: RunDir, arguments: list[str]) -> dict[str, str]:
    """What decides the tables of `evolve`: its options, and the crosscoder."""
    checksum = read_json(run.crosscoder / "cfg.json", "config of a crosscoder").get("metadata", {}).get("checksums")
    return {"options": shlex.join(arguments[1:]), "crosscoder": str(checksum)}


def _is_evolved(run: RunDir, arguments: list[str]) -> bool:
    """Whether `evolve` was complete with these options; its last table is "probe_parts"."""
    recorded = run.read_json().get("evolved")
    return recorded == _evolved(run, arguments) and "probe_parts" in run.table_names()
