"""JSON files as frozen dataclasses: every field is checked, and a refusal names file and field."""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from granite_paged.errors import FileError

Fail = Callable[[str, str], FileError]
"""The error for a field and what is wrong with it."""


def read_json(kind: Any, path: str | Path, error: type[FileError]) -> Any:
    """A file as a dataclass of that kind. Raises `error`."""
    fail = functools.partial(error, str(path))
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise fail("", f"cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise fail("", f"is not JSON: {problem}") from None
    return _checked(kind, data, fail, "")


def _checked(kind: Any, data: Any, fail: Fail, place: str) -> Any:
    """`data` as a value of `kind`: a dataclass, list, dict, optional or plain type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if data is None else _checked(inner[0], data, fail, place)
    if is_dataclass(kind):
        return _dataclass(kind, _typed(dict, data, fail, place), fail, place)
    if origin is list:
        items = enumerate(_typed(list, data, fail, place))
        return [_checked(inner[0], item, fail, f"{place}[{i}]") for i, item in items]
    if origin is dict:
        pairs = _typed(dict, data, fail, place).items()
        return {name: _checked(inner[1], value, fail, f"{place}.{name}") for name, value in pairs}
    return _typed(kind, data, fail, place)


def _dataclass(kind: Any, data: dict[str, Any], fail: Fail, place: str) -> Any:
    hints, values = typing.get_type_hints(kind), {}
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise fail(_at(place, unknown[0]), "is not a field of this format")
    for f in fields(kind):
        if f.name in data:
            values[f.name] = _checked(hints[f.name], data[f.name], fail, _at(place, f.name))
        elif f.default is MISSING and f.default_factory is MISSING:
            raise fail(_at(place, f.name), "is missing")
    return kind(**values)


_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number of at least 0",
    float: "a finite number of at least 0",
    list: "a list",
    dict: "an object",
}


def _typed(kind: type, data: Any, fail: Fail, place: str) -> Any:
    if kind is float and type(data) is int:
        data = float(data)
    number_of_use = kind not in (int, float) or (type(data) is kind and 0 <= data < float("inf"))
    if type(data) is not kind or not number_of_use:
        raise fail(place, f"must be {_NAMES[kind]}, got {data!r:.40}")
    return data


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
