"""Every failure is one line with a remedy and an exit code."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from crosslens.cli.app import main
from crosslens.cli.failures import explain
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from tests.given import of_norms


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


def test_real_errors_of_the_libraries_are_recognised(tmp_path: Path) -> None:
    """Writing beyond a limit on the size of files fails as a full disk does."""
    run, crosscoder = RunDir(tmp_path / "run"), of_norms(torch.rand(500, 3) + 1)
    table = pd.DataFrame({"x": torch.rand(9000).numpy()})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    found: list[tuple[str, int]] = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        for write in (lambda: run.save_table("own/x", table), lambda: crosscoder.save(tmp_path / "crosscoder")):
            with pytest.raises(Exception) as failed:
                write()
            found.append(explain(failed.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all("File too large" in told and code == 4 for told, code in found) and len(found) == 2, found


def test_a_traceback_is_shown_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text('{"source": {"settings": {}}}')
    (tmp_path / "crosscoder").mkdir()
    (tmp_path / "crosscoder" / "cfg.json").write_text("{}")
    (tmp_path / "crosscoder" / "sae_weights.safetensors").write_bytes(b"x")
    told: list[str] = []
    for options in ([], ["--debug"]):
        monkeypatch.setattr(sys, "argv", ["crosslens", "evolve", str(tmp_path), *options])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        told.append(capsys.readouterr().err)
    plain, debug = told
    assert plain.count("\n") == 1 and plain.startswith("crosslens: ")
    assert "Traceback" in debug and debug.splitlines()[-1] == plain.strip()


def test_a_reader_that_has_ended_is_no_failure() -> None:
    command = [sys.executable, "-m", "crosslens", "ls", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before a byte is written
        assert process.stderr.read() == b"" and process.wait() == 1
