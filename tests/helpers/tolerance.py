"""Tolerances of the tests, taken from `granite_paged.tolerances`. None was tuned to pass a test."""

from __future__ import annotations

import torch
from torch import Tensor

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
    "assert_as_defined",
    "assert_same_logits",
    "largest_error",
    "relative_error",
    "rounding_floor",
]

ATTENTION_FLOAT64 = LOGITS_FLOAT64


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a fraction of the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    """Check that float32 logits differ by rounding only: sums may be in another order."""
    error = largest_error(actual, expected)
    assert error <= LOGITS_FLOAT32, (
        f"logits differ by {error:.1e} of the largest logit, the bound is {LOGITS_FLOAT32:.1e}; "
        "tests/golden/test_golden_logits.py says whether SDPA or paged moved"
    )


def assert_as_defined(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Check a kernel's result against that of the plain PyTorch or the formula that defines it."""
    error = largest_error(actual, expected)
    assert error <= bound, (
        f"the kernel is off its definition by {error:.1e} of the largest value, the bound is "
        f"{bound:.1e}; if the definition changed on purpose, change the kernel as well"
    )


def rounding_floor(dtype: torch.dtype, terms: int) -> float:
    """Return the error that a sum of `terms` terms may have, whatever its order: eps * sqrt(terms).

    It is the bound where a case is so small that SDPA happens to be exact, so that a ratio to
    SDPA's error means nothing.
    """
    return torch.finfo(dtype).eps * terms**0.5
