"""Requests on their way in: what is made of them, what is refused, and who is in line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from granite_paged.engine.intake import SAMPLE_STRIDE, Arrival, Intake
from granite_paged.engine.request import Output, SamplingParams
from granite_paged.errors import EngineClosed, InvalidSampling, QueueFull, RequestCancelled

VOCABULARY = 97
PROMPT = (5, 6, 7)


class Door:
    """A scheduler that notes what it is asked, and has room for `limit` jobs."""

    def __init__(self, limit: int = 99) -> None:
        self.limit = limit
        self.sizes: list[int] = []  # tokens that were to fit
        self.jobs: list[int] = []  # jobs that were to have room
        self.queue = self

    def check_fits(self, tokens: int) -> None:
        self.sizes.append(tokens)

    def check_room(self, jobs: int) -> None:
        self.jobs.append(jobs)
        if jobs > self.limit:
            raise QueueFull(waiting=0, limit=self.limit)


def make(limit: int = 99) -> tuple[Intake, Door]:
    door: Any = Door(limit)
    return Intake(door, VOCABULARY, frozenset({1, 2})), door


def asked(intake: Intake, **params: Any) -> Any:
    return intake.samples(PROMPT, SamplingParams(**params), None)


# -- samples ------------------------------------------------------------------------------------


def test_a_request_has_a_job_and_an_output_per_sample() -> None:
    intake, door = make()
    heard: list[Any] = []
    params = SamplingParams(n=3, max_new_tokens=8, temperature=1.0)
    request = intake.samples(PROMPT, params, lambda *news: heard.append(news))
    assert door.sizes == [3 + 8 - 1], "the last token is not stored"
    assert [job.index for job in request.jobs] == [0, 1, 2]
    for job in request.jobs:
        assert (job.request, job.tokens, job.max_stored) == (request, [5, 6, 7], 10)
        assert (job.limit, job.greedy) == (8, False)
    assert [job.followers for job in request.jobs] == [request.jobs[1:], [], []]
    assert request.outputs == [Output(0, index, PROMPT) for index in range(3)]
    assert request.on_token is not None
    assert asked(intake).jobs[0].greedy


def test_samples_have_seeds_a_golden_ratio_apart() -> None:
    whole = 2**64
    golden = (math.isqrt(5 * whole**2) - whole) // 2
    assert golden | 1 == SAMPLE_STRIDE
    intake, _ = make()
    request = asked(intake, n=4, seed=2**63 - 1)
    expected = [(2**63 - 1 + index * SAMPLE_STRIDE) % 2**63 for index in range(4)]
    assert [job.seed for job in request.jobs] == expected
    assert asked(intake, seed=7).jobs[0].seed == 7


def test_requests_are_numbered_as_they_come() -> None:
    intake, _ = make()
    scoring = intake.scoring(PROMPT, ((1,),), "")
    assert [asked(intake).number, scoring.number, intake.number()] == [1, 0, 2]


def test_a_request_without_stop_tokens_takes_those_of_the_model() -> None:
    intake, _ = make()
    assert asked(intake).stop_tokens == {1, 2}
    assert asked(intake, stop_tokens=()).stop_tokens == frozenset()
    assert asked(intake, stop_tokens=(9,)).stop_tokens == frozenset({9})


# -- contexts and searches ----------------------------------------------------------------------


def test_a_context_stores_its_longest_continuation_but_for_the_last_token() -> None:
    intake, door = make()
    scoring = intake.scoring(PROMPT, ((1,), (1, 2, 3, 4)), "tenant")
    (job,) = scoring.jobs
    assert door.sizes == [3 + 4 - 1]
    assert (job.request, job.tokens, job.max_stored) == (scoring, [5, 6, 7], 6)
    assert (scoring.scores, scoring.namespace) == ([None, None], "tenant")
    assert intake.requests == [scoring]


def test_a_context_without_continuations_is_finished_and_not_in_line() -> None:
    intake, door = make()
    scoring = intake.scoring(PROMPT, (), "")
    assert (scoring.finished, door.sizes) == (True, [2])
    assert (len(intake), intake.first()) == (0, None)
    asked(intake)
    assert door.jobs[-1] == 1, "it counts as none that came"


def test_a_search_begins_with_one_beam() -> None:
    intake, door = make()
    params = SamplingParams(max_new_tokens=8, stop_tokens=(9,))
    request = intake.search(PROMPT, params, 3, 0.5)
    (beam,) = request.jobs
    assert door.sizes == [10]
    assert (beam.request, beam.tokens, beam.max_stored, beam.limit) == (request, [5, 6, 7], 10, 1)
    assert request.scores == {beam: 0.0}
    assert (request.width, request.length_penalty) == (3, 0.5)
    assert (request.stop_tokens, request.params.logprobs) == ({9}, 2 * 3)
    assert request.outputs == [Output(0, index, PROMPT) for index in range(3)]


@pytest.mark.parametrize(
    "penalty", [math.nan, math.inf, "1", 10**400], ids=["nan", "inf", "text", "huge"]
)
def test_a_length_penalty_must_be_a_finite_number(penalty: Any) -> None:
    intake, _ = make()
    with pytest.raises(InvalidSampling, match="length_penalty must be a finite number"):
        intake.search(PROMPT, SamplingParams(), 2, penalty)


# -- the line -----------------------------------------------------------------------------------


def test_requests_and_ends_are_taken_in_as_they_came() -> None:
    intake, _ = make()
    first, second = asked(intake), asked(intake)
    error = RequestCancelled(0)
    intake.end(first, error)
    assert len(intake) == 3
    assert intake.requests == [first, second], "those that are to open"
    found = []
    while arrival := intake.first():
        found.append(arrival)
        intake.drop_first()
    assert found == [Arrival(first), Arrival(second), Arrival(first, error)]
    assert (len(intake), intake.requests) == (0, [])


def test_the_queue_has_room_for_what_is_in_line_too() -> None:
    intake, door = make()
    asked(intake, n=3)
    assert door.jobs == [3, 3], "once before its samples are made, and once when it is in line"
    asked(intake, n=2)
    assert door.jobs[2:] == [3 + 2, 3 + 2]
    intake.drop_first()
    asked(intake)
    assert door.jobs[4:] == [2 + 1, 2 + 1]


def test_an_end_leaves_no_room() -> None:
    intake, door = make()
    request = asked(intake, n=3)
    intake.drop_first()
    intake.end(request, RequestCancelled(0))
    intake.drop_first()
    asked(intake)
    assert door.jobs[-1] == 1


def test_a_request_that_finds_no_room_is_not_in_line() -> None:
    intake, door = make(limit=2)
    asked(intake)
    with pytest.raises(QueueFull):
        asked(intake, n=2)
    assert (len(intake), door.sizes) == (1, [66])
    asked(intake)


def test_a_closed_intake_refuses_requests_and_takes_ends() -> None:
    intake, _ = make()
    request = asked(intake)
    intake.close()
    for refused in (
        lambda: asked(intake),
        lambda: intake.scoring(PROMPT, ((1,),), ""),
        lambda: intake.search(PROMPT, SamplingParams(), 2, 1.0),
    ):
        with pytest.raises(EngineClosed, match="make another"):
            refused()
    intake.end(request, RequestCancelled(0))
    assert len(intake) == 2


def test_a_request_that_comes_while_the_intake_closes_is_refused() -> None:
    """Its size is checked without the door's lock."""
    intake, door = make()
    door.check_fits = lambda tokens: intake.close()  # type: ignore[method-assign]
    with pytest.raises(EngineClosed):
        asked(intake)
    assert len(intake) == 0
