"""Columns of a padded batch, compared with a record that is kept row by row in lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from granite_paged.errors import InvalidRequest, PaddingError, PromptError
from granite_paged.hf.padding import PaddedBatch, PaddedStep
from granite_paged.paging.masks import PADDING

CPU = torch.device("cpu")


def mask_of(*rows: str) -> Tensor:
    """Return the mask that these rows spell: `.` is padding."""
    return torch.tensor([[int(column != ".") for column in row] for row in rows])


def bools(*rows: str) -> list[list[bool]]:
    return mask_of(*rows).bool().tolist()


def step(batch: PaddedBatch, *rows: str) -> PaddedStep:
    """Run a step whose mask, past columns included, is spelled by `rows`."""
    columns = len(rows[0]) - batch.count
    past = batch.stored(len(rows), CPU)
    new = batch.check(mask_of(*rows), columns, past.any(dim=1).tolist())
    batch.extend(new)
    return new


# -- one step -------------------------------------------------------------------------------------


def test_a_step_without_padding_needs_no_record() -> None:
    for mask in (None, mask_of("abc", "def")):
        batch = PaddedBatch()
        new = batch.check(mask, 3, [False, False])
        assert new == PaddedStep(3, 0, None, None, None, None)
        assert new.positions([0, 0]).tolist() == [[0, 1, 2], [0, 1, 2]]
        assert new.since_start(2, CPU).tolist() == [[0, 1, 2], [0, 1, 2]]
        assert batch.count == 0, "a check changes nothing"
        batch.extend(new)
        assert batch.count == 3
        assert batch.stored(2, CPU).tolist() == bools("abc", "def")
        assert batch.stored(2, CPU).dtype == torch.bool


def test_padding_on_the_left_counts_no_position() -> None:
    batch = PaddedBatch()
    new = step(batch, "..ab", "cdef")
    assert new.tokens is not None
    assert new.tokens.tolist() == bools("..ab", "cdef")
    assert (new.mask, new.hidden_by) == (None, None), "nothing follows a first token"
    assert new.positions([0, 0]).tolist() == [[PADDING, PADDING, 0, 1], [0, 1, 2, 3]]
    assert new.since_start(2, CPU).tolist() == [[-1, -1, 0, 1], [0, 1, 2, 3]]
    assert batch.stored(2, CPU).tolist() == bools("..ab", "cdef")


def test_padding_inside_a_row_is_masked() -> None:
    batch = PaddedBatch()
    step(batch, ".ab", "cde")
    new = step(batch, ".ab.x", "cdeyz")
    assert (new.count, new.before) == (2, 3)
    assert new.mask is not None
    assert new.mask.tolist() == [[0, 1], [1, 1]]
    assert new.mask.is_contiguous()
    assert new.tokens is not None
    assert new.tokens.tolist() == bools(".x", "yz")
    assert new.positions([2, 3]).tolist() == [[PADDING, 2], [3, 4]]
    assert new.since_start(2, CPU).tolist() == [[2, 3], [3, 4]]
    assert batch.stored(2, CPU).tolist() == bools(".ab.x", "cdeyz")


def test_a_later_step_without_padding_counts_on() -> None:
    batch = PaddedBatch()
    batch.extend(batch.check(None, 3, [False]))
    new = batch.check(None, 2, [True])
    assert new.positions([3]).tolist() == [[3, 4]]
    assert new.since_start(1, CPU).tolist() == [[3, 4]]
    batch.extend(new)
    assert (batch.count, batch.stored(1, CPU).tolist()) == (5, bools("abcde"))


def test_a_step_without_a_mask_after_padding_is_all_tokens() -> None:
    batch = PaddedBatch()
    step(batch, ".a", "bc")
    batch.extend(batch.check(None, 2, [True, True]))
    assert batch.stored(2, CPU).tolist() == bools(".axy", "bcxy")


def test_padding_after_tokens_is_recorded_from_the_first_column() -> None:
    batch = PaddedBatch()
    batch.extend(batch.check(None, 2, [False, False]))
    step(batch, "ab.x", "cdyz")
    assert batch.stored(2, CPU).tolist() == bools("ab.x", "cdyz")


def test_a_row_that_has_not_started_may_be_padding_only() -> None:
    batch = PaddedBatch()
    new = step(batch, "..", "ab")
    assert new.mask is None
    assert new.positions([0, 0]).tolist() == [[PADDING, PADDING], [0, 1]]
    assert step(batch, "...c", "abde").mask is None


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (1, 0)])
def test_an_empty_step_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(PromptError, match="empty prompt"):
        PaddedBatch().check(None, columns, [False] * rows)


def test_a_mask_of_another_shape_is_refused_with_the_shape_it_needs() -> None:
    batch = PaddedBatch()
    batch.extend(batch.check(None, 3, [False, False]))
    for mask in (mask_of("ab", "cd"), mask_of("abcde"), torch.ones(2, 5, 1)):
        with pytest.raises(InvalidRequest, match=r"must be \[2, 5\]"):
            batch.check(mask, 2, [True, True])


def test_padding_on_the_right_is_refused_by_row() -> None:
    with pytest.raises(PaddingError, match="right of row 1, 3, 4:"):
        PaddedBatch().check(mask_of("..a", "bc.", "...", "d..", ".e."), 3, [False] * 5)
    batch = PaddedBatch()
    step(batch, "ab")
    with pytest.raises(PaddingError, match="right of row 0:"):
        batch.check(mask_of("ab."), 1, [True])


def test_a_mask_that_shows_padding_is_refused_by_row() -> None:
    batch = PaddedBatch()
    step(batch, ".a", "bc", ".d")
    with pytest.raises(PaddingError, match="row 2 shows columns"):
        batch.check(mask_of(".ax", "bcx", "xdx"), 1, [True] * 3)


# -- what a later mask hides ----------------------------------------------------------------------


def test_a_mask_that_hides_stored_tokens_is_kept() -> None:
    batch = PaddedBatch()
    step(batch, ".ab", "cde")
    assert batch.check(mask_of(".abx", "cdex"), 1, [True, True]).hidden_by is None
    mask = mask_of(".a.x", "cdex")
    assert batch.check(mask, 1, [True, True]).hidden_by is mask
    shown = batch.visible(mask, (2, 5))
    # row 0 holds two tokens and hides the second; what no token is at counts as visible
    assert shown.tolist() == [[True, False, True, True, True], [True] * 5]
    assert batch.stored(2, CPU).tolist() == bools(".ab", "cde"), "hidden, but still stored"


def test_without_padding_a_mask_may_hide_tokens_too() -> None:
    batch = PaddedBatch()
    batch.extend(batch.check(None, 3, [False]))
    mask = mask_of("a.cx")
    assert batch.check(mask, 1, [True]).hidden_by is mask
    assert batch.visible(mask, (1, 3)).tolist() == [[True, False, True]]


def test_rows_are_selected_with_their_padding() -> None:
    batch = PaddedBatch()
    step(batch, ".ab", "cde")
    batch.select_rows(torch.tensor([1, 0, 1]))
    assert batch.stored(3, CPU).tolist() == bools("cde", ".ab", "cde")
    batch = PaddedBatch()
    batch.extend(batch.check(None, 2, [False]))
    batch.select_rows(torch.tensor([0, 0]))
    assert batch.stored(2, CPU).tolist() == bools("ab", "ab")


# -- any schedule -------------------------------------------------------------------------------


@given(st.data())
def test_any_steps_equal_a_record_by_row(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    record: list[list[bool]] = [[] for _ in range(rows)]
    batch = PaddedBatch()
    for _ in range(data.draw(st.integers(1, 4))):
        columns = data.draw(st.integers(1, 3))
        new = []
        for row in record:
            drawn = data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))
            if any(row) or any(drawn):
                drawn[-1] = True  # padding on the right is refused
            new.append(drawn)
        lengths = [sum(row) for row in record]
        mask = torch.tensor([past + now for past, now in zip(record, new, strict=True)])
        found = batch.check(mask.long(), columns, [length > 0 for length in lengths])
        batch.extend(found)
        positions, since = [], []
        for row, now, held in zip(record, new, lengths, strict=True):
            length, begun = held, row.index(True) if True in row else None
            positions.append([])
            since.append([])
            for column, token in enumerate(now, start=len(row)):
                positions[-1].append(length if token else PADDING)
                length += token
                begun = column if begun is None and token else begun
                since[-1].append(-1 if begun is None else column - begun)
            row.extend(now)
        assert found.positions(lengths).tolist() == positions
        assert found.since_start(rows, CPU).tolist() == since
        assert batch.stored(rows, CPU).tolist() == record
        inside = any(
            not token and True in row[:column] and column >= found.before
            for row in record
            for column, token in enumerate(row)
        )
        assert (found.mask is not None) == inside
