"""Files that would make a reader wait forever, or fill the memory, are refused by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import crosslens
from crosslens.errors import MAX_TEXT, UserError, read_json, read_text
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.corpora import MAX_BYTES
from tests.given import of_norms

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights of a crosscoder": ("sae_weights.safetensors", lambda path: crosslens.load(path.parent)),
    "config of a crosscoder": ("cfg.json", lambda path: crosslens.load(path.parent)),
    "task": ("task.jsonl", crosslens.Task.local),
    "table of a task": ("task.parquet", crosslens.Task.local),
    "registry": ("releases.yaml", crosslens.sharing.register_release),
    "manifest of snapshots": ("snapshots.json", lambda path: Snapshots.local(path.parent)),
}


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("what", READERS)
def test_a_pipe_is_refused(tmp_path: Path, what: str):
    import torch

    of_norms(torch.rand(3, 2) + 0.1).save(tmp_path)
    name, read = READERS[what]
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"is not a regular file|holds no crosscoder|no snapshots.json"):
        read(tmp_path / name)


def test_large_files_are_refused_before_they_are_read(tmp_path: Path):
    for name, size, read in (
        ("a.json", MAX_TEXT, lambda path: read_json(path, "config")),
        ("b.txt", MAX_TEXT, lambda path: read_text(path, "text")),
        ("c.jsonl", MAX_BYTES, crosslens.Task.local),
        ("d.parquet", MAX_BYTES, crosslens.Task.local),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size + 1)  # a sparse file
        with pytest.raises(UserError, match=f"it has {size + 1:,} bytes, the limit is {size:,}"):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prefix": ' + "9" * 5000 + "}"])
def test_deep_and_huge_values_are_refused(tmp_path: Path, text: str):
    (tmp_path / "task.jsonl").write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        crosslens.Task.local(tmp_path / "task.jsonl")
