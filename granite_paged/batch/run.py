"""One batch on one engine: lines are read, answered and written in a sliding window.

::

    input ──> block          read ahead, and ordered by prefix
          ──> engine         as many requests as run, and as many again that wait
          ──> window         lines that are taken and not yet written, in the order of the input
          ──> output         the finished lines at the window's beginning

At most `window` lines are in memory, whatever the length of the file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from granite_paged.batch.answering import Answering, Pending
from granite_paged.batch.lines import WINDOW, Line, prefix_key
from granite_paged.batch.output import BatchOutput, Tally

WINDOW_BYTES = 64 << 20
"""Most bytes of the window's lines, apart from the last line's."""

_READ_PER_STEP, _WRITE_PER_STEP = 16, 64  # lines; keeps the device from waiting for the host

Report = Callable[[Tally], None]
"""Called with what the output holds, after each step."""


def answer_lines(
    lines: Iterator[Line],
    answering: Answering,
    output: BatchOutput,
    report: Report,
    *,
    window: int = WINDOW,
) -> None:
    """Answer lines and write them to the output, in their order.

    Raises:
        CannotWrite: if the output cannot be written; earlier answers are kept.
        BrokenInvariant: if the engine has a fault.
    """
    Window(lines, answering, window).write_to(output, report)


@dataclass(slots=True)
class _Slot:
    """A line's place in the output."""

    line: Line
    pending: Pending | None = None  # None: not submitted yet


class Window:
    """The lines that were read and are not written yet."""

    def __init__(self, lines: Iterator[Line], answering: Answering, limit: int) -> None:
        self._lines = lines
        self._answering = answering
        self._engine = answering.engine
        self._limit = limit
        self._block_size = max(1, limit // 2)
        self._ahead = 2 * self._engine.runner.rows  # sequences that wait in the engine
        self._slots: deque[_Slot] = deque()
        self._block: list[_Slot] = []  # read, and not ordered yet
        self._ready: deque[_Slot] = deque()  # ordered by prefix, and not submitted yet
        self._bytes = 0

    def write_to(self, output: BatchOutput, report: Report) -> None:
        """Answer every line, and write as many per step as are finished."""
        while True:
            self._read(_READ_PER_STEP)
            self._submit()
            if not self._slots:
                return
            self._engine.step()
            finished = self._finished(_WRITE_PER_STEP)
            output.write([(slot.line, self._answering.answer(p)) for slot, p in finished])
            report(output.tally)

    def _read(self, most: int) -> None:
        """Read up to `most` lines into the block, while there is room."""
        for _ in range(min(most, self._block_size - len(self._block))):
            is_full = len(self._slots) >= self._limit or self._bytes >= WINDOW_BYTES
            if is_full or (line := next(self._lines, None)) is None:
                return
            slot = _Slot(line)
            self._slots.append(slot)
            self._block.append(slot)
            self._bytes += len(line.text)

    def _submit(self) -> None:
        """Submit ordered lines while few enough wait in the engine."""
        while self._engine.waiting < self._ahead:
            if not self._ready and not self._order():
                return
            pending = self._answering.take(self._ready[0].line)
            if pending is None:
                return
            self._ready.popleft().pending = pending

    def _order(self) -> bool:
        """Fill the block, and order it by prefix. Return whether there are lines."""
        self._read(self._block_size)
        self._ready.extend(sorted(self._block, key=lambda slot: prefix_key(slot.line)))
        self._block = []
        return bool(self._ready)

    def _finished(self, most: int) -> list[tuple[_Slot, Pending]]:
        """Take the finished lines at the beginning, at most `most`."""
        taken: list[tuple[_Slot, Pending]] = []
        while self._slots and len(taken) < most:
            slot = self._slots[0]
            if slot.pending is None or not slot.pending.finished:
                break
            taken.append((slot, slot.pending))
            self._slots.popleft()
            self._bytes -= len(slot.line.text)
        return taken
