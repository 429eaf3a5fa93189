"""Outputs are filled: what user code sees, and what remains when it raises or a request ends."""

from __future__ import annotations

from typing import Any

import pytest

from granite_paged.engine.beams import BeamRequest
from granite_paged.engine.job import State
from granite_paged.engine.outputs import OutputProcessor
from granite_paged.engine.request import Output
from granite_paged.errors import CallbackFailed, RequestCancelled, TokenizerFailed
from tests.helpers.output_setting import (
    STOP,
    Beams,
    Planner,
    Setting,
    asked,
    scored,
    searched,
)

# -- searches -----------------------------------------------------------------------------------


def over(setting: Setting, *answers: tuple[float, list[int]]) -> BeamRequest:
    """Return a search whose last report was read."""
    request = searched(width=len(answers))
    request.answers = list(answers)
    numbers = {"tokens": [1], "bad": [False], "top_tokens": [[]], "top_logprobs": [[]]}
    setting.read(numbers, drawn=[(request.jobs[0], 0, 0)])
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
