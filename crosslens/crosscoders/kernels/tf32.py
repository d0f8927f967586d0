"""`a @ b` on the tensor cores of a CUDA device with operands in TF32: a Triton kernel.

PyTorch allows TF32 for a whole process or not at all, and models run in other threads while a crosscoder trains. One
program of the kernel computes a block of the result, `DEPTH` entries of the inner dimension at a time, so the order of
the sum is the same in every run.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

STAGES, WARPS = 3, 8
DEPTH, GROUP = tl.constexpr(32), tl.constexpr(8)


def tf32_product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """`a @ b` for float32 operands with any strides, rounded to TF32 and summed in float32.

    Tensor cores read 32-bit operands along the inner dimension. An operand that lies the other way is copied, which
    takes a tenth of the time that the product then saves.
    """
    (m, k), n = a.shape, b.shape[1]
    a, b = a if a.stride(1) == 1 else a.contiguous(), b if b.stride(0) == 1 else b.T.contiguous().T
    out = torch.empty(m, n, dtype=torch.float32, device=a.device)
    if out.numel():
        rows, columns = _block(a.device)
        grid = (triton.cdiv(m, rows) * triton.cdiv(n, columns),)
        kernel: Any = _multiply
        with torch.cuda.device_of(a):
            kernel[grid](
                a, b, out, m, n, k, *a.stride(), *b.stride(), rows, columns, num_stages=STAGES, num_warps=WARPS
            )  # fmt: skip
    return out


def _block(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a program's block: as much as the shared memory of a multiprocessor holds in all stages."""
    if device.type != "cuda":  # Triton's interpreter
        return 16, 32
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    return (128, 256) if shared >= 4 * STAGES * DEPTH.value * (128 + 256) else (128, 64)


@triton.jit
@no_type_check  # Triton compiles the source: tests must not wrap the function, nor may it have other annotations
def _multiply(
    a, b, out, m, n, k, a_row, a_column, b_row, b_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr  # pyright: ignore[reportMissingParameterType]
):  # fmt: skip
    # programs that run at the same time share GROUP blocks of rows, so that operands stay in the cache
    program, across = tl.program_id(0), tl.cdiv(n, COLUMNS)
    first = program // (GROUP * across) * GROUP
    height = min(tl.cdiv(m, ROWS) - first, GROUP)
    row = first + program % (GROUP * across) % height
    column = program % (GROUP * across) // height
    # 64 bits: a weight matrix can have more than 2**31 entries
    rows = (row * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (column * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    depth = tl.arange(0, DEPTH).to(tl.int64)
    at_a = a + (rows % m)[:, None] * a_row + depth[None, :] * a_column
    at_b = b + depth[:, None] * b_row + (columns % n)[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        x = tl.load(at_a, mask=depth[None, :] < k - start, other=0.0)
        y = tl.load(at_b, mask=depth[:, None] < k - start, other=0.0)
        total = tl.dot(x, y, total, input_precision="tf32")
        at_a += DEPTH * a_column
        at_b += DEPTH * b_row
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], total, mask=inside)
