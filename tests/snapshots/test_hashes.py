"""Checksums of weights are computed once, for all processes, and again when a file changes."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from crosslens.snapshots import hashes, snapshot, weights
from crosslens.snapshots.collection import Snapshots


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How often weights were hashed; as in a new process, nothing is in this one's memory."""
    calls: list[int] = []
    compute = weights.hash_tensors.__wrapped__

    def hash_tensors(files: object) -> str:
        calls.append(1)
        return compute(files)

    monkeypatch.setattr(snapshot, "hash_tensors", hash_tensors)
    monkeypatch.setattr(hashes, "SMALLEST", 0)
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "mine"))
    return calls


def aged(folder: Path) -> Path:
    """The weights of a model that was written before the clock's last tick."""
    time.sleep(2 * hashes._SETTLED)
    return folder / "model.safetensors"


def test_a_checksum_is_computed_once_and_again_after_a_change(
    tiny_snapshots: Path, tmp_path: Path, counted: list[int]
) -> None:
    run = Path(shutil.copytree(tiny_snapshots, tmp_path / "run"))
    file = aged(run / "step10")
    first = Snapshots.local(run)[1].fingerprint
    assert Snapshots.local(run)[1].fingerprint == first and len(counted) == 1
    assert not [path for path in run.rglob("*") if "hash" in path.name]  # nothing is written beside the weights
    stat, tensors = file.stat(), load_file(file)
    tensors["gpt_neox.embed_in.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time of the contents as before
    assert file.stat().st_size == stat.st_size
    aged(run / "step10")
    changed = Snapshots.local(run)[1].fingerprint
    assert changed != first and len(counted) == 2
    assert Snapshots.local(run)[1].fingerprint == changed and len(counted) == 2


def test_weights_of_this_moment_are_not_remembered(
    tiny_snapshots: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(tiny_snapshots, tmp_path / "run"))
    monkeypatch.setattr(hashes, "_SETTLED", 1e6)
    for n in (1, 2):
        _ = Snapshots.local(run)[0].fingerprint
        assert len(counted) == n


def test_damaged_records_and_folders_that_cannot_be_written(
    tiny_snapshots: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(tiny_snapshots, tmp_path / "run"))
    aged(run / "step0")
    found = Snapshots.local(run)[0].fingerprint
    (record,) = (tmp_path / "mine" / "hashes").iterdir()
    changed = json.loads(record.read_text()) | {"sha256": "0" * 64}
    for text in ("", "[]", '{"sha256": "x"}', '{"sha256": "x", "files": []}', json.dumps(changed), "[" * 100_000):
        record.write_text(text)
        counted.clear()
        assert Snapshots.local(run)[0].fingerprint == found and len(counted) == 1
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "file"))
    assert Snapshots.local(run)[0].fingerprint == found
    assert (tmp_path / "file").read_text() == "not a folder"


def test_small_weights_are_hashed_each_time(tiny_snapshots: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashes, "SMALLEST", 4 << 20)
    for n in (1, 2):
        _ = Snapshots.local(tiny_snapshots)[0].fingerprint
        assert len(counted) == n
