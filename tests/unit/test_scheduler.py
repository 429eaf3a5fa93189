"""The scheduler: order, budgets, preemption, sharing, and the cost of a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from granite_paged.engine import rank
from granite_paged.engine.job import State
from granite_paged.engine.request import Request, SamplingParams
from granite_paged.errors import QueueFull, RequestTooLarge
from granite_paged.runner.shapes import Shapes
from tests.helpers.engine_harness import EngineHarness
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner

STEP_SECONDS = 0.15e-3
"""Limit on the scheduler's time for a decode step of 256 sequences, as it is on the host of a GPU.
Elsewhere it grows in proportion where Python is slower than `ADDING_SECONDS`, since shared
processors change their speed from minute to minute."""

ADDING_SECONDS = 34e-6
"""Time in which a processor that keeps the limit, an AMD EPYC with Python 3.11, adds a thousand
numbers at its fastest."""

ROUNDS, STEPS = 40, 8
"""Most rounds of measurements, and steps per round. Other processes only add time, so one round
within the limit shows what a step costs; a short one finds a quiet moment."""


def make_harness(options: dict[str, Any] | None = None, **sizes: Any) -> EngineHarness:
    return EngineHarness(HashOracle(), options, **sizes)


def ask(harness: EngineHarness, prompt: Sequence[int], new: int = 4, **params: Any) -> Request:
    request = harness.submit(prompt, SamplingParams(max_new_tokens=new, **params))
    assert request is not None
    return request


def states(*requests: Request) -> list[State]:
    return [request.jobs[0].state for request in requests]


def tokens_of(request: Request) -> int:
    return len(request.outputs[0].tokens)


# -- order --------------------------------------------------------------------------------------


def test_requests_are_admitted_in_order_of_arrival() -> None:
    harness = make_harness(rows=2)
    asked = [ask(harness, [n + 1]) for n in range(3)]
    harness.step()
    assert states(*asked) == [State.DECODE, State.DECODE, State.WAITING]


def test_higher_priority_is_admitted_first() -> None:
    harness = make_harness(rows=1)
    low, high = ask(harness, [1]), ask(harness, [2], priority=1)
    harness.step()
    assert states(low, high) == [State.WAITING, State.DECODE]


def test_low_priority_is_not_starved_by_higher_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank, "PRIORITY_WORTH", 8)
    harness = make_harness(rows=1)
    low = ask(harness, [1], new=2)
    for number in range(40):
        ask(harness, [2 + number], new=1, priority=1)
        harness.step()
    assert low.finished


def test_a_long_prompt_never_stalls_a_running_request() -> None:
    harness = make_harness(pages=80, chunk_tokens=16)
    running = ask(harness, [1], new=20, streamed=True)
    harness.step()
    long = ask(harness, list(range(90)) * 2, new=1)
    for step in range(8):
        harness.step()
        assert tokens_of(running) == step + 1, "a step did not decode the running request"
    assert states(long) == [State.PREFILL]


def test_a_step_keeps_to_its_token_budget() -> None:
    harness = make_harness({"step_tokens": 16}, pages=200, rows=8, chunk_tokens=64)
    for number in range(8):
        ask(harness, [number] * 30)
    before = 0
    while harness.step():
        assert harness.runner.computed - before <= 16 + 8, (
            "a step computed more than its chunk and its decodes"
        )
        before = harness.runner.computed


@pytest.mark.parametrize(("time", "most"), [(0, 8), (470, 16), (500, 32), (520, 64)])
def test_prefill_chunks_are_limited_while_rows_decode(time: float, most: int) -> None:
    """The limit is a power of two of tokens, at least 8. A prefill call costs as much as 450 more
    tokens than it has."""
    rows = 3
    longest = 1 + time / Shapes(64, rows, captured=False).decode_cost(rows)
    harness = make_harness({"longest_step": longest}, pages=200, rows=8, chunk_tokens=64)
    for number in range(rows):
        ask(harness, [number], new=40, streamed=True)
    harness.step()
    assert harness.runner.computed == rows, "no row decodes yet, so every prompt is computed"
    ask(harness, list(range(90)) * 2, new=1)
    largest = 0
    for _ in range(3):
        before = harness.runner.computed
        harness.step()
        largest = max(largest, harness.runner.computed - before - rows)
    assert largest == most


@pytest.mark.parametrize("streams", ["none", "a callback", "by request", "a waiting one"])
def test_prompts_wait_only_for_streamed_requests(streams: str) -> None:
    harness = make_harness(pages=200, rows=2, chunk_tokens=64)
    asked = SamplingParams(max_new_tokens=40, streamed=streams == "by request")
    on_token = (lambda *_: None) if streams == "a callback" else None
    harness.submit([1], asked, on_token)
    harness.step()
    long = ask(harness, list(range(90)) * 2, new=40)
    if streams == "a waiting one":  # both rows are taken
        ask(harness, [2], streamed=True)
    harness.step()
    whole = streams in ("none", "a waiting one")
    assert long.jobs[0].stored == (180 if whole else 8)


def test_dense_prompts_are_not_split_into_tiny_chunks() -> None:
    harness = make_harness(pages=200, rows=8, chunk_tokens=64, stateful=False, alignment=1)
    ask(harness, [1], new=40, streamed=True)
    harness.step()
    long = ask(harness, list(range(90)) * 2, new=1)
    harness.step()
    assert long.jobs[0].stored == 64


def test_a_second_prompt_waits_instead_of_being_split() -> None:
    harness = make_harness({"longest_step": 3.0}, pages=200, rows=8, chunk_tokens=64)
    for number in range(3):
        ask(harness, [number], new=40, streamed=True)
    harness.step()
    first, second = ask(harness, [1] * 20, new=9), ask(harness, [2] * 60, new=9)
    harness.step()
    assert states(first, second) == [State.DECODE, State.PREFILL]
    assert second.jobs[0].stored == 0
    harness.step()
    assert states(second) == [State.DECODE], "the prompt is computed in one chunk"


# -- pages --------------------------------------------------------------------------------------


def test_preemption_takes_the_newest_and_loses_no_token() -> None:
    harness = make_harness(pages=9, rows=2)
    old, new = ask(harness, [1] * 8, new=16), ask(harness, [2] * 8, new=16)
    while not harness.engine.stats().preempted:
        harness.step()
    assert states(old, new) == [State.DECODE, State.WAITING]
    kept = tokens_of(new)
    harness.drain()
    assert kept > 0
    assert (tokens_of(old), tokens_of(new)) == (16, 16)


def test_swapping_avoids_recomputation() -> None:
    computed = {}
    for preemption in ("recompute", "swap"):
        harness = make_harness({"preemption": preemption, "state_bytes": 0}, pages=9, rows=2)
        ask(harness, [1] * 8, new=16)
        ask(harness, [2] * 8, new=16)
        harness.drain()
        assert harness.met["preempted"]
        computed[preemption] = harness.runner.computed
    assert computed["swap"] == 2 * (8 + 15)
    assert computed["recompute"] > computed["swap"]


def test_pages_beyond_swap_bytes_are_recomputed() -> None:
    harness = make_harness({"preemption": "swap", "swap_bytes": 10}, pages=9, rows=2)
    ask(harness, [1] * 8, new=16)
    ask(harness, [2] * 8, new=16)
    harness.drain()
    assert harness.met["preempted"]
    assert not harness.met["swapped"]


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    harness = make_harness(pages=9, page_size=4)
    with pytest.raises(RequestTooLarge, match="9 needed, 8 free") as refusal:
        harness.engine.submit([1] * 8, SamplingParams(max_new_tokens=26))
    assert (refusal.value.needed, refusal.value.free) == (9, 8)
    fits = ask(harness, [1] * 8, new=25)
    harness.drain()
    assert tokens_of(fits) == 25


def test_a_full_queue_refuses_all_samples_of_a_request() -> None:
    harness = make_harness({"queue": 3})
    for number in range(2):
        ask(harness, [number + 1])
    with pytest.raises(QueueFull, match="2 sequences are waiting, the limit is 3"):
        harness.engine.submit([5], SamplingParams(n=2))
    assert harness.engine.stats().waiting == 2


# -- sharing ------------------------------------------------------------------------------------


def test_samples_share_one_prefill() -> None:
    harness = make_harness({"state_bytes": 0}, rows=4)
    ask(harness, [7] * 11, new=2, n=4, temperature=1.0)
    harness.drain()
    assert harness.runner.computed == 11 + 4 * 1
    assert harness.runner.forked == 3


def test_samples_wait_for_free_rows() -> None:
    harness = make_harness(rows=2)
    request = ask(harness, [7] * 11, new=3, n=5, temperature=1.0)
    harness.drain()
    assert all(output.finish == "length" for output in request.outputs)
    assert harness.engine.stats().restarted == 0


def test_continuations_share_one_prefill_of_the_context() -> None:
    harness = make_harness({"state_bytes": 0}, rows=3)
    harness.score([7] * 13, [[1, 2], [3], [4, 5, 6], [8]])
    harness.drain()
    assert harness.runner.computed == 12 + (2 + 1 + 3 + 1)
    assert harness.runner.forked == 3, "the last continuation takes the context's own row"


def test_contexts_leave_rows_for_continuations() -> None:
    """Eight contexts in eight rows would leave none to fork, and score one choice per step."""
    harness = make_harness({"state_bytes": 0}, rows=8, pages=200, chunk_tokens=64)
    for number in range(8):
        harness.score([number] * 13, [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
    harness.step()
    assert harness.engine.stats().running == 4, "at most half of all rows are reserved for forks"
    steps = 1
    while harness.step():
        steps += 1
    assert harness.met["scored"] == 8 * 5
    assert steps <= 14


def test_one_token_continuations_need_no_extra_step() -> None:
    harness = make_harness({"state_bytes": 0}, rows=1)
    harness.score([7] * 13, [[1], [3], [8], [9]])
    harness.drain()
    assert harness.met["scored"] == 4
    assert harness.runner.computed == 13
    assert harness.runner.forked == 0


def test_a_burst_computes_its_common_prefix_once() -> None:
    harness = make_harness(pages=200, rows=8, chunk_tokens=64)
    beginning = list(range(24))
    for number in range(8):
        ask(harness, [*beginning, 50 + number], new=1)
    harness.drain()
    assert harness.runner.computed == 24 + 8
    assert harness.runner.calls["save_row"] == 1


def test_room_is_made_before_a_state_is_copied() -> None:
    harness = make_harness({"state_bytes": 200}, pages=200, chunk_tokens=64)
    held = []
    harness.runner.fault = lambda call, rows: (
        held.append(harness.engine.stats().state_bytes) if call == "save_row" else None
    )
    for subject in range(4):
        for number in range(3):
            harness.score([*range(20 * subject, 20 * subject + 16), *[number] * 9], [[5]])
            while harness.step():
                pass
    assert len(held) == 4
    assert max(held) <= 100, "at most two states may exist, including the one being copied"
    assert harness.engine.stats().state_bytes == 200


def test_a_long_continuation_is_scored_in_chunks() -> None:
    harness = make_harness(pages=64, chunk_tokens=8)
    harness.score([1, 2, 3], [list(range(30)), [5]])
    harness.drain()
    assert harness.met["scored"] == 2
    assert harness.runner.calls["score"] >= 5


def test_a_context_scores_one_token_per_step_next_to_a_prompt_that_takes_the_budget() -> None:
    options = {"step_tokens": 8, "state_bytes": 0}
    harness = make_harness(options, rows=8, pages=200, chunk_tokens=8)
    harness.score([1, 2, 3], [[4], [5], [6], [7, 8]])
    ask(harness, range(10, 90), new=1)
    for calls in (0, 1, 2, 3):
        harness.step()
        assert harness.runner.calls["score"] == harness.runner.forked == calls, "one per step"
    harness.drain()
    assert harness.met["scored"] == 4


@pytest.mark.parametrize(("count", "length"), [(100, 2), (400, 2), (100, 60)])
def test_a_context_with_many_continuations_lets_a_later_prompt_in_at_once(
    count: int, length: int
) -> None:
    harness = make_harness({"state_bytes": 0}, pages=400, rows=8, chunk_tokens=64)
    harness.score([5, 6, 7, 8], [[3 + n % 90, n // 90] * (length // 2) for n in range(count)])
    for _ in range(3):
        harness.step()
    later = [ask(harness, [9, 10, n], new=2) for n in range(3)]
    for _ in range(3):
        harness.step()
    assert all(tokens_of(request) for request in later)
    harness.drain()
    assert harness.met["scored"] == count


def test_later_prompts_leave_half_the_rows_to_a_context_with_many_continuations() -> None:
    harness = make_harness({"state_bytes": 0}, pages=400, rows=8, chunk_tokens=64)
    harness.score([5, 6, 7, 8], [[n, n + 1] for n in range(90)])
    for _ in range(3):
        harness.step()
    for number in range(30):
        ask(harness, [9, 10, number], new=40)
    steps = 0
    while not harness.met["scored"]:
        harness.step()
        steps += 1
    assert steps <= 90 / (8 // 2) + 3


# -- cost ---------------------------------------------------------------------------------------


class Instant(SimulatedRunner):
    """Computes nothing."""

    def prefill(self, chunks: Sequence[Any]) -> Any:
        return self.oracle.logits((1,)).expand(len(chunks), -1)

    def decode(self, rows: Sequence[int], positions: Sequence[int]) -> Any:
        return self.oracle.logits((1,)).expand(len(rows), -1)


def adding_seconds() -> float:
    """Return the time to add a thousand numbers."""
    start, total = time.thread_time(), 0
    for number in range(1000):
        total += number
    return time.thread_time() - start


def test_scheduling_256_sequences_is_fast() -> None:
    runner = Instant(HashOracle(), pages=20_000, page_size=128, rows=256, chunk_tokens=2048)
    engine = EngineHarness(runner.oracle, runner=runner).engine
    for number in range(512):
        engine.submit([number % 90] * 32, SamplingParams(max_new_tokens=1000))
    while engine.stats().running < 256:
        engine.step()

    def seconds() -> float:
        start = time.thread_time()
        engine.inspect().scheduler.schedule()
        spent = time.thread_time() - start
        engine.step()
        return spent

    for _ in range(ROUNDS):
        times = [(seconds(), adding_seconds()) for _ in range(STEPS)]
        spent, adding = (sorted(each)[STEPS // 4] for each in zip(*times, strict=True))
        slower = 1.0 if torch.cuda.is_available() else max(1.0, adding / ADDING_SECONDS)
        limit = STEP_SECONDS * slower
        if spent < limit:
            break
    assert engine.stats().running == 256
    assert spent < limit
