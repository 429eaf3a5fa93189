"""Steps an engine for a caller who waits for answers.

The engine has no thread of its own: every caller who waits drives it, one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from granite_paged.engine.request import Request, Scoring
from granite_paged.errors import GranitePagedError, QueueFull
from granite_paged.progress import Progress

_Asked = TypeVar("_Asked", bound=Request | Scoring)


class Steppable(Protocol):
    """An engine."""

    @property
    def idle(self) -> bool:
        """Whether no request is open and no result is unread."""
        ...

    def step(self) -> bool:
        """Run one step. Return whether there was anything to do."""
        ...

    def cancel(self, request: Request | Scoring) -> None:
        """End a request as it is."""
        ...


def run(
    engine: Steppable,
    submits: Sequence[Callable[[], _Asked]],
    description: str,
    progress: Progress,
) -> list[_Asked | GranitePagedError]:
    """Submit everything, as the queue has room, and step until all of it is finished.

    Returns:
        For each, the finished request, or the error that refused it.
    """
    asked: list[_Asked | GranitePagedError] = []
    try:
        asked += (_submitted(engine, submit) for submit in submits)
        for done, one in enumerate(asked):
            progress(description, done, len(submits))
            while not (isinstance(one, GranitePagedError) or one.finished):
                engine.step()
        progress(description, len(submits), len(submits))
    finally:
        for one in asked:
            if not isinstance(one, GranitePagedError):
                engine.cancel(one)
    return asked


def _submitted(engine: Steppable, submit: Callable[[], _Asked]) -> _Asked | GranitePagedError:
    while True:
        try:
            return submit()
        except QueueFull as full:
            if engine.idle:
                return full
            engine.step()
        except GranitePagedError as refusal:
            return refusal
