"""Trained crosscoders from a folder, a release or the hub, looked at before they are loaded.

The files are SAELens's, and `sae_lens.SAE` loads them as well; here they are inspected first (`inspection`).
"""

from __future__ import annotations

from pathlib import Path

from crosslens.crosscoders import Crosscoder
from crosslens.crosscoders.inspection import (
    CONFIG,
    WEIGHTS,
    check_inside,
    inside,
    inspect_config,
)
from crosslens.crosscoders.loading import as_dtype, load
from crosslens.errors import UserError, shortened
from crosslens.sharing.importers import import_crosscoder, layout_files
from crosslens.sharing.registry import Entry, Release, find_release, list_releases
from crosslens.sharing.repositories import check_repository, fetch


def from_pretrained(
    release: str, sae_id: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None
) -> Crosscoder:
    """A crosscoder of a release, of a local folder, or of a repository on the hub, by its id.

    Args:
        release: name of a release (`crosslens ls releases`); a local folder; or a repository such as "someone/name".
        sae_id: of the release; else the folder below it, with `cfg.json` and `sae_weights.safetensors` in it.
        device: where to put it.
        dtype: of the parameters.
        revision: branch, tag or commit of the repository; that of the release, or the main branch, when None.

    Raises:
        UserError: no such release, id, folder, repository or revision; files that do not fit it, or each other.
    """
    if release in list_releases():
        found = find_release(release)
        return _from_release(found, found.entry(sae_id), device, dtype, revision)
    if Path(release).is_dir():
        if revision is not None:
            raise UserError(f"{release} is a local folder, which has no revision {revision!r}: leave it out")
        return load(inside(Path(release), sae_id, "id"), device, dtype)
    if "/" not in release:
        find_release(release)  # tells which there are
    return load(_download(check_repository(release), check_inside(sae_id, "id"), revision), device, dtype)


def _from_release(release: Release, entry: Entry, device: str, dtype: str, revision: str | None) -> Crosscoder:
    if release.repo_id is None:
        assert release.folder is not None
        if revision is not None:
            raise UserError(f"release {release.name!r} is a folder, which has no revision {revision!r}: leave it out")
        place = inside(release.folder, entry.path, "path")
    else:
        place = _download(release.repo_id, entry.path, revision or release.revision, release.layout)
    if release.layout is None:
        loaded = load(place, device, dtype)
    else:
        loaded = import_crosscoder(place, release.layout).to(device=device, dtype=as_dtype(dtype))
    for key, value in entry.config.items():
        found = loaded.cfg.architecture() if key == "architecture" else getattr(loaded.cfg, key, None)
        if found != value:
            raise UserError(
                f"{entry.id} of release {release.name!r} has {key}={shortened(found)}, where the release says "
                f"{shortened(value)}: its files have changed; pin a revision"
            )
    return loaded


def _download(repo: str, path: str, revision: str | None, layout: str | None = None) -> Path:
    """Where a crosscoder is in the hub's cache; its config is inspected before its weights are fetched."""
    names = [f"{path}/{CONFIG}", f"{path}/{WEIGHTS}"] if layout is None else layout_files(layout, path)
    config = fetch(repo, names[0], revision)
    if layout is None:
        inspect_config(config)
    # of the commit that the config is of: a branch may have moved on in between
    commit = config.parents[names[0].count("/")]
    fetch(repo, names[1], commit.name)
    return commit / path
