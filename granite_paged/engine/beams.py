"""Beam search: the beams of a request are jobs that pause after each token.

::

    decode   each beam decodes one token, in a batch with other jobs, and reports its most likely
             continuations
    choose   when all beams have reported, the best continuations of all are chosen: a beam without
             one ends, a beam with several is forked

A beam that has reported gives up its row while a sibling waits for one, so that no beam waits for
what its own siblings hold. Scores, stops and the length penalty are those of transformers' beam
search with `early_stopping=False`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from granite_paged.arguments import integer
from granite_paged.engine.executor import Executor
from granite_paged.engine.job import BeamJob, State
from granite_paged.engine.request import Request, SamplingParams
from granite_paged.engine.scheduler import Scheduler
from granite_paged.errors import InvalidSampling


class Continuation(NamedTuple):
    """A beam and one more token, with the log-probability of all its new tokens."""

    score: float
    parent: BeamJob
    token: int


@dataclass(slots=True, eq=False)
class BeamRequest(Request):
    """A request whose outputs are the best `width` answers, the best first.

    Attributes:
        scores: log-probability of each beam's new tokens so far.
        reports: (log-probability, token) of each beam's most likely continuations.
        answers: (score with length penalty, tokens) of finished beams, the best first.
    """

    jobs: list[BeamJob] = field(default_factory=list)  # type: ignore[assignment]
    width: int = 1
    length_penalty: float = 1.0
    scores: dict[BeamJob, float] = field(default_factory=dict)
    reports: dict[BeamJob, list[tuple[float, int]]] = field(default_factory=dict)
    answers: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def all_reported(self) -> bool:
        """Whether every beam has reported."""
        return self.reports.keys() >= set(self.jobs)

    def choose(self) -> list[Continuation]:
        """Return how the search goes on, the best first; [] when no better answer can come."""
        ordered = sorted(self._candidates(), key=lambda one: -one.score)
        candidates = ordered[: (1 + len(self.stop_tokens)) * self.width]
        length = len(candidates[0].parent.tokens) + 1 - len(self.prompt)
        running = []
        for place, one in enumerate(candidates):
            if one.token in self.stop_tokens or length == self.params.max_new_tokens:
                if place < self.width:
                    self._finish(one, length)
            else:
                running.append(one)
        return [] if self._settled(running, length) else running[: self.width]

    def _candidates(self) -> list[Continuation]:
        return [
            Continuation(self.scores[job] + logprob, job, token)
            for job in self.jobs
            for logprob, token in self.reports[job]
        ]

    def _finish(self, one: Continuation, length: int) -> None:
        answer = [*one.parent.tokens[len(self.prompt) :], one.token]
        self.answers.append((one.score / length**self.length_penalty, answer))
        self.answers.sort(key=lambda beam: -beam[0])
        del self.answers[self.width :]

    def _settled(self, running: list[Continuation], length: int) -> bool:
        if not running:
            return True
        if len(self.answers) < self.width:
            return False
        best = running[0].score / length**self.length_penalty
        return bool(best <= self.answers[-1][0])


class BeamKeeper:
    """Carries out what beam requests choose."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor

    def report(self, job: BeamJob, top: list[tuple[float, int]]) -> bool:
        """Note a beam's (log-probability, token) pairs. Return whether its search is over."""
        request = job.request
        request.reports[job] = top
        return request.all_reported and not self._advance(request)

    def make_way(self, request: BeamRequest) -> None:
        """Free what reported beams hold, if another beam of the request waits for it."""
        if any(job.state is State.WAITING for job in request.jobs):
            for reported in request.reports:
                self._scheduler.running.pause(reported)

    def _advance(self, request: BeamRequest) -> bool:
        """Start the next token of every chosen beam. Return whether there is one."""
        chosen = request.choose()
        request.reports.clear()
        children: dict[BeamJob, list[Continuation]] = {job: [] for job in request.jobs}
        for one in chosen:
            children[one.parent].append(one)
        for job in [job for job in request.jobs if not children[job]]:
            self._scheduler.finish(job)  # first: a sibling may take its row
        request.scores = {}
        for parent, born in children.items():
            tokens = list(parent.tokens)
            for one in born[1:]:  # forks first, while the parent is as it was
                sibling = _sibling(parent)
                request.jobs.append(sibling)  # at once: if a fork fails, all of them end
                self._extend(parent, sibling, one, tokens)
            if born:
                self._extend(parent, parent, born[0], tokens)
        request.jobs = list(request.scores)
        return bool(chosen)

    def _extend(self, parent: BeamJob, job: BeamJob, one: Continuation, tokens: list[int]) -> None:
        """Give a job the parent's tokens and one more."""
        job.request.scores[job] = one.score
        if parent.state is State.DONE:
            return  # a fork failed, and the request with it
        forked = job is parent or self._scheduler.fork(parent, job)
        job.tokens = [*tokens, one.token]
        job.drawn = job.sampled
        job.limit = job.drawn + 1
        if forked and job.placement:
            self._executor.feed(job)
        elif job.state is not State.DONE:
            self._scheduler.requeue(job)


def beam_params(params: SamplingParams, width: int, stops: int, vocabulary: int) -> SamplingParams:
    """Return what each of `width` beams asks for, if there are `stops` stop tokens.

    Raises:
        InvalidSampling: if `width` is below 1 or above the vocabulary, or if `params` asks for
            what a search does not do.
    """
    integer("beams", width, 1, error=InvalidSampling)
    if width > vocabulary:
        raise InvalidSampling(f"beams must be at most {vocabulary}, one per token, got {width}")
    honoured = ("max_new_tokens", "stop_tokens", "priority", "namespace")
    kept = {name: getattr(params, name) for name in honoured}
    if SamplingParams(**kept) != params:
        raise InvalidSampling(f"beam search does not sample: only {', '.join(honoured)} may be set")
    return SamplingParams(**kept, logprobs=(1 + stops) * width)


def _sibling(parent: BeamJob) -> BeamJob:
    """Return a new beam of the same request."""
    return BeamJob(
        request=parent.request,
        rank=parent.rank,
        tokens=[],
        max_stored=parent.max_stored,
        limit=parent.limit,
    )
