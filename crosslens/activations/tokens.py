"""Sequences of tokens from a dataset: a hub name, a local file, a list of documents or a token array."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

from crosslens.errors import UserError, did_you_mean, first_line

Source: TypeAlias = str | Path | Sequence[str] | Tensor | NDArray[Any]

_BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Dataset:
    """Where tokens come from, and how documents become sequences.

    Raises:
        UserError: `n_tokens` is not positive, or `sample_by` is unknown.
    """

    source: Source
    """Hub name, path to text / jsonl / csv / parquet (may be gzipped), list of documents, or tokens: `(N, T)`
    sequences, or `(N,)` one long stream."""
    n_tokens: int | None = None
    """Tokens to train on, without the positions that are left out; None takes the whole dataset."""
    context_size: int | None = None
    """Tokens per sequence; None takes the models' context, at most 1024. Always T for `(N, T)` tokens."""
    held_out_tokens: int | None = None
    """Tokens kept for evaluation; None takes n_tokens / 20, between 2,000 and 100,000."""
    text_column: str = "text"
    """Column that holds the documents."""
    split: str = "train"
    """Split of a hub dataset."""
    sample_by: str = "line"
    """`"line"` or `"paragraph"`: what counts as a document in a text file."""
    prepend_bos: bool = True
    """Begin sequences with BOS, where the tokenizer has one; and separate documents by it, unless `separator` says
    otherwise."""
    keep_special: bool = False
    """Keep positions whose token is BOS, padding, or the separator."""
    separator: str | None = None
    """What stands between documents: `"bos"`, `"eos"` or `"none"`. None is what stood there when the models' family was
    pretrained (`families.json`), where that is known, else BOS if `prepend_bos`."""
    drop_positions: int = 0
    """Leave out this many of the first tokens of every sequence and document, not counting BOS and separators. 1 leaves
    out the token on which models that were trained without BOS rest their attention (its norm can be 100 times that of
    others). Documents inside a sequence are recognised by the separator."""

    def __post_init__(self) -> None:
        if self.n_tokens is not None and self.n_tokens <= 0:
            raise UserError(f"n_tokens={self.n_tokens} must be positive, or None for the whole dataset")
        if self.sample_by not in ("line", "paragraph"):
            raise UserError(f"sample_by={self.sample_by!r} is unknown; use 'line' or 'paragraph'")
        if self.separator not in (None, *SEPARATORS):
            raise UserError(
                f"separator={self.separator!r} is unknown; use {', '.join(map(repr, SEPARATORS))}, or None for what "
                "the models were trained with"
            )
        if self.drop_positions < 0:
            raise UserError(f"drop_positions={self.drop_positions} must be at least 0")

    @property
    def name(self) -> str:
        """A short name for messages and metadata; never a folder of the user's machine."""
        if isinstance(self.source, (str, Path)):
            return Path(self.source).name if _is_file(self.source) else str(self.source)
        kind = "token array" if isinstance(self.source, (Tensor, np.ndarray)) else "list of documents"
        return f"{kind} of {len(self.source):,}"

    @property
    def n_held_out(self) -> int:
        """Tokens to hold out, with the default filled in."""
        if self.held_out_tokens is not None:
            return self.held_out_tokens
        return 100_000 if self.n_tokens is None else min(max(self.n_tokens // 20, 2_000), 100_000)

    def keep(self, tokens: Int[Tensor, "... T"], tokenizer: Any) -> Bool[Tensor, "... T"]:
        """Which positions of `tokens` are used: all but BOS, padding and separators of `tokenizer`, unless
        `keep_special`, and but the first `drop_positions` of every sequence and document."""
        return kept_positions(tokens, tokenizer, self.keep_special, self.separator, self.drop_positions)


def token_sequences(dataset: Dataset, tokenizer: Any) -> Int[Tensor, "N T"]:
    """Read sequences of equal length, enough for the tokens to train on and those to hold out.

    `(N, T)` tokens are taken as they are, everything else is packed into sequences of `context_size` tokens.

    Args:
        dataset: with a `context_size`, unless it holds `(N, T)` tokens.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        int32 tokens, in the order of the dataset.

    Raises:
        UserError: the data cannot be read, or are shorter than one sequence.
    """
    source, T = dataset.source, dataset.context_size
    if isinstance(source, (Tensor, np.ndarray)):
        tokens = torch.as_tensor(source)
        if tokens.ndim not in (1, 2) or tokens.is_floating_point():
            raise UserError(
                f"a token array of shape {tuple(tokens.shape)} and dtype {tokens.dtype} cannot be used; give whole "
                "numbers, (N, T) sequences or (N,) one long stream"
            )
        if tokens.ndim == 2:
            return _until(tokens.to(torch.int32), _needed(dataset, tokens.shape[1]), dataset, tokenizer)
        streams = iter([tokens.long()])
    else:
        streams = _tokenised(_documents(dataset), tokenizer)
    if T is None:
        raise UserError("context_size=None: give the number of tokens per sequence")
    bos = tokenizer.bos_token_id if dataset.prepend_bos else None
    between = bos if dataset.separator is None else separator_id(dataset.separator, tokenizer)
    packed = concat_and_batch_sequences(streams, T, begin_batch_token_id=bos, sequence_separator_token_id=between)
    wanted = _needed(dataset, T)
    rows: list[Tensor] = []
    counted = 0
    while wanted is None or counted < wanted:
        chunk = list(islice(packed, 1024))
        if not chunk:
            break
        left = None if wanted is None else wanted - counted
        stacked = _until(torch.stack(chunk).to(torch.int32), left, dataset, tokenizer)
        counted += int(dataset.keep(stacked, tokenizer).sum())
        rows.append(stacked)
    if not rows:
        raise UserError(
            f"{dataset.name} is shorter than one sequence of context_size={T} tokens; use more text or a smaller "
            "context_size"
        )
    return torch.cat(rows)


SEPARATORS = ("bos", "eos", "none")


def separator_id(separator: str | None, tokenizer: Any) -> int | None:
    """The token between documents; None if there is none."""
    return getattr(tokenizer, f"{separator}_token_id") if separator in ("bos", "eos") else None


def special_positions(
    tokens: Int[Tensor, "... T"], tokenizer: Any, separator: str | None = None
) -> Bool[Tensor, "... T"]:
    """Positions whose token is the tokenizer's BOS or padding token, or separates documents."""
    special = torch.zeros_like(tokens, dtype=torch.bool)
    for token in {tokenizer.bos_token_id, tokenizer.pad_token_id, separator_id(separator, tokenizer)} - {None}:
        special |= tokens == token
    return special


def kept_positions(
    tokens: Int[Tensor, "... T"],
    tokenizer: Any,
    keep_special: bool | None = False,
    separator: str | None = None,
    drop_positions: int | None = 0,
) -> Bool[Tensor, "... T"]:
    """Which positions of `tokens` training uses; the options are those of `Dataset`, None as by default."""
    special = special_positions(tokens, tokenizer, separator)
    keep = torch.ones_like(special) if keep_special else ~special
    if drop_positions:
        place = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
        begins = torch.where(special, place, -1).cummax(-1).values  # the last special token, before a document
        keep &= special | (place - begins > drop_positions)
    return keep


def split_sequences(
    counts: Int[Tensor, N], wanted: int | None, held_out: int, seed: int, name: str
) -> tuple[Int[Tensor, n], int]:
    """Choose sequences to train on and sequences to hold out, in an order drawn from the seed.

    Args:
        counts: kept tokens of each sequence.
        wanted: least number of tokens to train on; None takes all that are not held out.
        held_out: least number of tokens to hold out; at most a tenth of all when `wanted` is None.
        seed: seed for the order.
        name: name of the dataset, for messages.

    Returns:
        Indices of the training sequences followed by those held out, and the number of training sequences.

    Raises:
        UserError: the dataset has too few tokens.
    """
    total, largest = int(counts.sum()), int(counts.max()) if len(counts) else 0
    too_many = UserError(
        f"{name} has only {total} usable tokens, too few for n_tokens={wanted} plus {held_out} held out; ask for at "
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
            f"{name} has only {len(counts)} sequences, too few to hold any out: use more text or a smaller context_size"
        )
    training, spare = order[: enough - n_held_out], enough
    while int(counts[training].sum()) < (wanted or 0):  # whole sequences are held out, perhaps too much
        if spare == len(counts):
            raise too_many
        training, spare = torch.cat([training, torch.tensor([spare])]), spare + 1
    return torch.cat([training, order[enough - n_held_out :]]), len(training)


def generator(*numbers: int) -> torch.Generator:
    """A random generator seeded by a few integers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def _needed(dataset: Dataset, context_size: int) -> int | None:
    """Kept tokens to read: whole sequences are held out, so training may need one more."""
    return None if dataset.n_tokens is None else dataset.n_tokens + dataset.n_held_out + context_size


def _until(sequences: Tensor, n_tokens: int | None, dataset: Dataset, tokenizer: Any) -> Tensor:
    """The first sequences that together keep at least `n_tokens` tokens, or all."""
    if n_tokens is None:
        return sequences
    counts = dataset.keep(sequences, tokenizer).sum(-1)
    return sequences[: int((counts.cumsum(0) < n_tokens).sum()) + 1]


def _tokenised(documents: Iterator[str], tokenizer: Any) -> Iterator[Tensor]:
    while texts := list(islice(documents, 1000)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if ids:
                yield torch.tensor(ids)


def _documents(dataset: Dataset) -> Iterator[str]:
    source: Any = dataset.source
    if not isinstance(source, (str, Path)):
        if not all(isinstance(text, str) for text in source):
            raise UserError("a dataset given as a list must hold documents (strings); pass tokens as an array")
        return iter(source)
    from datasets import Dataset as Table
    from datasets import load_dataset

    name = str(source)
    if _is_file(source):
        suffix = next((s for s in Path(name).suffixes if s in _BUILDERS), None)
        if suffix is None:
            raise UserError(f"{name} has an unsupported file type: use {', '.join(_BUILDERS)}, each also with .gz")
        options: dict[str, Any] = {"sample_by": dataset.sample_by} if _BUILDERS[suffix] == "text" else {}
        if suffix == ".tsv":
            options["sep"] = "\t"
        # not load_dataset: it reports to the hub that a file was read
        read: Any = getattr(Table, f"from_{_BUILDERS[suffix]}")
        try:
            table = read(name, split="train", streaming=True, **options)
        except Exception as error:
            # parquet files are opened here already, and pyarrow raises exceptions of its own
            raise UserError(f"dataset {name} cannot be read: {first_line(error)}") from error
    elif Path(name).suffix in {*_BUILDERS, ".gz"} or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"dataset file {name} does not exist; give an existing file, or a hub name such as 'user/name'")
    else:
        try:
            table = load_dataset(name, split=dataset.split, streaming=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset {name!r} (split {dataset.split!r}) cannot be read from the hub: {first_line(error)}; "
                "check the name and the connection, or give a local file"
            ) from error
    return _column(table, name, dataset.text_column)


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


def _is_file(source: str | Path) -> bool:
    return Path(source).is_file()
