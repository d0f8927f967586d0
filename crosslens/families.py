"""Model families whose pretraining checkpoints are public: a table, and the look-up of revisions in it.

A family is one row of `FAMILIES`: where its repositories lie, its sizes, the steps at which checkpoints were kept, and
how a step is spelt as a revision. A new family is a new row.

Pythia (Biderman et al., arXiv 2304.01373): 154 checkpoints per size, at steps 0, 1, 2, 4, ..., 512 and then at every
1000 up to 143000; 2,097,152 tokens per step. The step set `paper` is that of Ge et al. (arXiv 2509.17196).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from crosslens.errors import UserError, did_you_mean


def revisions(family: str, size: str, steps: str | Sequence[int] = "all") -> list[Revision]:
    """The checkpoints of a model at some steps, in the order of training.

    Args:
        family: a key of `FAMILIES`.
        size: one of the family's sizes, such as `160m`.
        steps: optimiser steps, or the name of one of the family's step sets; `all` names every step.

    Raises:
        UserError: a family, size, set or step that does not exist; the message names the nearest that do.
    """
    row = _family(family)
    repository(family, size)
    return [
        Revision(f"step{step}", row.revision.format(step=step), step, step * row.tokens_per_step)
        for step in _steps(row, steps)
    ]


def repository(family: str, size: str) -> str:
    """The Hugging Face repository of a model, such as `EleutherAI/pythia-160m`.

    Raises:
        UserError: a family or size that does not exist.
    """
    row = _family(family)
    if size not in row.sizes:
        raise UserError(
            f"{family} has no size {size!r}: choose one of {', '.join(row.sizes)}{did_you_mean(size, row.sizes)}"
        )
    return row.repository.format(size=size)


def pythia_revisions(size: str, steps: str | Sequence[int] = "paper") -> list[Revision]:
    """`revisions` of Pythia: (label, revision, step, tokens) for each step."""
    return revisions("pythia", size, steps)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise UserError(f"unknown family {name!r}: choose one of {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def _steps(row: Family, steps: str | Sequence[int]) -> list[int]:
    if isinstance(steps, str):
        sets = {**row.step_sets, "all": row.steps}
        if steps not in sets:
            raise UserError(
                f"{row.name} has no step set {steps!r}: choose one of {', '.join(sets)}, or give a list of steps"
                f"{did_you_mean(steps, sets)}"
            )
        return list(sets[steps])
    if not steps:
        raise UserError(f"steps is empty: give steps of {row.name} ({row.steps_in_words}), or 'all'")
    for step in steps:
        if step not in row.steps:
            near = " and ".join(str(s) for s in _neighbours(row.steps, step))
            raise UserError(
                f"{row.name} has no checkpoint at step {step}: the nearest are {near} ({row.steps_in_words})"
            )
    if len(set(steps)) < len(steps):
        twice = next(step for step in steps if list(steps).count(step) > 1)
        raise UserError(f"step {twice} is given more than once: give every step once")
    return sorted(steps)


def _neighbours(steps: Sequence[int], step: int) -> list[int]:
    """The members of rising `steps` just below and just above `step`; the one nearest end where it is outside."""
    above = bisect.bisect(steps, step)
    return list(steps[max(0, above - 1) : above + 1])


class Revision(NamedTuple):
    """One checkpoint of a model."""

    label: str
    """Name of the snapshot, `step{N}`."""
    revision: str
    """Branch or tag of the repository."""
    step: int
    """Optimiser steps taken."""
    tokens: int
    """Tokens seen in training up to there."""


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    name: str
    """Key in `FAMILIES`."""
    repository: str
    """Repository, with `{size}` in the place of the size."""
    sizes: tuple[str, ...]
    """Sizes as they are spelt in repository names."""
    revision: str
    """Revision, with `{step}` in the place of the step."""
    steps: tuple[int, ...]
    """Steps of all checkpoints, rising."""
    steps_in_words: str
    """The same for an error message."""
    tokens_per_step: int
    """Tokens in a training batch."""
    step_sets: Mapping[str, tuple[int, ...]]
    """Choices of steps that have a name."""


_PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")

FAMILIES: dict[str, Family] = {
    "pythia": Family(
        name="pythia",
        repository="EleutherAI/pythia-{size}",
        sizes=(*_PYTHIA_SIZES, *(f"{size}-deduped" for size in _PYTHIA_SIZES)),
        revision="step{step}",
        steps=(0, *(2**n for n in range(10)), *range(1000, 143_001, 1000)),
        steps_in_words="0, 1, 2, 4, ..., 512, then every 1000 to 143000",
        tokens_per_step=1024 * 2048,
        step_sets={
            "paper": (
                *(0, 2, 4, 8, 16, 32, 64, 128, 256, 512),
                *range(1000, 10_001, 1000),
                *(14_000, 20_000, 27_000, 34_000, 47_000, 60_000),
                *(74_000, 87_000, 100_000, 114_000, 127_000, 143_000),
            ),
        },
    ),
}
"""All families, by name."""
