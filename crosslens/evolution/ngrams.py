"""What follows what in a corpus: unigram and bigram counts, to hold the predictions of models against.

1. A sequence of T tokens gives T - 1 pairs (x_t, x_t+1). Unigrams count what is predicted, the second token of every
   pair; bigrams count the pairs. So both speak of the same predictions, and H2 <= H1.
2. Special tokens count like others, for models predict the end of a document too; but not two of them in a row, which
   is padding, and not a padding token that is no other mark.
3. Entropies in nats: `H1 = H(p1)` and `H2 = sum_x p(x) H(p2(.|x))` with p(x) the share of pairs that begin with x.
   These are the least losses of a model that knows nothing but the counts. Counts of few tokens make H2 too small: a
   context that was seen once seems certain.

Ge et al. (arXiv 2509.17196) hold models against such counts without saying how they count: the rules are this project's
own.

Letters: N sequences, T positions, V tokens of the vocabulary, n different pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crosslens.errors import UserError, first_line

_FORMAT = "crosslens ngrams 1"
_PAIRS = 1 << 26  # encoded pairs that are sorted at a time


@dataclass(frozen=True)
class NgramCounts:
    """Counts of single tokens and of pairs of a corpus; made by `count_ngrams`.

    Attributes:
        unigrams: how often each token was to be predicted.
        starts: the pairs that begin with x are `starts[x]` to `starts[x + 1]`.
        followers: second token of every different pair, rising within a first one.
        counts: how often each pair was seen.
        vocabulary: sha256 of the tokenizer's vocabulary.
    """

    unigrams: Int[Tensor, " V"]
    starts: Int[Tensor, " V1"]
    followers: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    vocabulary: str

    @property
    def n_pairs(self) -> int:
        """Pairs that were counted."""
        return int(self.unigrams.sum())

    @property
    def contexts(self) -> Int[Tensor, " V"]:
        """How many pairs begin with each token."""
        ends = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])[self.starts]
        return ends.diff()

    @property
    def unigram_entropy(self) -> float:
        """H1, in nats per token."""
        return float(torch.special.entr(self.unigrams.double() / self.n_pairs).sum())

    @property
    def bigram_entropies(self) -> Float[Tensor, " V"]:
        """H(p2(.|x)) of every token x, in nats; 0 for those that begin no pair."""
        found = torch.zeros(len(self.unigrams), dtype=torch.float64)
        first = self.firsts()
        return found.index_add(0, first, torch.special.entr(self.counts.double() / self.contexts[first]))

    @property
    def bigram_entropy(self) -> float:
        """H2, in nats per token."""
        return float(self.bigram_entropies @ self.contexts.double() / self.n_pairs)

    def firsts(self) -> Int[Tensor, " n"]:
        """First token of every different pair."""
        return torch.arange(len(self.unigrams)).repeat_interleave(self.starts.diff())

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a `tokenizer` other than that of the counts.

        Raises:
            UserError: a vocabulary of another size, or of other tokens.
        """
        if len(tokenizer) != len(self.unigrams):
            raise UserError(
                f"the counts are over {len(self.unigrams):,} tokens, the snapshots' tokenizer has {len(tokenizer):,}: "
                "count with count_ngrams(snapshots, ...) of these snapshots"
            )
        if vocabulary_hash(tokenizer) != self.vocabulary:
            raise UserError(
                f"the counts are of another tokenizer, of the same size {len(self.unigrams):,} but with vocabulary "
                f"{self.vocabulary[:12]} and not {vocabulary_hash(tokenizer)[:12]}: count with "
                "count_ngrams(snapshots, ...) of these snapshots"
            )

    def save(self, path: str | Path) -> Path:
        """Write the counts to the safetensors file `path`."""
        tensors = {name: getattr(self, name).contiguous() for name in ("unigrams", "starts", "followers", "counts")}
        save_file(tensors, path, {"format": _FORMAT, "about": json.dumps({"vocabulary": self.vocabulary})})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> NgramCounts:
        """The counts that `save` wrote to `path`.

        Raises:
            UserError: no such file, or something else in it.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no n-gram counts: give a file that NgramCounts.save wrote")
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**tensors, vocabulary=json.loads(metadata["about"])["vocabulary"])
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}): give a file of NgramCounts.save") from error


def count_ngrams(
    tokens: Int[Tensor, "N T"] | Iterable[Int[Tensor, "_ _"]], tokenizer: PreTrainedTokenizerBase
) -> NgramCounts:
    """Unigram and bigram counts of a corpus.

    Args:
        tokens: sequences of the training corpus, such as `Activations.train_tokens()`; or lots of them, which
            need not be in memory together.
        tokenizer: of the models.

    Raises:
        UserError: a token that the tokenizer does not have, or nothing to count.
    """
    lots = [tokens] if isinstance(tokens, Tensor) else tokens
    V = len(tokenizer)
    found, n = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for lot in lots:
        if lot.numel() and not 0 <= int(lot.min()) <= int(lot.max()) < V:
            worst = int(lot.min()) if int(lot.min()) < 0 else int(lot.max())
            raise UserError(
                f"token id {worst} is outside the tokenizer's vocabulary of {V:,}: was the corpus tokenised with "
                "another tokenizer?"
            )
        for part in lot.split(max(1, _PAIRS // max(1, lot.shape[-1]))):
            part = part.long()
            codes = (part[:, :-1] * V + part[:, 1:])[is_predicted(part, tokenizer)]
            once, times = codes.unique(return_counts=True)
            # what was counted so far and what is new, as one sorted list again
            merged, where = torch.cat([found[0], once]).unique(return_inverse=True)
            n[0] = torch.zeros(len(merged), dtype=torch.int64).index_add(0, where, torch.cat([n[0], times]))
            found[0] = merged
    codes, counts = found[0], n[0]
    if not len(codes):
        raise UserError("there is no pair of tokens to count: give sequences of 2 tokens or more")
    first, second = codes // V, codes % V
    unigrams = torch.zeros(V, dtype=torch.int64).index_add(0, second, counts)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(first, minlength=V).cumsum(0)])
    return NgramCounts(unigrams, starts, second, counts, vocabulary_hash(tokenizer))


def is_predicted(tokens: Int[Tensor, "N T"], tokenizer: PreTrainedTokenizerBase) -> Bool[Tensor, "N T1"]:
    """Which of the T - 1 next tokens of a sequence count: all but padding."""
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
    """sha256 of the tokens of a tokenizer and their ids."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    text = json.dumps(sorted((index, token) for token, index in vocabulary.items()))
    return hashlib.sha256(text.encode()).hexdigest()
