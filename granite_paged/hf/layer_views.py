"""What a paged cache shows of its layers in the form that transformers' own caches have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from granite_paged.errors import NotPatched
from granite_paged.geometry import PagedConfig
from granite_paged.hf.padding import PaddedBatch
from granite_paged.paging.masks import PADDING
from granite_paged.paging.store import PageStore


class LayerViews(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Copies of a cache's contents, for readers; `PagedCache` owns the contents."""

    config: PagedConfig
    device: torch.device
    store: PageStore
    _rows: list[int]  # row -> sequence of the allocator
    _columns: PaddedBatch
    _step: Any

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a Mamba layer's last inputs, [B, channels, width], the newest last.

        `layers[i].conv_states[0]` holds them as a ring, see `layers.mamba`.

        Raises:
            NotPatched: in a step, whose Mamba layers must run ours and not transformers' forward.
        """
        self._refuse_plain_mamba(layer_idx)
        ring: Tensor | None = self.layers[layer_idx].conv_states[state_idx]
        if ring is None:
            return None
        started = self._columns.stored(len(self._rows), ring.device).cumsum(dim=1).bool()
        oldest = started.sum(dim=1)[:, None, None]  # the next input's position, modulo the width
        slot = (oldest + torch.arange(ring.shape[2], device=ring.device)) % ring.shape[2]
        return ring.gather(2, slot.expand_as(ring))

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Return whether Mamba layers have states. Raises NotPatched in a step."""
        self._refuse_plain_mamba(layer_idx)  # whose forward asks this up to transformers 5.23
        return bool(super().has_previous_state(layer_idx, state_idx))

    def gather(self, pool: Tensor) -> Tensor | None:
        """Copy the rows' K or V out of a pool, [1, Hkv, slots, D]; see `PagedLayer.keys`."""
        if not self._rows:
            return None
        stored = self._columns.stored(len(self._rows), self.device)
        positions = (stored.cumsum(dim=1) - 1).where(stored, PADDING)
        self.store.table.settle()
        gathered = pool[0][:, self.store.table.slots(positions, self.config.page_size)]
        return gathered.transpose(0, 1).where(stored[:, None, :, None], 0)

    def _refuse_plain_mamba(self, layer: int | None) -> None:
        if self._step is not None:
            raise NotPatched(
                f"Mamba layer {layer} has lost the forward that patch() gave it: "
                "call unpatch(model) and patch(model)"
            )
