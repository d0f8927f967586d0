"""Load trained crosscoders from a folder, a release or the hub.

The files are in SAELens's layout, and `sae_lens.SAE` loads them as well; here they are checked before they are loaded
(`crosscoders.inspection`).
"""

from __future__ import annotations

from pathlib import Path

from crosslens.crosscoders import Crosscoder
from crosslens.crosscoders.checksums import CONFIG, WEIGHTS
from crosslens.crosscoders.inspection import inspect_config
from crosslens.crosscoders.loading import as_dtype, load
from crosslens.errors import UserError, check_inside, inside, shortened
from crosslens.sharing.importers import import_crosscoder
from crosslens.sharing.layouts import LAYOUTS
from crosslens.sharing.registry import Entry, Release, find_release, list_releases
from crosslens.sharing.repositories import check_repository, fetch


def from_pretrained(
    release: str, sae_id: str, device: str = "cpu", dtype: str = "float32", *, revision: str | None = None
) -> Crosscoder:
    """Load a crosscoder by its id from a release, a local folder or a repository on the hub.

    Args:
        release: name of a release (`crosslens ls releases`); a local folder; or a repository such as "someone/name".
        sae_id: id in the release; otherwise the subfolder that holds `cfg.json` and `sae_weights.safetensors`.
        device: torch device of the crosscoder.
        dtype: number format of the parameters, such as "float32" or "bfloat16".
        revision: branch, tag or commit of the repository; None for the release's own, or the main branch.

    Raises:
        UserError: no such release, id, folder, repository or revision, or files that contradict it or each other.
    """
    if release in list_releases():
        found = find_release(release)
        return _from_release(found, found.entry(sae_id), device, dtype, revision)
    if Path(release).is_dir():
        if revision is not None:
            raise UserError(f"{release} is a local folder and has no revision {revision!r}: leave it out")
        return load(inside(Path(release), sae_id, "id"), device, dtype)
    if "/" not in release:
        find_release(release)  # raises, and lists the releases
    return load(_download(check_repository(release), check_inside(sae_id, "id"), revision), device, dtype)


def _from_release(release: Release, entry: Entry, device: str, dtype: str, revision: str | None) -> Crosscoder:
    if release.repo_id is None:
        assert release.folder is not None
        if revision is not None:
            raise UserError(f"release {release.name!r} is a folder and has no revision {revision!r}: leave it out")
        place = release.folder if entry.path == "." else inside(release.folder, entry.path, "path")
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
                f"{entry.id} of release {release.name!r} has {key}={shortened(found)}, but the release says "
                f"{shortened(value)}: its files have changed; pin a revision"
            )
    return loaded


def _download(repo: str, path: str, revision: str | None, layout: str | None = None) -> Path:
    """Download a crosscoder and return its folder; its config is checked before the weights are downloaded."""
    names = [f"{path}/{CONFIG}", f"{path}/{WEIGHTS}"] if layout is None else LAYOUTS[layout].files(path)
    config = fetch(repo, names[0], revision)
    if layout is None:
        inspect_config(config)
    # from the same commit as the config: the branch may have moved since
    commit = config.parents[names[0].count("/")]
    fetch(repo, names[1], commit.name)
    return commit / path
