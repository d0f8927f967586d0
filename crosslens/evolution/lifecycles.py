"""When features are born, peak and fade, read off the decoder norms; and how they turn.

With decoder norms `n_is` (F, S) of the scaled space and `v_is = n_is / max_s' n_is'`:

1. Feature i is *present* at snapshot s where `v_is >= presence`.
2. Origin: *initial* when present at the first snapshot; *emergent* when there is a birth, the first snapshot from which
   it is present for `min_run` snapshots in a row, or to the end; else *never*. The birth of an initial feature is 0.
3. Fate: *transient* when absent for good after having been present, its death being the first snapshot of that absence;
   else *persistent*.
4. Peak: the snapshot of the largest norm, the first of equals. Lifetime: the number of snapshots where it is present.
5. Dead features (which never fire on held-out activations, or whose decoder is zero at every snapshot) are none of
   this: they keep their row with `alive = False`, and everything else about their life is missing.

Ge et al. (arXiv 2509.17196) give the curves `v` and the turning of decoder rows, Bayazit et al. (arXiv 2509.05291)
RelDec, `n_is / sum_s' n_is'`; the definitions above are this project's own.
Letters: B tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.intervention.splice import check_snapshots
from crosslens.snapshots.hooks import canonical_hook

_MAX_FEATURE_BYTES = 1 << 28  # of the dense activations (B, F) at a time


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
            "the training has diverged, train again with a smaller lr"
        )
    return norms / norms.amax(1, keepdim=True)


def classify(norms: Float[Tensor, "F S"], presence: float = 0.5, *, min_run: int = 2) -> pd.DataFrame:
    """Origin, fate and dates of every feature from its decoder norms alone, a row per feature.

    Args:
        norms: decoder norms; only their ratios within a feature matter.
        presence: share of a feature's largest norm from which it counts as present, in (0, 1].
        min_run: snapshots in a row from which presence counts as a birth.

    Returns:
        origin, fate, birth, peak, death, lifetime; indices of snapshots as nullable integers, missing where there is no
        such snapshot, and all missing for features without a decoder.

    Raises:
        UserError: fewer than two snapshots, a norm that is not finite, a threshold out of range.
    """
    S = norms.shape[1]
    _check(S, presence, min_run)
    v = relative_norms(norms).numpy()
    present, real = v >= presence, np.isfinite(v[:, 0])
    run = np.zeros(v.shape, dtype=int)  # snapshots present in a row from here on
    for s in reversed(range(S)):
        run[:, s] = np.where(present[:, s], 1 + (run[:, s + 1] if s + 1 < S else 0), 0)
    starts = run >= np.minimum(min_run, S - np.arange(S))
    born = starts.any(1)
    initial, last = present[:, 0], S - 1 - present[:, ::-1].argmax(1)
    return pd.DataFrame(
        {
            "origin": _text(np.select([initial, born], ["initial", "emergent"], "never"), real),
            "fate": _text(np.where(last == S - 1, "persistent", "transient"), real),
            "birth": _integers(np.where(initial, 0, starts.argmax(1)), real & (initial | born)),
            "peak": _integers(np.where(np.isnan(v), 0, v).argmax(1), real),
            "death": _integers(last + 1, real & (last < S - 1)),
            "lifetime": _integers(present.sum(1), real),
        }
    )


def evolve(
    crosscoder: Crosscoder,
    acts: Activations | Firing | None = None,
    *,
    presence: float = 0.5,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
) -> pd.DataFrame:
    """The life of every feature, a row per feature.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots, or what `measure_firing` made of them; with them features that do not
            fire on the held-out ones are dead.
        presence: share of a feature's largest norm from which it counts as present.
        min_run: snapshots in a row from which presence counts as a birth.
        min_firing_rate: features that fire on no larger share of the held-out tokens are dead.

    Returns:
        feature, alive, firing_rate (share of held-out tokens, NaN without `acts`), origin, fate; birth, peak, death
        (indices of snapshots) and lifetime (number of snapshots where it is present), each followed by its date in
        steps and in tokens: birth_step, birth_tokens and so on. `lifetime_step` is the time from every snapshot where
        the feature is present to the next one: of a single life that ends, death minus birth. Dates are missing where
        the metadata lack them.
        Then, per snapshot, norm/<label> (the decoder norm), strength/<label> (v), reldec/<label>, present/<label>, and
        with `acts` firing_rate/<label> (share of tokens with f_is > 0) and mean_activation/<label> (mean of f_is n_is,
        the length of what the feature writes, over those tokens).

    Raises:
        UserError: one snapshot only, a threshold out of range, activations of other snapshots or another hook point.
    """
    if not 0 <= min_firing_rate < 1:
        raise UserError(f"min_firing_rate={min_firing_rate} is not in [0, 1): it is a share of tokens, such as 1e-5")
    _check(crosscoder.n_snapshots, presence, min_run)
    norms = crosscoder.decoder_norms.detach().cpu().float()
    firing = measure_firing(crosscoder, acts) if isinstance(acts, Activations) else acts
    rate = torch.full((len(norms),), torch.nan) if firing is None else firing.rate
    silent = rate <= min_firing_rate
    table = classify(norms.masked_fill(silent[:, None], 0.0), presence, min_run=min_run)
    table.insert(0, "feature", np.arange(len(table)))
    table.insert(1, "alive", table["origin"].notna())
    table.insert(2, "firing_rate", rate.numpy())
    snapshots, v = snapshot_columns(crosscoder), relative_norms(norms)
    present = (v >= presence) & torch.tensor(table["alive"].to_numpy())[:, None]
    _add_dates(table, snapshots, present.numpy())
    curves = {"norm": norms, "strength": v.float(), "reldec": norms / norms.sum(1, keepdim=True), "present": present}
    if firing is not None:
        curves |= {"firing_rate": firing.snapshot_rate.float(), "mean_activation": (firing.mean * norms).float()}
    columns = {
        f"{name}/{label}": values[:, s].numpy()
        for name, values in curves.items()
        for s, label in enumerate(snapshots["label"])
    }
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def _add_dates(table: pd.DataFrame, snapshots: pd.DataFrame, present: Any) -> None:
    """Steps and tokens of birth, peak, death and lifetime, each next to its column."""
    for offset, unit in enumerate(("step", "tokens"), start=1):
        dates = snapshots[unit].array
        for name in ("birth", "peak", "death"):
            where = table[name].fillna(-1).to_numpy(dtype=np.int64)
            found = pd.api.extensions.take(dates, where, allow_fill=True)
            table.insert(list(table).index(name) + offset, f"{name}_{unit}", found)
        spans = np.diff(snapshots[unit].to_numpy(dtype=float, na_value=np.nan))
        known = table["alive"] & bool(np.isfinite(spans).all())
        lived = np.where(np.isfinite(spans), spans, 0).astype(np.int64)
        table.insert(
            list(table).index("lifetime") + offset, f"lifetime_{unit}", _integers(present[:, :-1] @ lived, known)
        )


@dataclass(frozen=True)
class Firing:
    """How often, and how strongly, features are active on held-out tokens.

    Attributes:
        n_tokens: how many tokens.
        rate: share of them with f_i > 0.
        rms: root of the mean of f_i^2 over all of them.
        snapshot_rate: share of them with f_is > 0: `rate` wherever the gate is shared, less for JumpReLU.
        mean: mean of f_is over tokens where it is active, NaN where it never is.
    """

    n_tokens: int
    rate: Float[Tensor, " F"]
    rms: Float[Tensor, " F"]
    snapshot_rate: Float[Tensor, "F S"]
    mean: Float[Tensor, "F S"]


@torch.no_grad()
def measure_firing(crosscoder: Crosscoder, acts: Activations) -> Firing:
    """Firing of every feature on the held-out activations, in one pass and in float64.

    Args:
        crosscoder: any.
        acts: activations of its snapshots.

    Raises:
        UserError: no activations are held out, or they are not the crosscoder's.
    """
    check_activations(crosscoder, acts)
    F, S = crosscoder.cfg.d_sae, crosscoder.n_snapshots
    # one column is enough where one gate serves all snapshots
    gates = S if crosscoder.gate_per_snapshot else 1
    counts, sums = torch.zeros(F, gates).double(), torch.zeros(F, gates).double()
    active, squares, n = torch.zeros(F).double(), torch.zeros(F).double(), 0
    for _, features in held_out_features(crosscoder, acts):
        n += len(features)
        active += features.count_nonzero(0).cpu()
        squares += features.square().sum(0).cpu()
        for s in range(gates):
            gated = crosscoder.snapshot_acts(features, s)
            counts[:, s] += gated.count_nonzero(0).cpu()
            sums[:, s] += gated.sum(0).cpu()
    return Firing(n, active / n, (squares / n).sqrt(), (counts / n).expand(F, S), (sums / counts).expand(F, S))


def firing_rates(crosscoder: Crosscoder, acts: Activations) -> Float[Tensor, " F"]:
    """Share of held-out tokens on which each feature is active, in float64.

    Raises:
        UserError: no activations are held out, or they do not fit the crosscoder.
    """
    counts, n = torch.zeros(crosscoder.cfg.d_sae, dtype=torch.int64), 0
    for _, features in held_out_features(crosscoder, acts):
        counts += features.count_nonzero(0).cpu()
        n += len(features)
    return counts.double() / n


@torch.no_grad()
def held_out_features(
    crosscoder: Crosscoder, acts: Activations
) -> Iterator[tuple[Float[Tensor, "B S D"], Float[Tensor, "B F"]]]:
    """Held-out activations and their features, dense, as many tokens at a time as memory allows.

    Raises:
        UserError: no activations are held out, or they do not fit the crosscoder.
    """
    if isinstance(crosscoder, CrosscoderTrainingSAE):
        crosscoder = crosscoder.to_inference()  # in training the gate may depend on the batch
    n = 0
    for x in acts.held_out(batch_tokens(crosscoder.cfg.d_sae)):
        n += len(x)
        if len(x):
            x = x.to(crosscoder.W_dec.device)
            yield x, crosscoder.encode(x)
    if not n:
        raise UserError("no activations are held out: give Activations(held_out_tokens=...) of 1 or more")


def check_activations(crosscoder: Crosscoder, acts: Activations) -> None:
    """Refuse activations of other snapshots, or of another hook point, than the crosscoder was trained on.

    A crosscoder that does not record where it comes from is taken at its word.

    Raises:
        UserError: another number of snapshots, other weights, or another hook point.
    """
    metadata = crosscoder.cfg.metadata
    recorded: list[dict[str, Any]] = metadata.snapshots or []
    if not any(row.get("fingerprint") for row in recorded):
        return
    if metadata.hook_name and canonical_hook(metadata.hook_name) != canonical_hook(acts.hook_name):
        raise UserError(
            f"the crosscoder was trained on {metadata.hook_name}, the activations are those of {acts.hook_name}: "
            f"give Activations(..., hook_name={metadata.hook_name!r})"
        )
    check_snapshots(crosscoder, acts.snapshots)


@torch.no_grad()
def rotation(crosscoder: Crosscoder, reference: int = -1, *, min_norm: float = 0.05) -> Float[Tensor, "F S"]:
    """Cosine of every decoder row with the feature's row at the reference snapshot, by default the last.

    Args:
        crosscoder: any.
        reference: index of a snapshot.
        min_norm: rows below this share of the feature's largest norm have no direction. Rows can start equal in all
            snapshots: without this, features that were never used would seem not to have turned.

    Returns:
        Cosines in [-1, 1], NaN where the row or the reference row has no direction.

    Raises:
        UserError: no such snapshot.
    """
    rows, S = crosscoder.W_dec_by_snapshot, crosscoder.n_snapshots
    if not -S <= reference < S:
        raise UserError(f"reference={reference} is no snapshot: give an index from {-S} to {S - 1}")
    directed = relative_norms(crosscoder.decoder_norms) >= min_norm
    # one snapshot at a time: (F, S, D) once more is too much for large crosscoders
    cosines = [cosine_similarity(rows[:, s].float(), rows[:, reference].float(), dim=-1).cpu() for s in range(S)]
    return torch.stack(cosines, 1).masked_fill(~(directed & directed[:, [reference]]), torch.nan)


def snapshot_columns(crosscoder: Crosscoder) -> pd.DataFrame:
    """label, step and tokens of the crosscoder's snapshots, from its metadata; labels are indices where it has none."""
    recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
    if not recorded:
        recorded = [{"label": str(s)} for s in range(crosscoder.n_snapshots)]
    columns: dict[str, Any] = {"label": [str(row["label"]) for row in recorded]}
    for unit in ("step", "tokens"):
        columns[unit] = pd.array([row.get(unit) for row in recorded], dtype="Int64")
    return pd.DataFrame(columns)


def batch_tokens(d_sae: int) -> int:
    """Tokens to encode at a time, so that dense activations of `d_sae` features stay small."""
    return max(1, min(4096, _MAX_FEATURE_BYTES // (4 * d_sae)))


def _check(S: int, presence: float, min_run: int) -> None:
    if S < 2:
        raise UserError(f"evolution needs at least 2 snapshots, this crosscoder has {S}: train on more")
    if not 0 < presence <= 1:
        raise UserError(f"presence={presence} is not in (0, 1]: it is a share of a feature's largest norm, such as 0.5")
    if min_run < 1:
        raise UserError(f"min_run={min_run} is not possible: give 1 or more snapshots in a row")


def _integers(values: Any, valid: Any) -> pd.Series:
    return pd.Series(values, dtype="Int64").where(valid)


def _text(values: Any, valid: Any) -> pd.Series:
    return pd.Series(np.where(valid, values.astype(object), None), dtype=object)
