"""An output processor between fakes: a tokenizer, a scheduler and a keeper of beams."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.executor import PendingResult
from granite_paged.engine.job import BeamJob, Job, SampleJob, ScoringJob, State
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.request import Output, Request, SamplingParams, Scoring
from granite_paged.engine.step import PrefillChunk, ScoreChunk

PROMPT, STOP = (5, 6), 9


class Tokenizer:
    """Token 7 is "w7 ". Decoding raises what is in `fails`, once.

    Attributes:
        decoded: what was decoded.
    """

    def __init__(self) -> None:
        self.fails: list[BaseException] = []
        self.decoded: list[list[int]] = []

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens is True
        self.decoded.append(list(tokens))
        if self.fails:
            raise self.fails.pop()
        return "".join(f"w{token} " for token in tokens)


class Planner:
    """A scheduler that ends jobs, and notes the rest."""

    def __init__(self) -> None:
        self.failures: list[tuple[Job, Exception]] = []
        self.recovered: list[tuple[list[Job], Exception]] = []
        self.kept: list[Any] = []

    def finish(self, job: Job) -> None:
        job.state = State.DONE

    def fail(self, job: Job, error: Exception) -> None:
        self.failures.append((job, error))

    def recover(self, jobs: list[Job], error: Exception) -> None:
        self.recovered.append((jobs, error))

    def keep(self, chunk: PrefillChunk, state: Any) -> None:
        self.kept.append((chunk, state))

    def guarded(self, job: Job, action: Any, *arguments: Any) -> None:
        assert arguments[0] is job
        action(*arguments)


class Beams:
    """Notes reports. A search is over at its `over`-th report."""

    over = 1

    def __init__(self) -> None:
        self.reports: list[Any] = []

    def report(self, job: BeamJob, top: list[tuple[float, int]]) -> bool:
        self.reports.append((job, top))
        return len(self.reports) >= self.over


class Setting:
    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer, self.beams = tokenizer or Tokenizer(), Beams()
        self.planner: Any = Planner()
        beams: Any = self.beams
        self.outputs = OutputProcessor(self.tokenizer, self.planner, beams)

    def read(self, numbers: dict[str, Any], **jobs: Any) -> None:
        fetch: Any = SimpleNamespace(read=lambda: numbers)
        self.outputs.read(PendingResult(fetch, **jobs))

    def say(self, job: SampleJob, *tokens: int) -> None:
        """Read some tokens of a job, each in a step of its own."""
        for token in tokens:
            self.read({"tokens": [token], "bad": [False]}, drawn=[(job, job.generation, 0)])

    def tell(self, job: SampleJob, *tokens: int) -> None:
        """Read and deliver."""
        self.say(job, *tokens)
        self.outputs.deliver()


def asked(on_token: Any = None, *, limit: int = 4, **params: Any) -> Request:
    """Return a request whose samples decode."""
    wanted = SamplingParams(max_new_tokens=limit, **params)
    request = Request(3, PROMPT, wanted, frozenset({STOP}), on_token)
    request.outputs = [Output(3, index, PROMPT) for index in range(wanted.n)]
    request.jobs = [
        SampleJob(request=request, tokens=list(PROMPT), max_stored=20, index=index, limit=limit)
        for index in range(wanted.n)
    ]
    for job in request.jobs:
        job.state = State.DECODE
    return request


def searched(width: int = 2) -> BeamRequest:
    params = SamplingParams(logprobs=2 * width)
    request = BeamRequest(3, PROMPT, params, frozenset({STOP}), width=width)
    request.outputs = [Output(3, index, PROMPT) for index in range(width)]
    request.jobs = [
        BeamJob(request=request, tokens=list(PROMPT), max_stored=20) for _ in range(width)
    ]
    return request


def scored(*continuations: tuple[int, ...]) -> tuple[Scoring, ScoringJob]:
    scoring = Scoring(3, PROMPT, continuations, [None] * len(continuations))
    scoring.jobs = [ScoringJob(request=scoring, tokens=list(PROMPT), max_stored=20)]
    return scoring, scoring.jobs[0]


def part(job: ScoringJob, number: int, start: int, end: int) -> ScoreChunk:
    return ScoreChunk(job, job.generation, number, start, end, 1, 1, forked=False)
