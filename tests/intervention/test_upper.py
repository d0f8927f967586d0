"""The part of a model above a hook point against the whole model with a hook, for several families and hook points."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from crosslens.intervention.upper import Upper
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook

LAYERS, D, V, T = 4, 16, 19, 6
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE: dict[str, Any] = {**SIZES, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "gpt-neox-sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, use_parallel_residual=False)),
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**WIDE)),
    "olmo-2": lambda: Olmo2ForCausalLM(Olmo2Config(**WIDE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES, n_layer=LAYERS, n_head=2)),
    "gpt-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
}
POINTS = (
    "blocks.0.hook_resid_pre",
    "blocks.2.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_post",
    "blocks.3.hook_resid_post",
    "blocks.2.hook_resid_mid",
    "blocks.2.hook_attn_out",
    "blocks.0.hook_mlp_out",
    "blocks.3.hook_mlp_out",
)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_snapshots: Path) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[request.param]()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(folder / "step0")
    shutil.copytree(tiny_snapshots / "tokenizer", folder / "tokenizer")
    return request.param, Snapshots.local(folder).model(0)


@contextmanager
def counted(model: Any) -> Iterator[Counter[int]]:
    """How many prompts every block processes."""
    rows: Counter[int] = Counter()

    def count(place: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            rows[place] += len(output[0] if isinstance(output, tuple) else output)

        return hook

    inside = [getattr(block, "original_component", block) for block in model.blocks]
    handles = [block.register_forward_hook(count(i)) for i, block in enumerate(inside)]
    yield rows
    for handle in handles:
        handle.remove()


def whole(model: Any, point: str, tokens: Tensor, x: Tensor) -> Tensor:
    """Run all blocks with x at the hook."""

    def put_in(activation: Tensor, hook: Any) -> Tensor:
        del activation, hook
        return x

    return model.run_with_hooks(tokens, fwd_hooks=[(canonical_hook(point), put_in)], return_type="logits")[:, -1]


def agree(model: Any, point: str, n_skipped: int) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, V, (3, T), generator=generator)
    x = torch.randn(3, T, D, generator=generator).requires_grad_()
    upper = Upper(model, point, tokens[:1])
    assert upper.skipped == n_skipped
    run = upper.on(tokens)
    with counted(model) as rows:
        found = run.logits(x)
    assert [rows[i] for i in range(n_skipped)] == [0] * n_skipped
    assert [rows[i] for i in range(n_skipped, LAYERS)] == [3] * (LAYERS - n_skipped)
    expected = whole(model, point, tokens, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.abs().sum() > 0
    chosen = torch.tensor([2, 0, 2, 2])
    torch.testing.assert_close(run.logits(x[chosen], chosen), expected[chosen], rtol=1e-5, atol=1e-5)
    wanted = torch.tensor([3, 7, 18])
    some = upper.on(tokens, wanted)
    assert some.wanted is wanted
    found = some.logits(x[chosen], chosen)
    torch.testing.assert_close(found, expected[chosen][:, wanted], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *(
            torch.autograd.grad((out * weights[:1, wanted]).sum(), x)[0]
            for out in (found, whole(model, point, tokens[chosen], x[chosen])[:, wanted])
        ),
        rtol=1e-4,
        atol=1e-5,
    )
    assert not any("forward" in vars(module) for module in (*model.blocks, model.unembed))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("point", POINTS)
def test_the_upper_part_equals_the_model_with_a_hook(family: Any, point: str) -> None:
    name, model = family
    if point.endswith("resid_mid") and name == "gpt-neox":
        pytest.skip("attention and MLP are parallel")
    layer = int(point.split(".")[1])
    agree(model, point, layer + point.endswith("hook_resid_post"))


@pytest.mark.parametrize("point", POINTS)
def test_hooked_transformers_start_at_the_block(point: str) -> None:
    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D,
        n_ctx=T,
        d_head=8,
        n_heads=2,
        d_vocab=V,
        act_fn="gelu",
        positional_embedding_type="rotary",
        rotary_dim=4,
        seed=0,
    )
    model = HookedTransformer(config).requires_grad_(False).eval()
    layer = int(point.split(".")[1])
    agree(model, point, layer + point.endswith("hook_resid_post"))


def test_a_model_with_skip_connections_runs_all_blocks(family: Any) -> None:
    """A block that reads what the first one left behind: skipping blocks is wrong, and that is detected."""
    _, model = family
    seen: list[Tensor] = []

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        new = first(output) + seen[-1]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [
        model.blocks[0].register_forward_hook(lambda _module, _inputs, output: seen.append(first(output))),
        model.blocks[3].register_forward_hook(add),
    ]
    try:
        tokens = torch.randint(1, V, (2, T), generator=torch.Generator().manual_seed(3))
        x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(4))
        upper = Upper(model, "blocks.1.hook_resid_post", tokens)
        assert upper.skipped == 0
        found, expected = upper.on(tokens).logits(x), whole(model, "blocks.1.hook_resid_post", tokens, x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    finally:
        for handle in handles:
            handle.remove()


def test_logits_that_depend_on_those_of_all_tokens_are_computed_from_all(family: Any) -> None:
    _, model = family
    tokens = torch.randint(1, V, (2, T), generator=torch.Generator().manual_seed(5))
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(4))
    wanted = torch.tensor([2, 11])
    capped = model.unembed.register_forward_hook(lambda _module, _inputs, logits: 3 * torch.tanh(logits / 3))
    try:
        upper = Upper(model, "blocks.1.hook_resid_post", tokens)
        assert upper.shortcuts.unembeds_some
        expected = whole(model, "blocks.1.hook_resid_post", tokens, x)
        torch.testing.assert_close(upper.on(tokens, wanted).logits(x), expected[:, wanted], rtol=1e-5, atol=1e-5)
    finally:
        capped.remove()
    normalised = model.unembed.register_forward_hook(lambda _module, _inputs, logits: logits.log_softmax(-1))
    try:
        upper = Upper(model, "blocks.1.hook_resid_post", tokens)
        assert not upper.shortcuts.unembeds_some
        run, expected = upper.on(tokens, wanted), whole(model, "blocks.1.hook_resid_post", tokens, x)
        assert run.wanted is None
        torch.testing.assert_close(run.logits(x), expected, rtol=1e-5, atol=1e-5)
    finally:
        normalised.remove()


def test_blocks_are_restored_after_an_error(family: Any) -> None:
    _, model = family
    tokens = torch.randint(1, V, (2, T), generator=torch.Generator().manual_seed(5))
    before = model(tokens)
    upper = Upper(model, "blocks.1.hook_resid_post", tokens)
    with pytest.raises(RuntimeError):
        upper.on(tokens).logits(torch.zeros(2, T, D + 1))
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
