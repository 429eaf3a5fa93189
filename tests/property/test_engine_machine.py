"""The engine under any order of requests: every answer equals that of the request alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from granite_paged.engine.request import Output, SamplingParams
from granite_paged.errors import BrokenInvariant
from granite_paged.geometry import PagedConfig
from granite_paged.runner.runner import Runner
from tests.helpers.engine_harness import EngineHarness, Interrupted, random_walk
from tests.helpers.simulated_runner import HashOracle, ModelOracle, SimulatedRunner
from tests.helpers.tiny_models import tiny_model

DEEP_STEPS = int(os.environ.get("GRANITE_PAGED_DEEP_STEPS", "6000"))
"""Steps of the random walk; `nox -s property` asks for a million."""


@functools.cache
def model_oracle() -> ModelOracle:
    """Return an oracle of transformers' SDPA in float32, which caches its answers."""
    return ModelOracle(tiny_model())


# few different prompts, so that they share prefixes and the oracle's cache is used
TOKENS = st.integers(3, 6)
PROMPTS = st.builds(
    lambda stem, tail: [7 + i % 5 for i in range(stem)] + tail,
    st.sampled_from([0, 4, 8, 9, 16, 20]),
    st.lists(TOKENS, min_size=1, max_size=3),
)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    stop_tokens=st.sampled_from([(), (11, 29, 30, 31, 32, 60)]),
    n=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 1),
    priority=st.integers(-1, 1),
)


class EngineMachine(RuleBasedStateMachine):
    """Requests are submitted, stepped, forked, cancelled and preempted, with checks."""

    @initialize(
        pages=st.integers(11, 24),
        rows=st.integers(1, 5),
        chunk_tokens=st.sampled_from([16, 32]),
        preemption=st.sampled_from(["recompute", "swap"]),
        state_bytes=st.sampled_from([0, 250, 10_000]),
    )
    def start(self, preemption: str, state_bytes: int, **sizes: int) -> None:
        options = {"preemption": preemption, "state_bytes": state_bytes}
        self.broken: list[BrokenInvariant] = []
        self.harness = EngineHarness(model_oracle(), options, self.runner(**sizes))

    def runner(self, **sizes: int) -> Any:
        return SimulatedRunner(model_oracle(), **sizes)

    @rule(prompt=PROMPTS, params=PARAMS)
    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        self.harness.submit(prompt, params)

    @rule(
        context=PROMPTS,
        continuations=st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=3),
    )
    def score(self, context: list[int], continuations: list[list[int]]) -> None:
        self.harness.score(context, continuations)

    @rule(prompt=PROMPTS, new=st.integers(1, 5), beams=st.integers(1, 3))
    def search(self, prompt: list[int], new: int, beams: int) -> None:
        params = SamplingParams(max_new_tokens=new, stop_tokens=(11, 29, 60))
        self.harness.search(prompt, params, beams)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        at=st.integers(1, 4),
        does=st.sampled_from(["raise", "interrupt", "step", "cancel", "submit"]),
    )
    def submit_with_callback(
        self, prompt: list[int], params: SamplingParams, at: int, does: str
    ) -> None:
        def on_token(output: Output, token: int, text: str) -> None:
            if len(output.tokens) == at:
                event(f"callback: {does}")
                self.call_back(does)

        self.harness.submit(prompt, params, on_token)

    def call_back(self, does: str) -> None:
        engine = self.harness.engine
        try:
            engine.check_valid()
        except BrokenInvariant as error:
            self.broken.append(error)
        if does == "raise":
            raise ValueError("in a callback")
        if does == "interrupt":
            raise Interrupted
        if does == "step":
            engine.step()  # refused by name
        if does == "cancel":
            engine.cancel(self.harness.open[0])
        if does == "submit":
            self.harness.submit([5, 6], SamplingParams(max_new_tokens=2, stop_tokens=()))

    @rule(pick=st.integers(0, 7), call=st.sampled_from(["decode", "prefill", "write_pages"]))
    def cancel_in_the_middle_of_a_step(self, pick: int, call: str) -> None:
        """The garbage collector may close an abandoned stream anywhere."""
        runner, asked = self.harness.runner, self.harness.open
        if not asked or not hasattr(runner, "fault"):
            return
        request = asked[pick % len(asked)]

        def cancel_once(made: str, rows: Sequence[int]) -> None:
            if made == call:
                runner.fault = lambda made, rows: None
                event("cancel in a step")
                self.harness.engine.cancel(request)

        runner.fault = cancel_once

    @rule(pick=st.integers(0, 7))
    def cancel(self, pick: int) -> None:
        self.harness.cancel(pick)

    @rule()
    def evict(self) -> None:
        self.harness.evict()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()
            assert not self.broken


class LiveMachine(EngineMachine):
    """The same on the tiny model itself, with real pages, states and attention."""

    def runner(self, *, pages: int, rows: int, chunk_tokens: int) -> Any:
        sizes = PagedConfig(
            page_size=4, max_tokens=4 * pages, max_sequences=rows, chunk_tokens=chunk_tokens
        )
        return Runner.for_model(tiny_model(), sizes)


EXAMPLES = settings().max_examples
TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=EXAMPLES // 2, stateful_step_count=25)
TestLiveMachine = LiveMachine.TestCase
TestLiveMachine.settings = settings(max_examples=EXAMPLES // 4, stateful_step_count=20)

WALKS: dict[str, tuple[dict[str, Any], dict[str, int | bool]]] = {
    "roomy": ({}, {}),
    "swap": ({"preemption": "swap"}, {"pages": 16, "rows": 3}),
    "tight": (
        {"preemption": "swap", "swap_bytes": 150, "state_bytes": 250},
        {"pages": 14, "rows": 5},
    ),
    "dense": ({}, {"stateful": False, "alignment": 1, "pages": 16, "rows": 6}),
    "no cache": ({"state_bytes": 0, "queue": 4}, {"pages": 14, "rows": 2}),
    "one row": ({}, {"pages": 20, "rows": 1}),
}

EXPECTED = {
    "roomy": {"hits", "forked", "finish stop", "finish length", "finish cancelled", "scored"},
    "swap": {"preempted", "swapped", "hits"},
    "tight": {"preempted", "swapped", "hits"},
    "dense": {"preempted", "hits"},
    "no cache": {"preempted", "QueueFull", "scored"},
    "one row": {"hits", "scored"},
}


@pytest.mark.parametrize("kind", WALKS)
def test_a_long_random_walk_gives_right_answers_and_no_leaks(kind: str) -> None:
    options, sizes = WALKS[kind]
    harness = EngineHarness(HashOracle(), options, **sizes)

    random_walk(harness, DEEP_STEPS // len(WALKS), seed=len(kind))

    met = {what for what, times in harness.met.items() if times}
    assert met >= EXPECTED[kind], f"the walk never met {EXPECTED[kind] - met}"
