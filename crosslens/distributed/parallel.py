"""How several processes share one crosscoder: features split over some, the tokens of a batch over others.

torchrun starts W = m * n processes; rank d * n + r is process r of n along "features" and d of m along "data":

- process r owns the features [r F/n, (r + 1) F/n): their rows of both matrices, biases, thresholds, optimiser state;
- process d sees the tokens [d B/m, (d + 1) B/m) of every batch.

A crosscoder's forward pass is one sum over features, so n processes exchange the reconstruction (B/m, S D) and, for the
TopK gates, what tells which scores are the largest. Every loss is a function of that sum: it is the same in all n
processes, and each has the gradients of its own features without exchange. m groups add their gradients, as in data
parallel training. `ALONE` is the one process that owns everything; nothing is exchanged then.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from crosslens.errors import UserError

DIGIT_BITS = 11  # of a digit in the search for a threshold: 2,048 counts are exchanged for each
TIMEOUT = timedelta(minutes=30)  # one process may load models, or write, for long while the others wait


@dataclass(frozen=True)
class Parallel:
    """This process among those that share a crosscoder.

    Args:
        mesh: of the dimensions ("data", "features"); None for a process alone.
    """

    mesh: DeviceMesh | None = None

    @property
    def alone(self) -> bool:
        """Whether nothing is shared."""
        return self.mesh is None

    @cached_property
    def n_shares(self) -> int:
        """n, processes among which the features are split."""
        return 1 if self.mesh is None else self.mesh["features"].size()

    @cached_property
    def n_slices(self) -> int:
        """m, processes among which the tokens of a batch are split."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def rank(self) -> int:
        """Number of this process; 0 speaks, logs, and writes what is written once."""
        return 0 if self.mesh is None else dist.get_rank()

    @cached_property
    def share(self) -> int:
        """r, number of this process among those that split the features."""
        return 0 if self.mesh is None else self.mesh["features"].get_local_rank()

    @cached_property
    def part(self) -> int:
        """d, number of this process among those that split the tokens."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    @cached_property
    def feature_group(self) -> Any:
        """The processes that split the features of the same tokens; to look it up in the mesh takes time."""
        return None if self.mesh is None else self.mesh["features"].get_group()

    @cached_property
    def data_group(self) -> Any:
        """The processes that see other tokens with the same features."""
        return None if self.mesh is None else self.mesh["data"].get_group()

    def features(self, d_sae: int) -> slice:
        """The features that this process owns."""
        size = d_sae // self.n_shares
        return slice(self.share * size, (self.share + 1) * size)

    def tokens(self, batch_size: int) -> slice:
        """The tokens of a batch that this process sees."""
        size = batch_size // self.n_slices
        return slice(self.part * size, (self.part + 1) * size)

    def corner(self, n_tokens: int, n_features: int) -> tuple[int, int, int]:
        """First token and feature of this process's block of (B, F), and F, from the shape of the block."""
        return self.part * n_tokens, self.share * n_features, self.n_shares * n_features

    # ------------------------------------------------------------------ exchange
    def sum_features_(self, x: Tensor) -> Tensor:
        """Sum in place over the processes that split the features; the same bits in all of them."""
        return x if self.mesh is None or self.n_shares == 1 else _reduced(x, self.feature_group)

    def sum_data_(self, x: Tensor) -> Tensor:
        """Sum in place over the processes that split the tokens."""
        return x if self.mesh is None or self.n_slices == 1 else _reduced(x, self.data_group)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum in place over all processes."""
        return x if self.mesh is None else _reduced(x, None)

    def count(self, n: int) -> int:
        """Sum over all processes of a number of things."""
        return n if self.mesh is None else int(self.sum_(torch.tensor(n, device=self.mesh.device_type)))

    def smallest(self, x: Tensor) -> Tensor:
        """The smallest over all processes of a number."""
        if self.mesh is not None:
            dist.all_reduce(x, dist.ReduceOp.MIN)
        return x

    def total_features(self, x: Tensor) -> Tensor:
        """Sum over features of something that losses are made of: its gradient stays in the process it came from."""
        if self.mesh is None or self.n_shares == 1:
            return x
        total = _SumOnce.apply(x, self.feature_group, 1)
        assert isinstance(total, Tensor)
        return total

    def mean_data(self, x: Tensor) -> Tensor:
        """Mean over the processes that split the tokens; its gradient is left for the average over processes."""
        if self.mesh is None or self.n_slices == 1:
            return x
        mean = _SumOnce.apply(x, self.data_group, self.n_slices)
        assert isinstance(mean, Tensor)
        return mean

    def of_features(self, x: Tensor) -> Tensor:
        """What the processes that split the features hold, stacked along a new first dimension (n, ...)."""
        if self.mesh is None:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.n_shares)]
        dist.all_gather(parts, x.contiguous(), group=self.feature_group)
        return torch.stack(parts)

    def of_all(self, x: Tensor) -> Tensor:
        """What all processes hold, stacked along a new first dimension (W, ...)."""
        if self.mesh is None:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()

    @contextmanager
    def first(self) -> Generator[bool, None, None]:
        """A block that rank 0 runs while the others wait; its value tells which one this is.

        Raises:
            UserError: in the others, when rank 0 has failed; it says itself why.
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
            raise UserError("rank 0 has stopped; its message says why")

    # ------------------------------------------------------------------ the largest scores of all processes
    @torch.no_grad()
    def kth_largest(self, values: Float[Tensor, " n"], k: int) -> tuple[Tensor, Tensor]:
        """The k-th largest of the values of all processes, and how many of the values equal to it are among the k.

        Digit by digit, from the highest: counts of the digit among the values that share the digits so far are
        exchanged, never values. The bits of non-negative numbers are in the order of the numbers.

        Args:
            values: non-negative; together there are at least k.
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

    def earliest(self, positions: Int[Tensor, " n"], count: Tensor) -> Int[Tensor, " m"]:
        """Those of this process's positions that are among the `count` smallest of all; they differ."""
        numbers = self.of_all(torch.tensor(len(positions), device=positions.device))
        if count >= numbers.sum():
            return positions
        padded = positions.new_full((int(numbers.max()),), torch.iinfo(positions.dtype).max)
        padded[: len(positions)] = positions
        last = self.of_all(padded).flatten().sort().values[count - 1]
        return positions[positions <= last]


ALONE = Parallel()


def n_processes() -> int:
    """How many processes torchrun, or whoever has prepared torch.distributed, has started."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def check_split(world: int, n_slices: int, d_sae: int | None = None, batch_size: int | None = None) -> None:
    """Refuse what cannot be split evenly.

    Args:
        world: number of processes.
        n_slices: m, processes among which the tokens of a batch are split.
        d_sae: features, if they are known.
        batch_size: tokens of a batch, if they are known.

    Raises:
        UserError: names the size, the number of processes, and the nearest sizes that can be split.
    """
    if n_slices < 1 or world % n_slices:
        raise UserError(
            f"data_parallel={n_slices} does not divide the {world} process{'es' * (world > 1)} of this run: features "
            "are split over the others"
        )
    for name, size, parts, what in (
        ("d_sae", d_sae, world // n_slices, "features"),
        ("batch_size", batch_size, n_slices, "tokens"),
    ):
        if size is not None and size % parts:
            below = size // parts * parts
            near = " or ".join(str(n) for n in (below, below + parts) if n)
            raise UserError(f"{name}={size} cannot be split over {parts} processes by {what}: {near} can")


def join(device: str, n_slices: int = 1) -> tuple[Parallel, str]:
    """Join the processes that torchrun has started; one process without them is `ALONE`.

    Their group is made at the first call and left when the program ends.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, each process on the GPU of its local rank).
        n_slices: m, processes among which the tokens of a batch are split.

    Returns:
        The place of this process, and its device.

    Raises:
        UserError: the number of processes is not a multiple of `n_slices`.
    """
    world = n_processes()
    check_split(world, n_slices)
    if world == 1:
        return ALONE, device
    device = own_device(device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    shape = (n_slices, world // n_slices)
    return Parallel(init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("data", "features"))), device


def _leave() -> None:
    # after an error, others may be waiting for this process: to take leave of them would be to wait as well
    if not hasattr(sys, "last_value"):
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """The GPU of this process among those of its machine, where "cuda" leaves it open."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _reduced(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x


class _SumOnce(torch.autograd.Function):
    """A sum over processes that all compute the same function of it, divided by a number.

    The gradient of a part is that of the result: for a sum, exactly; for a mean, what is to be averaged over processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, divisor: int) -> Tensor:
        del ctx
        return _reduced(x.detach().clone(), group).div_(divisor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        del ctx
        return grad, None, None
