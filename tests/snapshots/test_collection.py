"""Snapshots against plain transformers, on tiny random models in local folders.

`check_offline` and `check_online` need their own Hugging Face home: test_family_models.py and test_hub.py run them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from crosslens.errors import UserError
from crosslens.snapshots import collection as snapshots_module
from crosslens.snapshots.collection import Snapshot, Snapshots, canonical_hook, hook_layer
from crosslens.snapshots.settings import ModelSettings
from crosslens.synthetic import pretraining
from crosslens.synthetic.pretraining import PretrainingConfig
from tests.hub_server import commit_of, revision_folder

WORDS = ["<e>", "<u>", *"abcdefghijklmnop"]
TOKENS = torch.tensor([[0, 3, 5, 7, 2, 9], [0, 11, 4, 4, 6, 17]])


def write_model(folder: Path, seed: int, **changes: Any) -> Path:
    """A random model in the layout of transformers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = GPTNeoXConfig(max_position_embeddings=32, **{"vocab_size": 20, **sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    for parameter in model.parameters():  # biases and norms too, to notice a library that swaps them
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<e>", eos_token="<e>", unk_token="<u>"
    ).save_pretrained(folder)


def as_bin(folder: Path) -> None:
    """Convert the weights to the old format, with the buffers that old files contain."""
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def plain_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three snapshots and one tokenizer; read only."""
    root = tmp_path_factory.mktemp("run")
    for step in (10, 0, 2):
        write_model(root / f"step{step}", seed=step)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------- collections
def test_step_folders_are_taken_by_step(run: Path) -> None:
    snaps = Snapshots.local(run)
    assert snaps.labels == ["step0", "step2", "step10"]
    assert snaps.steps == [0, 2, 10]
    assert snaps.tokens == [None, None, None]
    assert (snaps.d_model, snaps.n_layers, snaps.n_ctx) == (16, 3, 32)
    assert repr(snaps) == f"Snapshots({run.name}: 3 snapshots, step0 ... step10)"
    assert repr(snaps[[1]]) == f"Snapshots({run.name}: 1 snapshot, step2)"


def test_a_manifest_gives_any_names_and_order(copy: Path) -> None:
    (copy / "step10").rename(copy / "first")
    rows: list[dict[str, Any]] = [
        {"label": "a", "path": "first", "step": 1, "tokens": 7},
        {"label": "b", "path": "step0"},
    ]
    (copy / "snapshots.json").write_text(json.dumps({"name": "mine", "snapshots": rows}))
    snaps = Snapshots.local(copy)
    assert (snaps.name, snaps.labels, snaps.steps, snaps.tokens) == ("mine", ["a", "b"], [1, None], [7, None])
    assert snaps[0].name == str(copy / "first")


def test_a_configuration_without_a_vocabulary_is_no_tokenizer(copy: Path) -> None:
    for step in copy.glob("step*"):
        (step / "tokenizer_config.json").write_text("{}")
    assert Snapshots.local(copy).tokenizer("c a p zebra")["input_ids"] == [4, 2, 17, 1]


@pytest.mark.parametrize("place", ["step{}", "tokenizer", "."])
def test_the_tokenizer_is_found_in_each_place(copy: Path, place: str) -> None:
    shutil.rmtree(copy / "tokenizer")
    for step in (0, 2, 10):
        write_tokenizer(copy / place.format(step))
    snaps = Snapshots.local(copy)
    assert snaps.tokenizer("c a p zebra")["input_ids"] == [4, 2, 17, 1]
    assert snaps.tokenizer is snaps.tokenizer
    snaps.check()
    assert snaps[1].load().tokenizer("c")["input_ids"][-1] == 4


def test_indexing(run: Path) -> None:
    snaps = Snapshots.local(run)
    assert [s.label for s in snaps] == snaps.labels
    assert snaps[-1] == snaps[2]
    assert isinstance(snaps[-1], Snapshot)
    assert snaps[[0, 2]].labels == ["step0", "step10"] == snaps[::2].labels
    assert snaps[1:] == snaps[[1, 2]] != snaps[[2, 1]]
    assert snaps[[0]].name == snaps.name
    assert snaps["step10"] == snaps[2] and snaps[["step10", 0]] == snaps[[2, 0]]
    assert snaps.model("step10") is snaps.model(2) is snaps.model(-1)
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"snapshot {index} is not in \[-3, 2\]: there are 3 snapshots, step0, s"):
            _ = snaps[index]
    for ask in (lambda: snaps[[0, 10]], lambda: snaps.model(10)):
        with pytest.raises(IndexError, match="snapshot 10 is not in .*; for step 10 use 'step10'"):
            ask()
    for ask in (lambda: snaps["step1O"], lambda: snaps[["step0", "step1O"]], lambda: snaps.model("step1O")):
        message = "'step1O': there are 3 snapshots, step0, step2, step10; did you mean 'step10'"
        with pytest.raises(UserError, match=message):
            ask()
    with pytest.raises(UserError, match="without snapshots"):
        _ = snaps[3:]
    with pytest.raises(UserError, match="two snapshots have the label 'step0'"):
        _ = snaps[[0, 0]]


def test_a_record_makes_the_same_collection(run: Path) -> None:
    snaps = Snapshots.local(run)[[0, 2]]
    again = Snapshots.from_dict(json.loads(json.dumps(snaps.to_dict())))
    assert again == snaps
    assert again.fingerprints == snaps.fingerprints
    for wrong in ({}, {**snaps.to_dict(), "format": 2}, {**snaps.to_dict(), "snapshots": [{"labels": 1}]}):
        with pytest.raises(UserError, match="not a record of snapshots"):
            Snapshots.from_dict(wrong)


def test_pythia_is_a_table_of_revisions_of_the_hub() -> None:
    snaps = Snapshots.pythia("160m")
    assert repr(snaps) == "Snapshots(pythia-160m: 32 snapshots, step0 ... step143000)"
    snaps = Snapshots.pythia("14m", [512, 0])
    assert snaps[1] == Snapshot("step512", 512, 512 * 2_097_152, "EleutherAI/pythia-14m", "step512")
    hub = Snapshots.from_hub("a/b", ["x", "y"], tokens=[5, None])
    assert (hub.name, hub.labels, hub.steps, hub.tokens) == ("b", ["x", "y"], [None, None], [5, None])
    with pytest.raises(UserError, match="1 steps for 2 revisions"):
        Snapshots.from_hub("a/b", ["x", "y"], steps=[1])
    with pytest.raises(UserError, match=r"revisions='main' is one string: give a list, such as \['main'\]"):
        Snapshots.from_hub("a/b", "main")


def _no_steps(root: Path) -> None:
    for path in root.glob("step*"):
        shutil.rmtree(path)


def _write_rows(root: Path, *rows: dict[str, Any]) -> None:
    (root / "snapshots.json").write_text(json.dumps({"snapshots": rows}))


LOCAL_MISTAKES: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "there is no folder .*run"),
    (_no_steps, "has no sub-folders step0, step1000, ... and no snapshots.json"),
    (lambda root: shutil.rmtree(root / "tokenizer"), "there is no tokenizer in .*step0, "),
    (lambda root: (root / "step2" / "config.json").unlink(), "snapshot 'step2': .*step2 has no config.json"),
    (lambda root: (root / "snapshots.json").write_text("{"), "not a manifest of snapshots .JSONDecodeError"),
    (lambda root: _write_rows(root, {"label": "a"}), "not a manifest of snapshots .KeyError: 'path'"),
    (lambda root: _write_rows(root, {"label": "a", "path": "x"}), "'a': there is no folder .*x: check its path"),
    (lambda root: _write_rows(root, {"label": "a", "path": "x", "step": 1.5}), "step and tokens are whole numbers"),
    (lambda root: (root / "snapshots.json").write_text("[" * 100_000), "not a manifest of snapshots .RecursionError"),
    (lambda root: _write_rows(root, {"label": "a", "path": "x" * 5000}), r"not a manifest of snapshots .*: write"),
]


@pytest.mark.parametrize(("spoil", "message"), LOCAL_MISTAKES)
def test_a_folder_that_is_not_a_run_is_refused(copy: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(copy)
    with pytest.raises(UserError, match=message) as caught:
        Snapshots.local(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_revision_of_a_local_folder_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="local folder, which has no revision 'step0': use Snapshots.local"):
        Snapshots.from_hub(str(run), ["step0", "step2"])


# -------------------------------------------------------------------------------------------------------------- loading
def test_the_bridge_computes_what_transformers_computes(run: Path) -> None:
    snaps = Snapshots.local(run)
    for snapshot in snaps:
        model = snapshot.load()
        torch.testing.assert_close(model(TOKENS), plain_logits(Path(snapshot.name)), atol=1e-5, rtol=0)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    for dtype in (torch.float16, "float16"):
        assert next(snaps[0].load(dtype=dtype).parameters()).dtype == torch.float16


def test_loading_is_silent_and_leaves_no_trace(
    run: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logging.disable(logging.NOTSET)  # an earlier test may have changed it
    transformers_logging.enable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        Snapshots.local(run)[0].load()
        assert warnings.filters == filters
    assert [str(w.message) for w in caught] == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.root.manager.disable == logging.NOTSET
    assert transformers_logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        Snapshots.local(run)[0].load()
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


def test_models_are_kept_if_they_fit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snaps = Snapshots.local(run)
    first, last = snaps.model(0), snaps.model(-1)
    assert snaps.model(0) is first
    assert snaps.model(2, ModelSettings("cpu", batch_tokens=7)) is last
    assert snaps.model(0, ModelSettings(dtype="bfloat16")) is not first
    torch.testing.assert_close(last(TOKENS), plain_logits(run / "step10"), atol=1e-5, rtol=0)

    size = sum(p.numel() * 4 for p in first.parameters())
    monkeypatch.setattr(snapshots_module, "model_memory", lambda _: 3 * size - 1)
    snaps = Snapshots.local(run)
    gone = weakref.ref(snaps.model(0))
    kept = snaps.model(1)
    gc.collect()
    assert gone() is None
    assert snaps.model(1) is kept


def test_an_unavailable_backend_or_device_is_refused(run: Path) -> None:
    snapshot = Snapshots.local(run)[0]
    with pytest.raises(UserError, match="backend='brigde' is unknown: use one of bridge, .*; did you mean 'bridge'"):
        snapshot.load(backend="brigde")
    with pytest.raises(UserError, match="HookedTransformer cannot load .*step0.*use backend='bridge'"):
        snapshot.load(backend="hooked_transformer")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda' needs CUDA"):
            snapshot.load("cuda")


# --------------------------------------------------------------------------------------------------------- fingerprints
def test_a_fingerprint_is_of_the_tensors_not_of_the_files(copy: Path) -> None:
    snapshot = Snapshots.local(copy)[0]
    whole, folder = snapshot.fingerprint, Path(snapshot.name)
    weights = load_file(folder / "model.safetensors")

    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} torch.float32 {tuple(weights[name].shape)}\n".encode())
        digest.update(weights[name].numpy().tobytes())
    assert whole == digest.hexdigest()

    (folder / "model.safetensors").unlink()
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert snapshot.fingerprint == whole
    logits = plain_logits(folder)
    torch.testing.assert_close(snapshot.load()(TOKENS), logits, atol=1e-5, rtol=0)

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="snapshot 'step0': there is no model-00002-of-00002.safetensors in"):
        _ = snapshot.fingerprint

    for file in folder.glob("model*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    as_bin(folder)
    assert snapshot.fingerprint == whole
    torch.testing.assert_close(snapshot.load()(TOKENS), logits, atol=1e-5, rtol=0)


def test_one_changed_number_changes_the_fingerprint(copy: Path) -> None:
    snapshot = Snapshots.local(copy)[0]
    before, path = snapshot.fingerprint, Path(snapshot.name) / "model.safetensors"
    weights = load_file(path)
    weights["gpt_neox.final_layer_norm.bias"][3] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(1, 1))
    assert snapshot.fingerprint != before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


WEIGHT_MISTAKES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: _truncate(folder / "model.safetensors"), "model.safetensors is truncated, damaged.*copy it again"),
    (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), "safetensors is truncated"),
    (lambda folder: (as_bin(folder), _truncate(folder / "pytorch_model.bin")), "pytorch_model.bin is truncated, dama"),
    (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors or pytorch_model.bin in "),
]


@pytest.mark.parametrize(("spoil", "message"), WEIGHT_MISTAKES)
def test_damaged_weights_are_refused(copy: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(copy / "step2")
    snaps = Snapshots.local(copy)
    for attempt in (lambda: snaps.check(), lambda: snaps.model(1), lambda: snaps.fingerprints):
        with pytest.raises(UserError, match="snapshot 'step2': .*" + message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    snaps.check(weights=False)


def test_weights_that_do_not_fit_the_config_are_refused(copy: Path) -> None:
    path = copy / "step0" / "model.safetensors"
    weights = load_file(path)
    del weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="snapshot 'step0': .* is missing 1 tensors, such as gpt_neox.layers.1.mlp.dense_h"
    ):
        Snapshots.local(copy)[0].load()
    shutil.copy(write_model(copy / "wide", 1, hidden_size=32) / "model.safetensors", copy / "step2")
    with pytest.raises(UserError, match="snapshot 'step2': transformers cannot load .*step2: "):
        Snapshots.local(copy)[1].load()
    (copy / "step10" / "config.json").write_text('{"model_type": "unheard"}')
    with pytest.raises(UserError, match="snapshot 'step10': transformers cannot read .*config.json: "):
        Snapshots.local(copy).check()


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 17}, {"hidden_size": {}}, {"rope_parameters": 3}, {"num_attention_heads": 0}]
)
def test_configs_that_no_model_can_have_are_refused(copy: Path, changes: dict[str, Any]) -> None:
    path = copy / "step0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match="snapshot 'step0': transformers cannot read .*config.json: ") as caught:
        Snapshots.local(copy).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Unheard"}}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": {}}'),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(copy: Path, file: str, text: str) -> None:
    (copy / "tokenizer" / file).write_text(text)
    with pytest.raises(UserError, match="snapshot 'step0': transformers cannot read the tokenizer in .*: ") as caught:
        Snapshots.local(copy).check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../step0/model.safetensors", "x" * 5000, 3, "[" * 100_000])
def test_indices_of_weights_that_lead_nowhere_are_refused(copy: Path, name: Any) -> None:
    (copy / "step0" / "model.safetensors").unlink()
    index = copy / "step0" / "model.safetensors.index.json"
    index.write_text(name if name == "[" * 100_000 else json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"model.safetensors.index.json.*(not a path inside|is truncated, damaged)"):
        _ = Snapshots.local(copy)[0].fingerprint


# --------------------------------------------------------------------------------------------------------------- checks
def test_snapshots_that_belong_together_pass(run: Path) -> None:
    snaps = Snapshots.local(run)
    snaps.check()
    snaps.check("blocks.2.hook_resid_post")
    assert len(set(snaps.fingerprints)) == 3


def test_equal_weights_are_refused(copy: Path) -> None:
    shutil.rmtree(copy / "step10")
    shutil.copytree(copy / "step0", copy / "step10")
    as_bin(copy / "step10")
    with pytest.raises(UserError, match="snapshots 'step0' and 'step10' have equal weights"):
        Snapshots.local(copy).check()
    rows = [{"label": "a", "path": "step0"}, {"label": "b", "path": "step2/../step0"}]
    (copy / "snapshots.json").write_text(json.dumps({"snapshots": rows}))
    with pytest.raises(UserError, match="snapshots 'a' and 'b' have equal weights"):
        Snapshots.local(copy).check(weights=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 32}, "differ in width, 16 and 32"), ({"num_hidden_layers": 2}, "differ in depth, 3 and 2")],
)
def test_different_shapes_are_refused(copy: Path, change: dict[str, int], message: str) -> None:
    write_model(copy / "step2", 1, **change)
    (copy / "step10" / "model.safetensors").unlink()  # the configs are enough
    with pytest.raises(UserError, match=f"snapshots 'step0' and 'step2' {message}: take snapshots of one"):
        Snapshots.local(copy).check()


def test_different_tokenizers_are_refused(copy: Path) -> None:
    write_tokenizer(copy / "step10", [*WORDS[:-2], WORDS[-1], WORDS[-2]])
    with pytest.raises(UserError, match="snapshots 'step0' and 'step10' have tokenizers with different vocabularies"):
        Snapshots.local(copy).check()
    write_tokenizer(copy / "step10")
    settings = json.loads((copy / "step10" / "tokenizer_config.json").read_text())
    (copy / "step10" / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    Snapshots.local(copy).check()
    write_tokenizer(copy / "tokenizer", [*WORDS, "x", "y", "z"])
    with pytest.raises(UserError, match="the tokenizer has 21 tokens, the model 20"):
        Snapshots.local(copy).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_pct": 0.5}, "rope_parameters of their configuration"),
        ({"layer_norm_eps": 1e-4}, "layer_norm_eps of their configuration, 1e-05 and 0.0001: take snapshots of one"),
        ({"use_parallel_residual": False}, "use_parallel_residual of their configuration, True and False"),
    ],
)
def test_configurations_that_compute_something_else_are_refused(
    copy: Path, change: dict[str, Any], message: str
) -> None:
    write_model(copy / "step2", 2, **change)
    with pytest.raises(UserError, match=f"snapshots 'step0' and 'step2' differ in {message}") as caught:
        Snapshots.local(copy).check(weights=False)
    assert "\n" not in str(caught.value)


def test_what_only_a_release_or_the_training_writes_may_differ(copy: Path) -> None:
    path = copy / "step2" / "config.json"
    config = json.loads(path.read_text())
    config |= {"transformers_version": "4.0.0", "use_cache": False, "initializer_range": 0.5, "attention_dropout": 0.1}
    config |= {"offset_of_an_older_release": 100}
    path.write_text(json.dumps(config))
    Snapshots.local(copy).check()


def test_weights_that_were_rounded_differently_are_refused(copy: Path) -> None:
    weights = load_file(copy / "step2" / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in weights.items()}
    save_file(halves, copy / "step2" / "model.safetensors", metadata={"format": "pt"})
    snaps = Snapshots.local(copy)
    assert [str(s.stored_dtype) for s in snaps] == ["torch.float32", "torch.float16", "torch.float32"]
    snaps.check(weights=False)
    with pytest.raises(
        UserError, match="'step0' and 'step2' differ in the dtype of their weights, float32 and float16"
    ):
        snaps.check()


def test_whole_and_cut_models_are_kept_apart(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snaps = Snapshots.local(run)
    whole, cut = snaps.model(0), snaps.model(0, n_blocks=1)
    assert (len(whole.blocks), len(cut.blocks)) == (3, 1)
    assert snaps.model(0) is whole and snaps.model(0, n_blocks=1) is cut
    size = sum(p.numel() * 4 for p in cut.parameters())
    monkeypatch.setattr(snapshots_module, "model_memory", lambda _: 3 * size)
    assert snaps.model(1, n_blocks=1) is not cut and snaps.model(0, n_blocks=1) is cut
    assert snaps.model(1) is not whole and snaps.model(0) is not whole  # three whole ones are too many
    snaps.release()
    assert snaps.model(0, n_blocks=1) is not cut


HOOKS = [
    f"blocks.{layer}.{point}"
    for layer in range(3)
    for point in (
        *("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_resid_mid"),
        *("attn.hook_z", "ln2.hook_normalized"),
    )
]


def test_hook_points_are_read_where_the_model_stops(run: Path, copy: Path) -> None:
    write_model(copy / "step2", 2, use_parallel_residual=False)
    parallel, serial = Snapshots.local(run)[[1]], Snapshots.local(copy)[[1]]
    for snaps in (parallel, serial):
        model = snaps.model(0)
        _, whole = model.run_with_cache(TOKENS, return_cache_object=False)
        for hook in HOOKS:
            if hook.endswith("mid") and snaps is parallel:
                assert hook not in whole
                with pytest.raises(UserError, match="run in parallel, so choose 'blocks.*resid_post'"):
                    snaps.check(hook)
                continue
            snaps.check(hook)
            name = canonical_hook(hook)
            out, cache = model.run_with_cache(TOKENS, names_filter=name, stop_at_layer=hook_layer(hook))
            torch.testing.assert_close(cache[name], whole[hook], atol=0, rtol=0)
            # behind the last block the bridge runs on to the logits
            assert out.shape[-1] == (16 if hook_layer(hook) < 3 else 20)
    hidden = AutoModelForCausalLM.from_pretrained(run / "step2")(TOKENS, output_hidden_states=True).hidden_states
    model = parallel.model(0)
    for layer in range(2):
        name = canonical_hook(f"blocks.{layer + 1}.hook_resid_pre")
        assert name == f"blocks.{layer}.hook_resid_post"
        _, cache = model.run_with_cache(TOKENS, names_filter=name, stop_at_layer=layer + 1)
        torch.testing.assert_close(cache[name], hidden[layer + 1], atol=1e-5, rtol=0)


def test_no_more_blocks_run_than_the_hook_point_needs() -> None:
    points = {"hook_resid_pre": 0, "hook_resid_mid": 1, "hook_resid_post": 1, "hook_attn_out": 1, "hook_mlp_out": 1}
    for point, more in points.items():
        assert hook_layer(f"blocks.12.{point}") == 12 + more
    assert hook_layer("blocks.0.hook_resid_pre") == 1
    assert canonical_hook("blocks.0.hook_resid_pre") == "blocks.0.hook_resid_pre"
    assert hook_layer(canonical_hook("blocks.12.hook_resid_pre")) == 12


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.3.hook_resid_post", "has 3 blocks, 0 to 2, so choose for instance 'blocks.1.hook_resid_post'"),
        ("blocks.1.attn.hook_q", "'blocks.1.attn.hook_q' is not supported: .*such as 'blocks.1.hook_resid_post'"),
        ("blocks.1.attn.hook_pattern", "has one number for each pair of positions, .*: choose attn.hook_z"),
        ("blocks.1.hook_mlp_in", "is the residual stream that the MLP's norm reads: choose hook_resid_mid"),
        ("blocks.01.hook_resid_post", "not supported"),
        ("block.1.hook_resid_post", "not supported"),
    ],
)
def test_hook_points_that_do_not_exist_are_refused(run: Path, hook: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Snapshots.local(run).check(hook)
    assert canonical_hook(hook) == hook
    if "3 blocks" not in message:
        with pytest.raises(UserError, match=message):
            hook_layer(hook)


# ----------------------------------------------------------------------------------------------------------------- demo
def test_the_demo_is_made_once_and_again_if_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "cache"))
    recipe = PretrainingConfig(
        n_layers=1, d_model=16, n_heads=2, d_mlp=16, batch_size=2, n_steps=2, warmup_steps=0, snapshot_steps=(0, 2)
    )
    snaps = Snapshots.demo(3, config=recipe)
    assert (snaps.name, snaps.labels, snaps.steps) == ("crosslens-demo-seed3", ["step0", "step2"], [0, 2])
    assert snaps.tokens == [0, 2 * 2 * 48]
    assert Path(snaps[0].name).is_relative_to(tmp_path / "cache")
    snaps.check("blocks.0.hook_resid_post")

    weights = Path(snaps[1].name) / "model.safetensors"
    fingerprints, made = snaps.fingerprints, weights.stat().st_mtime_ns
    assert Snapshots.demo(3, config=recipe) == snaps
    assert weights.stat().st_mtime_ns == made
    _truncate(weights)
    assert Snapshots.demo(3, config=recipe).fingerprints == fingerprints
    assert Snapshots.demo(4, config=recipe).fingerprints != fingerprints

    make = pretraining.pretrain_demo
    monkeypatch.setattr(pretraining, "pretrain_demo", lambda *a, config, **k: make(*a, config=config or recipe, **k))
    last = Snapshots.demo(3, tmp_path / "mine")[[1]]
    written = last.to_dict()
    shutil.rmtree(tmp_path / "mine")
    again = Snapshots.from_dict(json.loads(json.dumps(written)))
    assert again == last
    assert again.fingerprints == fingerprints[1:]
    with pytest.raises(UserError, match="exists and is not the demo of seed 5"):
        Snapshots.demo(5, tmp_path / "mine")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshots_module.cache_folder
    for key, value, expected in [
        ("HOME", "/home/u", "/home/u/.cache/crosslens"),
        ("XDG_CACHE_HOME", "/x", "/x/crosslens"),
        ("CROSSLENS_CACHE", "/own", "/own"),
    ]:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False) if key == "HOME" else None
        monkeypatch.delenv("CROSSLENS_CACHE", raising=False) if key == "HOME" else None
        monkeypatch.setenv(key, value)
        assert folder() == Path(expected)


# --------------------------------------------------------------------------- the hub, for programs of other test files
PYTHIA = "EleutherAI/pythia-14m"


def write_hub(hub: Path) -> None:
    """A hub cache: Pythia at three steps, one in the old format and without tokenizer, and one without weights."""

    folder = partial(revision_folder, hub)
    for seed, (repo, revision) in enumerate(
        [(PYTHIA, "main"), (PYTHIA, "step0"), (PYTHIA, "step512"), (PYTHIA, "step1000"), ("some/other", "main")]
    ):
        write_model(folder(repo, revision), seed)
        write_tokenizer(folder(repo, revision))
    as_bin(folder(PYTHIA, "step512"))
    for file in folder(PYTHIA, "step512").glob("*token*"):
        file.unlink()
    write_model(folder(PYTHIA, "step1"), 5)
    (folder(PYTHIA, "step1") / "model.safetensors").unlink()


def check_offline(home: Path) -> None:
    folders = {rev: home / "hub" / "models--EleutherAI--pythia-14m" / "snapshots" / commit_of(rev) for rev in REVISIONS}
    snaps = Snapshots.pythia("14m", [0, 512, 1000])
    snaps.check("blocks.1.hook_resid_post")
    assert len(set(snaps.fingerprints)) == 3
    assert Snapshots.from_dict(snaps.to_dict()) == snaps
    for i, snapshot in enumerate(snaps):
        assert snapshot.revision is not None
        expected = plain_logits(folders[snapshot.revision])
        caches: list[Any] = []
        for backend in ("bridge", "hooked_transformer"):
            model = snaps.model(i, ModelSettings(backend=backend))
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            logits, cache = model.run_with_cache(TOKENS)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            caches.append(cache)
        for hook in HOOKS:
            if not hook.endswith("mid"):
                torch.testing.assert_close(caches[0][hook], caches[1][hook], atol=1e-4, rtol=0)

    other = Snapshots.from_hub("some/other", ["main"])
    other.check()
    refused(
        lambda: other.model(0, ModelSettings(backend="hooked_transformer")),
        "snapshot 'main': HookedTransformer cannot load some/other, only hub repositories that TransformerLens knows "
        "by name: use backend='bridge'",
    )
    refused(
        lambda: Snapshots.pythia("14m", [0, 2]).check(),
        f"snapshot 'step2': {PYTHIA}@step2 is not in the local cache and HF_HUB_OFFLINE is set: "
        f"run `hf download {PYTHIA} --revision step2` once without it",
    )
    refused(lambda: Snapshots.from_hub("no/such", ["main"]).d_model, "snapshot 'main': no/such@main is not in the")
    refused(lambda: Snapshots.from_hub("a b/c", ["x"]).d_model, "snapshot 'x': 'a b/c' is not the name of a repository")
    weightless = Snapshots.from_hub(PYTHIA, ["step1"])
    assert weightless.n_layers == 3
    refused(
        weightless.check,
        f"snapshot 'step1': there is no model.safetensors or pytorch_model.bin in {folders['step1']}: "
        "the repository has none, or HF_HUB_OFFLINE is set",
    )
    same = Snapshots.from_hub(PYTHIA, ["step0", commit_of("step0")])
    refused(lambda: same.check(weights=False), f"snapshots 'step0' and '{commit_of('step0')}' have equal weights")
    (folders["step0"] / "model.safetensors").write_bytes(b"cut")
    refused(
        lambda: snaps[0].fingerprint,
        f"snapshot 'step0': {folders['step0']}/model.safetensors is truncated, damaged or not a weight file: run "
        f"`hf download {PYTHIA} --revision step0 --force-download`",
    )
    Path(PYTHIA).mkdir(parents=True)
    refused(lambda: Snapshots.pythia("14m", [0]), f"'{PYTHIA}' is a local folder, which has no revision 'step0'")


REVISIONS = ("main", "step0", "step1", "step512", "step1000")


def check_online() -> None:
    snaps = Snapshots.pythia("14m", [0, 512, 1000])
    assert snaps.n_layers == 3
    assert len(set(snaps.fingerprints)) == 3
    snaps.check()
    assert snaps.tokenizer("c a")["input_ids"] == [4, 2]
    for repo, revision, message in [
        (
            PYTHIA,
            "step7",
            f"snapshot 'step7': {PYTHIA} has no revision 'step7': the nearest are step1 and step0",
        ),
        ("no/such", "main", "snapshot 'main': there is no repository 'no/such' on the hub: check its spelling"),
        ("gated/model", "main", "snapshot 'main': gated/model@main is gated: accept its terms on huggingface.co"),
    ]:
        refused(lambda r=repo, v=revision: Snapshots.from_hub(r, [v]).d_model, message)
    weightless = Snapshots.from_hub(PYTHIA, ["step1"])
    refused(weightless.check, "snapshot 'step1': there is no model.safetensors or pytorch_model.bin in")


def refused(attempt: Callable[[], Any], message: str) -> None:
    try:
        attempt()
    except UserError as error:
        assert str(error).startswith(message), f"{error}\nwhere expected was\n{message}"
        assert "\n" not in str(error)
    else:
        raise AssertionError(f"nothing was refused: {message}")
