"""Answers token by token, for loops and for asyncio.

A loop steps the engine itself. The streams of event loops share one thread, which steps the engine
while one of their requests is open::

    event loop          submit, cancel: never wait for a step
    thread              step ──> tokens of every stream ──> one wake-up per event loop
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from granite_paged.engine.request import Output, Request


class StreamedToken(NamedTuple):
    """One token of one sample, and the text that it completed."""

    sample: int
    token: int
    text: str


class TokenBuffer:
    """Tokens that were delivered and not consumed yet."""

    def __init__(self) -> None:
        self._tokens: deque[StreamedToken] = deque()

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[StreamedToken]:
        while self._tokens:
            yield self._tokens.popleft()

    def on_token(self, output: Output, token: int, text: str) -> None:
        """Keep a token. A request's callback."""
        self._tokens.append(StreamedToken(output.index, token, text))


class AsyncStream(TokenBuffer):
    """The tokens of one request, for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.loop = loop
        self.ready = asyncio.Event()
        self.request: Request | None = None
        self.error: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether no token comes any more."""
        return self.error is not None or (self.request is not None and self.request.finished)

    async def wait(self) -> bool:
        """Wait for news. Return whether more may come after the tokens that are here now."""
        await self.ready.wait()
        self.ready.clear()
        return not self.over


class Steps(Protocol):
    """An engine, as its thread needs it."""

    def step(self) -> bool:
        """Run one step."""
        ...

    def cancel(self, request: Request) -> None:
        """End a request."""
        ...


class StreamThread:
    """Steps an engine in a thread while asynchronous streams are open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for moments only, and never by a finalizer
        self._streams: list[AsyncStream] = []
        self._runs = False

    def follow(self, engine: Steps, stream: AsyncStream, request: Request) -> None:
        """Step an engine until the request of a stream is finished."""
        stream.request = request
        with self._lock:
            self._streams.append(stream)
            if not self._runs:
                name = "granite_paged streams"
                threading.Thread(target=self._run, args=(engine,), name=name).start()
                self._runs = True

    def _run(self, engine: Steps) -> None:
        is_needed = True
        while is_needed:
            try:
                engine.step()
            except BaseException as error:  # no caller is here to see it, so every stream does
                self._fail(error)
            is_needed = self._wake(engine)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            for stream in self._streams:
                stream.error = error

    def _wake(self, engine: Steps) -> bool:
        """Wake the streams that have news, all of one event loop at once.

        Returns:
            Whether a stream is still open.
        """
        waking: dict[asyncio.AbstractEventLoop, list[AsyncStream]] = {}
        with self._lock:
            streams, self._streams = self._streams, []
            for stream in streams:
                is_over = stream.over  # asked once: a stream that leaves the list must be woken
                if not is_over:
                    self._streams.append(stream)
                if is_over or len(stream):
                    waking.setdefault(stream.loop, []).append(stream)
            self._runs = is_needed = bool(self._streams)
        for loop, news in waking.items():
            try:
                loop.call_soon_threadsafe(_set_ready, news)
            except RuntimeError:  # the loop is closed, so no task reads these
                for stream in news:
                    if stream.request is not None:
                        engine.cancel(stream.request)
        return is_needed


def _set_ready(streams: list[AsyncStream]) -> None:
    for stream in streams:
        stream.ready.set()
