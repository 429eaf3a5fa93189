"""Triton's interpreter without most of its searches, which take a third of a kernel's time there.

While a kernel runs, the interpreter replaces the builtins of the language by its own, and finds
them among all members of `triton.language` again at each call of a function of the kernel.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _members(package: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(package, name)) for name in _builtins(package)]


def install() -> None:
    """Make the interpreter search each module and class of the language once."""
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": _members})
