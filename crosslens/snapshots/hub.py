"""Files from the Hugging Face hub: downloaded once, retried on failure, and evicted when no longer needed.

1. A revision is resolved to the folder of its commit in the hub's cache; files are downloaded into it one by one.
2. The hub's client resumes interrupted downloads, honours rate limits, and moves a file into the cache only when it is
   complete. When the client gives up, the download is retried with growing pauses, then reported in one line.
3. The fingerprint of a commit's weights is recorded next to them: a commit never changes, but its weights may be
   evicted. Before a download, the hub's own checksums tell equal files apart from different ones.
4. `evict` deletes weights from the cache, but never a file that another revision shares.

`repo` is `owner/name`, or `owner/name/folder` for a model in a folder of a repository: every file is then one of that
folder, and so are the records beside the cache.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from crosslens.errors import UserError, first_line, shortened

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in the order of preference; each may be split, with an index beside it."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"

PAUSES = (1.0, 4.0, 16.0)
"""Seconds between attempts to download a file."""

HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
"""Base of the errors of the HTTP library below the hub's client: requests, httpx or httpx2, depending on its release.
The client has no public name for it; `tests/snapshots/test_hub.py` checks that a failed connection raises it."""

_NO_ANSWER: tuple[type[Exception], ...] = (
    HTTP_ERROR,
    OSError,
    hub_errors.HFValidationError,
    json.JSONDecodeError,  # a proxy or a login page answers instead of the hub
)
"""What the hub's client raises without a connection, a repository, or a hub at the other end."""


def split_name(repo: str) -> tuple[str, str]:
    """`owner/name/folder/in/it` as `owner/name` and the folder, which may be empty."""
    parts = repo.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def split_place(place: str) -> tuple[str, str | None]:
    """An absolute folder and None; or a repository, perhaps with a folder in it, and its revision."""
    name, at, revision = place.rpartition("@")
    return (name, revision) if at and not Path(place).is_absolute() else (place, None)


def _within(repo: str, filename: str) -> tuple[str, str]:
    """A repository, and the name that a file has in it."""
    repository, folder = split_name(repo)
    return repository, f"{folder}/{filename}" if folder else filename


@functools.cache
def hub_folder(repo: str, revision: str, config: str = CONFIG) -> Path:
    """Folder of a revision's commit in the hub's cache, or a folder in it, containing `config`; looked up once per
    process.

    Raises:
        UserError: no such repository, revision or folder (the nearest are named), gated, or unreachable.
    """
    where = f"{repo}@{revision}"
    repository, folder = split_name(repo)
    if folder and not all(part.strip(".") for part in folder.split("/")):  # would lead out of the cache
        raise UserError(f"{repo!r} is not the name of a folder in a repository: give one such as org/model/checkpoints")
    try:
        return _fetch(repo, config, revision).parent
    except hub_errors.HFValidationError as error:
        raise UserError(
            f"{repository!r} is not the name of a repository: give one such as 'EleutherAI/pythia-14m'"
        ) from error
    except hub_errors.GatedRepoError as error:
        raise UserError(f"{where} is gated: accept its terms on huggingface.co, then run `hf auth login`") from error
    except hub_errors.RepositoryNotFoundError as error:
        near = nearest_names(repository, list_repositories(repository.split("/")[0]))
        hint = f"the nearest are {' and '.join(near)}" if near else "check its spelling"
        raise UserError(
            f"there is no repository {repository!r} on the hub: {hint}; if it is private, run `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        near = nearest_names(revision, list_revisions(repo))
        hint = f"the nearest are {' and '.join(near)}" if near else f"see https://huggingface.co/{repository}/tree/main"
        raise UserError(f"{repository} has no revision {revision!r}: {hint}") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise UserError(f"{where} is not in the local cache and {unreachable(repository, revision)}") from error
    except hub_errors.EntryNotFoundError as error:
        near = nearest_names(folder, list_folders(repository, revision, config))
        hint = f"the nearest folders with one are {' and '.join(near)}" if near else "none of its folders has one"
        what = f"folder {folder!r} with a {config}" if folder else config
        raise UserError(f"{repository}@{revision} has no {what}: {hint}") from error


def commit_of(repo: str, folder: Path) -> str:
    """The commit that `hub_folder` found."""
    depth = len(Path(split_name(repo)[1]).parts)
    return [folder, *folder.parents][depth].name


def hub_file(repo: str, commit: str, filename: str) -> Path | None:
    """A file of a commit, downloaded unless it is in the cache; None if the repository does not have it.

    Raises:
        UserError: the download failed.
    """
    cached = huggingface_hub.try_to_load_from_cache(*_within(repo, filename), revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # the cache records that this commit has no such file
        return None
    try:
        return _fetch(repo, filename, commit)
    except (hub_errors.EntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        return None


def weight_etags(repo: str, commit: str, weights: Sequence[str] = WEIGHTS) -> tuple[str, ...] | None:
    """The hub's checksums of the files of a commit's weights: equal files have equal ones, whatever their names.

    Asks the hub for what is not in the cache, and downloads no weights. None if it does not answer, or has no weights.
    """
    try:
        for filename in weights:
            if single := _etag(repo, commit, filename):
                return (single,)
            if index := hub_file(repo, commit, f"{filename}.index.json"):
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                found = [_etag(repo, commit, name) for name in sorted(names)]
                return None if None in found else tuple(etag for etag in found if etag)
    except (*_NO_ANSWER, UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _etag(repo: str, commit: str, filename: str) -> str | None:
    cached = huggingface_hub.try_to_load_from_cache(*_within(repo, filename), revision=commit)
    if isinstance(cached, str):
        return Path(cached).resolve().name if Path(cached).is_symlink() else None
    if cached is not None:  # the cache records that this commit has no such file
        return None
    try:
        return huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, filename, revision=commit)).etag
    except hub_errors.EntryNotFoundError:
        return None


def _fetch(repo: str, filename: str, revision: str) -> Path:
    """`hf_hub_download` with retries; an answer from the hub, such as "not found", is raised at once."""
    repo, filename = _within(repo, filename)
    for pause in (*PAUSES, None):
        try:
            check_answer(repo, filename, revision)
            return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision))
        except UserError:
            raise
        except (
            hub_errors.HFValidationError,
            hub_errors.RepositoryNotFoundError,
            hub_errors.RevisionNotFoundError,
            hub_errors.OfflineModeIsEnabled,
            hub_errors.EntryNotFoundError,  # LocalEntryNotFoundError among them: no connection at all
        ):
            raise
        except Exception as error:
            # the errors depend on the client's HTTP library
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if pause is None or (400 <= status < 500 and status not in (408, 429)):
                tries = f"in {len(PAUSES) + 1} attempts " if pause is None else ""
                raise UserError(
                    f"{repo}@{revision}: {filename} could not be downloaded {tries}({first_line(error)}): check the "
                    "connection and the disk, and run the same command again; no incomplete file was kept"
                ) from error
            time.sleep(pause)
    raise AssertionError("not reached")


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_answer(repo: str, filename: str, revision: str) -> None:
    """Refuse a hub whose answers would lead out of its cache: the client makes folders and files of their names.

    Raises:
        UserError: the checksum of the file, or the commit, has characters that they cannot have.
    """
    url = huggingface_hub.hf_hub_url(repo, filename, revision=revision)
    try:
        found = huggingface_hub.get_hf_file_metadata(url)
    except Exception:  # the download that follows says what is wrong
        return
    for what, name in (("checksum", found.etag), ("commit", found.commit_hash)):
        if name is not None and not _NAME.fullmatch(name):
            raise UserError(
                f"{repo}@{revision}: the hub at {huggingface_hub.constants.ENDPOINT} gives {shortened(repr(name))} as "
                f"the {what} of {filename}, which is none: nothing was downloaded; check HF_ENDPOINT"
            )


def unreachable(repo: str, revision: str) -> str:
    """End of a message: why the hub does not answer, and the remedy."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    return (
        f"{'HF_HUB_OFFLINE is set' if offline else 'the hub cannot be reached'}: "
        f"run `hf download {repo} --revision {revision}` once {'without it' if offline else 'with a connection'}"
    )


@functools.cache
def list_revisions(repo: str) -> tuple[str, ...]:
    """Branches and tags of a repository on the hub, or in the local cache if the hub is unreachable.

    Looked up once per process.
    """
    repo, _ = split_name(repo)
    try:
        refs = huggingface_hub.list_repo_refs(repo)
    except _NO_ANSWER:  # if the revision is needed, downloading it raises the error
        root = _repository_folder(repo) / "refs"
        return tuple(sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()))
    return tuple(ref.name for ref in [*refs.branches, *refs.tags])


@functools.cache
def list_folders(repo: str, revision: str, config: str = CONFIG) -> tuple[str, ...]:
    """Folders of a repository, at any depth, that have a file `config`; of the local cache if the hub is unreachable.

    Looked up once per process.
    """
    repo, _ = split_name(repo)
    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision)
    except _NO_ANSWER:
        ref = _repository_folder(repo) / "refs" / revision
        root = _repository_folder(repo) / "snapshots" / (ref.read_text() if ref.is_file() else revision)
        files = [path.relative_to(root).as_posix() for path in root.rglob(config)]
    return tuple(sorted(name.removesuffix(f"/{config}") for name in files if name.endswith(f"/{config}")))


@functools.cache
def list_repositories(owner: str, prefix: str = "") -> tuple[str, ...]:
    """Repositories of an owner whose names begin with `prefix`; of the local cache if the hub is unreachable.

    Looked up once per process.
    """
    try:
        found = [model.id for model in huggingface_hub.list_models(author=owner, search=prefix or None, limit=1000)]
    except _NO_ANSWER:
        cached = Path(huggingface_hub.constants.HF_HUB_CACHE).glob(f"models--{owner}--*")
        found = [path.name.removeprefix("models--").replace("--", "/", 1) for path in cached]
    return tuple(sorted(name for name in found if name.startswith(f"{owner}/{prefix}")))


def nearest_names(wanted: str, listed: Sequence[str]) -> list[str]:
    """At most two of the listed names: nearest in their numbers if they are spelt alike, else in spelling."""
    parts = re.split(r"(\d+)", wanted)
    numbers = [int(part) for part in parts[1::2]]
    ranked: list[tuple[list[int], str]] = []
    for name in listed if numbers else ():
        found = re.split(r"(\d+)", name)
        if found[: len(parts) - 1 : 2] == parts[:-1:2]:
            there = [int(part) for part in found[1 : len(parts) : 2]]
            ranked.append(([abs(a - b) for a, b in zip(numbers, there, strict=False)], name))
    if ranked:
        return [name for _, name in sorted(ranked)[:2]]
    return difflib.get_close_matches(wanted, listed, n=2, cutoff=0.3) or sorted(listed)[:2]


def is_on_disk(repo: str, revision: str, weights: Sequence[str] = WEIGHTS) -> bool:
    """Whether the weights of a revision are in the hub's local cache; needs no connection."""
    files = [_within(repo, name) for file in weights for name in (file, f"{file}.index.json")]
    return any(isinstance(huggingface_hub.try_to_load_from_cache(*f, revision=revision), str) for f in files)


def _repository_folder(repo: str) -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def recorded_fingerprint(repo: str, commit: str) -> str | None:
    """The fingerprint of a commit's weights, if it was computed before."""
    return next(iter(_recorded(repo, commit)), None)


def recorded_dtype(repo: str, commit: str) -> str | None:
    """The dtype of a commit's weights, if it was recorded."""
    return next(iter(_recorded(repo, commit)[1:]), None)


def _recorded(repo: str, commit: str) -> list[str]:
    """Fingerprint and dtype of a commit's weights; older releases recorded the first only."""
    path = _notes(repo, commit, "sha256")
    return path.read_text().split() if path.is_file() else []


def record_fingerprint(repo: str, commit: str, fingerprint: str, dtype: str) -> None:
    """Record the fingerprint of a commit's weights, and the dtype that they are stored in."""
    _note(_notes(repo, commit, "sha256"), f"{fingerprint} {dtype}")


def mark_download(repo: str, commit: str) -> None:
    """Record that crosslens is about to download the weights of a commit, so `evict` may delete them."""
    _note(_notes(repo, commit, "downloaded"), "")


def _notes(repo: str, commit: str, kind: str) -> Path:
    repository, folder = split_name(repo)
    name = ".".join([commit, *([folder.replace("/", "--")] if folder else ()), kind])
    return _repository_folder(repository) / "crosslens" / name


def _note(path: Path, text: str) -> None:
    """Write a small file atomically; ignore a cache that is not writable."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def evict(repo: str, commit: str) -> int:
    """Delete the weights of a commit from the hub's cache, and return the number of bytes freed.

    Only weights that `mark_download` recorded are deleted. Configuration and tokenizer stay, and so does a file that
    another commit of the repository shares. (The hub client's own `delete_revisions` deletes whole revisions.)
    """
    mark = _notes(repo, commit, "downloaded")
    if not mark.is_file():
        return 0
    repository, folder = split_name(repo)
    snapshots = _repository_folder(repository) / "snapshots"
    doomed = [path for path in (snapshots / commit / folder).glob("*") if path.name.startswith(_STEMS)]
    blobs = {path.resolve() for path in doomed if path.is_symlink()}
    freed = sum(path.stat().st_size for path in doomed if not path.is_symlink())
    for path in doomed:
        path.unlink(missing_ok=True)  # another process may be evicting them, too
    shared = {path.resolve() for path in snapshots.rglob("*") if path.is_symlink()}
    for blob in blobs - shared:
        if blob.is_file() and blob.is_relative_to(_repository_folder(repository).resolve()):
            freed += blob.stat().st_size
            blob.unlink(missing_ok=True)
    mark.unlink(missing_ok=True)
    return freed


_STEMS = ("model.", "model-", "pytorch_model.", "pytorch_model-", "adapter_model.")
