"""State rows of the runner, each free or owned by one job or one fork.

Rows are handed out by number and named in every step, so no running job moves into a hole. Host
only and without torch.
"""

from __future__ import annotations

from granite_paged.engine.step import Device
from granite_paged.errors import require


class RowPool:
    """Free rows, and which of them must be cleared before their next owner.

    Args:
        device: clears rows.
        rows: number of rows; they are 1 to `rows`.
    """

    def __init__(self, device: Device, rows: int) -> None:
        self.rows = rows
        self._device = device
        self._free = list(range(rows, 0, -1))
        self._dirty = set(self._free)

    @property
    def free(self) -> int:
        """Number of free rows."""
        return len(self._free)

    def take(self) -> int:
        """Return a free row, as its last owner left it."""
        return self._free.pop()

    def give(self, row: int) -> None:
        """Take a row back."""
        self._dirty.add(row)
        self._free.append(row)

    def clear(self, row: int) -> None:
        """Clear a row for its new owner, and with it all free ones that will need it."""
        if row in self._dirty:
            rows = self._dirty.intersection([row, *self._free])
            self._device.clear_rows(sorted(rows))
            self._dirty -= rows

    def check_valid(self, taken: list[int]) -> None:
        """Prove that every row is free or in `taken`; BrokenInvariant says if not."""
        rows = sorted([*taken, *self._free])
        require(rows == list(range(1, self.rows + 1)), "a row is lost, or has two owners")
