"""What cyclopts leaves open: which options `--help` lists, and mistakes in one line with a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, get_type_hints

from cyclopts import App, CycloptsError, MissingArgumentError
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import SIMPLE

import crosslens.config
from crosslens.config import COMMON
from crosslens.errors import UserError


class Help(DefaultFormatter):
    """In sections, without the options that few runs need, unless all are asked for."""

    def __init__(self, *, all: bool) -> None:
        super().__init__(panel_spec=PanelSpec(box=SIMPLE, padding=(0, 0)))
        self.rare = frozenset[str]() if all else rare_options()

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        """Print a section."""
        shown = [each for each in panel.entries if each.required or not {*each.positive_names} & self.rare]
        if shown:
            super().__call__(console, options, panel.copy(entries=shown))


def rare_options() -> frozenset[str]:
    """The options that are `COMMON` nowhere."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for cls in vars(crosslens.config).values():
        if hasattr(cls, "__dataclass_fields__"):
            for name, hint in get_type_hints(cls, include_extras=True).items():
                flag = "model-dtype" if name == "dtype" else name.replace("_", "-")
                names[COMMON in getattr(hint, "__metadata__", ())].add(f"--{flag}")
    return frozenset(names[False] - names[True])


def parse(app: App, words: Sequence[str]) -> partial[Any]:
    """The function that does what the words of a command line ask for.

    Raises:
        UserError: a mistake in them, in one line: the option, the value, what it must be.
    """
    try:
        command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise UserError(_describe(error)) from error
    except UserError as error:
        # the classes speak of fields, and the command line of options
        given = r"(?<![\w./-])([a-z]\w+|k)=('?)([^\s']+)\2"
        spelled = re.sub(given, lambda found: f"--{found[1].replace('_', '-')} {found[3]}", str(error))
        raise UserError(spelled) from error
    return partial(command, *bound.args, **bound.kwargs)


def _describe(error: CycloptsError) -> str:
    argument, cause = error.argument, error.__cause__
    if isinstance(cause, UserError) and argument is not None:
        token, values = argument.tokens[-1], ",".join(each.value for each in argument.tokens)
        where = "" if token.source in ("", "cli") else f"{token.source}: "
        return f"{where}{argument.name} {values} {cause}"
    if isinstance(error, MissingArgumentError) and argument is not None and not argument.tokens:
        assert error.app is not None
        known = {
            each.name: each.parameter.help for each in error.app.assemble_argument_collection(parse_docstring=True)
        }
        about = re.split(r"[.;] ", " ".join(str(known[argument.name]).split()))[0].rstrip(".")
        return f"{argument.name} is missing: {about}"
    error.verbose = False
    return str(error)
