"""Births of partners in two crosscoders, beside what they would be by chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from crosslens.evolution.partners import births_of_partners, describe_partners, shares_by_kind


def drawn(seed: int, n: int = 300, S: int = 6) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Pairs of n features, and what is known of both sides."""
    rng = np.random.default_rng(seed)

    def side() -> pd.DataFrame:
        origin = rng.choice(["initial", "emergent", "never", None], n, p=[0.3, 0.4, 0.2, 0.1])
        birth = np.where(origin == "emergent", rng.integers(1, S, n), 0)
        return pd.DataFrame(
            {
                "origin": pd.Series(origin, dtype="string"),
                "birth": pd.array(birth, dtype="Int64"),
                "kind": rng.choice(["lexical", "contextual"], n),
            }
        )

    pairs = pd.DataFrame(
        {
            "feature": pd.array([*rng.permutation(n)[: n - 20], *[None] * 5], dtype="Int64"),
            "partner": pd.array([*rng.permutation(n)[: n - 40], *[None] * 20, *range(5)], dtype="Int64"),
            "correlation": [*rng.random(n - 40), *[np.nan] * 25],
            "null": [*(rng.random(n - 40) * 0.75), *[np.nan] * 25],
            "variance": [*rng.random(n - 20), *[np.nan] * 5],
        }
    )
    return pairs, side(), side()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_births_of_partners_match_plain_loops(seed: int, threshold: float) -> None:
    pairs, first, second = drawn(seed)
    found = births_of_partners(pairs, first, second, threshold).set_index("kind")
    for kind in ("all", "lexical", "contextual"):
        live = shared = chance = 0
        written = partners_write = 0.0
        both: list[tuple[Any, Any]] = []
        for row in pairs.to_dict("records"):
            if pd.isna(row["feature"]) or (kind != "all" and first["kind"][row["feature"]] != kind):
                continue
            live += 1
            written += row["variance"]
            chance += row["null"] >= threshold
            if row["correlation"] >= threshold:
                shared += 1
                partners_write += row["variance"]
                one, other = first.loc[row["feature"]], second.loc[row["partner"]]
                if not pd.isna(one["origin"]) and not pd.isna(other["origin"]):
                    both.append((one, other))
        row = found.loc[kind]
        assert row["live"] == live and row["pairs"] == len(both)
        assert row["shared"] == pytest.approx(shared / live) and row["shared_by_chance"] == pytest.approx(chance / live)
        assert row["shared_variance"] == pytest.approx(partners_write / written)
        born = [pair for pair in both if pair[0]["origin"] == "emergent"]
        assert row["born"] == len(born)
        assert row["born_too"] == pytest.approx(np.mean([other["origin"] == "emergent" for _, other in born]))
        assert row["born_too_by_chance"] == pytest.approx(np.mean([b["origin"] == "emergent" for _, b in both]))
        dates = [(int(a["birth"]), int(b["birth"])) for a, b in born if b["origin"] == "emergent"]
        for name, most in (("same_birth", 0), ("within_1", 1)):
            assert row[name] == pytest.approx(np.mean([abs(a - b) <= most for a, b in dates]))
            chances = [abs(a - b) <= most for a, _ in dates for _, b in dates]
            assert row[f"{name}_by_chance"] == pytest.approx(np.mean(chances))
        if threshold > 0.5:
            continue
        # both sides are drawn by themselves, so nothing but chance is in their dates
        assert abs(row["born_too"] - row["born_too_by_chance"]) < 0.25


def test_equal_dates_are_seen_and_nothing_is_nan_free_where_nothing_is_shared() -> None:
    pairs, first, _ = drawn(7)
    same = pairs[pairs["partner"].notna() & pairs["feature"].notna()].assign(partner=lambda t: t["feature"])
    found = births_of_partners(same, first, first, 0.5).set_index("kind")
    assert (found[["born_too", "same_birth", "within_1"]] == 1).to_numpy().all()
    assert (found["same_birth_by_chance"] < 0.5).all() and (found["born_too_by_chance"] < 0.7).all()
    assert "100%" in describe_partners(found.reset_index())
    nothing = births_of_partners(pairs, first, first, 1.5).set_index("kind")
    assert (nothing["shared"] == 0).all() and nothing[["born_too", "same_birth"]].isna().to_numpy().all()


def test_shares_are_of_live_features_of_the_first() -> None:
    pairs, first, _ = drawn(3)
    found = shares_by_kind(pairs, first["kind"].tolist(), 0.5)
    assert (
        found["live"].tolist()[0]
        == pairs["feature"].notna().sum()
        == found["live"].tolist()[1:][0] + (found["live"].tolist()[2])
    )
