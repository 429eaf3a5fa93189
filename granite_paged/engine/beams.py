"""Beam search: the beams of a request are jobs like others, which stop after each token.

::

    each beam decodes one token, beside everyone else, and reports its likeliest continuations
    when all have: the best of all are chosen; who has no child ends, who has several is forked

A beam that has reported gives up its row while another of its request waits for one, so that no
beam waits for what its own siblings hold. Scores, stops and the length penalty are those of
transformers' beam search with `early_stopping=False`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from granite_paged.engine.request import Job, Request, SamplingParams, State
from granite_paged.engine.scheduler import Scheduler
from granite_paged.errors import InvalidSampling


class Continuation(NamedTuple):
    """A beam and one more token, with the log-probability of all its tokens."""

    score: float
    parent: Job
    token: int


@dataclass(slots=True, eq=False)
class BeamRequest(Request):
    """A request whose outputs are the best `width` answers, the best first.

    Attributes:
        scores: log-probability of each beam's tokens so far.
        reports: (log-probability, token) of each beam's likeliest continuations.
        finished: (score with length penalty, tokens), the best first.
    """

    width: int = 1
    length_penalty: float = 1.0
    scores: dict[Job, float] = field(default_factory=dict)
    reports: dict[Job, list[tuple[float, int]]] = field(default_factory=dict)
    finished_beams: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every beam has reported."""
        return self.reports.keys() >= set(self.jobs)

    def choose(self) -> list[Continuation]:
        """What to go on with, the best first; nothing when no better answer can come."""
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
        self.finished_beams.append((one.score / length**self.length_penalty, answer))
        self.finished_beams.sort(key=lambda beam: -beam[0])
        del self.finished_beams[self.width :]

    def _settled(self, running: list[Continuation], length: int) -> bool:
        if not running:
            return True
        if len(self.finished_beams) < self.width:
            return False
        best = running[0].score / length**self.length_penalty
        return bool(best <= self.finished_beams[-1][0])


class BeamKeeper:
    """Carries out what beam requests choose.

    Args:
        feed: makes a job's last token the one its row is fed next.
    """

    def __init__(self, scheduler: Scheduler, feed: Callable[[Job], object]) -> None:
        self._scheduler = scheduler
        self._feed = feed

    def report(self, request: BeamRequest, job: Job, likeliest: list[tuple[float, int]]) -> bool:
        """A beam's numbers arrived. Whether the request has its answers now."""
        request.reports[job] = likeliest
        if request.complete:
            self._advance(request)
        return request.finished

    def make_way(self, request: BeamRequest) -> None:
        """Beams that have reported must not hold what another of them waits for."""
        if any(job.state is State.WAITING for job in request.jobs):
            for reported in request.reports:
                self._scheduler.rest(reported)

    def _advance(self, request: BeamRequest) -> None:
        chosen = request.choose()
        request.reports.clear()
        children: dict[Job, list[Continuation]] = {job: [] for job in request.jobs}
        for one in chosen:
            children[one.parent].append(one)
        for job in [job for job in request.jobs if not children[job]]:
            self._scheduler.finish(job)  # first: its row may be a sibling's
        if not chosen:
            self._deliver(request)
            return
        request.scores = {}
        for parent, born in children.items():
            tokens = list(parent.tokens)
            for one in born[1:]:  # forks first, while the parent is as it was
                sibling = _sibling(parent)
                request.jobs.append(sibling)  # at once: should a fork fail, all of them end
                self._go_on(request, parent, sibling, one, tokens)
            if born:
                self._go_on(request, parent, parent, born[0], tokens)
        request.jobs = list(request.scores)

    def _go_on(
        self, request: BeamRequest, parent: Job, job: Job, one: Continuation, tokens: list[int]
    ) -> None:
        """The job takes the parent's tokens and one more."""
        request.scores[job] = one.score
        if parent.state is State.DONE:
            return  # a fork failed, and the request with it
        forked = job is parent or self._scheduler.fork(parent, job)
        job.tokens = [*tokens, one.token]
        job.sampled = len(job.tokens) - job.prompt_length
        job.limit = job.sampled + 1
        if forked and job.row > 0:
            self._feed(job)
        elif job.state is not State.DONE:
            self._scheduler.requeue(job)

    def _deliver(self, request: BeamRequest) -> None:
        for output, (score, tokens) in zip(request.outputs, request.finished_beams, strict=True):
            output.tokens, output.score = tokens, score
            output.finish = "stop" if tokens[-1] in request.stop_tokens else "length"


def beam_params(params: SamplingParams, width: int, stops: int) -> SamplingParams:
    """What each beam of a search asks for: so many of the likeliest tokens.

    Raises:
        InvalidSampling: for no beams, or params that a search cannot fulfil.
    """
    if width < 1:
        raise InvalidSampling(f"beams must be at least 1, {width} given")
    honoured = ("max_new_tokens", "stop_tokens", "priority")
    kept = {name: getattr(params, name) for name in honoured}
    if SamplingParams(**kept) != params:
        raise InvalidSampling(f"beam search does not sample: it heeds {', '.join(honoured)} only")
    return SamplingParams(**kept, logprobs=(1 + stops) * width)


def _sibling(parent: Job) -> Job:
    """A job of the same request, that is nowhere yet."""
    return Job(
        parent.request, parent.index, parent.rank, [], parent.limit, parent.most,
        parent.prompt_length, greedy=False, exact=True,
    )  # fmt: skip
