"""Induction: items from the tokenizer's own words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from crosslens.errors import UserError
from crosslens.tasks.items import Item


def induction_items(tokenizer: Any, n: int, length: int, seed: int) -> Iterator[Item]:
    """Random single-token words, repeated: the word that followed the first time follows again.

    The repetition stops after 1 to length - 1 words. The wrong answer is a word that does not occur; in the paired
    prefix it replaces the correct one.

    Raises:
        UserError: n or length out of range, or a tokenizer with too few single-token words.
    """
    if n < 1 or length < 2:
        raise UserError(f"n={n} and length={length} are out of range: n must be at least 1, length at least 2")
    lead, words = _single_token_words(tokenizer)
    if len(words) <= length:
        raise UserError(
            f"the tokenizer has {len(words)} single-token words, too few for length={length}: use a smaller length"
        )
    rng = random.Random(f"induction {seed}")
    for _ in range(n):
        *said, wrong = rng.sample(words, length + 1)
        repeated = rng.randint(1, length - 1)
        correct = said[repeated]
        other = [wrong if word == correct else word for word in said]
        prefix, patch = (lead + " ".join([*first, *said[:repeated]]) for first in (said, other))
        yield Item(prefix, f" {correct}", f" {wrong}", patch, {"length": length, "repeated": repeated})


def _single_token_words(tokenizer: Any) -> tuple[str, list[str]]:
    """Words that are one token wherever they occur, and the text that must precede the first word for this to hold."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts = [text.strip() for text in tokenizer.batch_decode([[i] for i in ids])]
    words = list(dict.fromkeys(text for text in texts if text.isalpha()))
    found: dict[str, list[str]] = {}
    for lead in ("", " "):
        twice: list[list[int]] = []
        if words:
            said = [f"{lead}{word} {word}" for word in words]
            twice = tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        found[lead] = [
            word
            for word, tokens in zip(words, twice, strict=True)
            if len(tokens) == 2 and tokens[0] == tokens[1] != unknown
        ]
    lead = max(found, key=lambda each: len(found[each]))
    return lead, found[lead]
