"""Agreement in the demo's language (`crosslens.synthetic.grammar`)."""

from __future__ import annotations

from crosslens.errors import UserError, did_you_mean
from crosslens.synthetic import grammar
from crosslens.tasks.corpora import PLAIN, Row, make_item
from crosslens.tasks.declaration import Format, Spelling
from crosslens.tasks.items import Source


def read(construction: str, language: str | None = None, n: int = 200, seed: int = 0) -> Source:
    """A construction in one language or in both; see `Task.demo`."""
    languages = grammar.LANGUAGES if language is None else (language,)
    name = construction if language is None else f"{construction}-{language}"
    rows = [row for each in languages for row in grammar.pairs(construction, each, n, seed)]
    return Source(name, [make_item(Row(f"task {name!r}, item {i}", row), PLAIN) for i, row in enumerate(rows)])


def _check(construction: str, where: str) -> None:
    known = grammar.CONSTRUCTIONS
    if construction not in known:
        raise UserError(
            f"{where} is unknown: use demo: and one of {', '.join(known)}{did_you_mean(construction, known)}"
        )


FORMAT = Format(
    kind="demo",
    title="demo",
    spellings=(
        Spelling(
            text="demo:simple",
            python='Task.demo("simple")',
            reads="the demo's language; also `pp`, `subj_rel`, `obj_rel`, `within_rc`",
        ),
    ),
    read=read,
    check=_check,
)
