"""From minimal pairs in words to prompts in tokens: one rule for every tokenizer.

1. Join the prefix with each answer (by one blank, unless the answer brings its own) and tokenise both strings whole, so
   that the tokens are those the model has met in text.
2. The tokens that both begin with are the prompt; of what remains, the tokens that both end in are left away
   ("works with" against "work with" is decided at the verb).
3. Exactly one token must then be left of each: the answers. Anything else is skipped, and counted with its reason.

The paired prefix is treated in the same way; its prompt must have as many tokens, and its answers must be the same
tokens. Batches hold prompts of one length: there is no padding anywhere. Letters: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.errors import UserError


def logit_difference(logits: Float[Tensor, "B V"], batch: PromptBatch) -> Float[Tensor, " B"]:
    """logit(correct) - logit(wrong) of every prompt, from the logits at its last position."""
    answers = torch.stack([batch.correct, batch.wrong], dim=1).to(logits.device)
    correct, wrong = logits.gather(1, answers).unbind(1)
    return correct - wrong


def encode(tokenizer: Any, items: Sequence[Item], prepend_bos: bool = True, max_length: int | None = None) -> Prompts:
    """The usable items as tokens, and why the others are not usable.

    Args:
        tokenizer: a Hugging Face tokenizer.
        items: minimal pairs.
        prepend_bos: begin prompts with the BOS token, where the tokenizer has one.
        max_length: tokens that the model takes, BOS included; longer prompts are skipped.
    """
    bos = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    clean = _divided(tokenizer, [(item.prefix, item) for item in items])
    paired = [(item.patch_prefix, item) for item in items if item.patch_prefix is not None]
    patched = iter(_divided(tokenizer, paired))
    prompts = Prompts(items)
    for index, (item, found) in enumerate(zip(items, clean, strict=True)):
        pair = None if item.patch_prefix is None else next(patched)
        if isinstance(found, _Divided) and max_length is not None and len(bos) + len(found.prompt) > max_length:
            found = f"longer than {max_length} tokens"
        if isinstance(found, str):
            prompts.skipped[found] += 1
            continue
        if isinstance(pair, _Divided):
            pair = _mismatch(found, pair) or pair
        if isinstance(pair, str):
            prompts.unpaired[pair] += 1
        patch = bos + pair.prompt if isinstance(pair, _Divided) else None
        prompts.usable.append(_Prompt(index, bos + found.prompt, found.correct, found.wrong, patch))
    return prompts


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
    """The paired prefix, for which `wrong` is the correct answer; None where the source has none."""
    info: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Whatever else the source says of this item, such as its case or language."""

    def __post_init__(self) -> None:
        for name in ("correct", "wrong"):
            if not getattr(self, name).strip():
                raise UserError(f"the {name} answer after {self.prefix!r} is empty: give a word")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one length, all with a paired prompt or none with one."""

    tokens: Int[Tensor, "B T"]
    correct: Int[Tensor, " B"]
    wrong: Int[Tensor, " B"]
    patch: Int[Tensor, "B T"] | None
    index: Int[Tensor, " B"]
    """Position of each prompt's item in `Prompts.items`."""

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, which: Bool[Tensor, " B"] | Int[Tensor, " n"]) -> PromptBatch:
        """The prompts that a mask or a list of positions chooses."""
        patch = None if self.patch is None else self.patch[which]
        return PromptBatch(self.tokens[which], self.correct[which], self.wrong[which], patch, self.index[which])


class Prompts:
    """The items of a task as one tokenizer sees them; `len` is the number of usable ones.

    Attributes:
        items: all items; `PromptBatch.index` points into it.
        skipped: items that cannot be used, counted by reason.
        unpaired: usable items whose paired prompt cannot be used, counted by reason.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.skipped: Counter[str] = Counter()
        self.unpaired: Counter[str] = Counter()
        self.usable: list[_Prompt] = []

    def __len__(self) -> int:
        return len(self.usable)

    def __repr__(self) -> str:
        counts = f"skipped={dict(self.skipped)}, unpaired={dict(self.unpaired)}"
        return f"Prompts({len(self)} of {len(self.items)} items, {counts})"

    def batches(self, max_size: int) -> Iterator[PromptBatch]:
        """Batches of at most `max_size` prompts, by length and those with a pair first, else in the items' order."""
        if max_size < 1:
            raise UserError(f"a batch of {max_size} prompts is not possible: give 1 or more")
        groups: dict[tuple[int, bool], list[_Prompt]] = {}
        for prompt in self.usable:
            groups.setdefault((len(prompt.tokens), prompt.patch is None), []).append(prompt)
        for _, group in sorted(groups.items(), key=lambda entry: entry[0]):
            for start in range(0, len(group), max_size):
                yield _stack(group[start : start + max_size])


class _Prompt(NamedTuple):
    item: int
    tokens: list[int]
    correct: int
    wrong: int
    patch: list[int] | None


class _Divided(NamedTuple):
    prompt: list[int]
    correct: int
    wrong: int


def _joined(prefix: str, answer: str) -> str:
    apart = not prefix or prefix[-1].isspace() or answer[0].isspace()
    return prefix + answer if apart else f"{prefix} {answer}"


def _divided(tokenizer: Any, items: Sequence[tuple[str, Item]]) -> list[_Divided | str]:
    """Prompt and answers in tokens of every (prefix, item), or the reason why there are none."""
    if not items:
        return []
    texts = [_joined(prefix, answer) for prefix, item in items for answer in (item.correct, item.wrong)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [_divide(ids[i], ids[i + 1], tokenizer.unk_token_id) for i in range(0, len(ids), 2)]


def _divide(correct: list[int], wrong: list[int], unknown: int | None) -> _Divided | str:
    if unknown is not None and unknown in (*correct, *wrong):
        return "a word is unknown to the tokenizer"
    if correct == wrong:
        return "the answers are the same tokens"
    shared = _n_shared(correct, wrong)
    prompt, rest, other = correct[:shared], correct[shared:], wrong[shared:]
    after = _n_shared(rest[::-1], other[::-1])
    rest, other = rest[: len(rest) - after], other[: len(other) - after]
    if len(rest) != 1 or len(other) != 1:
        return "the answers do not differ in exactly one token"
    if not prompt:
        return "the prompt is empty"
    return _Divided(prompt, rest[0], other[0])


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _mismatch(clean: _Divided, pair: _Divided) -> str | None:
    if len(clean.prompt) != len(pair.prompt):
        return "the paired prompt has another number of tokens"
    return None if clean[1:] == pair[1:] else "the answers are other tokens after the paired prompt"


def _stack(prompts: Sequence[_Prompt]) -> PromptBatch:
    patches = [prompt.patch for prompt in prompts if prompt.patch is not None]
    return PromptBatch(
        tokens=torch.tensor([prompt.tokens for prompt in prompts]),
        correct=torch.tensor([prompt.correct for prompt in prompts]),
        wrong=torch.tensor([prompt.wrong for prompt in prompts]),
        patch=torch.tensor(patches) if patches else None,
        index=torch.tensor([prompt.item for prompt in prompts]),
    )
