"""Model families whose pretraining checkpoints are public: reads the table `families.json`, and finds revisions in it.

A family is one entry of the table: where its repositories lie, its sizes, how a step is spelt as a revision, and what
a step is worth in tokens. What an entry says, a size of it may say otherwise. A new family is a new entry.

    repository, tokenizer   names on the hub with {size} in them; the tokenizer's where it lies elsewhere
    patterns                revisions with {step} in them, by the name of the set that they make; the first is training
                            from its start, those after it begin at `stage1_steps`
    steps                   the steps of the first pattern; absent where only the hub's own list tells (OLMo's revisions
                            bear rounded tokens, which do not follow from the step)
    sets                    choices of steps, or of revisions, that have a name: `paper` is that of Ge et al.
                            (arXiv 2509.17196), `triplet` those of Bayazit et al. (arXiv 2509.05291)

Every model has the sets `all`, `log:N` and `linear:N`: N of the steps, evenly spaced in log(1 + step) or in the step.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from crosslens.errors import UserError, did_you_mean

Listing = Callable[[], Sequence[str]]
"""Names the revisions that a repository is known to have; asked only where the table cannot tell."""


def nothing_listed() -> Sequence[str]:
    """The listing of who knows no more than the table."""
    return ()


def revisions(
    family: str, size: str, steps: str | Sequence[int | str] = "all", listing: Listing = nothing_listed
) -> list[Revision]:
    """The checkpoints of a model, in the order of training; see `Model.revisions`."""
    return find_model(family, size).revisions(steps, listing)


def repository(family: str, size: str) -> str:
    """The Hugging Face repository of a model, such as `EleutherAI/pythia-160m`.

    Raises:
        UserError: a family or size that does not exist.
    """
    return find_model(family, size).repository


def pythia_revisions(size: str, steps: str | Sequence[int | str] = "paper") -> list[Revision]:
    """`revisions` of Pythia: (label, revision, step, tokens) for each step."""
    return revisions("pythia", size, steps)


def find_model(family: str, size: str) -> Model:
    """A model of the table.

    Raises:
        UserError: a family or size that does not exist; the message names those that do.
    """
    table = read_table()
    if family not in table:
        raise UserError(f"unknown family {family!r}: choose one of {', '.join(table)}{did_you_mean(family, table)}")
    sizes = table[family]["sizes"]
    if size not in sizes:
        raise UserError(f"{family} has no size {size!r}: choose one of {', '.join(sizes)}{did_you_mean(size, sizes)}")
    entry = {**table[family], **sizes[size]}
    steps = entry.get("steps")
    return Model(
        name=f"{family}-{size}",
        repository=entry["repository"].format(size=size),
        tokenizer=entry["tokenizer"].format(size=size) if "tokenizer" in entry else None,
        patterns=entry["patterns"],
        tokens_per_step=entry["tokens_per_step"],
        steps=None if steps is None else tuple(_unroll(steps)),
        sets={name: tuple(_unroll(chosen)) for name, chosen in entry.get("sets", {}).items()},
        begins=entry.get("stage1_steps", 0),
        main_tokens=entry.get("main_tokens"),
    )


def match_model(name: str) -> Model | None:
    """The model of a name such as `pythia-160m` or `olmo2-7b`; None where it names no family of the table.

    Raises:
        UserError: a family without this size.
    """
    family, dash, size = name.partition("-")
    return find_model(family, size) if dash and family in read_table() else None


def pattern_model(repository: str, pattern: str, tokens_per_step: int | None = None) -> Model:
    """A repository that is not in the table, whose revisions follow a pattern such as `checkpoint-{step}`.

    Args:
        repository: on the hub.
        pattern: holds `{step}`, and may hold `{billions}` for tokens in billions.
        tokens_per_step: tokens in a training batch, where known.

    Raises:
        UserError: a pattern without `{step}`, or with something else in braces.
    """
    if "{step}" not in pattern or re.search(r"\{(?!(step|billions)\})", pattern):
        raise UserError(
            f"pattern={pattern!r} must hold {{step}}, may hold {{billions}}, and nothing else in braces: give one such "
            "as 'step{step}' or 'step{step}-tokens{billions}B'"
        )
    return Model(repository.rsplit("/", 1)[-1], repository, None, {"all": pattern}, tokens_per_step, None, {}, 0, None)


def spaced(steps: Sequence[int], n: int, scale: str) -> list[int]:
    """N of rising steps, first and last among them, whose neighbours are as evenly apart as the steps allow.

    Args:
        steps: rising.
        n: how many, from 2 to all.
        scale: "log", even in log(1 + step), or "linear".

    Raises:
        UserError: more than there are, or fewer than two.
    """
    if not 2 <= n <= len(steps):
        raise UserError(f"{scale}:{n} asks for {n} of {len(steps)} steps: give a number from 2 to {len(steps)}")
    marks = [math.log1p(step) if scale == "log" else float(step) for step in steps]
    wanted = [marks[0] + (marks[-1] - marks[0]) * k / (n - 1) for k in range(n)]
    places: list[int] = []
    for k, mark in enumerate(wanted):
        place = min(range(len(marks)), key=lambda i: abs(marks[i] - mark))
        # as many steps must be left as are still to be chosen, on either side
        places.append(min(max(place, places[-1] + 1 if places else 0), len(steps) - n + k))
    return [steps[place] for place in places]


def read_spaced(name: str) -> tuple[int, str] | None:
    """Number and scale of a set such as log:12 or linear:8, as `spaced` takes them; None of any other name."""
    scale, _, count = name.partition(":")
    return (int(count), scale) if scale in ("log", "linear") and count.isdecimal() else None


@functools.cache
def read_table() -> dict[str, dict[str, Any]]:
    """The table, by family."""
    return json.loads((Path(__file__).parent / "families.json").read_text(encoding="utf-8"))


def _unroll(items: Sequence[Any]) -> list[Any]:
    """Single steps or revisions, with `{"from": a, "to": b, "by": c}` written out, b included."""
    found: list[Any] = []
    for item in items:
        found.extend(range(item["from"], item["to"] + 1, item["by"]) if isinstance(item, dict) else [item])
    return found


def _neighbours(steps: Sequence[int], step: int) -> list[int]:
    """The members of rising `steps` just below and just above `step`; the one nearest end where it is outside."""
    above = bisect.bisect(steps, step)
    return list(steps[max(0, above - 1) : above + 1])


def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{step\}", r"(?P<step>\d+)").replace(r"\{billions\}", r"(?P<billions>\d+)")
    return re.compile(escaped)


class Revision(NamedTuple):
    """One checkpoint of a model."""

    label: str
    """Name of the snapshot: `step{N}`, or what else tells it from the others."""
    revision: str
    """Branch or tag of the repository."""
    step: int | None
    """Optimiser steps taken since the start of training, where known."""
    tokens: int | None
    """Tokens seen in training up to there, where known."""


@dataclass(frozen=True)
class Model:
    """One model: an entry of the table at one size, or a repository with a pattern of the user's."""

    name: str
    """Such as `pythia-160m`."""
    repository: str
    """On the hub."""
    tokenizer: str | None
    """Repository of the tokenizer, where it lies elsewhere."""
    patterns: Mapping[str, str]
    """Spelling of a revision, by the name of the set; the first is the one that steps belong to."""
    tokens_per_step: int | None
    """Tokens in a training batch, where known."""
    steps: tuple[int, ...] | None
    """Steps of the first pattern, rising; None where only the hub's list tells."""
    sets: Mapping[str, tuple[int | str, ...]]
    """Choices that have a name."""
    begins: int
    """Step at which the second pattern, and those after it, begin."""
    main_tokens: int | None
    """Tokens seen by the branch `main`, where known."""

    def revisions(self, steps: str | Sequence[int | str] = "all", listing: Listing = nothing_listed) -> list[Revision]:
        """Checkpoints in the order of training.

        Args:
            steps: steps or revisions; or the name of a set: "all", "log:8", "linear:8", "paper", "triplet", ...
            listing: names the repository's revisions.

        Raises:
            UserError: a set, step or revision that does not exist, with the nearest that do; or steps that cannot be
                turned into revisions because the hub's list is not at hand.
        """
        chosen = self._choose(steps, listing) if isinstance(steps, str) else list(steps)
        if not chosen:
            raise UserError(f"steps is empty: give steps of {self.name}, or 'all'")
        if len(set(chosen)) < len(chosen):
            twice = next(item for item in chosen if chosen.count(item) > 1)
            raise UserError(f"step {twice} is given more than once: give every step once")
        numbers = sorted(item for item in chosen if isinstance(item, int))
        found = self._at_steps(numbers, listing) if numbers else []
        found += [self.parse(item) for item in chosen if isinstance(item, str)]
        # a branch such as main has no step; it is the end of training
        return sorted(found, key=lambda row: (row.step is None, row.step or 0))

    def parse(self, revision: str) -> Revision:
        """Label, step and tokens of a revision.

        Raises:
            UserError: not of the model's patterns.
        """
        if revision == "main":
            return Revision("main", "main", None, self.main_tokens)
        for i, (name, pattern) in enumerate(self.patterns.items()):
            if match := _expression(pattern).fullmatch(revision):
                step = int(match["step"]) + (self.begins if i else 0)
                tokens = None if self.tokens_per_step is None else step * self.tokens_per_step
                if tokens is None and "billions" in match.groupdict():
                    tokens = int(match["billions"]) * 10**9
                label = f"{name}-step{match['step']}" if i else f"step{step}"
                return Revision(label, revision, step, tokens)
        raise UserError(
            f"{self.name} has no revision {revision!r}: they are spelt {' or '.join(self.patterns.values())}, or main"
        )

    def listed(self, listing: Listing, name: str = "all") -> list[Revision]:
        """The revisions of one pattern, rising; from the table where it has them, else from the listing."""
        pattern = self.patterns[name]
        if self.steps is not None and name == next(iter(self.patterns)):
            return [self.parse(pattern.format(step=step)) for step in self.steps]
        rows = [self.parse(item) for item in listing() if _expression(pattern).fullmatch(item)]
        if not rows:
            raise UserError(
                f"the revisions of {self.repository} ({pattern}) are not in the table, and the hub's list of them is "
                f"not at hand: connect to the hub, or give revisions by name, such as {self._example()!r}"
            )
        return sorted(rows, key=lambda row: row.step or 0)

    def _choose(self, name: str, listing: Listing) -> list[int | str]:
        if even := read_spaced(name):
            rows = {row.step: row.revision for row in self.listed(listing, next(iter(self.patterns)))}
            return [rows[step] for step in spaced([step for step in rows if step is not None], *even)]
        if name in self.sets:
            return list(self.sets[name])
        if name in self.patterns:
            return [row.revision for row in self.listed(listing, name)]
        if name == "main" or any(_expression(pattern).fullmatch(name) for pattern in self.patterns.values()):
            return [name]
        sets = [*self.sets, *self.patterns, "log:N", "linear:N"]
        raise UserError(
            f"{self.name} has no step set {name!r}: choose one of {', '.join(sets)}, or give a list of steps"
            f"{did_you_mean(name, sets)}"
        )

    def _at_steps(self, steps: list[int], listing: Listing) -> list[Revision]:
        name, pattern = next(iter(self.patterns.items()))
        if self.steps is None and "{billions}" not in pattern:
            known = {row.step for row in map(self._parsed, listing()) if row is not None}
            if not known:  # the spelling follows from the step; whether it exists is seen when it is loaded
                return [self.parse(pattern.format(step=step)) for step in steps]
        rows = {row.step: row for row in self.listed(listing, name) if row.step is not None}
        for step in steps:
            if step not in rows:
                near = " and ".join(str(s) for s in _neighbours(sorted(rows), step))
                raise UserError(f"{self.name} has no checkpoint at step {step}: the nearest are {near}")
        return [rows[step] for step in steps]

    def _parsed(self, revision: str) -> Revision | None:
        pattern = next(iter(self.patterns.values()))
        return self.parse(revision) if _expression(pattern).fullmatch(revision) else None

    def _example(self) -> str:
        named = [item for chosen in self.sets.values() for item in chosen if isinstance(item, str) and item != "main"]
        return next(iter(named), next(iter(self.patterns.values())).format(step=1000, billions=4))
