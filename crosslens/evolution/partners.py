"""Partners in another crosscoder: how many features have one, are they born there too, and at the same snapshot?

Features of two crosscoders are paired by `seeds.match`. Births are by R2, read in each crosscoder by itself, and every
share stands beside what it would be by chance:

1. *Shared*: features with a partner of correlation `threshold` or more. By chance: with the tokens of the other
   crosscoder permuted; and with a crosscoder over *unrelated* models that read the same text, which shares with any
   other what the text alone decides.
2. *Born too*: of the partners of features that are born after the first snapshot, the share that is. By chance: of all
   partners.
3. *Same birth* and *within one snapshot*: of the pairs that are both born. By chance: with the dates of the partners
   permuted.

All by kind of feature, lexical and contextual. The definitions are new here. Symbols: F features, S snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.evolution.births import presence_curves
from crosslens.evolution.lifecycles import PRESENCE, classify_lifecycles
from crosslens.evolution.presence import measure_decodability

KINDS = ("all", "lexical", "contextual")


def date_features(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    by: str = "r2",
    at: Sequence[int] | None = None,
    presence: float = PRESENCE,
    min_run: int = 2,
) -> pd.DataFrame:
    """Origin, fate and birth of every feature, and its kind.

    Args:
        crosscoder: any of two snapshots or more.
        acts: activations of its snapshots.
        by: "r2", or "norm" for the decoder norm.
        at: the snapshots to look at, all if None.
        presence: a feature is present where it has at least this share of its largest value.
        min_run: snapshots in a row that it must be present for to count as born.

    Returns:
        The columns of `classify_lifecycles`, counted in snapshots of `at`, and by R2 kind. Origin, fate and birth are
        missing for features without a reading.

    Raises:
        UserError: too few held-out tokens, or as `classify_lifecycles`.
    """
    if by == "norm":
        curves, kinds = crosscoder.decoder_norms.detach().cpu(), None
    else:
        found = measure_decodability(crosscoder, acts)
        curves = torch.from_numpy(presence_curves(crosscoder.decoder_norms, found, found.n_active > 0)["r2"])
        kinds = np.where(found.lexical, "lexical", "contextual")
    table = classify_lifecycles(curves if at is None else curves[:, list(at)], presence, min_run=min_run)
    return table if kinds is None else table.assign(kind=kinds)


def shares_by_kind(pairs: pd.DataFrame, kinds: Sequence[str], threshold: float = 0.7) -> pd.DataFrame:
    """How many live features of each kind have a partner.

    Args:
        pairs: the result of `match`.
        kinds: kind of every feature of the first crosscoder (F,).
        threshold: correlation from which two features are partners.

    Returns:
        A row per kind, all first: kind, live (features of the first crosscoder), shared, shared_by_chance (with
        permuted tokens), shared_variance (share of their variance that features with a partner write).
    """
    live = pd.DataFrame(pairs[pairs["feature"].notna()])
    rows: list[dict[str, Any]] = []
    for kind, here in _by_kind(live, kinds):
        partner = here["correlation"] >= threshold
        variance = here["variance"].sum()
        rows.append(
            {
                "kind": kind,
                "live": len(here),
                "shared": _mean(partner),
                "shared_by_chance": _mean(here["null"] >= threshold),
                "shared_variance": here.loc[partner, "variance"].sum() / variance if variance else np.nan,
            }
        )
    return pd.DataFrame(rows)


def births_of_partners(
    pairs: pd.DataFrame, first: pd.DataFrame, second: pd.DataFrame, threshold: float = 0.7
) -> pd.DataFrame:
    """Compare the births of partners in two crosscoders.

    Args:
        pairs: the result of `match`.
        first: `date_features` of the first crosscoder.
        second: the same of the second, over the same snapshots.
        threshold: correlation from which two features are partners.

    Returns:
        A row per kind of the first's features: the columns of `shares_by_kind`; pairs (partners that both have a
        reading), born (of them, features born in the first), born_too and born_too_by_chance, same_birth and
        same_birth_by_chance, within_1 and within_1_by_chance. NaN where there is nothing to count.
    """
    kept = pd.DataFrame(pairs[pairs["correlation"] >= threshold])
    ends = [
        table.iloc[kept[name].to_numpy(dtype=int)].reset_index(drop=True)
        for table, name in ((first, "feature"), (second, "partner"))
    ]
    known = ends[0]["origin"].notna() & ends[1]["origin"].notna()
    one, other = (pd.DataFrame(table[known]) for table in ends)
    rows: list[dict[str, Any]] = []
    for kind in KINDS:
        use = np.ones(len(one), dtype=bool) if kind == "all" else (one["kind"] == kind).to_numpy()
        born = [(table["origin"] == "emergent").to_numpy()[use] for table in (one, other)]
        both = born[0] & born[1]
        dates = [table["birth"].to_numpy(dtype=float, na_value=np.nan)[use][both] for table in (one, other)]
        apart = np.abs(np.subtract(*dates))
        by_chance = np.abs(np.subtract.outer(*dates))
        rows.append(
            {
                "kind": kind,
                "pairs": int(use.sum()),
                "born": int(born[0].sum()),
                "born_too": _mean(born[1][born[0]]),
                "born_too_by_chance": _mean(born[1]),
                "same_birth": _mean(apart == 0),
                "same_birth_by_chance": _mean(by_chance == 0),
                "within_1": _mean(apart <= 1),
                "within_1_by_chance": _mean(by_chance <= 1),
            }
        )
    return shares_by_kind(pairs, first["kind"].tolist(), threshold).merge(pd.DataFrame(rows), on="kind")


def describe_partners(births: pd.DataFrame) -> str:
    """What partners in other seeds have in common, in one line.

    Args:
        births: rows of `births_of_partners` about any number of pairs of crosscoders.
    """
    means = pd.DataFrame(births.groupby("kind").mean(numeric_only=True))
    kinds = ", ".join(f"{means['shared'][kind]:.0%} of {kind} features" for kind in KINDS[1:] if kind in means.index)
    row = means.loc["all"]
    return (
        f"a partner in another seed have {kinds}; of features with one that are born {row['born_too']:.0%} are born "
        f"there too (by chance {row['born_too_by_chance']:.0%}), and {row['same_birth']:.0%} of these at the same "
        f"snapshot (by chance {row['same_birth_by_chance']:.0%})"
    )


def _by_kind(table: pd.DataFrame, kinds: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """The rows about features of each kind, all first."""
    of = np.asarray(kinds)[table["feature"].to_numpy(dtype=int)]
    return [(kind, table if kind == "all" else pd.DataFrame(table[of == kind])) for kind in KINDS]


def _mean(values: Any) -> float:
    return float(np.mean(values)) if np.size(values) else float("nan")
