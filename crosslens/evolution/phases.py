"""The statistical and the feature phase of training: which leads, by how much, and whether the snapshots can tell.

1. *Statistical progress* P(s): KL2 (see `dynamics`) falls while the model learns bigram statistics. P is the share of
   its total fall reached by s: 0 at the first snapshot, 1 from the minimum on.
2. *Feature progress* Q(s): the share of features that have settled by s: from s on, the cosine of their decoder row
   with the one at the last snapshot is >= `min_cosine`. Q is 1 at the last snapshot. Where other seeds were trained,
   `evolve` of a run takes the cosine of the median angle between partners in two seeds at the last snapshot: a seed
   determines no direction more closely than that. Otherwise it is .5, or 60 degrees. Births do not measure this:
   features that are strong in the untrained model are not born later, but their directions still change.
3. *Two leads*: that of statistics is the largest P - Q, that of features the largest Q - P, each at its snapshot and 0
   or more. The largest of P - Q alone is positive for almost any two curves that end at 1, so one lead says nothing
   without the other.
4. *The turning point* is the snapshot where P - Q is largest: before it statistics are learnt faster than features,
   after it features are, each relative to its own total. There is none if the features' lead is the larger one.
5. *Unresolved*: if one interval between neighbouring snapshots holds `most` (90 %) or more of the rise of P or of Q,
   the order of the two is decided by where snapshots happen to be. The leads are then bounds at these snapshots, and
   there is no turning point.
6. Other events: the minimum of KL1 ("unigram") and KL2 ("bigram"); the loss falling below H2 for good
   ("below_bigram"); the median birth of emergent features ("births") and the median settling ("settling"); and the
   total dimensionality, after its minimum, having risen half-way to its last value ("dimensionality").
7. Intervals come from a bootstrap over whole sequences and whole features. Snapshots form a grid, and an event may lie
   anywhere between the neighbours of the snapshot where it is seen. Intervals therefore run from the snapshot before
   the lowest draws to the one after the highest (to the snapshot itself for events that are a first occurrence).

Limits. Settling is relative to the last snapshot: if the run is cut off while directions still rotate, settling comes
late by definition and the lead is too large. The same holds for P if the minimum of KL2 is at the last snapshot (its
event is then `at_edge`). If the phases overlap, the turning point depends on `min_cosine`: try several. Measure the
predictions of the untrained model too, whether or not the crosscoder has it: without it P has no true 0. KL2 needs
counts of enough text: contexts seen once look deterministic and inflate it (`min_count` leaves them out). A learning
rate warmup that ends near the turning point may be its cause, and the order of two events is no evidence of causation.
The intervals do not include the variation between pretraining runs.
The two phases are those of Ge et al. (arXiv 2509.17196); the definitions are new here.

Symbols: S snapshots, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.dynamics import (
    MIN_COSINE,
    Dynamics,
    bigram_progress,
    dynamics_table,
    feature_dates,
    first_for_good,
    measure_predictions,
    places_of,
    read_evolution,
)
from crosslens.evolution.firing import Firing
from crosslens.evolution.history import Evolution, evolve
from crosslens.evolution.lifecycles import PRESENCE
from crosslens.evolution.ngrams import NgramCounts, count_ngrams
from crosslens.evolution.selection import propose_snapshots
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import interval

_PREDICTED = 30_000  # tokens whose predictions `measure_dynamics` measures, at least, where the data has as many
_COLUMNS = [
    *(
        "event",
        "snapshot",
        "label",
        "step",
        "tokens",
        "snapshot_low",
        "snapshot_high",
        "step_low",
        "step_high",
        "at_edge",
    ),
    *("agreement", "after_turning_point", "n", "lead", "lead_low", "lead_high"),
    *("resolved", "jump", "jump_of", "jump_from", "jump_to"),
]


def find_phases(
    dynamics: Dynamics,
    crosscoder: Crosscoder | None = None,
    acts: Activations | Firing | Evolution | None = None,
    *,
    presence: float = PRESENCE,
    min_cosine: float = MIN_COSINE,
    level: float = 0.95,
    most: float = 0.9,
    seed: int = 0,
) -> pd.DataFrame:
    """Locate the statistical and the feature phase, the leads of both, and the events around them.

    Args:
        dynamics: dynamics of two snapshots or more.
        crosscoder: crosscoder of some of these snapshots; without it only events of the predictions are found.
        acts: as in `dynamics_table`: the result of `evolve`, whose first measure dates births, or for decoder norms
            activations of its snapshots or the result of `measure_firing`.
        presence: without an `Evolution`, a feature is present where its norm is at least this share of its largest.
        min_cosine: a feature is settled while its cosine with its row at the last snapshot is at least this.
        level: confidence level of the intervals.
        most: share of a curve in one interval from which the order of the phases is unresolved.
        seed: seed for the draws of features; those of sequences are the dynamics'.

    Returns:
        A row per event: event, snapshot (index, missing if it never happens), label, step, tokens; low and high
        (indices), step_low, step_high; at_edge (at the first or last snapshot, where it means little); agreement (share
        of draws with the same snapshot); after_turning_point (share of draws in which it is later than the turning
        point; NaN without one); n (number of features, for births and settling). The events statistics_lead,
        features_lead and turning_point also have lead, lead_low, lead_high; resolved; and the largest part of a curve
        in one interval: jump (its share), jump_of ("statistics" or "features"), jump_from and jump_to (labels).
        Dimensionality is not resampled.

    Raises:
        UserError: one snapshot only, a crosscoder without activations, or with snapshots that the dynamics lack.
    """
    S = len(dynamics.snapshots)
    if S < 2:
        raise UserError(f"phases need at least 2 snapshots, but there is only {S}: measure more")
    # the first row is the measurement, the others are draws
    kl1, kl2, loss, n_bootstrap = dynamics.kl1, dynamics.kl2, dynamics.loss, dynamics.n_bootstrap
    events = [_Event("unigram", kl1.argmin(1), reach=1), _Event("bigram", kl2.argmin(1), reach=1)]
    events.append(_Event("below_bigram", first_for_good(loss < dynamics.bigram_entropy)))
    if crosscoder is None:
        return _table(events, dynamics.snapshots, level)
    if acts is None:
        raise UserError("acts=None: activations are needed to find the live features of the crosscoder")
    if not 0 < most <= 1:
        raise UserError(f"most={most} is not in (0, 1]: it is a share of a curve, such as 0.9")
    places = np.array(places_of(dynamics, crosscoder))
    evolution = read_evolution(crosscoder, acts, presence)
    births, settling = feature_dates(evolution, min_cosine)
    rng = np.random.default_rng(seed + 1)
    born, settled = (_shares(when, len(places), n_bootstrap, rng) for when in (births, settling))
    progress = bigram_progress(kl2)
    ahead = progress[:, places] - settled
    jump = max(
        _jump("statistics", progress[0], np.arange(S), dynamics.snapshots),
        _jump("features", settled[0], places, dynamics.snapshots),
        key=lambda row: row["jump"],
    )
    jump["resolved"] = bool(jump["jump"] < most)
    leads = {"statistics": np.maximum(ahead.max(1), 0), "features": np.maximum(-ahead.min(1), 0)}
    when = {
        "statistics": np.where(ahead.max(1) > 0, places[ahead.argmax(1)], S),
        "features": np.where(ahead.min(1) < 0, places[ahead.argmin(1)], S),
    }
    turns = when["statistics"] if jump["resolved"] else np.full(n_bootstrap + 1, S)
    turns = np.where(leads["statistics"] > leads["features"], turns, S)
    events[:0] = [
        _Event("turning_point", turns, reach=1, lead=leads["statistics"], jump=jump),
        _Event("statistics_lead", when["statistics"], reach=1, lead=leads["statistics"], jump=jump),
        _Event("features_lead", when["features"], reach=1, lead=leads["features"], jump=jump),
    ]
    for name, shares, n in (("births", born, len(births)), ("settling", settled, len(settling))):
        half = shares >= 0.5
        events.append(_Event(name, np.where(half.any(1), places[half.argmax(1)], S), n=n))
    total = evolution.dimensionality["share"].to_numpy()
    least = int(total.argmin())
    half = (total >= (total[least] + total[-1]) / 2) & (np.arange(len(total)) > least)
    when = places[half.argmax()] if half.any() else S
    events.append(_Event("dimensionality", np.full(n_bootstrap + 1, when), drawn=False))
    return _table(events, dynamics.snapshots, level)


def measure_dynamics(
    crosscoder: Crosscoder,
    acts: Activations,
    counts: NgramCounts | None = None,
    *,
    evolution: Evolution | None = None,
    snapshots: Snapshots | None = None,
    accuracy: pd.DataFrame | None = None,
    min_cosine: float = MIN_COSINE,
    n_proposed: int = 5,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Measure how predictions and features change together, and propose snapshots.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; predictions are measured on the held-out tokens, and where these are
            fewer than 30,000 on the last of those for training too.
        counts: unigrams and bigrams of the pretraining corpus, by `count_ngrams`; of the crosscoder's training tokens
            if None. With few tokens the bigram entropy is too small, the bigram KL too large, and the loss falls below
            the entropy too late, so count as much text as possible.
        evolution: the result of `evolve(crosscoder, acts)`, which says when features are present and which snapshots
            are doubtful and not proposed; read here if None.
        snapshots: snapshots whose predictions are measured, those of `acts` among them: with the untrained model, which
            crosscoders do without, the fall of the bigram KL begins at 0. Those of `acts` if None.
        accuracy: the result of `Task.accuracy`, for the proposal of snapshots; concatenate the tables of several tasks.
        min_cosine: a feature is settled while its cosine with its row at the last snapshot is at least this; where
            other seeds were trained, that of partners in two seeds.
        n_proposed: number of snapshots to propose, at most all.
        seed: seed for the intervals.

    Returns:
        The tables dynamics (of `dynamics_table`), phases (of `find_phases`), similarity (of `snapshot_similarity`) and
        selection (of `propose_snapshots`).

    Raises:
        UserError: one snapshot only, counts of another tokenizer, activations of other snapshots, an evolution that was
            read without activations.
    """
    evolution = evolve(crosscoder, acts, seed=seed) if evolution is None else evolution
    if evolution.pass_ is None:
        raise UserError("this evolution was read without activations: give evolve(crosscoder, acts)")
    counts = count_ngrams(acts.train_tokens(), acts.snapshots.tokenizer) if counts is None else counts
    tokens = predicted_tokens(acts)
    measured = measure_predictions(snapshots or acts.snapshots, counts, tokens, seed=seed, settings=acts.settings)
    similarity, doubtful = evolution.pass_.similarity, evolution.pass_.doubtful
    return {
        "dynamics": dynamics_table(measured, crosscoder, evolution, min_cosine=min_cosine, seed=seed),
        "phases": find_phases(measured, crosscoder, evolution, min_cosine=min_cosine, seed=seed),
        "similarity": similarity,
        "selection": propose_snapshots(similarity, n_proposed, accuracy, steps=acts.snapshots.steps, doubtful=doubtful),
    }


def predicted_tokens(acts: Activations) -> Int[Tensor, "N T"]:
    """The sequences whose predictions `measure_dynamics` measures.

    Averages over contexts need many; the crosscoder's training does not touch the models' predictions.
    """
    return acts.tokens[-max(len(acts.held_out_tokens()), -(-_PREDICTED // acts.tokens.shape[1])) :]


@dataclass(frozen=True)
class _Event:
    """Snapshot of an event, as measured and in every draw (S if never); it may lie up to `reach` snapshots later."""

    name: str
    when: Any
    reach: int = 0
    n: int | None = None
    lead: Any = None
    jump: Any = None
    drawn: bool = True

    def row(self, S: int, level: float, turning_point: Any) -> dict[str, Any]:
        at, draws = int(self.when[0]), self.when[1:]
        row: dict[str, Any] = {"event": self.name, "n": self.n, "at_edge": at in (0, S - 1)}
        if at < S:
            low, high = interval(draws, level, method="inverted_cdf")
            row |= {
                "snapshot": at,
                "snapshot_low": max(0, int(low) - 1),
                "snapshot_high": min(S - 1, int(high) + self.reach),
            }
            if turning_point is not None and self.name != "turning_point" and not self.jump:
                row["after_turning_point"] = float((draws > turning_point).mean())
        row["agreement"] = float((draws == at).mean()) if self.drawn else np.nan
        if self.jump is not None:
            row |= self.jump
        if self.lead is not None:
            row["lead"] = float(self.lead[0])
            row["lead_low"], row["lead_high"] = map(float, interval(self.lead[1:], level))
        return row


def _jump(name: str, curve: Any, places: Any, snapshots: pd.DataFrame) -> dict[str, Any]:
    """The interval between neighbouring snapshots with the largest rise of a curve, and its share of the whole rise.

    What the curve has reached by its first snapshot counts as one interval, which begins nowhere.
    """
    rises = np.diff(curve, prepend=0.0)
    at = int(rises.argmax())
    labels = snapshots["label"].iloc[places].tolist()
    total = float(curve[-1])
    return {
        "jump": float(rises[at]) / total if total > 0 else 0.0,
        "jump_of": name,
        "jump_from": labels[at - 1] if at else None,
        "jump_to": labels[at],
    }


def _shares(when: Any, S: int, n_bootstrap: int, rng: np.random.Generator) -> Any:
    """(1 + draws, S) share of features whose date is s or earlier; 0 if there are none."""
    if not len(when):
        return np.zeros((n_bootstrap + 1, S))
    counts = np.bincount(when, minlength=S)
    drawn = rng.multinomial(len(when), counts / len(when), n_bootstrap)
    return np.vstack([counts, drawn]).cumsum(1) / len(when)


def _table(events: list[_Event], snapshots: pd.DataFrame, level: float) -> pd.DataFrame:
    """Events with their dates."""
    turning_point = next((e.when[1:] for e in events if e.name == "turning_point" and e.when[0] < len(snapshots)), None)
    table = pd.DataFrame([event.row(len(snapshots), level, turning_point) for event in events])
    table = table.reindex(columns=_COLUMNS)
    for name in ("snapshot", "snapshot_low", "snapshot_high", "n"):
        table[name] = table[name].astype("Int64")
    for end, units in (("", ("label", "step", "tokens")), ("_low", ("step",)), ("_high", ("step",))):
        where = table[f"snapshot{end}"].fillna(-1).to_numpy(dtype=np.int64)
        for unit in units:
            table[unit + end] = pd.api.extensions.take(snapshots[unit].array, where, allow_fill=True)
    return table
