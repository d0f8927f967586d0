"""Model families with public pretraining snapshots: a reader of the table `families.json`.

Each entry of the table is a family: its repositories, sizes, spelling of a step as a revision, and tokens per step. A
size may override any of these. To add a family, add an entry.

    about                   what a user should know, and the source of every fact
    repository, tokenizer   names on the hub, with {size} in them; the tokenizer only if it is in another repository
    patterns                revisions with {step} in them ({step:03} with zeros before it), keyed by the name of their
                            set; the first covers training from its start, later ones begin at `stage1_steps`
    tokens_per_step         absent if no source says so; {billions} in a pattern then gives the tokens
    counts                  "checkpoints" if {step} numbers those, and the steps are not known
    steps                   the steps of the first pattern; absent if only the hub lists them (OLMo's revisions contain
                            rounded token counts, which do not follow from the step)
    separator               what stood between documents in pretraining: bos, eos or none; absent if it is not known
    sets                    named choices of steps or revisions: `paper` is from Ge et al. (arXiv 2509.17196),
                            `triplet` from Bayazit et al. (arXiv 2509.05291)
    unlike                  families that are no control of this one, though they look like it, and why

Every model has the sets `all`, `log:N` and `linear:N`: N steps, evenly spaced in log(1 + step) or in the step.
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
"""Returns the revisions of a repository; called only if the table does not list them."""


def find_model(family: str, size: str) -> Model:
    """A model of the table.

    Raises:
        UserError: no such family or size; the message lists those that exist.
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
        where=entry["repository"].format(size=size) + "@{}",
        tokenizer=entry["tokenizer"].format(size=size) if "tokenizer" in entry else None,
        patterns=entry["patterns"],
        tokens_per_step=entry.get("tokens_per_step"),
        steps=None if steps is None else tuple(_unroll(steps)),
        sets={name: tuple(_unroll(chosen)) for name, chosen in entry.get("sets", {}).items()},
        begins=entry.get("stage1_steps", 0),
        main_tokens=entry.get("main_tokens"),
        counts_steps=entry.get("counts") != "checkpoints",
    )


def find_separator(repository: str) -> str | None:
    """What separated documents when the models of a repository were pretrained; None if the table does not say."""
    return _entry(repository).get("separator")


def find_unlike(repositories: Sequence[str]) -> str | None:
    """Why models of these repositories are no control of each other, if the table says so."""
    entries = {entry["family"]: entry for name in repositories if (entry := _entry(name))}
    reasons = [entry.get("unlike", {}).get(other) for entry in entries.values() for other in entries]
    return next(filter(None, reasons), None)


@functools.cache
def _entry(repository: str) -> dict[str, Any]:
    """The row of the table that a repository or its tokenizer is in, with the name of its family."""
    for name, family in read_table().items():
        for size, changes in family["sizes"].items():
            entry = {**family, **changes, "family": name}
            if repository in (entry["repository"].format(size=size), entry.get("tokenizer", "").format(size=size)):
                return entry
    return {}


def match_model(name: str) -> Model | None:
    """The model of a name such as `pythia-160m` or `olmo2-7b`; None if the family is not in the table.

    Raises:
        UserError: the family has no such size.
    """
    family, dash, size = name.partition("-")
    return find_model(family, size) if dash and family in read_table() else None


def pattern_model(place: str, tokens_per_step: int | None = None) -> Model:
    """A series of places outside the table: `{step}` stands anywhere in one.

    Args:
        place: such as `org/model@step{step}`, `org/model/checkpoints/step{step}`, `org/model-step-{step}`,
            `org/model+runs/lora/checkpoint-{step}`.
        tokens_per_step: tokens per training batch, if known.

    Raises:
        UserError: a place without `{step}`, or with anything else in braces.
    """
    if place.count("{step") != 1 or re.search(r"\{(?!(step(:0\d)?|billions)\})", place):
        raise UserError(
            f"pattern={place!r} must contain {{step}} once, may contain {{billions}}, and nothing else in braces: give "
            "one such as 'org/model@step{step}' or 'org/model/checkpoints/step{step}'"
        )
    model, plus, adapter = place.partition("+")
    base, part = (f"{model}+", adapter) if "{" in adapter else ("", model)
    name, at, revision = part.partition("@")
    parts = name.split("/")
    first = next((i for i, each in enumerate(parts) if "{" in each), len(parts))
    fixed = "/".join(parts[:first])
    if "{" in revision:
        where, pattern = f"{name}@{{}}", revision
    elif first >= 2 or (fixed and Path(fixed).expanduser().is_dir()):
        where, pattern = f"{fixed}/{{}}{at}{revision}", "/".join(parts[first:])
    else:  # of repositories, perhaps each with a folder in it
        where, pattern = "/".join(["{}", *parts[2:]]) + at + revision, "/".join(parts[:2])
        fixed = pattern.partition("{")[0].rstrip("-_")
    title = (base or fixed).split("@")[0].rstrip("+/").rsplit("/", 1)[-1]
    rest = "" if base else plus + adapter
    return Model(title, base + where + rest, None, {"all": pattern}, tokens_per_step, None, {}, 0, None)


def spaced(steps: Sequence[int], n: int, scale: str) -> list[int]:
    """Choose `n` steps, spaced as evenly as possible, including the first and the last.

    Args:
        steps: in ascending order.
        n: how many, from 2 to all.
        scale: "log" for even spacing in log(1 + step), or "linear".

    Raises:
        UserError: fewer than two, or more than there are.
    """
    if not 2 <= n <= len(steps):
        raise UserError(f"{scale}:{n} asks for {n} of {len(steps)} steps: give a number from 2 to {len(steps)}")
    marks = [math.log1p(step) if scale == "log" else float(step) for step in steps]
    wanted = [marks[0] + (marks[-1] - marks[0]) * k / (n - 1) for k in range(n)]
    places: list[int] = []
    for k, mark in enumerate(wanted):
        place = min(range(len(marks)), key=lambda i: abs(marks[i] - mark))
        # leave enough steps for the choices that remain, on either side
        places.append(min(max(place, places[-1] + 1 if places else 0), len(steps) - n + k))
    return [steps[place] for place in places]


def read_spaced(name: str) -> tuple[int, str] | None:
    """Number and scale of a set such as log:12 or linear:8, for `spaced`; None for any other name."""
    scale, _, count = name.partition(":")
    return (int(count), scale) if scale in ("log", "linear") and count.isdecimal() else None


@functools.cache
def read_table() -> dict[str, dict[str, Any]]:
    """The table, keyed by family."""
    return json.loads((Path(__file__).parent / "families.json").read_text(encoding="utf-8"))


def _unroll(items: Sequence[Any]) -> list[Any]:
    """Steps or revisions, with ranges `{"from": a, "to": b, "by": c}` expanded, b included."""
    found: list[Any] = []
    for item in items:
        found.extend(range(item["from"], item["to"] + 1, item["by"]) if isinstance(item, dict) else [item])
    return found


def _neighbours(steps: Sequence[int], step: int) -> list[int]:
    """The members of ascending `steps` next to `step`: two, or one if `step` is outside their range."""
    above = bisect.bisect(steps, step)
    return list(steps[max(0, above - 1) : above + 1])


def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\\{step(:0\d)?\\\}", r"(?P<step>\\d+)", re.escape(pattern))
    return re.compile(escaped.replace(r"\{billions\}", r"(?P<billions>\d+)"))


class Revision(NamedTuple):
    """One snapshot of a model on the hub."""

    label: str
    """Name of the snapshot: `step{N}`, or another name if that is not unique."""
    revision: str
    """Branch or tag of the repository."""
    step: int | None
    """Optimiser steps since the start of training, if known."""
    tokens: int | None
    """Tokens seen in training so far, if known."""


@dataclass(frozen=True)
class Model:
    """One model: an entry of the table at one size, or a series of places with the user's pattern.

    `listing` arguments name what the hub or the disk has in the place of `{}`; `tuple` names none.
    """

    name: str
    """Such as `pythia-160m`."""
    where: str
    """Place of a snapshot, with `{}` for what `patterns` spell: a revision, a folder, or a repository."""
    tokenizer: str | None
    """Repository of the tokenizer, if it is another one."""
    patterns: Mapping[str, str]
    """Spelling of what stands in `{}`, keyed by the name of the set; numbers of steps refer to the first."""
    tokens_per_step: int | None
    """Tokens per training batch, if known."""
    steps: tuple[int, ...] | None
    """Steps of the first pattern, ascending; None if only the hub lists them."""
    sets: Mapping[str, tuple[int | str, ...]]
    """Named choices of steps or revisions."""
    begins: int
    """Step at which the second and later patterns begin."""
    main_tokens: int | None
    """Tokens seen by the branch `main`, if known."""
    counts_steps: bool = True
    """Whether the numbers in revisions are steps; otherwise those of checkpoints, whose steps are not known."""

    @property
    def repository(self) -> str:
        """The part of `where` that all snapshots share: a repository or a folder, with what comes before it."""
        return self.where.partition("{}")[0].rstrip("@/") or next(iter(self.patterns.values()))

    def revisions(self, steps: str | Sequence[int | str] = "all", listing: Listing = tuple) -> list[Revision]:
        """Revisions in the order of training.

        Args:
            steps: steps or revisions; or the name of a set: "all", "log:8", "linear:8", "paper", "triplet", ...
            listing: names the repository's revisions.

        Raises:
            UserError: a set, step or revision that does not exist (the nearest are named), or steps that cannot be
                turned into revisions without the hub's list.
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
        # a branch such as main has no step: it is the end of training
        return sorted(found, key=lambda row: (row.step is None, row.step or 0))

    def parse(self, revision: str) -> Revision:
        """Label, step and tokens of a revision.

        Raises:
            UserError: it matches none of the model's patterns.
        """
        if revision == "main" and self._has_branches:
            return Revision("main", "main", None, self.main_tokens)
        for i, (name, pattern) in enumerate(self.patterns.items()):
            if match := _expression(pattern).fullmatch(revision):
                step = int(match["step"]) + (self.begins if i else 0)
                tokens = None if self.tokens_per_step is None else step * self.tokens_per_step
                if tokens is None and "billions" in match.groupdict():
                    tokens = int(match["billions"]) * 10**9
                label = f"{name}-step{match['step']}" if i else f"step{step}" if self.counts_steps else revision
                return Revision(label, revision, step, tokens)
        main = ", or main" if self._has_branches else ""
        raise UserError(
            f"{self.name} has no revision {revision!r}: they are spelt {' or '.join(self.patterns.values())}{main}"
        )

    @property
    def _has_branches(self) -> bool:
        return self.where.endswith("@{}")

    def listed(self, listing: Listing, name: str = "all") -> list[Revision]:
        """The revisions of one pattern, ascending; from the table if it lists them, else from `listing`."""
        pattern = self.patterns[name]
        if self.steps is not None and name == next(iter(self.patterns)):
            return [self.parse(pattern.format(step=step)) for step in self.steps]
        rows = [self.parse(item) for item in listing() if _expression(pattern).fullmatch(item)]
        if not rows:
            raise UserError(
                f"the revisions of {self.repository} ({pattern}) are not in the table, and the hub's list of them is "
                f"not available: connect to the hub, or give revisions by name, such as {self._example()!r}"
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
            if not known:  # the spelling follows from the step; loading will show whether the revision exists
                return [self.parse(pattern.format(step=step)) for step in steps]
        rows = {row.step: row for row in self.listed(listing, name) if row.step is not None}
        for step in steps:
            if step not in rows:
                near = " and ".join(str(s) for s in _neighbours(sorted(rows), step))
                raise UserError(f"{self.name} has no snapshot at step {step}: the nearest are {near}")
        return [rows[step] for step in steps]

    def _parsed(self, revision: str) -> Revision | None:
        pattern = next(iter(self.patterns.values()))
        return self.parse(revision) if _expression(pattern).fullmatch(revision) else None

    def _example(self) -> str:
        named = [item for chosen in self.sets.values() for item in chosen if isinstance(item, str) and item != "main"]
        return next(iter(named), next(iter(self.patterns.values())).format(step=1000, billions=4))
