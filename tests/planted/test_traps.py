"""Planted traps: what is drawn, what is true, and how readings are scored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from planted.traps import KINDS, TRAPS, UNBORN, PlantedTraps, Trap, judge_births, score_births

from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.training.config import TrainConfig
from crosslens.training.run import train

SMALL = {"n_each": 2, "d_model": 30}


def test_the_truth_is_that_of_regressions_on_drawn_tokens() -> None:
    traps = PlantedTraps(Trap(**SMALL), 1)
    truth = traps.truth()
    _, values, x = traps.draw(40_000, 5)
    for i in range(0, len(traps.kinds), 3):
        for s in (0, 4, 7):
            design = torch.cat([x[:, s], torch.ones(len(x), 1)], 1).double().numpy()
            f = values[:, i].double().numpy()
            left = f - design @ np.linalg.lstsq(design, f, rcond=None)[0]
            assert truth[i, s] == pytest.approx(1 - left.var() / f.var(), abs=0.03)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in (1, 2))])
def test_kinds_are_what_they_are_called(seed: int) -> None:
    traps = PlantedTraps(Trap(), seed)
    truth, strength = traps.truth(), traps.strength.numpy()
    present = truth >= 0.5 * truth.max(1, keepdims=True)
    here = np.arange(traps.n_snapshots) >= traps.at[:, None]
    for kind in KINDS:
        chosen = traps.kinds == kind
        assert chosen.sum() == traps.trap.n_each
        expected = np.ones_like(here) if kind in UNBORN else here
        if kind == "slow":  # half of what it has grown to by the last snapshot may be reached one or two before
            assert not present[chosen, 0].any() and present[chosen, -1].all()
        else:
            assert (present == expected)[chosen].all(), kind
    hidden, faint = traps.kinds == "hidden", traps.kinds == "faint"
    assert (strength[hidden] == 1).all() and (strength[faint].min(1) < 0.5 * strength[faint].max(1)).all()
    slow = np.diff(truth[traps.kinds == "slow"], axis=1)
    assert (slow > -0.02).all() and slow.max() < 0.3
    assert set(PlantedTraps(Trap(births=False), seed).kinds) == set(UNBORN)


def test_an_untrained_first_snapshot_knows_only_tokens_and_spreads_them_over_all_directions() -> None:
    traps = PlantedTraps(Trap(untrained=True), 3)
    truth = traps.truth()
    assert truth[~traps.lexical, 0].max() < 0.1 and truth[traps.lexical, 0].min() > 0.5
    x = traps.draw(5000, 0)[2].double()
    ratios = []
    for s in (0, 7):
        values = torch.linalg.eigvalsh(torch.cov(x[:, s].T))
        ratios.append(float(values.sum() ** 2 / values.square().sum()))
    assert ratios[0] > 25


def test_snapshots_that_are_mostly_mean() -> None:
    traps = PlantedTraps(Trap(mean_share=0.85), 4)
    x = traps.draw(8000, 0)[2]
    share = x.var(0).sum(1) / x.square().sum(2).mean(0)
    assert share[1::2].tolist() == pytest.approx([0.15] * 4, abs=0.03) and (share[::2] > 0.5).all()


def test_held_out_tokens_values_and_activations_belong_together() -> None:
    traps = PlantedTraps(Trap(**SMALL), 5, n_held_out=9_000)
    tokens, values, x = traps.held_out_tokens(), traps.held_out_values(), torch.cat(list(traps.held_out(777)))
    assert tokens.shape == (450, 20) and len(values) == len(x) == 9000 and traps.keep(tokens).all()
    for i in np.flatnonzero(traps.lexical):
        assert torch.equal(values[:, i] > 0, traps.types[i, tokens.flatten()])
    again = PlantedTraps(Trap(**SMALL), 5, n_tokens=3000)
    assert torch.equal(next(iter(again.batches(1000))), next(iter(traps.batches(1000))))
    assert len(list(again.batches(1000, epochs=2))) == 6


def test_scores_are_counts() -> None:
    judged = pd.DataFrame(
        {
            "birth": [2, 3, 0, 0, 4], "norm": [2, 2, 3, 0, 0], "r2": [2, 3, 1, 0, 4],
            "birth_low": [2, 4, 0, 0, 4], "birth_high": [2, 4, 1, 0, 4],
            "q": [0.01, 0.2, 0.04, 0.9, 0.01],
        }
    )  # fmt: skip
    scores = score_births(judged)
    assert scores == pytest.approx(
        {
            "found": 5, "born": 3, "exact/norm": 1 / 3, "false/norm": 1 / 3, "false_rate/norm": 0.5, "exact/r2": 1.0,
            "false/r2": 0.25, "false_rate/r2": 0.5, "covered": 2 / 3, "false_sure": 1 / 3,
        }
    )  # fmt: skip
    none = score_births(judged.iloc[3:4])
    assert np.isnan(none["exact/r2"]) and none["false/r2"] == none["false_rate/r2"] == 0


def test_refused() -> None:
    for options, message in (
        ({"n_snapshots": 7}, "n_snapshots=7 is too few"),
        ({"d_model": 71}, "d_model=71 is too small for 7 x n_each=8"),
        ({"mean_share": 1.0}, r"mean_share=1.0 is not in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            Trap(**options)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(TRAPS))
def test_births_by_decodability_survive_the_traps(name: str) -> None:
    traps = PlantedTraps(TRAPS[name], 0)
    config = TrainConfig(
        training_tokens=1_000_000, batch_size=512, lr=2e-3, dead_tokens=50_000, device="cpu", evaluate=False
    )
    crosscoder = train(traps, BatchTopKCrosscoderTrainingConfig(d_sae=80, k=4), config)
    # the default of .4 trades some exact dates for fewer births in models without an order
    default = score_births(judge_births(crosscoder, traps))
    assert default["false_sure"] <= 0.05 and (name == "no_births" or default["covered"] >= 0.92)
    assert name == "no_births" or default["exact/r2"] >= 0.85
    scores = score_births(judge_births(crosscoder, traps, presence=0.5))
    unborn = scores["found"] - scores["born"]
    assert scores["found"] >= 30 and scores["false_sure"] <= 0.05
    # with an untrained first snapshot nearly every feature is born after it
    assert (unborn == 0) == np.isnan(scores["false_rate/r2"])
    assert unborn >= 20 or name == "untrained"
    if unborn:
        assert scores["false_rate/r2"] <= (0.02 if name == "no_births" else 0.05)
    if name == "no_births":
        assert scores["born"] == 0 and scores["false_rate/norm"] > 0.02
    else:
        assert scores["born"] >= 20 and scores["covered"] >= 0.92
        assert scores["exact/r2"] >= 0.95 and scores["exact/norm"] < scores["exact/r2"]
