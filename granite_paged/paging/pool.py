"""One attention layer's K and V, in pages.

::

    keys, values  [1, Hkv, pages * page_size, D]
    slot          physical page * page_size + position in the page

The leading 1 lets every sequence of a batch read the one pool: FlexAttention broadcasts it.
A pool holds finite numbers only: kernels read the tail of a page with weight 0, and 0 * NaN is NaN.
So pools start as zeros, and NaN and infinity are stored as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from granite_paged.geometry import CacheGeometry


class KVPool:
    """K and V of one layer. The allocator decides which sequence has which page.

    Args:
        geometry: sizes of the model.
        pages: pages of the pool, the null page included.
        device: where the pool lies.
    """

    def __init__(self, geometry: CacheGeometry, pages: int, device: torch.device) -> None:
        self._geometry = geometry
        self.keys = self._zeros(pages, device)
        self.values = self._zeros(pages, device)

    @property
    def pages(self) -> int:
        """Pages of the pool, the null page included."""
        return self.keys.shape[2] // self._geometry.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of K and V together."""
        return self.keys.nbytes + self.values.nbytes

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Scatter new tokens. NaN and infinity are stored as 0.

        Args:
            slots: [B * S] int64, where each token goes; padding goes to slots of the null page.
            keys, values: [B, Hkv, S, D].

        Returns:
            [B, S] bool, whether a token's K and V are finite in the pool's dtype.
        """
        sound = []
        for stored, new in ((self.keys, keys), (self.values, values)):
            converted = new.to(stored.dtype)
            finite = torch.nan_to_num(_by_token(converted), 0.0, 0.0, 0.0)
            stored[0].index_copy_(1, slots, finite)
            sound.append(converted.isfinite().all(dim=(1, 3)))
        return sound[0] & sound[1]

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole pages. sources, targets: [n] int64."""
        for pages in self._by_page():
            pages.index_copy_(1, targets, pages.index_select(1, sources))

    def read_pages(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of pages [n] int64: [n, Hkv, page_size, D] each."""
        keys, values = (
            by_page.index_select(1, pages).transpose(0, 1) for by_page in self._by_page()
        )
        return keys.contiguous(), values.contiguous()

    def write_pages(self, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put back what `read_pages` returned. pages: [n] int64."""
        for by_page, new in zip(self._by_page(), (keys, values), strict=True):
            by_page.index_copy_(1, pages, new.transpose(0, 1))

    def resize(self, pages: int) -> None:
        """Resize to `pages` pages. Growing keeps contents; shrinking only hides the rest."""
        slots = pages * self._geometry.page_size
        for name in ("keys", "values"):  # one at a time, so that only one tensor exists twice
            old = getattr(self, name)
            if slots <= old.shape[2]:
                new = old[:, :, :slots]
            else:
                new = self._zeros(pages, old.device)
                new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def _zeros(self, pages: int, device: torch.device) -> Tensor:
        g = self._geometry
        return torch.zeros(
            1, g.kv_heads, pages * g.page_size, g.head_dim, dtype=g.dtype, device=device
        )

    def _by_page(self) -> tuple[Tensor, Tensor]:
        shape = (self._geometry.kv_heads, -1, self._geometry.page_size, self._geometry.head_dim)
        return self.keys.view(shape), self.values.view(shape)


def _by_token(states: Tensor) -> Tensor:
    """[B, Hkv, S, D] -> [Hkv, B * S, D]"""
    return states.transpose(0, 1).flatten(1, 2)
