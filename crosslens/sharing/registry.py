"""Releases by name: where their crosscoders are, which snapshots they were trained on, and how good they should be.

A registry is a YAML file in the style of SAELens's `pretrained_saes.yaml`. The package's own is read first, then the
files in the environment variable CROSSLENS_REGISTRY (separated as in PATH), then those given to `register_release`.

    name-of-the-release:
      model: pythia-160m                  # name used in tables
      repo_id: someone/repository         # on the hub; or folder: a path relative to the registry
      revision: v1                        # of the repository; default: the main branch
      conversion_func: openmoss           # one of crosslens.sharing.layouts; default: crosslens's own
      licence: MIT
      dataset: what it was trained on
      snapshots:                          # folder: path; or
        repo_id: EleutherAI/pythia-160m
        revisions: [step0, step1000]      # optional: steps, tokens, labels
        trained: [step1000]               # labels of those that the crosscoders were trained on; default: all
      saes:
      - id: blocks.6.hook_resid_post      # the id to pass to from_pretrained
        path: blocks.6.hook_resid_post    # folder in the repository, . for the repository itself
        hook_name: blocks.6.hook_resid_post
        variance_explained: 0.91          # expected on held-out tokens, like l0
        l0: 64.2
        config: {architecture: batchtopk_crosscoder, d_sae: 98304, n_snapshots: 32}
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslens.errors import UserError, check_inside, did_you_mean, inside, read_yaml, shortened
from crosslens.sharing.repositories import check_repository, check_revision

if TYPE_CHECKING:
    from crosslens.snapshots.collection import Snapshots

EMBEDDED = Path(__file__).parent / "pretrained.yaml"
VARIABLE = "CROSSLENS_REGISTRY"

_RELEASE_KEYS = {
    "model": str,
    "repo_id": str,
    "folder": str,
    "revision": str,
    "conversion_func": str,
    "licence": str,
    "dataset": str,
    "snapshots": dict,
    "saes": list,
}
_ENTRY_KEYS = {
    "id": str,
    "path": str,
    "hook_name": str,
    "variance_explained": (int, float),
    "l0": (int, float),
    "config": dict,
    "neuronpedia": str,
}
_SNAPSHOT_KEYS = {"folder": str, "repo_id": str, "revisions": list, "steps": list, "tokens": list, "labels": list,
                  "trained": list}  # fmt: skip
_registered: dict[str, Release] = {}


@dataclass(frozen=True)
class Entry:
    """One crosscoder of a release.

    Attributes:
        id: the id to pass to `from_pretrained`.
        path: its folder, relative to the repository or the release's folder.
        hook_name: TransformerLens name of the hook point.
        variance_explained: expected on held-out tokens, mean over snapshots; None if unknown.
        l0: expected number of active features per token; None if unknown.
        config: values that its cfg.json must have.
    """

    id: str
    path: str
    hook_name: str | None = None
    variance_explained: float | None = None
    l0: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Release:
    """Crosscoders that are published together.

    Attributes:
        name: name of the release.
        model: the model whose snapshots they were trained on.
        repo_id: repository on the hub; None for a folder.
        folder: local folder; None for a repository.
        revision: revision of the repository.
        layout: layout of another project to convert from; None for crosslens's own.
        licence: licence of the weights.
        dataset: text they were trained on.
        snapshots: where the snapshots are.
        entries: the crosscoders, by id.
    """

    name: str
    model: str
    repo_id: str | None
    folder: Path | None
    revision: str | None
    layout: str | None
    licence: str | None
    dataset: str | None
    snapshots: Mapping[str, Any] | None
    entries: Mapping[str, Entry]

    @property
    def place(self) -> str:
        """Where the crosscoders are, in words."""
        if self.repo_id is None:
            return "in this package" if self.folder and EMBEDDED.parent in self.folder.parents else "local"
        return self.repo_id + (f" at {self.revision}" if self.revision else "")

    def entry(self, sae_id: str) -> Entry:
        """The crosscoder with this id.

        Raises:
            UserError: there is none.
        """
        if sae_id not in self.entries:
            raise UserError(
                f"release {self.name!r} has no {shortened(sae_id)!r}: it has {', '.join(self.entries)}"
                f"{did_you_mean(sae_id, self.entries)}"
            )
        return self.entries[sae_id]


def register_release(path: str | Path) -> list[str]:
    """Add the releases in a YAML file for the rest of this process; `CROSSLENS_REGISTRY` adds them to every process.

    Args:
        path: a file in the schema shown in this module's docstring; folders in it are relative to the file.

    Returns:
        Names of the releases in the file.

    Raises:
        UserError: the file is not a registry, or a different release has the same name.
    """
    found = read_registry(Path(path))
    _registered.update(_new(_registered | _listed(), found, Path(path)))
    return list(found)


def list_releases() -> dict[str, Release]:
    """All releases by name: the package's, those in `CROSSLENS_REGISTRY`, and those registered.

    Raises:
        UserError: a file in `CROSSLENS_REGISTRY` is not a registry.
    """
    return _listed() | _registered


def load_snapshots(release: str, *, every: bool = False) -> Snapshots:
    """The snapshots that the crosscoders of a release were trained on.

    Args:
        release: name of a release; `crosslens ls releases` lists them.
        every: also those that they were not trained on, such as the untrained model, for controls.

    Raises:
        UserError: no such release, or it does not say where its snapshots are, or names some that are not there.
    """
    from crosslens.snapshots.collection import Snapshots  # imports torch, which listing releases does without

    found = find_release(release)
    where = found.snapshots
    if where is None:
        raise UserError(f"release {release!r} does not say where its snapshots are: see {found.model}")
    if "folder" in where:
        snapshots = Snapshots.local(where["folder"])
    else:
        named = {key: where[key] for key in ("steps", "tokens", "labels") if key in where}
        snapshots = Snapshots.from_hub(where["repo_id"], where["revisions"], **named)
    if every or "trained" not in where:
        return snapshots
    if missing := [label for label in where["trained"] if label not in snapshots.labels]:
        raise UserError(
            f"release {release!r} was trained on {missing[0]!r}, which is not among its snapshots "
            f"{', '.join(snapshots.labels)}: correct `trained` in its registry"
        )
    return snapshots[where["trained"]]


def find_release(name: str) -> Release:
    """The release with this name.

    Raises:
        UserError: there is none; the message lists them.
    """
    releases = list_releases()
    if name not in releases:
        raise UserError(
            f"there is no release {shortened(name)!r}: there are {', '.join(releases)}{did_you_mean(name, releases)}"
        )
    return releases[name]


def read_registry(path: Path) -> dict[str, Release]:
    """Read the releases in one file.

    Raises:
        UserError: the file is not a registry; the message names the file, release and key.
    """
    path = path.expanduser()
    return {str(name): _release(path, name, value) for name, value in read_yaml(path, "registry of releases").items()}


def _listed() -> dict[str, Release]:
    releases = dict(_read_once(EMBEDDED, EMBEDDED.stat().st_mtime_ns))
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{VARIABLE} names {path}, which does not exist: correct or unset it")
        releases |= _new(releases, _read_once(path, path.stat().st_mtime_ns), path)
    return releases


@functools.cache
def _read_once(path: Path, changed: int) -> dict[str, Release]:
    del changed  # only part of the cache key
    return read_registry(path)


def _new(known: Mapping[str, Release], found: dict[str, Release], path: Path) -> dict[str, Release]:
    """Return `found` if none of its releases contradicts a known one."""
    for name, release in found.items():
        if known.get(name, release) != release:
            raise UserError(f"{path} has a release {name!r}, but a different one has that name already: rename it")
    return found


def _release(path: Path, name: Any, value: Any) -> Release:
    where = f"{path}: release {shortened(name)!r}"
    if not isinstance(name, str) or not check_inside(name, f"{path}: release") or "/" in name:
        raise UserError(f"{where} must have a name without '/', which marks a repository")
    _check_keys(where, value, _RELEASE_KEYS, ("model", "saes"))
    if ("repo_id" in value) == ("folder" in value):
        raise UserError(f"{where} must have either a repo_id, on the hub, or a folder, relative to the file")
    if (layout := value.get("conversion_func")) is not None:
        from crosslens.sharing.layouts import LAYOUTS  # which need torch

        if layout not in LAYOUTS:
            raise UserError(f"{where}: conversion_func {layout!r} is not one of {', '.join(LAYOUTS)}")
    entries = [_entry(where, sae) for sae in value["saes"]]
    ids = [entry.id for entry in entries]
    if not ids or len(set(ids)) < len(ids):
        raise UserError(f"{where} must list at least one crosscoder under saes, with distinct ids")
    return Release(
        name=name,
        model=value["model"],
        repo_id=check_repository(value["repo_id"]) if "repo_id" in value else None,
        folder=inside(path.parent, value["folder"], f"{where}: folder") if "folder" in value else None,
        revision=check_revision(value.get("revision")),
        layout=layout,
        licence=value.get("licence"),
        dataset=value.get("dataset"),
        snapshots=_snapshots(path, where, value.get("snapshots")),
        entries=dict(zip(ids, entries, strict=True)),
    )


def _entry(where: str, value: Any) -> Entry:
    where = f"{where}, saes"
    _check_keys(where, value, _ENTRY_KEYS, ("id", "path"))
    if value["path"] != ".":  # the repository itself
        check_inside(value["path"], f"{where}: path")
    if not all(isinstance(key, str) for key in value.get("config", {})):
        raise UserError(f"{where}: the keys of config must be field names such as d_sae")
    for key in ("variance_explained", "l0"):
        if key in value and not math.isfinite(value[key]):
            raise UserError(f"{where}: {key}={value[key]} is not a finite number")
    return Entry(**{key: entry for key, entry in value.items() if key != "neuronpedia"})


def _snapshots(path: Path, where: str, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    where = f"{where}, snapshots"
    _check_keys(where, value, _SNAPSHOT_KEYS, ())
    if "folder" in value:
        return {**value, "folder": inside(path.parent, value["folder"], f"{where}: folder")}
    if not ("repo_id" in value and value.get("revisions")):
        raise UserError(f"{where} must have a folder, or a repo_id and revisions")
    check_repository(value["repo_id"])
    kinds: dict[str, type] = {"revisions": str, "labels": str, "steps": int, "tokens": int}
    for key, kind in kinds.items():
        values = value.get(key, [])
        if any(type(item) is not kind for item in values) or (key in value and len(values) != len(value["revisions"])):
            raise UserError(f"{where}: {key} must list one {kind.__name__} per revision")
    for revision in value["revisions"]:
        check_revision(revision)
    return dict(value)


def _check_keys(where: str, value: Any, known: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} is a {type(value).__name__}, but must be a mapping")
    for key in needed:
        if key not in value:
            raise UserError(f"{where} lacks {key}")
    for key, item in value.items():
        if key not in known:
            raise UserError(f"{where} has an unknown key {shortened(key)!r}{did_you_mean(key, known)}")
        if isinstance(item, bool) or not isinstance(item, known[key]):
            raise UserError(f"{where}: {key}={shortened(repr(item))} has the wrong type ({type(item).__name__})")
