"""A runner's graphs and kernels: accuracy by batch size, golden logits, and the memory plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged, verify
from granite_paged.errors import OutOfMemory
from granite_paged.hf.compat import with_cache
from granite_paged.models import load
from granite_paged.runner.memory_plan import weight_bytes
from granite_paged.runner.runner import Runner
from tests.helpers.driver import Driver
from tests.helpers.golden_models import MODELS
from tests.helpers.golden_runner import decoded, make_driver, prefilled, recorded
from tests.helpers.tolerance import LOGITS_FLOAT32, SDPA_RATIO, largest_error, relative_error

CONFIG = PagedConfig(max_tokens=16384, max_sequences=100)  # 100 forks each copy their last page
PROMPT, STEPS = 600, 4


@pytest.fixture(scope="module")
def model() -> Any:
    return load(random_weights="granite-4.0-h-1b", device="cuda", dtype="bfloat16").model


@pytest.fixture(scope="module")
def text(model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (PROMPT + STEPS,), generator=draw)


@pytest.fixture(scope="module")
def references(model: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the prompt's last token and of each step, by float64 and by SDPA."""
    exact_model = verify.float64_copy(model)
    exact, sdpa = (
        _played(each, text, DynamicCache(config=each.config)) for each in (exact_model, model)
    )
    return exact, sdpa


@pytest.fixture(scope="module")
def driver(model: Any) -> Driver:
    return Driver(model, CONFIG)


@torch.inference_mode()
def _played(model: Any, text: Tensor, cache: Any) -> Tensor:
    ids = text[None].to(model.device)
    feeds = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    logits = [model(feed, **with_cache(cache), logits_to_keep=1).logits[0] for feed in feeds]
    return torch.cat(logits)


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


def test_split_prompts_are_as_accurate_as_sdpa(
    driver: Driver, text: Tensor, references: tuple[Tensor, Tensor]
) -> None:
    """16 prompts of 600 tokens: 512 tokens of each run in graphs of 4, the rest in one of 16."""
    exact, sdpa = references
    prompts = dict.fromkeys(range(1, 17), text[:PROMPT].tolist())
    steps = driver.runner.shapes.arrange([PROMPT] * len(prompts))
    assert (steps[-1].batch, steps[-1].length, steps[-1].pieces[0].start) == (16, 128, 512)
    for row in prompts:
        driver.open(row)
    logits = driver.prefill(prompts)
    for row in prompts:
        driver.close(row)
    worst = SDPA_RATIO * relative_error(sdpa[0], exact[0])
    assert max(relative_error(one, exact[0]) for one in logits) <= worst


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 100])
@pytest.mark.parametrize("chunk", [256, 2048])
def test_logits_are_as_accurate_as_those_of_sdpa(
    driver: Driver, text: Tensor, references: tuple[Tensor, Tensor], rows: int, chunk: int
) -> None:
    if rows > 2 and chunk == 256:
        pytest.skip("chunks are the same for every batch")
    exact, sdpa = references
    prompt, steps = text[:PROMPT].tolist(), text[PROMPT:].tolist()
    driver.open(1)
    for start in range(0, PROMPT, chunk):
        logits = driver.prefill({1: prompt[start : start + chunk]})
    ours = [logits[0].clone()]
    for row in range(2, rows + 1):
        driver.sequences[row] = driver.allocator.fork(driver.sequences[1])
        driver.runner.fork_row(1, row)
    for step in steps:
        logits = driver.decode(dict.fromkeys(range(1, rows + 1), step))
        ours.append(logits[rows - 1].clone())
    assert not driver.runner.nonfinite.any()
    driver.check_valid()
    for row in range(1, rows + 1):
        driver.close(row)
    worst = SDPA_RATIO * relative_error(sdpa, exact)
    assert relative_error(torch.stack(ours), exact) <= worst


def test_a_patched_model_is_as_accurate_as_sdpa(
    model: Any, text: Tensor, references: tuple[Tensor, Tensor]
) -> None:
    exact, sdpa = references
    with paged(model):
        ours = _played(model, text, PagedCache.for_model(model))
    assert relative_error(ours, exact) <= SDPA_RATIO * relative_error(sdpa, exact)


def test_equal_steps_give_equal_bits(driver: Driver, text: Tensor) -> None:
    found = []
    for _ in range(2):
        for row in (1, 2, 3):
            driver.open(row)
            driver.prefill({row: text[: 100 * row].tolist()})
        found.append(driver.decode({1: 5, 2: 6, 3: 7}).clone())
        for row in (3, 2, 1):  # so that the next round gets the same pages
            driver.close(row)
    assert torch.equal(*found)


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


@pytest.mark.whole_gpu
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
    assert driver.prefill({1: [5] * 100}).isfinite().all()
    driver.check_valid()
