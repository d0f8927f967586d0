"""Run a function in several processes forked from the test, so that they share its fixtures and start at once."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

import crosslens.distributed.parallel
import crosslens.distributed.together


def run_ranks(world: int, folder: Path, body: Callable[[int], Any]) -> list[Any]:
    """The results of `body(rank)` in `world` processes with the environment that torchrun sets up.

    Args:
        world: number of processes.
        folder: for their results.
        body: called in each process; its result must survive `torch.save` and a weights-only load.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(_enter, (world, port, folder, body), nprocs=world, start_method="fork")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def _enter(rank: int, world: int, port: int, folder: Path, body: Callable[[int], Any]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    # so that a failing test ends
    crosslens.distributed.parallel.TIMEOUT = crosslens.distributed.together.TIMEOUT = timedelta(minutes=5)
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    try:
        torch.save(body(rank), folder / f"rank-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
