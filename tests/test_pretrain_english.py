"""`scripts/pretrain_english.py` at toy size: what it writes, and that a killed training goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import crosslens as cl

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "pretrain_english.py"
TOY = shlex.split("--layers 2 --d-model 32 --heads 2 --vocab-size 400 --context-size 32 --batch-size 8 --eval-rows 16")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_english", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of several lines, separated by blank lines."""
    rng, words = random.Random(0), shlex.split("the a dog dogs cat cats sees see that near house and runs run .")
    documents = ["\n".join(" ".join(rng.choices(words, k=12)) for _ in range(4)) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


def command(text: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--text", str(text), "--out", str(out), *TOY, *options]


def run(text: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(text, out, *options), capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_every_tenth_document_is_held_out(script: ModuleType, text: Path) -> None:
    documents = script.read_documents(text)
    training, held_out = script.split_documents(documents)
    assert len(documents) == 300 and len(held_out) == 30
    assert held_out == documents[9::10] and sorted(training + held_out) == sorted(documents)


def test_rows_begin_with_the_token_that_separates_documents(script: ModuleType, text: Path) -> None:
    documents = script.read_documents(text)[:40]
    tokenizer = script.train_tokenizer(documents, 300)
    assert len(tokenizer) <= 300 and tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    rows = script.pack(documents, tokenizer, 32)
    assert rows.shape[1] == 32 and rows[:, 0].eq(0).all()
    read = tokenizer.decode(rows[:, 1:].flatten())
    assert "".join(documents).startswith(read.replace("<|endoftext|>", "")) and read.count("<|endoftext|>") > 20


@pytest.mark.exhaustive
def test_a_killed_training_goes_on(text: Path, tmp_path: Path) -> None:
    options = shlex.split("--steps 300 --snapshots log:8 --checkpoint-every 20")
    assert run(text, tmp_path / "whole", *options).returncode == 0
    process = subprocess.Popen(
        command(text, tmp_path / "killed", *options),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment(),
    )
    while process.poll() is None and not (tmp_path / "killed/checkpoints/checkpoint-60/trainer_state.json").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed/step300").exists()
    assert run(text, tmp_path / "killed", *options).returncode == 0

    whole, killed = (cl.Snapshots.local(tmp_path / name) for name in ("whole", "killed"))
    assert whole.steps == killed.steps == [0, 1, 4, 11, 25, 58, 132, 300]
    assert [each.tokens for each in killed] == [(step or 0) * 8 * 32 for step in whole.steps]
    for a, b in zip(whole, killed, strict=True):
        first, second = (load_file(each.folder() / "model.safetensors") for each in (a, b))
        assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads((tmp_path / name / "pretraining.json").read_text()) for name in ("whole", "killed")]
    assert records[0] == records[1]
    assert [point["step"] for point in records[0]["curve"]] == whole.steps
    assert records[0]["curve"][0]["held_out"] > 5.5 > 3.5 > records[0]["curve"][-1]["held_out"]
    assert records[0]["curve"][-1]["train"] < 3.5

    other = run(text, tmp_path / "whole", "--steps", "200")
    assert other.returncode and "holds a training with steps=300, snapshots=log:8" in other.stderr
