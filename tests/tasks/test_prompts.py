"""Prompts: the tokenisation rule against a slow search, and scores of several-token answers against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosslens.errors import UserError
from crosslens.synthetic import grammar
from crosslens.tasks.items import Item
from crosslens.tasks.prompts import encode, encode_answers, logit_difference, summed_log_probability
from crosslens.tasks.task import Task


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    special = "<|endoftext|>"
    vocabulary = {word: i for i, word in enumerate([special, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, pad_token=special, unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer(grammar.vocabulary())


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which frequent words are one token and rare ones are several; it has no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["The uncle has uncles that have seen what is and are here with us . The farmer works . The farmers work ."]
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def rewrite(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


# ---- from words to tokens


def slow_prompt(tokenizer: Any, prefix: str, correct: str, wrong: str) -> tuple[list[int], int, int] | None:
    """All ways to cut both strings into prompt, one token, and a common end; the longest prompt wins."""
    blank = "" if correct[0].isspace() else " "
    a, b = rewrite(prefix + blank + correct, tokenizer), rewrite(prefix + blank + wrong, tokenizer)
    cuts = [i for i in range(1, min(len(a), len(b))) if a[:i] == b[:i] and a[i] != b[i] and a[i + 1 :] == b[i + 1 :]]
    return (a[: cuts[-1]], a[cuts[-1]], b[cuts[-1]]) if cuts else None


@given(
    st.lists(st.sampled_from(["The", "uncle", "uncles", "farmers", "works", "have", "here", "zebra"]), max_size=4),
    st.sampled_from([" works", " has", " zebra", " works with", "has"]),
    st.sampled_from([" work", " have", " uncles", " work with", "have"]),
)
def test_prompts_equal_a_slow_search(pieces: Any, prefix: list[str], correct: str, wrong: str) -> None:
    if correct[0].isspace() != wrong[0].isspace() or not prefix:
        return
    text = " ".join(prefix)
    prompts = encode(pieces, [Item(text, correct, wrong)])
    expected = slow_prompt(pieces, text, correct, wrong)
    assert len(prompts) == (expected is not None)
    assert sum(prompts.skipped.values()) == (expected is None)
    if expected is not None:
        (batch,) = prompts.batches(8)
        assert (batch.tokens[0].tolist(), int(batch.correct), int(batch.wrong)) == expected


def test_answers_are_joined_by_exactly_one_space(pieces: Any) -> None:
    one = encode(pieces, [Item("The uncle", " has", " have"), Item("The uncle", "has", "have")])
    first, second = one.usable
    assert first[1:4] == second[1:4]
    assert pieces.decode(first.tokens) == "The uncle" and pieces.decode([first.correct]) == " has"


def test_common_endings_of_answers_are_dropped(pieces: Any) -> None:
    items = [Item("The farmers", "have seen", "has seen"), Item("The farmers", "have", "has")]
    long, short = encode(pieces, items).usable
    assert long[1:] == short[1:]


def test_skipped_items_are_counted_by_reason(words: Any) -> None:
    items = [
        Item("the dog", "sleeps", "sleep"),
        Item("the dog", "sleeps", "zebra"),
        Item("the unicorn", "sleeps", "sleep"),
        Item("the dog", "sleeps", "sleeps"),
        Item("the dog", "sleeps now", "sleep"),
        Item("", "sleeps", "sleep"),
        Item("the dog near the old farmer", "sleeps", "sleep"),
    ]
    prompts = encode(words, items, max_length=5)
    assert prompts.skipped == {
        "a word is unknown to the tokenizer": 2,
        "the answers are the same tokens": 1,
        "the answers do not differ in exactly one token": 1,
        "the prompt is empty": 1,
        "longer than 5 tokens": 1,
    }
    assert len(prompts) + sum(prompts.skipped.values()) == len(items)
    assert prompts.examples == {
        "the answers are the same tokens": "'sleeps' / 'sleeps'",
        "the answers do not differ in exactly one token": "'sleeps now' / 'sleep'",
    }
    assert len(encode(words, items, prepend_bos=True, max_length=7)) == 2
    assert len(encode(words, items, prepend_bos=False, max_length=6)) == 2
    assert len(encode(words, items, prepend_bos=True, max_length=6)) == 1


def test_bos_is_prepended_to_prompt_and_pair(words: Any, pieces: Any) -> None:
    item = Item("the dog", "sleeps", "sleep", "the dogs")
    (batch,) = encode(words, [item]).batches(1)
    assert batch.tokens.tolist() == [[words.bos_token_id, *rewrite("the dog", words)]]
    assert batch.patch is not None
    assert batch.patch.tolist() == [[words.bos_token_id, *rewrite("the dogs", words)]]
    (batch,) = encode(words, [item], prepend_bos=False).batches(1)
    assert batch.tokens.tolist() == [rewrite("the dog", words)]
    (batch,) = encode(pieces, [Item("The uncle", " has", " have")]).batches(1)
    assert batch.tokens.tolist() == [rewrite("The uncle", pieces)]


def test_items_with_an_unusable_pair_are_kept_without_it(words: Any) -> None:
    items = [
        Item("the dog", "sleeps", "sleep", "the dogs"),
        Item("the cat", "sleeps", "sleep", "the old cats"),
        Item("the cow", "sleeps", "sleep", "the unicorns"),
        Item("the pig", "sleeps", "sleep"),
    ]
    prompts = encode(words, items)
    assert len(prompts) == 4 and not prompts.skipped
    assert prompts.unpaired == {
        "the paired prompt has a different number of tokens": 1,
        "a word is unknown to the tokenizer": 1,
    }
    paired, alone = prompts.batches(10)
    assert paired.patch is not None and paired.index.tolist() == [0]
    assert alone.patch is None and alone.index.tolist() == [1, 2, 3]
    assert "4 of 4 items" in repr(prompts)


def test_batches_have_one_length_and_hold_every_item_once(words: Any) -> None:
    task = Task.from_items("all", [item for c in grammar.CONSTRUCTIONS for item in Task.demo(c, n=9).items])
    prompts = task.prompts(words)
    for max_size in (1, 4, 100):
        seen: list[int] = []
        for batch in prompts.batches(max_size):
            assert 1 <= len(batch) <= max_size
            assert batch.patch is not None and batch.patch.shape == batch.tokens.shape
            for i in range(len(batch)):
                item = task.items[int(batch.index[i])]
                assert words.decode(batch.tokens[i, 1:]) == item.prefix
                assert words.decode(batch.patch[i, 1:]) == item.patch_prefix
                assert words.decode([int(batch.correct[i]), int(batch.wrong[i])]) == f"{item.correct} {item.wrong}"
            seen += batch.index.tolist()
        assert sorted(seen) == list(range(len(task)))
    lengths = [batch.tokens.shape[1] for batch in prompts.batches(4)]
    assert lengths == sorted(lengths)
    with pytest.raises(UserError, match="a batch size of 0 prompts"):
        next(prompts.batches(0))


def test_select_and_metric(words: Any) -> None:
    (batch,) = Task.demo("simple", "en", n=8).prompts(words).batches(8)
    logits = torch.randn(8, len(words), generator=torch.Generator().manual_seed(0))
    expected = [float(logits[i, batch.correct[i]] - logits[i, batch.wrong[i]]) for i in range(8)]
    assert logit_difference(logits, batch).tolist() == pytest.approx(expected)
    some = batch.select(torch.arange(8) % 2 == 0)
    assert some.index.tolist() == batch.index[::2].tolist() and some.patch is not None
    assert some.patch.tolist() == batch.patch[::2].tolist()  # pyright: ignore[reportOptionalSubscript]
    assert logit_difference(logits[::2], some).tolist() == pytest.approx(expected[::2])
    assert len(batch.select(torch.zeros(8, dtype=torch.bool))) == 0


# ---- answers of many tokens


def slow_answers(tokenizer: Any, item: Item, bos: int | None) -> tuple[list[int], list[int], int] | None:
    """Both strings and the number of tokens before the answers, token by token."""
    blank = "" if not item.prefix or item.correct[0].isspace() else " "
    found = [rewrite(item.prefix + blank + answer, tokenizer) for answer in (item.correct, item.wrong)]
    strings = [tokens if bos is None else [bos, *tokens] for tokens in found]
    start = 0
    while start < min(map(len, strings)) and strings[0][start] == strings[1][start]:
        start += 1
    if start in (0, len(strings[0]), len(strings[1])):
        return None
    return strings[0], strings[1], start


@given(
    st.lists(st.sampled_from(["The", "uncle", "farmers", "works", "zebra"]), max_size=3),
    st.sampled_from([" works", " has seen what is", " zebra", " works with", "has", "The uncle has"]),
    st.sampled_from([" work", " have seen what is", " uncles", " work with", "have", "A uncle has"]),
)
def test_answers_equal_a_slow_search(pieces: Any, prefix: list[str], correct: str, wrong: str) -> None:
    if correct[0].isspace() != wrong[0].isspace():
        return
    item = Item(" ".join(prefix), correct, wrong)
    found = encode_answers(pieces, [item])
    expected = slow_answers(pieces, item, None)
    assert len(found) == (expected is not None) and sum(found.skipped.values()) == (expected is None)
    if expected is None:
        return
    seen = 0
    for batch in found.batches(1):
        string = expected[0] if bool(batch.correct) else expected[1]
        assert [*batch.tokens[0].tolist(), int(batch.targets[0, -1])] == string
        assert batch.tokens[0, 1:].tolist() == batch.targets[0, :-1].tolist()
        assert batch.targets[0, int(batch.start) :].tolist() == string[expected[2] :]
        seen += 1
    assert seen == 2


def test_skipped_answers_are_counted_by_reason(words: Any, pieces: Any) -> None:
    items = [
        Item("the dog", "sleeps", "sleep"),
        Item("the dog", "sleeps", "zebra"),
        Item("the dog", "sleeps", "sleeps"),
        Item("the dog", "sleeps .", "sleeps"),
        Item("", "the dog sleeps", "a dog sleeps"),
        Item("the dog near the old farmer", "sleeps .", "sleep ."),
    ]
    answers = encode_answers(words, items, max_length=7)
    assert answers.skipped == {
        "a word is unknown to the tokenizer": 1,
        "the answers are the same tokens": 1,
        "one answer is the beginning of the other": 1,
        "longer than 7 tokens": 1,
    }
    assert answers.examples == {
        "the answers are the same tokens": "'sleeps' / 'sleeps'",
        "one answer is the beginning of the other": "'sleeps .' / 'sleeps'",
    }
    assert [pair.item for pair in answers.usable] == [0, 4]
    assert len(encode_answers(words, items, max_length=8)) == 3
    assert "2 of 6 items" in repr(answers)
    # the first token is predicted from the BOS alone
    assert answers.usable[1].start == 1
    without = encode_answers(words, items[4:5], prepend_bos=False)
    assert without.skipped == {"the first tokens differ, and there is no BOS token before them": 1}
    assert len(encode_answers(pieces, [Item("", "The uncle has", "A uncle has")])) == 0
    assert len(encode_answers(pieces, [Item("", "The uncle has", "The uncle have")])) == 1
    with pytest.raises(UserError, match="a batch size of 0 prompts"):
        next(answers.batches(0))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_summed_log_probabilities(words: Any, seed: int) -> None:
    items = [Item(i.prefix, f"{i.correct} .", f"{i.wrong} {i.wrong} .") for i in Task.demo("pp", n=5, seed=seed).items]
    generator = torch.Generator().manual_seed(seed)
    checked = 0
    for batch in encode_answers(words, items).batches(3):
        B, T = batch.tokens.shape
        logits = 5 * torch.randn(B, T, len(words), generator=generator)
        scores = summed_log_probability(logits, batch)
        for b in range(B):
            total = 0.0
            for t in range(int(batch.start[b]), T):
                row = logits[b, t].double()
                total += float(row[batch.targets[b, t]]) - math.log(sum(math.exp(float(x)) for x in row))
            assert float(scores[b]) == pytest.approx(total, rel=1e-5)
            checked += 1
    assert checked == 2 * len(items)


@pytest.fixture(scope="module")
def model(words: Any) -> Any:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.4,
    )
    return GPTNeoXForCausalLM(config).eval()


@torch.no_grad()
def metric(model: Any, words: Any, items: list[Item], size: int) -> dict[int, float]:
    """log p(correct) - log p(wrong) by item."""
    found: dict[int, float] = dict.fromkeys(range(len(items)), 0.0)
    for batch in encode_answers(words, items).batches(size):
        scores = summed_log_probability(model(batch.tokens).logits, batch)
        for i, correct, score in zip(batch.index.tolist(), batch.correct.tolist(), scores.tolist(), strict=True):
            found[i] += score if correct else -score
    return found


def test_scores_do_not_depend_on_the_batches(model: Any, words: Any) -> None:
    items = [item for c in ("simple", "pp", "obj_rel") for item in Task.demo(c, n=3).items]
    items = [Item(i.prefix, f"{i.correct} .", f"{i.wrong} {i.wrong} .") for i in items]
    alone = [metric(model, words, [item], 1)[0] for item in items]
    assert len({round(value, 4) for value in alone}) > 15
    for size in (1, 5, 1000):
        together = metric(model, words, items, size)
        assert [together[i] for i in range(len(items))] == pytest.approx(alone, abs=1e-5)
    # the same from the model's own padding, the way batches of unequal length are usually run
    for side in ("left", "right"):
        words.padding_side = side
        padded: list[float] = []
        for item, expected in zip(items, alone, strict=True):
            texts = [f"{words.bos_token} {item.prefix} {answer}" for answer in (item.correct, item.wrong)]
            batch = words(texts, padding=True, return_tensors="pt", add_special_tokens=False)
            mask = batch["attention_mask"]
            with torch.no_grad():
                positions = (mask.cumsum(-1) - 1).clamp_min(0)
                logits = model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits
            log_p = logits.double().log_softmax(-1)[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            real = mask[:, 1:] * mask[:, :-1]
            totals = (log_p * real).sum(-1)
            padded.append(float(totals[0] - totals[1]))
            assert padded[-1] == pytest.approx(expected, abs=1e-4)


def test_single_tokens_have_the_same_score_both_ways(model: Any, words: Any) -> None:
    items = list(Task.demo("pp", n=10).items)
    summed = metric(model, words, items, 7)
    for batch in encode(words, items).batches(7):
        with torch.no_grad():
            difference = logit_difference(model(batch.tokens).logits[:, -1], batch)
        for i, value in zip(batch.index.tolist(), difference.tolist(), strict=True):
            assert summed[i] == pytest.approx(value, abs=1e-5)
