"""Several hook points from one pass, other dtypes and attention, against `run_with_cache` and formulas."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
)

from crosslens.activations import harvesting
from crosslens.activations.harvesting import (
    forward_sequences,
    harvest,
    large_blocks_mapped,
    pass_sequences,
    rounding_error,
    run_to_hooks,
)
from crosslens.activations.loader import Activations
from crosslens.activations.plan import pass_bytes
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.intervention.splice import spliced_logits
from crosslens.intervention.upper import Upper
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook, check_hook, hook_layer
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.snapshot import Snapshot
from tests.snapshots.test_collection import write_tokenizer

TOKENS = torch.randint(2, 16, (7, 9), generator=torch.Generator().manual_seed(0))
CPU = ModelSettings("cpu", batch_tokens=3 * 9)
SHAPE: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
POINTS = {
    "gpt_neox": ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_in"),
    "serial": ("hook_resid_mid", "ln2.hook_normalized", "mlp.hook_in", "attn.hook_z", "hook_mlp_out"),
    "after": ("hook_resid_mid", "mlp.hook_in", "attn.hook_z", "hook_mlp_out"),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of other families, one snapshot each; Llama's heads together are wider than d_model."""
    root = tmp_path_factory.mktemp("families")
    rope: dict[str, Any] = {**SHAPE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    made: dict[str, PreTrainedModel] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made["bloom"] = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, **SHAPE))
        made["olmo"] = OlmoForCausalLM(OlmoConfig(**rope))
        made["olmo2"] = Olmo2ForCausalLM(Olmo2Config(**rope))
        made["llama"] = LlamaForCausalLM(LlamaConfig(**rope, head_dim=12, num_key_value_heads=1))
    for name, model in made.items():
        model.save_pretrained(root / name / "step0")
        write_tokenizer(root / name / "step0")
    return root


def outs_for(snaps: Snapshots, names: list[str], tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    return {name: torch.full((*tokens.shape, snaps.hook_width(name)), torch.nan) for name in names}


def compare_with_cache(snaps: Snapshots, names: list[str]) -> None:
    """Bit for bit in float32, at the same batches."""
    model, outs = snaps.model(0, CPU), outs_for(snaps, names)
    run_to_hooks(model, TOKENS, outs, CPU)
    for start in range(0, len(TOKENS), 3):
        _, cache = model.run_with_cache(TOKENS[start : start + 3], return_cache_object=False)
        for name in names:
            assert torch.equal(outs[name][start : start + 3], cache[name].flatten(2)), name
    cut = snaps[0].load("cpu", n_blocks=max(map(hook_layer, names)))
    again = outs_for(snaps, names)
    run_to_hooks(cut, TOKENS, again, CPU)
    assert all(torch.equal(again[name], outs[name]) for name in names)


def test_several_hook_points_are_those_of_run_with_cache(snaps: Snapshots) -> None:
    names = [f"blocks.{layer}.{point}" for layer in (1, 0) for point in POINTS["gpt_neox"]]
    compare_with_cache(snaps, names)


@pytest.mark.parametrize(
    ("family", "kind"), [("bloom", "serial"), ("olmo", "serial"), ("olmo2", "after"), ("llama", "serial")]
)
def test_other_families_have_them_too(families: Path, family: str, kind: str) -> None:
    snaps = Snapshots.local(families / family)
    names = [f"blocks.{layer}.{point}" for layer in (0, 1) for point in POINTS[kind]]
    for name in names:
        snaps.check(name)
    assert snaps.hook_width(f"blocks.0.{POINTS[kind][0]}") == 16
    assert snaps.hook_width("blocks.0.attn.hook_z") == (24 if family == "llama" else 16)
    compare_with_cache(snaps, names)


def test_the_input_of_the_mlp_is_what_it_says(families: Path) -> None:
    snaps = Snapshots.local(families / "llama")
    model = snaps.model(0, CPU)
    outs = outs_for(snaps, ["blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"])
    run_to_hooks(model, TOKENS, outs, CPU)
    middle, normalised, read = outs.values()
    expected = middle / (middle.square().mean(-1, keepdim=True) + model.original_model.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(normalised, expected, atol=1e-6, rtol=1e-6)
    gain = snaps[0]._load_transformers(torch.float32, None).model.layers[1].post_attention_layernorm.weight
    torch.testing.assert_close(read, expected * gain.detach(), atol=1e-6, rtol=1e-6)


def test_only_blocks_up_to_the_deepest_hook_point_run(snaps: Snapshots) -> None:
    model, ran = snaps.model(0, CPU), []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i, **__: ran.append(i)) for i, block in enumerate(model.blocks)
    ]
    try:
        names = ["blocks.1.hook_attn_out", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]
        outs = outs_for(snaps, names)
        run_to_hooks(model, TOKENS, outs, CPU)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1] * 3
    # two names of one activation
    assert canonical_hook(names[2]) == names[1] and torch.equal(outs[names[2]], outs[names[1]])


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("blocks.1.hook_resid_mid", 16, "never reached hook point blocks.1.hook_resid_mid"),
        ("blocks.1.hook_resid_post", 17, r"has activations of shape \(3, 9, 16\), where \(B, T, 17\) is needed"),
    ],
)
def test_a_hook_point_that_is_not_there_or_has_another_width(
    snaps: Snapshots, name: str, width: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_to_hooks(snaps.model(0, CPU), TOKENS, {name: torch.empty(*TOKENS.shape, width)}, CPU)
    assert "\n" not in str(caught.value)
    assert not any(point.fwd_hooks for point in snaps.model(0, CPU).hook_dict.values())


def test_blocks_without_a_norm_before_the_mlp_say_so(families: Path) -> None:
    config = Snapshots.local(families / "olmo2")[0].config()
    with pytest.raises(UserError, match="not the input of the MLP: blocks of olmo2 have no .*choose 'blocks.1.mlp.ho"):
        check_hook("blocks.1.ln2.hook_normalized", config)


@pytest.mark.parametrize("family", ["gpt_neox", "olmo", "olmo2", "llama"])
def test_fused_attention_is_the_same_function(snaps: Snapshots, families: Path, family: str) -> None:
    given = snaps if family == "gpt_neox" else Snapshots.local(families / family)
    fused = ModelSettings("cpu", attention="sdpa", batch_tokens=27)
    model = given.model(0, fused)
    assert model is not given.model(0, CPU)
    calls, plain = [0], torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        return plain(*args, **options)

    names = ["blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"]
    outs, exact = outs_for(given, names), outs_for(given, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        run_to_hooks(given.model(0, CPU), TOKENS, exact, CPU)
        assert calls == [0]
        run_to_hooks(model, TOKENS, outs, fused)
    assert calls == [2 * 3]
    for name in names:
        assert not torch.equal(outs[name], torch.zeros(())) and float(exact[name].abs().max()) > 0
        torch.testing.assert_close(outs[name], exact[name], atol=1e-6, rtol=1e-5)


def test_attention_that_a_family_or_backend_lacks_is_refused(families: Path) -> None:
    with pytest.raises(UserError, match="'step0': attention='sdpa' is not available for bloom in transformers: use"):
        Snapshots.local(families / "bloom")[0].load("cpu", attention="sdpa")
    with pytest.raises(UserError, match="attention='sdpa' needs backend='bridge'"):
        ModelSettings("cpu", backend="hooked_transformer", attention="sdpa")
    with pytest.raises(UserError, match="attention='spda' is unknown: use one of eager, sdpa; did you mean 'sdpa'"):
        ModelSettings("cpu", attention="spda")


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "attention": "sdpa"}, {}])
def test_the_error_of_a_dtype_is_that_of_its_activations(snaps: Snapshots, changes: dict[str, str]) -> None:
    ours = ModelSettings("cpu", batch_tokens=27, **changes)
    names = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"]
    found = rounding_error(snaps[2], TOKENS, {name: snaps.hook_width(name) for name in names}, ours)
    for name in names:
        given, exact = (harvest(snaps, TOKENS, name, each, only=2)[:, :, 0].double() for each in (ours, CPU))
        expected = float((given - exact).pow(2).sum() / exact.pow(2).sum())
        assert found[name] == pytest.approx(expected, rel=1e-6)
        assert (1e-7 < expected < 1e-2) if changes else expected == 0


def test_the_error_needs_one_model_in_memory(snaps: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    load = type(snaps[0]).load

    def loading(*args: Any, **options: Any) -> Any:
        assert all(model() is None for model in kept)
        model = load(*args, **options)
        kept.append(weakref.ref(model))
        return model

    monkeypatch.setattr(type(snaps[0]), "load", loading)
    rounding_error(snaps[0], TOKENS, {"blocks.0.hook_resid_post": 16}, ModelSettings("cpu", dtype="bfloat16"))
    assert len(kept) == 2


# ---------------------------------------------------------------------- activations at several hook points
NAMES = ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"]


# ---------------------------------------------------------------------- memory of a forward pass
def peak_bytes(model: Any, n: int, n_positions: int, settings: ModelSettings) -> int:
    """The most that a forward pass has allocated at once, as torch's profiler counts it."""
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    out = torch.zeros(n, n_positions, model.cfg.d_model)
    tokens = torch.zeros(n, n_positions, dtype=torch.long)
    run_to_hooks(model, tokens[:1], {name: out[:1]}, settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run_to_hooks(model, tokens, {name: out}, settings)
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events: list[Any] = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "olmo", "olmo2", "llama"])
@pytest.mark.parametrize(("dtype", "attention"), [("float32", "eager"), ("bfloat16", "eager"), ("float32", "sdpa")])
def test_the_memory_of_a_forward_pass(
    snaps: Snapshots, families: Path, family: str, dtype: str, attention: str
) -> None:
    """Where scores dominate, where the MLP does, and in two blocks as in one."""
    if (family, attention) == ("bloom", "sdpa"):
        pytest.skip("BLOOM has eager attention only")
    model_of = snaps if family == "gpt_neox" else Snapshots.local(families / family)
    settings = ModelSettings("cpu", dtype, attention=attention)
    for n_blocks in (1, 2):
        model = model_of[0].load("cpu", dtype, n_blocks=n_blocks, attention=attention)
        for n, T in ((2, 256), (64, 8)):
            expected = pass_bytes(model_of[0].config(), n, T, dtype, attention)
            assert peak_bytes(model, n, T, settings) == pytest.approx(expected, rel=0.3), (n_blocks, n, T)


@pytest.mark.parametrize("family", ["gpt_neox", "bloom"])
def test_no_block_keeps_its_attention_pattern(snaps: Snapshots, families: Path, family: str) -> None:
    """TransformerLens keeps (B, heads, T, T) of every block in the model."""
    model = (snaps if family == "gpt_neox" else Snapshots.local(families / family))[0].load("cpu")
    T = 11
    patterns: list[weakref.ref[torch.Tensor]] = []

    def note(pattern: torch.Tensor, hook: Any) -> None:
        del hook
        patterns.append(weakref.ref(pattern))

    hooks = [(f"blocks.{i}.attn.hook_pattern", note) for i in range(model.cfg.n_layers)]
    with torch.no_grad():
        model.run_with_hooks(TOKENS[:2].repeat(1, 2)[:, :T], fwd_hooks=hooks)
    assert len(patterns) == model.cfg.n_layers and not [found for found in patterns if found() is not None]


def test_passes_are_smaller_where_scores_are_large() -> None:
    settings = ModelSettings("cpu")
    assert pass_sequences(128, 12, settings) == 128  # 16,384 tokens
    assert pass_sequences(1024, 12, settings) == 2**30 // (8 * 12 * 1024**2) == 10
    assert pass_sequences(2048, 32, settings) == 1
    assert pass_sequences(2048, 32, dataclasses.replace(settings, attention="sdpa")) == 8
    assert pass_sequences(2048, 12, dataclasses.replace(settings, batch_tokens=100)) == 1


def test_a_cpu_runs_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = ModelSettings("cpu", attention="sdpa"), ModelSettings("cuda", attention="sdpa")
    monkeypatch.setattr(harvesting, "_CPU_TOKENS", 512)
    assert [forward_sequences(T, 2, cpu) for T in (128, 300, 2048)] == [4, 1, 1]
    assert [forward_sequences(T, 2, gpu) for T in (128, 2048)] == [128, 8]
    assert forward_sequences(128, 2, dataclasses.replace(cpu, batch_tokens=256)) == 2


def test_few_tokens_at_a_time_give_the_same_activations(snaps: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, hook_name = TOKENS.repeat(1, 2)[:, :12], "blocks.1.hook_resid_post"
    whole = harvest(snaps, tokens, hook_name)
    sizes: list[int] = []
    model = snaps.model(0, n_blocks=hook_layer(hook_name))
    handle = model.blocks[0].register_forward_hook(lambda *found: sizes.append(found[-1][..., 0].numel()))
    monkeypatch.setattr(harvesting, "_CPU_TOKENS", 24)
    try:
        torch.testing.assert_close(harvest(snaps, tokens, hook_name, cut=True), whole)
    finally:
        handle.remove()
    assert max(sizes) == 24 and sum(sizes) == tokens.numel()


def several(snaps: Snapshots, hook_name: Any, **options: Any) -> Activations:
    tokens = torch.randint(2, 16, (60, 9), generator=torch.Generator().manual_seed(1))
    options = {"seed": 3, "settings": CPU, **options}
    return Activations(snaps, hook_name, Dataset(tokens, 400, held_out_tokens=60), **options)


def test_one_pass_fills_a_folder_for_each_hook_point(
    snaps: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[str]] = []

    def watched(model: Any, tokens: Any, outs: dict[str, Any], *args: Any) -> None:
        passes.append(sorted(outs))
        run_to_hooks(model, tokens, outs, *args)

    monkeypatch.setattr("crosslens.activations.harvesting.run_to_hooks", watched)
    cached = several(snaps, NAMES).cache(tmp_path / "cache", "float32")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {*NAMES}
    assert passes == [sorted(NAMES)] * len(list((tmp_path / "cache" / NAMES[0]).glob("acts-*")))
    for name in NAMES:
        alone = several(snaps, name)
        assert cached[name].hook_names == (name,) and cached[name].metadata() == alone.metadata()
        expected = alone.cache(tmp_path / "alone" / name, "float32")
        for path in (tmp_path / "alone" / name).iterdir():
            assert path.read_bytes() == (tmp_path / "cache" / name / path.name).read_bytes(), (name, path.name)
        ours, theirs = (torch.cat([b.clone() for b in acts.batches(50, epochs=2)]) for acts in (cached[name], expected))
        assert torch.equal(ours, theirs)
        # activations at one of them find their folder
        passes.clear()
        again = alone.cache(tmp_path / "cache", "float32")
        assert passes == [] and torch.equal(next(again.held_out()), next(expected.held_out()))
        monkeypatch.setattr("crosslens.activations.harvesting.run_to_hooks", watched)
    # what is missing of one hook point is harvested alone
    removed = sorted((tmp_path / "cache" / NAMES[1]).glob("acts-*"))[-1]
    data = removed.read_bytes()
    removed.unlink()
    several(snaps, NAMES).cache(tmp_path / "cache", "float32")
    assert passes == [[NAMES[1]]] and removed.read_bytes() == data


def test_weights_are_deleted_once_all_shards_of_the_snapshot_are_there(
    snaps: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process works on a shard of the first snapshot until this one has harvested the second."""
    other = FileLock(tmp_path / "cache" / "harvest-00001-s00.lock")
    evicted: list[tuple[str, int]] = []

    def evict(snapshot: Snapshot) -> int:
        s = snaps.labels.index(snapshot.label)
        evicted.append((snapshot.label, len(list((tmp_path / "cache").glob(f"acts-*-s{s:02d}.safetensors")))))
        other.release()
        return 0

    monkeypatch.setattr(Snapshot, "evict", evict)
    (tmp_path / "cache").mkdir()
    with other:
        several(snaps, NAMES[1]).cache(tmp_path / "cache", "float32", evict=True)
    assert evicted[:3] == [("step10", 2), ("step20", 2), ("step0", 2)]


def test_several_hook_points_live(snaps: Snapshots) -> None:
    acts = several(snaps, NAMES)
    for name in NAMES:
        part = acts[name]
        assert part is acts[name] and part.tokens is acts.tokens and part.d_model == snaps.hook_width(name)
        assert torch.equal(part.block(3, 8), harvest(snaps, acts.tokens[3:8], name, CPU, cut=True))
    with pytest.raises(
        UserError, match=r"have 3 hook points, and a crosscoder reads one: choose it, .*acts\['blocks.0"
    ):
        acts.block(0, 1)
    with pytest.raises(
        UserError, match="no hook point 'blocks.1.hook_resid_pots': choose .*; did you mean 'blocks.1.h"
    ):
        _ = acts["blocks.1.hook_resid_pots"]
    assert several(snaps, NAMES[0])[NAMES[0]].hook_name == NAMES[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "hook_name is an empty list"),
        (["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"], "is given twice, perhaps by another name"),
        (["blocks.0.hook_resid_post", "blocks.7.hook_resid_post"], "the model has 3 blocks"),
        (["blocks.0.hook_resid_post", "blocks.0.attn.hook_pattern"], "has one number for each pair of positions"),
    ],
)
def test_lists_of_hook_points_that_are_refused(snaps: Snapshots, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        several(snaps, names)


def test_the_plan_of_several_is_for_one_pass(snaps: Snapshots, tmp_path: Path) -> None:
    acts = several(snaps, NAMES)
    plan, parts = acts.plan(measure=False), [acts[name].plan(measure=False) for name in NAMES]
    assert plan.cache_bytes == sum(part.cache_bytes for part in parts)
    assert plan.n_files == sum(part.n_files for part in parts)
    assert plan.forwards == parts[0].forwards and plan.model_bytes == parts[1].model_bytes > parts[0].model_bytes
    assert "at 3 hook points, of which a training reads one" in str(plan)
    acts.cache(tmp_path / "cache")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == plan.n_files
    assert sum(path.stat().st_size for path in files) == pytest.approx(plan.cache_bytes, rel=0.15)


def test_the_error_of_the_dtype_is_printed_once(
    snaps: Snapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = ModelSettings("cpu", dtype="bfloat16", attention="sdpa")
    several(snaps, NAMES[:2], settings=half).cache(tmp_path / "half")
    said = [line for line in capsys.readouterr().err.splitlines() if "squared error relative" in line]
    assert len(said) == 1 and said[0].startswith("models in bfloat16 with sdpa attention: squared error relative to")
    assert all(name in said[0] for name in NAMES[:2]) and "(step0, " in said[0]
    live = several(snaps, NAMES[0], settings=half)
    next(live.batches(50)), next(live.batches(50))
    assert capsys.readouterr().err.count("squared error relative") == 1
    several(snaps, NAMES[0]).cache(tmp_path / "exact", "float32")
    assert "squared error" not in capsys.readouterr().err
    with pytest.raises(UserError, match="different request: it has model_dtype=bfloat16, this request has model_dtype"):
        several(snaps, NAMES[0]).cache(tmp_path / "half")


@pytest.mark.parametrize("point", ["attn.hook_z", "mlp.hook_in", "ln2.hook_normalized"])
def test_the_new_hook_points_can_be_spliced(snaps: Snapshots, point: str) -> None:
    name, model = f"blocks.1.{point}", snaps.model(2, CPU)
    acts = harvest(snaps, TOKENS, name, CPU, only=2)[:, :, 0]
    clean = model(TOKENS, return_type="logits")
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens says that it computes an edited norm by itself
        same, changed = (spliced_logits(model, TOKENS, name, x, keep) for x in (acts, 0 * acts))
        upper = Upper(model, name, TOKENS).on(TOKENS).logits(acts)
    torch.testing.assert_close(same, clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(upper, clean[:, -1], atol=1e-5, rtol=1e-5)
    assert float((changed - clean).abs().max()) > 1e-3


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", *"abcde")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_are_given_back_while_harvesting_and_kept_afterwards():
    read = ctypes.CDLL(None).mallinfo2
    read.restype = MallInfo

    def mapped() -> int:  # MiB that a block of 8 MiB adds to those mapped by themselves
        before = read().hblkhd
        block = np.empty(1 << 20)
        found = read().hblkhd - before
        del block
        return found >> 20

    with large_blocks_mapped():
        assert mapped() == 8
    assert mapped() == 0


def test_a_threshold_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the threshold was set"))
    with large_blocks_mapped():
        pass
