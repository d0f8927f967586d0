"""Datasets of every kind become the same sequences; unreadable ones are refused in one line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

from crosslens.activations.tokens import Dataset, token_sequences
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots

T = 9


@pytest.fixture(scope="module")
def tokenizer(tiny_snapshots: Path) -> Any:
    return Snapshots.local(tiny_snapshots).tokenizer


@pytest.fixture(scope="module")
def documents(tiny_text: list[str]) -> list[str]:
    return tiny_text[:40]


def read(source: Any, tokenizer: Any, **options: Any) -> Tensor:
    given: dict[str, Any] = {"context_size": T, "held_out_tokens": 0, **options}
    return token_sequences(Dataset(source, **given), tokenizer)


def packed(documents: list[list[int]], bos: int | None, size: int = T) -> list[list[int]]:
    """One token after the other: BOS first in every sequence, and between documents."""
    start = [] if bos is None else [bos]
    rows, row = [], list(start)
    for document in documents:
        separator = [bos] if bos is not None and len(row) > len(start) else []
        for token in [*separator, *document]:
            if token == bos and row == start:
                continue
            row.append(token)
            if len(row) == size:
                rows.append(row)
                row = list(start)
    return rows


def ids(documents: list[str], tokenizer: Any) -> list[list[int]]:
    return [[tokenizer.get_vocab()[word] for word in text.split()] for text in documents]


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "data.txt": lambda path, docs: path.write_text("\n".join(docs) + "\n"),
    "data.txt.gz": lambda path, docs: path.write_bytes(gzip.compress("\n".join(docs).encode())),
    "data.jsonl": lambda path, docs: path.write_text("".join(json.dumps({"text": d, "id": 1}) + "\n" for d in docs)),
    "data.jsonl.gz": lambda path, docs: path.write_bytes(
        gzip.compress("".join(json.dumps({"text": d}) + "\n" for d in docs).encode())
    ),
    "data.csv": lambda path, docs: csv.writer(path.open("w")).writerows([["id", "text"], *((1, d) for d in docs)]),
    "data.tsv": lambda path, docs: path.write_text("id\ttext\n" + "".join(f"1\t{d}\n" for d in docs)),
    "data.parquet": lambda path, docs: pd.DataFrame({"text": docs}).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_every_kind(name: str, tmp_path: Path, tokenizer: Any, documents: list[str]):
    WRITERS[name](tmp_path / name, documents)
    found = read(tmp_path / name, tokenizer)
    assert found.dtype == torch.int32
    assert found.tolist() == packed(ids(documents, tokenizer), tokenizer.bos_token_id)
    assert read(str(tmp_path / name), tokenizer).tolist() == found.tolist()
    assert Dataset(tmp_path / name).name == name  # no folder of the user's


def test_a_file_is_read_without_a_connection(
    tmp_path: Path, tokenizer: Any, documents: list[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[Any] = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address))
    for name, write in WRITERS.items():
        write(tmp_path / name, documents)
        assert len(read(tmp_path / name, tokenizer)) and not asked, name


@pytest.mark.parametrize("size", [2, 7, 8, 9, 10, 32])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_lists_are_packed_with_bos_between_documents(
    tokenizer: Any, documents: list[str], size: int, prepend_bos: bool
):
    found = read(documents, tokenizer, context_size=size, prepend_bos=prepend_bos)
    expected = packed(ids(documents, tokenizer), tokenizer.bos_token_id if prepend_bos else None, size)
    assert found.tolist() == expected and len(expected) > 1
    assert Dataset(documents).name == "list of documents of 40"


def test_paragraphs_other_columns_and_missing_documents(tmp_path: Path, tokenizer: Any, documents: list[str]):
    path = tmp_path / "prose.txt"
    path.write_text("\n\n".join(d.replace(" . ", " .\n") for d in documents))
    expected = packed(ids(documents, tokenizer), 0)
    assert read(path, tokenizer, sample_by="paragraph").tolist() == expected
    assert read(path, tokenizer).tolist() != expected  # by lines, more documents
    rows = [{"body": d} for d in documents]
    rows.insert(3, {"body": None})  # type: ignore[dict-item]
    rows.insert(7, {"body": ""})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "rows.jsonl", tokenizer, column="body").tolist() == expected


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".txt.gz"])
def test_names_of_files_are_taken_literally(suffix: str, tmp_path: Path, tokenizer: Any, documents: list[str]):
    for name in ("data[1]", "a*b", "w?y", "{x}", "~", "a#b", "a b", "data.json"):
        if suffix.endswith(".gz") and "[" in name:
            continue
        others = documents[10:]
        for other in ("data1", "axb", "wxy", "x"):  # what a pattern would find
            WRITERS[f"data{suffix}"](tmp_path / f"{other}{suffix}", documents[:10])
        WRITERS[f"data{suffix}"](tmp_path / f"{name}{suffix}", others)
        assert read(tmp_path / f"{name}{suffix}", tokenizer).tolist() == packed(ids(others, tokenizer), 0), name
    for name in ["a::b"] * (suffix != ".csv") + ["data[1]"] * suffix.endswith(".gz"):
        WRITERS[f"data{suffix}"](tmp_path / f"{name}{suffix}", documents)
        with pytest.raises(UserError, match="has '::' or, .* brackets, .*: rename it"):
            read(tmp_path / f"{name}{suffix}", tokenizer)


class Spelled:
    """A tokenizer with a token per character."""

    bos_token_id = pad_token_id = 0
    eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*map(ord, text)] for text in texts]}


def test_cells_of_a_csv_file_are_texts_as_they_are_written(tmp_path: Path):
    cells = ["007", "NA", "null", "1.50", "nan", "True", "a,b", 'say "no"', "x" * 200_000]
    for name, delimiter in (("data.csv", ","), ("data.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(
                [["n", "text"], *((i, cell) for i, cell in enumerate(cells))]
            )
        found = read(tmp_path / name, Spelled(), context_size=2, prepend_bos=False)
        assert "".join(map(chr, found.flatten().tolist())) == "".join(cells)[: found.numel()]
        assert found.numel() >= len("".join(cells)) - 1
    (tmp_path / "commas.csv").write_text("n,text\n1,the cat, a dog\n")
    with pytest.raises(UserError, match="line 2 of commas.csv has 3 cells, its header 2: put texts with commas"):
        read(tmp_path / "commas.csv", Spelled())


def test_rows_without_the_column_are_counted(tmp_path: Path, tokenizer: Any, documents: list[str]):
    rows = [{"text": d} for d in documents]
    rows[3:3] = [{"id": 1}, {"text": None}]  # type: ignore[list-item]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="2 of the 42 rows that were read of rows.jsonl have nothing in .*'text'"):
        read(tmp_path / "rows.jsonl", tokenizer)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, lambda v: [v, v]])
def test_token_ids_that_would_wrap_around_are_refused(make: Any, tokenizer: Any):
    for wrong in (2**32 + 5, 2**31, -1):
        tokens = [3, wrong, *[4] * 30]
        source = make([tokens, tokens] if make is list else tokens)
        with pytest.raises(UserError, match=rf"token id {wrong} in .* is not in \[0, 2147483647\]"):
            read(source, tokenizer)


@pytest.mark.parametrize("wrong", [2**63, 2**64 - 1])
def test_token_ids_beyond_int64_are_shown_as_they_are(wrong: int, tokenizer: Any):
    tokens = [3, wrong, *[4] * 30]
    array = np.array(tokens, dtype=np.uint64)
    tensor = torch.from_numpy(array)
    for source in (array, np.stack([array, array]), tensor, tensor[None], [array], [tensor]):
        with pytest.raises(UserError, match=rf"token id {wrong} in .* is not in \[0, 2147483647\]"):
            read(source, tokenizer)
    small = np.array([3, *[4] * 30], dtype=np.uint64)
    assert torch.equal(read(small, tokenizer), read(small.astype(np.int64), tokenizer))


def test_half_of_a_character_is_refused(tokenizer: Any):
    with pytest.raises(
        UserError, match=r"document 1 of list of documents of 2, 'a \\ud800 b' has half of a character, "
    ):
        read(["a b", "a \ud800 b"], tokenizer)


@pytest.mark.parametrize("wrong", [np.array([3, None]), np.array(["3"]), np.array([True]), np.array([1j])])
def test_arrays_of_something_else_are_refused(wrong: Any, tokenizer: Any):
    with pytest.raises(
        UserError, match=r"a token array of shape \(\d,\) and dtype .* cannot be used; give whole numbers"
    ):
        read(wrong, tokenizer)


@pytest.mark.parametrize("as_array", [torch.tensor, np.array, lambda v: np.array(v, dtype=np.uint16)])
def test_token_arrays(tokenizer: Any, as_array: Any):
    stream = [2 + i % 11 for i in range(100)]
    assert read(as_array(stream), tokenizer).tolist() == packed([stream], 0)
    assert read(as_array(stream), tokenizer, prepend_bos=False).tolist() == packed([stream], None)
    grid = [stream[i : i + 5] for i in range(0, 100, 5)]
    assert read(as_array(grid), tokenizer).tolist() == grid  # as they are: no BOS, their own length
    assert Dataset(as_array(grid)).name == "token array of 20"


def test_reading_stops_when_enough_tokens_count(tokenizer: Any, documents: list[str]):
    whole = read(documents, tokenizer)
    for dataset in (documents, whole):
        for n_tokens, held_out in ((1, 0), (50, 0), (51, 9), (57, 4), (160, 30)):
            found = read(dataset, tokenizer, n_tokens=n_tokens, held_out_tokens=held_out)
            assert found.tolist() == whole[: len(found)].tolist()
            counts = (found != 0).sum(-1).tolist()
            # one sequence more than both need, because whole sequences are held out
            assert sum(counts) >= n_tokens + held_out + T > sum(counts[:-1])
        assert len(read(dataset, tokenizer, n_tokens=10**9)) == len(whole)


def test_more_than_one_read_ahead(tokenizer: Any, tiny_text: list[str]):
    """Sequences are read 1024 at a time; the count continues from one portion to the next."""
    whole = read(tiny_text, tokenizer, context_size=3)
    assert len(whole) > 3000
    for wanted in (3 * 1024 - 1, 3 * 1024, 3 * 1024 + 1, 3 * 2500):
        found = read(tiny_text, tokenizer, context_size=3, n_tokens=wanted - 3, keep_special=True)
        assert len(found) == -(-wanted // 3) and torch.equal(found, whole[: len(found)])


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("column", "data.jsonl", {"column": "txt"}, "column='txt' is not in .*its columns are 'text', 'id'; did"),
    ("missing", "gone.txt", {}, "gone.txt does not exist; give an existing file, or a hub name"),
    ("sample_by", "data.txt", {"sample_by": "page"}, "sample_by='page' is unknown; use 'line' or 'paragraph'"),
    ("too long", "data.txt", {"context_size": 10**6}, "is shorter than one sequence of context_size=1000000 tokens"),
]


@pytest.mark.parametrize(("name", "options", "message"), [pytest.param(*row[1:], id=row[0]) for row in BAD])
def test_unreadable_data(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, tokenizer: Any, documents: list[str]
):
    for writer in ("data.jsonl", "data.txt"):
        WRITERS[writer](tmp_path / writer, documents)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_what_their_names_say(tmp_path: Path, tokenizer: Any):
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(UserError, match=r"notes.docx has an unsupported file type: use .txt, .*each also with .gz"):
        read(tmp_path / "notes.docx", tokenizer)
    for name in ("broken.jsonl", "broken.parquet", "broken.txt.gz"):
        (tmp_path / name).write_bytes(b"{this is not it")
        with pytest.raises(UserError, match=f"{name} (cannot be read|is empty)") as caught:
            read(tmp_path / name, tokenizer)
        assert "\n" not in str(caught.value)
    (tmp_path / "late.jsonl").write_bytes(b'{"text": "the cat"}\n' * 5 + b'{"text": "the \xe6 cat"}\n')
    with pytest.raises(UserError, match="late.jsonl cannot be read: .*utf-8") as caught:
        read(tmp_path / "late.jsonl", tokenizer)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty.jsonl (is empty|cannot be read)"):
        read(tmp_path / "empty.jsonl", tokenizer)
    with pytest.raises(UserError, match="list of documents of 0 is shorter than one sequence"):
        read([], tokenizer)


def tables(documents: list[str]) -> dict[str, Callable[[], Any]]:
    """The same documents in every object that holds texts."""
    frame = pd.DataFrame({"id": range(len(documents)), "text": documents}, index=range(7, 7 + len(documents)))
    rows = [{"text": d, "id": 1} for d in documents]
    return {
        "tuple": lambda: tuple(documents),
        "list of dictionaries": lambda: rows,
        "generator": lambda: (d for d in documents),
        "generator of dictionaries": lambda: (row for row in rows),
        "iterator": lambda: iter(documents),
        "map": lambda: map(str, documents),
        "DataFrame": lambda: frame,
        "Series": lambda: frame["text"],
        "datasets.Dataset": lambda: datasets.Dataset.from_list(rows),
        "column of a Dataset": lambda: datasets.Dataset.from_list(rows)["text"],
        "IterableDataset": lambda: datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "generated": lambda: datasets.IterableDataset.from_generator(lambda: iter(rows)),
        "DataLoader": lambda: torch.utils.data.DataLoader(rows, batch_size=None),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("kind", tables([]))
def test_texts_in_memory_are_what_a_list_is(kind: str, tokenizer: Any, documents: list[str]):
    make = tables(documents)[kind]
    whole = read(documents, tokenizer)
    assert torch.equal(read(make(), tokenizer), whole)
    assert torch.equal(read(make(), tokenizer, n_tokens=50, held_out_tokens=9), whole[:9])
    name = Dataset(make()).name
    assert name.endswith(" of 40") or kind in ("map", "IterableDataset", "generated") or "erator" in name, name


def token_tables(rows: list[list[int]]) -> dict[str, Callable[[], Any]]:
    """The same rows of token ids in every object that holds them."""
    table = datasets.Dataset.from_dict({"text": ["x"] * len(rows), "input_ids": rows})
    frame = pd.DataFrame({"input_ids": rows})
    return {
        "list": lambda: rows,
        "arrays": lambda: [np.array(row, dtype=np.uint16) for row in rows],
        "tensors": lambda: (torch.tensor(row, dtype=torch.int32) for row in rows),
        "Series": lambda: frame["input_ids"],
        "DataFrame": lambda: frame,
        "Dataset": lambda: table,
        "Dataset in torch": lambda: table.with_format("torch"),
        "Dataset in numpy": lambda: table.with_format("numpy"),
        "IterableDataset": lambda: table.to_iterable_dataset(),
    }


@pytest.mark.parametrize("kind", token_tables([[1]]))
def test_token_ids_in_memory(kind: str, tokenizer: Any, documents: list[str]):
    """Documents are packed as texts are; rows as long as the context are sequences; nothing is tokenised again."""
    ragged = ids(documents, tokenizer)
    make = token_tables(ragged)[kind]
    assert read(make(), tokenizer, column="input_ids").tolist() == packed(ragged, 0)
    grid = [[2 + (3 * i + j) % 11 for j in range(T)] for i in range(70)]
    make = token_tables(grid)[kind]
    assert read(make(), tokenizer, column="input_ids").tolist() == grid
    assert read(make(), tokenizer, column="input_ids", n_tokens=30, held_out_tokens=0).tolist() == grid[: -(-39 // T)]
    # of another length they are documents
    assert read(make(), tokenizer, column="input_ids", context_size=7).tolist() == packed(grid, 0, 7)


def test_token_ids_in_a_file(tmp_path: Path, tokenizer: Any, documents: list[str]):
    rows = ids(documents, tokenizer)
    pd.DataFrame({"input_ids": rows, "text": documents}).to_parquet(tmp_path / "rows.parquet")
    for column in ("input_ids", "text"):
        assert read(tmp_path / "rows.parquet", tokenizer, column=column).tolist() == packed(rows, 0)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stream_is_read_no_further_than_needed(tokenizer: Any, documents: list[str], streamed: bool):
    """It may be endless, and each document may come from a network."""
    taken = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal taken
        while True:
            for document in documents:
                taken += 1
                yield {"text": document}

    for wanted in (1, 100, 1000):
        taken = 0
        source = datasets.IterableDataset.from_generator(endless) if streamed else endless()
        found = read(source, tokenizer, n_tokens=wanted, held_out_tokens=0)
        assert int((found != 0).sum()) >= wanted
        shortest = min(map(len, ids(documents, tokenizer)))
        assert taken <= 16 + 3 * (wanted + T) / shortest


def test_an_iterator_is_read_once(tokenizer: Any, documents: list[str]):
    dataset = Dataset((d for d in documents), context_size=T)
    assert len(token_sequences(dataset, tokenizer))
    with pytest.raises(UserError, match="the generator has nothing left: an iterator can be read once; give a new one"):
        token_sequences(dataset, tokenizer)


def test_what_is_missing_in_a_table_is_left_out(tokenizer: Any, documents: list[str]):
    expected = packed(ids(documents, tokenizer), 0)
    holes: list[Any] = [*documents[:3], None, *documents[3:7], float("nan"), "", *documents[7:]]
    for source in (pd.DataFrame({"text": holes}), pd.Series(holes), [{"text": hole} for hole in holes]):
        assert read(source, tokenizer).tolist() == expected


def failing() -> Iterator[str]:
    yield "the cat"
    raise OSError("the connection was lost\nmore lines")


def stream(*rows: Any) -> Any:
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def table(**columns: list[Any]) -> Any:
    return datasets.Dataset.from_dict(columns)


LIST = "list of documents of 2"
NO_TEXT = "column='text' is not in"
WRONG: list[tuple[str, Callable[[], Any], dict[str, Any], str]] = [
    ("column", lambda: pd.DataFrame({"txt": ["a"]}), {}, f"{NO_TEXT} the DataFrame: its columns are 'txt'; did you"),
    ("Dataset", lambda: table(body=["a"]), {}, f"{NO_TEXT} the Dataset: its columns are 'body'"),
    ("rows", lambda: [{"body": "a"}], {"column": "ids"}, "column='ids' is not in .* of 1: its columns are 'body'"),
    ("later", lambda: [{"text": "a"}, {"body": "a"}], {}, f"{NO_TEXT} {LIST}: its columns are 'body'"),
    ("streamed", lambda: stream({"body": "a"}), {}, f"{NO_TEXT} IterableDataset: its columns are 'body'"),
    (
        "splits",
        lambda: datasets.DatasetDict({"train": table(text=["a"])}),
        {},
        "DatasetDict with the splits 'train': give",
    ),
    ("dictionary", lambda: {"text": ["a"]}, {}, "the dataset is a dict: give a hub name, a file, tokens, a table"),
    ("number", lambda: 7, {}, "the dataset is a int: give a hub name"),
    ("bytes", lambda: b"text", {}, "the dataset is a bytes: give a hub name"),
    ("set", lambda: {"a", "b"}, {}, "the dataset is a set: give a hub name"),
    ("function", lambda: failing, {}, "the dataset is a function: give a hub name"),
    ("nothing", lambda: iter(()), {}, "the tuple_iterator has nothing left: an iterator can be read once"),
    ("numbers", lambda: pd.DataFrame({"text": [1, 2]}), {}, "document 0 of DataFrame of 2 is 1, a int: give texts, or"),
    ("floats", lambda: [[1.5, 2.0], [1]], {}, rf"document 0 of {LIST} is \[1.5, 2.0\], a list: give texts, or"),
    ("later type", lambda: ["the cat", 3], {}, f"document 1 of {LIST} is 3, a int: give texts"),
    ("words", lambda: [["the", "cat"], ["a"]], {}, f"document 0 of {LIST} is .*, a list: give texts"),
    ("nested", lambda: [[[1, 2], [3, 4]], []], {}, f"document 0 of {LIST} is .*, a list: give texts, or rows of token"),
    ("fails", failing, {}, "dataset generator cannot be read: the connection was lost"),
    (
        "ragged",
        lambda: iter([[2] * T] * 70 + [[2] * 5]),
        {},
        "row 70 of list_iterator has 5 token ids, the rows before",
    ),
]


@pytest.mark.parametrize(("make", "options", "message"), [pytest.param(*row[1:], id=row[0]) for row in WRONG])
def test_objects_that_hold_no_documents(make: Callable[[], Any], options: dict[str, Any], message: str, tokenizer: Any):
    jaxtyping.config.update("jaxtyping_disable", True)  # the type checks of the test run would refuse some first
    try:
        with pytest.raises(UserError, match=message) as caught:
            read(make(), tokenizer, **options)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert "\n" not in str(caught.value)


def test_splits(tokenizer: Any, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # `datasets` takes a folder of this name before it asks the hub
    (tmp_path / "someone" / "name").mkdir(parents=True)
    for name, texts in {"train": documents[:20], "test": documents[20:]}.items():
        WRITERS["data.jsonl"](tmp_path / "someone" / "name" / f"{name}.jsonl", texts)
    for options, texts in (
        ({}, documents[:20]),
        ({"split": "train"}, documents[:20]),
        ({"split": "test"}, documents[20:]),
    ):
        assert read("someone/name", tokenizer, **options).tolist() == packed(ids(texts, tokenizer), 0)
    with pytest.raises(UserError, match=r"'someone/name' \(split 'tset'\) cannot be read from the hub: .*tset"):
        read("someone/name", tokenizer, split="tset")


def test_a_hub_dataset_that_is_unavailable(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    def load(name: str, **_: Any) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore lines")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match=r"dataset 'someone/nothing' \(split 'test'\) cannot be read.*or give a local"):
        read("someone/nothing", tokenizer, split="test")


@pytest.mark.parametrize("array", [torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(30), np.zeros((3, 9))])
def test_arrays_that_hold_no_tokens(array: Any, tokenizer: Any):
    with pytest.raises(UserError, match="cannot be used; give whole numbers"):
        read(array, tokenizer)


def test_saelens_packing_is_what_we_build_on():
    """BOS begins every sequence and separates documents, the unfinished tail is dropped."""
    documents = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 7, 8, 9])]
    rows = concat_and_batch_sequences(iter(documents), 4, begin_batch_token_id=0, sequence_separator_token_id=0)
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [0, 4, 0, 5], [0, 6, 7, 8]]
    rows = concat_and_batch_sequences(iter(documents), 4, begin_batch_token_id=None, sequence_separator_token_id=None)
    assert [row.tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8]]
