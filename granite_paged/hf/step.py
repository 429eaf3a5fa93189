"""One step of a `PagedCache`: what the layers of one forward pass share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from granite_paged.device import to_device
from granite_paged.errors import NonFinite
from granite_paged.geometry import bucket
from granite_paged.hf.padding import PaddedBatch, PaddedStep
from granite_paged.paging.masks import PADDING, paged_block_mask
from granite_paged.paging.store import PageStore


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
        finite: attention layer, or name of a later part -> [] bool on the device, whether its
            numbers were finite.
    """

    columns: PaddedStep
    slots: Tensor
    block_mask: BlockMask
    rows: Tensor
    since_start: Tensor
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


def make_step(
    store: PageStore,
    record: PaddedBatch,
    new: PaddedStep,
    host_positions: Tensor,
    *,
    compiled: bool,
) -> CacheStep:
    """Make the tensors of a step whose pages are in the page table.

    Args:
        store: page table and pools.
        record: of the columns before the step.
        new: the step's columns.
        host_positions: [B, S] int64, of its tokens.
        compiled: pad to shapes for which a kernel may have been compiled already.
    """
    (batch, columns), table, page_size = host_positions.shape, store.table, store.geometry.page_size
    (flat,) = to_device(table.physical.device, host_positions.flatten())
    positions = flat.view(batch, columns)
    rows, more = (bucket(batch), bucket(columns, steps=2) - columns) if compiled else (batch, 0)
    physical, visible = table.physical[:rows], None
    if new.hidden_by is not None:
        visible = record.visible(new.hidden_by, (rows, physical.shape[1] * page_size))
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
        ),
        rows=torch.arange(batch, device=positions.device),
        since_start=new.since_start(batch, positions.device),
    )
