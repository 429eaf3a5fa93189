"""Puts a planned step on the device.

Nothing here waits: each call leaves a `PendingResult`, whose numbers the host reads after the next
step was launched. A call that raises concerns its own jobs only; the scheduler recovers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from granite_paged.device import Fetch, finite_rows, upload
from granite_paged.engine.job import Job, SampleJob, ScoringJob, State
from granite_paged.engine.sampling import Draw, draw, seen_tokens
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.step import PrefillChunk, ScoreChunk, StepPlan, calls
from granite_paged.runner.runner import Chunk, Runner, Scores, scores_of
from granite_paged.runner.storage import RowSnapshot


@dataclass(slots=True)
class PendingResult:
    """Numbers on their way to the host, and the jobs that they are for.

    Attributes:
        drawn: (job, its generation, index of its numbers) of each token.
        prefilled: chunks whose pages, and states, other prompts may use if they are finite.
        scored: chunks of continuations, in the order of their log-probabilities.
    """

    fetch: Fetch
    drawn: list[tuple[SampleJob, int, int]] = field(default_factory=list)
    prefilled: list[tuple[PrefillChunk, RowSnapshot | None]] = field(default_factory=list)
    scored: list[ScoreChunk] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        """Return the jobs concerned that did not restart since."""
        owners: list[tuple[Job, int]] = [(job, generation) for job, generation, _ in self.drawn]
        owners += [(chunk.job, chunk.generation) for chunk, _ in self.prefilled]
        owners += [(chunk.job, chunk.generation) for chunk in self.scored]
        return [job for job, generation in dict.fromkeys(owners) if job.generation == generation]


class Executor:
    """Makes the calls of a step."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._concerned: list[Job] = []  # by the call that is being made

    def launch(self, step: StepPlan) -> list[PendingResult]:
        """Make every call of a step. Return the results of those that did not raise."""
        results: list[PendingResult] = []
        loading = [job for job in dict.fromkeys(step.loading) if job.placement]
        for group in calls(loading, loading):
            self._attempt(results, group, self._load, group)
        for job in step.resumed:
            self._attempt(results, [job], self.feed, job)
        for jobs in step.decodes:
            self._attempt(results, jobs, self._decode, jobs)
        for parts in step.scores:
            self._attempt(results, [part.job for part in parts], self._score, parts)
        for chunks in step.prefills:
            live = [chunk for chunk in chunks if chunk.generation == chunk.job.generation]
            live = [chunk for chunk in live if chunk.job.state is not State.DONE]
            if live:
                self._attempt(results, [chunk.job for chunk in live], self._prefill, live)
        return results

    def feed(self, job: Job) -> list[PendingResult]:
        """Feed a job's last token to its row in the next decode step."""
        row = job.placed.row
        self._runner.tokens[row : row + 1] = self._upload(job.tokens[-1:])
        return []

    def _attempt(
        self,
        results: list[PendingResult],
        jobs: Iterable[Job],
        call: Callable[[Any], list[PendingResult]],
        argument: Any,
    ) -> None:
        self._concerned = list(jobs)
        try:
            results += call(argument)
        except Exception as error:
            self._scheduler.recover(self._concerned, error)
        finally:
            self._concerned = []  # an idle engine keeps no request alive

    # -- calls ----------------------------------------------------------------------------------

    def _load(self, jobs: Sequence[Job]) -> list[PendingResult]:
        """Load the states that jobs start from, so that a fault concerns no other call."""
        self._runner.load_states([job.placed.row for job in jobs])
        return []

    def _decode(self, jobs: Sequence[SampleJob]) -> list[PendingResult]:
        places = [job.placed for job in jobs]
        rows, positions = [p.row for p in places], [p.stored - 1 for p in places]
        logits = self._runner.decode(rows, positions)
        greedy = all(job.greedy for job in jobs)
        result = self._decoded(jobs) if greedy else self._drawn(logits, jobs)
        if len(jobs) == 1:
            jobs[0].isolated = False  # it ran alone without a fault
        return [result]

    def _prefill(self, chunks: Sequence[PrefillChunk]) -> list[PendingResult]:
        rows = [chunk.job.placed.row for chunk in chunks]
        logits = self._runner.prefill(
            [
                Chunk(row, chunk.start, chunk.job.tokens[chunk.start : chunk.end])
                for row, chunk in zip(rows, chunks, strict=True)
            ]
        )
        kept = [(chunk, self._state_after(chunk)) for chunk in chunks]
        unsound = self._runner.nonfinite[self._upload(rows)] != 0
        for place, (_, state) in enumerate(kept):
            if state is not None:
                unsound[place : place + 1] |= ~state.all_finite()
        results = [PendingResult(Fetch(self._runner.device, unsound=unsound), prefilled=kept)]
        drawing: list[SampleJob] = []
        places: list[int] = []
        single: list[tuple[int, ScoringJob]] = []
        for place, chunk in enumerate(chunks):
            job = chunk.job
            if chunk.last and isinstance(job, SampleJob):
                drawing.append(job)
                places.append(place)
                for forked in self._scheduler.prefilled(chunk):
                    self._concerned.append(forked)  # now: what comes next may raise
                    drawing.append(forked)
                    places.append(place)
            elif chunk.last and isinstance(job, ScoringJob) and job.single:
                single.append((place, job))
        if single:
            results.append(self._score_single(logits, single))
        if drawing:
            results.append(self._drawn(logits[self._upload(places)], drawing))
        return results

    def _score_single(
        self, logits: torch.Tensor, contexts: Sequence[tuple[int, ScoringJob]]
    ) -> PendingResult:
        """Score continuations of one token by their context's last logits.

        Args:
            logits: [n, V].
            contexts: row of the logits, and job.
        """
        chunks, places, tokens = [], [], []
        for place, job in contexts:
            row, sequence = job.placed.row, job.placed.sequence
            for number in job.unscored():
                chunks.append(
                    ScoreChunk(job, job.generation, number, 0, 1, row, sequence, forked=False)
                )
                places.append(place)
                tokens.append(job.continuation(number)[0])
        targets, rows = self._upload(tokens), self._upload(places)
        scores = scores_of(logits, targets, rows, exact=self._runner.config.exact)
        return self._scored(scores, chunks)

    def _score(self, parts: Sequence[ScoreChunk]) -> list[PendingResult]:
        chunks, targets = [], []
        for part in parts:
            continuation = part.job.continuation(part.number)
            fed = [part.job.tokens[-1], *continuation[:-1]]
            start = len(part.job.tokens) - 1 + part.start
            chunks.append(Chunk(part.row, start, fed[part.start : part.end]))
            targets.append(list(continuation[part.start : part.end]))
        return [self._scored(self._runner.score(chunks, targets), parts)]

    # -- details --------------------------------------------------------------------------------

    def _state_after(self, chunk: PrefillChunk) -> RowSnapshot | None:
        if not self._scheduler.room_for_state(chunk, self._runner.row_bytes):
            return None
        try:
            return self._runner.save_row(chunk.job.placed.row)
        except torch.OutOfMemoryError:
            return None  # the prompt goes on; others compute what they could have shared

    def _scored(self, scores: Scores, chunks: Sequence[ScoreChunk]) -> PendingResult:
        fetch = Fetch(
            self._runner.device,
            logprobs=scores.logprobs,
            greedy=scores.greedy,
            bad=self._runner.nonfinite[self._upload([chunk.row for chunk in chunks])],
        )
        return PendingResult(fetch, scored=list(chunks))

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return upload(numbers, torch.int64, self._runner.device)

    def _decoded(self, jobs: Sequence[SampleJob]) -> PendingResult:
        """Send the tokens that a decode step has fed to the host: those of all rows, in two copies.

        Picking rows would put kernels between this step and the next.
        """
        fetch = Fetch(self._runner.device, tokens=self._runner.tokens, bad=self._runner.nonfinite)
        return PendingResult(fetch, drawn=[(job, job.generation, job.placed.row) for job in jobs])

    def _drawn(self, logits: torch.Tensor, jobs: Sequence[SampleJob]) -> PendingResult:
        """Draw a token for each job, feed it to its row, and send it to the host.

        Args:
            logits: [jobs, V].
        """
        rows, exact = self._upload([job.placed.row for job in jobs]), self._runner.config.exact
        drawn = draw(logits, [_draw_of(job, logits) for job in jobs], exact=exact)
        self._runner.tokens.index_copy_(0, rows, drawn.tokens)
        fetch = Fetch(
            self._runner.device,
            tokens=drawn.tokens,
            logprobs=drawn.logprobs,
            top_logprobs=drawn.top_logprobs,
            top_tokens=drawn.top_tokens,
            bad=(self._runner.nonfinite[rows] != 0) | ~finite_rows(logits),
        )
        numbered = enumerate(jobs)
        return PendingResult(fetch, drawn=[(job, job.generation, at) for at, job in numbered])


def _draw_of(job: SampleJob, logits: torch.Tensor) -> Draw:
    params = job.request.params
    if params.repetition_penalty != 1 and job.seen is None:
        job.seen = seen_tokens(job.tokens, logits)
    return Draw(params, job.seed, job.drawn - 1, job.seen)
