"""What the requests of a report of bits are, how they run, and which reports are compared."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from granite_paged import PagedConfig, bits
from granite_paged.bits import BitsReport, bits_report, newest_pairs
from granite_paged.errors import InvalidArgument
from granite_paged.models import LoadedModel
from granite_paged.paging.allocator import PageAllocator
from granite_paged.runner.runner import Runner
from granite_paged.runner.storage import RowSnapshot
from tests.helpers.tiny_models import shortest_model

REPORT = BitsReport("tiny", "f00", "float32", {"torch": "2.14.1"}, {"short": {"logits": "a"}})


def test_recorded_bits_are_of_these_requests() -> None:
    """Another length or cut would make other bits, of which none are recorded."""
    expected = {"short": (7, ()), "chunked": (100, (33, 64, 71)), "long": (300, ())}
    assert expected == bits.REQUESTS
    assert bits.FED == 4


def test_a_request_is_computed_in_its_chunks_and_then_token_by_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bits, "REQUESTS", {"chunked": (9, (2, 5))})
    model = shortest_model()
    calls: list[Any] = []

    def noted(owner: Any, name: str, read: Any) -> Any:
        right = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            calls.append(read(*args))
            return right(self, *args)

        return mock.patch.object(owner, name, call)

    def chunk(chunks: Any) -> tuple[int, int, int]:
        ((row, start, tokens),) = chunks
        return (row, start, len(tokens))

    with (
        noted(PageAllocator, "append", lambda growth: list(growth.values())),
        noted(Runner, "prefill", chunk),
        noted(Runner, "decode", lambda rows, positions: (rows, positions)),
    ):
        bits_report(LoadedModel("tiny", model.requires_grad_(False), None), PagedConfig())
    prompt = [[2], (1, 0, 2), [3], (1, 2, 3), [4], (1, 5, 4)]
    fed = [each for position in range(9, 13) for each in ([1], ([1], [position]))]
    assert calls == prompt + fed


def test_the_newest_reports_of_each_model_and_dtype_are_compared() -> None:
    double = replace(REPORT, dtype="float64")
    older, old, new = (replace(REPORT, place={"torch": name}) for name in ("1", "2", "3"))
    first, second = [older, double, old], [older, new, replace(REPORT, weights="other")]
    assert newest_pairs(first, second) == [(old, new)]
    assert newest_pairs(first, [*second, double]) == [(old, new), (double, double)]
    with pytest.raises(InvalidArgument, match="no model in common"):
        newest_pairs([double], second)


@pytest.mark.parametrize(("slot", "counts"), [(0, True), (2, True), (3, False), (4, False)])
@pytest.mark.parametrize("name", ["recent", "times"])
def test_kept_inputs_count_up_to_the_last_token(name: str, slot: int, counts: bool) -> None:
    """The slots after it hold inputs of no token of the request: 13 tokens in slots of 5."""
    states = RowSnapshot(*(torch.zeros(2, 5, 7, 9) for _ in range(4)))
    runner: Any = SimpleNamespace(
        device=torch.device("cpu"),
        geometry=SimpleNamespace(page_size=16, attention_layers=(), mamba_layers=(0, 2)),
        storage=SimpleNamespace(pages=SimpleNamespace(table=mock.MagicMock())),
        save_row=lambda row: states,
    )
    before = dict(bits._by_layer(runner, 13))
    getattr(states, name)[1, slot] = 1
    after = dict(bits._by_layer(runner, 13))
    assert after["0 mamba"] == before["0 mamba"]
    assert (after["2 mamba"] != before["2 mamba"]) is counts
