"""The device that a computation runs on, its memory, and the precision of its large products."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from crosslens.config import Precision
from crosslens.errors import UserError, shortened

GPU_FILES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # on Linux: NVIDIA, Jetson, AMD, WSL


def find_assumed_device() -> str:
    """cuda where there may be a GPU: torch, which knows, takes seconds to import."""
    return "cpu" if sys.platform == "linux" and not any(map(os.path.exists, GPU_FILES)) else "cuda"


def check_device(device: str | None) -> None:
    """Refuse a CUDA device that is not in this machine; torch is asked only if there may be a GPU.

    Raises:
        UserError: there is none, or none of this number.
    """
    if device is None or not device.startswith("cuda"):
        return
    count = 0
    if find_assumed_device() != "cpu":
        import torch

        count = torch.cuda.device_count()
    if not count:
        raise UserError(f"--device {device!r} needs CUDA, which is not available here: use --device cpu")
    if int(device.partition(":")[2] or 0) >= count:
        raise UserError(f"--device {device!r} does not exist: there are {count} GPUs, from cuda:0")


def find_device() -> str:
    """`"cuda"` if torch can use it, else `"cpu"`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


_NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, and number of processes, as torchrun sets them; 0 and 1 for a single one.

    Raises:
        UserError: they are no such numbers.
    """
    found: dict[str, int] = {}
    for name, least in _NUMBERS.items():
        text = os.environ.get(name, str(least))
        if not text.isdecimal() or not least <= int(text) < 2**20:
            raise UserError(
                f"{name}={shortened(repr(text))} is in the environment, and is no number from {least}: unset it"
            )
        found[name] = int(text)
    if found["RANK"] >= found["WORLD_SIZE"]:
        raise UserError(
            f"RANK={found['RANK']} in the environment does not fit WORLD_SIZE={found['WORLD_SIZE']}: unset both, or "
            "start the processes with torchrun, which sets them"
        )
    return found["RANK"], found["WORLD_SIZE"]


def check_launcher() -> None:
    """Refuse processes that would wait for others that nobody has started.

    Raises:
        UserError: WORLD_SIZE is set, and not what torchrun sets beside it.
    """
    world = rank_and_world()[1]
    if world > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        raise UserError(
            f"WORLD_SIZE={world} is in the environment, but nothing has started {world} processes (RANK, MASTER_ADDR "
            "or MASTER_PORT is missing): use torchrun, or unset WORLD_SIZE and RANK"
        )


def is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return rank_and_world()[0] == 0


def own_device(device: str) -> str:
    """`device`, with "cuda" replaced by the GPU of this process's local rank if torchrun started it."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def model_memory(device: str) -> int:
    """Bytes that the models of all snapshots may take on a device together: half of its memory.

    The other half is for activations and a crosscoder. On the CPU the limit of the process's control group counts, and
    processes that torchrun started on this machine share it.
    """
    import torch

    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory // 2
    rank_and_world()  # refuses what are no numbers
    total = _host_memory()
    return total // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _host_memory() -> int:
    """Physical memory of this machine in bytes, or the limit of the control group."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        total = 4 << 30
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdecimal():
            return min(total, int(text))
    return total


@cache
def has_triton() -> bool:
    """Whether there is a CUDA device, and Triton to compile kernels for it: not on Windows, for example."""
    import torch

    return find_spec("triton") is not None and torch.cuda.is_available()


def choose_precision(precision: str | None, device: str) -> Precision:
    """The precision of large products on a device; None chooses tf32 on CUDA if Triton is installed, else float32.

    Raises:
        UserError: an unknown precision, or tf32 without CUDA or Triton.
    """
    cuda, triton = device.startswith("cuda"), find_spec("triton") is not None
    if precision is None:
        return "tf32" if cuda and triton else "float32"
    known: dict[str, Precision] = {name: name for name in get_args(Precision)}
    if precision not in known:
        names = ", ".join(map(repr, known))
        raise UserError(f"precision={precision!r} is unknown; use {names}, or None to choose by the device")
    if precision == "tf32" and not (cuda and triton):
        missing = "Triton (pip install triton)" if cuda else f"a CUDA device, not device={device!r}"
        raise UserError(f"precision='tf32' needs {missing}; use 'float32' or 'bfloat16'")
    return known[precision]
