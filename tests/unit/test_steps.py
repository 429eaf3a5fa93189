"""The steps of a runner: which are kept, what is captured, and which model runs them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.paging.masks import blocks_of
from granite_paged.runner import steps as steps_module
from granite_paged.runner.shapes import Shapes
from granite_paged.runner.steps import Steps, most_rows, query_blocks
from tests.helpers.strategies import make_geometry

ROWS, WIDTH = 5, 7
SHAPES = Shapes(32, ROWS - 1, captured=True)
GEOMETRY = make_geometry(page_size=16)


class RecordedStep:
    """Takes the place of a `CapturedStep`."""

    def __init__(
        self,
        model: Any,
        storage: Any,
        batch: int,
        length: int,
        decodes: bool,
        prefill_mask: Any = None,
        split: Any = None,
    ) -> None:
        self.shape, self.prefill_mask, self.split = (batch, length, decodes), prefill_mask, split
        self.captured: list[Any] = []
        self.compiled: list[Any] = []

    def capture(self, graphs: Any, stream: Any) -> None:
        self.captured.append((graphs, stream))

    def compile(self, stream: Any) -> None:
        self.compiled.append(stream)


class Plan(NamedTuple):
    """Takes the place of a `DecodePlan`."""

    batch: int
    pages: int
    device: str
    most: int

    @property
    def parts(self) -> int:
        return 33 if self.batch < 4 else self.most


class Mask(NamedTuple):
    """Takes the place of a `QueryBlockMask` or `SplitMask`."""

    store: Any
    kind: str
    size: int


def plan_of(geometry: Any, batch: int, pages: int, device: torch.device, most: int) -> Any:
    return Plan(batch, pages, device.type, most)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "CapturedStep", RecordedStep)
    monkeypatch.setattr(steps_module.DecodePlan, "choose", plan_of)
    kernels = pytest.importorskip("granite_paged.layers.triton.masks")
    monkeypatch.setattr(
        kernels, "QueryBlockMask", lambda store, blocks: Mask(store, "blocks", blocks)
    )
    monkeypatch.setattr(kernels, "SplitMask", lambda store, parts: Mask(store, "split", parts))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "graphs")
    monkeypatch.setattr(steps_module, "_capture_stream", lambda device: f"stream of {device}")


def make(*, captured: bool = True, reads_mask: bool = True) -> Steps:
    maps = SimpleNamespace(physical=torch.zeros(ROWS, WIDTH), logical=torch.zeros(9))
    storage: Any = SimpleNamespace(
        tokens=torch.zeros(ROWS), stacked=[torch.zeros(2, 3)], pages=SimpleNamespace(table=maps)
    )
    model = SimpleNamespace(reads_mask=reads_mask)
    with mock.patch.object(steps_module, "_model", return_value=model):
        shapes = Shapes(32, ROWS - 1, captured=captured)
        return Steps(mock.Mock(), storage, PagedConfig(page_size=16), GEOMETRY, shapes)


def shapes_of(steps: Steps) -> list[Any]:
    return sorted(steps._captured)


def test_a_captured_step_is_kept_and_one_outside_the_warm_up_counts_as_late() -> None:
    steps = make()
    first: Any = steps.step(2, 8)
    assert first.shape == (2, 8, False)
    assert first.captured == [("graphs", "stream of cpu")]
    assert steps.step(2, 8) is first
    assert steps.late == 1
    assert steps.step(2, 1, decodes=True) is not steps.step(2, 1)
    assert steps.late == 3
    steps.forget()
    assert steps.step(2, 8) is not first


def test_a_step_without_graphs_is_made_at_every_call() -> None:
    steps = make(captured=False)
    first: Any = steps.step(2, 8)
    assert steps.step(2, 8) is not first
    assert (first.captured, first.split, shapes_of(steps), steps.late) == ([], None, [], 0)
    assert first.prefill_mask is None


def test_a_decode_step_of_a_model_that_reads_masks_gets_a_plan_for_the_widest_row() -> None:
    steps = make()
    step: Any = steps.step(3, 1, decodes=True)
    plan, mask = step.split
    assert plan == (3, WIDTH, "cpu", 4)
    assert mask == (steps._storage.pages, "split", 33)
    assert step.prefill_mask is None
    others: list[Any] = [steps.step(rows, 1, decodes=True) for rows in (2, 4)]
    assert others[0].split[1] is mask, "steps with as many parts share a mask"
    assert others[1].split[1][1:] == ("split", 4)
    plain: Any = make(reads_mask=False).step(3, 1, decodes=True)
    assert (plain.split, plain.prefill_mask) == (None, None)


def test_a_prompt_of_a_model_that_reads_masks_attends_in_blocks() -> None:
    steps = make()
    step: Any = steps.step(1, 32)
    blocks = query_blocks(SHAPES, 1, 32, GEOMETRY.group)
    assert step.prefill_mask == (steps._storage.pages, "blocks", blocks)
    assert step.split is None
    other: Any = steps.step(1, 16)
    assert other.prefill_mask is step.prefill_mask, "steps with as many blocks share a mask"
    plain: Any = make(reads_mask=False).step(1, 32)
    assert plain.prefill_mask is None


@pytest.mark.parametrize("chunk_tokens", [16, 512, 2048])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_prompts_of_all_shapes_have_few_numbers_of_query_blocks(
    chunk_tokens: int, group: int
) -> None:
    """FlexAttention is compiled for each of them."""
    shapes = Shapes(chunk_tokens, 256, captured=True)
    prompts = [shape for shape in shapes.all() if shape[1] > 1]
    found = {shape: query_blocks(shapes, *shape, group) for shape in prompts}
    assert all(found[b, s] >= b * blocks_of(s, group) for b, s in prompts)
    few = [blocks for (b, s), blocks in found.items() if b * s <= 512]
    many = [blocks for (b, s), blocks in found.items() if b * s > 512]
    assert set(few) == {max(b * blocks_of(s, group) for b, s in prompts if b * s <= 512)}
    assert len(set(many)) == (chunk_tokens > 512)
    assert max(found.values()) == max(b * blocks_of(s, group) for b, s in prompts)


@pytest.mark.parametrize(
    ("rows", "batch", "most"),
    [(256, 1, 64), (256, 64, 64), (256, 128, 256), (200, 128, 256), (100, 128, 128), (40, 32, 64)],
)
def test_decode_steps_share_their_attention_with_larger_ones(
    rows: int, batch: int, most: int
) -> None:
    """Up to 64 rows; and all that have more."""
    assert most_rows(Shapes(32, rows, captured=True), batch) == most


def test_few_rows_are_not_computed_as_64() -> None:
    assert most_rows(Shapes(32, 5, captured=True), 4) == 8


def test_steps_are_compiled_without_being_captured() -> None:
    steps, made = make(), []
    right = steps._made

    def recorded(*shape: Any) -> Any:
        made.append(right(*shape))
        return made[-1]

    with mock.patch.object(steps, "_made", recorded):
        steps.compile(4, 1)
        steps.compile(4, 2)
    assert [step.shape for step in made] == [(4, 1, True), (4, 2, False)]
    assert [step.compiled for step in made] == [["stream of cpu"]] * 2
    assert shapes_of(steps) == []


@contextlib.contextmanager
def ahead(steps: Steps, missing: Any) -> Iterator[Callable[[Any], None]]:
    """Note which shapes are compiled ahead, and which are waited for."""
    waited: list[Any] = []
    AHEAD.append((list(missing), waited))
    yield waited.append


AHEAD: list[Any] = []


def test_a_warm_up_captures_what_is_missing_and_reports_each_shape() -> None:
    steps, told = make(), []
    steps.step(2, 1, decodes=True)
    AHEAD.clear()
    shapes = [(1, 1), (2, 1), (2, 8)]
    with mock.patch.object(steps_module, "compiled_ahead", ahead):
        steps.warm_up(shapes, lambda *args: told.append(args))
        assert steps.late == 1, "none of these was late"
        assert shapes_of(steps) == [(1, 1, True), (2, 1, True), (2, 8, False)]
        steps.warm_up(shapes, lambda *args: None)
    assert told == [("decode 1 x 1", 1, 3), ("prefill 2 x 8", 2, 3), ("ready", 3, 3)]
    assert AHEAD == [([(1, 1), (2, 8)], [(1, 1), (2, 8)]), ([], [])]


def test_what_kernels_depend_on_includes_the_shapes_of_all_buffers() -> None:
    content = make().content()
    assert content[-1] == [(2, 3), (ROWS, WIDTH), (9,)]
    assert content[1] is GEOMETRY


@pytest.mark.parametrize(
    ("exact", "captured", "device", "expected"),
    [
        (False, False, "cpu", "EagerModel"),
        (False, True, "cuda", "TritonModel"),
        (True, False, "cpu", "ExactModel"),
        (True, True, "cuda", "ExactTritonModel"),
    ],
)
def test_a_model_is_chosen_by_mode_device_and_capture(
    exact: bool, captured: bool, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("granite_paged.runner.exact_triton_model")  # it needs Triton
    for place in (
        "steps.EagerModel",
        "steps.ExactModel",
        "triton_model.TritonModel",
        "exact_triton_model.ExactTritonModel",
    ):
        name = place.partition(".")[2]
        made_by = functools.partial(lambda name, *args: (name, *args), name)
        monkeypatch.setattr(f"granite_paged.runner.{place}", made_by)
    model, config = SimpleNamespace(device=torch.device(device)), PagedConfig(exact=exact)
    made = steps_module._model(model, "storage", config, captured=captured)  # type: ignore[arg-type]
    assert made == (expected, model, "storage", config.backend)
