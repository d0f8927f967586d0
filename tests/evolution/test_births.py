"""Births with their uncertainty: every definition in plain loops, and calibration where the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student

from crosslens.errors import UserError
from crosslens.evolution.births import count_births, date_births, describe_reversed, presence_curves
from crosslens.evolution.lifecycles import classify_lifecycles
from crosslens.evolution.presence import Decodability
from crosslens.stats import q_values, resample_counts


def made(r2: np.ndarray, *, n: int = 40, G: int = 32, noise: float = 0.3, seed: int = 0) -> Decodability:
    """Decodability of given expected R2 (F, S): G groups of n tokens, whose squares and errors vary."""
    rng = np.random.default_rng(seed)
    F, S = r2.shape
    total = n * rng.gamma(1 / noise**2, noise**2, (G, F))
    error = total[..., None] * np.clip(1 - r2 + noise * (1 - r2) * rng.standard_normal((G, F, S)), 0, None)
    found = 1 - error.sum(0) / total.sum(0)[:, None]
    between = np.where(np.arange(F) % 2, 0.9, 0.1)
    return Decodability(
        found, found.copy(), between, np.full(F, 100), n * G, np.stack([error, error]), np.stack([total, total])
    )


def slow_birth(curve: np.ndarray, presence: float, min_run: int) -> int:
    """Birth of one feature, S if there is none."""
    birth = classify_lifecycles(torch.tensor(curve)[None], presence, min_run=min_run)["birth"][0]
    return len(curve) if pd.isna(birth) else int(birth)


@pytest.mark.parametrize(("S", "presence", "min_run", "seed"), [(5, 0.5, 2, 0), (3, 0.8, 1, 1), (7, 0.3, 3, 2)])
def test_dates_are_those_of_loops(S: int, presence: float, min_run: int, seed: int) -> None:
    F, G, n = 9, 6, 30
    found = made(np.random.default_rng(seed).random((F, S)), G=G, seed=seed)
    features = np.arange(F) != 4
    table = date_births(found, "r2", features, presence=presence, min_run=min_run, n_bootstrap=n, seed=seed)
    ends = [norm.cdf(sign * np.sqrt(G / (G - 1)) * student.ppf(0.975, G - 1)) for sign in (-1, 1)]
    draws = np.random.default_rng(seed).multinomial(G, np.full(G, 1 / G), size=n)
    for i in range(F):
        if i == 4:
            assert table.loc[i].isna().all()
            continue
        row = table.loc[i]
        assert row["effect"] == pytest.approx(found.r2[i].clip(0).max() - max(found.r2[i, 0], 0))
        again: list[Any] = []
        for draw in draws:
            error = sum(k * found.error[0, g, i] for g, k in enumerate(draw))
            total = sum(k * found.total[0, g, i] for g, k in enumerate(draw))
            curve = (1 - error / total).clip(0)
            again.append((slow_birth(curve, presence, min_run), curve.max() - curve[0]))
        births, effects = np.array(again).T
        assert row["birth_low"] == np.quantile(births, ends[0], method="inverted_cdf")
        assert row["birth_high"] == np.quantile(births, ends[1], method="inverted_cdf")
        assert [row["effect_low"], row["effect_high"]] == pytest.approx(np.quantile(effects, ends))
        margins = []
        for g in range(G):
            rest = [h for h in range(G) if h != g]
            curve = 1 - found.error[0, rest, i].sum(0) / found.total[0, rest, i].sum()
            margins.append(presence * curve.max() - curve[0])
        error = np.sqrt((G - 1) / G * ((np.array(margins) - np.mean(margins)) ** 2).sum())
        margin = presence * found.r2[i].max() - found.r2[i, 0].clip(0)
        assert row["p"] == pytest.approx(student.sf(margin / error, G - 1))
    np.testing.assert_array_equal(table["q"], q_values(table["p"].to_numpy()))


@pytest.mark.exhaustive
def test_intervals_cover_and_q_values_hold_what_they_promise() -> None:
    rng = np.random.default_rng(3)
    F, S = 2000, 6
    # slow births, whose dates are unsure; and features that are just not born
    rise = np.clip((np.arange(S) - rng.uniform(0.5, 3, (F, 1))) / 3 + 0.5, 0.02, 1)
    flat = rng.uniform(0.5, 1, (F, 1)) + np.zeros(S)
    flat[:, 1:] = 1
    truth = np.concatenate([rise, flat]) * rng.uniform(0.3, 0.9, (2 * F, 1))
    found = made(truth, seed=4)
    table = date_births(found, "r2", np.ones(2 * F, dtype=bool), n_bootstrap=300)
    birth = np.array([slow_birth(curve, 0.5, 2) for curve in truth[:F]])
    low, high = (table[f"birth_{end}"][:F].to_numpy(dtype=int) for end in ("low", "high"))
    assert ((low <= birth) & (birth <= high)).mean() >= 0.95
    unsure = low < high  # where it is a matter of the interval
    assert unsure.sum() > 200 and ((low <= birth) & (birth <= high))[unsure].mean() >= 0.95
    sure = (table["q"] <= 0.05).to_numpy()
    assert sure[:F].mean() > 0.5 and sure[F:].sum() <= 0.05 * sure.sum()


def test_counts_forward_and_reversed() -> None:
    r2 = np.array(
        [[0, 0, 0.8, 0.8], [0.8, 0.8, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.01, 0.02, 0.02, 0.04], [0, 0.6, 0.6, 0.6]]
    )
    found = made(r2, noise=0.05)
    norms = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    alive = np.array([True, True, True, True, True])
    curves = presence_curves(norms, found, alive)
    assert not curves["r2"][3].any(), "nothing predicts this feature"
    assert curves["within"][1].any(), "a lexical feature with a tenth of its variance within token types"
    found.between[1] = 0.96
    assert not presence_curves(norms, found, alive)["within"][1].any(), "and one with a twenty-fifth"
    found.between[1] = 0.9
    table = count_births(curves, found.lexical, found, thresholds=(0.3, 0.5)).set_index(
        ["measure", "kind", "threshold"]
    )
    columns = ["n", "born", "born_reversed", "sure", "sure_reversed"]
    assert table.loc[("r2", "all", 0.5), columns].tolist() == [4, 2, 1, 2, 1]
    assert table.loc[("r2", "contextual", 0.5), columns].tolist() == [3, 2, 0, 2, 0]
    assert table.loc[("r2", "lexical", 0.3), columns].tolist() == [1, 0, 1, 0, 1]
    assert table.loc[("within", "contextual", 0.5), columns].tolist() == [3, 2, 0, 2, 0]
    assert table.loc[("within", "lexical", 0.5), columns].tolist() == [1, 0, 1, 0, 1]
    assert table.loc[("norm", "all", 0.5), columns].tolist()[:3] == [4, 2, 1]
    assert table.loc["norm"][["sure", "sure_reversed"]].isna().all(axis=None)
    assert set(table.loc["within"].index.get_level_values("kind")) == {"all", "lexical", "contextual"}
    alone = count_births({"norm": curves["norm"]})
    assert alone["kind"].unique().tolist() == ["all"] and alone["threshold"].tolist() == [0.3, 0.4, 0.5, 0.7]
    dead = presence_curves(norms, found, np.zeros(5, dtype=bool))
    assert (count_births(dead, found.lexical, found)[["n", "born"]] == 0).all(axis=None)
    assert date_births(found, "r2", np.zeros(5, dtype=bool)).isna().all(axis=None)


def test_refused() -> None:
    found = made(np.random.default_rng(0).random((4, 3)))
    everything = np.ones(4, dtype=bool)
    for arguments, options, message in (
        (("norm", everything), {}, "measure='norm' is unknown: use 'r2' or 'within'"),
        (("r2", everything), {"presence": 0.0}, r"presence=0.0 is not in \(0, 1\]"),
        (("r2", everything), {"min_run": 0}, "min_run=0 must be 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            date_births(found, *arguments, **options)
    with pytest.raises(UserError, match="dating births needs at least 2 snapshots"):
        date_births(made(np.ones((4, 1)) / 2), "r2", everything)
    with pytest.raises(UserError, match="counting births needs at least 2 snapshots"):
        count_births({"norm": np.ones((4, 1))})
    with pytest.raises(UserError, match="presence=2 is not in"):
        count_births({"norm": np.ones((4, 2))}, thresholds=(2,))


def test_births_with_as_many_reversed_are_named():
    rows = [
        ("r2", "all", 0.5, 388, 90),
        ("r2", "contextual", 0.3, 63, 84),
        ("r2", "contextual", 0.5, 66, 87),
        ("r2", "lexical", 0.5, 4, 5),
        ("within", "contextual", 0.5, 20, 6),
        ("norm", "all", 0.5, 30, 300),
    ]
    counts = pd.DataFrame(rows, columns=["measure", "kind", "threshold", "born", "born_reversed"])
    rest = (
        "with the snapshots reversed: features fade, too, or it is noise; a null of untrained or exchangeable models "
        "tells which"
    )
    assert describe_reversed(counts, 0.5) == [
        f"by R2, 66 contextual features are born forward and 87 {rest}",
        f"by within-token R2, 20 contextual features are born forward and 6 {rest}",
    ]
    assert describe_reversed(counts, 0.3) == [f"by R2, 63 contextual features are born forward and 84 {rest}"]
    assert describe_reversed(counts) == []  # at the default, of which there are none


def planted_curves(first: np.ndarray, seed: int, S: int = 4, G: int = 32, noise: float = 0.1) -> Decodability:
    """R2 of features that rise from a share of .8 to .8 itself, with errors that vary between groups."""
    rng = np.random.default_rng(seed)
    F = len(first)
    r2 = np.repeat(0.8 * np.ones((F, 1)), S, 1)
    r2[:, 0] *= first
    total = np.ones((2, G, F)) * 50
    error = total[..., None] * (1 - r2 + noise * rng.standard_normal((2, G, F, S)))
    found = 1 - error.sum(1) / total.sum(1)[..., None]
    return Decodability(found[0], found[1], np.zeros(F), np.full(F, 50), 1600, error, total)


def test_births_of_a_common_trend_do_not_exceed_it():
    """All rise alike: many are born, and none stands out; one that starts lower than the others does."""
    first = np.full(60, 0.4)
    curves = lambda found: {"r2": found.r2.clip(0)}  # noqa: E731
    exceeding: list[int] = []
    for seed in range(10):
        common = planted_curves(first, seed)
        row = count_births(curves(common), np.zeros(60, bool), common, thresholds=(0.5,)).query("kind == 'all'").iloc[0]
        assert row["born"] > 50 and row["sure"] > 40
        exceeding.append(row["beyond_trend"])
    assert np.mean(exceeding) <= 0.05 * 60
    first[:10] = 0.05
    found = planted_curves(first, 1)
    assert count_births(curves(found), None, found, thresholds=(0.5,))["beyond_trend"].tolist() == [
        pytest.approx(10, abs=2)
    ]


def test_a_kind_is_counted_as_if_it_were_all_there_is():
    """Both kinds rise alike, but one from less: within its own kind no feature exceeds the trend."""
    lexical = np.arange(48) % 2 == 0
    found = planted_curves(np.where(lexical, 0.2, 0.45), 3)
    rows = count_births({"r2": found.r2.clip(0)}, lexical, found, thresholds=(0.5,)).set_index("kind")
    for kind, members in (("lexical", lexical), ("contextual", ~lexical)):
        alone = Decodability(
            *(each[members] for each in (found.r2, found.within, found.between, found.n_active)),
            *(found.n_tokens, found.error[:, :, members], found.total[:, :, members]),
        )
        expected = count_births({"r2": alone.r2.clip(0)}, None, alone, thresholds=(0.5,)).iloc[0]
        for name in ("n", "born", "born_low", "born_high", "born_reversed", "beyond_trend", "beyond_trend_high"):
            assert rows.loc[kind, name] == expected[name], (kind, name)
    assert rows["beyond_trend"]["lexical"] < 12 < rows["beyond_trend"]["all"]


@pytest.mark.parametrize(("noise", "S"), [(0.03, 4), (0.03, 9), (0.1, 4), (0.1, 9)])
def test_intervals_of_counts_cover_the_count_without_noise(noise: float, S: int):
    """Of the features, two thirds start at .2 to .8 of their largest; the standard error of R2 is .005 or .02.

    What a test finds has no count without noise: its intervals cover the mean over data.
    """
    rng = np.random.default_rng(0)
    first = np.concatenate([np.full(30, 0.1), rng.uniform(0.2, 0.8, 60)])
    rows: list[dict[str, float]] = []
    for seed in range(60):
        found = planted_curves(first, seed, S=S, noise=noise)
        rows.append(count_births({"r2": found.r2.clip(0)}, None, found, thresholds=(0.5,)).iloc[0].to_dict())
    table = pd.DataFrame(rows)
    for name in ("born", "sure", "beyond_trend"):
        low, high, count = table[f"{name}_low"], table[f"{name}_high"], table[name].astype(float)
        assert ((low <= count) & (count <= high)).all() and high.max() <= 90 and low.min() >= 0
        truth = (first < 0.5).sum() if name == "born" else count.mean()
        assert ((low <= truth) & (truth <= high)).mean() >= 0.88, name
    assert (table["sure"] <= table["born"]).all() and table["sure"].mean() > 20 and table["beyond_trend"].mean() > 20


def test_counts_of_a_history_read_backwards_are_those_of_the_reversed_one():
    """Also their intervals; and drawn counts are those of a slow count of drawn curves."""
    rng = np.random.default_rng(5)
    first = np.concatenate([np.full(5, 0.1), rng.uniform(0.2, 0.8, 11)])
    found = planted_curves(first, 2, noise=0.1)
    turned = Decodability(
        *(found.r2[:, ::-1], found.within[:, ::-1], found.between, found.n_active, found.n_tokens),
        *(found.error[..., ::-1], found.total),
    )
    forward = count_births({"r2": found.r2.clip(0)}, None, found, thresholds=(0.5,)).iloc[0]
    backward = count_births({"r2": turned.r2.clip(0)}, None, turned, thresholds=(0.5,)).iloc[0]
    for name in ("born", "sure"):
        for end in ("", "_low", "_high"):
            assert forward[f"{name}{end}"] == backward[f"{name}_reversed{end}"]
            assert backward[f"{name}{end}"] == forward[f"{name}_reversed{end}"]
    G, max_q = found.error.shape[1], 0.05
    margin = lambda curve: 0.5 * max(curve) - curve[0]  # noqa: E731
    without = found.resample("r2", 1.0 - np.eye(G), np.arange(16))
    errors = [np.sqrt((G - 1) * np.var([margin(without[g, i]) for g in range(G)])) for i in range(16)]
    t = np.array([margin(curve) / error for curve, error in zip(found.r2, errors, strict=True)])
    least = t[q_values(student.sf(t, G - 1)) <= max_q].min()
    drawn = found.resample("r2", resample_counts(G, 200, 0).astype(float), np.arange(16)).clip(0)
    counts = [
        sum(slow_birth(c, 0.5, 2) not in (0, 4) and margin(c) / e >= least for c, e in zip(curves, errors, strict=True))
        for curves in drawn
    ]
    size = student.ppf(0.975, G - 1) * np.sqrt(G / (G - 1)) * np.std(counts, ddof=1)
    ends = forward["sure"], 2 * forward["sure"] - np.mean(counts)
    assert forward["sure_low"] == pytest.approx(min(ends) - size) and forward["sure_high"] == pytest.approx(
        max(ends) + size
    )
