"""Groups of lines on their way to a worker, and the task that reads them. Without torch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from granite_paged.batch.lines import WINDOW, Line, parsed, prefix_key, read_lines

Columns = dict[str, Any]
"""A batch of rows: arrays of numpy, by the names of their columns."""


def packed(group: Sequence[tuple[int, Line]]) -> bytes:
    """Return numbered lines as bytes, without their JSON objects, which a worker parses again."""
    return pickle.dumps([(i, line.number, line.text, line.problem, line.end) for i, line in group])


def unpacked(content: bytes) -> list[tuple[int, Line]]:
    """Return the numbered lines of `packed`."""
    lines = []
    for index, number, text, problem, end in pickle.loads(content):
        line = parsed(number, text, end)
        lines.append((index, replace(line, problem=problem)))
    return lines


def read_groups(batch: Columns, held: int, lines: int) -> Iterator[Columns]:
    """Yield groups of a file, without its first `held` lines. Blocks are ordered by prefix."""
    (path,) = batch["item"]
    with open(str(path), "rb") as file:
        numbered = islice(enumerate(read_lines(file)), held, None)
        while block := list(islice(numbered, WINDOW)):
            block.sort(key=lambda pair: prefix_key(pair[1]))
            for start in range(0, len(block), lines):
                content = np.empty(1, dtype=object)
                content[0] = packed(block[start : start + lines])
                yield {"lines": content}
