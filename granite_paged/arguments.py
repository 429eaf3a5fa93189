"""Checks of arguments. Each refuses a wrong type or value by the argument's name."""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from granite_paged.errors import GranitePagedError, InvalidArgument

_Kind = TypeVar("_Kind")


def integer(
    name: str,
    value: Any,
    least: float = -math.inf,
    below: float = math.inf,
    *,
    error: type[GranitePagedError] = InvalidArgument,
) -> int:
    """Return an integer of any library as an int, if it is at least `least` and below `below`."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and least <= int(value) < below:
        return int(value)
    least_text = f" of at least {least}" if least > -math.inf else ""
    below_text = f" and below 2**{int(math.log2(below))}" if below < math.inf else ""
    raise error(f"{name} must be an integer{least_text}{below_text}, got {_shown(value)}")


def number(
    name: str,
    value: Any,
    holds: Callable[[float], bool],
    must: str,
    *,
    error: type[GranitePagedError] = InvalidArgument,
) -> float:
    """Return a real number as a float, if a float can hold it and `holds` says so of it."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if holds(float(value)):
                return float(value)
    raise error(f"{name} must {must}, got {_shown(value)}")


def one_of(
    name: str,
    value: Any,
    known: Sequence[str],
    *,
    error: type[GranitePagedError] = InvalidArgument,
) -> None:
    """Refuse what is not one of these words."""
    if not isinstance(value, str) or value not in known:
        listed = f"{', '.join(known[:-1])} or {known[-1]}"
        raise error(f"{name} must be {listed}, got {_shown(value)}")


def function(name: str, value: Any) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise InvalidArgument(f"{name} must be a function, got {_shown(value)}")


def instance(
    name: str,
    value: Any,
    kind: type[_Kind],
    *,
    error: type[GranitePagedError] = InvalidArgument,
) -> _Kind:
    """Return a value of this class."""
    if isinstance(value, kind):
        return value
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise error(f"{name} must be {article} {kind.__name__}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value as an error shows it: shortened, if it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return f"a value of type {type(value).__name__} that is too long to show"
