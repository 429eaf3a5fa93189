"""`granite-paged batch` on Ray: a file is read, answered and written by one pipeline.

::

    read       one task on this machine: lines, blocks ordered by prefix, cut into groups
    answer     one actor per worker; `CALLS` groups at once, so that its engine stays full
    write      this process: answers in the order of the input

Ray bounds what is in flight, and runs a group again whose worker was lost: an answer depends on
its line alone, so nothing is lost, and nothing is written twice.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

from granite_paged.batch.answer import Answer
from granite_paged.batch.lines import Line
from granite_paged.batch.output import BatchOutput
from granite_paged.batch.run import Report
from granite_paged.ray.cluster import check_resources, failures_named
from granite_paged.ray.groups import read_groups
from granite_paged.ray.pipeline import Workers, answered_rows
from granite_paged.ray.workers import LineWorker, ModelSpec, WorkerOptions

CALLS = 8
"""Calls that a worker runs at once, so that its engine does not drain between two groups."""

LINES = 64
"""Lines of a group, which one call answers."""


def answer_file(
    ray: Any,
    path: str,
    spec: ModelSpec,
    options: WorkerOptions,
    workers: Workers,
    output: BatchOutput,
    report: Report,
) -> None:
    """Answer the lines of a file that the output lacks, and write them in their order.

    Args:
        ray: the module, connected.
        path: the input, which this machine can read.

    Raises:
        ClusterError: if the cluster is too small, or a worker fails; earlier answers are kept.
        CannotWrite: if the output cannot be written; earlier answers are kept.
        DataError: if the output has answers of another model.
    """
    check_resources(ray, workers.count, workers.gpus, workers.cpus)
    read = partial(read_groups, held=output.tally.lines, lines=LINES)
    waiting: dict[int, tuple[Line, Answer]] = {}
    rows = answered_rows(ray, [path], LineWorker, (spec, options), workers, read=read, calls=CALLS)
    with failures_named(output), closing(rows):
        for row in rows:
            output.check_run(str(row["run"]))
            _keep(pickle.loads(row["answers"]), waiting)
            output.write(list(_next_answers(waiting, output.tally.lines)))
            report(output.tally)


def _keep(answers: list[tuple[int, int, Answer]], waiting: dict[int, tuple[Line, Answer]]) -> None:
    for index, end, answer in answers:
        waiting[index] = (Line(0, b"", {}, end=end), answer)


def _next_answers(
    waiting: dict[int, tuple[Line, Answer]], index: int
) -> Iterator[tuple[Line, Answer]]:
    """Take the answers that follow the first `index` ones."""
    while index in waiting:
        yield waiting.pop(index)
        index += 1
