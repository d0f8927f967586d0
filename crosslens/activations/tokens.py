"""Sequences of tokens from a dataset: on the hub, in a file, or in memory.

1. A source is read as items, one after the other and no further than needed: texts, conversations, or rows of token
   ids. Of several sources that are mixed, each item is drawn by their weights.
2. Texts are tokenised, conversations by the tokenizer's chat template (`crosslens.activations.chat`). Rows of exactly
   `context_size` ids are sequences as they are; everything else is packed into sequences, documents separated by BOS
   (SAELens's packing).
3. Reading stops as soon as enough positions are kept, so an endless stream will do.
"""

from __future__ import annotations

import csv
import gzip
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
import xxhash
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor

from crosslens.activations.chat import COLUMNS, Message, check_template, chosen, encode, read_messages
from crosslens.config import check_weights
from crosslens.errors import UserError, check_characters, did_you_mean, first_line, shortened
from crosslens.snapshots.collection import Snapshots

Source: TypeAlias = str | Path | Tensor | NDArray[Any] | Iterable[Any] | Mapping[str, float]
"""A hub name, a path, token ids, a table, or documents one after the other; or hub names and paths with weights."""

_PORTION = 1024
"""Sequences or documents that are read together, at most."""

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
    """Hub name; path to text / jsonl / csv / parquet (may be gzipped); tokens, `(N, T)` sequences or `(N,)` one long
    stream; a `datasets.Dataset` or `IterableDataset`, a DataFrame or Series; or a list, generator or other iterable of
    documents, each a text, a conversation (a list of {"role", "content"}), a row of token ids, or a dictionary with
    `column`. An iterator can be read once. Or a dictionary of hub names and paths with weights that sum to 1: every
    document is drawn from one of them, as `datasets.interleave_datasets` does, until the first is exhausted."""
    n_tokens: int | None = None
    """Tokens to train on, without the positions that are left out; None takes the whole dataset."""
    context_size: int | None = None
    """Tokens per sequence; None takes the models' context, at most 1024. Always T for `(N, T)` tokens."""
    held_out_tokens: int | None = None
    """Tokens kept for evaluation; None takes n_tokens / 20, between 2,000 and 100,000."""
    column: str = "text"
    """Column that holds the documents, as texts, conversations or token ids; `messages` or `conversations` where a
    table has no `text`. Where all rows have `context_size` ids, they are sequences as they are."""
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
    keep_roles: Sequence[str] | None = None
    """Of conversations, keep only what these roles say, such as `("assistant",)`; the template's own tokens and plain
    texts are then left out."""
    drop_roles: Sequence[str] | None = None
    """Of conversations, leave out what these roles say."""

    def __post_init__(self) -> None:
        for name in ("keep_roles", "drop_roles"):
            roles = getattr(self, name)
            listed = isinstance(roles, Sequence) and not isinstance(roles, str)
            if roles is not None and not (listed and all(isinstance(role, str) for role in roles)):
                raise UserError(f"{name}={roles!r} must be a list of roles, such as ['assistant']")
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
        if _is_mix(self.source):
            check_weights(self.source)
        else:
            _check_source(self.source, self.column)

    @property
    def name(self) -> str:
        """A short name for messages and metadata; never a folder of the user's machine."""
        if isinstance(self.source, (str, Path)):
            return Path(self.source).name if _is_file(self.source) else str(self.source)
        if isinstance(self.source, Mapping):
            return ", ".join(f"{replace(self, source=name).name} {weight:g}" for name, weight in self.source.items())
        kind = type(self.source).__name__
        if isinstance(self.source, list):
            kind = "list of documents"
        elif isinstance(self.source, (Tensor, np.ndarray)):
            kind = "token array"
        return f"{kind} of {len(self.source):,}" if isinstance(self.source, Sized) else kind

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


class Sequences:
    """The sequences of a dataset in the order of a seed, those to train on first; read when they are first needed.

    Args:
        dataset: with a `context_size`.
        snapshots: whose tokenizer is used.
        seed: seed for the order.
    """

    def __init__(self, dataset: Dataset, snapshots: Snapshots, seed: int) -> None:
        self.dataset, self.snapshots, self.seed = dataset, snapshots, seed
        self.found: Found | None = None
        """What was read, or found in a cache."""
        if self.dataset.keep_roles is not None or self.dataset.drop_roles is not None:
            check_template(snapshots.tokenizer)

    @property
    def tokens(self) -> Int[Tensor, "N T"]:
        """Sequences for training, then those held out."""
        return self._read().tokens

    @property
    def n_train(self) -> int:
        """Number of sequences for training."""
        return self._read().n_train

    @property
    def chosen(self) -> Bool[Tensor, "N T"] | None:
        """Positions of `tokens` that are of the roles asked for; None if none are."""
        return self._read().chosen

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Positions of each training sequence that are kept."""
        return self.keep(self.tokens[: self.n_train]).sum(-1).numpy()

    def keep(self, tokens: Int[Tensor, "... T"]) -> Bool[Tensor, "... T"]:
        """Which positions of `tokens`, some of the sequences, training uses: as `Dataset.keep` and the roles say."""
        keep = self.dataset.keep(tokens, self.snapshots.tokenizer)
        if (chosen := self.chosen) is None:
            return keep
        rows = [self._places[_digest(row)] for row in tokens.reshape(-1, tokens.shape[-1])]
        return keep & chosen[rows].view_as(keep)

    @cached_property
    def _places(self) -> dict[bytes, int]:
        """The number of a sequence by its contents."""
        return {_digest(row): i for i, row in enumerate(self.tokens)}

    def held_out_documents(self) -> Int[Tensor, "n T"]:
        """Number of the document at every position of the held-out sequences.

        A document begins at a token that separates documents, anywhere but at the first position of a sequence, where
        BOS stands; other sequences go on with the last document of the one before them in the data. Every sequence is a
        document where nothing separates them, or the order in the data is not known.
        """
        tokens, n_train, _ = self._read()
        begins = special_positions(tokens, self.snapshots.tokenizer, self.dataset.separator)
        begins[:, 0] = False
        place = places_in_data(self.keep(tokens).sum(-1), n_train, self.dataset, self.seed)
        if place is None or not begins.any():
            place, begins[:, 0] = torch.arange(len(tokens)), True
        in_data = torch.empty(len(tokens), dtype=torch.long)
        in_data[place] = begins.sum(1)
        before = (in_data.cumsum(0) - in_data)[place]
        return before[n_train:, None] + begins[n_train:].cumsum(1)

    def _read(self) -> Found:
        if self.found is None:
            dataset, n_words = self.dataset, len(self.snapshots.tokenizer)
            tokens, chosen = read_sequences(dataset, self.snapshots.tokenizer, self.seed)
            lowest, highest = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
            if lowest < 0 or highest >= n_words:
                raise UserError(
                    f"token id {lowest if lowest < 0 else highest} in {dataset.name} is outside the tokenizer's "
                    f"vocabulary of {n_words}: was it tokenised with another tokenizer?"
                )
            keep = dataset.keep(tokens, self.snapshots.tokenizer)
            counts = (keep if chosen is None else keep & chosen).sum(-1)
            order, n_train = split_sequences(counts, dataset.n_tokens, dataset.n_held_out, self.seed, dataset.name)
            self.found = Found(tokens[order], n_train, None if chosen is None else chosen[order])
        return self.found


def _digest(tokens: Int[Tensor, " T"]) -> bytes:
    return xxhash.xxh3_128_digest(tokens.to(torch.int32).contiguous().numpy().tobytes())


class Found(NamedTuple):
    """The sequences of a dataset."""

    tokens: Int[Tensor, "N T"]
    """Those for training, then those held out."""
    n_train: int
    """How many are for training."""
    chosen: Bool[Tensor, "N T"] | None
    """Positions of the roles that were asked for; None if none were."""


def token_sequences(dataset: Dataset, tokenizer: Any, seed: int = 0) -> Tensor:
    """Read sequences of equal length, enough for the tokens to train on and those to hold out.

    `(N, T)` tokens, and rows of `context_size` ids, are taken as they are, everything else is packed into sequences of
    `context_size` tokens.

    Args:
        dataset: with a `context_size`, unless it holds `(N, T)` tokens.
        tokenizer: a Hugging Face tokenizer.
        seed: of the order in which sources are mixed.

    Returns:
        int32 tokens, in the order of the dataset.

    Raises:
        UserError: the data cannot be read, or are shorter than one sequence.
    """
    return read_sequences(dataset, tokenizer, seed)[0]


def read_sequences(dataset: Dataset, tokenizer: Any, seed: int) -> tuple[Tensor, Tensor | None]:
    """As `token_sequences`; and which positions are of the roles that are asked for, None if none are.

    Where two sequences have the same tokens, a position is of these roles if it is in both.

    Raises:
        UserError: as `token_sequences`, or a role that nobody has.
    """
    source, T = dataset.source, dataset.context_size
    if isinstance(source, (Tensor, np.ndarray)):
        tokens = _as_tensor(source)
        if tokens is None or tokens.ndim not in (1, 2) or not _is_whole(tokens):
            raise UserError(
                f"a token array of shape {tuple(source.shape)} and dtype {source.dtype} cannot be used; give whole "
                "numbers, (N, T) sequences or (N,) one long stream"
            )
        if tokens.ndim == 2:
            return _until(_as_int32(tokens, dataset.name), _needed(dataset, tokens.shape[1]), dataset, tokenizer), None
        items: Iterator[Item] = iter([_as_int64(tokens, dataset.name)])
    elif isinstance(source, Mapping):
        items = _mixed(dataset, source, seed)
    else:
        items = _items(dataset)
    if T is None:
        raise UserError("context_size=None: give the number of tokens per sequence")
    bos = tokenizer.bos_token_id if dataset.prepend_bos else None
    between = bos if dataset.separator is None else separator_id(dataset.separator, tokenizer)
    seen: set[str] = set()
    begun = list(islice(items, 1))
    if begun and isinstance(begun[0], Tensor):  # of documents, some among so many are shorter or longer
        begun += islice(items, 63)
    items = chain(begun, items)
    if begun and all(isinstance(item, Tensor) and len(item) == T for item in begun):
        packed = _whole_rows(items, T, dataset.name)
    else:
        streams = _tokenised(items, tokenizer, dataset, seen)
        packed = concat_and_batch_sequences(streams, T, begin_batch_token_id=bos, sequence_separator_token_id=between)
    wanted = _needed(dataset, T)
    rows: list[Tensor] = []
    counted = 0
    while wanted is None or counted < wanted:
        left = None if wanted is None else wanted - counted
        chunk = list(islice(packed, _PORTION if left is None else min(_PORTION, -(-left // T))))
        if not chunk:
            break
        stacked = _until(torch.stack(chunk), left, dataset, tokenizer)
        counted += int(_kept(stacked, dataset, tokenizer).sum())
        rows.append(stacked)
    if not rows:
        raise UserError(
            f"{dataset.name} is shorter than one sequence of context_size={T} tokens; use more text or a smaller "
            "context_size"
        )
    coded = torch.cat(rows)
    left_out = coded >= _LEFT_OUT
    sequences = _as_int32(coded - left_out * _LEFT_OUT, dataset.name)
    if dataset.keep_roles is None and dataset.drop_roles is None:
        return sequences, None
    _check_roles(dataset, seen)
    _, same, counts = torch.unique(sequences, dim=0, return_inverse=True, return_counts=True)
    agreed = torch.zeros(len(counts), sequences.shape[1]).index_add(0, same, (~left_out).float())
    return sequences, (agreed == counts[:, None])[same]


_LEFT_OUT = 1 << 40
"""Added to the ids of tokens of other roles, while documents are packed."""


def _kept(coded: Int[Tensor, "n T"], dataset: Dataset, tokenizer: Any) -> Bool[Tensor, "n T"]:
    """Positions that training uses, of token ids with `_LEFT_OUT`."""
    left_out = coded.long() >= _LEFT_OUT  # whole arrays may be int32, which would wrap around
    return dataset.keep(coded - left_out * _LEFT_OUT, tokenizer) & ~left_out


def _check_roles(dataset: Dataset, seen: Set[str]) -> None:
    for name in ("keep_roles", "drop_roles"):
        for role in getattr(dataset, name) or ():
            if role not in seen:
                raise UserError(
                    f"{name}: no conversation that was read of {dataset.name} has the role {role!r}, they have "
                    f"{', '.join(sorted(seen)) or 'none'}{did_you_mean(role, seen)}"
                )


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
    counts: Int[Tensor, " N"], wanted: int | None, held_out: int, seed: int, name: str
) -> tuple[Int[Tensor, " n"], int]:
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
    most = total - held_out - max(0, largest - 1)
    remedy = f"ask for at most {most}" if most > 0 else "give more documents, or set held_out_tokens"
    too_many = UserError(
        f"{name} has only {total} usable tokens, too few for n_tokens={wanted} plus {held_out} held out; {remedy}"
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


def places_in_data(counts: Int[Tensor, " N"], n_train: int, dataset: Dataset, seed: int) -> Int[Tensor, " N"] | None:
    """Place in the data of the sequences that `split_sequences` chose, from what it chose them by.

    Args:
        counts: kept tokens of each sequence, in the order chosen.
        n_train: the number of training sequences.
        dataset: whose sequences they are.
        seed: seed for the order.

    Returns:
        The places; None where several would have led to this choice, which is rare.
    """
    N, wanted, held_out = len(counts), dataset.n_tokens, dataset.n_held_out
    found: list[Tensor] = []
    for spare in range(n_train):  # training sequences that were added in the end
        order = torch.randperm(N - spare, generator=generator(seed))
        place = torch.cat([order[: n_train - spare], torch.arange(N - spare, N), order[n_train - spare :]])
        in_data = torch.empty_like(counts)
        in_data[place] = counts
        if spare and (wanted is None or int(in_data[: N - spare].sum()) < wanted + held_out):
            break
        with suppress(UserError):
            if torch.equal(split_sequences(in_data, wanted, held_out, seed, dataset.name)[0], place):
                found.append(place)
    return found[0] if len(found) == 1 else None


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
    counts = _kept(sequences, dataset, tokenizer).sum(-1)
    return sequences[: int((counts.cumsum(0) < n_tokens).sum()) + 1]


def _as_int32(tokens: Tensor, name: str) -> Tensor:
    """Token ids as int32; those that would wrap around are refused."""
    wide = _as_int64(tokens, name)
    if wide.numel():
        lowest, highest = int(wide.min()), int(wide.max())
        if lowest < 0 or highest >= 2**31:
            raise _no_token_id(lowest if lowest < 0 else highest, name)
    return wide.to(torch.int32)


def _as_int64(tokens: Tensor, name: str) -> Tensor:
    """Token ids as int64, where those of uint64 that would become negative are refused."""
    wide = tokens.long()
    if tokens.dtype == torch.uint64 and wide.numel() and (lowest := int(wide.min())) < 0:
        raise _no_token_id(lowest + 2**64, name)
    return wide


def _no_token_id(value: int, name: str) -> UserError:
    return UserError(f"token id {value} in {name} is not in [0, {2**31 - 1}]: was it tokenised with another tokenizer?")


def _tokenised(items: Iterator[Item], tokenizer: Any, dataset: Dataset, seen: set[str]) -> Iterator[Tensor]:
    """Token ids of each document, plus `_LEFT_OUT` where they are of roles that are left out; the roles go to `seen`.

    Texts are tokenised in portions that grow, so that little is read in vain.
    """
    size = 8
    whose = dataset.keep_roles is not None or dataset.drop_roles is not None
    special = {tokenizer.bos_token_id, tokenizer.pad_token_id}  # `keep_special` decides about these
    while portion := list(islice(items, size)):
        texts = [item for item in portion if isinstance(item, str)]
        ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for item in portion:
            roles: Sequence[str | None] = ()
            if isinstance(item, list):
                check_template(tokenizer)
                seen.update(message["role"] for message in item)
                try:
                    found, roles = encode(item, tokenizer, whose=whose)
                except UserError as error:
                    raise UserError(f"the conversation {shortened(repr(item))} of {dataset.name} {error}") from error
                tokens = torch.tensor(found)
            else:
                tokens = torch.tensor(next(ids)) if isinstance(item, str) else item
            if not len(tokens):
                continue
            if whose:
                used = chosen(roles or [None] * len(tokens), dataset.keep_roles, dataset.drop_roles)
                used |= torch.isin(
                    tokens, torch.tensor([each for each in special if each is not None], dtype=torch.long)
                )
                tokens = tokens + ~used * _LEFT_OUT
            yield tokens
        size = min(2 * size, _PORTION)


def _mixed(dataset: Dataset, weights: Mapping[str, float], seed: int) -> Iterator[Item]:
    """Documents of several sources, each drawn by weight, until one source has no more.

    In the order of `datasets.interleave_datasets`, which would need one type for all: texts, conversations or ids.
    """
    parts = [_items(replace(dataset, source=name)) for name in weights]
    ahead = [next(part, None) for part in parts]
    draws, probabilities = np.random.default_rng(seed), list(weights.values())
    while True:
        for i in draws.choice(len(parts), size=1000, p=probabilities):
            item, ahead[i] = ahead[i], next(parts[i], None)
            if item is not None:
                yield item
            if ahead[i] is None:
                return


def _whole_rows(items: Iterator[Item], T: int, name: str) -> Iterator[Tensor]:
    """Rows of T token ids as they are."""
    for i, item in enumerate(items):
        if not isinstance(item, Tensor) or len(item) != T:
            what = f"{len(item)} token ids" if isinstance(item, Tensor) else "text"
            raise UserError(
                f"row {i} of {name} has {what}, the rows before it context_size={T} ids: leave such rows out, or "
                "choose another context_size, and all are packed into sequences"
            )
        yield item


def _is_mix(source: Any) -> TypeGuard[Mapping[str, float]]:
    """Whether it gives datasets and weights; other dictionaries hold no documents."""
    return isinstance(source, Mapping) and any(isinstance(weight, (int, float)) for weight in source.values())


def _column(there: Iterable[Any], wanted: str) -> str:
    """The column to read: `wanted`, or that of conversations where a table has no column of texts."""
    there = [*there]
    return next((each for each in COLUMNS if each in there), wanted) if wanted == "text" not in there else wanted


def _check_source(source: Any, column: str) -> None:
    """Refuse what is no dataset, and a table without the column, before anything is read."""
    kind = type(source).__name__
    if isinstance(source, Mapping) and source and all(hasattr(table, "column_names") for table in source.values()):
        splits = ", ".join(map(repr, source))
        raise UserError(f"the dataset is a {kind} with the splits {splits}: give one of them, as dataset[split]")
    readable = isinstance(source, (Path, Iterable)) or hasattr(source, "__getitem__")
    if not readable or isinstance(source, (bytes, Mapping, Set)):
        raise UserError(
            f"the dataset is a {kind}: give a hub name, a file, tokens, a table (datasets.Dataset, DataFrame), or "
            "documents as a list or generator"
        )
    names = getattr(source, "column_names", None) or list(getattr(source, "columns", ()))
    if names and _column(names, column) not in names:
        raise _no_column(column, f"the {kind}", names)


def _no_column(column: str, name: str, names: Iterable[Any]) -> UserError:
    there = ", ".join(map(repr, names))
    return UserError(f"column={column!r} is not in {name}: its columns are {there}{did_you_mean(column, names)}")


Item: TypeAlias = str | list[Message] | Tensor


def _items(dataset: Dataset) -> Iterator[Item]:
    """Documents of a source, as texts, conversations or token ids; empty ones too. Missing ones are left out, with a
    warning."""
    source: Any = dataset.source
    from_file = isinstance(source, (str, Path))
    rows = _file_rows(dataset) if from_file else _rows(_memory_rows(source, dataset.column), dataset.name)
    begun = list(islice(rows, 1))
    if not begun and isinstance(source, Iterator):
        raise UserError(f"the {dataset.name} has nothing left: an iterator can be read once; give a new one, or a list")
    if not begun and from_file:
        raise UserError(f"dataset {dataset.name} is empty; give a file with documents")
    missing = read = 0
    try:
        for i, row in enumerate(chain(begun, rows)):
            read = i + 1
            if isinstance(row, Mapping):
                column = _column(row, dataset.column)
                if column not in row:
                    raise _no_column(dataset.column, dataset.name, row)
                row = row[column]
            if row is None or (isinstance(row, float) and math.isnan(row)):  # what is missing in a DataFrame
                missing += 1
                continue
            yield _item(row, i, dataset.name, from_file)
    finally:
        if missing:
            warnings.warn(
                f"{missing:,} of the {read:,} rows that were read of {dataset.name} have nothing in the column "
                f"{dataset.column!r}: they are left out",
                stacklevel=2,
            )


def _item(row: Any, i: int, name: str, from_file: bool) -> Item:
    """A text, a conversation or token ids; numbers in files are texts."""
    if isinstance(row, str):
        return check_characters(row, f"document {i} of {name},")
    if from_file and isinstance(row, (bool, int, float)):
        return str(row)
    try:
        messages = read_messages(row)
    except UserError as error:
        raise UserError(f"document {i} of {name} {error}") from error
    if messages is not None:
        for message in messages:
            check_characters(message["content"], f"document {i} of {name},")
        return messages
    if isinstance(row, (Sequence, np.ndarray, Tensor)) and not isinstance(row, bytes):
        ids = _as_tensor(row)
        if ids is not None and ids.ndim == 1 and (not len(ids) or _is_whole(ids)):
            return _as_int64(ids, name)
    raise UserError(
        f"document {i} of {name} is {shortened(repr(row))}, a {type(row).__name__}: give texts, or rows of token ids "
        "(whole numbers), or conversations"
    )


def _as_tensor(values: Any) -> Tensor | None:
    """Numbers as a tensor; None if they are something else."""
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_whole(ids: Tensor) -> bool:
    return not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool


def _memory_rows(source: Any, column: str) -> Iterable[Any]:
    """The column of a table, everything else as it is."""
    if hasattr(source, "select_columns"):  # of the `datasets` library: the other columns need not be decoded
        names = source.column_names
        return source if names is None else source.select_columns([_column(names, column)])
    return source[_column(source.columns, column)] if hasattr(source, "columns") else source


def _file_rows(dataset: Dataset) -> Iterator[Any]:
    from datasets import Dataset as Table
    from datasets import load_dataset
    from datasets.data_files import DataFilesDict, DataFilesList

    source: Any = dataset.source
    name = str(source)
    if _is_file(source):
        path = Path(source).absolute()
        suffix = next((s for s in reversed(path.suffixes) if s in _BUILDERS), None)
        if suffix is None:
            raise UserError(f"{name} has an unsupported file type: use {', '.join(_BUILDERS)}, each also with .gz")
        if _BUILDERS[suffix] == "csv":
            return _rows(_csv_rows(path, "\t" if suffix == ".tsv" else ","), name)
        if "::" in str(path) or (path.suffix not in _BUILDERS and {"[", "]"} & {*str(path)}):
            raise UserError(
                f"{name} has '::' or, in the path of a compressed file, brackets, which the library that reads it "
                "takes for parts of an address: rename it"
            )
        options: dict[str, Any] = {"sample_by": dataset.sample_by} if _BUILDERS[suffix] == "text" else {}
        # a list that is resolved already: a name would be a pattern, in which [ ] * ? have a meaning
        files = DataFilesDict({"train": DataFilesList([str(path)], [(str(path),)])})
        # not load_dataset: it reports to the hub that a file was read
        read: Any = getattr(Table, f"from_{_BUILDERS[suffix]}")
        try:
            table = read(files, split="train", streaming=True, **options)
        except Exception as error:
            # parquet files are opened here already, and pyarrow raises exceptions of its own
            raise UserError(f"dataset {name} cannot be read: {first_line(error)}") from error
    elif Path(name).suffix in {*_BUILDERS, ".gz"} or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"dataset file {name} does not exist; give an existing file, or a hub name such as 'user/name'")
    else:
        try:
            # releases of datasets before 4 run a script of the repository or folder, or ask
            table = load_dataset(name, split=dataset.split, streaming=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset {name!r} (split {dataset.split!r}) cannot be read from the hub: {first_line(error)}; "
                "check the name and the connection, or give a local file"
            ) from error
    return _rows(table, name)


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, str | None]]:
    """Rows of a csv file, every cell as it is written: "007" and "NA" are texts. None where a row ends early."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = _next_row(reader) or []
        while (row := _next_row(reader)) is not None:
            if len(row) > len(header):
                raise UserError(
                    f"line {reader.line_num} of {path.name} has {len(row)} cells, its header {len(header)}: put texts "
                    f"with {'tabs' if delimiter != ',' else 'commas'} or line breaks in double quotes"
                )
            if row:
                yield dict(zip_longest(header, row))


def _next_row(reader: Iterator[list[str]]) -> list[str] | None:
    """The next row; documents may be longer than 128 KiB, the limit that other files of the process keep."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _rows(table: Iterable[Any], name: str) -> Iterator[Any]:
    rows = iter(table)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            # datasets raises many kinds here, at any row: parsers, decompression, the network; so do generators
            raise UserError(f"dataset {name} cannot be read: {first_line(error)}") from error
        yield row


def _is_file(source: str | Path) -> bool:
    return Path(source).is_file()
