"""JSON files as frozen dataclasses: every field is checked, and a refusal names file and field."""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from granite_paged.errors import FileError

Fail = Callable[[str, str], FileError]
"""Makes the error for a field and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a number, both inclusive, as the second argument of `Annotated`."""

    low: float = 0
    high: float = 2**64  # more than any seed, byte count or rate; arithmetic on it cannot overflow


Share = Annotated[float, Limits(0, 1)]
Signed = Annotated[float, Limits(low=-(2**64))]
SignedInt = Annotated[int, Limits(low=-(2**64))]


def read_json(kind: Any, path: str | Path, error: type[FileError]) -> Any:
    """Return a file as a dataclass of that kind. Raises `error`.

    Numbers are finite and, unless annotated with other `Limits`, not negative.
    """
    fail = functools.partial(error, str(path))
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise fail("", f"cannot be read: {problem.strerror}") from None
    except RecursionError:
        raise fail("", "is nested too deeply") from None
    except ValueError as problem:
        raise fail("", f"is not JSON: {problem}") from None
    return checked(kind, data, fail, "")


def checked(kind: Any, data: Any, fail: Fail, place: str) -> Any:
    """Return `data` as a value of `kind`: a dataclass, collection, optional or plain type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else checked(inner[0], data, fail, place)
    if origin is Annotated:
        return _number(inner[0], inner[1], data, fail, place)
    if kind in (int, float):
        return _number(kind, Limits(), data, fail, place)
    if is_dataclass(kind):
        return _dataclass(kind, _typed(dict, data, fail, place), fail, place)
    if origin in (list, tuple):
        items = _typed(list, data, fail, place)
        kinds = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(items)
        if len(items) != len(kinds):
            raise fail(place, f"must have {len(kinds)} items, got {len(items)}")
        pairs = enumerate(zip(kinds, items, strict=True))
        return origin(checked(kind, item, fail, f"{place}[{i}]") for i, (kind, item) in pairs)
    if origin is dict:
        values = _typed(dict, data, fail, place).items()
        return {name: checked(inner[1], value, fail, _at(place, name)) for name, value in values}
    return _typed(kind, data, fail, place)


def _dataclass(kind: Any, data: dict[str, Any], fail: Fail, place: str) -> Any:
    hints, values = typing.get_type_hints(kind, include_extras=True), {}
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise fail(_at(place, unknown[0]), "is not a field of this format")
    for f in fields(kind):
        if f.name in data:
            values[f.name] = checked(hints[f.name], data[f.name], fail, _at(place, f.name))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise fail(_at(place, f.name), "is missing")
    return kind(**values)


_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    list: "a list",
    dict: "an object",
}


def _number(kind: type, limits: Limits, data: Any, fail: Fail, place: str) -> Any:
    known = type(data) is kind or (kind is float and type(data) is int)
    if not (known and limits.low <= data <= limits.high):
        wanted = f"{_NAMES[kind]} of at least {limits.low:.3g} and at most {limits.high:.3g}"
        raise fail(place, f"must be {wanted}, got {data!r:.40}")
    return kind(data)


def _typed(kind: type, data: Any, fail: Fail, place: str) -> Any:
    if type(data) is not kind:
        raise fail(place, f"must be {_NAMES[kind]}, got {data!r:.40}")
    return data


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
