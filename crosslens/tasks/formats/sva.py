"""The format of feature-circuits (Marks et al., arXiv 2403.19647), and of Bayazit et al. (arXiv 2509.05291)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from crosslens.tasks.corpora import FILES, Row, differing_words, make_item, read_rows
from crosslens.tasks.declaration import Format, Spelling, check_file
from crosslens.tasks.items import Item, Source

COLUMNS = {"prefix": "clean_prefix", "correct": "clean_answer", "wrong": "patch_answer"}


def read(path: str | Path, name: str | None = None, answers: str = "single") -> Source:
    """A task from a file; see `Task.sva`."""
    return Source(name or Path(path).stem, [_item(row) for row in read_rows(Path(path))], answers)


def _item(row: Row) -> Item:
    """An item; the words in which its prefixes differ, the head noun in both numbers, are its group."""
    item = make_item(row, COLUMNS)
    if item.group is not None or item.patch_prefix is None:
        return item
    return replace(item, group=differing_words(item.prefix, item.patch_prefix))


def check(path: str, where: str) -> None:
    """Refuse a file that cannot be read; `where` is the argument in messages."""
    read(check_file(path, where, FILES))


FORMAT = Format(
    kind="sva",
    title="SVA",
    spellings=(
        Spelling(
            text="sva:FILE",
            python='Task.sva("FILE")',
            reads="`clean_prefix`, `clean_answer`, `patch_answer`; optionally `patch_prefix`, `group`",
        ),
    ),
    keys=tuple(COLUMNS.values()),
    read=read,
    check=check,
)
