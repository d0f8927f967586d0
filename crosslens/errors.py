"""Errors that a user can fix: one line with the value, the valid range and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An invalid request.

    The message is one line that names the value, the valid range and the remedy. The command line prints it without a
    traceback and exits with code 2.
    """


def did_you_mean(value: object, options: Iterable[object]) -> str:
    """A clause for the end of a message that names the option closest to `value`, or an empty string."""
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(value: object) -> str:
    """A value as text of at most 60 characters, for messages."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
