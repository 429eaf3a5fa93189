"""Parts of a runner's model in plain PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from granite_paged.paging.page_table import PageTable
from granite_paged.runner.model import EagerModel, ModelStep, by_head

ROWS, PAGE = 5, 4


def make(**parts: Any) -> tuple[EagerModel, Any]:
    """Return a model without layers, and its pool."""
    table = PageTable(ROWS, 3, 8, torch.device("cpu"))
    table.write(2, 0, 5)
    table.write(4, 0, 7)
    table.settle()
    pool = mock.Mock()
    pages = SimpleNamespace(table=table, pools={1: pool}, geometry=SimpleNamespace(page_size=PAGE))
    storage: Any = SimpleNamespace(
        pages=pages,
        tokens=torch.zeros(ROWS, dtype=torch.int64),
        nonfinite=torch.zeros(ROWS, dtype=torch.uint8),
    )
    live = SimpleNamespace(
        lm_head=lambda hidden: 10 * hidden,
        base_model=SimpleNamespace(norm=lambda hidden: hidden + 1, **parts),
        config=SimpleNamespace(logits_scaling=4.0),
    )
    return EagerModel(live, storage, "eager"), pool


def step_of(rows: list[int], positions: list[list[int]]) -> ModelStep:
    at = torch.tensor(rows)
    return ModelStep(at, at - 1, torch.tensor(positions, dtype=torch.int32), None)


def test_logits_are_of_normed_states_and_divided_by_their_scaling() -> None:
    model, _ = make()
    assert model.logits(torch.tensor([[3.0, 7.0]])).tolist() == [[10.0, 20.0]]


@pytest.mark.parametrize(
    ("bad", "flags"),
    [
        ([], [0, 0]),
        ([(0, 0)], [1, 0]),
        ([(0, 1)], [1, 0]),
        ([(1, 2)], [0, 1]),
        ([(1, 0)], [0, 0]),
        ([(0, 1), (1, 1)], [1, 1]),
    ],
    ids=["none", "first token", "second token", "last token", "padding", "two rows"],
)
def test_a_row_is_flagged_for_its_tokens_and_not_for_its_padding(
    bad: list[tuple[int, int]], flags: list[int]
) -> None:
    model, pool = make()
    finite = torch.ones(2, 3, dtype=torch.bool)
    for place in bad:
        finite[place] = False
    pool.write.return_value = finite
    keys, values = torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4)
    model._write(1, keys, values, step_of([4, 2], [[0, 1, 2], [-1, 0, 1]]))
    slots, *written = pool.write.call_args.args
    assert slots.tolist() == [28, 29, 30, 0, 20, 21]
    assert written == [keys, values]
    assert model._storage.nonfinite[[4, 2]].tolist() == flags
    assert model._storage.nonfinite[[0, 1, 3]].tolist() == [0, 0, 0]


def test_a_flag_stays_until_it_is_cleared() -> None:
    model, pool = make()
    model._storage.nonfinite[4] = 1
    pool.write.return_value = torch.ones(1, 1, dtype=torch.bool)
    model._write(1, torch.zeros(1), torch.zeros(1), step_of([4], [[0]]))
    assert model._storage.nonfinite.tolist() == [0, 0, 0, 0, 1]


def test_positions_turn_queries_and_keys_where_the_model_has_rotary_embeddings() -> None:
    hidden, positions = torch.zeros(1, 3, 2), torch.tensor([[-1, 0, 1]])
    assert make(rotary_emb=None)[0]._rotary(hidden, positions) is None
    turned = mock.Mock()
    assert make(rotary_emb=turned)[0]._rotary(hidden, positions) is turned.return_value
    assert turned.call_args.args[1].tolist() == [[0, 0, 1]], "padding has no negative angle"


def test_a_decode_step_feeds_the_next_token_of_its_rows() -> None:
    model, _ = make()
    step, fed = step_of([4, 2], [[3], [5]]), []

    def forward(tokens: Tensor, step: ModelStep) -> Tensor:
        fed.append(tokens.tolist())
        return tokens[..., None].float()

    with mock.patch.object(model, "forward", forward):
        logits = model.decode(torch.tensor([0, 1, 12, 3, 14]), step)
    assert fed == [[[14], [12]]]
    assert logits.tolist() == [[10 * 15 / 4], [10 * 13 / 4]]


def test_the_first_of_equal_logits_is_written() -> None:
    model, _ = make()
    model.write_argmax(torch.tensor([[1.0, 3.0, 3.0], [5.0, 2.0, 1.0]]), torch.tensor([4, 2]))
    assert model._storage.tokens.tolist() == [0, 0, 0, 0, 1]
    assert model._storage.nonfinite.tolist() == [0] * ROWS


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_is_flagged_for_logits_that_are_not_finite(bad: float) -> None:
    model, _ = make()
    model._storage.nonfinite[3] = 1
    logits = torch.tensor([[1.0, bad, 3.0], [5.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    model.write_argmax(logits, torch.tensor([4, 2, 3]))
    assert model._storage.nonfinite.tolist() == [0, 0, 0, 1, 1]


def test_projections_are_split_by_head() -> None:
    projected = torch.arange(2 * 3 * 20).view(2, 3, 20)
    heads = by_head(projected, 5)
    assert heads.shape == (2, 4, 3, 5)
    for head in range(4):
        assert torch.equal(heads[:, head], projected[..., 5 * head : 5 * head + 5])
