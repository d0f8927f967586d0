"""Held-out metrics against loops over tokens, and against plain transformers with forward hooks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import crosslens.activations.plan
import crosslens.training.evaluation
from crosslens.activations.harvesting import harvest
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import (
    BatchTopKCrosscoderTrainingConfig,
    Crosscoder,
    JumpReLUCrosscoderTrainingConfig,
    JumpReLUCrosscoderTrainingSAE,
)
from crosslens.snapshots.collection import Snapshots
from crosslens.training.config import TrainConfig
from crosslens.training.evaluation import evaluate, quick_metrics, reconstruction_table, splice_losses
from crosslens.training.run import complete, train

T = 16
STEPS = (0, 10, 20)


@pytest.fixture(scope="module")
def acts(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    snapshots = Snapshots.local(tiny_snapshots)
    return Activations(snapshots, "blocks.1.hook_resid_post", Dataset(tiny_text, 1500, T, 300))


@pytest.fixture(scope="module")
def batchtopk(acts: Activations) -> Crosscoder:
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=32, k=4)
    return train(acts, architecture, TrainConfig(batch_size=100, training_tokens=5000, lr=3e-3))


@pytest.fixture(scope="module")
def jumprelu(acts: Activations) -> Crosscoder:
    """Random rows with very different norms at the snapshots, so that the gates differ between them."""
    config = JumpReLUCrosscoderTrainingConfig(d_sae=32, decoder_init_norm=0.3, decoder_init="independent")
    sae = JumpReLUCrosscoderTrainingSAE(complete(config, acts))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(32, 3, generator=draw).repeat_interleave(16, 1) * 2)
        sae.W_enc.copy_(torch.randn(48, 32, generator=draw) * 0.2)
        sae.b_enc.copy_(torch.randn(32, generator=draw) * 0.5)
        sae.b_dec.copy_(torch.randn(48, generator=draw) * 0.1)
        sae.activation_scale.copy_(torch.tensor([30.0, 0.8, 0.5]))
    return sae.to_inference()


@pytest.fixture(params=["batchtopk", "jumprelu"])
def crosscoder(request: pytest.FixtureRequest) -> Crosscoder:
    return request.getfixturevalue(request.param)


def kept_activations(acts: Activations) -> Tensor:
    tokens = acts.held_out_tokens()
    return harvest(acts.snapshots, tokens, acts.hook_name)[tokens != 0].double()


def test_reconstruction_in_loops_over_tokens(
    acts: Activations, crosscoder: Crosscoder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("crosslens.activations.loader.BLOCK_TOKENS", 5 * T)  # several blocks
    x = kept_activations(acts)
    f = crosscoder.encode(x.float())
    x_hat = crosscoder.decode(f).double()
    table = reconstruction_table(crosscoder, acts)
    assert table["label"].tolist() == ["step0", "step10", "step20"] and table["step"].tolist() == list(STEPS)
    for s in range(3):
        mean = sum(row for row in x[:, s]) / len(x)
        errors = [float((x_hat[b, s] - x[b, s]).square().sum()) for b in range(len(x))]
        spreads = [float((x[b, s] - mean).square().sum()) for b in range(len(x))]
        row = table.iloc[s]
        assert row["explained_variance"] == pytest.approx(1 - sum(errors) / sum(spreads), abs=1e-6)
        ratios = [1 - e / v for e, v in zip(errors, spreads, strict=True)]
        assert row["explained_variance_per_token"] == pytest.approx(sum(ratios) / len(x), abs=1e-5)
        active = sum(1 for values in crosscoder.snapshot_acts(f, s).tolist() for v in values if v != 0)
        assert row["l0"] == pytest.approx(active / len(x))
        silent = [i for i in range(32) if all(v == 0 for v in f[:, i].tolist())]
        assert row["dead_fraction"] == pytest.approx(len(silent) / 32)
    if type(crosscoder).__name__.startswith("Jump"):
        assert table["l0"].nunique() == 3  # a gate per snapshot
    else:
        assert table["l0"].nunique() == 1 and table["explained_variance"].min() > 0.5


def plain_losses(
    acts: Activations, crosscoder: Crosscoder, folder: Path, n: int, left_out_stay_clean: bool = True
) -> list[dict[str, float]]:
    """CE and KL with transformers only: a forward hook on block 1, and a loop over tokens."""
    tokens = acts.held_out_tokens()[:n].long()
    raw = torch.stack([_hidden(folder / f"step{step}", tokens) for step in STEPS], 2)
    f = crosscoder.encode(raw)
    replace = (tokens != 0) if left_out_stay_clean else torch.ones_like(tokens, dtype=torch.bool)
    rows = []
    for s, step in enumerate(STEPS):
        model = _load(folder / f"step{step}")
        x_hat = crosscoder.decode(f)[..., s, :]
        log_p = {}
        for name, replacement in (("clean", None), ("spliced", x_hat), ("zero", torch.zeros_like(x_hat))):

            def hook(_module: Any, _inputs: Any, output: Any, new: Tensor | None = replacement) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                if new is None:
                    return None
                changed = torch.where(replace[..., None], new, hidden)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handle = model.gpt_neox.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                log_p[name] = model(tokens).logits.double().log_softmax(-1)
            handle.remove()
        sums = dict.fromkeys(("clean", "spliced", "zero", "kl"), 0.0)
        for b in range(len(tokens)):
            for t in range(T - 1):
                target = int(tokens[b, t + 1])
                for name in ("clean", "spliced", "zero"):
                    sums[name] -= float(log_p[name][b, t, target])
                p, q = log_p["clean"][b, t], log_p["spliced"][b, t]
                sums["kl"] += float((p.exp() * (p - q)).sum())
        rows.append({name: value / (len(tokens) * (T - 1)) for name, value in sums.items()})
    return rows


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def _hidden(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return _load(folder)(tokens, output_hidden_states=True).hidden_states[2]


def test_losses_of_spliced_models(acts: Activations, crosscoder: Crosscoder, tiny_snapshots: Path):
    n = 6
    found = evaluate(crosscoder, acts, n_tokens=n * T)
    expected = plain_losses(acts, crosscoder, tiny_snapshots, n)
    for s in range(3):
        row, wanted = found.iloc[s], expected[s]
        for name in ("clean", "spliced", "zero"):
            assert row[f"ce_{name}"] == pytest.approx(wanted[name], abs=1e-5), name
        assert row["kl"] == pytest.approx(wanted["kl"], abs=1e-5)
        cost = wanted["zero"] - wanted["clean"]
        if cost < 0.1:
            assert math.isnan(row["ce_recovered"])
        else:
            recovered = 1 - (wanted["spliced"] - wanted["clean"]) / cost
            assert row["ce_recovered"] == pytest.approx(recovered, abs=1e-4)
    # both branches: zeroing costs an untrained model nothing
    assert math.isnan(found["ce_recovered"][0]) and not found["ce_recovered"][1:].isna().any()
    # and the positions that keep their clean activations matter
    everywhere = plain_losses(acts, crosscoder, tiny_snapshots, n, left_out_stay_clean=False)
    assert abs(everywhere[2]["zero"] - expected[2]["zero"]) > 1e-3


@pytest.mark.parametrize(("least", "n_nan"), [(0.0, None), (1e9, 3)])
def test_recovered_is_nan_where_zeros_cost_less(
    acts: Activations, batchtopk: Crosscoder, monkeypatch: pytest.MonkeyPatch, least: float, n_nan: int | None
):
    monkeypatch.setattr(crosslens.training.evaluation, "MIN_ZERO_COST", least)
    rows = splice_losses(batchtopk, acts, acts.held_out_tokens()[:4].long())
    below = [math.isnan(row["ce_recovered"]) for row in rows]
    assert below == [row["ce_zero"] - row["ce_clean"] < least for row in rows]
    assert n_nan is None or sum(below) == n_nan


def test_splicing_in_batches_changes_nothing(acts: Activations, batchtopk: Crosscoder):
    tokens = acts.held_out_tokens()[:7].long()
    whole = splice_losses(batchtopk, acts, tokens)
    parts = splice_losses(batchtopk, acts, tokens, batch_tokens=2 * T)
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=1e-5, nan_ok=True)


def test_the_clean_model_spliced_with_itself_loses_nothing(acts: Activations, batchtopk: Crosscoder):
    """A crosscoder that reconstructs exactly: CE recovered is 1 and KL 0."""
    exact = type(batchtopk)(batchtopk.cfg)

    class Exact(type(batchtopk)):  # type: ignore[misc]
        def encode(self, x: Tensor) -> Tensor:
            return x.flatten(-2)

        def decode(self, feature_acts: Tensor) -> Tensor:
            return feature_acts.unflatten(-1, (3, 16))

    exact.__class__ = Exact
    for row in splice_losses(exact, acts, acts.held_out_tokens()[:4].long())[1:]:
        assert row["ce_spliced"] == pytest.approx(row["ce_clean"], abs=1e-6)
        assert row["ce_recovered"] == pytest.approx(1, abs=1e-5) and abs(row["kl"]) < 1e-6


def test_quick_metrics_are_the_table_by_name(acts: Activations, crosscoder: Crosscoder):
    table, metrics = reconstruction_table(crosscoder, acts), quick_metrics(crosscoder, acts)
    expected = {"metrics/held_out/dead_fraction": table["dead_fraction"][0]}
    for name in ("explained_variance", "l0"):
        expected[f"metrics/held_out/{name}"] = sum(table[name]) / 3
        expected |= {f"metrics/held_out/{name}/step{step}": table[name][s] for s, step in enumerate(STEPS)}
    assert metrics == pytest.approx(expected)


def test_columns_of_the_table(acts: Activations, batchtopk: Crosscoder):
    table = evaluate(batchtopk, acts, n_tokens=2 * T)
    assert list(table.columns) == [
        "snapshot", "label", "step", "tokens", "explained_variance", "explained_variance_per_token", "l0",
        "dead_fraction", "ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "kl",
    ]  # fmt: skip
    assert table["snapshot"].tolist() == [0, 1, 2] and len(table) == 3


def test_passes_of_few_sequences_give_the_same_losses(
    acts: Activations, batchtopk: Crosscoder, monkeypatch: pytest.MonkeyPatch
):
    """As for large vocabularies, whose logits are limited."""
    tokens = acts.held_out_tokens()[:7].long()
    whole = splice_losses(batchtopk, acts, tokens)
    monkeypatch.setattr(crosslens.activations.plan, "LOGIT_BYTES", 1)
    one_by_one = splice_losses(batchtopk, acts, tokens)
    for a, b in zip(whole, one_by_one, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6, nan_ok=True)
