"""Turns what came back from the device into outputs.

::

    read      numbers become tokens and scores of jobs; jobs whose last token came are finished
    deliver   user code runs: text by the tokenizer, stop strings, callbacks; outputs are filled

Between the two, the state of the step is complete. A number that arrives for a job that restarted
or ended since is dropped: it is one step late.
"""

from __future__ import annotations

import contextlib
import math
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
from granite_paged.errors import CallbackFailed, NonFiniteRequest, TokenizerFailed


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
        for job, generation, at in result.drawn:
            if job.generation == generation and job.state is not State.DONE:
                if numbers["bad"][at]:
                    self._fail_nonfinite(job)
                elif isinstance(job, BeamJob):
                    self._scheduler.guarded(job, self._read_beam, job, numbers, at)
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
        if self._beams.report(job, top[: job.request.params.logprobs]):
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
        if not all(math.isfinite(logprob) for logprob, _ in pairs):
            self._fail_nonfinite(job)
            return
        known = [*job.partial.pop(chunk.number, []), *pairs]
        if chunk.end < len(job.continuation(chunk.number)):
            job.partial[chunk.number] = known
            return
        logprobs = tuple(logprob for logprob, _ in known)
        is_greedy = all(greedy for _, greedy in known)
        job.request.scores[chunk.number] = Score(sum(logprobs), logprobs, is_greedy)
        if job.complete:
            self.ended.append(job.request)
            self._scheduler.finish(job)

    def _fail_nonfinite(self, job: Job) -> None:
        self._scheduler.fail(job, NonFiniteRequest(job.request.number))

    # -- deliver --------------------------------------------------------------------------------

    def deliver(self) -> bool:
        """Deliver what was read, and every failure. Return whether there was anything.

        An interrupt, such as KeyboardInterrupt, passes through. The next call delivers the rest.
        """
        busy = bool(self._arrivals or self._scheduler.failures)
        while self._arrivals:
            arrival = self._arrivals[0]
            if isinstance(arrival, BeamRequest):
                if not arrival.finished:
                    self._deliver_search(arrival)  # an interrupt delivers it again
                self._arrivals.popleft()
            else:
                self._arrivals.popleft()
                if _output(arrival.job).finish is None:
                    self._deliver_token(*arrival)
        failures = self._scheduler.failures
        while failures:
            job, error = failures[0]
            if isinstance(job, SampleJob) and not isinstance(job, BeamJob):
                self._end_sample(job, "error", error)
            else:
                self.end(job.request, "error", error)
            failures.pop(0)  # an interrupt ends it again
        return busy

    def end(self, request: Request | Scoring, finish: Finish, error: Exception) -> None:
        """End what is not finished of a request."""
        for job in request.jobs:
            self._scheduler.finish(job)
        if isinstance(request, Scoring):
            request.error = request.error or error
        elif isinstance(request, BeamRequest):
            for output in request.outputs:
                _finish(output, finish, error)
        else:
            for sample in request.jobs:
                self._end_sample(sample, finish, error)
        self.ended.append(request)

    def _end_sample(self, job: SampleJob, finish: Finish, error: Exception | None = None) -> None:
        self._scheduler.finish(job)
        output = _output(job)
        if output.finish is None:
            try:
                self._complete_text(job, output)
            finally:  # an interrupt, too, leaves it finished
                _finish(output, finish, error)
                self.ended.append(job.request)

    def _deliver_token(
        self, job: SampleJob, token: int, logprob: TokenLogprob | None, finish: Finish | None
    ) -> None:
        output = _output(job)
        output.tokens.append(token)
        if logprob:
            output.logprobs.append(logprob)
        try:
            piece = self._text(job, output, token, last=finish is not None)
            if job in self._texts and self._texts[job].stopped:
                finish = "stop"
            self._call_back(job, output, token, piece)
        except Exception as error:
            self._end_sample(job, "error", TokenizerFailed(job.request.number, error))
        finally:  # an interrupt, too, leaves a job that is done
            if finish:
                self._end_sample(job, finish)

    def _text(self, job: SampleJob, output: Output, token: int, *, last: bool) -> str:
        """Return what the token adds to the text. Without a reader, the last token decodes all."""
        request = job.request
        if self._tokenizer is None:
            return ""
        if request.on_token is None and not request.params.stop_strings:
            if last:
                output.text = self._whole_text(output.tokens)
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
            self._end_sample(job, "error", CallbackFailed(job.request.number, error))

    def _deliver_search(self, request: BeamRequest) -> None:
        try:
            texts = [self._whole_text(tokens) for _, tokens in request.answers]
        except Exception as error:
            self.end(request, "error", TokenizerFailed(request.number, error))
            return
        for output, text, (score, tokens) in zip(
            request.outputs, texts, request.answers, strict=True
        ):
            output.tokens, output.text, output.score = tokens, text, score
            output.finish = "stop" if tokens[-1] in request.stop_tokens else "length"
        self.ended.append(request)

    def _complete_text(self, job: SampleJob, output: Output) -> None:
        """Decode what an early end left undecoded."""
        text = self._texts.pop(job, None)
        with contextlib.suppress(Exception):  # what ends the job is more important
            if text is not None:
                text.finish()
                output.text = text.text
            elif not output.text:
                output.text = self._whole_text(output.tokens)

    def _whole_text(self, tokens: list[int]) -> str:
        if self._tokenizer is None or not tokens:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _output(job: SampleJob) -> Output:
    return job.request.outputs[job.index]


def _finish(output: Output, finish: Finish, error: Exception | None) -> None:
    if output.finish is None:
        output.finish, output.error = finish, error


def _logprob(token: int, most: int, numbers: dict[str, list[Any]], at: int) -> TokenLogprob:
    top = zip(numbers["top_tokens"][at], numbers["top_logprobs"][at], strict=True)
    return TokenLogprob(token, numbers["logprobs"][at], tuple(top)[:most])
