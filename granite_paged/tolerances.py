"""Tolerances for "the same answer", each with its derivation. None was tuned to pass a test."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SDPA_RATIO = 1.1
"""float16 and bfloat16: limit on paged's error against float64, divided by SDPA's error.

Two correct kernels add the same rounded products in different orders, and their errors differ by
less than a tenth."""

LOGITS_FLOAT32, FEW_LAYERS = 2e-5, 4
"""float32: limit on the largest |paged - SDPA|, divided by the largest |logit|, of a few layers.

This is about 170 roundings of 2**-23. A few layers of sums over a few hundred terms differ by that
much when only the order of summation differs. The differences of more layers are independent of
each other, so their squares add: `logit_bound` grows with the root of the number of layers."""

LOGITS_FLOAT64 = 1e-12
"""The same limit for float64 without Mamba layers: about 10**4 roundings of 2**-53.

transformers computes Mamba layers in float32 in any case, so models with them keep
`LOGITS_FLOAT32`."""

RECALL = 0.98
"""Least accuracy of the embedded checkpoint on associative recall, for `default` and `paged`."""

WASTE = 0.04
"""Limit on the share of held KV bytes that store no token, for many sequences of 1 to 4096 tokens.

A sequence wastes half a page on average; half of 128 tokens is 3.1 % of the mean length."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference, divided by that of `expected`."""
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


def logit_bound(dtype: torch.dtype, *, attention_only: bool, layers: int) -> float | None:
    """Return the limit on the largest logit difference, divided by the largest logit.

    None for float16 and bfloat16, to which `SDPA_RATIO` applies instead.
    """
    if dtype not in (torch.float32, torch.float64):
        return None
    is_exact = dtype == torch.float64 and attention_only
    few = LOGITS_FLOAT64 if is_exact else LOGITS_FLOAT32
    return few * math.sqrt(max(1.0, layers / FEW_LAYERS))
