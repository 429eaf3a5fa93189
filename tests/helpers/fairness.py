"""Checks that rank decides: each request ends within a number of steps that follows from its rank.

`docs/guides/scheduling.md` states the rules and the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.engine import Engine
from granite_paged.engine.job import Job
from granite_paged.engine.request import Request, Scoring

Asked = Request | Scoring


@dataclass
class Wait:
    """Steps that an open request took, and the most that it may take, passed requests apart.

    Attributes:
        before: cost and number of turns of the requests that rank before it, and of its own.
    """

    steps: int
    before: dict[Asked, tuple[int, int]]


class FairnessWatch:
    """Follows every open request of an engine, step by step."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self._core = engine._core
        self._scheduler = engine.inspect().scheduler
        self._prefix = engine.inspect().prefix
        self._rows = rows
        self._unit = min(self._scheduler._limits.alignment, self._prefix.block)
        self._longest = 0  # cost of the longest request
        self._waits: dict[Asked, Wait] = {}
        self._first: Job | None = None
        self._running: list[Job] = []

    def restart(self) -> None:
        """Count again from here: a fault may have made requests start over."""
        self._waits.clear()
        self._first = None

    def before_step(self) -> None:
        """Note what is open."""
        asked = [one for one in self._core.open if one.jobs]  # a search that is over has none
        self._waits = {one: wait for one, wait in self._waits.items() if one in set(asked)}
        for one in asked:
            self._longest = max(self._longest, self._cost(one))
            self._waits.setdefault(one, Wait(0, {}))
        for one, wait in self._waits.items():
            for other in asked:
                if other not in wait.before and _first_rank(other) <= _last_rank(one):
                    wait.before[other] = (self._cost(other), _turns(other))
        first = self._scheduler.queue.first()
        is_computed = first and any(node.pending_states for node in first.path)
        self._first = None if is_computed else first  # it may wait for its prefix
        self._running = self._scheduler.running.jobs()

    def after_step(self) -> None:
        """Check what is still open."""
        self._check_first()
        passed = self._rows * self._longest
        for one in self._core.open:
            if (wait := self._waits.get(one)) is not None:
                wait.steps += 1
                most = sum(cost + turns * passed for cost, turns in wait.before.values())
                assert wait.steps <= most, (
                    f"request {one.number} is open for {wait.steps} steps, at most {most} are fair"
                )

    def _check_first(self) -> None:
        """A waiting job that ranks before all running ones, with higher priority, is let in."""
        job = self._first
        if job is None or job is not self._scheduler.queue.first():
            return
        is_free = all(
            job.rank < other.rank and job.rank.priority > other.rank.priority
            for other in self._running
        )
        assert not is_free or any(node.pending_states for node in job.path), (
            f"request {job.request.number} waits behind running ones of lower priority"
        )

    def _cost(self, asked: Asked) -> int:
        """Return the most steps that a request takes while it ranks first."""
        job = asked.jobs[0]
        chunks = -(-job.max_stored // self._unit) + 3
        if isinstance(asked, Scoring):
            return chunks + 3 * len(asked.continuations)
        if isinstance(asked, BeamRequest):
            return asked.params.max_new_tokens * asked.width * chunks
        return asked.params.n * (chunks + asked.params.max_new_tokens)


def _turns(asked: Asked) -> int:
    """Return how often a request may have to wait for running ones of its own priority."""
    if isinstance(asked, Scoring):
        return 1 + len(asked.continuations)
    if isinstance(asked, BeamRequest):
        return 1 + asked.params.max_new_tokens * asked.width
    return asked.params.n


def _first_rank(asked: Asked) -> tuple[int, int]:
    return min(job.rank for job in asked.jobs)


def _last_rank(asked: Asked) -> tuple[int, int]:
    return max(job.rank for job in asked.jobs)
