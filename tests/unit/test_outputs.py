"""From numbers to outputs: what is read, what is dropped, and what user code sees of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.executor import PendingResult
from granite_paged.engine.job import BeamJob, Job, SampleJob, ScoringJob, State
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.request import (
    Output,
    Request,
    SamplingParams,
    Score,
    Scoring,
    TokenLogprob,
)
from granite_paged.engine.step import PrefillChunk, ScoreChunk
from granite_paged.errors import (
    CallbackFailed,
    NonFiniteRequest,
    RequestCancelled,
    TokenizerFailed,
)

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
            self.read({"tokens": [token], "bad": [False]}, drawn=[(job, job.generation)])

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


# -- tokens -------------------------------------------------------------------------------------


def test_tokens_are_read_into_their_jobs_and_counted() -> None:
    setting = Setting()
    first, second = asked().jobs[0], asked().jobs[0]
    assert setting.outputs.tokens == 0
    numbers = {"tokens": [1, 2], "bad": [False, False]}
    setting.read(numbers, drawn=[(first, 0), (second, 0)])
    setting.read(numbers, drawn=[(second, 0)])
    assert (first.tokens, second.tokens) == ([5, 6, 1], [5, 6, 2, 1])
    assert setting.outputs.tokens == 3
    assert first.request.outputs[0].tokens == [], "nothing is delivered yet"


def test_a_job_is_finished_when_its_last_token_is_read() -> None:
    setting = Setting()
    job, stopping = asked(limit=2).jobs[0], asked().jobs[0]
    setting.say(job, 1)
    assert job.state is State.DECODE
    setting.say(job, 2)
    setting.say(stopping, STOP)
    assert job.state is stopping.state is State.DONE


def test_a_token_for_a_job_that_restarted_or_ended_is_dropped() -> None:
    setting = Setting()
    restarted, ended = asked().jobs[0], asked().jobs[0]
    restarted.generation, ended.state = 1, State.DONE
    numbers = {"tokens": [1, 2], "bad": [False, False]}
    setting.read(numbers, drawn=[(restarted, 0), (ended, 0)])
    assert restarted.tokens == ended.tokens == list(PROMPT)
    assert not setting.outputs.deliver()


def test_a_number_that_is_not_finite_fails_its_job_only() -> None:
    setting = Setting()
    bad, good = asked().jobs[0], asked().jobs[0]
    numbers = {"tokens": [1, 2], "bad": [True, False]}
    setting.read(numbers, drawn=[(bad, 0), (good, 0)])
    ((failed, error),) = setting.planner.failures
    assert failed is bad
    assert isinstance(error, NonFiniteRequest)
    assert error.request == 3
    assert (bad.tokens, good.tokens) == ([5, 6], [5, 6, 2])


def test_a_result_that_cannot_be_read_concerns_its_jobs() -> None:
    setting = Setting()
    job = asked().jobs[0]
    fault = OSError()

    def fail() -> Any:
        raise fault

    fetch: Any = SimpleNamespace(read=fail)
    setting.outputs.read(PendingResult(fetch, drawn=[(job, 0)]))
    assert setting.planner.recovered == [([job], fault)]
    assert job.tokens == list(PROMPT)


def test_the_logprobs_that_a_request_asks_for_are_reported() -> None:
    setting = Setting()
    jobs = [asked(logprobs=most).jobs[0] for most in (None, 0, 2)]
    numbers = {
        "tokens": [1, 2, 3],
        "bad": [False] * 3,
        "logprobs": [-1.0, -2.0, -3.0],
        "top_tokens": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "top_logprobs": [[-0.1, -0.2, -0.3]] * 3,
    }
    setting.read(numbers, drawn=[(job, 0) for job in jobs])
    setting.outputs.deliver()
    assert [job.request.outputs[0].logprobs for job in jobs] == [
        [], [TokenLogprob(2, -2.0)], [TokenLogprob(3, -3.0, ((7, -0.1), (8, -0.2)))],
    ]  # fmt: skip


# -- chunks of prompts --------------------------------------------------------------------------


def test_sound_chunks_are_kept_and_others_fail_their_jobs() -> None:
    setting = Setting()
    sound, unsound, over = (asked().jobs[0] for _ in range(3))
    chunks = [PrefillChunk(job, 0, 0, 2, last=True) for job in (sound, unsound, over)]
    over.generation = 1
    prefilled = [(chunk, f"state {place}") for place, chunk in enumerate(chunks)]
    setting.read({"unsound": [False, True, True]}, prefilled=prefilled)
    assert setting.planner.kept == [(chunks[0], "state 0")]
    ((failed, error),) = setting.planner.failures
    assert failed is unsound
    assert isinstance(error, NonFiniteRequest)


# -- scores -------------------------------------------------------------------------------------


def test_a_continuation_in_chunks_has_one_score_of_all_its_tokens() -> None:
    setting = Setting()
    scoring, job = scored((1, 2, 3, 4), (5,))
    numbers = {"logprobs": [-1.0, -2.0, -3.0], "greedy": [True] * 3, "bad": [False, False]}
    setting.read(numbers, scored=[part(job, 0, 0, 2), part(job, 1, 0, 1)])
    assert scoring.scores == [None, Score(-3.0, (-3.0,), True)]
    assert (job.state, setting.outputs.ended) == (State.NEW, [])
    other, last = scored((1,))
    numbers = {"logprobs": [-4.0, -5.0, -6.0], "greedy": [True, False, True], "bad": [False] * 3}
    setting.read(numbers, scored=[part(job, 0, 2, 3), part(job, 0, 3, 4), part(last, 0, 0, 1)])
    assert other.scores == [Score(-6.0, (-6.0,), True)]
    assert scoring.scores[0] == Score(-12.0, (-1.0, -2.0, -4.0, -5.0), False)
    assert (job.state, setting.outputs.ended, job.partial) == (State.DONE, [scoring, other], {})


def test_a_score_for_a_job_that_restarted_or_ended_is_dropped() -> None:
    setting = Setting()
    (_, restarted), (_, ended) = scored((1,)), scored((1,))
    parts = [part(restarted, 0, 0, 1), part(ended, 0, 0, 1)]
    restarted.generation, ended.state = 1, State.DONE
    numbers = {"logprobs": [-1.0, -2.0], "greedy": [True, True], "bad": [False, False]}
    setting.read(numbers, scored=parts)
    assert restarted.request.scores == ended.request.scores == [None]
    assert setting.outputs.ended == []


@pytest.mark.parametrize("fault", ["bad", "logprob"])
def test_a_score_that_is_not_finite_fails_its_job_only(fault: str) -> None:
    setting = Setting()
    (_, failing), (_, good) = scored((1, 2)), scored((1, 2))
    logprobs = [-1.0, -math.inf if fault == "logprob" else -1.0, -2.0, -3.0]
    numbers = {"logprobs": logprobs, "greedy": [True] * 4, "bad": [fault == "bad", False]}
    setting.read(numbers, scored=[part(failing, 0, 0, 2), part(good, 0, 0, 2)])
    ((failed, error),) = setting.planner.failures
    assert failed is failing
    assert isinstance(error, NonFiniteRequest)
    assert (failing.request.scores, good.request.scores[0]) == ([None], Score(-5.0, (-2, -3), True))


# -- searches -----------------------------------------------------------------------------------


def test_a_beam_reports_the_candidates_that_its_search_asks_for() -> None:
    setting = Setting()
    setting.beams.over = 2
    job = searched(width=1).jobs[0]
    numbers = {
        "tokens": [1], "bad": [False], "top_tokens": [[1, 2, 3]], "top_logprobs": [[-1, -2, -3]],
    }  # fmt: skip
    setting.read(numbers, drawn=[(job, 0)])
    assert setting.beams.reports == [(job, [(-1, 1), (-2, 2)])]
    assert (setting.outputs.tokens, job.tokens) == (1, list(PROMPT))
    assert not setting.outputs.deliver(), "the search goes on"


def over(setting: Setting, *answers: tuple[float, list[int]]) -> BeamRequest:
    """Return a search whose last report was read."""
    request = searched(width=len(answers))
    request.answers = list(answers)
    numbers = {"tokens": [1], "bad": [False], "top_tokens": [[]], "top_logprobs": [[]]}
    setting.read(numbers, drawn=[(request.jobs[0], 0)])
    return request


def test_the_answers_of_a_search_are_its_outputs() -> None:
    setting = Setting()
    request = over(setting, (-1.0, [3, 4, STOP]), (-2.0, [STOP, STOP, 3]), (-3.0, [STOP]))
    assert not request.finished
    assert setting.outputs.deliver()
    assert [(o.tokens, o.text, o.score, o.finish) for o in request.outputs] == [
        ([3, 4, STOP], "w3 w4 w9 ", -1.0, "stop"),
        ([STOP, STOP, 3], "w9 w9 w3 ", -2.0, "length"),
        ([STOP], "w9 ", -3.0, "stop"),
    ]
    assert setting.outputs.ended == [request]


def test_an_interrupt_delivers_a_search_again() -> None:
    setting = Setting()
    request = over(setting, (-1.0, [3]))
    setting.tokenizer.fails = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        setting.outputs.deliver()
    assert not request.finished
    assert setting.outputs.deliver()
    assert request.outputs[0].text == "w3 "


def test_a_search_that_was_cancelled_is_not_delivered() -> None:
    setting = Setting()
    request = over(setting, (-1.0, [3]), (-2.0, [4]))
    error = RequestCancelled(3)
    setting.outputs.end(request, "cancelled", error)
    setting.outputs.deliver()
    for output in request.outputs:
        assert (output.finish, output.error, output.tokens) == ("cancelled", error, [])
    assert {job.state for job in request.jobs} == {State.DONE}


def test_a_tokenizer_that_raises_ends_the_whole_search() -> None:
    setting = Setting()
    request = over(setting, (-1.0, [3]), (-2.0, [4]))
    setting.tokenizer.fails = [ValueError()]
    setting.outputs.deliver()
    for output in request.outputs:
        assert output.finish == "error"
        assert isinstance(output.error, TokenizerFailed)


# -- delivery -----------------------------------------------------------------------------------


def test_tokens_are_delivered_in_the_order_they_came() -> None:
    setting = Setting()
    heard: list[Any] = []
    requests = [asked(lambda *news: heard.append(news)) for _ in range(2)]
    (first,), (second,) = (request.jobs for request in requests)
    for job, token in ((first, 1), (second, 2), (first, 3)):
        setting.say(job, token)
    assert heard == []
    assert setting.outputs.deliver()
    assert heard == [
        (requests[0].outputs[0], 1, "w1 "),
        (requests[1].outputs[0], 2, "w2 "),
        (requests[0].outputs[0], 3, "w3 "),
    ]
    assert not setting.outputs.deliver()


def test_a_finished_sample_says_why_it_ended() -> None:
    setting = Setting()
    length, stop = asked(limit=2), asked()
    setting.tell(length.jobs[0], 1)
    assert (length.outputs[0].finish, setting.outputs.ended) == (None, [])
    setting.tell(length.jobs[0], 2)
    setting.tell(stop.jobs[0], 1, STOP)
    assert [r.outputs[0].finish for r in (length, stop)] == ["length", "stop"]
    assert [r.outputs[0].tokens for r in (length, stop)] == [[1, 2], [1, STOP]]
    assert setting.outputs.ended == [length, stop]


def test_a_token_after_the_end_of_its_sample_is_dropped() -> None:
    setting = Setting()
    request = asked()
    setting.say(request.jobs[0], 1)
    setting.outputs.end(request, "cancelled", RequestCancelled(3))
    assert setting.outputs.deliver()
    assert (request.outputs[0].tokens, request.outputs[0].finish) == ([], "cancelled")


def test_a_sample_that_fails_ends_by_itself() -> None:
    setting = Setting()
    request = asked(n=2)
    errors = [ValueError(), OSError()]
    other = asked()
    setting.planner.fail(request.jobs[1], errors[0])
    setting.planner.fail(other.jobs[0], errors[1])
    assert setting.outputs.deliver()
    assert [(o.finish, o.error) for o in request.outputs] == [(None, None), ("error", errors[0])]
    assert [(o.finish, o.error) for o in other.outputs] == [("error", errors[1])]
    assert setting.planner.failures == []
    assert request.jobs[1].state is State.DONE


def test_a_beam_or_a_context_that_fails_ends_its_request() -> None:
    setting = Setting()
    search, (scoring, job) = searched(), scored((1,))
    error = ValueError()
    setting.planner.fail(search.jobs[0], error)
    setting.planner.fail(job, error)
    setting.outputs.deliver()
    assert [output.error for output in search.outputs] == [error, error]
    assert scoring.error is error
    assert {each.state for each in (job, *search.jobs)} == {State.DONE}


def test_an_interrupt_while_a_failure_is_delivered_loses_none() -> None:
    setting = Setting()
    first, second = asked(), asked()
    setting.tell(first.jobs[0], 1)
    for request in (first, second):
        setting.planner.fail(request.jobs[0], ValueError())
    setting.tokenizer.fails = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        setting.outputs.deliver()
    assert (first.finished, second.finished) == (True, False)
    assert setting.outputs.deliver()
    assert second.finished


# -- ends ---------------------------------------------------------------------------------------


def test_what_is_finished_of_a_request_stays_when_the_rest_is_ended() -> None:
    setting = Setting()
    request = asked(n=2, limit=1)
    setting.tell(request.jobs[0], 1)
    error = RequestCancelled(3)
    setting.outputs.end(request, "cancelled", error)
    assert [(o.finish, o.error) for o in request.outputs] == [
        ("length", None), ("cancelled", error),
    ]  # fmt: skip
    assert setting.outputs.ended[-1] is request


def test_a_search_keeps_why_an_output_was_finished() -> None:
    setting = Setting()
    request = over(setting, (-1.0, [3]))
    setting.outputs.deliver()
    setting.outputs.end(request, "cancelled", RequestCancelled(3))
    assert (request.outputs[0].finish, request.outputs[0].error) == ("length", None)


def test_scores_keep_the_first_error() -> None:
    setting = Setting()
    scoring, job = scored((1,))
    first, second = ValueError(), OSError()
    for error in (first, second):
        setting.outputs.end(scoring, "error", error)
    assert (scoring.error, job.state) == (first, State.DONE)


# -- text ---------------------------------------------------------------------------------------


def test_without_a_tokenizer_there_is_no_text() -> None:
    heard: list[Any] = []
    request = asked(lambda output, token, piece: heard.append((token, piece)), limit=2)
    planner, beams = Planner(), Beams()
    outputs = OutputProcessor(None, planner, beams)  # type: ignore[arg-type]
    setting = Setting()
    setting.outputs = outputs
    setting.tell(request.jobs[0], 1, 2)
    assert heard == [(1, ""), (2, "")]
    assert (request.outputs[0].text, request.outputs[0].finish) == ("", "length")


def test_an_answer_that_no_one_streams_is_decoded_once() -> None:
    setting = Setting()
    request = asked(limit=3)
    setting.tell(request.jobs[0], 1, 2)
    assert (setting.tokenizer.decoded, request.outputs[0].text) == ([], "")
    setting.tell(request.jobs[0], 3)
    assert request.outputs[0].text == "w1 w2 w3 "
    assert setting.tokenizer.decoded == [[1, 2, 3]]


def test_a_callback_gets_each_piece_and_with_the_last_token_the_rest() -> None:
    setting = Setting()
    heard: list[Any] = []
    request = asked(
        lambda output, token, piece: heard.append((piece, output.text)),
        limit=2, stop_strings=(" w2 w",),
    )  # fmt: skip
    setting.tell(request.jobs[0], 1, 2)
    assert heard == [("w1", "w1"), (" w2 ", "w1 w2 ")]
    assert setting.outputs._texts == {}


def test_a_stop_string_ends_a_sample_before_it() -> None:
    setting = Setting()
    request = asked(stop_strings=("w2",))
    (job,) = request.jobs
    setting.tell(job, 1)
    assert (request.outputs[0].text, request.outputs[0].finish) == ("w1 ", None)
    setting.tell(job, 2, 3)
    assert (request.outputs[0].text, request.outputs[0].finish) == ("w1 ", "stop")
    assert request.outputs[0].tokens == [1, 2]
    assert job.state is State.DONE


def test_a_tokenizer_that_raises_ends_its_sample() -> None:
    setting = Setting()
    request, other = asked(lambda *news: None), asked(limit=1)
    fault = IndexError()
    setting.tokenizer.fails = [fault]
    setting.tell(request.jobs[0], 1)
    setting.tell(other.jobs[0], 1)
    output = request.outputs[0]
    assert (output.finish, output.tokens) == ("error", [1])
    assert isinstance(output.error, TokenizerFailed)
    assert (output.error.request, output.error.__cause__) == (3, fault)
    assert other.outputs[0].text == "w1 "


def test_a_callback_that_raises_ends_its_sample() -> None:
    fault = ZeroDivisionError()

    def broken(output: Output, token: int, piece: str) -> None:
        raise fault

    setting = Setting()
    request = asked(broken)
    setting.tell(request.jobs[0], 1, 2)
    output = request.outputs[0]
    assert (output.finish, output.tokens, output.text) == ("error", [1], "w1 ")
    assert isinstance(output.error, CallbackFailed)
    assert (output.error.request, output.error.__cause__) == (3, fault)


def test_an_interrupt_at_the_last_token_leaves_its_sample_finished() -> None:
    def interrupt(output: Output, token: int, piece: str) -> None:
        raise KeyboardInterrupt

    setting = Setting()
    request = asked(interrupt, limit=1)
    with pytest.raises(KeyboardInterrupt):
        setting.tell(request.jobs[0], 1)
    assert (request.outputs[0].finish, request.outputs[0].text) == ("length", "w1 ")


def test_a_sample_that_is_cancelled_has_the_text_of_its_tokens() -> None:
    setting = Setting()
    plain, streamed, empty = asked(), asked(stop_strings=(" w2 w",)), asked()
    setting.tell(plain.jobs[0], 1, 2)
    setting.tell(streamed.jobs[0], 1, 2)
    assert streamed.outputs[0].text == "w1"
    setting.tokenizer.decoded.clear()
    for request in (plain, streamed, empty):
        setting.outputs.end(request, "cancelled", RequestCancelled(3))
    assert [r.outputs[0].text for r in (plain, streamed, empty)] == ["w1 w2 ", "w1 w2 ", ""]
    assert [] not in setting.tokenizer.decoded, "nothing is no text, whatever the tokenizer"
    assert setting.outputs._texts == {}


def test_a_tokenizer_that_raises_when_a_sample_is_cancelled_changes_no_reason() -> None:
    setting = Setting()
    request = asked()
    setting.tell(request.jobs[0], 1)
    setting.tokenizer.fails = [ValueError()]
    error = RequestCancelled(3)
    setting.outputs.end(request, "cancelled", error)
    assert (request.outputs[0].finish, request.outputs[0].error) == ("cancelled", error)
