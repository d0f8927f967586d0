"""Where snapshots come from: folders of one repository, several repositories, adapters, and series of any of them.

What reads a hub is this file run as a program, against a server on 127.0.0.1 or a cache without a connection, because
the Hugging Face libraries read their environment when they are imported.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from crosslens.activations import Activations, harvest
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.pipeline.opening import parse_snapshots
from crosslens.snapshots import ModelSettings, Snapshots
from crosslens.snapshots.families import pattern_model
from crosslens.snapshots.folders import parse_place
from crosslens.snapshots.hub import hub_folder, list_folders, list_repositories, list_revisions
from tests.hub_server import revision_folder, run_program, serve
from tests.snapshots.test_collection import TOKENS, write_model, write_tokenizer

HOOK = "blocks.1.hook_resid_post"
MANY = torch.randint(2, 18, (40, 8), generator=torch.Generator().manual_seed(0))
DATA = Dataset(MANY, 150, held_out_tokens=20, prepend_bos=False)
RANK, ALPHA = 2, 6


# ------------------------------------------------------------------------------------------------------------ adapters
def write_adapter(folder: Path, model: Any, seed: int = 0, targets: tuple[str, ...] = (), **settings: Any) -> Path:
    """A LoRA adapter of a model, in the files of peft."""
    draw = torch.Generator().manual_seed(seed)
    rank = settings.get("r", RANK)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not name.endswith(targets or ("query_key_value", "dense_h_to_4h")):
            continue
        shape = tuple(module.weight.shape)
        out, into = shape[::-1] if type(module).__name__ == "Conv1D" else shape
        own = next((r for p, r in settings.get("rank_pattern", {}).items() if name.endswith(p)), rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(own, into, generator=draw)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, own, generator=draw) / 10
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "me/base", **settings}
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": [*targets], **config}))
    return folder


def slow_merge(model: Any, folder: Path) -> Any:
    """W + alpha / r * B A, one column at a time, from the file alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors, weights = load_file(folder / "adapter_model.safetensors"), dict(model.named_parameters())
    for key, a in tensors.items():
        if ".lora_A" not in key:
            continue
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")]
        alpha = next((v for p, v in config.get("alpha_pattern", {}).items() if name.endswith(p)), config["lora_alpha"])
        scale = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
        weight = weights[f"{name}.weight"].data
        for column in range(a.shape[1]):
            change = sum(scale * a[k, column] * b[:, k] for k in range(len(a)))
            if type(model.get_submodule(name)).__name__ == "Conv1D":
                weight[column] += change
            else:
                weight[:, column] += change
    return model


def make(family: str, folder: Path) -> Any:
    if family == "neox":
        return GPTNeoXForCausalLM.from_pretrained(write_model(folder, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "llama":
            sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
            model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=20, intermediate_size=32, **sizes))
        else:
            model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=2, n_positions=32))
    model.save_pretrained(folder)
    return model.eval()


CASES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("neox", ("query_key_value", "dense_h_to_4h"), {}),
    ("neox", ("dense",), {"use_rslora": True}),
    (
        "llama",
        ("q_proj", "down_proj", "lm_head"),
        {"alpha_pattern": {"down_proj": 3}, "rank_pattern": {"down_proj": 1}},
    ),
    ("gpt2", ("c_attn", "c_fc"), {"fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("family", "targets", "settings"), CASES)
@pytest.mark.parametrize("n_blocks", [None, 2])
def test_an_adapter_is_merged_as_by_hand(
    family: str, targets: tuple[str, ...], settings: dict[str, Any], n_blocks: int | None, tmp_path: Path
) -> None:
    model = make(family, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", model, 1, targets, **settings)
    snaps = Snapshots.of({"base": tmp_path / "base", "tuned": f"{tmp_path / 'base'}+{adapter}"})
    snaps.check(HOOK)
    expected = slow_merge(model, adapter)(TOKENS, output_hidden_states=True)
    merged = snaps[1].load("cpu", n_blocks=n_blocks)
    if n_blocks is None:
        torch.testing.assert_close(merged(TOKENS), expected.logits, atol=1e-5, rtol=1e-5)
        assert (snaps[0].load("cpu")(TOKENS) - expected.logits).abs().max() > 0.01
    _, cache = merged.run_with_cache(TOKENS)
    torch.testing.assert_close(cache[HOOK], expected.hidden_states[2], atol=1e-5, rtol=1e-5)


def test_a_folder_of_an_adapter_may_have_an_at_in_its_name(tmp_path: Path) -> None:
    model = make("neox", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    place = f"{tmp_path / 'base'}+{write_adapter(tmp_path / 'me@home' / 'lora', model, 1, ('dense',))}"
    assert parse_place(place).is_on_disk() and Snapshots.of({"tuned": place})[0].is_on_disk()


@pytest.mark.parametrize(("family", "targets", "settings"), CASES)
def test_an_adapter_is_merged_as_by_peft(
    family: str, targets: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: its merge is not compared")
    model = make(family, tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[*targets], task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at first
            parameter.data.normal_(generator=torch.Generator().manual_seed(0)).div_(10)
    wrapped.save_pretrained(tmp_path / "lora")
    found = Snapshots.of({"tuned": f"{tmp_path / 'base'}+{tmp_path / 'lora'}"})[0].load("cpu")
    with torch.no_grad():
        torch.testing.assert_close(found(TOKENS), wrapped.merge_and_unload()(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_what_was_trained_as_a_whole_takes_its_place(tmp_path: Path) -> None:
    model = make("neox", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    head, bias = torch.randn(20, 16), torch.randn(48)
    tensors[f"base_model.model.{'embed_out' if hasattr(model, 'embed_out') else 'lm_head'}.weight"] = head
    tensors["base_model.model.gpt_neox.layers.0.attention.query_key_value.bias"] = bias
    save_file(tensors, adapter / "adapter_model.safetensors")
    expected = slow_merge(model, adapter)
    expected.get_output_embeddings().weight.data = head
    expected.gpt_neox.layers[0].attention.query_key_value.bias.data = bias
    found = Snapshots.of({"a": f"{tmp_path / 'base'}+{adapter}"})[0].load("cpu")
    torch.testing.assert_close(found(TOKENS), expected(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING: only LORA is merged here; merge it with peft's"),
        ({"use_dora": True}, "has use_dora=True, which is not merged here"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa, which is not merged here"),
        ({"r": 0}, "no numbers above 0 for r and lora_alpha"),
        ({"lora_alpha": None}, "no numbers above 0 for r and lora_alpha"),
    ],
)
def test_other_adapters_are_refused_before_weights_are_read(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make("neox", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", model)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.write_bytes(b"never read")
    with pytest.raises(UserError, match="snapshot 'a': .*") as caught:
        Snapshots.of({"a": f"{tmp_path / 'base'}+{adapter}"}).check(HOOK, weights=False)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    make("neox", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    other = make("llama", tmp_path / "other")
    wide = GPTNeoXForCausalLM.from_pretrained(write_model(tmp_path / "wide", 0, hidden_size=32))
    for model, targets, message in [
        (other, ("q_proj",), "its tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has no place"),
        (
            wide,
            (),
            r"its change of gpt_neox.layers.0.attention.query_key_value does not fit \(\(96, 32\), the model has",
        ),
    ]:
        adapter = write_adapter(tmp_path / f"lora{len(targets)}", model, 0, targets)
        with pytest.raises(UserError, match=f"snapshot 'a': the adapter in .* cannot be merged: {message}"):
            Snapshots.of({"a": f"{tmp_path / 'base'}+{adapter}"})[0].load("cpu")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lacks its partner: copy the adapter again"):
        Snapshots.of({"a": f"{tmp_path / 'base'}+{adapter}"})[0].load("cpu")


def test_local_series_and_what_they_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make("neox", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    for step in (20, 100):
        write_adapter(tmp_path / "runs" / "lora" / f"checkpoint-{step}", model, step)
    (tmp_path / "runs" / "lora" / "logs").mkdir()
    snaps = parse_snapshots("base+runs/lora/checkpoint-{step}", None)
    assert (snaps.labels, snaps.steps, snaps.name) == (["step20", "step100"], [20, 100], "base")
    snaps.check(HOOK)
    assert len({*snaps.fingerprints, Snapshots.of({"a": "base"}).fingerprints[0]}) == 3
    assert Snapshots.from_dict(json.loads(json.dumps(snaps.to_dict()))) == snaps
    named = parse_snapshots("step0=base,step100=base+runs/lora/checkpoint-100", None)
    assert named.steps == [0, 100] and named.fingerprints[1] == snaps.fingerprints[1]
    assert "adapter" not in named.to_dict()["snapshots"][0]
    acts = Activations(named, HOOK, DATA)
    assert [part.count("+") for part in acts.fingerprint()["snapshots"]] == [0, 1]
    before = acts.cache(tmp_path / "cache", "float32").block(0, 4)
    torch.testing.assert_close(before, harvest(named, acts.tokens[:4], HOOK, ModelSettings("cpu")))
    # other weights of the adapter are another cache
    shutil.rmtree(tmp_path / "runs" / "lora" / "checkpoint-100")
    write_adapter(tmp_path / "runs" / "lora" / "checkpoint-100", model, 7)
    with pytest.raises(UserError, match="is a cache for a different request: it has snapshots"):
        again = parse_snapshots("step0=base,step100=base+runs/lora/checkpoint-100", None)
        Activations(again, HOOK, DATA).cache(tmp_path / "cache", "float32")
    for spec, message in [
        ("base+runs/lora/checkpoint-{step}", "no snapshot at step 50: the nearest are 20 and 100"),
        (
            "a=base+runs/lora/checkpoint-50",
            r"'a': there is no folder 'runs/lora/checkpoint-50'.*runs/lora/checkpoint-20 a",
        ),
        ("a=base+base", "'a': base has no adapter_config.json: give the folder of an adapter as peft saves it"),
        ("a=runs/lora/checkpoint-20", "it holds an adapter, so give its model, too: me/base.runs/lora/checkpoint-20"),
        ("a=runs/lora/checkpoint-20@x", "is a local folder, which has no revision 'x'"),
        ("a=base@x+runs/lora/checkpoint-20", "'base' is a local folder, which has no revision 'x'"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            parse_snapshots(spec, "50" if "{" in spec else None)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["org/model/../x", "org/model//x", "org/model/.", "org/model/a/../../.."])
def test_a_folder_that_leads_out_of_the_cache_is_refused(name: str) -> None:
    """Such as a record could name that others wrote."""
    snaps = Snapshots.from_hub(name, ["main"])
    for attempt in (snaps[0].folder, snaps[0].evict, snaps.check):
        with pytest.raises(UserError, match="snapshot 'main': .* is not the name of a folder in a repository"):
            attempt()
    with pytest.raises(UserError, match="it is no name of a repository"):
        Snapshots.of({"a": name})


def test_an_architecture_without_a_bridge_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config = {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "d_model": 16, "n_layer": 2, "n_head": 2}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    write_tokenizer(tmp_path / "a")
    with pytest.raises(UserError, match=r"snapshot 'a': TransformerLens \S+ has no TransformerBridge for XLNetLMHead"):
        Snapshots.of({"a": tmp_path / "a"}).check(weights=False)


# ------------------------------------------------------------------------------------------------------------- the hub
FOLDERS, MANY_REPOS, LORA = "org/model", "org/tiny-step-{}k", "me/lora"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in folders, with one tokenizer at the top; a repository a step; adapters of the first model."""
    root = tmp_path_factory.mktemp("hub")
    top = revision_folder(root, FOLDERS, "main")
    for step in (0, 1000, 3000):
        write_model(top / "checkpoints" / f"step{step}", step)
    write_tokenizer(top)
    for step in (50, 240, 480):
        place = revision_folder(root, MANY_REPOS.format(step), "main")
        write_model(place, step)
        write_tokenizer(place)
    lora = revision_folder(root, LORA, "main")
    model = AutoModelForCausalLM.from_pretrained(top / "checkpoints" / "step0")
    for step in (10, 20):
        write_adapter(lora / f"checkpoint-{step}", model, step)
    write_adapter(revision_folder(root, "me/lora-v2", "v2"), model, 5)
    return root


@pytest.mark.exhaustive
def test_every_source_through_the_hubs_client(hub: Path, tmp_path: Path) -> None:
    with serve(hub) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = run_program([__file__, str(hub)], tmp_path, **environment)
    names = ["folders", "repositories", "adapters", "errors", "evict"]
    assert done.stdout.split() == names, done.stdout + done.stderr
    weights = [line for line in asked if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(set(weights)) > 8 and not any("adapter_model" in w for w in asked if "/org/" in w)


@pytest.mark.slow
def test_every_source_from_a_cache_without_a_connection(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    shutil.copytree(hub, tmp_path / "home" / "hub")
    done = run_program([__file__, str(hub), "offline"], tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.stdout.split() == ["folders", "repositories", "adapters"], done.stdout + done.stderr


def plain(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return (model if adapter is None else slow_merge(model, adapter))(TOKENS).logits


def check(snaps: Snapshots, expected: list[torch.Tensor]) -> None:
    snaps.check(HOOK)
    assert snaps.tokenizer("c a")["input_ids"] == [4, 2]
    assert Snapshots.from_dict(json.loads(json.dumps(snaps.to_dict()))) == snaps
    for snapshot, logits in zip(snaps, expected, strict=True):
        torch.testing.assert_close(snapshot.load("cpu")(TOKENS), logits, atol=1e-5, rtol=0)


def check_folders(hub: Path) -> None:
    top = revision_folder(hub, FOLDERS, "main")
    snaps = parse_snapshots(f"{FOLDERS}/checkpoints/step{{step}}", None)
    assert (snaps.labels, snaps.steps) == (["step0", "step1000", "step3000"], [0, 1000, 3000])
    assert {s.revision for s in snaps} == {"main"} and snaps[1].name == f"{FOLDERS}/checkpoints/step1000"
    check(snaps, [plain(top / "checkpoints" / label) for label in snaps.labels])
    assert len({s.origin for s in snaps}) == 3 and snaps[1].origin.startswith(f"{FOLDERS}/checkpoints/step1000@")
    assert parse_snapshots(f"{FOLDERS}/checkpoints/step{{step}}", "log:2").labels == ["step0", "step3000"]
    two = Snapshots.of({"step0": f"{FOLDERS}/checkpoints/step0", "step3000": f"{FOLDERS}/checkpoints/step3000@main"})
    assert two.steps == [0, 3000] and two.fingerprints == [snaps.fingerprints[0], snaps.fingerprints[2]]


def check_repositories(hub: Path) -> None:
    snaps = Snapshots.from_model(pattern_model("org/tiny-step-{step}k"))
    assert (snaps.labels, snaps.steps, snaps.name) == (["step50", "step240", "step480"], [50, 240, 480], "tiny-step")
    check(snaps, [plain(revision_folder(hub, MANY_REPOS.format(s), "main")) for s in snaps.steps])


def check_adapters(hub: Path) -> None:
    base, lora = revision_folder(hub, FOLDERS, "main") / "checkpoints" / "step0", revision_folder(hub, LORA, "main")
    snaps = parse_snapshots(f"{FOLDERS}/checkpoints/step0@main+{LORA}/checkpoint-{{step}}", None)
    assert snaps.labels == ["step10", "step20"]
    check(snaps, [plain(base, lora / f"checkpoint-{step}") for step in (10, 20)])
    three = Snapshots.of(
        {"base": f"{FOLDERS}/checkpoints/step0", "tuned": f"{FOLDERS}/checkpoints/step0+me/lora-v2@v2"}
    )
    check(three, [plain(base), plain(base, revision_folder(hub, "me/lora-v2", "v2"))])
    assert three[1].adapter == "me/lora-v2@v2" and three[1].origin.count("@") == 2


def check_errors(_: Path) -> None:
    for name, message in [
        (f"{FOLDERS}/checkpoints/step2000", "has no folder 'checkpoints/step2000' with a config.json: the nearest "
         "folders with one are checkpoints/step1000 and checkpoints/step3000"),
        (FOLDERS, "org/model@main has no config.json: the nearest folders with one are checkpoints/step0 and"),
        ("org/tiny-step-200k", "there is no repository 'org/tiny-step-200k' on the hub: the nearest are "
         "org/tiny-step-240k and org/tiny-step-50k"),
        (f"{FOLDERS}/checkpoints/step0@v7", "org/model has no revision 'v7': the nearest are main"),
        (f"{FOLDERS}/checkpoints/step0+{LORA}/checkpoint-15", "me/lora@main has no folder 'checkpoint-15' with a "
         "adapter_config.json: the nearest folders with one are checkpoint-10 and checkpoint-20"),
        (f"{FOLDERS}/checkpoints/step0+me/lora-v3", "there is no repository 'me/lora-v3' on the hub: the nearest are "
         "me/lora-v2"),
        (f"{FOLDERS}/checkpoints/step0+me/lora-v2@v3", "me/lora-v2 has no revision 'v3': the nearest are v2"),
    ]:  # fmt: skip
        refused(lambda n=name: Snapshots.of({"a": n}).check(weights=False), message)
    for spec, steps, message in [
        (f"{FOLDERS}/checkpoints/step{{step}}", "2000", "no snapshot at step 2000: the nearest are 1000 and 3000"),
        ("org/tiny-step-{step}k", "200", "no snapshot at step 200: the nearest are 50 and 240"),
        (f"org/model+{LORA}/checkpoint-{{step}}", "11", "no snapshot at step 11: the nearest are 10 and 20"),
    ]:
        refused(lambda s=spec, t=steps: parse_snapshots(s, t), message)


def check_evict(_: Path) -> None:
    """The model below the adapters is downloaded once, and deleted at the end; what the user downloaded is kept."""
    for cached in (hub_folder, list_folders, list_repositories, list_revisions):
        cached.cache_clear()
    blobs = Path.cwd() / "hub"
    shutil.rmtree(blobs)
    snaps = parse_snapshots(f"{FOLDERS}/checkpoints/step0+{LORA}/checkpoint-{{step}}", None)
    acts = Activations(snaps, HOOK, DATA)
    assert acts.plan(measure=False).n_downloads == 2
    cached = acts.cache("cache", "float32", evict=True)
    assert not [path for path in blobs.rglob("*.safetensors") if path.exists()]
    assert len(set(snaps.fingerprints)) == 2  # recorded
    again = Activations(snaps, HOOK, acts.dataset).cache("cache", "float32")
    assert torch.equal(next(again.batches(50)), next(cached.batches(50)))


def refused(attempt: Callable[[], Any], message: str) -> None:
    try:
        attempt()
    except UserError as error:
        assert message in str(error) and "\n" not in str(error), f"{error}\nwhere expected was\n{message}"
    else:
        raise AssertionError(f"nothing was refused: {message}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in (check_folders, check_repositories, check_adapters, check_errors, check_evict)[
        : 3 if "offline" in sys.argv else 5
    ]:
        each(Path(sys.argv[1]))
        sys.stdout.write(f"{each.__name__.removeprefix('check_')}\n")
