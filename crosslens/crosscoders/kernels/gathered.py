"""Weighted sums of rows of a table on a CUDA device: a Triton kernel.

PyTorch's embedding-bag reads whole rows, most of them from the device's memory. Here a program sums `COLUMNS` columns
of one group, and the programs that run at the same time have the same columns, so that rows that several groups share
are in the cache: of 6,144 columns and 64 pairs a token, 7 TB/s on an H100, whose memory has 3. Rows are added in the
order of the pairs, so the result is the same in every run.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PAIRS, COLUMNS, WARPS = 4, 256, 2


def gathered_sums(
    table: Float[Tensor, "m N"],
    ids: Int[Tensor, " p"],
    starts: Int[Tensor, " n_1"],
    weights: Float[Tensor, " p"],
    out: Float[Tensor, "n N"],
) -> None:
    """`sparse.sum_rows` of a float32 table into `out`; entries of a row of both must be neighbours in memory."""
    n, N = out.shape
    if out.numel():
        kernel: Any = _sum
        with torch.cuda.device_of(table):
            kernel[(n, triton.cdiv(N, COLUMNS))](
                table, ids, starts, weights, out, N, table.stride(0), out.stride(0), PAIRS, COLUMNS, num_warps=WARPS
            )  # fmt: skip


@triton.jit
@no_type_check  # as in `tf32`
def _sum(
    table, ids, starts, weights, out, n_columns, table_row, out_row, PAIRS: tl.constexpr, COLUMNS: tl.constexpr  # pyright: ignore[reportMissingParameterType]
):  # fmt: skip
    # programs are started group by group, for one block of columns after the other
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_columns
    end = tl.load(starts + group + 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(tl.load(starts + group), end, PAIRS):
        at = first + tl.arange(0, PAIRS)
        row = tl.load(ids + at, mask=at < end, other=0).to(tl.int64)
        weight = tl.load(weights + at, mask=at < end, other=0.0)
        rows = tl.load(
            table + row[:, None] * table_row + columns[None, :], mask=(at < end)[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(rows * weight[:, None], axis=0)
    tl.store(out + group * out_row + columns, total, mask=inside)
