"""Paged attention on PyTorch FlexAttention for IBM Granite-4 hybrid models, for inference.

Importing compiles, registers and patches nothing; torch loads with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite_paged.engine.engine import Engine
    from granite_paged.engine.request import SamplingParams
    from granite_paged.geometry import PagedConfig
    from granite_paged.hf.cache import PagedCache
    from granite_paged.hf.patching import is_patched, paged, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "PagedCache",
    "PagedConfig",
    "SamplingParams",
    "__version__",
    "is_patched",
    "paged",
    "patch",
    "unpatch",
]

_HOME = {
    "Engine": "engine.engine",
    "PagedCache": "hf.cache",
    "PagedConfig": "geometry",
    "SamplingParams": "engine.request",
    "is_patched": "hf.patching",
    "paged": "hf.patching",
    "patch": "hf.patching",
    "unpatch": "hf.patching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
