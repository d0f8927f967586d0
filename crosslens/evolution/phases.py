"""Statistics first, features later: the turning point between two phases of training, and how sure it is.

1. *Statistical progress* P(s): KL2 (`dynamics`) falls while the model learns what follows what, and rises
   when it uses more of the context than counts can. P is the share of the whole fall, from the first snapshot to the
   least KL2, that is done by s: 0 at the first snapshot, 1 from the least on.
2. *Feature progress* Q(s): the share of features that have settled by s, which means that from s on the cosine of
   their decoder row with that of the last snapshot is >= `min_cosine`. It is 1 at the last snapshot. Births are no
   measure of it: features that are strong in the untrained model are not born later, but their directions there are
   not the final.
3. *The turning point is the snapshot where P - Q is largest*, the *lead* its value there. Up to it statistics are
   learnt faster than features, each as a share of its own whole, from it on features are. A lead near 1 says that one
   phase is over before the other begins, near 0 that they are one. At a lead of 0 or less there is no turning point.
4. Other events stand beside it: the least KL1 ("unigram") and KL2 ("bigram"); a loss below H2 for good
   ("below_bigram"); the median birth of emergent features ("births") and the median settling ("settling"); and where
   the total dimensionality, past its least value, has made half of its way up to the last one ("room").
5. Intervals: whole sequences, and whole features, are drawn anew with replacement. Snapshots are a grid, and an event
   lies anywhere between the neighbours of where it is seen: so intervals reach from the snapshot before the lowest
   draws to the one after the highest (for what is a first time: up to the snapshot itself).

Where this fails. Settling is relative to the last snapshot: in a run that is cut off while directions still turn it
comes late by definition, and the lead is too large. The same holds for P where the least KL2 is at the last snapshot
(its event is then `at_edge`): the fall is not over. Where the phases overlap, the turning point moves with
`min_cosine`: try several. Events between the first two snapshots cannot be told apart, and a first snapshot that is
already trained has no 0 of P. KL2 needs counts of enough text: contexts seen once seem certain, and inflate it
(`min_count` leaves rare ones out). A warmup of the learning rate that ends near the turning point may be what sets it.
The order of two events is no cause. And the intervals do not contain the randomness of another pretraining run.
The two phases are those of Ge et al. (arXiv 2509.17196); the definitions are this project's own.

Letters: S snapshots, F features.
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
    """The turning point between the statistical and the feature phase, and the events around it, in order.

    Args:
        dynamics: of two snapshots or more.
        crosscoder: of some of these snapshots; without it there is no turning point, only events of the predictions.
        acts: its activations, or what `measure_firing` made of them.
        presence: share of a feature's largest norm from which it counts as present.
        min_cosine: cosine to the last snapshot's direction, from which a feature counts as settled.
        level: of the intervals.
        n_bootstrap: draws.
        seed: of the draws.

    Returns:
        A row per event: event, snapshot (index, missing where it never happens), label, step, tokens; low and high
        (indices), low_step, high_step; at_edge (at the first or last snapshot, where it says little); agreement (share
        of draws that give this snapshot); after_turning_point (share of draws in which it is at a later snapshot than
        the turning point; NaN without a crosscoder); n (features, of births and settling); lead, lead_low, lead_high
        (of the turning point). Room has no draws of its own.

    Raises:
        UserError: one snapshot only, a crosscoder without activations, or of snapshots that the dynamics lack.
    """
    S = len(dynamics.snapshots)
    if S < 2:
        raise UserError(f"phases need at least 2 snapshots, there is {S}: measure more")
    # the first row is what was measured, the others are draws
    kl1, kl2, loss = (
        np.vstack([dynamics.mean(name), dynamics.draws(name, n_bootstrap, seed)]) for name in ("kl1", "kl2", "loss")
    )
    events = [_Event("unigram", kl1.argmin(1), reach=1), _Event("bigram", kl2.argmin(1), reach=1)]
    events.append(_Event("below_bigram", first_for_good(loss < dynamics.bigram_entropy)))
    if crosscoder is None:
        return _table(events, dynamics.snapshots, level)
    if acts is None:
        raise UserError("a crosscoder without activations does not tell which features are alive: give acts")
    places = np.array(places_of(dynamics, crosscoder))
    firing = measure_firing(crosscoder, acts) if isinstance(acts, Activations) else acts
    births, settling = feature_dates(crosscoder, firing, presence, min_cosine)
    rng = np.random.default_rng(seed + 1)
    born, settled = (_shares(when, len(places), n_bootstrap, rng) for when in (births, settling))
    lead = bigram_progress(kl2)[:, places] - settled
    turning = np.where(lead.max(1) > 0, places[lead.argmax(1)], S)
    events.insert(0, _Event("turning_point", turning, reach=1, lead=lead.max(1)))
    for name, shares, n in (("births", born, len(births)), ("settling", settled, len(settling))):
        half = shares >= 0.5
        events.append(_Event(name, np.where(half.any(1), places[half.argmax(1)], S), n=n))
    room = total_dimensionality(crosscoder, firing, presence=presence, seed=seed)["share"].to_numpy()
    least = int(room.argmin())
    half = (room >= (room[least] + room[-1]) / 2) & (np.arange(len(room)) > least)
    when = places[half.argmax()] if half.any() else S
    events.append(_Event("room", np.full(n_bootstrap + 1, when), drawn=False))
    return _table(events, dynamics.snapshots, level)


@dataclass(frozen=True)
class _Event:
    """When something happens: what was measured, then draws of it; S for never. `reach` snapshots later at most."""

    name: str
    when: Any
    reach: int = 0
    n: int | None = None
    lead: Any = None
    drawn: bool = True

    def row(self, S: int, tails: tuple[float, float], turning: Any) -> dict[str, Any]:
        at, draws = int(self.when[0]), self.when[1:]
        row: dict[str, Any] = {"event": self.name, "n": self.n, "at_edge": at in (0, S - 1)}
        if at < S:
            low, high = np.quantile(draws, tails, method="inverted_cdf").tolist()
            row |= {"snapshot": at, "low": max(0, int(low) - 1), "high": min(S - 1, int(high) + self.reach)}
            if turning is not None and self.name != "turning_point":
                row["after_turning_point"] = float((draws > turning).mean())
        row["agreement"] = float((draws == at).mean()) if self.drawn else np.nan
        if self.lead is not None:
            row["lead"] = float(self.lead[0])
            row["lead_low"], row["lead_high"] = np.quantile(self.lead[1:], tails).tolist()
        return row


def _shares(when: Any, S: int, n_bootstrap: int, rng: np.random.Generator) -> Any:
    """(1 + draws, S) share of features whose date is s or earlier; 0 without features."""
    if not len(when):
        return np.zeros((n_bootstrap + 1, S))
    counts = np.bincount(when, minlength=S)
    drawn = rng.multinomial(len(when), counts / len(when), n_bootstrap)
    return np.vstack([counts, drawn]).cumsum(1) / len(when)


def _table(events: list[_Event], snapshots: pd.DataFrame, level: float) -> pd.DataFrame:
    """Events with their dates."""
    turning = next((event.when[1:] for event in events if event.name == "turning_point"), None)
    tails = ((1 - level) / 2, (1 + level) / 2)
    table = pd.DataFrame([event.row(len(snapshots), tails, turning) for event in events])
    table = table.reindex(columns=_COLUMNS)
    for name in ("snapshot", "low", "high", "n"):
        table[name] = table[name].astype("Int64")
    for name, units in (("snapshot", ("label", "step", "tokens")), ("low", ("step",)), ("high", ("step",))):
        where = table[name].fillna(-1).to_numpy(dtype=np.int64)
        for unit in units:
            column = unit if name == "snapshot" else f"{name}_{unit}"
            table[column] = pd.api.extensions.take(snapshots[unit].array, where, allow_fill=True)
    return table
