"""Decodability against explicit ridge regressions, one feature and one snapshot at a time."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from crosslens.errors import UserError
from crosslens.evolution import presence
from crosslens.evolution.presence import check_tokens, measure_decodability, plan_decodability
from tests.given import Held, Read, of_norms


def explicit(x: np.ndarray, f: np.ndarray, fitted: np.ndarray, judged: np.ndarray, ridge: float) -> tuple[float, float]:
    """Squared error and squares on `judged` of a ridge regression fitted on `fitted`; x (n, D) and f (n,) are given."""
    D = x.shape[1]
    design = x[fitted]
    penalty = np.sqrt(ridge * (design**2).sum() / D)
    # the penalty as D more observations
    w = np.linalg.lstsq(np.vstack([design, penalty * np.eye(D)]), np.concatenate([f[fitted], np.zeros(D)]), rcond=None)
    return float(((f[judged] - x[judged] @ w[0]) ** 2).sum()), float((f[judged] ** 2).sum())


def groups_of(documents: list[int], G: int) -> list[int]:
    """The group of every token: documents in the order in which they come, each where its middle token falls."""
    n, before, of = len(documents), 0, {}
    for document in dict.fromkeys(documents):
        size = documents.count(document)
        of[document] = int((before + size / 2) * G // n)
        before += size
    numbers = sorted(set(of.values()))
    if len(numbers) < min(G, 8):
        return [i * G // n for i in range(n)]
    return [numbers.index(of[document]) for document in documents]


def slow(
    x: np.ndarray, f: np.ndarray, types: np.ndarray, documents: np.ndarray, ridge: float, G: int
) -> dict[str, Any]:
    """All of `Decodability` for x (n, S, D) and f (n, F), in loops."""
    group = np.array(groups_of(documents.tolist(), G))
    n, S, F, G = len(x), x.shape[1], f.shape[1], group.max() + 1
    error, total = np.full((2, G, F, S), np.nan), np.full((2, G, F), np.nan)
    between = np.full(F, np.nan)
    for i in range(F):
        within = sum(((f[types == t, i] - f[types == t, i].mean()) ** 2).sum() for t in set(types.tolist()))
        everything = ((f[:, i] - f[:, i].mean()) ** 2).sum()
        if everything > 0:
            between[i] = 1 - (within / (n - len(set(types.tolist())))) / (everything / (n - 1))
    for g in range(G):
        own, a = group == g, group % 2 != g % 2
        counts = Counter(types[a].tolist())
        often = np.array([counts[t] > 1 for t in types.tolist()])
        around_x, around_f = x.copy(), f.copy()
        for t in set(types[often].tolist()):
            around_x[types == t] -= x[a & (types == t)].mean(0)
            around_f[types == t] -= f[a & (types == t)].mean(0)
        for i in range(F):
            if f[a, i].any() and f[~a, i].any():
                for s in range(S):
                    centred = x[:, s] - x[a, s].mean(0), f[:, i] - f[a, i].mean()
                    error[0, g, i, s], total[0, g, i] = explicit(*centred, a, own, ridge)
                    inner = around_x[:, s], around_f[:, i]
                    error[1, g, i, s], total[1, g, i] = explicit(*inner, a & often, own & often, ridge)
    r2 = 1 - error.sum(1) / total.sum(1)[..., None]
    return {"r2": r2[0], "within": r2[1], "between": between, "error": error, "total": total}


class OfDocuments(Read):
    """Held-out tokens of given documents, numbers (N, T)."""

    def __init__(self, x: torch.Tensor, tokens: torch.Tensor, documents: torch.Tensor) -> None:
        super().__init__(x, tokens)
        self.documents = documents

    def held_out_documents(self) -> torch.Tensor:
        return self.documents[self.keep(self.read)]


@pytest.mark.parametrize(
    ("N", "T", "S", "D", "F", "G", "ridge", "seed"),
    [
        (64, 6, 3, 4, 7, 4, 1e-3, 0),
        (40, 9, 2, 6, 5, 5, 0.3, 1),
        (3, 200, 2, 3, 6, 3, 1e-2, 2),
        (20, 30, 2, 3, 4, 10, 1e-3, 3),
    ],
)
@pytest.mark.parametrize("length", [0, 20, 170, 400])  # of documents, at most; 0: a sequence each
@pytest.mark.parametrize("gathered", [1e9, -1e9])  # predictions from weights, and from the tokens fitted on
def test_decodability_is_that_of_explicit_regressions(
    N: int,
    T: int,
    S: int,
    D: int,
    F: int,
    G: int,
    ridge: float,
    seed: int,
    length: int,
    gathered: float,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(presence, "_GATHERED", gathered)
    monkeypatch.setattr(presence, "_PREDICTED", 50 * F)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (N, T), generator=draw)
    tokens[-1, -1] = 9  # a type that occurs once
    documents = torch.arange(N)[:, None].expand(N, T)
    if length:  # documents of several sequences, which are read in any order
        documents = (torch.rand(N * T, generator=draw) < 2 / length).cumsum(0).view(N, T)
        documents = documents[torch.randperm(N, generator=draw)]
    # activations depend on the token, on hidden variables, and have a large mean
    x = torch.randn(10, S, D, generator=draw)[tokens] + torch.randn(N, T, S, D, generator=draw) + 5
    crosscoder = of_norms(torch.rand(F, S, generator=draw) + 0.2, D=D, seed=seed)
    # half of the tokens are active, and none so little that rounding decides
    crosscoder.b_enc.data = 0.01 - (x.flatten(0, 1).flatten(1) @ crosscoder.W_enc.data).median(0).values
    crosscoder.b_enc.data[2] = -1e3  # silent
    held = OfDocuments(x, tokens, documents)
    found = measure_decodability(crosscoder, held, ridge=ridge, n_groups=G)
    kept = (tokens != 0).numpy()
    f = crosscoder.encode(held.x).double().numpy()
    assert not f[:, 2].any()
    expected = slow(held.x.double().numpy(), f, tokens.numpy()[kept], documents.numpy()[kept], ridge, G)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=2e-4, atol=2e-5, err_msg=name)
    assert np.isnan(found.r2[2]).all() and np.isnan(found.within[2]).all() and np.isnan(found.between[2])
    assert np.isfinite(np.delete(found.r2, 2, 0)).all()
    assert found.n_tokens == kept.sum() and found.n_active.tolist() == (f > 0).sum(0).tolist()
    assert found.lexical.tolist() == (expected["between"] > 0.5).tolist()


def test_resampling_counts_the_groups_again() -> None:
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 5, (32, 8), generator=draw)
    x = torch.randn(32, 8, 2, 4, generator=draw)
    found = measure_decodability(of_norms(torch.rand(6, 2), D=4), Read(x, tokens), n_groups=4)
    weights = np.array([[1.0, 1, 1, 1], [0, 2, 1, 1]])
    for which, measure in enumerate(("r2", "within")):
        again = found.resample(measure, weights, [1, 3])
        np.testing.assert_allclose(again[0], found.curves(measure)[[1, 3]])
        twice = found.error[which][[1, 1, 2, 3]].sum(0), found.total[which][[1, 1, 2, 3]].sum(0)
        np.testing.assert_allclose(again[1], (1 - twice[0] / twice[1][:, None])[[1, 3]])


def test_what_depends_on_the_token_is_lexical_and_what_does_not_is_contextual() -> None:
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 6, (200, 10), generator=draw)
    context = torch.randn(200, 10, generator=draw)
    # snapshot 0 knows the token only, snapshot 1 the context too
    one_hot = torch.nn.functional.one_hot(tokens, 6).float()
    x = torch.zeros(200, 10, 2, 7)
    x[:, :, 0, :6], x[:, :, 1, :6], x[:, :, 1, 6] = one_hot, one_hot, context
    x += 0.01 * torch.randn(x.shape, generator=draw)
    crosscoder = of_norms(torch.ones(2, 2), D=7)
    crosscoder.W_enc.data.zero_()
    crosscoder.W_enc.data[3, 0] = 1.0  # token 3 at snapshot 0
    crosscoder.W_enc.data[7 + 6, 1] = 1.0  # the context, at snapshot 1 only
    found = measure_decodability(crosscoder, Read(x, tokens))
    assert found.lexical.tolist() == [True, False]
    assert found.between[0] > 0.95 and abs(found.between[1]) < 0.05
    assert (found.r2[0] > 0.95).all() and found.r2[1, 0] < 0.05 and found.r2[1, 1] > 0.5
    assert abs(found.within[1, 0]) < 0.05 and found.within[1, 1] > 0.5


def test_types_that_occur_once_leave_no_within_token_reading() -> None:
    tokens = torch.arange(1, 201).view(50, 4)
    x = torch.randn(50, 4, 2, 3, generator=torch.Generator().manual_seed(6))
    found = measure_decodability(of_norms(torch.ones(4, 2), D=3), Read(x, tokens))
    assert np.isnan(found.within).all() and np.isnan(found.between).all() and np.isfinite(found.r2).all()
    assert not found.lexical.any()


def test_the_plan_counts_what_is_held() -> None:
    held, seconds = plan_decodability(16_384, 8, 512, 50_000)
    assert 2.5 < held / 1e9 < 3.5 and 200 < seconds < 300
    more, longer = plan_decodability(32_768, 8, 512, 100_000)
    assert 1.5 * held < more < 4 * held and longer == 4 * seconds
    # few tokens predict without a weight for every feature and dimension
    few, sooner = plan_decodability(16_384, 8, 512, 4_000)
    assert few < 0.8 * held and sooner < seconds / 50
    papers, _ = plan_decodability(98_304, 32, 768, 20 * 768)
    assert papers - 8 * 98_304 * 32 * 768 < 16 * 2**30


def test_refused() -> None:
    crosscoder, x, tokens = of_norms(torch.ones(4, 2), D=3), torch.randn(9, 6, 2, 3), torch.ones(9, 6, dtype=torch.long)
    for options, message in (
        ({"ridge": 0}, "ridge=0 must be positive"),
        ({"n_groups": 1}, "n_groups=1 must be 2 or more"),
        ({"n_groups": 28}, "54 tokens are held out, decodability needs 56 or more"),
    ):
        with pytest.raises(UserError, match=message):
            measure_decodability(crosscoder, Read(x, tokens), **options)
    with pytest.raises(UserError, match="0 tokens are held out"):
        measure_decodability(crosscoder, Read(x, 0 * tokens))


def test_few_tokens_per_dimension_are_warned_of_and_very_few_refused() -> None:
    """Both say the number to give."""

    def check(D: int) -> None:
        read = Read(torch.randn(9, 6, 2, D), torch.ones(9, 6, dtype=torch.long))
        check_tokens(of_norms(torch.ones(4, 2), D=D), read, n_groups=9)

    with pytest.raises(UserError, match=r"54 tokens .*, 3\.9 per dimension: .* need 4 \(56\).*held_out_tokens=280\)"):
        check(14)
    for D, message in ((13, r"54 tokens .*, 4\.2 per dimension: .*held_out_tokens=260\)"), (3, r"18\.0 per dimension")):
        with pytest.warns(UserWarning, match=message):
            check(D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(2)


def test_constant_activations_predict_nothing() -> None:
    tokens = torch.randint(1, 4, (64, 4), generator=torch.Generator().manual_seed(7))
    x = torch.randn(64, 4, 2, 3, generator=torch.Generator().manual_seed(8))
    x[:, :, 0] = 2.0
    found = measure_decodability(of_norms(torch.ones(4, 2), D=3), Read(x, tokens))
    live = found.r2[~np.isnan(found.r2[:, 0])]
    assert len(live) > 1 and abs(live[:, 0]).max() < 1e-5 and (live[:, 1] > 0.2).any()


def test_the_batches_of_the_stream_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(9)
    tokens = torch.randint(1, 5, (40, 7), generator=draw)
    x = torch.randn(40, 7, 3, 4, generator=draw)
    crosscoder = of_norms(torch.rand(5, 3, generator=draw), D=4)
    found = measure_decodability(crosscoder, Read(x, tokens), n_groups=3)
    monkeypatch.setattr(Held, "held_out", lambda self, *_: iter(self.x.split(101)))
    again = measure_decodability(crosscoder, Read(x, tokens), n_groups=3)
    np.testing.assert_allclose(again.error, found.error, rtol=1e-5)
    np.testing.assert_allclose(again.r2, found.r2, atol=1e-6)
