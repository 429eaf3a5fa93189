"""What the tokens of a step of a `PagedCache` attend to."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from granite_paged import PagedCache
from granite_paged.errors import CannotBeExact
from granite_paged.hf import step as step_module
from granite_paged.hf.step import TokenPages, TokenSlots
from tests.helpers.cache_steps import PAGE, grow, make, mask_of


def slots_of(own: PagedCache, row: int) -> Tensor:
    """Return the slots of a row's tokens, in order."""
    pages = torch.tensor(own.allocator.pages_of(own.sequences[row]))
    slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
    return slots[: own.allocator.length(own.sequences[row])]


def test_a_token_of_an_exact_step_attends_to_its_row_up_to_itself() -> None:
    own = make(exact=True)
    grow(own, 3, batch=2, mask=mask_of("..a", "bcd"))
    tokens = own.begin_step(2, 4, mask_of("..aefgh", "bcd.ijk")).tokens
    assert tokens is not None
    assert list(tokens.tokens()) == [*((0, n) for n in range(4)), *((1, n) for n in range(1, 4))]
    for row, column, count in ((0, 0, 2), (0, 3, 5), (1, 1, 4), (1, 3, 6)):
        assert tokens.attended(row, column).tolist() == slots_of(own, row)[:count].tolist()
    own.end_step()
    assert make().begin_step(1, 1).tokens is None


def test_a_row_may_end_with_the_last_column_of_the_page_table() -> None:
    own = make(exact=True)
    tokens = own.begin_step(1, 2 * PAGE).tokens
    assert isinstance(tokens, TokenSlots)
    assert tokens.slots[0].tolist() == slots_of(own, 0).tolist()


def test_kernels_of_exact_mode_find_tokens_by_their_pages_and_take_no_hidden_ones() -> None:
    own = make(exact=True)
    with mock.patch.object(step_module, "uses_exact_kernels", return_value=True):
        tokens = own.begin_step(2, 3, mask_of("..a", "bcd")).tokens
        assert isinstance(tokens, TokenPages)
        own.end_step()
        with pytest.raises(CannotBeExact, match="a mask hides"):
            own.begin_step(2, 1, mask_of("..ae", "b.df"))


@pytest.mark.parametrize("exact", [False, True])
def test_a_token_attends_to_nothing_that_a_mask_hides(exact: bool) -> None:
    own = make(exact=exact)
    grow(own, 9, batch=2)
    step = own.begin_step(2, 1, mask_of("a.cdefgh.j", "bcdefghijk"))
    shown = [[place for place in range(10) if place not in (1, 8)], list(range(10))]
    for row, places in enumerate(shown):
        at, slots = torch.tensor(row), torch.arange(own.allocator.pages * PAGE)
        allowed = step.block_mask.mask_mod(at, at, torch.tensor(0), slots)
        expected = slots_of(own, row)[places].tolist()
        assert allowed.nonzero().flatten().tolist() == sorted(expected)
        if step.tokens is not None:
            assert step.tokens.attended(row, 0).tolist() == expected
