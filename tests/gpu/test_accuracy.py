"""granite-4.0-h-1b in bfloat16 on the runner and patched: accuracy by batch size, equal bits.

The tests share a driver of 100 rows and references in float64, so one process runs all of them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.hf.compat import with_cache
from tests.helpers.driver import Driver
from tests.helpers.tolerance import SDPA_RATIO, relative_error
from tests.helpers.turns import float64_copy

CONFIG = PagedConfig(max_tokens=16384, max_sequences=100)  # 100 forks each copy their last page
PROMPT, STEPS = 600, 4


@pytest.fixture(scope="module")
def text(model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (PROMPT + STEPS,), generator=draw)


@pytest.fixture(scope="module")
def references(model: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the prompt's last token and of each step, by float64 and by SDPA."""
    sdpa = _played(model, text, DynamicCache(config=model.config))
    with float64_copy(model) as exact_model:
        return _played(exact_model, text, DynamicCache(config=model.config)), sdpa


@pytest.fixture(scope="module")
def driver(model: Any) -> Driver:
    return Driver(model, CONFIG)


@torch.inference_mode()
def _played(model: Any, text: Tensor, cache: Any) -> Tensor:
    ids = text[None].to(model.device)
    feeds = [ids[:, :PROMPT], *ids[:, PROMPT:].split(1, dim=1)]
    logits = [model(feed, **with_cache(cache), logits_to_keep=1).logits[0] for feed in feeds]
    return torch.cat(logits)


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
