"""A runner gives the golden logits too, in plain PyTorch and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.golden_models import CHUNK, DECODED, MODELS
from tests.helpers.golden_runner import decoded, make_driver, prefilled, recorded
from tests.helpers.tolerance import LOGITS_FLOAT32, largest_error

every_model = pytest.mark.parametrize("name", MODELS)
both_models = pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])

INTERPRETED_STEPS = 3
"""Decode steps in Triton's interpreter: the first takes a page, the others read its states."""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton is not interpreted here: tests/gpu runs the same"
)


@every_model
@both_models
def test_runner_prefill_equals_golden_logits(name: str, kernels: bool) -> None:
    logits = prefilled(make_driver(name, "cpu", kernels=kernels), name, CHUNK)
    assert largest_error(logits, recorded("prefill", name)["prefill"][0, -1]) <= LOGITS_FLOAT32


@every_model
@both_models
def test_runner_decode_equals_golden_logits(name: str, kernels: bool) -> None:
    steps = INTERPRETED_STEPS if kernels else DECODED
    logits = decoded(make_driver(name, "cpu", kernels=False), name, steps, kernels=kernels)
    expected = recorded("chunked_prefill_then_decode", name)["decode"][:, :steps]
    assert largest_error(logits, expected) <= LOGITS_FLOAT32
