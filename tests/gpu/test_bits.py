"""Bits of exact mode on this GPU against the recorded ones, where versions match."""

from __future__ import annotations

import pytest

from granite_paged.bits import bits_report
from granite_paged.models import load
from tests.helpers.golden_bits import compare_with_recorded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_embedded_model_has_the_recorded_bits(dtype: str) -> None:
    compare_with_recorded(bits_report(load(device="cuda", dtype=dtype)))
