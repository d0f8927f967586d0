"""How several processes train one crosscoder: features split over some of them, the tokens of a batch over others.

torchrun starts W = m * n processes. Rank d * n + r is rank r of n along "features" and rank d of m along "data":

- feature-parallel rank r holds the features [r F/n, (r + 1) F/n): their rows of both matrices, biases, thresholds and
  optimiser state;
- data-parallel rank d sees the tokens [d B/m, (d + 1) B/m) of every batch.

A crosscoder's forward pass is one sum over features, so n processes exchange the reconstruction (B/m, S D) and, for the
TopK gates, enough about their scores to find the largest. Every loss is a function of that sum: it is the same in all n
processes, and each has the gradients of its own features without communication. The m groups average their gradients,
as in data-parallel training. `ALONE` is a single process that holds everything; it exchanges nothing.

`Parallel` is the strategy (`crosslens.distributed.strategy`) that the trainer gives to a training SAE.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import override

from crosslens.distributed.devices import check_launcher, own_device, rank_and_world
from crosslens.distributed.strategy import Strategy
from crosslens.errors import UserError

DIGIT_BITS = 11  # bits per digit in the search for a threshold: 2,048 counts are exchanged for each
TIMEOUT = timedelta(minutes=30)  # one process may load models, or write, while the others wait


@dataclass(frozen=True)
class Parallel(Strategy):
    """The ranks of this process, and the collective operations among the processes that train a crosscoder.

    Args:
        mesh: with dimensions ("data", "features"); None for a single process.
    """

    mesh: DeviceMesh | None = None

    @property
    @override
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.mesh is None

    @cached_property
    def n_feature_ranks(self) -> int:
        """n, the number of processes that split the features."""
        return 1 if self.mesh is None else self.mesh["features"].size()

    @cached_property
    @override
    def n_data_ranks(self) -> int:
        """m, the number of groups that split the tokens of a batch."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def n_ranks(self) -> int:
        """W, the number of processes."""
        return self.n_feature_ranks * self.n_data_ranks

    @property
    def rank(self) -> int:
        """Global rank; rank 0 prints, logs, and writes shared files."""
        return 0 if self.mesh is None else dist.get_rank()

    @cached_property
    def feature_rank(self) -> int:
        """r, the feature-parallel rank."""
        return 0 if self.mesh is None else self.mesh["features"].get_local_rank()

    @cached_property
    def data_rank(self) -> int:
        """d, the data-parallel rank."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    @cached_property
    def feature_group(self) -> Any:
        """The processes with the same tokens and other features; cached, because the lookup is slow."""
        return None if self.mesh is None else self.mesh["features"].get_group()

    @cached_property
    def data_group(self) -> Any:
        """The processes with the same features and other tokens."""
        return None if self.mesh is None else self.mesh["data"].get_group()

    @override
    def features(self, d_sae: int) -> slice:
        """The features that this process holds."""
        size = d_sae // self.n_feature_ranks
        return slice(self.feature_rank * size, (self.feature_rank + 1) * size)

    def tokens(self, batch_size: int) -> slice:
        """The tokens of a batch that this process sees."""
        size = batch_size // self.n_data_ranks
        return slice(self.data_rank * size, (self.data_rank + 1) * size)

    @override
    def sum_features_(self, x: Tensor) -> Tensor:
        """Sum in place over the processes that split the features; the same bits in all of them."""
        return x if self.mesh is None or self.n_feature_ranks == 1 else _reduced(x, self.feature_group)

    def sum_data_(self, x: Tensor) -> Tensor:
        """Sum in place over the processes that split the tokens."""
        return x if self.mesh is None or self.n_data_ranks == 1 else _reduced(x, self.data_group)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum in place over all processes."""
        return x if self.mesh is None else _reduced(x, None)

    @override
    def count(self, n: int) -> int:
        """Sum of a count over all processes."""
        return n if self.mesh is None else int(self.sum_(torch.tensor(n, device=self.mesh.device_type)))

    @override
    def smallest(self, x: Tensor) -> Tensor:
        """Minimum of a scalar over all processes."""
        if self.mesh is not None:
            dist.all_reduce(x, dist.ReduceOp.MIN)
        return x

    @override
    def total_features(self, x: Tensor) -> Tensor:
        """Sum a loss term over the processes that split the features; its gradient stays local."""
        if self.mesh is None or self.n_feature_ranks == 1:
            return x
        total = _SumOnce.apply(x, self.feature_group, 1)
        assert isinstance(total, Tensor)
        return total

    @override
    def mean_data(self, x: Tensor) -> Tensor:
        """Mean over the processes that split the tokens; its gradient is averaged with all others."""
        if self.mesh is None or self.n_data_ranks == 1:
            return x
        mean = _SumOnce.apply(x, self.data_group, self.n_data_ranks)
        assert isinstance(mean, Tensor)
        return mean

    def gather_features(self, x: Tensor) -> Tensor:
        """The tensors of the processes that split the features, stacked along a new first dimension (n, ...)."""
        return x[None] if self.mesh is None else _gathered(x, self.n_feature_ranks, self.feature_group)

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all processes, stacked along a new first dimension (W, ...)."""
        return x[None] if self.mesh is None else _gathered(x, self.n_ranks, None)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()

    @contextmanager
    def first(self) -> Generator[bool, None, None]:
        """A block that only rank 0 runs, while the others wait at its end; yields whether this is rank 0.

        Raises:
            UserError: in the other processes, if rank 0 failed.
        """
        failed = torch.zeros(1, device="cpu" if self.mesh is None else self.mesh.device_type)
        try:
            yield self.rank == 0
        except BaseException:
            failed.fill_(1)
            raise
        finally:
            self.sum_(failed)
        if failed and self.rank:
            raise UserError("rank 0 stopped with an error; see its message")

    @override
    @torch.no_grad()
    def kth_largest(self, values: Float[Tensor, " n"], k: int) -> tuple[Tensor, Tensor]:
        """The k-th largest value of all processes (NaN ranks first), and how many of the k largest equal it.

        Radix selection: from the highest digit down, the processes exchange how many values have each digit, never the
        values. The bits of non-negative floats sort like the floats.

        Args:
            values: non-negative, at least k over all processes.
            k: rank, from 1.
        """
        precise = values.double() if values.dtype == torch.float64 else values.float()
        kind, width = (torch.int64, 63) if precise.dtype == torch.float64 else (torch.int32, 31)
        bits = precise.abs().view(kind).long()
        left = torch.tensor(k, device=values.device)
        found = torch.zeros((), dtype=torch.long, device=values.device)
        for shift in range((width - 1) // DIGIT_BITS * DIGIT_BITS, -1, -DIGIT_BITS):
            digits = (bits >> shift) & (2**DIGIT_BITS - 1)
            counts = self.sum_(torch.bincount(digits, minlength=2**DIGIT_BITS))
            at_least = counts.flip(0).cumsum(0).flip(0)
            digit = (at_least >= left).sum() - 1
            left = left - torch.where(digit + 1 < len(counts), at_least.roll(-1)[digit], 0)
            found = found | (digit << shift)
            bits = bits[digits == digit]
        return found.to(kind).view(precise.dtype).to(values.dtype), left

    @override
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
        n_tokens, n_features = shape
        marked = tied.nonzero().flatten()
        rows, columns = tokens[marked] + self.data_rank * n_tokens, features[marked] + self.feature_rank * n_features
        places = rows * (self.n_feature_ranks * n_features) + columns
        numbers = self.gather(torch.tensor(len(places), device=places.device))
        if count >= numbers.sum():
            return tied
        padded = places.new_full((int(numbers.max()),), torch.iinfo(places.dtype).max)
        padded[: len(places)] = places
        first = places <= self.gather(padded).flatten().sort().values[count - 1]
        return tied.index_put((marked,), first)

    @override
    def kth_per_token(self, largest: Float[Tensor, "B k"]) -> tuple[Float[Tensor, "B 1"], Int[Tensor, "B 1"]]:
        """The k-th largest score of each token over all processes, and how many of the k this process keeps.

        Args:
            largest: the k largest scores of each token in this process.
        """
        k = largest.shape[-1]
        of_ranks = self.gather_features(largest)
        top = rearrange(of_ranks, "n b k -> b (n k)").topk(k, dim=-1, sorted=False).values
        kth = torch.where(top.isnan(), torch.inf, top).amin(-1)
        larger = ((of_ranks > kth[:, None]) | of_ranks.isnan()).sum(-1)
        tied = (of_ranks == kth[:, None]).sum(-1)
        before = (tied.cumsum(0) - tied)[self.feature_rank]
        tied_here = (k - larger.sum(0) - before).clamp_min(0)
        return kth[:, None], (larger[self.feature_rank] + tied_here)[:, None]


ALONE = Parallel()


def n_processes() -> int:
    """Number of processes that torchrun started, or that torch.distributed was initialised with."""
    return dist.get_world_size() if dist.is_initialized() else rank_and_world()[1]


def check_split(world: int, data_parallel: int, d_sae: int | None = None, batch_size: int | None = None) -> None:
    """Refuse sizes that cannot be split evenly.

    Args:
        world: number of processes.
        data_parallel: m, number of groups that split the tokens of a batch.
        d_sae: number of features, if known.
        batch_size: tokens per batch, if known.

    Raises:
        UserError: names the size, the number of processes, and the nearest sizes that can be split.
    """
    if data_parallel < 1 or world % data_parallel:
        raise UserError(
            f"data_parallel={data_parallel} does not divide the {world} process{'es' * (world > 1)} of this run: use "
            f"a divisor of {world}; features are split over the processes of a group"
        )
    for name, size, ranks, what in (
        ("d_sae", d_sae, world // data_parallel, "features"),
        ("batch_size", batch_size, data_parallel, "tokens"),
    ):
        if size is not None and size % ranks:
            below = size // ranks * ranks
            near = " or ".join(str(n) for n in (below, below + ranks) if n)
            raise UserError(f"{name}={size} cannot be split over {ranks} processes by {what}: use {near}")


def join(device: str, data_parallel: int = 1) -> tuple[Parallel, str]:
    """Join the processes that torchrun started; a single process gets `ALONE`.

    The process group is initialised by the first call and destroyed when the program ends.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, each process on the GPU of its local rank).
        data_parallel: m, number of groups that split the tokens of a batch.

    Returns:
        The ranks of this process, and its device.

    Raises:
        UserError: the number of processes is not a multiple of `data_parallel`.
    """
    world = n_processes()
    check_split(world, data_parallel)
    if not dist.is_initialized():
        check_launcher()
    if world == 1:
        return ALONE, device
    device = own_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    shape = (data_parallel, world // data_parallel)
    return Parallel(init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("data", "features"))), device


def _leave() -> None:
    # destroying the group waits for the others, who may be waiting for a process that failed
    if not hasattr(sys, "last_value"):
        dist.destroy_process_group()


def _reduced(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


def _gathered(x: Tensor, size: int, group: Any) -> Tensor:
    found = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(found, x.contiguous(), group=group)
    return torch.stack(found)


class _SumOnce(torch.autograd.Function):
    """A sum over processes, divided by `divisor`, of which every process then computes the same function.

    The gradient passes through unchanged. For a sum that is exact; for a mean, gradients are averaged over processes
    later.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, divisor: int) -> Tensor:
        del ctx
        return _reduced(x.detach().clone(), group).div_(divisor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        del ctx
        return grad, None, None
