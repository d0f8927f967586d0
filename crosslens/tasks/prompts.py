"""Tokenise minimal pairs into prompts and answers, with one rule for every tokenizer.

1. Join the prefix with each answer (by one space, unless the answer brings its own) and tokenise both strings whole, to
   get the tokens that the model has seen in text.
2. The longest common token prefix is the prompt; the rest of each string is its answer.
3. `encode`, for one differing token: drop the tokens that both answers end in ("works with" and "work with" differ at
   the verb); exactly one token must be left of each.
4. `encode_answers`, for any number of tokens: answers stay whole, and are scored by the summed log-probability of their
   tokens. For whole sentences this is the difference of their log-probabilities, because the common part cancels.

Other items are skipped and counted by reason. The paired prefix is treated the same way; its prompt must have the same
number of tokens, and its answers must be the same tokens. A batch holds strings of one length: there is no padding.

Symbols: B prompts or strings, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.errors import UserError, shortened
from crosslens.tasks.items import Item

_SAME = "the answers are the same tokens"
_NOT_ONE = "the answers do not differ in exactly one token"
_BEGINNING = "one answer is the beginning of the other"


def logit_difference(
    logits: Float[Tensor, "B V"], batch: PromptBatch, tokens: Int[Tensor, " V"] | None = None
) -> Float[Tensor, " B"]:
    """logit(correct) - logit(wrong) of every prompt.

    Args:
        logits: at the last position of every prompt.
        batch: the prompts.
        tokens: those that the logits are of, in ascending order, the answers among them; None for the vocabulary.
    """
    answers = batch.answers.to(logits.device)
    columns = answers if tokens is None else torch.searchsorted(tokens, answers)
    correct, wrong = logits.gather(1, columns).unbind(1)
    return correct - wrong


def summed_log_probability(logits: Float[Tensor, "B T V"], batch: AnswerBatch) -> Float[Tensor, " B"]:
    """Log-probability of every answer given its prompt: the sum over its tokens, in nats, float64."""
    targets = batch.targets.to(logits.device)
    scored = torch.arange(targets.shape[1], device=logits.device) >= batch.start.to(logits.device)[:, None]
    # softmax over the vocabulary at the scored positions only
    log_p = logits[scored].float().log_softmax(-1).gather(-1, targets[scored][:, None])[:, 0]
    each = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    each[scored] = log_p.double()
    return each.sum(-1)


def encode(tokenizer: Any, items: Sequence[Item], prepend_bos: bool = True, max_length: int | None = None) -> Prompts:
    """Prompts of the items whose answers differ in one token; the others are counted by reason.

    Args:
        tokenizer: a Hugging Face tokenizer.
        items: minimal pairs.
        prepend_bos: begin prompts with the BOS token, if the tokenizer has one.
        max_length: context length of the model in tokens, BOS included; longer prompts are skipped.
    """
    bos = bos_tokens(tokenizer, prepend_bos)
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
            _keep_example(prompts.examples, found, item)
            continue
        if isinstance(pair, _Divided):
            pair = _mismatch(found, pair) or pair
        if isinstance(pair, str):
            prompts.unpaired[pair] += 1
        patch = bos + pair.prompt if isinstance(pair, _Divided) else None
        prompts.usable.append(Prompt(index, bos + found.prompt, found.correct, found.wrong, patch))
    return prompts


def encode_answers(
    tokenizer: Any, items: Sequence[Item], prepend_bos: bool = True, max_length: int | None = None
) -> Answers:
    """Both answers of the items, of any number of tokens; unusable items are counted by reason.

    Args:
        tokenizer: a Hugging Face tokenizer.
        items: minimal pairs; paired prefixes are not used.
        prepend_bos: begin prompts with the BOS token, if the tokenizer has one.
        max_length: context length of the model in tokens, BOS included; the last token is only predicted and does not
            count.
    """
    bos = bos_tokens(tokenizer, prepend_bos)
    answers = Answers(items)
    texts = _tokenised(tokenizer, [(item.prefix, item) for item in items])
    for index, (correct, wrong) in enumerate(texts):
        shared = _n_shared(correct, wrong)
        reason = _indistinct(correct, wrong, tokenizer.unk_token_id)
        if reason is None and shared == min(len(correct), len(wrong)):
            reason = _BEGINNING
        if reason is None and not bos and not shared:
            reason = "the first tokens differ, and there is no BOS token before them"
        if reason is None and max_length is not None and len(bos) + max(len(correct), len(wrong)) - 1 > max_length:
            reason = f"longer than {max_length} tokens"
        if reason is not None:
            answers.skipped[reason] += 1
            _keep_example(answers.examples, reason, items[index])
            continue
        answers.usable.append(_Pair(index, len(bos) + shared, bos + correct, bos + wrong))
    return answers


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one length; either all have a paired prompt or none has."""

    tokens: Int[Tensor, "B T"]
    correct: Int[Tensor, " B"]
    wrong: Int[Tensor, " B"]
    patch: Int[Tensor, "B T"] | None
    index: Int[Tensor, " B"]
    """Index of each prompt's item in `Prompts.items`."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answers(self) -> Int[Tensor, "B 2"]:
        """The correct and the wrong answer."""
        return torch.stack([self.correct, self.wrong], 1)

    def select(self, which: Bool[Tensor, " B"] | Int[Tensor, " n"]) -> PromptBatch:
        """Select prompts by a mask or by indices."""
        patch = None if self.patch is None else self.patch[which]
        return PromptBatch(self.tokens[which], self.correct[which], self.wrong[which], patch, self.index[which])


class Prompts:
    """The prompts of a task for one tokenizer; `len` is the number of usable items.

    Attributes:
        items: all items; `PromptBatch.index` points into it.
        skipped: number of unusable items by reason.
        examples: the answers of the first of them, where the reason is in the answers.
        unpaired: number of usable items with an unusable paired prompt, by reason.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.unpaired: Counter[str] = Counter()
        self.usable: list[Prompt] = []

    def __len__(self) -> int:
        return len(self.usable)

    def __repr__(self) -> str:
        counts = f"skipped={dict(self.skipped)}, unpaired={dict(self.unpaired)}"
        return f"Prompts({len(self)} of {len(self.items)} items, {counts})"

    def batches(self, max_size: int) -> Iterator[PromptBatch]:
        """Batches of at most `max_size` prompts: by length, those with a pair first, then in the items' order."""
        _check_size(max_size)
        groups: dict[tuple[int, bool], list[Prompt]] = {}
        for prompt in self.usable:
            groups.setdefault((len(prompt.tokens), prompt.patch is None), []).append(prompt)
        for _, group in sorted(groups.items(), key=lambda entry: entry[0]):
            for start in range(0, len(group), max_size):
                yield _stack(group[start : start + max_size])


@dataclass(frozen=True)
class AnswerBatch:
    """Prompts, each with one of its answers, all of one length.

    Attributes:
        tokens: (B, T) the model's input: prompt and answer without the last token.
        targets: (B, T) the next token at each position.
        start: (B,) position from which the targets belong to the answer.
        correct: (B,) whether it is the correct answer.
        index: (B,) index of the item in `Answers.items`.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    start: Int[Tensor, " B"]
    correct: Bool[Tensor, " B"]
    index: Int[Tensor, " B"]

    def __len__(self) -> int:
        return len(self.tokens)


class Answers:
    """Both answers of a task's items for one tokenizer; `len` is the number of usable items.

    Attributes:
        items: all items; `AnswerBatch.index` points into it.
        skipped: number of unusable items by reason.
        examples: the answers of the first of them, where the reason is in the answers.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.usable: list[_Pair] = []

    def __len__(self) -> int:
        return len(self.usable)

    def __repr__(self) -> str:
        return f"Answers({len(self)} of {len(self.items)} items, skipped={dict(self.skipped)})"

    def batches(self, max_size: int) -> Iterator[AnswerBatch]:
        """Batches of at most `max_size` strings, two per usable item, by length."""
        _check_size(max_size)
        groups: dict[int, list[tuple[_Pair, bool]]] = {}
        for pair in self.usable:
            for correct in (True, False):
                groups.setdefault(len(pair.correct if correct else pair.wrong), []).append((pair, correct))
        for _, group in sorted(groups.items(), key=lambda entry: entry[0]):
            for start in range(0, len(group), max_size):
                yield _stack_answers(group[start : start + max_size])


class Prompt(NamedTuple):
    """A prompt and its answers in tokens."""

    item: int
    """Index of its item."""
    tokens: list[int]
    """With the BOS token, if there is one."""
    correct: int
    """The token of the correct answer."""
    wrong: int
    """That of the wrong one."""
    patch: list[int] | None
    """The paired prompt, of as many tokens; None if it has none."""


class _Pair(NamedTuple):
    item: int
    start: int
    correct: list[int]
    wrong: list[int]


class _Divided(NamedTuple):
    prompt: list[int]
    correct: int
    wrong: int


def bos_tokens(tokenizer: Any, prepend: bool = True) -> list[int]:
    """The BOS token, if the tokenizer has one and it is wanted."""
    return [tokenizer.bos_token_id] if prepend and tokenizer.bos_token_id is not None else []


def _check_size(max_size: int) -> None:
    if max_size < 1:
        raise UserError(f"a batch size of {max_size} prompts must be at least 1")


def _joined(prefix: str, answer: str) -> str:
    apart = not prefix or prefix[-1].isspace() or answer[0].isspace()
    return prefix + answer if apart else f"{prefix} {answer}"


def _tokenised(tokenizer: Any, items: Sequence[tuple[str, Item]]) -> list[tuple[list[int], list[int]]]:
    """Tokens of every prefix with the correct and the wrong answer."""
    if not items:
        return []
    texts = [_joined(prefix, answer) for prefix, item in items for answer in (item.correct, item.wrong)]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [(ids[i], ids[i + 1]) for i in range(0, len(ids), 2)]


def _divided(tokenizer: Any, items: Sequence[tuple[str, Item]]) -> list[_Divided | str]:
    """Prompt and answers in tokens for every (prefix, item), or the reason why it is unusable."""
    return [_divide(correct, wrong, tokenizer.unk_token_id) for correct, wrong in _tokenised(tokenizer, items)]


def _keep_example(examples: dict[str, str], reason: str, item: Item) -> None:
    if reason in (_SAME, _NOT_ONE, _BEGINNING):
        examples.setdefault(reason, f"{shortened(repr(item.correct))} / {shortened(repr(item.wrong))}")


def _indistinct(correct: list[int], wrong: list[int], unknown: int | None) -> str | None:
    if unknown is not None and unknown in (*correct, *wrong):
        return "a word is unknown to the tokenizer"
    return _SAME if correct == wrong else None


def _divide(correct: list[int], wrong: list[int], unknown: int | None) -> _Divided | str:
    if reason := _indistinct(correct, wrong, unknown):
        return reason
    shared = _n_shared(correct, wrong)
    prompt, rest, other = correct[:shared], correct[shared:], wrong[shared:]
    after = _n_shared(rest[::-1], other[::-1])
    rest, other = rest[: len(rest) - after], other[: len(other) - after]
    if len(rest) != 1 or len(other) != 1:
        return _NOT_ONE
    if not prompt:
        return "the prompt is empty"
    return _Divided(prompt, rest[0], other[0])


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _mismatch(clean: _Divided, pair: _Divided) -> str | None:
    if len(clean.prompt) != len(pair.prompt):
        return "the paired prompt has a different number of tokens"
    return None if clean[1:] == pair[1:] else "the answers are different tokens after the paired prompt"


def _stack(prompts: Sequence[Prompt]) -> PromptBatch:
    patches = [prompt.patch for prompt in prompts if prompt.patch is not None]
    return PromptBatch(
        tokens=torch.tensor([prompt.tokens for prompt in prompts]),
        correct=torch.tensor([prompt.correct for prompt in prompts]),
        wrong=torch.tensor([prompt.wrong for prompt in prompts]),
        patch=torch.tensor(patches) if patches else None,
        index=torch.tensor([prompt.item for prompt in prompts]),
    )


def _stack_answers(strings: Sequence[tuple[_Pair, bool]]) -> AnswerBatch:
    tokens = torch.tensor([pair.correct if correct else pair.wrong for pair, correct in strings])
    return AnswerBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        # the token at `start` of the string is predicted one position earlier
        start=torch.tensor([pair.start - 1 for pair, _ in strings]),
        correct=torch.tensor([correct for _, correct in strings]),
        index=torch.tensor([pair.item for pair, _ in strings]),
    )
