"""Files whose columns have the names of an item's parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crosslens.errors import UserError, did_you_mean
from crosslens.tasks.corpora import FILES, PLAIN, read_items
from crosslens.tasks.declaration import Format, Spelling, check_file
from crosslens.tasks.items import Source

_PARTS = (*PLAIN, "patch_prefix")


def read(
    path: str | Path, columns: Mapping[str, str] | None = None, name: str | None = None, answers: str = "single"
) -> Source:
    """A task from a file; see `Task.local`."""
    items = read_items(Path(path), complete_columns(columns))
    return Source(name or Path(path).stem, items, answers)


def complete_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column of each part, where `columns` names those that differ.

    Raises:
        UserError: an unknown part.
    """
    for part in columns or ():
        if part not in _PARTS:
            raise UserError(
                f"columns: {part!r} is not an item's field; use any of {_PARTS}{did_you_mean(part, _PARTS)}"
            )
    return {**PLAIN, **(columns or {})}


FORMAT = Format(
    kind="",
    title="plain",
    spellings=(
        Spelling(
            text="FILE",
            python='Task.local("FILE")',
            reads="`prefix`, `correct`, `wrong`; optionally `patch_prefix`, `group`",
        ),
    ),
    keys=tuple(PLAIN.values()),
    read=read,
    check=lambda path, where: read(check_file(path, where, FILES)),
)
