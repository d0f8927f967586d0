"""The formats of tasks, one module each: what is read, how it is written as an argument, and the check of that.

A module of this folder ends with the declaration `FORMAT` (`crosslens.tasks.declaration`); nothing else needs to name
it. `check` takes milliseconds for a small file, because nothing here imports torch or pandas.
"""

from __future__ import annotations

import importlib
import pkgutil

from crosslens.tasks.declaration import FORMATS, Format
from crosslens.tasks.declaration import spellings as spellings
from crosslens.tasks.items import Source

for _found in pkgutil.iter_modules(__path__):
    _format: Format = importlib.import_module(f"{__name__}.{_found.name}").FORMAT
    FORMATS[_format.kind] = _format


def check(spec: str, option: str = "--task") -> str:
    """Return a task as it was written, such as `sva:FILE`, if it can be read.

    Args:
        spec: the task.
        option: what messages call it.

    Raises:
        UserError: no such file, a file of another format, or an unknown name; what needs the hub is not looked up.
    """
    form, rest = _divided(spec)
    form.check(rest, f"{option} {spec!r}")
    return spec


def read(spec: str) -> Source:
    """Read the task that is written as `spec`; `Task.parse` makes it a `Task`.

    Raises:
        UserError: it cannot be read.
    """
    form, rest = _divided(spec)
    return form.read(rest)


def _divided(spec: str) -> tuple[Format, str]:
    """The format of a task, and what it is to read."""
    kind, _, rest = spec.partition(":")
    return (FORMATS[kind], rest) if kind and kind in FORMATS else (FORMATS[""], spec)
