"""Dense products in each precision, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from crosslens.crosscoders.kernels.products import encoder_product, product
from crosslens.distributed.devices import choose_precision
from crosslens.errors import UserError
from crosslens.training.config import TrainConfig

SHAPES = [(5, 7, 3), (33, 40, 70), (64, 100, 96), (1, 1, 1), (0, 3, 4), (3, 0, 4)]
LAYOUTS = {"row-major": lambda x: x.contiguous(), "column-major": lambda x: x.T.contiguous().T}

kernels_are_left_alone = pytest.mark.skipif(
    Version(version("jaxtyping")) < Version("0.3.11"),
    reason="in tests jaxtyping wraps functions that are marked no_type_check, which Triton cannot compile",
)


def operands(m: int, k: int, n: int, of_a: str, of_b: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(m + k)
    a, b = torch.randn(m, k, generator=draw), torch.randn(k, n, generator=draw)
    return LAYOUTS[of_a](a), LAYOUTS[of_b](b)


def slow_product(a: Tensor, b: Tensor) -> Tensor:
    entries = [
        [sum((x * y for x, y in zip(row, column, strict=True)), 0.0) for column in b.T.tolist()] for row in a.tolist()
    ]
    return torch.tensor(entries, dtype=torch.float64).view(len(a), b.shape[1])


@pytest.mark.parametrize(("of_a", "of_b"), [(a, b) for a in LAYOUTS for b in LAYOUTS])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_any_layout(shape: tuple[int, int, int], of_a: str, of_b: str):
    a, b = operands(*shape, of_a, of_b)
    exact = slow_product(a, b)
    torch.testing.assert_close(product(a, b).double(), exact, rtol=1e-5, atol=1e-5)
    rounded = slow_product(a.bfloat16().float(), b.bfloat16().float())
    found = product(a, b, "bfloat16")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), rounded, rtol=2**-8, atol=1e-5)  # the result is rounded, too


@pytest.mark.exhaustive
@kernels_are_left_alone
def test_the_kernels_in_the_interpreter():
    """Triton's interpreter runs kernels on a CPU, without rounding; it must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    program = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from jaxtyping import install_import_hook
install_import_hook("crosslens", "beartype.beartype")  # as in pytest: it must leave the kernels alone
from crosscoders.test_products import LAYOUTS, SHAPES, operands
import torch
from crosslens.crosscoders.kernels.products import product
from crosslens.crosscoders.kernels.sparse import sum_rows
from crosslens.crosscoders.kernels.gathered import gathered_sums
for shape, of_a, of_b in itertools.product(SHAPES, LAYOUTS, LAYOUTS):
    a, b = operands(*shape, of_a, of_b)
    torch.testing.assert_close(product(a, b, "tf32"), a @ b, rtol=1e-5, atol=1e-5)
    print(*shape)
for n, m, p, columns in [(5, 7, 40, 3), (3, 9, 0, 70), (1, 1, 1, 300), (6, 4, 33, 600)]:
    draw = torch.Generator().manual_seed(n)
    inner = torch.randint(p + 1, (n - 1,), generator=draw).sort().values
    starts = torch.cat([torch.tensor([0]), inner, torch.tensor([p])])
    ids, weights = torch.randint(m, (p,), generator=draw), torch.randn(p, generator=draw)
    table, out = torch.randn(m, columns, generator=draw), torch.full((n, 2, columns), torch.nan)
    expected = torch.stack([weights[a:b] @ table[ids[a:b]] for a, b in zip(starts[:-1], starts[1:])])
    alone = torch.full((n, columns), torch.nan)
    for found in (alone, out[:, 1]):
        gathered_sums(table, ids, starts, weights, found)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sum_rows(table, ids, starts, weights), found, rtol=1e-5, atol=1e-5)
    assert out[:, 0].isnan().all()
    print("sums", n)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 * len(SHAPES) + 4


@kernels_are_left_alone
@pytest.mark.parametrize(("capability", "columns"), [(80, 256), (86, 64), (90, 256)])
def test_the_tf32_kernel_compiles_without_a_gpu(capability: int, columns: int):
    """To machine code whose tensor cores multiply TF32, with the shared memory that `_block` counts on."""
    triton = pytest.importorskip("triton")
    kernels = pytest.importorskip("crosslens.crosscoders.kernels.tf32")
    pointers, sizes = dict.fromkeys(("a", "b", "out"), "*fp32"), dict.fromkeys(("ROWS", "COLUMNS"), "constexpr")
    signature = {name: {**pointers, **sizes}.get(name, "i32") for name in kernels._multiply.arg_names}
    source = triton.compiler.ASTSource(kernels._multiply, signature, {"ROWS": 128, "COLUMNS": columns})
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_stages": kernels.STAGES, "num_warps": kernels.WARPS}
    compiled = triton.compile(source, target=target, options=options)
    assert "tf32.tf32" in compiled.asm["ptx"] and compiled.asm["cubin"]
    assert compiled.metadata.shared <= 4 * kernels.STAGES * kernels.DEPTH.value * (128 + columns)


@kernels_are_left_alone
@pytest.mark.parametrize("capability", [80, 90])
def test_the_sums_of_rows_compile_without_a_gpu(capability: int):
    """To loads of four numbers at a time, and sums within a thread: no shared memory."""
    triton = pytest.importorskip("triton")
    kernels = pytest.importorskip("crosslens.crosscoders.kernels.gathered")
    kinds = dict.fromkeys(("table", "weights", "out"), "*fp32") | dict.fromkeys(("ids", "starts"), "*i64")
    kinds |= dict.fromkeys(("PAIRS", "COLUMNS"), "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernels._sum.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if not name.isupper()}
    constants = {"PAIRS": kernels.PAIRS, "COLUMNS": kernels.COLUMNS}
    source = triton.compiler.ASTSource(kernels._sum, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
    assert compiled.asm["cubin"] and "ld.global.v4" in compiled.asm["ptx"]
    assert compiled.metadata.shared == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pre_activations_of_any_leading_shape(precision: str):
    draw = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(*shape, generator=draw) for shape in ((2, 3, 8), (8, 5), (5,)))
    h = encoder_product(x, W, bias, precision)  # type: ignore[arg-type]
    assert h.shape == (2, 3, 5)
    torch.testing.assert_close(h, x @ W + bias, rtol=0.02, atol=0.1 if precision == "bfloat16" else 1e-5)


def test_the_device_and_triton_decide_the_precision(monkeypatch: pytest.MonkeyPatch):
    assert choose_precision(None, "cpu") == "float32"
    assert choose_precision(None, "cuda:1") == "tf32"  # Triton is installed with the test dependencies
    assert choose_precision("bfloat16", "cpu") == "bfloat16"
    for ask in (lambda: choose_precision("tf32", "cpu"), lambda: TrainConfig(precision="tf32", device="cpu")):
        with pytest.raises(UserError, match="precision='tf32' needs a CUDA device, not device='cpu'; use 'float32'"):
            ask()
    with pytest.raises(UserError, match="precision='float8' is unknown; use 'float32', 'tf32', 'bfloat16', or None"):
        choose_precision("float8", "cpu")
    monkeypatch.setattr("crosslens.distributed.devices.find_spec", lambda _: None)
    assert choose_precision(None, "cuda:1") == "float32"
    with pytest.raises(UserError, match=r"precision='tf32' needs Triton \(pip install triton\); use 'float32'"):
        choose_precision("tf32", "cuda")
