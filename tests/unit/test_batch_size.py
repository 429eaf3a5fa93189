"""`eval --batch-size auto`: `default` gets the batch at which it is fastest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from granite_paged.evaluate import batch_size
from granite_paged.evaluate.batch_size import LARGEST, best_batch
from granite_paged.evaluate.scorer import ScoreRequest
from tests.helpers.memory_errors import MEMORY_ERRORS

REQUESTS = [ScoreRequest([number], [[1]]) for number in range(3 * LARGEST)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds of each size; a size that is missing does not fit into memory."""
    times: dict[int, float] = {}

    def seconds(model: object, requests: Sequence[ScoreRequest], size: int) -> float:
        assert len(requests) >= size, "a batch that is not full is no measurement of its size"
        if size not in times:
            raise MEMORY_ERRORS["driver"]
        return times[size]

    monkeypatch.setattr(batch_size, "_seconds", seconds)
    return times


def test_the_largest_size_is_timed_with_a_full_batch(timed: dict[int, float]) -> None:
    timed.update({2**power: 1.0 / 2**power for power in range(8)})
    assert best_batch(None, REQUESTS) == LARGEST == 128


def test_a_size_that_does_not_fit_ends_the_search(timed: dict[int, float]) -> None:
    timed.update({1: 4.0, 2: 3.0, 4: 2.0, 16: 0.1})
    assert best_batch(None, REQUESTS) == 4


def test_slower_sizes_end_the_search_and_near_ones_do_not(timed: dict[int, float]) -> None:
    timed.update({1: 4.0, 2: 4.4, 4: 3.0, 8: 3.9, 16: 0.1})
    assert best_batch(None, REQUESTS) == 4
