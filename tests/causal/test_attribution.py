"""Attribution against plain transformers with hand-written hooks, captum, and a model solved by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosslens import crosscoders
from crosslens.causal import attribution, recipes
from crosslens.causal.attribution import Attribution, Estimator, attribute, exact_effects, quadrature
from crosslens.causal.relative import effect_interval, relie, relie_interval, share_relie, sign_changes
from crosslens.crosscoders import StandardCrosscoder, StandardCrosscoderConfig
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.intervention.splice import CleanRun, spliced_logits
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.prompts import PromptBatch
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, Slow, baselines, make_crosscoder, plain_model, slow_runs

NOUNS = ("cat", "dog", "king", "child")
MANY = [
    {"prefix": prefix, "correct": "sees", "wrong": "likes"}
    for a, b in itertools.product(NOUNS, NOUNS)
    for prefix in (f"the {a} near the {b}", f"{a} {b}", f"the {b} sees a {a} near a {b}")
]


def same(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


# ---------------------------------------------------------------------- against plain transformers
@pytest.mark.parametrize(
    ("architecture", "baseline", "error", "rule", "n_nodes"),
    [
        ("standard_crosscoder", "zero", "joint", "gauss_legendre", 5),
        ("jumprelu_crosscoder", "zero", "frozen", "midpoint", 3),
        ("batchtopk_crosscoder", "mean", "joint", "midpoint", 2),
        ("jumprelu_crosscoder", "mean", "frozen", "left", 3),
        ("jumprelu_crosscoder", "patch", "joint", "gauss_legendre", 2),
        ("topk_crosscoder", "patch", "frozen", "left", 4),
        ("batchtopk_crosscoder", "patch", "joint", "removal", 0),
        ("standard_crosscoder", "mean", "joint", "both_ends", 0),
    ],
)
def test_ig_equals_gradients_of_single_features(
    snaps: Snapshots, task: Task, architecture: str, baseline: str, error: str, rule: str, n_nodes: int
) -> None:
    cc = make_crosscoder(snaps, architecture)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    runs = PromptRuns(cc, snaps, task, batch_size=2, paired=baseline == "patch")
    if n_nodes:
        estimator = Estimator("ig", rule=rule, n_nodes=n_nodes, error=error, baseline=baseline)
        points = quadrature(rule, n_nodes)
    else:
        estimator = Estimator(rule, baseline=baseline)
        points = estimator.nodes()
    found = attribute(runs, estimator, positions=True)
    assert found.positions is not None
    for s in (0, 2):
        effects, errors = torch.zeros(4, 6, F), torch.zeros(4, 6)  # by prompt and position from the end
        clean, start = torch.zeros(4), torch.zeros(4)
        for i, (run, (f0, e0)) in enumerate(zip(slow, baselines(baseline, slow, paired, s), strict=True)):
            by_position, error_node = run.effects(s, f0, e0 if error == "joint" else None, *points)
            effects[i, : len(by_position)], errors[i, : len(error_node)] = by_position.flip(0), error_node.flip(0)
            clean[i] = run.metric(s)
            start[i] = run.metric(s, run.decode(f0, s) + (e0 if error == "joint" else run.error(s)))
        totals, error_totals = effects.sum(1).double(), errors.sum(1).double()
        same(found.effects[:, s], totals.mean(0), atol=3e-5)  # gates near their threshold round differently elsewhere
        same(found.standard_errors[:, s], totals.std(0) / 2)
        same(found.error_effect[s], error_totals.mean())
        assert (error == "joint") == bool(found.error_effect[s] != 0)
        same(found.metric_clean[s], clean.mean())
        same(found.metric_baseline[s], start.mean())
        change = (clean - start).double()
        residual = (totals.sum(-1) + error_totals - change).abs()
        same(found.completeness[s], residual.mean() / change.abs().mean(), rtol=1e-3, atol=1e-4)
        ids = found.positions.features
        same(found.positions.effects[..., s], effects.mean(0)[:, ids])
        same(found.positions.sizes[..., s], effects.abs().mean(0)[:, ids])
        same(found.positions.error_effects[:, s], errors.mean(0))
        same(found.positions.error_sizes[:, s], errors.abs().mean(0))
        others = torch.ones(F, dtype=torch.bool).index_fill_(0, ids, False)
        assert effects[..., others].abs().sum() == 0 and not found.active[others].any()


@pytest.mark.parametrize(
    ("hook", "method"),
    [
        ("blocks.0.hook_resid_pre", "ig"),
        pytest.param("blocks.2.hook_resid_pre", "exact", marks=pytest.mark.exhaustive),
        pytest.param("blocks.1.hook_attn_out", "ig", marks=pytest.mark.exhaustive),
        ("blocks.2.hook_mlp_out", "exact"),
    ],
)
def test_other_hook_points_equal_the_whole_model_with_a_hook(
    snaps: Snapshots, task: Task, hook: str, method: str
) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    cc.cfg.metadata.hook_name = hook
    features = list(range(0, F, 8)) if method == "exact" else None
    found = attribute(
        cc, snaps, task, Estimator(method, rule="midpoint", n_nodes=2, baseline="zero"), features=features
    )
    for s in (0, 2):
        effects, baseline = torch.zeros(4, F), torch.zeros(4)
        for batch in PromptRuns(cc, snaps, task, batch_size=1, paired=False).batches:
            run, item = CleanRun.of(cc, snaps, batch.tokens), int(batch.index)

            def metric(f: Tensor, share: float, run: CleanRun = run, batch: PromptBatch = batch, s: int = s) -> Tensor:
                error = run.acts[:, :, s] - cc.decode_snapshot(run.features, s)
                x = cc.decode_snapshot(f, s) + share * error
                logits = spliced_logits(snaps.model(s), batch.tokens, hook, x, run.keep)[0, -1]
                return logits[batch.correct[0]] - logits[batch.wrong[0]]

            baseline[item] = metric(0 * run.features, 0)
            for alpha in (0.25, 0.75) if features is None else ():
                f = (alpha * run.features).requires_grad_()
                (gradient,) = torch.autograd.grad(metric(f, alpha), f)
                effects[item] += (run.features * gradient).sum((0, 1)) / 2
            for i in features or ():
                f = run.features.clone()
                f[..., i] = 0
                effects[item, i] = metric(run.features, 1) - metric(f, 1)
        same(found.effects[:, s], effects.mean(0))
        same(found.metric_baseline[s], baseline.mean())


@pytest.mark.parametrize(
    ("architecture", "baseline", "error"),
    [
        pytest.param("batchtopk_crosscoder", "zero", "joint", marks=pytest.mark.exhaustive),
        ("jumprelu_crosscoder", "mean", "frozen"),
        ("jumprelu_crosscoder", "patch", "joint"),
    ],
)
def test_exact_equals_one_run_per_feature(
    snaps: Snapshots, task: Task, architecture: str, baseline: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "BATCH_TOKENS", 20)  # several passes per batch
    cc = make_crosscoder(snaps, architecture)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    runs = PromptRuns(cc, snaps, task, batch_size=3, paired=True)
    found = attribute(runs, Estimator("exact", error=error), baseline=baseline)
    for s in (2,):
        rows: list[Tensor] = []
        errors: list[float] = []
        for run, (f0, e0) in zip(slow, baselines(baseline, slow, paired, s), strict=True):
            clean = run.metric(s)
            rows.append((clean - run.without_each(s, range(F), f0)).double())
            errors.append(float(clean - run.metric(s, run.decode(run.f[s], s) + e0)))
        effects = torch.stack(rows)
        same(found.effects[:, s], effects.mean(0))
        same(found.standard_errors[:, s], effects.std(0) / 2)
        same(found.error_effect[s], torch.tensor(errors).mean() if error == "joint" else torch.zeros(()))
        same(found.effects[:, s], exact_effects(runs, s, torch.arange(F), baseline=baseline))


def test_exact_of_chosen_features(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    every = attribute(cc, snaps, task, "exact", baseline="zero")
    chosen = every.top(3, -1, by="magnitude")
    some = attribute(cc, snaps, task, "exact", features=chosen, baseline="zero")
    same(some.effects[chosen], every.effects[chosen])
    rest = torch.ones(F, dtype=torch.bool).index_fill_(0, chosen, False)
    assert some.effects[rest].abs().sum() == 0 and not some.active[rest].any()
    assert some.completeness.isnan().all() and not every.completeness.isnan().any()
    assert sorted(some.top(3, -1, by="magnitude").tolist()) == sorted(chosen.tolist())


# ---------------------------------------------------------------------- against captum
@pytest.mark.parametrize(
    ("rule", "theirs", "baseline"),
    [
        ("gauss_legendre", "gausslegendre", "zero"),
        ("midpoint", "riemann_middle", "patch"),
        ("left", "riemann_right", "zero"),
    ],
)
def test_ig_equals_captum(snaps: Snapshots, task: Task, rule: str, theirs: str, baseline: str) -> None:
    captum_attr = pytest.importorskip("captum.attr")
    cc = make_crosscoder(snaps, "topk_crosscoder", seed=3)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    found = attribute(cc, snaps, task, Estimator("ig", rule=rule, n_nodes=6), baseline=baseline)
    for s in (2,):
        rows: list[Tensor] = []
        errors: list[Tensor] = []
        for run, (f0, e0) in zip(slow, baselines(baseline, slow, paired, s), strict=True):

            def forward(f: Tensor, e: Tensor, run: Slow = run, s: int = s) -> Tensor:
                return run.metrics(s, run.decode(f, s) + e)

            inputs, start = (run.f[s][None], run.error(s)[None]), (f0[None], e0[None])
            ours, error = captum_attr.IntegratedGradients(forward).attribute(
                inputs, baselines=start, n_steps=6, method=theirs
            )
            rows.append(ours.sum((0, 1)))
            errors.append(error.sum())
        same(found.effects[:, s], torch.stack(rows).mean(0))
        same(found.error_effect[s], torch.stack(errors).mean())


# ---------------------------------------------------------------------- a model solved by hand
LINEAR: dict[str, Any] = {
    "metric": (1.0, 4.0),  # m = k_s (h_0 - h_1) of the last position's residual stream h
    "scale": (1.0, 2.0),  # activation_scale
    "features": (2.0, 3.0),  # the two features, the same everywhere
    "first": (0.5, 0.75),  # W_dec[0, s] = (first_s, 0, ...)
    "second": (1.0, 1.0),  # W_dec[1, s] = (0, second_s, 0, ...) at the first snapshot, negated at the second
    "bias": (0.25, -0.5),  # b_dec[s] = (bias_s, 0, ...)
}


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshots, StandardCrosscoder]:
    """Two snapshots whose metric is linear in the last block's output, and a crosscoder of two constant features.

    The last layer norm is linear because its epsilon dwarfs the variance; answers are unembedded along (1, 0, ...) and
    (0, 1, 0, ...), so m = k_s (h_0 - h_1).
    """
    folder = tmp_path_factory.mktemp("linear")
    words = ("[bos]", "[unk]", "one", "two", "three", "right", "wrong")
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    raw.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="[bos]", eos_token="[bos]", pad_token="[bos]", unk_token="[unk]"
    ).save_pretrained(folder / "tokenizer")
    config = GPTNeoXConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        layer_norm_eps=1e8,
        bos_token_id=0,
        eos_token_id=0,
    )
    for s, k in enumerate(LINEAR["metric"]):
        with torch.random.fork_rng():
            torch.manual_seed(s)
            model = GPTNeoXForCausalLM(config)
        model.gpt_neox.final_layer_norm.weight.data.fill_(1e4)
        unembedding = model.get_output_embeddings().weight.data
        unembedding.zero_()
        unembedding[5, 0] = unembedding[6, 1] = k
        model.gpt_neox.embed_in.weight.data.mul_(100)
        model.save_pretrained(folder / f"step{s}")
    snaps = Snapshots.local(folder)
    cc = StandardCrosscoder(StandardCrosscoderConfig(d_in=16, d_sae=2, n_snapshots=2))
    cc.W_enc.data.zero_()
    cc.b_enc.data = torch.tensor(LINEAR["features"])
    cc.W_dec.data = torch.zeros(2, 16)
    for s, sign in enumerate((1, -1)):
        cc.W_dec.data[0, 8 * s] = LINEAR["first"][s]
        cc.W_dec.data[1, 8 * s + 1] = sign * LINEAR["second"][s]
    cc.b_dec.data = torch.zeros(16)
    cc.b_dec.data[0], cc.b_dec.data[8] = LINEAR["bias"]
    cc.activation_scale.copy_(torch.tensor(LINEAR["scale"]))
    cc.cfg.metadata.hook_name, cc.cfg.metadata.prepend_bos = "blocks.1.hook_resid_post", True
    return snaps, cc


LINEAR_TASK = Task.from_items(
    "linear",
    [{"prefix": prefix, "correct": "right", "wrong": "wrong"} for prefix in ("one two", "two", "three one two three")],
)
# f_i k_s <W_dec[i, s], (1, -1)> / c_s: 2 * 1 * .5, 2 * 4 * .75 / 2;  3 * 1 * -1, 3 * 4 * 1 / 2
BY_HAND = torch.tensor([[1.0, 3.0], [-3.0, 6.0]])


@pytest.mark.parametrize("method", ["ig", "gradient", "exact"])
@pytest.mark.parametrize("error", ["joint", "frozen"])
def test_two_linear_features_by_hand(linear: tuple[Snapshots, StandardCrosscoder], method: str, error: str) -> None:
    snaps, cc = linear
    found = attribute(cc, snaps, LINEAR_TASK, Estimator(method, n_nodes=3, error=error), positions=method != "exact")
    same(found.effects, BY_HAND, rtol=1e-4, atol=1e-4)
    assert found.standard_errors.max() < 1e-4
    same(relie(found, 0.1), torch.tensor([[1 / 4, 3 / 4], [1 / 3, 2 / 3]]), rtol=1e-3)
    baseline = torch.tensor([1.0 * 0.25, 4.0 * -0.5 / 2])  # k_s b_dec[s, 0] / c_s
    if error == "joint":
        same(found.metric_baseline, baseline, rtol=1e-3)
        same(found.error_effect, found.metric_clean - baseline - BY_HAND.sum(0), rtol=1e-3, atol=1e-3)
        same(found.completeness, torch.zeros(2), atol=1e-4)
    else:
        same(found.metric_baseline, found.metric_clean - BY_HAND.sum(0), rtol=1e-3, atol=1e-3)
        assert not found.error_effect.any()
        same(found.completeness, torch.zeros(2), atol=1e-3)
    turned = sign_changes(found, 0.1)
    assert turned[["feature", "from_snapshot", "to_snapshot"]].to_numpy().tolist() == [[1, 0, 1]]
    if found.positions is not None:
        # nothing above the last block moves anything between positions
        assert found.positions.shares().query("position == 0")["share"].tolist() == [1, 1]


def test_positive_effects_support_the_correct_answer(linear: tuple[Snapshots, StandardCrosscoder]) -> None:
    """The paper's metric is log p(wrong) - log p(correct), and its effects (0 - f) times the gradient: one sign."""
    snaps, cc = linear
    swapped = Task.from_items(
        "swapped", [{"prefix": item.prefix, "correct": "wrong", "wrong": "right"} for item in LINEAR_TASK.items]
    )
    same(
        attribute(cc, snaps, swapped, Estimator("ig", n_nodes=2), baseline="zero").effects,
        -BY_HAND,
        rtol=1e-4,
        atol=1e-4,
    )


# ---------------------------------------------------------------------- exact effects and their agreement
@pytest.mark.parametrize("baseline", ["zero", "mean", "patch"])
def test_features_added_to_the_baseline_equal_single_splices(snaps: Snapshots, task: Task, baseline: str) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder", seed=3)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    runs = PromptRuns(cc, snaps, task, batch_size=2, paired=baseline == "patch")
    s = 2
    removed, added = torch.zeros(F), torch.zeros(F)
    for run, (f0, e0) in zip(slow, baselines(baseline, slow, paired, s), strict=True):
        alone = f0.repeat(F, 1, 1)
        for i in range(F):
            alone[i, :, i] = run.f[s][:, i]
        start = run.metric(s, run.decode(f0, s) + e0)
        removed += (run.metric(s) - run.without_each(s, range(F), f0)) / 4
        added += (run.metrics(s, run.decode(alone, s) + e0) - start) / 4
    every = torch.arange(F)
    same(exact_effects(runs, s, every, baseline), removed, atol=1e-4)
    same(exact_effects(runs, s, every, baseline, "baseline"), added, atol=1e-4)
    for method, exact in (("removal", removed), ("ig", (removed + added) / 2), ("gradient", removed)):
        found = attribute(runs, method, baseline=baseline, n_exact=6)
        top = found.effects[:, s].abs().topk(6).indices
        expected = spearmanr(found.effects[top, s], exact[top])[0]
        assert float(found.agreement[s]) == pytest.approx(expected, abs=1e-6)
    assert attribute(runs, baseline=baseline).agreement.isnan().all()
    with pytest.raises(UserError, match="end='start' is unknown; use one of"):
        exact_effects(runs, s, every, baseline, "start")


def test_encoder_shares_mark_features_that_later_snapshots_activate(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    share = torch.rand(F, 3, dtype=torch.float64)
    share /= share.sum(-1, keepdim=True)
    frame = attribute(cc, snaps, task, "gradient", baseline="zero").to_frame(cc.decoder_norms, share)
    for row in frame.head(30).itertuples():
        later = sum(float(share[row.feature, s]) for s in range(row.snapshot + 1, 3))
        assert row.encoder_share == pytest.approx(float(share[row.feature, row.snapshot]))
        assert row.read_later == pytest.approx(later, abs=1e-12) and row.mostly_later == (later > 0.5)


# ---------------------------------------------------------------------- mistakes of the released code
def clean_gradient(model: Any, ids: Tensor, hidden: Tensor, correct: int, wrong: int) -> Tensor:
    """Gradient of log p(wrong) - log p(correct) at the output (T, D) of block 1."""
    x = hidden[None].detach().requires_grad_()

    def splice(_module: Any, _inputs: Any, output: Any) -> Any:
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.gpt_neox.layers[1].register_forward_hook(splice)
    log_p = model(ids).logits[0, -1].log_softmax(-1)
    handle.remove()
    return torch.autograd.grad(log_p[wrong] - log_p[correct], x)[0][0]


def test_the_released_code_is_reproduced(snaps: Snapshots, task: Task) -> None:
    """Every node gets the logits of the first, the clean run: (0 - f) times one gradient; its prompts have no BOS."""
    cc = make_crosscoder(snaps, "standard_crosscoder", seed=2)
    found = attribute(PromptRuns(cc, snaps, task, prepend_bos=False, paired=False), recipes.released())
    vocabulary = snaps.tokenizer.get_vocab()
    expected = torch.zeros(F, 3)
    for item in ITEMS:
        ids = torch.tensor([[vocabulary[word] for word in item["prefix"].split()]])
        models = [plain_model(each.name) for each in snaps]
        states = [model(ids, output_hidden_states=True).hidden_states[2][0] for model in models]
        f = cc.encode(torch.stack(states, 1)).detach()
        for s, (model, hidden) in enumerate(zip(models, states, strict=True)):
            gradient = clean_gradient(model, ids, hidden, vocabulary[item["correct"]], vocabulary[item["wrong"]])
            rows = cc.W_dec[:, s * cc.d_model : (s + 1) * cc.d_model] / cc.activation_scale[s]
            by_token = (0 - f) * (gradient @ rows.T)
            expected[:, s] += torch.where(by_token.abs() <= 0.1, 0.0, by_token).sum(0).detach() / len(ITEMS)
    same(found.effects, expected, rtol=1e-5, atol=1e-6)
    assert found.effects.abs().max() > 0.1


def test_the_papers_rule_is_reproduced(snaps: Snapshots, task: Task) -> None:
    """h(alpha_k) = W_dec ((1 - k/10) f) + b_dec + (1 - k/10) error, k = 0..9; |effect of a token| <= .1 becomes 0."""
    cc = make_crosscoder(snaps, "standard_crosscoder", seed=2)
    found = attribute(cc, snaps, task, recipes.paper(), baseline="zero")
    assert str(found.estimator) == "ig (left, 10 nodes), zero baseline, error node moved too, threshold 0.1"
    cut = 0
    for s in range(len(snaps)):
        rows: list[Tensor] = []
        for run in slow_runs(snaps, cc):
            f, e = run.f[s], run.error(s)
            gradient = torch.zeros_like(f)
            for k in range(10):
                scaled = ((1 - k / 10) * f).requires_grad_()
                m = -run.metric(s, run.decode(scaled, s) + (1 - k / 10) * e)  # theirs is wrong minus correct
                gradient += torch.autograd.grad(m, scaled)[0] / 10
            by_token = (0 - f) * gradient
            small = by_token.abs() <= 0.1
            cut += int((small & (by_token != 0)).sum())
            rows.append(torch.where(small, 0.0, by_token).sum(0))
        same(found.effects[:, s], torch.stack(rows).mean(0), rtol=1e-5, atol=1e-6)
    assert cut > 20
    kept = attribute(cc, snaps, task, Estimator("ig", rule="left", n_nodes=10), baseline="zero")
    assert (kept.effects - found.effects).abs().max() > 0.01


def test_results_do_not_depend_on_the_batches(snaps: Snapshots) -> None:
    """Their mean is over the positions of a batch, padding included, which overweights a short last batch."""
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    many = Task.from_items("many", MANY[:24])
    whole = attribute(cc, snaps, many, Estimator("ig", n_nodes=3), positions=True, n_bootstrap=5, baseline="zero")
    parts = [
        attribute(cc, snaps, Task.from_items("part", MANY[:24][i::3]), Estimator("ig", n_nodes=3), baseline="zero")
        for i in range(3)
    ]
    assert {len(batch.tokens[0]) for batch in PromptRuns(cc, snaps, many, paired=False).batches} == {3, 6, 9}
    same(whole.effects, torch.stack([part.effects for part in parts]).mean(0))  # prompts of each part have one length
    again = attribute(
        PromptRuns(cc, snaps, many, batch_size=5, paired=False),
        Estimator("ig", n_nodes=3),
        positions=True,
        n_bootstrap=5,
    )
    for name in ("effects", "standard_errors", "error_effect", "metric_clean", "metric_baseline", "completeness"):
        same(getattr(again, name), getattr(whole, name))
    same(again.positions.sizes, whole.positions.sizes)  # type: ignore[union-attr]
    same(again.bootstrap.effects, whole.bootstrap.effects)  # type: ignore[union-attr]


def test_gates_do_not_depend_on_the_batch(snaps: Snapshots, task: Task) -> None:
    """Their BatchTopK stays in training mode, where features depend on the other tokens of the batch."""
    architecture = "batchtopk_crosscoder"
    sae_class, config_class = crosscoders.TRAINING_ARCHITECTURES[architecture]
    inference = make_crosscoder(snaps, architecture)
    training = sae_class(config_class(d_sae=F, d_in=inference.cfg.d_in, n_snapshots=3, k=2))
    state = {**training.state_dict(), **inference.state_dict()}
    training.load_state_dict(state)
    training.cfg.metadata = inference.cfg.metadata
    ours = attribute(training, snaps, task, Estimator("ig", n_nodes=2))
    same(ours.effects, attribute(inference, snaps, task, Estimator("ig", n_nodes=2)).effects)


def test_the_bos_is_left_out(snaps: Snapshots, task: Task) -> None:
    """Theirs counts the first position, which training leaves out."""
    cc = make_crosscoder(snaps, "standard_crosscoder")
    found = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), positions=True, baseline="zero")
    assert found.positions is not None
    table = found.positions.to_frame()
    assert table["position"].max() == 4  # six tokens with the BOS, five without
    cc.cfg.metadata.keep_special = True
    kept = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), positions=True, baseline="zero")
    assert kept.positions is not None and kept.positions.to_frame()["position"].max() == 5
    same(kept.metric_clean, found.metric_clean)


def test_effects_of_opposite_sign_cancel_before_the_absolute_value(snaps: Snapshots) -> None:
    """Absolute values are taken after averaging, so effects of opposite sign on different prompts cancel."""
    item = {"prefix": "the cat", "correct": "sees", "wrong": "likes"}
    both = [item, {"prefix": "the cat", "correct": "likes", "wrong": "sees"}]
    cc = make_crosscoder(snaps, "standard_crosscoder")
    found = attribute(
        cc, snaps, Task.from_items("both", both), Estimator("ig", n_nodes=2), positions=True, baseline="zero"
    )
    one = attribute(cc, snaps, Task.from_items("one", [item]), Estimator("ig", n_nodes=2), baseline="zero")
    assert one.effects.abs().max() > 0.1 and found.effects.abs().max() < 1e-6
    assert relie(found).isnan().all()
    assert found.positions is not None and found.positions.sizes.max() > 0.05


def test_the_most_harmful_are_not_the_smallest(snaps: Snapshots, task: Task) -> None:
    """Their `bottom` features are the smallest in magnitude: zeros."""
    found = attribute(
        make_crosscoder(snaps, "standard_crosscoder"), snaps, task, Estimator("ig", n_nodes=2), baseline="zero"
    )
    worst = found.top(3, 2, by="negative")
    assert found.effects[worst, 2].tolist() == sorted(found.effects[:, 2].tolist())[:3]
    assert found.effects[worst[0], 2] < 0
    assert found.top(3, 2).tolist() == found.top(3, -1).tolist() == found.effects[:, 2].topk(3).indices.tolist()


def test_no_global_state_is_changed(snaps: Snapshots, task: Task) -> None:
    """Theirs turns on anomaly detection for the whole process."""
    cc = make_crosscoder(snaps, "standard_crosscoder")
    tokens = torch.tensor([[0, 3, 7]])
    before = snaps.model(1)(tokens)
    with torch.no_grad():
        attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="zero")
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not torch.is_anomaly_enabled()
    same(snaps.model(1)(tokens), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in (*cc.parameters(), *snaps.model(1).parameters()))


# ---------------------------------------------------------------------- cost
@pytest.mark.parametrize(
    ("method", "hook"),
    [
        ("ig", "blocks.1.hook_resid_post"),
        ("exact", "blocks.1.hook_resid_post"),
        ("gradient", "blocks.2.hook_mlp_out"),
    ],
)
def test_nothing_below_the_hook_runs_again(snaps: Snapshots, method: str, hook: str) -> None:
    """Except one prompt per snapshot to compare logits, and once per batch for a hook inside a block."""
    cc = make_crosscoder(snaps, "standard_crosscoder")
    cc.cfg.metadata.hook_name = hook
    many = Task.from_items("many", MANY)
    runs = PromptRuns(cc, snaps, many, batch_size=10, paired=False)
    assert runs.active.any()  # the clean runs are made
    rows: Counter[int] = Counter()

    def count(block: int) -> Callable[..., None]:
        def note(_module: Any, _inputs: Any, output: Any) -> None:
            rows[block] += len(output[0] if isinstance(output, tuple) else output)

        return note

    models = [snaps.model(s) for s in range(3)]
    handles = [model.blocks[i].original_component.register_forward_hook(count(i)) for model in models for i in range(3)]
    attribute(runs, Estimator(method, n_nodes=10))
    for handle in handles:
        handle.remove()
    inside = 0 if hook.endswith("resid_post") else len(runs) * 3 + 3
    assert rows[0] == rows[1] == 3 + inside
    assert rows[2] >= len(runs) * 3 * {"ig": 11, "gradient": 2, "exact": 3}[method]


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
        self.numel = max(self.numel, *made, 0)
        return out


@pytest.mark.parametrize(
    ("method", "baseline"), [("ig", "mean"), pytest.param("exact", "zero", marks=pytest.mark.exhaustive)]
)
def test_memory_does_not_grow_with_the_prompts(
    snaps: Snapshots, method: str, baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attribution, "BATCH_TOKENS", 128)
    cc = make_crosscoder(snaps, "standard_crosscoder", seed=5)
    largest: list[int] = []
    for n in (24, 48):  # more than the prompts that are kept word by word
        some = Task.from_items("some", MANY[:n])
        runs = PromptRuns(cc, snaps, some, batch_size=4, paired=False)
        assert len(runs) == n and len(runs.features) == F
        with _Largest() as seen:
            attribute(runs, Estimator(method, n_nodes=2), baseline=baseline, positions=method == "ig")
        largest.append(seen.numel)
    assert largest[0] == largest[1] > 0


def test_methods_share_runs(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder")
    runs = PromptRuns(cc, snaps, task, paired=True)
    for method, baseline in (("ig", "patch"), ("exact", "mean")):
        found = attribute(runs, Estimator(method, n_nodes=3), baseline=baseline)
        same(found.effects, attribute(cc, snaps, task, Estimator(method, n_nodes=3), baseline=baseline).effects)


# ---------------------------------------------------------------------- what is reported
def test_effects_and_error_node_add_up(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder")
    fine = attribute(cc, snaps, task, Estimator("ig", n_nodes=64), baseline="zero")
    assert fine.completeness.max() < 1e-3
    coarse = attribute(cc, snaps, task, "gradient", baseline="zero")
    assert coarse.completeness.max() > 10 * fine.completeness.max()
    total = fine.effects.sum(0) + fine.error_effect
    same(total, fine.metric_clean - fine.metric_baseline, rtol=1e-2, atol=1e-4)


def test_bootstrap_against_loops(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    few = MANY[:9]
    runs = PromptRuns(cc, snaps, Task.from_items("few", few), batch_size=2, paired=False)
    found = attribute(runs, Estimator("ig", n_nodes=2), n_bootstrap=300, seed=5)
    kept = found.bootstrap
    assert kept is not None and kept.effects.shape == (300, len(kept.features), 3)
    order = torch.cat([b.index for b in runs.batches]).tolist()
    counts = np.random.default_rng(5).multinomial(9, [1 / 9] * 9, size=300)
    slow = [Slow(snaps, cc, few[i]) for i in order]
    for s in (2,):
        each, metrics = [], []
        for run in slow:
            zero = torch.zeros_like(run.f[s])
            effects, _ = run.effects(s, zero, torch.zeros_like(run.acts[:, s]), *quadrature("gauss_legendre", 2))
            each.append(effects.sum(0)[kept.features].double())
            metrics.append(run.metric(s).double())
        for r in (0, 1, 299):
            drawn = [i for i, count in enumerate(counts[r]) for _ in range(count)]
            same(kept.effects[r, :, s], torch.stack([each[i] for i in drawn]).mean(0))
            same(kept.metric[r, s], torch.stack([metrics[i] for i in drawn]).mean())
    # the spread of the replicates is the standard error, up to the n - 1 of the sample and the noise of 300 draws
    spread, error = kept.effects.double().std(0), found.standard_errors[kept.features] * math.sqrt(8 / 9)
    large = error > error.max() / 20
    assert (spread / error)[large].median() == pytest.approx(1, abs=0.05)
    again = attribute(
        cc, snaps, Task.from_items("few", few), Estimator("ig", n_nodes=2), n_bootstrap=300, seed=5, baseline="zero"
    )
    same(again.bootstrap.effects, kept.effects)  # type: ignore[union-attr]
    other = attribute(
        cc, snaps, Task.from_items("few", few), Estimator("ig", n_nodes=2), n_bootstrap=300, seed=6, baseline="zero"
    )
    assert (other.bootstrap.effects - kept.effects).abs().max() > 0.01  # type: ignore[union-attr]
    low, high = relie_interval(found, min_effect=0.0)
    share = relie(found, 0.0)
    sure = (~share.isnan()) & (found.effects.abs() > 2 * found.standard_errors)
    assert sure.any() and ((low <= share) & (share <= high))[sure].float().mean() > 0.9
    frame = found.to_frame(cc.decoder_norms)
    listed = found.active.any(-1)
    for column, bound in zip(("relie_low", "relie_high"), relie_interval(found), strict=True):
        np.testing.assert_allclose(frame[column], bound[listed].flatten())
    for column, bound in zip(("ie_low", "ie_high"), effect_interval(found), strict=True):
        np.testing.assert_allclose(frame[column], bound[listed].flatten())
    shares = share_relie(found, 0.0)[:, 2]
    size = found.effects.abs() / found.effects.abs().sum(0)
    same(shares[listed], (size[:, 2] / size.sum(-1))[listed])
    assert "relie_low" not in attribute(
        cc, snaps, Task.from_items("few", few), Estimator("ig", n_nodes=1), baseline="zero"
    ).to_frame(cc.decoder_norms)


def test_one_prompt_has_no_standard_error(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    found = attribute(
        cc, snaps, Task.from_items("one", ITEMS[:1]), Estimator("ig", n_nodes=2), n_bootstrap=3, baseline="zero"
    )
    assert found.standard_errors[found.active.any(-1)].isnan().all()
    assert relie(found).isnan().all() and not relie(found, 1e-3)[found.effects.abs().amax(-1) > 1e-3].isnan().any()


def test_an_attribution_can_be_rebuilt_from_its_tables(snaps: Snapshots, task: Task, tmp_path: Path) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    for estimator in (
        Estimator("ig", n_nodes=2),
        Estimator("gradient", baseline="patch"),
        Estimator("exact", baseline="mean", error="frozen"),
        recipes.paper(),
    ):
        ie = attribute(cc, snaps, task, estimator, n_exact=4)
        for name, table in (("features", ie.to_frame(cc.decoder_norms)), ("snapshots", ie.snapshot_frame())):
            table.to_parquet(tmp_path / name)
        frame, per_snapshot = pd.read_parquet(tmp_path / "features"), pd.read_parquet(tmp_path / "snapshots")
        again = Attribution.from_frames("tiny", frame, per_snapshot, F)
        for name in (
            "effects",
            "standard_errors",
            "error_effect",
            "metric_clean",
            "metric_baseline",
            "completeness",
            "agreement",
            "active",
        ):
            torch.testing.assert_close(getattr(again, name), getattr(ie, name), equal_nan=True)
        listed = ie.active.any(-1)
        torch.testing.assert_close(again.sizes[listed], ie.sizes[listed])
        assert (again.labels, again.steps, again.n_prompts) == (ie.labels, ie.steps, ie.n_prompts)
        assert again.estimator == ie.estimator
        assert again.top(3, 1).tolist() == ie.top(3, 1).tolist()
        row = frame.iloc[4]
        norms = cc.decoder_norms[int(row["feature"])]
        assert row["reldec"] == pytest.approx(float(norms[int(row["snapshot"])] / norms.sum()))
    with pytest.raises(UserError, match="lacks rule, threshold: attribute the task again"):
        Attribution.from_frames("tiny", frame, per_snapshot.drop(columns=["rule", "threshold"]), F)


def test_tables_say_how_effects_were_estimated(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    table = attribute(
        cc, snaps, task, Estimator("ig", rule="midpoint", n_nodes=3, error="frozen"), baseline="mean"
    ).snapshot_frame()
    recorded = table[["method", "rule", "n_nodes", "baseline", "error", "threshold"]].drop_duplicates()
    assert recorded.to_numpy().tolist() == [["ig", "midpoint", 3, "mean", "frozen", 0.0]]
    assert attribute(cc, snaps, task, "gradient").estimator == Estimator("gradient", baseline="patch")
    alone = PromptRuns(cc, snaps, task, paired=False)
    assert attribute(alone, "gradient").estimator == Estimator("gradient", baseline="zero")


def test_features_active_on_the_paired_prompt_alone_are_in_the_table(snaps: Snapshots) -> None:
    one = Task.from_items("one", ITEMS[1:2])
    cc = make_crosscoder(snaps, "jumprelu_crosscoder", seed=1)
    found = attribute(cc, snaps, one, Estimator("ig", n_nodes=2), baseline="patch")
    frame = found.to_frame(cc.decoder_norms)
    for s in range(3):
        same(torch.tensor(frame[frame["snapshot"] == s]["ie"].sum()), found.effects[:, s].sum())
    alone = found.active & ~attribute(cc, snaps, one, Estimator("ig", n_nodes=1), baseline="zero").active
    assert alone.any() and found.effects[alone].abs().max() > 0


# ---------------------------------------------------------------------- positions
def test_positions_separate_direct_effects_from_moved_ones(snaps: Snapshots, task: Task) -> None:
    last = make_crosscoder(snaps, "standard_crosscoder", layer=2)
    control = attribute(last, snaps, task, Estimator("ig", n_nodes=3), positions=True, baseline="zero")
    assert control.positions is not None
    shares = control.positions.shares()
    assert shares[shares["position"] == 0][["share", "error_share"]].to_numpy().tolist() == [[1, 1]] * 3
    assert control.positions.to_frame()["position"].eq(0).all()
    assert control.positions.main()[["position", "share", "last_share"]].drop_duplicates().to_numpy().tolist() == [
        [0, 1, 1]
    ]
    middle = attribute(
        make_crosscoder(snaps, "standard_crosscoder"),
        snaps,
        task,
        Estimator("ig", n_nodes=3),
        positions=True,
        baseline="zero",
    )
    assert middle.positions is not None
    shares = middle.positions.shares()
    np.testing.assert_allclose(shares.groupby("snapshot")["share"].sum(), 1)
    assert shares.query("position > 0 and share > 0.01").shape[0] > 3


@pytest.mark.parametrize(("method", "baseline"), [("ig", "patch"), ("gradient", "zero"), ("removal", "mean")])
def test_the_words_of_single_prompts(snaps: Snapshots, task: Task, method: str, baseline: str) -> None:
    """Each equals the attribution of a task that has this prompt alone, by feature and by position."""
    cc = make_crosscoder(snaps, "standard_crosscoder")
    runs = PromptRuns(cc, snaps, task, batch_size=3, paired=baseline == "patch")
    found = attribute(runs, method, baseline=baseline, positions=True)
    assert found.prompts is not None
    order = torch.cat([batch.index for batch in runs.batches]).tolist()
    assert sorted(found.prompts["prompt"].unique()) == list(range(len(runs)))
    words = found.prompt_frame()
    for prompt, item in enumerate(order):
        text = found.prompts.query(f"prompt == {prompt} and snapshot == 0").drop_duplicates("position")["token"]
        assert " ".join(text).replace("<|endoftext|>", "").strip() == task.items[item].prefix
        stored = words.loc[words["prompt"] == prompt, ["prefix", "correct", "wrong", "paired"]].drop_duplicates()
        pair = task.items[item]
        assert stored.to_numpy().tolist() == [[pair.prefix, pair.correct, pair.wrong, pair.patch_prefix]]
        table = found.prompt(prompt)
        by_feature = table.pivot_table(index="feature", columns="snapshot", values="effect", aggfunc="sum")
        if baseline == "mean":  # the mean of one prompt alone is another
            continue
        alone = attribute(
            PromptRuns(cc, snaps, replace(task, items=(task.items[item],)), paired=baseline == "patch"),
            method,
            baseline=baseline,
            positions=True,
        )
        expected = alone.effects[by_feature.index.tolist()]
        same(torch.tensor(by_feature.fillna(0).to_numpy()), expected)
        assert set(alone.effects.abs().amax(-1).gt(1e-4).nonzero().flatten().tolist()) <= set(by_feature.index)
        length, kept = len(text), alone.positions
        assert kept is not None
        for row in words[words["prompt"] == prompt].itertuples():
            here = kept.effects[length - 1 - row.position, :, row.snapshot]
            assert row.effect == pytest.approx(float(here.sum()), abs=1e-5)
            if row.feature >= 0:
                assert row.feature_effect == pytest.approx(float(here[here.abs().argmax()]), abs=1e-5)
    same(torch.tensor(words.groupby("snapshot")["effect"].sum().to_numpy() / len(runs)), found.effects.sum(0))
    few = found.among([int(found.top(1, -1)[0])]).prompt_frame()
    assert set(few["feature"]) <= {-1, int(found.top(1, -1)[0])}
    with pytest.raises(UserError, match="prompt 99 is not kept; these are: 0, 1"):
        found.prompt(99)
    with pytest.raises(UserError, match="positions=True"):
        attribute(runs, "gradient").prompt(0)


def test_some_of_many_prompts_are_kept(snaps: Snapshots) -> None:
    runs = PromptRuns(make_crosscoder(snaps, "topk_crosscoder"), snaps, Task.from_items("many", MANY), paired=False)
    found = attribute(runs, "gradient", positions=True)
    assert found.prompts is not None
    kept = found.prompts["prompt"].unique()
    assert len(kept) == 16 < len(runs) and {0, len(runs) - 1} < set(kept)


def test_position_tables_against_loops(snaps: Snapshots, task: Task) -> None:
    found = attribute(
        make_crosscoder(snaps, "topk_crosscoder"), snaps, task, Estimator("ig", n_nodes=2), positions=True
    )
    kept = found.positions
    assert kept is not None
    same(kept.effects.sum(0), found.effects[kept.features])
    same(kept.error_effects.sum(0), found.error_effect)
    total = kept.sizes.sum((0, 1))
    for row in kept.shares().itertuples():
        assert row.share == pytest.approx(float(kept.sizes[row.position, :, row.snapshot].sum() / total[row.snapshot]))
    main = kept.main().set_index(["feature", "snapshot"])
    for column, feature in enumerate(kept.features.tolist()):
        for s in range(3):
            sizes = kept.sizes[:, column, s].tolist()
            if not sum(sizes):
                assert (feature, s) not in main.index
                continue
            row = main.loc[(feature, s)]
            assert row["position"] == sizes.index(max(sizes))
            assert row["share"] == pytest.approx(max(sizes) / sum(sizes))
            assert row["last_share"] == pytest.approx(sizes[0] / sum(sizes))
    frame = kept.to_frame()
    assert frame["size"].gt(0).all() and frame["ie"].sum() == pytest.approx(float(kept.effects.sum()))
    assert (
        attribute(
            make_crosscoder(snaps, "topk_crosscoder"), snaps, task, Estimator("ig", n_nodes=1), baseline="zero"
        ).positions
        is None
    )


# ---------------------------------------------------------------------- mistakes
def test_errors_are_one_line(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    runs = PromptRuns(cc, snaps, task, paired=False)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "integrated"}, "method='integrated' is unknown; use one of"),
        ({"baseline": "none"}, "baseline='none' is unknown"),
        ({"n_bootstrap": -1}, "n_bootstrap=-1 must be at least 0"),
        ({"n_exact": 2}, "n_exact=2 must be 0, or at least 3"),
        ({"method": "exact", "positions": True}, "ablates a feature at all positions at once"),
        ({"method": "ig", "features": [1]}, "features= needs method='exact'"),
        ({"method": "exact", "features": [1, F]}, r"feature 24 is not in \[0, 23\]"),
        ({"method": "exact", "features": [-1]}, r"feature -1 is not in \[0, 23\]"),
        ({"method": "exact", "features": []}, "no features are given"),
        ({"method": "exact", "features": [2, 2]}, "a feature is given twice"),
        ({"baseline": "patch"}, "make the runs with PromptRuns\\(..., paired=True\\)"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message) as error:
            attribute(runs, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="trained on 3 snapshots, but 2 were given"):
        attribute(cc, snaps[:2], task, baseline="zero")
    with pytest.raises(UserError, match="its snapshot step0 does not match the given step20"):
        attribute(cc, snaps[[2, 1, 0]], task, baseline="zero")
    unpaired = Task.from_items("unpaired", [{"prefix": "the cat", "correct": "sees", "wrong": "likes"}])
    with pytest.raises(UserError, match="no paired prompts"):
        attribute(cc, snaps, unpaired, baseline="patch")

    odd = make_crosscoder(snaps, "standard_crosscoder")
    odd.cfg.metadata.hook_name = "odd"  # of another program
    with pytest.raises(UserError, match=r"never reached hook point odd: choose another, such as 'blocks\.0\."):
        attribute(odd, snaps, task)


def test_errors_of_top(snaps: Snapshots, task: Task) -> None:
    ie = attribute(
        make_crosscoder(snaps, "batchtopk_crosscoder"), snaps, task, Estimator("ig", n_nodes=1), baseline="zero"
    )
    with pytest.raises(UserError, match=r"k=1000 is not in \[1, "):
        ie.top(1000, 0)
    with pytest.raises(UserError, match=r"snapshot 3 is not in \[-3, 2\]"):
        ie.top(1, 3)
    with pytest.raises(UserError, match="by='bottom' is unknown"):
        ie.top(1, 0, by="bottom")
