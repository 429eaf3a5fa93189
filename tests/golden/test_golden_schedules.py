"""Four fixed schedules, written so that a diff shows which request ran when, and where.

A difference means that requests run in another order, in other chunks or in other rows.
"""

from __future__ import annotations

from typing import Any

from syrupy.assertion import SnapshotAssertion

from granite_paged.engine.request import SamplingParams
from granite_paged.engine.step import PrefillChunk, ScoreChunk, StepPlan
from tests.helpers.engine_harness import EngineHarness
from tests.helpers.simulated_runner import HashOracle


class ScheduleRecorder(EngineHarness):
    """An engine with a simulated runner that records every step.

    Pages have 4 tokens, and states are kept at multiples of 8.
    """

    def __init__(self, options: dict[str, Any] | None = None, **sizes: Any) -> None:
        super().__init__(HashOracle(), options, **sizes)
        self.lines = [f"{self.runner.rows} rows, {self.runner.pages - 1} pages of 4 tokens"]
        scheduler = self.engine.inspect().scheduler
        schedule = scheduler.schedule

        def noted() -> StepPlan:
            before = self.engine.stats()
            step = schedule()
            self._note(step, self.engine.stats().preempted - before.preempted)
            return step

        scheduler.schedule = noted  # type: ignore[method-assign]

    def ask(self, prompt: list[int], new: int, **params: Any) -> None:
        request = self.submit(prompt, SamplingParams(max_new_tokens=new, **params))
        assert request is not None
        samples = f", {request.params.n} samples" if request.params.n > 1 else ""
        self.lines.append(
            f"request {request.number}: {len(prompt)} tokens, {new} to sample{samples}"
        )

    def text(self) -> str:
        self.drain()
        stats = self.engine.stats()
        self.lines += [
            "",
            f"preempted {stats.preempted}, swapped {stats.swapped}, "
            f"prefix hits {stats.prefix_hits}, tokens shared {stats.prefix_hit_rate:.0%}",
        ]
        return "\n".join(self.lines) + "\n"

    def _note(self, step: StepPlan, preempted: int) -> None:
        if not step:
            return
        stats = self.engine.stats()
        self.lines += [
            "",
            f"step {stats.steps}: waiting {stats.waiting}, pages free "
            f"{stats.pages - stats.pages_held}" + f", preempted {preempted}" * (preempted > 0),
        ]
        for job in step.resumed:
            row, stored = job.placed.row, job.placed.stored
            self.lines.append(f"   back    {_name(job)} in row {row}, {stored} tokens")
        for jobs in step.decodes:
            fed = ", ".join(f"{_name(job)} at {job.stored - 1}" for job in jobs)
            self.lines.append(f"   decode  {fed}")
        for parts in step.scores:
            self.lines.append(f"   score   {', '.join(map(_part, parts))}")
        for spans in step.prefills:
            self.lines.append(f"   prefill {', '.join(map(_span, spans))}")


def _name(job: Any) -> str:
    several = len(job.request.jobs) > 1
    return f"{job.request.number}" + (f".{job.index}" if several else "")


def _span(span: PrefillChunk) -> str:
    state = ", its state kept" if span.end in span.job.checkpoints else ""
    return f"{_name(span.job)} in row {span.job.placed.row}: {span.start}..{span.end - 1}{state}"


def _part(part: ScoreChunk) -> str:
    where = f"row {part.row}" + (" forked" if part.forked else " itself")
    return f"{_name(part.job)} continuation {part.number} in {where}, {part.end - part.start}"


def test_a_long_prompt_joins_running_requests(golden_table: SnapshotAssertion) -> None:
    recorder = ScheduleRecorder(pages=40, rows=3, chunk_tokens=16)
    recorder.ask([1, 2, 3], 9, streamed=True)
    recorder.ask([4] * 5, 6, streamed=True)
    recorder.step()
    recorder.ask(list(range(60)), 3)
    recorder.ask([5], 2)
    assert golden_table == recorder.text()


def test_a_burst_shares_its_prefix(golden_table: SnapshotAssertion) -> None:
    recorder = ScheduleRecorder(pages=60, rows=4, chunk_tokens=32)
    beginning = list(range(20))
    for tail in ([70, 71], [72], [73] * 9):
        recorder.ask([*beginning, *tail], 2)
    recorder.ask([80], 3)
    recorder.step()
    recorder.step()
    recorder.ask([*beginning, 74], 2)
    assert golden_table == recorder.text()


def test_preemption_when_pages_run_out(golden_table: SnapshotAssertion) -> None:
    recorder = ScheduleRecorder({"preemption": "swap", "state_bytes": 0}, pages=10, rows=3)
    recorder.ask([1] * 9, 12)
    recorder.ask([2] * 6, 9, priority=1)
    recorder.ask([3] * 5, 8)
    assert golden_table == recorder.text()


def test_samples_and_scores_fork(golden_table: SnapshotAssertion) -> None:
    recorder = ScheduleRecorder(pages=40, rows=3)
    recorder.score([1] * 11, [[2], [3, 4], [5, 6, 7]])
    recorder.lines.append("scoring 0: a context of 11 tokens, continuations of 1, 2 and 3")
    recorder.ask([8] * 6, 3, n=4, temperature=1.0)
    assert golden_table == recorder.text()
