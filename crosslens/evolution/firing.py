"""How often and how strongly every feature fires on held-out tokens. Symbols: S snapshots, F features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.evolution.held_out import Block, check_activations, read


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
    sums = FiringSums(crosscoder)
    read(crosscoder, acts, sums, purpose="Firing rates")
    return sums.result()


class FiringSums:
    """The accumulator of `measure_firing`."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.F, self.S = crosscoder.cfg.d_sae, crosscoder.n_snapshots
        # a gate shared by all snapshots needs one column only
        self.gates = self.S if crosscoder.gate_per_snapshot else 1
        self.counts, self.sums = torch.zeros(2, self.F, self.gates).double()
        self.active, self.squares = torch.zeros(2, self.F).double()
        self.n = 0

    def add(self, block: Block) -> None:
        """Take the next tokens."""
        self.n += len(block)
        self.active += block.count()
        self.squares += block.count(block.pairs.values.double().square())
        for s in range(self.gates):
            gated = block.gated(s)
            self.counts[:, s] += block.count(gated != 0)
            self.sums[:, s] += block.count(gated)

    def result(self) -> Firing:
        """Rates and means."""
        F, S, n = self.F, self.S, self.n
        rms = (self.squares / n).sqrt()
        return Firing(
            n, self.active / n, rms, (self.counts / n).expand(F, S), (self.sums / self.counts).expand(F, S)
        )  # fmt: skip
