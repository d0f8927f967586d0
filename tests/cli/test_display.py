"""Tables on terminals of several widths and in pipes, and values as strict JSON."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from crosslens.cli.display import Column, Output, counted, measured, number, percent, size, to_json
from crosslens.snapshots.families import Revision
from tests.given import CONTROL, controls

PROGRAM = """
from crosslens.cli.display import Column, Output
out = Output()
columns = [Column("snapshot"), Column("long name of a column", drop=2), Column("interval", drop=1),
           Column("words", left=True)]
rows = [(f"step{10**i}", str(i), "[-0.10, +0.20]", "one two [three] four five six seven eight") for i in range(3)]
out.table(columns, rows, title="a title", note="a note")
out.table(columns, rows, title="a title", note="a note", bare=True)
"""


def on_terminal(width: int) -> list[str]:
    """The lines that a terminal of this width shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    hidden = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    env = {**{name: value for name, value in os.environ.items() if name not in hidden}, "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, env=env, cwd=Path(__file__).parents[2]) as p:
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the program has ended
                break
            if not part:
                break
            text += part
    os.close(ours)
    assert p.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.decode())
    return [line.rstrip() for line in plain.splitlines()]


@pytest.mark.parametrize(("width", "left_out"), [(120, []), (80, ["long name of a column"]), (50, None)])
def test_a_table_fits_the_terminal(width: int, left_out: list[str] | None) -> None:
    lines = on_terminal(width)
    assert max(map(len, lines)) <= width
    assert lines[0] == "a title" and "─" * 20 in lines[2]
    head = lines[1]
    note = " ".join(lines).partition("no room for ")[2].partition(":")[0]
    if left_out is None:  # both, and the words are folded
        assert note == "long name of a column, interval"
        assert not any("one two [three] four five six seven eight" in line for line in lines)
    else:
        assert note == ", ".join(left_out)
        assert ("long name" in head) == (not left_out) and "interval" in head
        assert any("one two [three] four five six seven eight" in line for line in lines)


def test_a_table_in_a_pipe_is_plain_text() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert done.stdout.isascii() and "\x1b" not in done.stdout
    assert lines[0] == "a title" and lines[5] == "a note" and len(lines) == 6 + 3
    assert lines[1] == "snapshot  long name of a column        interval  words"
    assert lines[2] == "   step1                      0  [-0.10, +0.20]  one two [three] four five six seven eight"
    assert [line.split()[0] for line in lines[6:]] == ["step1", "step10", "step100"]


def test_one_object_on_stdout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = Output(as_json=True)
    out.say("an announcement")
    out.table([], [])
    out.end(value=1)
    told = capsys.readouterr()
    assert json.loads(told.out) == {"value": 1} and told.err == "an announcement\n"
    monkeypatch.setenv("RANK", "1")  # of torchrun
    monkeypatch.setenv("WORLD_SIZE", "2")
    other = Output(as_json=True)
    other.say("an announcement")
    other.end(value=1)
    assert capsys.readouterr() == ("", "")


def test_control_characters_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A label or token could otherwise rename the window, clear the screen, or turn text around."""
    out = Output()
    out.say("a\x1b]0;owned\x07b\u202egnp.exe\x9b31m c\td\n")
    out.table([Column("label\x1b[2J")], [["\x1b[2J"]], title="\u2067t")
    said = capsys.readouterr().out
    assert r"a\u001b]0;owned\u0007b\u202egnp.exe\u009b31m c" in said and "\td\n" in said
    assert said.count(r"\u001b[2J") == 2 and r"\u2067t" in said  # some columns are named after snapshots


def test_values_as_json() -> None:
    table = pd.DataFrame({"a": [1.5, math.nan], "b": pd.array([None, 2], dtype="Int64"), "c": ["x", None]})
    found = to_json(
        {
            "table": table,
            "missing": [math.nan, math.inf, -math.inf, pd.NA, pd.NaT, None],
            "numbers": [np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor([1.0, math.nan])],
            "row": Revision("step0", "main", None, 7),
            4: Path("a/b"),
        }
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "table": [{"a": 1.5, "b": None, "c": "x"}, {"a": None, "b": 2, "c": None}],
        "missing": [None] * 6,
        "numbers": [0.5, 3, True, [1.0, None]],
        "row": ["step0", "main", None, 7],
        "4": "a/b",
    }
    assert all(value is None for value in found["missing"])


def test_numbers_have_the_digits_that_they_deserve() -> None:
    assert measured(5.0412, 0.15443, sign=True) == "+5.04 ± 0.15"
    assert measured(-123.4, 27.1) == "-123 ± 27"
    assert measured(0.012345, 0.00067) == "0.01235 ± 0.00067"
    assert measured(1.5, math.nan) == "1.500" and measured(1.5, 0.0) == "1.500 ± 0.000"
    assert (number(math.nan), number(None), number(pd.NA), percent(math.nan)) == ("-",) * 4
    assert (percent(0.1234), number(-0.5, 2, sign=True)) == ("12.3%", "-0.50")
    assert [size(n) for n in (7, 2048, 1_500_000, 3 * 2**30)] == ["7 B", "2 KiB", "1.43 MiB", "3 GiB"]
    assert size(1_023_600) == "1000 KiB"
    assert [counted(n, "table") for n in (0, 1, 1234)] == ["0 tables", "1 table", "1,234 tables"]


@pytest.mark.parametrize("text", CONTROL.values(), ids=CONTROL)
def test_control_characters_are_shown_as_their_codes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.say(f"said {text}")
    out.table([Column(f"at {text}"), Column("token", left=True)], [(text, repr(text))], title=text, note=text)
    shown = capsys.readouterr().out
    assert not controls(shown) and shown.count("\\u") >= 5
    Output(as_json=True).end(label=text, **{text: [text, {"token": "ü 👩\u200d💻"}]})
    shown = capsys.readouterr().out
    assert not controls(shown) and "ü 👩\u200d💻" in shown
    assert json.loads(shown) == {"label": text, text: [text, {"token": "ü 👩\u200d💻"}]}


def test_a_line_break_in_a_cell_begins_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table([Column("feature", left=True), Column("n")], [("3 plural\ncrosslens: deleted\tall", "1")])
    assert capsys.readouterr().out.splitlines()[1:] == ["3 plural\\ncrosslens: deleted\\tall  1"]
