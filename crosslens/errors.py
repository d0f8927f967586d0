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
