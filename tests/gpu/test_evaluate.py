"""The evaluation on a GPU: every mode, real peak memory, compiled steps."""

from __future__ import annotations

import gc

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.report.eval_results import Evaluation
from tests.helpers.evaluation import tiny_evaluation, tiny_loaded, tiny_task

SIZES = {"hidden_size": 192, "num_attention_heads": 6, "mamba_d_head": 64}  # heads of 32
CONFIG = PagedConfig(page_size=16, max_tokens=8192)


def evaluated(dtype: torch.dtype, modes: tuple[str, ...], batch: int = 1) -> Evaluation:
    gc.collect()  # a patched model is a reference cycle and keeps its weights until it is collected
    loaded = tiny_loaded(initializer_range=0.1, **SIZES)
    loaded.model.to("cuda", dtype)
    return tiny_evaluation(loaded, tiny_task(8), modes, config=CONFIG, batch=batch)


@pytest.mark.parametrize(
    ("batch", "modes"),
    # `static` compiles for most of a minute, and runs rows one by one also where it gets several
    [(1, ("default", "paged")), (8, ("default", "static", "paged"))],
    ids=["1", "8"],
)
def test_all_modes_agree_in_float32(batch: int, modes: tuple[str, ...]) -> None:
    result = evaluated(torch.float32, modes, batch).tasks["tiny"]
    for mode, found in result.agreement.items():
        assert found.differing == (), mode
        # even without TF32, kernels sum in other orders
        assert found.largest_difference < 1e-2, mode


def test_every_difference_in_bfloat16_is_a_near_tie() -> None:
    assert evaluated(torch.bfloat16, ("default", "paged")).passed


def test_peak_memory_is_measured_per_mode() -> None:
    """The peak of default is the same with and without another mode's pools on the device."""
    together = evaluated(torch.float32, ("default", "paged")).tasks["tiny"].modes
    alone = evaluated(torch.float32, ("default",)).tasks["tiny"].modes
    assert alone["default"].peak_bytes
    assert together["paged"].peak_bytes
    assert together["default"].peak_bytes == pytest.approx(alone["default"].peak_bytes, rel=0.02)
