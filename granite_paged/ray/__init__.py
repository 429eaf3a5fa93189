"""Several GPUs and several machines, on Ray: one engine per worker.

`Answers` is a callable class for `ray.data.Dataset.map_batches`; `by_prefix` puts prompts with a
common beginning into the same batch. `granite-paged batch --ray` is built from the same parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite_paged.ray.workers import Answers, by_prefix

__all__ = ["Answers", "by_prefix"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from granite_paged.ray import workers

    return getattr(workers, name)
