"""Files of options: TOML, or the run.json of an earlier run.

Keys are the names of options, with dashes or underscores, and values what follows them on the command line:

    snapshots = "pythia-160m"
    steps = [0, 512, 143000]        # or "0,512,143000"
    hook = "blocks.6.hook_resid_post"
    k = 64

A file for `crosslens run` has them in a table per command. Paths are relative to the directory that the command is run
in. The command line wins over the file, and the file over the recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import App
from cyclopts.config import Dict

from crosslens.config import RECIPES
from crosslens.errors import UserError, brief, did_you_mean, read_text, shortened
from crosslens.rundir import RunDir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]


def fill(root: App, app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Take what the command line does not give from the file of --config, and then from the recipe.

    Between reading the command line and making the options cyclopts calls this with all but `root`, the app of all
    commands.

    Raises:
        UserError: the file cannot be read, or holds something else than options of the command.
    """
    typed = _typed(arguments, "--config")
    if typed is not None:
        path, verb = Path(typed), commands[-1]
        contents = _read(path)
        if verb in ("plan", "harvest") and verb not in contents:  # a file for `train` has options that these do without
            of_train = _check(path, contents, "train", root["train"].assemble_argument_collection())
            known = {name for each in arguments for name in each.names}
            contents = {option: value for option, value in of_train.items() if f"--{option}" in known}
        contents = _check(path, contents, verb, arguments)
        Dict(contents, source=typed, use_commands_as_keys=False)(app, commands, arguments)
    recipe = _typed(arguments, "--recipe")
    if recipe in RECIPES:
        Dict(dict(RECIPES[recipe]), source=f"--recipe {recipe}", use_commands_as_keys=False)(app, commands, arguments)


def _typed(arguments: Any, name: str) -> str | None:
    """What was given for an option so far."""
    return next((each.tokens[-1].value for each in arguments if name in each.names and each.tokens), None)


def _check(path: Path, contents: Mapping[str, Any], verb: str, arguments: Any) -> dict[str, Any]:
    """The options in a file, or in its table of a command, by their names."""
    where, table = "", contents.get(verb)
    if isinstance(table, dict):
        run_dir = {"run_dir": contents["run_dir"]} if verb == "train" and "run_dir" in contents else {}
        where, contents = f" in [{verb}]", {**run_dir, **table}
    known = {name[2:] for each in arguments for name in each.names if name.startswith("--")} - {"config", "json"}
    found: dict[str, Any] = {}
    for key, value in contents.items():
        option = key.replace("_", "-")
        if option not in known:
            raise UserError(
                f"{path}: {shortened(key)!r}{where} is no option of `crosslens {verb}`{did_you_mean(option, known)}"
            )
        if option in found:
            raise UserError(f"{path}: {key!r}{where} is given twice, with dashes and with underscores")
        if isinstance(value, dict):
            raise UserError(f"{path}: {key} = {shortened(value)}{where} must be a text, a number or a list of them")
        found[option] = value
    return found


def _read(path: Path) -> Mapping[str, Any]:
    if path.name == "run.json":
        contents = RunDir.open(path.parent).read_json()
        if "options" not in contents:
            command = " ".join(contents.get("command") or ()) or "Python"
            raise UserError(
                f"--config {path} records no options of `crosslens train`: the run was made by {shortened(command)!r}; "
                "repeat that with another directory"
            )
        return contents["options"]
    return parse_toml(path)


def parse_toml(path: Path) -> Mapping[str, Any]:
    """The contents of a TOML file.

    Raises:
        UserError: another type of file, or not TOML.
    """
    if path.suffix != ".toml":
        raise UserError(f"--config {path} is neither a .toml file nor a run.json")
    try:
        return tomllib.loads(read_text(path, "file of options"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid TOML ({brief(error)}); correct it") from error
