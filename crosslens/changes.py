"""One batch of prompts at one snapshot: its features as pairs, what changes at the hook when they change, the metric.

With f_s the features, f0_s what they are changed to (zero, their mean over the prompts, or their values on the paired
prompt), and gates frozen from the clean run, the change f_s - f0_s moves the activation at the hook by

    sum_i (f_is - f0_is) W_dec[i, s] / c_s

Letters: B prompts, T positions, D d_model, A features active on any prompt, n pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosslens.crosscoders.sparse import row_pointers, sampled_product
from crosslens.prompts import PromptBatch, logit_difference
from crosslens.upper import UpperRun

_ENTRIES = 1 << 22  # pairs made at a time where the baseline is the mean


@dataclass(frozen=True)
class Pairs:
    """Values of (token, feature) pairs of a batch, sorted by token.

    Attributes:
        tokens: (n,) place b * T + t of the token.
        features: (n,) column among the A features.
        values: (n,).
    """

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]

    def to(self, device: str | torch.device) -> Pairs:
        """The same on a device."""
        return Pairs(self.tokens.to(device), self.features.to(device), self.values.to(device))


@dataclass(frozen=True)
class BatchAt:
    """One batch of prompts at one snapshot.

    Attributes:
        prompts: the batch.
        first: number of prompts in the batches before it.
        keep: (B, T) positions that are spliced; BOS and padding keep their clean activation.
        clean: (B, T, D) raw activation at the hook.
        patch: (B, T, D) that of the paired prompts, where there are any.
        pairs: features of the clean run, f_is; some may be 0.
        patch_values: (n,) of the paired prompts, on the same pairs.
        directions: (A, D) decoder rows in raw space, W_dec[i, s] / c_s.
        bias: (D,) what the decoder puts out when no feature is active.
        upper: the prompts in the model above the hook.
    """

    prompts: PromptBatch
    first: int
    keep: Bool[Tensor, "B T"]
    clean: Float[Tensor, "B T D"]
    patch: Float[Tensor, "B T D"] | None
    pairs: Pairs
    patch_values: Float[Tensor, " n"] | None
    directions: Float[Tensor, "A D"]
    bias: Float[Tensor, " D"]
    upper: UpperRun

    def __len__(self) -> int:
        return len(self.clean)

    def changes(self, baseline: str, mean: Float[Tensor, " A"] | None = None) -> Iterator[Pairs]:
        """`f_is - f0_is` where it is not 0: every pair once, all pairs of a prompt together.

        Args:
            baseline: "zero", "mean" or "patch".
            mean: of every feature, for "mean".
        """
        pairs, values = self.pairs, self.pairs.values
        if baseline == "mean":
            assert mean is not None
            yield from self._changes_from(mean)
            return
        if baseline == "patch":
            assert self.patch_values is not None
            values = values - self.patch_values
        kept = values != 0
        yield Pairs(pairs.tokens[kept], pairs.features[kept], values[kept])

    def _changes_from(self, mean: Float[Tensor, " A"]) -> Iterator[Pairs]:
        """The mean is 0 at no position: dense in the features that have one, for some prompts at a time."""
        columns, T = mean.nonzero().flatten(), self.keep.shape[1]
        per_chunk = max(1, _ENTRIES // max(1, T * len(columns)))
        for start in range(0, len(self), per_chunk):
            keep = self.keep[start : start + per_chunk]
            low, high = start * T, start * T + keep.numel()
            change = -mean.repeat(keep.numel(), 1)
            inside = (self.pairs.tokens >= low) & (self.pairs.tokens < high)
            change[self.pairs.tokens[inside] - low, self.pairs.features[inside]] += self.pairs.values[inside]
            tokens = keep.flatten().nonzero().flatten()
            values = change[tokens][:, columns].flatten()
            yield Pairs((tokens + low).repeat_interleave(len(columns)), columns.repeat(len(tokens)), values)

    def moved(self, pairs: Pairs) -> Float[Tensor, "B T D"]:
        """How far pairs move the activation: `sum_i value W_dec[i, s] / c_s`."""
        starts = row_pointers(pairs.tokens, self.keep.numel())[:-1]
        moved = embedding_bag(pairs.features, self.directions, starts, mode="sum", per_sample_weights=pairs.values)
        return moved.view_as(self.clean)

    def along(self, pairs: Pairs, gradient: Float[Tensor, "B T D"]) -> Float[Tensor, " n"]:
        """What pairs contribute to a linear function of the activation: `value <W_dec[i, s] / c_s, gradient>`."""
        rows = row_pointers(pairs.tokens, self.keep.numel())
        return pairs.values * sampled_product(rows, pairs.features, gradient.flatten(0, 1), self.directions)

    def metric(self, x: Float[Tensor, "n T D"], rows: Int[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
        """logit(correct) - logit(wrong) when the activation at the hook is `x`.

        Args:
            x: activations at all positions, clean where nothing is spliced; may carry gradients.
            rows: which prompt of the batch each is a version of; all in order when None.
        """
        batch = self.prompts if rows is None else self.prompts.select(rows.to(self.prompts.tokens.device))
        return logit_difference(self.upper.logits(x, rows), batch)
