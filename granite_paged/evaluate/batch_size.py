"""Measure the batch size at which `default` is fastest, so that `paged` meets its best."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from granite_paged.device import one_memory_error
from granite_paged.evaluate.scorer import ScoreRequest
from granite_paged.evaluate.scorer_default import DefaultScorer

LARGEST = 128
_SAMPLE = LARGEST  # requests on which each size is timed: one batch of the largest
_WORSE = 1.25  # a size this many times slower than the best ends the search


def best_batch(model: Any, requests: Sequence[ScoreRequest], seed: int = 0) -> int:
    """Return the rows per forward pass, a power of two, at which a sample takes the least time.

    Sizes that do not fit into memory are skipped; `seed` draws the sample.
    """
    sample = random.Random(seed).sample(list(requests), min(_SAMPLE, len(requests)))
    times: dict[int, float] = {}
    size = 1
    while size <= LARGEST:
        try:
            with one_memory_error():
                times[size] = min(_seconds(model, sample, size) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        if times[size] > _WORSE * min(times.values()):
            break
        size *= 2
    return min(times, key=lambda size: times[size], default=1)


def _seconds(model: Any, requests: Sequence[ScoreRequest], batch: int) -> float:
    start = time.perf_counter()
    DefaultScorer(model, batch).score(requests)  # it reads its scores: it waits for the device
    return time.perf_counter() - start
