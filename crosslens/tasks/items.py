"""`Item`, a minimal pair in words, before a tokenizer reads it, and `Source`, the items of a task with its name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crosslens.errors import UserError, check_characters, did_you_mean, shortened

ANSWERS = ("single", "multi")


def check_answers(answers: str) -> None:
    """Refuse what is not a way to compare answers."""
    if answers not in ANSWERS:
        raise UserError(f"answers={answers!r} is unknown; use 'single' or 'multi'{did_you_mean(answers, ANSWERS)}")


@dataclass(frozen=True)
class Item:
    """A minimal pair in words.

    Raises:
        UserError: an answer is empty, or a text has half of a character.
    """

    prefix: str
    correct: str
    wrong: str
    patch_prefix: str | None = None
    """The paired prefix, after which `wrong` is the correct answer; None if the source has none."""
    info: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Other columns of the source, such as case or language."""
    group: str | None = field(default=None, repr=False, compare=False)
    """What items that are not independent have in common, such as the head noun; None if it is not known."""

    def __post_init__(self) -> None:
        for name in ("correct", "wrong"):
            if not getattr(self, name).strip():
                raise UserError(
                    f"the {name} answer after {shortened(repr(self.prefix))} is empty: give at least one word"
                )
        for text in (self.prefix, self.correct, self.wrong, self.patch_prefix or ""):
            check_characters(text, "the text")


def groups(items: Sequence[Item]) -> list[int]:
    """The group of every item, numbered from 0: the units of standard errors, intervals and p-values.

    Items of one `Item.group` are a group; where it is not known, items of one prefix and paired prefix, either way
    round.
    """
    keys: list[Hashable] = [
        frozenset((item.prefix, item.patch_prefix)) if item.group is None else item.group for item in items
    ]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [number[key] for key in keys]


class Source(NamedTuple):
    """What a format reads: the parts of a task."""

    name: str
    """Name of the task."""
    items: Sequence[Item]
    """The items, duplicates included."""
    answers: str = "single"
    """As in `Task`."""
    n_sentences: int | None = None
    """Number of different pairs of sentences, if the items come from sentences."""
