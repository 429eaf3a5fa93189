"""A runner's model in exact mode: which calls it makes, and with what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from granite_paged.paging.page_table import PageTable
from granite_paged.runner import exact_model
from granite_paged.runner.exact_model import ExactModel
from granite_paged.runner.model import EagerModel, ModelStep

HIDDEN, VOCABULARY, PAGE = 6, 11, 4


@pytest.fixture
def model() -> ExactModel:
    table = PageTable(rows=5, width=3, pages=8, device=torch.device("cpu"))
    for row, logical, physical in ((2, 0, 5), (2, 1, 3), (4, 0, 7)):
        table.write(row, logical, physical)
    table.settle()
    pages = SimpleNamespace(
        table=table,
        pools={1: SimpleNamespace(keys="keys", values="values")},
        geometry=SimpleNamespace(page_size=PAGE),
    )
    decoder = SimpleNamespace(dtype=torch.float64, norm=lambda hidden: hidden)
    live = SimpleNamespace(
        lm_head=lambda hidden: hidden.repeat(1, 2),
        base_model=decoder,
        config=SimpleNamespace(hidden_size=HIDDEN, logits_scaling=2.0),
    )
    return ExactModel(live, SimpleNamespace(pages=pages), "auto")  # type: ignore[arg-type]


def test_it_reads_no_mask() -> None:
    assert ExactModel.reads_mask is False
    assert EagerModel.reads_mask is True


def test_every_token_is_computed_by_itself_in_order(model: ExactModel) -> None:
    tokens = torch.tensor([[7, 8, 9], [1, 2, 3]])
    positions = torch.tensor([[5, 6, 7], [0, 1, -1]])
    step = ModelStep(torch.tensor([2, 4]), torch.tensor([1, 3]), positions, None)
    calls: list[Any] = []

    def forward(self: EagerModel, token: Tensor, one: ModelStep) -> Tensor:
        calls.append((token.tolist(), *(part.tolist() for part in one[:3]), *one[3:]))
        assert all(part.untyped_storage().nbytes() == 8 for part in (token, *one[:3])), "a view"
        return torch.full((1, 1, HIDDEN), float(token))

    with mock.patch.object(EagerModel, "forward", forward):
        hidden = model.forward(tokens, step)
    assert calls == [
        ([[7]], [2], [1], [[5]], None, None, False),
        ([[8]], [2], [1], [[6]], None, None, False),
        ([[9]], [2], [1], [[7]], None, None, False),
        ([[1]], [4], [3], [[0]], None, None, False),
        ([[2]], [4], [3], [[1]], None, None, False),
    ]
    assert hidden.dtype == torch.float64
    assert hidden.shape == (2, 3, HIDDEN)
    assert hidden[:, :, -1].tolist() == [[7, 8, 9], [1, 2, 0]], "padding is zero"


def test_every_row_of_logits_is_computed_by_itself(model: ExactModel) -> None:
    hidden, shapes = torch.arange(3.0 * HIDDEN).view(3, HIDDEN), []

    def logits(self: EagerModel, row: Tensor) -> Tensor:
        shapes.append(tuple(row.shape))
        return row[..., :2] * 10

    with mock.patch.object(EagerModel, "logits", logits):
        found = model.logits(hidden)
    assert shapes == [(1, 1, HIDDEN)] * 3
    assert torch.equal(found, hidden[:, :2] * 10)


@pytest.mark.parametrize(("position", "expected"), [(0, [20]), (5, [20, 21, 22, 23, 12, 13])])
def test_a_token_attends_to_the_slots_of_its_row_up_to_itself(
    model: ExactModel, position: int, expected: list[int]
) -> None:
    rows, query = torch.tensor([2]), torch.zeros(1, 2, 1, 4)
    step = ModelStep(rows, rows - 1, torch.tensor([[position]]), None)
    attend = mock.Mock(return_value="attended")
    with mock.patch.object(exact_model, "attend_one_token", attend):
        assert model._attend_pages(1, query, step, 0.5) == "attended"
    (_, keys, values, slots, scale) = attend.call_args.args
    assert (keys, values, slots.tolist(), scale) == ("keys", "values", expected, 0.5)
