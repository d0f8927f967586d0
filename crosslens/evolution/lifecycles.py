"""When features appear, peak and disappear, for any curves of presence; and how their directions rotate.

With a measure of presence `n_is` (F, S), such as decoder norms or R2, and `v_is = n_is / max_s' n_is'`:

1. Feature i is *present* at snapshot s where `v_is >= presence`.
2. Origin: *initial* if present at the first snapshot; *emergent* if it has a birth, the first snapshot from which it is
   present for `min_run` snapshots in a row or until the end; otherwise *never*. The birth of an initial feature is 0.
3. Fate: *transient* if the feature disappears for good (its death is the first snapshot of that absence); otherwise
   *persistent*.
4. Peak: the first snapshot with the largest value. Lifetime: the number of snapshots where it is present.
5. Features without a reading, whose values are all 0, keep their row; all columns are missing. `history.evolve` treats
   dead features (never active on held-out activations, or with a zero decoder at every snapshot) in this way.

The curves `v` and the rotation of decoder rows follow Ge et al. (arXiv 2509.17196), RelDec, `n_is / sum_s' n_is'`,
follows Bayazit et al. (arXiv 2509.05291); the definitions above are new here.
Symbols: B tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.snapshots.checks import check_snapshots
from crosslens.snapshots.hooks import canonical_hook

_MAX_FEATURE_BYTES = 1 << 28  # of dense feature activations (B, F) in memory at a time


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


def classify_lifecycles(norms: Float[Tensor, "F S"], presence: float = 0.5, *, min_run: int = 2) -> pd.DataFrame:
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


@dataclass(frozen=True)
class Firing:
    """How often and how strongly features are active on held-out tokens.

    Attributes:
        n_tokens: number of tokens.
        rate: share of tokens with f_i > 0.
        rms: root mean square of f_i over all tokens.
        snapshot_rate: share of tokens with f_is > 0: equal to `rate` if the gate is shared, lower for JumpReLU.
        mean: mean of f_is over the tokens where it is active, NaN if there are none.
    """

    n_tokens: int
    rate: Float[Tensor, " F"]
    rms: Float[Tensor, " F"]
    snapshot_rate: Float[Tensor, "F S"]
    mean: Float[Tensor, "F S"]


@torch.no_grad()
def measure_firing(crosscoder: Crosscoder, acts: Activations | Firing) -> Firing:
    """Measure how every feature fires on the held-out activations, in one pass and in float64.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; an earlier result is returned unchanged.

    Raises:
        UserError: no activations are held out, or they are not the crosscoder's.
    """
    if isinstance(acts, Firing):
        return acts
    check_activations(crosscoder, acts)
    F, S = crosscoder.cfg.d_sae, crosscoder.n_snapshots
    # a gate shared by all snapshots needs one column only
    gates = S if crosscoder.gate_per_snapshot else 1
    counts, sums = torch.zeros(F, gates).double(), torch.zeros(F, gates).double()
    active, squares, n = torch.zeros(F).double(), torch.zeros(F).double(), 0
    for _, features in held_out_features(crosscoder, acts, "Firing rates"):
        n += len(features)
        active += features.count_nonzero(0).cpu()
        squares += features.square().sum(0).cpu()
        for s in range(gates):
            gated = crosscoder.snapshot_acts(features, s)
            counts[:, s] += gated.count_nonzero(0).cpu()
            sums[:, s] += gated.sum(0).cpu()
    return Firing(n, active / n, (squares / n).sqrt(), (counts / n).expand(F, S), (sums / counts).expand(F, S))


@torch.no_grad()
def held_out_features(
    crosscoder: Crosscoder, acts: Activations, purpose: str = "Held-out features"
) -> Iterator[tuple[Float[Tensor, "B S D"], Float[Tensor, "B F"]]]:
    """Yield held-out activations and their dense features, as many tokens at a time as memory allows.

    Args:
        crosscoder: trained on the snapshots of `acts`.
        acts: with held-out tokens.
        purpose: what they are read for, in a word or two, for the progress bar.

    Raises:
        UserError: no activations are held out, or they do not fit the crosscoder.
    """
    if isinstance(crosscoder, CrosscoderTrainingSAE):
        crosscoder = crosscoder.to_inference()  # the gate used in training may depend on the batch
    n = 0
    with tqdm(desc=purpose, unit=" tokens", unit_scale=True, leave=False, delay=2) as bar:
        for x in acts.held_out(batch_tokens(crosscoder.cfg.d_sae)):
            n += len(x)
            if len(x):
                x = x.to(crosscoder.W_dec.device)
                yield x, crosscoder.encode(x)
            bar.update(len(x))
    if not n:
        raise UserError("no activations are held out: give Dataset(held_out_tokens=...) of 1 or more")


def check_activations(crosscoder: Crosscoder, acts: Activations) -> None:
    """Refuse activations of snapshots or a hook point that the crosscoder was not trained on.

    A crosscoder without recorded fingerprints is not checked.

    Raises:
        UserError: another number of snapshots, other weights, or another hook point.
    """
    metadata = crosscoder.cfg.metadata
    recorded: list[dict[str, Any]] = metadata.snapshots or []
    if not any(row.get("fingerprint") for row in recorded):
        return
    if metadata.hook_name and canonical_hook(metadata.hook_name) != canonical_hook(acts.hook_name):
        raise UserError(
            f"the crosscoder was trained on {metadata.hook_name}, the activations are from {acts.hook_name}: "
            f"use Activations(..., hook_name={metadata.hook_name!r})"
        )
    check_snapshots(crosscoder, acts.snapshots)


@torch.no_grad()
def rotation(crosscoder: Crosscoder, reference: int = -1, *, min_norm: float = 0.05) -> Float[Tensor, "F S"]:
    """Compare every decoder row with the feature's row at a reference snapshot.

    Args:
        crosscoder: any.
        reference: index of the reference snapshot; the last by default.
        min_norm: rows below this share of the feature's largest norm have no direction. Rows can start equal at all
            snapshots, so without this limit features that were never used would seem not to have rotated.

    Returns:
        Cosines in [-1, 1], NaN where the row or the reference row has no direction.

    Raises:
        UserError: `reference` is out of range.
    """
    rows, S = crosscoder.W_dec_by_snapshot, crosscoder.n_snapshots
    if not -S <= reference < S:
        raise UserError(f"reference={reference} is out of range: give a snapshot index from {-S} to {S - 1}")
    directed = relative_norms(crosscoder.decoder_norms) >= min_norm
    # one snapshot at a time: another (F, S, D) tensor is too much for large crosscoders
    cosines = [cosine_similarity(rows[:, s].float(), rows[:, reference].float(), dim=-1).cpu() for s in range(S)]
    return torch.stack(cosines, 1).masked_fill(~(directed & directed[:, [reference]]), torch.nan)


def count_origins(lifecycles: pd.DataFrame) -> dict[str, int]:
    """How many live features have each origin, and how many are `unknown`: their values are all 0.

    Args:
        lifecycles: the table of one measure.
    """
    counts = lifecycles.loc[lifecycles["alive"], "origin"].value_counts()
    found = {origin: int(counts.get(origin, 0)) for origin in ("initial", "emergent", "never")}
    return {**found, "unknown": int(lifecycles["alive"].sum()) - sum(found.values())}


def snapshot_columns(crosscoder: Crosscoder) -> pd.DataFrame:
    """label, step and tokens of the crosscoder's snapshots from its metadata; labels default to indices."""
    recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
    if not recorded:
        recorded = [{"label": str(s)} for s in range(crosscoder.n_snapshots)]
    columns: dict[str, Any] = {"label": [str(row["label"]) for row in recorded]}
    for unit in ("step", "tokens"):
        columns[unit] = pd.array([row.get(unit) for row in recorded], dtype="Int64")
    return pd.DataFrame(columns)


def batch_tokens(d_sae: int) -> int:
    """Tokens to encode at a time so that the dense activations of `d_sae` features stay small."""
    return max(1, min(4096, _MAX_FEATURE_BYTES // (4 * d_sae)))


def require_two_snapshots(what: str, n_snapshots: int) -> None:
    """Raise UserError where `what` cannot be computed because there is no second snapshot to compare with."""
    if n_snapshots < 2:
        raise UserError(f"{what} needs at least 2 snapshots, this crosscoder has {n_snapshots}: train on more")


def check_presence(presence: float, min_run: int = 1) -> None:
    """Raise UserError where a threshold of presence is out of range."""
    if not 0 < presence <= 1:
        raise UserError(f"presence={presence} is not in (0, 1]: it is a share of a feature's largest value, like 0.5")
    if min_run < 1:
        raise UserError(f"min_run={min_run} must be 1 or more snapshots in a row")


def _integers(values: Any, valid: Any) -> pd.Series:
    return pd.Series(values, dtype="Int64").where(valid)


def _text(values: Any, valid: Any) -> pd.Series:
    return pd.Series(np.where(valid, values.astype(object), None), dtype=object)
