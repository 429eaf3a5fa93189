"""The pipeline of Ray Data that every command uses: rows in, answered rows out, in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from granite_paged.ray.groups import Columns


@dataclass(frozen=True, slots=True)
class Workers:
    """How many workers, and what each of them gets.

    Attributes:
        count: number of workers.
        gpus, cpus: of each worker; a part of a GPU is possible.
    """

    count: int
    gpus: float
    cpus: float


def answered_rows(
    ray: Any,
    items: Sequence[Any],
    worker: type,
    arguments: tuple[Any, ...],
    workers: Workers,
    *,
    read: Callable[[Columns], Iterator[Columns]] | None = None,
    calls: int = 1,
) -> Generator[dict[str, Any], None, None]:
    """Yield what workers answer, in the order of the items. Closing it stops the workers.

    Args:
        ray: the module, connected.
        items: one row each.
        worker: a callable class; a call gets one row.
        arguments: of its constructor.
        workers: how many.
        read: runs first, in one task on this machine, and turns an item into rows.
        calls: most calls that a worker runs at once.
    """
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    pool = ray.data.ActorPoolStrategy(
        size=workers.count,
        max_tasks_in_flight_per_actor=calls + 2,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=True,
    )
    with ray.data.DataContext.current(_context(ray)):
        dataset = ray.data.from_items(list(items))
        if read is not None:
            dataset = dataset.map_batches(read, batch_size=1, num_cpus=0, resources=here)
        dataset = dataset.map_batches(
            worker,
            fn_constructor_args=arguments,
            compute=pool,
            batch_size=1,
            num_gpus=workers.gpus,
            num_cpus=workers.cpus,
        )
    with closing(iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))) as batches:
        for batch in batches:
            for row in zip(*batch.values(), strict=True):
                yield dict(zip(batch, row, strict=True))


def _context(ray: Any) -> Any:
    """Return settings of datasets that keep their order and have one row per block."""
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: any row is more, so each has its own block
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context
