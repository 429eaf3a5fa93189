"""The steps of a runner: which are kept, what is captured, and which model runs them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from granite_paged import PagedConfig
from granite_paged.runner import steps as steps_module
from granite_paged.runner.steps import Steps
from tests.helpers.strategies import make_geometry

ROWS, WIDTH = 5, 7
GEOMETRY = make_geometry(page_size=16)


class RecordedStep:
    """Takes the place of a `CapturedStep`."""

    def __init__(self, model: Any, storage: Any, batch: int, length: int, decodes: bool, plan: Any):
        self.shape, self.plan = (batch, length, decodes), plan
        self.captured: list[Any] = []
        self.compiled: list[Any] = []

    def capture(self, graphs: Any, stream: Any) -> None:
        self.captured.append((graphs, stream))

    def compile(self, stream: Any) -> None:
        self.compiled.append(stream)


def plan_of(geometry: Any, batch: int, pages: int, device: torch.device) -> Any:
    return (batch, pages, device.type)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "CapturedStep", RecordedStep)
    monkeypatch.setattr(steps_module.DecodePlan, "choose", plan_of)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "graphs")
    monkeypatch.setattr(steps_module, "_capture_stream", lambda device: f"stream of {device}")


def make(fallback: str = "", *, reads_mask: bool = True) -> Steps:
    maps = SimpleNamespace(physical=torch.zeros(ROWS, WIDTH), logical=torch.zeros(9))
    storage: Any = SimpleNamespace(
        tokens=torch.zeros(ROWS), stacked=[torch.zeros(2, 3)], pages=SimpleNamespace(table=maps)
    )
    model = SimpleNamespace(reads_mask=reads_mask)
    with mock.patch.object(steps_module, "_model", return_value=model):
        return Steps(mock.Mock(), storage, PagedConfig(page_size=16), GEOMETRY, fallback)


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
    steps = make("a reason")
    first: Any = steps.step(2, 8)
    assert steps.step(2, 8) is not first
    assert (first.captured, first.plan, shapes_of(steps), steps.late) == ([], None, [], 0)


def test_a_step_of_a_model_that_reads_masks_gets_a_plan_for_the_widest_row() -> None:
    step: Any = make().step(3, 1, decodes=True)
    assert step.plan == (3, WIDTH, "cpu")
    other: Any = make(reads_mask=False).step(3, 1, decodes=True)
    assert other.plan is None


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
    ("exact", "fallback", "device", "expected"),
    [
        (False, "a reason", "cpu", "EagerModel"),
        (False, "", "cuda", "TritonModel"),
        (True, "a reason", "cpu", "ExactModel"),
        (True, "", "cuda", "ExactTritonModel"),
    ],
)
def test_a_model_is_chosen_by_mode_device_and_fallback(
    exact: bool, fallback: str, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
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
    made = steps_module._model(model, "storage", config, fallback)  # type: ignore[arg-type]
    assert made == (expected, model, "storage", config.backend)
