"""Which snapshots to train a crosscoder on: similarity of activations, accuracy on tasks, and a proposal of k.

1. `snapshot_similarity` compares the activations of every pair of snapshots on the same tokens: the mean over tokens of
   the cosine and of the Pearson correlation over coordinates; and linear CKA (Kornblith et al., arXiv 1905.00414),
   `|X'Y|^2 / (|X'X| |Y'Y|)` in Frobenius norms with columns centred over tokens, which is invariant to rotations.
   Bayazit et al. (arXiv 2509.05291) use cosine and Pearson to choose snapshots by eye.
2. The distance of two snapshots is `(1 - weight) a + weight b`. a is 1 - similarity, divided by its largest value. b is
   the root mean square over tasks of the difference in accuracy, with the part expected by chance (the binomial
   variances of both) subtracted from the square, divided by its largest value.
3. `propose_snapshots` takes the first and the last snapshot that are not doubtful, and the k - 2 between them that
   minimise the sum of distances from every snapshot to the nearer of the two chosen ones around it. Since snapshots are
   ordered, dynamic programming finds the optimum. The search is new here.
4. `doubtful_snapshots` names those that a crosscoder is better trained without, since they take features from the
   others: untrained ones, whose variance is spread over many directions, and those nearly equal to one before. They are
   not proposed: on one family, a dictionary over twelve snapshots, five of them untrained or nearly so, found no birth
   by R2 that reversed time did not match, and one over the last six found 100 against 6.

The proposal only reflects what was measured: changes between saved snapshots, or changes that neither the tasks nor the
activations at this hook point show, are missed. Symbols: B tokens, S snapshots, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from crosslens.activations.loader import Activations
from crosslens.distributed.together import each
from crosslens.errors import UserError

SAMPLE = 4096
"""Held-out tokens that snapshots are compared on."""
_TOKENS = 512  # at a time
MEASURES = ("cosine", "pearson", "cka")


@torch.no_grad()
def snapshot_similarity(acts: Activations, *, max_tokens: int = SAMPLE) -> pd.DataFrame:
    """Compare the activations of every pair of snapshots on the same held-out tokens.

    Args:
        acts: activations of all candidate snapshots.
        max_tokens: held-out tokens to compare on; all their activations are in memory at once.

    Returns:
        A row per pair, including each snapshot with itself: snapshot, other (indices, snapshot <= other), label,
        other_label, cosine and pearson in [-1, 1], cka in [0, 1], n (tokens). Pearson and CKA are NaN if activations
        are constant.

    Raises:
        UserError: one snapshot only, or fewer than two tokens.
    """
    return _compare(acts, max_tokens).similarity


class Comparison(NamedTuple):
    """What is known of the snapshots' activations on some tokens."""

    similarity: pd.DataFrame
    """The result of `snapshot_similarity`."""
    ratios: Float[np.ndarray, " S"]
    """Participation ratio of every snapshot."""


def _compare(acts: Activations, max_tokens: int) -> Comparison:
    if acts.n_snapshots < 2:
        raise UserError(f"similarity needs at least 2 snapshots, but there is only {acts.n_snapshots}: add more")
    if max_tokens < 2:
        raise UserError(f"max_tokens={max_tokens} must be 2 or more")
    kept, n = list[Tensor](), 0
    for x in acts.held_out(min(max_tokens, SAMPLE)):
        kept.append(x[: max_tokens - n].cpu())
        n += len(kept[-1])
        if n >= max_tokens:
            break
    return compare([torch.cat(kept)[:, s] for s in range(acts.n_snapshots)] if n else [], acts.snapshots.labels)


@torch.no_grad()
def compare(x: list[Float[Tensor, "n D"]], labels: list[str]) -> Comparison:
    """Compare the activations of S snapshots, whose scale does not matter.

    Raises:
        UserError: fewer than two tokens.
    """
    n, S = len(x[0]) if x else 0, len(x)
    if n < 2:
        raise UserError(f"{n} token(s) are held out: give Dataset(held_out_tokens=...) of 2 or more")
    cosine, pearson = torch.zeros(2, S, S, dtype=torch.float64)
    for part in range(0, n, _TOKENS):
        rows = torch.stack([one[part : part + _TOKENS] for one in x]).double()
        around = rows - rows.mean(-1, keepdim=True)
        rows, around = normalize(rows, dim=-1, eps=1e-8), around / around.norm(dim=-1, keepdim=True)
        cosine += rows.flatten(1) @ rows.flatten(1).T
        pearson += around.flatten(1) @ around.flatten(1).T
    around = [(one.double() - one.double().mean(0)).float() for one in x]
    shared = torch.zeros(S, S, dtype=torch.float64)
    pairs = list(combinations_with_replacement(range(S), 2))
    products = each(lambda pair: (around[pair[0]].T @ around[pair[1]]).double().square().sum(), pairs)
    for (s, t), product in zip(pairs, products, strict=True):
        shared[s, t] = product
    own = shared.diagonal()
    cka = (shared / (own[:, None] * own).sqrt()).masked_fill(own[:, None] * own == 0, torch.nan)
    one, other = (index.numpy() for index in torch.triu_indices(S, S))
    names = np.array(labels)
    similarity = pd.DataFrame(
        {
            "snapshot": one,
            "other": other,
            "label": names[one],
            "other_label": names[other],
            "cosine": (cosine / n).numpy()[one, other],
            "pearson": (pearson / n).numpy()[one, other],
            "cka": cka.numpy()[one, other],
            "n": n,
        }
    )
    # tr(C)^2 / tr(C^2) of the covariances
    ratios = torch.stack([one.double().square().sum() ** 2 for one in around]) / own
    return Comparison(similarity, ratios.numpy())


@torch.no_grad()
def doubtful_snapshots(
    acts: Activations,
    share: Float[Tensor, "F S"] | None = None,
    comparison: Comparison | None = None,
    *,
    max_tokens: int = SAMPLE,
    max_ratio: float = 1.5,
    max_similarity: float = 0.99,
    min_similarity: float = 0.2,
    max_fall: float = 3.0,
) -> pd.DataFrame:
    """Name the snapshots that a crosscoder is better trained without, and why.

    A snapshot is named if

    - its step is 0: it is untrained;
    - the participation ratio of its activations, `(sum of variances)^2 / sum of squared variances` over principal
      directions, is more than `max_ratio` times that of the last snapshot: so are those of untrained models;
    - or is more than `max_fall` times that of a later one. Directions of a random model are many; first training leaves
      the few that carry the statistics of tokens, from which the others grow. Before this a model is as if untrained;
    - CKA to a snapshot before it, named or not, or to the last one, is `max_similarity` or more: it adds next to
      nothing. The last snapshot itself is not named for this, it stands for the trained model;
    - there are three snapshots or more, and CKA to each of the others is less than `min_similarity`: a crosscoder then
      spends features on it alone, which vanish at the next snapshot. Neither is the last snapshot named for this;
    - the median of its encoder shares exceeds 3 / S: features are mostly read from it.

    Args:
        acts: activations of all snapshots; the held-out ones are used.
        share: the result of `encoder_share` for a crosscoder over them; without it the last reason is not examined.
        comparison: what is known of the activations already; read here if None.
        max_tokens: held-out tokens to compare on; all their activations are in memory at once.
        max_ratio: largest participation ratio, relative to the last snapshot.
        max_similarity: CKA from which on two snapshots are near duplicates.
        min_similarity: CKA below which two snapshots have next to nothing in common.
        max_fall: participation ratio, relative to the smallest of a later snapshot.

    Returns:
        A row per snapshot: snapshot, label, step, participation_ratio, similarity (largest CKA to one before it or
        to the last), encoder_share (median over features, NaN without `share`), reason (empty if there is none).

    Raises:
        UserError: one snapshot only, or fewer than two tokens.
    """
    found = _compare(acts, max_tokens) if comparison is None else comparison
    similarity, ratios, S = found.similarity.set_index(["snapshot", "other"])["cka"], found.ratios, len(found.ratios)
    snapshots = acts.snapshots
    medians = np.full(S, np.nan) if share is None else share.nanmedian(0).values.numpy()
    rows: list[dict[str, Any]] = []
    for s, (label, step) in enumerate(zip(snapshots.labels, snapshots.steps, strict=True)):
        row: dict[str, Any] = {"snapshot": s, "label": label, "step": step, "participation_ratio": ratios[s]}
        others = [*range(s), S - 1] if s < S - 1 else list(range(s))
        near = np.array([similarity[min(t, s), max(t, s)] for t in others])
        nearest_of_all = max(similarity[min(t, s), max(t, s)] for t in range(S) if t != s)
        row["similarity"] = near.max()
        row["encoder_share"] = medians[s]
        reasons: list[str] = []
        if step == 0:
            reasons.append("untrained (step 0)")
        if ratios[s] > max_ratio * ratios[-1]:
            reasons.append(f"as if untrained (participation ratio {ratios[s]:.1f}, {ratios[-1]:.1f} at the end)")
        elif ratios[s] > max_fall * ratios[s:].min():
            lowest = s + int(ratios[s:].argmin())
            reasons.append(
                f"before the first training took effect (participation ratio {ratios[s]:.1f}, {ratios[lowest]:.1f} at "
                f"{snapshots.labels[lowest]})"
            )
        if row["similarity"] >= max_similarity and s < S - 1:
            nearest = snapshots.labels[others[int(near.argmax())]]
            reasons.append(f"nearly equal to {nearest} (CKA {row['similarity']:.3f})")
        if nearest_of_all < min_similarity and S > 2 and s < S - 1:
            reasons.append(f"next to nothing in common with any other (CKA {nearest_of_all:.2f} at most)")
        if medians[s] > 3 / S:
            reasons.append(f"most features are read from it (median encoder share {medians[s]:.0%}, 3/S = {3 / S:.0%})")
        rows.append({**row, "reason": "; ".join(reasons)})
    table = pd.DataFrame(rows)
    return table.assign(step=table["step"].astype("Int64"))


def untrained_steps(labels: Sequence[str], steps: Sequence[int | None]) -> list[str]:
    """What can be said of snapshots before any model is run: which are untrained, by their steps; in lines as below.

    Args:
        labels: of the snapshots.
        steps: training steps, where known.
    """
    table = pd.DataFrame({"label": list(labels), "step": pd.array(list(steps), dtype="Int64")})
    table["reason"] = ["untrained (step 0)" if step == 0 else "" for step in steps]
    return describe_doubtful(table)


def describe_doubtful(table: pd.DataFrame) -> list[str]:
    """What was found, a line per snapshot, and the `--steps` that leave these out; no lines if there are none.

    Args:
        table: the result of `doubtful_snapshots`.
    """
    named: pd.DataFrame = table.loc[table["reason"] != ""]
    if named.empty:
        return []
    lines = [f"{row['label']}: {row['reason']}" for row in named.to_dict("records")]
    left: pd.DataFrame = table.loc[table["reason"] == ""]
    if len(left) >= 2 and left["step"].notna().all():
        lines.append(f"to leave these out: --steps {','.join(map(str, left['step']))}")
    return lines


def propose_snapshots(
    similarity: pd.DataFrame,
    k: int,
    accuracy: pd.DataFrame | None = None,
    *,
    measure: str = "cka",
    weight: float = 0.5,
    steps: Sequence[int | None] | None = None,
    doubtful: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Propose the k snapshots that best represent all of them, and say why.

    Args:
        similarity: the result of `snapshot_similarity`.
        k: number of snapshots, 2 or more; at most all, or all that are not doubtful.
        accuracy: the result of `Task.accuracy` for the same snapshots; concatenate the tables of several tasks.
        measure: "cosine", "pearson" or "cka".
        weight: weight of accuracy relative to similarity, in [0, 1]; ignored without accuracy.
        steps: training steps of the snapshots, for the table.
        doubtful: the result of `doubtful_snapshots`: what it names is neither chosen nor represented, unless fewer than
            two snapshots would be left.

    Returns:
        A row per snapshot: snapshot, label, step, chosen, stands_for (labels represented by a chosen snapshot), nearest
        (label of the chosen snapshot that represents it; missing for a doubtful one), distance (to that one),
        previous_similarity (to the snapshot before), cost (increase in the summed distance without this chosen
        snapshot), and reason, in words, for what is chosen and for what is doubtful; with `accuracy`, accuracy/<task>.

    Raises:
        UserError: k out of range, an unknown measure, a weight outside [0, 1], accuracy of other snapshots.
    """
    ends = [similarity[["snapshot", "label"]], similarity[["other", "other_label"]]]
    labels: dict[int, str] = {s: label for rows in ends for s, label in rows.itertuples(index=False)}
    S = max(labels) + 1
    names = [labels.get(s, str(s)) for s in range(S)]
    doubts = [""] * S if doubtful is None else doubtful.sort_values("snapshot")["reason"].tolist()
    if len(doubts) != S:
        raise UserError(f"doubtful has {len(doubts)} snapshots, similarity has {S}: measure both on the same snapshots")
    kept = np.flatnonzero(np.array(doubts) == "")
    if len(kept) < 2:
        kept = np.arange(S)
    if doubtful is not None:
        k = min(k, len(kept))
    if not 2 <= k <= S:
        raise UserError(f"k={k} is not in [2, {S}]: the first and the last of the {S} snapshots are always chosen")
    if measure not in MEASURES:
        raise UserError(f"measure={measure!r} is unknown: use {', '.join(map(repr, MEASURES))}")
    if not 0 <= weight <= 1:
        raise UserError(f"weight={weight} is not in [0, 1]: it is the weight of accuracy in the distance")
    if steps is not None and len(steps) != S:
        raise UserError(f"{len(steps)} steps for {S} snapshots: give one per snapshot")
    pairwise = np.full((S, S), np.nan)
    pairs = similarity[["snapshot", "other"]].to_numpy()
    pairwise[pairs[:, 0], pairs[:, 1]] = pairwise[pairs[:, 1], pairs[:, 0]] = similarity[measure].to_numpy(dtype=float)
    if np.isnan(pairwise).any():
        raise UserError(
            f"{measure} is missing for some pairs of the {S} snapshots: give the whole table of snapshot_similarity"
        )
    curves = _curves(accuracy, names) if accuracy is not None else {}
    distance = _scaled(1 - pairwise[np.ix_(kept, kept)])
    if curves:
        of_kept = {task: (value[kept], variance[kept]) for task, (value, variance) in curves.items()}
        distance = (1 - weight) * distance + weight * _scaled(_accuracy_distance(of_kept))
    cost = _segments(distance)
    path = np.array(_best_path(cost, k))  # places in `kept`, as are `nearest` and `distance`
    n = np.arange(len(kept))
    later = np.clip(np.searchsorted(path, n), 1, k - 1)
    both = np.stack([path[later - 1], path[later]], 1)
    nearest = np.where(np.isin(n, path), n, both[n, distance[n[:, None], both].argmin(1)])
    chosen = kept[path].tolist()
    table = pd.DataFrame({"snapshot": np.arange(S), "label": names})
    table["step"] = pd.array([None] * S if steps is None else list(steps), dtype="Int64")
    table["chosen"] = np.isin(np.arange(S), chosen)
    table["nearest"] = pd.Series([names[i] for i in kept[nearest]], index=kept)
    table["distance"] = pd.Series(distance[n, nearest], index=kept)
    table["stands_for"] = [
        ", ".join(names[i] for i in kept[kept[nearest] == s]) if s in chosen else "" for s in range(S)
    ]
    table["previous_similarity"] = [np.nan, *(pairwise[s - 1, s] for s in range(1, S))]
    table["cost"] = np.nan
    for a, b, c in zip(path, path[1:], path[2:], strict=False):
        table.loc[kept[b], "cost"] = cost[a, c] - cost[a, b] - cost[b, c]
    for task, (value, _) in curves.items():
        table[f"accuracy/{task}"] = value
    left_out = set(range(S)) - set(kept.tolist())
    table["reason"] = [
        _reason(table, s, chosen, pairwise, measure, curves)
        if s in chosen
        else f"left out: {doubts[s]}"
        if s in left_out
        else ""
        for s in range(S)
    ]
    return table


def _scaled(distance: Any) -> Any:
    """Distances divided by the largest, or all zero."""
    distance = np.clip(distance, 0, None)  # rounding can make 1 - similarity negative
    np.fill_diagonal(distance, 0)
    return distance / distance.max() if distance.max() > 0 else distance


def _curves(accuracy: pd.DataFrame, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """Accuracy and its binomial variance by task, in the order of the snapshots."""
    curves: dict[str, tuple[Any, Any]] = {}
    for task, rows in accuracy.groupby("task", sort=False):
        rows = rows.sort_values("snapshot")
        if rows["label"].tolist() != names:
            raise UserError(
                f"accuracy on {task!r} has the snapshots {', '.join(map(str, rows['label']))}, similarity has "
                f"{', '.join(names)}: measure both on the same snapshots"
            )
        value, n = rows["accuracy"].to_numpy(dtype=float), rows["n"].to_numpy(dtype=float)
        curves[str(task)] = (value, value * (1 - value) / n)
    return curves


def _accuracy_distance(curves: dict[str, tuple[Any, Any]]) -> Any:
    squares = [(value[:, None] - value) ** 2 - (variance[:, None] + variance) for value, variance in curves.values()]
    return np.sqrt(np.clip(np.mean(squares, 0), 0, None))


def _segments(distance: Any) -> Any:
    """(S, S): summed distance of the snapshots between two chosen ones to the nearer of the two."""
    S = len(distance)
    cost = np.zeros((S, S))
    for a in range(S):
        for b in range(a + 2, S):
            between = slice(a + 1, b)
            cost[a, b] = np.minimum(distance[a, between], distance[b, between]).sum()
    return cost


def _best_path(cost: Any, k: int) -> list[int]:
    """The k indices from first to last with the lowest total cost, the earliest in a tie."""
    S = len(cost)
    best = np.full((k, S), np.inf)
    came = np.zeros((k, S), dtype=int)
    best[0, 0] = 0
    for j in range(1, k):
        for b in range(j, S):
            through = best[j - 1, :b] + cost[:b, b]
            came[j, b] = through.argmin()
            best[j, b] = through[came[j, b]]
    path = [S - 1]
    for j in range(k - 1, 0, -1):
        path.append(int(came[j, path[-1]]))
    return path[::-1]


def _reason(
    table: pd.DataFrame, s: int, chosen: list[int], pairwise: Any, measure: str, curves: dict[str, tuple[Any, Any]]
) -> str:
    """Why a snapshot was chosen."""
    place = chosen.index(s)
    which = "first" if place == 0 else "last" if place == len(chosen) - 1 else ""
    sure = "" if s in (0, len(table) - 1) else " that is not doubtful"
    parts = [f"the {which} snapshot{sure}"] if which else []
    others = table["stands_for"].iloc[s].count(",")
    if others:
        parts.append(f"stands for {others} other{'s' * (others > 1)}")
    if place:
        before = chosen[place - 1]
        label = table["label"].iloc[before]
        parts.append(f"{measure} {pairwise[before, s]:.2f} to {label}, the one chosen before")
        moves = {task: value[s] - value[before] for task, (value, _) in curves.items()}
        sure = {
            task: move
            for task, move in moves.items()
            if abs(move) > 2 * (curves[task][1][s] + curves[task][1][before]) ** 0.5
        }
        if sure:
            task = max(sure, key=lambda name: abs(sure[name]))
            value = curves[task][0]
            parts.append(f"accuracy on {task} {value[before]:.0%} to {value[s]:.0%} since then")
    if np.isfinite(table["cost"].iloc[s]):
        parts.append(f"without it the summed distance grows by {table['cost'].iloc[s]:.3f}")
    return "; ".join(parts)
