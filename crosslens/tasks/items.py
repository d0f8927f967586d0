"""`Item`: a minimal pair in words, as sources give it and before a tokenizer reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crosslens.errors import UserError, shortened


@dataclass(frozen=True)
class Item:
    """A minimal pair in words.

    Raises:
        UserError: an answer is empty.
    """

    prefix: str
    correct: str
    wrong: str
    patch_prefix: str | None = None
    """The paired prefix, after which `wrong` is the correct answer; None if the source has none."""
    info: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Other columns of the source, such as case or language."""

    def __post_init__(self) -> None:
        for name in ("correct", "wrong"):
            if not getattr(self, name).strip():
                raise UserError(
                    f"the {name} answer after {shortened(repr(self.prefix))} is empty: give at least one word"
                )
