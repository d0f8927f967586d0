"""Compare the predictions of every snapshot with n-gram statistics, next to the features it has.

With p_s the next-token prediction of snapshot s and p1, p2 the unigram and bigram distributions of the training corpus,
averaged over the predictions of some sequences (nats per token):

    KL1  = E KL(p1 || p_s(.|x_<=t))
    KL2  = E KL(p2(.|x_t) || p_s(.|x_<=t))
    loss = E -log p_s(x_t+1|x_<=t)

The lowest loss possible from the counts alone is H1 or H2, the entropies of p1 and p2. Ge et al. (arXiv 2509.17196)
report these curves without formulas. The other direction, KL(p_s || p2), is infinite at any pair missing from the
corpus, so it is left out. Intervals come from a bootstrap over whole sequences. `crosslens.evolution.phases` derives
the phases of training from these curves.

Symbols: N sequences, T positions, S snapshots, F features, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.geometry import total_dimensionality
from crosslens.evolution.lifecycles import Firing, classify_lifecycles, measure_firing, rotation, snapshot_columns
from crosslens.evolution.ngrams import NgramCounts, is_predicted
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings

_PAIRS = 1 << 22  # (prediction, follower) pairs in memory at a time


@dataclass(frozen=True)
class Dynamics:
    """Divergences and losses of every snapshot, summed over the predictions of each sequence, by `measure_dynamics`.

    Attributes:
        snapshots: label, step and tokens, one row per snapshot.
        kl1: (N, S) sums of KL(p1 || p_s), in nats.
        kl2: (N, S) sums of KL(p2 || p_s), over predictions whose context occurs in the counts.
        loss: (N, S) sums of -log p_s.
        n: (N,) number of predictions.
        known: (N,) number of predictions whose context occurs in the counts.
        unigram_entropy: H1 of the counts, in nats per token.
        bigram_entropy: H2 of the counts, in nats per token.
    """

    snapshots: pd.DataFrame
    kl1: Float[Tensor, "N S"]
    kl2: Float[Tensor, "N S"]
    loss: Float[Tensor, "N S"]
    n: Int[Tensor, " N"]
    known: Int[Tensor, " N"]
    unigram_entropy: float
    bigram_entropy: float

    def draws(self, name: str, n_bootstrap: int, seed: int = 0) -> Float[np.ndarray, "draws S"]:
        """Bootstrap the mean over predictions, in nats; draws with equal seeds are paired.

        Args:
            name: kl1, kl2 or loss.
            n_bootstrap: number of draws of whole sequences, with replacement.
            seed: seed for the draws.
        """
        N = len(self.n)
        weights = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), n_bootstrap).astype(float)
        return (weights @ getattr(self, name).numpy()) / (weights @ self._counts(name).numpy())[:, None]

    def mean(self, name: str) -> Float[np.ndarray, " S"]:
        """Mean of `name` (kl1, kl2 or loss) over all predictions, in nats."""
        return (getattr(self, name).sum(0) / self._counts(name).sum()).numpy()

    def _counts(self, name: str) -> Float[Tensor, " N"]:
        return (self.known if name == "kl2" else self.n).double()

    def to_frame(self, *, level: float = 0.95, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Tabulate the means with their intervals, a row per snapshot.

        Args:
            level: confidence level of the intervals.
            n_bootstrap: bootstrap draws.
            seed: seed for the draws.

        Returns:
            snapshot, label, step, tokens; kl1, kl2 and loss, each with _low and _high, in nats; bigram_progress (of the
            function of that name), h1, h2, n (number of predictions), known (share of them in the mean of kl2).
        """
        columns: dict[str, Any] = {name: self.snapshots[name].array for name in self.snapshots}
        columns = {"snapshot": np.arange(len(self.snapshots)), **columns}
        for name in ("kl1", "kl2", "loss"):
            drawn = self.draws(name, n_bootstrap, seed)
            columns[name] = self.mean(name)
            columns[f"{name}_low"], columns[f"{name}_high"] = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], 0)
        columns["bigram_progress"] = bigram_progress(columns["kl2"][None])[0]
        columns |= {"h1": self.unigram_entropy, "h2": self.bigram_entropy}
        columns |= {"n": int(self.n.sum()), "known": float(self.known.sum() / self.n.sum())}
        return pd.DataFrame(columns)


@torch.no_grad()
def measure_dynamics(
    snapshots: Snapshots,
    counts: NgramCounts,
    tokens: Int[Tensor, "N T"],
    *,
    min_count: int = 1,
    batch_tokens: int = 4096,
    settings: ModelSettings | None = None,
) -> Dynamics:
    """Measure unigram KL, bigram KL and loss of every snapshot, one model at a time.

    Args:
        snapshots: the models.
        counts: n-gram counts of the training corpus, by `count_ngrams`.
        tokens: sequences to predict, such as `Activations.held_out_tokens()`; intervals resample these.
        min_count: contexts with fewer counts are left out of KL2.
        batch_tokens: tokens per forward pass; all their logits are in memory.
        settings: how the models run.

    Raises:
        UserError: counts of another tokenizer, tokens outside its vocabulary, nothing to predict, sequences longer than
            the models' context, logits that are not finite.
    """
    counts.check(snapshots.tokenizer)
    if min_count < 1:
        raise UserError(f"min_count={min_count} must be 1 or more")
    V, T = len(counts.unigrams), int(tokens.shape[1])
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < V:
        raise UserError(
            f"token id {int(tokens.max())} is outside the vocabulary of {V:,}: tokenise with the snapshots' tokenizer"
        )
    if snapshots.n_ctx < T:
        raise UserError(f"sequences of {T} tokens exceed the models' context of {snapshots.n_ctx}: cut them")
    predicted = is_predicted(tokens, snapshots.tokenizer)
    contexts = counts.contexts
    known = predicted & (contexts[tokens[:, :-1].long()] >= min_count)
    if not predicted.any() or not known.any():
        raise UserError(
            f"none of the {int(predicted.sum())} predictions has a context with min_count={min_count} or more counts: "
            "count more text, or text like these sequences"
        )
    settings = settings or ModelSettings()
    ngrams = _Ngrams(counts, settings.device)
    snapshots.check(weights=False)
    sums: dict[str, list[Tensor]] = {"kl1": [], "kl2": [], "loss": []}
    step = max(1, batch_tokens // T)
    for s in tqdm(range(len(snapshots)), desc="Dynamics", unit="snapshot", leave=False):
        model: Any = snapshots.model(s, settings)
        found: list[list[Tensor]] = []
        for batch, use, sure in zip(tokens.split(step), predicted.split(step), known.split(step), strict=True):
            batch = batch.long().to(settings.device)
            log_p = model(batch, return_type="logits")[:, :-1].float().log_softmax(-1)
            if not torch.isfinite(log_p).all():
                raise UserError(
                    f"snapshot {snapshots.labels[s]} has non-finite logits: check its weights or leave it out"
                )
            found.append([part.sum(1).cpu() for part in ngrams.divergences(log_p, batch, use, sure)])
        for name, parts in zip(sums, zip(*found, strict=True), strict=True):
            sums[name].append(torch.cat(parts))
    table = pd.DataFrame({"label": snapshots.labels})
    for unit, values in (("step", snapshots.steps), ("tokens", snapshots.tokens)):
        table[unit] = pd.array(values, dtype="Int64")
    stacked = {name: torch.stack(values, 1) for name, values in sums.items()}
    return Dynamics(
        table, **stacked, n=predicted.sum(1), known=known.sum(1),
        unigram_entropy=counts.unigram_entropy, bigram_entropy=counts.bigram_entropy,
    )  # fmt: skip


class _Ngrams:
    """Counts as probabilities, on the device of the models."""

    def __init__(self, counts: NgramCounts, device: str) -> None:
        self.p1 = (counts.unigrams.double() / counts.n_pairs).float().to(device)
        self.h1, self.h2 = counts.unigram_entropy, counts.bigram_entropies.to(device)
        self.starts, self.followers = counts.starts.to(device), counts.followers.to(device)
        self.p2 = (counts.counts.double() / counts.contexts[counts.firsts()]).to(device)

    def divergences(
        self,
        log_p: Float[Tensor, "b t V"],
        tokens: Int[Tensor, "b T"],
        use: Bool[Tensor, "b t"],
        sure: Bool[Tensor, "b t"],
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"], Float[Tensor, "b t"]]:
        """KL1, KL2 and loss of every prediction, 0 where it is left out."""
        use, sure = use.to(log_p.device), sure.to(log_p.device)
        kl1 = -self.h1 - (log_p[..., : len(self.p1)] @ self.p1).double()
        loss = -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1).double()
        kl2 = torch.zeros_like(loss)
        where = sure.nonzero()
        first = tokens[:, :-1][sure]
        lengths = self.starts.diff()[first]
        # few tokens follow a given context: read only these pairs, a bounded number at a time
        chunks = torch.bucketize(lengths.cumsum(0), torch.arange(_PAIRS, int(lengths.sum()) + _PAIRS, _PAIRS).to(first))
        for chunk in chunks.unique().tolist():
            rows, starts, n = (values[chunks == chunk] for values in (where, self.starts[first], lengths))
            owner = torch.arange(len(n), device=n.device).repeat_interleave(n)
            pair = torch.arange(len(owner), device=n.device) - (n.cumsum(0) - n)[owner] + starts[owner]
            b, t = rows[owner].unbind(1)
            cross = self.p2[pair] * log_p[b, t, self.followers[pair]].double()
            kl2[rows[:, 0], rows[:, 1]] = -cross.new_zeros(len(n)).index_add(0, owner, cross)
        kl2[sure] -= self.h2[first]
        return kl1 * use, kl2, loss * use


def dynamics_table(
    dynamics: Dynamics,
    crosscoder: Crosscoder,
    acts: Activations | Firing,
    *,
    presence: float = 0.5,
    min_cosine: float = 0.5,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Tabulate predictions and features side by side, a row per snapshot.

    Args:
        dynamics: dynamics of the crosscoder's snapshots, or of more snapshots of the same run.
        crosscoder: trained on two snapshots or more.
        acts: activations of its snapshots, or the result of `measure_firing`; features that never fire are left out.
        presence: a feature is present where its norm is at least this share of its largest norm.
        min_cosine: a feature is settled while its cosine with its row at the last snapshot is at least this.
        n_bootstrap: bootstrap draws.
        seed: seed for the draws and the random directions.

    Returns:
        The columns of `Dynamics.to_frame`, then present (number of features), born (emergent features whose birth is
        here), settled (features that keep their final direction from here on), alive (features that ever fire),
        dimensionality (total / D) and random_dimensionality (of as many random directions). They are missing at
        snapshots that the crosscoder does not have.

    Raises:
        UserError: a crosscoder with snapshots that the dynamics lack, or activations of other snapshots.
    """
    places = places_of(dynamics, crosscoder)
    firing = measure_firing(crosscoder, acts)
    dimensionality = total_dimensionality(crosscoder, firing, presence=presence, seed=seed)
    births, settling = feature_dates(crosscoder, firing, presence, min_cosine)
    S = crosscoder.n_snapshots
    table = dynamics.to_frame(n_bootstrap=n_bootstrap, seed=seed)
    columns: dict[str, Any] = {
        "present": dimensionality["present"].to_numpy(),
        "born": np.bincount(births, minlength=S),
        "settled": np.bincount(settling, minlength=S).cumsum(),
        "alive": np.full(S, int((firing.rate > 0).sum())),
        "dimensionality": dimensionality["share"].to_numpy(),
        "random_dimensionality": dimensionality["random_share"].to_numpy(),
    }
    for name, values in columns.items():
        found = np.full(len(table), np.nan)
        found[places] = values
        table[name] = found if name.endswith("dimensionality") else pd.Series(found).astype("Int64")
    return table


def feature_dates(crosscoder: Crosscoder, firing: Firing, presence: float, min_cosine: float) -> tuple[Any, Any]:
    """Births of emergent features, and the snapshots from which features that fire keep their direction.

    Returns:
        Two arrays of snapshot indices, each in the order of its features.

    Raises:
        UserError: a threshold out of range, one snapshot only.
    """
    if not -1 < min_cosine <= 1:
        raise UserError(f"min_cosine={min_cosine} is not in (-1, 1]: it is a cosine, such as 0.5")
    alive = (firing.rate > 0)[:, None].to("cpu")
    lifecycles = classify_lifecycles(crosscoder.decoder_norms.detach().cpu().float() * alive, presence)
    births = lifecycles.loc[lifecycles["origin"] == "emergent", "birth"].to_numpy(dtype=np.int64)
    kept = (rotation(crosscoder) >= min_cosine) & alive
    settled = first_for_good(kept.numpy())
    return births, settled[settled < crosscoder.n_snapshots]


def places_of(dynamics: Dynamics, crosscoder: Crosscoder) -> list[int]:
    """Index in the dynamics of every snapshot of the crosscoder.

    Raises:
        UserError: a snapshot that the dynamics lack or have at another step.
    """
    ours, theirs = dynamics.snapshots, snapshot_columns(crosscoder)
    index = {label: i for i, label in enumerate(ours["label"])}
    for label, step in zip(theirs["label"], theirs["step"], strict=True):
        if label not in index or (not pd.isna(step) and step != ours["step"].iloc[index[label]]):
            raise UserError(
                f"the crosscoder's snapshot {label!r} is not in the dynamics, which have {', '.join(index)}: measure "
                "both on the same snapshots"
            )
    return [index[label] for label in theirs["label"]]


def first_for_good(holds: Any) -> Any:
    """For every row, the first column from which all are True; the number of columns if the last is False."""
    S = holds.shape[1]
    false = ~holds[:, ::-1]
    return np.where(false.any(1), S - false.argmax(1), 0)


def bigram_progress(kl2: Float[np.ndarray, "n S"]) -> Float[np.ndarray, "n S"]:
    """Share of KL2's total fall, from the first snapshot to its minimum, reached by each snapshot.

    It runs from 0 to 1 and never decreases; it is 0 throughout if KL2 does not fall.
    """
    lowest = np.minimum.accumulate(kl2, axis=1)
    fall = lowest[:, :1] - lowest
    return fall / np.where(fall[:, -1:] > 0, fall[:, -1:], 1)
