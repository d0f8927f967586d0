"""Python code that a model or tokenizer brings runs only if the user says so; nobody is asked."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from crosslens.activations import Activations
from crosslens.cli.app import app
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots

HOOK = "blocks.1.hook_resid_post"
CODE = """
from pathlib import Path
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")

class OwnConfig(GPTNeoXConfig):
    model_type = "own"

class OwnModel(GPTNeoXForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists once the code of a snapshot has run."""
    return tmp_path / "has_run"


@pytest.fixture
def models(tiny_snapshots: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Snapshots with a Python file that nothing refers to yet, and a user who answers every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    folder = tmp_path / "models"
    shutil.copytree(tiny_snapshots, folder)
    for path in (*folder.glob("step*"), folder / "tokenizer"):
        (path / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def own_config(models: Path) -> None:
    for path in models.glob("step*"):
        change(path / "config.json", model_type="own", auto_map=CLASSES)
        weights = load_file(path / "model.safetensors")
        weights["lm_head.weight"] = weights.pop("embed_out.weight")  # transformers renames it for its own classes only
        save_file(weights, path / "model.safetensors", {"format": "pt"})


def own_tokenizer(models: Path) -> None:
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "code.OwnTokenizer"]}}
    change(models / "tokenizer" / "tokenizer_config.json", **own)


def own_model(models: Path) -> None:
    """A configuration that transformers knows, of models that do not generate."""
    for path in models.glob("step*"):
        change(path / "config.json", model_type="vit", auto_map={"AutoModelForCausalLM": "code.OwnModel"})


@pytest.mark.parametrize("owned", [own_config, own_tokenizer, own_model])
def test_code_is_refused_without_a_question(models: Path, marker: Path, owned: Callable[[Path], None]) -> None:
    owned(models)
    message = r"snapshot 'step0': .* brings Python code of its own .* --trust-remote-code \(in Python: trust_remote"
    for snapshots in (Snapshots.local(models), Snapshots.of({"step0": models / "step0"})):
        with pytest.raises(UserError, match=message):
            snapshots[0].load("cpu")
        with pytest.raises(UserError):
            snapshots[0].load("cpu", attention="sdpa")
    assert not marker.exists()


def test_what_transformers_knows_is_loaded_without_the_code(models: Path, marker: Path) -> None:
    for path in models.glob("step*"):
        change(path / "config.json", auto_map=CLASSES)
    own = {"auto_map": {"AutoTokenizer": [None, "code.OwnTokenizer"]}}
    change(models / "tokenizer" / "tokenizer_config.json", **own)
    Snapshots.local(models)[0].load("cpu", attention="sdpa")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_that_a_config_names_is_not_fetched(models: Path, tiny_text: list[str], name: str) -> None:
    for path in models.glob("step*"):  # transformers would download the repository and run it
        change(path / "config.json", **{name: "someone/kernel"})
    for trust in (False, True):
        snapshots = Snapshots.local(models, trust_remote_code=trust)
        assert Activations(snapshots, HOOK, tiny_text, 500, 16).plan(measure=False).model_bytes
        snapshots[0].load("cpu", attention="sdpa")


def test_an_adapter_beside_the_weights_is_refused(models: Path) -> None:
    (models / "step10" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(UserError, match=r"snapshot 'step10': .* has an adapter \(adapter_config.json\), .* merge it"):
        Snapshots.local(models).check(HOOK)


def test_trust_is_recorded_and_part_of_the_identity(models: Path, tiny_text: list[str]) -> None:
    plain, trusting = Snapshots.local(models), Snapshots.local(models, trust_remote_code=True)
    assert trusting == plain.trusting_code() != plain and trusting.trusting_code(False) == plain
    assert "trust_remote_code" not in json.dumps(plain.to_dict())
    assert Snapshots.from_dict(plain.to_dict()) == plain and Snapshots.from_dict(trusting.to_dict()) == trusting
    for make in (
        lambda **trust: Snapshots.of({"a": models / "step0"}, **trust),
        lambda **trust: Snapshots.from_hub("someone/model", ["main"], **trust),
    ):
        assert make(trust_remote_code=True)[0].trust_remote_code and not make()[0].trust_remote_code
    ours, theirs = (Activations(each, HOOK, tiny_text, 500, 16) for each in (plain, trusting))
    for name in ("fingerprint", "metadata"):
        assert getattr(theirs, name)() == {**getattr(ours, name)(), "trust_remote_code": True}
        assert "trust_remote_code" not in getattr(ours, name)()


def test_models_whose_code_transformer_lens_would_run(tiny_snapshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslens.snapshots.snapshot.hub_folder", lambda *_: tiny_snapshots / "step0")
    snapshots = Snapshots.from_hub("microsoft/phi-2", ["main"])
    with pytest.raises(UserError, match="for microsoft/phi-2, TransformerLens's HookedTransformer runs Python code"):
        snapshots[0].load("cpu", backend="hooked_transformer")


@pytest.mark.parametrize("verb", ["train", pytest.param("plan", marks=pytest.mark.exhaustive)])
def test_on_the_command_line(models: Path, marker: Path, tmp_path: Path, tiny_text: list[str], verb: str) -> None:
    own_config(models)
    own_tokenizer(models)
    (tmp_path / "text.txt").write_text("\n".join(tiny_text))
    options = ["--snapshots", models, "--hook", HOOK, "--dataset", tmp_path / "text.txt", "--context-size", 16]
    options += ["--n-tokens", 1000, "--device", "cpu"]
    train = ["train", *options, "--d-sae", 20, "--k", 3, "--batch-size", 64, "--run-dir", tmp_path / "run"]
    words = [sys.executable, "-m", "crosslens", *map(str, train if verb == "train" else ["plan", *options])]
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as yes:
        done = subprocess.run(words, stdin=yes.stdout, capture_output=True, text=True, check=False, timeout=120)
        yes.kill()
    assert done.returncode == 2 and "brings Python code of its own" in done.stderr, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr and not marker.exists()
    if verb == "plan":
        return
    app([*map(str, train), "--trust-remote-code"])
    assert marker.exists()
    recorded = RunDir.open(tmp_path / "run").read_json()
    assert all(row["trust_remote_code"] for row in recorded["source"]["snapshots"]["snapshots"])
    assert recorded["identity"]["trust_remote_code"] is True
