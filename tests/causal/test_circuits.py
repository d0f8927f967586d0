"""Edges between two crosscoders against plain transformers: one prompt, one feature and one snapshot at a time."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import linregress, spearmanr
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from crosslens.causal import circuits
from crosslens.causal.circuits import Edges, carry, connect_features
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention import prompt_runs
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.intervention.upper import Upper
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, Slow, baselines, make_crosscoder, slow_runs

LOWER, UPPER = [3, 0, 7, 11, 20], [5, 2, 16, 9, 1, 23]
ALL = 10_000  # pairs: every selected lower feature is intervened on


def both(lower: Crosscoder, upper: Crosscoder, snaps: Snapshots, task: Task) -> tuple[PromptRuns, PromptRuns]:
    return PromptRuns(lower, snaps, task), PromptRuns(upper, snaps, task)


def carried(low: Slow, s: int, x: Tensor, layer: int) -> Tensor:
    """Output of a block of the plain model when that of the lower block is `x` everywhere except at the BOS."""
    seen: list[Tensor] = []

    def put_in(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        new = torch.cat([hidden[:, :1], x[None, 1:]], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def capture(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers = low.models[s].gpt_neox.layers
    handles = [layers[low.layer].register_forward_hook(put_in), layers[layer].register_forward_hook(capture)]
    low.models[s](low.tokens)
    for handle in handles:
        handle.remove()
    return seen[0][0]


def read(up: Slow, s: int, b: Tensor, target: str) -> Tensor:
    """The target of all upper features (T, F) when snapshot s, and no other, has `b` at the upper hook."""
    acts = torch.stack([b if r == s else up.acts[:, r] for r in range(len(up.snaps))], dim=1)
    if target == "activation":
        found = up.cc.snapshot_acts(up.cc.encode(acts), s)
    else:
        flat = (acts * up.cc.activation_scale[:, None]).flatten(1) - up.cc.cfg.apply_b_dec_to_input * up.cc.b_dec
        found = flat @ up.cc.W_enc + up.cc.b_enc
    return torch.cat([torch.zeros_like(found[:1]), found[1:]])


def slow_edges(low: Slow, up: Slow, s: int, f0: Tensor, e0: Tensor, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Exact and first-order edges (L, U) of one prompt, and the first-order effect of the error node (U,)."""
    clean = read(up, s, up.acts[:, s], target)
    exact = torch.zeros(len(LOWER), len(UPPER))
    for n, i in enumerate(LOWER):
        edited = low.f[s].clone()
        edited[:, i] = f0[:, i]
        b = carried(low, s, low.decode(edited, s) + low.error(s), up.layer)
        exact[n] = (clean - read(up, s, b, target)).sum(0)[UPPER]
    f, e = low.f[s].clone().requires_grad_(), low.error(s).clone().requires_grad_()
    b = carried(low, s, low.decode(f, s) + e, up.layer)
    hidden = read(up, s, b, "pre_activation")
    first, error = torch.zeros(len(LOWER), len(UPPER)), torch.zeros(len(UPPER))
    for m, j in enumerate(UPPER):
        total = torch.zeros(())
        for t in range(1, len(hidden)):
            if target == "pre_activation" or clean[t, j] > 0:
                total = total + hidden[t, j]
        if total.requires_grad:
            df, de = torch.autograd.grad(total, (f, e), retain_graph=True)
            first[:, m] = ((low.f[s] - f0) * df)[1:, LOWER].sum(0)
            error[m] = ((low.error(s) - e0) * de)[1:].sum()
    return exact.detach(), first, error


CASES = [
    pytest.param("standard_crosscoder", "standard_crosscoder", "activation", "zero", marks=pytest.mark.exhaustive),
    ("jumprelu_crosscoder", "topk_crosscoder", "activation", "patch"),
    ("topk_crosscoder", "jumprelu_crosscoder", "activation", "mean"),
    ("standard_crosscoder", "batchtopk_crosscoder", "pre_activation", "patch"),
]


@pytest.mark.parametrize(("below", "above", "target", "baseline"), CASES)
def test_edges_equal_single_interventions(
    snaps: Snapshots, task: Task, below: str, above: str, target: str, baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuits, "BATCH_TOKENS", 6)  # several passes per batch
    monkeypatch.setattr(circuits, "_ENTRIES", 4 * F)
    lower, upper = make_crosscoder(snaps, below, layer=0), make_crosscoder(snaps, above, seed=1, layer=2)
    runs = [PromptRuns(cc, snaps, task, batch_size=3, paired=baseline == "patch") for cc in (lower, upper)]
    found = connect_features(*runs, LOWER, UPPER, n_exact=ALL, target=target, baseline=baseline)
    low, up = slow_runs(snaps, lower, layer=0), slow_runs(snaps, upper, layer=2)
    paired = slow_runs(snaps, lower, "patch_prefix", layer=0)
    for s in (2,):
        per_prompt = [
            slow_edges(a, b, s, f0, e0, target)
            for a, b, (f0, e0) in zip(low, up, baselines(baseline, low, paired, s), strict=True)
        ]
        exact, first, error = (torch.stack(each).double() for each in zip(*per_prompt, strict=True))
        close = {"rtol": 1e-3, "atol": 2e-5}
        torch.testing.assert_close(found.exact[..., s], exact.mean(0), **close)
        torch.testing.assert_close(found.effects[..., s], first.mean(0), **close)
        torch.testing.assert_close(found.error_effects[..., s], error.mean(0), **close)
        torch.testing.assert_close(found.exact_errors[..., s], exact.std(0) / 2, **close)
        torch.testing.assert_close(found.standard_errors[..., s], first.std(0) / 2, **close)
        clean = torch.stack([read(b, s, b.acts[:, s], target).sum(0)[UPPER] for b in up]).double().mean(0)
        torch.testing.assert_close(found.clean[..., s], clean, **close)
    assert found.exact.abs().max() > 0.01 and (found.exact != 0).double().mean() > 0.3
    assert (found.exact - found.effects).abs().max() > 1e-3, "the blocks between must be nonlinear"


def test_first_order_is_the_limit_of_small_interventions(snaps: Snapshots, task: Task) -> None:
    lower, upper = make_crosscoder(snaps, "standard_crosscoder", layer=0), make_crosscoder(snaps, "standard_crosscoder")
    off: list[np.ndarray] = []
    for scale in (1.0, 0.003):
        lower.W_dec.data *= scale
        found = connect_features(*both(lower, upper, snaps, task), LOWER, UPPER, n_exact=ALL, target="pre_activation")
        off.append(found.agreement()["off"].to_numpy())
    assert (off[0] > 0.04).all() and (off[1] < 0.1 * off[0]).all()


def test_only_one_snapshot_is_changed(snaps: Snapshots, task: Task) -> None:
    """An upper crosscoder that reads nothing from a snapshot has no edges there."""
    lower, upper = make_crosscoder(snaps, "standard_crosscoder", layer=0), make_crosscoder(snaps, "standard_crosscoder")
    upper.W_enc_by_snapshot.data[1] = 0
    found = connect_features(*both(lower, upper, snaps, task), LOWER, UPPER, n_exact=ALL)
    assert not found.exact[..., 1].any() and not found.effects[..., 1].any()
    assert found.exact[..., 0].any() and found.exact[..., 2].any() and found.clean[:, 1].any()


def test_the_largest_edges_are_measured_exactly(snaps: Snapshots, task: Task) -> None:
    lower, upper = make_crosscoder(snaps, "topk_crosscoder", layer=0), make_crosscoder(snaps, "topk_crosscoder")
    runs = both(lower, upper, snaps, task)
    every = connect_features(*runs, LOWER, UPPER, n_exact=ALL)
    for n in (0, 4):
        found = connect_features(*runs, LOWER, UPPER, n_exact=n)
        torch.testing.assert_close(found.effects, every.effects)
        for s in range(3):
            ranked = sorted(((abs(float(every.effects[i, j, s])), i) for i in range(5) for j in range(6)), reverse=True)
            measured = {i for _, i in ranked[:n]}
            for i in range(5):
                if i in measured:
                    torch.testing.assert_close(found.exact[i, :, s], every.exact[i, :, s])
                else:
                    assert found.exact[i, :, s].isnan().all() and found.exact_errors[i, :, s].isnan().all()
        assert found.agreement()["n"].tolist() == (~found.exact.isnan()).sum((0, 1)).tolist()


def test_inactive_features_have_no_edges(snaps: Snapshots, task: Task) -> None:
    lower, upper = make_crosscoder(snaps, "standard_crosscoder", layer=0), make_crosscoder(snaps, "standard_crosscoder")
    lower.b_enc.data[3] = upper.b_enc.data[5] = -1e4
    found = connect_features(*both(lower, upper, snaps, task), [0, 3], [5, 2], n_exact=ALL)
    for edges in (found.effects, found.exact):
        assert not edges[1].any() and not edges[:, 0].any() and edges[0, 1].all()
    assert not found.clean[0].any()


def _put_in(x: Tensor, _activation: Tensor, hook: Any) -> Tensor:
    del hook
    return x


def _note(seen: list[Tensor], activation: Tensor, hook: Any) -> None:
    del hook
    seen.append(activation)


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"),
        ("blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"),
        pytest.param("blocks.0.hook_resid_post", "blocks.2.hook_attn_out", marks=pytest.mark.exhaustive),
        pytest.param("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", marks=pytest.mark.exhaustive),
    ],
)
def test_any_two_hook_points(snaps: Snapshots, task: Task, below: str, above: str) -> None:
    """Against the models' own hooks, running all blocks."""
    lower, upper = make_crosscoder(snaps, "jumprelu_crosscoder"), make_crosscoder(snaps, "jumprelu_crosscoder", seed=1)
    lower.cfg.metadata.hook_name, upper.cfg.metadata.hook_name = below, above
    low, up = both(lower, upper, snaps, task)
    found = connect_features(low, up, LOWER, UPPER, n_exact=ALL)
    for s in (2,):
        model = snaps.model(s)
        totals = torch.zeros(len(LOWER), len(UPPER))
        for (batch, run, _), (_, above_run, _) in zip(low.clean(), up.clean(), strict=True):
            clean = above_run.snapshot_acts(upper, s)
            for n, i in enumerate(LOWER):
                f = run.snapshot_acts(lower, s)
                x = run.acts[:, :, s] - f[..., [i]] * lower.W_dec_by_snapshot[i, s] / lower.activation_scale[s]
                seen: list[Tensor] = []
                names = [circuits.canonical_hook(name) for name in (below, above)]
                hooks = [(names[0], partial(_put_in, x)), (names[1], partial(_note, seen))]
                model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
                acts = above_run.acts.clone()
                acts[:, :, s] = seen[0]
                after = upper.snapshot_acts(upper.encode(acts), s) * run.keep[..., None]
                totals[n] += (clean - after)[..., UPPER].sum((0, 1)).detach()
        torch.testing.assert_close(found.exact[..., s].float(), totals / len(low), rtol=1e-3, atol=2e-5)
        assert found.exact[..., s].abs().max() > 1e-3


def test_parallel_attention_and_mlp_do_not_affect_each_other(snaps: Snapshots, task: Task) -> None:
    """The blocks of the tiny model are parallel."""
    lower, upper = make_crosscoder(snaps, "standard_crosscoder"), make_crosscoder(snaps, "standard_crosscoder")
    lower.cfg.metadata.hook_name, upper.cfg.metadata.hook_name = "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"
    found = connect_features(*both(lower, upper, snaps, task), LOWER, UPPER, n_exact=2)
    assert not found.effects.any() and not found.exact.nan_to_num(0.0).abs().gt(1e-5).any()
    assert found.agreement()[["spearman", "slope"]].isna().all(axis=None)


def test_only_blocks_between_the_hooks_run(snaps: Snapshots, task: Task) -> None:
    lower, upper = make_crosscoder(snaps, "standard_crosscoder", layer=0), make_crosscoder(snaps, "standard_crosscoder")
    part, expected = (next(iter(PromptRuns(each, snaps, task).at(2))) for each in (lower, upper))
    model, ran = snaps.model(2), []
    handles = [block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.blocks)]
    rows = torch.arange(len(part))
    b = carry(part.upper, part.clean, rows, "blocks.1.hook_resid_post")
    assert ran == [1]
    torch.testing.assert_close(b, expected.clean, rtol=1e-4, atol=1e-5)
    part.upper.logits(part.clean, rows)
    assert ran == [1, 1, 2], "the stopping hook is removed"
    for handle in handles:
        handle.remove()


POINTS = [
    ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid"),
    ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post"),
    ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"),
    ("blocks.1.hook_mlp_out", "blocks.2.hook_attn_out"),
    ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"),
]


@pytest.fixture(scope="module", params=["hooked_transformer", "gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_snapshots: Path) -> Any:
    sizes = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "hooked_transformer":
            return HookedTransformer(
                HookedTransformerConfig(
                    n_layers=3, d_model=16, n_ctx=8, d_head=8, n_heads=2, d_mlp=32, act_fn="gelu", d_vocab=16,
                    normalization_type="LN", init_weights=True, seed=0,
                )
            )  # fmt: skip
        if request.param == "gpt2":
            made: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, **sizes))
        else:
            made = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
                    **sizes,
                )
            )  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder / "step0")
    shutil.copytree(tiny_snapshots / "tokenizer", folder / "tokenizer")
    return Snapshots.local(folder).model(0)


@pytest.mark.parametrize(("below", "above"), POINTS)
def test_activations_are_carried_between_any_two_points(model: Any, below: str, above: str) -> None:
    """Values and gradients against the model's own hooks, running every block."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 16, (3, 5), generator=g)
    rows = torch.tensor([2, 0, 0, 1])
    x = torch.randn(4, 5, 16, generator=g)
    upstream = torch.randn(4, 5, 16, generator=g)
    run = Upper(model, below, tokens[:1]).on(tokens)
    found: list[tuple[Tensor, Tensor]] = []
    for way in ("carried", "hooked"):
        put = x.clone().requires_grad_()
        if way == "carried":
            arrived = carry(run, put, rows, above)
        else:
            seen: list[Tensor] = []
            hooks = [(circuits.canonical_hook(below), partial(_put_in, put)), (above, partial(_note, seen))]
            model.run_with_hooks(tokens[rows], fwd_hooks=hooks)
            arrived = seen[0]
        found.append((arrived.detach(), torch.autograd.grad((arrived * upstream).sum(), put)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0][1].abs().max() > 1e-3


def test_errors_come_before_the_models_run(snaps: Snapshots, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_runs, "harvest", None)
    lower, upper = make_crosscoder(snaps, "topk_crosscoder", layer=0), make_crosscoder(snaps, "topk_crosscoder")
    low, up = both(lower, upper, snaps, task)

    def refuse(message: str, a: PromptRuns = low, b: PromptRuns = up, **options: Any) -> None:
        given: dict[str, Any] = {"lower_features": [0], "upper_features": [1], **options}
        with pytest.raises(UserError, match=message):
            connect_features(a, b, **given)

    refuse("which is not above blocks.1.hook_resid_post", up, low)
    refuse("which is not above blocks.0.hook_resid_post", low, low)
    refuse(r"feature 24 is not in \[0, 23\]", lower_features=[24])
    refuse("a feature is given twice", upper_features=[1, 1])
    refuse("target='activations' is unknown.*did you mean 'activation'", target="activations")
    refuse("baseline='none' is unknown", baseline="none")
    refuse("n_exact=-1 must be at least 0", n_exact=-1)
    refuse("baseline='patch' needs the paired prompts", baseline="patch")
    refuse("have different batches: make both with one batch_size", b=PromptRuns(upper, snaps, task, batch_size=1))
    other = Task.from_items("other", ITEMS[:2])
    refuse("the lower runs use 'tiny' at .*, the upper runs use 'other'", b=PromptRuns(upper, snaps, other))


def test_a_hook_point_that_the_model_lacks(snaps: Snapshots, task: Task) -> None:
    part = next(iter(PromptRuns(make_crosscoder(snaps, "topk_crosscoder", layer=0), snaps, task).at(0)))
    with pytest.raises(UserError, match="TransformerBridge never reached hook point blocks.7.hook_resid_post"):
        carry(part.upper, part.clean, torch.arange(len(part)), "blocks.7.hook_resid_post")


def given_edges(effects: Tensor, exact: Tensor) -> Edges:
    L, U, S = effects.shape
    nothing = torch.zeros(U, S)
    return Edges(
        "given", [f"step{s}" for s in range(S)], [None] * S, "activation", "zero", torch.arange(L) + 10,
        torch.arange(U) + 20, effects, effects / 2, exact, exact / 2, nothing, nothing + torch.arange(U)[:, None], 3,
    )  # fmt: skip


def test_the_table_of_edges() -> None:
    g = torch.Generator().manual_seed(0)
    effects, exact = torch.randn(3, 4, 2, generator=g).double(), torch.randn(3, 4, 2, generator=g).double()
    exact[1] = math.nan
    table = given_edges(effects, exact).to_frame()
    assert len(table) == 24 and table["step"].isna().all()
    for row in table.to_dict("records"):
        i, j, s = row["lower"] - 10, row["upper"] - 20, row["snapshot"]
        assert (row["effect"], row["effect_se"]) == (float(effects[i, j, s]), float(effects[i, j, s]) / 2)
        np.testing.assert_equal((row["exact"], row["exact_se"]), (float(exact[i, j, s]), float(exact[i, j, s]) / 2))
        assert (row["label"], row["clean"]) == (f"step{s}", j)


def test_agreement_equals_scipy() -> None:
    g = torch.Generator().manual_seed(1)
    effects = torch.randn(3, 4, 3, generator=g).double()
    exact = 2 * effects + 0.5 * torch.randn(3, 4, 3, generator=g).double()
    exact[0, :, 1] = math.nan
    exact[..., 2] = math.nan
    table = given_edges(effects, exact).agreement()
    assert table["n"].tolist() == [12, 8, 0]
    for s, kept in ((0, [0, 1, 2]), (1, [1, 2])):
        a, b = effects[kept, :, s].flatten().numpy(), exact[kept, :, s].flatten().numpy()
        row = table.iloc[s]
        assert row["spearman"] == pytest.approx(spearmanr(a, b).statistic)
        assert row["pearson"] == pytest.approx(linregress(a, b).rvalue)
        assert row["slope"] == pytest.approx(float(np.linalg.lstsq(a[:, None], b, rcond=None)[0][0]))
        assert row["same_sign"] == pytest.approx(sum(x * y > 0 for x, y in zip(a, b, strict=True)) / len(a))
        assert row["off"] == pytest.approx(sum(abs(a - b)) / sum(abs(b)))
    assert table.iloc[2][["spearman", "pearson", "slope", "same_sign", "off"]].isna().all()
