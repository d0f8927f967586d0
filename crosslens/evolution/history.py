"""The history of every feature: curves of presence over snapshots, and the lifecycles that follow from them.

Presence is read in up to three ways, and every lifecycle says by which:

1. R2, how well a snapshot alone predicts the feature (`presence.measure_decodability`): what the model holds.
2. Within-token R2, what the context adds to that, for contextual features.
3. The decoder norm, what the dictionary writes: the reading of Ge et al. (arXiv 2509.17196) and, as RelDec, of Bayazit
   et al. (arXiv 2509.05291). It depends on the other features and on how spread a snapshot's activations are, and as
   many features are born by it with the snapshots in reversed order as forwards (`births.count_births`).

With activations all three are read, and R2 comes first; without them there are only decoder norms. A feature is present
where a measure is at least `presence` of the feature's largest value; see `lifecycles.classify_lifecycles`.

`evolve` reads and encodes the held-out activations once, for every analysis that needs them (`held_out.read`).
`Evolution.tables` adds what the decoder alone says.

Symbols: S snapshots, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.crosscoders.partition import feature_parts
from crosslens.errors import UserError, visible
from crosslens.evolution.agreement import top_agreement
from crosslens.evolution.births import NAMES, count_births, date_births, presence_curves, with_null
from crosslens.evolution.columns import per_feature, snapshot_columns
from crosslens.evolution.controls import encoder_share
from crosslens.evolution.firing import Firing, measure_firing
from crosslens.evolution.geometry import (
    HalfCosines,
    cosines_of_pairs,
    feature_dimensionality,
    half_cosines,
    linear_maps,
    rotation,
    rotation_per_interval,
    total_dimensionality,
)
from crosslens.evolution.held_out import HeldOut, read
from crosslens.evolution.lifecycles import (
    PRESENCE,
    add_dates,
    check_presence,
    classify_lifecycles,
    count_origins,
    relative_norms,
    require_two_snapshots,
)
from crosslens.evolution.measures import take_measures
from crosslens.evolution.presence import Decodability, check_tokens, measure_decodability
from crosslens.evolution.selection import SAMPLE, compare, doubtful_snapshots
from crosslens.evolution.splitting import JointActivity, split_counts
from crosslens.printing import as_html, plot


@dataclass(frozen=True)
class Pass:
    """What one pass over the held-out activations finds, beside firing and decodability.

    Attributes:
        halves: of `half_cosines`.
        maps: of `linear_maps`.
        shares: of `encoder_share`.
        joint: pairs of features that may replace one another.
        agreement: of `top_agreement`.
        similarity: of `snapshot_similarity`.
        doubtful: of `doubtful_snapshots`.
        measured: the tables of all `measures`, by name.
    """

    halves: HalfCosines
    maps: Float[Tensor, "S1 D D"]
    shares: Float[Tensor, "F S"]
    joint: JointActivity
    agreement: pd.DataFrame
    similarity: pd.DataFrame
    doubtful: pd.DataFrame
    measured: Mapping[str, pd.DataFrame]


@dataclass(frozen=True, repr=False)
class Evolution:
    """Curves and lifecycles of every feature, by `evolve`.

    Attributes:
        table: a row per feature and snapshot: feature, snapshot, label, step, tokens; norm (of the decoder), strength
            (norm relative to the feature's largest), reldec (relative to the sum over snapshots); r2, within (see
            `Decodability`); firing_rate (share of held-out tokens with f_is > 0), mean_activation (mean of f_is n_is,
            the length of the vector the feature writes, over those tokens). The last four are NaN where there is no
            reading, and throughout without activations.
        curves: by measure, in the order of `measures`: what lifecycles are read from, all zero for features without a
            reading (of `presence_curves`).
        firing: how often features fire, None without activations.
        decodability: what r2 and within come from, None without activations.
        presence: share of a feature's largest value from which it is present.
        min_run: snapshots in a row a feature must be present for to count as born.
        crosscoder: whose features these are.
        seed: seed for the intervals, and for the random directions that dimensionality is compared with.
        nulls: counts of births in models without a history, by "untrained" and "exchangeable", for `count_births`.
        pass_: what else the pass over the held-out activations found, None without activations.
    """

    table: pd.DataFrame
    curves: dict[str, Float64[np.ndarray, "F S"]]
    firing: Firing | None
    decodability: Decodability | None
    presence: float
    min_run: int
    crosscoder: Crosscoder
    seed: int = 0
    nulls: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pass_: Pass | None = None
    _lifecycles: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def measures(self) -> list[str]:
        """What presence was read by, the default first: r2, within and norm with activations, otherwise norm alone."""
        return list(self._lifecycles)

    def lifecycles(self, measure: str | None = None) -> pd.DataFrame:
        """The lifecycle of every feature by one measure.

        Args:
            measure: "r2", "within" or "norm"; the first of `measures` if None, which is r2 if activations were given.

        Returns:
            A row per feature: feature, alive (it fires on held-out tokens, where known, and has a decoder), kind
            (lexical, contextual or missing), token_share (of its variance, between token types), firing_rate (share of
            held-out tokens); origin, fate; birth, peak, death (snapshot indices) and lifetime (number of snapshots
            where it is present), each followed by its date in steps and in tokens: birth_step, birth_tokens and so on.
            `lifetime_step` adds up the steps from each snapshot where the feature is present to the next one; if it is
            present only once and then disappears, that is death minus birth. Dates are missing where the metadata lack
            them, all of these for features without a reading. By r2 and within also the columns of `date_births`.

        Raises:
            UserError: a measure that was not read.
        """
        measure = measure or self.measures[0]
        if measure not in self._lifecycles:
            known = " or ".join(map(repr, self.measures))
            without = "" if self.decodability else "; the others need activations, evolve(crosscoder, acts)"
            raise UserError(f"measure={measure!r} was not read: use {known}{without}")
        return self._lifecycles[measure]

    def wide(self, column: str) -> pd.DataFrame:
        """One column of `table` as a table with a row per feature and a column per snapshot.

        Args:
            column: such as "r2" or "norm".

        Raises:
            UserError: an unknown column.
        """
        known = [name for name in self.table if name not in ("feature", "snapshot", "label", "step", "tokens")]
        if column not in known:
            raise UserError(f"column={column!r} is unknown: use one of {', '.join(map(str, known))}")
        S = int(self.table["snapshot"].max()) + 1
        labels = pd.Index(self.table["label"].iloc[:S], name=None)
        return pd.DataFrame(self.table[column].to_numpy().reshape(-1, S), columns=labels)

    def present(self, measure: str | None = None) -> Bool[np.ndarray, "F S"]:
        """Where every feature is present by one measure; nowhere if it has no reading.

        Args:
            measure: as in `lifecycles`.
        """
        return _present(self.curves[measure or self.measures[0]], self.presence)

    def count_births(self) -> pd.DataFrame:
        """Count births by every measure over thresholds, with the snapshots in order and reversed.

        Returns:
            A row per measure, kind and threshold, as `births.count_births` returns them.
        """
        lexical = None if self.decodability is None else self.decodability.lexical
        counts = count_births(self.curves, lexical, self.decodability, min_run=self.min_run, seed=self.seed)
        for name, null in self.nulls.items():
            counts = with_null(counts, null, name)
        return counts

    @cached_property
    def alive(self) -> Bool[Tensor, " F"]:
        """Which features fire on held-out tokens, where this is known, and have a decoder.

        Raises:
            UserError: decoder norms were not read.
        """
        return torch.tensor(self.lifecycles("norm")["alive"].to_numpy(dtype=bool))

    @cached_property
    def turning(self) -> Bool[Tensor, " F"]:
        """The live features whose direction may change: those that are not shared or dedicated by construction."""
        part = _parts(self.crosscoder)
        return self.alive if part is None else self.alive & torch.from_numpy(part == "free")

    @cached_property
    def _dimensionality(self) -> tuple[Float[Tensor, "F S"], pd.DataFrame]:
        firing = self.require_firing()
        each = feature_dimensionality(self.crosscoder, firing, presence=self.presence)
        return each, total_dimensionality(
            self.crosscoder, firing, presence=self.presence, seed=self.seed, dimensionality=each
        )  # fmt: skip

    @property
    def dimensionality(self) -> pd.DataFrame:
        """The result of `total_dimensionality`, a row per snapshot.

        Raises:
            UserError: an evolution that was read without activations.
        """
        return self._dimensionality[1]

    def require_firing(self) -> Firing:
        """How often features fire.

        Raises:
            UserError: an evolution that was read without activations.
        """
        if self.firing is None:
            raise UserError("this evolution was read without activations: give evolve(crosscoder, acts)")
        return self.firing

    @torch.no_grad()
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every analysis of features over time that needs no task, as a run directory stores them.

        Returns:
            Tables by name. Per feature and snapshot: evolution (`table`). Per measure of presence and feature:
            lifecycles (of `lifecycles`, `measure` first). Births by measure: birth_counts (of `count_births`). Per
            feature: directions (cosine/<label>, with the row at the last snapshot), feature_dimensionality
            (dimensionality/<label>), encoder (share/<label>, of `encoder_share`), and scaling (of `latent_scaling`; not
            for TopK and BatchTopK, where it equals the decoder norm). Per pair of features: replacements, splits, and
            in split_counts their number beside that by chance. Per snapshot: dimensionality (of
            `total_dimensionality`, with the participation_ratio of the activations), doubtful (of
            `doubtful_snapshots`). Per pair of snapshots: rotation (of `rotation_per_interval`), cosines (of
            `cosines_of_pairs`). Per feature and interval: agreement (of `top_agreement`). Those that need
            activations are left out where there were none.

        Raises:
            UserError: as the analyses.
        """
        crosscoder, labels = self.crosscoder, snapshot_columns(self.crosscoder)["label"].tolist()
        parts = [table.assign(measure=measure) for measure, table in self._lifecycles.items()]
        lifecycles = pd.concat(parts, ignore_index=True)
        columns = ["measure", *(name for name in lifecycles if name != "measure")]
        found = self.pass_
        lexical = None if self.decodability is None else self.decodability.lexical
        splits, counts = split_counts(crosscoder, self.alive, presence=self.presence, lexical=lexical, seed=self.seed)
        tables = {
            "evolution": self.table,
            "lifecycles": pd.DataFrame(lifecycles[columns]),
            "birth_counts": self.count_births(),
            "rotation": rotation_per_interval(
                crosscoder, self.turning, found and found.halves, None if found is None else found.maps
            ),
            "cosines": cosines_of_pairs(crosscoder, self.turning),
            "directions": per_feature(labels, cosine=rotation(crosscoder)),
            "splits": splits,
            "split_counts": pd.DataFrame(counts),
        }
        if found is None:
            return tables
        tables["split_counts"] = pd.DataFrame([*counts, *found.joint.counts(lexical, self.seed)])
        each, total = self._dimensionality
        return tables | {
            "dimensionality": total.assign(participation_ratio=found.doubtful["participation_ratio"]),
            "feature_dimensionality": per_feature(labels, dimensionality=each),
            "encoder": per_feature(labels, share=found.shares),
            "doubtful": found.doubtful,
            "replacements": found.joint.table(),
            "agreement": found.agreement,
            **found.measured,
        }

    def describe(self) -> list[str]:
        """How many features have which origin by every measure, a line each."""
        first = self._lifecycles[self.measures[0]]
        labels = self.table["label"].iloc[: int(self.table["snapshot"].max()) + 1]
        lines = [
            f"{int(first['alive'].sum()):,} live features of {len(first):,} at {len(labels)} snapshots, "
            f"{labels.iloc[0]} to {labels.iloc[-1]}"
        ]
        for measure, table in self._lifecycles.items():
            counts = count_origins(table)
            unknown = counts.pop("unknown")
            words = [f"{count:,} {origin}" for origin, count in counts.items() if count]
            if unknown:
                why = (
                    "hardly varying within token types, or hardly predicted"
                    if measure == "within"
                    else "hardly predicted"
                )
                words.append(f"{unknown:,} unknown ({why})")
            lines.append(f"by {NAMES[measure]}: {', '.join(words)}")
        if self.decodability is None:
            lines.append("decoder norms alone do not date births: give activations, evolve(crosscoder, acts)")
        return lines

    def __repr__(self) -> str:
        return visible("\n".join(self.describe()))

    def _repr_html_(self) -> str:
        first, *notes = self.describe()
        rows = [{"by": NAMES[name], **count_origins(table)} for name, table in self._lifecycles.items()]
        return as_html(first, pd.DataFrame(rows), "\n".join(["features by origin", *notes[len(rows) :]]))

    def plot(self, figure: str = "evolution-map") -> Any:
        """A figure of the report, in a notebook.

        Args:
            figure: "evolution-map" (presence over training), "births", "birth-counts", "origins", "rotation",
                "cosines", "splits", ...

        Raises:
            UserError: no such figure.
        """
        return plot(self.tables(), figure)


@torch.no_grad()
def evolve(
    crosscoder: Crosscoder,
    acts: Activations | Firing | None = None,
    *,
    presence: float = PRESENCE,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
    nulls: Mapping[str, pd.DataFrame] | None = None,
    seed: int = 0,
) -> Evolution:
    """Follow every feature over the snapshots: presence, lifecycles, directions, and the controls of each.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; the held-out ones are used. Without them, or with the result of
            `measure_firing` in their place, decoder norms are all that is read.
        presence: a feature is present where a measure is at least this share of its largest value.
        min_run: snapshots in a row a feature must be present for to count as born.
        min_firing_rate: features active on this share of the held-out tokens or less are dead.
        nulls: counts of births in models without a history, by "untrained" and "exchangeable" (`births_without_history`
            of `crosslens.pipeline`).
        seed: seed for the intervals, and for the random directions that dimensionality is compared with.

    Returns:
        An `Evolution`. Its default measure is R2 where activations are given, otherwise the decoder norm.

    Raises:
        UserError: one snapshot only, a threshold out of range, too few activations held out, or those of other
            snapshots or of another hook point.
    """
    if not 0 <= min_firing_rate < 1:
        raise UserError(f"min_firing_rate={min_firing_rate} is not in [0, 1): it is a share of tokens, such as 1e-5")
    require_two_snapshots("evolution", crosscoder.n_snapshots)
    check_presence(presence, min_run)
    norms = crosscoder.decoder_norms.detach().cpu().float()
    relative_norms(norms)  # refuses norms that are not finite before anything is encoded
    firing, found, held = acts if isinstance(acts, Firing) else None, None, None
    if acts is not None and not isinstance(acts, Firing):
        check_tokens(crosscoder, acts)  # before anything is encoded
        held = read(crosscoder, acts, purpose="Evolution")
        firing, found = measure_firing(crosscoder, held), measure_decodability(crosscoder, held)
    alive = (norms > 0).any(1).numpy()
    if firing is not None:
        alive &= (firing.rate > min_firing_rate).numpy()
    curves = presence_curves(norms, found, alive)
    snapshots, F = snapshot_columns(crosscoder), len(norms)
    about = pd.DataFrame({"feature": np.arange(F), "alive": alive})
    if (part := _parts(crosscoder)) is not None:
        about["part"] = part
        curves["norm"][part != "free"] = 0  # set by training, and no finding: no reading
    kind = np.full(F, None, dtype=object)
    if found is not None:
        kind[found.between > 0.5], kind[found.between <= 0.5] = "lexical", "contextual"
    about["kind"] = kind
    about["token_share"] = np.full(F, np.nan) if found is None else found.between
    about["firing_rate"] = np.full(F, np.nan) if firing is None else firing.rate.numpy()
    lifecycles: dict[str, pd.DataFrame] = {}
    for measure, values in curves.items():
        table = pd.concat([about, classify_lifecycles(torch.from_numpy(values), presence, min_run=min_run)], axis=1)
        add_dates(table, snapshots, _present(values, presence))
        if found is not None and measure != "norm":
            dates = date_births(found, measure, values.max(1) > 0, presence=presence, min_run=min_run, seed=seed)
            table = pd.concat([table, dates], axis=1)
        lifecycles[measure] = table
    table = _table(crosscoder, snapshots, firing, found)
    rest = None if held is None else _rest(held, lifecycles["norm"])
    return Evolution(
        table, curves, firing, found, presence, min_run, crosscoder, seed, nulls or {}, rest, lifecycles
    )  # fmt: skip


def _parts(crosscoder: Crosscoder) -> np.ndarray | None:
    """For every feature "free", "shared", or the snapshots that it is dedicated to; None if all are free."""
    cfg = crosscoder.cfg
    if not (cfg.n_shared or cfg.dedicated):
        return None
    return np.array(feature_parts(cfg.n_shared, cfg.dedicated, cfg.d_sae), dtype=object)


def _rest(held: HeldOut, lifecycles: pd.DataFrame) -> Pass:
    """What else the held-out activations say."""
    crosscoder, acts = held.crosscoder, held.acts
    shares = encoder_share(crosscoder, held)
    comparison = compare([x[:SAMPLE].clone() for x in held.x], acts.snapshots.labels)
    return Pass(
        halves=half_cosines(crosscoder, held),
        maps=linear_maps(crosscoder, held),
        shares=shares,
        joint=JointActivity(crosscoder, held, lifecycles),
        agreement=top_agreement(crosscoder, held),
        similarity=comparison.similarity,
        doubtful=doubtful_snapshots(acts, shares, comparison),
        measured=take_measures(held),
    )


def _present(values: Float64[np.ndarray, "F S"], presence: float) -> Bool[np.ndarray, "F S"]:
    return relative_norms(torch.from_numpy(values)).numpy() >= presence  # NaN, and so False, without a reading


def _table(
    crosscoder: Crosscoder, snapshots: pd.DataFrame, firing: Firing | None, found: Decodability | None
) -> pd.DataFrame:
    """A row per feature and snapshot."""
    norms = crosscoder.decoder_norms.detach().cpu().float()
    F, S = norms.shape
    table = pd.DataFrame({"feature": np.repeat(np.arange(F), S), "snapshot": np.tile(np.arange(S), F)})
    for name in snapshots:
        table[name] = snapshots[name].take(table["snapshot"]).array
    nothing = np.full((F, S), np.nan)
    for name, values in (
        ("norm", norms.numpy()),
        ("strength", relative_norms(norms).numpy()),
        ("reldec", (norms / norms.sum(1, keepdim=True)).numpy()),
        ("r2", nothing if found is None else found.r2),
        ("within", nothing if found is None else found.within),
        ("firing_rate", nothing if firing is None else firing.snapshot_rate.numpy()),
        ("mean_activation", nothing if firing is None else (firing.mean * norms).numpy()),
    ):
        table[name] = values.astype(np.float32).flatten()
    return table
