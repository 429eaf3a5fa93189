"""Columns and tokens: what transformers counts, and what pages hold.

transformers pads a batch to one width and counts its *columns*; pages hold *tokens* only. This file
records, for every column so far, whether it was a token when it was run::

    columns     p p a b c | p d          p: padding
    tokens          0 1 2     3          positions in the sequence, in its pages

A later mask may hide a stored token. It may not show a column that was padding, because nothing was
stored for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from granite_paged.errors import InvalidRequest, PaddingError, PromptError
from granite_paged.paging.masks import PADDING


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """The columns that one step adds to a batch, checked.

    Attributes:
        count: number of new columns (S).
        before: number of columns before them.
        tokens: [B, S] bool on the host, True for tokens; None if all are tokens.
        mask: [B, S], the user's mask of these columns, for Mamba layers; None if no padding follows
            a row's first token.
        stored: [B, before + S] bool, the batch's record once the step is done; None if all are
            tokens.
        hidden_by: [B, before + S], the user's whole mask, if it hides tokens stored earlier.
    """

    count: int
    before: int
    tokens: Tensor | None
    mask: Tensor | None
    stored: Tensor | None
    hidden_by: Tensor | None

    def positions(self, lengths: Sequence[int]) -> Tensor:
        """Positions of the new tokens in their sequences, `PADDING` for padding.

        Args:
            lengths: tokens that each row holds already.

        Returns:
            [B, S] int64 on the host.
        """
        start = torch.tensor(lengths)[:, None]
        if self.tokens is None:
            return start + torch.arange(self.count)
        return (start + self.tokens.cumsum(dim=1) - 1).where(self.tokens, PADDING)

    def since_start(self, batch: int, device: torch.device) -> Tensor:
        """Columns since each row's first token, -1 before it: [B, S] int64."""
        if self.stored is None:
            past = torch.arange(self.count, device=device).expand(batch, -1)
            return past + self.before
        started = self.stored.cumsum(dim=1).bool().cumsum(dim=1) - 1
        return started[:, -self.count :]


class PaddedBatch:
    """The record of a batch's columns.

    Attributes:
        count: columns so far, padding included.
    """

    def __init__(self) -> None:
        self.count = 0
        self._stored: Tensor | None = None  # [B, count] bool on the masks' device; None: all tokens

    def check(self, mask: Tensor | None, columns: int, started: Sequence[bool]) -> PaddedStep:
        """Compare a mask with the record. Changes nothing.

        Args:
            mask: [B, count + S], zero for padding; None if there is none.
            columns: number of new columns (S).
            started: for each row, whether it holds a token already.

        Raises:
            InvalidRequest: for a mask of another shape.
            PaddingError: for padding on the right, or a mask that shows what was padding.
            PromptError: for no rows or no columns.
        """
        batch, tokens, padded, inside, hidden_by = len(started), None, None, None, None
        if batch < 1 or columns < 1:
            raise PromptError("empty prompt: give every row at least one token")
        if mask is not None:
            if tuple(mask.shape) != (batch, self.count + columns):
                raise InvalidRequest(
                    f"attention_mask must be [{batch}, {self.count + columns}], past columns "
                    f"included, got {list(mask.shape)}"
                )
            padded = mask[:, self.count :].contiguous()
            tokens = padded.bool().cpu()
            after_first = tokens.cumsum(dim=1).bool() | torch.tensor(started)[:, None]
            _refuse_right_padding(tokens, after_first)
            inside = padded if bool((after_first & ~tokens).any()) else None
            hidden_by = mask if self._hides(mask) else None
            if bool(tokens.all()):
                tokens = padded = None
        stored = self._extended(padded, batch, columns)
        return PaddedStep(
            count=columns,
            before=self.count,
            tokens=tokens,
            mask=inside,
            stored=stored,
            hidden_by=hidden_by,
        )

    def extend(self, new: PaddedStep) -> None:
        """Add the columns of a finished step to the record."""
        self.count += new.count
        self._stored = new.stored

    def select_rows(self, rows: Tensor) -> None:
        """Let row i become what row `rows[i]` was. rows: [n] int64."""
        if self._stored is not None:
            self._stored = self._stored.index_select(0, rows)

    def stored(self, batch: int, device: torch.device) -> Tensor:
        """Return which columns so far were tokens when they were run, [B, count] bool."""
        if self._stored is None:
            return torch.ones(batch, self.count, dtype=torch.bool, device=device)
        return self._stored

    def visible(self, mask: Tensor, shape: tuple[int, int]) -> Tensor:
        """Whether the mask shows each stored token, as [rows, positions] bool.

        Args:
            mask: [B, count + S], the user's.
            shape: of the answer, at least [B, tokens of the longest row].
        """
        past, stored = self._past(mask)
        position = (stored.cumsum(dim=1) - 1)[stored]  # of stored tokens, row by row
        row = torch.arange(len(past), device=past.device)[:, None].expand_as(past)[stored]
        visible = past.new_ones(shape)
        visible[row, position] = past[stored]
        return visible

    def _hides(self, mask: Tensor) -> bool:
        """Whether the mask hides tokens that were stored.

        `generate()` makes such masks in a later turn: it fed padding to a finished row as if that
        were tokens, and the mask of the next turn leaves it out.
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
        """The record with new columns, [B, count + S] bool; new: [B, S], None if all are tokens."""
        known = new if self._stored is None else self._stored
        if known is None:
            return None
        ones = known.new_ones(batch, self.count + columns, dtype=torch.bool)
        if self._stored is not None:
            ones[:, : self.count] = self._stored
        if new is not None:
            ones[:, self.count :] = new
        return ones


def _refuse_right_padding(tokens: Tensor, after_first: Tensor) -> None:
    ends_padded = after_first[:, -1] & ~tokens[:, -1]
    if bool(ends_padded.any()):  # a row without tokens may be padded again
        raise PaddingError(
            f"padding on the right of row {_names(ends_padded)}: pad on the left "
            "(tokenizer.padding_side = 'left'), or Mamba states would decay over it"
        )


def _names(marked: Tensor) -> str:
    """Numbers of the rows that are True in [B] bool."""
    return ", ".join(map(str, marked.nonzero().flatten().tolist()))
