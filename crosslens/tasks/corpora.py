"""Read minimal pairs from their sources: files with columns, the hub, CLAMS, BLiMP and MultiBLiMP.

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
from crosslens.tasks.items import Item

PLAIN = {"prefix": "prefix", "correct": "correct", "wrong": "wrong"}
SVA = {"prefix": "clean_prefix", "correct": "clean_answer", "wrong": "patch_answer"}
FORMATS = {
    "plain": (tuple(PLAIN.values()), "--task FILE, or Task.local in Python"),
    "SVA": (tuple(SVA.values()), "--task sva:FILE, or Task.sva in Python"),
    "BLiMP": (("sentence_good", "sentence_bad"), "--task blimp:FILE, or Task.blimp in Python"),
}
"""The keys that every row of a file has, by format, and what reads it."""
_KEYS = {key for keys, _ in FORMATS.values() for key in keys}
_BLIMP = {"prefix": "one_prefix_prefix", "correct": "one_prefix_word_good", "wrong": "one_prefix_word_bad"}
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
    text = _read_text(path)
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


def read_clams(path: Path, capitalise: bool, end: str, info: Mapping[str, str]) -> list[Row]:
    """Rows of `good` and `bad` from a raw CLAMS file: lines of `True|False<TAB>sentence`, in pairs.

    Sentences are capitalised on request and get `end` appended; rows also have the columns of `info`.

    Raises:
        UserError: the file cannot be read, a line has another format, or both lines of a pair are right or wrong.
    """
    lines = [(i, line.strip()) for i, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    sentences: list[tuple[int, str, str]] = []
    for number, line in lines:
        verdict, _, sentence = line.partition("\t")
        if verdict not in ("True", "False") or not sentence.strip():
            raise UserError(
                f"{path}, line {number}: {shortened(repr(line))} is not 'True' or 'False', a tab, and a sentence"
            )
        sentence = sentence.strip() + end
        sentences.append((number, verdict, sentence[0].upper() + sentence[1:] if capitalise else sentence))
    if len(sentences) % 2:
        raise UserError(
            f"{path} has {len(sentences)} sentences, an odd number: give pairs of a correct and a wrong one"
        )
    rows: list[Row] = []
    for (number, verdict, sentence), (other_number, *other) in zip(sentences[::2], sentences[1::2], strict=True):
        found = {verdict: sentence, other[0]: other[1]}
        if len(found) == 1:
            raise UserError(f"{path}, lines {number} and {other_number} are both {verdict}: pairs must be adjacent")
        rows.append(Row(f"{path}, line {number}", {"good": found["True"], "bad": found["False"], **info}))
    return rows


def _read_text(path: Path) -> str:
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

    The paired prefix is optional unless the columns name one.

    Raises:
        UserError: a column is missing or is not text, or an answer is empty.
    """
    if row.values.get("patch_prefix"):
        columns = {"patch_prefix": "patch_prefix", **columns}
    texts = _texts(row, columns)
    info = {key: value for key, value in row.values.items() if key not in columns.values()}
    try:
        return Item(**texts, info=info)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error


def make_pair(row: Row, good: str, bad: str, answers: str) -> Item:
    """Make an item from the columns of a correct and a wrong sentence; see `divide`.

    Raises:
        UserError: a column is missing, or a sentence is empty.
    """
    texts = _texts(row, {"good": good, "bad": bad})
    for key, text in texts.items():
        if not text.strip():
            raise UserError(f"{row.where}: the {key} sentence is empty; give two sentences")
    info = {key: value for key, value in row.values.items() if key not in (good, bad)}
    return Item(*divide(texts["good"], texts["bad"], answers), info=info)


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


def blimp_items(rows: Sequence[Row], answers: str | None) -> tuple[list[Item], str]:
    """Items of a BLiMP paradigm, and how to score their answers: "multi" unless it has the one-prefix method.

    Raises:
        UserError: "single" is requested for a paradigm without the one-prefix method, or a key is missing.
    """
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
        return [make_pair(row, "sentence_good", "sentence_bad", answers) for row in rows], answers
    # rows on the hub have only the sentences
    return [
        make_pair(row, "sentence_good", "sentence_bad", answers)
        if _BLIMP["prefix"] not in row.values
        else make_item(row, _BLIMP)
        for row in rows
    ], answers


def select(rows: Sequence[Row], key: str, wanted: str) -> list[Row]:
    """The rows whose column `key` is `wanted`.

    Raises:
        UserError: there are none.
    """
    present = sorted({str(row.values.get(key)) for row in rows})
    if wanted not in present:
        raise UserError(f"no row has {key} {wanted!r}: choose one of {_named(present)}{did_you_mean(wanted, present)}")
    return [row for row in rows if str(row.values.get(key)) == wanted]


def multiblimp_rows(language: str, path: str | Path | None) -> list[Row]:
    """Rows of one language of MultiBLiMP: from the hub, a folder with `<language>/data.tsv`, or a file.

    Raises:
        UserError: no such language, or a file that cannot be read.
    """
    if path is None:
        rows = read_hub("jumelet/multiblimp", language)
    elif Path(path).is_dir():
        file = _existing(Path(path) / language / "data.tsv", language, (each.name for each in Path(path).glob("*")))
        rows = read_rows(file)
    else:
        rows = read_rows(Path(path))
        column = next((name for name in ("language", "lang") if rows and name in rows[0].values), None)
        rows = rows if column is None else select(rows, column, language)
    return [Row(row.where, {"language": language, **row.values}) for row in rows]


def clams_file(language: str, case: str | None, folder: str | Path | None) -> Path:
    """Path of a CLAMS evaluation set: `<folder>/<language>_evalset/<case>.txt`.

    Raises:
        UserError: it does not exist.
    """
    if folder is None or case is None:
        raise UserError(
            f"CLAMS {language!r}, {case!r}: the evaluation sets are not on the hub: clone "
            "github.com/aaronmueller/clams and give a language, a case and the folder, such as "
            "clams('fr', 'simple_agrmt', 'clams'), or a .txt file"
        )
    cases = Path(folder) / f"{language}_evalset"
    if not cases.is_dir():
        present = [each.name.removesuffix("_evalset") for each in sorted(Path(folder).glob("*_evalset"))]
        raise UserError(
            f"{folder} has no {cases.name}: give one of its languages {present}{did_you_mean(language, present)}"
        )
    return _existing(cases / f"{case}.txt", case, (each.stem for each in cases.glob("*.txt")))


def blimp_rows(uid_or_path: str | Path, folder: str | Path | None) -> list[Row]:
    """Rows of a BLiMP paradigm: from a file, from `<uid>.jsonl` in a folder, or from the hub.

    Raises:
        UserError: no such file or paradigm.
    """
    path = Path(uid_or_path)
    if folder is not None:
        file = Path(folder) / f"{uid_or_path}.jsonl"
        path = _existing(file, str(uid_or_path), (each.stem for each in Path(folder).glob("*.jsonl")))
    return read_rows(path) if path.suffix in FILES else read_hub("nyu-mll/blimp", str(uid_or_path))


def _existing(path: Path, wanted: str, present: Iterable[str]) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist: give an existing file{did_you_mean(wanted, present)}")
    return path


def _texts(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    for key in columns.values():
        if key not in row.values:
            for name, (keys, reader) in FORMATS.items():
                if key in _KEYS.difference(keys) and all(each in row.values for each in keys):
                    raise UserError(
                        f"{row.where}: the key {key!r} is missing; this is the {name} format ({', '.join(keys)}): "
                        f"use {reader}"
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
