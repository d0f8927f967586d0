"""Counts, divergences and phases: plain loops in float64, and cases with known answers."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

import crosslens.evolution.dynamics
import crosslens.evolution.ngrams
from crosslens.errors import UserError
from crosslens.evolution.dynamics import Dynamics, bigram_progress, dynamics_table, first_for_good, measure_predictions
from crosslens.evolution.firing import Firing, measure_firing
from crosslens.evolution.geometry import rotation, total_dimensionality
from crosslens.evolution.history import evolve
from crosslens.evolution.ngrams import NgramCounts, count_ngrams, vocabulary_hash
from crosslens.evolution.phases import find_phases
from crosslens.snapshots.collection import Snapshots
from tests.given import Held, of_norms, of_rows, snapshots_at


def random_tokens(N: int, T: int, V: int, seed: int) -> torch.Tensor:
    """Sequences that begin with id 0 and in which low ids are frequent."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (V * torch.rand(N, T, generator=generator) ** 2).long()
    tokens[:, 0] = 0
    return tokens.int()


def pairs_of(tokens: torch.Tensor, special: set[int]) -> list[tuple[int, int]]:
    return [
        (row[t], row[t + 1])
        for row in tokens.tolist()
        for t in range(len(row) - 1)
        if not (row[t] in special and row[t + 1] in special)
    ]


def entropy(counts: Counter[Any]) -> float:
    n = sum(counts.values())
    return -sum(c / n * math.log(c / n) for c in counts.values())


# ---- counts


@pytest.mark.parametrize(
    ("N", "T", "seed", "at_a_time"), [(30, 9, 0, 1 << 26), (30, 9, 0, 20), (1, 2, 1, 1), (50, 20, 2, 90)]
)
def test_counts_match_plain_loops(
    snaps: Snapshots, monkeypatch: pytest.MonkeyPatch, N: int, T: int, seed: int, at_a_time: int
) -> None:
    monkeypatch.setattr(crosslens.evolution.ngrams, "_PAIRS", at_a_time)
    V = len(snaps.tokenizer)
    tokens = random_tokens(N, T, V, seed)
    tokens[:, 1] = torch.where(tokens[:, 1] == 0, 1, tokens[:, 1])
    pairs = pairs_of(tokens, {0})
    unigrams, bigrams = Counter(y for _, y in pairs), Counter(pairs)
    found = count_ngrams(tokens, snaps.tokenizer)
    assert found.unigrams.tolist() == [unigrams[y] for y in range(V)] and found.n_pairs == len(pairs)
    assert (
        dict(
            zip(zip(found.firsts().tolist(), found.followers.tolist(), strict=True), found.counts.tolist(), strict=True)
        )
        == bigrams
    )
    assert list(zip(found.firsts().tolist(), found.followers.tolist(), strict=True)) == sorted(bigrams)
    contexts = Counter(x for x, _ in pairs)
    assert found.contexts.tolist() == [contexts[x] for x in range(V)]
    assert found.unigram_entropy == pytest.approx(entropy(unigrams))
    rows = {x: entropy(Counter({y: c for (a, y), c in bigrams.items() if a == x})) for x in contexts}
    assert found.bigram_entropies.tolist() == pytest.approx([rows.get(x, 0.0) for x in range(V)])
    expected = sum(contexts[x] * rows[x] for x in contexts) / len(pairs)
    assert found.bigram_entropy == pytest.approx(expected) and expected <= found.unigram_entropy + 1e-12
    lots = count_ngrams([tokens[: N // 2], tokens[N // 2 :]], snaps.tokenizer)
    assert all(
        torch.equal(getattr(lots, name), getattr(found, name)) for name in ("unigrams", "starts", "followers", "counts")
    )


def test_padding_does_not_count(snaps: Snapshots) -> None:
    """BOS, EOS and padding share one id here: the end of a document counts once, padding does not count."""
    tokens = torch.tensor([[0, 3, 4, 0, 0, 0], [0, 0, 5, 0, 6, 0]])
    counts = count_ngrams(tokens, snaps.tokenizer)
    seen = Counter(
        dict(
            zip(
                zip(counts.firsts().tolist(), counts.followers.tolist(), strict=True),
                counts.counts.tolist(),
                strict=True,
            )
        )
    )
    assert seen == Counter([(0, 3), (3, 4), (4, 0), (0, 5), (5, 0), (0, 6), (6, 0)])
    own = copy.deepcopy(snaps.tokenizer)
    own.pad_token = "<unk>"  # id 1, distinct from BOS and EOS
    counts = count_ngrams(torch.tensor([[0, 3, 1, 1], [1, 0, 4, 1]]), own)
    assert list(zip(counts.firsts().tolist(), counts.followers.tolist(), strict=True)) == [(0, 3), (0, 4)]


def test_counts_can_be_saved_and_loaded(snaps: Snapshots, tmp_path: Path) -> None:
    counts = count_ngrams(random_tokens(5, 8, len(snaps.tokenizer), 0), snaps.tokenizer)
    again = NgramCounts.load(counts.save(tmp_path / "counts.safetensors"))
    for name in ("unigrams", "starts", "followers", "counts"):
        assert torch.equal(getattr(again, name), getattr(counts, name))
    assert again.vocabulary == counts.vocabulary
    with pytest.raises(UserError, match="cannot be read"):
        NgramCounts.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no counts")
    with pytest.raises(UserError, match="cannot be read"):
        NgramCounts.load(tmp_path / "text")
    model = next(Path(snaps[0].folder()).glob("*.safetensors"))
    with pytest.raises(UserError, match="holds no n-gram counts"):
        NgramCounts.load(model)


def test_damaged_counts_are_refused(snaps: Snapshots, tmp_path: Path) -> None:
    counts = count_ngrams(random_tokens(5, 8, len(snaps.tokenizer), 0), snaps.tokenizer)
    path = counts.save(tmp_path / "counts.safetensors")
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="counts.safetensors is damaged .*: count again, or give a file"):
            NgramCounts.load(path)
    for old, new in ((counts.vocabulary[:9], "123456789"), ("vocabulary", "vocabulari"), ('"about":"{', '"about":"[')):
        path.write_bytes(whole.replace(old.encode(), new.encode()))
        assert path.read_bytes() != whole
        with pytest.raises(UserError, match=r"counts.safetensors (is damaged|cannot be read) \(.*\): count again"):
            NgramCounts.load(path)
    tensors = {name: getattr(counts, name) for name in ("unigrams", "starts", "followers", "counts")}
    about = json.dumps({"vocabulary": counts.vocabulary})  # as older releases wrote it
    save_file(tensors, path, {"format": "crosslens ngrams 1", "about": about})
    assert NgramCounts.load(path).vocabulary == counts.vocabulary


def test_counts_of_another_tokenizer_are_refused(snaps: Snapshots) -> None:
    tokens = random_tokens(4, 8, len(snaps.tokenizer), 0)
    counts = count_ngrams(tokens, snaps.tokenizer)
    larger = copy.deepcopy(snaps.tokenizer)
    larger.add_tokens(["ship"])
    with pytest.raises(UserError, match=f"the counts have a vocabulary of {len(larger)}, the snapshots' tokenizer"):
        measure_predictions(snaps, count_ngrams(tokens, larger), tokens)
    swapped = _swapped(snaps.tokenizer)
    assert vocabulary_hash(swapped) != counts.vocabulary == vocabulary_hash(snaps.tokenizer)
    with pytest.raises(UserError, match="the counts are from another tokenizer of the same size"):
        measure_predictions(snaps, count_ngrams(tokens, swapped), tokens)
    for wrong, message in ((torch.tensor([[0, 99]]), "token id 99 is outside"), (torch.tensor([[0], [1]]), "no pair")):
        with pytest.raises(UserError, match=message):
            count_ngrams(wrong, snaps.tokenizer)


def _swapped(tokenizer: Any) -> Any:
    """The same tokens, with the ids of two of them swapped."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    ids: dict[str, int] = dict(tokenizer.get_vocab())
    ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
    raw = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    bos = tokenizer.bos_token
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=bos, pad_token=bos, unk_token="<unk>")


# ---- divergences


def kl(p: list[float], q: list[float]) -> float:
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True) if x)


def slow_dynamics(
    model: Any, tokens: torch.Tensor, seen: list[tuple[int, int]], V: int, min_count: int, times: list[int]
) -> list[float]:
    """KL1, KL2 and loss of one model, by plain loops, with every sequence repeated as often as `times` says."""
    with torch.no_grad():
        p = model(tokens.long()).logits.double().softmax(-1)[..., :V].tolist()
    everywhere: list[list[float]] = []
    after: dict[int, list[list[float]]] = {}
    losses: list[float] = []
    following: dict[int, Counter[int]] = {}
    for x, y in seen:
        following.setdefault(x, Counter())[y] += 1
    for i, row in enumerate(tokens.tolist()):
        for _ in range(times[i]):
            for t in range(len(row) - 1):
                if row[t] == row[t + 1] == 0:
                    continue
                everywhere.append(p[i][t])
                losses.append(-math.log(p[i][t][row[t + 1]]))
                if following.get(row[t], Counter()).total() >= min_count:
                    after.setdefault(row[t], []).append(p[i][t])
    average = [sum(column) / len(everywhere) for column in zip(*everywhere, strict=True)]
    p1 = [sum(y == v for _, y in seen) / len(seen) for v in range(V)]
    kl2, n = 0.0, 0
    for x, predictions in after.items():
        p2 = [following[x][v] / following[x].total() for v in range(V)]
        kl2 += len(predictions) * kl(p2, [sum(c) / len(predictions) for c in zip(*predictions, strict=True)])
        n += len(predictions)
    return [kl(p1, average), kl2 / n, sum(losses) / len(losses)]


@pytest.mark.parametrize(
    ("N", "T", "seed", "pairs", "min_count", "sums"),
    [(6, 9, 0, 1 << 22, 1, 1 << 27), (6, 9, 0, 7, 1, 1 << 27), (3, 20, 1, 50, 4, 1 << 27), (9, 4, 2, 1, 2, 400)],
)
def test_averaged_divergences_and_their_draws_match_plain_loops(
    snaps: Snapshots,
    monkeypatch: pytest.MonkeyPatch,
    N: int,
    T: int,
    seed: int,
    pairs: int,
    min_count: int,
    sums: int,
) -> None:
    monkeypatch.setattr(crosslens.evolution.dynamics, "_PAIRS", pairs)
    monkeypatch.setattr(crosslens.evolution.dynamics, "_SUMS", sums)
    V = len(snaps.tokenizer)
    corpus, tokens = random_tokens(12, 10, V, seed + 10), random_tokens(N, T, V, seed)
    counts = count_ngrams(corpus, snaps.tokenizer)
    seen = pairs_of(corpus, {0})
    found = measure_predictions(
        snaps, counts, tokens, batch_tokens=2 * T, min_count=min_count, n_bootstrap=4, seed=seed
    )
    assert found.unigram_entropy == counts.unigram_entropy and found.bigram_entropy == counts.bigram_entropy
    assert found.snapshots["label"].tolist() == ["step0", "step10", "step20"]
    assert found.n == len(pairs_of(tokens, {0})) and found.kl1.shape == (5, 3) and found.n_bootstrap == 4
    often = Counter(x for x, _ in seen)
    assert found.known == pytest.approx(sum(often[x] >= min_count for x, _ in pairs_of(tokens, {0})) / found.n)
    G = found.n_groups
    assert G == N if sums > 400 else 2 <= G < N
    weights = np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), 4)
    for s in range(3):
        model = GPTNeoXForCausalLM.from_pretrained(snaps[s].folder())
        slow: list[list[float]] = []
        for of_groups in [np.ones(G, dtype=int), *weights]:
            times = [int(of_groups[i * G // N]) for i in range(N)]
            slow.append(slow_dynamics(model, tokens, seen, V, min_count, times))
        expected = np.array(slow)
        bias = expected[1:, :2].mean(0) - expected[0, :2]
        expected[:, :2] -= np.where(np.arange(5) == 0, 1, 2)[:, None] * bias
        values = np.stack([getattr(found, name)[:, s] for name in ("kl1", "kl2", "loss")], 1)
        assert values == pytest.approx(expected, abs=5e-5)
        assert values[1:, :2].mean(0) == pytest.approx(values[0, :2]), "the measurement is the mean of the draws"


def test_few_contexts_bias_the_divergences_little(snaps: Snapshots) -> None:
    """Averages over few sharp predictions: without the correction KL2 is (P - X) / 2N too large."""
    V, generator = len(snaps.tokenizer), torch.Generator().manual_seed(0)
    chain = torch.rand(V, V, generator=generator) ** 3 + 0.02
    chain[:, :2] = 0
    corpus, tokens = (_walk(chain, n, 20, generator) for n in (4000, 60))
    counts = count_ngrams(corpus, snaps.tokenizer)
    use = torch.ones(60, 19, dtype=torch.bool)
    averages = crosslens.evolution.dynamics._Averages(counts, tokens[:, :-1].unique(), 60, "cpu")
    # knows the next word: its average over all contexts would be the bigrams
    bigrams = (chain / chain.sum(1, keepdim=True))[tokens[:, :-1]]
    p = 0.98 * torch.nn.functional.one_hot(tokens[:, 1:], V) + 0.02 * bigrams
    averages.add(p.log(), tokens, use, use, torch.arange(60))
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 400)
    plain = averages.divergences(torch.from_numpy(np.vstack([np.ones((1, 60)), weights])))[1]
    corrected = crosslens.evolution.dynamics._without_bias(plain)
    assert plain[0] > 0.05 and abs(corrected[0]) < plain[0] / 2
    assert corrected[1:].mean() == pytest.approx(corrected[0])
    assert corrected[1:].std() == pytest.approx(plain[1:].std())


def _walk(chain: torch.Tensor, n: int, T: int, generator: torch.Generator) -> torch.Tensor:
    """(n, T) sequences of a Markov chain."""
    found = [torch.randint(2, len(chain), (n,), generator=generator)]
    while len(found) < T:
        found.append(torch.multinomial(chain[found[-1]], 1, generator=generator)[:, 0])
    return torch.stack(found, 1)


def test_training_reduces_the_divergences(snaps: Snapshots, tiny_text: list[str]) -> None:
    ids: Any = snaps.tokenizer(tiny_text, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([i for document in ids for i in (0, *document)])
    tokens = stream[: len(stream) // 16 * 16].view(-1, 16)
    found = measure_predictions(snaps, count_ngrams(tokens[50:], snaps.tokenizer), tokens[:50], n_bootstrap=200)
    table = found.to_frame()
    for name in ("kl1", "kl2", "loss"):
        assert table[name].is_monotonic_decreasing
        assert (table[f"{name}_low"] < table[f"{name}_high"]).all()
        low, high = np.quantile(getattr(found, name)[1:], [(1 - 0.95) / 2, (1 + 0.95) / 2], axis=0)
        assert table[f"{name}_low"].tolist() == low.tolist() and table[f"{name}_high"].tolist() == high.tolist()
    assert (table["loss_low"] < table["loss"]).all() and (table["loss"] < table["loss_high"]).all()
    assert table["loss"].iloc[0] == pytest.approx(math.log(len(snaps.tokenizer)), abs=0.3)
    assert table["n"].unique().tolist() == [50 * 15] and 0.99 < table["known"].iloc[0] <= 1
    assert table["step"].isna().all() or table["step"].tolist() == [0, 10, 20]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("knows", ["unigrams", "bigrams", "everything"])
def test_a_model_that_knows_the_counts_has_no_divergence(snaps: Snapshots, seed: int, knows: str) -> None:
    """Nor has one that knows more: predictions are averaged over contexts before they are compared."""
    tokens, V = torch.randint(2, 6, (40, 12), generator=torch.Generator().manual_seed(seed)), len(snaps.tokenizer)
    counts = count_ngrams(tokens, snaps.tokenizer)
    dense = torch.zeros(V, V).index_put((counts.firsts(), counts.followers), counts.counts.float())
    if knows == "unigrams":
        p = (counts.unigrams / counts.n_pairs).expand(40, 11, V)
    elif knows == "bigrams":
        p = (dense / dense.sum(1, keepdim=True).clamp(min=1))[tokens[:, :-1]]
    else:
        p = torch.nn.functional.one_hot(tokens[:, 1:], V).float()
    use = torch.ones(40, 11, dtype=torch.bool)
    averages = crosslens.evolution.dynamics._Averages(counts, torch.arange(2, 6), 40, "cpu")
    averages.add((p + 1e-30).log(), tokens, use, use, torch.arange(40) * averages.n_groups // 40)
    kl1, kl2, loss = (values[0] for values in averages.divergences(torch.ones(1, averages.n_groups).double()))
    assert kl1 == pytest.approx(0, abs=1e-6)
    expected = {"unigrams": counts.unigram_entropy, "bigrams": counts.bigram_entropy, "everything": 0.0}
    assert loss == pytest.approx(expected[knows], abs=1e-6)
    if knows == "unigrams":
        assert kl2 == pytest.approx(counts.unigram_entropy - counts.bigram_entropy, abs=1e-6) and kl2 > 0
    else:
        assert kl2 == pytest.approx(0, abs=1e-6)


def test_errors(snaps: Snapshots) -> None:
    V = len(snaps.tokenizer)
    tokens = random_tokens(4, 8, V, 0)
    counts = count_ngrams(tokens, snaps.tokenizer)
    for arguments, options, message in (
        ((snaps, counts, tokens), {"min_count": 0}, "min_count=0 must be 1 or more"),
        ((snaps, counts, tokens), {"n_bootstrap": 0}, "n_bootstrap=0 must be 1 or more"),
        (
            (snaps, counts, tokens),
            {"min_count": 1000},
            "predictions has a context with min_count=1000 or more",
        ),
        ((snaps, counts, tokens + V), {}, "is outside the vocabulary of"),
        ((snaps, counts, tokens.repeat(1, 9)), {}, "sequences of 72 tokens exceed the models' context of 32"),
    ):
        with pytest.raises(UserError, match=message):
            measure_predictions(*arguments, **options)


# ---- phases


def curves(
    kl1: Any, kl2: Any, loss: Any, *, floor: float = 2.0, noise: float = 0.0, N: int = 40, seed: int = 0
) -> Dynamics:
    """Dynamics with given curves at steps 0, 10, 20, ...; the draws are means over N noisy sequences."""
    S = len(kl1)
    rng = np.random.default_rng(seed)
    weights = np.vstack([np.ones(N), rng.multinomial(N, np.full(N, 1 / N), 300)]) / N
    made = [weights @ (np.asarray(x, dtype=float) + noise * rng.normal(size=(N, S))) for x in (kl1, kl2, loss)]
    table = pd.DataFrame({"label": [f"step{10 * s}" for s in range(S)]})
    for unit, factor in (("step", 10), ("tokens", 70)):
        table[unit] = pd.array([factor * s for s in range(S)], dtype="Int64")
    return Dynamics(table, *made, n=10 * N, known=1.0, n_groups=N, unigram_entropy=3.0, bigram_entropy=floor)


def test_first_for_good() -> None:
    holds = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=bool)
    assert first_for_good(holds).tolist() == [0, 1, 2, 3, 3]


def test_events_of_predictions() -> None:
    found = find_phases(curves([2, 1, 3, 4, 5], [5, 3, 1, 2, 4], [9, 3, 1.9, 2.1, 1.5])).set_index("event")
    assert list(found.index) == ["unigram", "bigram", "below_bigram"]
    assert found["snapshot"].tolist() == [1, 2, 4] and found["step"].tolist() == [10, 20, 40]
    assert found["label"].tolist() == ["step10", "step20", "step40"] and found["tokens"].tolist() == [70, 140, 280]
    assert found["snapshot_low"].tolist() == [0, 1, 3] and found["snapshot_high"].tolist() == [2, 3, 4]
    assert found["step_low"].tolist() == [0, 10, 30] and found["step_high"].tolist() == [20, 30, 40]
    assert found["at_edge"].tolist() == [False, False, True] and (found["agreement"] == 1).all()
    assert found["after_turning_point"].isna().all()
    never = find_phases(curves([2, 1], [5, 3], [9, 3])).set_index("event").loc["below_bigram"]
    assert pd.isna(never["snapshot"]) and pd.isna(never["step"]) and not never["at_edge"]


def test_intervals_cover_the_truth_and_widen_with_uncertainty() -> None:
    sure = unsure = 0
    for seed in range(40):
        sharp, flat = (
            find_phases(curves([1] * 5, kl2, [3] * 5, noise=0.3, seed=seed)).iloc[1]
            for kl2 in ([5, 3, 1, 2, 4], [5, 1.02, 1, 1.02, 4])
        )
        assert sharp["snapshot_low"] == 1 and sharp["snapshot_high"] == 3 and sharp["agreement"] == 1
        sure += flat["snapshot_low"] <= 2 <= flat["snapshot_high"]
        unsure += flat["snapshot_high"] - flat["snapshot_low"] > 2
    assert sure == 40 and unsure >= 30


def test_bigram_progress_by_hand() -> None:
    found = bigram_progress(np.array([[5, 3, 1, 2, 4], [5, 6, 4, 4.5, 3], [1, 2, 3, 4, 5]], dtype=float))
    assert found.tolist() == [[0, 0.5, 1, 1, 1], [0, 0, 0.5, 0.5, 1], [0, 0, 0, 0, 0]]


def rotating_rows() -> Any:
    """Six features at four snapshots: two rotate at the third, three at the last, one never fires."""
    early, late = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 0, 0])
    rows = torch.stack([early] * 4).repeat(6, 1, 1)
    for i in (0, 1):
        rows[i, 2:] = late
    for i in (2, 3, 4):
        rows[i, 3:] = late
    return of_rows(rows, snapshots_at(0, 10, 20, 30))


def firing_of(rate: Any, S: int) -> Firing:
    rate = torch.as_tensor(rate, dtype=torch.float64)
    return Firing(100, rate, rate, rate[:, None].expand(-1, S), rate[:, None].expand(-1, S))


def test_events_of_features() -> None:
    dynamics = curves([2, 1, 3, 4], [5, 2, 1, 4], [9, 3, 3, 3])
    found = find_phases(dynamics, rotating_rows(), firing_of([0.5] * 5 + [0], 4)).set_index("event")
    assert list(found.index) == [
        "turning_point",
        "statistics_lead",
        "features_lead",
        "unigram",
        "bigram",
        "below_bigram",
        "births",
        "settling",
        "dimensionality",
    ]
    settling = found.loc["settling"]
    assert (settling["snapshot"], settling["n"], settling["snapshot_low"], settling["snapshot_high"]) == (3, 5, 1, 3)
    # three of five rotate last: they set the median unless a draw has three or more of the other two
    assert settling["agreement"] == pytest.approx(
        sum(math.comb(5, j) * 0.4**j * 0.6 ** (5 - j) for j in (0, 1, 2)), abs=0.05
    )
    assert settling["after_turning_point"] == 1 and found.loc["unigram", "after_turning_point"] == 0
    assert found.loc["births", "n"] == 0 and pd.isna(found.loc["births", "snapshot"])
    norms = torch.tensor([[0.1, 0.2, 1, 1], [0.1, 0.2, 0.9, 1], [0.1, 0.1, 0.2, 1], [1, 1, 1, 1]])
    crosscoder = of_norms(norms, snapshots_at(0, 10, 20, 30))
    births = find_phases(dynamics, crosscoder, firing_of([0.5] * 4, 4)).set_index("event").loc["births"]
    found = births[["snapshot", "n", "snapshot_low", "snapshot_high", "step"]]
    assert found.tolist() == [2, 3, 1, 3, 20]
    # of two that are born at snapshots 2 and 3, half are at 2
    two = of_norms(norms[1:], snapshots_at(0, 10, 20, 30))
    births = find_phases(dynamics, two, firing_of([0.5] * 3, 4)).set_index("event").loc["births"]
    assert (births["snapshot"], births["n"]) == (2, 2)


def phases_of(kl2: list[float], rows: Any, rate: Any, **options: Any) -> pd.DataFrame:
    S = len(kl2)
    return find_phases(curves([1] * S, kl2, [3] * S), rows, firing_of(rate, rows.n_snapshots), **options).set_index(
        "event"
    )


def test_the_turning_point_is_where_statistics_lead_most() -> None:
    rate = [0.5] * 5 + [0]
    # P is 0, .75, 1, 1; Q is 0, 0, .4, 1
    found = phases_of([5, 2, 1, 4], rotating_rows(), rate)
    point = found.loc["turning_point"]
    assert (point["snapshot"], point["snapshot_low"], point["snapshot_high"]) == (1, 0, 3)
    assert point["lead"] == pytest.approx(0.75) and point["lead_low"] == pytest.approx(0.75)
    assert 0.75 < point["lead_high"] <= 1 and 0.5 < point["agreement"] < 1 and not point["at_edge"]
    assert point["resolved"] and point["jump"] == pytest.approx(0.75) and point["jump_of"] == "statistics"
    assert (point["jump_from"], point["jump_to"]) == ("step0", "step10")
    same = found.loc["statistics_lead", ["snapshot", "lead", "lead_low", "lead_high", "resolved", "jump"]]
    assert same.tolist() == point[same.index].tolist()
    behind = found.loc["features_lead"]
    assert pd.isna(behind["snapshot"]) and behind["lead"] == 0
    # P is 0, .25, 1, 1
    point = phases_of([5, 4, 1, 4], rotating_rows(), rate).loc["turning_point"]
    assert point["snapshot"] == 2 and point["lead"] == pytest.approx(0.6)
    assert (point["jump_from"], point["jump_to"]) == ("step10", "step20")
    never = phases_of([1, 2, 3, 4], rotating_rows(), rate)
    assert pd.isna(never.loc["turning_point", "snapshot"]) and never.loc["statistics_lead", "lead"] == 0


def test_features_may_lead() -> None:
    # Q is 0, 0, .4, 1; P is 0, .1, .2, 1
    found = phases_of([11, 10, 9, 1], rotating_rows(), [0.5] * 5 + [0])
    assert pd.isna(found.loc["turning_point", "snapshot"]), "the features' lead is the larger one"
    statistics, features = found.loc["statistics_lead"], found.loc["features_lead"]
    assert (statistics["snapshot"], features["snapshot"]) == (1, 2)
    assert statistics["lead"] == pytest.approx(0.1) and features["lead"] == pytest.approx(0.2)
    assert features["lead_low"] <= 0.2 <= features["lead_high"]
    # a curve against itself leads in neither direction
    found = phases_of([5, 5, 3.4, 1], rotating_rows(), [0.5] * 5 + [0])
    assert found.loc[["statistics_lead", "features_lead"], "lead"].tolist() == pytest.approx([0, 0])


def test_phases_that_the_snapshots_cannot_tell_apart() -> None:
    rate = [0.5] * 5 + [0]
    # P is 0, .95, 1, 1: where it rises lies between the first two snapshots
    found = phases_of([20, 1, 0, 4], rotating_rows(), rate)
    for event in ("turning_point", "statistics_lead", "features_lead"):
        row = found.loc[event]
        assert not row["resolved"] and row["jump"] == pytest.approx(0.95) and row["jump_of"] == "statistics"
        assert (row["jump_from"], row["jump_to"]) == ("step0", "step10")
    assert pd.isna(found.loc["turning_point", "snapshot"])
    assert found.loc["statistics_lead", "snapshot"] == 1 and found.loc["statistics_lead", "lead"] == pytest.approx(0.95)
    assert found["after_turning_point"].isna().all()
    assert phases_of([20, 1, 0, 4], rotating_rows(), rate, most=0.96).loc["turning_point", "snapshot"] == 1
    # all features settle in the last interval
    rows = rotating_rows()
    rows.W_dec.data[:2] = rows.W_dec[2]
    row = phases_of([5, 4, 3, 2], rows, rate).loc["turning_point"]
    assert not row["resolved"] and row["jump_of"] == "features"
    assert (row["jump_from"], row["jump_to"]) == ("step20", "step30")
    # all have settled at the first snapshot
    row = phases_of([5, 4, 3, 2], of_rows(torch.ones(6, 4, 4), snapshots_at(0, 10, 20, 30)), rate).loc["turning_point"]
    assert not row["resolved"] and pd.isna(row["jump_from"]) and row["jump_to"] == "step0"
    with pytest.raises(UserError, match=r"most=0 is not in \(0, 1\]"):
        phases_of([5, 4, 3, 2], rows, rate, most=0)


def test_the_crosscoder_may_have_fewer_snapshots() -> None:
    dynamics = curves([2, 1, 3, 4, 5], [5, 1, 2, 4, 5], [9, 3, 3, 3, 3])
    norms = torch.tensor([[0.1, 1, 1], [0.1, 0.1, 1], [0.1, 0.1, 1]])
    crosscoder, firing = of_norms(norms, snapshots_at(0, 20, 40)), firing_of([0.5] * 3, 3)
    crosscoder.cfg.metadata.snapshots[1]["tokens"] = None
    assert find_phases(dynamics, crosscoder, firing).set_index("event").loc["births", "snapshot"] == 4
    table = dynamics_table(dynamics, crosscoder, firing)
    assert table["born"].tolist() == [0, pd.NA, 1, pd.NA, 2] or table["born"].isna().tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert table.loc[[0, 2, 4], "born"].tolist() == [0, 1, 2] and table.loc[[0, 2, 4], "present"].tolist() == [0, 1, 3]
    assert table.loc[[1, 3], "dimensionality"].isna().all()
    for label, step in (("step25", 25), ("step20", 21)):
        crosscoder.cfg.metadata.snapshots[1] |= {"label": label, "step": step}
        with pytest.raises(UserError, match=f"the crosscoder's snapshot '{label}' is not in the dynamics"):
            find_phases(dynamics, crosscoder, firing)


@pytest.mark.parametrize(("F", "S", "D", "seed"), [(30, 4, 5, 0), (7, 2, 3, 1), (50, 6, 8, 2)])
def test_the_table_matches_its_parts(F: int, S: int, D: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    crosscoder = of_norms(torch.rand(F, S, generator=generator), snapshots_at(*range(0, 10 * S, 10)), D=D, seed=seed)
    # rows close to each other, so that some features keep their direction
    crosscoder.W_dec_by_snapshot.data += (
        2 * torch.randn(F, 1, D, generator=generator) * crosscoder.decoder_norms[..., None]
    )
    acts = Held(torch.randn(40, S, D, generator=generator))
    dynamics = curves(*np.random.default_rng(seed).uniform(1, 5, (3, S)))
    firing = measure_firing(crosscoder, acts)
    table = dynamics_table(dynamics, crosscoder, firing, min_cosine=0.8)
    evolution, cosines = evolve(crosscoder, firing), rotation(crosscoder)
    lifecycles = evolution.lifecycles()
    alive = lifecycles["alive"].to_numpy()
    dimensionality = total_dimensionality(crosscoder, firing)
    for s in range(S):
        assert table["present"].iloc[s] == int(evolution.present()[:, s].sum()) == dimensionality["present"].iloc[s]
        emergent = lifecycles[lifecycles["origin"] == "emergent"]
        assert table["born"].iloc[s] == int((emergent["birth"] == s).sum())
        settled = sum(bool(alive[i]) and all(float(cosines[i, t]) >= 0.8 for t in range(s, S)) for i in range(F))
        assert table["settled"].iloc[s] == settled
        assert table["dimensionality"].iloc[s] == pytest.approx(dimensionality["total"].iloc[s] / D)
    assert table["alive"].unique().tolist() == [alive.sum()] and table["settled"].is_monotonic_increasing
    assert list(table)[:4] == ["snapshot", "label", "step", "tokens"]
    assert table["kl1"].to_numpy() == pytest.approx(dynamics.kl1[0])


def test_errors_and_missing_events() -> None:
    dynamics = curves([2, 1, 3, 4], [5, 1, 2, 4], [9, 3, 3, 3])
    with pytest.raises(UserError, match="phases need at least 2 snapshots, but there is only 1"):
        find_phases(curves([1], [1], [1]))
    with pytest.raises(UserError, match="acts=None: activations are needed to find the live features"):
        find_phases(dynamics, rotating_rows())
    with pytest.raises(UserError, match=r"min_cosine=2 is not in \(-1, 1\]"):
        find_phases(dynamics, rotating_rows(), firing_of([0.5] * 6, 4), min_cosine=2)
    dead = find_phases(dynamics, rotating_rows(), firing_of([0.0] * 6, 4)).set_index("event")
    assert pd.isna(dead.loc["settling", "snapshot"]) and dead.loc["settling", "n"] == 0
