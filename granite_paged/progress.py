"""Progress of long work, reported by one kind of callback; only the command line draws bars."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (description, done, total) as work proceeds."""


def silent(description: str, done: int, total: int) -> None:
    """Report nothing."""
