"""Any models as snapshots: in memory, from functions, from folders and repositories that are not of one run."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from crosslens.activations import Activations, harvest
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.snapshots import ModelSettings, Snapshots
from crosslens.snapshots.snapshot import Snapshot
from crosslens.training import TrainConfig, train
from tests.snapshots.test_collection import TOKENS, WORDS, write_model, write_tokenizer

HOOK = "blocks.1.hook_resid_post"


def make(family: str = "neox", seed: int = 0, **changes: Any) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 20, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "neox":
            sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **sizes}
            return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, max_position_embeddings=32, **sizes))
        if family == "llama":
            sizes |= {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
            return LlamaForCausalLM(
                LlamaConfig(intermediate_size=32, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
            )
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **sizes))


def hooked(seed: int, **changes: Any) -> HookedTransformer:
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 8, "d_vocab": 20, "act_fn": "gelu"}
    return HookedTransformer(HookedTransformerConfig(**{**sizes, **changes}, seed=seed))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Made in memory: it has no place that TransformerLens could read it from again."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<e>", eos_token="<e>", unk_token="<u>")


def plain(model: PreTrainedModel, hook_layer: int = 1) -> torch.Tensor:
    """The residual stream after a block, by transformers alone."""
    with torch.no_grad():
        return copy.deepcopy(model).float().eval()(TOKENS, output_hidden_states=True).hidden_states[hook_layer + 1]


def outside(model: nn.Module) -> Any:
    """All that a user could see of a model."""
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.dtype, p.detach().clone()) for name, p in model.named_parameters()},
        {name: (id(b), b.dtype, b.clone()) for name, b in model.named_buffers()},
        {name: len(module._forward_hooks) for name, module in model.named_modules()},
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return one == other


# ------------------------------------------------------------------------------------------------- models in memory
@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_compute_what_they_compute_and_stay_as_they_are(family: str, dtype: str, tokenizer: Any) -> None:
    kept = [make(family, seed).to(getattr(torch, dtype)) for seed in (0, 1)]
    kept[0].train()
    kept[1].eval()
    before = copy.deepcopy([(m.config.to_dict(), m.config._attn_implementation) for m in kept])
    seen, knew = [outside(m) for m in kept], copy.deepcopy(tokenizer.special_tokens_map)
    snaps = Snapshots.from_models(kept, ["base", "chat"], tokenizer=tokenizer)
    found = harvest(snaps, TOKENS, HOOK, ModelSettings("cpu"), cut=True)
    for s, model in enumerate(kept):
        expected = plain(model)
        assert (found[:, :, s] - expected).abs().max() < 1e-5 * expected.abs().max()
    model = snaps.model(0, ModelSettings("cpu"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda x, **_: x * 0)])
    assert [(m.config.to_dict(), m.config._attn_implementation) for m in kept] == before
    assert same([outside(m) for m in kept][0], seen[0]) and same([outside(m) for m in kept][1], seen[1])
    assert tokenizer.special_tokens_map == knew
    ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, kept[0]))
    assert (theirs <= ours) == (dtype == "float32")  # the memory is shared, unless the dtype is another
    assert not theirs & ours or dtype == "float32"


@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
def test_a_model_and_its_folder_have_one_fingerprint(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """So that a crosscoder that was trained on models in memory can be used with what was saved of them."""
    made = make(family).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "a")
    write_tokenizer(tmp_path / "a")
    kept = type(made).from_pretrained(tmp_path / "a")  # `to` has rounded its rotary embedding
    on_disk = Snapshots.of({"a": tmp_path / "a"})
    in_memory = Snapshots.from_models([kept], ["a"], tokenizer=tokenizer)
    again = Snapshots.from_models([lambda: type(kept).from_pretrained(tmp_path / "a")], ["a"], tokenizer=tokenizer)
    assert on_disk.fingerprints == in_memory.fingerprints == again.fingerprints
    assert on_disk[0].stored_dtype == in_memory[0].stored_dtype == again[0].stored_dtype == torch.bfloat16
    expected = harvest(on_disk, TOKENS, HOOK, ModelSettings("cpu"))
    assert torch.equal(harvest(in_memory, TOKENS, HOOK, ModelSettings("cpu")), expected)
    assert torch.equal(harvest(again, TOKENS, HOOK, ModelSettings("cpu")), expected)
    bridge = Snapshots.from_models([on_disk[0].load("cpu", "bfloat16")], ["a"])
    assert torch.equal(harvest(bridge, TOKENS, HOOK, ModelSettings("cpu")), expected)  # in float32, as asked for
    changed = make(family).to(torch.bfloat16)
    changed.get_output_embeddings().weight.data[3, 5] += 1
    assert Snapshots.from_models([changed], ["a"], tokenizer=tokenizer).fingerprints != on_disk.fingerprints


def test_bridges_and_hooked_transformers(tokenizer: Any, tmp_path: Path) -> None:
    """Each keeps its hooks and its mode; what ours does stays in ours."""
    bridges: list[Any] = []
    for seed in (0, 1):
        write_tokenizer(write_model(tmp_path / f"m{seed}", seed))
        bridges.append(Snapshot("a", None, None, str(tmp_path / f"m{seed}")).load("cpu").train().requires_grad_(True))
    settings = ModelSettings("cpu")
    hooks = ("blocks.0.hook_mlp_out", HOOK, "blocks.1.hook_resid_pre")
    models: list[Any]
    for models, given in ((bridges, None), ([hooked(0), hooked(1)], tokenizer)):
        expected = [m.run_with_cache(TOKENS)[1] for m in models]
        seen = [outside(m) for m in models]
        snaps = Snapshots.from_models(models, ["base", "chat"], [10, None], given)
        assert (snaps.d_model, snaps.n_ctx, snaps.steps, snaps.name) == (16, 32, [10, None], "base, chat")
        for hook in hooks:
            snaps.check(hook)
            found = harvest(snaps, TOKENS, hook, settings)
            name = "blocks.0.hook_resid_post" if hook.endswith("pre") else hook
            assert all(torch.equal(found[:, :, s], expected[s][name].detach()) for s in (0, 1))
        assert all(same(outside(m), was) for m, was in zip(models, seen, strict=True))
        assert Activations(snaps, HOOK, TOKENS.repeat(20, 1), settings=settings).plan(measure=False).n_downloads == 0
    assert isinstance(snaps[0].load("cpu", backend="hooked_transformer"), HookedTransformer)
    with pytest.raises(UserError, match="backend='hooked_transformer' does not fit a TransformerBridge in memory"):
        Snapshots.from_models(bridges, ["a", "b"])[0].load("cpu", backend="hooked_transformer")


def test_functions_keep_one_model_in_memory(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    def loader(seed: int) -> Callable[[], Any]:
        def load() -> Any:
            gc.collect()
            assert sum(ref() is not None for ref in made) <= 1  # the one before may still be compared with
            model = make(seed=seed)
            made.append(weakref.ref(model))
            return model

        return load

    monkeypatch.setattr("crosslens.snapshots.collection.model_memory", lambda _: 0)
    snaps = Snapshots.from_models([loader(0), loader(1), loader(2)], ["a", "b", "c"], tokenizer=tokenizer)
    assert not made  # nothing is loaded yet
    acts = Activations(snaps, HOOK, TOKENS.repeat(20, 1), settings=ModelSettings("cpu"))
    assert len(made) == 3  # once each, for everything that is compared
    assert len(set(snaps.fingerprints)) == 3 and len(made) == 3

    found = harvest(snaps, TOKENS, HOOK, acts.settings)
    assert all(torch.allclose(found[:, :, s], plain(make(seed=s)), atol=1e-6) for s in range(3))
    snaps.release()
    gc.collect()
    assert not [ref for ref in made if ref() is not None]


def test_a_model_that_trains_on_is_refused(tokenizer: Any) -> None:
    """One list entry for each step of a loop would otherwise hold the last weights several times."""
    base = make()
    chat = copy.deepcopy(base)
    snaps = Snapshots.from_models([base, chat], ["base", "chat"], tokenizer=tokenizer)
    with pytest.raises(UserError, match="'base' and 'chat' have equal weights"):
        snaps.check(HOOK)
    with torch.no_grad():
        chat.get_output_embeddings().weight.mul_(2)
    with pytest.raises(UserError, match="snapshot 'chat': its weights were changed or moved after they were read"):
        snaps.check(HOOK)
    with pytest.raises(UserError, match="'chat': its weights were changed"):
        snaps[1].load("cpu")
    Snapshots.from_models([base, chat], ["base", "chat"], tokenizer=tokenizer).check(HOOK)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the type checks of the test run, which would refuse wrong types before we do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def fail() -> Any:
    raise RuntimeError("no such file\nand more")


def test_models_come_by_label_and_labels_name_steps(tokenizer: Any) -> None:
    kept = [make(seed=seed) for seed in range(3)]
    snaps = Snapshots.from_models(
        dict(zip(["step0", "step128", "checkpoint-500"], kept, strict=True)), tokenizer=tokenizer
    )
    assert snaps.labels == ["step0", "step128", "checkpoint-500"] and snaps.steps == [0, 128, 500]
    assert Snapshots.from_models(kept, ["step0", "step128", "last"], tokenizer=tokenizer).steps == [None, None, None]
    assert Snapshots.from_models(kept, ["step0", "step1", "step2"], [5, 6, 7], tokenizer).steps == [5, 6, 7]


MODELS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("no list", lambda t: Snapshots.from_models(make(), ["a"], tokenizer=t), "models is a GPTNeoXFor.*give a list"),  # type: ignore[arg-type]
    ("empty", lambda t: Snapshots.from_models([], [], tokenizer=t), "models is an empty list: give a list of models"),
    (
        "twice",
        lambda t: Snapshots.from_models({"a": make()}, ["a"], tokenizer=t),
        "beside a dictionary, whose keys",
    ),
    ("no labels", lambda t: Snapshots.from_models([make(), make()], tokenizer=t), "labels=None must be a list of 2"),
    ("text", lambda t: Snapshots.from_models([make()], "a", tokenizer=t), "labels='a' must be a list of 1 names"),
    ("labels", lambda t: Snapshots.from_models([make()] * 2, ["a"], tokenizer=t), "1 labels for 2 models: give one"),
    ("steps", lambda t: Snapshots.from_models([make()] * 2, ["a", "b"], [1], t), "1 steps for 2 models: give one"),
    ("twice", lambda t: Snapshots.from_models([make(), make()], ["a", "a"], tokenizer=t), "have the label 'a'"),
    ("one object", lambda t: Snapshots.from_models([make()] * 2, ["a", "b"], tokenizer=t), "'b' have equal weights"),
    ("name", lambda t: Snapshots.from_models(["gpt2"], ["a"], tokenizer=t), "'a': a str is neither a model nor a"),
    ("class", lambda t: Snapshots.from_models([GPT2LMHeadModel], ["a"], tokenizer=t), "a type is neither a model nor"),
    ("module", lambda t: Snapshots.from_models([nn.Linear(2, 2)], ["a"], tokenizer=t), "'a': Linear is not a model"),
    (
        "no head",
        lambda t: Snapshots.from_models([GPTNeoXModel(make().config)], ["a"], tokenizer=t),  # type: ignore[arg-type]
        "GPTNeoXModel has no language-model head: load it with AutoModelForCausalLM",
    ),
    ("no tokenizer", lambda _: Snapshots.from_models([make()], ["a"]), "'a': its model has no tokenizer: give one"),
    ("tokenizer", lambda _: Snapshots.from_models([make()], ["a"], tokenizer="gpt2"), "tokenizer is a str: give a"),  # type: ignore[arg-type]
    (
        "width",
        lambda t: Snapshots.from_models([make(), make(hidden_size=32)], ["a", "b"], tokenizer=t),
        "'a' and 'b' differ in width, 16 and 32: take models of one width",
    ),
    (
        "vocabulary",
        lambda t: Snapshots.from_models([make(), make(vocab_size=12)], ["a", "b"], tokenizer=t),
        "the tokenizer has 18 tokens, the model 12",
    ),
    (
        "kinds",
        lambda t: Snapshots.from_models([make(), hooked(0)], ["a", "b"], tokenizer=t),
        "'a' and 'b' are a transformers model and a HookedTransformer.*give models of one kind",
    ),
    (
        "hook",
        lambda t: Snapshots.from_models([make(), make(num_hidden_layers=1)], ["a", "b"], tokenizer=t).check(HOOK),
        "snapshot 'b': hook_name='blocks.1.hook_resid_post' does not exist: the model has 1 blocks",
    ),
    (
        "hook of a HookedTransformer",
        lambda t: Snapshots.from_models([hooked(0, parallel_attn_mlp=True)], ["a"], tokenizer=t).check(
            "blocks.0.hook_resid_mid"
        ),
        "'a': hook_name='blocks.0.hook_resid_mid' does not exist: attention and MLP of these blocks run in parallel",
    ),
    ("meta", lambda t: Snapshots.from_models([make().to("meta")], ["a"], tokenizer=t), "weights are not loaded"),
    ("fails", lambda t: Snapshots.from_models([fail], ["a"], tokenizer=t).check(HOOK), "failed: RuntimeError: no such"),
    ("returns", lambda t: Snapshots.from_models([dict], ["a"], tokenizer=t).check(HOOK), "a type is neither"),
    (
        "nothing",
        lambda t: Snapshots.from_models([lambda: 3], ["a"], tokenizer=t).check(HOOK),
        "function returned a int",
    ),
    (
        "folder",
        lambda t: Snapshots.from_models([make()], ["a"], tokenizer=t)[0].folder(),
        "'a': its model is in memory, not in a folder: save it with save_pretrained",
    ),
    (
        "attention",
        lambda t: Snapshots.from_models([make()], ["a"], tokenizer=t)[0].load("cpu", attention="sdpa"),  # type: ignore[call-arg]
        "'a': attention='sdpa' is not available for models in memory: use attention='eager'",
    ),
    (
        "record",
        lambda t: Snapshots.from_models([make()], ["a"], tokenizer=t).to_dict(),
        "cannot be recorded: save each with save_pretrained, its tokenizer too, and use Snapshots.of",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "message"), [pytest.param(*row[1:], id=row[0]) for row in MODELS])
def test_models_that_cannot_be_used(call: Callable[[Any], Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(tokenizer)
    assert "\n" not in str(caught.value)


def test_tokenizers_of_different_vocabularies_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    for name, words in (("a", WORDS), ("b", [*WORDS[:-1], "zebra"])):
        write_tokenizer(write_model(tmp_path / name, seed=len(name + words[-1])), words)
    snaps = Snapshots.of({name: tmp_path / name for name in "ab"})
    with pytest.raises(UserError, match="'a' and 'b' have tokenizers with different vocabularies: take models with"):
        snaps.check()
    bridges = [s.load("cpu") for s in snaps]
    with pytest.raises(UserError, match="'a' and 'b' have tokenizers with different vocabularies"):
        Snapshots.from_models(bridges, ["a", "b"])
    Snapshots.from_models(bridges, ["a", "b"], tokenizer=tokenizer).check(HOOK)  # the user says that one serves both


def test_a_run_of_models_in_memory_says_what_it_lacks(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    snaps = Snapshots.from_models([make(seed=0), make(seed=1)], ["base", "chat"], tokenizer=tokenizer)
    tokens = torch.randint(2, 18, (40, 8), generator=torch.Generator().manual_seed(0))
    acts = Activations(
        snaps, HOOK, Dataset(tokens, 200, held_out_tokens=50, prepend_bos=False), settings=ModelSettings("cpu")
    )
    config = TrainConfig(run_dir=str(tmp_path / "run"), batch_size=50, device="cpu")
    crosscoder = train(acts, BatchTopKCrosscoderTrainingConfig(d_sae=16, k=4), config)
    said = capsys.readouterr().err
    assert "models in memory cannot be recorded: save each with save_pretrained" in said
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "source" not in recorded and recorded["model"] == "base, chat"
    assert [row["fingerprint"] for row in crosscoder.cfg.metadata.snapshots] == snaps.fingerprints
    cached = acts.cache(tmp_path / "cache", "float32")
    assert torch.equal(cached.block(0, 5), acts.block(0, 5))


# -------------------------------------------------------------------------------------- folders and repositories
@pytest.fixture
def two(tmp_path: Path) -> Path:
    """base/ and chat/ of different depth, each with its tokenizer, and seeds/ with two models and one tokenizer."""
    write_tokenizer(write_model(tmp_path / "base", 0))
    write_tokenizer(write_model(tmp_path / "chat", 1, num_hidden_layers=2))
    for seed in (3, 4):
        write_model(tmp_path / "seeds" / f"s{seed}", seed)
    write_tokenizer(tmp_path / "seeds" / "tokenizer")
    return tmp_path


def test_any_folders_are_snapshots(two: Path) -> None:
    snaps = Snapshots.of({"base": str(two / "base"), "chat": two / "chat", "seed 3": two / "seeds" / "s3"})
    snaps.check(HOOK)
    assert (snaps.labels, snaps.steps, snaps.n_layers) == (["base", "chat", "seed 3"], [None] * 3, 2)
    assert snaps.name == "base, chat, s3"  # no folder of the user's machine
    again = Snapshots.from_dict(json.loads(json.dumps(snaps.to_dict())))
    assert again == snaps and again.fingerprints == snaps.fingerprints
    for collection in (again, again[[1, 0]], again[:2]):
        collection.check(HOOK)  # they still may differ in depth
    with pytest.raises(UserError, match="snapshot 'chat': hook_name='blocks.2.hook_resid_post' does not exist"):
        snaps.check("blocks.2.hook_resid_post")
    with pytest.raises(UserError, match="'base' and 'chat' differ in depth, 3 and 2: take snapshots of one pretrain"):
        Snapshots(list(snaps), "one run").check()


def test_repositories_and_revisions() -> None:
    snaps = Snapshots.of({"base": "google/gemma-2-2b", "chat": "google/gemma-2-2b-it@v1.0", "old": "gpt2"})
    assert [(s.name, s.revision) for s in snaps] == [
        ("google/gemma-2-2b", "main"),
        ("google/gemma-2-2b-it", "v1.0"),
        ("gpt2", "main"),
    ]
    assert snaps.name == "gemma-2-2b, gemma-2-2b-it, gpt2"
    assert Snapshots.from_dict(snaps.to_dict()) == snaps
    assert Snapshots.of({"a": "org/sft@step1", "b": "org/sft@step2"}).name == "sft"


PLACES: list[tuple[str, Any, str]] = [
    ("empty", {}, r"'{}' gives no models: give labels and places"),
    ("a list", ["base", "chat"], "gives no models: give labels and places"),
    ("a model", {"a": 3}, "'a': '3' is not a place: give labels and places as strings"),
    ("gone", {"a": "./nowhere"}, "'a': there is no folder './nowhere', and it is no name of a repository"),
    ("gone path", {"a": Path("no/where")}, "there is no folder 'no/where'"),
    ("revision of a folder", {"a": "{two}/base@step1"}, "base' is a local folder, which has no revision 'step1'"),
    ("no model", {"a": "{two}/seeds/tokenizer"}, "has no config.json: give a model in the layout of transformers$"),
    ("a run", {"a": "{two}/run"}, "in its sub-folders use Snapshots.local"),
    ("twice", {"a": "{two}/base", "b": "{two}/base"}, "'a' and 'b' have equal weights"),
    ("copies", {"a": "{two}/base", "b": "{two}/copy"}, "'a' and 'b' have equal weights"),
    ("width", {"a": "{two}/base", "b": "{two}/wide"}, "'a' and 'b' differ in width, 16 and 32: take models of one"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("places", "message"), [pytest.param(*row[1:], id=row[0]) for row in PLACES])
def test_places_that_cannot_be_used(places: Any, message: str, two: Path) -> None:
    write_tokenizer(write_model(two / "copy", 0))
    write_tokenizer(write_model(two / "wide", 5, hidden_size=32))
    write_model(two / "run" / "step0", 6)
    if isinstance(places, dict):
        places = {k: v.format(two=two) if isinstance(v, str) else v for k, v in places.items()}
    with pytest.raises(UserError, match=message) as caught:
        Snapshots.of(places).check(HOOK)
    assert "\n" not in str(caught.value)


def test_different_dtypes_are_a_warning(two: Path) -> None:
    make(seed=7).to(torch.bfloat16).save_pretrained(two / "half")
    write_tokenizer(two / "half")
    with pytest.warns(UserWarning, match="'base' are stored as float32, those of 'half' as bfloat16: their difference"):
        Snapshots.of({"base": two / "base", "half": two / "half"}).check(HOOK)
