"""The batch size at which `default` is fastest, measured: the mark that paged is held against."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from granite_paged.evaluate.scorer import Request
from granite_paged.evaluate.scorer_default import DefaultScorer

LARGEST = 128
_SAMPLE = 64  # requests that every size is timed on
_WORSE = 1.25  # a size that is so much slower than the best ends the search


def best_batch(model: Any, requests: Sequence[Request], seed: int = 0) -> int:
    """The rows a forward pass, a power of two, at which a sample of requests takes least time.

    Sizes that do not fit into memory are not taken.
    """
    sample = random.Random(seed).sample(list(requests), min(_SAMPLE, len(requests)))
    times: dict[int, float] = {}
    size = 1
    while size <= LARGEST:
        try:
            times[size] = min(_seconds(model, sample, size) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        if times[size] > _WORSE * min(times.values()):
            break
        size *= 2
    return min(times, key=lambda size: times[size], default=1)


def _seconds(model: Any, requests: Sequence[Request], batch: int) -> float:
    start = time.perf_counter()
    DefaultScorer(model, batch).score(requests)  # it reads its scores, so the device is done
    return time.perf_counter() - start
