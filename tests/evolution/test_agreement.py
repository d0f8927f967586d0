"""Agreement of top tokens: a loop over tokens, and cases with known answers."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

import crosslens.evolution.agreement
from crosslens.errors import UserError
from crosslens.evolution.agreement import top_agreement
from tests.given import Held, of_norms, snapshots_at


@pytest.fixture(params=[1 << 23, 3 * 40])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosslens.evolution.agreement, "_ENTRIES", request.param)


def made(F: int, S: int, D: int, seed: int) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    crosscoder = of_norms(0.1 + torch.rand(F, S, generator=generator), snapshots_at(*range(S)), D=D, seed=seed)
    crosscoder.activation_scale.copy_(torch.rand(S, generator=generator) + 0.5)
    crosscoder.b_dec.data = torch.randn(S * D, generator=generator)
    crosscoder.b_enc.data = 0.5 * torch.randn(F, generator=generator)
    # neighbouring snapshots are similar, so that agreement is neither 0 nor 1
    x = torch.randn(37, 1, D, generator=generator) + 0.7 * torch.randn(37, S, D, generator=generator)
    crosscoder.W_dec_by_snapshot.data.mul_(0.3).add_(torch.randn(F, 1, D, generator=generator))
    crosscoder.W_enc.data = crosscoder.W_dec.data.T.clone()
    return crosscoder, x


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("by", ["filter", "projection", "encoder"])
@pytest.mark.parametrize(("F", "S", "D", "n_top", "seed"), [(7, 3, 4, 5, 0), (4, 5, 6, 1, 1), (9, 2, 3, 12, 2)])
def test_agreement_matches_plain_loops(by: str, F: int, S: int, D: int, n_top: int, seed: int) -> None:
    crosscoder, x = made(F, S, D, seed)
    table = top_agreement(crosscoder, Held(x), n_top=n_top, by=by)
    active = (crosscoder.encode(x) > 0).tolist()
    alive = [i for i in range(F) if any(row[i] for row in active)]
    assert table["feature"].tolist() == [i for i in alive for _ in range(S - 1)]
    rows = iter(table.itertuples(index=False))
    for i in alive:
        tops: list[list[int]] = []
        for s in range(S):
            row = crosscoder.W_dec.data.view(F, S, D)[i, s].double()
            scaled = x[:, s].double() * float(crosscoder.activation_scale[s])
            mean = sum(scaled) / len(x)
            covariance = sum(torch.outer(token - mean, token - mean) for token in scaled) / len(x)
            strength: list[float] = []
            for token in scaled:
                if by == "filter":
                    ridge = 1e-3 * covariance.trace() / D * torch.eye(D).double()
                    strength.append(float((token - mean) @ torch.linalg.solve(covariance + ridge, row)))
                elif by == "projection":
                    strength.append(float((token - mean) @ row) / float(row.norm()))
                else:
                    strength.append(float(token @ crosscoder.W_enc.data.view(S, D, F)[s, :, i].double()))
            tops.append(sorted(range(len(x)), key=lambda b: -strength[b])[:n_top])
        for s in range(S - 1):
            found = next(rows)
            assert (found.feature, found.snapshot, found.other) == (i, s, s + 1)
            assert found.agreement == pytest.approx(len(set(tops[s]) & set(tops[s + 1])) / n_top)
            assert found.active == pytest.approx(sum(active[b][i] for b in tops[s]) / n_top)
            assert found.other_active == pytest.approx(sum(active[b][i] for b in tops[s + 1]) / n_top)
            assert found.chance == pytest.approx(n_top / len(x))
            sizes = crosscoder.decoder_norms[i] / crosscoder.decoder_norms[i].max()
            assert found.norm == pytest.approx(float(min(sizes[s], sizes[s + 1])))
            assert (found.label, found.other_label, found.step, found.other_step) == (
                f"step{s}",
                f"step{s + 1}",
                s,
                s + 1,
            )


def test_wide_models_with_several_threads() -> None:
    # PyTorch's batched inverse raised an error or hung here
    crosscoder, x = made(5, 3, 192, 0)
    alone = top_agreement(crosscoder, Held(x), n_top=5)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        several = top_agreement(crosscoder, Held(x), n_top=5)
    finally:
        torch.set_num_threads(before)
    pd.testing.assert_frame_equal(alone, several)


def test_snapshots_agree_if_a_direction_responds_to_the_same_tokens() -> None:
    """One direction with the same content at the first two snapshots and other content at the third."""
    generator = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(60, 3, 4, generator=generator)
    x[:10, :2, 0] += 5 + torch.rand(10, 1, generator=generator)
    x[30:40, 2, 0] += 5
    crosscoder = of_norms(torch.ones(1, 3), snapshots_at(0, 1, 2))
    crosscoder.W_dec.data = torch.tensor([[1.0, 0, 0, 0] * 3])
    crosscoder.W_enc.data = torch.tensor([[1.0, 0, 0, 0] * 2 + [0.0] * 4]).T.clone()
    table = top_agreement(crosscoder, Held(x), n_top=10)
    assert table["agreement"].tolist() == [1, 0] and table["active"].iloc[0] == 1
    assert table["other_active"].iloc[1] < 1


def test_the_filter_separates_a_feature_from_a_stronger_one() -> None:
    """Two directions at 45 degrees: the projection confuses a weak feature with a strong one."""
    generator = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(400, 2, 4, generator=generator)
    on, loud = torch.rand(2, 400, generator=generator) < torch.tensor([[0.1], [0.5]])
    rows = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0]])
    loudness = 9 * loud * (1 + torch.rand(400, generator=generator))
    x += (on[:, None] * rows[0] + loudness[:, None] * rows[1])[:, None]
    crosscoder = of_norms(torch.ones(1, 2), snapshots_at(0, 1))
    crosscoder.W_dec.data = rows[:1].repeat(1, 2)
    crosscoder.W_enc.data = torch.tensor([[1.0, -1, 0, 0] * 2]).T.clone()
    crosscoder.b_enc.data.fill_(-1)
    found = {by: float(top_agreement(crosscoder, Held(x), by=by)["active"].iloc[0]) for by in ("filter", "projection")}
    assert found["filter"] == 1 and found["projection"] < 0.5


def test_ties_are_broken_consistently() -> None:
    x = torch.ones(40, 2, 3)
    crosscoder = of_norms(torch.ones(2, 2), snapshots_at(0, 1), D=3)
    assert (top_agreement(crosscoder, Held(x), torch.tensor([0, 1]), n_top=7)["agreement"] == 1).all()


def test_rows_without_a_direction_and_features_that_never_fire() -> None:
    crosscoder, x = made(3, 2, 4, 0)
    crosscoder.W_dec_by_snapshot.data[0, 0] *= 1e-3
    crosscoder.b_enc.data[1] = -100
    assert top_agreement(crosscoder, Held(x), n_top=3)["feature"].tolist() == [0, 2]
    table = top_agreement(crosscoder, Held(x), torch.tensor([1, 0]), n_top=3)
    assert table["feature"].tolist() == [1, 0] and table["agreement"].isna().tolist() == [False, True]
    assert table["active"].iloc[0] == 0
    assert not top_agreement(crosscoder, Held(x), n_top=3, by="encoder")["agreement"].isna().any()


def test_errors() -> None:
    crosscoder, x = made(3, 2, 4, 0)
    for options, message in (
        ({"by": "norm"}, "by='norm' is unknown: use 'filter', 'projection', 'encoder'"),
        ({"ridge": 0.0}, "ridge=0.0 must be above 0"),
        ({"n_top": 0}, "n_top=0 must be at least 1"),
        ({"n_top": 38}, "n_top=38 is more than the 37 held-out tokens: ask for at most 18"),
    ):
        with pytest.raises(UserError, match=message):
            top_agreement(crosscoder, Held(x), **options)
    with pytest.raises(UserError, match="agreement needs at least 2 snapshots, this crosscoder has 1"):
        top_agreement(made(3, 1, 4, 0)[0], Held(x[:, :1]))
