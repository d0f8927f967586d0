"""Repositories of crosscoders on the hub: names, files, and what the hub refuses, in one line.

Everything goes through `huggingface_hub`, so that its cache, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and its tokens hold here
too. No message repeats a token.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from crosslens.errors import UserError, first_line, shortened

# what the HTTP library below huggingface_hub raises: httpx or requests, by its release
_HTTP: type[Exception] = errors.HfHubHTTPError.__bases__[0]
_REVISION = re.compile(r"\w[\w./+-]*")
_TOKEN = re.compile(r"hf_\w{6,}")


def check_repository(repo: str) -> str:
    """`repo`, the name of a repository such as "someone/crosscoders".

    Raises:
        UserError: it is none.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except errors.HFValidationError:
        valid = False
    else:
        valid = repo.count("/") == 1
    if not valid:
        raise UserError(f"{shortened(repo)!r} is no name of a repository: give one such as 'someone/name'")
    return repo


def check_revision(revision: str | None) -> str | None:
    """`revision`, a branch, tag or commit, or None for the main branch.

    Raises:
        UserError: it is none.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UserError(f"revision {shortened(revision)!r} is no branch, tag or commit: give one such as 'main'")
    return revision


def fetch(repo: str, filename: str, revision: str | None = None) -> Path:
    """A file of a repository in the hub's cache, downloaded where it is not there yet.

    Raises:
        UserError: there is no such repository, revision or file, or the hub cannot be reached.
    """
    with explained(check_repository(repo), revision):
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=check_revision(revision)))


@contextlib.contextmanager
def explained(repo: str, revision: str | None = None, writing: bool = False) -> Generator[None, None, None]:
    """What the hub refuses inside, told as a `UserError`."""
    where = repo if revision is None else f"{repo} at {revision}"
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"{where} is gated: accept its terms on the hub, then run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision!r}: see its branches and tags on the hub") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{where} is not in the local cache, and {reason}: try again with a connection") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{where} lacks a file ({_said(error)}): check the id, a folder of the repository") from error
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(repo, where, error, writing)) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN") from error
    except RuntimeError as error:
        if not writing:
            raise
        # of the upload of one large file; what it came of may hold a signed address
        raise UserError(f"the upload to {where} broke ({_said(error)}): nothing was committed, run it again") from error
    except (_HTTP, OSError) as error:
        raise UserError(f"the connection to the hub broke ({_said(error)}): try again") from error


def _refusal(repo: str, where: str, error: errors.HfHubHTTPError, writing: bool) -> str:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        # the hub answers so for repositories that do not exist, too
        absent = "" if writing else f"there is no repository {repo!r}, or "
        return f"{absent}the hub does not accept the token, which may have expired: run `hf auth login`"
    if status == 403:
        wanted = "write to" if writing else "read"
        return f"the token may not {wanted} {where}: use one with that right, or a repository of your own"
    if status == 404:
        return f"there is no {where} on the hub: check its spelling; if it is private, run `hf auth login`"
    if status == 429:
        return "the hub asks to wait (too many requests): try again later"
    return f"the hub refused {where} with status {status} ({_said(error)}): try again later"


def _said(error: BaseException) -> str:
    return shortened(_TOKEN.sub("hf_...", first_line(error)))
