"""Generated tasks: indirect-object identification from templates, induction from the tokenizer's own words."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

from crosslens.errors import UserError
from crosslens.tasks.items import Item

_NAMES = (
    "Adam Alice Andrew Anna Ben Daniel David Emma Grace Henry Jack James Jane John Kate Laura Lucy Mark Martin Mary "
    "Michael Paul Peter Rachel Robert Rose Sam Sarah Simon Tom"
)
_PLACES = "bank church garden hospital hotel house library market museum office park river school shop station"
_GIFTS = "a ball,a book,a card,a coat,a flower,a hat,a key,a letter,a map,a ring,the money,the newspaper"
_SCENES = (
    "When {0} and {1} went to the {place}, {giver} gave {gift} to",
    "After {0} and {1} came to the {place}, {giver} handed {gift} to",
    "Then {0} and {1} met at the {place}. {giver} passed {gift} to",
    "While {0} and {1} stood near the {place}, {giver} showed {gift} to",
)


def ioi_items(n: int, seed: int) -> Iterator[Item]:
    """Indirect-object identification (Wang et al., arXiv 2211.00593): of two people one gives; who receives?

    Items alternate between the cases "ABBA" (the giver is named second) and "BABA" (named first). In the paired prefix
    the other person gives; in `info["abc_prefix"]` a third person gives, so that neither answer is correct.

    Raises:
        UserError: n is below 1 or above the number of items.
    """
    names, places, gifts = _NAMES.split(), _PLACES.split(), _GIFTS.split(",")
    sizes = (len(_SCENES), len(places), len(gifts), len(names), len(names) - 1, len(names) - 2)
    total = math.prod(sizes)
    if not 1 <= n <= total:
        raise UserError(f"n={n} must be between 1 and {total}, the number of items")
    rng = random.Random(f"ioi {seed}")
    for i, number in enumerate(rng.sample(range(total), n)):
        giver = 1 - i % 2
        drawn: list[int] = []
        for size in sizes:
            number, digit = divmod(number, size)
            drawn.append(digit)
        scene, place, gift = _SCENES[drawn[0]], places[drawn[1]], gifts[drawn[2]]
        left = list(names)
        people = [left.pop(digit) for digit in drawn[3:]]
        texts = [scene.format(*people, place=place, gift=gift, giver=name) for name in people]
        info = {"case": "ABBA" if giver else "BABA", "abc_prefix": texts[2]}
        yield Item(texts[giver], f" {people[1 - giver]}", f" {people[giver]}", texts[1 - giver], info)


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
