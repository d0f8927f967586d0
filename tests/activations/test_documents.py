"""Where documents begin in a sequence, what separates them, and which of their first tokens are left out."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset, kept_positions, token_sequences
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
