"""Turns what came back from the device into outputs.

::

    read      numbers become tokens and scores of jobs; jobs whose last token came are finished
    deliver   user code runs: text by the tokenizer, stop strings, callbacks; outputs are filled

Between the two, the state of the step is complete. A number that arrives for a job that restarted
or ended since is dropped: it is one step late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from granite_paged.engine.beams import BeamKeeper, BeamRequest
from granite_paged.engine.detokenizer import Detokenizer
from granite_paged.engine.executor import PendingResult
from granite_paged.engine.job import BeamJob, Job, SampleJob, ScoringJob, State
from granite_paged.engine.request import Finish, Output, Request, Score, Scoring, TokenLogprob
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.step import ScoreChunk
from granite_paged.errors import CallbackFailed, NonFiniteRequest


class Arrival(NamedTuple):
    """A token that was read and is to be delivered."""

    job: SampleJob
    token: int
    logprob: TokenLogprob | None
    finish: Finish | None  # why the token is the last one


class OutputProcessor:
    """Fills the outputs of requests.

    Attributes:
        tokens: number of tokens sampled since it was made.
        ended: requests of which a job ended; the reader empties the list.
    """

    def __init__(self, tokenizer: Any | None, scheduler: Scheduler, beams: BeamKeeper) -> None:
        self.tokens = 0
        self.ended: list[Request | Scoring] = []
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._beams = beams
        self._arrivals: deque[Arrival | BeamRequest] = deque()
        self._texts: dict[SampleJob, Detokenizer] = {}

    # -- read -----------------------------------------------------------------------------------

    def read(self, result: PendingResult) -> None:
        """Wait for a result and take its numbers in; a fault concerns its jobs only."""
        try:
            numbers = result.fetch.read()
        except Exception as error:
            self._scheduler.recover(result.jobs, error)
            return
        self._read_chunks(result, numbers)
        for at, (job, generation) in enumerate(result.drawn):
            if job.generation == generation and job.state is not State.DONE:
                if numbers["bad"][at]:
                    self._fail_nonfinite(job)
                elif isinstance(job, BeamJob):
                    self._read_beam(job, numbers, at)
                else:
                    self._read_token(job, numbers, at)
        if result.scored:
            self._read_scores(result.scored, numbers)

    def _read_chunks(self, result: PendingResult, numbers: dict[str, list[Any]]) -> None:
        unsound = numbers.get("unsound", ())
        for (chunk, state), is_unsound in zip(result.prefilled, unsound, strict=True):
            if not is_unsound:
                self._scheduler.keep(chunk, state)
            elif chunk.job.generation == chunk.generation:
                self._fail_nonfinite(chunk.job)

    def _read_token(self, job: SampleJob, numbers: dict[str, list[Any]], at: int) -> None:
        token, most = numbers["tokens"][at], job.request.params.logprobs
        logprob = None if most is None else _logprob(token, most, numbers, at)
        self.tokens += 1
        job.tokens.append(token)
        self._arrivals.append(Arrival(job, token, logprob, job.finish))
        if job.complete:
            self._scheduler.finish(job)

    def _read_beam(self, job: BeamJob, numbers: dict[str, list[Any]], at: int) -> None:
        self.tokens += 1
        top = list(zip(numbers["top_logprobs"][at], numbers["top_tokens"][at], strict=True))
        if self._beams.report(job, top):
            self._arrivals.append(job.request)

    def _read_scores(self, chunks: Sequence[ScoreChunk], numbers: dict[str, list[Any]]) -> None:
        start = 0
        for at, chunk in enumerate(chunks):
            end = start + chunk.end - chunk.start
            logprobs, greedy = numbers["logprobs"][start:end], numbers["greedy"][start:end]
            start = end
            job = chunk.job
            if job.generation == chunk.generation and job.state is not State.DONE:
                if numbers["bad"][at]:
                    self._fail_nonfinite(job)
                else:
                    self._read_score(job, chunk, list(zip(logprobs, greedy, strict=True)))

    def _read_score(
        self, job: ScoringJob, chunk: ScoreChunk, pairs: list[tuple[float, bool]]
    ) -> None:
        known = [*job.partial.pop(chunk.number, []), *pairs]
        if chunk.end < len(job.continuation(chunk.number)):
            job.partial[chunk.number] = known
            return
        logprobs = tuple(logprob for logprob, _ in known)
        is_greedy = all(greedy for _, greedy in known)
        job.request.scores[chunk.number] = Score(sum(logprobs), logprobs, is_greedy)
        if job.complete:
            self._scheduler.finish(job)
            self.ended.append(job.request)

    def _fail_nonfinite(self, job: Job) -> None:
        self._scheduler.fail(job, NonFiniteRequest(job.request.number))

    # -- deliver --------------------------------------------------------------------------------

    def deliver(self) -> bool:
        """Deliver what was read, and every failure. Return whether there was anything.

        An interrupt, such as KeyboardInterrupt, passes through. The next call delivers the rest.
        """
        busy = bool(self._arrivals or self._scheduler.failures)
        while self._arrivals:
            arrival = self._arrivals.popleft()
            if isinstance(arrival, BeamRequest):
                if not arrival.finished:
                    self._deliver_search(arrival)
            elif _output(arrival.job).finish is None:
                self._deliver_token(*arrival)
        failures = self._scheduler.failures
        while failures:
            job, error = failures.pop(0)
            self.end(job, "error", error)
        return busy

    def end(self, job: Job, finish: Finish, error: Exception | None = None) -> None:
        """End a job, and say why in the outputs that depend on it."""
        self._scheduler.finish(job)
        request = job.request
        self.ended.append(request)
        if isinstance(request, Scoring):
            request.error = request.error or error
        elif isinstance(request, BeamRequest):
            for beam in request.jobs:
                self._scheduler.finish(beam)
            for output in request.outputs:
                _finish(output, finish, error)
        elif isinstance(job, SampleJob):
            self._texts.pop(job, None)
            _finish(_output(job), finish, error)

    def _deliver_token(
        self, job: SampleJob, token: int, logprob: TokenLogprob | None, finish: Finish | None
    ) -> None:
        output = _output(job)
        output.tokens.append(token)
        if logprob:
            output.logprobs.append(logprob)
        try:
            piece = self._text(job, output, token, last=finish is not None)
            if finish is None and job in self._texts and self._texts[job].stopped:
                finish = "stop"
            self._call_back(job, output, token, piece)
        finally:  # interrupted too, for the job is done
            if finish:
                self.end(job, finish)

    def _text(self, job: SampleJob, output: Output, token: int, *, last: bool) -> str:
        """Return what the token adds to the text. Without a reader, the last token decodes all."""
        request = job.request
        if self._tokenizer is None:
            return ""
        if request.on_token is None and not request.params.stop_strings:
            if last:
                output.text = self._whole_text(output)
            return ""
        if job not in self._texts:
            self._texts[job] = Detokenizer(self._tokenizer, request.params.stop_strings)
        text = self._texts[job]
        piece = text.push(token) + (text.finish() if last else "")
        output.text = text.text
        return piece

    def _call_back(self, job: SampleJob, output: Output, token: int, piece: str) -> None:
        if job.request.on_token is None:
            return
        try:
            job.request.on_token(output, token, piece)
        except Exception as error:
            self.end(job, "error", CallbackFailed(job.request.number, error))

    def _deliver_search(self, request: BeamRequest) -> None:
        for output, (score, tokens) in zip(request.outputs, request.answers, strict=True):
            output.tokens, output.score = tokens, score
            output.text = self._whole_text(output)
            output.finish = "stop" if tokens[-1] in request.stop_tokens else "length"
        self.ended.append(request)

    def _whole_text(self, output: Output) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(output.tokens, skip_special_tokens=True))


def _output(job: SampleJob) -> Output:
    return job.request.outputs[job.index]


def _finish(output: Output, finish: Finish, error: Exception | None) -> None:
    if output.finish is None:
        output.finish, output.error = finish, error


def _logprob(token: int, most: int, numbers: dict[str, list[Any]], at: int) -> TokenLogprob:
    top = zip(numbers["top_tokens"][at], numbers["top_logprobs"][at], strict=True)
    return TokenLogprob(token, numbers["logprobs"][at], tuple(top)[:most])
