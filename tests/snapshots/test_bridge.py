"""The contract with TransformerLens: what this package uses of its classes, on the installed release.

`make test-bridge` runs this file with TransformerLens 4, in an environment without SAELens, which does not allow that
release; so nothing here imports SAELens.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    SmolLM3Config,
)

from crosslens.errors import UserError
from crosslens.snapshots import ModelSettings, Snapshots
from crosslens.snapshots.bridge import BRIDGE, check_architecture, kind_of, last_position, transformers_model
from tests.snapshots.test_collection import write_tokenizer

TOKENS = torch.tensor([[0, 3, 5, 7, 2, 9], [0, 11, 4, 4, 6, 17]])
D, LAYERS = 16, 3
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "pythia": GPTNeoXConfig(**SMALL),
    "olmo": OlmoConfig(**SMALL, clip_qkv=0.5),
    "olmo2": Olmo2Config(**SMALL),
    "olmo3": Olmo3Config(**SMALL, sliding_window=4),
    "olmoe": OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "smollm3": SmolLM3Config(**SMALL, num_key_value_heads=1, bos_token_id=1, eos_token_id=1),
    "amber": LlamaConfig(**SMALL),
    "stanford": GPT2Config(vocab_size=20, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=32),
    "bloom": BloomConfig(vocab_size=20, n_head=2, n_layer=LAYERS, hidden_size=D),
}
"""A tiny model of the architecture of every family in the table; PolyPythias is Pythia's."""


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A snapshot as a bridge, the model of transformers, and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
        for parameter in model.parameters():  # biases and norms too, to notice a library that swaps them
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return Snapshots.of({"a": folder})[0].load("cpu"), plain, folder


def test_every_family_has_a_model_here() -> None:
    from crosslens.snapshots.families import read_table

    assert {*read_table()} == {*FAMILIES, "polypythias"}


def test_logits_and_the_residual_stream_are_those_of_transformers(run: tuple[Any, Any, Path]) -> None:
    bridge, plain, _ = run
    with torch.no_grad():
        expected = plain(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(bridge(TOKENS), expected.logits, atol=2e-5, rtol=1e-5)
    logits, cache = bridge.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, expected.logits, atol=2e-5, rtol=1e-5)
    for layer in range(LAYERS - 1):
        hidden = expected.hidden_states[layer + 1]
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], hidden, atol=1e-5, rtol=1e-5)
    _, short = bridge.run_with_cache(TOKENS, stop_at_layer=2, names_filter="blocks.1.hook_resid_post")
    assert torch.equal(short["blocks.1.hook_resid_post"], cache["blocks.1.hook_resid_post"])
    seen: list[str] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: seen.append(str(i))) for i, block in enumerate(bridge.blocks)
    ]
    bridge.run_with_cache(TOKENS, stop_at_layer=2, names_filter="blocks.1.hook_resid_post", return_cache_object=False)
    for handle in handles:
        handle.remove()
    assert "2" not in seen


def test_hooks_change_what_follows_and_carry_gradients(run: tuple[Any, Any, Path]) -> None:
    bridge, plain, _ = run
    point = "blocks.1.hook_resid_post"
    _, cache = bridge.run_with_cache(TOKENS)
    leaf = cache[point].clone().requires_grad_()

    def put_in(x: torch.Tensor, **_: Any) -> torch.Tensor:
        return leaf + 0 * x

    def zero(x: torch.Tensor, **_: Any) -> torch.Tensor:
        return 0 * x

    found = bridge.run_with_hooks(TOKENS, fwd_hooks=[(point, put_in)], return_type="logits")
    torch.testing.assert_close(found, bridge(TOKENS), atol=1e-5, rtol=1e-5)
    found[:, -1, 3].sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().max() > 0
    zeroed = bridge.run_with_hooks(TOKENS, fwd_hooks=[(point, zero)], return_type="logits")
    assert (zeroed - found).abs().max() > 1e-3
    assert torch.equal(bridge(TOKENS), bridge(TOKENS)) and point in bridge.hook_dict


def test_some_tokens_are_unembedded_alone(run: tuple[Any, Any, Path]) -> None:
    bridge, model, _ = run
    expected = model(TOKENS).logits
    options = last_position(bridge)
    assert options == {"logits_to_keep": 1, "use_cache": False}
    torch.testing.assert_close(bridge(TOKENS, return_type="logits", **options)[:, -1], expected[:, -1])
    words = torch.tensor([2, 17, 19])
    weight, bias = bridge.unembed.W_U.T[words], bridge.unembed.b_U[words]
    bridge.unembed.__dict__["forward"] = lambda hidden, **_: torch.nn.functional.linear(hidden, weight, bias)
    try:
        torch.testing.assert_close(bridge(TOKENS, return_type="logits"), expected[..., words])
    finally:
        del bridge.unembed.__dict__["forward"]
    torch.testing.assert_close(bridge(TOKENS, return_type="logits"), expected)


def test_what_else_is_read_of_a_bridge(run: tuple[Any, Any, Path]) -> None:
    bridge, plain, folder = run
    assert kind_of(bridge) == BRIDGE and kind_of(plain) is None
    assert type(transformers_model(bridge)) is type(plain) and transformers_model(torch.nn.Linear(1, 1)) is None
    assert (bridge.cfg.n_heads, bridge.cfg.d_vocab, len(bridge.blocks)) == (2, 20, LAYERS)
    assert isinstance(bridge.cfg.normalization_type, str) and hasattr(bridge, "ln_final")
    assert not any(parameter.requires_grad for parameter in bridge.parameters()) and not bridge.training
    cut = Snapshots.of({"a": folder})[0].load("cpu", n_blocks=2)
    assert len(cut.blocks) == 2
    _, cache = bridge.run_with_cache(TOKENS)
    _, short = cut.run_with_cache(TOKENS)
    torch.testing.assert_close(short["blocks.0.hook_resid_post"], cache["blocks.0.hook_resid_post"])
    made = bridge.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, verbose=False, return_type="tokens")
    assert made.shape == (1, 9)


def test_bfloat16_is_near_float32(run: tuple[Any, Any, Path]) -> None:
    bridge, plain, folder = run
    if int(version("transformer-lens").split(".")[0]) >= 4 and plain.config.model_type in ("olmo", "olmo2", "olmo3"):
        pytest.xfail("TransformerLens 4.3.0's bridges of OLMo mix float32 and bfloat16")
    _, cache = bridge.run_with_cache(TOKENS)
    _, halved = Snapshots.of({"a": folder})[0].load("cpu", "bfloat16").run_with_cache(TOKENS)
    found, exact = (each["blocks.1.hook_resid_post"] for each in (halved, cache))
    assert found.dtype == torch.bfloat16 and (found.float() - exact).norm() < 0.05 * exact.norm()


def test_fused_attention_gives_the_same(run: tuple[Any, Any, Path]) -> None:
    bridge, _, folder = run
    try:
        fused = Snapshots.of({"a": folder}).model(0, ModelSettings("cpu", attention="sdpa"))
    except UserError as error:
        assert "attention='sdpa' is not available for" in str(error)
        return
    torch.testing.assert_close(fused(TOKENS), bridge(TOKENS), atol=2e-5, rtol=1e-4)


def test_an_architecture_without_a_bridge_is_refused() -> None:
    from transformers import XLNetConfig

    with pytest.raises(
        UserError, match=f"TransformerLens {version('transformer-lens')} has no TransformerBridge for XLNet"
    ):
        check_architecture(XLNetConfig())


def conflict() -> str | None:
    """Why TransformerLens 4 is not here: what the installed SAELens requires, as pip says it; None if it is here."""
    if int(version("transformer-lens").split(".")[0]) >= 4:
        return None
    try:
        wanted = next(each for each in requires("sae-lens") or () if re.match(r"transformer[-_]lens\b", each))
    except PackageNotFoundError:
        return "SAELens is not installed, and TransformerLens is below 4"
    return f"sae-lens {version('sae-lens')} depends on {wanted}"


@pytest.mark.skipif(conflict() is not None, reason=str(conflict()))
def test_transformer_lens_4_is_what_this_file_ran_with() -> None:
    with pytest.raises(ImportError):
        from transformer_lens import HookedTransformer  # noqa: F401
    assert kind_of(torch.nn.Linear(1, 1)) is None
