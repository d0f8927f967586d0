"""The device that a computation runs on."""

from __future__ import annotations

import os


def find_device() -> str:
    """`"cuda"` if torch can use it, else `"cpu"`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device(device: str) -> str:
    """`device`, with "cuda" replaced by the GPU of this process's local rank if torchrun started it."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
