"""A step's budget of tokens: how decodes, continuations and prompts share it, by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from granite_paged.engine.job import ScoringJob, State
from granite_paged.engine.request import Request, SamplingParams
from granite_paged.engine.step import ScoreChunk, StepPlan
from granite_paged.errors import StepFailed
from granite_paged.runner.shapes import Shapes
from tests.helpers.engine_harness import EngineHarness
from tests.helpers.simulated_runner import HashOracle

ALIGNMENT = 8
"""Tokens that every chunk but the last of a prompt is a multiple of."""


class Planned(EngineHarness):
    """An engine without a prefix cache of states, which keeps the plan of every step."""

    def __init__(self, step_tokens: int, options: Any = None, **sizes: Any) -> None:
        options = {"step_tokens": step_tokens, "state_bytes": 0, **(options or {})}
        sizes = {"pages": 400, "rows": 8, "chunk_tokens": 64, "alignment": ALIGNMENT, **sizes}
        super().__init__(HashOracle(), options, **sizes)
        self.plans: list[StepPlan] = []
        scheduler = self.engine.inspect().scheduler
        schedule = scheduler.schedule

        def kept() -> StepPlan:
            self.plans.append(schedule())
            return self.plans[-1]

        scheduler.schedule = kept  # type: ignore[method-assign]

    def ask(self, prompt: Sequence[int], new: int = 2, **params: Any) -> Request:
        request = self.submit(prompt, SamplingParams(max_new_tokens=new, **params))
        assert request is not None
        return request

    def scoring(self, *lengths: int, first: int) -> None:
        """Submit a context of 4 tokens, with continuations of these lengths, and compute it."""
        self.score([first] * 4, [[n % 90] * length for n, length in enumerate(lengths)])

    def scored(self) -> list[tuple[int, int]]:
        """Return (first token of the context, tokens) of each continuation of the last step."""
        found: dict[tuple[int, int], int] = {}
        for chunk in self.plans[-1].score_chunks:
            found[chunk.job.tokens[0], chunk.number] = chunk.end
        return [(context, tokens) for (context, _), tokens in found.items()]

    def spent(self) -> int:
        """Return the number of tokens that the last step computes."""
        plan = self.plans[-1]
        scores = sum(chunk.end - chunk.start for chunk in plan.score_chunks)
        prompts = sum(chunk.end - chunk.start for call in plan.prefills for chunk in call)
        return sum(map(len, plan.decodes)) + scores + prompts


def states(*requests: Request) -> list[State]:
    return [request.jobs[0].state for request in requests]


def test_jobs_that_cannot_grow_start_over_and_preempt_no_other() -> None:
    harness = Planned(64)
    asked = [harness.ask([number] * 4, new=12) for number in range(2)]
    harness.step()
    failures = ["no memory"]

    def fault(call: str, rows: Sequence[int]) -> None:
        if call == "write_pages" and failures:
            raise RuntimeError(failures.pop())

    harness.runner.fault = fault
    harness.drain()
    stats = harness.engine.stats()
    assert (stats.restarted, stats.preempted) == (2, 0)
    assert [len(request.outputs[0].tokens) for request in asked] == [12, 12]


# -- continuations ------------------------------------------------------------------------------


def test_continuations_and_prompts_share_one_budget() -> None:
    harness = Planned(40)
    harness.scoring(*[6] * 60, first=5)
    harness.step()
    for number in range(2):
        harness.ask([number] * 80)
    while harness.step():
        assert harness.spent() <= 40, "tokens of a step"


def test_contexts_share_one_budget_and_the_first_comes_first() -> None:
    harness = Planned(30)
    for first in (5, 6):
        harness.scoring(*[6] * 12, first=first)
    harness.step()
    harness.step()
    assert harness.scored() == [(5, 6)] * 5
    harness.drain()


def test_the_last_token_of_a_budget_is_used() -> None:
    harness = Planned(31)
    harness.scoring(*[6] * 12, first=5)
    harness.scoring(1, 2, 3, first=6)
    harness.step()
    harness.step()
    assert harness.scored() == [(5, 6)] * 5 + [(6, 1)]
    harness.drain()


def test_a_continuation_in_several_chunks_costs_all_its_tokens() -> None:
    harness = Planned(20, chunk_tokens=8)
    harness.scoring(20, 20, first=5)
    harness.scoring(2, 3, first=6)
    harness.step()
    harness.step()
    assert harness.scored() == [(5, 20)]
    harness.drain()


def test_continuations_leave_one_chunk_to_a_waiting_prompt() -> None:
    harness = Planned(40)
    harness.scoring(*[8] * 90, first=5)
    harness.step()
    harness.step()
    assert harness.scored() == [(5, 8)] * 5
    harness.ask([9] * 4)
    harness.step()
    assert harness.scored() == [(5, 8)] * 4, "32 tokens, and 8 for the prompt"
    harness.drain()


def test_prompts_that_rank_first_take_their_tokens_first() -> None:
    harness = Planned(40)
    harness.scoring(*[6] * 60, first=5)
    harness.scoring(*[6] * 60, first=6)
    harness.step()
    harness.ask([9] * 44, priority=1)
    harness.step()
    assert harness.scored() == [(5, 6)], "one of the first context, whatever comes first"
    assert harness.spent() == 6 + 32
    harness.step()
    assert harness.scored() == [(5, 6)] * 3 + [(6, 6)], "the prompt has 12 left: 20 of 32 remain"
    harness.drain()


def test_a_call_scores_as_many_continuations_as_it_takes() -> None:
    harness = Planned(64, chunk_tokens=16)
    harness.scoring(*[4] * 7, 2, first=5)
    harness.step()
    harness.step()
    calls = [[chunk.end for chunk in call] for call in harness.plans[-1].scores]
    assert calls == [[4] * 4, [4] * 3 + [2]]
    harness.drain()


def test_a_long_continuation_has_calls_of_its_own() -> None:
    harness = Planned(64, chunk_tokens=8)
    harness.scoring(2, 20, 2, first=5)
    harness.step()
    harness.step()
    calls = [[(c.number, c.start, c.end) for c in call] for call in harness.plans[-1].scores]
    assert calls == [[(1, 0, 8)], [(1, 8, 16)], [(1, 16, 20)], [(0, 0, 2), (2, 0, 2)]]
    assert [c.forked for call in harness.plans[-1].scores for c in call] == [True] * 4 + [False]
    harness.drain()


def test_continuations_leave_a_row_to_each_waiting_job() -> None:
    """7 of 8 rows are free. Each waiting job gets one, but 4 rows, half of all, stay for forks."""
    harness = Planned(400)
    harness.scoring(*[2] * 90, first=5)
    harness.step()
    harness.step()
    assert len(harness.scored()) == 7
    for waiting, forks in ((1, 6), (2, 5), (3, 4), (6, 4)):
        for number in range(waiting):
            harness.ask([number, 9], new=1)
        harness.step()
        assert len(harness.scored()) == forks
        harness.step()
    harness.drain()


def test_the_tokens_of_a_context_that_failed_go_to_the_next() -> None:
    """All of the budget is kept for a waiting prompt, but for one token."""
    harness = Planned(ALIGNMENT)
    harness.scoring(2, 2, first=5)
    harness.scoring(2, 2, 2, first=6)
    while len(harness.engine.inspect().scheduler.running.scoring) < 2:
        harness.step()
    harness.ask([9] * 4)
    harness.allowed = (StepFailed,)
    planner = harness.engine.inspect().scheduler._scores
    plan = planner.plan

    def fails_once(job: ScoringJob, budget: int) -> list[list[ScoreChunk]]:
        planner.plan = plan  # type: ignore[method-assign]
        raise RuntimeError("a fault")

    planner.plan = fails_once  # type: ignore[method-assign]
    harness.step()
    assert harness.scored() == [(6, 2)]
    harness.drain()


def test_the_first_context_that_found_no_pages_preempts_for_the_next_step() -> None:
    """It has a continuation of 3 pages. The context after it has one page, the sample has the rest.

    In a step, it preempts contexts and prompts alone: others have a token planned already.
    """
    harness = Planned(200, rows=4, pages=9)
    harness.score([5] * 5, [[1] * 12])
    decodes = harness.ask([7] * 18, new=6)
    harness.score([6] * 5, [[2] * 2])
    harness.step()
    harness.step()
    assert (states(decodes), harness.scored()) == ([State.DECODE], [])
    harness.step()
    assert (states(decodes), harness.scored()) == ([State.WAITING], [(5, 12)])
    harness.drain()


# -- prompts ------------------------------------------------------------------------------------


def test_a_prompt_of_one_token_takes_the_last_token_of_a_budget() -> None:
    harness = Planned(9, chunk_tokens=8)
    first, second = harness.ask([1] * 8), harness.ask([2])
    harness.step()
    assert states(first, second) == [State.DECODE, State.DECODE]
    harness.drain()


def test_no_prompt_comes_in_once_the_budget_is_spent() -> None:
    harness = Planned(8)
    first, second = harness.ask([1] * 8), harness.ask([2] * 8)
    harness.step()
    assert states(first, second) == [State.DECODE, State.WAITING]
    harness.drain()


def test_only_what_is_left_of_running_prompts_keeps_others_out() -> None:
    harness = Planned(32)
    first, second = harness.ask([1] * 44), harness.ask([2] * 8)
    harness.step()
    assert states(first, second) == [State.PREFILL, State.WAITING]
    harness.step()
    assert states(first, second) == [State.DECODE, State.DECODE]
    harness.drain()


def test_a_shorter_prompt_does_not_overtake_one_that_fits_no_more_into_a_call() -> None:
    harness = Planned(64, chunk_tokens=16)
    asked = [harness.ask([number] * length) for number, length in enumerate((8, 16, 8))]
    harness.step()
    calls = [[chunk.job.tokens[0] for chunk in call] for call in harness.plans[-1].prefills]
    assert calls == [[0], [1], [2]]
    assert states(*asked) == [State.DECODE] * 3
    harness.drain()


def test_a_job_that_waits_for_a_prefix_keeps_no_other_out() -> None:
    harness = Planned(64, {"state_bytes": 10**6})
    first, same, other = (
        harness.ask(prompt) for prompt in ([*range(24), 90], [*range(24), 91], [50] * 8)
    )
    harness.step()
    assert states(first, same, other) == [State.DECODE, State.WAITING, State.DECODE]
    harness.drain()


def test_a_prompt_that_starts_from_a_prefix_spends_what_is_left_of_it() -> None:
    harness = Planned(20, {"state_bytes": 10**6}, stateful=False, chunk_tokens=16)
    harness.ask([*range(24)])
    while harness.step():
        pass
    same, other = harness.ask([*range(24)]), harness.ask([50] * 8)
    harness.step()
    assert states(same, other) == [State.DECODE, State.DECODE], "8 tokens each"
    harness.drain()


@pytest.mark.parametrize("dropped", [False, True])
def test_a_prompt_that_began_before_the_prefixes_were_dropped_is_not_kept(dropped: bool) -> None:
    """They are dropped when weights change, and its first pages are of the old ones."""
    harness = Planned(8, {"state_bytes": 10**6}, chunk_tokens=8, stateful=False)
    for _ in range(2):
        harness.ask([*range(24)], new=1)
        harness.step()
        if dropped:
            harness.evict()
        while harness.step():  # `drain` would drop the prefixes
            pass
    assert harness.engine.stats().prefix_hits == (0 if dropped else 1)
    harness.drain()


def test_a_short_prompt_does_not_overtake_one_that_has_no_room_for_a_chunk() -> None:
    """A step takes 12 tokens. After a chunk of 8, the next prompt, whose chunks have 8 tokens too,
    does not fit, and the short one behind it must wait."""
    harness = Planned(12)
    harness.ask([1] * 11)
    last = harness.ask([2] * 3)
    harness.step()
    assert states(last) == [State.PREFILL]
    for length in (8, 30):
        harness.ask([length] * length, priority=1)
    harness.step()
    calls = [[chunk.job.tokens[0] for chunk in call] for call in harness.plans[-1].prefills]
    assert calls == [[8]]
    harness.drain()


def test_a_chunk_that_is_cut_for_streams_is_whole_alignments() -> None:
    """There is time for 32 tokens. A chunk of 96 is halved until it fits: to 48, then to 24."""
    time = Shapes(96, 2, captured=False).prefill_cost([32])
    longest = 1 + time / Shapes(96, 2, captured=False).decode_cost(1)
    harness = Planned(200, {"longest_step": longest}, chunk_tokens=96, alignment=24, rows=2)
    harness.ask([1], new=20, streamed=True)
    harness.step()
    harness.ask([2] * 180)
    harness.step()
    ((chunk,),) = harness.plans[-1].prefills
    assert (chunk.start, chunk.end) == (0, 24)
    harness.drain()


def test_every_step_is_counted_once() -> None:
    harness = Planned(8)
    harness.ask([1] * 8, new=4)
    harness.drain()
    assert harness.engine.stats().steps == len(harness.plans) >= 4


def test_a_context_whose_prefix_is_cached_comes_in_with_nothing_to_compute() -> None:
    harness = Planned(64, {"state_bytes": 10**6}, stateful=False)
    harness.ask([*range(17)])
    while harness.step():
        pass
    assert [job for plan in harness.plans for job in plan.ready] == []
    harness.score([*range(17)], [[1, 2]])
    harness.step()
    (job,) = harness.plans[-1].ready
    assert job.stored == 16
    harness.drain()


def test_no_job_is_preempted_while_prompts_of_higher_rank_take_the_whole_budget() -> None:
    harness = Planned(17, rows=2)
    low = harness.ask([1], new=20)
    harness.step()
    harness.ask([2] * 32, priority=2)
    harness.step()
    middle = harness.ask([3] * 4, priority=1)
    harness.step()
    assert states(low, middle) == [State.DECODE, State.WAITING], "16 tokens are left, and for 16"
    harness.step()
    assert states(low, middle) == [State.WAITING, State.DECODE]
    harness.drain()


def test_a_prompt_does_not_come_before_itself() -> None:
    harness = Planned(16)
    first, second = harness.ask([1] * 40), harness.ask([2])
    harness.step()
    before = harness.engine.inspect().scheduler._prompts_before
    assert (before(first.jobs[0].rank), before(second.jobs[0].rank)) == (0, 24)
    harness.drain()
