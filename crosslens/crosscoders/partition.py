"""Features that are shared by all snapshots, or dedicated to some of them, by construction.

The first `n_shared` features are shared: each has one decoder row, that of every snapshot (Anthropic, *Insights on
Crosscoder Model Diffing*, 2025). Then come the dedicated ones (arXiv 2602.11729), whose rows of the encoder and of the
decoder are zero at all other snapshots. The rest is free.

Both are linear constraints on the weights W of one feature (S, D), and training keeps to them by orthogonal projection
of the gradients G:

    shared:     G_s <- mean over s of G_s      1/S of the gradient of the one row; Adam ignores the factor
    dedicated:  G_s <- 0 at other snapshots

so Adam gives all copies of a row the same step, and never moves a row that is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.errors import UserError, did_you_mean


def group(key: str, labels: Sequence[str]) -> list[int]:
    """The snapshots that features are dedicated to.

    Args:
        key: the label of a snapshot, or several joined by "+".
        labels: of all snapshots.

    Raises:
        UserError: a label that no snapshot has, or all of them.
    """
    named = [key] if key in labels else key.split("+")
    for label in named:
        if label not in labels:
            raise UserError(
                f"dedicated features are for snapshot {label!r}, which is none of {', '.join(labels)}"
                f"{did_you_mean(label, labels)}: give a label, or several joined by +"
            )
    if len(set(named)) == len(labels):
        raise UserError(f"dedicated features are for all snapshots ({key}): leave one out, or use n_shared")
    return [labels.index(label) for label in named]


def check_partition(n_shared: int, dedicated: Mapping[str, int], d_sae: int, labels: Sequence[str] | None) -> None:
    """Check the settings of a config.

    Args:
        n_shared: number of shared features.
        dedicated: number of dedicated features by snapshot or group.
        d_sae: number of all features.
        labels: of the snapshots; None where they are not known yet.

    Raises:
        UserError: numbers out of range, or an unknown snapshot.
    """
    if n_shared < 0:
        raise UserError(f"n_shared={n_shared} must be 0 or more features")
    for key, count in dedicated.items():
        if count < 1:
            raise UserError(f"dedicated={{{key!r}: {count}}} must be 1 or more features")
        if labels is not None:
            group(key, labels)
    total = n_shared + sum(dedicated.values())
    if total > d_sae:
        raise UserError(
            f"n_shared and dedicated make {total} features, more than d_sae={d_sae}: give fewer, or a larger d_sae"
        )


class Partition(NamedTuple):
    """Which of the features at hand are constrained."""

    shared: slice
    dedicated: list[tuple[slice, list[int]]]
    """Features, and the snapshots where their rows are zero."""

    @staticmethod
    def of(n_shared: int, dedicated: Mapping[str, int], labels: Sequence[str], own: slice) -> Partition:
        """The partition of the features `own` of a crosscoder; see `check_partition` for the others."""
        parts = list(_blocks(n_shared, dedicated))
        here = [slice(max(part.start, own.start) - own.start, min(part.stop, own.stop) - own.start) for part in parts]
        absent = [sorted({*range(len(labels))} - {*group(key, labels)}) for key in dedicated]
        others = [(part, where) for part, where in zip(here[1:], absent, strict=True) if part.start < part.stop]
        return Partition(here[0] if here[0].start < here[0].stop else slice(0, 0), others)

    def project_(self, rows: Float[Tensor, "F S D"], tie: bool) -> None:
        """Project gradients, in place; `tie`: those of shared features are those of one row."""
        if tie and self.shared.stop:
            rows[self.shared] = rows[self.shared].mean(1, keepdim=True)
        for features, absent in self.dedicated:
            rows[features, absent] = 0

    def tie_(self, rows: Float[Tensor, "F S D"]) -> None:
        """Make the rows of shared features equal to those of the first snapshot, in place."""
        if self.shared.stop:
            rows[self.shared, 1:] = rows[self.shared, :1]


def feature_parts(n_shared: int, dedicated: Mapping[str, int], d_sae: int) -> list[str]:
    """For every feature "shared", the snapshots that it is dedicated to, or "free"."""
    names = ["shared", *dedicated]
    parts = ["free"] * d_sae
    for name, part in zip(names, _blocks(n_shared, dedicated), strict=True):
        parts[part] = [name] * (part.stop - part.start)
    return parts


def _blocks(n_shared: int, dedicated: Mapping[str, int]) -> Iterator[slice]:
    """The shared features, and those of every group, in their order in the dictionary."""
    first = 0
    for count in (n_shared, *dedicated.values()):
        yield slice(first, first + count)
        first += count


def penalty_factors(n_shared: int, factor: float, own: slice, like: Tensor) -> Float[Tensor, " F"]:
    """What the penalty of each of the features `own` is multiplied by: `factor` for shared ones."""
    ids = torch.arange(own.start, own.stop, device=like.device)
    return torch.where(ids < n_shared, like.new_tensor(factor), like.new_tensor(1.0))
