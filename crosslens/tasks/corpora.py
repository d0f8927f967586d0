"""Read minimal pairs from files with columns and from the hub; what the formats of tasks have in common.

1. Readers return `Row`s, each with its origin (file and line) for error messages.
2. Makers turn rows into `Item`s. A pair of sentences becomes an item in one of two ways: for one differing token, the
   shared words are the prefix and the words that differ are the answers; for full sentences, the answers are everything
   after the shared words.

Nothing here imports torch, so that a wrong file is refused at once.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from crosslens.errors import UserError, check_regular, did_you_mean, first_line, shortened
from crosslens.tasks.declaration import FORMATS
from crosslens.tasks.items import Item, Source

PLAIN = {"prefix": "prefix", "correct": "correct", "wrong": "wrong"}
GROUP = "group"
"""Column that says which rows are not independent."""
MAX_BYTES = 64 * 2**20
"""Largest file of a task that is read: some 300,000 minimal pairs."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".json", ".ndjson")
FILES = (*_JSON, *_DELIMITERS, ".parquet")
_PUNCTUATION = ".,;:!?\"'»”’)"


class Row(NamedTuple):
    """One row of a source, and its origin."""

    where: str
    values: Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read every row of a file with named columns; the origin is the line or, in a JSON array, the entry.

    Raises:
        UserError: an unknown kind of file, a file that cannot be read, or a row that is not an object.
    """
    if path.suffix not in FILES:
        raise UserError(f"{path} has the unknown suffix {path.suffix!r}: use one of {', '.join(FILES)}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    text = read_text(path)
    rows: list[tuple[str, Any]]
    if path.suffix in _DELIMITERS:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[path.suffix])
        try:
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
        except csv.Error as error:
            raise UserError(f"{path} is not a valid table ({first_line(error)}): fix the file") from error
    elif text.lstrip().startswith("["):
        rows = [(f"{path}, entry {i}", row) for i, row in enumerate(_parsed(text, str(path)), start=1)]
    else:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(where, _parsed(line, where)) for where, line in lines]
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise UserError(
                f"{where}: {shortened(repr(row))} is not a JSON object; use objects with keys such as 'prefix'"
            )
        if None in row:
            raise UserError(f"{where} has more fields than the header: quote fields that contain separators")
    return [Row(*row) for row in rows]


def read_items(path: Path, columns: Mapping[str, str]) -> list[Item]:
    """Read the items of a file by the columns of their parts; errors as in `read_rows` and `make_item`."""
    return [make_item(row, columns) for row in read_rows(path)]


def read_hub(repository: str, config: str | None, split: str = "train") -> list[Row]:
    """Read every row of a split of a dataset on the Hugging Face hub, or in its cache.

    Raises:
        UserError: no such dataset, configuration or split, or no connection.
    """
    import datasets  # takes half a second, and only the hub needs it

    name = repository if config is None else f"{repository} {config}"
    try:
        table: Any = datasets.load_dataset(repository, config, split=split, trust_remote_code=False)
        rows = [dict(row) for row in table]
    except Exception as error:  # datasets raises many kinds of errors and documents none
        if isinstance(error, ValueError) and "Available:" in str(error):
            known = re.findall(r"'([^']+)'", str(error).split("Available:")[-1])
            raise UserError(
                f"{repository} has no configuration {config!r}: it has {len(known)}, such as "
                f"{', '.join(map(repr, known[:3]))}{did_you_mean(config, known)}"
            ) from error
        raise UserError(
            f"{name} (split {split!r}) cannot be read from the hub ({first_line(error)}): check the name and the "
            "connection, or give a local file"
        ) from error
    return [Row(f"{name}, row {i}", row) for i, row in enumerate(rows, start=1)]


def read_text(path: Path) -> str:
    """The text of a file of a task.

    Raises:
        UserError: it cannot be read, is too large, or is not UTF-8.
    """
    check_regular(path, "file of a task", MAX_BYTES)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): give an existing UTF-8 file") from error


def _read_parquet(path: Path) -> list[Row]:
    check_regular(path, "file of a task", MAX_BYTES)
    import pandas as pd  # takes half a second, and only parquet needs it

    try:
        records = pd.read_parquet(path).to_dict("records")
    except Exception as error:  # pyarrow has its own exceptions, and not all are ValueErrors
        raise UserError(f"cannot read {path} ({first_line(error)}): give an existing parquet file") from error
    return [Row(f"{path}, row {i}", {str(k): v for k, v in row.items()}) for i, row in enumerate(records, start=1)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise UserError(f"{where}: not valid JSON ({error}); give one JSON object per line") from error


def make_item(row: Row, columns: Mapping[str, str]) -> Item:
    """Make an item from the columns of its parts; the other columns are its `info`.

    The paired prefix is optional unless the columns name one. The column `group` is the item's group.

    Raises:
        UserError: a column is missing or is not text, or an answer is empty.
    """
    if row.values.get("patch_prefix"):
        columns = {"patch_prefix": "patch_prefix", **columns}
    texts = _texts(row, columns)
    info = {key: value for key, value in row.values.items() if key not in (*columns.values(), GROUP)}
    try:
        return Item(**texts, info=info, group=_group(row))
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error


def make_pair(row: Row, good: str, bad: str, answers: str, by_verb: bool = False) -> Item:
    """Make an item from the columns of a correct and a wrong sentence; see `divide`.

    The column `group` is the item's group; where there is none and `by_verb` is set, the words that differ.

    Raises:
        UserError: a column is missing, or a sentence is empty.
    """
    texts = _texts(row, {"good": good, "bad": bad})
    for key, text in texts.items():
        if not text.strip():
            raise UserError(f"{row.where}: the {key} sentence is empty; give two sentences")
    info = {key: value for key, value in row.values.items() if key not in (good, bad, GROUP)}
    group = _group(row) or (differing_words(texts["good"], texts["bad"]) if by_verb else None)
    return Item(*divide(texts["good"], texts["bad"], answers), info=info, group=group)


def read_pairs(name: str, rows: Sequence[Row], good: str, bad: str, answers: str, by_verb: bool = False) -> Source:
    """A task from the columns of a correct and a wrong sentence; arguments and errors as in `make_pair`."""
    items = [make_pair(row, good, bad, answers, by_verb) for row in rows]
    return Source(name, items, answers, len({(row.values[good], row.values[bad]) for row in rows}))


def differing_words(one: str, other: str) -> str:
    """The words that only one of two texts has, in alphabetical order: of a pair that differs in the number of its
    head noun, that noun in both numbers.
    """
    return " ".join(sorted(set(one.split()) ^ set(other.split())))


def divide(good: str, bad: str, answers: str) -> tuple[str, str, str]:
    """Divide two non-empty sentences into (prefix, correct, wrong).

    The prefix is the words that both begin with. With `answers="multi"` the answers are the rest of each sentence; with
    "single" the words and punctuation marks that both end in are dropped too. Each answer keeps at least one word, even
    if the sentences are equal.
    """
    words = [list(re.finditer(r"\S+", sentence)) for sentence in (good, bad)]
    texts = [[match.group() for match in found] for found in words]
    most = min(map(len, words)) - 1
    shared = min(_n_shared(*texts), most)
    after = 0 if answers == "multi" else min(_n_shared(*(each[::-1] for each in texts)), most - shared)
    correct, wrong = (
        sentence[found[shared].start() : found[len(found) - after - 1].end()]
        for sentence, found in zip((good, bad), words, strict=True)
    )
    if answers == "single":
        while len(correct) > 1 < len(wrong) and correct[-1] == wrong[-1] and correct[-1] in _PUNCTUATION:
            correct, wrong = correct[:-1], wrong[:-1]
    return good[: words[0][shared].start()].rstrip(), correct, wrong


def select(rows: Sequence[Row], key: str, wanted: str) -> list[Row]:
    """The rows whose column `key` is `wanted`.

    Raises:
        UserError: there are none.
    """
    present = sorted({str(row.values.get(key)) for row in rows})
    if wanted not in present:
        raise UserError(f"no row has {key} {wanted!r}: choose one of {_named(present)}{did_you_mean(wanted, present)}")
    return [row for row in rows if str(row.values.get(key)) == wanted]


def existing(path: Path, wanted: str, present: Iterable[str]) -> Path:
    """Return `path` if it is a file; `wanted` and `present` are the name that was given and those that there are.

    Raises:
        UserError: it is not.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give an existing file{did_you_mean(wanted, present)}")
    return path


def _group(row: Row) -> str | None:
    """The column `group` of a row as text; None where it is missing or empty."""
    value = row.values.get(GROUP)
    return None if value is None or value != value or value == "" else str(value)


def _texts(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    for key in columns.values():
        if key not in row.values:
            named = [form for form in FORMATS.values() if form.keys]
            for form in named if any(key in form.keys for form in named) else ():
                if key not in form.keys and all(each in row.values for each in form.keys):
                    raise UserError(
                        f"{row.where}: the key {key!r} is missing; this is the {form.title} format "
                        f"({', '.join(form.keys)}): use {form.reader}"
                    )
            present = _named(row.values)
            raise UserError(
                f"{row.where}: the key {key!r} is missing; present are {present}{did_you_mean(key, row.values)}"
            )
        if not isinstance(row.values[key], str):
            raise UserError(f"{row.where}: the key {key!r} is {shortened(repr(row.values[key]))}; give text")
    return {role: row.values[key] for role, key in columns.items()}


def _named(names: Iterable[Any]) -> str:
    """The first names, for a message."""
    listed = [shortened(repr(name)) for name in islice(names, 21)]
    return ", ".join(listed if len(listed) <= 20 else [*listed[:20], "..."])


def _n_shared(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
