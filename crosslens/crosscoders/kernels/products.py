"""Large dense products in a chosen precision, which is an argument of each product and never a setting of the process.

- "float32": the library's product.
- "bfloat16": operands rounded to bfloat16 (8 bits of mantissa), summed in float32; a CPU rounds the result, too.
- "tf32": operands rounded to TF32 (11 bits) by the tensor cores of a CUDA device, summed in float32. PyTorch allows
  TF32 for a whole process or not at all, and models run in other threads while a crosscoder trains; so this product is
  a kernel of its own, which needs Triton (PyTorch's CUDA builds bring it).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from crosslens.distributed.devices import Precision


def product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], precision: Precision = "float32") -> Float[Tensor, "m n"]:
    """`a @ b`, in the dtype of `a`."""
    if precision == "float32":
        return a @ b
    if precision == "tf32":
        from crosslens.crosscoders.kernels.tf32 import tf32_product  # Triton is optional

        return tf32_product(a, b)
    a, b, dtype = a.bfloat16(), b.bfloat16(), a.dtype
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a @ b).to(dtype)


def encoder_product(
    x: Float[Tensor, "... N"],
    W_enc: Float[Tensor, "N F"],
    b_enc: Float[Tensor, " F"],
    precision: Precision = "float32",
    out: Float[Tensor, "... F"] | None = None,
) -> Float[Tensor, "... F"]:
    """`h = x W_enc + b_enc`: the product in the given precision, the sum with the bias in that of `x`.

    `out` is where a product in float32 of x (B, N) may be written.
    """
    if precision == "float32":
        return linear(x, W_enc.T, b_enc) if out is None else torch.addmm(b_enc, x, W_enc, out=out)
    flat = product(x.reshape(-1, x.shape[-1]), W_enc, precision)
    return flat.add_(b_enc).view(*x.shape[:-1], -1)
