"""When features are born, how sure that is, and how many births are false.

For a curve of presence of each feature over snapshots (decoder norm, R2 or within-token R2, see `presence`), relative
to the feature's largest value, lifecycles are those of `lifecycles.classify_lifecycles`. For both R2, whose errors are
known for G groups of documents, `date_births` adds

1. a 95 % interval of the birth, in snapshots, from a bootstrap over groups of documents: percentiles,
   expanded for the small number of groups (Hesterberg 2015, 10.1080/00031305.2015.1089789, section 5.3);
2. the *effect*, largest R2 minus R2 at the first snapshot, with its interval;
3. a p-value of the hypothesis that the feature is present at the first snapshot,
   `d = threshold * max_s R2_is - R2_i0 <= 0`: one-sided t test of d over its jackknife standard error, G - 1 degrees of
   freedom; and a q-value (Benjamini and Hochberg 1995) over all features that have one.

There are no dates between snapshots. R2 of a regression fitted on n tokens is low by about (1 - R2) D / n, so an
interpolated point where a curve reaches the threshold is late, by more than its sampling error. What the intervals in
snapshots cover, by the number of tokens, is in `benchmarks/birth_intervals.py`.

A count of births means little alone. `count_births` gives it at several thresholds, for lexical and contextual features
apart, with an interval over groups of documents, as all counts have, and next to it

1. the count on the same curves with the snapshots in *reversed* order: noise and drift without a direction are born as
   often backwards, and so are features that fade, which is a finding and not an error;
2. how many births exceed the *common trend*: features of one kind may all become easier to predict, and then most of
   them pass the threshold for no reason of their own. A birth exceeds it if its R2 at the first snapshot is a smaller
   share of its largest than that of the median curve of its kind, with a q-value as above;
3. the counts in models without a history (`with_null`): *untrained* ones, which have hardly any contextual features,
   and *exchangeable* ones, trained models of one step that differ in their seeds. `crosslens.pipeline` makes both.

The definitions are new here. Symbols: S snapshots, F features, G groups of documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Float64
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor

from crosslens.errors import UserError
from crosslens.evolution.lifecycles import PRESENCE, birth_index, check_presence, require_two_snapshots
from crosslens.evolution.presence import Decodability
from crosslens.stats import jackknife_error, q_values, resample_counts

MEASURES = ("r2", "within", "norm")  # the first one that was read is the default
THRESHOLDS = (0.3, PRESENCE, 0.5, 0.7)
COUNTS = ("born", "born_reversed", "sure", "sure_reversed", "beyond_trend")
MIN_R2 = 0.05
MIN_WITHIN = 0.05
"""Least share of a feature's variance within token types from which within-token R2 is read."""
NAMES = {"norm": "decoder norm", "r2": "R2", "within": "within-token R2"}
NULLS = {"untrained": "models that never trained", "exchangeable": "models of other seeds at one step"}
_FEATURES = 256  # at a time when resampling: the draws of each take 4 kB a snapshot, three times over
_ENDS = ("", "_reversed")  # of the history that comes first
_SHARE = 0.25  # births reversed in time per birth, from which on the count alone says little
_FEW = 5  # births reversed in time that say nothing


def presence_curves(
    norms: Float[Tensor, "F S"], decodability: Decodability | None, alive: Bool[np.ndarray, " F"]
) -> dict[str, Float64[np.ndarray, "F S"]]:
    """Curves of presence by measure, in the order of `MEASURES`; all zero for features without a reading.

    R2 below 0 counts as 0. Features whose R2 stays below .05 at every snapshot cannot be dated by it. Within-token R2
    is read for features with a twentieth of their variance or more within token types; others have too little left.

    Args:
        norms: decoder norms.
        decodability: the result of `measure_decodability`; without it, only the norm is read.
        alive: features that are read.
    """
    curves: dict[str, Any] = {}
    if decodability is not None:
        varies = decodability.between <= 1 - MIN_WITHIN
        for measure, kept in (("r2", alive), ("within", alive & varies)):
            values = np.nan_to_num(decodability.curves(measure)).clip(0)
            curves[measure] = np.where((kept & (values.max(1) >= MIN_R2))[:, None], values, 0.0)
    return {**curves, "norm": np.where(alive[:, None], norms.detach().cpu().double().numpy(), 0.0)}


def date_births(
    decodability: Decodability,
    measure: str,
    features: Bool[np.ndarray, " F"],
    *,
    presence: float = PRESENCE,
    min_run: int = 2,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Date the births of features by decodability, with intervals and q-values.

    Args:
        decodability: the result of `measure_decodability`.
        measure: "r2" or "within".
        features: features to date, such as those where `presence_curves` are not zero; the others get missing values.
        presence: a feature is present where its R2 is at least this share of its largest.
        min_run: snapshots in a row a feature must be present for to count as born.
        n_bootstrap: draws of groups of documents.
        seed: seed for the draws.

    Returns:
        A row per feature: birth_low, birth_high (snapshot indices; S where a draw has no birth), effect, effect_low,
        effect_high, p, q.

    Raises:
        UserError: one snapshot only, an unknown measure, a threshold out of range.
    """
    _check(decodability, measure, presence, min_run)
    curves, G = np.nan_to_num(decodability.curves(measure)), decodability.error.shape[1]
    return date_curves(
        curves, partial(decodability.resample, measure), G, features,
        presence=presence, min_run=min_run, n_bootstrap=n_bootstrap, seed=seed,
    )  # fmt: skip


def date_curves(
    curves: Float64[np.ndarray, "F S"],
    resample: Callable[[Float64[np.ndarray, "n G"], Any], Float64[np.ndarray, "n f S"]],
    n_groups: int,
    features: Bool[np.ndarray, " F"],
    *,
    presence: float,
    min_run: int,
    n_bootstrap: int,
    seed: int,
) -> pd.DataFrame:
    """`date_births` for curves of any R2 that is known by groups.

    Args:
        curves: R2.
        resample: the curves of some features with every group counted as often as the weights say.
        n_groups: G.
        features: features to date.
        presence: as in `date_births`, and so are the others.
        min_run: as there.
        n_bootstrap: as there.
        seed: as there.
    """
    F, G = len(curves), n_groups
    draws = resample_counts(G, n_bootstrap, seed).astype(float)
    leave_one_out = 1.0 - np.eye(G)
    ends = interval_ends(G)
    names = ["birth_low", "birth_high", "effect", "effect_low", "effect_high", "p"]
    found = np.full((F, len(names)), np.nan)
    for ids in np.split(np.flatnonzero(features), range(_FEATURES, int(features.sum()), _FEATURES)):
        values = curves[ids].clip(0)
        found[ids, 2] = values.max(1) - values[:, 0]
        drawn = np.nan_to_num(resample(draws, ids)).clip(0)
        births = birth_index(_relative(drawn) >= presence, min_run)
        found[ids, 0], found[ids, 1] = np.quantile(births, ends, axis=0, method="inverted_cdf")
        found[ids, 3], found[ids, 4] = np.quantile(drawn.max(2) - drawn[..., 0], ends, axis=0)
        error = jackknife_error(_margin(np.nan_to_num(resample(leave_one_out, ids)), presence))
        found[ids, 5] = student.sf(_t(_margin(values, presence), error), G - 1)
    table = pd.DataFrame(found, columns=pd.Index(names))
    for name in names[:2]:
        table[name] = table[name].astype("Int64")
    table["q"] = q_values(table["p"].to_numpy())
    return table


def interval_ends(n_groups: int) -> Float64[np.ndarray, " 2"]:
    """Quantiles of draws of groups that make an interval of 95 %.

    A bootstrap of G groups has standard errors too small by sqrt((G - 1) / G), and normal tails instead of Student's.
    """
    return norm.cdf(np.sqrt(n_groups / (n_groups - 1)) * student.ppf([0.025, 0.975], n_groups - 1))


def count_births(
    curves: dict[str, Float64[np.ndarray, "F S"]],
    lexical: Bool[np.ndarray, " F"] | None = None,
    decodability: Decodability | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    min_run: int = 2,
    max_q: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Count births forward and with the snapshots in reversed order.

    Args:
        curves: the result of `presence_curves`.
        lexical: which features are lexical; without it only all features are counted.
        decodability: to count those births with a q-value up to `max_q` too.
        thresholds: shares of a feature's largest value from which on it is present.
        min_run: snapshots in a row a feature must be present for to count as born.
        max_q: largest q-value.
        seed: seed for the draws of the interval.

    Returns:
        A row per measure, kind (all, lexical, contextual) and threshold: measure, kind, threshold, n (features with a
        reading), born, born_reversed, sure and sure_reversed (of these, with a q-value up to `max_q`), beyond_trend
        (births that exceed the median curve of their kind, with such a q-value); and <count>_low and <count>_high of
        each, its 95% interval over groups of documents. By the norm, intervals, sure and beyond_trend are missing.

    Raises:
        UserError: one snapshot only, a threshold out of range.
    """
    rows: list[dict[str, Any]] = []
    for measure, values in curves.items():
        require_two_snapshots("counting births", values.shape[1])
        read = values.max(1) > 0
        kinds = {"all": read}
        if lexical is not None:
            kinds |= {"lexical": read & lexical, "contextual": read & ~lexical}
        for threshold in thresholds:
            check_presence(threshold, min_run)
        judged = decodability if measure != "norm" else None
        tests: dict[tuple[float, str], _Test] = {}
        trend: dict[str, _Test] = {}
        drawn: dict[tuple[str, float, str], Any] = {}
        if judged is not None:
            tests = {(at, end): _test(judged, measure, read, at, max_q, end=end) for at in thresholds for end in _ENDS}
            trend = _trends(judged, measure, values, kinds, max_q)
            drawn = _drawn_counts(judged, measure, kinds, min_run, seed, tests, trend)
        for threshold in thresholds:
            found: dict[str, Any] = {}
            for end in _ENDS:
                found[f"born{end}"] = _born(_turned(values, end), threshold, min_run)
                if tests:
                    found[f"sure{end}"] = found[f"born{end}"] & tests[threshold, end].passed
            for kind, members in kinds.items():
                row: dict[str, Any] = {"measure": measure, "kind": kind, "threshold": threshold}
                row["n"] = int(members.sum())
                row |= {name: int((births & members).sum()) for name, births in found.items()}
                if judged is not None:
                    row["beyond_trend"] = int((found["born"] & trend[kind].passed).sum())
                    for name in COUNTS:
                        counts = drawn[kind, threshold, name]
                        low, high = _count_interval(row[name], row["n"], counts, judged.error.shape[1])
                        row |= {f"{name}_low": low, f"{name}_high": high}
                rows.append(row)
    names = [each for name in COUNTS for each in (name, f"{name}_low", f"{name}_high")]
    table = pd.DataFrame(rows).reindex(columns=["measure", "kind", "threshold", "n", *names])
    return table.astype(dict.fromkeys(COUNTS[2:], "Int64"))


def _drawn_counts(
    decodability: Decodability,
    measure: str,
    kinds: dict[str, Bool[np.ndarray, " F"]],
    min_run: int,
    seed: int,
    tests: dict[tuple[float, str], _Test],
    trend: dict[str, _Test],
    draws: int = 200,
) -> dict[tuple[str, float, str], Float64[np.ndarray, " R"]]:
    """All counts, by kind, threshold and name, in draws of groups of documents; standard errors are those of the data.

    Args:
        decodability: as the others, of `count_births`.
        measure: of presence.
        kinds: features of each kind.
        min_run: snapshots in a row.
        seed: of the draws.
        tests: of births, by threshold and end.
        trend: of births beyond the common trend, by kind.
        draws: R.
    """
    weights = resample_counts(decodability.error.shape[1], draws, seed).astype(float)
    counts: defaultdict[tuple[str, float, str], Any] = defaultdict(lambda: np.zeros(draws))
    for ids in np.split(np.arange(len(decodability.r2)), range(_FEATURES, len(decodability.r2), _FEATURES)):
        ids = ids[np.any([members[ids] for members in kinds.values()], axis=0)]
        drawn = np.nan_to_num(decodability.resample(measure, weights, ids)).clip(0)
        exceeds = {kind: test.passes(drawn, ids) for kind, test in trend.items()}
        for (threshold, end), test in tests.items():
            born = _born(_turned(drawn, end), threshold, min_run)
            found = {f"born{end}": born, f"sure{end}": born & test.passes(drawn, ids)}
            for kind, members in kinds.items():
                beyond = {} if end else {"beyond_trend": born & exceeds[kind]}
                for name, births in (found | beyond).items():
                    counts[kind, threshold, name] += births[:, members[ids]].sum(1)
    return counts


def _count_interval(count: int, n: int, drawn: Float64[np.ndarray, " R"], G: int) -> tuple[float, float]:
    """The 95% interval of a count, which holds both the count and the count less the bias that the draws show.

    Noise in R2 makes the largest of S values too large and so births too many; draws add as much noise again.
    """
    # a bootstrap of G groups has standard errors too small by sqrt((G - 1) / G)
    size = float(student.ppf(0.975, G - 1) * np.sqrt(G / (G - 1)) * drawn.std(ddof=1))
    corrected = 2 * count - float(drawn.mean())
    return max(min(count, corrected) - size, 0), min(max(count, corrected) + size, n)


class _Test(NamedTuple):
    """t tests of the hypothesis that features are present at the first snapshot, at the last one with `end`."""

    share: float
    """Of the largest R2, from which on a feature is present."""
    end: str
    error: Float64[np.ndarray, " F"]
    """Jackknife standard error of the margin, `share * max_s R2_is - R2_i0`."""
    passed: Bool[np.ndarray, " F"]
    """Where the q-value is at most the limit."""
    least: float
    """Smallest t there; infinite if there is none."""

    def passes(self, drawn: Float64[np.ndarray, "R f S"], ids: Any) -> Bool[np.ndarray, "R f"]:
        """Where other curves of some features have a t as large."""
        return _t(_margin(_turned(drawn, self.end), self.share), self.error[ids]) >= self.least


def _test(
    decodability: Decodability,
    measure: str,
    features: Bool[np.ndarray, " F"],
    share: float,
    max_q: float,
    *,
    end: str = "",
) -> _Test:
    """Test some features; the others do not pass."""
    G = decodability.error.shape[1]
    t, error = (np.full(len(features), np.nan) for _ in range(2))
    for ids in np.split(np.flatnonzero(features), range(_FEATURES, int(features.sum()), _FEATURES)):
        without = np.nan_to_num(decodability.resample(measure, 1.0 - np.eye(G), ids))
        error[ids] = jackknife_error(_margin(_turned(without, end), share))
        curves = _turned(np.nan_to_num(decodability.curves(measure)[ids]), end)
        t[ids] = _t(_margin(curves, share), error[ids])
    passed = q_values(student.sf(t, G - 1)) <= max_q
    return _Test(share, end, error, passed, float(t[passed].min(initial=np.inf)))


def _trends(
    decodability: Decodability,
    measure: str,
    values: Float64[np.ndarray, "F S"],
    kinds: dict[str, Bool[np.ndarray, " F"]],
    max_q: float,
) -> dict[str, _Test]:
    """Tests of the features of each kind, that each is as present at the first snapshot as the median curve."""
    common = {kind: _relative(values[members]) for kind, members in kinds.items()}
    return {
        kind: _test(decodability, measure, kinds[kind], float(np.median(curves[:, 0])) if len(curves) else 0.0, max_q)
        for kind, curves in common.items()
    }


def with_null(counts: pd.DataFrame, null: pd.DataFrame, name: str) -> pd.DataFrame:
    """Add to a result of `count_births` that of models without a history.

    Args:
        counts: of the snapshots.
        null: of the other models.
        name: "untrained" or "exchangeable".

    Returns:
        `counts` with a column of that name (share of the features that are born there) and <name>_n (features with a
        reading there). Untrained models have few contextual features.
    """
    keys = ["measure", "kind", "threshold"]
    own = null.rename(columns={"n": f"{name}_n", "born": name})[[*keys, f"{name}_n", name]]
    table = counts.merge(own, on=keys, how="left", validate="one_to_one")
    table[name] = table[name] / table[f"{name}_n"]
    return table


def table_of_counts(counts: pd.DataFrame) -> list[str]:
    """`count_births` as a table of one screen: a line per measure and kind, a column per threshold.

    A cell is births forward / reversed, then those in untrained and in exchangeable models where they are known. Below
    stand, at the default threshold, the births by R2 that exceed the common trend of their kind.

    Args:
        counts: the result of `count_births` or `with_null`.
    """
    thresholds = sorted(set(counts["threshold"].tolist()))
    known = [name for name in NULLS if name in counts]
    width = 34 if len(known) > 1 else 22
    lines = ["births".ljust(34) + "".join(f"{f'at {one:g}':>{width}}" for one in thresholds)]
    for _, rows in counts.groupby(["measure", "kind"], sort=False):
        measure, kind = str(rows["measure"].iloc[0]), str(rows["kind"].iloc[0])
        cells: list[str] = []
        for row in rows.sort_values("threshold").to_dict("records"):
            cell = f"{row['born']} / {row['born_reversed']}"
            for name in known:
                born = round(row[name] * row[f"{name}_n"]) if row[f"{name}_n"] else 0
                cell += f" ({born} of {row[f'{name}_n']})"
            cells.append(f"{cell:>{width}}")
        lines.append(f"{NAMES[measure]}, {kind} ({rows['n'].iloc[0]})".ljust(34) + "".join(cells))
    rest = (
        f"in brackets: in {', then in '.join(NULLS[name] for name in known)}"
        if known
        else "false births not measured: use --untrained or --null"
    )
    columns = ["measure", "kind", "born", "beyond_trend"]
    beyond = pd.DataFrame(counts[counts["threshold"] == PRESENCE]).reindex(columns=columns)
    for measure, rows in beyond.dropna(subset=["beyond_trend"]).groupby("measure", sort=False):
        parts = [f"{row['kind']} {row['beyond_trend']} of {row['born']}" for row in rows.to_dict("records")]
        lines.append(f"{NAMES[str(measure)]}, births beyond the common trend at {PRESENCE:g}: {', '.join(parts)}")
    return [*lines, f"forward / with the snapshots reversed; {rest}"]


def describe_reversed(counts: pd.DataFrame, presence: float = PRESENCE) -> list[str]:
    """Where many features are born with the snapshots reversed too, a line each; none elsewhere.

    These are kinds of features of which more than a quarter as many are born with the snapshots in reversed order. That
    may be noise, or features that fade: the count alone does not tell.

    Args:
        counts: the result of `count_births`.
        presence: the threshold of presence to judge at.
    """
    lines: list[str] = []
    judged: pd.DataFrame = counts.loc[(counts["threshold"] == presence) & (counts["measure"] != "norm")]
    for row in judged.to_dict("records"):
        if row["born_reversed"] > max(_FEW, _SHARE * row["born"]):
            kind = "features" if row["kind"] == "all" else f"{row['kind']} features"
            measure = NAMES.get(row["measure"], row["measure"])
            lines.append(
                f"by {measure}, {row['born']:,} {kind} are born forward and {row['born_reversed']:,} with the "
                "snapshots reversed: features fade, too, or it is noise; a null of untrained or exchangeable models "
                "tells which"
            )
    return lines


def _born(values: Float64[np.ndarray, "... S"], presence: float, min_run: int) -> Bool[np.ndarray, " ..."]:
    """Which features are emergent."""
    births = birth_index(_relative(values) >= presence, min_run)
    return (births > 0) & (births < values.shape[-1])


def _turned(values: Float64[np.ndarray, "... S"], end: str) -> Float64[np.ndarray, "... S"]:
    return values[..., ::-1] if end else values


def _relative(values: Float64[np.ndarray, "... S"]) -> Float64[np.ndarray, "... S"]:
    highest = values.max(-1, keepdims=True)
    return np.divide(values, highest, out=np.zeros_like(values), where=highest > 0)


def _margin(values: Float64[np.ndarray, "... S"], share: float) -> Float64[np.ndarray, " ..."]:
    return share * values.max(-1) - values[..., 0]


def _t(margin: Float64[np.ndarray, "... f"], error: Float64[np.ndarray, " f"]) -> Float64[np.ndarray, "... f"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(error > 0, margin / error, np.sign(margin) * np.inf)


def _check(decodability: Decodability, measure: str, presence: float, min_run: int) -> None:
    if measure not in MEASURES[:2]:
        raise UserError(f"measure={measure!r} is unknown: use {' or '.join(map(repr, MEASURES[:2]))}")
    require_two_snapshots("dating births", decodability.r2.shape[1])
    check_presence(presence, min_run)
