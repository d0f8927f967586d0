"""What every annotated function of the package is checked by in the tests: beartype, with shapes by jaxtyping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_inner: dict[tuple[Any, ...], Callable[..., Any]] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a signature. jaxtyping hands in a function of this signature that does nothing.

    A function within a function is defined anew at each call of the outer one: its check is generated the first time
    alone, so that most of the time of `causal` is not spent on it.
    """
    if "<locals>" not in function.__qualname__ or function.__defaults__ or function.__kwdefaults__:
        return _checked(function)
    # two classes may have one name; jaxtyping makes a class for each mention of a shape
    hints = (hint if isinstance(hint, type) and not hasattr(hint, "dim_str") else repr(hint)
             for hint in function.__annotations__.values())  # fmt: skip
    key = function.__module__, function.__qualname__, function.__code__.co_varnames, *hints
    if key not in _inner:
        _inner[key] = _checked(function)
    return _inner[key]
