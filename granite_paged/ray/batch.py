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
from dataclasses import dataclass
from typing import Any

from granite_paged.batch.answer import Answer
from granite_paged.batch.lines import Line
from granite_paged.batch.output import BatchOutput
from granite_paged.batch.run import Report
from granite_paged.ray.cluster import check_resources, failures_named
from granite_paged.ray.groups import read_groups
from granite_paged.ray.workers import LineWorker, ModelSpec

CALLS = 8
"""Calls that a worker runs at once, so that its engine does not drain between two groups."""


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers, and what each of them gets.

    Attributes:
        count: number of workers.
        gpus, cpus: of each worker; a part of a GPU is possible.
        lines: lines of a group, which one call answers.
        options: passed to `LineWorker`.
    """

    count: int
    gpus: float
    cpus: float
    options: dict[str, Any]
    lines: int = 64


def answer_file(
    ray: Any,
    path: str,
    spec: ModelSpec,
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
    dataset = _pipeline(ray, path, spec, workers, output.tally.lines)
    waiting: dict[int, tuple[Line, Answer]] = {}
    batches = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))
    with failures_named(output), closing(batches):  # which stops the workers
        for batch in batches:
            for content, run in zip(batch["answers"], batch["run"], strict=True):
                output.check_run(str(run))
                _keep(pickle.loads(content), waiting)
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


def _pipeline(ray: Any, path: str, spec: ModelSpec, workers: Workers, held: int) -> Any:
    """Return the dataset of answers, lazily. Its blocks have one row each, in order."""
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}  # keeps the reader on this machine
    pool = ray.data.ActorPoolStrategy(
        size=workers.count,
        max_tasks_in_flight_per_actor=CALLS + 2,
        max_concurrent_calls_per_actor=CALLS,
        enable_true_multi_threading=True,
    )
    with ray.data.DataContext.current(_context(ray)):
        groups = ray.data.from_items([path]).map_batches(
            read_groups,
            fn_kwargs={"held": held, "lines": workers.lines},
            batch_size=1,
            num_cpus=0,
            resources=here,
        )
        return groups.map_batches(
            LineWorker,
            fn_constructor_args=(spec,),
            fn_constructor_kwargs=workers.options,
            compute=pool,
            batch_size=1,
            num_gpus=workers.gpus,
            num_cpus=workers.cpus,
        )


def _context(ray: Any) -> Any:
    """Return settings of datasets that keep their order and have one row per block."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: any row is more, so each has its own block
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context
