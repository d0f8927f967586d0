"""Indirect-object identification (Wang et al., arXiv 2211.00593), generated from templates, or a file as of SVA."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from crosslens.errors import UserError
from crosslens.tasks.declaration import Format, Spelling
from crosslens.tasks.formats import sva
from crosslens.tasks.items import Item, Source

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


def read(path: str | Path | None = None, n: int = 200, seed: int = 0) -> Source:
    """A task from a file, or generated; see `Task.ioi`."""
    return Source("ioi", list(_items(n, seed))) if path is None else sva.read(path)


def _items(n: int, seed: int) -> Iterator[Item]:
    """Of two people one gives; who receives?

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


FORMAT = Format(
    kind="ioi",
    title="IOI",
    spellings=(
        Spelling(text="ioi", python="Task.ioi()", reads="indirect objects, generated"),
        Spelling(text="ioi:FILE", python='Task.ioi("FILE")', reads="as SVA"),
    ),
    read=lambda path: read(path or None),
    check=lambda path, where: path and sva.check(path, where),
)
