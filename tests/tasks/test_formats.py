"""Formats of tasks: what they declare, what the page about tasks says of them, and reading them by their spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crosslens.errors import UserError
from crosslens.tasks import Task, formats
from crosslens.tasks.declaration import FORMATS

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
FILES = {"": "plain.jsonl", "sva": "sva.jsonl", "ioi": "ioi.jsonl", "blimp": "blimp.jsonl", "clams": "clams.txt"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A file of each format, with the lines that the page shows."""
    shown = dict(re.findall(r"^(plain|SVA, IOI|BLiMP) +(\{.*\})$", PAGE, re.M))
    lines = {"": shown["plain"], "sva": shown["SVA, IOI"], "ioi": shown["SVA, IOI"], "blimp": shown["BLiMP"]}
    lines["clams"] = "\n".join(re.findall(r"(?:True|False)\t.*", PAGE))
    for kind, name in FILES.items():
        (tmp_path / name).write_text(lines[kind], encoding="utf-8")
    return tmp_path


def test_the_page_has_every_spelling_with_what_it_reads():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
    for spelling in formats.spellings():
        row = next(row for row in rows if f"`{spelling.text}`" in row)
        assert spelling.reads in row, spelling.text
        assert any(cell.startswith(f"`{spelling.python}`") for cell in row), spelling.text


def test_every_format_of_the_page_is_declared():
    on_page = set(re.findall(r"\| `((?:\w+:)?[\w]+)` \| `Task", PAGE))
    assert on_page == {spelling.text for spelling in formats.spellings()}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_checked_and_read_by_its_spelling(kind: str, files: Path):
    path = files / FILES[kind]
    spec = f"{kind}:{path}" if kind else str(path)
    assert formats.check(spec) == spec
    task = Task.parse(spec)
    assert task == getattr(Task, kind or "local")(path) and len(task) == 1
    assert task.name == path.stem


def test_names_are_checked_and_read_by_their_spelling():
    for spec, wanted in {"ioi": Task.ioi(), "demo:pp": Task.demo("pp")}.items():
        assert formats.check(spec) == spec and Task.parse(spec) == wanted
    for spec in ("blimp:regular_plural", "multiblimp:fra", "multiblimp:fra:SV-#"):
        assert formats.check(spec) == spec  # without looking at the hub


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.jsonl", "X 'nothing.jsonl': there is no file 'nothing.jsonl'; give blimp:UID, .*sva:FILE or FILE"),
        ("sva:", "X 'sva:': there is no file ''; give"),
        ("clams:{}/plain.jsonl", "X 'clams:.*' has an unsupported file type: give one of .txt"),
        ("blimp:a b", "X 'blimp:a b' does not name a paradigm"),
        ("multiblimp:French", "X 'multiblimp:French' does not name a language, such as fra"),
        ("demo:simpel", "X 'demo:simpel' is unknown: use demo: and one of .*did you mean 'simple'"),
        ("{}/sva.jsonl", "this is the SVA format .*: use --task sva:FILE, or Task.sva in Python"),
        ("sva:{}/plain.jsonl", "this is the plain format .*: use --task FILE, or Task.local in Python"),
        ("sva:{}/blimp.jsonl", "this is the BLiMP format .*: use --task blimp:FILE, or Task.blimp in Python"),
    ],
)
def test_what_cannot_be_read_is_refused(spec: str, message: str, files: Path):
    with pytest.raises(UserError, match=message):
        formats.check(spec.format(files), "X")


def test_kinds_are_what_stands_before_the_colon():
    for kind, form in FORMATS.items():
        assert form.kind == kind
        assert all(spelling.text.partition(":")[0] == (kind or "FILE") for spelling in form.spellings)
