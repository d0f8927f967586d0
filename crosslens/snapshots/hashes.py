"""Checksums of weights that were computed before, remembered for other processes.

1. A checksum is remembered under the path, size and times of its files: if any of them changes, it is computed again.
2. The records are small files in the user's cache, not in the folders of the weights, which may belong to others.
3. Files that changed a moment ago are not remembered: a second change might leave the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

SMALLEST = 4 << 20
"""Bytes of weights below which hashing takes no time worth remembering."""

_SETTLED = 0.05  # seconds; a tick of the clock that stamps files is 10 ms at most ...
_SETTLED_COARSE = 2.1  # ... but some file systems count whole or even seconds


def cache_folder() -> Path:
    """The user's cache: $CROSSLENS_CACHE, else $XDG_CACHE_HOME/crosslens, else ~/.cache/crosslens."""
    if ours := os.environ.get("CROSSLENS_CACHE"):
        return Path(ours).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crosslens"


def remembered_hash(files: Sequence[Path]) -> str | None:
    """The checksum of these files, if it was computed before and they have not changed since."""
    try:
        found = json.loads(_record(files).read_text())
        # a record of an older release has no checksum, and one that is damaged another: it is computed again
        whole = found["checksum"] == _checksum(found["sha256"], found["files"])
        return str(found["sha256"]) if whole and found["files"] == _state(files) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remember_hash(files: Sequence[Path], sha256: str) -> None:
    """Remember the checksum of files for other processes; does nothing if the user's cache is not writable."""
    state, stats = _state(files), [path.stat() for path in files]
    times = [when for stat in stats for when in (stat.st_mtime_ns, stat.st_ctime_ns)]
    latest, coarse = max(times), all(when % 10**9 == 0 for when in times)
    if sum(stat.st_size for stat in stats) < SMALLEST:
        return
    if time.time_ns() - latest < (_SETTLED_COARSE if coarse else _SETTLED) * 1e9:
        return
    path = _record(files)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"sha256": sha256, "files": state, "checksum": _checksum(sha256, state)}))
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _checksum(sha256: str, state: list[list[str | int]]) -> str:
    return hashlib.sha256(json.dumps([sha256, state]).encode()).hexdigest()


def _record(files: Sequence[Path]) -> Path:
    names = "\n".join(str(path.resolve()) for path in files)
    return cache_folder() / "hashes" / f"{hashlib.sha256(names.encode()).hexdigest()}.json"


def _state(files: Sequence[Path]) -> list[list[str | int]]:
    """Path, size, and times of the last change of contents and of attributes, of every file."""
    rows: list[list[str | int]] = []
    for path in files:
        stat = path.stat()
        rows.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return rows
