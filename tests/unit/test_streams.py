"""The thread that steps an engine for asynchronous streams: who is woken, and when it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine import streams
from granite_paged.engine.streams import AsyncStream, StreamedToken, StreamThread, TokenBuffer


class Loop:
    """An event loop that calls at once, or refuses because it is closed."""

    def __init__(self) -> None:
        self.woken = 0
        self.closed = False

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        if self.closed:
            raise RuntimeError("the loop is closed")
        self.woken += 1
        callback(*arguments)


class Request:
    finished = False


class Steps:
    """An engine whose `n`-th step does what `script[n]` says. Later steps raise."""

    def __init__(self, *script: Callable[[], object]) -> None:
        self.script = script
        self.steps = 0
        self.cancelled: list[Any] = []

    def step(self) -> bool:
        self.steps += 1
        self.script[self.steps - 1]()
        return True

    def cancel(self, request: Any) -> None:
        self.cancelled.append(request)
        request.finished = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What was started as a thread; the test runs it."""
    threads: list[Callable[[], None]] = []

    def thread(target: Any, args: Any, name: str) -> Any:
        return SimpleNamespace(start=lambda: threads.append(lambda: target(*args)))

    monkeypatch.setattr(streams, "threading", SimpleNamespace(Thread=thread, Lock=threading.Lock))
    return threads


def stream_of(loop: Any) -> tuple[AsyncStream, Any]:
    """Return a stream and its request."""
    return AsyncStream(loop), Request()


def finish(request: Any) -> None:
    request.finished = True


def nothing() -> None:
    """A step without news."""


def say(stream: AsyncStream, token: int) -> None:
    stream.on_token(SimpleNamespace(index=1), token, f"w{token}")  # type: ignore[arg-type]


# -- one stream ---------------------------------------------------------------------------------


def test_tokens_are_consumed_once_and_in_order() -> None:
    buffer = TokenBuffer()
    output: Any = SimpleNamespace(index=2)
    buffer.on_token(output, 7, "w7")
    buffer.on_token(output, 8, "w8")
    assert len(buffer) == 2
    assert list(buffer) == [StreamedToken(2, 7, "w7"), StreamedToken(2, 8, "w8")]
    assert (len(buffer), list(buffer)) == (0, [])


def test_a_stream_is_over_when_its_request_is_finished_or_the_engine_failed() -> None:
    stream, request = stream_of(Loop())
    assert not stream.over
    stream.request = request
    assert not stream.over
    finish(request)
    assert stream.over
    failed, _ = stream_of(Loop())
    failed.error = ValueError()
    assert failed.over


def test_waiting_says_whether_more_may_come_and_waits_again_next_time() -> None:
    async def work() -> None:
        stream, request = stream_of(asyncio.get_running_loop())
        stream.request = request
        stream.ready.set()
        assert await stream.wait() is True
        assert not stream.ready.is_set()
        finish(request)
        stream.ready.set()
        assert await stream.wait() is False

    asyncio.run(work())


# -- the thread ---------------------------------------------------------------------------------


def test_one_thread_steps_until_the_last_request_is_finished(
    started: list[Callable[[], None]],
) -> None:
    thread, loop = StreamThread(), Loop()
    (first, one), (second, two), (third, three) = (stream_of(loop) for _ in range(3))
    steps = Steps(nothing, lambda: finish(two), nothing, lambda: finish(one))
    thread.follow(steps, first, one)
    thread.follow(steps, second, two)
    assert len(started) == 1
    started[0]()
    assert steps.steps == 4
    assert first.error is second.error is None

    more = Steps(nothing, lambda: finish(three))
    thread.follow(more, third, three)
    assert len(started) == 2, "the first thread is over"
    started[1]()
    assert (steps.steps, more.steps) == (4, 2)


def test_a_step_wakes_the_streams_with_news_together(started: list[Callable[[], None]]) -> None:
    thread, loop, other = StreamThread(), Loop(), Loop()
    (first, one), (second, two), (still, three) = (stream_of(loop) for _ in range(3))
    alone, four = stream_of(other)
    awake: list[list[bool]] = []

    def news() -> None:
        for stream in (first, second, alone):
            say(stream, 7)

    def end() -> None:
        awake.append([stream.ready.is_set() for stream in (first, second, still, alone)])
        awake.append([len(stream) > 0 for stream in (first, second, still, alone)])
        assert (loop.woken, other.woken) == (1, 1)
        for stream in (first, second, alone):
            stream.ready.clear()
            list(stream)
        for request in (one, two, three, four):
            finish(request)

    steps = Steps(news, end)
    for stream, request in ((first, one), (second, two), (still, three), (alone, four)):
        thread.follow(steps, stream, request)
    started[0]()
    assert awake == [[True, True, False, True]] * 2
    assert (loop.woken, other.woken) == (2, 2)
    for stream in (first, second, still, alone):
        assert stream.ready.is_set(), "its request is finished"
        assert stream.error is None


def test_streams_of_a_closed_loop_are_cancelled_and_others_go_on(
    started: list[Callable[[], None]],
) -> None:
    thread, closed, loop = StreamThread(), Loop(), Loop()
    (left, one), (left_too, two), (kept, three) = (
        stream_of(closed), stream_of(closed), stream_of(loop),
    )  # fmt: skip
    closed.closed = True

    def news() -> None:
        say(left, 7)
        say(left_too, 7)
        say(kept, 7)

    steps = Steps(news, nothing, lambda: finish(three))
    for stream, request in ((left, one), (left_too, two), (kept, three)):
        thread.follow(steps, stream, request)
    started[0]()
    assert steps.cancelled[:2] == [one, two]
    assert three not in steps.cancelled
    assert steps.steps == 3
    assert kept.error is None


def test_what_a_step_raises_ends_every_stream_and_the_thread(
    started: list[Callable[[], None]],
) -> None:
    fault = KeyboardInterrupt()

    def fail() -> None:
        raise fault

    thread, loop = StreamThread(), Loop()
    (first, one), (second, two) = (stream_of(loop) for _ in range(2))
    steps = Steps(nothing, fail)
    thread.follow(steps, first, one)
    thread.follow(steps, second, two)
    started[0]()
    assert steps.steps == 2
    assert (first.error, second.error) == (fault, fault)
    assert first.ready.is_set()
    assert second.ready.is_set()
