"""The engine's core, step by step: what opens, what ends, and what is counted."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine import core as module
from granite_paged.engine.core import EngineCore
from granite_paged.engine.job import State
from granite_paged.engine.limits import LONGEST_STEP, Limits
from granite_paged.engine.rank import Rank
from granite_paged.engine.request import Request, SamplingParams, Scoring
from granite_paged.errors import (
    BrokenInvariant,
    EngineBusy,
    EngineClosed,
    RequestCancelled,
    StepFailed,
    UnsupportedModel,
)
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner

STATE_BYTES = 1000


class Model(SimulatedRunner):
    """A runner whose model changes when asked to.

    Attributes:
        looks: for each look at the model, whether the engine was idle.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(HashOracle(), **sizes)
        self.looks: list[Any] = []
        self.changes = False
        self.error: Exception | None = None

    def notice_changes(self, *, idle: bool) -> bool:
        self.looks.append(idle)
        if self.error:
            raise self.error
        return self.changes


class Core(EngineCore):
    """A core over a `Model`, with what tests ask for."""

    def __init__(self, **sizes: Any) -> None:
        self.model = Model(**sizes)
        runner: Any = self.model
        limits = Limits.of(
            runner, step_tokens=None, longest_step=LONGEST_STEP, queue=99,
            swap_bytes=10**6, preemption="recompute",
        )  # fmt: skip
        super().__init__(runner, None, limits, STATE_BYTES, frozenset())

    def ask(self, *prompt: int, new: int = 3, on_token: Any = None, **params: Any) -> Request:
        wanted = SamplingParams(max_new_tokens=new, stop_tokens=(), **params)
        return self.intake.samples(prompt or (1, 2, 3), wanted, on_token)

    def score(self, *continuations: tuple[int, ...]) -> Scoring:
        return self.intake.scoring((1, 2, 3), continuations, "")

    def search(self, new: int = 3, width: int = 2) -> Any:
        params = SamplingParams(max_new_tokens=new, stop_tokens=())
        return self.intake.search((1, 2, 3), params, width, 1.0)

    def cancel(self, request: Request | Scoring) -> None:
        self.intake.end(request, RequestCancelled(request.number))

    def drain(self) -> None:
        while self.step():
            self.check_valid()
        assert self.idle


def unfinished(request: Request) -> list[Any]:
    return [output.index for output in request.outputs if output.finish is None]


# -- steps --------------------------------------------------------------------------------------


def test_a_step_says_whether_there_was_anything_to_do() -> None:
    core = Core()
    assert not core.step()
    request = core.ask(new=1)
    assert core.step(), "the prompt is computed"
    assert not request.finished
    assert core.step(), "and its token is delivered"
    assert request.finished
    assert not core.step()


def test_a_step_with_a_failure_to_deliver_had_something_to_do() -> None:
    core = Core()
    core.ask()
    core.take_in()
    core._scheduler.schedule = lambda: _nothing(core)  # type: ignore[method-assign]
    assert core.step()


def _nothing(core: Core) -> Any:
    """Fail the open request, and plan nothing."""
    (request,) = core.open
    core._scheduler.fail(request.jobs[0], ValueError())
    return module.StepPlan()


@pytest.mark.parametrize("before", [[], [False, False, True], [True]], ids=repr)
def test_three_steps_without_work_for_an_open_request_are_a_bug(before: list[bool]) -> None:
    core = Core()
    core.ask()
    core.take_in()
    works = [*before, False, False, False]
    expected = works[:-1]
    core._step = lambda: works.pop(0)  # type: ignore[method-assign]
    assert [core.step() for _ in expected] == expected
    with pytest.raises(BrokenInvariant, match="requests are open, but no step has work"):
        core.step()


def test_an_engine_without_requests_may_step_without_work() -> None:
    core = Core()
    assert [core.step() for _ in range(9)] == [False] * 9
    core.ask()
    core.drain()
    assert [core.step() for _ in range(9)] == [False] * 9


def test_a_step_is_read_after_the_next_one_was_launched() -> None:
    core = Core()
    request = core.ask(new=3)
    held: list[int] = []
    core.model.fault = lambda call, rows: (
        held.append(len(request.jobs[0].tokens)) if call == "decode" else None
    )
    core.drain()
    assert held == [3, 4], "the first token is read when its decode was launched"


def test_an_interrupt_in_a_step_starts_its_requests_over() -> None:
    core = Core()
    first, second = core.ask(1, 2), core.ask(3, 4)
    core.step()

    def interrupt(call: str, rows: Any) -> None:
        if call == "decode":
            raise KeyboardInterrupt

    core.model.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        core.step()
    assert (core.stepping, core._pending) == (False, [])
    core.check_valid()
    core.model.fault = lambda call, rows: None
    core.drain()
    assert core.stats().restarted == 2
    assert [len(request.outputs[0].tokens) for request in (first, second)] == [3, 3]


# -- between steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "stepping", "busy", "refused", "refused_at_delivery"),
    [
        ("", False, False, False, False),
        ("take in", True, True, True, True),
        ("step", True, True, True, True),
        ("deliver", True, False, True, False),
    ],
)
def test_a_step_refuses_methods_by_its_phase(
    phase: Any, stepping: bool, busy: bool, refused: bool, refused_at_delivery: bool
) -> None:
    core = Core()
    core._phase = phase
    assert (core.stepping, core.busy) == (stepping, busy)
    for may_deliver, is_refused in ((False, refused), (True, refused_at_delivery)):
        if is_refused:
            with pytest.raises(EngineBusy, match="close"):
                core.check_idle("close", may_deliver=may_deliver)
        else:
            core.check_idle("close", may_deliver=may_deliver)
    assert core.take_in() is not busy
    assert core._phase == phase


def test_nothing_is_taken_in_while_state_is_half_updated() -> None:
    core = Core()
    request = core.ask()
    core._phase = "step"
    assert not core.take_in()
    assert (request in core._open, len(core.intake)) == (False, 1)
    core._phase = ""
    assert core.take_in()
    assert (request in core._open, len(core.intake)) == (True, 0)


def test_a_core_is_idle_when_nothing_is_open_coming_or_unread() -> None:
    core = Core()
    assert core.idle
    request = core.ask()
    assert not core.idle, "it is in line"
    core.take_in()
    assert not core.idle, "it is open"
    core.step()
    core.cancel(request)
    core.take_in()
    assert core.open == []
    assert not core.idle, "its token is unread"
    core.step()
    assert core.idle


def test_a_core_knows_its_requests() -> None:
    core = Core()
    request = core.ask()
    assert core.knows(request), "it is in line"
    assert core.open == [request]
    core.take_in()
    assert core.knows(request), "it is open"
    assert core.open == [request]
    core.drain()
    assert core.knows(request), "it is finished"
    assert core.open == []
    assert not core.knows(Core().ask())


def test_a_finished_request_that_is_open_between_two_steps_is_a_bug() -> None:
    core = Core()
    request = core.ask()
    core.step()
    core.check_valid()
    request.outputs[0].finish = "length"
    with pytest.raises(BrokenInvariant, match="a finished request is open"):
        core.check_valid()
    core._phase = "deliver"
    core.check_valid()  # the step closes it at its end


# -- opening ------------------------------------------------------------------------------------


def test_requests_are_ranked_as_they_open_by_arrival_and_priority() -> None:
    core = Core()
    low, high, scoring, search = (
        core.ask(n=2),
        core.ask(priority=2),
        core.score((1,)),
        core.search(),
    )
    core.take_in()
    assert [job.rank for job in low.jobs] == [Rank.of(1, 0), Rank.of(2, 0)]
    assert high.jobs[0].rank == Rank.of(3, 2)
    assert scoring.jobs[0].rank == Rank.of(4, 0)
    assert search.jobs[0].rank == Rank.of(5, 0)


def test_only_the_first_sample_of_a_request_waits_until_its_prompt_is_computed() -> None:
    core = Core()
    request = core.ask(n=3, temperature=1.0)
    core.take_in()
    assert [job.state for job in request.jobs] == [State.WAITING, State.NEW, State.NEW]
    assert core.stats().waiting == 1


def test_a_request_that_cannot_open_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    fault = MemoryError()

    def fail(job: Any) -> None:
        raise fault

    bad = core.ask()
    with monkeypatch.context() as broken:
        broken.setattr(core._scheduler.queue, "add", fail)
        assert core.take_in()
    good = core.ask()
    core.drain()
    output = bad.outputs[0]
    assert output.finish == "error"
    assert isinstance(output.error, StepFailed)
    assert (output.error.request, output.error.__cause__) == (bad.number, fault)
    assert good.outputs[0].finish == "length"


def test_a_request_that_is_cancelled_ends_when_it_is_taken_in() -> None:
    core = Core()
    request, other = core.ask(), core.search()
    core.step()
    for one in (request, other):
        core.cancel(one)
    assert not request.finished
    core.take_in()
    for output in (*request.outputs, *other.outputs):
        assert output.finish == "cancelled"
        assert isinstance(output.error, RequestCancelled)
    assert core.open == []
    core.drain()


# -- the model ----------------------------------------------------------------------------------


def test_the_model_is_looked_at_once_after_requests_opened() -> None:
    core = Core()
    core.step()
    assert core.model.looks == []
    core.ask(new=5)
    core.step()
    core.step()
    assert core.model.looks == [True]
    core.ask()
    core.step()
    assert core.model.looks == [True, False], "a request runs"
    core.drain()
    core.ask()
    core.step()
    assert core.model.looks == [True, False, True]


@pytest.mark.parametrize("busy", ["running", "unread"])
def test_a_core_with_a_running_job_or_an_unread_result_is_not_idle_for_the_model(
    busy: str,
) -> None:
    core = Core()
    request = core.ask(new=9)
    core.step()
    if busy == "running":
        core._pending = []
    else:
        core.cancel(request)
    core.ask()
    core.step()
    assert core.model.looks == [True, False]


def test_prefixes_are_forgotten_when_the_model_changed() -> None:
    core = Core(pages=100)
    for _ in range(2):
        core.ask(*range(40), new=1)
        core.drain()
    assert core.stats().pages_cached
    core.ask(*range(50, 53), new=1)
    core.model.changes = True
    core.step()
    assert core.stats().pages_cached == core.stats().state_bytes == 0


def test_prefixes_that_are_forgotten_are_not_made_again_by_what_runs() -> None:
    core = Core(pages=100, stateful=False)
    running, other = core.ask(*range(40), new=9), core.ask(*range(50, 90), new=9)
    core.step()
    core.forget_prefixes()
    assert [job.placed.is_shareable for job in (running.jobs[0], other.jobs[0])] == [False] * 2
    core.drain()
    assert core.stats().pages_cached == 0


def test_a_model_that_cannot_run_ends_every_open_request() -> None:
    core = Core()
    first, second = core.ask(new=9), core.ask(new=9)
    error = UnsupportedModel("it was moved")
    core.model.error = error
    core.step()
    assert [request.outputs[0].error for request in (first, second)] == [error, error]
    assert core.open == []
    core.model.error = None
    good = core.ask()
    core.drain()
    assert good.outputs[0].finish == "length"


# -- searches -----------------------------------------------------------------------------------


def test_each_open_search_makes_way_before_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    made: list[Any] = []
    monkeypatch.setattr(core._beams, "make_way", made.append)
    plain, search = core.ask(new=9), core.search(width=1)
    core.step()
    assert made == [search]
    core.drain()
    assert (search.finished, plain.finished) == (True, True)
    assert set(made) == {search}
    assert core._searches == set()


def test_a_search_that_cannot_make_way_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Any) -> None:
        raise MemoryError

    core = Core()
    monkeypatch.setattr(core._beams, "make_way", fail)
    search, other = core.search(), core.ask()
    core.drain()
    assert [output.finish for output in search.outputs] == ["error", "error"]
    assert all(isinstance(output.error, StepFailed) for output in search.outputs)
    assert other.outputs[0].finish == "length"


# -- closing ------------------------------------------------------------------------------------


def test_closing_ends_what_is_open_or_in_line() -> None:
    core = Core()
    opened, scoring = core.ask(new=9), core.score((1, 2), (3, 4))
    core.step()
    coming = core.ask(n=2)
    core.close()
    assert core.idle
    assert unfinished(opened) == unfinished(coming) == []
    for error in (opened.outputs[0].error, scoring.error):
        assert isinstance(error, EngineClosed)
        assert "while the request ran" in str(error)
    assert all(isinstance(output.error, EngineClosed) for output in coming.outputs)
    assert "before the request ran" in str(coming.outputs[0].error)
    assert core.inspect().allocator.held == 0
    with pytest.raises(EngineClosed):
        core.ask()


def test_what_is_cancelled_after_closing_keeps_its_reason() -> None:
    core = Core()
    request = core.ask()
    core.take_in()
    core._closed = True
    core.cancel(request)
    core.take_in()
    assert isinstance(request.outputs[0].error, RequestCancelled)


# -- numbers ------------------------------------------------------------------------------------


def test_the_plan_adds_the_states_that_the_prefix_cache_may_keep() -> None:
    assert Core().plan.prefix_bytes == STATE_BYTES
    assert Core(stateful=False).plan.prefix_bytes == 0


def test_the_stats_of_a_new_engine_are_its_sizes() -> None:
    stats = Core(pages=64, rows=4).stats()
    sizes = (stats.rows, stats.rows_held, stats.pages, stats.pages_held)
    assert sizes == (4, 0, 63, 0), "the null page is no page"
    assert (stats.steps, stats.tokens, stats.tokens_per_second, stats.schedule_ms) == (0, 0, 0, 0)


def test_rows_and_pages_are_held_by_what_runs() -> None:
    core = Core(rows=4)
    core.ask(*range(10))
    core.step()
    stats = core.stats()
    assert (stats.rows_held, stats.running, stats.pages_held) == (1, 1, 3)


def test_rates_are_over_the_time_of_steps_with_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100)  # one second per look
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    core = Core()
    core.ask(new=5)
    core.step()
    assert core.stats().schedule_ms == 1000, "a step looks twice for scheduling"
    steps = 1
    while core.step():
        steps += 1
    assert (core.stats().tokens, core.stats().steps) == (5, steps + 1)
    assert core.stats().tokens_per_second == 5 / (3 * steps), "and twice in all, around it"
    assert core.stats().schedule_ms == 1000
