"""A fault at every call that a step makes, one after the other: at most one request fails.

The calls are counted in a run without faults. The ordinary profile raises at three calls of each
site; `wide` and `deep` raise at every one.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from granite_paged.device import Fetch
from granite_paged.engine import executor
from granite_paged.engine.admission import Admission
from granite_paged.engine.beams import BeamKeeper, BeamRequest
from granite_paged.engine.core import EngineCore
from granite_paged.engine.executor import Executor
from granite_paged.engine.lifecycle import JobLifecycle
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.request import Request, SamplingParams, Scoring
from granite_paged.engine.rows import RowPool
from granite_paged.engine.running import RunningJobs
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.scoring import ScorePlanner
from granite_paged.engine.waiting import LateCleanups, WaitingQueue
from granite_paged.errors import CallbackFailed, PromptError, StepFailed, TokenizerFailed
from granite_paged.paging.allocator import PageAllocator
from tests.helpers import engine_harness
from tests.helpers.call_sites import (
    Broken,
    Site,
    count_calls,
    fault_at,
    methods_of,
    name_of,
    wrapped,
)
from tests.helpers.engine_harness import EngineHarness, expected_tokens
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner
from tests.helpers.words import Words

EVERY = os.environ.get("HYPOTHESIS_PROFILE", "default") != "default"
STEM = list(range(20))
OUTSIDE_STEPS = (
    "check_valid",
    "clear",
    "check_fits",
    "close",
    "warm_up",
    "references",
    "length",
    "pages_for",
)
"""Called by the tests or by `submit`, so that a fault there is the caller's."""
CONCERNS_ALL = {"SimulatedRunner.notice_changes"}
"""Called once per step and not for a request."""
GUARDS = (
    *("guarded", "recover", "restart", "_restart", "fail", "finish", "release", "forget"),
    *("take_row", "give_row", "_remove_unneeded"),
)
"""Methods that take up the faults of what they call; nothing takes up theirs."""
PARTS: list[Site] = [
    *methods_of(PageAllocator, PrefixCache, SimulatedRunner),
    *((executor, name) for name in ("draw", "upload", "seen_tokens", "finite_rows")),
    *((RunningJobs, name) for name in ("place", "grow", "fork")),
    *((Executor, name) for name in ("_decode", "_prefill", "_score")),
    *((BeamKeeper, name) for name in ("report", "make_way")),
    (ScorePlanner, "plan"),
    (Fetch, "read"),
]
SITES = {
    name_of(site): site
    for site in PARTS
    if site[1] not in OUTSIDE_STEPS and (site[0] is Executor or not site[1].startswith("_"))
}


PRIVATE = {
    name_of(site): site
    for site in methods_of(
        *(RowPool, WaitingQueue, LateCleanups, PrefixCache, RunningJobs, Admission, ScorePlanner),
        *(BeamRequest, BeamKeeper, JobLifecycle, Scheduler),
    )
    if name_of(site) not in SITES
    and site[1] not in (*OUTSIDE_STEPS, *GUARDS)
    and site[1] not in ("attempt", "retry", "check_room")
}
"""Calls inside a part. Those of the bookkeeping of all requests may end a step."""


def busy_harness() -> EngineHarness:
    """Return a harness with one request of three samples; `step_to_the_end` submits more."""
    options = {"preemption": "swap", "state_bytes": 400}
    harness = EngineHarness(HashOracle(), options, pages=18, rows=5)
    harness.faulty = True
    harness.submit(STEM[:10], params(5, n=3))
    return harness


def arrive(harness: EngineHarness, steps: int) -> list[Any]:
    """Submit what arrives before a step: hits, swaps, scores, beams; then what preempts them."""
    before = len(harness.open)
    if steps == 1:
        harness.score(STEM[:13], [[1, 2], [3], [4, 5, 6]])
        harness.score(STEM[:9], [[1], [3]])
        for number, heat in enumerate((0, 0.5, 0, 0.5)):
            prompt = [*STEM[: 4 * number], 50 + number]
            harness.submit(prompt, params(12 + number, temperature=heat, repetition_penalty=1.1))
        harness.search(STEM[:6], SamplingParams(max_new_tokens=4, stop_tokens=(1,)), 2)
    if steps == 5:
        for number in range(3):
            harness.submit([*STEM, number], params(9, priority=number % 2))
    return harness.open[before:]


def params(new: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, stop_tokens=(), **more)


@functools.cache
def calls_of_sites() -> dict[str, int]:
    harness, sites = busy_harness(), [*SITES.values(), *PRIVATE.values()]
    return dict(count_calls(sites, lambda: step_to_the_end(harness, [])))


def step_to_the_end(harness: EngineHarness, asked: list[Any]) -> int:
    """Step until nothing is open. Return how often a step raised the fault."""
    raised = 0
    for steps in range(500):
        asked += arrive(harness, steps)
        try:
            if not harness.step():
                return raised
        except Broken:
            raised += 1
            harness.restart_watch()
    raise AssertionError("the engine never ends")


def numbers_up_to(calls: int) -> list[int]:
    every = range(1, calls + 1)
    return list(every) if EVERY else sorted({2, (calls + 1) // 2, calls}.intersection(every))


@pytest.fixture(autouse=True)
def _searches_are_expected_before_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected answers of a search come from an engine, which the fault must not meet."""
    known = {
        (6, 2): engine_harness.expected_beams(
            HashOracle(), STEM[:6], SamplingParams(max_new_tokens=4, stop_tokens=(1,)), 2
        )
    }
    monkeypatch.setattr(
        engine_harness, "expected_beams", lambda oracle, p, params, beams: known[len(p), beams]
    )


@pytest.mark.parametrize("name", SITES)
def test_a_fault_at_any_call_of_a_step_ends_at_most_one_request(name: str) -> None:
    for number in numbers_up_to(calls_of_sites().get(name, 0)):
        harness = busy_harness()
        asked = list(harness.open)
        with fault_at(SITES[name], number) as counts:
            raised = step_to_the_end(harness, asked)
        assert counts[name] >= number, "the fault was never reached"
        assert not raised or name in CONCERNS_ALL, f"call {number} ended a step for all"
        harness.step()  # cleans up what the fault left
        harness.drain()
        assert_one_failed_at_most(asked, f"call {number}")


@pytest.mark.parametrize("name", PRIVATE)
def test_a_fault_inside_a_part_ends_at_most_one_request_or_one_step(name: str) -> None:
    """A step that ends is raised to its caller, and every request starts over."""
    for number in numbers_up_to(calls_of_sites().get(name, 0)):
        harness = busy_harness()
        asked = list(harness.open)
        with fault_at(PRIVATE[name], number):
            raised = step_to_the_end(harness, asked)
        harness.step()  # cleans up what the fault left
        harness.drain()
        assert_one_failed_at_most(asked, f"call {number}")
        failed = sum(bool(errors_of(one)) for one in asked)
        assert raised + failed <= 1, f"call {number} ended a step and a request"


def assert_one_failed_at_most(asked: list[Request | Scoring], where: str) -> None:
    failed = [one for one in asked if errors_of(one)]
    assert len(failed) <= 1, f"{where} ended several requests"
    for one in failed:
        for error in errors_of(one):
            assert isinstance(error, StepFailed), where
            assert error.request == one.number
            assert isinstance(error.__cause__, Broken)


def errors_of(asked: Request | Scoring) -> list[Exception]:
    if isinstance(asked, Scoring):
        return [asked.error] if asked.error else []
    return [output.error for output in asked.outputs if output.error]


def test_the_faults_reach_the_parts_of_a_step() -> None:
    never = set(SITES) - set(calls_of_sites())
    assert {"RowPool.give", "WaitingQueue._push", "PrefixCache._prune"} <= set(calls_of_sites())
    assert never <= {"PageAllocator.extend_pool"}, f"no step calls {never}"


# -- user code ----------------------------------------------------------------------------------


class Listener:
    """A callback."""

    def heard(self, *arrived: Any) -> None:
        """Do nothing."""


def user_harness() -> EngineHarness:
    harness = EngineHarness(HashOracle(), {"tokenizer": Words()}, pages=40, rows=4)
    harness.faulty = True
    harness.submit([1, 2, 3], params(5))
    harness.submit([4, 5], params(6, stop_strings=("never",)))
    harness.submit([6], params(6, n=2), lambda *arrived: Listener().heard(*arrived))
    harness.search(STEM[:6], SamplingParams(max_new_tokens=4, stop_tokens=(1,)), 2)
    harness.score([1, 2], [[3], [4]])
    return harness


@contextlib.contextmanager
def ctrl_c_at(site: Site, number: int) -> Iterator[None]:
    """Send this process SIGINT at the `number`-th call of a site, once."""
    counts = itertools.count(1)

    def press(name: str) -> None:
        if next(counts) == number:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with wrapped([site], press):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


USER_CODE: dict[str, tuple[Site, type[Exception]]] = {
    "decode": ((Words, "decode"), TokenizerFailed),
    "callback": ((Listener, "heard"), CallbackFailed),
}


@pytest.mark.parametrize("kind", USER_CODE)
def test_a_fault_at_any_call_of_user_code_ends_its_request_only(kind: str) -> None:
    site, error_type = USER_CODE[kind]
    calls = count_calls([site], user_harness().drain)[name_of(site)]
    assert calls >= 10
    for number in range(1, calls + 1):
        harness = user_harness()
        asked = list(harness.open)
        with fault_at(site, number):
            harness.drain()
        failed = [one for one in asked if errors_of(one)]
        assert len(failed) <= 1, f"call {number} ended several requests"
        assert all(isinstance(error, error_type) for one in failed for error in errors_of(one))


def test_a_fault_at_any_call_that_encodes_refuses_its_prompt_only() -> None:
    texts = ["w1 w2 w3", "w4 w5", "w6"]
    expected = [
        expected_tokens(
            HashOracle(), Words()(text, add_special_tokens=False)["input_ids"], params(3)
        )
        for text in texts
    ]
    for number in range(len(texts)):
        harness = EngineHarness(HashOracle(), {"tokenizer": Words()}, pages=40, rows=4)
        with fault_at((Words, "__call__"), number + 1):
            outputs = harness.engine.generate(texts, params(3))
        for place, output in enumerate(outputs):
            assert isinstance(output.error, PromptError) == (place == number)
            assert output.tokens == ([] if place == number else expected[place])
        harness.check_empty()


@pytest.mark.parametrize("kind", USER_CODE)
def test_an_interrupt_at_any_call_of_user_code_changes_no_answer(kind: str) -> None:
    site, _ = USER_CODE[kind]
    calls = count_calls([site], user_harness().drain)[name_of(site)]
    for number in range(1, calls + 1):
        harness = user_harness()
        asked = list(harness.open)
        with fault_at(site, number, engine_harness.Interrupted):
            harness.drain()
        assert not [one for one in asked if errors_of(one)]


DEVICE = ("SimulatedRunner.decode", "SimulatedRunner.prefill", "Fetch.read")


@pytest.mark.parametrize("name", DEVICE)
def test_an_interrupt_at_any_call_of_the_device_changes_no_answer(name: str) -> None:
    for number in numbers_up_to(calls_of_sites()[name]):
        harness = busy_harness()
        asked = list(harness.open)
        with fault_at(SITES[name], number, engine_harness.Interrupted):
            step_to_the_end(harness, asked)
        harness.drain()
        assert not [one for one in asked if errors_of(one)], f"call {number}"


@pytest.mark.parametrize("name", [*SITES, *PRIVATE])
def test_ctrl_c_at_any_call_of_a_step_changes_no_answer(name: str) -> None:
    """It comes between two bytecodes of bookkeeping as well, and nothing there can start over."""
    calls = calls_of_sites().get(name, 0)
    for number in numbers_up_to(calls) if EVERY else [calls][:calls]:
        harness = busy_harness()
        asked, pressed = list(harness.open), False
        with ctrl_c_at({**SITES, **PRIVATE}[name], number):
            for steps in range(500):
                try:
                    asked += arrive(harness, steps)
                    if not harness.step():
                        break
                except KeyboardInterrupt:
                    pressed = True
                    asked += [one for one in harness.open if one not in asked]
        assert pressed, f"call {number}"
        harness.drain()
        assert not [one for one in asked if errors_of(one)], f"call {number}"


@pytest.mark.parametrize("number", range(1, 4))
def test_ctrl_c_while_prompts_are_submitted_leaves_no_request_open(number: int) -> None:
    engine = user_harness().engine
    engine.cancel_all()
    texts = ["w1 w2 w3", "w4 w5", "w6"]
    with ctrl_c_at((EngineCore, "take_in"), number), pytest.raises(KeyboardInterrupt):
        engine.generate(texts, params(3))
    assert engine.idle
    assert not engine.inspect().allocator.held
    assert [len(output.tokens) for output in engine.generate(texts[:2], params(3))] == [3, 3]
