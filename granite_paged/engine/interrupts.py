"""Ctrl-C takes effect between two steps of an engine, where its bookkeeping is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C at the end of the block, and of a second one at once.

    Does nothing outside the main thread, which alone is interrupted, and where the program has its
    own handler of SIGINT, as `asyncio.run` has.
    """
    default = signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            default(number, frame)
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is note:  # else a callback set one of its own
            signal.signal(signal.SIGINT, default)
        if came:
            raise KeyboardInterrupt
