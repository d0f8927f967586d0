"""Compare the predictions of every snapshot with n-gram statistics, next to the features it has.

With p_s the next-token prediction of snapshot s, and p1 and p2 the unigram and bigram distributions of the training
corpus, over the predictions of some sequences (nats per token):

    KL1  = KL(p1 || E p_s)                                      E over all contexts
    KL2  = E_x KL(p2(.|x) || E[p_s | the context ends in x])    x as frequent as in the sequences
    loss = E -log p_s(x_t+1|x_<=t)

Predictions are averaged over contexts *before* they are compared. The mean of the divergences of single predictions
also grows with every bit of context that a model uses: it is lowest for a model that knows n-grams and nothing else,
and would say that a good model has unlearnt its unigrams. Averaged, a model that knows the statistics and more has a
divergence of 0.

The lowest loss possible from the counts alone is H1 or H2, the entropies of p1 and p2. Ge et al. (arXiv 2509.17196)
report such curves without formulas. The other direction, KL(p_s || p2), is infinite at any pair missing from the
corpus, so it is left out. Intervals come from a bootstrap over whole sequences, with the averages computed anew for
every draw; where those of every sequence do not fit into memory, groups of sequences are drawn. An average over few
contexts overstates a divergence, by up to P / 2N' nats over N' predictions, and a draw has still fewer different ones:
what the draws exceed the plain divergence by in the mean is taken off it, twice off them (Efron's correction). This
leaves contexts that occur once, so measure on enough text.
`crosslens.evolution.phases` derives the phases of training from these curves.

Symbols: N sequences, T positions, S snapshots, F features, V tokens of the vocabulary, G groups of sequences, P pairs
of a context and a token that follows it in the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.activations.plan import NANOSECOND, logit_bytes, logit_sequences
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import each
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.firing import Firing, measure_firing
from crosslens.evolution.geometry import rotation
from crosslens.evolution.history import Evolution, evolve
from crosslens.evolution.lifecycles import PRESENCE
from crosslens.evolution.ngrams import NgramCounts, is_predicted
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.stats import interval, resample_counts

_PAIRS = 1 << 22  # (prediction, follower) pairs in memory at a time
_SUMS = 1 << 26  # numbers in memory that the averages of all groups may take

MIN_COSINE = 0.5
"""Cosine with its final direction from which a feature is settled, where no other seeds say how far a seed fixes it."""


@dataclass(frozen=True)
class Dynamics:
    """Divergences and losses of every snapshot, by `measure_predictions`: as measured, and in every bootstrap draw.

    Attributes:
        snapshots: label, step and tokens, one row per snapshot.
        kl1: (1 + draws, S) KL(p1 || E p_s), in nats; the first row is the measurement. Draws are paired (a row
            of `kl1`, `kl2` and `loss` is of the same sequences, at all snapshots). Corrected for the bias of averages
            over few contexts, so a divergence of about 0 may be below it.
        kl2: (1 + draws, S) E_x KL(p2(.|x) || E[p_s | x]), over predictions whose context occurs in the counts.
        loss: (1 + draws, S) mean of -log p_s.
        n: number of predictions.
        known: share of the predictions whose context occurs in the counts.
        n_groups: number of sequences, or of groups of them, that are drawn.
        unigram_entropy: H1 of the counts, in nats per token.
        bigram_entropy: H2 of the counts, in nats per token.
    """

    snapshots: pd.DataFrame
    kl1: Float[np.ndarray, "draws S"]
    kl2: Float[np.ndarray, "draws S"]
    loss: Float[np.ndarray, "draws S"]
    n: int
    known: float
    n_groups: int
    unigram_entropy: float
    bigram_entropy: float

    @property
    def n_bootstrap(self) -> int:
        """Number of draws."""
        return len(self.loss) - 1

    def to_frame(self, *, level: float = 0.95) -> pd.DataFrame:
        """Tabulate the measurements with their intervals, a row per snapshot.

        Args:
            level: confidence level of the intervals, percentiles of the draws.

        Returns:
            snapshot, label, step, tokens; kl1, kl2 and loss, each with _low and _high, in nats; bigram_progress (of the
            function of that name), h1, h2, n (number of predictions), known (share of them in the mean of kl2).
        """
        columns: dict[str, Any] = {name: self.snapshots[name].array for name in self.snapshots}
        columns = {"snapshot": np.arange(len(self.snapshots)), **columns}
        for name in ("kl1", "kl2", "loss"):
            values = getattr(self, name)
            columns[name] = values[0]
            columns[f"{name}_low"], columns[f"{name}_high"] = interval(values[1:], level)
        columns["bigram_progress"] = bigram_progress(self.kl2[:1])[0]
        columns |= {"h1": self.unigram_entropy, "h2": self.bigram_entropy, "n": self.n, "known": self.known}
        return pd.DataFrame(columns)


@torch.no_grad()
def measure_predictions(
    snapshots: Snapshots,
    counts: NgramCounts,
    tokens: Int[Tensor, "N T"],
    *,
    min_count: int = 1,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_tokens: int = 4096,
    settings: ModelSettings | None = None,
) -> Dynamics:
    """Measure unigram KL, bigram KL and loss of every snapshot, one model at a time.

    Args:
        snapshots: the models.
        counts: n-gram counts of the training corpus, by `count_ngrams`.
        tokens: sequences to predict, such as `Activations.held_out_tokens()`; intervals resample these.
        min_count: contexts with fewer counts are left out of KL2.
        n_bootstrap: bootstrap draws.
        seed: seed for the draws.
        batch_tokens: tokens per forward pass; all their logits are in memory.
        settings: how the models run.

    Raises:
        UserError: counts of another tokenizer, tokens outside its vocabulary, nothing to predict, sequences longer than
            the models' context, logits that are not finite.
    """
    counts.check(snapshots.tokenizer)
    if min_count < 1:
        raise UserError(f"min_count={min_count} must be 1 or more")
    if n_bootstrap < 1:
        raise UserError(f"n_bootstrap={n_bootstrap} must be 1 or more")
    V, (N, T) = len(counts.unigrams), tokens.shape
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < V:
        raise UserError(
            f"token id {int(tokens.max())} is outside the vocabulary of {V:,}: tokenise with the snapshots' tokenizer"
        )
    if snapshots.n_ctx < T:
        raise UserError(f"sequences of {T} tokens exceed the models' context of {snapshots.n_ctx}: cut them")
    predicted = is_predicted(tokens, snapshots.tokenizer)
    known = predicted & (counts.contexts[tokens[:, :-1].long()] >= min_count)
    if not predicted.any() or not known.any():
        raise UserError(
            f"none of the {int(predicted.sum())} predictions has a context with min_count={min_count} or more counts: "
            "count more text, or text like these sequences"
        )
    settings = settings or ModelSettings()
    averages = _Averages(counts, tokens[:, :-1][known].unique().long(), N, settings.device)
    G = averages.n_groups
    group = torch.arange(N) * G // N
    draws = torch.from_numpy(np.vstack([np.ones((1, G)), resample_counts(G, n_bootstrap, seed)]))
    snapshots.check(weights=False)
    step = min(max(1, batch_tokens // T), logit_sequences(len(snapshots.tokenizer), T))

    def measure_at(s: int) -> list[np.ndarray]:
        model: Any = snapshots.model(s, settings)
        averages.clear()
        for batch, use, sure, of in zip(
            tokens.split(step), predicted.split(step), known.split(step), group.split(step), strict=True
        ):
            batch = batch.long().to(settings.device)
            log_p = model(batch, return_type="logits")[:, :-1].float().log_softmax(-1)
            if not torch.isfinite(log_p).all():
                raise UserError(
                    f"snapshot {snapshots.labels[s]} has non-finite logits: check its weights or leave it out"
                )
            averages.add(log_p, batch, use, sure, of)
        kl1, kl2, loss = averages.divergences(draws)
        return [_without_bias(kl1), _without_bias(kl2), loss]

    found = each(measure_at, range(len(snapshots)), "Dynamics")
    table = pd.DataFrame({"label": snapshots.labels})
    for unit, values in (("step", snapshots.steps), ("tokens", snapshots.tokens)):
        table[unit] = pd.array(values, dtype="Int64")
    kl1, kl2, loss = (np.stack(values, 1) for values in zip(*found, strict=True))
    n = int(predicted.sum())
    return Dynamics(
        table, kl1=kl1, kl2=kl2, loss=loss, n=n, known=int(known.sum()) / n, n_groups=G,
        unigram_entropy=counts.unigram_entropy, bigram_entropy=counts.bigram_entropy,
    )  # fmt: skip


def _without_bias(values: Float[np.ndarray, " draws"]) -> Float[np.ndarray, " draws"]:
    """A measurement and its draws, less the bias that the draws have over the measurement."""
    bias = values[1:].mean() - values[0]
    return np.concatenate([values[:1] - bias, values[1:] - 2 * bias])


def plan_predictions(
    counts: NgramCounts, tokens: Int[Tensor, "N T"], tokenizer: Any, n_bootstrap: int = 1000
) -> tuple[int, float]:
    """Count what `measure_predictions` needs besides the models and their passes.

    Args:
        counts: as there.
        tokens: as there.
        tokenizer: of the models.
        n_bootstrap: as there.

    Returns:
        Bytes of memory; and operations of a snapshot, as in `forecast`.
    """
    V, (N, T) = len(counts.unigrams), tokens.shape
    known = is_predicted(tokens, tokenizer) & (counts.contexts[tokens[:, :-1].long()] > 0)
    contexts = tokens[:, :-1][known].unique().long()
    pairs = int(counts.starts.diff()[contexts].sum())
    size = V + pairs + len(contexts)
    groups = _n_groups(N, size)
    # sums in float64, those of pairs once more in float32; five arrays of as many pairs as are summed at a time
    held = 8 * groups * size + 4 * groups * pairs + 5 * 8 * _PAIRS + logit_bytes(V, T)
    # a product and logarithms; softmax and sums of the predictions
    return held, n_bootstrap * size * (2 * groups + 8 * NANOSECOND) + 12 * NANOSECOND * V * tokens.numel()


def _n_groups(n_sequences: int, size: int) -> int:
    """Groups of sequences whose sums, of `size` numbers each, fit into memory."""
    return max(1, min(n_sequences, max(2, _SUMS // size)))


class _Averages:
    """Sums of the predictions of one snapshot over the contexts of every group of sequences.

    Args:
        counts: the counts to compare with.
        contexts: (X,) the tokens, ascending, whose following tokens are compared; only these pairs are kept.
        n_sequences: N.
        device: device of the predictions.
    """

    def __init__(self, counts: NgramCounts, contexts: Int[Tensor, " X"], n_sequences: int, device: str) -> None:
        V = len(counts.unigrams)
        self.p1 = counts.unigrams.double() / counts.n_pairs
        self.h1, self.h2 = counts.unigram_entropy, counts.bigram_entropies[contexts]
        lengths = counts.starts.diff()[contexts]
        self.owner = torch.arange(len(contexts)).repeat_interleave(lengths)
        self.starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])  # in the kept pairs
        kept = counts.starts[contexts][self.owner] + torch.arange(len(self.owner)) - self.starts[self.owner]
        self.followers = counts.followers[kept]
        p2 = counts.counts[kept].double() / counts.contexts[contexts][self.owner]
        shape = len(contexts), len(kept)
        self.p2 = csr_matrix((p2.numpy(), np.arange(len(kept)), self.starts.numpy()), shape)
        self.place = torch.full((V,), -1).index_copy(0, contexts, torch.arange(len(contexts)))
        size = V + len(self.owner) + len(contexts)
        self.n_groups = G = _n_groups(n_sequences, size)
        self.device = device
        self.sums = torch.zeros(G, V, dtype=torch.float64)
        self.pairs = torch.zeros(G * len(self.owner), dtype=torch.float64)
        self.seen = torch.zeros(G * len(contexts), dtype=torch.float64)
        self.loss, self.n = torch.zeros(G, dtype=torch.float64), torch.zeros(G, dtype=torch.float64)

    def clear(self) -> None:
        """Start with another snapshot, in the same memory."""
        for values in (self.sums, self.pairs, self.seen, self.loss, self.n):
            values.zero_()

    def add(
        self,
        log_p: Float[Tensor, "b t V"],
        tokens: Int[Tensor, "b T"],
        use: Bool[Tensor, "b t"],
        sure: Bool[Tensor, "b t"],
        group: Int[Tensor, " b"],
    ) -> None:
        """Add the predictions of some sequences: those in `use`, and for KL2 those in `sure`."""
        V, n, X = len(self.p1), len(self.owner), len(self.h2)
        p = log_p.exp()[..., :V].cpu()
        tokens = tokens.cpu()
        losses = -log_p.gather(-1, tokens[:, 1:, None].to(log_p.device)).squeeze(-1).double().cpu()
        self.loss.index_add_(0, group, (losses * use).sum(1))
        self.n.index_add_(0, group, use.sum(1).double())
        self.sums.index_add_(0, group, (p * use[..., None]).sum(1, dtype=torch.float64))
        where = sure.nonzero()
        place, of = self.place[tokens[:, :-1][sure]], group[where[:, 0]]
        self.seen.index_add_(0, of * X + place, torch.ones(len(place), dtype=torch.float64))
        lengths = self.starts.diff()[place]
        # few tokens follow a given context: read only these pairs, a bounded number at a time
        chunks = torch.bucketize(lengths.cumsum(0), torch.arange(_PAIRS, int(lengths.sum()) + _PAIRS, _PAIRS))
        for chunk in chunks.unique().tolist():
            here = chunks == chunk
            rows, starts, count, at = where[here], self.starts[:-1][place[here]], lengths[here], of[here]
            owner = torch.arange(len(count)).repeat_interleave(count)
            pair = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner] + starts[owner]
            b, t = rows[owner].unbind(1)
            self.pairs.index_add_(0, at[owner] * n + pair, p[b, t, self.followers[pair]].double())

    def divergences(self, draws: Float[Tensor, "n G"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """KL1, KL2 and loss, with every group counted as often as each row of `draws` says."""
        X, n = len(self.h2), len(self.owner)
        smallest = torch.finfo(torch.float32).tiny  # predictions are in float32, and may be 0 there
        heard = self.p1 > 0
        # of the many pairs float32 is enough: each rounds by 1e-7 on its own, and they are averaged
        seen, pairs, rounded = self.seen.view(-1, X), self.pairs.view(-1, n).float(), draws.float()
        kl1, kl2 = torch.empty(len(draws), dtype=torch.float64), torch.empty(len(draws), dtype=torch.float64)
        step = max(1, _PAIRS // max(n, len(self.p1)))
        for start in range(0, len(draws), step):
            part = slice(start, start + step)
            mean = (draws[part] @ self.sums[:, heard]) / (draws[part] @ self.n)[:, None]
            kl1[part] = -self.h1 - mean.clamp(min=smallest).log() @ self.p1[heard]
            often = draws[part] @ seen
            # log of a mean is log of the sum less log of how often, and p2 sums to 1 over the followers of a context
            summed = (pairs.T @ rounded[part].T).clamp_(min=smallest).log_().double()
            cross = torch.from_numpy(self.p2 @ summed.numpy()).T - often.clamp(min=1).log()
            kl2[part] = (often * (-self.h2 - cross)).sum(1) / often.sum(1)
        loss = (draws @ self.loss) / (draws @ self.n)
        return kl1.numpy(), kl2.numpy(), loss.numpy()


def dynamics_table(
    dynamics: Dynamics,
    crosscoder: Crosscoder,
    acts: Activations | Firing | Evolution,
    *,
    presence: float = PRESENCE,
    min_cosine: float = MIN_COSINE,
    seed: int = 0,
) -> pd.DataFrame:
    """Tabulate predictions and features side by side, a row per snapshot.

    Args:
        dynamics: dynamics of the crosscoder's snapshots, or of more snapshots of the same run.
        crosscoder: trained on two snapshots or more.
        acts: the result of `evolve`, whose first measure says where features are present and when they are born; or
            activations of the snapshots or the result of `measure_firing`, for decoder norms. Features that never fire
            are left out.
        presence: without an `Evolution`, a feature is present where its norm is at least this share of its largest.
        min_cosine: a feature is settled while its cosine with its row at the last snapshot is at least this.
        seed: without an `Evolution`, seed for the random directions.

    Returns:
        The columns of `Dynamics.to_frame`, then measure (of presence), present (number of features), born (emergent
        features whose birth is here), settled (features that keep their final direction from here on), alive (features
        that ever fire), dimensionality (total / D) and random_dimensionality (of as many random directions), which are
        missing at snapshots that the crosscoder does not have; and settled_angle (of `min_cosine`, in degrees).

    Raises:
        UserError: a crosscoder with snapshots that the dynamics lack, or activations of other snapshots.
    """
    places = places_of(dynamics, crosscoder)
    evolution = read_evolution(crosscoder, acts, presence, seed)
    births, settling = feature_dates(evolution, min_cosine)
    S = crosscoder.n_snapshots
    table = dynamics.to_frame().assign(measure=evolution.measures[0])
    columns: dict[str, Any] = {
        "present": evolution.present().sum(0),
        "born": np.bincount(births, minlength=S),
        "settled": np.bincount(settling, minlength=S).cumsum(),
        "alive": np.full(S, int((evolution.require_firing().rate > 0).sum())),
        "dimensionality": evolution.dimensionality["share"].to_numpy(),
        "random_dimensionality": evolution.dimensionality["random_share"].to_numpy(),
    }
    table["settled_angle"] = np.rad2deg(np.arccos(min_cosine))
    for name, values in columns.items():
        found = np.full(len(table), np.nan)
        found[places] = values
        table[name] = found if name.endswith("dimensionality") else pd.Series(found).astype("Int64")
    return table


def read_evolution(
    crosscoder: Crosscoder, acts: Activations | Firing | Evolution, presence: float, seed: int = 0
) -> Evolution:
    """How features fire and when they are present: as given, or by decoder norm.

    Raises:
        UserError: an `Evolution` without activations.
    """
    if not isinstance(acts, Evolution):
        return evolve(crosscoder, measure_firing(crosscoder, acts), presence=presence, seed=seed)
    acts.require_firing()
    return acts


def feature_dates(evolution: Evolution, min_cosine: float) -> tuple[Any, Any]:
    """Births of emergent features, and the snapshots from which features that fire keep their direction.

    Returns:
        Two arrays of snapshot indices, each in the order of its features.

    Raises:
        UserError: a threshold out of range, or an evolution without activations.
    """
    if not -1 < min_cosine <= 1:
        raise UserError(f"min_cosine={min_cosine} is not in (-1, 1]: it is a cosine, such as 0.5")
    evolution.require_firing()  # otherwise features that never fire count, too
    lifecycles = evolution.lifecycles()
    births = lifecycles.loc[lifecycles["origin"] == "emergent", "birth"].to_numpy(dtype=np.int64)
    kept = (rotation(evolution.crosscoder) >= min_cosine) & evolution.turning[:, None]
    settled = first_for_good(kept.numpy())
    return births, settled[settled < kept.shape[1]]


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
