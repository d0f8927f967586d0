"""Where documents begin in a sequence, what separates them, and which of their first tokens are left out."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import (
    Dataset,
    Found,
    Sequences,
    kept_positions,
    places_in_data,
    split_sequences,
    token_sequences,
)
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.families import find_separator

BOS, EOS, PAD = 0, 1, 2
NAMES = {"bos": BOS, "eos": EOS}
TOKENIZER = SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


def slow_keep(row: list[int], keep_special: bool, separator: str | None, drop: int) -> list[bool]:
    """One position after the other, counting tokens since the start of the sequence or document."""
    special = {BOS, PAD, NAMES.get(separator or "", BOS)}
    kept, count = [], 0
    for token in row:
        if token in special:
            kept.append(keep_special)
            count = 0
        else:
            count += 1
            kept.append(count > drop)
    return kept


@pytest.mark.parametrize("seed", [0, 1])
def test_positions_that_are_kept(seed: int) -> None:
    tokens = torch.randint(0, 7, (50, 11), generator=torch.Generator().manual_seed(seed))
    for keep_special, separator, drop in itertools.product((False, True), (None, "bos", "eos", "none"), (0, 1, 2, 20)):
        kept = kept_positions(tokens, TOKENIZER, keep_special, separator, drop)
        expected = [slow_keep(row, keep_special, separator, drop) for row in tokens.tolist()]
        assert kept.tolist() == expected, (keep_special, separator, drop)
        assert torch.equal(kept[3], kept_positions(tokens[3], TOKENIZER, keep_special, separator, drop))


def test_documents_are_separated_as_the_models_were_trained() -> None:
    repositories = {
        "allenai/OLMo-1B-0724-hf": "eos",
        "allenai/OLMo-2-1124-7B": "eos",
        "bigscience/bloom-1b1-intermediate": "eos",
        "bigscience/bloom-7b1": "eos",
        "EleutherAI/pythia-160m": None,
        "some/model": None,
    }
    assert {name: find_separator(name) for name in repositories} == repositories
    # the repository of the first snapshot decides; nothing is downloaded
    assert Snapshots.bloom("560m", revisions=["global_step1000"]).separator == "eos"


class Words:
    """A tokenizer whose words are numbers."""

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, None

    def __len__(self) -> int:
        return 10_000

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


@pytest.mark.parametrize(
    ("separator", "bos", "expected"),
    [
        (None, True, [[0, 5, 6, 0, 7], [0, 8, 9, 0, 5]]),
        (None, False, [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]]),
        ("bos", False, [[5, 6, 0, 7, 8], [9, 0, 5, 6, 0]]),
        ("eos", True, [[0, 5, 6, 1, 7], [0, 8, 9, 1, 5]]),
        ("eos", False, [[5, 6, 1, 7, 8], [9, 1, 5, 6, 1]]),
        ("none", True, [[0, 5, 6, 7, 8], [0, 9, 5, 6, 7]]),
    ],
)
def test_what_stands_between_documents(separator: str | None, bos: bool, expected: list[list[int]]) -> None:
    documents = ["5 6", "7 8 9"] * 2
    options = {"context_size": 5, "held_out_tokens": 0, "prepend_bos": bos, "separator": separator}
    assert token_sequences(Dataset(documents, **options), Words()).tolist()[:2] == expected


def test_activations_leave_them_out_everywhere(tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path) -> None:
    def make(drop: int) -> Activations:
        data = Dataset(tiny_text, 300, 16, 60, drop_positions=drop)
        return Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", data)

    acts = make(2)
    tokens = acts.train_tokens()
    kept = torch.tensor([slow_keep(row, False, None, 2) for row in (tokens + 3 * (tokens > 0)).tolist()])
    assert torch.equal(acts.keep(tokens), kept) and acts.n_tokens == int(kept.sum()) >= 300
    whole = acts.block(0, len(tokens))[kept]
    for given in (acts, acts.cache(tmp_path / "cache", "float32")):
        batches = torch.cat(list(given.batches(1, epochs=1)))
        assert torch.equal(*(x.flatten(1).sort(0).values for x in (batches, whole)))
    assert acts.metadata()["drop_positions"] == 2
    assert torch.equal(make(0).keep(tokens), tokens != 0)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(
        UserError, match="separator='</s>' is unknown; use 'bos', 'eos', 'none', or None for what the m"
    ):
        Dataset("x", separator="</s>")
    with pytest.raises(UserError, match="drop_positions=-1 must be at least 0"):
        Dataset("x", drop_positions=-1)


class OfWords(Snapshots):
    """No models; their tokenizer only."""

    tokenizer: Any = Words()
    _snapshots = ()

    def __init__(self) -> None: ...


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("separator", "drop", "n_tokens"), [("bos", 0, None), ("bos", 2, 400), ("eos", 1, 900)])
@pytest.mark.parametrize("longest", [5, 60])  # shorter and longer than a sequence
def test_documents_of_held_out_tokens(separator: str, drop: int, n_tokens: int | None, longest: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (8000 // longest,), generator=draw).tolist()
    # every word occurs in one document
    words, texts, document_of = iter(range(3, 10_000)), [], {}
    for number, length in enumerate(lengths):
        chosen = list(itertools.islice(words, length))
        texts.append(" ".join(map(str, chosen)))
        document_of |= dict.fromkeys(chosen, number)
    data = Dataset(texts, n_tokens, context_size=17, held_out_tokens=200, separator=separator, drop_positions=drop)
    sequences = Sequences(data, OfWords(), seed)
    held_out, found = sequences.tokens[sequences.n_train :], sequences.held_out_documents()
    kept = sequences.keep(held_out)
    documents: list[Any] = [document_of[word] for word in held_out[kept].tolist()]
    if places_in_data(sequences.keep(sequences.tokens).sum(-1), sequences.n_train, data, seed) is None:
        assert drop  # where sequences keep about as many tokens the order in the data is known
        documents = list(zip(kept.nonzero()[:, 0].tolist(), documents, strict=True))
    numbers: dict[Any, set[int]] = {}
    for document, number in zip(documents, found[kept].tolist(), strict=True):
        numbers.setdefault(document, set()).add(number)
    assert len(numbers) > 3 and all(len(given) == 1 for given in numbers.values())
    # two that meet at the beginning of a sequence cannot be told apart, and no others share a number
    given = [number.pop() for number in numbers.values()]
    assert len(set(given)) >= 0.8 * len(given)
    # tokens that were found in a cache say the same
    cached = Sequences(data, OfWords(), seed)
    cached.found = Found(sequences.tokens, sequences.n_train, None)
    assert torch.equal(cached.held_out_documents(), found)


def test_sequences_are_documents_where_nothing_separates_them() -> None:
    rows = torch.arange(3, 603).view(60, 10)
    rows[::2, 0] = BOS
    sequences = Sequences(Dataset(rows, held_out_tokens=50, context_size=10), OfWords(), 0)
    found = sequences.held_out_documents()
    assert (found == found[:, :1]).all() and len(found[:, 0].unique()) == len(found) > 4


def test_all_tokens_of_a_dataset_can_be_asked_for() -> None:
    counts = torch.full((10,), 8)
    order, n_train = split_sequences(counts, 72, 8, 0, "data")
    assert sorted(order.tolist()) == list(range(10)) and n_train == 9
    with pytest.raises(UserError, match="data has only 80 usable tokens, too few for n_tokens=73 plus 8 held out; ask"):
        split_sequences(counts, 73, 8, 0, "data")


@pytest.mark.parametrize("seed", range(5))
def test_places_in_the_data_are_those_that_sequences_were_drawn_from(seed: int) -> None:
    draw, places = torch.Generator().manual_seed(seed), []
    for wanted, held_out in ((None, 40), (200, 40), (170, 7), (301, 60)):
        counts = torch.randint(20, 30, (60,), generator=draw)
        data = Dataset(["a"], wanted, held_out_tokens=held_out)
        place, n_train = split_sequences(counts, wanted, data.n_held_out, seed, "data")
        found = places_in_data(counts[place], n_train, data, seed)
        assert found is None or torch.equal(found, place)
        places.append(found)
    assert places.count(None) < 2
