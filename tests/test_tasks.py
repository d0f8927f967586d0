"""Tasks: the tokenisation rule against a slow search, every source and error, accuracy against transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosslens import grammar
from crosslens.errors import UserError
from crosslens.prompts import Item, encode
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task, logit_difference, wilson_interval

SVA = [
    {"clean_prefix": "The uncle", "patch_prefix": "The uncles", "clean_answer": " has", "patch_answer": " have"},
    {"clean_prefix": "The uncles", "patch_prefix": "The uncle", "clean_answer": " are", "patch_answer": " is"},
    {"clean_prefix": "The uncle", "patch_prefix": "The uncles", "clean_answer": " has", "patch_answer": " have"},
]


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


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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
def test_prompts_are_what_a_slow_search_finds(pieces: Any, prefix: list[str], correct: str, wrong: str) -> None:
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


def test_answers_are_joined_by_exactly_one_blank(pieces: Any) -> None:
    one = encode(pieces, [Item("The uncle", " has", " have"), Item("The uncle", "has", "have")])
    first, second = one.usable
    assert first[1:4] == second[1:4]
    assert pieces.decode(first.tokens) == "The uncle" and pieces.decode([first.correct]) == " has"


def test_what_both_answers_end_in_is_left_away(pieces: Any) -> None:
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
    assert len(encode(words, items, prepend_bos=True, max_length=7)) == 2
    assert len(encode(words, items, prepend_bos=False, max_length=6)) == 2
    assert len(encode(words, items, prepend_bos=True, max_length=6)) == 1


def test_bos_is_prepended_to_prompt_and_pair_where_there_is_one(words: Any, pieces: Any) -> None:
    item = Item("the dog", "sleeps", "sleep", "the dogs")
    (batch,) = encode(words, [item]).batches(1)
    assert batch.tokens.tolist() == [[words.bos_token_id, *rewrite("the dog", words)]]
    assert batch.patch is not None
    assert batch.patch.tolist() == [[words.bos_token_id, *rewrite("the dogs", words)]]
    (batch,) = encode(words, [item], prepend_bos=False).batches(1)
    assert batch.tokens.tolist() == [rewrite("the dog", words)]
    (batch,) = encode(pieces, [Item("The uncle", " has", " have")]).batches(1)
    assert batch.tokens.tolist() == [rewrite("The uncle", pieces)]


def test_an_item_whose_pair_does_not_fit_stays_without_it(words: Any) -> None:
    items = [
        Item("the dog", "sleeps", "sleep", "the dogs"),
        Item("the cat", "sleeps", "sleep", "the old cats"),
        Item("the cow", "sleeps", "sleep", "the unicorns"),
        Item("the pig", "sleeps", "sleep"),
    ]
    prompts = encode(words, items)
    assert len(prompts) == 4 and not prompts.skipped
    assert prompts.unpaired == {
        "the paired prompt has another number of tokens": 1,
        "a word is unknown to the tokenizer": 1,
    }
    paired, alone = prompts.batches(10)
    assert paired.patch is not None and paired.index.tolist() == [0]
    assert alone.patch is None and alone.index.tolist() == [1, 2, 3]
    assert "4 of 4 items" in repr(prompts)


def test_batches_have_one_length_lead_back_to_the_items_and_hold_each_once(words: Any) -> None:
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
    with pytest.raises(UserError, match="a batch of 0 prompts"):
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


def test_no_usable_item_is_an_error_with_the_reasons(words: Any) -> None:
    task = Task.from_items("odd", [Item("the unicorn", "sleeps", "sleep"), Item("the dog", "sleeps now", "sleep")])
    with pytest.raises(UserError) as caught:
        task.prompts(words)
    assert str(caught.value) == (
        "task 'odd': none of its 2 items can be used (a word is unknown to the tokenizer: 1, the answers do not differ "
        "in exactly one token: 1): give items whose answers differ in one token of this tokenizer, after prompts that "
        "fit the model"
    )


# ---- sources


def test_sva_drops_and_counts_duplicates(tmp_path: Path) -> None:
    task = Task.sva(write(tmp_path / "simple_test.json", *SVA))
    assert task.name == "simple_test" and len(task) == 2 and task.duplicates == 1
    assert task.items[0] == Item("The uncle", " has", " have", "The uncles")
    named = Task.sva(write(tmp_path / "a.json", {**SVA[0], "case": "singular"}), "b")
    assert named.name == "b" and named.items[0].info == {"case": "singular"}


@pytest.mark.parametrize("layout", ["jsonl", "array", "csv", "tsv"])
def test_local_reads_the_same_items_from_every_layout(tmp_path: Path, layout: str) -> None:
    rows = [("The dog, the\u2028cat", "is", "are"), ('The "dogs"', "are", "is")]
    keyed = [dict(zip(("p", "good", "bad"), row, strict=True)) for row in rows]
    path = tmp_path / f"mine.{layout if layout != 'array' else 'json'}"
    if layout == "array":
        path.write_text(json.dumps(keyed))
    elif layout == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in keyed), encoding="utf-8")
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="," if layout == "csv" else "\t")
            writer.writerows([("p", "good", "bad"), *rows])
    task = Task.local(path, prefix="p", correct="good", wrong="bad")
    assert [(i.prefix, i.correct, i.wrong) for i in task.items] == rows and task.name == "mine"


def test_local_takes_pairs_where_there_are_some(tmp_path: Path) -> None:
    row = {"prefix": "The dog", "correct": "is", "wrong": "are"}
    path = write(tmp_path / "t.jsonl", {**row, "patch_prefix": "The dogs"}, {**row, "prefix": "The cat"})
    assert [item.patch_prefix for item in Task.local(path).items] == ["The dogs", None]
    with pytest.raises(UserError, match="line 2: the key 'patch_prefix' is missing; present are 'prefix', 'correct'"):
        Task.local(path, patch_prefix="patch_prefix")


def test_errors_name_file_line_key_and_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", SVA[0], {"clean_prefx": "a", "clean_answer": " b"})
    with pytest.raises(UserError) as caught:
        Task.sva(path)
    assert str(caught.value) == (
        f"{path}, line 2: the key 'clean_prefix' is missing; present are 'clean_prefx', 'clean_answer'; "
        "did you mean 'clean_prefx'?"
    )
    for content, message in (
        ('{"prefix": "a", "correct": 3, "wrong": "c"}', "line 1: the key 'correct' is 3; give text"),
        ('{"prefix": "a", "correct": " ", "wrong": "c"}', "line 1: the correct answer after 'a' is empty"),
        ('\n{"prefix": ', "line 2: not valid JSON"),
        ("[1, 2]", "entry 1: 1 is no JSON object"),
        ("  ", "task 't' has no items"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            Task.local(path)
    (tmp_path / "t.csv").write_text("prefix,correct,wrong\na,b\n")
    with pytest.raises(UserError, match="t.csv, line 2: the key 'wrong' is None; give text"):
        Task.local(tmp_path / "t.csv")
    with pytest.raises(UserError, match="cannot read .*missing.json"):
        Task.sva(tmp_path / "missing.json")
    with pytest.raises(UserError, match="unknown kind '.parquet': give one of .jsonl, .json, .ndjson, .csv, .tsv"):
        Task.local(tmp_path / "t.parquet")


def test_from_items_takes_items_and_dictionaries() -> None:
    rows = [Item("a", "b", "c"), {"prefix": "a", "correct": "c", "wrong": "b", "patch_prefix": "d", "note": 1}]
    task = Task.from_items("mine", [*rows, rows[0]])
    assert task.items == (Item("a", "b", "c"), Item("a", "c", "b", "d")) and task.duplicates == 1
    assert task.items[1].info == {"note": 1}
    for items, message in (
        ([], "task 'x' has no items"),
        ([{"prefix": "a", "correct": "b"}], "task 'x', item 0: the key 'wrong' is missing"),
    ):
        with pytest.raises(UserError, match=message):
            Task.from_items("x", items)
    with pytest.raises(UserError, match="task name 'a/b'"):
        Task.from_items("a/b", rows)


BLIMP = {
    "sentence_good": "The girl who annoys these adults works with Bob.",
    "sentence_bad": "The girl who annoys these adults work with Bob.",
    "one_prefix_prefix": "The girl who annoys these adults",
    "one_prefix_word_good": "works with",
    "one_prefix_word_bad": "work with",
    "UID": "distractor_agreement_relative_clause",
    "one_prefix_method": True,
}


def test_blimp_from_a_file_from_a_folder_and_from_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    uid = BLIMP["UID"]
    short = {
        **BLIMP,
        "sentence_good": "Paula sleeps.",
        "sentence_bad": "Paula sleep.",
        "one_prefix_prefix": "Paula",
        "one_prefix_word_good": "sleeps",
        "one_prefix_word_bad": "sleep",
    }
    same = {**BLIMP, "sentence_bad": BLIMP["sentence_good"], "one_prefix_word_bad": "works with"}
    path = write(tmp_path / f"{uid}.jsonl", BLIMP, short)
    task = Task.blimp(path)
    assert task.name == uid and task.items == Task.blimp(str(uid), folder=tmp_path).items
    assert task.items[0] == Item("The girl who annoys these adults", "works with", "work with")
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        only = ("sentence_good", "sentence_bad", "UID", "one_prefix_method")
        return [{key: row[key] for key in only} for row in (BLIMP, short, same)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub = Task.blimp(str(uid))
    assert asked == [(("nyu-mll/blimp", uid), {"split": "train"})]
    assert [(i.prefix, i.correct, i.wrong) for i in hub.items] == [
        ("The girl who annoys these adults", "works", "work"),
        ("Paula", "sleeps", "sleep"),
        ("The girl who annoys these adults works with", "Bob", "Bob"),  # no pair: skipped as the same tokens
    ]


def test_blimp_errors(tmp_path: Path, monkeypatch: Any) -> None:
    uid = "distractor_agreement_relative_clause"
    path = write(tmp_path / f"{uid}.jsonl", {**BLIMP, "one_prefix_method": False, "UID": "adjunct_island"})
    with pytest.raises(UserError, match="line 1: 'adjunct_island' is not judged by the one-prefix method"):
        Task.blimp(path)
    with pytest.raises(UserError, match=f"did you mean '{uid}'"):
        Task.blimp("distractor_agreement_relative_clauses", folder=tmp_path)

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/blimp' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError) as caught:
        Task.blimp("nothing")
    assert str(caught.value) == (
        "BLiMP paradigm 'nothing' cannot be read from the hub (Couldn't reach 'nyu-mll/blimp' on the Hub): "
        "check its name and the connection, or give its .jsonl file"
    )


def test_demo_pools_the_languages() -> None:
    task = Task.demo("pp", n=20, seed=3)
    assert task.name == "pp" and Counter(i.info["language"] for i in task.items) == {"en": 20, "fr": 20}
    assert task == Task.demo("pp", n=20, seed=3) != Task.demo("pp", n=20, seed=4)
    french = Task.demo("pp", "fr", n=20, seed=3)
    assert french.name == "pp-fr" and french.items == task.items[20:]
    assert all(item.patch_prefix is not None for item in task.items)
    with pytest.raises(UserError, match="did you mean 'simple'"):
        Task.demo("simpel")


# ---- halves


def test_halves_share_no_prefix_and_keep_everything() -> None:
    numbers = ("uncle", "uncles"), ("king", "kings"), ("dog", "dogs"), ("cat", "cats"), ("boy", "boys")
    items = [
        Item(f"The {a}", verb, other, f"The {b}")
        for one, many in numbers
        for verb, other in (("is", "are"), ("has", "have"))
        for a, b in ((one, many), (many, one))
    ]
    task = Task.from_items("t", items)
    for seed in range(5):
        halves = task.split(seed)
        assert sorted(map(repr, halves[0].items + halves[1].items)) == sorted(map(repr, items))
        prefixes = [{p for item in half.items for p in (item.prefix, item.patch_prefix)} for half in halves]
        assert not prefixes[0] & prefixes[1]
        assert {len(half) for half in halves} == {8, 12}
        assert halves == task.split(seed) and halves[0].name == halves[1].name == "t"
        for half in halves:
            assert list(half.items) == [item for item in items if item in half.items]
    assert len({task.split(seed)[0] for seed in range(5)}) > 1
    chained = [Item("a", "x", "y", "b"), Item("c", "x", "y", "b"), Item("c", "x", "z", "d"), Item("d", "x", "z")]
    with pytest.raises(UserError, match="task 'c' cannot be split"):
        Task.from_items("c", chained).split()
    assert {len(h) for h in Task.from_items("c", [*chained, Item("e", "x", "y")]).split()} == {1, 4}


# ---- accuracy


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (1, 1), (250, 300)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    interval = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert wilson_interval(float(k), n) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert wilson_interval(n / 2, n)[0] == pytest.approx(1 - wilson_interval(n / 2, n)[1])


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: Any, words: Any) -> Snapshots:
    """Three tiny models; in the second all embeddings of the output are zero, so that every answer is a tie."""
    root = tmp_path_factory.mktemp("snapshots")
    config = GPTNeoXConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.4,
    )
    for step in (0, 10, 20):
        with torch.random.fork_rng():
            torch.manual_seed(step)
            model = GPTNeoXForCausalLM(config)
        if step == 10:
            torch.nn.init.zeros_(model.get_output_embeddings().weight)
        model.save_pretrained(root / f"step{step}")
    words.save_pretrained(root / "tokenizer")
    return Snapshots.local(root)


def test_accuracy_is_what_transformers_says_item_by_item(snapshots: Snapshots, words: Any) -> None:
    items = [item for c in ("simple", "pp", "obj_rel") for item in Task.demo(c, n=10).items]
    task = Task.from_items("mixed", items)
    table = task.accuracy(snapshots, batch_size=7)
    assert list(table) == ["task", "snapshot", "label", "step", "tokens", "accuracy", "low", "high", "metric", "n"]
    assert table["label"].tolist() == ["step0", "step10", "step20"] and table["step"].tolist() == [0, 10, 20]
    assert table["tokens"].isna().all() and (table["n"] == 60).all() and (table["task"] == "mixed").all()
    for s, row in table.iterrows():
        model = GPTNeoXForCausalLM.from_pretrained(snapshots[int(str(s))].name)
        metric: list[float] = []
        with torch.no_grad():
            for item in items:
                tokens = torch.tensor([[0, *rewrite(item.prefix, words)]])
                logits = model(tokens).logits[0, -1]
                metric.append(float(logits[rewrite(item.correct, words)[0]] - logits[rewrite(item.wrong, words)[0]]))
        accuracy = sum((m > 0) + 0.5 * (m == 0) for m in metric) / 60
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["metric"] == pytest.approx(sum(metric) / 60, abs=1e-5)
        assert row["low"] < row["accuracy"] < row["high"]
    assert table["accuracy"][1] == 0.5 and table["metric"][1] == 0
    assert table["metric"].abs().max() > 0.05 and table["accuracy"].nunique() > 1


def test_accuracy_skips_what_does_not_fit_the_context(snapshots: Snapshots) -> None:
    long = Item(" ".join(["the dog"] * 6), "sleeps", "sleep")
    table = Task.from_items("t", [long, Item("the dog", "sleeps", "sleep")]).accuracy(snapshots[[0]])
    assert table["n"].tolist() == [1]


def test_non_finite_logits_name_the_snapshot(snapshots: Snapshots, monkeypatch: Any) -> None:
    def nothing(tokens: Any, return_type: str) -> Any:
        assert return_type == "logits"
        return torch.full((*tokens.shape, 900), math.nan)

    monkeypatch.setattr(Snapshots, "model", lambda *_, **__: nothing)
    with pytest.raises(UserError, match="snapshot step0 has non-finite logits on task 'simple'"):
        Task.demo("simple", n=4).accuracy(snapshots)
