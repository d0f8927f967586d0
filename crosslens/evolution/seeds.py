"""Seeds as an axis: which features do crosscoders of several seeds share, and do their lifecycles agree?

1. The features of two crosscoders are encoded on the same held-out tokens. A feature is *live* if its activation varies
   there (and its firing rate exceeds `min_rate`).
2. `match` pairs live features one to one so that the sum of the correlations of their activations is largest. The
   cosine of the decoders stands beside it: by cosine two seeds of one demo share a twentieth of their features, by
   activation half, because a feature that fires on the same tokens can be written with other features' help.
3. Features weigh by the variance they write, `Var(f_i) sum_s n_is^2`, as a share of that of all live features.
4. `rotation_of_partners` asks of rotation whether the same feature turns by as much in the other seed, and how far
   apart the two directions are at one snapshot.
5. The *null* is the same matching with the tokens of the second crosscoder permuted.
6. A feature's `n_seeds` is the number of crosscoders, its own included, in which its partner has a correlation of at
   least `threshold`. It is a *consensus* feature if these are more than half of all.

Correlations need tokens: a feature that fires on a handful has a partner by luck or not at all. Rows are reported with
their firing rate. Above 4,096 features, pairs are each other's nearest neighbours instead of the best assignment.
The definitions are new here; matching by decoder cosine, `by="decoder"`, is that of earlier work.

Symbols: N tokens, S snapshots, D d_model, F and G features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_matrix, csr_matrix, vstack
from torch.nn.functional import normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.firing import Firing
from crosslens.evolution.geometry import rotation_per_interval
from crosslens.evolution.held_out import batch_tokens, check_activations
from crosslens.evolution.history import evolve
from crosslens.evolution.lifecycles import PRESENCE, relative_norms
from crosslens.evolution.partners import births_of_partners, date_features, describe_partners
from crosslens.stats import rank_correlation

_BLOCK = 1024  # features at a time
ASSIGNED = 4096  # most features for which `match` defaults to the best assignment


def match(
    a: Crosscoder,
    b: Crosscoder,
    acts: Activations,
    *,
    acts_b: Activations | None = None,
    by: str = "activation",
    min_rate: float = 0.0,
    method: str | None = None,
    max_tokens: int = 262_144,
    seed: int = 0,
) -> pd.DataFrame:
    """Pair the live features of two crosscoders one to one.

    Args:
        a: a crosscoder.
        b: another one, of another seed or size.
        acts: activations of the snapshots of `a`; the held-out ones are used.
        acts_b: activations of the same tokens in the snapshots of `b`, if they are other snapshots.
        by: what is matched: "activation", the correlation of activations, or "decoder", the cosine of the decoders over
            the snapshots that both have.
        min_rate: features that fire on this share of the held-out tokens or less are left out.
        method: "assignment", the pairs with the largest sum; "mutual", pairs that are each other's nearest neighbour,
            for any number of features; None: the assignment up to 4,096 features.
        max_tokens: held-out tokens to read at most.
        seed: seed of the permutation.

    Returns:
        A row per pair, then a row for every live feature without a partner: feature (of `a`), partner (of `b`), both
        missing where there is none; correlation, and cosine of the decoders (NaN without common snapshots); nearest
        and partner_nearest, the largest correlation of each with any feature of the other crosscoder; firing_rate,
        partner_firing_rate (shares of tokens); variance, partner_variance (shares of all live features); null, the
        feature's correlation with its partner when the tokens of `b` are permuted. Ordered by what is matched, largest
        first.

    Raises:
        UserError: an unknown `by` or `method`, a rate out of range, no live feature, other tokens or snapshots.
    """
    _check_options(by, method, min_rate)
    if acts_b is None:
        first, second = read_features([a, b], acts, min_rate=min_rate, max_tokens=max_tokens)
    else:
        if not torch.equal(acts.held_out_tokens(), acts_b.held_out_tokens()):
            raise UserError("acts and acts_b hold out different tokens: use the same dataset, n_tokens and seed")
        (first,) = read_features([a], acts, min_rate=min_rate, max_tokens=max_tokens)
        (second,) = read_features([b], acts_b, min_rate=min_rate, max_tokens=max_tokens)
    return _matched(first, second, by, method, seed)


def match_shares(pairs: pd.DataFrame, threshold: float = 0.7) -> dict[str, float]:
    """Summarise the result of `match`: how much of each crosscoder the other one finds.

    Args:
        pairs: from `match`.
        threshold: two features with this correlation (or cosine, in `cosine_*`) or more are the same.

    Returns:
        live_a, live_b (numbers of features); share_a, share_b (of them with a partner, one to one); variance_a,
        variance_b (the same weighted by variance); nearest_a, nearest_b (with any such neighbour, not one to one);
        cosine_a, cosine_b (with a partner whose decoder has this cosine); null_a (with a partner in the null);
        median_cosine (of the partners).
    """
    in_a, in_b = pairs["feature"].notna(), pairs["partner"].notna()
    found = pairs["correlation"] >= threshold
    live_a, live_b = int(in_a.sum()), int(in_b.sum())
    row: dict[str, float] = {"live_a": live_a, "live_b": live_b}
    row |= {"share_a": found.sum() / live_a, "share_b": found.sum() / live_b}
    row |= {"variance_a": pairs.loc[found, "variance"].sum(), "variance_b": pairs.loc[found, "partner_variance"].sum()}
    row["nearest_a"] = (pairs["nearest"] >= threshold).sum() / live_a
    row["nearest_b"] = (pairs["partner_nearest"] >= threshold).sum() / live_b
    cosine = pairs["cosine"] >= threshold
    row |= {"cosine_a": cosine.sum() / live_a, "cosine_b": cosine.sum() / live_b}
    row["null_a"] = (pairs["null"] >= threshold).sum() / live_a
    row["median_cosine"] = float(pairs.loc[found, "cosine"].median())
    return {name: float(value) for name, value in row.items()}


@torch.no_grad()
def rotation_of_partners(
    a: Crosscoder, b: Crosscoder, pairs: pd.DataFrame, threshold: float = 0.7, *, min_norm: float = 0.05
) -> pd.DataFrame:
    """Compare how far partners in two seeds rotate between neighbouring snapshots.

    Args:
        a: a crosscoder.
        b: another one of the same snapshots.
        pairs: the result of `match`.
        threshold: correlation from which two features are partners.
        min_norm: rows below this share of the feature's largest norm have no direction.

    Returns:
        A row per interval: before, after (indices), from, to (labels), n (pairs with directions at both ends), angle_a,
        angle_b (median angles in degrees), spearman (of the angles of partners: do the same features turn?), apart
        (median angle between the two partners' rows at `after`: how far a seed determines a direction at all).

    Raises:
        UserError: fewer than two snapshots in common.
    """
    at = shared_snapshots(a, b)
    if len(at[0]) < 2:
        raise UserError(f"the crosscoders have {len(at[0])} snapshot in common: rotation needs at least 2")
    kept = pairs.loc[pairs["correlation"] >= threshold, ["feature", "partner"]].to_numpy(dtype=int)
    rows: list[torch.Tensor] = []
    for crosscoder, places, ids in ((a, at[0], kept[:, 0]), (b, at[1], kept[:, 1])):
        found = crosscoder.W_dec_by_snapshot[ids][:, places].float().cpu()
        short = relative_norms(crosscoder.decoder_norms)[ids][:, places] < min_norm
        rows.append(normalize(found, dim=-1, eps=1e-30).masked_fill(short[..., None], torch.nan))
    one, other = rows

    def angle(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        return (x * y).sum(-1).clamp(-1, 1).acos().rad2deg().double().numpy()

    turns = angle(one[:, :-1], one[:, 1:]), angle(other[:, :-1], other[:, 1:])
    between = angle(one, other)[:, 1:]
    known = np.isfinite(turns[0]) & np.isfinite(turns[1])
    labels = snapshot_columns(a)["label"].take(at[0]).tolist()
    table = pd.DataFrame({"before": at[0][:-1], "after": at[0][1:], "from": labels[:-1], "to": labels[1:]})
    table["n"] = known.sum(0)
    for name, values in (("angle_a", turns[0]), ("angle_b", turns[1]), ("apart", between)):
        table[name] = [np.median(values[use, s]) if use.any() else np.nan for s, use in enumerate(known.T)]
    table["spearman"] = [
        rank_correlation(*(turn[use, s] for turn in turns)) if use.sum() > 2 else np.nan
        for s, use in enumerate(known.T)
    ]
    return table


def consensus(
    crosscoders: Mapping[str, Crosscoder] | Sequence[Crosscoder],
    acts: Activations,
    threshold: float = 0.7,
    *,
    min_rate: float = 0.0,
    method: str | None = None,
    max_tokens: int = 262_144,
) -> pd.DataFrame:
    """Find the features that most of several crosscoders have in common.

    Args:
        crosscoders: two or more crosscoders of the same snapshots, such as several seeds; by name, or numbered.
        acts: activations of these snapshots; the held-out ones are used.
        threshold: correlation from which a partner counts.
        min_rate: features that fire on this share of the held-out tokens or less are not live.
        method: as in `match`.
        max_tokens: held-out tokens to read at most.

    Returns:
        A row per crosscoder and feature: crosscoder (its name), feature, alive, firing_rate, variance (share of that of
        the live features), n_seeds (crosscoders that have the feature, its own included; 0 if dead), of (number of
        crosscoders), consensus (n_seeds is more than half of them), correlation (mean over the other crosscoders of the
        correlation with the partner there, 0 where there is none; NaN if dead); and for each crosscoder
        partner/<name> and correlation/<name>, the partner there, whatever its correlation (missing if there is none,
        and for the crosscoder itself).

    Raises:
        UserError: fewer than two crosscoders, a threshold out of range, or as `match`.
    """
    named = dict(crosscoders) if isinstance(crosscoders, Mapping) else {str(i): c for i, c in enumerate(crosscoders)}
    _check_options("activation", method, min_rate)
    _check_several(len(named), threshold)
    read = read_features(list(named.values()), acts, min_rate=min_rate, max_tokens=max_tokens)
    return _consensus(dict(zip(named, read, strict=True)), threshold, method)


def _consensus(read: Mapping[str, LiveFeatures], threshold: float, method: str | None) -> pd.DataFrame:
    """The table of `consensus`."""
    n_seeds = {name: np.where(each.alive, 1, 0) for name, each in read.items()}
    total = {name: np.zeros(len(each.alive)) for name, each in read.items()}
    partners = {(m, n): np.full((2, len(read[m].alive)), np.nan) for m in read for n in read}
    for m, n in combinations(read, 2):
        i, j, value, _, _ = _assigned(_correlations(read[m], read[n]), len(read[m].ids), len(read[n].ids), method)
        for name, ids in ((m, read[m].ids[i]), (n, read[n].ids[j])):
            n_seeds[name][ids] += value >= threshold
            total[name][ids] += value
        a, b = read[m].ids[i], read[n].ids[j]
        partners[m, n][:, a], partners[n, m][:, b] = (b, value), (a, value)
    tables: list[pd.DataFrame] = []
    for name, each in read.items():
        found = n_seeds[name]
        columns: dict[str, Any] = {"crosscoder": name, "feature": np.arange(len(found)), "alive": each.alive}
        columns |= {"firing_rate": each.rate, "variance": each.variance, "n_seeds": found, "of": len(read)}
        columns["consensus"] = 2 * found > len(read)
        columns["correlation"] = np.where(each.alive, total[name] / (len(read) - 1), np.nan)
        for other in read:
            ids, value = partners[name, other]
            columns |= {f"partner/{other}": pd.array(ids, dtype="Int64"), f"correlation/{other}": value}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def consensus_shares(found: pd.DataFrame) -> pd.DataFrame:
    """Summarise the result of `consensus`.

    Args:
        found: from `consensus`.

    Returns:
        A row per crosscoder: crosscoder, alive (number of live features), consensus and unanimous (shares of them found
        by most and by all), consensus_variance and unanimous_variance (the same weighted by variance), of (number of
        crosscoders).
    """
    rows: list[dict[str, Any]] = []
    for name, table in found.groupby("crosscoder", sort=False):
        live = pd.DataFrame(table[table["alive"]])
        all_of = live["n_seeds"] == live["of"]
        rows.append(
            {
                "crosscoder": name,
                "alive": len(live),
                "consensus": float(live["consensus"].mean()),
                "unanimous": float(all_of.mean()),
                "consensus_variance": float(live.loc[live["consensus"], "variance"].sum()),
                "unanimous_variance": float(live.loc[all_of, "variance"].sum()),
                "of": int(live["of"].iloc[0]),
            }
        )
    return pd.DataFrame(rows)


def compare_seeds(
    crosscoders: Mapping[str, Crosscoder], acts: Activations, threshold: float = 0.7, *, min_rate: float = 0.0
) -> dict[str, pd.DataFrame]:
    """Compare several seeds: every pair of them, and the features that most have.

    Args:
        crosscoders: two or more crosscoders of the same snapshots, by name.
        acts: activations of these snapshots; the held-out ones are used.
        threshold: correlation from which a partner counts.
        min_rate: features that fire on this share of the held-out tokens or less are not live.

    Returns:
        The tables consensus (of `consensus`); seeds: a row per pair of crosscoders with a, b (their names) and the
        columns of `match_shares`; and, for two snapshots or more, seeds_rotation: a row per pair and interval with a, b
        and the columns of `rotation_of_partners`; and seeds_births: a row per pair and kind of feature with a, b and
        the columns of `births_of_partners`, where the held-out tokens are enough to date births by R2.

    Raises:
        UserError: as `consensus`.
    """
    _check_options("activation", None, min_rate)
    _check_several(len(crosscoders), threshold)
    read = dict(zip(crosscoders, read_features(list(crosscoders.values()), acts, min_rate=min_rate), strict=True))
    several = next(iter(crosscoders.values())).n_snapshots > 1
    dates: dict[str, pd.DataFrame] = {}
    if several:
        try:
            dates = {name: date_features(crosscoder, acts) for name, crosscoder in crosscoders.items()}
        except UserError as error:
            warnings.warn(f"births are not compared between seeds: {error}", stacklevel=2)
    rows: list[dict[str, Any]] = []
    turns: list[pd.DataFrame] = []
    births: list[pd.DataFrame] = []
    for a, b in combinations(read, 2):
        pairs = _matched(read[a], read[b], "activation", None, 0)
        rows.append({"a": a, "b": b, **match_shares(pairs, threshold)})
        if several:
            turns.append(rotation_of_partners(crosscoders[a], crosscoders[b], pairs, threshold).assign(a=a, b=b))
        if dates:
            births.append(births_of_partners(pairs, dates[a], dates[b], threshold).assign(a=a, b=b))
    tables = {"consensus": _consensus(read, threshold, None), "seeds": pd.DataFrame(rows)}
    more = {"seeds_rotation": turns, "seeds_births": births}
    return tables | {name: pd.concat(parts, ignore_index=True) for name, parts in more.items() if parts}


def describe_seeds(tables: Mapping[str, pd.DataFrame], threshold: float = 0.7) -> str:
    """What the seeds have in common, in two lines, and a third about births where they were compared.

    Args:
        tables: the result of `compare_seeds`.
        threshold: as there.
    """
    pairs, shares = tables["seeds"], consensus_shares(tables["consensus"])
    births = tables.get("seeds_births")
    more = "" if births is None else f"\n{describe_partners(births)}"
    return (
        f"a live feature has a partner of correlation {threshold:g} or more in another seed: "
        f"{pairs[['share_a', 'share_b']].to_numpy().mean():.0%} of them, which write "
        f"{pairs[['variance_a', 'variance_b']].to_numpy().mean():.0%} of the variance (by chance "
        f"{pairs['null_a'].mean():.0%}; by decoder cosine {pairs[['cosine_a', 'cosine_b']].to_numpy().mean():.0%})\n"
        f"found by most of {len(shares)} seeds: {shares['consensus'].mean():.0%} of the live features, "
        f"{shares['consensus_variance'].mean():.0%} of the variance; by all: {shares['unanimous'].mean():.0%}, "
        f"{shares['unanimous_variance'].mean():.0%}{more}"
    )


def add_consensus(table: pd.DataFrame, found: pd.DataFrame, *, only: bool = False) -> pd.DataFrame:
    """Add n_seeds and consensus to a table with a column `feature`, such as lifecycles or an attribution.

    Args:
        table: a table about features of one crosscoder.
        found: the rows of `consensus` about this crosscoder.
        only: keep the rows of consensus features only.

    Returns:
        A row per row of the table, or per one about a consensus feature: its columns, then n_seeds and consensus.

    Raises:
        UserError: no column `feature`, several crosscoders in `found`, or features that it does not have.
    """
    if "feature" not in table:
        raise UserError(f"the table has no column 'feature' but {', '.join(map(str, table))}: give one about features")
    if not found["feature"].is_unique:
        names = ", ".join(map(str, found["crosscoder"].unique()))
        raise UserError(f"found is about several crosscoders ({names}): select one, found[found['crosscoder'] == ...]")
    known = found.set_index("feature")[["n_seeds", "consensus"]]
    if missing := set(table["feature"]) - set(known.index):
        raise UserError(f"feature {min(missing)} is not among the {len(known)} of the consensus: is it of this run?")
    rest = table.drop(columns=["n_seeds", "consensus"], errors="ignore")
    marked = rest.join(known, on="feature")
    return pd.DataFrame(marked[marked["consensus"]]).reset_index(drop=True) if only else marked


def compare_features(
    a: Crosscoder,
    b: Crosscoder,
    acts: Activations,
    *,
    acts_b: Activations | None = None,
    threshold: float = 0.7,
    min_rate: float = 0.0,
    method: str | None = None,
    by: str = "r2",
    presence: float = PRESENCE,
    min_run: int = 2,
) -> dict[str, float]:
    """Compare the features of two crosscoders: how much is found by both, and whether the lifecycles agree.

    Lifecycles are classified on the snapshots that both crosscoders have.

    Args:
        a: a crosscoder.
        b: another crosscoder of the same model.
        acts: activations of the snapshots of `a`.
        acts_b: activations of the same tokens in the snapshots of `b`, if they are other snapshots.
        threshold: two features with this correlation or more are the same.
        min_rate: as in `match`.
        method: as in `match`.
        by: what dates lifecycles: "r2", or "norm" for the decoder norm.
        presence: a feature is present where it has at least this share of its largest value.
        min_run: snapshots in a row a feature must be present for to count as born.

    Returns:
        snapshots (in common), matched (pairs), the entries of `match_shares`, same_origin, same_fate, and for pairs
        that both have a birth: same_birth, birth_within_1 (snapshots), and same_birth_by_chance, the value of
        same_birth if partners were shuffled. NaN if there is no pair.

    Raises:
        UserError: fewer than two snapshots in common, or as `match` and `classify_lifecycles`.
    """
    shared = shared_snapshots(a, b)
    S = len(shared[0])
    if S < 2:
        raise UserError(f"the crosscoders have {S} snapshot in common: comparing lifecycles needs at least 2")
    if by not in ("r2", "norm"):
        raise UserError(f"by={by!r} is unknown: use 'r2' or 'norm'")
    pairs = match(a, b, acts, acts_b=acts_b, min_rate=min_rate, method=method)
    kept = pairs.loc[pairs["correlation"] >= threshold]
    left, right = (
        date_features(crosscoder, its, by=by, at=at, presence=presence, min_run=min_run)
        .iloc[kept[name].to_numpy(dtype=int)]
        .reset_index(drop=True)
        for crosscoder, its, at, name in ((a, acts, shared[0], "feature"), (b, acts_b or acts, shared[1], "partner"))
    )
    known = left["origin"].notna() & right["origin"].notna()
    left, right = left[known].reset_index(drop=True), right[known].reset_index(drop=True)
    births = np.stack([table["birth"].to_numpy(dtype=float, na_value=np.nan) for table in (left, right)])
    births = births[:, np.isfinite(births).all(0)].astype(int)
    apart = np.abs(births[0] - births[1])
    frequencies = [np.bincount(dates, minlength=S) / max(1, len(dates)) for dates in births]
    return {
        "snapshots": S,
        "matched": len(kept),
        **match_shares(pairs, threshold),
        "same_origin": _mean((left["origin"] == right["origin"]).to_numpy()),
        "same_fate": _mean((left["fate"] == right["fate"]).to_numpy()),
        "same_birth": _mean(apart == 0),
        "birth_within_1": _mean(apart <= 1),
        "same_birth_by_chance": float(frequencies[0] @ frequencies[1]) if len(apart) else float("nan"),
    }


def compare_evolutions(
    crosscoders: Mapping[str, tuple[Crosscoder, Activations | Firing]], *, presence: float = PRESENCE, min_run: int = 2
) -> pd.DataFrame:
    """Tabulate summary statistics of several crosscoders, to see whether they depend on size, snapshots, or seed.

    Args:
        crosscoders: by name, each with the activations of its own snapshots or the result of `measure_firing`.
            Lifecycles are by R2 with activations, otherwise by decoder norm.
        presence: a feature is present where that measure is at least this share of its largest value.
        min_run: snapshots in a row a feature must be present for to count as born.

    Returns:
        A row per crosscoder: name, snapshots, features, alive, measure (of presence); initial, emergent, never,
        transient (shares of the live features with a reading); median_birth (step, of emergent features);
        rotation_from, rotation_to (labels of the interval where most features rotate), rotation_from_step,
        rotation_to_step, rotation_share (of all features that rotate); dimensionality_first, dimensionality_least,
        dimensionality_last (shares of D). Steps are missing if none are recorded, the interval if no feature rotates.

    Raises:
        UserError: no crosscoder, or as `evolve`.
    """
    if not crosscoders:
        raise UserError("crosscoders is empty: give one or more by name")
    rows: list[dict[str, Any]] = []
    for name, (crosscoder, acts) in crosscoders.items():
        found = evolve(crosscoder, acts, presence=presence, min_run=min_run)
        table = found.lifecycles()
        live = pd.DataFrame(table[table["origin"].notna()])
        intervals = rotation_per_interval(crosscoder, torch.tensor(table["alive"].to_numpy()))
        most = intervals.loc[intervals["largest"]]
        share = found.dimensionality["share"].to_numpy()
        row: dict[str, Any] = {
            "name": name,
            "snapshots": crosscoder.n_snapshots,
            "features": len(table),
            "alive": int(table["alive"].sum()),
            "measure": found.measures[0],
            **{origin: _mean((live["origin"] == origin).to_numpy()) for origin in ("initial", "emergent", "never")},
            "transient": _mean((live["fate"] == "transient").to_numpy()),
            "median_birth": live.loc[live["origin"] == "emergent", "birth_step"].astype("Float64").median(),
        }
        for column in ("from", "to", "from_step", "to_step", "share"):
            row[f"rotation_{column}"] = next(iter(most[column]), None)
        row |= {"dimensionality_first": share[0], "dimensionality_least": share.min(), "dimensionality_last": share[-1]}
        rows.append(row)
    return pd.DataFrame(rows)


def shared_snapshots(a: Crosscoder, b: Crosscoder) -> tuple[list[int], list[int]]:
    """Indices of the snapshots that two crosscoders have in common, by weights if recorded, otherwise by label.

    Raises:
        UserError: no common snapshot, or different d_model.
    """
    if a.d_model != b.d_model:
        raise UserError(
            f"the crosscoders have d_model {a.d_model} and {b.d_model}: only crosscoders of one model can be matched"
        )
    names: list[list[str]] = []
    for crosscoder in (a, b):
        recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
        labels = snapshot_columns(crosscoder)["label"].tolist()
        names.append(
            [row.get("fingerprint") or label for row, label in zip(recorded or [{}] * len(labels), labels, strict=True)]
        )
    pairs = [(names[0].index(name), s) for s, name in enumerate(names[1]) if name in names[0]]
    if not pairs:
        raise UserError(
            f"the crosscoders have no snapshot in common ({', '.join(snapshot_columns(a)['label'])} and "
            f"{', '.join(snapshot_columns(b)['label'])}; equal labels have different weights): use compare_evolutions "
            "for different models"
        )
    return [i for i, _ in pairs], [j for _, j in pairs]


@dataclass(frozen=True)
class LiveFeatures:
    """Activations of the live features of one crosscoder on some tokens, by `read_features`.

    Attributes:
        crosscoder: whose features these are.
        ids: indices of the live features.
        values: (N, n) their activations, sparse.
        mean: (n,) means over tokens.
        std: (n,) standard deviations over tokens.
        alive: (F,) whether each feature is live.
        rate: (F,) share of tokens where each feature is active.
        variance: (F,) share of each feature in the variance that live features write; 0 if not live.
    """

    crosscoder: Crosscoder
    ids: np.ndarray
    values: Any
    mean: np.ndarray
    std: np.ndarray
    alive: np.ndarray
    rate: np.ndarray
    variance: np.ndarray


@torch.no_grad()
def read_features(
    crosscoders: Sequence[Crosscoder], acts: Activations, *, min_rate: float = 0.0, max_tokens: int = 262_144
) -> list[LiveFeatures]:
    """Encode held-out activations with several crosscoders, in one pass.

    Args:
        crosscoders: crosscoders of the snapshots of `acts`.
        acts: the held-out activations are used.
        min_rate: features that fire on this share of the tokens or less are not live.
        max_tokens: tokens to read at most.

    Raises:
        UserError: activations of other snapshots, nothing held out, or a crosscoder without a live feature.
    """
    for crosscoder in crosscoders:
        check_activations(crosscoder, acts)
    # the gate used in training may depend on the batch
    ready = [c.to_inference() if isinstance(c, CrosscoderTrainingSAE) else c for c in crosscoders]
    parts: list[list[Any]] = [[] for _ in ready]
    n = 0
    for x in acts.held_out(batch_tokens(max(c.cfg.d_sae for c in ready))):
        x = x[: max_tokens - n]
        for crosscoder, found in zip(ready, parts, strict=True):
            found.append(csr_matrix(crosscoder.encode(x.to(crosscoder.W_dec.device)).float().cpu().numpy()))
        n += len(x)
        if n >= max_tokens:
            break
    if not n:
        raise UserError("no activations are held out: give Dataset(held_out_tokens=...) of 1 or more")
    return [_live(c, vstack(found), min_rate) for c, found in zip(crosscoders, parts, strict=True)]


def _live(crosscoder: Crosscoder, values: Any, min_rate: float) -> LiveFeatures:
    values = csc_matrix(values, dtype=np.float64)
    N = values.shape[0]
    rate = np.diff(values.indptr) / N
    mean = np.asarray(values.mean(0)).ravel()
    variance = np.maximum(np.asarray(values.multiply(values).mean(0)).ravel() - mean**2, 0)
    size = crosscoder.decoder_norms.detach().double().square().sum(1).cpu().numpy()
    # a constant feature has a variance of rounding size, and no correlation
    alive = (rate > min_rate) & (variance > 1e-12 * (mean**2 + variance)) & (size > 0)
    if not alive.any():
        raise UserError(
            f"no feature fires on more than {min_rate:g} of the {N:,} held-out tokens: train longer, or lower min_rate"
        )
    ids = np.flatnonzero(alive)
    written = np.where(alive, variance * size, 0.0)
    live = values[:, ids]
    return LiveFeatures(crosscoder, ids, live, mean[ids], np.sqrt(variance[ids]), alive, rate, written / written.sum())


def _check_options(by: str, method: str | None, min_rate: float) -> None:
    if by not in ("activation", "decoder"):
        raise UserError(f"by={by!r} is unknown: use 'activation' or 'decoder'")
    if method not in (None, "assignment", "mutual"):
        raise UserError(f"method={method!r} is unknown: use 'assignment', 'mutual', or None")
    if not 0 <= min_rate < 1:
        raise UserError(f"min_rate={min_rate} is not in [0, 1): it is a share of tokens, such as 1e-4")


def _check_several(n: int, threshold: float) -> None:
    if n < 2:
        raise UserError(f"a consensus needs at least 2 crosscoders, but there is only {n}: train more seeds")
    if not 0 < threshold <= 1:
        raise UserError(f"threshold={threshold} is not in (0, 1]: it is a correlation, such as 0.7")


def _matched(a: LiveFeatures, b: LiveFeatures, by: str, method: str | None, seed: int) -> pd.DataFrame:
    """The table of `match`."""
    n, m = len(a.ids), len(b.ids)
    correlations, cosines = _correlations(a, b), _cosines(a, b) if by == "decoder" or _share_any(a, b) else None
    order = np.random.default_rng(seed).permutation(a.values.shape[0])
    null = np.full(n, np.nan)
    if by == "activation":
        i, j, value, nearest_a, nearest_b = _assigned(correlations, n, m, method)
        at, _, by_chance, _, _ = _assigned(_correlations(a, b, order), n, m, method)
        null[at] = by_chance
        cosine = np.full(len(i), np.nan) if cosines is None else _values(cosines, i, j)
        correlation = value
    else:
        assert cosines is not None
        i, j, cosine, _, _ = _assigned(cosines, n, m, method)
        correlation = _values(correlations, i, j)
        _, _, _, nearest_a, nearest_b = _assigned(correlations, n, m, "mutual")
        null[i] = _values(_correlations(a, b, order), i, j)
    alone_a, alone_b = np.setdiff1d(np.arange(n), i), np.setdiff1d(np.arange(m), j)
    left = np.concatenate([i, alone_a, np.full(len(alone_b), -1)])
    right = np.concatenate([j, np.full(len(alone_a), -1), alone_b])

    def column(values: np.ndarray, at: np.ndarray) -> np.ndarray:
        return np.where(at >= 0, values[at], np.nan)

    padding = np.full(len(alone_a) + len(alone_b), np.nan)
    columns: dict[str, Any] = {
        "feature": pd.array(np.where(left >= 0, a.ids[left], -1), dtype="Int64"),
        "partner": pd.array(np.where(right >= 0, b.ids[right], -1), dtype="Int64"),
        "correlation": np.concatenate([correlation, padding]),
        "cosine": np.concatenate([cosine, padding]),
        "nearest": column(nearest_a, left),
        "partner_nearest": column(nearest_b, right),
        "firing_rate": column(a.rate[a.ids], left),
        "partner_firing_rate": column(b.rate[b.ids], right),
        "variance": column(a.variance[a.ids], left),
        "partner_variance": column(b.variance[b.ids], right),
        "null": column(null, left),
    }
    table = pd.DataFrame(columns)
    for name in ("feature", "partner"):
        table[name] = table[name].where(table[name] >= 0)
    key = "correlation" if by == "activation" else "cosine"
    return table.sort_values(key, ascending=False, ignore_index=True, kind="stable")


def _correlations(a: LiveFeatures, b: LiveFeatures, order: np.ndarray | None = None) -> Callable[[slice], np.ndarray]:
    """A function of a slice of the features of `a` that returns their correlations (n, m) with those of `b`."""
    N = a.values.shape[0]
    other = b.values.tocsr() if order is None else b.values.tocsr()[order]

    def block(part: slice) -> np.ndarray:
        products = (a.values[:, part].T @ other).toarray() / N
        covariance = products - a.mean[part, None] * b.mean[None]
        return covariance / (a.std[part, None] * b.std[None])

    return block


def _cosines(a: LiveFeatures, b: LiveFeatures) -> Callable[[slice], np.ndarray]:
    """The same for the cosines of decoders over the snapshots that both have."""
    at_a, at_b = shared_snapshots(a.crosscoder, b.crosscoder)
    rows_a, rows_b = (
        normalize(each.crosscoder.W_dec_by_snapshot.detach()[each.ids][:, at].flatten(1).float().cpu(), dim=1)
        for each, at in ((a, at_a), (b, at_b))
    )
    return lambda part: (rows_a[part] @ rows_b.T).double().numpy()


def _share_any(a: LiveFeatures, b: LiveFeatures) -> bool:
    try:
        shared_snapshots(a.crosscoder, b.crosscoder)
    except UserError:
        return False
    return True


def _assigned(
    block: Callable[[slice], np.ndarray], n: int, m: int, method: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs i, j of the one-to-one matching, their similarities, and the largest similarity of every row and column.

    Args:
        block: returns the similarities (rows, m) of a slice of the n rows.
        n: number of rows.
        m: number of columns.
        method: as in `match`.
    """
    whole = method == "assignment" or (method is None and max(n, m) <= ASSIGNED)
    kept: list[np.ndarray] = []
    best_a, nearest_a = np.empty(n), np.empty(n, dtype=int)
    best_b, nearest_b = np.full(m, -np.inf), np.zeros(m, dtype=int)
    for start in range(0, n, _BLOCK):
        part = slice(start, min(start + _BLOCK, n))
        values = block(part)
        best_a[part], nearest_a[part] = values.max(1), values.argmax(1)
        closer = values.max(0) > best_b
        best_b[closer], nearest_b[closer] = values.max(0)[closer], values.argmax(0)[closer] + start
        if whole:
            kept.append(values)
    if whole:
        similarity = np.concatenate(kept)
        i, j = linear_sum_assignment(similarity, maximize=True)
        return i, j, similarity[i, j], best_a, best_b
    i = np.flatnonzero(nearest_b[nearest_a] == np.arange(n))
    return i, nearest_a[i], best_a[i], best_a, best_b


def _values(block: Callable[[slice], np.ndarray], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Similarities of given pairs."""
    found = np.empty(len(i))
    for start in range(0, int(i.max(initial=-1)) + 1, _BLOCK):
        here = (i >= start) & (i < start + _BLOCK)
        if here.any():
            rows = block(slice(start, start + _BLOCK))
            found[here] = rows[i[here] - start, j[here]]
    return found


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
