"""Bounds of the tests. The laws are the package's own; none was tuned to make a test pass."""

from __future__ import annotations

import torch

from granite_paged.tolerances import (
    LOGITS_FLOAT32,
    LOGITS_FLOAT64,
    RECALL,
    SDPA_RATIO,
    WASTE,
    relative_error,
)

__all__ = [
    "ATTENTION_FLOAT64",
    "LOGITS_FLOAT32",
    "LOGITS_FLOAT64",
    "RECALL",
    "SDPA_RATIO",
    "WASTE",
    "relative_error",
    "rounding_floor",
]

ATTENTION_FLOAT64 = LOGITS_FLOAT64


def rounding_floor(dtype: torch.dtype, terms: int) -> float:
    """Error that summing so many terms may make in a dtype whatever the order: for cases so small
    that SDPA happens to be exact and a ratio means nothing."""
    return torch.finfo(dtype).eps * terms**0.5
