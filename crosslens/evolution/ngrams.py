"""Unigram and bigram counts of a corpus, to compare the predictions of models with.

1. A sequence of T tokens has T - 1 pairs (x_t, x_t+1). Unigrams count the second token of every pair, bigrams count the
   pairs. Both thus describe the same predictions, and H2 <= H1.
2. Special tokens count like others, since models predict the end of a document too. Two special tokens in a row are
   padding and do not count; nor does a padding token that is neither BOS nor EOS.
3. Entropies in nats: `H1 = H(p1)` and `H2 = sum_x p(x) H(p2(.|x))` with p(x) the share of pairs that begin with x.
   These are the lowest losses of a model that only knows the counts. Counts of few tokens make H2 too small: a context
   seen once looks deterministic.

Ge et al. (arXiv 2509.17196) compare models with such counts without giving the rules of counting; these are
new here.

Symbols: N sequences, T positions, V tokens of the vocabulary, n different pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crosslens.errors import UserError, brief
from crosslens.rundir import share

_FORMAT = "crosslens ngrams 1"
_TENSORS = ("unigrams", "starts", "followers", "counts")
_PAIRS = 1 << 26  # encoded pairs to sort at a time


@dataclass(frozen=True)
class NgramCounts:
    """Counts of single tokens and pairs of tokens in a corpus, by `count_ngrams`.

    Attributes:
        unigrams: how often each token is the second of a pair.
        starts: the distinct pairs that begin with x have indices `starts[x]` to `starts[x + 1]`.
        followers: second token of every distinct pair, ascending for each first token.
        counts: how often each pair occurs.
        vocabulary: sha256 of the tokenizer's vocabulary.
    """

    unigrams: Int[Tensor, " V"]
    starts: Int[Tensor, " V1"]
    followers: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    vocabulary: str

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return int(self.unigrams.sum())

    @property
    def contexts(self) -> Int[Tensor, " V"]:
        """Number of pairs that begin with each token."""
        ends = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])[self.starts]
        return ends.diff()

    @property
    def unigram_entropy(self) -> float:
        """H1, in nats per token."""
        return float(torch.special.entr(self.unigrams.double() / self.n_pairs).sum())

    @property
    def bigram_entropies(self) -> Float[Tensor, " V"]:
        """H(p2(.|x)) of every token x, in nats; 0 if no pair begins with x."""
        found = torch.zeros(len(self.unigrams), dtype=torch.float64)
        first = self.firsts()
        return found.index_add(0, first, torch.special.entr(self.counts.double() / self.contexts[first]))

    @property
    def bigram_entropy(self) -> float:
        """H2, in nats per token."""
        return float(self.bigram_entropies @ self.contexts.double() / self.n_pairs)

    def firsts(self) -> Int[Tensor, " n"]:
        """First token of every distinct pair."""
        return torch.arange(len(self.unigrams)).repeat_interleave(self.starts.diff())

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a `tokenizer` other than the one used for counting.

        Raises:
            UserError: a vocabulary of another size or with other tokens.
        """
        if len(tokenizer) != len(self.unigrams):
            raise UserError(
                f"the counts have a vocabulary of {len(self.unigrams):,}, the snapshots' tokenizer {len(tokenizer):,}: "
                "use count_ngrams(tokens, snapshots.tokenizer)"
            )
        if vocabulary_hash(tokenizer) != self.vocabulary:
            raise UserError(
                f"the counts are from another tokenizer of the same size, {len(self.unigrams):,}, with vocabulary "
                f"{self.vocabulary[:12]} and not {vocabulary_hash(tokenizer)[:12]}: use count_ngrams(tokens, "
                "snapshots.tokenizer)"
            )

    def save(self, path: str | Path) -> Path:
        """Write the counts, with a checksum, to the safetensors file `path`."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        about = {"vocabulary": self.vocabulary, "checksum": self._checksum()}
        save_file(tensors, path, {"format": _FORMAT, "about": json.dumps(about)})
        share(Path(path))
        return Path(path)

    def _checksum(self) -> str:
        digest = xxhash.xxh3_64(self.vocabulary.encode())
        for name in _TENSORS:
            digest.update(getattr(self, name).contiguous().numpy().data)
        return digest.hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> NgramCounts:
        """Load the counts that `save` wrote to `path`.

        Raises:
            UserError: `path` is missing, damaged, or is not such a file.
        """
        again = "count again, or give a file written by NgramCounts.save"
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no n-gram counts: give a file written by NgramCounts.save")
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(metadata["about"])
            found = cls(**tensors, vocabulary=about["vocabulary"])
            whole = about.get("checksum") in (None, found._checksum())  # files of older releases have none
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path} cannot be read ({brief(error)}): {again}") from error
        if not whole:
            raise UserError(f"{path} is damaged (its counts do not have the checksum in it): {again}")
        return found


def count_ngrams(
    tokens: Int[Tensor, "N T"] | Iterable[Int[Tensor, "_ _"]], tokenizer: PreTrainedTokenizerBase
) -> NgramCounts:
    """Count the unigrams and bigrams of a corpus.

    Args:
        tokens: sequences of the training corpus, such as `Activations.train_tokens()`; or an iterable of such tensors,
            which need not fit in memory together.
        tokenizer: the models' tokenizer.

    Raises:
        UserError: a token outside the tokenizer's vocabulary, or nothing to count.
    """
    chunks = [tokens] if isinstance(tokens, Tensor) else tokens
    V = len(tokenizer)
    found, n = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for chunk in chunks:
        if chunk.numel() and not 0 <= int(chunk.min()) <= int(chunk.max()) < V:
            worst = int(chunk.min()) if int(chunk.min()) < 0 else int(chunk.max())
            raise UserError(
                f"token id {worst} is outside the tokenizer's vocabulary of {V:,}: tokenise the corpus with this "
                "tokenizer"
            )
        for part in chunk.split(max(1, _PAIRS // max(1, chunk.shape[-1]))):
            part = part.long()
            codes = (part[:, :-1] * V + part[:, 1:])[is_predicted(part, tokenizer)]
            once, times = codes.unique(return_counts=True)
            # merge the counts so far and the new ones into one sorted list
            merged, where = torch.cat([found[0], once]).unique(return_inverse=True)
            n[0] = torch.zeros(len(merged), dtype=torch.int64).index_add(0, where, torch.cat([n[0], times]))
            found[0] = merged
    codes, counts = found[0], n[0]
    if not len(codes):
        raise UserError("there are no pairs of tokens to count: give sequences of 2 tokens or more")
    first, second = codes // V, codes % V
    unigrams = torch.zeros(V, dtype=torch.int64).index_add(0, second, counts)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(first, minlength=V).cumsum(0)])
    return NgramCounts(unigrams, starts, second, counts, vocabulary_hash(tokenizer))


def is_predicted(tokens: Int[Tensor, "N T"], tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, "N T1"]:
    """Which of the T - 1 next tokens of each sequence count: all but padding."""
    marks: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    pad: Any = tokenizer.pad_token_id
    special = torch.zeros_like(tokens, dtype=torch.bool)
    for token in {*marks, pad} - {None}:
        special |= tokens == token
    counted = ~(special[:, 1:] & special[:, :-1])
    if pad is not None and pad not in marks:
        counted &= (tokens[:, 1:] != pad) & (tokens[:, :-1] != pad)
    return counted


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer's tokens and ids."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    text = json.dumps(sorted((index, token) for token, index in vocabulary.items()))
    return hashlib.sha256(text.encode()).hexdigest()
