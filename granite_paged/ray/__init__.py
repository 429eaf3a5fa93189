"""Several GPUs and several machines, on Ray: one engine per worker.

`Answers` is a callable class for `ray.data.Dataset.map_batches`; `by_prefix` puts prompts with a
common beginning into the same batch. `granite-paged batch --ray` is built from the same parts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite_paged.ray.rows import by_prefix
    from granite_paged.ray.workers import Answers

__all__ = ["Answers", "by_prefix"]

_MODULES = {"Answers": "workers", "by_prefix": "rows"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
