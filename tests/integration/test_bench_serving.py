"""The transformers modes of the serving benchmark run exactly the requested work."""

from __future__ import annotations

from typing import Any

import pytest

from granite_paged.bench.serving import Batches
from granite_paged.bench.workload import Arrival
from tests.helpers.tiny_models import tiny_model

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12), (13,)]
NEW = (2, 5, 3)


@pytest.mark.parametrize("static", [False, True])
def test_a_batch_runs_as_many_steps_as_its_longest_answer(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    shapes: list[tuple[int, ...]] = []
    forward = model.forward

    def noted(input_ids: Any, **others: Any) -> Any:
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "forward", noted)
    coming = [Arrival(0.0, prompt, new) for prompt, new in zip(PROMPTS, NEW, strict=True)]
    records = Batches(model, coming, 2, static=static).serve("default")
    assert [len(record.tokens) for record in records] == list(NEW)
    assert [len(record.times) for record in records] == list(NEW)
    last = (2, 5) if static else (1, 1)  # static: one shape for all batches
    assert shapes == [(2, 5), *[(2, 1)] * 4, last, *[(last[0], 1)] * 2]
