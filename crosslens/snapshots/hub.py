"""Files of the Hugging Face hub: fetched once, with patience, and given back when they are no longer needed.

1. A revision is resolved to the folder of its commit in the hub's own cache; files are fetched into it one by one.
2. The hub's client resumes what is cut off, and waits where it is told to; what it gives up is tried again here, with
   growing pauses, and then told in one line. It moves a file into the cache only when all of it has arrived.
3. The fingerprint of a commit's weights is kept beside them: a commit never changes, and its weights may have been
   given back.
4. `evict` deletes weights from the cache, but never a file that another revision shares.
"""

from __future__ import annotations

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

from crosslens.errors import UserError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in the order of preference; each may be split, with an index beside it."""

PAUSES = (1.0, 4.0, 16.0)
"""Seconds between the attempts to fetch a file."""

_NO_ANSWER: tuple[type[Exception], ...] = (
    hub_errors.HfHubHTTPError.__bases__[0],  # of the HTTP library below the client: httpx or requests, by its release
    OSError,
    hub_errors.HFValidationError,
    json.JSONDecodeError,  # somebody else answers: a proxy, or a page to log in
)
"""What the hub's client raises where there is no connection, no repository, or no hub at the other end."""


@functools.cache
def hub_folder(repo: str, revision: str) -> Path:
    """Folder of a revision's commit in the hub's cache, with config.json in it; looked up once per process.

    Raises:
        UserError: no such repository or revision (with the nearest that exist), gated, or not to be reached.
    """
    where = f"{repo}@{revision}"
    try:
        return _fetch(repo, "config.json", revision).parent
    except hub_errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: give one such as 'EleutherAI/pythia-14m'") from error
    except hub_errors.GatedRepoError as error:
        raise UserError(f"{where} is gated: accept its terms on huggingface.co, then run `hf auth login`") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no repository {repo!r} on the hub: check its spelling; if it is private, run `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        near = nearest_revisions(revision, list_revisions(repo))
        hint = f"the nearest are {' and '.join(near)}" if near else f"see https://huggingface.co/{repo}/tree/main"
        raise UserError(f"{repo} has no revision {revision!r}: {hint}") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise UserError(f"{where} is not in the local cache and {unreachable(repo, revision)}") from error
    except hub_errors.EntryNotFoundError as error:
        raise UserError(f"{where} has no config.json: choose a repository in the layout of transformers") from error


def hub_file(repo: str, commit: str, filename: str) -> Path | None:
    """A file of a commit, downloaded where it is not in the cache yet; None where the repository has none.

    Raises:
        UserError: it cannot be fetched.
    """
    cached = huggingface_hub.try_to_load_from_cache(repo, filename, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # the hub said earlier that this commit has no such file
        return None
    try:
        return _fetch(repo, filename, commit)
    except (hub_errors.EntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        return None


def _fetch(repo: str, filename: str, revision: str) -> Path:
    """`hf_hub_download`; what may pass by itself is tried again, what the hub has answered is raised at once."""
    for pause in (*PAUSES, None):
        try:
            return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision))
        except (
            hub_errors.HFValidationError,
            hub_errors.RepositoryNotFoundError,
            hub_errors.RevisionNotFoundError,
            hub_errors.OfflineModeIsEnabled,
            hub_errors.EntryNotFoundError,  # LocalEntryNotFoundError among them: no connection at all
        ):
            raise
        except Exception as error:
            # the client's transport (requests, httpx, ...) changes with its release, and so do its errors
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if pause is None or (400 <= status < 500 and status not in (408, 429)):
                tries = f"in {len(PAUSES) + 1} attempts " if pause is None else ""
                raise UserError(
                    f"{repo}@{revision}: {filename} could not be fetched {tries}({first_line(error)}): check the "
                    "connection and the disk, and run the same command again; nothing incomplete was kept as whole"
                ) from error
            time.sleep(pause)
    raise AssertionError("not reached")


def unreachable(repo: str, revision: str) -> str:
    """Why the hub does not answer, and the remedy, as the end of a message."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    return (
        f"{'HF_HUB_OFFLINE is set' if offline else 'the hub cannot be reached'}: "
        f"run `hf download {repo} --revision {revision}` once {'without it' if offline else 'with a connection'}"
    )


# ---------------------------------------------------------------------- revisions
@functools.cache
def list_revisions(repo: str) -> tuple[str, ...]:
    """Branches and tags of a repository by the hub's own list; those in the local cache where the hub is out of reach.

    Asked once per process.
    """
    try:
        refs = huggingface_hub.list_repo_refs(repo)
    except _NO_ANSWER:  # what follows tells the user if it matters
        root = _repository_folder(repo) / "refs"
        return tuple(sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()))
    return tuple(ref.name for ref in [*refs.branches, *refs.tags])


def nearest_revisions(revision: str, listed: Sequence[str]) -> list[str]:
    """At most two of the listed revisions, those nearest in number where they are numbered, else in spelling."""
    number = re.search(r"\d+", revision)
    numbered = [(match, name) for name in listed if (match := re.search(r"\d+", name))]
    if number and numbered:
        alike = [(m, name) for m, name in numbered if name[: m.start()] == revision[: number.start()]] or numbered
        ranked = sorted(alike, key=lambda pair: (abs(int(pair[0][0]) - int(number[0])), pair[1]))
        return [name for _, name in ranked[:2]]
    return difflib.get_close_matches(revision, listed, n=2, cutoff=0.3) or sorted(listed)[:2]


def is_on_disk(repo: str, revision: str) -> bool:
    """Whether the weights of a revision are in the hub's local cache; asks nobody."""
    names = [name for weights in WEIGHTS for name in (weights, f"{weights}.index.json")]
    return any(isinstance(huggingface_hub.try_to_load_from_cache(repo, n, revision=revision), str) for n in names)


def _repository_folder(repo: str) -> Path:
    return Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


# ---------------------------------------------------------------------- what is known of a commit
def recorded_fingerprint(repo: str, commit: str) -> str | None:
    """The fingerprint of a commit's weights, if it was ever computed here."""
    path = _notes(repo) / f"{commit}.sha256"
    return path.read_text().strip() if path.is_file() else None


def record_fingerprint(repo: str, commit: str, fingerprint: str) -> None:
    """Keep the fingerprint of a commit's weights."""
    _note(_notes(repo) / f"{commit}.sha256", fingerprint)


def mark_download(repo: str, commit: str) -> None:
    """Note, before the weights of a commit are downloaded, that it is done here: `evict` may delete them again."""
    _note(_notes(repo) / f"{commit}.downloaded", "")


def _notes(repo: str) -> Path:
    return _repository_folder(repo) / "crosslens"


def _note(path: Path, text: str) -> None:
    """Write a small file whole; a cache that cannot be written to is no reason to stop."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------- giving back
def evict(repo: str, commit: str) -> int:
    """Delete the weights of a commit from the hub's cache, and return the bytes that this freed.

    Only where `mark_download` was called for it: what others downloaded stays. So do configuration and tokenizer, and a
    file that another commit of the repository shares.
    """
    mark = _notes(repo) / f"{commit}.downloaded"
    if not mark.is_file():
        return 0
    snapshots = _repository_folder(repo) / "snapshots"
    doomed = [path for path in (snapshots / commit).glob("*") if path.name.startswith(_STEMS)]
    blobs = {path.resolve() for path in doomed if path.is_symlink()}
    freed = sum(path.stat().st_size for path in doomed if not path.is_symlink())
    for path in doomed:
        path.unlink()
    shared = {path.resolve() for path in snapshots.rglob("*") if path.is_symlink()}
    for blob in blobs - shared:
        if blob.is_file() and blob.is_relative_to(_repository_folder(repo).resolve()):
            freed += blob.stat().st_size
            blob.unlink()
    mark.unlink()
    return freed


_STEMS = ("model.", "model-", "pytorch_model.", "pytorch_model-")
