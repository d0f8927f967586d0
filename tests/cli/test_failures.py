"""Every failure is one line with a remedy and an exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from crosslens.cli.failures import explain
from crosslens.errors import UserError


def caught(cause: BaseException) -> BaseException:
    try:
        try:
            raise cause
        except BaseException as error:
            raise RuntimeError("of a library") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (UserError("k=0 is too small"), "k=0 is too small", 2),
        (caught(UserError("k=0 is too small")), "k=0 is too small", 2),
        (FloatingPointError("the loss is nan"), "the loss is nan", 3),
        (OSError(errno.ENOSPC, "x", "/a/b"), "/a/b: No space left on device; free some disk space", 4),
        (caught(OSError(errno.ENOSPC, "x")), "No space left on device; free", 4),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device; free", 4),
        (PermissionError(errno.EACCES, "x", "/a"), "/a: Permission denied; choose a place", 2),
        (OSError(errno.ENAMETOOLONG, "x", "/a"), "/a: File name too long; choose a shorter name", 2),
        (OSError(errno.EROFS, "x", "/a"), "/a: Read-only file system; the file system is read-only", 4),
        (MemoryError(), r"out of memory \(MemoryError\); `crosslens plan`", 4),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "out of memory", 4),
        (RuntimeError("CUDA error: an illegal memory access"), "the device failed", 4),
        (CheckpointException("write", {0: (OSError(errno.ENOSPC, "x"), [])}), "No space left on device; free", 4),  # type: ignore[dict-item]
        (
            UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"),
            r"^'a\\udcff' has half of a character, '\\udcff', which is no text: remove it$",
            2,
        ),
        (KeyError("some key"), r"failed unexpectedly \(KeyError: 'some key'\); .* --debug", 3),
    ],
)
def test_failures_are_explained(error: BaseException, words: str, code: int):
    import re

    found = explain(error)
    assert re.search(words, found[0]) and found[1] == code


def test_real_errors_of_the_libraries_are_recognised(tmp_path: Path):
    """Writing beyond a limit on the size of files fails as a full disk does."""
    program = (
        "import resource, signal, sys, torch\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from crosslens.cli.failures import explain\n"
        "from crosslens.rundir import RunDir\n"
        "import pandas as pd\n"
        "def table(): RunDir('run').save_table('own/x', pd.DataFrame({'x': torch.rand(9000).numpy()}))\n"
        "def weights():\n"
        "    from tests.given import of_norms\n"
        "    of_norms(torch.rand(500, 3) + 1).save('crosscoder')\n"
        "for write in (table, weights):\n"
        "    try: write()\n"
        "    except BaseException as error: print(*explain(error), sep=' | ')\n"
        "    else: print('written')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("File too large" in line and line.endswith("| 4") for line in lines), done


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "crosslens", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_a_traceback_is_shown_only_on_request(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"source": {"settings": {}}}')
    (tmp_path / "crosscoder").mkdir()
    (tmp_path / "crosscoder" / "cfg.json").write_text("{}")
    (tmp_path / "crosscoder" / "sae_weights.safetensors").write_bytes(b"x")
    plain = command("evolve", tmp_path)
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1 and plain.stderr.startswith("crosslens: ")
    debug = command("evolve", tmp_path, "--debug")
    assert debug.returncode == 2 and "Traceback" in debug.stderr
    assert debug.stderr.splitlines()[-1] == plain.stderr.strip()


def test_a_reader_that_has_ended_is_no_failure() -> None:
    command = [sys.executable, "-m", "crosslens", "ls", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before a byte is written
        assert process.stderr.read() == b"" and process.wait() == 1
