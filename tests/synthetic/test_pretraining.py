"""The demo's pretraining: reproducible, complete or absent, and described by its manifest."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from crosslens.errors import UserError
from crosslens.sharing.registry import EMBEDDED
from crosslens.synthetic import grammar, pretraining
from crosslens.synthetic.pretraining import PretrainingConfig, demo_is_intact, demo_tokenizer, fine_tune, pretrain_demo

TINY = PretrainingConfig(
    n_layers=1, d_model=16, n_heads=2, d_mlp=32, context_size=16, batch_size=4, n_steps=6, warmup_steps=2,
    snapshot_steps=(0, 3, 6),
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain_demo(tmp_path_factory.mktemp("demo") / "seed0", 0, config=TINY, progress=False)


def _weights(folder: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted(folder.glob("*/model.safetensors"))}


def test_the_manifest_lists_every_file(demo: Path):
    manifest = json.loads((demo / "snapshots.json").read_text())
    assert manifest["format"] == 2 and manifest["name"] == "crosslens-demo-seed0" and manifest["seed"] == 0
    assert manifest["snapshots"] == [
        {"label": f"step{step}", "path": f"step{step}", "step": step, "tokens": step * 4 * 16} for step in (0, 3, 6)
    ]
    assert manifest["config"]["d_model"] == 16 and manifest["config"]["snapshot_steps"] == [0, 3, 6]
    present = {p.relative_to(demo).as_posix() for p in demo.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == present - {"snapshots.json"}
    assert {f"step{step}/model.safetensors" for step in (0, 3, 6)} <= present
    assert [p.name for p in demo.parent.iterdir()] == ["seed0"]  # nothing temporary left


def test_snapshots_load_with_transformers(demo: Path):
    tokenizer = AutoTokenizer.from_pretrained(demo / "step0")
    tokens = torch.tensor([[0, *tokenizer.encode("the king near the cars")]])
    logits = {}
    for step in (0, 3, 6):
        model = AutoModelForCausalLM.from_pretrained(demo / f"step{step}")
        assert isinstance(model, GPTNeoXForCausalLM) and model.dtype == torch.float32
        assert model.config.architectures == ["GPTNeoXForCausalLM"]
        assert model.config._attn_implementation == "sdpa"
        logits[step] = model(tokens).logits
        assert logits[step].shape == (1, 6, len(tokenizer)) and bool(logits[step].isfinite().all())
        names = set(load_file(demo / f"step{step}" / "model.safetensors"))
        assert {"embed_out.weight", "gpt_neox.embed_in.weight"} <= names  # as in every release of transformers
    assert not torch.equal(logits[0], logits[3]) and not torch.equal(logits[3], logits[6])


def test_same_seed_same_bytes_and_another_seed_another_model(demo: Path, tmp_path: Path):
    state = torch.random.get_rng_state()
    torch.rand(3)  # the global generator is not used ...
    torch.random.set_rng_state(state)
    again = _weights(pretrain_demo(tmp_path / "again", 0, config=TINY, progress=False))
    assert torch.equal(torch.random.get_rng_state(), state)  # ... or advanced
    assert again == _weights(demo) and len(set(again.values())) == 3
    other = _weights(pretrain_demo(tmp_path / "other", 1, config=TINY, progress=False))
    assert all(other[step] != again[step] for step in again)


def test_the_snapshot_steps_do_not_change_the_training(demo: Path, tmp_path: Path):
    config = dataclasses.replace(TINY, snapshot_steps=(1, 6))
    folder = pretrain_demo(tmp_path / "demo", 0, config=config, progress=False)
    assert _weights(folder)["step6"] == _weights(demo)["step6"]


def test_training_is_adamw_on_the_next_word(demo: Path):
    """Compare with transformers' own loss, torch's unfused AdamW and torch's own schedules."""
    tokenizer = demo_tokenizer()
    rows: list[list[int]] = []
    row = ""
    for document in grammar.documents(200, seed=0):
        row += " <|endoftext|> " + document
        ids = tokenizer.encode(row)
        if len(ids) >= TINY.context_size:
            rows.append(ids[: TINY.context_size])
            row = ""
    model = AutoModelForCausalLM.from_pretrained(demo / "step0").train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TINY.lr, betas=(0.9, 0.95), weight_decay=TINY.weight_decay, foreach=False
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=TINY.n_steps - TINY.warmup_steps, eta_min=TINY.lr * TINY.final_lr_fraction
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[TINY.warmup_steps])
    for step in range(TINY.n_steps):
        tokens = torch.tensor(rows[step * TINY.batch_size : (step + 1) * TINY.batch_size])
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    start = AutoModelForCausalLM.from_pretrained(demo / "step0").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(demo / "step6").state_dict()
    reference = model.state_dict()
    assert set(trained) == set(reference)
    for name, value in trained.items():
        if name.endswith("query_key_value.bias"):
            # a vector added to all keys leaves attention unchanged: Adam amplifies a gradient of pure rounding error
            heads = (TINY.n_heads, 3, TINY.d_model // TINY.n_heads)
            value.view(heads)[:, 1] = reference[name].view(heads)[:, 1]
        torch.testing.assert_close(value, reference[name], atol=2e-6, rtol=1e-4)
    embedding = "gpt_neox.embed_in.weight"
    assert (trained[embedding] - start[embedding]).abs().max() > 1e-3  # far more than the tolerance


def test_learning_rate_at_the_corners():
    config = dataclasses.replace(TINY, n_steps=110, warmup_steps=10, snapshot_steps=(110,), final_lr_fraction=0.1)
    assert [pretraining._lr_factor(step, config) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert math.isclose(pretraining._lr_factor(60, config), 0.55)
    assert math.isclose(pretraining._lr_factor(110, config), 0.1)


def test_tokenizer_has_one_id_per_word(demo: Path):
    words = grammar.vocabulary()
    for tokenizer in (demo_tokenizer(), *map(AutoTokenizer.from_pretrained, sorted(demo.glob("step*")))):
        assert len(tokenizer) == len(words) + 2
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
        assert tokenizer.bos_token == "<|endoftext|>" and tokenizer.unk_token_id == 1
        assert tokenizer.encode(" ".join(words)) == list(range(2, len(words) + 2))
        assert tokenizer.encode("the zebra") == [tokenizer.encode("the")[0], 1]
        assert tokenizer.encode("<|endoftext|> the") == [0, tokenizer.encode("the")[0]]
        document = next(grammar.documents(1, seed=9))
        assert tokenizer.decode(tokenizer.encode(document)) == document


def test_intact_means_the_same_bytes_and_recipe(demo: Path, tmp_path: Path):
    assert demo_is_intact(demo, 0, TINY)
    assert not demo_is_intact(demo, 1, TINY) and not demo_is_intact(demo, 0)
    assert not demo_is_intact(demo, 0, dataclasses.replace(TINY, lr=1e-3))
    assert not demo_is_intact(tmp_path / "absent", 0, TINY)

    folder = shutil.copytree(demo, tmp_path / "demo")
    for name in ("step3/model.safetensors", "step6/config.json", "step0/tokenizer.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not demo_is_intact(folder, 0, TINY), name
        (folder / name).unlink()
        assert not demo_is_intact(folder, 0, TINY), name
        (folder / name).write_bytes(whole)
        assert demo_is_intact(folder, 0, TINY)
    for manifest in ("", "[]", "{}", '{"files": 3}', "\x00"):
        (folder / "snapshots.json").write_text(manifest)
        assert not demo_is_intact(folder, 0, TINY), manifest


def test_another_language_is_another_recipe(demo: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar, "_SUBJECT_MODIFIERS", (1.0, 0.0, 0.0, 0.0))
    assert not demo_is_intact(demo, 0, TINY)


def test_an_intact_folder_is_kept_and_any_other_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "a" / "demo"
    folder.mkdir(parents=True)  # an empty folder may be used
    pretrain_demo(folder, 0, config=TINY, progress=False)
    written = (folder / "snapshots.json").stat().st_mtime_ns

    other = dataclasses.replace(TINY, n_steps=3, snapshot_steps=(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_train", None)  # neither of these computes anything
        assert pretrain_demo(folder, 0, config=TINY, progress=False) == folder
        assert (folder / "snapshots.json").stat().st_mtime_ns == written
        with pytest.raises(UserError, match="not the demo of seed 0 with this recipe: .*overwrite=True$"):
            pretrain_demo(folder, 0, config=other)
    assert demo_is_intact(folder, 0, TINY)
    pretrain_demo(folder, 0, config=other, overwrite=True, progress=False)
    assert demo_is_intact(folder, 0, other) and not (folder / "step6").exists()


def test_a_failing_run_leaves_what_was_there(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(*args: object):
        yield 0, AutoModelForCausalLM.from_pretrained(demo / "step0")
        raise RuntimeError(f"power cut {len(args)}")

    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    monkeypatch.setattr(pretraining, "_train", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain_demo(folder, 0, config=TINY, overwrite=True, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["demo"] and (folder / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_faster_process_is_no_error(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool):
    """Two processes fill the same folder; the second to finish finds it complete and leaves it alone."""
    folder, train = tmp_path / "demo", pretraining._train
    if overwrite:
        shutil.copytree(demo / "step0", folder)  # something else, which is to be replaced

    def overtaken(seed: int, config: PretrainingConfig, progress: bool):
        yield from train(seed, config, progress)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(demo, folder)
        (folder / "by the other").touch()

    monkeypatch.setattr(pretraining, "_train", overtaken)
    assert pretrain_demo(folder, 0, config=TINY, overwrite=overwrite, progress=False) == folder
    assert demo_is_intact(folder, 0, TINY) and (folder / "by the other").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 0}, "n_layers=0 is too small"),
        ({"context_size": 1}, "context_size=1 is too small"),
        ({"d_model": 18, "n_heads": 4}, "d_model=18 does not split into 4 heads .* multiple of 8"),
        ({"d_model": 12, "n_heads": 4}, "d_model=12 does not split into 4 heads of even width"),
        ({"warmup_steps": 7}, "warmup_steps=7 is outside 0 to n_steps=6"),
        ({"lr": 0.0}, "lr=0.0 is too small"),
        ({"snapshot_steps": ()}, r"snapshot_steps=\(\) must rise"),
        ({"snapshot_steps": (3, 0, 6)}, "must rise from 0 or more to n_steps=6"),
        ({"snapshot_steps": (0, 3)}, "must rise from 0 or more to n_steps=6"),
    ],
)
def test_impossible_recipes_are_refused(change: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_the_default_recipe_has_a_middle_block_and_starts_at_zero():
    config = PretrainingConfig()
    assert config.n_layers == 3 and config.d_model == 128 and config.snapshot_steps[0] == 0
    assert 13 <= len(config.snapshot_steps) <= 15


@pytest.mark.exhaustive
def test_a_killed_run_leaves_no_folder(tmp_path: Path):
    folder = tmp_path / "demo"
    code = f"from crosslens.synthetic.pretraining import pretrain_demo; pretrain_demo({str(folder)!r}, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".demo.partial-*/step0/model.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not folder.exists() and not demo_is_intact(folder)
    pretrain_demo(folder, 0, config=TINY, progress=False)  # the next run still works
    assert demo_is_intact(folder, 0, TINY)


@pytest.mark.parametrize("pretrained", ["release", pytest.param("here", marks=pytest.mark.exhaustive)])
def test_simple_agreement_is_learnt_first_and_attractors_later(tmp_path: Path, pretrained: str):
    """The released snapshots are half as wide, and made by scripts/make_release.py."""
    if pretrained == "here":
        folder, n = pretrain_demo(tmp_path / "demo", 0, progress=False), 200
    else:
        folder, n = EMBEDDED.parent / "releases" / "demo" / "snapshots", 100
    tokenizer = demo_tokenizer()
    curves: dict[tuple[str, str], list[float]] = {}
    for step in sorted(int(each.name.removeprefix("step")) for each in folder.glob("step*")):
        model = AutoModelForCausalLM.from_pretrained(folder / f"step{step}", dtype=torch.float32).eval()
        for construction in ("simple", "pp", "subj_rel"):
            for language in grammar.LANGUAGES:
                items = grammar.pairs(construction, language, n, seed=11)
                tokens = torch.tensor([[0, *tokenizer.encode(item["prefix"])] for item in items])
                with torch.no_grad():
                    logits = model(tokens).logits[:, -1]
                correct, wrong = (
                    torch.tensor([tokenizer.encode(item[key]) for item in items]) for key in ("correct", "wrong")
                )
                accuracy = (logits.gather(1, correct) > logits.gather(1, wrong)).float().mean().item()
                curves.setdefault((construction, language), []).append(accuracy)
    assert sum(curve[0] for curve in curves.values()) / len(curves) <= 0.6
    for (construction, language), curve in curves.items():
        assert curve[-1] >= 0.95
        if construction != "simple":
            assert min(curve[1:-1]) < 0.4  # the nearest noun comes first
            simple = curves["simple", language]
            first = [next(i for i, value in enumerate(c) if value >= 0.9) for c in (simple, curve)]
            assert first[0] < first[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuning_makes_a_copy_that_knows_the_new_documents(demo: Path, dtype: torch.dtype):
    model: Any = AutoModelForCausalLM.from_pretrained(demo / "step6", dtype=dtype).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    texts = [" ".join(["today", "the", "king", "sleep", "."] * 4)] * 200
    tuned = fine_tune(model, texts, 20, lr=1e-2, batch_size=4)
    assert all(torch.equal(p, before[name]) and p.dtype == dtype for name, p in model.named_parameters())
    assert model.training and not tuned.training and tuned.dtype == torch.float32

    def loss(which: torch.nn.Module) -> float:
        tokens = torch.tensor([[0, *demo_tokenizer()(texts[0])["input_ids"]]])[:, :16]
        with torch.no_grad():
            logits = which(tokens).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits[0].float(), tokens[0, 1:]))

    assert loss(tuned) < 0.8 * loss(model)
    again = fine_tune(model, iter(texts), 20, lr=1e-2, batch_size=4)
    assert all(torch.equal(p, q) for p, q in zip(tuned.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="the documents end after 2 of n_steps=20 steps: give more documents"):
        fine_tune(model, texts[:10], 20, batch_size=4)
