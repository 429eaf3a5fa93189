"""Counts the states of an engine that faults hide in: a run can be required to reach them."""

from __future__ import annotations

from collections import Counter

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.engine import Engine
from granite_paged.engine.job import Job, State
from granite_paged.engine.step import StepPlan


class DeepStates:
    """Counts of an engine's states, step by step, in `met`."""

    def __init__(self, engine: Engine, met: Counter[str]) -> None:
        self._engine = engine
        self._met = met
        self._scheduler = engine.inspect().scheduler
        self._before = engine.stats()
        schedule, preempting = self._scheduler.schedule, self._scheduler._admission
        place = preempting.place_by_preempting

        def noted_schedule() -> StepPlan:
            step = schedule()
            self._met["resumed"] += len(step.resumed)
            return step

        def noted_place(job: Job) -> bool:
            before = self._scheduler.counts.preempted
            placed = place(job)
            self._met["preempted by rank"] += self._scheduler.counts.preempted - before
            return placed

        self._scheduler.schedule = noted_schedule  # type: ignore[method-assign]
        preempting.place_by_preempting = noted_place  # type: ignore[method-assign]

    def note_step(self) -> None:
        """Count what the last step did."""
        before, after = self._before, self._engine.stats()
        self._before = after
        swapped = after.swapped - before.swapped
        self._met["preempted by swap"] += swapped
        self._met["preempted by recompute"] += after.preempted - before.preempted - swapped
        self._met["restarted"] += after.restarted - before.restarted
        is_tight = after.pages - after.pages_held + after.pages_cached <= 2
        for request in self._engine._core.open:
            states = {job.state for job in request.jobs}
            if isinstance(request, BeamRequest):
                self._met["beams under pressure"] += {State.WAITING, State.UNREAD} <= states
            elif len(request.jobs) > 1 and State.DECODE in states:
                self._met["forks under pressure"] += is_tight or State.WAITING in states

    def note_eviction(self) -> None:
        """Count an eviction of pages that running jobs use."""
        allocator, prefix, _ = self._engine.inspect()
        pages = (page for one in prefix.sequences for page in allocator.pages_of(one))
        self._met["evicted while in use"] += any(allocator.references(page) > 1 for page in pages)
