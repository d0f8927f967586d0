"""Where snapshots are: a folder whose sub-folders are snapshots, or a folder or repository for each of them.

The sub-folders are found by name, or listed in a `snapshots.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslens.config import LARGEST
from crosslens.errors import UserError, brief, shortened

if TYPE_CHECKING:
    from crosslens.snapshots.snapshot import Snapshot


def read_run(root: Path) -> tuple[str, list[Snapshot]]:
    """Name and snapshots of a local run, in the order of training.

    Raises:
        UserError: no such folder, nothing in it, a folder without a model, or no tokenizer.
    """
    from crosslens.snapshots.snapshot import Snapshot  # imports torch, which listing folders does not need

    name, rows = read_rows(root)
    snapshots: list[Snapshot] = []
    for row in rows:
        path = root / row["path"]
        tokenizer = _local_tokenizer(path, root)
        snapshots.append(Snapshot(row["label"], row["step"], row["tokens"], str(path), None, tokenizer))
        snapshots[-1].folder()
    return name, snapshots


def read_rows(root: Path) -> tuple[str, list[dict[str, Any]]]:
    """Name of a local run, and label, path, step and tokens of its snapshots, in the order of training.

    Raises:
        UserError: no such folder, no snapshots in it, or a damaged manifest.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: give one with sub-folders step0, step1000, ...")
    manifest = root / "snapshots.json"
    return _read_manifest(manifest) if manifest.is_file() else (root.name, _step_folders(root))


def _read_manifest(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Name and rows (label, path, step, tokens) of a `snapshots.json`."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = [
            {"label": row["label"], "path": row["path"], "step": row.get("step"), "tokens": row.get("tokens")}
            for row in manifest["snapshots"]
        ]
        if not rows:
            raise ValueError("it lists none")
        for row in rows:
            if not (isinstance(row["label"], str) and isinstance(row["path"], str)):
                raise TypeError("label and path are strings")
            if any(type(row[key]) not in (int, type(None)) for key in ("step", "tokens")):
                raise TypeError("step and tokens are whole numbers")
            if any(abs(row[key] or 0) > LARGEST for key in ("step", "tokens")):
                raise ValueError(f"a step is more than {LARGEST:,}")
            (path.parent / row["path"]).is_dir()  # raises what a path of this length or with these characters raises
        return str(manifest.get("name", path.parent.name)), rows
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} is not a manifest of snapshots ({type(error).__name__}: {brief(error)}): write "
            '{"snapshots": [{"label": "start", "path": "folder", "step": 0, "tokens": 0}, ...]}'
        ) from error


def steps_of(labels: Sequence[str]) -> list[int | None]:
    """The steps that labels such as step128 or checkpoint-500 name; of none if not of all."""
    found = [re.fullmatch(r"(?:step|checkpoint)[-_ ]?(\d{1,15})", label) for label in labels]
    return [int(each[1]) if each and all(found) else None for each in found]


def _step_folders(root: Path) -> list[dict[str, Any]]:
    """Rows as in a manifest for the sub-folders `stepN`, or else `checkpoint-N` (of a transformers.Trainer), by N."""
    names, found = [path.name for path in root.iterdir() if path.is_dir()], list[tuple[int, str]]()
    for pattern in (r"step(\d{1,15})", r"checkpoint-(\d{1,15})"):
        matches = [re.fullmatch(pattern, name) for name in names]
        found = found or sorted((int(match[1]), match[0]) for match in matches if match)
    if not found:
        hint = " (it holds a single model)" if (root / "config.json").is_file() else ""
        raise UserError(
            f"{root} has no sub-folders step0, step1000, ... and no snapshots.json{hint}: name the folders of the "
            "snapshots after their steps, as step1000 or checkpoint-1000, or list them in "
            '{"snapshots": [{"label": ..., "path": ...}, ...]}'
        )
    return [{"label": name, "path": name, "step": step, "tokens": None} for step, name in found]


def _local_tokenizer(folder: Path, root: Path) -> str:
    """Folder of a local snapshot's tokenizer: its own, `tokenizer/` or the root."""
    from crosslens.snapshots.snapshot import tokenizer_files

    for candidate in (folder, root / "tokenizer", root):
        if tokenizer_files(candidate):
            return str(candidate)
    raise UserError(f"there is no tokenizer in {folder}, {root / 'tokenizer'} or {root}: put one into any of them")


def read_places(places: Mapping[str, str | Path]) -> list[Snapshot]:
    """A snapshot for each label and place: a folder, or a repository with an optional `@revision` (else `@main`).

    Raises:
        UserError: no places, a revision of a folder, a folder that does not exist or holds no model, no tokenizer, or
            a name that no repository can have.
    """
    from crosslens.snapshots.snapshot import Snapshot

    rows = check_places(places)
    snapshots: list[Snapshot] = []
    for label, (name, revision) in rows.items():
        tokenizer = _local_tokenizer(Path(name), Path(name).parent) if revision is None else None
        snapshots.append(Snapshot(label, None, None, name, revision, tokenizer))
    return snapshots


def check_places(places: Mapping[str, str | Path]) -> dict[str, tuple[str, str | None]]:
    """For each label a folder and None, or a repository and a revision; nothing is looked up on the hub.

    Raises:
        UserError: as in `read_places`, except that a tokenizer is not looked for.
    """
    if not isinstance(places, Mapping) or not places:
        raise UserError(
            f"{shortened(places)!r} gives no models: give labels and places, such as "
            '{"base": "google/gemma-2-2b", "chat": "folder"}'
        )
    found: dict[str, tuple[str, str | None]] = {}
    for label, place in places.items():
        if not isinstance(label, str) or not isinstance(place, str | Path):
            raise UserError(f"{label!r}: {shortened(place)!r} is not a place: give labels and places as strings")
        repository, at, revision = str(place).partition("@")
        folder = Path(place).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                hint = "; for all snapshots in its sub-folders use Snapshots.local" if _has_runs(folder) else ""
                raise UserError(
                    f"snapshot {label!r}: {place} has no config.json: give a model in the layout of transformers{hint}"
                )
            found[label] = str(folder.resolve()), None
        elif at and Path(repository).expanduser().is_dir():
            raise UserError(
                f"snapshot {label!r}: {repository!r} is a local folder, which has no revision {revision!r}: give the "
                "folder of that snapshot, or work in a directory without a folder of that name"
            )
        elif isinstance(place, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@.+)?", place):
            raise UserError(
                f"snapshot {label!r}: there is no folder {str(place)!r}, and it is no name of a repository: give a "
                "folder, 'org/model' or 'org/model@revision'"
            )
        else:
            found[label] = repository, revision or "main"
    return found


def _has_runs(folder: Path) -> bool:
    return (folder / "snapshots.json").is_file() or any(folder.glob("step*/config.json"))
