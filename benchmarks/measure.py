"""How the benchmarks measure: time in alternating rounds, the peak memory of a step, the machine, and the tables."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import multiprocessing
import platform
import re
import shlex
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

M_MMAP_THRESHOLD = -3  # glibc's number for mallopt


# ---------------------------------------------------------------------- time
@dataclass(frozen=True)
class Seconds:
    """A duration: CPU seconds of this process, and wall seconds."""

    cpu: float
    wall: float


def timed(call: Callable[[], Any], device: str) -> Seconds:
    """Seconds of one call, including the work of the device."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int, device: str
) -> dict[str, list[Seconds]]:
    """Time every call once per round, in rotating order; a call's `before`, if it has one, is not timed."""
    timings: dict[str, list[Seconds]] = {name: [] for name in calls}
    for i in range(-warm_up, rounds):
        for name in rotated(calls, i):
            getattr(calls[name], "before", lambda: None)()
            seconds = timed(calls[name], device)
            if i >= 0:
                timings[name].append(seconds)
    return timings


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def with_tf32(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A call with the library's own products in TF32, which PyTorch allows for a whole process or not at all."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return call(*arguments, **options)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rotated(names: Iterable[str], by: int) -> list[str]:
    """The names in another order every round, so that none always follows the same one."""
    ordered = list(names)
    first = by % len(ordered)
    return ordered[first:] + ordered[:first]


# ---------------------------------------------------------------------- memory
class LiveTensors(TorchDispatchMode):
    """Memory alive during a step, counted at every operation: deterministic, but blind to memory inside kernels.

    Attributes:
        peak_bytes: largest sum of the storages made since entry that were alive together; views count once.
        peak_bf: largest number of floating-point storages of B * F entries alive together.
        n_bsf: tensors of B * S * F entries made, of any type.
    """

    def __init__(self, S: int, F: int, B: int) -> None:
        super().__init__()
        self.bf = {(B, F), (F, B), (B * F,)}
        self.bsf = set() if S == 1 else {tuple(sorted((B, S, F))), tuple(sorted((B, S * F))), (B * S * F,)}
        self.alive: dict[int, tuple[weakref.ref[Any], bool]] = {}
        self.peak_bytes = self.peak_bf = self.n_bsf = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        inputs = {id(storage) for t in tree_leaves((args, kwargs)) for storage in storages(t)}
        out = func(*args, **(kwargs or {}))
        # the inputs are still alive; tensors that died before must not be counted with the outputs
        self.alive = {key: entry for key, entry in self.alive.items() if entry[0]() is not None}
        for tensor in tree_leaves(out):
            for storage in storages(tensor):
                shape = tuple(tensor.shape)
                if id(storage) in self.alive or id(storage) in inputs:
                    continue
                is_bf = shape in self.bf and tensor.is_floating_point() and tensor.layout == torch.strided
                self.n_bsf += tuple(sorted(shape)) in self.bsf
                self.alive[id(storage)] = (weakref.ref(storage), is_bf)
        held = [reference() for reference, _ in self.alive.values()]
        self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in held if storage is not None))
        self.peak_bf = max(self.peak_bf, sum(is_bf for _, is_bf in self.alive.values()))
        return out


def storages(value: Any) -> list[torch.UntypedStorage]:
    """The storages of a tensor; a sparse one has several."""
    if not isinstance(value, Tensor):
        return []
    if value.layout == torch.strided:
        return [value.untyped_storage()]
    if value.layout == torch.sparse_coo:
        parts = (value._indices(), value._values())
    else:
        parts = (value.crow_indices(), value.col_indices(), value.values())
    return [part.untyped_storage() for part in parts]


def step_memory(step: Callable[[], Any], shape: tuple[int, ...], device: str) -> dict[str, Any]:
    """Peak memory of one step above what is resident before it, by the kernel (or the CUDA allocator) and by tensors.

    Args:
        step: one training step, warmed up (the optimiser's state exists, gradients are freed), in a process that has
            called `return_freed_memory` at its start.
        shape: (S, D, F, B).
        device: of the step.

    Returns:
        `step_mb` (None where the system does not say), `tensors_mb`, `peak_bf`, `n_bsf`.
    """
    synchronise(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
        step()
        synchronise(device)
        after: int | None = torch.cuda.max_memory_allocated(device)
    else:
        before = reset_resident_peak()
        step()
        after = resident("VmHWM")
    S, _, F, B = shape
    with LiveTensors(S, F, B) as live:
        step()
    return {
        "step_mb": None if before is None or after is None else (after - before) / 1e6,
        "tensors_mb": live.peak_bytes / 1e6,
        "peak_bf": live.peak_bf,
        "n_bsf": live.n_bsf,
    }


def return_freed_memory() -> None:
    """Make glibc map every larger block separately, so that freed tensors leave the resident set at once."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)


def reset_resident_peak() -> int | None:
    """Reset the kernel's high-water mark of resident memory, and return the current value in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def resident(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a forked process, which frees its memory. The caller must not have run a backward pass."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------- machine, tables, reports
def machine(device: str) -> str:
    """The card, or the processor with its cores and vector instructions."""
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    cores = multiprocessing.cpu_count()
    return f"{model}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions(packages: Iterable[str]) -> str:
    named: list[str] = []
    for package in packages:
        try:
            named.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            named.append(f"{package} not installed")
    return ", ".join(named)


def markdown(rows: list[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> str:
    """A table with one line per row."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(show(row) for show in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


def number(key: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A column of `markdown`: a number of the row, or a dash."""

    def show(row: Mapping[str, Any]) -> str:
        return "-" if row.get(key) is None else format(row[key], form)

    return show


def write_report(
    name: str,
    title: str,
    body: str,
    device: str,
    threads: int,
    packages: Iterable[str],
    command: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Write a dated report with hardware, versions and command, under benchmarks/reports unless a folder is given."""
    where, today = machine(device), datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", where.split(",")[0].lower())).strip("-")
    path = (folder or Path(__file__).parent / "reports") / f"{today}-{name}-{slug}.md"
    path.parent.mkdir(exist_ok=True)
    # the folders of this machine say nothing to a reader
    given = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    command = command or shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *given])
    path.write_text(
        f"# {title}, {today}\n\n"
        f"- Machine: {where}; {threads} thread{'s' * (threads > 1)}.\n"
        f"- Versions: Python {platform.python_version()}, {versions(packages)}.\n"
        f"- Command: `{command}`\n\n{body}\n"
    )
    return path
