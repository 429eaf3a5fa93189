"""Exact mode under any order of requests: every bit equals that of the request alone."""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from granite_paged.engine.request import SamplingParams
from granite_paged.geometry import PagedConfig
from tests.helpers.exact_bits import Alone, ExactHarness
from tests.helpers.tiny_models import shortest_model

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
DTYPES = (torch.float32, torch.float64)


@functools.cache
def model(dtype: torch.dtype) -> Any:
    return shortest_model().to(dtype)


@functools.cache
def alone(dtype: torch.dtype, exact: bool) -> Alone:
    return Alone(model(dtype), exact=exact)


# few different requests, so that they share prefixes, and answers alone are computed once
TOKENS = st.integers(3, 5)
PROMPTS = st.builds(
    lambda stem, tail: [7 + i % 5 for i in range(stem)] + tail,
    st.sampled_from([0, 4, 9, 16, 21]),
    st.lists(TOKENS, min_size=1, max_size=2),
)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.sampled_from([1, 5, 9]),
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop_tokens=st.just(()),
    n=st.sampled_from([1, 1, 3]),
    seed=st.integers(0, 1),
    logprobs=st.just(3),
    priority=st.integers(-1, 1),
)


class ExactMachine(RuleBasedStateMachine):
    """Requests are submitted, stepped, forked, preempted, cancelled and scored."""

    met: ClassVar[Counter[str]] = Counter()
    dtype: ClassVar[torch.dtype]
    exact: ClassVar[bool] = True

    @initialize(
        pages=st.integers(12, 20),
        page_size=st.sampled_from([4, 8]),
        rows=st.integers(2, 9),
        chunk_tokens=st.sampled_from([16, 32, 64]),
        preemption=st.sampled_from(["recompute", "swap"]),
        state_bytes=st.sampled_from([0, 100_000]),
    )
    def start(
        self,
        pages: int,
        page_size: int,
        rows: int,
        chunk_tokens: int,
        preemption: str,
        state_bytes: int,
    ) -> None:
        config = PagedConfig(
            page_size=page_size,
            max_tokens=page_size * pages,
            max_sequences=rows,
            chunk_tokens=chunk_tokens,
            exact=self.exact,
        )
        self.harness = ExactHarness(
            model(self.dtype),
            alone(self.dtype, self.exact),
            config,
            preemption=preemption,
            state_bytes=state_bytes,
        )

    @rule(prompt=PROMPTS, params=PARAMS)
    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        self.harness.submit(prompt, params)

    @rule(count=st.integers(2, 8), stem=st.sampled_from([0, 9, 21]))
    def submit_several(self, count: int, stem: int) -> None:
        """Several long answers at once, so that pages run out; the last ones rank first."""
        self.harness.search([*[7] * stem, 9], SamplingParams(max_new_tokens=3, stop_tokens=()), 3)
        for number in range(count):
            params = SamplingParams(
                max_new_tokens=9, stop_tokens=(), logprobs=3, priority=number // 2
            )
            self.harness.submit([*[7] * stem, 3 + number % 3, 5], params)
            self.harness.step()

    @rule(
        context=PROMPTS,
        continuations=st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=3),
    )
    def score(self, context: list[int], continuations: list[list[int]]) -> None:
        self.harness.score(context, continuations)

    @rule(prompt=PROMPTS, beams=st.integers(2, 3))
    def search(self, prompt: list[int], beams: int) -> None:
        params = SamplingParams(max_new_tokens=3, stop_tokens=(11, 29, 60))
        self.harness.search(prompt, params, beams)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @rule(pick=st.integers(0, 7))
    def cancel(self, pick: int) -> None:
        self.harness.cancel(pick)

    @rule()
    def evict(self) -> None:
        self.harness.evict()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            self.met.update(self.harness.met)


def walk(machine: ExactMachine, moves: int, chance: random.Random) -> None:
    """Call the machine's rules in random order, so that each profile reaches all of them."""
    pick = chance.choice
    machine.start(
        preemption=pick(["recompute", "swap"]), rows=pick([4, 9]), pages=pick([14, 20]),
        state_bytes=pick([0, 10**5, 10**5]), page_size=pick([4, 8]), chunk_tokens=pick([16, 64]),
    )  # fmt: skip

    def prompt() -> list[int]:
        return [7 + i % 5 for i in range(pick([0, 9, 16, 21]))] + [pick([3, 4, 5])]

    def params() -> SamplingParams:
        return SamplingParams(
            max_new_tokens=pick([5, 9]), temperature=pick([0.0, 1.0]), top_p=pick([1.0, 0.9]),
            n=pick([1, 3]), logprobs=3, stop_tokens=(), priority=pick([-1, 0, 1]),
        )  # fmt: skip

    rules: list[Callable[[], Any]] = [
        lambda: machine.submit(prompt=prompt(), params=params()),
        lambda: machine.submit_several(count=pick([4, 8]), stem=pick([0, 9, 21])),
        lambda: machine.score(context=prompt(), continuations=[[3, 4, pick([3, 5])], [5]]),
        lambda: machine.search(prompt=prompt(), beams=pick([2, 3])),
        lambda: machine.cancel(pick=pick(range(8))) if chance.random() < 0.5 else machine.evict(),
    ]
    for _ in range(moves):
        if chance.random() < 0.5 and len(machine.harness.open) < 12:
            pick(rules)()
        machine.step(steps=pick([1, 2, 3]))
    machine.teardown()


STATES = (
    *("decoded in company", "decoded in company of five", "prefilled in company"),
    *("prompts continued", "hits", "preempted by swap", "preempted by recompute", "resumed"),
    *("forks under pressure", "beams under pressure", "samples of one prompt", "answers"),
    *("searches", "scored", "evicted while in use"),
)
REQUIRED = {"default": 2, "wide": 8, "deep": 80}
"""How often a run of each profile reaches every state, at least."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_equals_that_of_the_request_alone(dtype: torch.dtype) -> None:
    class Machine(ExactMachine):
        met: ClassVar[Counter[str]] = Counter()

    Machine.dtype = dtype
    examples, before = settings().max_examples, alone(dtype, True).bits.compared
    runs = settings(max_examples=max(1, examples // 16), stateful_step_count=12)
    run_state_machine_as_test(Machine, settings=runs)
    for seed in range(max(1, examples // 8)):
        walk(Machine(), 24, random.Random(seed))
    missed = {what: Machine.met[what] for what in STATES if Machine.met[what] < REQUIRED[PROFILE]}
    assert not missed, f"the run did not reach {missed}"
    assert alone(dtype, True).bits.compared - before > 10 * examples


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_differ_without_exact_mode(dtype: torch.dtype) -> None:
    class Machine(ExactMachine):
        exact: ClassVar[bool] = False

    Machine.dtype = dtype
    with pytest.raises(AssertionError, match="bits"):
        walk(Machine(), 24, random.Random(1))
