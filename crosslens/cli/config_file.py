"""A file of options for `crosslens train`: TOML, or the run.json of an earlier run.

Keys are the names of options, with dashes or underscores, and values what follows them on the command line:

    snapshots = "pythia-160m"
    steps = [0, 512, 143000]        # or "0,512,143000"
    hook = "blocks.6.hook_resid_post"
    k = 64

Paths are relative to the directory that the command is run in. The command line wins over the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crosslens.cli.display import to_json
from crosslens.errors import UserError, brief, did_you_mean, read_text, shortened
from crosslens.rundir import RunDir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    Context = typer.Context
else:  # that class is for annotations only: what typer passes is the context of the click in use
    Context = typer.Context.__base__
_NOT_IN_FILES = ("help", "config", "json")


def read_config(context: Context, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of a command; the callback of its --config option.

    Raises:
        UserError: the file cannot be read, or holds something else than options of the command.
    """
    if path is None:
        return None
    parameters = _parameters(context)
    defaults: dict[str, Any] = {}
    for key, value in _read(path).items():
        option = key.replace("_", "-")
        if option not in parameters:
            raise UserError(
                f"--config {path}: {shortened(key)!r} is no option of `crosslens {context.command.name}`"
                f"{did_you_mean(option, parameters)}"
            )
        name, multiple = parameters[option]
        if name in defaults:
            raise UserError(f"--config {path}: {key!r} is given twice, with dashes and with underscores")
        words = [word(path, key, part) for part in (value if isinstance(value, list) else [value])]
        defaults[name] = words if multiple else ",".join(words)
    context.default_map = defaults
    return path


def given_options(context: Context) -> dict[str, Any]:
    """The options of a command that were given, on the command line or in a file, as `read_config` reads them."""
    return {
        option.replace("-", "_"): to_json(context.params[name])
        for option, (name, _) in _parameters(context).items()
        if getattr(context.get_parameter_source(name), "name", "") in ("COMMANDLINE", "DEFAULT_MAP")
    }


def _parameters(context: Context) -> dict[str, tuple[str, bool]]:
    """Options of a command by name: the parameter, and whether it can be repeated."""
    found: dict[str, tuple[str, bool]] = {}
    for parameter in context.command.params:
        option = parameter.opts[0].removeprefix("--")
        if option not in _NOT_IN_FILES:
            found[option] = parameter.name, bool(getattr(parameter, "multiple", False))
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


def word(path: Path, key: str, value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # 2e7 tokens
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(
            f"--config {path}: {key} = {shortened(value)} must be a text, a number or a list of them, at the top level "
            "of the file"
        )
    return str(value)
