"""Exact mode on the CPU: every token is computed by itself, by the same calls in the same shapes.

Libraries choose kernels, and the order of their sums, by shape: a product of several rows differs
in its last bits from products of one row each. Here no call holds more than one token:

::

    products, norms, MLPs   [1, 1, width]
    Mamba                   the recurrence, from the state after the previous token
    attention               over the sequence's own tokens, copied in order (`one_token.py`)
    logits                  [1, 1, vocabulary]

So a token's bits depend on the tokens before it in its sequence, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from granite_paged.layers.one_token import attend_one_token
from granite_paged.runner.model import EagerModel, ModelStep


class ExactModel(EagerModel):
    """transformers' own modules, one token at a time."""

    reads_mask = False

    def forward(self, tokens: Tensor, step: ModelStep) -> Tensor:
        """See `EagerModel.forward`. Hidden states of padding are zeros."""
        shape = (*tokens.shape, int(self._config.hidden_size))
        hidden = torch.zeros(shape, dtype=self._decoder.dtype, device=tokens.device)
        for row, column in (step.positions >= 0).nonzero().tolist():
            one = ModelStep(
                step.rows[row : row + 1].clone(),
                step.states[row : row + 1].clone(),
                step.positions[row : row + 1, column : column + 1].clone(),
                None,
                None,
            )
            token = tokens[row : row + 1, column : column + 1].clone()
            hidden[row, column] = super().forward(token, one)[0, 0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """See `EagerModel.logits`."""
        logits: Callable[[Tensor], Tensor] = super().logits
        return torch.cat([logits(row.clone()[None])[0] for row in torch.split(hidden, 1)])

    def _attend_pages(self, index: int, query: Tensor, step: ModelStep, scale: float) -> Tensor:
        store, pool = self._storage.pages, self._storage.pages.pools[index]
        before = torch.arange(int(step.positions[0, 0]) + 1, device=query.device)
        slots = store.table.slots(before[None], store.geometry.page_size, step.rows)[0]
        return attend_one_token(query, pool.keys, pool.values, slots, scale)
