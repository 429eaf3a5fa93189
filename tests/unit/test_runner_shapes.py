"""Shapes of captured prefill graphs, and how chunks are arranged over them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.geometry import bucket
from granite_paged.runner.shapes import (
    SHORTEST_CHUNK,
    STEP_TOKENS,
    Batch,
    ChunkPiece,
    Shapes,
)

LENGTHS = [SHORTEST_CHUNK << i for i in range(7)]
"""Lengths up to the default chunk of 2,048 tokens."""

CAPTURED = Shapes(2048, 256, captured=True, alignment=256)


@pytest.mark.parametrize(
    ("length", "batches"),
    [(32, [1, 16]), (64, [1, 8]), (128, [1, 4, 16]), (256, [1, 8]), (1024, [1, 2]), (2048, [1])],
)
def test_no_prefill_graph_exceeds_a_chunk(length: int, batches: list[int]) -> None:
    assert CAPTURED.batches(length) == batches


@given(st.sampled_from(LENGTHS), st.integers(1, 20))
def test_no_graph_has_twice_the_available_rows(length: int, rows: int) -> None:
    """Its workspace would be held for rows that can never be filled."""
    batches = Shapes(2048, rows, captured=True).batches(length)
    most = bucket(rows)
    assert batches == sorted({min(batch, most) for batch in CAPTURED.batches(length)})
    assert max(batches) < 2 * rows


@pytest.mark.parametrize("chunk_tokens", [16, 32, 64, 256, 2048, 8192])
def test_a_small_runner_has_graphs(chunk_tokens: int) -> None:
    for length in [each for each in (16, *LENGTHS) if each <= chunk_tokens]:
        batches = Shapes(chunk_tokens, 256, captured=True).batches(length)
        assert batches[0] == 1
        assert batches[-1] * length <= chunk_tokens


@pytest.mark.parametrize(
    ("length", "chunks", "batch"),
    [
        (32, 1, 1),
        (32, 2, 16),  # two launches cost as much as 14 empty rows
        (64, 40, 8),
        (128, 3, 4),
        (128, 16, 16),
        (512, 2, 1),
        (512, 3, 4),
        (2048, 9, 1),
    ],
)
def test_chunks_use_the_cheapest_batch(length: int, chunks: int, batch: int) -> None:
    assert CAPTURED.cheapest_batch(length, chunks) == batch


@given(st.sampled_from(LENGTHS), st.integers(1, 100))
def test_no_batch_is_cheaper_per_chunk(length: int, chunks: int) -> None:
    def cost(batch: int) -> float:
        return (STEP_TOKENS + batch * length) / min(batch, chunks)

    chosen = CAPTURED.cheapest_batch(length, chunks)
    assert cost(chosen) == min(map(cost, CAPTURED.batches(length)))


# -- arranging chunks ---------------------------------------------------------------------------

CHUNKS = st.lists(st.integers(1, 2048), min_size=1, max_size=40)


def cost(steps: Iterable[Batch]) -> int:
    return sum(STEP_TOKENS + step.batch * step.length for step in steps)


@given(CHUNKS, st.booleans())
def test_every_token_is_computed_once_and_in_order(lengths: list[int], cut: bool) -> None:
    done = dict.fromkeys(range(len(lengths)), 0)
    for step in CAPTURED.arrange(lengths, cut=cut):
        assert step.batch in CAPTURED.batches(step.length)
        assert len(step.pieces) <= step.batch
        assert len({piece.chunk for piece in step.pieces}) == len(step.pieces)
        for chunk, start, end in step.pieces:
            assert start == done[chunk] < end <= start + step.length
            done[chunk] = end
    assert list(done.values()) == lengths


@given(CHUNKS)
def test_chunks_are_split_only_at_boundaries_to_save_time(lengths: list[int]) -> None:
    cut = CAPTURED.arrange(lengths)
    assert all(piece.start % 256 == 0 for step in cut for piece in step.pieces)
    assert cost(cut) <= cost(CAPTURED.arrange(lengths, cut=False))
    assert CAPTURED.prefill_cost(lengths) == cost(cut)


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [
        ([300], [(1, 512)]),
        ([384] * 16, [(8, 256), (8, 256), (16, 128)]),
        ([500] * 8, [(4, 512), (4, 512)]),  # the rest after 256 tokens is as long again
        ([700], [(1, 1024)]),
        ([20] * 4 + [300], [(1, 512), (16, 32)]),
        ([257] * 16, [(8, 256), (8, 256), (16, 32)]),
        ([1407], [(1, 2048)]),  # in pieces of 1,024, 256 and 127 tokens, it would take longer
        ([544, 1525], [(2, 1024), (1, 512)]),  # the longest are cut first
    ],
)
def test_many_chunks_ending_just_past_a_boundary_are_split(
    lengths: list[int], steps: list[tuple[int, int]]
) -> None:
    assert [(step.batch, step.length) for step in CAPTURED.arrange(lengths)] == steps


def test_chunks_are_not_cut_where_that_saves_nothing() -> None:
    """Cut at 512, the two longer ones take four rows of 512 and eight of 64 with the rest."""
    shapes = Shapes(2048, 256, captured=True, alignment=64)
    whole, cut = [(2, 1024), (1, 512)], [(4, 512), (8, 64)]
    assert len({sum(STEP_TOKENS + b * n for b, n in steps) for steps in (whole, cut)}) == 1
    assert [(step.batch, step.length) for step in shapes.arrange([378, 551, 551])] == whole


def test_a_length_beyond_a_call_has_a_batch_of_one() -> None:
    assert Shapes(64, 8, captured=True).batches(128) == [1]


def test_uncaptured_steps_have_the_shape_of_their_chunks() -> None:
    plain = Shapes(64, 8, captured=False)
    pieces = (ChunkPiece(0, 0, 3), ChunkPiece(1, 0, 20), ChunkPiece(2, 0, 7))
    assert plain.arrange([3, 20, 7]) == (Batch(pieces, 3, 20),)
    assert plain.fits([20, 3, 7])
    assert not plain.fits([20, 3, 7, 1])
    assert CAPTURED.fits([2048] * 9)
    assert not CAPTURED.fits([2049])
    assert list(plain.all()) == []


# -- lengths, costs and all shapes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_tokens", "tokens", "length"),
    [(2048, 1, 32), (2048, 32, 32), (2048, 33, 64), (2048, 2048, 2048), (16, 1, 16)],
)
def test_a_chunk_is_computed_at_the_next_power_of_two(
    chunk_tokens: int, tokens: int, length: int
) -> None:
    assert Shapes(chunk_tokens, 8, captured=True).length(tokens) == length
    assert Shapes(chunk_tokens, 8, captured=False).length(tokens) == tokens


def test_costs_are_those_of_the_record_in_tokens_of_a_long_prompt() -> None:
    """On an H200, a prefill step costs 450 tokens more than it computes, and a decode step 290 and
    7.7 per row."""
    assert CAPTURED.prefill_cost([2048]) == 450 + 2048
    assert CAPTURED.prefill_cost([2048, 1]) == 2 * 450 + 2048 + 32
    assert CAPTURED.decode_cost(3) == 290 + 7.7 * 4
    assert Shapes(64, 8, captured=False).decode_cost(3) == 290 + 7.7 * 3


def test_a_call_without_chunks_fits() -> None:
    assert Shapes(64, 8, captured=False).fits([])


def test_chunks_may_be_cut_anywhere_by_default() -> None:
    assert Shapes(64, 8, captured=True).alignment == 1


@pytest.mark.parametrize(
    ("longest", "lengths"), [(1, [32]), (32, [32]), (33, [32, 64]), (9999, LENGTHS)]
)
def test_a_chunk_alone_makes_steps_of_one_row(longest: int, lengths: list[int]) -> None:
    assert CAPTURED.alone(longest) == {(1, length) for length in lengths}


def test_the_steps_of_a_first_request_are_captured_first() -> None:
    prefills, decodes = [(1, 32), (1, 64), (1, 128)], [(1, 1), (2, 1), (4, 1), (8, 1)]
    found = list(Shapes(128, 5, captured=True).all())
    assert found == [*prefills, *decodes, (4, 32), (2, 64)]
