"""BLiMP (Warstadt et al. 2020): pairs of sentences, with the parts of an item where the paradigm allows it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crosslens.errors import UserError
from crosslens.tasks.corpora import FILES, Row, differing_words, existing, make_item, make_pair, read_hub, read_rows
from crosslens.tasks.declaration import Format, Spelling, check_file, listed
from crosslens.tasks.items import Item, Source, check_answers

_SENTENCES = ("sentence_good", "sentence_bad")
_PARTS = {"prefix": "one_prefix_prefix", "correct": "one_prefix_word_good", "wrong": "one_prefix_word_bad"}


def read(uid_or_path: str | Path, folder: str | Path | None = None, answers: str | None = None) -> Source:
    """A paradigm from a file, from `<uid>.jsonl` in a folder, or from the hub; see `Task.blimp`."""
    check_answers(answers or "single")
    path = Path(uid_or_path)
    name = path.stem if path.suffix in FILES else str(uid_or_path)
    if folder is not None:
        file = Path(folder) / f"{uid_or_path}.jsonl"
        path = existing(file, str(uid_or_path), (each.stem for each in Path(folder).glob("*.jsonl")))
    rows = read_rows(path) if path.suffix in FILES else read_hub("nyu-mll/blimp", str(uid_or_path))
    return Source(name, *_items(rows, answers, by_verb="subject_verb_agreement" in name))


def _items(rows: Sequence[Row], answers: str | None, by_verb: bool) -> tuple[list[Item], str]:
    """Items of a paradigm, and how to score their answers: "multi" unless it has the one-prefix method."""
    # a csv has the strings True and False
    elsewhere = next((row for row in rows if str(row.values.get("one_prefix_method")).lower() == "false"), None)
    if elsewhere is not None and answers == "single":
        raise UserError(
            f"{elsewhere.where}: {elsewhere.values.get('UID', 'this paradigm')!r} does not have the one-prefix method: "
            "what follows the word that differs decides which is right, so only full sentences can be compared, by "
            "Task.accuracy (leave answers out); for attribution choose a paradigm with one_prefix_method"
        )
    answers = answers or ("single" if elsewhere is None else "multi")
    if answers == "multi":
        return [make_pair(row, *_SENTENCES, answers, by_verb) for row in rows], answers
    # rows on the hub have only the sentences
    items = [
        make_pair(row, *_SENTENCES, answers, by_verb) if _PARTS["prefix"] not in row.values else make_item(row, _PARTS)
        for row in rows
    ]
    if by_verb:
        items = [replace(item, group=item.group or differing_words(item.correct, item.wrong)) for item in items]
    return items, answers


def _check(rest: str, where: str) -> None:
    if Path(rest).suffix in FILES:
        read(check_file(rest, where, FILES))
    elif not re.fullmatch(r"\w+", rest):
        raise UserError(f"{where} does not name a paradigm: give {listed()}")


FORMAT = Format(
    kind="blimp",
    title="BLiMP",
    spellings=(
        Spelling(text="blimp:UID", python='Task.blimp("UID")', reads="a paradigm of BLiMP, from the hub"),
        Spelling(
            text="blimp:FILE",
            python='Task.blimp("FILE")',
            reads="`sentence_good`, `sentence_bad`; for paradigms of the one-prefix method also its columns",
        ),
    ),
    keys=_SENTENCES,
    read=read,
    check=_check,
)
