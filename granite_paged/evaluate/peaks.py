"""Peak memory of one mode, while other modes keep their caches on the same device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Peaks:
    """Peaks of each mode, without what the other modes keep on the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, int] = {}
        self._peak = 0

    @contextlib.contextmanager
    def of(self, mode: str) -> Iterator[None]:
        """What is allocated inside belongs to this mode."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        grown = torch.cuda.memory_allocated(self._device) - before
        self._kept[mode] = self._kept.get(mode, 0) + grown
        self._peak = torch.cuda.max_memory_allocated(self._device)

    def peak(self, mode: str) -> int:
        """Bytes, inside the `of` that ended last."""
        return self._peak - sum(kept for other, kept in self._kept.items() if other != mode)
