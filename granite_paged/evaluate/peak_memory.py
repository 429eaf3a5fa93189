"""Peak memory of one mode, while other modes keep their caches on the same device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch

from granite_paged.device import graph_bytes


class PeakMemory:
    """Peak memory of each mode, without what the other modes keep on the device.

    The private memory of CUDA graphs, which the allocator does not count, belongs to the mode that
    captured them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: Counter[str] = Counter()
        self._graphs: Counter[str] = Counter()
        self._peak = 0
        self._seen = (0, 0)

    @contextlib.contextmanager
    def of(self, mode: str) -> Iterator[None]:
        """Attribute what is allocated inside the context to this mode."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        allocated, graphs = torch.cuda.memory_allocated(self._device), self._graph_bytes()
        yield
        self._kept[mode] += torch.cuda.memory_allocated(self._device) - allocated
        self._graphs[mode] += self._graph_bytes() - graphs
        self._peak = torch.cuda.max_memory_allocated(self._device)

    def peak(self, mode: str) -> int:
        """Return the mode's peak in bytes during the last `of`, which must be its own."""
        others = sum(kept for other, kept in self._kept.items() if other != mode)
        return self._peak - others + self._graphs[mode]

    def _graph_bytes(self) -> int:
        """Count again only if reserved memory changed, because counting takes milliseconds."""
        reserved = torch.cuda.memory_reserved(self._device)
        if reserved != self._seen[0]:
            self._seen = (reserved, graph_bytes(self._device))
        return self._seen[1]
