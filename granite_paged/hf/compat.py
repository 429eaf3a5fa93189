"""What transformers calls the cache, which differs by version.

`past_key_values` up to 5.23, for a Mamba layer `cache_params`; `cache` everywhere from 5.24 on.
There the old names of arguments work with a warning, and those of outputs do not.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GraniteMoeHybridForCausalLM

_NAMES = ("cache", "past_key_values")


def _cache_name() -> str:
    known = inspect.signature(GraniteMoeHybridForCausalLM.forward).parameters
    return next(name for name in _NAMES if name in known)


CACHE = _cache_name()
"""Argument of a model and of `generate()`, key of its keyword arguments, field of its outputs."""


def with_cache(cache: Any) -> dict[str, Any]:
    """Keyword arguments for a model's call: `model(ids, **with_cache(cache))`."""
    return {CACHE: cache}


def rename_cache(kwargs: dict[str, Any]) -> None:
    """Have keyword arguments that may be of either version name the cache as this one does."""
    for name in _NAMES:
        if name != CACHE and name in kwargs:
            given = kwargs.pop(name)
            kwargs.setdefault(CACHE, given)
