"""The name that transformers gives to the cache, which differs by release.

Up to 5.23 it is `past_key_values`, and `cache_params` for a Mamba layer; from 5.24 it is `cache`
everywhere. Those releases accept the old names of arguments with a warning, and drop those of
outputs.
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
"""Name of the cache in the arguments and outputs of models and of `generate()`."""


def with_cache(cache: Any) -> dict[str, Any]:
    """Return keyword arguments for a model's call: `model(ids, **with_cache(cache))`."""
    return {CACHE: cache}


def rename_cache(kwargs: dict[str, Any]) -> None:
    """Rename the cache in keyword arguments, in place, as this release of transformers names it."""
    for name in _NAMES:
        if name != CACHE and name in kwargs:
            given = kwargs.pop(name)
            kwargs.setdefault(CACHE, given)
