"""The asyncio side: the event loop never waits for a step, and one thread serves all streams."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import EngineClosed, QueueFull
from tests.helpers.engine_harness import EngineHarness, expected_tokens
from tests.helpers.simulated_runner import HashOracle

STEP = 0.4
"""Seconds of a slow step."""

BLOCKED = 0.1
"""Most seconds that the loop may stand still while one runs: far below a step, above the noise of
a machine that does other work."""

PARAMS = SamplingParams(max_new_tokens=4, stop_tokens=())
PROMPTS = [[1, 2, 3], [4, 5], [6]]


def make_engine(**sizes: Any) -> EngineHarness:
    return EngineHarness(HashOracle(), **sizes)


def slow_down(harness: EngineHarness) -> None:
    """Let every call of the device take `STEP`."""
    harness.runner.fault = lambda made, rows: (
        time.sleep(STEP) if made in ("decode", "prefill") else None
    )


async def tokens_of(
    engine: Engine, prompt: list[int], params: SamplingParams = PARAMS
) -> list[int]:
    return [piece.token async for piece in engine.astream(prompt, params)]


async def longest_block(work: Callable[[], Awaitable[object]]) -> float:
    """Return the longest time that the event loop stood still while it did some work."""
    longest, last = 0.0, time.perf_counter()

    async def beat() -> None:
        nonlocal longest, last
        while True:
            last = time.perf_counter()
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - last - 0.005)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0)
    await work()
    await asyncio.sleep(0.02)
    beating.cancel()
    return longest


def shortest_block(work: Callable[[], Awaitable[object]]) -> float:
    """Return the least of some longest blocks: a busy machine makes longer ones."""
    shortest = math.inf
    for _ in range(4):
        shortest = min(shortest, asyncio.run(longest_block(work)))
        if shortest < BLOCKED:
            break
    return shortest


def test_a_request_during_a_step_does_not_block_the_loop() -> None:
    harness = make_engine()
    slow_down(harness)

    async def work() -> None:
        first = asyncio.create_task(tokens_of(harness.engine, PROMPTS[0]))
        await asyncio.sleep(STEP / 2)
        await asyncio.gather(first, tokens_of(harness.engine, PROMPTS[1]))

    assert shortest_block(work) < BLOCKED


def test_a_disconnect_during_a_step_does_not_block_the_loop() -> None:
    harness = make_engine()
    slow_down(harness)

    async def work() -> None:
        leaving = asyncio.create_task(tokens_of(harness.engine, PROMPTS[0]))
        await asyncio.sleep(STEP / 2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving

    assert shortest_block(work) < BLOCKED
    harness.drain()
    assert harness.engine.idle


@contextlib.contextmanager
def held_step(harness: EngineHarness) -> Iterator[None]:
    """Hold a step of another thread inside its first prefill."""
    begun, over = threading.Event(), threading.Event()

    def hold(made: str, rows: Any) -> None:
        if made == "prefill":
            begun.set()
            assert over.wait(timeout=60)

    harness.runner.fault = hold
    stepping = threading.Thread(target=harness.engine.step)
    stepping.start()
    assert begun.wait(timeout=60)
    yield
    assert stepping.is_alive()
    harness.runner.fault = lambda made, rows: None
    over.set()
    stepping.join()


def test_submit_cancel_and_stats_return_during_a_step() -> None:
    harness = make_engine()
    engine = harness.engine
    other = engine.submit(PROMPTS[0], PARAMS)
    with held_step(harness):
        load = engine.load
        added = engine.submit(PROMPTS[1], PARAMS)
        assert (engine.load - load, engine.idle, engine.closed) == (5, False, False)
        assert engine.stats().steps == 1
        engine.cancel(other)
        assert not other.finished
    assert other.outputs[0].finish == "cancelled"
    harness.drain()
    assert added.outputs[0].tokens == expected_tokens(HashOracle(), PROMPTS[1], PARAMS)


def test_a_stream_begins_and_ends_during_a_step_of_another_thread() -> None:
    harness = make_engine()
    harness.engine.submit(PROMPTS[0], PARAMS)

    async def work() -> None:
        streaming = asyncio.create_task(tokens_of(harness.engine, PROMPTS[1]))
        await asyncio.sleep(0.02)
        streaming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await streaming

    with held_step(harness):
        asyncio.run(work())
    harness.drain()


def test_only_asynchronous_streams_start_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/architecture.md says so: callers step for all other requests."""
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", counted)
    harness = make_engine()
    harness.engine.generate(PROMPTS, PARAMS)
    harness.engine.score([(PROMPTS[0], PROMPTS[1:])])
    harness.engine.search(PROMPTS[0], SamplingParams(max_new_tokens=4), beams=2)
    assert len(list(harness.engine.stream(PROMPTS[0], PARAMS))) == 4
    assert started == []
    assert len(asyncio.run(tokens_of(harness.engine, PROMPTS[0]))) == 4
    assert len(started) == 1


def test_two_hundred_streams_share_one_thread() -> None:
    harness = make_engine(pages=400)
    before = threading.active_count()
    most = 0

    async def stream(number: int) -> list[int]:
        nonlocal most
        tokens = []
        async for piece in harness.engine.astream([1 + number % 7, number % 90], PARAMS):
            tokens.append(piece.token)
            most = max(most, threading.active_count() - before)
        return tokens

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(stream, range(200)))

    answers = asyncio.run(together())
    for number, tokens in enumerate(answers):
        prompt = [1 + number % 7, number % 90]
        assert tokens == expected_tokens(HashOracle(), prompt, PARAMS)
    assert 1 <= most <= 2, "at most one thread, and one that is just ending"
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    harness.drain()


async def leave(stream: Any) -> None:
    await stream.aclose()


async def collect_garbage(stream: Any) -> None:
    del stream
    gc.collect()
    await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", [leave, collect_garbage])
def test_a_stream_that_is_left_is_cancelled_by_the_next_step(how: Any) -> None:
    harness = make_engine()
    engine = harness.engine

    async def work() -> None:
        streams = [engine.astream(PROMPTS[0], SamplingParams(max_new_tokens=90, stop_tokens=()))]
        async for _ in streams[0]:
            break
        await how(streams.pop())
        await tokens_of(engine, PROMPTS[1])
        assert not engine.load

    asyncio.run(work())
    assert engine.stats().tokens < 60
    harness.drain()


def test_streams_left_in_a_closed_loop_are_cancelled() -> None:
    harness = make_engine()
    stream = harness.engine.astream(PROMPTS[0], SamplingParams(max_new_tokens=90, stop_tokens=()))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(anext(stream))
    loop.close()
    deadline = time.monotonic() + 20
    while harness.engine.load and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not harness.engine.load
    harness.drain()


def test_what_a_step_of_the_thread_raises_ends_every_stream(monkeypatch: Any) -> None:
    harness = make_engine()
    engine = harness.engine

    def failing() -> bool:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine, "_core", _Failing(engine._core, failing))

    async def work() -> list[Any]:
        asked = (tokens_of(engine, prompt) for prompt in PROMPTS)
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [str(error) for error in asyncio.run(work())] == ["a bug"] * 3
    monkeypatch.undo()
    assert asyncio.run(tokens_of(engine, PROMPTS[0]))
    harness.drain()


class _Failing:
    """A core whose step raises."""

    def __init__(self, core: Any, step: Callable[[], bool]) -> None:
        self.core, self.step = core, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)


def test_closing_under_streams_ends_each_by_name() -> None:
    harness = make_engine()
    slow_down(harness)

    async def work() -> list[Any]:
        asked = [asyncio.create_task(tokens_of(harness.engine, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(STEP / 2)
        await asyncio.to_thread(harness.engine.close)
        return await asyncio.gather(*asked, return_exceptions=True)

    assert {type(error) for error in asyncio.run(work())} == {EngineClosed}


def test_a_stream_refused_by_a_full_queue_says_so() -> None:
    harness = EngineHarness(HashOracle(), {"queue": 1})

    async def work() -> list[Any]:
        harness.engine.submit([1], PARAMS)
        asked = (tokens_of(harness.engine, [1], PARAMS) for _ in range(2))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert {type(error) for error in asyncio.run(work())} == {QueueFull}


def test_the_queue_counts_requests_that_came_during_a_step() -> None:
    harness = EngineHarness(HashOracle(), {"queue": 2})
    engine = harness.engine
    engine.submit(PROMPTS[0], PARAMS)
    with held_step(harness):
        for prompt in PROMPTS[1:]:
            engine.submit(prompt, PARAMS)
        with pytest.raises(QueueFull):
            engine.submit(PROMPTS[0], PARAMS)
    harness.drain()
