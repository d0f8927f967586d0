"""Edges between the features of two hook points, against slopes of plain transformers, one feature at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crosslens as cl
from crosslens.causal.circuits import connect_features
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, Slow, make_crosscoder


def upper_acts(model: Any, tokens: Tensor, layer: int, replacement: Tensor, above: int) -> Tensor:
    """(T, D) above, when the activation below is `replacement`."""
    seen: list[Tensor] = []

    def put(_module: Any, _inputs: Any, output: Any) -> Any:
        return (replacement[None], *output[1:]) if isinstance(output, tuple) else replacement[None]

    def see(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    layers = model.gpt_neox.layers
    handles = [layers[layer].register_forward_hook(put), layers[above].register_forward_hook(see)]
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("architecture", ["batchtopk_crosscoder", "jumprelu_crosscoder"])
@torch.no_grad()
def test_edges_are_the_slopes_of_plain_transformers(snaps: Snapshots, architecture: str) -> None:
    lower, upper = (make_crosscoder(snaps, architecture, seed=layer, layer=layer) for layer in (0, 1))
    # means are over prompts, of which two are of one group
    grouped = Task.from_items("grouped", [{**item, "group": group} for item, group in zip(ITEMS, "aabc", strict=True)])
    table = connect_features(lower, upper, snaps, grouped, [3, 7], n=F)
    expected = torch.zeros(F, 2, len(snaps), dtype=torch.float64)
    parts = torch.zeros(2, len(snaps), dtype=torch.float64)
    for item in ITEMS:
        low, high = Slow(snaps, lower, item, 0), Slow(snaps, upper, item, 1)
        D = upper.d_model
        fires = torch.stack(high.f).amax(0)[:, [3, 7]] != 0
        for s, model in enumerate(low.models):
            W = upper.W_enc[s * D : (s + 1) * D, [3, 7]] * upper.activation_scale[s]
            x = low.acts[:, s]
            parts[:, s] += (upper_acts(model, low.tokens, 0, x, 1) @ W * fires).sum(0).double() / len(ITEMS)
            for i in low.f[s].any(0).nonzero().flatten().tolist():
                written = low.f[s][:, i, None] * lower.W_dec[i, s * D : (s + 1) * D] / lower.activation_scale[s]
                with torch.enable_grad():
                    kept = torch.ones((), requires_grad=True)  # how much of the feature is kept
                    read = (upper_acts(model, low.tokens, 0, x + (kept - 1) * written, 1) @ W * fires).sum(0)
                    slopes = [torch.autograd.grad(one, kept, retain_graph=True)[0] for one in read]
                expected[i, :, s] += torch.stack(slopes).double() / len(ITEMS)
    assert expected.abs().max() > 1e-3 and len(table) >= 2 * len(snaps)
    found = torch.zeros_like(expected)
    for row in table.to_dict("records"):
        found[row["from_feature"], [3, 7].index(row["feature"]), row["snapshot"]] = row["edge"]
        assert row["part"] == pytest.approx(float(parts[[3, 7].index(row["feature"]), row["snapshot"]]), abs=1e-5)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


def test_the_largest_edges_are_kept_and_go_to_json(snaps: Snapshots, task: Task, tmp_path: Path) -> None:
    lower, upper = (make_crosscoder(snaps, "topk_crosscoder", layer=layer) for layer in (0, 1))
    every, few = (connect_features(lower, upper, snaps, task, [1, 2], n=n) for n in (F, 3))
    for j in (1, 2):
        size = every[every["feature"] == j].groupby("from_feature")["edge"].apply(lambda edge: edge.abs().max())
        assert set(few.loc[few["feature"] == j, "from_feature"]) == set(size.nlargest(3).index)
    assert set(few["n_prompts"]) == {len(ITEMS)} and few["edge_se"].notna().all()
    assert str(few).startswith("tiny: the 3 largest edges into each of 2 upper features, on 4 prompts in 4 groups")
    few.to_json(tmp_path / "edges.json", orient="records")
    assert json.loads((tmp_path / "edges.json").read_text())[0]["from_feature"] == few["from_feature"].iloc[0]


def test_mistakes_are_refused(snaps: Snapshots, task: Task) -> None:
    lower, upper = (make_crosscoder(snaps, "topk_crosscoder", layer=layer) for layer in (0, 1))
    cases: list[tuple[Crosscoder, Crosscoder, list[int], int, str]] = [
        (upper, lower, [1], 1, "the lower crosscoder reads blocks.1.hook_resid_post and the upper one blocks.0"),
        (lower, lower, [1], 1, "give the one at the earlier hook point first"),
        (lower, upper, [F], 1, r"feature 24 is not in \[0, 23\]"),
        (lower, upper, [1], 0, "n=0 must be at least 1"),
    ]
    for below, above, features, n, words in cases:
        with pytest.raises(UserError, match=words):
            cl.causal.connect_features(below, above, snaps, task, features, n=n)
