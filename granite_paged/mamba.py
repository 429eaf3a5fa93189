"""Recurrent state of a Mamba-2 layer, one row a sequence.

::

    conv_states[0]       [rows, conv_dim, conv_width]          model dtype
    recurrent_states[0]  [rows, heads, head_dim, state_size]   float32

A row's state is of fixed size however long its sequence is, so it needs no pages; what rows need is
to follow their sequences when a batch is reordered, repeated or cut down.
"""

from __future__ import annotations

import copy

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

_STATE = 0  # Granite's Mamba layers keep one state; transformers' cache allows for several


class MambaRows(LinearAttentionLayer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' recurrent state, with rows that can be selected and dropped."""

    is_compileable = False

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes a copy of what row `rows[i]` was. rows: [n] int64, repeats allowed."""
        for states in (self.conv_states, self.recurrent_states):
            if states[_STATE] is not None:
                states[_STATE] = states[_STATE].index_select(0, rows)

    def take(self, saved: MambaRows) -> None:
        """Become a copy of what another layer holds."""
        self.__dict__.update(copy.deepcopy(saved.__dict__))

    def reset(self) -> None:
        """Forget every row, and how many there were."""
        for by_state, unset in (
            (self.conv_states, None),
            (self.recurrent_states, None),
            (self.is_conv_states_initialized, False),
            (self.is_recurrent_states_initialized, False),
            (self.has_previous_state, False),
        ):
            by_state[_STATE] = unset

    @property
    def nbytes(self) -> int:
        """Bytes of both states."""
        states = (self.conv_states[_STATE], self.recurrent_states[_STATE])
        return sum(state.nbytes for state in states if state is not None)
