"""SIGTERM, as job schedulers and `kill` send it, ends a command as Ctrl-C does.

So whatever an interrupted command keeps is kept, and a step of the engine ends before.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Termination:
    """Whether SIGTERM has come."""

    came: bool = False


@contextmanager
def terminations_interrupt() -> Iterator[Termination]:
    """Let SIGTERM do in this block what SIGINT does, and yield whether it has come.

    Outside the main thread, and where the program has its own handler, SIGTERM is left alone.
    Processes that are forked in the block end at once, as by default.
    """
    termination, process = Termination(), os.getpid()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield termination
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            os._exit(128 + number)
        termination.came = True
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:  # SIGINT is ignored, as in the background jobs of a shell
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield termination
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:  # else a command set one of its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
