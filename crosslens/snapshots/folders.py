"""Where snapshots are: a folder whose sub-folders are snapshots, or a place for each of them.

The sub-folders are found by name, or listed in a `snapshots.json`. A place is a model, or a model and an adapter that
is merged into it (`model+adapter`); each of the two is a folder in the layout of transformers or peft, or
`owner/name[/folder][@revision]` on the hub. Whatever is read here becomes `Snapshot`s, and nothing else in the package
knows of how places are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crosslens.config import LARGEST
from crosslens.errors import UserError, brief, read_json, shortened
from crosslens.snapshots.hub import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    WEIGHTS,
    is_on_disk,
    list_folders,
    list_repositories,
    list_revisions,
    nearest_names,
    split_name,
    split_place,
)

if TYPE_CHECKING:
    from crosslens.snapshots.families import Model
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
    """A snapshot for each label and place; steps are those that labels such as step128 name, if all do.

    Raises:
        UserError: no places, a revision of a folder, a folder that does not exist or holds no model or adapter, no
            tokenizer, or a name that no repository can have.
    """
    rows = check_places(places)
    return [
        make_snapshot(label, step, None, place)
        for (label, place), step in zip(rows.items(), steps_of([*rows]), strict=True)
    ]


def make_snapshot(
    label: str, step: int | None, tokens: int | None, place: Place, repository: str | None = None
) -> Snapshot:
    """The snapshot in a place; its tokenizer is there, in a folder above it, or in another `repository`.

    Raises:
        UserError: a folder without a tokenizer.
    """
    from crosslens.snapshots.snapshot import Snapshot

    folder = Path(place.name)
    tokenizer = _local_tokenizer(folder, folder.parent) if place.revision is None else None
    return Snapshot(label, step, tokens, place.name, place.revision, tokenizer, repository, adapter=place.adapter)


def check_places(places: Mapping[str, str | Path]) -> dict[str, Place]:
    """The place of each label; nothing is looked up on the hub.

    Raises:
        UserError: as in `read_places`, except that a tokenizer is not looked for.
    """
    if not isinstance(places, Mapping) or not places:
        raise UserError(
            f"{shortened(places)!r} gives no models: give labels and places, such as "
            '{"base": "google/gemma-2-2b", "chat": "folder"}'
        )
    found: dict[str, Place] = {}
    for label, place in places.items():
        if not isinstance(label, str) or not isinstance(place, str | Path):
            raise UserError(f"{label!r}: {shortened(place)!r} is not a place: give labels and places as strings")
        try:
            found[label] = parse_place(place)
        except UserError as error:
            raise UserError(f"snapshot {label!r}: {error}") from error
    return found


class Place(NamedTuple):
    """Where a model is."""

    name: str
    """A folder, or `owner/name` on the hub, perhaps with a folder in the repository."""
    revision: str | None
    """Of a repository; None for a folder."""
    adapter: str | None = None
    """An absolute folder, or `owner/name[/folder]@revision` on the hub; None without one."""

    def is_on_disk(self) -> bool:
        """Whether the weights are on this disk; needs no connection."""
        parts: list[tuple[str, str | None, tuple[str, ...]]] = [(self.name, self.revision, WEIGHTS)]
        if self.adapter is not None:
            parts.append((*split_place(self.adapter), ADAPTER_WEIGHTS))
        return all(revision is None or is_on_disk(name, revision, weights) for name, revision, weights in parts)


def parse_place(place: str | Path) -> Place:
    """Read `model` or `model+adapter`, where each is a folder or `owner/name[/folder][@revision]`.

    Raises:
        UserError: a folder without a model or adapter, a revision of a folder, or what is neither a folder nor the name
            of a repository.
    """
    model, plus, adapter = str(place).partition("+")
    if not plus or Path(place).expanduser().is_dir():
        return Place(*_parse_part(place, CONFIG))
    name, revision = _parse_part(adapter, ADAPTER_CONFIG)
    return Place(*_parse_part(model, CONFIG), name if revision is None else f"{name}@{revision}")


def _parse_part(place: str | Path, config: str) -> tuple[str, str | None]:
    """A folder and None, or the name of a repository, perhaps with a folder in it, and a revision."""
    repository, at, revision = str(place).partition("@")
    folder = Path(place).expanduser()
    if folder.is_dir():
        if not (folder / config).is_file():
            raise UserError(f"{place} has no {config}: {_hint(folder, config)}")
        return str(folder.resolve()), None
    if at and Path(repository).expanduser().is_dir():
        raise UserError(
            f"{repository!r} is a local folder, which has no revision {revision!r}: give the folder of that snapshot, "
            "or work in a directory without a folder of that name"
        )
    first = repository.split("/")[0]
    if (
        isinstance(place, Path)
        or not _REPOSITORY.fullmatch(str(place))
        or (repository.count("/") > 1 and Path(first).is_dir())
    ):
        listed = (
            [path.as_posix() for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        )
        near = nearest_names(str(place), listed)
        hint = f"the nearest are {' and '.join(near)}" if near else "give a folder, 'org/model' or 'org/model@revision'"
        raise UserError(f"there is no folder {str(place)!r}, and it is no name of a repository: {hint}")
    return repository, revision or "main"


_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*(@.+)?")


def _hint(folder: Path, config: str) -> str:
    """What a folder holds instead of a model or an adapter, and what to do."""
    if config == ADAPTER_CONFIG:
        return "give the folder of an adapter as peft saves it"
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG, "config of an adapter").get("base_model_name_or_path")
        return f"it holds an adapter, so give its model, too: {base or 'model'}+{folder}"
    hint = "; for all snapshots in its sub-folders use Snapshots.local" if _has_runs(folder) else ""
    return f"give a model in the layout of transformers{hint}"


def _has_runs(folder: Path) -> bool:
    return (folder / "snapshots.json").is_file() or any(folder.glob("step*/config.json"))


def list_model(model: Model) -> tuple[str, ...]:
    """What there is to stand in the place of `{}`: revisions of a repository, folders in it, repositories of an owner,
    or local folders.

    Args:
        model: whose `where` and first pattern say what is looked for.
    """
    pattern = next(iter(model.patterns.values()))
    before, _, after = model.where.partition("{}")
    part = before.rsplit("+", 1)[-1]
    config = ADAPTER_CONFIG if "+" in before else CONFIG
    if part.endswith("@"):
        return list_revisions(part[:-1])
    root = Path(part).expanduser()
    if part and root.is_dir():
        found = root.glob(re.sub(r"\{.*?\}", "*", pattern))
        return tuple(sorted(path.relative_to(root).as_posix() for path in found if (path / config).is_file()))
    if part:
        inside = split_name(part)[1]
        folders = list_folders(part, after.partition("+")[0].removeprefix("@") or "main", config)
        return tuple(name.removeprefix(inside) for name in folders)
    owner, _, name = pattern.partition("/")
    return list_repositories(owner, name.partition("{")[0])
