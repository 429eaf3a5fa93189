"""The memory of a batch does not grow with the length of its file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.batch.answer import PREFIX, Answer
from granite_paged.batch.lines import WINDOW, Line, read_lines
from granite_paged.batch.output import BatchOutput, Tally
from granite_paged.batch.run import answer_lines

SHORT, LONG = 4 * WINDOW, 16 * WINDOW
GROWTH = 16 << 20
"""Bytes that a long file may take more than a short one: sqlite's cache, and noise. What one line
holds while it is in memory is about a kilobyte, so that keeping every line takes 50 MB."""


class EchoAnswering:
    """Answers each line after two steps, with what `BatchOutput` takes for an answer."""

    run = "0" * 16

    def __init__(self) -> None:
        runner = SimpleNamespace(rows=256)
        self._submitted: list[SimpleNamespace] = []
        self._running: list[SimpleNamespace] = []
        self.engine: Any = SimpleNamespace(runner=runner, waiting=0, step=self._step)

    def _step(self) -> None:
        for pending in self._running:
            pending.finished = True
        self._running, self._submitted = self._submitted, []
        self.engine.waiting = 0

    def take(self, line: Line) -> Any:
        pending = SimpleNamespace(line=line, finished=False)
        self._submitted.append(pending)
        self.engine.waiting += 1
        return pending

    def answer(self, pending: Any) -> Answer:
        line = pending.line
        body = {"usage": {"completion_tokens": 1}, "choices": [{"text": "x" * 80}]}
        row = {
            "id": f"{PREFIX}{self.run}_{line.digest}",
            "custom_id": line.custom_id,
            "response": {"body": body},
            "error": None,
        }
        return Answer(json.dumps(row).encode() + b"\n", tokens=1)


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def requests(count: int) -> Iterator[str]:
    for number in range(count):
        body = {"prompt": f"{number} {'text ' * 20}", "max_tokens": 4}
        yield json.dumps({"custom_id": f"r{number}", "body": body}) + "\n"


def peak(folder: Path, count: int) -> int:
    """Answer a file of `count` lines, then read it and its output again. Return the most memory."""
    source, target = folder / f"{count}.jsonl", str(folder / f"{count}.out")
    with open(source, "w") as file:
        file.writelines(requests(count))
    most = 0

    def report(tally: Tally) -> None:
        nonlocal most
        most = max(most, resident())

    with open(source, "rb") as file, closing(BatchOutput(target)) as output:
        answering: Any = EchoAnswering()
        answer_lines(read_lines(file), answering, output, report)
        assert output.tally.lines == count
    with open(source, "rb") as file, closing(BatchOutput(target)) as output:
        output.match(read_lines(file))
        assert output.tally.lines == count
        report(output.tally)
    return most


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
def test_memory_is_that_of_a_file_a_fourth_as_long(tmp_path: Path) -> None:
    short = peak(tmp_path, SHORT)
    assert peak(tmp_path, LONG) - short < GROWTH
