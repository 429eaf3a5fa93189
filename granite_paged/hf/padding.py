"""PaddedBatch and tokens: what transformers counts against what pages hold.

transformers pads a batch to one width and counts its *columns*; pages hold *tokens* only. This file
keeps, for every column so far, whether it was a token when it was run::

    columns     p p a b c | p d          p: padding
    tokens          0 1 2     3          positions in the sequence, in its pages

A later mask may hide a stored token, but not show a column that was padding: nothing was stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from granite_paged.errors import InvalidRequest, PaddingError, PromptError


@dataclass(frozen=True, slots=True)
class NewColumns:
    """The columns of one step, checked.

    Attributes:
        count: how many (S).
        before: how many there were before them.
        tokens: [B, S] bool on the host, which are tokens; None where all are.
        mask: [B, S] of the user's mask, for Mamba layers; None where all are tokens.
        stored: [B, columns so far + S] bool, the record once the step is done; None: all tokens.
        hidden_by: the whole mask, where it leaves out tokens stored earlier; else None.
    """

    count: int
    before: int
    tokens: Tensor | None
    mask: Tensor | None
    stored: Tensor | None
    hidden_by: Tensor | None

    def since_start(self, batch: int, device: torch.device) -> Tensor:
        """[B, S] int64: columns since each row's first token; -1 before it."""
        if self.stored is None:
            past = torch.arange(self.count, device=device).expand(batch, -1)
            return past + self.before
        started = self.stored.cumsum(dim=1).bool().cumsum(dim=1) - 1
        return started[:, -self.count :]


class PaddedBatch:
    """The record of a batch's columns. `count` of them so far, padding included."""

    def __init__(self) -> None:
        self.count = 0
        self._stored: Tensor | None = None  # [B, count] bool on the masks' device; None: all tokens

    def check(self, mask: Tensor | None, columns: int, started: Sequence[bool]) -> NewColumns:
        """Hold a mask against the record; changes nothing.

        Args:
            mask: [B, count + S], zero where padding; None where there is none.
            columns: new ones (S).
            started: for each row, whether it holds a token already.

        Raises:
            InvalidRequest: a mask of another shape.
            PaddingError: padding on the right, or a mask that shows what was padding.
            PromptError: no rows or no columns.
        """
        batch = len(started)
        if batch < 1 or columns < 1:
            raise PromptError("empty prompt: give every row at least one token")
        if mask is None:
            return NewColumns(
                columns, self.count, None, None, self._extended(None, batch, columns), None
            )
        if tuple(mask.shape) != (batch, self.count + columns):
            raise InvalidRequest(
                f"attention_mask must be [{batch}, {self.count + columns}], past columns included; "
                f"{list(mask.shape)} given"
            )
        new = mask[:, self.count :].bool()
        tokens = new.cpu()
        _refuse_right_padding(tokens, torch.tensor(started))
        hidden_by = mask if self._hides(mask) else None
        if bool(tokens.all()):
            return NewColumns(
                columns, self.count, None, None, self._extended(None, batch, columns), hidden_by
            )
        padded = mask[:, self.count :].contiguous()
        return NewColumns(
            columns, self.count, tokens, padded, self._extended(new, batch, columns), hidden_by
        )

    def extend(self, new: NewColumns) -> None:
        """Take the columns of a finished step into the record."""
        self.count += new.count
        self._stored = new.stored

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was. rows: [n] int64."""
        if self._stored is not None:
            self._stored = self._stored.index_select(0, rows)

    def visible(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """Which stored tokens the mask leaves in: [rows, positions] bool, of this shape."""
        past, stored = self._past(mask)
        position = (stored.cumsum(dim=1) - 1)[stored]  # of stored tokens, row by row
        row = torch.arange(len(past), device=past.device)[:, None].expand_as(past)[stored]
        visible = past.new_ones(shape)
        visible[row, position] = past[stored]
        return visible

    def _hides(self, mask: Tensor) -> bool:
        """`generate()` hides tokens in a later turn: a row that had finished was fed padding as if
        it were tokens, and the mask of the next turn leaves it out.
        """
        past, stored = self._past(mask)
        shown = (past & ~stored).any(dim=1)
        if bool(shown.any()):
            raise PaddingError(
                f"attention_mask of row {_names(shown)} shows columns that were padding when they "
                "were run: their K and V were never stored"
            )
        return not torch.equal(past, stored)

    def _past(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, count] bool each: tokens as the mask has them, and as they were stored."""
        past = mask[:, : self.count].bool()
        return past, torch.ones_like(past) if self._stored is None else self._stored

    def _extended(self, new: Tensor | None, batch: int, columns: int) -> Tensor | None:
        if new is None and self._stored is None:
            return None
        known = new if self._stored is None else self._stored
        assert known is not None
        past = known.new_ones(batch, self.count) if self._stored is None else self._stored
        more = known.new_ones(batch, columns) if new is None else new
        return torch.cat([past, more], dim=1)


def _refuse_right_padding(tokens: Tensor, started: Tensor) -> None:
    ends_padded = (tokens.any(dim=1) | started) & ~tokens[:, -1]
    if bool(ends_padded.any()):  # a row that has not started may go on being padded
        raise PaddingError(
            f"padding on the right of row {_names(ends_padded)}: pad on the left "
            "(tokenizer.padding_side = 'left'), or Mamba states would decay over it"
        )


def _names(marked: Tensor) -> str:
    """The rows that are True in [B] bool."""
    return ", ".join(map(str, marked.nonzero()[:, 0].tolist()))
