"""What `crosslens ls` prints: the families of models, and the snapshots of one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crosslens import families
from crosslens.families import Revision
from crosslens.hub import is_on_disk, list_revisions
from crosslens.specs import parse_snapshots, parse_steps


def list_families() -> Iterator[str]:
    """A line per family: its sizes, and what its steps are."""
    for name, entry in families.read_table().items():
        yield f"{name}: {', '.join(entry['sizes'])} ({entry['about']})"


def list_snapshots(what: str, steps: str | None = None) -> Iterator[str]:
    """A line per snapshot: label, revision, tokens seen, and whether its weights are on this disk.

    Args:
        what: as `specs.parse_snapshots` takes it.
        steps: of a model of the table, or of a pattern; all when None.

    Raises:
        UserError: no such model, folder, set or step.
    """
    repository, _, pattern = what.partition("@")
    model = None if Path(what).is_dir() else families.match_model(what)
    if model is None and "{step}" in pattern:
        model = families.pattern_model(repository, pattern)
    if model is None:
        for snapshot in parse_snapshots(what, None):
            row = Revision(snapshot.label, snapshot.revision or "", snapshot.step, snapshot.tokens)
            yield _line(row, snapshot.is_on_disk())
        return
    repository = model.repository
    for row in model.revisions(parse_steps(steps or "all"), lambda: list_revisions(repository)):
        yield _line(row, is_on_disk(repository, row.revision))


def _line(row: Revision, here: bool) -> str:
    tokens = "" if row.tokens is None else f"{row.tokens:,} tokens"
    return f"{row.label:>12}  {row.revision:>12}  {tokens:>26}  {'on this disk' if here else 'not on this disk'}"
