"""What "the same answer" means, and where each bound comes from. None was tuned."""

from __future__ import annotations

import torch
from torch import Tensor

SDPA_RATIO = 1.1
"""Half precision: our error against float64 may exceed SDPA's own by a tenth. Two summation orders
of the same rounded products differ by that much and no more when both are right."""

LOGITS_FLOAT32 = 2e-5
"""float32: largest |paged - SDPA| as a part of the largest |logit|. About 170 roundings of 2**-23:
what a few layers of sums over a few hundred terms differ by when only their order does."""

LOGITS_FLOAT64 = 1e-12
"""float64, attention only (transformers computes Mamba in float32): about 10**4 roundings."""

RECALL = 0.98
"""Accuracy that the embedded checkpoint reaches on associative recall, default and paged."""

WASTE = 0.04
"""Part of the held KV bytes without a token, over many sequences of 1 to 4096 tokens: half a page
of 128 is 3.1 % of their mean length."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square error as a part of the root mean square of `expected`."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def logit_bound(dtype: torch.dtype, *, attention_only: bool) -> float | None:
    """Bound on the largest logit difference, as a part of the largest logit; None for halves,
    which are judged by `SDPA_RATIO`.
    """
    if dtype == torch.float64 and attention_only:
        return LOGITS_FLOAT64
    if dtype in (torch.float32, torch.float64):
        return LOGITS_FLOAT32
    return None
