"""Progress bars that suit where they are read: a terminal, a notebook or a log file.

`tqdm` is that of tqdm.auto. Where stderr is neither a terminal nor a notebook, such as `2> train.log`, a bar is one
plain line every 30 s, shared by all bars, and ends without a word: bars that redraw themselves with carriage returns
fill such files.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.asyncio import tqdm as plain
from tqdm.auto import tqdm as automatic

from crosslens.errors import visible

EVERY = 30.0  # seconds between two lines, over all bars of the process
_IN_NOTEBOOK = automatic is not plain


class tqdm(automatic):
    """tqdm, with lines in place of a bar where there is no terminal. Arguments and errors are tqdm's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not _IN_NOTEBOOK and options.get("file") is None and not sys.stderr.isatty():
            options |= {"file": _Lines(), "position": 0}  # a nested bar writes no codes that move the cursor
        super().__init__(*args, **options)


class _Lines:
    """What a bar writes, as lines on stderr."""

    written = time.monotonic()  # of the class: short commands write nothing

    def write(self, text: str) -> None:
        line = text.strip()
        if line and time.monotonic() - _Lines.written >= EVERY:
            _Lines.written = time.monotonic()
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def say(words: str) -> None:
    """Write a line to the terminal without breaking a progress bar; control characters as their codes."""
    tqdm.write(visible(words), file=sys.stderr)
