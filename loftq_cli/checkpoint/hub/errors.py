"""What goes wrong with the hub, its cache and the way there: each failure as one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from loftq_cli.errors import CorruptFileError, EnvironmentFailure, LoftqError


@contextmanager
def explained(
    repo_id: str,
    revision: str | None,
    name: str | None = None,
    *,
    place: Path | None = None,
    sending: bool = False,
) -> Iterator[None]:
    """Around what asks the hub or reads its cache, and nothing else: all of that block's errors
    become ``EnvironmentFailure``, or ``CorruptFileError`` if a file has the wrong size.
    ``place`` is where the file goes if not into the hub cache; ``sending`` is for uploads."""
    try:
        yield
    except LoftqError:  # such as a download that was given up
        raise
    except Exception as error:
        what = f"{name} of {repo_id}" if name else repo_id
        raise _explain(error, repo_id, revision, what, place, sending) from error


def _explain(
    error: BaseException,
    repo_id: str,
    revision: str | None,
    what: str,
    place: Path | None,
    sending: bool,
) -> LoftqError:
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{repo_id}"
    otherwise = "--offline uses what is in the hub cache"
    if sending:
        otherwise = "the same command goes on where it was"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        # The library fell back on the cache, in vain; why it had to is the cause.
        return _explain(error.__cause__, repo_id, revision, what, place, sending)
    if sending and type(error) is RuntimeError and error.__cause__ is not None:
        return _explain(error.__cause__, repo_id, revision, what, place, sending)
    if isinstance(error, GatedRepoError):  # before its base class, RepositoryNotFoundError
        return EnvironmentFailure(
            f"access to {repo_id} is gated: its licence has to be accepted first",
            hint=f"accept it at {page}, then log in with `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RepositoryNotFoundError):
        return EnvironmentFailure(
            f"{hub} has no model {repo_id}, or it is private and you have no access to it",
            hint="check the id; for a private model, log in with `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return EnvironmentFailure(
            f"{repo_id} has no revision {revision or 'main'!r}",
            hint=f"{page} lists the branches and tags",
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, what, otherwise)
    reason = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_disk(error, reason, what, place)
    if type(error) is OSError:  # how the library says that a file has the wrong size
        return CorruptFileError(f"{what} arrived damaged: {reason}", hint="run the command again")
    return EnvironmentFailure(
        f"{what} could not be {'sent to' if sending else 'read from'} {hub}: "
        f"{type(error).__name__}: {reason}",
        hint=f"check the connection and HF_ENDPOINT; {otherwise}",
    )


def _explain_disk(error: OSError, reason: str, what: str, place: Path | None) -> EnvironmentFailure:
    where = f"the hub cache {constants.HF_HUB_CACHE}" if place is None else str(place)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some (`hf cache` helps), or set HF_HOME to a larger disk"
        if place is not None:
            hint = "free some, or choose an --output on a larger disk"
        return EnvironmentFailure(f"no space left for {what} in {where}", hint=hint)
    hint = "set HF_HOME to a directory that can be written"
    if place is not None:
        hint = "choose an --output whose directory can be written"
    return EnvironmentFailure(f"cannot use {where}: {error.strerror or reason}", hint=hint)


def _explain_status(error: HfHubHTTPError, what: str, otherwise: str) -> EnvironmentFailure:
    status = error.response.status_code
    if status == 401:
        hint = "the token is missing or wrong: log in with `hf auth login`, or correct HF_TOKEN"
    elif status == 403:
        hint = "the token has no right to this; `hf auth whoami` says whose it is"
    elif status == 429:
        hint = "too many requests: wait some minutes, and log in for a higher limit"
    else:
        hint = f"try again later; {otherwise}"
    said = f": {' '.join(error.server_message.split())}" if error.server_message else ""
    return EnvironmentFailure(f"{constants.ENDPOINT} answered {status} for {what}{said}", hint=hint)
