"""A `PagedCache` without a model, and steps of it of which no layer writes anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from granite_paged import PagedCache, PagedConfig
from tests.helpers.tiny_models import tiny_model

PAGE = 4
CPU = torch.device("cpu")
CONFIG = tiny_model().config


def make(**options: Any) -> PagedCache:
    """Return an empty cache for a tiny model, with pages of `PAGE` tokens."""
    config = PagedConfig(**{"page_size": PAGE, **options})
    return PagedCache(CONFIG, config, device=CPU, dtype=torch.float32)


def mask_of(*rows: str) -> Tensor:
    """Return the mask that these rows spell: `.` is padding."""
    return torch.tensor([[int(column != ".") for column in row] for row in rows])


def grow(own: PagedCache, columns: int, batch: int = 1, mask: Tensor | None = None) -> None:
    """Run a step of which no layer writes anything."""
    own.begin_step(batch, columns, mask)
    own.end_step()
