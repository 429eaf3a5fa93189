"""Numbers of the device are read: whose they are, what is dropped, and what fails."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.executor import PendingResult
from granite_paged.engine.job import State
from granite_paged.engine.request import Score, TokenLogprob
from granite_paged.engine.step import PrefillChunk
from granite_paged.errors import NonFiniteRequest
from tests.helpers.output_setting import PROMPT, STOP, Setting, asked, part, scored, searched

# -- tokens -------------------------------------------------------------------------------------


def test_tokens_are_read_into_their_jobs_and_counted() -> None:
    setting = Setting()
    first, second = asked().jobs[0], asked().jobs[0]
    assert setting.outputs.tokens == 0
    numbers = {"tokens": [1, 2], "bad": [False, False]}
    setting.read(numbers, drawn=[(first, 0, 0), (second, 0, 1)])
    setting.read(numbers, drawn=[(second, 0, 0)])
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
    setting.read(numbers, drawn=[(restarted, 0, 0), (ended, 0, 1)])
    assert restarted.tokens == ended.tokens == list(PROMPT)
    assert not setting.outputs.deliver()


def test_a_number_that_is_not_finite_fails_its_job_only() -> None:
    setting = Setting()
    bad, good = asked().jobs[0], asked().jobs[0]
    numbers = {"tokens": [1, 2], "bad": [True, False]}
    setting.read(numbers, drawn=[(bad, 0, 0), (good, 0, 1)])
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
    setting.outputs.read(PendingResult(fetch, drawn=[(job, 0, 0)]))
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
    setting.read(numbers, drawn=[(job, 0, at) for at, job in enumerate(jobs)])
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


# -- beams --------------------------------------------------------------------------------------


def test_a_beam_reports_the_candidates_that_its_search_asks_for() -> None:
    setting = Setting()
    setting.beams.over = 2
    job = searched(width=1).jobs[0]
    numbers = {
        "tokens": [1], "bad": [False], "top_tokens": [[1, 2, 3]], "top_logprobs": [[-1, -2, -3]],
    }  # fmt: skip
    setting.read(numbers, drawn=[(job, 0, 0)])
    assert setting.beams.reports == [(job, [(-1, 1), (-2, 2)])]
    assert (setting.outputs.tokens, job.tokens) == (1, list(PROMPT))
    assert not setting.outputs.deliver(), "the search goes on"
