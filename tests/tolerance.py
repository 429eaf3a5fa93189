"""Bounds, and where they come from. None was tuned to make a test pass."""

from __future__ import annotations

import torch
from torch import Tensor

SDPA_RATIO = 1.1
"""Our error against float64 may exceed SDPA's own by a tenth: two summation orders of the same
products differ by that much and no more when both are right."""

LOGITS_FLOAT32 = 2e-5
"""Largest |paged - SDPA| of float32 logits, as a part of the largest |logit|: about 170 float32
roundings (2**-23 each), what 4 layers of sums over a few hundred terms may differ by."""

ATTENTION_FLOAT64 = 1e-12
"""For float64: sums of 10**3 terms round to about 10**3 * 2**-53."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square error as a part of the root mean square of `expected`."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def rounding_floor(dtype: torch.dtype, terms: int) -> float:
    """Error that summing so many terms may make in a dtype whatever the order: for cases so small
    that SDPA happens to be exact and a ratio means nothing."""
    return torch.finfo(dtype).eps * terms**0.5
