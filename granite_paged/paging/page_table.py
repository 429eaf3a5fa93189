"""The allocator's answers, mirrored on the device.

::

    physical  [rows, width] int32   logical page of a row -> physical page (0: the null page)
    logical   [pages]       int32   physical page -> logical page, -1 where nobody holds it

A shared page sits at the same logical place in every sequence that holds it, since sequences come
to share pages only by forking; so one inverse map serves all rows. Whether a page is *mine* needs
both maps: `logical[p] >= 0 and physical[row, logical[p]] == p`.

Every change of these tensors is made in this file, from host data that crosses in one copy a step.
A caller that decides page by page gathers what it decided in `PendingEntries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from granite_paged.device import to_device
from granite_paged.errors import BrokenInvariant
from granite_paged.paging.allocator import NULL_PAGE, PageAllocator

NOBODY = -1
"""Logical page of a physical page that no sequence holds."""


class PendingEntries:
    """Entries of a `PageTable` that are to be set, gathered on the host.

    The last word on an entry counts, as if each had been set when it was given.
    """

    def __init__(self) -> None:
        self._physical: dict[tuple[int, int], int] = {}
        self._logical: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._physical or self._logical)

    def write(self, row: int, logical_page: int, physical_page: int) -> None:
        """As `PageTable.write`, of one entry."""
        self._physical[row, logical_page] = physical_page
        self._logical[physical_page] = logical_page

    def forget(self, pages: Iterable[int]) -> None:
        """As `PageTable.forget`."""
        self._logical.update(dict.fromkeys(pages, NOBODY))

    def drop_rows(self, rows: Iterable[int]) -> None:
        """These rows are new: what was to be written there is not their owners'."""
        gone = set(rows)
        self._physical = {at: page for at, page in self._physical.items() if at[0] not in gone}

    def clear(self) -> None:
        """They are set."""
        self._physical.clear()
        self._logical.clear()

    def columns(self, width: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Places in a flat `physical` of that width, what goes there; the same of `logical`."""
        places = [row * width + logical for row, logical in self._physical]
        return places, [*self._physical.values()], [*self._logical], [*self._logical.values()]


class PageTable:
    """Page tables of the rows of a batch, on the device.

    Args:
        rows: sequences.
        width: logical pages a row can name.
        pages: physical pages, the null page included.
    """

    def __init__(self, rows: int, width: int, pages: int, device: torch.device) -> None:
        self.physical = torch.full((rows, width), NULL_PAGE, dtype=torch.int32, device=device)
        self.logical = torch.full((pages,), NOBODY, dtype=torch.int32, device=device)

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
            extra = self.logical.new_full((pages - len(self.logical),), NOBODY)
            self.logical = torch.cat([self.logical, extra])

    def write(self, rows: Tensor, logical_pages: Tensor, physical_pages: Tensor) -> None:
        """Set `physical[row, logical page]` and the inverse. All [n] int64 on the device."""
        self.physical[rows, logical_pages] = physical_pages.int()
        self.logical[physical_pages] = logical_pages.int()

    def forget(self, pages: Tensor) -> None:
        """Pages [n] that nobody holds any more."""
        self.logical[pages] = NOBODY

    def settle(self, pending: PendingEntries) -> None:
        """Set what is pending, in one copy; nothing is afterwards."""
        if pending:
            columns = map(torch.tensor, pending.columns(self.physical.shape[1]))
            places, physical, pages, logical = to_device(self.physical.device, *columns)
            self.physical.view(-1).index_copy_(0, places, physical.int())
            self.logical.index_copy_(0, pages, logical.int())
            pending.clear()

    def slots(self, positions: Tensor, page_size: int) -> Tensor:
        """[B, S] int64: the slot of each position; padding (-1) goes to the null page's first."""
        return _slots(self.physical[: len(positions)], positions, page_size)

    def slots_of(self, rows: Tensor, positions: Tensor, page_size: int) -> Tensor:
        """The same for the rows named, [B] int64."""
        return _slots(self.physical.index_select(0, rows), positions, page_size)

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was. rows: [n] int64, any length."""
        self.physical = self.physical.index_select(0, rows)

    def check_valid(self, allocator: PageAllocator, sequences: Sequence[int]) -> None:
        """Prove that the device agrees with the allocator about these sequences, row by row."""
        physical, logical = self.physical.tolist(), self.logical.tolist()
        held: dict[int, int] = {}
        for row, sequence in enumerate(sequences):
            pages = allocator.pages_of(sequence)
            if tuple(physical[row][: len(pages)]) != pages:
                raise BrokenInvariant(f"row {row}: page table is stale")
            held.update({page: place for place, page in enumerate(pages)})
        for page, place in enumerate(logical):
            if place != held.get(page, NOBODY):
                raise BrokenInvariant(f"page {page}: the inverse map says {place}")


def _slots(table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    at = positions.clamp(min=0)
    page = table.long().gather(1, at // page_size)
    return torch.where(positions >= 0, page * page_size + at % page_size, 0)
