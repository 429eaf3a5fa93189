"""A planned step, put on the device.

Nothing here waits: each call leaves a `Flight`, whose numbers the host reads after the next step
was launched. A call that raises concerns its own jobs only; the scheduler hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from granite_paged.engine.prefix import RowState
from granite_paged.engine.request import Job, Request, Scoring, State
from granite_paged.engine.runner import Chunk, Runner, Scores, scores_of
from granite_paged.engine.sampling import Draw, Drawn, draw, seen_tokens
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.step import Part, Span, Step
from granite_paged.transfer import Fetch, upload


@dataclass(slots=True)
class Flight:
    """Numbers on their way to the host, and whose they are.

    Attributes:
        drawn: (job, epoch) of each token.
        kept: spans whose pages, and states, others may use if they are sound.
        parts: continuations, in the order of their log-probabilities.
    """

    fetch: Fetch
    drawn: list[tuple[Job, int]] = field(default_factory=list)
    kept: list[tuple[Span, RowState | None]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        """Everyone concerned, as they were when it was launched."""
        owners = [*self.drawn, *((s.job, s.epoch) for s, _ in self.kept)]
        owners += [(part.job, part.epoch) for part in self.parts]
        return [job for job, epoch in dict.fromkeys(owners) if job.epoch == epoch]


class Launcher:
    """Makes the calls of a step."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._concerned: list[Job] = []  # by the call that is being made

    def launch(self, step: Step) -> list[Flight]:
        """Make every call of a step. Returns those that were made."""
        flights: list[Flight] = []
        for job in step.resumed:
            self._attempt(flights, [job], self.feed, job)
        for jobs in step.decodes:
            self._attempt(flights, jobs, self._decode, jobs)
        for parts in step.scores:
            self._attempt(flights, [part.job for part in parts], self._score, parts)
        for spans in step.prefills:
            live = [span for span in spans if span.epoch == span.job.epoch]
            live = [span for span in live if span.job.state is not State.DONE]
            if live:
                self._attempt(flights, [span.job for span in live], self._prefill, live)
        return flights

    def _attempt(
        self,
        flights: list[Flight],
        jobs: Iterable[Job],
        call: Callable[[Any], list[Flight]],
        argument: Any,
    ) -> None:
        self._concerned = list(jobs)
        try:
            made = call(argument)
        except Exception as error:
            self._scheduler.recover(self._concerned, error)
        else:
            flights += made

    # -- calls ----------------------------------------------------------------------------------

    def feed(self, job: Job) -> list[Flight]:
        """The job's last token is the one that its row is fed next. Nothing comes back."""
        last = self._upload(job.tokens[-1:])
        self._runner.tokens[job.row : job.row + 1] = last
        return []

    def _decode(self, jobs: Sequence[Job]) -> list[Flight]:
        positions = [job.stored - 1 for job in jobs]
        logits = self._runner.decode([job.row for job in jobs], positions)
        flight = self._drawn(logits, jobs, decoded=True)
        if len(jobs) == 1:
            jobs[0].suspect = False  # it ran alone, and well
        return [flight]

    def _prefill(self, spans: Sequence[Span]) -> list[Flight]:
        chunks = [Chunk(s.job.row, s.start, s.job.tokens[s.start : s.end]) for s in spans]
        logits = self._runner.prefill(chunks)
        kept = [(span, self._state_after(span)) for span in spans]
        unsound = self._runner.nonfinite[self._upload([span.job.row for span in spans])]
        flights = [Flight(Fetch(self._runner.device, unsound=unsound), kept=kept)]
        drawing, places = [], []
        for place, span in enumerate(spans):
            if span.last and not span.job.scoring:
                jobs = self._scheduler.prefilled(span)
                self._concerned += jobs
                drawing += jobs
                places += [place] * len(jobs)
        chosen = [
            (place, span) for place, span in enumerate(spans) if span.last and span.job.single
        ]
        if chosen:
            flights.append(self._choices(logits, chosen))
        if drawing:
            flights.append(self._drawn(logits[self._upload(places)], drawing))
        return flights

    def _choices(self, logits: torch.Tensor, chosen: Sequence[tuple[int, Span]]) -> Flight:
        """Log-probabilities of single tokens after a context, from the context's last logits."""
        parts, places, tokens = [], [], []
        for place, (job, epoch, *_) in chosen:
            for number in job.unscored():
                parts.append(Part(job, epoch, number, 0, 1, job.row, job.handle, False))
                places.append(place)
                tokens.append(job.continuation(number)[0])
        at, wanted = self._upload(places), self._upload(tokens)
        return self._answered(scores_of(logits, wanted, at), parts)

    def _score(self, parts: Sequence[Part]) -> list[Flight]:
        chunks, targets = [], []
        for part in parts:
            fed, wanted = _continuation(part)
            start = len(part.job.tokens) - 1 + part.start
            chunks.append(Chunk(part.row, start, fed))
            targets.append(wanted)
        return [self._answered(self._runner.score(chunks, targets), parts)]

    # -- details --------------------------------------------------------------------------------

    def _state_after(self, span: Span) -> RowState | None:
        if not self._scheduler.room_for_state(span, self._runner.row_bytes):
            return None
        state: RowState = self._runner.save_row(span.job.row)
        return state

    def _answered(self, scores: Scores, parts: Sequence[Part]) -> Flight:
        fetch = Fetch(
            self._runner.device,
            logprobs=scores.logprobs,
            greedy=scores.greedy,
            bad=self._runner.nonfinite[self._upload([part.row for part in parts])],
        )
        return Flight(fetch, parts=list(parts))

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return upload(numbers, torch.int64, self._runner.device)

    def _drawn(self, logits: torch.Tensor, jobs: Sequence[Job], *, decoded: bool = False) -> Flight:
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
        return Flight(fetch, drawn=[(job, job.epoch) for job in jobs])


def _draw_of(job: Job, logits: torch.Tensor) -> Draw:
    assert isinstance(job.request, Request)
    params = job.request.params
    if params.repetition_penalty != 1 and job.seen is None:
        job.seen = seen_tokens(job.tokens, logits)
    return Draw(params, job.seed, job.sampled - 1, job.seen)


def _continuation(part: Part) -> tuple[list[int], list[int]]:
    """Tokens to feed, and those whose log-probabilities are wanted after them."""
    assert isinstance(part.job.request, Scoring)
    continuation = part.job.continuation(part.number)
    fed = [part.job.tokens[-1], *continuation[:-1]]
    return fed[part.start : part.end], list(continuation[part.start : part.end])
