"""A planned step, put on the device.

Nothing here waits: each call leaves a `PendingResult`, whose numbers the host reads after the next
step was launched. A call that raises concerns its own jobs only; the scheduler recovers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from granite_paged.device import Fetch, upload
from granite_paged.engine.prefix_cache import RowState
from granite_paged.engine.request import Job, Request, Scoring, State
from granite_paged.engine.sampling import Draw, Drawn, draw, seen_tokens
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.step import PrefillChunk, ScoreChunk, Step
from granite_paged.runner.runner import Chunk, Runner, Scores, scores_of


@dataclass(slots=True)
class PendingResult:
    """Numbers on their way to the host, and whose they are.

    Attributes:
        drawn: (job, generation) of each token.
        kept: chunks whose pages, and states, others may use if they are sound.
        parts: continuations, in the order of their log-probabilities.
    """

    fetch: Fetch
    drawn: list[tuple[Job, int]] = field(default_factory=list)
    kept: list[tuple[PrefillChunk, RowState | None]] = field(default_factory=list)
    parts: list[ScoreChunk] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        """Everyone concerned, as they were when it was launched."""
        owners = [*self.drawn, *((s.job, s.generation) for s, _ in self.kept)]
        owners += [(part.job, part.generation) for part in self.parts]
        return [job for job, generation in dict.fromkeys(owners) if job.generation == generation]


class Executor:
    """Makes the calls of a step."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._concerned: list[Job] = []  # by the call that is being made

    def launch(self, step: Step) -> list[PendingResult]:
        """Make every call of a step. Returns those that were made."""
        results: list[PendingResult] = []
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

    def _attempt(
        self,
        results: list[PendingResult],
        jobs: Iterable[Job],
        call: Callable[[Any], list[PendingResult]],
        argument: Any,
    ) -> None:
        self._concerned = list(jobs)
        try:
            made = call(argument)
        except Exception as error:
            self._scheduler.recover(self._concerned, error)
        else:
            results += made

    # -- calls ----------------------------------------------------------------------------------

    def feed(self, job: Job) -> list[PendingResult]:
        """The job's last token is the one that its row is fed next. Nothing comes back."""
        last = self._upload(job.tokens[-1:])
        self._runner.tokens[job.row : job.row + 1] = last
        return []

    def _decode(self, jobs: Sequence[Job]) -> list[PendingResult]:
        positions = [job.stored - 1 for job in jobs]
        logits = self._runner.decode([job.row for job in jobs], positions)
        result = self._drawn(logits, jobs, decoded=True)
        if len(jobs) == 1:
            jobs[0].isolated = False  # it ran alone, and well
        return [result]

    def _prefill(self, chunks: Sequence[PrefillChunk]) -> list[PendingResult]:
        wanted = [Chunk(c.job.row, c.start, c.job.tokens[c.start : c.end]) for c in chunks]
        logits = self._runner.prefill(wanted)
        kept = [(chunk, self._state_after(chunk)) for chunk in chunks]
        unsound = self._runner.nonfinite[self._upload([chunk.job.row for chunk in chunks])]
        results = [PendingResult(Fetch(self._runner.device, unsound=unsound), kept=kept)]
        drawing, places = [], []
        for place, chunk in enumerate(chunks):
            if chunk.last and not chunk.job.scoring:
                jobs = self._scheduler.prefilled(chunk)
                self._concerned += jobs
                drawing += jobs
                places += [place] * len(jobs)
        chosen = [
            (place, chunk) for place, chunk in enumerate(chunks) if chunk.last and chunk.job.single
        ]
        if chosen:
            results.append(self._choices(logits, chosen))
        if drawing:
            results.append(self._drawn(logits[self._upload(places)], drawing))
        return results

    def _choices(
        self, logits: torch.Tensor, chosen: Sequence[tuple[int, PrefillChunk]]
    ) -> PendingResult:
        """Log-probabilities of single tokens after a context, from the context's last logits."""
        parts, places, tokens = [], [], []
        for place, (job, generation, *_) in chosen:
            for number in job.unscored():
                parts.append(
                    ScoreChunk(job, generation, number, 0, 1, job.row, job.sequence, False)
                )
                places.append(place)
                tokens.append(job.continuation(number)[0])
        at, wanted = self._upload(places), self._upload(tokens)
        return self._answered(scores_of(logits, wanted, at), parts)

    def _score(self, parts: Sequence[ScoreChunk]) -> list[PendingResult]:
        chunks, targets = [], []
        for part in parts:
            fed, wanted = _continuation(part)
            start = len(part.job.tokens) - 1 + part.start
            chunks.append(Chunk(part.row, start, fed))
            targets.append(wanted)
        return [self._answered(self._runner.score(chunks, targets), parts)]

    # -- details --------------------------------------------------------------------------------

    def _state_after(self, chunk: PrefillChunk) -> RowState | None:
        if not self._scheduler.room_for_state(chunk, self._runner.row_bytes):
            return None
        state: RowState = self._runner.save_row(chunk.job.row)
        return state

    def _answered(self, scores: Scores, parts: Sequence[ScoreChunk]) -> PendingResult:
        fetch = Fetch(
            self._runner.device,
            logprobs=scores.logprobs,
            greedy=scores.greedy,
            bad=self._runner.nonfinite[self._upload([part.row for part in parts])],
        )
        return PendingResult(fetch, parts=list(parts))

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return upload(numbers, torch.int64, self._runner.device)

    def _drawn(
        self, logits: torch.Tensor, jobs: Sequence[Job], *, decoded: bool = False
    ) -> PendingResult:
        """Draw a token for each job, feed it to its row, and send it to the host.

        decoded: the logits are those of a decode step, which has fed the likeliest.
        """
        rows, fed = self._upload([job.row for job in jobs]), self._runner.tokens
        if decoded and all(job.greedy for job in jobs):
            drawn = Drawn(fed.index_select(0, rows))
        else:
            drawn = draw(logits, [_draw_of(job, logits) for job in jobs])
            fed.index_copy_(0, rows, drawn.tokens)
        fetch = Fetch(
            self._runner.device,
            tokens=drawn.tokens,
            logprobs=drawn.logprobs,
            top_logprobs=drawn.top_logprobs,
            top_tokens=drawn.top_tokens,
            bad=self._runner.nonfinite[rows],
        )
        return PendingResult(fetch, drawn=[(job, job.generation) for job in jobs])


def _draw_of(job: Job, logits: torch.Tensor) -> Draw:
    assert isinstance(job.request, Request)
    params = job.request.params
    if params.repetition_penalty != 1 and job.seen is None:
        job.seen = seen_tokens(job.tokens, logits)
    return Draw(params, job.seed, job.sampled - 1, job.seen)


def _continuation(part: ScoreChunk) -> tuple[list[int], list[int]]:
    """Tokens to feed, and those whose log-probabilities are wanted after them."""
    assert isinstance(part.job.request, Scoring)
    continuation = part.job.continuation(part.number)
    fed = [part.job.tokens[-1], *continuation[:-1]]
    return fed[part.start : part.end], list(continuation[part.start : part.end])
