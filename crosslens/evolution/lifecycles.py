"""When features appear, peak and disappear, for any curves of presence.

With a measure of presence `n_is` (F, S), such as decoder norms or R2, and `v_is = n_is / max_s' n_is'`:

1. Feature i is *present* at snapshot s where `v_is >= presence`.
2. Origin: *initial* if present at the first snapshot; *emergent* if it has a birth, the first snapshot from which it is
   present for `min_run` snapshots in a row or until the end; otherwise *never*. The birth of an initial feature is 0.
3. Fate: *transient* if the feature disappears for good (its death is the first snapshot of that absence); otherwise
   *persistent*.
4. Peak: the first snapshot with the largest value. Lifetime: the number of snapshots where it is present.
5. Features without a reading, whose values are all 0, keep their row; all columns are missing. `history.evolve` treats
   dead features (never active on held-out activations, or with a zero decoder at every snapshot) in this way.

The curves `v` follow Ge et al. (arXiv 2509.17196), RelDec, `n_is / sum_s' n_is'`, follows Bayazit et al. (arXiv
2509.05291); the definitions above are new here. Symbols: S snapshots, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.errors import UserError

PRESENCE = 0.4
"""Share of its largest value from which a feature is present: of .3, .4, .5, ... the largest at which at most 5 % of
the contextual features of models without an order are born by R2, 3.8 % (`benchmarks/exchangeable.py`)."""


def relative_norms(norms: Float[Tensor, "F S"]) -> Float[Tensor, "F S"]:
    """`v = n / max over snapshots` in float64, NaN for features without a decoder.

    Raises:
        UserError: a norm is negative or not finite.
    """
    norms = norms.detach().cpu().double()
    if not (torch.isfinite(norms) & (norms >= 0)).all():
        row = int((~torch.isfinite(norms) | (norms < 0)).any(1).nonzero()[0])
        raise UserError(
            f"decoder norms of feature {row} are {norms[row].tolist()}: they must be finite and not negative; "
            "training has diverged, train again with a smaller lr"
        )
    return norms / norms.amax(1, keepdim=True)


def classify_lifecycles(norms: Float[Tensor, "F S"], presence: float = PRESENCE, *, min_run: int = 2) -> pd.DataFrame:
    """Classify every feature by one measure of presence.

    Args:
        norms: decoder norms, or another measure that is 0 or more; only their ratios within a feature matter.
        presence: a feature is present where its value is at least this share of its largest, in (0, 1].
        min_run: snapshots in a row a feature must be present for to count as born.

    Returns:
        A row per feature: origin, fate, birth, peak, death, lifetime. Snapshots are nullable integer indices, missing
        where there is no such snapshot. All columns are missing for features whose values are all 0.

    Raises:
        UserError: fewer than two snapshots, a norm that is not finite, a threshold out of range.
    """
    S = norms.shape[1]
    require_two_snapshots("evolution", S)
    check_presence(presence, min_run)
    v = relative_norms(norms).numpy()
    present, real = v >= presence, np.isfinite(v[:, 0])
    birth = birth_index(present, min_run)
    born = birth < S
    initial, last = present[:, 0], S - 1 - present[:, ::-1].argmax(1)
    return pd.DataFrame(
        {
            "origin": _text(np.select([initial, born], ["initial", "emergent"], "never"), real),
            "fate": _text(np.where(last == S - 1, "persistent", "transient"), real),
            "birth": _integers(birth, real & born),
            "peak": _integers(np.where(np.isnan(v), 0, v).argmax(1), real),
            "death": _integers(last + 1, real & (last < S - 1)),
            "lifetime": _integers(present.sum(1), real),
        }
    )


def birth_index(present: Bool[np.ndarray, "*rows S"], min_run: int) -> Int[np.ndarray, "*rows"]:
    """First snapshot from which a feature is present for `min_run` in a row or until the end.

    0 if it is present at the first snapshot, however long; S if there is no such snapshot.
    """
    S = present.shape[-1]
    run, birth = np.zeros(present.shape[:-1], dtype=int), np.full(present.shape[:-1], S)
    for s in reversed(range(S)):
        run = np.where(present[..., s], run + 1, 0)  # snapshots present in a row from here on
        birth = np.where((run >= min(min_run, S - s)) | ((s == 0) & present[..., s]), s, birth)
    return birth


def add_dates(table: pd.DataFrame, snapshots: pd.DataFrame, present: Bool[np.ndarray, "F S"]) -> None:
    """Insert the steps and tokens of birth, peak, death and lifetime next to each column.

    Args:
        table: the columns of `classify_lifecycles`.
        snapshots: the result of `snapshot_columns`.
        present: where features are present.
    """
    for offset, unit in enumerate(("step", "tokens"), start=1):
        dates = snapshots[unit].array
        for name in ("birth", "peak", "death"):
            where = table[name].fillna(-1).to_numpy(dtype=np.int64)
            found = pd.api.extensions.take(dates, where, allow_fill=True)
            table.insert(list(table).index(name) + offset, f"{name}_{unit}", found)
        spans = np.diff(snapshots[unit].to_numpy(dtype=float, na_value=np.nan))
        known = table["lifetime"].notna() & bool(np.isfinite(spans).all())
        lived = np.where(np.isfinite(spans), spans, 0).astype(np.int64)
        table.insert(
            list(table).index("lifetime") + offset, f"lifetime_{unit}", _integers(present[:, :-1] @ lived, known)
        )


def count_origins(lifecycles: pd.DataFrame) -> dict[str, int]:
    """How many live features have each origin, and how many are `unknown`: their values are all 0.

    Args:
        lifecycles: the table of one measure.
    """
    counts = lifecycles.loc[lifecycles["alive"], "origin"].value_counts()
    found = {origin: int(counts.get(origin, 0)) for origin in ("initial", "emergent", "never")}
    return {**found, "unknown": int(lifecycles["alive"].sum()) - sum(found.values())}


def require_two_snapshots(what: str, n_snapshots: int) -> None:
    """Raise UserError where `what` cannot be computed because there is no second snapshot to compare with."""
    if n_snapshots < 2:
        raise UserError(f"{what} needs at least 2 snapshots, this crosscoder has {n_snapshots}: train on more")


def check_presence(presence: float, min_run: int = 1) -> None:
    """Raise UserError where a threshold of presence is out of range."""
    if not 0 < presence <= 1:
        raise UserError(
            f"presence={presence} is not in (0, 1]: it is a share of a feature's largest value, like {PRESENCE}"
        )
    if min_run < 1:
        raise UserError(f"min_run={min_run} must be 1 or more snapshots in a row")


def _integers(values: Any, valid: Any) -> pd.Series:
    return pd.Series(values, dtype="Int64").where(valid)


def _text(values: Any, valid: Any) -> pd.Series:
    return pd.Series(np.where(valid, values.astype(object), None), dtype=object)
