"""What a job says of itself: what it has yet to compute, whether it is complete, what it needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.job import BeamJob, Job, Placement, SampleJob, ScoringJob, State
from granite_paged.engine.rank import FIRST
from granite_paged.errors import BrokenInvariant

PROMPT = [5, 6, 7]
STOP = 50


def request(**fields: Any) -> Any:
    return SimpleNamespace(number=4, prompt=PROMPT, stop_tokens={STOP}, namespace="a", **fields)


def sample(*sampled: int, limit: int = 4, **fields: Any) -> SampleJob:
    """Return a sample of which some tokens were read."""
    tokens = [*PROMPT, *sampled]
    return SampleJob(request=request(), tokens=tokens, max_stored=9, limit=limit, **fields)


def scoring(*continuations: tuple[int, ...]) -> ScoringJob:
    asked = request(continuations=continuations, scores=[None] * len(continuations))
    return ScoringJob(request=asked, tokens=list(PROMPT), max_stored=9)


# -- new ----------------------------------------------------------------------------------------


def test_a_new_job_has_done_nothing_and_holds_nothing() -> None:
    job = SampleJob(request=request(), tokens=list(PROMPT), max_stored=9)
    assert (job.rank, job.state, job.ticket, job.generation) == (FIRST, State.NEW, 0, 0)
    assert (job.placement, job.swapped, job.isolated) == (None, None, False)
    assert (job.followers, job.path, job.checkpoints) == ([], [], {})
    assert (job.index, job.limit, job.drawn, job.seed, job.greedy) == (0, 0, 0, 0, True)
    assert (job.seen, job.namespace, job.siblings) == (None, "a", [job])
    assert (job.rows_for_forks, Job.complete.fget(job)) == (0, False)  # type: ignore[attr-defined]


def test_a_new_placement_has_no_tokens_and_may_be_shared() -> None:
    expected = Placement(2, 3, target=0, stored=0, reserved=0, is_shareable=True)
    assert Placement(2, 3) == expected


def test_a_job_without_a_row_has_no_place_and_nothing_stored() -> None:
    job = sample()
    assert (job.stored, job.remaining) == (0, 9)
    with pytest.raises(BrokenInvariant, match="request 4 has no row"):
        assert job.placed
    job.placement = Placement(1, 2, stored=5)
    assert job.placed is job.placement
    assert (job.stored, job.remaining) == (5, 4)


@pytest.mark.parametrize("state", [State.UNREAD, State.DONE])
def test_a_job_without_a_row_that_was_launched_has_nothing_left(state: State) -> None:
    """Seen here: an engine's load counted all tokens of a request whose stream had just ended."""
    for job in (sample(), scoring()):
        assert job.remaining
        job.state = state
        assert job.remaining == 0


# -- samples ------------------------------------------------------------------------------------


def test_a_sample_ends_at_a_stop_token_or_at_its_limit() -> None:
    assert sample().finish is None
    assert sample(1, 2, 3).finish is None
    assert sample(1, 2, 3, 4).finish == "length"
    assert sample(1, STOP).finish == "stop"
    assert sample(1, 2, 3, STOP).finish == "stop"
    assert [sample(1).complete, sample(STOP).complete] == [False, True]


def test_a_stop_token_ends_a_sample_only_as_its_last_sampled_token() -> None:
    job = sample()
    job.tokens[0] = job.tokens[1] = job.tokens[2] = STOP
    assert job.finish is None, "it is in the prompt"
    assert sample(STOP, 1).finish is None


@pytest.mark.parametrize(("reserved", "more"), [(0, 4), (1, 3), (3, 1), (4, 4), (9, 3)])
def test_a_sample_grows_to_the_end_of_a_page(reserved: int, more: int) -> None:
    job = sample()
    job.placement = Placement(1, 2, reserved=reserved)
    assert job.growth(4) == more


def test_a_prefill_draws_one_token() -> None:
    job = sample()
    job.prefilled()
    assert job.drawn == 1


def test_a_sample_that_starts_over_draws_its_unread_tokens_again() -> None:
    job = sample(1, 2, drawn=4, seen="tokens")
    job.start_over()
    assert (job.generation, job.drawn, job.seen) == (1, 2, None)
    assert job.tokens == [*PROMPT, 1, 2]


# -- beams --------------------------------------------------------------------------------------


def test_a_beam_is_never_complete_and_grows_token_by_token() -> None:
    asked = request(jobs=[], reports={})
    job = BeamJob(request=asked, tokens=[*PROMPT, STOP], max_stored=9, limit=1)
    assert (job.complete, job.growth(4), job.greedy) == (False, 1, False)
    assert job.finish == "stop"


def test_a_beam_that_starts_over_forgets_its_report() -> None:
    asked = request(jobs=[], reports={})
    job, other = (BeamJob(request=asked, tokens=[*PROMPT], max_stored=9) for _ in range(2))
    asked.jobs = [other]
    asked.reports = {job: 1, other: 2}
    job.start_over()
    job.start_over()
    assert (job.generation, asked.reports) == (2, {other: 2})
    assert list(job.siblings) == [other, job], "and itself, even before the search lists it"


# -- contexts -----------------------------------------------------------------------------------


def test_the_logits_of_a_whole_context_score_continuations_of_one_token() -> None:
    single, several = scoring((1,), (2,)), scoring((1,), (2, 3))
    assert (single.single, several.single) == (True, False)
    assert (single.prefill_tokens, several.prefill_tokens) == (3, 2)
    assert (single.rows_for_forks, several.rows_for_forks) == (0, 1)
    for job in (single, several):
        job.prefilled()
    assert (single.pending, several.pending) == ([], [0, 1])


def test_the_last_continuation_needs_no_row_of_its_own() -> None:
    job = scoring((1, 2), (3, 4), (5, 6))
    assert job.rows_for_forks == 2
    job.pending = [2]
    assert job.rows_for_forks == 0
    job.pending = []
    assert job.rows_for_forks == 0


def test_what_remains_of_a_context_is_its_own_tokens_and_its_continuations() -> None:
    job = scoring((1, 2), (3,))
    assert job.remaining == 3 + 3
    job.placement = Placement(1, 2, stored=2)
    assert job.remaining == 1 + 3
    job.pending = [1]
    assert job.remaining == 1 + 1
    job.pending, job.placed.stored = [], 3
    assert job.remaining == 0


def test_a_context_is_complete_when_every_continuation_has_a_score() -> None:
    job = scoring((1, 2), (3,))
    job.request.scores[1] = "score"  # type: ignore[call-overload]
    assert (job.complete, job.unscored()) == (False, [0])
    job.request.scores[0] = "score"  # type: ignore[call-overload]
    assert (job.complete, job.unscored()) == (True, [])


def test_a_context_that_starts_over_scores_again_what_has_no_score() -> None:
    job = scoring((1, 2), (3,), (4,))
    job.request.scores[1] = "score"  # type: ignore[call-overload]
    job.pending, job.partial = [2], {0: [(-1.0, True)]}
    job.start_over()
    assert (job.generation, job.pending, job.partial) == (1, [0, 2], {})
