"""A captured step larger than its batch: its padding changes no state and no output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged import PagedConfig
from granite_paged.paging.masks import PADDING
from granite_paged.runner.graph import CapturedStep
from granite_paged.runner.shapes import Shapes
from granite_paged.runner.storage import NULL_ROW
from granite_paged.runner.triton_model import TritonModel
from tests.helpers.driver import Driver
from tests.helpers.tiny_models import FLAVOURS, VOCABULARY, tiny_model
from tests.helpers.tolerance import assert_same_logits

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton is not interpreted here: tests/gpu runs padded graphs"
)

CONFIG = PagedConfig(page_size=16, max_tokens=256, max_sequences=3, chunk_tokens=32)
PROMPTS = {3: list(range(5, 24)), 1: [7, 8, 9]}


@pytest.fixture(scope="module", params=list(FLAVOURS))
def model(request: pytest.FixtureRequest) -> Any:
    """Each kind of layer before and after the other, since the interpreter is slow."""
    layers = ["attention"] * 2 if request.param == "dense" else ["mamba", "attention", "mamba"]
    return tiny_model(request.param, num_hidden_layers=len(layers), layer_types=layers)


def plain(model: Any, config: PagedConfig = CONFIG, rows: Iterable[int] = PROMPTS) -> Driver:
    """Return a runner in plain PyTorch, with a sequence open in each row."""
    driver = Driver(model, config)
    for row in rows:
        driver.open(row)
    return driver


def kernels(model: Any, config: PagedConfig = CONFIG, rows: Iterable[int] = PROMPTS) -> Driver:
    """Return the same runner with the Triton model."""
    driver = plain(model, config, rows)
    runner = driver.runner
    runner._steps.model = TritonModel(model, runner.storage, "auto")
    return driver


def larger(driver: Driver, batch: int, length: int, *, decodes: bool) -> CapturedStep:
    runner = driver.runner
    return CapturedStep(runner._steps.model, runner.storage, batch, length, decodes, None)


def everything(driver: Driver) -> list[Tensor]:
    storage = driver.runner.storage
    pools = [part for pool in storage.pages.pools.values() for part in (pool.keys, pool.values)]
    return [*pools, *storage.stacked, storage.pages.table.physical, storage.nonfinite]


def test_padding_of_a_prefill_changes_nothing(model: Any) -> None:
    exact, padded = plain(model), kernels(model)
    expected = exact.prefill(PROMPTS)
    chunks = padded.chunks(PROMPTS)
    step = larger(padded, 3, 32, decodes=False)
    inputs = step.padding()
    for place, chunk in enumerate(chunks):
        inputs.rows[place] = chunk.row
        inputs.positions[place, : len(chunk.tokens)] = range(len(chunk.tokens))
        inputs.tokens[place, : len(chunk.tokens)] = chunk.tokens
        inputs.last[place] = 32 * place + len(chunk.tokens) - 1
    step.run(inputs)
    assert_same_logits(step.logits[:2], expected)
    assert step.logits.isfinite().all()
    for actual, wanted in zip(everything(padded), everything(exact), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


def test_padding_of_a_decode_step_changes_nothing(model: Any) -> None:
    exact, padded = plain(model), kernels(model)
    for driver in (exact, padded):
        driver.prefill(PROMPTS)
    expected = exact.decode({3: 11, 1: 12}).clone()
    positions = [padded.allocator.length(padded.sequences[row]) for row in (3, 1)]
    padded._grow({3: 1, 1: 1})
    padded.runner.tokens[torch.tensor([3, 1])] = torch.tensor([11, 12])
    step = larger(padded, 5, 1, decodes=True)
    inputs = step.padding()
    assert inputs.rows.tolist() == [NULL_ROW] * 5
    assert inputs.positions.tolist() == [[PADDING]] * 5
    inputs.rows[:2], inputs.positions[:2, 0] = [3, 1], positions
    step.run(inputs)
    assert_same_logits(step.logits[:2], expected)
    assert step.logits.isfinite().all()
    for actual, wanted in zip(everything(padded), everything(exact), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["hybrid", "dense"], indirect=True)  # states, and positions
def test_split_chunks_equal_whole_ones(model: Any) -> None:
    """Captured steps split chunks where that takes less time."""
    lengths = {1: 70, 3: 9}
    draw = torch.Generator().manual_seed(0)
    prompts = {
        row: torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()
        for row, count in lengths.items()
    }
    sizes = PagedConfig(page_size=16, max_tokens=512, chunk_tokens=128)
    whole, cut = plain(model, sizes, prompts), kernels(model, sizes, prompts)
    shapes = Shapes(128, 2, captured=True, alignment=cut.runner.alignment)
    cut.runner.shapes = shapes
    steps = shapes.arrange(list(lengths.values()))
    assert any(piece.start for step in steps for piece in step.pieces), (
        "no chunk is split, so nothing is tested"
    )
    logits = cut.prefill(prompts)
    for place, row in enumerate(prompts):
        assert_same_logits(logits[place], whole.prefill({row: prompts[row]})[0])
    fed = {row: 5 + row for row in prompts}
    logits = cut.decode(fed)
    for place, row in enumerate(fed):
        assert_same_logits(logits[place], whole.decode({row: fed[row]})[0])
