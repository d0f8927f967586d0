"""Steering against ablation by `Splice`, and against plain transformers with hand-written hooks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import GPTNeoXForCausalLM

from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.splice import CleanRun, Edit, Splice
from crosslens.intervention.steering import steer
from crosslens.snapshots.collection import Snapshots
from tests.plain_model import F, draw_crosscoder, make_crosscoder

PROMPT = torch.tensor([[0, 2, 6, 10, 3, 13]])  # the cat sees a fish, after the BOS
EDITS = {3: 0.0, 5: 2.5, 11: -1.0}


@pytest.fixture(scope="module")
def hooked(snaps: Snapshots) -> Snapshots:
    """Three HookedTransformers."""
    config = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_mlp=32, d_vocab=16, act_fn="gelu", seed=0
    )
    models = [HookedTransformer(config, snaps.tokenizer).requires_grad_(False).eval() for _ in range(3)]
    return Snapshots.from_models(models, labels=["a", "b", "c"], tokenizer=snaps.tokenizer)


@pytest.fixture(params=["bridge", "hooked_transformer"])
def both(request: pytest.FixtureRequest, snaps: Snapshots, hooked: Snapshots) -> tuple[Crosscoder, Snapshots]:
    """A crosscoder and snapshots of either kind of model."""
    found = snaps if request.param == "bridge" else hooked
    crosscoder = draw_crosscoder("batchtopk_crosscoder", 3, 16).to_inference()
    crosscoder.cfg.metadata.hook_name, crosscoder.cfg.metadata.prepend_bos = "blocks.1.hook_resid_post", True
    return crosscoder, found


def write(model: Any, prompt: Tensor, n: int = 12, *, cached: bool = True) -> Tensor:
    """The prompt with n more tokens, the most probable ones."""
    return model.generate(
        prompt, max_new_tokens=n, do_sample=False, stop_at_eos=False, use_past_kv_cache=cached, return_type="tokens",
        verbose=False,
    )  # fmt: skip


def logits_in_parts(model: Any, tokens: Tensor) -> Tensor:
    """Logits at all positions, in parts of three tokens, then one, with a cache of keys and values."""
    parts = (tokens[:, :3], *tokens[:, 3:].split(1, 1))
    if isinstance(model, HookedTransformer):
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
        return torch.cat([model(part, past_kv_cache=cache) for part in parts], 1)
    found, cache = list[Tensor](), None
    for part in parts:
        out = model.original_model(part, use_cache=True, past_key_values=cache)
        found.append(out.logits)
        cache = out.past_key_values
    return torch.cat(found, 1)


def test_a_factor_of_1_changes_no_bit(both: tuple[Crosscoder, Snapshots]) -> None:
    crosscoder, snapshots = both
    every = dict.fromkeys(range(F), 1.0)
    for s, cached in itertools.product(range(3), (True, False)):
        model: Any = snapshots.model(s)
        before = model(PROMPT), logits_in_parts(model, PROMPT), write(model, PROMPT, cached=cached)
        for edits in (every, [Edit(None, factor=1.0, value=0.0)]):
            with steer(crosscoder, snapshots, s, edits) as steered:
                after = steered(PROMPT), logits_in_parts(steered, PROMPT), write(steered, PROMPT, cached=cached)
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_factor_of_0_is_the_ablation(both: tuple[Crosscoder, Snapshots]) -> None:
    crosscoder, snapshots = both
    tokens = torch.tensor([PROMPT[0].tolist(), [0, 7, 9, 11, 2, 4]])
    run = CleanRun.of(crosscoder, snapshots, tokens)
    for s, features in itertools.product(range(3), ([4], [1, 2, 9], list(range(F)))):
        model: Any = snapshots.model(s)
        expected = Splice(crosscoder, run, s, [Edit(features)]).logits(model)
        assert (expected - model(tokens)).abs().max() > 1e-3
        with steer(crosscoder, snapshots, s, dict.fromkeys(features, 0.0)) as steered:
            found = steered(tokens), steered.run_with_hooks(tokens, fwd_hooks=[]), logits_in_parts(steered, tokens)
        for logits in found:
            assert (logits - expected).abs().max() < 1e-6 * max(1, float(expected.abs().max()))  # 2 bits of float32
        assert torch.equal(snapshots.model(s)(tokens), model(tokens))


@pytest.mark.parametrize("edits", [EDITS, [Edit([3], value=2.0), Edit([7, 8], factor=1.0, value=1.5)]])
def test_steering_equals_the_splice_on_the_text_that_it_writes(both: tuple[Crosscoder, Snapshots], edits: Any) -> None:
    crosscoder, snapshots = both
    listed = [Edit([i], factor=f) for i, f in edits.items()] if isinstance(edits, dict) else edits
    for s in range(3):
        written: list[Tensor] = []
        with steer(crosscoder, snapshots, s, edits) as model:
            written += [write(model, PROMPT, cached=cached) for cached in (True, False)]
            seen = model(written[0])
        assert torch.equal(written[0], written[1])
        run = CleanRun.of(crosscoder, snapshots, written[0])
        expected = Splice(crosscoder, run, s, listed).logits(snapshots.model(s))
        assert (seen - expected).abs().max() < 1e-6
        assert torch.equal(expected[:, 5:-1].argmax(-1), written[0][:, 6:])


def plain_continuation(snaps: Snapshots, crosscoder: Crosscoder, s: int, n: int) -> tuple[list[int], Tensor]:
    """The same with transformers alone: every token from a pass over the whole text, features one by one."""
    models: Any = [GPTNeoXForCausalLM.from_pretrained(at.name, attn_implementation="eager").eval() for at in snaps]
    W = crosscoder.W_dec.view(F, len(snaps), -1)[:, s] / crosscoder.activation_scale[s]
    tokens, logits = PROMPT[0].tolist(), torch.zeros(0)
    for _ in range(n):
        batch = torch.tensor([tokens])
        x = torch.stack([model(batch, output_hidden_states=True).hidden_states[2][0] for model in models], 1)
        f = crosscoder.snapshot_acts(crosscoder.encode(x), s)
        change = sum((factor - 1) * f[:, i, None] * W[i] for i, factor in EDITS.items())
        assert isinstance(change, Tensor)
        change[batch[0] == 0] = 0  # the BOS, which separates documents, too

        def hook(_module: Any, _inputs: Any, output: Any, change: Tensor = change) -> Any:
            return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

        handle = models[s].gpt_neox.layers[1].register_forward_hook(hook)
        logits = models[s](batch).logits[0]
        handle.remove()
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


@pytest.mark.parametrize("architecture", ["batchtopk_crosscoder", "jumprelu_crosscoder"])
@torch.no_grad()
def test_steering_equals_plain_transformers(snaps: Snapshots, architecture: str) -> None:
    crosscoder = make_crosscoder(snaps, architecture)
    for s in (0, 2):
        tokens, logits = plain_continuation(snaps, crosscoder, s, 8)
        with steer(crosscoder, snaps, snaps.labels[s], EDITS) as model:
            for cached in (True, False):
                assert write(model, PROMPT, 8, cached=cached)[0].tolist() == tokens
            assert (model(torch.tensor([tokens[:-1]]))[0] - logits).abs().max() < 1e-5
            # the generate of transformers runs the same hooks
            beside = model.original_model.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=99)
            assert beside[0].tolist() == tokens


def test_text_loss_and_hooks_work_within(snaps: Snapshots) -> None:
    crosscoder = make_crosscoder(snaps, "batchtopk_crosscoder")
    model: Any = snaps.model(2)
    seen: list[Tensor] = []

    def see(activation: Tensor, hook: Any) -> None:
        del hook
        seen.append(activation)

    hook = ("blocks.1.hook_resid_post", see)
    clean = model("the cat sees a", return_type="loss")
    with steer(crosscoder, snaps, 2, {3: 0.0, 4: 8.0}):
        steered = model("the cat sees a", return_type="loss")
        assert steered != clean
        model.run_with_hooks("the cat sees a", fwd_hooks=[hook])
        assert model("the cat sees a", return_type="loss") == steered  # the hooks of steering stay
        assert model.generate("the cat", max_new_tokens=3, verbose=False).startswith("the cat")
    model.run_with_hooks("the cat sees a", fwd_hooks=[hook])
    assert not torch.equal(seen[0], seen[1])  # hooks at the same point see the steered activation
    assert model("the cat sees a", return_type="loss") == clean


def test_no_other_snapshot_runs_where_features_are_added_to(snaps: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder = make_crosscoder(snaps, "topk_crosscoder")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("crosslens.intervention.steering.harvest", refuse)
    with steer(crosscoder, snaps, 0, Edit([2], factor=1.0, value=3.0)) as model:
        assert not torch.equal(model(PROMPT), snaps.model(1)(PROMPT))


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ({}, "no edits are given"),
        ({F: 1.0}, r"feature 24 is not in \[0, 23\]"),
        (Edit([1], positions=[-1]), "steering edits every position"),
        (Edit([1], value=torch.zeros(1, 6, F)), r"one number or \(24,\) numbers"),
    ],
)
def test_edits_are_refused(snaps: Snapshots, edits: Any, words: str) -> None:
    crosscoder = make_crosscoder(snaps, "topk_crosscoder")
    with pytest.raises(UserError, match=words), steer(crosscoder, snaps, 0, edits):
        pass
    with pytest.raises(UserError, match="no snapshot has the label 'step5'"), steer(crosscoder, snaps, "step5", {1: 0}):
        pass


def test_what_cannot_be_followed_is_refused(snaps: Snapshots) -> None:
    crosscoder = make_crosscoder(snaps, "topk_crosscoder")
    model: Any = snaps.model(2)
    with pytest.raises(UserError, match="prompts of one length"), steer(crosscoder, snaps, 2, {1: 0.0}):
        model.generate(["the cat", "the cat sees a fish"], max_new_tokens=2, verbose=False)
    cache = model.original_model(PROMPT, use_cache=True).past_key_values
    with pytest.raises(UserError, match="a text of 6 tokens that it did not read"), steer(crosscoder, snaps, 2, {1: 0}):
        model(PROMPT[:, :1], use_cache=True, past_key_values=cache)
    with pytest.raises(UserError, match="takes no edits below"), steer(crosscoder, snaps, 2, {1: 0.0}):
        model.run_with_hooks(PROMPT, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: 0 * x)])  # noqa: ARG005
    assert not model.original_model._forward_pre_hooks
