"""One pass over the held-out activations, for all analyses together.

1. Each block of tokens is read and encoded once (`held_out_features`); `Block` has what analyses make of it: scaled
   activations, active pairs of a token and a feature, and the reconstruction error. Sums run over active pairs only.
2. An analysis of the tokens is an accumulator: its constructor starts it, `add` takes a block, and `result` ends it. It
   is in the file of its analysis, with the table it makes. `read` feeds any number of them in one pass.
3. What is wanted before the pass, covariances of the activations and a sample of them, comes from a reading without
   encoding: `read_activations`.

Symbols: B tokens, S snapshots, D d_model, F features, p active pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag
from tqdm.auto import tqdm

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.snapshots.checks import check_snapshots
from crosslens.snapshots.hooks import canonical_hook

_MAX_FEATURE_BYTES = 1 << 28  # of dense feature activations (B, F) in memory at a time


@runtime_checkable
class Accumulator(Protocol):
    """What one pass over the held-out tokens feeds."""

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        ...


class Pairs(NamedTuple):
    """The active pairs of a token and a feature, by feature and then by token."""

    tokens: Int[Tensor, " p"]
    """Token of each pair, counted from the first of the block."""
    features: Int[Tensor, " p"]
    """Feature of each pair."""
    values: Float[Tensor, " p"]
    """f_i of each pair."""


class Block:
    """Some held-out tokens and their features.

    Attributes:
        crosscoder: whose features these are.
        x: (B, S, D) raw activations.
        features: (B, F) dense features f_i.
        first: index of the first token among all held-out ones.
    """

    def __init__(
        self, crosscoder: Crosscoder, x: Float[Tensor, "B S D"], features: Float[Tensor, "B F"], first: int
    ) -> None:
        self.crosscoder, self.x, self.features, self.first = crosscoder, x, features, first
        self._gated: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def scaled(self) -> Float[Tensor, "B S D"]:
        """Activations in the space the crosscoder is trained in."""
        return self.crosscoder.scale(self.x)

    @cached_property
    def pairs(self) -> Pairs:
        """The active pairs."""
        tokens, features = self.features.nonzero(as_tuple=True)
        order = features.argsort(stable=True)
        tokens, features = tokens[order], features[order]
        return Pairs(tokens, features, self.features[tokens, features])

    def gated(self, s: int) -> Float[Tensor, " p"]:
        """f_is of the pairs at snapshot s: f_i where the gate is shared."""
        if not self.crosscoder.gate_per_snapshot:
            return self.pairs.values
        if s not in self._gated:
            here = self.crosscoder.snapshot_acts(self.features, s)
            self._gated[s] = here[self.pairs.tokens, self.pairs.features]
        return self._gated[s]

    @cached_property
    def error(self) -> Float[Tensor, "B S D"]:
        """What the reconstruction leaves of the scaled activations."""
        crosscoder, (tokens, features, _) = self.crosscoder, self.pairs
        order = tokens.argsort(stable=True)
        first = starts(tokens, len(self))

        def decoded(rows: Tensor, values: Tensor) -> Tensor:
            values = values[order].to(rows.dtype)
            return embedding_bag(features[order], rows, first, mode="sum", per_sample_weights=values)

        if crosscoder.gate_per_snapshot:
            rows = crosscoder.W_dec_by_snapshot
            parts = [decoded(rows[:, s].contiguous(), self.gated(s)) for s in range(crosscoder.n_snapshots)]
            rebuilt = torch.stack(parts, 1)
        else:
            rebuilt = decoded(crosscoder.W_dec, self.gated(0)).view_as(self.scaled)
        return (self.scaled - crosscoder.b_dec_by_snapshot).sub_(rebuilt)

    def count(self, weights: Shaped[Tensor, " p"] | None = None) -> Tensor:
        """Number of pairs of every feature, or the sum in float64 of their weights (F,), on the host."""
        weights = None if weights is None else weights.double()
        return torch.bincount(self.pairs.features, weights, self.features.shape[1]).double().cpu()

    def sum_by_feature(self, rows: Float[Tensor, "B N"], weights: Shaped[Tensor, " p"]) -> Float[Tensor, "F N"]:
        """For every feature the weighted sum of the rows of its tokens."""
        rows, weights = rows.contiguous(), weights.to(rows.dtype)
        return embedding_bag(self.pairs.tokens, rows, self._starts, mode="sum", per_sample_weights=weights)

    @cached_property
    def _starts(self) -> Int[Tensor, " F"]:
        return starts(self.pairs.features, self.features.shape[1])


@torch.no_grad()
def read(
    crosscoder: Crosscoder, acts: Activations, *accumulators: Accumulator, purpose: str = "Held-out features"
) -> None:
    """Encode the held-out activations once, and give every block to all accumulators.

    Args:
        crosscoder: trained on the snapshots of `acts`.
        acts: with held-out tokens.
        accumulators: what is fed.
        purpose: what is read, in a word or two, for the progress bar.

    Raises:
        UserError: no activations are held out, or they do not fit the crosscoder.
    """
    first = 0
    for x, features in held_out_features(crosscoder, acts, purpose):
        block = Block(crosscoder, x, features, first)
        first += len(x)
        del x, features
        for each in accumulators:
            each.add(block)


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
    with tqdm(desc=purpose, unit=" tokens", unit_scale=True, leave=False, delay=2) as bar:
        for x in read_activations(crosscoder, acts):
            yield x, crosscoder.encode(x)
            bar.update(len(x))


def read_activations(crosscoder: Crosscoder, acts: Activations) -> Iterator[Float[Tensor, "B S D"]]:
    """Yield the held-out activations in the same blocks, on the crosscoder's device, without encoding them.

    Raises:
        UserError: no activations are held out.
    """
    n = 0
    for x in acts.held_out(batch_tokens(crosscoder.cfg.d_sae)):
        n += len(x)
        if len(x):
            yield x.to(crosscoder.W_dec.device)
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


def batch_tokens(d_sae: int) -> int:
    """Tokens to encode at a time so that the dense activations of `d_sae` features stay small."""
    return max(1, min(4096, _MAX_FEATURE_BYTES // (4 * d_sae)))


def starts(ids: Int[Tensor, " p"], n: int) -> Int[Tensor, " n"]:
    """Where the pairs of each of n tokens or features start, when they are in its order."""
    counts = torch.bincount(ids, minlength=n)
    return counts.cumsum(0) - counts
