"""What came back from the device, turned into outputs: text, stops, callbacks, errors.

A number that arrives for a job that restarted or ended since is dropped: it is one step late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite_paged.engine.beams import BeamKeeper, BeamRequest
from granite_paged.engine.detokenizer import Detokenizer
from granite_paged.engine.executor import PendingResult
from granite_paged.engine.request import (
    Finish,
    Job,
    Output,
    Request,
    Score,
    Scoring,
    State,
    TokenLogprob,
)
from granite_paged.engine.scheduler import Scheduler
from granite_paged.engine.step import ScoreChunk
from granite_paged.errors import CallbackFailed, NonFiniteRequest, StepFailed


class OutputProcessor:
    """Fills the outputs of requests.

    Attributes:
        scheduler, beams: told of jobs that end and report; set once, as each knows the other.
        tokens: sampled and delivered since it was made.
        ended: requests of which a job ended; whoever reads the list empties it.
    """

    scheduler: Scheduler
    beams: BeamKeeper

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokens = 0
        self.ended: list[Request | Scoring] = []
        self._tokenizer = tokenizer
        self._texts: dict[Job, Detokenizer] = {}

    # -- what arrives ---------------------------------------------------------------------------

    def read(self, result: PendingResult) -> None:
        """Wait for a result and deliver it; a fault concerns its jobs only."""
        try:
            numbers = result.fetch.read()
        except Exception as error:
            self.scheduler.recover(result.jobs, error)
            return
        self._keep(result, numbers)
        for at, (job, generation) in enumerate(result.drawn):
            if job.generation == generation and job.state is not State.DONE:
                if numbers["bad"][at]:
                    self.end(job, "error", NonFiniteRequest(job.request.number))
                elif isinstance(job.request, BeamRequest):
                    self._report(job, job.request, numbers, at)
                else:
                    self._token(job, numbers["tokens"][at], numbers, at)
        if result.parts:
            self._scores(result.parts, numbers)

    def failed(self, job: Job, error: Exception) -> None:
        """A fault of the machinery ended this job."""
        failure = StepFailed(job.request.number, _named(error))
        failure.__cause__ = error
        self.end(job, "error", failure)

    def end(self, job: Job, finish: Finish, error: Exception | None = None) -> None:
        """The job is over."""
        if job.state is State.DONE:
            return
        self._texts.pop(job, None)
        self.scheduler.finish(job)
        self.ended.append(job.request)
        if isinstance(job.request, Scoring):
            job.request.error = job.request.error or error
        elif isinstance(job.request, BeamRequest):
            for beam in job.request.jobs:
                self.scheduler.finish(beam)
            for output in job.request.outputs:
                output.finish, output.error = finish, error
        else:
            output = job.request.outputs[job.index]
            output.finish, output.error = finish, error

    # -- tokens ---------------------------------------------------------------------------------

    def _keep(self, result: PendingResult, numbers: dict[str, list[Any]]) -> None:
        for (chunk, state), unsound in zip(result.kept, numbers.get("unsound", ()), strict=True):
            job = chunk.job
            if not unsound:
                self.scheduler.keep(chunk, state)
            elif job.generation == chunk.generation:
                self.end(job, "error", NonFiniteRequest(job.request.number))

    def _token(self, job: Job, token: int, numbers: dict[str, list[Any]], at: int) -> None:
        assert isinstance(job.request, Request)
        output = job.request.outputs[job.index]
        self.tokens += 1
        job.tokens.append(token)
        output.tokens.append(token)
        if job.request.params.logprobs is not None:
            output.logprobs.append(_logprob(token, job.request.params.logprobs, numbers, at))
        finish = self._finish_of(job, job.request, token)
        piece = self._text(job, output, token, last=finish is not None)
        if finish is None and job in self._texts and self._texts[job].stopped:
            finish = "stop"
        self._tell(job, job.request, token, piece)
        if finish:
            self.end(job, finish)

    def _report(
        self, job: Job, request: BeamRequest, numbers: dict[str, list[Any]], at: int
    ) -> None:
        self.tokens += 1
        likeliest = list(zip(numbers["top_logprobs"][at], numbers["top_tokens"][at], strict=True))
        if self.beams.report(request, job, likeliest):
            self.ended.append(request)
            for output in request.outputs:
                output.text = self._whole_text(output)

    def _finish_of(self, job: Job, request: Request, token: int) -> Finish | None:
        if token in request.stop_tokens:
            return "stop"
        return "length" if len(job.tokens) - job.prompt_length == job.limit else None

    def _text(self, job: Job, output: Output, token: int, *, last: bool) -> str:
        """What the token adds to the text; all of it at the end where nobody looks before."""
        assert isinstance(job.request, Request)
        if self._tokenizer is None:
            return ""
        if job.request.on_token is None and not job.request.params.stop_strings:
            if last:
                output.text = self._whole_text(output)
            return ""
        if job not in self._texts:
            self._texts[job] = Detokenizer(self._tokenizer, job.request.params.stop_strings)
        text = self._texts[job]
        piece = text.push(token) + (text.finish() if last else "")
        output.text = text.text
        return piece

    def _whole_text(self, output: Output) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(output.tokens, skip_special_tokens=True))

    def _tell(self, job: Job, request: Request, token: int, piece: str) -> None:
        if request.on_token is None:
            return
        try:
            request.on_token(request.outputs[job.index], token, piece)
        except Exception as error:
            failure = CallbackFailed(request.number, _named(error))
            failure.__cause__ = error
            self.end(job, "error", failure)

    # -- scores ---------------------------------------------------------------------------------

    def _scores(self, parts: Sequence[ScoreChunk], numbers: dict[str, list[Any]]) -> None:
        start = 0
        for at, part in enumerate(parts):
            end = start + part.end - part.start
            pairs = list(
                zip(numbers["logprobs"][start:end], numbers["greedy"][start:end], strict=True)
            )
            start = end
            job = part.job
            if job.generation == part.generation and job.state is not State.DONE:
                if numbers["bad"][at]:
                    self.end(job, "error", NonFiniteRequest(job.request.number))
                else:
                    self._scored(job, part, pairs)

    def _scored(self, job: Job, part: ScoreChunk, pairs: list[tuple[float, bool]]) -> None:
        assert isinstance(job.request, Scoring)
        known = [*job.partial.pop(part.number, []), *pairs]
        if part.end < len(job.continuation(part.number)):
            job.partial[part.number] = known
            return
        logprobs = tuple(logprob for logprob, _ in known)
        greedy = all(likeliest for _, likeliest in known)
        job.request.scores[part.number] = Score(sum(logprobs), logprobs, greedy)
        if job.request.finished:
            self.end(job, "stop")


def _logprob(token: int, most: int, numbers: dict[str, list[Any]], at: int) -> TokenLogprob:
    likeliest = zip(numbers["top_tokens"][at], numbers["top_logprobs"][at], strict=True)
    return TokenLogprob(token, numbers["logprobs"][at], tuple(likeliest)[:most])


def _named(error: Exception) -> str:
    return f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
