"""Communication between processes in a training step: the `Strategy` that the trainer passes to a training SAE.

The models and kernels contain no communication code. Two parts of a step need every feature or every token: the
reconstruction is a sum over features, and the TopK gates rank the scores of all of them. A model asks its strategy for
both. A plain `Strategy` is that of a process which holds everything; `crosslens.distributed.Parallel` communicates.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Strategy:
    """How a process takes part in a training step: a single one, which holds all features and all tokens."""

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return True

    @cached_property
    def n_data_ranks(self) -> int:
        """Number of groups that the tokens of a batch are split over."""
        return 1

    def features(self, d_sae: int) -> slice:
        """The features whose weights this process holds."""
        return slice(0, d_sae)

    def sum_features_(self, x: Tensor) -> Tensor:
        """Sum in place over the processes that split the features."""
        return x

    def total_features(self, x: Tensor) -> Tensor:
        """Sum a loss term over the processes that split the features; its gradient stays local."""
        return x

    def mean_data(self, x: Tensor) -> Tensor:
        """Mean over the processes that split the tokens; its gradient is averaged with all others."""
        return x

    def count(self, n: int) -> int:
        """Sum of a count over all processes."""
        return n

    def smallest(self, x: Tensor) -> Tensor:
        """Minimum of a scalar over all processes."""
        return x

    def kth_largest(self, values: Float[Tensor, " n"], k: int) -> tuple[Tensor, Tensor]:
        """The k-th largest value of all processes (NaN ranks first), and how many of the k largest equal it.

        Args:
            values: non-negative, at least k over all processes.
            k: rank, from 1.
        """
        n = len(values)
        if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
            # numpy only partitions, which is faster than a heap; NaN ranks first, too
            top = torch.from_numpy(np.partition(values.numpy(), n - k)[n - k :])
        else:
            top = values.topk(k, sorted=False).values
        kth = torch.where(top.isnan(), torch.inf, top).amin()
        return kth, (top == kth).sum()

    def earliest(
        self,
        tied: Bool[Tensor, " n"],
        tokens: Int[Tensor, " n"],
        features: Int[Tensor, " n"],
        shape: tuple[int, int],
        count: Tensor,
    ) -> Bool[Tensor, " n"]:
        """Which of the marked entries of a (B, F) matrix are the first `count` of those over all processes.

        Args:
            tied: the marks of entries, which are in order.
            tokens: row of each entry, in this process's block.
            features: column of each entry.
            shape: shape of this process's block.
            count: a scalar.
        """
        del tokens, features, shape
        return tied & (tied.cumsum(0) <= count)

    def kth_per_token(self, largest: Float[Tensor, "B k"]) -> tuple[Float[Tensor, "B 1"], int | Int[Tensor, "B 1"]]:
        """The k-th largest score of each token over all processes, and how many of the k this process keeps.

        Args:
            largest: the k largest scores of each token in this process.
        """
        return torch.where(largest.isnan(), torch.inf, largest).amin(-1, keepdim=True), largest.shape[-1]


ONE_PROCESS = Strategy()
