"""Activations are what the models compute, every kept position once per epoch, in an order that can be continued."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import crosslens.progress
from crosslens.activations import mixing
from crosslens.activations.harvesting import harvest
from crosslens.activations.loader import Activations, LiveActivations
from crosslens.activations.mixing import MixedRows
from crosslens.activations.plan import evaluation_bytes, training_bytes
from crosslens.activations.tokens import Dataset, special_positions
from crosslens.crosscoders import JumpReLUCrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshot, Snapshots
from crosslens.snapshots.settings import ModelSettings

HOOK = "blocks.1.hook_resid_post"
T = 16


@pytest.fixture(scope="module")
def snapshots(tiny_snapshots: Path) -> Snapshots:
    return Snapshots.local(tiny_snapshots)


def make(snapshots: Snapshots, dataset: Any, **options: Any) -> Activations:
    hook_name, seed, mixing = (
        options.pop(*given) for given in (("hook_name", HOOK), ("seed", 0), ("mixing_tokens", None))
    )
    given: dict[str, Any] = {"n_tokens": 1000, "context_size": T, "held_out_tokens": 200, **options}
    return Activations(snapshots, hook_name, Dataset(dataset, **given), seed=seed, mixing_tokens=mixing)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslens.activations.loader.BLOCK_TOKENS", 13 * T)  # several blocks, the last one smaller
    monkeypatch.setattr("crosslens.activations.mixing.UNIT", 30)


def keys(rows: Tensor) -> Counter[bytes]:
    return Counter(row.numpy().tobytes() for row in rows)


def sequences(tokens: Tensor) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row) for row in tokens.tolist())


# ---------------------------------------------------------------------- what is harvested


@pytest.mark.parametrize(
    "hook_name",
    ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.1.hook_mlp_out",
     "blocks.2.hook_resid_post"],
)  # fmt: skip
def test_bit_identical_to_run_with_cache(snapshots: Snapshots, hook_name: str):
    tokens = torch.randint(1, 16, (6, T), generator=torch.Generator().manual_seed(0))
    found = harvest(snapshots, tokens, hook_name)
    assert found.shape == (6, T, 3, 16) and found.dtype == torch.float32
    for s in range(3):
        _, cache = snapshots[s].load().run_with_cache(tokens)  # the whole model, loaded by itself
        assert torch.equal(found[:, :, s], cache[hook_name])
    assert torch.equal(harvest(snapshots, tokens, hook_name, only=2), found[:, :, 2:])
    in_parts = harvest(snapshots, tokens, hook_name, ModelSettings(batch_tokens=2 * T))
    assert torch.equal(in_parts[2:4], harvest(snapshots, tokens[2:4], hook_name))
    torch.testing.assert_close(in_parts, found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_of_half_precision_give_float32(snapshots: Snapshots, tiny_text: list[str], dtype: str):
    settings = ModelSettings(dtype=dtype)
    assert next(snapshots.model(0, settings).parameters()).dtype == getattr(torch, dtype)
    tokens = torch.randint(1, 16, (4, T), generator=torch.Generator().manual_seed(0))
    found, exact = harvest(snapshots, tokens, HOOK, settings), harvest(snapshots, tokens, HOOK)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * float(exact.std()))
    acts = Activations(snapshots, HOOK, Dataset(tiny_text, 300, T, 0), settings=settings)
    assert next(acts.batches(50)).dtype == torch.float32


def test_the_residual_stream_is_that_of_transformers(snapshots: Snapshots, tiny_snapshots: Path):
    tokens = torch.randint(1, 16, (4, T), generator=torch.Generator().manual_seed(1))
    found = harvest(snapshots, tokens, HOOK)
    for s, step in enumerate((0, 10, 20)):
        model = AutoModelForCausalLM.from_pretrained(tiny_snapshots / f"step{step}", attn_implementation="eager")
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[:, :, s], states[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[:, :, 0], found[:, :, 1])


@pytest.mark.parametrize(("hook_name", "n_blocks"), [("blocks.0.hook_resid_post", 1), ("blocks.2.hook_resid_pre", 2)])
def test_only_the_blocks_up_to_the_hook_are_run(snapshots: Snapshots, hook_name: str, n_blocks: int):
    ran: list[int] = []
    model = snapshots.model(0)
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))  # type: ignore[misc]
        for i, block in enumerate(model.blocks)
    ]
    try:
        harvest(snapshots, torch.ones(2, T, dtype=torch.long), hook_name, only=0)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == list(range(n_blocks))


def test_non_finite_activations_name_the_snapshot(tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path):
    shutil.copytree(tiny_snapshots, tmp_path / "broken")
    weights = tmp_path / "broken" / "step10" / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "layers.0" in key and key.endswith("dense.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    acts = make(Snapshots.local(tmp_path / "broken"), tiny_text)
    with pytest.raises(UserError, match=rf"snapshot step10 has non-finite activations at {HOOK} \(\d+ positions, the"):
        next(acts.batches(100))


# ---------------------------------------------------------------------- positions and their order


@pytest.mark.parametrize("mixing_tokens", [None, 120])  # all of an epoch, or a part of it
@pytest.mark.parametrize(
    ("keep_special", "size"),
    [  # 250: more than a block
        (False, 250),
        *(pytest.param(special, 37, marks=pytest.mark.exhaustive) for special in (False, True)),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_every_kept_position_once_per_epoch(
    snapshots: Snapshots, tiny_text: list[str], keep_special: bool, size: int, mixing_tokens: int | None
):
    acts = make(snapshots, tiny_text, keep_special=keep_special, mixing_tokens=mixing_tokens)
    everything = harvest(snapshots, acts.train_tokens(), HOOK)
    kept = torch.ones_like(acts.train_tokens(), dtype=torch.bool) if keep_special else acts.train_tokens() != 0
    expected = keys(everything[kept])
    n = int(kept.sum())
    assert acts.n_tokens == n and (n < acts.train_tokens().numel()) != keep_special
    batches = list(itertools.islice(acts.batches(size), 3 * n // size + 1))
    assert {len(batch) for batch in batches} == {size}
    stream = torch.cat(batches)
    for epoch in range(3):
        assert keys(stream[epoch * n : (epoch + 1) * n]) == expected
    assert not torch.equal(stream[:n], stream[n : 2 * n])  # every epoch has its own order
    assert not torch.equal(stream[:n], everything[kept])
    once = list(acts.batches(size, epochs=1))
    assert [len(batch) for batch in once] == [size] * (n // size)
    assert torch.equal(torch.cat(once), stream[: n // size * size])


def test_a_single_block_is_reshuffled_in_every_epoch(snapshots: Snapshots, tiny_text: list[str]):
    acts = make(snapshots, tiny_text, n_tokens=300)
    n = acts.n_tokens
    assert len(acts.train_tokens()) <= acts.block_sequences
    first, second = itertools.islice(acts.batches(n), 2)
    assert keys(first) == keys(second) and not torch.equal(first, second)


def test_bos_and_padding_are_special(snapshots: Snapshots):
    class Tokenizer:
        bos_token_id, pad_token_id = 3, 5

    tokens = torch.tensor([[3, 1, 5], [5, 2, 3]])
    assert special_positions(tokens, Tokenizer()).tolist() == [[True, False, True], [True, False, True]]
    Tokenizer.bos_token_id = None  # type: ignore[assignment]
    assert special_positions(tokens, Tokenizer()).tolist() == [[False, False, True], [True, False, False]]
    assert snapshots.tokenizer.bos_token_id == 0


@pytest.mark.parametrize("mixing_tokens", [None, pytest.param(100, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.exhaustive), 37])
@pytest.mark.usefixtures("small_blocks")
def test_starting_later_equals_skipping(
    snapshots: Snapshots, tiny_text: list[str], batch_size: int, mixing_tokens: int | None
):
    acts = make(snapshots, tiny_text, n_tokens=400, mixing_tokens=mixing_tokens)
    n = acts.n_tokens
    assert acts.data_order == ("a live buffer of 100 tokens" if mixing_tokens else "shuffled")
    per_epoch = n // batch_size
    whole = list(itertools.islice(acts.batches(batch_size), 2 * per_epoch + 4))  # beyond the second epoch's end
    starts = {0, 1, per_epoch // 2, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch + 1}
    for start in sorted(starts):
        later = list(itertools.islice(acts.batches(batch_size, start=start), 3))
        assert all(torch.equal(a, b) for a, b in zip(later, whole[start : start + 3], strict=True)), start


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.usefixtures("small_blocks")
def test_a_bar_while_the_buffer_is_filled(
    snapshots: Snapshots,
    tiny_text: list[str],
    start: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """At the beginning and where a training is resumed; it goes before the first batch comes."""
    monkeypatch.setattr(crosslens.progress, "EVERY", -math.inf)  # a line for each, although this is no terminal
    monkeypatch.setattr(mixing, "_bar", partial(mixing._bar, delay=0, mininterval=0))
    stream = make(snapshots, tiny_text, n_tokens=400, mixing_tokens=100).batches(10, start=start)
    next(stream)
    assert capfd.readouterr().err.count("Filling the buffer") > 2
    next(stream)
    assert "Filling the buffer" not in capfd.readouterr().err


def test_deterministic_in_the_seed_and_off_the_global_generator(snapshots: Snapshots, tiny_text: list[str]):
    state = torch.random.get_rng_state()
    first = make(snapshots, tiny_text, seed=5)
    batches = [batch.clone() for batch in itertools.islice(first.batches(50), 25)]
    torch.rand(7)
    again = make(snapshots, tiny_text, seed=5)
    assert torch.equal(first.tokens, again.tokens)
    assert all(torch.equal(a, b) for a, b in zip(batches, again.batches(50), strict=False))
    other = make(snapshots, tiny_text, seed=6)
    assert not torch.equal(first.tokens, other.tokens)
    one, two = sequences(first.tokens), sequences(other.tokens)
    # the same sequences; n_tokens is a minimum, and may need one more
    assert (one <= two or two <= one) and abs(one.total() - two.total()) <= 1
    torch.random.set_rng_state(state)
    next(again.batches(50))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_held_out_sequences_are_not_in_training(snapshots: Snapshots):
    # all sequences differ: each spells its index in base 13
    grid = torch.tensor([[0, *(2 + (i // 13**d) % 13 for d in range(7))] for i in range(300)])
    for held_out in (1, 100, 777):
        acts = make(snapshots, grid, n_tokens=1000, held_out_tokens=held_out)
        train, held = sequences(acts.train_tokens()), sequences(acts.held_out_tokens())
        assert not train & held and (train + held) <= sequences(grid)
        kept = int((acts.held_out_tokens() != 0).sum())
        assert held_out <= kept < held_out + 7  # at least what was asked for, not one sequence more
        assert 1000 <= acts.n_tokens < 1000 + 2 * 7
        stream = torch.cat(list(acts.held_out(50)))
        expected = harvest(snapshots, acts.held_out_tokens(), HOOK)[acts.held_out_tokens() != 0]
        torch.testing.assert_close(stream, expected)  # in reading order


@pytest.mark.usefixtures("small_blocks")
def test_held_out_does_not_depend_on_what_was_read_before(snapshots: Snapshots, tiny_text: list[str]):
    fresh = torch.cat(list(make(snapshots, tiny_text).held_out(64)))
    used = make(snapshots, tiny_text)
    next(used.batches(10))
    assert torch.equal(torch.cat(list(used.held_out(7))), fresh)


def test_arrays_are_used_unchanged(snapshots: Snapshots):
    grid = (np.arange(200 * 10).reshape(200, 10) % 13 + 2).astype(np.uint16)
    acts = make(snapshots, grid, n_tokens=500, held_out_tokens=50, context_size=None)
    assert acts.tokens.shape[1] == 10 and acts.dataset.context_size == 10 and acts.metadata()["context_size"] == 10
    assert 500 <= acts.n_tokens < 520  # n_tokens counts here too
    stream = torch.arange(3000) % 13 + 2
    acts = make(snapshots, stream, n_tokens=500, prepend_bos=False)
    assert acts.tokens.shape[1] == T and not bool((acts.tokens == 0).any())


def test_default_held_out_and_the_whole_dataset(snapshots: Snapshots, tiny_text: list[str]):
    acts = make(snapshots, tiny_text, n_tokens=None, held_out_tokens=None)
    total = int((acts.tokens != 0).sum())
    held = int((acts.held_out_tokens() != 0).sum())
    assert total // 10 <= held < total // 10 + T and acts.n_tokens == total - held
    acts = make(snapshots, tiny_text, n_tokens=3000, held_out_tokens=None)
    assert 2000 <= int((acts.held_out_tokens() != 0).sum()) < 2000 + T


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"])
def test_cut_models_hold_no_more_blocks_and_give_the_same(snapshots: Snapshots, hook_name: str):
    tokens = torch.randint(1, 16, (5, T), generator=torch.Generator().manual_seed(2))
    n_blocks = int(hook_name[7]) + (not hook_name.endswith("pre"))
    for s in range(3):
        model = snapshots.model(s, n_blocks=n_blocks)
        assert len(model.blocks) == n_blocks and model is not snapshots.model(s)
        assert not any(f"layers.{n_blocks}." in name for name, _ in model.original_model.named_parameters())
    assert torch.equal(harvest(snapshots, tokens, hook_name, cut=True), harvest(snapshots, tokens, hook_name))


def test_live_batches_use_cut_models_alone(snapshots: Snapshots, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch):
    asked: set[int | None] = set()
    load = Snapshot.load

    def watched(*args: Any, n_blocks: int | None = None, **options: Any) -> Any:
        asked.add(n_blocks if len(args) < 5 else args[4])
        return load(*args, **options) if len(args) == 5 else load(*args, n_blocks=n_blocks, **options)

    monkeypatch.setattr(Snapshot, "load", watched)
    fresh = Snapshots(list(snapshots), "fresh")
    next(make(fresh, tiny_text).batches(50))
    assert asked == {2}


def test_the_stream_ends_its_thread(snapshots: Snapshots, tiny_text: list[str]):
    acts = make(snapshots, tiny_text)
    before = threading.active_count()
    stream = acts.batches(50)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    assert len(list(acts.batches(50, epochs=1))) == acts.n_tokens // 50 and threading.active_count() == before
    assert 0 < acts.waited_first <= acts.waited


@pytest.mark.usefixtures("small_blocks")
def test_one_batch_is_made_ahead_and_errors_reach_the_consumer(
    snapshots: Snapshots, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch
):
    acts = make(snapshots, tiny_text, mixing_tokens=60)
    made, asked = [0], threading.Semaphore(0)
    read = MixedRows.read

    def watched(*args: Any) -> None:
        asked.release()
        made[0] += 1
        if made[0] == 3:
            raise RuntimeError("the third batch")
        read(*args)

    monkeypatch.setattr(MixedRows, "read", watched)
    stream = acts.batches(40)
    next(stream)
    assert asked.acquire(timeout=60) and asked.acquire(timeout=60)  # the second is made while the first is in use
    assert not asked.acquire(timeout=0.3) and made == [2]
    with pytest.raises(RuntimeError, match="the third batch"):
        list(stream)
    assert made == [3] and list(stream) == []


def test_buffers_are_used_again_once_nobody_holds_a_batch(snapshots: Snapshots, tiny_text: list[str]):
    acts = make(snapshots, tiny_text)
    held = list(itertools.islice(acts.batches(30), 12))
    assert len({batch.data_ptr() for batch in held}) == 12  # each has its own
    dropped = {batch.data_ptr() for batch in itertools.islice(acts.batches(30), 12)}
    assert len(dropped) <= 4
    kept, places = [], set()
    for batch in itertools.islice(acts.batches(30), 12):
        kept.append(batch[:1])  # a part of it holds the buffer, too
        places.add(batch.data_ptr())
    assert len(places) == 12 and all(torch.equal(a[:1], b) for a, b in zip(held, kept, strict=True))


# ---------------------------------------------------------------------- plan, record, mistakes


@pytest.mark.usefixtures("small_blocks")
def test_plan(snapshots: Snapshots, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    acts = make(snapshots, tiny_text)
    N = len(acts.tokens)
    plan = acts.plan(measure=False, folder=tmp_path / "not" / "yet")
    assert (plan.n_tokens, plan.n_sequences, plan.n_snapshots, plan.d_model) == (acts.n_tokens, N, 3, 16)
    assert plan.forwards == N * T * 3 and plan.cache_bytes == int(N * T * (3 * (32 + 1 / 8) + 8)) + 8 * 4096
    assert plan.n_files == 9  # training and held out: tokens and three snapshots; manifest
    cut = snapshots[0].load(n_blocks=2).original_model
    size = sum(p.numel() for p in cut.parameters())
    assert plan.model_bytes == pytest.approx(4 * size, rel=0.01) and plan.models_fit
    token, n, held = 3 * 16 * 4, acts.n_tokens, int(acts.keep(acts.held_out_tokens()).sum())
    assert plan.batch_bytes == n * token and plan.mixing_bytes == (n + 13 * T + held) * token
    assert plan.held_out_bytes == held * token and plan.n_held_out == held
    assert plan.order_bytes == int(n * (5 + 3 * 5 / 32))
    assert plan.cached_bytes == 3 * plan.batch_bytes + plan.order_bytes
    assert plan.live_bytes == 3 * plan.model_bytes + plan.pass_bytes + plan.mixing_bytes + 3 * plan.batch_bytes
    assert acts.plan(measure=False, batch_size=100).batch_bytes == 100 * token
    # one shard and a third, and one as stored
    assert plan.harvest_bytes == len(acts.train_tokens()) * T * (16 * 16 // 3 + 16 * 2)
    assert plan.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05) and plan.n_downloads == 0
    assert math.isnan(plan.seconds) and "not measured" in str(plan)
    cheap = "one pass over the data, and the models fit into memory together"
    assert plan.recommendation == ("live", f"{cheap}; with a cache, evolve and other seeds need not run them again")
    assert acts.plan(measure=False, dtype="int8").cache_bytes == int(N * T * (3 * (20 + 1 / 8) + 8)) + 8 * 4096
    several = acts.plan(measure=False, training_tokens=5 * acts.n_tokens)
    assert several.passes == 5 and several.recommendation[0] == "cached" and "recommended cached: 5 p" in str(several)
    monkeypatch.setattr("crosslens.activations.loader.model_memory", lambda _: 3 * plan.model_bytes - 1)
    large = acts.plan(measure=False)
    assert not large.models_fit and large.recommendation[0] == "cached"
    assert large.live_bytes == plan.model_bytes + plan.pass_bytes + plan.mixing_bytes + 3 * plan.batch_bytes
    monkeypatch.setattr("crosslens.activations.loader.free_bytes", lambda _: large.cache_bytes - 1)
    assert "too full for a cache" in acts.plan(measure=False).recommendation[1]
    assert plan.training_bytes == 0 and "training" not in str(plan)
    architecture = JumpReLUCrosscoderTrainingConfig(d_sae=4096)
    alone, split = (acts.plan(measure=False, architecture=architecture, processes=n) for n in (1, 4))
    held = 16 * 4096 * (2 * 48 + 2)  # value, gradient, two moments
    assert held < split.training_bytes * 4 and 3 * held < 4 * (alone.training_bytes - split.training_bytes)
    assert alone.harvest_bytes == split.harvest_bytes == plan.harvest_bytes  # whatever is trained
    assert alone.host_memory == alone.process_bytes + alone.training_bytes + alone.live_bytes > 100e6
    assert alone.device_memory == 0 and "GPU" not in str(alone)
    assert "for weights, gradients, Adam and a step" in str(alone) and "in each of 4 processes" in str(split)
    halved = acts.plan(measure=False, architecture=architecture, processes=4, data_parallel=2)
    assert halved.training_bytes == training_bytes(architecture, 3, 16, 2048, 2) < alone.training_bytes
    with monkeypatch.context() as larger:  # three of four processes run the models of a snapshot each
        larger.setattr("crosslens.activations.loader.model_bytes", lambda *_: 1 << 30)
        larger.setattr("crosslens.activations.loader.model_memory", lambda *_: 1 << 40)
        evaluated_alone, evaluated_by_four = (
            acts.plan(measure=False, architecture=architecture, processes=n).evaluation_bytes >> 30 for n in (1, 4)
        )
        assert (evaluated_alone, evaluated_by_four) == (3, 1)
        larger.setattr("crosslens.activations.loader.model_memory", lambda *_: 2 << 30)  # one at a time
        assert acts.plan(measure=False, architecture=architecture).evaluation_bytes >> 30 == 1
    for positions, chunk in ((16, 4096), (5000, 5000)):  # features and two in float64, of the tokens encoded at a time
        assert evaluation_bytes(100, 10, positions, 0) == 8192 * 4 * 10 + chunk * (8 * 100 + 24 * 10) + (48 << 20)
    kept = alone.process_bytes + alone.held_out_bytes
    assert alone.train_memory == max(alone.host_memory, kept + alone.evaluation_bytes + alone.loaded_bytes)
    stored = dataclasses.replace(alone, cached=True)
    assert stored.host_memory == kept + alone.cached_bytes + alone.training_bytes
    assert stored.harvest_memory == sum((alone.process_bytes, plan.model_bytes, plan.pass_bytes, plan.harvest_bytes))
    # weights that a token is multiplied with: not those of the embedding, and not those of the unembedding where cut
    blocks, of_cut = (
        sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        for model in (snapshots[0].load().original_model, cut)
    )
    unembedding = snapshots[0].config().vocab_size * 16
    assert alone.whole_share == pytest.approx((blocks + unembedding) / of_cut, rel=0.02)
    light = acts.plan(measure=False, architecture=architecture, adam_moments="bfloat16")
    assert alone.training_bytes - light.training_bytes == 2 * 2 * 2 * 48 * 4096  # 2 bytes, 2 moments, 2 matrices
    measured = acts.plan()
    assert 0 < measured.seconds < 60 and "about" in str(measured)
    with pytest.raises(UserError, match="dtype='int4' is unknown for a cache.*did you mean 'int8'"):
        acts.plan(dtype="int4")


def test_the_plan_refuses_words_that_transformers_does_not_know(
    tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path
):
    shutil.copytree(tiny_snapshots, tmp_path / "models")
    for path in (tmp_path / "models").glob("step*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "odd"}))
    acts = Activations(Snapshots.local(tmp_path / "models"), HOOK, Dataset(tiny_text, 1000, T))
    with pytest.raises(
        UserError, match=r"cannot make the model that its config.json describes \(KeyError: 'odd'\): corr"
    ):
        acts.plan(measure=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("passes", [1, 3])
def test_the_plan_for_a_gpu_tells_its_memory_from_the_hosts(snapshots: Snapshots, tiny_text: list[str], passes: int):
    """The same bytes as on CPUs: models and crosscoder on the GPU, blocks and program on the host."""
    acts = make(snapshots, tiny_text)
    architecture = JumpReLUCrosscoderTrainingConfig(d_sae=4096)
    options: dict[str, Any] = {"training_tokens": passes * acts.n_tokens, "architecture": architecture, "processes": 2}
    on_cpu = acts.plan(measure=False, **options)
    acts.settings = dataclasses.replace(acts.settings, device="cuda:1")
    plan = acts.plan(measure=False, **options)
    models = 3 * plan.model_bytes + plan.pass_bytes if passes == 1 else 0
    batches = 2 * plan.batch_bytes  # in use, and on its way
    assert plan.device_memory == plan.training_bytes + models + batches > 0
    checkpoint = 3 * 4 * 3 * 16 * 4096 // 2
    cached = plan.cached_bytes + plan.held_out_bytes
    host = cached if passes == 3 else plan.mixing_bytes + 3 * plan.batch_bytes
    assert plan.host_memory == plan.process_bytes + host + checkpoint
    apart = plan.device_memory + plan.host_memory - plan.process_bytes - checkpoint - batches
    assert apart == on_cpu.host_memory - on_cpu.process_bytes
    lines = {line.split()[0]: line for line in str(plan).splitlines()}

    def mib(n: int) -> str:
        return f"{n / 2**20:,.0f} MiB"

    assert f"{mib(plan.device_memory)} of GPU memory in each of 2 processes: " in lines["training"]
    assert f"; {mib(plan.host_memory)} of host memory: " in lines["training"]
    assert ("for models" in lines["training"]) == (passes == 1)
    live = plan.live_bytes - plan.loaded_bytes - plan.pass_bytes
    assert f"{mib(plan.loaded_bytes + plan.pass_bytes)} of GPU memory, {mib(live)} of host memory" in lines["live"]
    assert f"{mib(plan.cached_bytes)} of host memory" in lines["cached"]


def test_held_out_activations_are_kept_if_they_are_few(
    snapshots: Snapshots, tiny_text: list[str], monkeypatch: pytest.MonkeyPatch
):
    acts = make(snapshots, tiny_text)
    blocks: list[tuple[int, int]] = []
    block = LiveActivations.block

    def counted(acts: Activations, first: int, last: int) -> Tensor:
        blocks.append((first, last))
        return block(acts, first, last)

    monkeypatch.setattr(LiveActivations, "block", counted)
    first = torch.cat(list(acts.held_out(50)))
    n = len(blocks)
    assert n > 0
    for x in acts.held_out(7):
        x.zero_()  # what a caller does with them changes nothing
    assert torch.equal(torch.cat(list(acts.held_out(50))), first) and len(blocks) == n
    monkeypatch.setattr("crosslens.activations.loader.HELD_OUT_BYTES", first.nbytes - 1)
    many = make(snapshots, tiny_text)
    assert all(torch.equal(torch.cat(list(many.held_out(50))), first) for _ in range(2)) and len(blocks) == 3 * n


def test_a_run_reads_the_cache_it_was_recorded_with(
    snapshots: Snapshots, tiny_text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny_text))
    cached = make(snapshots, path).cache(tmp_path / "cache", "int8")
    recorded = json.loads(json.dumps(cached.to_dict()))
    again = Activations.from_dict(recorded)
    found = torch.cat(list(again.held_out()))
    assert torch.equal(found, torch.cat(list(cached.held_out())))
    live = torch.cat(list(make(snapshots, path).held_out()))
    assert not torch.equal(found, live)  # int8 rounds
    other = {**recorded, "hook_name": "blocks.0.hook_resid_post"}
    capsys.readouterr()
    assert not torch.equal(torch.cat(list(Activations.from_dict(other).held_out())), found)
    assert "is not used, and the models run instead" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(torch.cat(list(Activations.from_dict(recorded).held_out())), live)


def test_recorded_and_made_again(snapshots: Snapshots, tiny_text: list[str], tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny_text))
    acts = make(snapshots, path, seed=3)
    recorded = json.loads(json.dumps(acts.to_dict()))
    again = Activations.from_dict(recorded)
    assert torch.equal(again.tokens, acts.tokens) and again.n_tokens == acts.n_tokens
    assert torch.equal(next(again.batches(50)), next(acts.batches(50)))
    assert again.metadata() == acts.metadata() and again.fingerprint() == acts.fingerprint()
    assert str(tmp_path) not in json.dumps(acts.metadata())  # no folder of the user's in what is published
    assert [s["label"] for s in acts.metadata()["snapshots"]] == ["step0", "step10", "step20"]
    assert again.to_dict() == acts.to_dict() and again.seed == 3
    given = ModelSettings(batch_tokens=77)
    assert Activations.from_dict(recorded, given).settings == given
    with pytest.raises(UserError, match="a dataset in memory cannot be recorded"):
        make(snapshots, tiny_text).to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "n_tokens=0 must be positive"),
        ({"context_size": 33}, r"context_size=33 is not in \[2, 32\], the models' context"),
        ({"context_size": 1}, "context_size=1 is not in"),
        ({"mixing_tokens": 15}, "mixing_tokens=15 must be at least 16, the tokens of a sequence"),
        ({"hook_name": "blocks.7.hook_resid_post"}, "blocks.7.hook_resid_post"),
        ({"hook_name": "blocks.1.hook_resid_pots"}, "blocks.1.hook_resid_pots"),
    ],
)
def test_mistakes_are_reported_at_once(
    snapshots: Snapshots, tiny_text: list[str], options: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        make(snapshots, tiny_text, **options)
    assert "\n" not in str(caught.value)


def test_numbers_are_given_once(snapshots: Snapshots, tiny_text: list[str]):
    for name, value in (("n_tokens", 300), ("context_size", T)):
        with pytest.raises(UserError, match=f"{name}=9 conflicts with {name}={value} of the Dataset: set it once"):
            Activations(snapshots, HOOK, Dataset(tiny_text, 300, T), **{name: 9})
    acts = Activations(snapshots, HOOK, Dataset(tiny_text, held_out_tokens=50), 300, T)
    assert acts.dataset == Dataset(tiny_text, 300, T, 50)


def test_more_tokens_than_there_are(snapshots: Snapshots, tiny_text: list[str]):
    with pytest.raises(UserError, match=r"too few for n_tokens=100000 plus 200 held out; ask for at most") as error:
        _ = make(snapshots, tiny_text, n_tokens=100_000).tokens
    most = int(str(error.value).split()[-1])
    assert make(snapshots, tiny_text, n_tokens=most).n_tokens >= most  # the remedy works
    with pytest.raises(UserError, match=f"n_tokens={most + T}"):
        _ = make(snapshots, tiny_text, n_tokens=most + T).tokens
    with pytest.raises(UserError, match="plus 200 held out; give more documents, or set held_out_tokens"):
        _ = make(snapshots, tiny_text[:2], n_tokens=300).tokens


@pytest.mark.parametrize("seed", [0, 1])
def test_training_never_lacks_a_sequence(snapshots: Snapshots, tiny_text: list[str], seed: int):
    for n_tokens in (300, 305, 311):
        acts = make(snapshots, tiny_text, n_tokens=n_tokens, seed=seed)
        assert n_tokens <= acts.n_tokens < n_tokens + 2 * T
        held = int((acts.held_out_tokens() != 0).sum())
        assert 200 <= held < 200 + T
        assert not sequences(acts.train_tokens()) & sequences(acts.held_out_tokens())


def test_other_mistakes_of_the_data(snapshots: Snapshots, tiny_text: list[str]):
    with pytest.raises(UserError, match="context_size=40 is not in"):
        make(snapshots, torch.ones(9, 40, dtype=torch.long))
    for bad, said in ((99, "outside the tokenizer's vocab"), (-1, "not in ")):
        with pytest.raises(UserError, match=f"token id {bad} in token array of 400 is {said}"):
            _ = make(snapshots, torch.full((400, T), bad)).tokens
    acts = make(snapshots, tiny_text)
    with pytest.raises(UserError, match=rf"batch_size=5000 is not in \[1, {acts.n_tokens}\]"):
        next(acts.batches(5000))
    with pytest.raises(UserError, match="sequences, too few to hold any out"):
        _ = make(snapshots, torch.ones(1, T, dtype=torch.long), n_tokens=1, held_out_tokens=1).tokens


def test_snapshots_with_equal_weights_are_refused(tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path):
    shutil.copytree(tiny_snapshots, tmp_path / "twins")
    shutil.copytree(tiny_snapshots / "step10", tmp_path / "twins" / "step15")
    with pytest.raises(UserError, match="'step10' and 'step15' have equal weights"):
        next(make(Snapshots.local(tmp_path / "twins"), tiny_text).batches(10))
