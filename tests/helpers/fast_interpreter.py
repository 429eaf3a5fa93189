"""Triton's interpreter without work whose result it throws away or has already.

The results stay the same. Replaced are the builtins of the language, which the interpreter searches
for and sets again at each call of a function of a kernel; a check of integer sums in 64 bits, whose
result counts only in debug mode; and tables, types and shapes that it builds for each operation.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

POINTER = np.dtype(np.uint64)


@functools.cache
def _builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _members(package: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(package, name)) for name in _builtins(package)]


@functools.cache
def _languages(fn: Any) -> list[Any]:
    modules = filter(inspect.ismodule, fn.__globals__.values())
    return [module for module in modules if module in (tl, tl.core)]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a running kernel, which has replaced the language already."""
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


_search_np_dtype = functools.cache(interpreter._get_np_dtype)


def _get_np_dtype(dtype: Any) -> np.dtype[Any]:
    dtype = dtype.scalar
    return POINTER if dtype.is_ptr() else _search_np_dtype(dtype)


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


def _init_tensor(self: Any, handle: Any, dtype: Any) -> None:
    self.handle = handle
    self.type = dtype
    self.dtype = dtype.scalar
    self.shape, self.numel = _shape(tuple(dtype.shape) if dtype.is_block() else ())


_init_block = tl.block_type.__init__


@functools.cache
def _block(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    block = tl.block_type.__new__(tl.block_type)
    _init_block(block, tl.int32, list(sizes))
    return block.shape, block.numel, str(block.shape)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    self.element_ty = element_ty
    self.shape, self.numel, shown = _block(sizes)
    self.name = f"<{shown}, {element_ty}>"


_broadcast = interpreter.TritonSemantic.broadcast_impl_value


def _broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    sizes = [operand.type.shape if operand.type.is_block() else None for operand in (lhs, rhs)]
    return (lhs, rhs) if sizes[0] is sizes[1] else _broadcast(self, lhs, rhs)


def install() -> None:
    """Make the interpreter faster in this process."""
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": _members})
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _get_np_dtype
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.TritonSemantic.broadcast_impl_value = _broadcast_impl_value
    tl.tensor.__init__ = _init_tensor
    tl.block_type.__init__ = _init_block_type
