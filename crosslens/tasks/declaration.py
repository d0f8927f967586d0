"""What a format of tasks declares about itself.

The module of a format ends with one `FORMAT = Format(...)`: how tasks are written on the command line and in configs,
what is read, and how that is checked. The command line, its `--help`, error messages and the docs read it.

Nothing here imports torch or pandas, so that a wrong task is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosslens.errors import UserError
from crosslens.tasks.items import Source


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way to write a task."""

    text: str
    """As an argument, with the part that varies in capitals: `sva:FILE`."""
    python: str
    """The same in Python, of `crosslens.tasks`."""
    reads: str
    """The columns of a file, or the items that a name stands for; in Markdown."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of tasks."""

    kind: str
    """What stands before the colon; "" for the format of all other arguments."""
    title: str
    """Its name in messages."""
    spellings: tuple[Spelling, ...]
    """All ways to write its tasks."""
    keys: tuple[str, ...] = ()
    """What every row of its files has, if that tells it from other formats."""
    read: Callable[[str], Source]
    """Reads the task that stands behind the colon."""
    check: Callable[[str, str], object]
    """Refuses what cannot be read, without a connection: from what stands behind the colon, and the argument as error
    messages should name it."""

    @property
    def reader(self) -> str:
        """What reads its files, for messages."""
        spelling = next(each for each in self.spellings if each.text.endswith("FILE"))
        return f"--task {spelling.text}, or {spelling.python.partition('(')[0]} in Python"


FORMATS: dict[str, Format] = {}
"""The formats by kind, filled in by `crosslens.tasks.formats`."""


def spellings() -> list[Spelling]:
    """All ways to write a task, those of files without a kind last."""
    return [each for kind in sorted(FORMATS, key=lambda kind: (not kind, kind)) for each in FORMATS[kind].spellings]


def listed() -> str:
    """All ways to write a task, for a message."""
    *others, last = (each.text for each in spellings())
    return f"{', '.join(others)} or {last}"


def check_file(path: str, where: str, known: Sequence[str]) -> Path:
    """The path of a file of a task.

    Args:
        path: what should be a file.
        where: the argument, as the message should name it.
        known: the suffixes that can be read.

    Raises:
        UserError: there is no such file, or it has another suffix.
    """
    if not Path(path).is_file():
        raise UserError(f"{where}: there is no file {path!r}; give {listed()}")
    if Path(path).suffix not in known:
        raise UserError(f"{where} has an unsupported file type: give one of {', '.join(known)}")
    return Path(path)
