"""Is a feature there before its decoder says so? Linear probes for single features, snapshot by snapshot.

For a feature i and a snapshot s (after Ge et al., arXiv 2509.17196, who do not publish their settings):

1. Every token is labelled by the crosscoder, "f_i is active" or not, from the clean activations of all snapshots. The
   labels are the same for every snapshot.
2. Equally many active and inactive tokens are taken from the shuffled training activations, `n_samples` at most.
3. Half of each class trains a logistic regression on the raw activations of snapshot s, standardised by that half; the
   probe error is the share of the other half that it gets wrong: .5 is chance.

The claim to test is that the error is low where the decoder norm is high (`probe_correlation`). Rare features are
judged on fewer tokens, which raises their error: `n` says on how many. `min_samples = n_samples` makes them equal.

The settings, scikit-learn's `lbfgs` with C = 1 and tolerance 1e-3, were chosen by error and time alone on 12 features
of 10 snapshots with D = 128. C = .01 made .03 more errors; C = 10, a tolerance of 1e-4, or 4000 tokens at most .005
fewer for up to twice the time; `newton-cholesky` as many, no faster.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Int8
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.activations import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution import batch_tokens, firing_rates, relative_norms, snapshot_columns

_MARGIN = 1.5  # a feature is tried when it should fire so much more often than it must


def probe(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    n_features: int = 50,
    n_samples: int = 2000,
    seed: int = 0,
    min_samples: int = 400,
    max_tokens: int = 50_000,
) -> pd.DataFrame:
    """Held-out error of a linear probe for some live features at every snapshot.

    Args:
        crosscoder: trained on the snapshots of `acts`.
        acts: features are chosen by their firing rates on the held-out activations, probes use the training ones.
        n_features: features to draw at random from those that fire often enough; fewer when there are fewer.
        n_samples: tokens per feature at most, half of them active; train and test together.
        seed: of the features and of the halves.
        min_samples: tokens per feature at least; features with less are not probed.
        max_tokens: training activations to look at, in whole batches; those that are used stay in memory, S * D * 4
            bytes each.

    Returns:
        A row per feature and snapshot: feature, snapshot, label, step, norm (relative to the feature's largest),
        probe_error, n (tokens, half for training and half for testing).

    Raises:
        UserError: a number that is out of range, or no feature that fires often enough, and seldom enough.
    """
    for name, value, least in (("n_features", n_features, 1), ("min_samples", min_samples, 4)):
        if value < least:
            raise UserError(f"{name}={value} is too small: give {least} or more")
    if n_samples < min_samples:
        raise UserError(f"n_samples={n_samples} is less than min_samples={min_samples}: raise it, or lower min_samples")
    available = min(max_tokens, acts.n_tokens)
    rates = firing_rates(crosscoder, acts)
    expected = torch.minimum(rates, 1 - rates) * available
    eligible = (expected >= _MARGIN * min_samples / 2).nonzero().squeeze(1).numpy()
    if not len(eligible):
        raise UserError(
            f"no feature is active, and inactive, on {min_samples // 2} of {available} tokens: lower "
            f"min_samples={min_samples}, or raise max_tokens={max_tokens} and the tokens of the activations"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(eligible, min(n_features, len(eligible)), replace=False))
    x, labels = _samples(crosscoder, acts, torch.from_numpy(chosen), n_samples // 2, available)
    v, snapshots = relative_norms(crosscoder.decoder_norms), snapshot_columns(crosscoder)
    rows: list[dict[str, Any]] = []
    for column, feature in enumerate(tqdm(chosen.tolist(), desc="Probing", unit="feature", leave=False)):
        halves = _halves(labels[:, column].numpy(), n_samples // 4, rng)
        n = sum(len(indices) for indices, _ in halves)
        if n < min_samples:
            continue
        # the problems are small: handing their products to several threads costs more than it saves
        with threadpool_limits(1):
            errors = [
                _probe_error(*((x[indices, s].numpy(), y) for indices, y in halves))
                for s in range(crosscoder.n_snapshots)
            ]
        rows += [
            {"feature": feature, "snapshot": s, "norm": float(v[feature, s]), "probe_error": error, "n": n}
            for s, error in enumerate(errors)
        ]
    table = pd.DataFrame(rows, columns=["feature", "snapshot", "norm", "probe_error", "n"])
    for place, name in ((2, "label"), (3, "step")):
        table.insert(place, name, snapshots[name].take(table["snapshot"].tolist()).array)
    return table


def probe_correlation(
    table: pd.DataFrame, *, without: Collection[int] = (), n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Correlation of probe error and relative decoder norm over features and snapshots.

    The intervals (95 %, percentiles) come from drawing whole features with replacement: the snapshots of one feature
    are no independent evidence.

    Args:
        table: as `probe` returns it.
        without: indices of snapshots to leave out, such as the untrained one.
        n_bootstrap: draws.
        seed: of the draws.

    Returns:
        spearman, spearman_low, spearman_high, pearson, pearson_low, pearson_high (NaN where either is constant),
        n (points) and n_features.

    Raises:
        UserError: a snapshot that the table does not have, or fewer than two features.
    """
    known = sorted(set(table["snapshot"].tolist()))
    for s in without:
        if s not in known:
            raise UserError(f"without={s} is no snapshot of this table: it has {', '.join(map(str, known))}")
    kept = table[~table["snapshot"].isin(list(without))]
    members = [np.asarray(rows) for rows in kept.reset_index(drop=True).groupby("feature").indices.values()]
    if len(members) < 2:
        raise UserError(f"a correlation over {len(members)} feature(s) says nothing: probe 2 or more, at some snapshot")
    pair = np.stack([kept["norm"], kept["probe_error"]]).astype(float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(members), size=(n_bootstrap, len(members)))
    draws = [np.concatenate([members[i] for i in pick]) for pick in picks]
    result: dict[str, float] = {}
    measures: dict[str, Callable[[Any], Any]] = {"spearman": lambda rows: rankdata(rows, axis=1), "pearson": np.asarray}
    for name, transform in measures.items():
        result[name] = _correlation(transform(pair))
        resampled = [_correlation(transform(pair[:, draw])) for draw in draws]
        low, high = np.nanquantile(resampled, [0.025, 0.975]) if np.isfinite(resampled).any() else (np.nan, np.nan)
        result |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return {**result, "n": pair.shape[1], "n_features": len(members)}


@torch.no_grad()
def _samples(
    crosscoder: Crosscoder, acts: Activations, features: Int[Tensor, " n"], per_class: int, max_tokens: int
) -> tuple[Float[Tensor, "N S D"], Int8[Tensor, "N n"]]:
    """Raw activations of the first tokens of the shuffled stream on which a feature is active, or is not.

    Labels are 1 for active, 0 for inactive, -1 where a token is not for this feature: of each class the first
    `per_class`. Tokens that are for no feature are dropped at once.
    """
    size = min(batch_tokens(crosscoder.cfg.d_sae), max_tokens)
    have = torch.zeros(2, len(features), dtype=torch.int64)  # of the inactive, and of the active
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    for i, x in enumerate(acts.batches(size, epochs=1), start=1):
        active = (crosscoder.encode(x.to(crosscoder.W_dec.device))[:, features.to(crosscoder.W_dec.device)] != 0).cpu()
        both = torch.stack([~active, active])
        wanted = both & (have[:, None] + both.cumsum(1) <= per_class)
        have += both.sum(1)
        label = torch.where(wanted[1], 1, torch.where(wanted[0], 0, -1)).to(torch.int8)
        used = (label >= 0).any(1)
        kept.append(x[used].cpu())
        labels.append(label[used])
        if i * size >= max_tokens or (have >= per_class).all():
            break
    return torch.cat(kept), torch.cat(labels)


def _halves(labels: Any, per_half: int, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """(indices, labels) for training and for testing, each with equally many tokens of both classes."""
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in (0, 1)]
    m = min(per_half, *(len(indices) // 2 for indices in classes))
    y = np.repeat([0, 1], m)
    return [(np.concatenate([indices[start : start + m] for indices in classes]), y) for start in (0, m)]


def _probe_error(train: tuple[Any, Any], test: tuple[Any, Any]) -> float:
    (x, y), (other, truth) = train, test
    mean, scale = x.mean(0), x.std(0)
    scale[scale == 0] = 1  # a constant coordinate tells nothing
    regression = LogisticRegression(C=1.0, tol=1e-3, max_iter=1000).fit((x - mean) / scale, y)
    return float((regression.predict((other - mean) / scale) != truth).mean())


def _correlation(pair: Any) -> float:
    a, b = pair - pair.mean(1, keepdims=True)
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")
