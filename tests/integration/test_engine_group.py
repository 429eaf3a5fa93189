"""A group of engines answers like one engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.engine import group as groups
from granite_paged.engine.group import EngineGroup
from granite_paged.errors import (
    CannotBeExact,
    DeviceError,
    EngineClosed,
    EngineLost,
    InvalidArgument,
    InvalidRequest,
)
from tests.helpers.tiny_models import tiny_model

SIZES = PagedConfig(page_size=8, max_tokens=160, max_sequences=4, chunk_tokens=32)
PROMPTS = [[3 + n, 5, 7 + n, *range(10, 10 + n)] for n in range(9)]


@pytest.fixture
def group() -> Iterator[EngineGroup]:
    with EngineGroup([Engine(tiny_model(), SIZES) for _ in range(2)]) as made:
        yield made


@pytest.fixture
def one() -> Iterator[Engine]:
    with Engine(tiny_model(), SIZES) as made:
        yield made


def test_a_group_uses_all_engines_and_keeps_order(group: EngineGroup, one: Engine) -> None:
    params = SamplingParams(max_new_tokens=6, n=2, temperature=0.7, stop_tokens=())
    together = [output.tokens for output in group.generate(PROMPTS, params)]
    assert together == [output.tokens for output in one.generate(PROMPTS, params)]
    assert all(stats.tokens > 30 for stats in group.stats())


def test_a_group_scores_in_order(group: EngineGroup, one: Engine) -> None:
    items = [(prompt, [[4], [5, 6]]) for prompt in PROMPTS]
    for scores, expected in zip(group.score(items), one.score(items), strict=True):
        assert [score.logprob for score in scores] == pytest.approx(
            [score.logprob for score in expected], abs=1e-4
        )


def test_a_group_refuses_prompts_and_items_as_an_engine_does(
    group: EngineGroup, one: Engine
) -> None:
    prompts: list[Any] = [PROMPTS[0], torch.tensor(5), None]
    found, expected = group.generate(prompts), one.generate(prompts)
    assert [(o.finish, type(o.error)) for o in found] == [
        (o.finish, type(o.error)) for o in expected
    ]
    items: list[Any] = [(PROMPTS[0], [[4, 5]]), (3,)]
    steps = [stats.steps for stats in group.stats()]
    with pytest.raises(InvalidRequest, match="an item must be a pair"):
        group.score(items)
    assert [stats.steps for stats in group.stats()] != steps, "the sound item was not scored"


def test_a_request_goes_to_the_least_loaded_engine(group: EngineGroup) -> None:
    asked = [group.submit(prompt, SamplingParams(max_new_tokens=2)) for prompt in PROMPTS[:4]]
    assert [stats.waiting for stats in group.stats()] == [2, 2]
    while group.step():
        pass
    assert all(request.finished for request in asked)


def test_replicas_run_on_the_given_devices() -> None:
    model = tiny_model()
    with EngineGroup.replicas(model, ["cpu"], SIZES) as group:
        (output,) = group.generate(PROMPTS[0], SamplingParams(max_new_tokens=2))
        assert output.error is None
    with pytest.raises(DeviceError, match="cuda:99"):
        EngineGroup.replicas(model, ["cuda:99"], SIZES)


def test_a_group_in_exact_mode_gives_the_bits_of_one_engine() -> None:
    params = SamplingParams(max_new_tokens=4, logprobs=1, stop_tokens=())
    exact = replace(SIZES, exact=True)
    with EngineGroup([Engine(tiny_model(), exact) for _ in range(2)]) as both:
        found = [(output.tokens, output.logprobs) for output in both.generate(PROMPTS, params)]
    with Engine(tiny_model(), exact) as engine:
        alone = [engine.generate(prompt, params)[0] for prompt in PROMPTS]
    assert found == [(output.tokens, output.logprobs) for output in alone]


def test_engines_with_other_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Engine(tiny_model(), replace(SIZES, exact=True)) for _ in range(2))
    with Engine(tiny_model(), SIZES) as plain, pytest.raises(CannotBeExact, match="group"):
        EngineGroup([first, plain])
    places = iter([{"device": "one GPU"}, {"device": "another GPU"}])
    monkeypatch.setattr(groups, "bits_place", lambda device: next(places))
    with first, second, pytest.raises(CannotBeExact, match="group"):
        EngineGroup([first, second])


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one"):
        EngineGroup([])


# -- when an engine fails -----------------------------------------------------------------------


def fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> bool:
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(engine, "step", step)


def test_the_work_of_a_lost_engine_is_done_by_another(
    group: EngineGroup, one: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(group.engines[0], monkeypatch)
    params = SamplingParams(max_new_tokens=4, stop_tokens=())
    answers = group.generate(PROMPTS, params)
    assert [o.tokens for o in answers] == [o.tokens for o in one.generate(PROMPTS, params)]
    items = [(prompt, [[4], [5, 6]]) for prompt in PROMPTS]
    assert len(group.score(items)) == len(items)


def test_work_that_two_engines_fail_at_is_reported_by_name(
    group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in group.engines:
        fail(engine, monkeypatch)
    outputs = group.generate(PROMPTS[:3], SamplingParams(max_new_tokens=2, n=2))
    assert len(outputs) == 6
    assert all(isinstance(output.error, EngineLost) for output in outputs)
    assert "fell off the bus" in str(outputs[0].error)
    assert [(output.index, output.refused) for output in outputs[:3]] == [
        (0, PROMPTS[0]),
        (1, PROMPTS[0]),
        (0, PROMPTS[1]),
    ]
    with pytest.raises(EngineLost):
        group.score([(PROMPTS[0], [[4]])])


def test_an_engine_that_is_closed_under_its_work_hands_it_over(
    group: EngineGroup, one: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, steps = group.engines[0], []
    step = closing.step

    def counted() -> bool:
        steps.append(1)
        if len(steps) == 4:
            closing.close()
        return step()

    monkeypatch.setattr(closing, "step", counted)
    params = SamplingParams(max_new_tokens=8, stop_tokens=(), n=2, temperature=0.7)
    answers = group.generate(PROMPTS, params)
    assert len(steps) >= 4
    assert [output.error for output in answers] == [None] * 2 * len(PROMPTS)
    assert [o.tokens for o in answers] == [o.tokens for o in one.generate(PROMPTS, params)]


def test_a_step_that_raises_keeps_the_other_engines_going(
    group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [group.submit(prompt, SamplingParams(max_new_tokens=2)) for prompt in PROMPTS[:2]]
    fail(group.engines[0], monkeypatch)
    for _ in range(8):
        with pytest.raises(RuntimeError, match="fell off the bus"):
            group.step()
    assert [request.finished for request in asked] == [False, True]


def test_a_group_is_asked_during_a_step_of_each_engine(group: EngineGroup) -> None:
    """Finding the least loaded engine waits for no step."""
    held = [engine._lock for engine in group.engines]
    with ThreadPoolExecutor(1) as pool, held[0], held[1]:
        asked = pool.submit(group.submit, PROMPTS[0], SamplingParams(max_new_tokens=2))
        request = asked.result(timeout=10)
    while group.step():
        pass
    assert request.finished


def test_a_closed_engine_gets_no_work(group: EngineGroup) -> None:
    group.engines[0].close()
    outputs = group.generate(PROMPTS, SamplingParams(max_new_tokens=2))
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    request = group.submit(PROMPTS[0], SamplingParams(max_new_tokens=2))
    while group.step():
        pass
    assert request.finished
    group.engines[1].close()
    with pytest.raises(EngineClosed, match="every engine"):
        group.submit(PROMPTS[0])


def test_an_interrupt_ends_the_work_of_every_engine(
    group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, calls = groups.wait, []

    def interrupted(running: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 1:
            waiting(running, timeout=0.2)
            raise KeyboardInterrupt
        return waiting(running, **options)

    monkeypatch.setattr(groups, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        group.generate(PROMPTS * 20, SamplingParams(max_new_tokens=100, stop_tokens=()))
    assert sum(stats.tokens for stats in group.stats()) < 20 * len(PROMPTS) * 100
    assert all(engine.idle or not engine.load for engine in group.engines)


def test_replicas_that_were_made_close_if_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = []

    def close(engine: Engine) -> None:
        closed.append(engine)

    monkeypatch.setattr(Engine, "close", close)
    with pytest.raises(DeviceError, match="cuda:99"):
        EngineGroup.replicas(tiny_model(), ["cpu", "cuda:99"], SIZES)
    assert len(closed) == 1


def test_close_closes_every_engine_whatever_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    group = EngineGroup([Engine(tiny_model(), SIZES) for _ in range(3)])
    close = Engine.close

    def closing(engine: Engine) -> None:
        close(engine)
        if engine is group.engines[1]:
            raise RuntimeError("stuck")

    monkeypatch.setattr(Engine, "close", closing)
    with pytest.raises(RuntimeError, match="stuck"):
        group.close()
    assert all(engine.closed for engine in group.engines)


def test_the_load_counts_every_continuation(one: Engine) -> None:
    one.submit_scoring([5, 6, 7], [[4, 5]] * 50)
    assert one.load == 3 + 2 * 50
