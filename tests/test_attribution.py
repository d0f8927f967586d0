"""Attribution and ablation against plain transformers with hand-written hooks, features one at a time."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from crosslens import crosscoders
from crosslens.ablation import _size_matched, ablate, exact_effects, feature_sizes, set_metrics
from crosslens.attribution import Attribution, attribute, quadrature, relie
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention import spliced_logits
from crosslens.runs import PromptRuns
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task

HOOK, LAYER, F = "blocks.1.hook_resid_post", 1, 24
ITEMS = [
    {"prefix": "the cat", "correct": "sees", "wrong": "likes", "patch_prefix": "the dog"},
    {"prefix": "the king", "correct": "finds", "wrong": "likes", "patch_prefix": "the child"},
    {"prefix": "the cat near the house", "correct": "sees", "wrong": ".", "patch_prefix": "the dog near the bread"},
    {"prefix": "a child sees", "correct": "a", "wrong": "the", "patch_prefix": "a king likes"},
]


@pytest.fixture(scope="module")
def snaps(tiny_snapshots: Path) -> Snapshots:
    return Snapshots.local(tiny_snapshots)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.from_items("tiny", ITEMS)


def make_crosscoder(snaps: Snapshots, architecture: str, seed: int = 0) -> Crosscoder:
    """A random crosscoder whose features are active on about half of the positions, with unequal scales and norms."""
    S, D = len(snaps), snaps.d_model
    options: dict[str, Any] = {"k": 8} if "topk" in architecture else {}
    sae_class, config_class = crosscoders.TRAINING_ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = sae_class(config_class(d_sae=F, d_in=S * D, n_snapshots=S, decoder_init_norm=1.0, **options))
        with torch.no_grad():
            sae.W_dec.add_(0.5 * torch.randn_like(sae.W_dec)).mul_(torch.rand(F, 1) + 0.2)
            sae.b_dec.normal_(0, 0.5)
            sae.b_enc.normal_(0, 0.5)
            sae.activation_scale.copy_(torch.rand(S) + 0.5)
            if "jumprelu" in architecture:
                sae.log_threshold.normal_(0.0, 0.5)
            if "batchtopk" in architecture:
                sae.threshold.fill_(1.0)
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.prepend_bos = HOOK, True
    metadata.snapshots = [{"label": s.label, "step": s.step, "fingerprint": s.fingerprint} for s in snaps]
    return sae.to_inference()


@functools.cache
def plain_model(folder: str) -> Any:
    return GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


class Slow:
    """One prompt, one snapshot, plain transformers: activations by a forward hook, the splice by another."""

    def __init__(self, snaps: Snapshots, cc: Crosscoder, item: dict[str, str]) -> None:
        self.cc, self.snaps = cc, snaps
        self.models = [plain_model(s.name) for s in snaps]
        vocabulary = snaps.tokenizer.get_vocab()
        self.tokens = torch.tensor([[0, *(vocabulary[w] for w in item["prefix"].split())]])
        self.answers = vocabulary[item["correct"]], vocabulary[item["wrong"]]
        self.acts = torch.stack([self.run(m)[1] for m in self.models], dim=1)  # (T, S, D)
        f = cc.encode(self.acts)
        f[0] = 0  # the BOS is left out
        self.f = [cc.snapshot_acts(f, s) for s in range(len(snaps))]

    def run(self, model: Any, replacement: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden[0].detach())
            if replacement is None:
                return None
            new = torch.cat([hidden[:, :1], replacement[None, 1:]], dim=1)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = model.gpt_neox.layers[LAYER].register_forward_hook(hook)
        logits = model(self.tokens).logits[0, -1]
        handle.remove()
        return logits, seen[0]

    def metric(self, s: int, replacement: Tensor | None = None) -> Tensor:
        logits, _ = self.run(self.models[s], replacement)
        return logits[self.answers[0]] - logits[self.answers[1]]

    def decode(self, f: Tensor, s: int) -> Tensor:
        D = self.cc.d_model
        W = self.cc.W_dec[:, s * D : (s + 1) * D]
        return (f @ W + self.cc.b_dec[s * D : (s + 1) * D]) / self.cc.activation_scale[s]

    def effects(
        self, s: int, f0: Tensor, e0: Tensor | None, nodes: list[float], weights: list[float]
    ) -> tuple[Tensor, Tensor]:
        """IE of every feature, and of the error node, through gradients of the features themselves."""
        f = self.f[s]
        e = self.acts[:, s] - self.decode(f, s)
        e0 = e if e0 is None else e0
        gradients = [torch.zeros_like(f), torch.zeros_like(e)]
        for node, weight in zip(nodes, weights, strict=True):
            fa = (f0 + node * (f - f0)).requires_grad_()
            ea = (e0 + node * (e - e0)).requires_grad_()
            found = torch.autograd.grad(self.metric(s, self.decode(fa, s) + ea), (fa, ea))
            gradients = [total + weight * part for total, part in zip(gradients, found, strict=True)]
        return ((f - f0) * gradients[0]).sum(0), ((e - e0) * gradients[1])[1:].sum()


def slow_runs(snaps: Snapshots, cc: Crosscoder, key: str = "prefix") -> list[Slow]:
    return [Slow(snaps, cc, {**item, "prefix": item[key]}) for item in ITEMS]


@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
@pytest.mark.parametrize(
    ("baseline", "error", "rule", "steps"),
    [
        ("zero", "joint", "gauss_legendre", 5),
        ("zero", "frozen", "midpoint", 3),
        ("mean", "joint", "midpoint", 2),
        ("patch", "joint", "gauss_legendre", 2),
        ("patch", "frozen", "crosscoding_through_time", 4),
    ],
)
def test_ig_equals_gradients_of_single_features(
    snaps: Snapshots, task: Task, architecture: str, baseline: str, error: str, rule: str, steps: int
) -> None:
    cc = make_crosscoder(snaps, architecture)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    found = attribute(cc, snaps, task, rule=rule, steps=steps, baseline=baseline, error=error, batch_size=2)
    nodes, weights = quadrature(rule, steps)
    for s in range(len(snaps)):
        positions = sum(len(run.tokens[0]) - 1 for run in slow)
        mean = sum(run.f[s].sum(0) for run in slow) / positions
        rows: list[tuple[Tensor, Tensor]] = []
        for run, other in zip(slow, paired, strict=True):
            f0 = {"zero": torch.zeros_like(run.f[s]), "mean": mean.expand_as(run.f[s]), "patch": other.f[s]}[baseline]
            f0 = torch.cat([torch.zeros_like(f0[:1]), f0[1:]])
            e0 = None
            if error == "joint":
                e0 = torch.zeros_like(run.acts[:, s])
                if baseline == "patch":
                    e0 = other.acts[:, s] - other.decode(other.f[s], s)
            rows.append(run.effects(s, f0, e0, nodes, weights))
        effects = torch.stack([row[0] for row in rows]).double()
        torch.testing.assert_close(found.effects[:, s], effects.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.standard_errors[:, s], effects.std(0) / 2, rtol=1e-4, atol=1e-5)
        errors = torch.stack([row[1] for row in rows]).double()
        torch.testing.assert_close(found.error_effect[s], errors.mean(), rtol=1e-4, atol=1e-5)
        clean = torch.stack([run.metric(s) for run in slow]).double()
        torch.testing.assert_close(found.metric_clean[s], clean.mean(), rtol=1e-4, atol=1e-5)


def test_effects_and_error_node_add_up(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder")
    fine = attribute(cc, snaps, task, steps=64)
    assert fine.completeness.max() < 1e-3
    coarse = attribute(cc, snaps, task, method="gradient")
    assert coarse.completeness.max() > 10 * fine.completeness.max()
    total = fine.effects.sum(0) + fine.error_effect
    torch.testing.assert_close(total, fine.metric_clean - fine.metric_baseline, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("rule", ["gauss_legendre", "midpoint", "crosscoding_through_time"])
def test_rules_average(rule: str) -> None:
    nodes, weights = quadrature(rule, 10)
    assert len(nodes) == 10
    assert math.isclose(sum(weights), 1)
    integral = sum(w * (3 * a * a) for a, w in zip(nodes, weights, strict=True))
    assert abs(integral - 1) < {"gauss_legendre": 1e-12, "midpoint": 3e-3, "crosscoding_through_time": 0.16}[rule]
    if rule == "crosscoding_through_time":
        np.testing.assert_allclose(nodes, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("value", ["zero", "mean", "patch"])
@pytest.mark.parametrize("error", [False, True])
def test_feature_sets_equal_a_plain_splice(
    snaps: Snapshots, task: Task, architecture: str, keep: bool, value: str, error: bool
) -> None:
    cc = make_crosscoder(snaps, architecture, seed=1)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    runs = PromptRuns(cc, snaps, task, paired=True)
    sets = torch.tensor([[0, 3, 5], [7, 8, 23]])
    for s in (0, 2):
        found = set_metrics(runs, s, sets, keep=keep, value=value, error=error)
        order = torch.cat([batch.index for batch in runs.batches])
        mean = sum(run.f[s].sum(0) for run in slow) / sum(len(run.tokens[0]) - 1 for run in slow)
        for row, chosen in enumerate(sets):
            for column, item in enumerate(order.tolist()):
                run, other = slow[item], paired[item]
                new = {"zero": torch.zeros_like(run.f[s]), "mean": mean.expand_as(run.f[s]), "patch": other.f[s]}[value]
                edited = run.f[s].clone() if not keep else new.clone()
                edited[:, chosen] = (new if not keep else run.f[s])[:, chosen]
                spliced = run.decode(edited, s)
                if error:
                    spliced = spliced + run.acts[:, s] - run.decode(run.f[s], s)
                expected = run.metric(s, spliced).double()
                torch.testing.assert_close(found[row, column], expected, rtol=1e-4, atol=1e-5)


def test_nothing_edited_is_the_clean_model(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    runs = PromptRuns(cc, snaps, task)
    for batch, run, _ in runs.clean():
        for s in range(len(snaps)):
            model = snaps.model(s)
            decoded = cc.decode_snapshot(run.snapshot_acts(cc, s), s)
            whole = decoded + (run.acts[:, :, s] - decoded)
            spliced = spliced_logits(model, batch.tokens, HOOK, whole, run.keep)
            torch.testing.assert_close(spliced, model(batch.tokens), rtol=1e-5, atol=1e-5)
            elsewhere = spliced_logits(model, batch.tokens, HOOK, whole + 5, torch.zeros_like(run.keep))
            torch.testing.assert_close(elsewhere, model(batch.tokens), rtol=0, atol=0)


def test_exact_effects_are_single_ablations(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    runs = PromptRuns(cc, snaps, task)
    effects = exact_effects(runs, 2, torch.arange(F))
    for feature in range(F):
        drops: list[Tensor] = []
        for run in slow_runs(snaps, cc):
            without = run.f[2].clone()
            without[:, feature] = 0
            error = run.acts[:, 2] - run.decode(run.f[2], 2)
            drops.append(run.metric(2) - run.metric(2, run.decode(without, 2) + error))
        torch.testing.assert_close(effects[feature], torch.stack(drops).double().mean(), rtol=1e-4, atol=1e-5)


def test_relie_is_a_share_or_nan(snaps: Snapshots, task: Task) -> None:
    ie = attribute(make_crosscoder(snaps, "standard_crosscoder"), snaps, task, steps=2)
    share = relie(ie)
    rows = share.sum(-1)
    matters = (ie.effects.abs() > 2 * ie.standard_errors).any(-1)
    assert matters.any() and not matters.all()
    torch.testing.assert_close(rows[matters], torch.ones_like(rows[matters]))
    assert share[~matters].isnan().all()
    feature = int(matters.nonzero()[0])
    expected = ie.effects[feature].abs() / ie.effects[feature].abs().sum()
    torch.testing.assert_close(share[feature], expected)
    assert relie(ie, min_effect=1e9).isnan().all()
    scaled = ie.effects[feature].abs() / ie.metric_clean.abs().clamp_min(0.1)
    torch.testing.assert_close(relie(ie, normalised=True)[feature], scaled / scaled.sum())


def test_tables_hold_the_whole_attribution(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    ie = attribute(cc, snaps, task, steps=2)
    frame, per_snapshot = ie.to_frame(cc.decoder_norms), ie.snapshot_frame()
    again = Attribution.from_frames("tiny", frame, per_snapshot, F)
    for name in ("effects", "error_effect", "metric_clean", "completeness", "active"):
        torch.testing.assert_close(getattr(again, name), getattr(ie, name))
    assert (again.labels, again.steps, again.n_prompts) == (ie.labels, ie.steps, ie.n_prompts)
    assert again.top(3, 1).tolist() == ie.top(3, 1).tolist()
    norms = cc.decoder_norms
    row = frame.iloc[4]
    assert row["reldec"] == pytest.approx(
        float(norms[int(row["feature"]), int(row["snapshot"])] / norms[int(row["feature"])].sum())
    )


def test_ablation_table_and_controls(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    ie = attribute(cc, snaps, task, steps=2)
    runs = PromptRuns(cc, snaps, task)
    table = ablate(cc, snaps, task, ie, k=[1, 4], n_draws=3, seed=1, runs=runs)
    assert len(table) == len(snaps) * 2 * 3
    again = ablate(cc, snaps, task, ie, k=[1, 4], n_draws=3, seed=1)
    assert table.equals(again)
    top = table[(table["features"] == "top") & (table["k"] == 4) & (table["snapshot"] == 2)].iloc[0]
    expected = set_metrics(runs, 2, ie.top(4, 2)[None]).mean()
    assert top["metric"] == pytest.approx(float(expected))
    assert top["clean"] == pytest.approx(float(ie.metric_clean[2]), abs=1e-5)
    kept = ablate(cc, snaps, task, ie, k=[F], keep=True, controls=(), at=[2], runs=runs).iloc[0]
    assert kept["metric"] == pytest.approx(kept["reconstruction_only"], abs=1e-4)
    assert not kept["error"]


def test_size_matched_sets_are_of_like_size_and_disjoint(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    runs = PromptRuns(cc, snaps, task)
    size = feature_sizes(runs, 0)
    active = (size > 0).nonzero().flatten()
    top = active[size[active].topk(3).indices]
    sets = _size_matched(top, size, active, 20, np.random.default_rng(0))
    assert sets.shape == (20, 3)
    assert not torch.isin(sets, top).any()
    assert all(len(set(row)) == 3 for row in sets.tolist())
    assert torch.isin(sets, active).all()


def test_mistakes_are_told_in_one_line(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    for options, told in (
        ({"rule": "gauss"}, "rule='gauss' is unknown"),
        ({"baseline": "none"}, "baseline='none' is unknown"),
        ({"steps": 0}, "steps=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=told):
            attribute(cc, snaps, task, **options)
    with pytest.raises(UserError, match="trained on 3 snapshots, 2 are given"):
        attribute(cc, snaps[:2], task)
    with pytest.raises(UserError, match="its snapshot step0 is not the given step20"):
        attribute(cc, snaps[[2, 1, 0]], task)
    unpaired = Task.from_items("unpaired", [{"prefix": "the cat", "correct": "sees", "wrong": "likes"}])
    with pytest.raises(UserError, match="no paired prompts"):
        attribute(cc, snaps, unpaired, baseline="patch")
    ie = attribute(cc, snaps, task, steps=1)
    with pytest.raises(UserError, match=r"k=1000 is not in \[1, "):
        ie.top(1000, 0)
    with pytest.raises(UserError, match="did you mean 'random'"):
        ablate(cc, snaps, task, ie, controls=["randm"])
