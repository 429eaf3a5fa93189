"""What a runner keeps on the device for its sequences.

::

    pages       page table and pools
    tokens      [rows + 1] int64, each row's next input token
    nonfinite   [rows + 1] uint8, whether a row met NaN or infinity since it was cleared
    stacked     conv, ssm and, on a GPU, the inputs that rows keep beside them (`Kept`), of all
                Mamba layers, [layers, rows, ...] each

Row 0 is the null row: it takes padding, belongs to no sequence and has no Mamba state. So the state
of row r has index r - 1.

Loads of saved states are deferred, like changes of the page table, until a step needs them: one
copy serves all rows that begin with the same state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from granite_paged.device import finite_rows, host_copy, to_device
from granite_paged.layers.mamba import Kept, MambaSizes, MambaState
from granite_paged.paging.store import PageStore

NULL_ROW = 0
"""Row that takes padding."""


class RowSnapshot(NamedTuple):
    """A copy of one row's Mamba states, all layers together.

    Attributes:
        conv: [layers, channels, width], in the model's dtype.
        ssm: [layers, heads, head_dim, state_size] float32.
        recent, times: inputs since `ssm` was stored, see `MambaState`; None where it is of the last
            token.
    """

    conv: Tensor
    ssm: Tensor
    recent: Tensor | None = None
    times: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(part.nbytes for part in self.parts)

    def all_finite(self) -> Tensor:
        """Return whether every number is finite, as [1] bool."""
        finite = [finite_rows(part.reshape(1, -1)) for part in self.parts]
        return torch.stack(finite).all(dim=0)

    @property
    def parts(self) -> list[Tensor]:
        """Return what there is of them."""
        return [part for part in self if part is not None]


class Storage(NamedTuple):
    """A runner's buffers; see the module's docstring for shapes.

    Attributes:
        states: Mamba layer -> its part of `stacked`, with `rows` None.
        loads: the deferred loads, row -> saved state.
    """

    pages: PageStore
    tokens: Tensor
    nonfinite: Tensor
    stacked: list[Tensor]
    states: dict[int, MambaState]
    loads: dict[int, RowSnapshot]

    def settle(self) -> None:
        """Carry all pending changes to the device."""
        self.pages.table.settle()
        if self.loads:
            self.load_states(list(self.loads))

    def load_states(self, rows: Sequence[int]) -> None:
        """Carry out the deferred loads of these rows.

        If that raises, their states may hold anything: the rows must be cleared.
        """
        wanted = {row: self.loads[row] for row in rows if row in self.loads}
        try:
            for saved in {id(saved): saved for saved in wanted.values()}.values():
                self._copy([row for row, other in wanted.items() if other is saved], saved)
        finally:
            self._drop_loads(wanted)

    def copy_row(self, source: int, targets: Sequence[int]) -> None:
        """Copy a row to others: its page table, token, flag and states."""
        self.load_states([source])
        self._drop_loads(targets)
        (index,) = to_device(self.tokens.device, torch.tensor(targets))
        self.pages.table.copy_row(source, index)
        for tensor in (self.nonfinite, self.tokens):
            tensor[index] = tensor[source].clone()
        for states in self.stacked:
            for target in targets:  # one by one, so that no second copy of the source is made
                states[:, target - 1].copy_(states[:, source - 1])

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Set rows to zeros for their next sequences."""
        self._drop_loads(rows)
        (index,) = to_device(self.tokens.device, torch.tensor(rows))
        self.pages.table.clear_rows(rows, index)
        for tensor in (self.nonfinite, self.tokens):
            tensor.index_fill_(0, index, 0)
        for states in self.stacked:
            states.index_fill_(1, index - 1, 0)

    def save_row(self, row: int, *, to_host: bool) -> RowSnapshot:
        """Copy a row's Mamba states, on the device or to host memory."""
        self.load_states([row])
        save = host_copy if to_host else torch.clone
        return RowSnapshot(*(save(states[:, row - 1]) for states in self.stacked))

    def load_row(self, row: int, snapshot: RowSnapshot) -> None:
        """Put saved Mamba states into a row. From host memory they are copied at once."""
        if snapshot.conv.device == self.tokens.device:
            self.loads[row] = snapshot
        else:
            self._drop_loads([row])
            self._copy([row], snapshot)

    def clear(self) -> None:
        """Drop pools and states, so that their memory is free."""
        self.loads.clear()
        self.pages.pools.clear()
        self.states.clear()
        self.stacked.clear()

    def _drop_loads(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.loads.pop(row, None)

    def _copy(self, rows: Sequence[int], snapshot: RowSnapshot) -> None:
        """Copy a state to rows. That of a single row may be in host memory."""
        if len(rows) == 1:
            for own, saved in zip(self.stacked, snapshot.parts, strict=True):
                own[:, rows[0] - 1].copy_(saved, non_blocking=True)
            return
        (index,) = to_device(self.tokens.device, torch.tensor(rows))
        for own, saved in zip(self.stacked, snapshot.parts, strict=True):
            each = saved[:, None].expand(-1, len(rows), *saved.shape[1:])  # the same for every row
            own.index_copy_(1, index - 1, each)


def make_storage(
    pages: PageStore,
    mixers: Mapping[int, Any],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kept: Kept = Kept.NOTHING,
) -> Storage:
    """Allocate a runner's buffers.

    Args:
        pages: page table of `rows + 1` rows, and pools.
        mixers: Mamba layer -> its module. All layers of a model have the same sizes.
        rows: rows of sequences, the null row not counted.
        dtype: of the convolutions' states.
        device: of all buffers.
        kept: the inputs that rows keep beside their states.
    """
    stacked = [torch.zeros(0, rows, device=device) for _ in range(2)]
    if mixers:
        sizes = MambaSizes.of(next(iter(mixers.values())))
        state = sizes.empty_state(len(mixers) * rows, dtype, device, kept)
        stacked = [part.view(len(mixers), rows, *part.shape[1:]) for part in state.parts]
    return Storage(
        pages=pages,
        tokens=torch.zeros(rows + 1, dtype=torch.int64, device=device),
        nonfinite=torch.zeros(rows + 1, dtype=torch.uint8, device=device),
        stacked=stacked,
        states={
            index: MambaState(parts[0], parts[1], None, *parts[2:])
            for index, *parts in zip(mixers, *stacked, strict=True)
        },
        loads={},
    )
