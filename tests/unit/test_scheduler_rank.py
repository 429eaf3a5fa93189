"""Rank decides who comes in, who gives up row and pages, and whose tokens are computed first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from granite_paged.engine.job import State
from granite_paged.engine.rank import Rank
from granite_paged.engine.request import Request, SamplingParams
from tests.helpers.engine_harness import EngineHarness
from tests.helpers.simulated_runner import HashOracle


def make_harness(options: dict[str, Any] | None = None, **sizes: Any) -> EngineHarness:
    return EngineHarness(HashOracle(), options, **sizes)


def ask(harness: EngineHarness, prompt: Sequence[int], new: int = 4, **params: Any) -> Request:
    request = harness.submit(prompt, SamplingParams(max_new_tokens=new, **params))
    assert request is not None
    return request


def states(*requests: Request) -> list[State]:
    return [request.jobs[0].state for request in requests]


def steps_to_first_token(harness: EngineHarness, request: Request) -> int:
    steps = 0
    while not request.outputs[0].tokens:
        harness.step()
        steps += 1
    return steps


def test_a_step_of_priority_is_worth_a_thousand_arrivals() -> None:
    low, high, late = Rank.of(1, 0), Rank.of(1000, 1), Rank.of(1001, 1)
    assert high.preempts(low)
    assert not late.preempts(low), "a thousand arrivals, and no more"
    assert low < late
    assert not Rank.of(1, 1).preempts(high), "equal priority never preempts"


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_request_of_higher_priority_takes_a_row_at_once(preemption: str) -> None:
    harness = make_harness({"preemption": preemption}, pages=200, rows=4)
    running = [ask(harness, [n, 5], new=140, priority=-5) for n in range(4)]
    for _ in range(3):
        harness.step()
    urgent = ask(harness, [9, 10, 11], priority=10)
    assert steps_to_first_token(harness, urgent) <= 2
    assert states(*running) == [*[State.DECODE] * 3, State.WAITING], "the newest gave way"
    harness.drain()
    assert all(len(one.outputs[0].tokens) == 140 for one in running)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_request_of_higher_priority_takes_pages_at_once(preemption: str) -> None:
    options = {"preemption": preemption, "state_bytes": 0, "longest_step": math.inf}
    harness = make_harness(options, pages=17, rows=4)
    running = [ask(harness, [n] * 19, new=12) for n in range(3)]
    harness.step()
    urgent = ask(harness, [9] * 31, priority=1)
    assert steps_to_first_token(harness, urgent) <= 2
    assert states(*running) == [State.DECODE, State.WAITING, State.WAITING]
    harness.drain()


@pytest.mark.parametrize("kind", ["samples", "scores", "beams"])
def test_any_kind_of_running_request_gives_way(kind: str) -> None:
    harness = make_harness(rows=2, pages=200)
    if kind == "samples":
        ask(harness, [1, 2], n=2, new=30)
    elif kind == "scores":
        harness.score([1, 2], [[3, n] for n in range(60)])
        harness.score([1, 3], [[3, n] for n in range(60)])
    else:
        harness.search([1, 2], SamplingParams(max_new_tokens=20, stop_tokens=()), beams=2)
    for _ in range(3):
        harness.step()
    urgent = ask(harness, [9, 10, 11], new=2, priority=1)
    assert steps_to_first_token(harness, urgent) <= 2
    harness.drain()


def test_equal_priority_never_preempts() -> None:
    harness = make_harness(rows=1, pages=40)
    running, later = ask(harness, [1], new=30, priority=3), ask(harness, [2], priority=3)
    for _ in range(8):
        harness.step()
    assert states(running, later) == [State.DECODE, State.WAITING]
    harness.drain()
    assert not harness.met["preempted"]


def test_nothing_is_preempted_in_vain() -> None:
    """The pages of lower priority would not be enough: requests of equal priority hold the rest."""
    harness = make_harness({"state_bytes": 0}, pages=17, rows=4)
    equal, low = ask(harness, [1] * 31, new=16, priority=1), ask(harness, [2] * 7, new=12)
    harness.step()
    urgent = ask(harness, [9] * 44, priority=1)
    harness.step()
    harness.step()
    assert states(equal, low, urgent) == [State.DECODE, State.DECODE, State.WAITING]
    harness.drain()


def test_a_preempted_request_keeps_its_rank() -> None:
    harness = make_harness(rows=1, pages=60)
    first = ask(harness, [1], new=20)
    harness.step()
    later = ask(harness, [2])
    urgent = [ask(harness, [3 + n], priority=1) for n in range(2)]
    while not all(request.finished for request in urgent):
        harness.step()
    harness.step()
    assert states(first, later) == [State.DECODE, State.WAITING]
    harness.drain()
    assert harness.met["preempted"] == 1, "it is preempted once, not once per urgent request"


def test_a_burst_of_higher_priority_takes_several_rows_in_one_step() -> None:
    harness = make_harness({"longest_step": math.inf}, rows=4, pages=100)
    running = [ask(harness, [n, 5], new=40) for n in range(4)]
    harness.step()
    urgent = [ask(harness, [n, 7], new=2, priority=1) for n in range(3)]
    harness.step()
    assert [states(one) for one in urgent] == [[State.DECODE]] * 3
    assert states(*running) == [State.DECODE, *[State.WAITING] * 3]
    harness.drain()


def test_prompts_that_rank_first_are_computed_before_scores() -> None:
    options = {"state_bytes": 0, "step_tokens": 24}
    harness = make_harness(options, pages=400, rows=8, chunk_tokens=64)
    harness.score([5, 6, 7, 8], [[n, n + 1] for n in range(90)])
    for _ in range(3):
        harness.step()
    urgent, scored = ask(harness, [9] * 80, new=1, priority=1), harness.met["scored"]
    steps = steps_to_first_token(harness, urgent)
    assert steps <= 80 // 16 + 2
    assert harness.open[0].scores.count(None) >= 90 - scored - 16 - steps, "one score per step"
    harness.drain()


def test_continuations_longer_than_a_step_do_not_stop_prompts() -> None:
    options = {"state_bytes": 0, "step_tokens": 16}
    harness = make_harness(options, pages=400, rows=4, chunk_tokens=64)
    harness.score([5, 6, 7, 8], [[n] * 40 for n in range(50)])
    for _ in range(3):
        harness.step()
    later = ask(harness, [9] * 24, new=1)
    assert steps_to_first_token(harness, later) <= 24 // 8 + 2
    harness.drain()


def test_a_context_takes_the_pages_of_newer_decodes() -> None:
    """It ranks first, so it needs not wait for the newer ones to end."""
    harness = make_harness({"state_bytes": 0}, pages=21, rows=4)
    harness.score([5] * 9, [[n] * 20 for n in range(3)])
    newer = [ask(harness, [n] * 10, new=40) for n in range(3)]
    steps = 0
    while not harness.met["scored"]:
        harness.step()
        steps += 1
    assert steps <= 14
    assert not any(request.finished for request in newer)
    harness.drain()
