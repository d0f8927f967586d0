"""The format of feature-circuits (Marks et al., arXiv 2403.19647), and of Bayazit et al. (arXiv 2509.05291)."""

from __future__ import annotations

from pathlib import Path

from crosslens.tasks.corpora import FILES, read_items
from crosslens.tasks.declaration import Format, Spelling, check_file
from crosslens.tasks.items import Source

COLUMNS = {"prefix": "clean_prefix", "correct": "clean_answer", "wrong": "patch_answer"}


def read(path: str | Path, name: str | None = None, answers: str = "single") -> Source:
    """A task from a file; see `Task.sva`."""
    return Source(name or Path(path).stem, read_items(Path(path), COLUMNS), answers)


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
            reads="`clean_prefix`, `clean_answer`, `patch_answer`; optionally `patch_prefix`",
        ),
    ),
    keys=tuple(COLUMNS.values()),
    read=read,
    check=check,
)
