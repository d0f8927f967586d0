"""How often and how strongly every feature fires on held-out tokens. Symbols: S snapshots, F features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.evolution.held_out import HeldOut, read


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


def measure_firing(crosscoder: Crosscoder, acts: Activations | HeldOut | Firing) -> Firing:
    """Measure how every feature fires on the held-out activations, with sums in float64.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; an earlier result is returned unchanged.

    Raises:
        UserError: no activations are held out, or they are not the crosscoder's.
    """
    if isinstance(acts, Firing):
        return acts
    held = read(crosscoder, acts, purpose="Firing rates")
    (n, F), S = held.f.shape, crosscoder.n_snapshots
    # a gate shared by all snapshots needs one column only
    gates = [held.gated(s) for s in range(S if crosscoder.gate_per_snapshot else 1)]
    counts, sums = (torch.stack([_by_feature(f, power) for f in gates], 1) for power in (0, 1))
    rms = (_by_feature(held.f, 2) / n).sqrt()
    return Firing(n, _by_feature(held.f, 0) / n, rms, (counts / n).expand(F, S), (sums / counts).expand(F, S))


def _by_feature(f: Any, power: int) -> Float[Tensor, " F"]:
    """Sums of a power of the active values of every feature."""
    return torch.from_numpy(np.bincount(f.indices, f.data.astype(np.float64) ** power, f.shape[1])).double()
