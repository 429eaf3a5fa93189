"""Attention over gathered pages: what is copied and masked, and numbers that are not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged.layers import gathered
from granite_paged.layers.gathered import gathered_attention
from granite_paged.paging.masks import PADDING
from tests.helpers.strategies import PagedSequences, Step, make_geometry

GROUP, KV_HEADS, ADDED = 2, 3, 5


def make(past: tuple[int, ...] = (17, 4), added: int = ADDED) -> tuple[PagedSequences, Step]:
    paged = PagedSequences(make_geometry(group=GROUP, kv_heads=KV_HEADS, page_size=8))
    return paged, paged.step({paged.open(tokens): added for tokens in past})


def gather(step: Step) -> Any:
    """Return what the layers of a step share."""
    return gathered._gather(step.mask(), len(step.query), step.query.shape[2], GROUP)


def attend(step: Step) -> Tensor:
    return gathered_attention(step.query, step.keys, step.values, step.mask(), step.scale)


# -- what is copied -------------------------------------------------------------------------------


def test_the_pages_of_a_row_are_copied_in_logical_order_up_to_the_longest_row() -> None:
    paged, step = make()
    shared = gather(step)
    first, second = (paged.allocator.pages_of(sequence) for sequence in paged.rows)
    assert shared.pages.tolist() == [list(first), [*second, 0]]
    assert shared.allowed.shape == (2, ADDED, 17 + ADDED)
    taken = shared.take(step.keys)
    assert taken.shape == (2, KV_HEADS, 17 + ADDED, 16)
    for row, sequence in enumerate(paged.rows):
        held = paged.keys[sequence]
        assert torch.equal(taken[row, :, : held.shape[1]], held)


def test_a_step_of_one_page_copies_one_page() -> None:
    _, step = make(past=(0, 1), added=2)
    assert gather(step).pages.shape == (2, 1)


def test_a_step_of_padding_alone_reads_one_token_and_gives_zeros() -> None:
    _, step = make()
    step = step.replace(positions=torch.full_like(step.positions, PADDING))
    shared = gather(step)
    assert shared.pages.tolist() == [[0], [0]]
    assert shared.allowed.shape == (2, ADDED, 1)
    assert shared.attends_to_nothing.all()
    assert not attend(step).any()


def test_a_query_attends_to_its_row_up_to_itself() -> None:
    _, step = make()
    shared = gather(step)
    at = torch.arange(17 + ADDED)
    for row, past in enumerate((17, 4)):
        for token in range(ADDED):
            expected = at <= past + token
            assert torch.equal(shared.allowed[row, token], expected)
    assert not shared.attends_to_nothing.any()


def test_a_bias_is_made_once_and_only_where_something_is_masked() -> None:
    _, step = make()
    shared = gather(step)
    bias = shared.bias(torch.float64)
    assert bias is not None
    assert bias.shape == (2, 1, ADDED, 17 + ADDED)
    assert torch.equal(bias[:, 0] == 0, shared.allowed)
    assert torch.equal(bias[:, 0] == -torch.inf, ~shared.allowed)
    assert shared.bias(torch.float64) is bias
    _, decode = make(past=(6, 6), added=1)
    assert gather(decode).bias(torch.float64) is None


def test_a_mask_of_more_rows_serves_a_smaller_batch() -> None:
    _, step = make(past=(17, 4, 9))
    mask, fewer = step.mask(), step.rows([0, 1])
    out = gathered_attention(fewer.query, step.keys, step.values, mask, step.scale)
    torch.testing.assert_close(out, attend(step)[:2])


# -- what is masked at once -----------------------------------------------------------------------


def parts_of(tokens: int, width: int, batch: int = 1) -> list[list[int]]:
    """Return the folded rows of each call of the mask_mod."""
    calls: list[list[int]] = []

    def mask_mod(row: Tensor, head: Tensor, folded_row: Tensor, slot: Tensor) -> Tensor:
        calls.append(folded_row.flatten().tolist())
        return torch.ones(batch, folded_row.shape[1], 1, dtype=torch.bool)

    slots = torch.zeros(batch, width, dtype=torch.long)
    mask = SimpleNamespace(mask_mod=mask_mod)
    allowed = gathered._allowed(mask, slots, tokens, GROUP)  # type: ignore[arg-type]
    assert allowed.shape == (batch, tokens, 1)
    return calls


def test_four_million_pairs_are_masked_at_once() -> None:
    assert len(parts_of(2**11, 2**11)) == 1
    assert len(parts_of(2**11 + 1, 2**11)) == 2
    assert len(parts_of(2**10, 2**11, batch=2)) == 1
    assert len(parts_of(2**10 + 1, 2**11, batch=2)) == 2


def test_a_row_longer_than_that_is_masked_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "MASKED_AT_ONCE", 5)
    assert parts_of(3, 7) == [[0], [GROUP], [2 * GROUP]]


# -- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_only_queries_that_attend_to_such_a_number_give_nan(name: str, value: float) -> None:
    """Those of its own KV head, in its own row, at its position or later."""
    paged, step = make()
    clean, stored = attend(step), getattr(step, name).clone()
    place = 17 + 2  # of the third new token of the first row
    stored[0, 1, paged.slots(paged.rows[0])[place], 7] = value
    out = attend(step.replace(**{name: stored}))
    sick = torch.zeros(2, KV_HEADS * GROUP, ADDED, dtype=torch.bool)
    sick[0, GROUP : 2 * GROUP, 2:] = True
    assert torch.equal(out.isnan().any(3), sick)
    assert torch.equal(out.isnan().all(3), sick)
    torch.testing.assert_close(out[~sick], clean[~sick])


@pytest.mark.parametrize("name", ["keys", "values"])
def test_such_a_number_beyond_the_last_token_reaches_nothing(name: str) -> None:
    paged, step = make()
    clean, stored = attend(step), getattr(step, name).clone()
    stored[:, :, paged.unread_slots(paged.rows)] = torch.nan
    torch.testing.assert_close(attend(step.replace(**{name: stored})), clean)
