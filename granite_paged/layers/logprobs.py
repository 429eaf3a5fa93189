"""Log-probabilities of logits: of drawn tokens and of scored ones, by the same function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ALIGNED = 16
"""Bytes. Where all rows begin at a multiple of it, a GPU reads them in the same way."""


def log_probabilities(logits: Tensor, *, exact: bool = False) -> Tensor:
    """Return the log-softmax of logits [n, V], of any float dtype, as [n, V] float32.

    exact: give a row the same bits whatever the other rows are.
    """
    return by_row(_log_softmax, logits, exact=exact)


def by_row(function: Callable[[Tensor], Tensor], rows: Tensor, *, exact: bool) -> Tensor:
    """Apply a function to rows [n, V], each by itself where its bits could depend on the others.

    That is in exact mode on the CPU, where vectorised loops treat the ends of a tensor in another
    way, and on a GPU where rows begin at other places modulo the width of a load.
    """
    if not exact or (rows.is_cuda and rows.shape[1] * rows.itemsize % _ALIGNED == 0):
        return function(rows)
    return torch.cat([function(row.clone()) for row in torch.split(rows, 1)])


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1, dtype=torch.float32)
