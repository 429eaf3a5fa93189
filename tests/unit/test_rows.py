"""Rows of a device: handed out by number, and cleared together before they are used again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from granite_paged.engine.rows import RowPool
from granite_paged.errors import BrokenInvariant


def make(rows: int = 4) -> tuple[RowPool, Any]:
    device: Any = mock.Mock()
    return RowPool(device, rows), device


def test_rows_are_taken_from_the_first_to_the_last() -> None:
    pool, _ = make()
    assert pool.free == pool.rows == 4
    assert [pool.take() for _ in range(4)] == [1, 2, 3, 4]
    assert pool.free == 0
    with pytest.raises(IndexError):
        pool.take()


def test_the_row_that_was_given_back_last_is_taken_first() -> None:
    pool, _ = make()
    first, second = pool.take(), pool.take()
    pool.give(second)
    pool.give(first)
    assert (pool.free, pool.take(), pool.take()) == (4, first, second)


def test_a_row_is_cleared_once_and_with_it_all_free_ones() -> None:
    pool, device = make()
    first, second = pool.take(), pool.take()
    pool.clear(first)
    pool.clear(first)
    assert device.clear_rows.mock_calls == [mock.call([1, 3, 4])], "the second has another owner"
    pool.give(first)
    pool.clear(second)
    assert device.clear_rows.mock_calls[1:] == [mock.call([1, 2])]


def test_a_row_that_could_not_be_cleared_is_cleared_again() -> None:
    pool, device = make(rows=2)
    row = pool.take()
    device.clear_rows.side_effect = [MemoryError, None]
    with pytest.raises(MemoryError):
        pool.clear(row)
    pool.clear(row)
    assert device.clear_rows.mock_calls == [mock.call([1, 2])] * 2


@pytest.mark.parametrize("taken", [[], [1], [1, 2, 2], [1, 2, 3], [0, 1, 2]], ids=repr)
def test_every_row_is_free_or_has_one_owner(taken: list[int]) -> None:
    pool, _ = make()
    assert [pool.take(), pool.take()] == [1, 2]
    pool.check_valid([2, 1])
    with pytest.raises(BrokenInvariant, match="a row is lost, or has two owners"):
        pool.check_valid(taken)
