"""What an engine did and holds, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of an engine.

    Attributes:
        waiting, running: jobs; a request has one for each of its samples.
        rows, rows_held, pages, pages_held: there, and taken by jobs or the prefix cache.
        pages_cached, state_bytes: of those, what the prefix cache keeps.
        prefix_hits, prefix_misses: prompts that could start from something kept, and not.
        tokens_hit, prefix_hit_rate: prompt tokens that were not computed again, and their share.
        preempted, swapped: jobs that lost their pages, and those of them copied to the host.
        restarted: jobs that shared a call that raised.
        tokens, tokens_per_second: sampled, and per second spent in steps.
        schedule_ms: host time a step that the scheduler took.
        planned_bytes, device_bytes: memory by the plan, and what torch holds (CUDA only).
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

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, by name."""
        return asdict(self)
