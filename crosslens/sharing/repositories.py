"""Repositories of crosscoders on the hub: check names, download files, and turn the hub's refusals into `UserError`s.

Everything goes through `huggingface_hub`, with its cache, tokens, `HF_ENDPOINT` and `HF_HUB_OFFLINE`. Messages never
repeat a token.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from crosslens.errors import UserError, first_line, shortened
from crosslens.snapshots.hub import HTTP_ERROR, check_answer

_REVISION = re.compile(r"\w[\w./+-]*")
_TOKEN = re.compile(r"hf_\w{6,}")


def check_repository(repo: str) -> str:
    """Return `repo` if it is a valid repository name such as "someone/crosscoders".

    Raises:
        UserError: it is not.
    """
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        valid = False
    else:
        valid = repo.count("/") == 1
    if not valid:
        raise UserError(f"{shortened(repo)!r} is not a repository name: give one such as 'someone/name'")
    return repo


def check_revision(revision: str | None) -> str | None:
    """Return `revision` if it can be a branch, tag or commit, or is None for the main branch.

    Raises:
        UserError: it cannot.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UserError(f"revision {shortened(revision)!r} is not a branch, tag or commit: give one such as 'main'")
    return revision


def fetch(repo: str, filename: str, revision: str | None = None) -> Path:
    """Path of a repository's file in the local cache, downloaded if necessary.

    Raises:
        UserError: no such repository, revision or file, or the hub cannot be reached.
    """
    with explained(check_repository(repo), revision):
        check_answer(repo, filename, check_revision(revision) or "main")
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=check_revision(revision)))


@contextlib.contextmanager
def explained(repo: str, revision: str | None = None, writing: bool = False) -> Generator[None, None, None]:
    """Turn errors of the hub's client inside the block into `UserError`s."""
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
        raise UserError(f"{where} is not in the local cache, and {reason}: connect and try again") from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{where} lacks a file ({_said(error)}): check the id, which is a folder in the repository"
        ) from error
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(repo, where, error, writing)) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("no token for the hub was found: run `hf auth login`, or set HF_TOKEN") from error
    except RuntimeError as error:
        if not writing:
            raise
        # raised by the upload of a large file; its cause may hold a signed URL
        raise UserError(f"the upload to {where} failed ({_said(error)}): nothing was committed, try again") from error
    except (HTTP_ERROR, OSError) as error:
        raise UserError(f"the connection to the hub failed ({_said(error)}): try again") from error


def _refusal(repo: str, where: str, error: errors.HfHubHTTPError, writing: bool) -> str:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        # the hub's answer for repositories that do not exist, too
        absent = "" if writing else f"there is no repository {repo!r}, or "
        return f"{absent}the hub does not accept the token, which may have expired: run `hf auth login`"
    if status == 403:
        wanted = "write to" if writing else "read"
        return f"the token has no permission to {wanted} {where}: use one that has it, or a repository of your own"
    if status == 404:
        return f"there is no {where} on the hub: check its spelling; if it is private, run `hf auth login`"
    if status == 429:
        return "the hub is limiting requests: try again later"
    return f"the hub refused {where} with status {status} ({_said(error)}): try again later"


def _said(error: BaseException) -> str:
    return shortened(_TOKEN.sub("hf_...", first_line(error)))
