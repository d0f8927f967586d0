"""Features that split, merge, or replace one another.

A crosscoder can represent a split in two ways, and each has its own function:

1. `splits`: two features share their direction up to a snapshot and differ from it on. Until then the model writes two
   concepts as one. This takes one active feature per token, so a sparse dictionary prefers it. The reverse is a merger.
2. `replacements`: feature i dies at about the snapshot where j is born, the last row of i and the first row of j have
   the same direction, and both are active on the same tokens. A feature with several successors has split; several
   features with one successor have merged. This takes two active features per token.

No count of either stands without what chance gives (`split_counts`): for splits and mergers the same pairs with the
snapshots in random orders, for replacements the pairs that agree in all but their dates with these dates permuted.

Both look for pairs in blocks and never keep an F x F matrix. Both definitions are new here.
Symbols: B tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import each
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.held_out import HeldOut, read
from crosslens.evolution.lifecycles import PRESENCE, classify_lifecycles, relative_norms, require_two_snapshots

_BLOCK = 2048  # features at a time
_PAIRS = 1 << 14  # pairs of features at a time
_ROUNDING = 1e-5  # of a cosine
_DRAWS = 200
"""Random orders of the snapshots, or permutations of dates, for what chance gives."""


@torch.no_grad()
def replacements(
    crosscoder: Crosscoder,
    acts: Activations | HeldOut,
    lifecycles: pd.DataFrame | None = None,
    *,
    max_gap: int = 1,
    min_cosine: float = 0.7,
    min_overlap: float = 0.5,
) -> pd.DataFrame:
    """Find pairs of features where the second replaces the first, with the same direction and on the same tokens.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        lifecycles: of `evolve(crosscoder, acts).lifecycles("norm")`, which is computed here if None: that one row
            takes over from another is a matter of the dictionary.
        max_gap: most snapshots between the death of the first and the birth of the second, in either order.
        min_cosine: least cosine between the predecessor's row at its last snapshot and the successor's at its birth.
        min_overlap: how much more often both are active together than by chance, relative to the most their firing
            rates allow: `(p_ij / min(p_i, p_j) - max(p_i, p_j)) / (1 - max(p_i, p_j))` (Loevinger's H). It is 1 if the
            rarer feature is active only where the other is, and 0 by chance.

    Returns:
        A row per pair: predecessor, successor, death (of the predecessor), death_step, birth (of the successor),
        birth_step, cosine, overlap, successors (of the predecessor), predecessors (of the successor), and kind: "split"
        with several successors, "merger" with several predecessors, "split and merger", otherwise "replacement".

    Raises:
        UserError: one snapshot only, max_gap below 0, lifecycles without firing rates, activations that are not the
            crosscoder's.
    """
    if lifecycles is None:
        firing, norms = measure_firing(crosscoder, acts), crosscoder.decoder_norms.detach().cpu()
        lifecycles = classify_lifecycles(norms.where(firing.rate[:, None] > 0, 0)).assign(firing_rate=firing.rate)
    rate = torch.tensor(lifecycles["firing_rate"].to_numpy(dtype=float))
    if len(rate) != crosscoder.cfg.d_sae or rate.isnan().any():
        raise UserError(
            "lifecycles lack the firing rates of this crosscoder's features: give those of evolve(crosscoder, acts)"
        )
    return JointActivity(
        crosscoder, acts, lifecycles, max_gap=max_gap, min_cosine=min_cosine, min_overlap=min_overlap
    ).table()


class JointActivity:
    """Pairs of features of which one may replace the other, and which are active on the same tokens.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of its snapshots.
        lifecycles: by decoder norm, with firing rates; no dates for features that never fire.
        max_gap: as of `replacements`, as are the others.
        min_cosine: see there.
        min_overlap: see there.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        acts: Activations | HeldOut,
        lifecycles: pd.DataFrame,
        *,
        max_gap: int = 1,
        min_cosine: float = 0.7,
        min_overlap: float = 0.5,
    ) -> None:
        if max_gap < 0:
            raise UserError(f"max_gap={max_gap} must be 0 or more snapshots")
        self.max_gap, self.steps = max_gap, snapshot_columns(crosscoder)["step"]
        self.death, self.birth = (
            lifecycles[name].to_numpy(dtype=float, na_value=-1).astype(int) for name in ("death", "birth")
        )
        # of any gap: those that agree in all but their dates say what chance gives
        pairs, cosine = _candidates(crosscoder, lifecycles, crosscoder.n_snapshots, min_cosine)
        overlap = np.empty(0)
        if len(pairs):
            held = read(crosscoder, acts, purpose="Splits")
            active = (held.f > 0).astype(np.float32).tocsc()
            parts = [part.numpy() for part in pairs.split(_PAIRS)]
            joint = [active[:, part[:, 0]].multiply(active[:, part[:, 1]]).sum(0) for part in parts]
            rate = lifecycles["firing_rate"].to_numpy(dtype=float)[pairs]
            low, high = rate.min(1), rate.max(1)
            overlap = (np.concatenate(joint) / len(held) / low - high) / (1 - high)  # Loevinger's H
        kept = overlap >= min_overlap
        self.pairs, self.cosine, self.overlap = pairs.numpy()[kept], cosine.numpy()[kept], overlap[kept]

    def _near(self, birth: Int[np.ndarray, " F"]) -> Bool[np.ndarray, " n"]:
        """Pairs whose death and birth are near each other, given the births of all features."""
        return np.abs(self.death[self.pairs[:, 0]] - birth[self.pairs[:, 1]]) <= self.max_gap

    def counts(self, lexical: Bool[np.ndarray, " F"] | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """How many replacements there are, and how many with the births permuted among the features that are born.

        Args:
            lexical: as of `split_counts`.
            seed: seed for the permutations.

        Returns:
            Rows as those of `split_counts`.
        """
        born = np.flatnonzero(self.birth > 0)
        rng, drawn = np.random.default_rng(seed), self.birth.copy()
        near = [self._near(self.birth)]
        for _ in range(_DRAWS):
            drawn[born] = rng.permutation(self.birth[born])
            near.append(self._near(drawn))
        return _counts("replacement", near, self.pairs, lexical)

    def table(self) -> pd.DataFrame:
        """The table of `replacements`."""
        kept = self._near(self.birth)
        table = pd.DataFrame(self.pairs[kept], columns=pd.Index(["predecessor", "successor"]))
        for name, dates, members in (("death", self.death, "predecessor"), ("birth", self.birth, "successor")):
            table[name] = dates[table[members]]
            table[f"{name}_step"] = self.steps.take(table[name]).array
        table["cosine"], table["overlap"] = self.cosine[kept], self.overlap[kept]
        table["successors"] = table.groupby("predecessor")["successor"].transform("size")
        table["predecessors"] = table.groupby("successor")["predecessor"].transform("size")
        several, joined = table["successors"] > 1, table["predecessors"] > 1
        table["kind"] = np.select(
            [several & joined, several, joined], ["split and merger", "split", "merger"], "replacement"
        )
        return table.sort_values(["death", "predecessor", "successor"], ignore_index=True)


@torch.no_grad()
def splits(
    crosscoder: Crosscoder,
    alive: Bool[Tensor, " F"] | None = None,
    *,
    presence: float = PRESENCE,
    together: float = 0.9,
    apart: float = 0.7,
) -> pd.DataFrame:
    """Find pairs of features that share their direction up to a snapshot and differ from it on, or the reverse.

    Only snapshots where both are present count. A pair splits if its cosine is at least `together` at the first of
    them, below `apart` at the last, and crosses the midpoint of the two thresholds exactly once; it merges if the same
    holds backwards. All pairs are compared, which takes F * F * S * D multiplications.

    Args:
        crosscoder: trained on two snapshots or more.
        alive: features to compare, such as `evolve(...).lifecycles()["alive"]`; all with a decoder if None.
        presence: a feature is present where its norm is at least this share of its largest norm.
        together: two rows whose cosine is at least this have the same direction.
        apart: two rows whose cosine is below this have different directions.

    Returns:
        A row per pair: feature, partner (the larger index), kind ("split" or "merger"), at (first snapshot after the
        change), at_step, at_tokens, cosine_before and cosine_after (at the first and the last snapshot where both are
        present).

    Raises:
        UserError: one snapshot only, or thresholds out of order.
    """
    return _PairsOverTime.of(crosscoder, alive, presence, together, apart).table(crosscoder)


def split_counts(
    crosscoder: Crosscoder,
    alive: Bool[Tensor, " F"] | None = None,
    *,
    presence: float = PRESENCE,
    together: float = 0.9,
    apart: float = 0.7,
    lexical: Bool[np.ndarray, " F"] | None = None,
    seed: int = 0,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The pairs of `splits`, and how many there are by chance: in random orders of the snapshots.

    Args:
        crosscoder: as of `splits`, as are the others.
        alive: see there.
        presence: see there.
        together: see there.
        apart: see there.
        lexical: which features are lexical; without it pairs are counted together only.
        seed: seed for the orders.

    Returns:
        The table of `splits`; and for splits and mergers kind, features (those of the pair: all, or lexical,
        contextual, mixed), n, by_chance (mean over 200 orders) and most_by_chance (95 % of the orders have no more).

    Raises:
        UserError: as `splits`.
    """
    pairs = _PairsOverTime.of(crosscoder, alive, presence, together, apart)
    found = pairs.changes()
    rng = np.random.default_rng(seed)
    drawn = [pairs.permuted(rng.permutation(crosscoder.n_snapshots)).changes() for _ in range(_DRAWS)]
    rows: list[dict[str, Any]] = []
    for kind in ("split", "merger"):
        rows += _counts(kind, [getattr(one, kind) for one in (found, *drawn)], pairs.pairs, lexical)
    return pairs.table(crosscoder), rows


class _Changes(NamedTuple):
    """Which pairs split and which merge, at which snapshot, and their cosines before and after."""

    split: Bool[np.ndarray, " n"]
    merger: Bool[np.ndarray, " n"]
    at: Int[np.ndarray, " n"]
    before: Float[np.ndarray, " n"]
    after: Float[np.ndarray, " n"]


class _PairsOverTime(NamedTuple):
    """Pairs of features that have the same direction at some snapshot.

    Attributes:
        pairs: the two features, the smaller number first.
        cosines: of their rows at every snapshot.
        both: where both are present.
        together: least cosine of rows of the same direction.
        apart: rows with a lower cosine have different directions.
    """

    pairs: Int[np.ndarray, "n 2"]
    cosines: Float[np.ndarray, "n S"]
    both: Bool[np.ndarray, "n S"]
    together: float
    apart: float

    @classmethod
    def of(
        cls, crosscoder: Crosscoder, alive: Bool[Tensor, " F"] | None, presence: float, together: float, apart: float
    ) -> _PairsOverTime:
        """Compare all pairs of rows."""
        S = crosscoder.n_snapshots
        require_two_snapshots("splitting", S)
        if not -1 <= apart <= together <= 1:
            raise UserError(f"apart={apart} and together={together} must satisfy -1 <= apart <= together <= 1")
        present = relative_norms(crosscoder.decoder_norms) >= presence
        if alive is not None:
            present &= alive[:, None]
        pairs = _neighbours(crosscoder, present, together)
        rows = crosscoder.W_dec_by_snapshot
        first, second = (pairs[:, i].to(rows.device) for i in (0, 1))
        columns = [cosine_similarity(rows[first, s].float(), rows[second, s].float()) for s in range(S)]
        both = present[pairs[:, 0]] & present[pairs[:, 1]]
        return cls(pairs.numpy(), torch.stack(columns, 1).cpu().numpy(), both.numpy(), together, apart)

    def permuted(self, order: Int[np.ndarray, " S"]) -> _PairsOverTime:
        """The same pairs with the snapshots in another order."""
        return self._replace(cosines=self.cosines[:, order], both=self.both[:, order])

    def changes(self) -> _Changes:
        """Which pairs cross from together to apart, or back, exactly once."""
        both, cosines = self.both, self.cosines
        S = both.shape[1]
        first, last = both.argmax(1), S - 1 - both[:, ::-1].argmax(1)
        here = np.arange(len(both))
        before, after = cosines[here, first], cosines[here, last]
        # where only one of the two is present, keep the state of the snapshot before, so that it is no change
        close = cosines >= (self.together + self.apart) / 2
        for s in range(1, S):
            close[:, s] = np.where(both[:, s] | (s <= first), close[:, s], close[:, s - 1])
        turns = (close[:, 1:] != close[:, :-1]) & (np.arange(1, S) > first[:, None])
        once = turns.sum(1) == 1
        split = once & (before >= self.together) & (after < self.apart)
        merger = once & (before < self.apart) & (after >= self.together)
        return _Changes(split, merger, turns.argmax(1) + 1, before, after)

    def table(self, crosscoder: Crosscoder) -> pd.DataFrame:
        """The table of `splits`."""
        found = self.changes()
        kept = found.split | found.merger
        table = pd.DataFrame({"feature": self.pairs[kept, 0], "partner": self.pairs[kept, 1]})
        table["kind"] = np.where(found.split[kept], "split", "merger")
        table["at"] = found.at[kept]
        snapshots = snapshot_columns(crosscoder)
        for unit in ("step", "tokens"):
            table[f"at_{unit}"] = snapshots[unit].take(table["at"]).array
        table["cosine_before"], table["cosine_after"] = found.before[kept], found.after[kept]
        return table


def _counts(
    kind: str,
    kept: list[Bool[np.ndarray, " n"]],
    pairs: Int[np.ndarray, "n 2"],
    lexical: Bool[np.ndarray, " F"] | None,
) -> list[dict[str, Any]]:
    """How many pairs are kept first, and how many by chance, as in all others; all of them, and by kind of feature."""
    which = {"all": np.ones(len(pairs), dtype=bool)}
    if lexical is not None:
        n = lexical[pairs].sum(1)
        which |= {"lexical": n == 2, "contextual": n == 0, "mixed": n == 1}
    rows: list[dict[str, Any]] = []
    for features, mask in which.items():
        found, *drawn = (int((each & mask).sum()) for each in kept)
        chance = {"by_chance": float(np.mean(drawn)), "most_by_chance": float(np.quantile(drawn, 0.95))}
        rows.append({"kind": kind, "features": features, "n": found, **chance})
    return rows


def _candidates(
    crosscoder: Crosscoder, lifecycles: pd.DataFrame, max_gap: int, min_cosine: float
) -> tuple[Int[Tensor, "n 2"], Float[Tensor, " n"]]:
    """(predecessor, successor) pairs whose dates and directions match, and their cosines."""
    death, birth = (
        torch.tensor(lifecycles[name].to_numpy(dtype=float, na_value=np.nan)) for name in ("death", "birth")
    )
    pairs: list[Tensor] = [torch.empty(0, 2, dtype=torch.int64)]
    cosines: list[Tensor] = [torch.empty(0)]
    for d in range(1, crosscoder.n_snapshots):
        dying = (death == d).nonzero().flatten()
        # features present at the first snapshot are not born there
        for b in range(max(1, d - max_gap), min(crosscoder.n_snapshots - 1, d + max_gap) + 1):
            born = (birth == b).nonzero().flatten()
            after = _directions(crosscoder, born, b)
            for part in dying.split(_BLOCK):
                cosine = (_directions(crosscoder, part, d - 1) @ after.T).cpu()
                fit = ((cosine >= min_cosine) & (part[:, None] != born)).nonzero()
                pairs.append(torch.stack([part[fit[:, 0]], born[fit[:, 1]]], 1))
                cosines.append(cosine[fit[:, 0], fit[:, 1]])
    return torch.cat(pairs), torch.cat(cosines)


def _neighbours(crosscoder: Crosscoder, present: Bool[Tensor, "F S"], min_cosine: float) -> Int[Tensor, "n 2"]:
    """Pairs of features that are present with the same direction at some snapshot, the smaller index first.

    Most pairs are ruled out by the first coordinates along the principal directions of the rows: by the inequality of
    Cauchy and Schwarz, what the other coordinates add to a cosine is at most the product of their lengths.
    """
    D = crosscoder.d_model
    # so many that a cosine of random rows reaches the bound by 5 standard deviations only
    n_first = min(D, int(((5 + (25 + 4 * (1 - min_cosine) * D) ** 0.5) / 2) ** 2) + 1)

    def near_at(s: int) -> Int[Tensor, "n 2"]:
        found: list[Tensor] = [torch.empty(0, 2, dtype=torch.int64)]
        ids = present[:, s].nonzero().flatten()
        rows = _directions(crosscoder, ids, s)
        if n_first < D:
            rotated = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
            rest = rotated[:, n_first:].norm(dim=1, keepdim=True)
            bound = torch.cat([rotated[:, :n_first], rest], 1)
        else:
            bound = rows
        for start in range(0, len(ids), _BLOCK):
            part = bound[start : start + _BLOCK]
            for other in range(start, len(ids), _BLOCK):
                near = part @ bound[other : other + _BLOCK].T >= min_cosine - _ROUNDING
                pairs = near.nonzero() + torch.tensor([start, other], device=near.device)
                pairs = pairs[pairs[:, 1] > pairs[:, 0]]
                for some in pairs.split(_PAIRS):
                    cosine = (rows[some[:, 0]] * rows[some[:, 1]]).sum(1)
                    found.append(ids[some[cosine >= min_cosine].cpu()])
        return torch.cat(found)

    return torch.unique(torch.cat(each(near_at, range(crosscoder.n_snapshots))), dim=0)


def _directions(crosscoder: Crosscoder, ids: Int[Tensor, " n"], s: int) -> Float[Tensor, "n D"]:
    """Unit decoder rows of some features at snapshot s."""
    rows = crosscoder.W_dec_by_snapshot
    return normalize(rows[ids.to(rows.device), s].float(), dim=-1)
