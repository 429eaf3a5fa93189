"""Counts, sizes and times of an engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment.

    Attributes:
        steps: number of steps; those that found no work count as well.
        waiting, running: number of jobs; a request has one per sample.
        rows, rows_held: number of state rows, and of those taken.
        pages, pages_held: number of pages, and of those held by jobs or the prefix cache.
        pages_cached, state_bytes: what the prefix cache keeps.
        prefix_hits, prefix_misses: number of prompts that did, or did not, start from a prefix.
        tokens_hit, prefix_hit_rate: prompt tokens that were not computed again, and their share.
        preempted, swapped: number of jobs that lost their pages, and that were copied to the host.
        swapped_bytes: host memory of those copies.
        restarted: number of restarts after faults.
        tokens, tokens_per_second: sampled tokens, and their rate over the time spent in steps.
        schedule_ms: mean host time per step for scheduling.
        planned_bytes: device memory by plan.
        device_bytes: device memory that torch holds; None without a GPU.
        late_captures: number of steps that were compiled and captured while requests waited; 0
            after a full warm-up.
    """

    steps: int
    waiting: int
    running: int
    rows: int
    rows_held: int
    pages: int
    pages_held: int
    pages_cached: int
    state_bytes: int
    prefix_hits: int
    prefix_misses: int
    tokens_hit: int
    prefix_hit_rate: float
    preempted: int
    swapped: int
    swapped_bytes: int
    restarted: int
    tokens: int
    tokens_per_second: float
    schedule_ms: float
    planned_bytes: int
    device_bytes: int | None
    late_captures: int

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return asdict(self)
