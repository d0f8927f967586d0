"""Every failure of a command in one line, with an exit code.

2  a mistake that the user can fix: an argument, a path, a file
3  the run failed: a loss that is not finite, or an error that nobody expected
4  the machine: a full or broken disk, too little memory, a device that fails

`--debug` shows the traceback besides.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from crosslens.errors import UserError, brief, half

USER, FAILED, MACHINE = 2, 3, 4
_MISTAKES = {
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "check the path: it is a folder",
    errno.EEXIST: "check the path: it is there already",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "check the links in the path",
}
_MACHINE = {
    errno.ENOSPC: "free some disk space, and repeat the command: it continues with what is complete",
    errno.EDQUOT: "free some of your disk quota, and repeat the command: it continues with what is complete",
    errno.EFBIG: "the file is larger than is allowed here: choose another disk, or raise the limit",
    errno.EROFS: "the file system is read-only: choose another one",
    errno.EIO: "the disk or the network file system failed: check it, and repeat the command",
    errno.ENOMEM: "see `crosslens plan` for the memory that it takes",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|failed to|unable to) allocate|bad_alloc|mmap.*failed", re.IGNORECASE
)
_DEVICE = re.compile(r"\b(CUDA|cuBLAS|cuDNN|NCCL|MPS)\b.*(error|failure)|no CUDA", re.IGNORECASE | re.DOTALL)


def explain(error: BaseException) -> tuple[str, int]:
    """What happened in one line, with a remedy, and the exit code.

    Libraries wrap the errors of the system in their own, so the causes of an error count, too.
    """
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause), USER
        if isinstance(cause, UnicodeEncodeError) and "surrogates" in cause.reason:  # of an argument or a file
            return half(cause), USER
        if isinstance(cause, FloatingPointError):
            return str(cause), FAILED
        if isinstance(cause, MemoryError) or _NO_MEMORY.search(str(cause)):
            return (
                f"out of memory ({brief(cause)}); `crosslens plan` says what takes it, and a smaller --batch-size or "
                "--d-sae, --adam-moments bfloat16 and more processes need less"
            ), MACHINE
        number = _number(cause)
        if number in _MACHINE or number in _MISTAKES:
            name = getattr(cause, "filename", None)
            where = f"{name}: " if isinstance(name, str | os.PathLike) else ""
            remedy, code = (_MACHINE[number], MACHINE) if number in _MACHINE else (_MISTAKES[number], USER)
            return f"{where}{os.strerror(number)}; {remedy}", code
        if _DEVICE.search(str(cause)):
            return f"the device failed ({brief(cause)}); check it, or use --device cpu", MACHINE
    said = f"{type(error).__name__}: {brief(error)}" if str(error).strip() else type(error).__name__
    return f"failed unexpectedly ({said}); repeat the command with --debug for the traceback, and report it", FAILED


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it, also within those that gather the errors of several processes."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [one.__cause__, one.__context__]
        gathered = getattr(one, "failures", None)  # of torch.distributed.checkpoint
        if isinstance(gathered, dict):
            left += [found[0] for found in gathered.values() if isinstance(found, tuple) and found]


def _number(error: BaseException) -> int:
    """The system's number of an error, 0 if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # of libraries in other languages
    found = re.search(r"(?:\bos error |\[[Ee]rrno |\bOs \{ code: )(\d+)\b", str(error))
    return int(found[1]) if found else 0
