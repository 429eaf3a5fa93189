"""A runner's graphs and kernels: golden logits, what is compiled, and the memory plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.errors import OutOfMemory
from granite_paged.runner.memory_plan import weight_bytes
from granite_paged.runner.runner import Runner
from tests.helpers.driver import Driver
from tests.helpers.golden_models import MODELS
from tests.helpers.golden_runner import decoded, make_driver, prefilled, recorded
from tests.helpers.tolerance import LOGITS_FLOAT32, largest_error


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("work", ["prefill", "steps"])
def test_golden_logits(name: str, work: str) -> None:
    driver = make_driver(name, "cuda", kernels=False)
    if work == "prefill":
        found = largest_error(prefilled(driver, name), recorded("prefill", name)["prefill"][0, -1])
    else:
        expected = recorded("chunked_prefill_then_decode", name)["decode"]
        found = largest_error(decoded(driver, name), expected)
    assert found <= LOGITS_FLOAT32


def test_nothing_compiles_after_warm_up(model: Any) -> None:
    runner_config = PagedConfig(max_tokens=1024, max_sequences=2, chunk_tokens=256)
    driver = Driver(model, runner_config)
    done: list[str] = []
    driver.runner.warm_up(lambda what, at, total: done.append(what))
    assert done[-1] == "ready"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for row in (1, 2):
            driver.open(row)
            driver.prefill({row: list(range(5, 5 + 120 * row))})
        for token in range(140):  # across a page
            driver.decode({1: token, 2: token})
    driver.check_valid()


def test_the_memory_plan_is_within_5_per_cent_of_the_peak(model: Any) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - weight_bytes(model)
    runner = Runner.for_model(model, PagedConfig(max_tokens=32768, max_sequences=32))
    runner.warm_up()
    peak = torch.cuda.max_memory_allocated() - others
    assert abs(runner.plan.total_bytes - peak) <= 0.05 * peak, (runner.plan, peak)
    runner.close()


@pytest.mark.whole_gpu
def test_a_smaller_step_succeeds_after_out_of_memory(model: Any) -> None:
    driver = Driver(model, PagedConfig(max_tokens=4096, max_sequences=2))
    driver.open(1)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    # half of the workspace of a step of 2,048 tokens
    left = driver.runner.plan.workspace_bytes // 2
    hoard = torch.empty(free - left, dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemory, match="lower PagedConfig"):
        driver.prefill({1: [5] * 2048})
    driver.close(1)
    driver.open(1)
    del hoard
    torch.cuda.empty_cache()  # cuBLAS asks the driver, not torch's allocator
    assert driver.prefill({1: [5] * 100}).isfinite().all()
    driver.check_valid()
