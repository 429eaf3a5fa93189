"""The model of Triton kernels, interpreted, beside the model of plain PyTorch, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from granite_paged.geometry import PagedConfig
from granite_paged.layers import attention
from granite_paged.layers.mamba import Kept
from granite_paged.paging.masks import blocks_of
from granite_paged.runner import graph, memory_plan
from granite_paged.runner import runner as runner_module
from granite_paged.runner.model import EagerModel
from granite_paged.runner.steps import Steps
from tests.helpers.driver import Driver
from tests.helpers.tiny_models import VOCABULARY, tiny_model
from tests.helpers.tolerance import assert_as_defined

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("kernels are interpreted here; tests/gpu runs them", allow_module_level=True)

from granite_paged.layers.triton import exact_scan, exact_step  # they need Triton
from granite_paged.layers.triton import mamba as triton_mamba
from granite_paged.layers.triton.masks import QueryBlockMask, SplitMask
from granite_paged.runner.exact_triton_model import ExactTritonModel
from granite_paged.runner.triton_model import TritonModel

CONFIG = PagedConfig(page_size=16, max_sequences=4, max_tokens=320, backend="eager")
BOUND = 1e-5
"""Largest error of logits, relative to the largest: each layer rounds a few sums to float32."""

SIZES: dict[str, dict[str, Any]] = {
    "hybrid": {"layer_types": ["mamba", "attention"]},
    "experts": {"layer_types": ["mamba", "attention"]},
    "dense": {"layer_types": ["attention", "attention"]},
}
SCALES = {"logits_scaling": 3.0, "residual_multiplier": 0.4, "embedding_multiplier": 2.0}


def model_of(flavour: str, **sizes: Any) -> Any:
    """Return a model of two layers whose norms and scales all differ."""
    model = tiny_model(flavour, num_hidden_layers=2, **{**SIZES[flavour], **SCALES, **sizes})
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5, generator=draw)
    return model


class Both:
    """A runner of kernels, and a plain one with the same model, that are fed the same tokens."""

    def __init__(self, flavour: str, **sizes: Any) -> None:
        model = model_of(flavour, **sizes)
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


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps have the masks of captured ones: prompts in blocks, and rows in parts."""

    def made(steps: Steps, batch: int, length: int, decodes: bool) -> graph.CapturedStep:
        geometry, storage = steps._geometry, steps._storage
        parts = (steps.model, storage, batch, length, decodes)
        if not isinstance(steps.model, TritonModel):
            return graph.CapturedStep(*parts)
        if not decodes:
            blocks = batch * blocks_of(length, geometry.group)
            return graph.CapturedStep(
                *parts, prefill_mask=QueryBlockMask(storage.pages, blocks + 1)
            )
        pages = storage.pages.table.physical.shape[1]
        plan = attention.DecodePlan.choose(geometry, batch, pages, storage.tokens.device, 4)
        assert plan.parts == (5 if batch <= 2 else 4)
        return graph.CapturedStep(*parts, split=(plan, SplitMask(storage.pages, plan.parts)))

    monkeypatch.setattr(Steps, "_made", made)
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 10)
    monkeypatch.setattr(
        attention,
        "_compiled",
        lambda function: torch.compile(function, backend="eager", fullgraph=True, dynamic=False),
    )


@pytest.mark.usefixtures("replaying", "laid_out")
@pytest.mark.parametrize("flavour", SIZES)
def test_steps_with_the_masks_of_captured_ones_run_as_plain_pytorch_does(flavour: str) -> None:
    both = Both(flavour)
    both.prefill({1: 5, 2: 50, 3: 1})
    both.prefill({2: 20, 3: 30})
    both.decode(2)
    both.decode(1, 2)
    both.decode(1, 2, 3)


SPIED = (
    (TritonModel, "_one_row_logits"),
    (TritonModel, "_decode_mixer"),
    (exact_step, "gated_step"),
    (exact_scan, "gated_scan"),
    (graph, "paged_block_mask"),
)


@pytest.fixture
def calls() -> Iterator[Callable[[str], int]]:
    """Return a function that tells how often one of `SPIED` was called."""
    with ExitStack() as patches:
        spies = {
            name: patches.enter_context(
                mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))
            )
            for owner, name in SPIED
        }
        yield lambda name: spies[name].call_count


@pytest.mark.usefixtures("replaying")
def test_the_head_of_one_row_is_a_product_of_one_row(calls: Callable[[str], int]) -> None:
    both = Both("dense")
    both.prefill({1: 2, 2: 2})
    both.decode(1, 2)
    assert calls("_one_row_logits") == 0
    both.prefill({1: 1})
    both.decode(1)
    assert calls("_one_row_logits") == 2


@pytest.mark.usefixtures("replaying")
def test_more_rows_than_products_take_run_as_a_prompt_does(
    calls: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("granite_paged.runner.triton_model.MOST_ROWS", 2)
    both = Both("dense")
    both.prefill({1: 1, 2: 1, 3: 1})
    both.decode(1, 2, 3)
    assert calls("_decode_mixer") == 0
    both.decode(1, 2)
    assert calls("_decode_mixer") == 2, "once per layer"


@pytest.mark.usefixtures("replaying")
def test_the_first_step_of_several_rows_allocates_what_their_products_share() -> None:
    both = Both("dense")
    model = both.kernels.runner._steps.model
    assert isinstance(model, TritonModel)
    both.prefill({1: 1, 2: 1, 3: 1})
    both.decode(1)
    assert model._scratch is None
    both.decode(1, 2)
    first = model._scratch
    assert first is not None
    both.decode(1, 2, 3)
    both.decode(1)
    assert model._scratch is first


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize(("groups", "deferred"), [(1, True), (2, False)])
def test_a_norm_of_one_group_is_left_to_the_next_product(groups: int, deferred: bool) -> None:
    both = Both("hybrid", mamba_n_groups=groups)
    both.prefill({1: 5})
    with mock.patch.object(triton_mamba, "step", wraps=triton_mamba.step) as step:
        both.decode(1)
    (call,) = step.call_args_list
    assert (call.args[-1] is not None) is deferred


def test_exact_mode_takes_a_step_for_one_token_and_no_block_mask(
    calls: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    let_rows_keep(Kept.CHUNK, monkeypatch)
    both = Both("hybrid")
    both.use(ExactTritonModel)
    both.prefill({1: 3})
    assert (calls("gated_scan"), calls("gated_step")) == (1, 0)
    both.decode(1)
    assert (calls("gated_scan"), calls("gated_step")) == (1, 1)
    assert calls("paged_block_mask") == 2, "of the plain model"


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
