"""From a dataset to sequences of tokens: hub names, local files, lists of documents, token arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

from crosslens.errors import UserError, did_you_mean, first_line

Dataset: TypeAlias = str | Path | Sequence[str] | Tensor | NDArray[Any]

_BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def describe_dataset(dataset: Dataset) -> str:
    """A short name of a dataset for messages and metadata; never a folder of the user's machine."""
    if isinstance(dataset, (str, Path)):
        return Path(dataset).name if _is_file(dataset) else str(dataset)
    kind = "token array" if isinstance(dataset, (Tensor, np.ndarray)) else "list of documents"
    return f"{kind} of {len(dataset):,}"


def token_sequences(
    dataset: Dataset,
    tokenizer: Any,
    context_size: int,
    *,
    prepend_bos: bool = True,
    n_tokens: int | None = None,
    count: Callable[[Tensor], Tensor],
    text_column: str = "text",
    split: str = "train",
    sample_by: str = "line",
) -> Int[Tensor, "N T"]:
    """Sequences of equal length from a dataset, until `n_tokens` of them count.

    Args:
        dataset: hub name, path, list of documents, or tokens: (N, T) sequences as they are, (N,) one long stream.
        tokenizer: a Hugging Face tokenizer.
        context_size: T, for everything but a 2-D token array.
        prepend_bos: begin sequences with BOS and separate documents by it, where the tokenizer has one.
        n_tokens: stop when `count` over the sequences reaches it; None takes all.
        count: tokens of each sequence that count, (n, T) -> (n,).
        text_column: column of the documents.
        split: split of a hub dataset.
        sample_by: "line" or "paragraph", what a document is in a text file.

    Returns:
        int32 tokens, in the order of the dataset.
    """
    bos = tokenizer.bos_token_id if prepend_bos else None
    if isinstance(dataset, (Tensor, np.ndarray)):
        tokens = torch.as_tensor(dataset)
        if tokens.ndim not in (1, 2) or tokens.is_floating_point():
            raise UserError(
                f"a token array of shape {tuple(tokens.shape)} and dtype {tokens.dtype} cannot be used; give whole "
                "numbers, (N, T) sequences or (N,) one long stream"
            )
        if tokens.ndim == 2:
            return _until(tokens.to(torch.int32), n_tokens, count)
        streams = iter([tokens.long()])
    else:
        streams = _tokenised(_documents(dataset, text_column, split, sample_by), tokenizer)
    packed = concat_and_batch_sequences(
        streams, context_size, begin_batch_token_id=bos, sequence_separator_token_id=bos
    )
    rows: list[Tensor] = []
    counted = 0
    while n_tokens is None or counted < n_tokens:
        chunk = list(islice(packed, 1024))
        if not chunk:
            break
        stacked = torch.stack(chunk).to(torch.int32)
        stacked = _until(stacked, None if n_tokens is None else n_tokens - counted, count)
        counted += int(count(stacked).sum())
        rows.append(stacked)
    if not rows:
        raise UserError(
            f"{describe_dataset(dataset)} holds less than one sequence of context_size={context_size} tokens; "
            "use more text or a smaller context_size"
        )
    return torch.cat(rows)


def split_sequences(
    counts: Int[Tensor, N], wanted: int | None, held_out: int, seed: int, name: str
) -> tuple[Int[Tensor, n], int]:
    """Which sequences are trained on, and which are held out, in an order drawn from the seed.

    Args:
        counts: tokens of each sequence that count.
        wanted: tokens to train on, at least; all that are not held out when None.
        held_out: tokens to hold out, at least; a tenth of all at most when `wanted` is None.
        seed: of the order.
        name: of the dataset, for messages.

    Returns:
        Sequences to train on, then those held out; and how many are to train on.

    Raises:
        UserError: fewer tokens than that.
    """
    total, largest = int(counts.sum()), int(counts.max()) if len(counts) else 0
    too_many = UserError(
        f"n_tokens={wanted} (and {held_out} held out) is more than {name} holds: {total} usable tokens; ask for at "
        f"most {max(0, total - held_out - max(0, largest - 1))}"
    )
    if wanted is None:
        held_out = min(held_out, total // 10)
    if total < (wanted or 1) + held_out:
        raise too_many
    enough = len(counts) if wanted is None else int((counts.cumsum(0) < wanted + held_out).sum()) + 1
    order = torch.randperm(enough, generator=generator(seed))
    n_held_out = int((counts[order].flip(0).cumsum(0) < held_out).sum()) + 1 if held_out else 0
    if n_held_out >= enough:
        raise UserError(
            f"{name} makes too few sequences to hold some out ({len(counts)}): use more text or a smaller context_size"
        )
    training, spare = order[: enough - n_held_out], enough
    while int(counts[training].sum()) < (wanted or 0):  # what is held out is whole sequences, and may be too much
        if spare == len(counts):
            raise too_many
        training, spare = torch.cat([training, torch.tensor([spare])]), spare + 1
    return torch.cat([training, order[enough - n_held_out :]]), len(training)


def generator(*numbers: int) -> torch.Generator:
    """A random generator that is a function of a few integers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def _until(sequences: Tensor, n_tokens: int | None, count: Callable[[Tensor], Tensor]) -> Tensor:
    """The first sequences that together count at least `n_tokens`, or all."""
    if n_tokens is None:
        return sequences
    return sequences[: int((count(sequences).cumsum(0) < n_tokens).sum()) + 1]


def _tokenised(documents: Iterator[str], tokenizer: Any) -> Iterator[Tensor]:
    while texts := list(islice(documents, 1000)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if ids:
                yield torch.tensor(ids)


def _documents(dataset: Any, text_column: str, split: str, sample_by: str) -> Iterator[str]:
    if not isinstance(dataset, (str, Path)):
        if not all(isinstance(text, str) for text in dataset):
            raise UserError("a dataset given as a list must hold documents (strings); pass tokens as an array")
        return iter(dataset)
    from datasets import Dataset as Table
    from datasets import load_dataset

    name = str(dataset)
    if _is_file(dataset):
        suffix = next((s for s in Path(name).suffixes if s in _BUILDERS), None)
        if suffix is None:
            raise UserError(f"{name} is of an unknown kind; known are {', '.join(_BUILDERS)}, each also with .gz")
        if sample_by not in ("line", "paragraph"):
            raise UserError(f"sample_by={sample_by!r} is unknown; use 'line' or 'paragraph'")
        options: dict[str, Any] = {"sample_by": sample_by} if _BUILDERS[suffix] == "text" else {}
        if suffix == ".tsv":
            options["sep"] = "\t"
        # not load_dataset, which reports to the hub that somebody has read a file
        read: Any = getattr(Table, f"from_{_BUILDERS[suffix]}")
        try:
            table = read(name, split="train", streaming=True, **options)
        except Exception as error:
            # parquet is opened here already, and pyarrow has exceptions of its own
            raise UserError(f"dataset {name} cannot be read: {first_line(error)}") from error
    elif Path(name).suffix in {*_BUILDERS, ".gz"} or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"dataset file {name} does not exist; give an existing file, or a hub name such as 'user/name'")
    else:
        try:
            table = load_dataset(name, split=split, streaming=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset {name!r} (split {split!r}) cannot be read from the hub: {first_line(error)}; "
                "check the name and the connection, or give a local file"
            ) from error
    return _column(table, name, text_column)


def _column(table: Any, name: str, text_column: str) -> Iterator[str]:
    rows = _rows(table, name)
    first = next(rows, None)
    if first is None:
        raise UserError(f"dataset {name} is empty; give a file with documents")
    if text_column not in first:
        raise UserError(
            f"text_column={text_column!r} is not in {name}: its columns are {', '.join(map(repr, first))}"
            f"{did_you_mean(text_column, first)}"
        )
    for row in chain([first], rows):
        if row[text_column] is not None:
            yield str(row[text_column])


def _rows(table: Any, name: str) -> Iterator[dict[str, Any]]:
    rows = iter(table)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            # datasets raises many kinds here, at any row: parsers, decompression, the network
            raise UserError(f"dataset {name} cannot be read: {first_line(error)}") from error
        yield row


def _is_file(dataset: str | Path) -> bool:
    return Path(dataset).is_file()
