"""Mistakes of the user, told in one line: the value, what is valid, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A request that cannot be served as it stands.

    The message is one line that names the offending value, the valid range and the remedy. The command line
    prints it without a traceback and exits with code 2.
    """


def did_you_mean(value: object, options: Iterable[object]) -> str:
    """The closest of `options` to `value` as a clause to append to a message, or an empty string."""
    close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(value: object) -> str:
    """A value as text of at most 60 characters, to name it in a message."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
