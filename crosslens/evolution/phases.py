"""The turning point between the statistical and the feature phase of training, with intervals.

1. *Statistical progress* P(s): KL2 (see `dynamics`) falls while the model learns bigram statistics, and rises when it
   uses more context than bigrams can. P is the share of KL2's total fall reached by s: 0 at the first snapshot, 1 from
   the minimum on.
2. *Feature progress* Q(s): the share of features that have settled by s: from s on, the cosine of their decoder row
   with the one at the last snapshot is >= `min_cosine`. Q is 1 at the last snapshot. Births do not measure this:
   features that are strong in the untrained model are not born later, but their directions still change.
3. *The turning point is the snapshot where P - Q is largest*; the *lead* is P - Q there. Before it statistics are
   learnt faster than features, after it features are, each relative to its own total. A lead near 1 means that one
   phase ends before the other begins, a lead near 0 that they coincide. With a lead of 0 or less there is no turning
   point.
4. Other events: the minimum of KL1 ("unigram") and KL2 ("bigram"); the loss falling below H2 for good
   ("below_bigram"); the median birth of emergent features ("births") and the median settling ("settling"); and the
   total dimensionality, after its minimum, having risen half-way to its last value ("dimensionality").
5. Intervals come from a bootstrap over whole sequences and whole features. Snapshots form a grid, and an event may lie
   anywhere between the neighbours of the snapshot where it is seen. Intervals therefore run from the snapshot before
   the lowest draws to the one after the highest (to the snapshot itself for events that are a first occurrence).

Limits. Settling is relative to the last snapshot: if the run is cut off while directions still rotate, settling comes
late by definition and the lead is too large. The same holds for P if the minimum of KL2 is at the last snapshot (its
event is then `at_edge`). If the phases overlap, the turning point depends on `min_cosine`: try several. Events between
the first two snapshots cannot be told apart, and P has no true 0 if the first snapshot is already trained. KL2 needs
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

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.dynamics import Dynamics, bigram_progress, feature_dates, first_for_good, places_of
from crosslens.evolution.geometry import total_dimensionality
from crosslens.evolution.lifecycles import Firing, measure_firing

_COLUMNS = [
    *("event", "snapshot", "label", "step", "tokens", "low", "high", "low_step", "high_step", "at_edge"),
    *("agreement", "after_turning_point", "n", "lead", "lead_low", "lead_high"),
]


def find_phases(
    dynamics: Dynamics,
    crosscoder: Crosscoder | None = None,
    acts: Activations | Firing | None = None,
    *,
    presence: float = 0.5,
    min_cosine: float = 0.5,
    level: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Locate the turning point between the statistical and the feature phase, and the events around it.

    Args:
        dynamics: dynamics of two snapshots or more.
        crosscoder: crosscoder of some of these snapshots; without it only events of the predictions are found.
        acts: activations of its snapshots, or the result of `measure_firing`.
        presence: a feature is present where its norm is at least this share of its largest norm.
        min_cosine: a feature is settled while its cosine with its row at the last snapshot is at least this.
        level: confidence level of the intervals.
        n_bootstrap: bootstrap draws.
        seed: seed for the draws.

    Returns:
        A row per event: event, snapshot (index, missing if it never happens), label, step, tokens; low and high
        (indices), low_step, high_step; at_edge (at the first or last snapshot, where it means little); agreement (share
        of draws with the same snapshot); after_turning_point (share of draws in which it is later than the turning
        point; NaN without a crosscoder); n (number of features, for births and settling); lead, lead_low, lead_high
        (of the turning point). Dimensionality is not resampled.

    Raises:
        UserError: one snapshot only, a crosscoder without activations, or with snapshots that the dynamics lack.
    """
    S = len(dynamics.snapshots)
    if S < 2:
        raise UserError(f"phases need at least 2 snapshots, but there is only {S}: measure more")
    # the first row is the measurement, the others are draws
    kl1, kl2, loss = (
        np.vstack([dynamics.mean(name), dynamics.draws(name, n_bootstrap, seed)]) for name in ("kl1", "kl2", "loss")
    )
    events = [_Event("unigram", kl1.argmin(1), reach=1), _Event("bigram", kl2.argmin(1), reach=1)]
    events.append(_Event("below_bigram", first_for_good(loss < dynamics.bigram_entropy)))
    if crosscoder is None:
        return _table(events, dynamics.snapshots, level)
    if acts is None:
        raise UserError("acts=None: activations are needed to find the live features of the crosscoder")
    places = np.array(places_of(dynamics, crosscoder))
    firing = measure_firing(crosscoder, acts)
    births, settling = feature_dates(crosscoder, firing, presence, min_cosine)
    rng = np.random.default_rng(seed + 1)
    born, settled = (_shares(when, len(places), n_bootstrap, rng) for when in (births, settling))
    lead = bigram_progress(kl2)[:, places] - settled
    turning_point = np.where(lead.max(1) > 0, places[lead.argmax(1)], S)
    events.insert(0, _Event("turning_point", turning_point, reach=1, lead=lead.max(1)))
    for name, shares, n in (("births", born, len(births)), ("settling", settled, len(settling))):
        half = shares >= 0.5
        events.append(_Event(name, np.where(half.any(1), places[half.argmax(1)], S), n=n))
    total = total_dimensionality(crosscoder, firing, presence=presence, seed=seed)["share"].to_numpy()
    least = int(total.argmin())
    half = (total >= (total[least] + total[-1]) / 2) & (np.arange(len(total)) > least)
    when = places[half.argmax()] if half.any() else S
    events.append(_Event("dimensionality", np.full(n_bootstrap + 1, when), drawn=False))
    return _table(events, dynamics.snapshots, level)


@dataclass(frozen=True)
class _Event:
    """Snapshot of an event, as measured and in every draw (S if never); it may lie up to `reach` snapshots later."""

    name: str
    when: Any
    reach: int = 0
    n: int | None = None
    lead: Any = None
    drawn: bool = True

    def row(self, S: int, tails: tuple[float, float], turning_point: Any) -> dict[str, Any]:
        at, draws = int(self.when[0]), self.when[1:]
        row: dict[str, Any] = {"event": self.name, "n": self.n, "at_edge": at in (0, S - 1)}
        if at < S:
            low, high = np.quantile(draws, tails, method="inverted_cdf").tolist()
            row |= {"snapshot": at, "low": max(0, int(low) - 1), "high": min(S - 1, int(high) + self.reach)}
            if turning_point is not None and self.name != "turning_point":
                row["after_turning_point"] = float((draws > turning_point).mean())
        row["agreement"] = float((draws == at).mean()) if self.drawn else np.nan
        if self.lead is not None:
            row["lead"] = float(self.lead[0])
            row["lead_low"], row["lead_high"] = np.quantile(self.lead[1:], tails).tolist()
        return row


def _shares(when: Any, S: int, n_bootstrap: int, rng: np.random.Generator) -> Any:
    """(1 + draws, S) share of features whose date is s or earlier; 0 if there are none."""
    if not len(when):
        return np.zeros((n_bootstrap + 1, S))
    counts = np.bincount(when, minlength=S)
    drawn = rng.multinomial(len(when), counts / len(when), n_bootstrap)
    return np.vstack([counts, drawn]).cumsum(1) / len(when)


def _table(events: list[_Event], snapshots: pd.DataFrame, level: float) -> pd.DataFrame:
    """Events with their dates."""
    turning_point = next((event.when[1:] for event in events if event.name == "turning_point"), None)
    tails = ((1 - level) / 2, (1 + level) / 2)
    table = pd.DataFrame([event.row(len(snapshots), tails, turning_point) for event in events])
    table = table.reindex(columns=_COLUMNS)
    for name in ("snapshot", "low", "high", "n"):
        table[name] = table[name].astype("Int64")
    for name, units in (("snapshot", ("label", "step", "tokens")), ("low", ("step",)), ("high", ("step",))):
        where = table[name].fillna(-1).to_numpy(dtype=np.int64)
        for unit in units:
            column = unit if name == "snapshot" else f"{name}_{unit}"
            table[column] = pd.api.extensions.take(snapshots[unit].array, where, allow_fill=True)
    return table
