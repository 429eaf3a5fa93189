"""Requests and cancellations on their way into the engine.

Callers hand them in at any time, from any thread, and never wait for a step: a request is checked,
numbered and put into the line. The engine takes the line in between two steps, when requests get
their rank and wait for a row and pages.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from typing import NamedTuple, TypeVar

from granite_paged.arguments import number
from granite_paged.engine.beams import BeamRequest, beam_params
from granite_paged.engine.job import BeamJob, SampleJob, ScoringJob
from granite_paged.engine.request import OnToken, Output, Request, SamplingParams, Scoring
from granite_paged.engine.scheduler import Scheduler
from granite_paged.errors import EngineClosed, GranitePagedError, InvalidSampling

SAMPLE_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two samples of a request: 2**64 divided by the golden ratio, made odd."""

_Asked = TypeVar("_Asked", bound=Request | Scoring)


class Arrival(NamedTuple):
    """A request to open, or to end with `error`."""

    request: Request | Scoring
    error: GranitePagedError | None = None


class Intake:
    """Makes requests and keeps them in line. Its methods wait for no step.

    Args:
        scheduler: says what fits, and how many sequences wait.
        vocabulary: number of tokens of the model.
        stop_tokens: end answers where a request names no others.
    """

    def __init__(self, scheduler: Scheduler, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        self._scheduler = scheduler
        self._vocabulary = vocabulary
        self._stop_tokens = stop_tokens
        self._numbers = itertools.count()
        self._line: deque[Arrival] = deque()
        self._door = threading.RLock()  # held for a check and an append
        self._closed = False
        # samples that came in and that the engine took in: each has one writer at a time
        self._came = self._taken = 0

    def __len__(self) -> int:
        return len(self._line)

    @property
    def requests(self) -> list[Request | Scoring]:
        """Return the requests that are in line to be opened."""
        return [arrival.request for arrival in self._line.copy() if arrival.error is None]

    def number(self) -> int:
        """Return the number of the next request."""
        return next(self._numbers)

    # -- coming in ------------------------------------------------------------------------------

    def samples(
        self, prompt: tuple[int, ...], params: SamplingParams, on_token: OnToken | None
    ) -> Request:
        """Hand in the samples of a prompt.

        Raises:
            InvalidSampling: if they would not fit into an empty queue.
            RequestTooLarge, QueueFull, EngineClosed: as `Engine.submit` says.
        """
        self._check_samples(params.n)
        self._check_room(params.n)  # first: each sample takes memory
        longest = self._fitting(len(prompt) + params.max_new_tokens - 1)
        request = Request(self.number(), prompt, params, self._stops(params), on_token)
        request.jobs = [
            SampleJob(
                request=request,
                tokens=list(prompt),
                max_stored=longest,
                index=index,
                limit=params.max_new_tokens,
                seed=(params.seed + index * SAMPLE_STRIDE) % 2**63,
                greedy=params.greedy,
            )
            for index in range(params.n)
        ]
        request.jobs[0].followers = request.jobs[1:]
        request.outputs = _outputs(request, params.n)
        return self._handed_in(request)

    def scoring(
        self,
        context: tuple[int, ...],
        continuations: tuple[tuple[int, ...], ...],
        namespace: str,
    ) -> Scoring:
        """Hand in continuations to score. Raises RequestTooLarge, QueueFull, EngineClosed."""
        longest = self._fitting(len(context) - 1 + max(map(len, continuations), default=0))
        scoring = Scoring(self.number(), context, continuations, [None] * len(continuations))
        scoring.namespace = namespace
        scoring.jobs = [ScoringJob(request=scoring, tokens=list(context), max_stored=longest)]
        return self._handed_in(scoring)

    def search(
        self, prompt: tuple[int, ...], params: SamplingParams, width: int, length_penalty: float
    ) -> BeamRequest:
        """Hand in a beam search. Raises InvalidSampling, and as `scoring` does."""
        finite = "be a finite number"
        number("length_penalty", length_penalty, math.isfinite, finite, error=InvalidSampling)
        stops = self._stops(params)
        params = beam_params(params, width, len(stops), self._vocabulary)
        longest = self._fitting(len(prompt) + params.max_new_tokens - 1)
        request = BeamRequest(
            self.number(), prompt, params, stops, width=width, length_penalty=length_penalty
        )
        beam = BeamJob(request=request, tokens=list(prompt), max_stored=longest, limit=1)
        request.jobs, request.scores = [beam], {beam: 0.0}
        request.outputs = _outputs(request, width)
        return self._handed_in(request)

    def end(self, request: Request | Scoring, error: GranitePagedError) -> None:
        """Hand in that a request is to end."""
        self._line.append(Arrival(request, error))

    def close(self) -> None:
        """Refuse whatever comes from now on."""
        with self._door:
            self._closed = True

    # -- taken in -------------------------------------------------------------------------------

    def first(self) -> Arrival | None:
        """Return the first in line, or None. Only one thread may look and drop at a time."""
        return self._line[0] if self._line else None

    def drop_first(self) -> None:
        """Drop the first in line: the engine took it in."""
        arrival = self._line.popleft()
        if arrival.error is None:
            self._taken += len(arrival.request.jobs)

    # -- details --------------------------------------------------------------------------------

    def _handed_in(self, request: _Asked) -> _Asked:
        with self._door:
            self._check_room(len(request.jobs))
            if not request.finished:  # nothing to score is finished at once
                self._came += len(request.jobs)
                self._line.append(Arrival(request))
        return request

    def _check_samples(self, samples: int) -> None:
        most = self._scheduler.queue.limit
        if samples > most:
            raise InvalidSampling(
                f"n must be at most {most}, the length of the engine's queue, got {samples}"
            )

    def _check_room(self, jobs: int) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed: make another one")
        self._scheduler.queue.check_room(jobs + self._came - self._taken)

    def _fitting(self, tokens: int) -> int:
        self._scheduler.check_fits(tokens)
        return tokens

    def _stops(self, params: SamplingParams) -> frozenset[int]:
        stops = params.stop_tokens
        return self._stop_tokens if stops is None else frozenset(stops)


def _outputs(request: Request, count: int) -> list[Output]:
    return [Output(request.number, index, request.prompt) for index in range(count)]
