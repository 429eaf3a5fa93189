"""Logits of every kind of model, by SDPA and by paged attention, against recorded ones."""

from __future__ import annotations

import pytest
from syrupy.assertion import SnapshotAssertion

from tests.helpers.golden_models import (
    MODELS,
    chunks_then_decode,
    golden_model,
    prefill,
    three_way,
    tokens,
)

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_prefill(name: str, golden_logits: SnapshotAssertion) -> None:
    golden = golden_model(name)

    measured = three_way(golden, prefill, tokens(golden.model, (37,), seed=1))

    assert golden_logits == measured


@every_model
def test_left_padded_batch(name: str, golden_logits: SnapshotAssertion) -> None:
    golden = golden_model(name)

    measured = three_way(golden, prefill, tokens(golden.model, (21, 16, 8, 5), seed=2))

    assert golden_logits == measured


@every_model
def test_chunked_prefill_then_decode(name: str, golden_logits: SnapshotAssertion) -> None:
    golden = golden_model(name)

    # the second row starts in the middle of the first chunk; both rows cross a page in decode
    measured = three_way(golden, chunks_then_decode, tokens(golden.model, (40, 31), seed=3))

    assert golden_logits == measured
