"""Tasks: every source and error, the hub on a local server, accuracy against transformers."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import wilson_interval
from crosslens.synthetic import grammar
from crosslens.tasks.accuracy import describe_accuracy, list_counts
from crosslens.tasks.items import Item
from crosslens.tasks.task import Task
from tests.hub_server import serve_datasets

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


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rewrite(text: str, tokenizer: Any) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_no_usable_item_is_an_error_with_reasons(words: Any) -> None:
    task = Task.from_items("odd", [Item("the unicorn", "sleeps", "sleep"), Item("the dog", "sleeps now", "sleep")])
    with pytest.raises(UserError) as caught:
        task.prompts(words)
    assert str(caught.value) == (
        "task 'odd': none of its 2 items is usable (a word is unknown to the tokenizer: 1, the answers do not differ "
        "in exactly one token, such as 'sleeps now' / 'sleep': 1): give items whose answers differ in one token of "
        "this tokenizer, with prompts that fit the model's context"
    )


# ---- sources


def test_sva_drops_and_counts_duplicates(tmp_path: Path) -> None:
    task = Task.sva(write(tmp_path / "simple_test.json", *SVA))
    assert task.name == "simple_test" and len(task) == 2 and task.duplicates == 1
    assert task.items[0] == Item("The uncle", " has", " have", "The uncles")
    named = Task.sva(write(tmp_path / "a.json", {**SVA[0], "case": "singular"}), "b")
    assert named.name == "b" and named.items[0].info == {"case": "singular"}


@pytest.mark.parametrize("layout", ["jsonl", "array", "csv", "tsv", "parquet"])
def test_local_reads_the_same_items_from_every_layout(tmp_path: Path, layout: str) -> None:
    rows = [("The dog, the\u2028cat", "is", "are"), ('The "dogs"', "are", "is")]
    keyed = [dict(zip(("p", "good", "bad"), row, strict=True)) for row in rows]
    path = tmp_path / f"mine.{layout if layout != 'array' else 'json'}"
    if layout == "array":
        path.write_text(json.dumps(keyed))
    elif layout == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in keyed), encoding="utf-8")
    elif layout == "parquet":
        pd.DataFrame(keyed).to_parquet(path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file, delimiter="," if layout == "csv" else "\t")
            writer.writerows([("p", "good", "bad"), *rows])
    task = Task.local(path, {"prefix": "p", "correct": "good", "wrong": "bad"})
    assert [(i.prefix, i.correct, i.wrong) for i in task.items] == rows and task.name == "mine"


def test_local_reads_optional_pairs(tmp_path: Path) -> None:
    row = {"prefix": "The dog", "correct": "is", "wrong": "are"}
    path = write(tmp_path / "t.jsonl", {**row, "patch_prefix": "The dogs"}, {**row, "prefix": "The cat"})
    assert [item.patch_prefix for item in Task.local(path).items] == ["The dogs", None]
    with pytest.raises(UserError, match="line 2: the key 'patch_prefix' is missing; present are 'prefix', 'correct'"):
        Task.local(path, {"patch_prefix": "patch_prefix"})
    with pytest.raises(UserError, match="columns: 'corect' is not an item's field; .*did you mean 'correct'"):
        Task.local(path, {"corect": "good"})


def test_errors_name_file_line_and_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", SVA[0], {"clean_prefx": "a", "clean_answer": " b"})
    with pytest.raises(UserError) as caught:
        Task.sva(path)
    assert str(caught.value) == (
        f"{path}, line 2: the key 'clean_prefix' is missing; present are 'clean_prefx', 'clean_answer'; "
        "did you mean 'clean_prefx'?"
    )
    for make, row, message in (
        (
            Task.local,
            SVA[0],
            "the key 'prefix' is missing; this is the SVA format (clean_prefix, clean_answer, patch_answer): use "
            "--task sva:FILE, or Task.sva in Python",
        ),
        (
            Task.sva,
            {"prefix": "a", "correct": "b", "wrong": "c"},
            "plain format (prefix, correct, wrong): use --task",
        ),
        (Task.local, {"sentence_good": "a b", "sentence_bad": "a c"}, "use --task blimp:FILE, or Task.blimp in Python"),
        (Task.blimp, SVA[0], "the key 'sentence_good' is missing; this is the SVA format"),
    ):
        with pytest.raises(UserError, match=f"t.json, line 1: .*{re.escape(message)}"):
            make(write(path, row))
    for content, message in (
        ('{"prefix": "a", "correct": 3, "wrong": "c"}', "line 1: the key 'correct' is 3; give text"),
        ('{"prefix": "a", "correct": " ", "wrong": "c"}', "line 1: the correct answer after 'a' is empty"),
        ('\n{"prefix": ', "line 2: not valid JSON"),
        ("[1, 2]", "entry 1: 1 is not a JSON object"),
        ("  ", "task 't' has no items"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            Task.local(path)
    (tmp_path / "t.csv").write_text("prefix,correct,wrong\na,b\n")
    with pytest.raises(UserError, match="t.csv, line 2: the key 'wrong' is None; give text"):
        Task.local(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text(",".join("x" * 5000 + str(i) for i in range(100)) + "\n" + "a," * 99 + "b\n")
    with pytest.raises(UserError, match=r"the key 'prefix' is missing; present are 'x+\.\.\., .*, \.\.\.") as caught:
        Task.local(tmp_path / "t.csv")
    assert len(str(caught.value)) < 2000
    with pytest.raises(UserError, match="cannot read .*missing.json"):
        Task.sva(tmp_path / "missing.json")
    (tmp_path / "t.parquet").write_text("none")
    for name in ("t.parquet", "missing.parquet"):
        with pytest.raises(UserError, match=f"cannot read .*{name} .*: give an existing parquet file"):
            Task.local(tmp_path / name)
    damaged = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe1"))
    pq.write_table(pa.table({"prefix": damaged, "correct": ["a"], "wrong": ["b"]}), tmp_path / "t.parquet")
    said = "utf-8" if int(pd.__version__.partition(".")[0]) > 2 else "Wrapping a"  # which pandas 2 leaves to pyarrow
    with pytest.raises(UserError, match=rf"cannot read .*t.parquet \(.*{said}"):
        Task.local(tmp_path / "t.parquet")
    with pytest.raises(UserError, match="unknown suffix '.xlsx': use one of .jsonl, .json, .ndjson, .csv, .tsv, .parq"):
        Task.local(tmp_path / "t.xlsx")


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


SHORT = {
    **BLIMP,
    "sentence_good": "Paula sleeps.",
    "sentence_bad": "Paula sleep.",
    "one_prefix_prefix": "Paula",
    "one_prefix_word_good": "sleeps",
    "one_prefix_word_bad": "sleep",
}
ISLAND = {
    "sentence_good": "Who should Derek hug after shocking Richard?",
    "sentence_bad": "Who should Derek hug Richard after shocking?",
    "UID": "adjunct_island",
    "one_prefix_method": False,
}
UID = "distractor_agreement_relative_clause"
WHOLE = [  # of BLIMP and SHORT
    ("The girl who annoys these adults", "works with Bob.", "work with Bob."),
    ("Paula", "sleeps.", "sleep."),
]


def words_of(task: Task) -> list[tuple[str, str, str]]:
    return [(item.prefix, item.correct, item.wrong) for item in task.items]


def test_blimp_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path / f"{UID}.jsonl", BLIMP, SHORT)
    task = Task.blimp(path)
    assert task.name == UID and task.answers == "single" and task == Task.blimp(UID, folder=tmp_path)
    assert words_of(task) == [
        ("The girl who annoys these adults", "works with", "work with"),
        ("Paula", "sleeps", "sleep"),
    ]
    whole = Task.blimp(path, answers="multi")
    assert whole.answers == "multi" and words_of(whole) == WHOLE
    # without the columns of the one-prefix method the words come from the sentences
    columns = ("sentence_good", "sentence_bad", "UID", "one_prefix_method")
    same = {**BLIMP, "sentence_bad": BLIMP["sentence_good"]}
    path = write(tmp_path / "short.jsonl", *({key: row[key] for key in columns} for row in (BLIMP, SHORT, same)))
    assert words_of(Task.blimp(path)) == [
        ("The girl who annoys these adults", "works", "work"),
        ("Paula", "sleeps", "sleep"),
        ("The girl who annoys these adults works with", "Bob", "Bob"),  # no pair: skipped as the same tokens
    ]


def test_blimp_without_the_one_prefix_method_compares_full_sentences(tmp_path: Path, words: Any) -> None:
    path = write(tmp_path / "adjunct_island.jsonl", ISLAND)
    task = Task.blimp(path)
    assert task.answers == "multi"
    assert words_of(task) == [("Who should Derek hug", "after shocking Richard?", "Richard after shocking?")]
    with pytest.raises(
        UserError,
        match="line 1: 'adjunct_island' does not have the one-prefix method: .*only full sentences can be compared, by "
        "Task.accuracy .leave answers out.; for attribution choose a paradigm with one_prefix_method",
    ):
        Task.blimp(path, answers="single")
    pd.DataFrame([ISLAND]).to_csv(tmp_path / "adjunct_island.csv", index=False)
    assert Task.blimp(tmp_path / "adjunct_island.csv").answers == "multi"
    with pytest.raises(UserError) as caught:
        task.prompts(words)
    assert str(caught.value) == (
        "task 'adjunct_island' compares answers of several tokens (answers='multi'), which attribution does not "
        "support: use Task.accuracy, or a task whose answers differ in one token"
    )
    with pytest.raises(UserError, match="none of its 1 items is usable .*unknown to the tokenizer.*tells apart"):
        task.strings(words)
    with pytest.raises(UserError, match=f"does not exist: give an existing file; did you mean '{UID}'"):
        Task.blimp(f"{UID}s", folder=write(tmp_path / f"{UID}.jsonl", BLIMP).parent)
    for make in (
        lambda: Task.blimp(path, answers="mutli"),
        lambda: Task.from_sentences("x", [], answers="mutli"),
        lambda: Task.from_items("x", [Item("a", "b", "c")], answers="mutli"),
    ):
        with pytest.raises(
            UserError, match="answers='mutli' is unknown; use 'single' or 'multi'; did you mean 'multi'"
        ):
            make()


@pytest.mark.parametrize(
    ("good", "bad", "single", "multi"),
    [
        ("the dog sleeps", "the dog sleep", ("the dog", "sleeps", "sleep"), ("the dog", "sleeps", "sleep")),
        ("Il dort ici.", "Ils dort ici.", ("", "Il", "Ils"), ("", "Il dort ici.", "Ils dort ici.")),
        ("he walked", "he talked", ("he", "walked", "talked"), None),
        ("a b c d", "a c b d", ("a", "b c", "c b"), ("a", "b c d", "c b d")),
        ("a b c d.", "a d.", ("a", "b c d", "d"), ("a", "b c d.", "d.")),
        ("a b", "a b c", ("a", "b", "b c"), ("a", "b", "b c")),
        ("He said\u00a0: «\u00a0no »", "He said\u00a0: «\u00a0yes »", ("He said\u00a0: «", "no", "yes"), None),
        ("say (it)", "say (me)", ("say", "(it", "(me"), ("say", "(it)", "(me)")),
        ("?", "!", ("", "?", "!"), ("", "?", "!")),
        ("no.", ".", ("", "no.", "."), ("", "no.", ".")),
    ],
)
def test_sentences_are_divided_at_the_words_that_differ(
    good: str, bad: str, single: tuple[str, str, str], multi: tuple[str, str, str] | None
) -> None:
    (one,) = Task.from_sentences("t", [{"sentence_good": good, "sentence_bad": bad}], answers="single").items
    assert (one.prefix, one.correct, one.wrong) == single
    if multi is not None:
        (whole,) = Task.from_sentences("t", [{"g": good, "b": bad, "note": 1}], "g", "b").items
        assert (whole.prefix, whole.correct, whole.wrong) == multi and whole.info == {"note": 1}


CLAMS = "True\tles auteurs sont vieux\nFalse\tles auteurs est vieux\nFalse\tl' auteur rient\nTrue\tl' auteur rit\n"


def test_pairs_that_differ_in_their_first_word_are_compared_as_sentences(tmp_path: Path) -> None:
    """In `simple_npi_anim`, "no" or "the" is right because of the "ever" after it; no prompt stands before either."""
    pairs = [f"{noun} have ever {end}" for noun in ("authors", "pilots") for end in ("been popular", "had children")]
    path = tmp_path / "simple_npi_anim.txt"
    path.write_text("".join(f"True\tno {rest}\nFalse\tthe {rest}\n" for rest in [*pairs, pairs[0]]))
    task = Task.clams(path)
    assert task.answers == "multi" and len(task) == 4 and task.merged == {"the same item": 1}
    assert words_of(task)[0] == ("", "no authors have ever been popular", "the authors have ever been popular")
    one_word = Task.clams(path, answers="single")
    assert words_of(one_word) == [("", "no", "the")]
    assert one_word.merged == {
        "the same item": 1,
        "the same prompt and answers, other words after them": 3,
    }


def test_the_documented_formats_can_be_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    lines = page.split("```text\n")[1].split("```")[0].splitlines()
    examples = {line[:12].strip(): line[12:] for line in lines if line[0] != " "}
    rows = {name: tmp_path / f"{name}.jsonl" for name in examples}
    for name, path in rows.items():
        path.write_text(examples[name] + "\n")
    clams = tmp_path / "clams.txt"
    clams.write_text("\n".join(line[12:] for line in lines if line[12:].startswith(("True\t", "False\t"))))
    expected = Item("The friends", " have", " has", "The friend")
    assert Task.local(rows["plain"]).items == Task.sva(rows["SVA, IOI"]).items == (expected,)
    assert Task.ioi(rows["SVA, IOI"]).items == (expected,)
    assert Task.blimp(rows["BLiMP"]).items == (Item("Beth", "scares", "scare"),)
    assert Task.clams(clams).items == (Item("the author", "laughs", "laugh"),)
    found = Task.multiblimp("fra", "SV-#", rows["MultiBLiMP"]).items
    assert found == (Item("le chat", "dort", "dorment"),)


def test_task_files_of_crosscoding_through_time(tmp_path: Path) -> None:
    """`clams_data/*.jsonl`: the keys of feature-circuits without paired prompts, and further ones."""
    rows = [
        {"clean_prefix": "The author", "clean_answer": " laughs", "patch_answer": " laugh", "skip": 0, "lang": "en"},
        {"clean_prefix": "L'auteur", "clean_answer": " rit", "patch_answer": " rient", "skip": 1, "lang": "fr"},
    ]
    task = Task.sva(write(tmp_path / "clams_simple_agrmt.jsonl", *rows))
    assert words_of(task) == [("The author", " laughs", " laugh"), ("L'auteur", " rit", " rient")]
    assert [item.patch_prefix for item in task.items] == [None, None] and task.items[1].info["lang"] == "fr"


def test_names_that_would_overwrite_other_tables_are_refused() -> None:
    refused = ("simple.snapshots", "Simple.SUMMARY", "x" * 101, "é" * 51, "aux", "a:b", "a\nb", ".a", "a ", "", "a/b")
    for name in refused:
        with pytest.raises(UserError, match="in file names"):
            Task.from_items(name, [Item("a", "b", "c")])
    composed = Task.from_items("e\u0301", [Item("a", "b", "c")]).name  # both forms of é are one name
    assert composed == "\u00e9"


def test_what_is_left_out_is_said() -> None:
    table = pd.DataFrame(
        {
            "task": "t", "label": ["a", "b"], "accuracy": [0.5, 0.9], 
            "accuracy_low": [0.3, 0.7], "accuracy_high": [0.7, 1.0],
            "at_chance": [True, False], "n": 12, "few": True, "skipped": 3, "reasons": "too long: 2, odd: 1",
            "merged": 1, "merged_reasons": "the same item",
        }
    )  # fmt: skip
    assert describe_accuracy(table) == [
        "t: 12 of 16 items, 1 merged (the same item), 3 skipped (too long: 2, odd: 1); fewer than 20, so means over "
        "tasks leave it out",
        "           a  accuracy 50.0% [30.0%, 70.0%], at chance",
        "           b  accuracy 90.0% [70.0%, 100.0%]",
    ]
    assert describe_accuracy(table.assign(skipped=0, merged=0, few=False))[0] == "t: 12 items"
    assert list_counts({"a": 1, "b": 3}) == "b: 3, a: 1" and list_counts({}) == "" and list_counts({"a": 2}) == "a"
    assert list_counts({"a": 1, "b": 3}, {"b": "' go' / ' goes'"}) == "b, such as ' go' / ' goes': 3, a: 1"


def test_clams_pairs_are_adjacent_lines(tmp_path: Path) -> None:
    (tmp_path / "fr_evalset").mkdir()
    path = tmp_path / "fr_evalset" / "simple_agrmt.txt"
    path.write_text(CLAMS + "\n", encoding="utf-8")
    task = Task.clams("fr", "simple_agrmt", tmp_path)
    assert task.name == "clams-fr-simple_agrmt" and task.answers == "single"
    assert words_of(task) == [("les auteurs", "sont", "est"), ("l' auteur", "rit", "rient")]
    assert task.items[0].info == {"language": "fr", "case": "simple_agrmt"}
    whole = Task.clams(path, answers="multi", capitalise=True, end=" .")
    assert whole.name == "simple_agrmt" and whole.answers == "multi"
    assert words_of(whole) == [("Les auteurs", "sont vieux .", "est vieux ."), ("L' auteur", "rit .", "rient .")]
    for content, message in (
        ("True\ta b\nTrue\ta c\n", "lines 1 and 2 are both True: pairs must be adjacent"),
        ("True\ta b\nFalse\ta c\nTrue\ta d", "has 3 sentences, an odd number: give pairs"),
        ("\nTrue a b\n", "line 2: 'True a b' is not 'True' or 'False', a tab, and a sentence"),
        ("True\t \nFalse\ta", "line 1: 'True' is not 'True' or 'False', a tab"),
        ("[" * 100_000, r"line 1: '\[{56}... is not 'True' or 'False', a tab"),
        ("", "has no items"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            Task.clams(path)
    for make, message in (
        (lambda: Task.clams("fr", "simple_agrm", tmp_path), "does not exist: .*did you mean 'simple_agrmt'"),
        (lambda: Task.clams("frr", "simple_agrmt", tmp_path), "has no frr_evalset: give one of its languages"),
        (
            lambda: Task.clams("fr", "simple_agrmt"),
            "CLAMS 'fr', 'simple_agrmt': the evaluation sets are not on the hub",
        ),
        (lambda: Task.clams(tmp_path / "none.txt"), "cannot read .*none.txt"),
    ):
        with pytest.raises(UserError, match=message):
            make()


MULTIBLIMP = [  # the word that differs stands in the middle, or is the last
    {"sen": 'Il le dit, "bien".', "wrong_sen": 'Il le dis, "bien".', "phenomenon": "SV-P", "verb": "dit"},
    {"sen": "Les rois voient", "wrong_sen": "Les rois voit", "phenomenon": "SV-#", "verb": "voient"},
]


@pytest.mark.parametrize("kind", ["folder", "csv", "tsv", "jsonl", "parquet"])
def test_multiblimp_by_language_and_phenomenon(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(MULTIBLIMP)
    several = pd.concat([frame.assign(language="fra"), frame.assign(language="spa", sen="no")], ignore_index=True)
    path = tmp_path / f"pairs.{kind}"
    if kind == "folder":
        (tmp_path / "fra").mkdir()
        frame.to_csv(tmp_path / "fra" / "data.tsv", sep="\t", index=False)
        path = tmp_path
    elif kind == "jsonl":
        several.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        several.to_parquet(path)
    else:
        several.to_csv(path, sep="," if kind == "csv" else "\t", index=False)
    task = Task.multiblimp("fra", path=path)
    assert task.name == "multiblimp-fra" and words_of(task) == [("Il le", "dit", "dis"), ("Les rois", "voient", "voit")]
    assert task.items[1].info == {"language": "fra", "phenomenon": "SV-#", "verb": "voient"}
    number = Task.multiblimp("fra", "SV-#", path)
    assert number.name == "multiblimp-fra-SV-#" and number.items == task.items[1:]
    whole = Task.multiblimp("fra", "SV-P", path, answers="multi")
    assert words_of(whole) == [("Il le", 'dit, "bien".', 'dis, "bien".')] and whole.answers == "multi"
    with pytest.raises(UserError, match="no row has phenomenon 'SV-N': choose one of 'SV-#', 'SV-P'"):
        Task.multiblimp("fra", "SV-N", path)
    message = "did you mean 'fra'" if kind == "folder" else "no row has language 'frau': choose one of 'fra', 'spa'"
    with pytest.raises(UserError, match=message):
        Task.multiblimp("frau", path=path)


def test_ioi_from_a_file_and_generated(tmp_path: Path) -> None:
    row = {
        "clean_prefix": "Emma and Anna met. Anna handed a ring to",
        "patch_prefix": "Emma and Anna met. Emma handed a ring to",
        "abc_prefix": "Emma and Anna met. Henry handed a ring to",
        "clean_answer": " Emma",
        "patch_answer": " Anna",
        "case": "ABBA",
    }
    (item,) = Task.ioi(write(tmp_path / "ioi.jsonl", row)).items
    assert item == Item(row["clean_prefix"], " Emma", " Anna", row["patch_prefix"])
    assert item.info == {"case": "ABBA", "abc_prefix": row["abc_prefix"]}

    task = Task.ioi(n=60, seed=1)
    assert len(task) == 60 and task == Task.ioi(n=60, seed=1) != Task.ioi(n=60, seed=2)
    assert Counter(item.info["case"] for item in task.items) == {"ABBA": 30, "BABA": 30}
    for item in task.items:
        receiver, giver = item.correct.strip(), item.wrong.strip()
        names = re.findall(r"[A-Z][a-z]+", item.prefix)[1:]  # the first word is none
        assert names == ([receiver, giver, giver] if item.info["case"] == "ABBA" else [giver, receiver, giver])
        assert item.patch_prefix is not None
        cut = item.prefix.rindex(giver)
        assert item.patch_prefix == item.prefix[:cut] + receiver + item.prefix[cut + len(giver) :]
        open_prefix = item.info["abc_prefix"]
        third = re.findall(r"[A-Z][a-z]+", open_prefix)[-1]
        assert third not in names and open_prefix == item.prefix[:cut] + third + item.prefix[cut + len(giver) :]
    for n in (0, 10**8):
        with pytest.raises(UserError, match=f"n={n} must be between 1 and [0-9]+, the number of items"):
            Task.ioi(n=n)


def test_induction_repeats_single_token_words(words: Any) -> None:
    for tokenizer in (words, bytes_tokenizer()):
        task = Task.induction(tokenizer, n=40, length=6, seed=1)
        assert task == Task.induction(tokenizer, n=40, length=6, seed=1) != Task.induction(tokenizer, n=40, length=6)
        prompts = task.prompts(tokenizer, prepend_bos=False)
        assert len(prompts) == len(task) == 40 and not prompts.unpaired
        repeats: set[int] = set()
        for batch in prompts.batches(100):
            assert batch.patch is not None
            rows = zip(batch.tokens, batch.patch, batch.correct, batch.wrong, strict=True)
            for tokens, patch, correct, wrong in rows:
                first, again = tokens[:6].tolist(), tokens[6:].tolist()
                repeats.add(len(again))
                assert len(set(first)) == 6 and again == first[: len(again)]
                assert int(correct) == first[len(again)] and int(wrong) not in first
                first[len(again)] = int(wrong)
                assert patch.tolist() == first + again
        assert repeats == {1, 2, 3, 4, 5}
    for options, message in (
        ({"length": 1}, "length=1 are out of range: n must be at least 1, length at least 2"),
        ({"n": 0}, "n=0"),
        ({"length": 10_000}, r"the tokenizer has \d+ single-token words, too few for length=10000"),
    ):
        with pytest.raises(UserError, match=message):
            Task.induction(words, **options)
    with pytest.raises(UserError, match="the tokenizer has 0 single-token words"):
        Task.induction(word_tokenizer(["1", "2"]))


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: a word has a different token at the beginning than after a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = "the uncle has uncles that have seen what is here , and the farmers work"
    tokenizer.train_from_iterator([text, *text.split()] * 20, trainer)  # words are one token at the beginning, too
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# ---- the hub


HUB = """
import sys
from crosslens.errors import UserError
from crosslens.tasks.task import Task

def told(make):
    try:
        make()
    except UserError as error:
        print(str(error).replace("\\n", "|"))

for task in (
    Task.blimp("adjunct_island"),
    Task.blimp("distractor_agreement_relative_clause"),
    Task.multiblimp("fra", "SV-#"),
    Task.hub("jumelet/multiblimp", "fra", columns={"prefix": "phenomenon", "correct": "verb", "wrong": "sen"}),
):
    print(task.name, task.answers, [(item.prefix, item.correct, item.wrong) for item in task.items])
if sys.argv[1] == "online":
    told(lambda: Task.blimp("adjunct_iland"))
    told(lambda: Task.hub("no/such"))
    told(lambda: Task.hub("jumelet/multiblimp", "fra", "test"))
    told(lambda: Task.hub("jumelet/multiblimp", "fra"))
told(lambda: Task.multiblimp("deu"))
"""
BLIMP_WORDS = [("The girl who annoys these adults", "works", "work"), ("Paula", "sleeps", "sleep")]
EXPECTED = [
    "adjunct_island multi [('Who should Derek hug', 'after shocking Richard?', 'Richard after shocking?')]",
    f"distractor_agreement_relative_clause single {BLIMP_WORDS}",
    "multiblimp-fra-SV-# single [('Les rois', 'voient', 'voit')]",
    f"fra single {[(row['phenomenon'], row['verb'], row['sen']) for row in MULTIBLIMP]}",
]


def card(configs: dict[str, str], extra: str = "") -> str:
    lines = [f"- config_name: {name}\n  data_files: {files}\n{extra}" for name, files in configs.items()]
    return "---\nconfigs:\n" + "".join(lines) + "---\n"


@pytest.mark.exhaustive
def test_the_hub_online_and_then_from_the_cache(tmp_path: Path) -> None:
    blimp, multiblimp = tmp_path / "hub" / "nyu-mll" / "blimp", tmp_path / "hub" / "jumelet" / "multiblimp"
    columns = ["sentence_good", "sentence_bad", "UID", "one_prefix_method"]
    for uid, rows in (("adjunct_island", [ISLAND]), (UID, [BLIMP, SHORT])):
        (blimp / uid).mkdir(parents=True)
        pd.DataFrame(rows)[columns].to_parquet(blimp / uid / "train-00000-of-00001.parquet")
    (blimp / "README.md").write_text(card({uid: f"{uid}/train-*" for uid in ("adjunct_island", UID)}))
    (multiblimp / "fra").mkdir(parents=True)
    pd.DataFrame(MULTIBLIMP).to_csv(multiblimp / "fra" / "data.tsv", sep="\t", index=False)
    (multiblimp / "README.md").write_text(card({"fra": "fra/data.tsv"}, '  sep: "\\t"\n'))

    def run(mode: str, **env: str) -> list[str]:
        found = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **env}
        for key in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"):
            found.pop(key, None)
        command = [sys.executable, "-c", HUB, mode]
        done = subprocess.run(command, env=found, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    with serve_datasets(tmp_path / "hub") as address:
        online = run("online", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert online == [
        *EXPECTED,
        "nyu-mll/blimp has no configuration 'adjunct_iland': it has 2, such as 'adjunct_island', "
        f"'{UID}'; did you mean 'adjunct_island'?",
        "no/such (split 'train') cannot be read from the hub (Dataset 'no/such' doesn't exist on the Hub or cannot be "
        "accessed.): check the name and the connection, or give a local file",
        "jumelet/multiblimp fra (split 'test') cannot be read from the hub (Unknown split \"test\". Should be one of "
        "['train'].): check the name and the connection, or give a local file",
        "jumelet/multiblimp fra, row 1: the key 'prefix' is missing; present are 'sen', 'wrong_sen', "
        "'phenomenon', 'verb'",
        "jumelet/multiblimp has no configuration 'deu': it has 1, such as 'fra'",
    ]
    assert run("offline", HF_HUB_OFFLINE="1") == [
        *EXPECTED,
        "jumelet/multiblimp deu (split 'train') cannot be read from the hub (Couldn't find cache for "
        "jumelet/multiblimp for config 'deu'): check the name and the connection, or give a local file",
    ]


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


def test_halves_share_no_prefix_and_keep_all_items() -> None:
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


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: Any, words: Any) -> Snapshots:
    """Three tiny models; the output embeddings of the second are zero, so every answer is a tie."""
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


def test_accuracy_equals_transformers_item_by_item(snapshots: Snapshots, words: Any) -> None:
    items = [item for c in ("simple", "pp", "obj_rel") for item in Task.demo(c, n=10).items]
    task = Task.from_items("mixed", items)
    table = task.accuracy(snapshots, batch_size=7)
    numbers = ["accuracy", "accuracy_low", "accuracy_high", "at_chance", "metric", "n"]
    left_out = ["few", "skipped", "reasons", "merged", "merged_reasons"]
    assert list(table) == ["task", "snapshot", "label", "step", "tokens", *numbers, *left_out]
    assert table["at_chance"].tolist() == [
        low <= 0.5 <= high for low, high in table[["accuracy_low", "accuracy_high"]].to_numpy()
    ]
    assert table["at_chance"][1] and not table["few"].any()
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
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert table["accuracy"][1] == 0.5 and table["metric"][1] == 0
    assert table["metric"].abs().max() > 0.05 and table["accuracy"].nunique() > 1


def test_accuracy_skips_items_longer_than_the_context(snapshots: Snapshots) -> None:
    long = Item(" ".join(["the dog"] * 6), "sleeps", "sleep")
    other, odd = Item(" ".join(["a dog"] * 6), "sleeps", "sleep"), Item("the unicorn", "sleeps", "sleep")
    for answers in ("single", "multi"):
        task = Task.from_items("t", [long, Item("the dog", "sleeps", "sleep"), other, odd], answers)
        table = task.accuracy(snapshots[[0]])
        assert table["n"].tolist() == [1] and table["skipped"].tolist() == [3]
        assert table["reasons"].tolist() == ["longer than 12 tokens: 2, a word is unknown to the tokenizer: 1"]
        with pytest.raises(UserError, match=r"none of its 1 items is usable \(longer than 12 tokens\): give items"):
            Task.from_items("t", [long], answers).accuracy(snapshots[[0]])


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_accuracy_of_several_tokens_equals_whole_sentences(snapshots: Snapshots, words: Any, prepend_bos: bool) -> None:
    rows: list[dict[str, str]] = []
    for item in Task.demo("pp", n=4).items:
        rows.append({"good": f"{item.prefix} {item.correct} .", "bad": f"{item.prefix} {item.wrong} ."})
        rows.append({"good": f"{item.prefix} {item.correct} {item.wrong}", "bad": f"{item.prefix} {item.wrong} ."})
        other = " ".join(reversed(item.prefix.split()))
        rows.append({"good": f"{item.prefix} .", "bad": f"{other} ."})
    task = Task.from_sentences("whole", rows, "good", "bad")
    table = task.accuracy(snapshots, batch_size=5, prepend_bos=prepend_bos)
    assert table["reasons"][0] == ("" if prepend_bos else NO_BOS)
    assert table["skipped"][0] == (0 if prepend_bos else 8) and (table["n"] + table["skipped"] == 24).all()
    for s, row in table.iterrows():
        model = GPTNeoXForCausalLM.from_pretrained(snapshots[int(str(s))].name)
        metric: list[float] = []
        for pair in rows:
            strings = [rewrite(pair[key], words) for key in ("good", "bad")]
            if not prepend_bos and strings[0][0] != strings[1][0]:
                continue
            totals: list[float] = []
            for ids in ([0, *tokens] if prepend_bos else tokens for tokens in strings):
                with torch.no_grad():
                    log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                totals.append(sum(float(log_p[t, token]) for t, token in enumerate(ids[1:])))
            metric.append(totals[0] - totals[1])
        accuracy = sum((m > 1e-9) + 0.5 * (abs(m) <= 1e-9) for m in metric) / len(metric)
        assert row["n"] == len(metric)
        assert row["metric"] == pytest.approx(sum(metric) / len(metric), abs=1e-5)
        assert row["accuracy"] == pytest.approx(accuracy)
        assert (row["accuracy_low"], row["accuracy_high"]) == wilson_interval(accuracy * len(metric), len(metric))
    # if all words are equally likely, sentences of the same length tie
    assert table["accuracy"][1] == 0.5 and table["metric"].abs().max() > 0.1


NO_BOS = "the first tokens differ, and there is no BOS token before them"


def test_non_finite_logits_name_the_snapshot(snapshots: Snapshots, monkeypatch: Any) -> None:
    def nothing(tokens: Any, return_type: str) -> Any:
        assert return_type == "logits"
        return torch.full((*tokens.shape, 900), math.nan)

    monkeypatch.setattr(Snapshots, "model", lambda *_, **__: nothing)
    with pytest.raises(UserError, match="snapshot step0 has non-finite logits on task 'simple'"):
        Task.demo("simple", n=4).accuracy(snapshots)


def test_formats_know_what_items_have_in_common(tmp_path: Path) -> None:
    """The head noun or the verb, in whatever form it stands; a column says otherwise."""
    sva = [
        {"clean_prefix": "The friends", "patch_prefix": "The friend", "clean_answer": "have", "patch_answer": "has"},
        {"clean_prefix": "The friend", "patch_prefix": "The friends", "clean_answer": "is", "patch_answer": "are"},
        {"clean_prefix": "The aunts", "patch_prefix": "The aunt", "clean_answer": "have", "patch_answer": "has"},
        {
            "clean_prefix": "The men",
            "patch_prefix": "The man",
            "clean_answer": "go",
            "patch_answer": "goes",
            "group": 7,
        },
        {"clean_prefix": "The king", "clean_answer": "goes", "patch_answer": "go"},
    ]
    (tmp_path / "sva.jsonl").write_text("\n".join(map(json.dumps, sva)))
    assert [item.group for item in Task.sva(tmp_path / "sva.jsonl").items] == [
        "friend friends", "friend friends", "aunt aunts", "7", None,
    ]  # fmt: skip
    (tmp_path / "plain.csv").write_text("prefix,correct,wrong,group\na,b,c,x\nd,e,f,\n")
    plain = Task.local(tmp_path / "plain.csv").items
    assert [item.group for item in plain] == ["x", None] and "group" not in plain[0].info
    lines = ["True\tthe author that the guards like laughs", "False\tthe author that the guards like laugh"]
    (tmp_path / "obj_rel_across_anim.txt").write_text("\n".join(lines))
    lines = ["True\tthe author that the guards like laughs", "False\tthe author that the guards likes laughs"]
    (tmp_path / "obj_rel_within_anim.txt").write_text("\n".join(lines))
    for case, group in (("across", "the author"), ("within", "the guards")):
        assert Task.clams(tmp_path / f"obj_rel_{case}_anim.txt").items[0].group == group
    blimp = {"sentence_good": "Beth scares Roger.", "sentence_bad": "Beth scare Roger."}
    for name, group in (("regular_plural_subject_verb_agreement_1", "scare scares"), ("anaphor", None)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(blimp))
        assert Task.blimp(tmp_path / f"{name}.jsonl").items[0].group == group
    demo = Task.demo("within_rc", "en", n=40)
    assert all(item.group is not None and item.group.split()[0] == "en" for item in demo.items)
    noun = [item.group.split()[1] for item in demo.items if item.group and item.info["number"] == "sg"]
    singular = [item.prefix.split()[-1] for item in demo.items if item.info["number"] == "sg"]
    assert noun == singular  # the noun that the inner verb agrees with
