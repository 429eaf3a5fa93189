"""The model of Triton kernels, interpreted, beside the model of plain PyTorch, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged.geometry import PagedConfig
from granite_paged.layers.mamba import Kept
from granite_paged.runner import memory_plan
from granite_paged.runner import runner as runner_module
from granite_paged.runner.model import EagerModel
from tests.helpers.driver import Driver
from tests.helpers.tiny_models import VOCABULARY, tiny_model
from tests.helpers.tolerance import assert_as_defined

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("kernels are interpreted here; tests/gpu runs them", allow_module_level=True)

from granite_paged.runner.exact_triton_model import ExactTritonModel  # both need Triton
from granite_paged.runner.triton_model import TritonModel

CONFIG = PagedConfig(page_size=16, max_sequences=4, max_tokens=320, backend="eager")
BOUND = 1e-5
"""Largest error of logits, relative to the largest: each layer rounds a few sums to float32."""

SIZES: dict[str, dict[str, Any]] = {
    "hybrid": {"layer_types": ["mamba", "attention"]},
    "experts": {"layer_types": ["mamba", "attention"]},
    "dense": {"layer_types": ["attention", "attention"]},
}


class Both:
    """A runner of kernels, and a plain one with the same model, that are fed the same tokens."""

    def __init__(self, flavour: str) -> None:
        model = tiny_model(flavour, num_hidden_layers=2, **SIZES[flavour])
        self.plain, self.kernels = Driver(model, CONFIG), Driver(model, CONFIG)
        self._draw = torch.Generator().manual_seed(1)
        self.use(TritonModel)
        for driver in (self.plain, self.kernels):
            for row in (1, 2, 3):
                driver.open(row)

    def use(self, kind: type[EagerModel]) -> None:
        """Let the second runner go on with this kind of model."""
        runner = self.kernels.runner
        runner._steps.model = kind(runner._live, runner._storage, "eager")

    def prefill(self, lengths: dict[int, int]) -> None:
        tokens = {row: self._tokens(length) for row, length in lengths.items()}
        self._compare(lambda driver: driver.prefill(tokens))

    def decode(self, *rows: int, steps: int = 1) -> None:
        for _ in range(steps):
            fed = dict(zip(rows, self._tokens(len(rows)), strict=True))
            self._compare(lambda driver, fed=fed: driver.decode(fed))  # type: ignore[misc]

    def fork(self, source: int, target: int) -> None:
        for driver in (self.plain, self.kernels):
            driver.fork(source, target)

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=self._draw).tolist()

    def _compare(self, step: Callable[[Driver], Tensor]) -> None:
        assert_as_defined(step(self.kernels), step(self.plain), BOUND)


def let_rows_keep(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows keep inputs, as they do where kernels run."""
    for module in (memory_plan, runner_module):
        monkeypatch.setattr(module, "kept_inputs", lambda model, config: kept)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    let_rows_keep(Kept.REPLAY, monkeypatch)


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize("flavour", SIZES)
def test_kernels_run_prompts_and_answers_as_plain_pytorch_does(flavour: str) -> None:
    both = Both(flavour)
    both.prefill({1: 5, 2: 19, 3: 1})
    both.decode(2)
    both.decode(1, 2, 3)


def test_the_kernels_of_exact_mode_run_prompts_and_answers_as_plain_pytorch_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    let_rows_keep(Kept.CHUNK, monkeypatch)
    both = Both("hybrid")
    both.use(ExactTritonModel)
    both.prefill({1: 5, 2: 62, 3: 1})
    both.decode(1, 2, 3, steps=3)  # the second row ends a chunk of 64
    both.prefill({2: 2})


@pytest.mark.usefixtures("replaying")
def test_rows_that_keep_inputs_can_be_forked_prefilled_and_saved() -> None:
    both = Both("hybrid")
    both.prefill({1: 3, 2: 7})
    both.decode(1, 2, steps=3)
    both.fork(2, 4)
    both.prefill({1: 4})  # a prompt after an answer, as in a chat
    saved = [driver.runner.save_row(2) for driver in (both.plain, both.kernels)]
    for driver, snapshot in zip((both.plain, both.kernels), saved, strict=True):
        driver.runner.clear_rows([2])
        driver.runner.set_pages(2, driver.allocator.pages_of(driver.sequences[2]))
        driver.runner.load_row(2, snapshot)
    both.decode(4, 1, 2, steps=2)


@pytest.mark.usefixtures("replaying")
def test_plain_pytorch_goes_on_where_kernels_left_inputs_to_be_replayed() -> None:
    """This happens when an adapter is added to a live model."""
    both = Both("hybrid")
    both.prefill({1: 3, 2: 7})
    both.decode(1, 2, steps=3)
    both.use(EagerModel)
    both.decode(2)
    both.prefill({1: 2})
    both.decode(1, 2)
