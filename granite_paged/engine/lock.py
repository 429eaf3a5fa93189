"""The engine's lock: one step at a time, in the order of asking."""

from __future__ import annotations

import threading
from typing import Self


class FairLock:
    """A re-entrant lock that a thread which asks again and again does not keep from others.

    A thread that waits holds the turn, so a thread that asks later gets the lock later.
    """

    def __init__(self) -> None:
        self._lock, self._turn = threading.RLock(), threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._owner == threading.get_ident()

    def acquire_now(self) -> bool:
        """Take it if it is free, or the caller's already. Return whether it was taken."""
        return self._lock.acquire(blocking=False) and self._taken()

    def release(self) -> None:
        """Give it back."""
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()

    def __enter__(self) -> Self:
        if self.is_mine:  # waiting for the turn of others would wait for this thread
            self._lock.acquire()
        else:
            with self._turn:
                self._lock.acquire()
        self._taken()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _taken(self) -> bool:
        self._owner = threading.get_ident()
        self._depth += 1
        return True
