"""Bits of exact mode on this GPU against the recorded ones, where versions match."""

from __future__ import annotations

import pytest

from granite_paged.bits import bits_report
from granite_paged.models import load
from tests.helpers.golden_bits import compare_with_recorded


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [(None, "bfloat16"), (None, "float16"), ("granite-4.0-h-1b", "bfloat16")],
)
def test_a_model_has_the_recorded_bits(geometry: str | None, dtype: str) -> None:
    loaded = load(random_weights=geometry, device="cuda", dtype=dtype)
    compare_with_recorded(bits_report(loaded))
