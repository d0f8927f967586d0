"""Passages against plain loops over sequences, and the distribution of the draw."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chisquare

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.features.passages import PassageSampler, passage_tables
from crosslens.features.tables import feature_tables
from crosslens.snapshots.collection import Snapshots
from tests.intervention.test_view import make_crosscoder


def make_values(N: int, T: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of which feature 0 has none and the last has few pauses, and a mask of positions to keep."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(N, T, n, generator=g) * (torch.rand(N, T, n, generator=g) < torch.linspace(0, 0.6, n))
    keep = torch.rand(N, T, generator=g) < 0.9
    return values * keep[..., None], keep


@pytest.mark.parametrize(
    ("N", "T", "n", "window", "R", "seed"), [(7, 9, 4, 2, 3, 0), (12, 5, 3, 8, 20, 1), (5, 16, 6, 0, 2, 2)]
)
def test_candidates_in_loops(N: int, T: int, n: int, window: int, R: int, seed: int) -> None:
    values, keep = make_values(N, T, n, seed)
    sampler, parts = PassageSampler(n, R, seed, window), PassageSampler(n, R, seed, window)
    sampler.add(values, keep, 0)
    for begin in range(0, N, 2):
        parts.add(values[begin : begin + 2], keep[begin : begin + 2], begin)
    merged, rest = PassageSampler(n, R, seed, window), PassageSampler(n, R, seed, window)
    merged.add(values[:3], keep[:3], 0)
    rest.add(values[3:], keep[3:], 3)
    merged.merge(rest)
    for other in (parts, merged):
        for name in ("keys", "sequences", "positions", "values", "n_active"):
            torch.testing.assert_close(getattr(other, name), getattr(sampler, name), rtol=0, atol=0)
    assert sampler.n_tokens == merged.n_tokens == int(keep.sum())
    for i in range(n):
        assert int(sampler.n_active[i]) == sum(float(values[m, t, i]) > 0 for m in range(N) for t in range(T))
        for kind in (0, 1):
            want: list[tuple[float, int, int, float]] = []
            for m in range(N):
                u = np.random.default_rng([seed, m]).random(2 * (n + T))
                places: list[int] = []
                for t in range(T):
                    around = [float(values[m, v, i]) for v in range(max(0, t - window), min(T, t + window + 1))]
                    fits = values[m, t, i] > 0 if kind == 0 else keep[m, t] and not any(around)
                    places += [t] if fits else []
                if places:
                    best = max(places, key=lambda t: u[2 * n + kind * T + t])
                    span = values[m, max(0, best - window) : best + window + 1, i]
                    want.append((log(1 - u[kind * n + i]) / len(places), m, best, float(span.max())))
            want = sorted(want, reverse=True)[:R]
            found = sampler.keys[kind, i]
            assert int((found > -torch.inf).sum()) == len(want)
            for e, (key, m, t, value) in enumerate(want):
                assert float(found[e]) == pytest.approx(key, rel=1e-12)
                assert (int(sampler.sequences[kind, i, e]), int(sampler.positions[kind, i, e])) == (m, t)
                assert float(sampler.values[kind, i, e]) == pytest.approx(value)


def test_every_active_token_comes_first_equally_often() -> None:
    """One sequence has a single active token and another has five: all six are equally likely."""
    values = torch.zeros(3, 6, 1)
    values[0, 2], values[1, 1:] = 1.0, 1.0
    keep, counts = torch.ones(3, 6, dtype=torch.bool), dict[tuple[int, int], int]()
    for seed in range(400):
        sampler = PassageSampler(1, 2, seed, 0)
        sampler.add(values, keep, 0)
        place = int(sampler.sequences[0, 0, 0]), int(sampler.positions[0, 0, 0])
        counts[place] = counts.get(place, 0) + 1
    assert set(counts) == {(0, 2), *((1, t) for t in range(1, 6))}
    assert chisquare(list(counts.values())).pvalue > 0.01  # the same on every machine: the seeds are given


@pytest.mark.parametrize("architecture", ["jumprelu_crosscoder", "batchtopk_crosscoder"])
def test_passages_of_a_crosscoder(tiny_snapshots: Path, tiny_text: list[str], architecture: str) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", Dataset(tiny_text, 900, 32, 600))
    crosscoder, n = make_crosscoder(architecture), 5
    tables = feature_tables(crosscoder, acts, n_examples=2, n_passages=n, seed=3)
    passages, texts = tables["passages"], tables["held_out_tokens"]
    tokens = acts.held_out_tokens()
    keep, first = acts.keep(tokens), len(acts.tokens) - len(tokens)
    values = crosscoder.encode(acts.block(first, len(acts.tokens))) * keep[..., None]
    names = {(row["sequence"], row["position"]): row["token"] for row in texts.to_dict("records")}
    assert set(texts["sequence"]) == set(passages["sequence"])
    assert passages["active"].any() and not passages["active"].all()
    used = tables["examples"].groupby("feature")["sequence"].agg(set)
    for row in passages.to_dict("records"):
        i, span = row["feature"], slice(row["begin"], row["end"])
        inside = values[row["sequence"], span, i]
        assert row["active"] == bool((inside > 0).any()) and row["rank"] < n
        assert row["activation"] == pytest.approx(float(inside.max()), rel=1e-5)
        assert row["rate"] == pytest.approx(int((values[..., i] > 0).sum()) / int(keep.sum()))
        assert row["sequence"] not in used.get(i, set()) and row["end"] - row["begin"] <= 17
        assert all((row["sequence"], t) in names for t in range(row["begin"], row["end"]))
    for (_, active), part in passages.groupby(["feature", "active"]):
        assert part["rank"].tolist() == list(range(len(part))) and part["sequence"].is_unique
        assert active or (part["activation"] == 0).all()
        assert len(part) == n, "others stand in for those that hold an example"
    again = feature_tables(crosscoder, acts, n_examples=2, n_passages=n, seed=3)["passages"]
    pd.testing.assert_frame_equal(again, passages)
    assert not feature_tables(crosscoder, acts, n_examples=2, n_passages=n, seed=4)["passages"].equals(passages)
    with pytest.raises(UserError, match="n_passages=-1 must be 0 or more"):
        feature_tables(crosscoder, acts, n_passages=-1)


def test_passages_with_the_text_of_an_example_or_of_each_other_are_dropped() -> None:
    values = torch.zeros(6, 3, 1)
    values[:5, 1] = 1.0
    tokens = torch.tensor([[5, 6, 7], [5, 6, 7], [1, 6, 2], [1, 6, 2], [3, 6, 4], [8, 8, 8]])
    sampler = PassageSampler(1, 9, seed=0, window=1)
    sampler.add(values, torch.ones(6, 3, dtype=torch.bool), 0)
    example = torch.tensor([[0, -1]]), torch.tensor([[1, 0]])
    found = passage_tables(sampler, tokens, lambda ids: ids, *example, n_passages=9)["passages"]
    active = set(found.loc[found["active"], "sequence"])
    # 0 is the example and 1 has its text; 2 and 3 have the same
    assert 4 in active and len(active & {2, 3}) == 1 and len(active) == 2
    assert found.loc[~found["active"], "sequence"].tolist() == [5]
    few = passage_tables(sampler, tokens, lambda ids: ids, *example, n_passages=1)["passages"]
    assert len(few) == 2 and few["sequence"].tolist()[0] == found["sequence"].tolist()[0]
