"""One step of a `PagedCache`: what the layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.device import to_device
from granite_paged.errors import CannotBeExact, NonFinite
from granite_paged.geometry import bucket
from granite_paged.hf.padding import PaddedBatch, PaddedStep
from granite_paged.layers.backend import uses_exact_kernels
from granite_paged.paging.masks import PADDING, paged_block_mask
from granite_paged.paging.store import PageStore


@dataclass(frozen=True, slots=True)
class TokenSlots:
    """The slots that each token of a step attends to.

    Attributes:
        positions: [B][S], of the step's tokens; `PADDING` for padding.
        slots: [B] tensors [tokens] int64, the slots of each row's tokens in order.
        visible: [rows, positions] bool, False for tokens that the user's mask hides; None if none
            are hidden.
    """

    positions: list[list[int]]
    slots: list[Tensor]
    visible: Tensor | None

    @classmethod
    def of(cls, store: PageStore, positions: Tensor, visible: Tensor | None) -> TokenSlots:
        """Look up the slots of a step. positions: [B, S] int64 on the host."""
        page_size, slots = store.geometry.page_size, []
        for row, last in enumerate(positions.amax(dim=1).tolist()):
            every = torch.arange(last + 1)[None]
            slots.append(store.table.slots(every, page_size, torch.tensor([row]))[0])
        return cls(positions.tolist(), slots, visible)

    def tokens(self) -> Iterator[tuple[int, int]]:
        """Yield row and column of each token that is no padding, row by row."""
        for row, positions in enumerate(self.positions):
            yield from ((row, column) for column, at in enumerate(positions) if at != PADDING)

    def attended(self, row: int, column: int) -> Tensor:
        """Return the slots [n] int64 that a token attends to."""
        end = self.positions[row][column] + 1
        slots = self.slots[row][:end]
        return slots if self.visible is None else slots[self.visible[row, :end]]


@dataclass(frozen=True, slots=True)
class TokenPages:
    """Where the kernels of exact mode find the tokens of a step.

    Attributes:
        rows: [B] int64, rows of the page table.
        positions: [B, S] int32, contiguous; `PADDING` for padding.
        table: [rows, width] int32, logical page -> physical page.
        page_size: tokens per page.
    """

    rows: Tensor
    positions: Tensor
    table: Tensor
    page_size: int


@dataclass(slots=True)
class CacheStep:
    """What the layers of one forward pass share.

    Attributes:
        columns: the new columns of the batch, padding included.
        slots: [B * S] int64, where each new token's K and V go.
        block_mask: for every attention layer.
        rows: [B] int64, 0 to B - 1: the rows of Mamba states.
        since_start: [B, S] int64, columns since the row's first token, -1 before it. Mamba layers
            take these as positions, since in transformers a state decays over padding inside a
            sequence.
        tokens: in exact mode, what each token attends to, in the form that the device's attention
            reads.
        finite: attention layer, or name of a later part -> [] bool on the device, whether its
            numbers were finite.
    """

    columns: PaddedStep
    slots: Tensor
    block_mask: BlockMask
    rows: Tensor
    since_start: Tensor
    tokens: TokenSlots | TokenPages | None = None
    finite: dict[int | str, Tensor] = field(default_factory=dict)

    def check_finite(self) -> None:
        """Raise NonFinite, which names what was not finite first. Waits for the device once."""
        if not self.finite:
            return
        sound = torch.stack(list(self.finite.values())).tolist()
        bad = [part for part, is_sound in zip(self.finite, sound, strict=True) if not is_sound]
        if bad:
            layers = [part for part in bad if isinstance(part, int)]
            raise NonFinite(layers, "" if layers else str(bad[0]))


def check_has_kernel(new: PaddedStep, device: torch.device) -> None:
    """Raise CannotBeExact for a step of exact mode that no kernel of the device computes."""
    if new.hidden_by is not None and uses_exact_kernels(device):
        raise CannotBeExact("tokens that a mask hides have no exact kernel on a GPU")


def make_step(
    store: PageStore,
    record: PaddedBatch,
    new: PaddedStep,
    host_positions: Tensor,
    *,
    compiled: bool,
    exact: bool,
) -> CacheStep:
    """Make the tensors of a step whose pages are in the page table.

    Args:
        store: page table and pools.
        record: of the columns before the step.
        new: the step's columns.
        host_positions: [B, S] int64, of its tokens.
        compiled: pad to shapes for which a kernel may have been compiled already.
        exact: say what each token attends to; `check_has_kernel` has passed.
    """
    (batch, columns), table, page_size = host_positions.shape, store.table, store.geometry.page_size
    (flat,) = to_device(table.physical.device, host_positions.flatten())
    positions = flat.view(batch, columns)
    rows, more = (bucket(batch), bucket(columns, steps=2) - columns) if compiled else (batch, 0)
    physical, visible = table.physical[:rows], None
    if new.hidden_by is not None:
        visible = record.visible(new.hidden_by, (rows, physical.shape[1] * page_size))
    of_batch, exact_tokens = torch.arange(batch, device=positions.device), None
    if exact:
        exact_tokens = _exact_tokens(store, host_positions, of_batch, positions, visible)
    return CacheStep(
        columns=new,
        slots=table.slots(positions, page_size).flatten(),
        block_mask=paged_block_mask(
            physical,
            table.logical,
            torch.nn.functional.pad(positions.int(), (0, more, 0, rows - batch), value=PADDING),
            page_size=page_size,
            group=store.geometry.group,
            visible=visible,
            gathers=not compiled,
        ),
        rows=of_batch,
        since_start=new.since_start(batch, positions.device),
        tokens=exact_tokens,
    )


def _exact_tokens(
    store: PageStore,
    host_positions: Tensor,
    rows: Tensor,
    positions: Tensor,
    visible: Tensor | None,
) -> TokenSlots | TokenPages:
    if not uses_exact_kernels(positions.device):
        return TokenSlots.of(store, host_positions, visible)
    table, page_size = store.table.physical, store.geometry.page_size
    return TokenPages(rows, positions.int().contiguous(), table, page_size)
