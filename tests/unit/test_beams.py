"""Beam search: which continuations are chosen, and what the beams of a request are told to do."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.beams import BeamKeeper, BeamRequest, beam_params
from granite_paged.engine.job import BeamJob, State
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidSampling

PROMPT = (7, 8)
STOP = 50

Report = Sequence[tuple[float, int]]


def search(
    *reports: Report,
    width: int = 2,
    new: int = 9,
    stops: Sequence[int] = (STOP,),
    penalty: float = 1.0,
    sampled: Sequence[int] = (1,),
    scores: Sequence[float] = (0.0, 0.0, 0.0),
) -> BeamRequest:
    """Return a search with a decoding beam for each report, all of which have reported."""
    params = SamplingParams(max_new_tokens=new)
    request = BeamRequest(1, PROMPT, params, frozenset(stops), width=width, length_penalty=penalty)
    for report, score in zip(reports, scores, strict=False):
        job = BeamJob(request=request, tokens=[*PROMPT, *sampled], max_stored=40, limit=1)
        job.state, job.placement, job.rank = State.DECODE, SimpleNamespace(), SimpleNamespace()  # type: ignore[assignment]
        request.jobs.append(job)
        request.scores[job], request.reports[job] = score, list(report)
    return request


def chosen(request: BeamRequest) -> list[tuple[float, int, int]]:
    """Return (score, beam, token) of each continuation that is chosen."""
    return [(one.score, request.jobs.index(one.parent), one.token) for one in request.choose()]


# -- choosing -----------------------------------------------------------------------------------


def test_a_search_has_one_beam_by_default() -> None:
    request = BeamRequest(1, PROMPT, SamplingParams(), frozenset())
    assert (request.width, request.length_penalty) == (1, 1.0)


def test_the_best_continuations_of_all_beams_are_chosen() -> None:
    request = search(
        [(-1, 3), (-4, 4), (-9, 5), (-9, 6)],
        [(-0.5, 3), (-2, 4), (-9, 5), (-9, 6)],
        scores=[-1, -2],
    )
    assert chosen(request) == [(-2, 0, 3), (-2.5, 1, 3)]
    assert request.answers == []


def test_a_search_of_one_beam_takes_the_best_token() -> None:
    assert chosen(search([(-1, 3), (-2, 4)], width=1, stops=())) == [(-1, 0, 3)]


def test_every_beam_may_stop_and_as_many_go_on() -> None:
    rest = [(-90, 60 + number) for number in range(4)]
    reports = [[(-3, STOP), (score, 3), *rest] for score in (-1, -2, -5)]
    request = search(*reports, width=3)
    assert chosen(request) == [(-1, 0, 3), (-2, 1, 3), (-5, 2, 3)]
    assert request.answers == [(-1.5, [1, STOP])]


def test_a_stop_is_an_answer_only_among_the_best() -> None:
    first = search([(-1, 3), (-2, STOP), (-3, 4), (-4, 5)])
    assert chosen(first) == [(-1, 0, 3), (-3, 0, 4)]
    assert first.answers == [(-1.0, [1, STOP])], "-2 for two tokens"
    third = search([(-1, 3), (-2, 4), (-3, STOP), (-4, 5)])
    assert chosen(third) == [(-1, 0, 3), (-2, 0, 4)]
    assert third.answers == []


@pytest.mark.parametrize(("penalty", "score"), [(0.0, -8.0), (1.0, -4.0), (2.0, -2.0), (3.0, -1.0)])
def test_an_answer_is_divided_by_a_power_of_its_length(penalty: float, score: float) -> None:
    request = search([(-8, STOP), (-9, 3), (-9, 4), (-9, 5)], penalty=penalty)
    request.choose()
    assert request.answers == [(score, [1, STOP])]


def test_the_best_answers_are_kept_with_the_best_first() -> None:
    request = search([(-4, STOP), (-5, 3), (-6, 4), (-7, 5)])
    request.answers = [(-1.0, [9]), (-3.0, [8])]
    request.choose()
    assert request.answers == [(-1.0, [9]), (-2.0, [1, STOP])]


@pytest.mark.parametrize(("new", "ends"), [(2, True), (3, False)])
def test_the_last_token_ends_the_best_beams(new: int, ends: bool) -> None:
    request = search([(-2, 3), (-4, 4), (-6, 5), (-8, 6)], new=new)
    assert (chosen(request) == []) == ends
    assert request.answers == ([(-1.0, [1, 3]), (-2.0, [1, 4])] if ends else [])


@pytest.mark.parametrize(("best", "over"), [(-7, False), (-8, True), (-9, True)])
def test_a_search_is_over_when_no_beam_can_beat_its_answers(best: float, over: bool) -> None:
    """Two tokens of length penalty 2: the score is divided by 4."""
    request = search([(best, 3), (-99, 4), (-99, 5), (-99, 6)], penalty=2.0)
    request.answers = [(-1.0, [9]), (-2.0, [8])]
    assert (request.choose() == []) == over


def test_a_search_goes_on_until_it_has_as_many_answers_as_beams() -> None:
    request = search([(-90, 3), (-99, 4), (-99, 5), (-99, 6)])
    request.answers = [(-1.0, [9])]
    assert [token for _, _, token in chosen(request)] == [3, 4]
    request.answers.append((-2.0, [8]))
    assert request.choose() == []


def test_the_worst_of_several_answers_is_the_one_to_beat() -> None:
    request = search([(-6, 3), (-99, 4), (-99, 5), *[(-99, 60 + n) for n in range(3)]], width=3)
    request.answers = [(-1.0, [9]), (-2.0, [8]), (-4.0, [7])]
    assert len(request.choose()) == 3


# -- carrying out -------------------------------------------------------------------------------


class Setting:
    """A `BeamKeeper` that records what it asks of scheduler and executor.

    Attributes:
        room: whether a fork finds a row; it fails if this is an error.
    """

    def __init__(self, *, room: bool | Exception = True) -> None:
        self.room = room
        self.log: list[tuple[Any, ...]] = []
        scheduler: Any = SimpleNamespace(
            finish=self._finish,
            fork=self._fork,
            requeue=lambda job: self.log.append(("requeue", job)),
            running=SimpleNamespace(pause=lambda job: self.log.append(("pause", job))),
        )
        executor: Any = SimpleNamespace(feed=lambda job: self.log.append(("feed", job)))
        self.keeper = BeamKeeper(scheduler, executor)

    def advance(self, request: BeamRequest) -> bool:
        """Report for the last beam, the others having reported. Return whether it is over."""
        job = request.jobs[-1]
        return self.keeper.report(job, request.reports.pop(job))

    def calls(self) -> list[str]:
        return [call[0] for call in self.log]

    def _finish(self, job: BeamJob) -> None:
        self.log.append(("finish", job))
        job.state = State.DONE

    def _fork(self, parent: BeamJob, child: BeamJob) -> bool:
        self.log.append(("fork", parent, list(parent.tokens)))
        if isinstance(self.room, Exception):
            for job in child.siblings:
                job.state = State.DONE
            return False
        if self.room:
            child.state, child.placement, child.drawn = State.DECODE, parent.placement, 1
        return self.room


def test_nothing_is_chosen_before_every_beam_has_reported() -> None:
    request = search([(-1, 3), (-2, 4), (-3, 5), (-4, 6)], [(-1, 3)])
    late = request.jobs[1]
    del request.reports[late]
    setting = Setting()
    first = request.jobs[0]
    assert not setting.keeper.report(first, request.reports[first])
    assert setting.log == []
    assert not setting.keeper.report(late, [(-5, 3), (-6, 4), (-7, 5), (-8, 6)])
    assert request.reports == {}


def test_a_beam_takes_its_best_continuation_and_forks_for_the_others() -> None:
    request = search([(-1, 3), (-2, 4), (-3, 5), (-4, 6), (-5, 7), (-6, 9)], width=3)
    parent = request.jobs[0]
    setting = Setting()
    assert not setting.advance(request)
    assert setting.calls() == ["fork", "feed", "fork", "feed", "feed"]
    assert [call[2] for call in setting.log if call[0] == "fork"] == [[*PROMPT, 1]] * 2
    assert {job.tokens[-1]: score for job, score in request.scores.items()} == {3: -1, 4: -2, 5: -3}
    assert parent.tokens == [*PROMPT, 1, 3]
    assert request.jobs[-1] is parent
    assert [job.tokens for job in request.jobs[:2]] == [[*PROMPT, 1, 4], [*PROMPT, 1, 5]]
    assert [(job.drawn, job.limit) for job in request.jobs] == [(2, 3)] * 3
    sibling = request.jobs[0]
    assert (sibling.max_stored, sibling.rank) == (parent.max_stored, parent.rank)


def test_a_beam_without_a_continuation_ends_before_others_fork() -> None:
    request = search([(-1, 3), (-2, 4), (-3, 5), (-4, 6)], [(-1, 3), (-2, 4)], scores=[0, -50])
    loser = request.jobs[1]
    setting = Setting()
    assert not setting.advance(request)
    assert setting.calls() == ["finish", "fork", "feed", "feed"]
    assert setting.log[0][1] is loser
    assert loser not in request.jobs


def test_a_search_that_is_over_ends_every_beam() -> None:
    request = search([(-1, 3), (-2, 4), (-3, 5), (-4, 6)], new=2)
    setting = Setting()
    assert setting.advance(request)
    assert setting.calls() == ["finish"]
    assert request.jobs == []


def test_a_beam_that_finds_no_row_waits() -> None:
    request = search([(-1, 3), (-2, 4), (-3, 5), (-4, 6)])
    parent = request.jobs[0]
    setting = Setting(room=False)
    setting.advance(request)
    assert setting.calls() == ["fork", "requeue", "feed"]
    assert setting.log[1][1] is request.jobs[0] is not parent
    assert setting.log[2][1] is parent


def test_a_beam_that_gave_up_its_row_waits() -> None:
    request = search([(-1, 3), (-2, 4)], width=1, stops=())
    request.jobs[0].placement = None
    setting = Setting()
    setting.advance(request)
    assert setting.log == [("requeue", request.jobs[0])]


def test_nothing_more_is_done_once_a_fork_failed() -> None:
    """The failure ended the parent as well, so it is neither fed nor put into the queue."""
    request = search([(-1, 3), (-2, 4), (-3, 5), (-4, 6), (-5, 7), (-6, 9)], width=3)
    setting = Setting(room=RuntimeError("no memory"))
    setting.advance(request)
    assert setting.calls() == ["fork"]


@pytest.mark.parametrize("waits", [False, True])
def test_reported_beams_make_way_only_for_one_that_waits(waits: bool) -> None:
    request = search([(-1, 3)], [(-1, 3)], [(-1, 3)], width=3)
    del request.reports[request.jobs[2]]
    request.jobs[2].state = State.WAITING if waits else State.DECODE
    setting = Setting()
    setting.keeper.make_way(request)
    assert setting.log == ([("pause", job) for job in request.jobs[:2]] if waits else [])


# -- parameters ---------------------------------------------------------------------------------


def test_each_beam_reports_enough_to_replace_every_stop() -> None:
    asked = SamplingParams(max_new_tokens=5, stop_tokens=(1, 2), priority=3, namespace="a")
    params = beam_params(asked, 3, stops=2, vocabulary=100)
    assert params == SamplingParams(
        max_new_tokens=5, stop_tokens=(1, 2), priority=3, namespace="a", logprobs=9
    )


@pytest.mark.parametrize(("width", "fits"), [(0, False), (1, True), (4, True), (5, False)])
def test_a_search_has_from_one_beam_to_one_per_token(width: int, fits: bool) -> None:
    if fits:
        assert beam_params(SamplingParams(), width, 0, 4).logprobs == width
    else:
        with pytest.raises(InvalidSampling, match="beams must be"):
            beam_params(SamplingParams(), width, 0, 4)


def test_a_search_refuses_what_it_does_not_do() -> None:
    with pytest.raises(InvalidSampling, match="only max_new_tokens, stop_tokens, priority"):
        beam_params(SamplingParams(temperature=1.0), 2, 0, 4)
