"""What defines a model, and checksums of weights that were computed before, remembered for other processes.

A model is its weights (`Snapshot.fingerprint`), the entries of its configuration as transformers loads it
(`config_entries`), and, where text goes in, its tokenizer (`tokenizer_digest`). Caches, runs and crosscoders record the
three, beside dtype, attention and backend. Those of version 0.2 have the fingerprint of the weights alone, and other
releases of transformers and tokenizers name some entries otherwise: what both sides have is compared
(`changed_entry`, `changed_tokenizer`).

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
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

SMALLEST = 4 << 20
"""Bytes of weights below which hashing takes no time worth remembering."""

_SETTLED = 0.05  # seconds; a tick of the clock that stamps files is 10 ms at most ...
_SETTLED_COARSE = 2.1  # ... but some file systems count whole or even seconds


# entries that depend on the release of transformers, on training or on generation: the computation is the same
_IRRELEVANT = {
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "is_decoder"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "slow_but_exact", "output_attentions"),
    *("output_hidden_states", "chunk_size_feed_forward", "problem_type", "id2label", "label2id"),
}


def config_entries(config: Any) -> dict[str, Any]:
    """The entries of a configuration of transformers that decide what the model computes, in types of JSON."""
    found, kind = config.to_dict(), type(config)
    try:
        known = kind().to_dict().keys()
    except Exception:  # of code that a repository brings, which may need arguments
        known = found.keys()
    if kind.__name__ in ("PretrainedConfig", "PreTrainedConfig"):  # made for a HookedTransformer
        known = found.keys()
    # entries unknown to transformers come from older releases and have no effect
    kept = {key: value for key, value in found.items() if key in known and key not in _IRRELEVANT}
    return json.loads(json.dumps(kept, default=str))


def changed_entry(recorded: Any, given: Sequence[Mapping[str, Any]]) -> tuple[str, Any, Any] | None:
    """The first entry of configurations that both sides have, and that differs: its name and both values.

    Args:
        recorded: as `given`, at an earlier time; None if they were not recorded.
        given: entries of the models, or of one for all of them.
    """
    if not isinstance(recorded, list) or not recorded:
        return None
    pairs = max(len(recorded), len(given))
    for i in range(pairs):
        before, now = recorded[min(i, len(recorded) - 1)], given[min(i, len(given) - 1)]
        if not isinstance(before, dict):
            continue
        for key in sorted(before.keys() & now.keys()):
            if before[key] != now[key]:
                return key, before[key], now[key]
    return None


def tokenizer_definition(tokenizer: Any) -> str | None:
    """A hash of a fast tokenizer's definition, without the state that a call leaves in it; None for a slow one."""
    import xxhash

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    defined = json.loads(backend.to_str())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return xxhash.xxh3_128_hexdigest(json.dumps([{**defined, "truncation": None, "padding": None}, special]).encode())


def tokenizer_digest(tokenizer: Any) -> str:
    """What a tokenizer does with text: a hash, after the release of `tokenizers` that wrote out the definition."""
    defined = tokenizer_definition(tokenizer)
    if defined is None:
        words = json.dumps(sorted(tokenizer.get_vocab().items()))
        return f"vocabulary:{hashlib.sha256(words.encode()).hexdigest()[:32]}"
    return f"{'.'.join(version('tokenizers').split('.')[:2])}:{defined}"


def changed_tokenizer(recorded: Any, given: str) -> bool:
    """Whether a tokenizer is another than that with the digest `recorded`; False if that cannot be said."""
    if not isinstance(recorded, str) or recorded.partition(":")[0] != given.partition(":")[0]:
        return False
    return recorded != given


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
