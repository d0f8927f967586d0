"""`UserError`, for mistakes that a user can fix; readers of small files, which raise it for any defect; a checksum.

An error is one line with the value, the valid range and the remedy. Files that others wrote are read within limits,
parsed safely, and never lead out of the folder they were found in. Nothing here imports torch, so that a wrong file is
refused before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import json
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_TEXT = 16 * 2**20
"""Bytes of the largest text file that is read; the config of a crosscoder over 1,000 snapshots takes a 64th of it."""
MAX_NAME = 100
"""Bytes of the longest name that becomes part of a file name."""
_DEPTH = 12
_DIRECTIONS = {*"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
_SUFFIXES = (".curves", ".last", ".snapshots", ".summary")  # of the tables beside that of a task


class UserError(ValueError):
    """An invalid request.

    The message is one line that names the value, the valid range and the remedy. The command line prints it without a
    traceback and exits with code 2.
    """


def did_you_mean(value: object, options: Iterable[object]) -> str:
    """A clause for the end of a message that names the option closest to `value`, or an empty string."""
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    return f"; did you mean {shortened(repr(close[0]))}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(value: object) -> str:
    """A value as text of at most 60 characters, for messages."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def visible(text: str) -> str:
    """Text in which control characters, and those that change the direction of writing, are written as their codes.

    A label or token could otherwise move the cursor of a terminal, rename its window, begin another line, or show words
    in another order. Tabs and line breaks of ASCII stay. JSON stays JSON, and of the same values.
    """
    if text.isprintable():
        return text
    return "".join(f"\\u{ord(c):04x}" if c in _DIRECTIONS or (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160
                   else c for c in text)  # fmt: skip


def check_characters(text: str, what: str) -> str:
    """Return a text, if all of it is characters.

    Args:
        text: the text.
        what: what it is, for the message.

    Raises:
        UserError: a surrogate has no partner. JSON and the command line may hold half of a character, which no file and
            no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} {half(error)}") from error
    return text


def half(error: UnicodeEncodeError) -> str:
    """The end of a message that a text has half of a character; what is around it is shown."""
    around = ascii(error.object[max(0, error.start - 25) : error.start + 25])
    return f"{around} has half of a character, {ascii(error.object[error.start])}, which is no text: remove it"


def read_text(path: Path, what: str) -> str:
    """Read a small UTF-8 text file; `what` says in messages what it should have been.

    Raises:
        UserError: the file is missing, too large, not a regular file, or not UTF-8.
    """
    try:
        check_regular(path, what, MAX_TEXT)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a valid {what}: it is not UTF-8 text; download it again") from error
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shortened(path)} cannot be read as {what}: {brief(error)}; check the path") from error


def check_regular(path: Path, what: str, limit: int | None = None) -> None:
    """Refuse what is there but cannot be read as a file: a pipe, for which a reader would wait forever, or a device.

    Args:
        path: file to read; whatever is missing or a folder fails when it is opened.
        what: what it should be, for the message.
        limit: largest size in bytes.

    Raises:
        UserError: it is a special file, or larger than `limit`.
    """
    status = path.stat() if path.exists() else None
    if status is None or stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a valid {what}: it is not a regular file")
    if limit is not None and status.st_size > limit:
        raise UserError(f"{path} is not a valid {what}: it has {status.st_size:,} bytes, the limit is {limit:,}")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    text = read_text(path, what)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({brief(error)}); download or write it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a valid {what}: it contains a {type(found).__name__} instead of an object")
    return found


def json_checksum(contents: Any) -> str:
    """The XXH3 of contents as JSON reads them back: the same before they are written and after they are read."""
    import xxhash  # not where only a message is needed

    return xxhash.xxh3_64_hexdigest(json.dumps(json.loads(json.dumps(contents)), sort_keys=True).encode())


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """Read a YAML mapping with the safe loader; aliases are refused, because they can expand without limit.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    import yaml  # only registries are YAML

    text = read_text(path, what)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{path} uses a YAML alias (*{shortened(event.anchor)}): write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH:
                raise UserError(f"{path} is not a valid {what}: it is nested deeper than {_DEPTH} levels")
        found = yaml.safe_load(text)
    except UserError:
        raise
    # the loader lets the errors of dates, numbers and keys through
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{path} is not valid YAML ({brief(error)}); correct it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a valid {what}: it contains a {type(found).__name__} instead of a mapping")
    return found


def inside(root: Path, name: str, what: str) -> Path:
    """The path `name` below `root`.

    Raises:
        UserError: `name` is absolute, or leaves `root` through ".." or a link.
    """
    place = root / name if _is_plain(name) else None
    if place is None or not place.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{what} {shortened(name)!r} is not below its folder: give a relative path without '..'")
    return place


def check_inside(name: str, what: str) -> str:
    """Return `name` if it is a plain relative path, as in a repository on the hub.

    Raises:
        UserError: the path is absolute, or has a part such as "..".
    """
    if not _is_plain(name):
        raise UserError(f"{what} {shortened(name)!r} is not a path inside a repository: give one without '..' and '\\'")
    return name


def check_file_name(name: str, what: str) -> str:
    """A name that can be part of a file name on every system, in Unicode's composed form (NFC).

    Args:
        name: the name.
        what: what has the name, for the message.

    Raises:
        UserError: it is empty, too long, reserved, or has characters that file names cannot have.
    """
    name = unicodedata.normalize("NFC", name)
    wrong = sorted({c for c in name if c in '/\\<>:"|?*' or ord(c) < 32 or visible(c) != c})
    if wrong:
        raise UserError(f"{what} {shortened(repr(name))} is used in file names: remove {' '.join(map(repr, wrong))}")
    if not name or name.strip(" .") != name:
        raise UserError(f"{what} {name!r} is used in file names: it must not be empty, or begin or end with ' ' or '.'")
    if len(name.encode()) > MAX_NAME:
        raise UserError(
            f"{what} {shortened(repr(name))} has {len(name.encode())} bytes, and is used in file names: give a name of "
            f"at most {MAX_NAME}"
        )
    if name.lower() in _RESERVED or name.lower().endswith(_SUFFIXES):
        raise UserError(f"{what} {name!r} is reserved in file names: choose another one")
    return name


def brief(error: BaseException) -> str:
    """What an error says, in one line of at most 240 characters: it may quote the file at any length."""
    line = first_line(error)
    return line if len(line) <= 240 else line[:237] + "..."


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return not ({"", ".", ".."} & set(parts) or set("\\:\0") & set(name) or any(ord(c) < 32 for c in name))
