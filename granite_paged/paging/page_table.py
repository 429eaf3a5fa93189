"""The page tables of a batch, mirrored on the device.

::

    physical  [rows, width] int32   logical page of a row -> physical page (0: the null page)
    logical   [pages]       int32   physical page -> logical page, -1 where no sequence holds it

A shared page has the same logical number in every sequence that holds it, since sequences come to
share pages only by forking. So one inverse map serves all rows. Whether a page belongs to a row
takes both maps: `logical[p] >= 0 and physical[row, logical[p]] == p`.

Only this file changes these tensors. Changes are gathered on the host; `settle` carries them to the
device in one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from granite_paged.device import to_device
from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import NULL_PAGE, PageAllocator

UNHELD = -1
"""Logical page of a physical page that no sequence holds."""


class PageTable:
    """Page tables of the rows of a batch, on the device.

    Args:
        rows: sequences.
        width: logical pages a row can name.
        pages: physical pages, the null page included.

    Attributes:
        physical: [rows, width] int32, as of the last `settle`.
        logical: [pages] int32, as of the last `settle`.
    """

    def __init__(self, rows: int, width: int, pages: int, device: torch.device) -> None:
        self.physical = torch.full((rows, width), NULL_PAGE, dtype=torch.int32, device=device)
        self.logical = torch.full((pages,), UNHELD, dtype=torch.int32, device=device)
        self._entries: dict[tuple[int, int], int] = {}  # pending: (row, logical) -> physical
        self._places: dict[int, int] = {}  # pending: physical page -> logical page

    @property
    def nbytes(self) -> int:
        """Bytes of both maps."""
        return self.physical.nbytes + self.logical.nbytes

    def fit(self, *, rows: int, width: int, pages: int) -> None:
        """Grow any side that is too small; contents stay."""
        have_rows, have_width = self.physical.shape
        if rows > have_rows or width > have_width:
            # doubling the width keeps a long decode from reallocating at every page
            wide = have_width if width <= have_width else max(width, 2 * have_width)
            grown = self.physical.new_full((max(rows, have_rows), wide), NULL_PAGE)
            grown[:have_rows, :have_width] = self.physical
            self.physical = grown
        if pages > len(self.logical):
            extra = self.logical.new_full((pages - len(self.logical),), UNHELD)
            self.logical = torch.cat([self.logical, extra])

    # -- changes, gathered until `settle` -------------------------------------------------------

    def write(self, row: int, logical_page: int, physical_page: int) -> None:
        """Set `physical[row, logical_page]` and the inverse. Raises IndexError outside the maps."""
        rows, width = self.physical.shape
        (pages,) = self.logical.shape  # len() of a tensor takes longer
        if not (row < rows and logical_page < width and physical_page < pages):
            raise IndexError(
                f"entry ({row}, {logical_page}) = {physical_page} lies outside a table of "
                f"{rows} x {width} entries and {pages} pages"
            )
        self._entries[row, logical_page] = physical_page
        self._places[physical_page] = logical_page

    def forget(self, pages: Iterable[int]) -> None:
        """Take pages that no sequence holds any more out of the inverse map."""
        self._places.update(dict.fromkeys(pages, UNHELD))

    def settle(self) -> None:
        """Carry all pending changes to the device, in one copy."""
        if not (self._entries or self._places):
            return
        width = self.physical.shape[1]
        at, physical, pages, logical = to_device(
            self.physical.device,
            torch.tensor([row * width + logical_page for row, logical_page in self._entries]),
            torch.tensor([*self._entries.values()]),
            torch.tensor([*self._places]),
            torch.tensor([*self._places.values()]),
        )
        self.physical.view(-1).index_copy_(0, at, physical.int())
        self.logical.index_copy_(0, pages, logical.int())
        self._entries.clear()
        self._places.clear()

    # -- changes of whole rows, at once ---------------------------------------------------------

    def clear_rows(self, rows: Sequence[int], index: Tensor) -> None:
        """Let these rows name the null page everywhere. index: `rows` [n] int64 on the device."""
        cleared = set(rows)
        self._entries = {at: page for at, page in self._entries.items() if at[0] not in cleared}
        self.physical.index_fill_(0, index, NULL_PAGE)

    def copy_row(self, source: int, targets: Tensor) -> None:
        """Copy a row to others. targets: [n] int64 on the device."""
        self.settle()
        self.physical[targets] = self.physical[source].clone()

    def select_rows(self, rows: Tensor) -> None:
        """Let row i become what row `rows[i]` was. rows: [n] int64 on the device, any length."""
        self.settle()
        self.physical = self.physical.index_select(0, rows)

    # -- reading --------------------------------------------------------------------------------

    def slots(self, positions: Tensor, page_size: int, rows: Tensor | None = None) -> Tensor:
        """Slots of positions in a pool; padding goes to the null page's first.

        Args:
            positions: [B, S] int64, `PADDING` (-1) for padding.
            page_size: tokens per page.
            rows: [B] int64, rows of the table. None: the first B.

        Returns:
            [B, S] int64.
        """
        table = self.physical[: len(positions)] if rows is None else self.physical[rows]
        at = positions.clamp(min=0)
        page = table.long().gather(1, at // page_size)
        return torch.where(positions >= 0, page * page_size + at % page_size, 0)

    def check_valid(self, allocator: PageAllocator, sequences: Sequence[int]) -> None:
        """Prove that the device agrees with the allocator about these sequences, row by row.

        Raises:
            BrokenInvariant: names the row or page that is stale.
        """
        self.settle()
        physical, logical = self.physical.tolist(), self.logical.tolist()
        held: dict[int, int] = {}
        for row, sequence in enumerate(sequences):
            pages = allocator.pages_of(sequence)
            if tuple(physical[row][: len(pages)]) != pages:
                raise BrokenInvariant(f"row {row}: page table is stale")
            held.update({page: place for place, page in enumerate(pages)})
        for page, place in enumerate(logical):
            if place != held.get(page, UNHELD):
                raise BrokenInvariant(f"page {page}: the inverse map says {place}")
