"""One token at a time: what a module is called with, and how its results are put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from granite_paged.layers import logprobs
from granite_paged.layers.logprobs import by_row, log_probabilities
from granite_paged.layers.one_token import (
    RotaryByToken,
    TokenByToken,
    attend_one_token,
)

SLOTS = torch.tensor([5, 2, 9])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_attends_to_the_slots_it_names(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 1, 8).to(dtype)
    keys, values = (torch.randn(1, 2, 12, 8).to(dtype) for _ in range(2))
    found = attend_one_token(query, keys, values, SLOTS, scale=0.3)
    assert (found.shape, found.dtype) == ((1, 4, 1, 8), dtype)
    for head in range(4):
        own_keys, own_values = (pool[0, head // 2, SLOTS].double() for pool in (keys, values))
        weights = (0.3 * own_keys @ query[0, head, 0].double()).softmax(0)
        expected = weights @ own_values
        torch.testing.assert_close(found[0, head, 0].double(), expected.to(dtype).double())


class Calls:
    """A module's `forward` that records what it is called with."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, ...]] = []

    def double(self, hidden: Tensor) -> Tensor:
        self.given.append((hidden,))
        return torch.cat([hidden, -hidden], dim=-1)

    def rotary(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        self.given.append((x, position))
        angles = position[..., None] * torch.tensor([1.0, 0.5, 0.25])
        return angles.cos(), angles.sin()


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 5), (4, 1, 5), (1, 4, 5)])
def test_each_token_is_a_call_in_fresh_memory(shape: tuple[int, ...]) -> None:
    calls, hidden = Calls(), torch.randn(shape)
    found = TokenByToken(calls.double)(hidden)
    assert torch.equal(found, torch.cat([hidden, -hidden], dim=-1))
    assert [given.shape for (given,) in calls.given] == [(1, 1, 5)] * (shape[0] * shape[1])
    assert all(given.storage_offset() == 0 for (given,) in calls.given)


def test_each_position_is_a_call_of_its_own() -> None:
    calls, positions = Calls(), torch.tensor([[3, 4, 5, 6], [0, 9, 1, 7]])
    cos, sin = RotaryByToken(calls.rotary)(torch.randn(2, 4, 6), positions)
    expected = Calls().rotary(torch.zeros(1), positions)
    assert torch.equal(cos, expected[0])
    assert torch.equal(sin, expected[1])
    assert [(x.shape, position.shape) for x, position in calls.given] == [((1, 1, 6), (1, 1))] * 8


# -- log-probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_rows_are_computed_alone_only_in_exact_mode(exact: bool) -> None:
    calls: list[Tensor] = []
    rows = torch.arange(16 * 3).view(3, 16).float()

    def negated(given: Tensor) -> Tensor:
        calls.append(given)
        return -given

    assert torch.equal(by_row(negated, rows, exact=exact), -rows)
    assert [given.shape for given in calls] == ([(1, 16)] * 3 if exact else [(3, 16)])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_each_row(dtype: torch.dtype, exact: bool) -> None:
    logits = torch.randn(3, 7).to(dtype)
    found = log_probabilities(logits, exact=exact)
    assert found.dtype == torch.float32
    expected = logits.double() - logits.double().logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("width", "dtype", "whole"),
    [
        (4, torch.float32, True),
        (8, torch.float32, True),
        (8, torch.bfloat16, True),
        (5, torch.float32, False),
        (4, torch.bfloat16, False),
        (12, torch.bfloat16, False),
    ],
)
def test_rows_on_a_gpu_are_computed_together_where_each_begins_at_16_bytes(
    width: int, dtype: torch.dtype, whole: bool
) -> None:
    shapes: list[torch.Size] = []

    def kept(given: Tensor) -> Tensor:
        shapes.append(given.shape)
        return given

    by_row(kept, torch.zeros(3, width, dtype=dtype).as_subclass(OnGpu), exact=True)
    assert shapes == ([(3, width)] if whole else [(1, width)] * 3)


def test_log_probabilities_are_computed_together_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[torch.Size] = []

    def kept(given: Tensor) -> Tensor:
        shapes.append(given.shape)
        return given

    monkeypatch.setattr(logprobs, "_log_softmax", kept)
    log_probabilities(torch.zeros(3, 7))
    assert shapes == [(3, 7)]
