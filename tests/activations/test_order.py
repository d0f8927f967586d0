"""Batches are uniform draws without replacement from all tokens, and any position of the stream is found at once."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.special import gammaln

from crosslens.activations import mixing, order
from crosslens.activations.mixing import Draw, Fill, Schedule
from crosslens.activations.order import Order, permuted_runs, stored_order
from crosslens.activations.plan import buffered_sequences, distinct_sequences

C, N_SEQUENCES, B = 40, 500, 600  # tokens of a sequence, sequences, tokens of a batch


def tokens_of(made: Order, first: int, last: int) -> list[tuple[int, int]]:
    return [(piece.shard, int(row)) for piece in made.pieces(first, last) for row in piece.rows]


@pytest.mark.parametrize("counts", [[5], [3, 0, 9], [40] * 70, [700] * 9, [7_001, 3]])
def test_every_token_once_per_epoch_and_any_cut_of_the_stream(counts: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "_MARK", 100)  # several recorded counts in a window
    made = Order(counts, seed=3)
    n = sum(counts)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    epochs = [tokens_of(made, epoch * n, (epoch + 1) * n) for epoch in range(3)]
    assert all(len(found) == n and set(found) == everything for found in epochs)
    singly = [tokens_of(made, i, i + 1)[0] for i in range(min(n, 120))]
    assert sorted(tokens_of(Order(counts, seed=3), 0, len(singly))) == sorted(singly)
    cuts = np.sort(np.random.default_rng(0).integers(0, 3 * n, 12))
    for first, last in itertools.pairwise([0, *cuts.tolist(), 3 * n]):
        parts = [tokens_of(made, i, min(i + 7, last)) for i in range(first, min(first + 70, last), 7)]
        assert sorted(itertools.chain(*parts)) == sorted(tokens_of(made, first, min(first + 70, last)))


def test_other_seeds_and_epochs_have_other_orders():
    n = 300
    found = [tokens_of(Order([100] * 3, seed), e * n, (e + 1) * n) for seed in (0, 1, -1) for e in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert found[0] == tokens_of(Order([100] * 3, 0), 0, n)


@pytest.mark.parametrize("n", [1, 31, 32, 100])
def test_runs_stay_together(n: int):
    rows = permuted_runs(n, 8, np.random.default_rng(0))
    assert sorted(rows.tolist()) == list(range(n))
    starts = [i for i in range(n) if rows[i] % 8 == 0]
    assert all(rows[i] == rows[i - 1] + 1 for i in range(n) if i not in starts)


@pytest.mark.exhaustive
def test_an_epoch_is_a_uniform_permutation():
    """All 120 orders of five tokens in two shards are equally frequent, over seeds."""
    seeds = 6000
    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    for seed in range(seeds):
        made = Order([3, 2], seed)
        stored = [stored_order(n, seed, shard) for shard, n in enumerate((3, 2))]
        places = [tokens_of(made, i, i + 1)[0] for i in range(5)]
        found[tuple((shard, int(stored[shard][row])) for shard, row in places)] += 1
    assert len(found) == 120
    chi = sum((n - seeds / 120) ** 2 for n in found.values()) / (seeds / 120)
    assert abs(chi - 119) < 4 * math.sqrt(2 * 119)


# ---------------------------------------------------------------------- sequences in a batch


def none_drawn(n_tokens: int) -> float:
    """Probability that a batch has none of `n_tokens` given tokens."""
    total = C * N_SEQUENCES
    left = total - n_tokens
    return math.exp(gammaln(left + 1) - gammaln(left - B + 1) - gammaln(total + 1) + gammaln(total - B + 1))


def distinct_moments() -> tuple[float, float]:
    """Mean and variance of the number of sequences in B tokens drawn without replacement."""
    one, two, n = none_drawn(C), none_drawn(2 * C), N_SEQUENCES
    return n * (1 - one), n * one * (1 - one) + n * (n - 1) * (two - one**2)


def deviation(counts: list[int]) -> float:
    """By how many standard errors the mean of the counts differs from sampling without replacement."""
    mean, variance = distinct_moments()
    return (float(np.mean(counts)) - mean) / math.sqrt(variance / len(counts))


def cached_counts(n_shards: int, n_batches: int) -> list[int]:
    """Sequences in each batch from a cache of some shards."""
    split = np.array_split(np.arange(N_SEQUENCES), n_shards)
    made = Order([len(part) * C for part in split], seed=0)
    owner = [np.repeat(part, C)[stored_order(len(part) * C, 0, i)] for i, part in enumerate(split)]
    batches = ([owner[p.shard][p.rows] for p in made.pieces(i * B, (i + 1) * B)] for i in range(n_batches))
    return [len(np.unique(np.concatenate(batch))) for batch in batches]


def buffered_counts(capacity: int, n_batches: int) -> list[int]:
    """Sequences in each batch from a mixing buffer, without those of the last buffer of an epoch."""
    schedule = Schedule(np.full(N_SEQUENCES, C), capacity, 0, N_SEQUENCES)
    owner = np.empty(capacity, dtype=np.int64)
    drawn: list[int] = []
    for event in schedule.epoch(0):
        if isinstance(event, Fill):
            owner[event.slots] = np.repeat(event.sequences, C)
        else:
            drawn += owner[event.slots].tolist()
    return [len(set(drawn[i * B : (i + 1) * B])) for i in range(n_batches)]


@pytest.mark.parametrize("n_shards", [1, 5, 20])
def test_sequences_in_a_batch_follow_sampling_without_replacement(n_shards: int):
    counts = cached_counts(n_shards, 100)  # over several epochs
    assert abs(deviation(counts)) < 4
    assert np.mean(counts) == pytest.approx(distinct_sequences(np.full(N_SEQUENCES, C), B), rel=0.01)
    assert 0.4 < np.var(counts) / distinct_moments()[1] < 2


def test_a_buffer_that_holds_all_draws_without_replacement(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "UNIT", 64)
    assert abs(deviation(buffered_counts(C * N_SEQUENCES, 30))) < 4


@pytest.mark.parametrize("share", [4, 10])
def test_a_smaller_buffer_mixes_as_planned(share: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "UNIT", 64)
    capacity = C * N_SEQUENCES // share
    ramp = 2 * capacity // B  # at first the buffer holds few sequences, and all of each
    counts = buffered_counts(capacity, (C * N_SEQUENCES - capacity) // B)[ramp:]
    assert np.mean(counts) == pytest.approx(buffered_sequences(np.full(N_SEQUENCES, C), capacity, B), rel=0.1)
    assert deviation(counts) < -4  # the test of sampling without replacement tells


def test_blocks_of_sequences_fail_the_test():
    """The null: shuffling within blocks of 20 sequences."""
    rng = np.random.default_rng(0)
    counts: list[int] = []
    for first in range(0, N_SEQUENCES, 20):
        block = rng.permutation(np.repeat(np.arange(first, first + 20), C))
        counts.append(len(np.unique(block[:B])))
    assert deviation(counts) < -50


def test_windows_of_shards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "WINDOW", 4)
    made = Order([30] * 10, 0)
    windows = [{shard for shard, _ in tokens_of(made, i * 20, (i + 1) * 20)} for i in range(15)]
    assert all(len(shards) <= 8 for shards in windows)  # a batch may lie in two
    assert len(set().union(*windows)) == 10
    assert {frozenset(w) for w in windows} != {
        frozenset(shard for shard, _ in tokens_of(made, 300 + i * 20, 320 + i * 20)) for i in range(15)
    }


# ---------------------------------------------------------------------- the mixing buffer


@pytest.mark.parametrize("capacity", [20, 60, 1000])
def test_the_schedule_never_overwrites_what_was_not_drawn(capacity: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixing, "UNIT", 7)
    counts = np.random.default_rng(0).integers(0, 9, 50)
    for epoch in range(2):
        held: dict[int, tuple[int, int]] = {}
        given: list[tuple[int, int]] = []
        for event in Schedule(counts, capacity, 3, 4).epoch(epoch):
            if isinstance(event, Draw):
                given += [held.pop(slot) for slot in event.slots.tolist()]
                continue
            tokens = [(int(i), k) for i in event.sequences for k in range(counts[i])]
            assert len(tokens) == len(event.slots) and not held.keys() & set(event.slots.tolist())
            held.update(zip(event.slots.tolist(), tokens, strict=True))
        assert not held and sorted(given) == [(i, k) for i, n in enumerate(counts) for k in range(n)]
