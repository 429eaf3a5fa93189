"""Which graphs a captured prefill has, and which of them chunks are shared out over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.engine.shapes import (
    SHORTEST_CHUNK,
    STEP_TOKENS,
    cheapest_batch,
    prefill_batches,
)

LENGTHS = [SHORTEST_CHUNK << i for i in range(7)]
"""Up to the usual chunk of 2,048 tokens."""


@pytest.mark.parametrize(
    ("length", "batches"),
    [(32, [1, 16]), (64, [1, 8]), (128, [1, 4, 16]), (256, [1, 8]), (1024, [1, 2]), (2048, [1])],
)
def test_a_prefill_has_few_graphs_and_none_of_more_than_a_chunk(
    length: int, batches: list[int]
) -> None:
    assert prefill_batches(length, 2048) == batches


@pytest.mark.parametrize("chunk_tokens", [16, 32, 64, 256, 2048, 8192])
def test_a_small_runner_has_graphs_too(chunk_tokens: int) -> None:
    for length in [each for each in (16, *LENGTHS) if each <= chunk_tokens]:
        batches = prefill_batches(length, chunk_tokens)
        assert batches[0] == 1
        assert batches[-1] * length <= chunk_tokens


@pytest.mark.parametrize(
    ("length", "chunks", "batch"),
    [
        (32, 1, 1),
        (32, 2, 16),  # two launches cost as much as the 14 rows that stay empty
        (64, 40, 8),
        (128, 3, 4),
        (128, 16, 16),
        (512, 2, 1),
        (512, 3, 4),
        (2048, 9, 1),
    ],
)
def test_chunks_take_the_batch_that_costs_them_least(length: int, chunks: int, batch: int) -> None:
    assert cheapest_batch(length, chunks, 2048) == batch


@given(st.sampled_from(LENGTHS), st.integers(1, 100))
def test_no_other_batch_is_cheaper_a_chunk(length: int, chunks: int) -> None:
    def cost(batch: int) -> float:
        return (STEP_TOKENS + batch * length) / min(batch, chunks)

    chosen = cheapest_batch(length, chunks, 2048)
    assert cost(chosen) == min(map(cost, prefill_batches(length, 2048)))
