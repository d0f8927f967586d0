"""Linear probes for single features at every snapshot: is a feature decodable before its decoder norm is large?

For a feature i and a snapshot s (after Ge et al., arXiv 2509.17196, who do not publish their settings):

1. Label every token by whether f_i is active, which the crosscoder decides from the clean activations of all
   snapshots. The labels are the same for every snapshot.
2. Take equal numbers of active and inactive tokens from the shuffled training activations, at most `n_samples`.
3. Train a logistic regression on half of each class, on the raw activations of snapshot s standardised by that half.
   Test it on the other half, then swap the halves. The probe error is the share of held-out tokens misclassified;
   chance is .5.

The hypothesis is that the error is low where the feature is present: `probe_presence` correlates it with every measure
of presence within features over snapshots; `probe_correlation` with the decoder norm over all points, and `probe_parts`
decomposes that. Rare features have fewer tokens, given as `n`, and thus a higher error; `min_samples = n_samples` gives
all features the same number.

A feature of a single word can be decoded from any snapshot that distinguishes words, even an untrained one. Its error
against arbitrary inactive tokens is therefore low everywhere, as it is for all features active on few words. With
`negatives="same_token"` the inactive tokens are other occurrences of the same words in equal numbers, so the probe can
only use the context.

The settings, scikit-learn's `lbfgs` with C = 1 and tolerance 1e-3, were chosen by error and time on 12 features of 10
snapshots with D = 128. C = .01 raised the error by .03; C = 10, a tolerance of 1e-4 or 4000 tokens lowered it by at
most .005 at up to twice the time; `newton-cholesky` had the same error and was no faster.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Int8
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import each, rank_and_size
from crosslens.errors import UserError
from crosslens.evolution.births import NAMES
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.firing import Firing, measure_firing
from crosslens.evolution.held_out import batch_tokens
from crosslens.evolution.history import Evolution, evolve
from crosslens.evolution.lifecycles import relative_norms
from crosslens.stats import correlation, interval, ranks_in_draws, resample

NEGATIVES = ("any", "same_token")
N_SAMPLES, MAX_TOKENS = 2000, 50_000
_MARGIN = 1.5  # a feature is probed if its expected number of samples exceeds the minimum by this factor


def probe(
    crosscoder: Crosscoder,
    acts: Activations,
    evolution: Evolution | None = None,
    *,
    n_features: int = 50,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Probe some features at every snapshot, and compare the errors with every measure of presence.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        evolution: the result of `evolve(crosscoder, acts)`; computed here if None.
        n_features: features to probe, drawn from those that are active often enough.
        seed: seed for the draws.

    Returns:
        The tables probe (of `probe_errors`), probe_presence and probe_parts (of the functions of these names).

    Raises:
        UserError: as `probe_errors`.
    """
    evolution = evolve(crosscoder, acts, seed=seed) if evolution is None else evolution
    errors = probe_errors(crosscoder, acts, firing=evolution.firing, n_features=n_features, seed=seed)
    return {
        "probe": errors,
        "probe_presence": probe_presence(errors, evolution.table, seed=seed),
        "probe_parts": probe_parts(errors, seed=seed),
    }


def probe_errors(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    firing: Firing | None = None,
    n_features: int = 50,
    n_samples: int = N_SAMPLES,
    seed: int = 0,
    min_samples: int = 400,
    max_tokens: int = MAX_TOKENS,
    negatives: str = "any",
) -> pd.DataFrame:
    """Measure the held-out error of a linear probe for some live features at every snapshot.

    Args:
        crosscoder: trained on the snapshots of `acts`.
        acts: features are chosen by their firing rates on the held-out activations; probes use the training ones.
        firing: the result of `measure_firing`; measured here if None.
        n_features: features to draw at random from those that fire often enough.
        n_samples: most tokens per feature, train and test together; half of them active.
        seed: seed for the features and the halves.
        min_samples: least tokens per feature; features with fewer are not probed.
        max_tokens: training activations to read, in whole batches; those in use stay in memory, S * D * 4 bytes each.
        negatives: "any" inactive tokens, or "same_token": for every active token an inactive one with the same id from
            the same batch. Features active on nearly all or almost none of the tokens of an id have too few pairs and
            are left out.

    Returns:
        A row per feature and snapshot: feature, snapshot, label, step, norm (relative to the feature's largest),
        probe_error, n (tokens), first_error and second_error (of the two halves; probe_error is their mean).

    Raises:
        UserError: a number out of range, unknown `negatives`, or no feature with enough active and inactive tokens.
    """
    if negatives not in NEGATIVES:
        raise UserError(f"negatives={negatives!r} is unknown: use {' or '.join(map(repr, NEGATIVES))}")
    for name, value, least in (("n_features", n_features, 1), ("min_samples", min_samples, 4)):
        if value < least:
            raise UserError(f"{name}={value} must be {least} or more")
    if n_samples < min_samples:
        raise UserError(f"n_samples={n_samples} is less than min_samples={min_samples}: raise it, or lower min_samples")
    available = min(max_tokens, acts.n_tokens)
    rates = measure_firing(crosscoder, firing or acts).rate
    expected = torch.minimum(rates, 1 - rates) * available
    eligible = (expected >= _MARGIN * min_samples / 2).nonzero().squeeze(1).numpy()
    if not len(eligible):
        raise UserError(
            f"no feature is both active and inactive on {min_samples // 2} of {available} tokens: lower "
            f"min_samples={min_samples}, or raise max_tokens={max_tokens} and the tokens of the activations"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(eligible, min(n_features, len(eligible)), replace=False))
    x, labels, tokens = _samples(crosscoder, acts, torch.from_numpy(chosen), n_samples // 2, available, negatives)
    v, snapshots = relative_norms(crosscoder.decoder_norms), snapshot_columns(crosscoder)
    drawn: list[tuple[int, Any]] = []
    for column, feature in enumerate(chosen.tolist()):
        label = labels[:, column].numpy()
        if tokens is not None:
            halves = _paired_halves(label, tokens.numpy(), n_samples // 4, rng)
        else:
            halves = _halves(label, n_samples // 4, rng)
        if sum(len(indices) for indices, _ in halves) >= min_samples:
            drawn.append((feature, halves))

    def fit(feature: int, halves: Any) -> list[dict[str, Any]]:
        n, rows = sum(len(indices) for indices, _ in halves), list[dict[str, Any]]()
        # the matrices are small: several threads would cost more than they save
        with threadpool_limits(1):
            for s in range(crosscoder.n_snapshots):
                one, other = ((x[indices, s].numpy(), y) for indices, y in halves)
                errors = _probe_error(one, other), _probe_error(other, one)
                row = {"feature": feature, "snapshot": s, "norm": float(v[feature, s]), "probe_error": sum(errors) / 2}
                rows.append({**row, "n": n, "first_error": errors[0], "second_error": errors[1]})
        return rows

    found = each(lambda one: fit(*one), drawn, "Probing", "feature")
    rows = [row for of_feature in found for row in of_feature]
    if not rows:
        raise UserError(
            f"none of the {len(chosen)} features drawn has {min_samples} tokens: lower min_samples={min_samples}, or "
            f"raise max_tokens={max_tokens} or n_features={n_features}"
        )
    table = pd.DataFrame(rows)
    for place, name in ((2, "label"), (3, "step")):
        table.insert(place, name, snapshots[name].take(table["snapshot"].tolist()).array)
    return table


def probe_correlation(
    table: pd.DataFrame, *, without: Collection[int] = (), n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Correlate probe error with relative decoder norm over features and snapshots.

    The 95 % percentile intervals come from a bootstrap over whole features, since the snapshots of one feature are not
    independent.

    Args:
        table: the result of `probe_errors`.
        without: indices of snapshots to leave out, such as the untrained one.
        n_bootstrap: bootstrap draws.
        seed: seed for the draws.

    Returns:
        spearman, spearman_low, spearman_high, pearson, pearson_low, pearson_high (NaN if either variable is constant),
        n (points) and n_features.

    Raises:
        UserError: a snapshot that the table does not have, or fewer than two features.
    """
    kept, counts, n_features = _prepare(table, without, n_bootstrap, seed)
    pair = kept[["norm", "probe_error"]].to_numpy(dtype=float).T
    return {**_correlations(pair, counts), "n": len(kept), "n_features": n_features}


def probe_parts(
    table: pd.DataFrame, *, without: Collection[int] | None = None, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Decompose the correlation of probe error and relative decoder norm.

    - all: the same as `probe_correlation`.
    - trained: without the snapshots in `without`, as in all rows below.
    - within_features: both variables minus their means over a feature's snapshots. This tests the hypothesis: does the
      error of a feature fall where its norm rises?
    - within_snapshots: both variables minus their means over a snapshot's features. This compares features with each
      other and says nothing about training.
    - disattenuated: corrected for the noise of single probes: both correlations divided by the square root of the
      reliability of the error, 2r / (1 + r) for the correlation r of the two halves (Spearman-Brown).

    A correlation is also small if errors or norms hardly vary: see `sd_error` and `sd_norm`.

    Args:
        table: the result of `probe_errors`.
        without: indices of snapshots to leave out; those of step 0 if None.
        n_bootstrap: bootstrap draws of whole features, for the 95 % intervals.
        seed: seed for the draws.

    Returns:
        A row per part: part, spearman, pearson, each with _low and _high, reliability (of the error; only in the last
        row), sd_norm, sd_error, n (points), n_features.

    Raises:
        UserError: a snapshot that the table does not have, or fewer than two features.
    """
    if without is None:
        steps = table.drop_duplicates("snapshot")[["snapshot", "step"]].dropna().astype(int)
        without = [s for s, step in steps.to_numpy().tolist() if step == 0]
    columns = ["norm", "probe_error", "first_error", "second_error"]
    rows: list[dict[str, Any]] = []
    for part in ("all", "trained", "within_features", "within_snapshots", "disattenuated"):
        kept, counts, n_features = _prepare(table, () if part == "all" else without, n_bootstrap, seed)
        values: Any = kept[columns].astype(float)
        if part.startswith("within"):
            values -= values.groupby(kept[part.removeprefix("within_").removesuffix("s")]).transform("mean")
        found = values.to_numpy().T
        correct = part == "disattenuated"
        row: dict[str, Any] = {"part": part, **_correlations(found if correct else found[:2], counts)}
        row["reliability"] = float(_reliability(*found[2:])) if correct else np.nan
        row |= {"sd_norm": found[0].std(), "sd_error": found[1].std(), "n": len(kept), "n_features": n_features}
        rows.append(row)
    return pd.DataFrame(rows)


def probe_presence(
    table: pd.DataFrame,
    evolution: pd.DataFrame,
    *,
    without: Collection[int] = (),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate probe error with every measure of presence, within features over snapshots and between features.

    Within features, both are taken minus their means over a feature's snapshots: is a feature easier to decode where
    the measure is higher? Between features, minus their means over a snapshot's features, which says nothing about
    training. Ranks, and 95 % intervals from a bootstrap over whole features.

    Args:
        table: the result of `probe_errors`.
        evolution: the `table` of `evolve(crosscoder, acts)`.
        without: indices of snapshots to leave out.
        n_bootstrap: bootstrap draws.
        seed: seed for the draws.

    Returns:
        A row per measure (r2, within, and norm, relative to the feature's largest) and part (within_features,
        between_features): measure, part, spearman, spearman_low, spearman_high, n (points), n_features. Points without
        a reading are left out.

    Raises:
        UserError: a snapshot that the table does not have, or fewer than two features.
    """
    wanted = evolution[["feature", "snapshot", "r2", "within", "strength"]]
    merged = table[["feature", "snapshot", "probe_error"]].merge(wanted, on=["feature", "snapshot"])
    rows: list[dict[str, Any]] = []
    for measure, column in (("r2", "r2"), ("within", "within"), ("norm", "strength")):
        points: Any = merged[["feature", "snapshot", column, "probe_error"]].dropna()
        for part, by in (("within_features", "feature"), ("between_features", "snapshot")):
            kept, counts, n_features = _prepare(points, without, n_bootstrap, seed)
            values = kept[[column, "probe_error"]].astype(float)
            values -= values.groupby(kept[by]).transform("mean")
            found = _correlations(values.to_numpy().T, counts)
            row = {name: value for name, value in found.items() if name.startswith("spearman")}
            rows.append({"measure": measure, "part": part, **row, "n": len(kept), "n_features": n_features})
    return pd.DataFrame(rows)


def describe_probes(table: pd.DataFrame) -> list[str]:
    """Correlations in two lines, within features first.

    Args:
        table: the result of `probe_presence`.
    """
    lines: list[str] = []
    for part, rows in table.groupby("part", sort=False):
        words = [
            f"{NAMES[row['measure']]} {row['spearman']:+.2f} [{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            for row in rows.to_dict("records")
        ]
        lines.append(f"probe error against presence, {str(part).replace('_', ' ')} (Spearman): {', '.join(words)}")
    return lines


def _prepare(
    table: pd.DataFrame, without: Collection[int], n_bootstrap: int, seed: int
) -> tuple[pd.DataFrame, Int[np.ndarray, "R n"], int]:
    """The rows to keep, and how often each is in every bootstrap draw of features; and the number of features."""
    known = sorted(set(table["snapshot"].tolist()))
    for s in without:
        if s not in known:
            raise UserError(f"without={s} is not a snapshot of this table, which has {', '.join(map(str, known))}")
    kept: Any = table[~table["snapshot"].isin(list(without))].reset_index(drop=True)
    features, owner = np.unique(kept["feature"], return_inverse=True)
    n = len(features)
    if n < 2:
        raise UserError(f"a correlation needs 2 or more features, the table has {n}: probe more features")
    drawn = np.stack([np.bincount(picks, minlength=n) for picks in resample(n, n_bootstrap, seed)])
    return kept, np.vstack([np.ones(n, dtype=int), drawn])[:, owner], n


def _correlations(values: Any, counts: Int[np.ndarray, "R n"]) -> dict[str, float]:
    """Both correlations of the first two rows, with intervals; corrected for noise if two more rows are given.

    The first row of `counts` is the measurement, the others are draws.
    """
    result: dict[str, float] = {}
    for name, rows in (("spearman", [ranks_in_draws(row, counts) for row in values]), ("pearson", values)):
        found = correlation(rows[0], rows[1], counts)
        if len(rows) > 2:
            found = found / np.sqrt(_reliability(rows[2], rows[3], counts))
        low, high = interval(found[1:])
        result |= {name: float(found[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return result


def _reliability(first: Any, second: Any, counts: Any = None) -> Any:
    """Reliability of the mean of two errors; NaN if they are not positively correlated."""
    between = correlation(first, second, counts)
    return np.where(between > 0, 2 * between / (1 + between), np.nan)


@torch.no_grad()
def _samples(
    crosscoder: Crosscoder,
    acts: Activations,
    features: Int[Tensor, " n"],
    per_class: int,
    max_tokens: int,
    negatives: str = "any",
) -> tuple[Float[Tensor, "N S D"], Int8[Tensor, "N n"], Int[Tensor, " N"] | None]:
    """Raw activations and labels of the first `per_class` active and inactive tokens of each feature in the stream.

    Labels are 1 for active, 0 for inactive and -1 where a feature does not use the token. Tokens used by no feature are
    dropped. With `negatives="same_token"` the token ids come last.
    """
    size = min(batch_tokens(crosscoder.cfg.d_sae), max_tokens)
    have = torch.zeros(2, len(features), dtype=torch.int64)  # inactive and active tokens so far
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    ids: list[Tensor] = []
    matched = negatives == "same_token"
    # live, the first batch would wait until a buffer of gigabytes is harvested
    in_sequences = matched or not acts.is_cached
    stream = _with_tokens(acts, size, max_tokens) if in_sequences else ((x, None) for x in acts.batches(size, epochs=1))
    seen = 0
    for x, tokens, active in _with_activity(crosscoder, stream, features):
        both = _same_tokens(active, tokens) if matched and tokens is not None else torch.stack([~active, active])
        wanted = both & (have[:, None] + both.cumsum(1) <= per_class)
        have += both.sum(1)
        label = torch.where(wanted[1], 1, torch.where(wanted[0], 0, -1)).to(torch.int8)
        used = (label >= 0).any(1)
        kept.append(x[used].cpu())
        labels.append(label[used])
        if matched and tokens is not None:
            ids.append(tokens[used])
        seen += len(x)
        if seen >= max_tokens or (have >= per_class).all():
            break
    return torch.cat(kept), torch.cat(labels), torch.cat(ids) if matched else None


def _with_activity(
    crosscoder: Crosscoder, stream: Iterable[tuple[Tensor, Tensor | None]], features: Int[Tensor, " n"]
) -> Iterator[tuple[Float[Tensor, "B S D"], Int[Tensor, " B"] | None, Bool[Tensor, "B n"]]]:
    """Add which features are active; where several processes work together, each encodes one of as many batches."""
    device = crosscoder.W_dec.device

    def active(x: Tensor) -> Tensor:
        return (crosscoder.encode(x.to(device))[:, features.to(device)] != 0).cpu()

    batches = iter(stream)
    while some := list(islice(batches, rank_and_size()[1])):
        found = each(active, [x for x, _ in some])
        yield from ((x, tokens, one) for (x, tokens), one in zip(some, found, strict=True))


def _with_tokens(
    acts: Activations, size: int, max_tokens: int
) -> Iterator[tuple[Float[Tensor, "B S D"], Int[Tensor, " B"]]]:
    """Yield training activations and their tokens, sequence by sequence; `Activations` has shuffled the sequences."""
    sequences = acts.train_tokens()
    step = min(acts.block_sequences, -(-max_tokens // max(1, int(acts.keep(sequences[:1]).sum()))))
    for first in range(0, len(sequences), step):
        tokens = sequences[first : first + step]
        kept = acts.keep(tokens)
        yield from zip(acts.block(first, first + len(tokens))[kept].split(size), tokens[kept].split(size), strict=True)


def _same_tokens(active: Bool[Tensor, "B n"], tokens: Int[Tensor, " B"]) -> Bool[Tensor, "2 B n"]:
    """Inactive and active tokens, the first ones of every token id, in equal numbers."""
    order = tokens.argsort(stable=True)
    _, group = tokens[order].unique_consecutive(return_inverse=True)
    both = torch.stack([~active, active])[:, order].long()
    counts = torch.zeros(2, int(group.max()) + 1, active.shape[1], dtype=torch.int64).index_add(1, group, both)
    before = counts.cumsum(1) - counts  # tokens with a smaller id
    place = both.cumsum(1) - before[:, group]
    chosen = both.bool() & (place <= counts.amin(0)[group])
    return torch.zeros_like(chosen).index_copy(1, order, chosen)


def _halves(labels: Any, per_half: int, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """(indices, labels) for training and testing, each with equal numbers of both classes."""
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in (0, 1)]
    m = min(per_half, *(len(indices) // 2 for indices in classes))
    y = np.repeat([0, 1], m)
    return [(np.concatenate([indices[start : start + m] for indices in classes]), y) for start in (0, m)]


def _paired_halves(labels: Any, tokens: Any, per_half: int, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """The same from pairs of one active and one inactive token with the same id, never split between the halves.

    Otherwise one half could have more active tokens of an id and the other fewer, and a probe that only reads ids would
    be wrong more often than chance.
    """
    classes: list[Any] = []
    for label in (0, 1):
        indices = rng.permutation(np.flatnonzero(labels == label))
        classes.append(indices[np.argsort(tokens[indices], kind="stable")])
    # the first tokens of every id and class, as many as both classes have
    places = [_place(tokens[indices]) for indices in classes]
    size = [dict(zip(*np.unique(tokens[indices], return_counts=True), strict=True)) for indices in classes]
    both = [
        indices[[place < min(one.get(t, 0) for one in size) for t, place in zip(tokens[indices], where, strict=True)]]
        for indices, where in zip(classes, places, strict=True)
    ]
    pairs = rng.permutation(np.stack(both, 1))
    m = min(per_half, len(pairs) // 2)
    y = np.repeat([0, 1], m)
    return [(pairs[start : start + m].T.reshape(-1), y) for start in (0, m)]


def _place(sorted_ids: Any) -> Any:
    """Number of earlier elements with the same id, in a sorted list."""
    return np.arange(len(sorted_ids)) - np.searchsorted(sorted_ids, sorted_ids)


def _probe_error(train: tuple[Any, Any], test: tuple[Any, Any]) -> float:
    (x, y), (other, truth) = train, test
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1  # constant coordinates
    regression = LogisticRegression(C=1.0, tol=1e-3, max_iter=1000).fit((x - mean) / scale, y)
    return float((regression.predict((other - mean) / scale) != truth).mean())
