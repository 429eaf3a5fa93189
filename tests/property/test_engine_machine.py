"""The engine under any order of requests: every answer equals that of the request alone."""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from granite_paged.engine.request import Output, Request, SamplingParams
from granite_paged.errors import BrokenInvariant, NonFiniteRequest, StepFailed, TokenizerFailed
from granite_paged.geometry import PagedConfig
from granite_paged.runner.runner import Runner
from tests.helpers.engine_harness import EngineHarness, Interrupted, random_walk
from tests.helpers.simulated_runner import HashOracle, ModelOracle, SimulatedRunner
from tests.helpers.tiny_models import shortest_model
from tests.helpers.words import Words

DEEP_STEPS = int(os.environ.get("GRANITE_PAGED_DEEP_STEPS", "6000"))
"""Steps of all random walks together; `nox -s property` asks for a million."""

SHARDS = int(os.environ.get("GRANITE_PAGED_SHARDS", "1"))
"""Parts of each walk and each machine, with seeds of their own, for as many processes."""

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")


@functools.cache
def model() -> Any:
    return shortest_model()


@functools.cache
def model_oracle() -> ModelOracle:
    """Return an oracle of transformers' SDPA in float32, which caches its answers."""
    return ModelOracle(model())


CALLBACKS = ("raise", "interrupt", "step", "cancel", "submit", "close")
"""What a callback does."""


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

    met: ClassVar[Counter[str]] = Counter()
    nan: ClassVar[int] = 2  # a prompt with this token has no finite numbers
    state_bytes: ClassVar[Sequence[int]] = (0, 250, 10**5)

    @initialize(
        pages=st.integers(11, 15),
        rows=st.integers(2, 5),
        chunk_tokens=st.sampled_from([16, 32]),
        preemption=st.sampled_from(["recompute", "swap"]),
        state_bytes=st.sampled_from([0, 250, 10_000]),
    )
    def start(self, **chosen: Any) -> None:
        self.chosen = chosen
        self.nonfinite: list[Request] = []
        self.broken: list[BrokenInvariant] = []
        self.open(**chosen)

    def open(self, preemption: str, state_bytes: int, **sizes: int) -> None:
        self.words = Words()
        options = {
            "preemption": preemption,
            "state_bytes": state_bytes,
            "tokenizer": self.words,
        }
        self.harness = EngineHarness(model_oracle(), options, self.runner(**sizes))
        self.harness.allowed += (TokenizerFailed,)
        if isinstance(self.harness.runner, SimulatedRunner):
            self.harness.allowed += (NonFiniteRequest, StepFailed)

    def runner(self, **sizes: int) -> Any:
        return SimulatedRunner(model_oracle(), nan=self.nan, **sizes)

    def note(self, what: str) -> None:
        self.met[what] += 1

    @rule(prompt=PROMPTS, params=PARAMS)
    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        self.note("submit")
        self.harness.submit(prompt, params)

    @rule(count=st.integers(2, 4), stem=st.sampled_from([0, 4, 9]), new=st.integers(4, 9))
    def submit_several(self, count: int, stem: int, new: int) -> None:
        """Several long answers at once, so that pages run out; the last ones rank first."""
        self.note("submit several")
        self.harness.search([*[7] * stem, 9], SamplingParams(max_new_tokens=4), 3)
        for number in range(count):
            params = SamplingParams(max_new_tokens=2 * new, stop_tokens=(), priority=number // 2)
            self.harness.submit([*[7] * stem, 3 + number, 5], params)
            self.harness.step()

    @rule(prompt=PROMPTS)
    def submit_nonfinite(self, prompt: list[int]) -> None:
        if isinstance(self.harness.runner, SimulatedRunner):
            params = SamplingParams(stop_tokens=(), max_new_tokens=3, priority=2)
            request = self.harness.submit([*prompt, self.nan], params)
            self.nonfinite += [request] if request else []

    @rule(prompt=PROMPTS, params=PARAMS)
    def submit_with_a_tokenizer_that_raises(self, prompt: list[int], params: Any) -> None:
        self.note("tokenizer raises")
        self.words.fails["decode"] = IndexError("piece id is out of range")
        self.harness.submit(prompt, replace(params, stop_strings=("never",)))

    @rule(
        context=PROMPTS,
        continuations=st.lists(st.lists(TOKENS, min_size=1, max_size=4), max_size=3),
    )
    def score(self, context: list[int], continuations: list[list[int]]) -> None:
        self.note("score")
        self.harness.score(context, continuations)

    @rule(prompt=PROMPTS, new=st.integers(1, 5), beams=st.integers(1, 3))
    def search(self, prompt: list[int], new: int, beams: int) -> None:
        self.note("search")
        params = SamplingParams(max_new_tokens=new, stop_tokens=(11, 29, 60))
        self.harness.search(prompt, params, beams)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()
        if self.harness.engine.closed:  # by a callback
            self.finish()
            self.open(**self.chosen)

    @rule(
        prompt=PROMPTS,
        params=PARAMS,
        at=st.integers(1, 4),
        does=st.sampled_from(CALLBACKS),
    )
    def submit_with_callback(
        self, prompt: list[int], params: SamplingParams, at: int, does: str
    ) -> None:
        def on_token(output: Output, token: int, text: str) -> None:
            if len(output.tokens) == at:
                self.note(f"callback: {does}")
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
        if does == "cancel" and self.harness.open:
            self.note("cancel while delivering")
            engine.cancel(self.harness.open[0])
        if does == "close":
            engine.close()
        if does == "submit":
            self.harness.submit([5, 6], SamplingParams(max_new_tokens=2, stop_tokens=()))

    @rule(
        pick=st.integers(0, 7),
        call=st.sampled_from(["decode", "prefill", "write_pages", "clear_rows"]),
        does=st.sampled_from(["cancel", "cancel", "interrupt", "raise"]),
    )
    def act_in_the_middle_of_a_step(self, pick: int, call: str, does: str) -> None:
        """The garbage collector may close an abandoned stream anywhere; so may Ctrl-C come."""
        runner, asked = self.harness.runner, self.harness.open
        if not asked or not isinstance(runner, SimulatedRunner):
            return
        request = asked[pick % len(asked)]

        def act_once(made: str, rows: Sequence[int]) -> None:
            if made != call:
                return
            runner.fault = lambda made, rows: None
            phase = "planning" if made in ("write_pages", "clear_rows") else "running"
            self.note(f"{does} while {phase}")
            if does == "interrupt":
                raise Interrupted
            if does == "raise":
                raise RuntimeError("on the device")
            self.harness.engine.cancel(request)

        runner.fault = act_once

    @rule(pick=st.integers(0, 7))
    def cancel(self, pick: int) -> None:
        self.note("cancel")
        self.harness.cancel(pick)

    @rule()
    def evict(self) -> None:
        self.note("evict")
        self.harness.evict()

    @rule()
    @precondition(lambda self: self.harness.open)
    def close_under_open_requests(self) -> None:
        self.note("close")
        self.harness.close()
        self.finish()
        self.open(**self.chosen)

    def finish(self) -> None:
        """Run what is open to its end, check it, and add to the counts."""
        if not self.harness.engine.closed:
            self.harness.drain()
        self.harness.check_empty()
        self.met.update({what: self.harness.met[what] for what in DEEP_STATES})
        errors = [request.outputs[0].error for request in self.nonfinite]
        self.met["not finite"] += sum(isinstance(error, NonFiniteRequest) for error in errors)
        assert all(request.outputs[0].finish != "length" for request in self.nonfinite)
        self.nonfinite.clear()
        assert not self.broken

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.finish()


def walk_the_rules(machine: EngineMachine, moves: int, chance: random.Random) -> None:
    """Call the machine's rules in random order, so that each profile reaches all of them."""
    pick = chance.choice
    machine.start(
        preemption=pick(["recompute", "swap"]), state_bytes=pick(machine.state_bytes),
        rows=pick([3, 5]), pages=pick([12, 14, 16]), chunk_tokens=pick([16, 32]),
    )  # fmt: skip

    def prompt() -> list[int]:
        return [7 + i % 5 for i in range(pick([0, 4, 8, 9, 16, 20]))] + [pick([3, 4, 5, 6])]

    def params() -> SamplingParams:
        new, heat, seed, n = pick([2, 6, 9]), pick([0.0, 0.0, 1.0]), pick([0, 1]), pick([1, 1, 2])
        return SamplingParams(
            max_new_tokens=new, temperature=heat, seed=seed, n=n, priority=pick([-1, 0, 1]),
            stop_tokens=pick([(), (11, 29, 60)]), streamed=pick([False, True]),
        )  # fmt: skip

    def evict_under_a_shared_stem() -> None:
        machine.submit_several(count=4, stem=9, new=9)
        machine.step(steps=2)
        machine.evict()

    def submit_with_callback() -> None:
        at, does = pick([1, 2]), pick(CALLBACKS)
        machine.submit_with_callback(prompt=prompt(), params=params(), at=at, does=does)

    rules: list[Callable[[], Any]] = [
        lambda: machine.submit(prompt=prompt(), params=params()),
        lambda: machine.submit_several(count=pick([2, 4]), stem=pick([0, 4, 9]), new=pick([4, 9])),
        lambda: machine.submit_nonfinite(prompt=prompt()),
        lambda: machine.submit_with_a_tokenizer_that_raises(prompt=prompt(), params=params()),
        lambda: machine.score(context=prompt(), continuations=[[3, pick([4, 5])], [6]]),
        lambda: machine.search(prompt=prompt(), new=pick([2, 5]), beams=pick([2, 3])),
        *3 * [submit_with_callback],
        lambda: machine.act_in_the_middle_of_a_step(
            pick=pick(range(8)),
            call=pick(["decode", "prefill", "write_pages", "clear_rows"]),
            does=pick(["cancel", "interrupt", "raise"]),
        ),
        lambda: machine.cancel(pick=pick(range(8))),
        machine.evict,
        evict_under_a_shared_stem,
    ]
    for _ in range(moves):
        if chance.random() < 0.01 and machine.harness.open:
            machine.close_under_open_requests()
        elif chance.random() < 0.5 and len(machine.harness.open) < 12:
            pick(rules)()
        machine.step(steps=pick([1, 2, 3]))
    machine.teardown()


class LiveMachine(EngineMachine):
    """The same on the tiny model itself, with real pages, states and attention."""

    met: ClassVar[Counter[str]] = Counter()
    state_bytes: ClassVar[Sequence[int]] = (0, 10**5, 10**5)  # one state takes more than 250

    def runner(self, *, pages: int, rows: int, chunk_tokens: int) -> Any:
        sizes = PagedConfig(
            page_size=4, max_tokens=4 * pages, max_sequences=rows, chunk_tokens=chunk_tokens
        )
        return Runner.for_model(model(), sizes)


DEEP_STATES = (
    *("preempted by rank", "preempted by swap", "preempted by recompute", "resumed", "restarted"),
    *("forks under pressure", "beams under pressure", "evicted while in use"),
)
RULES = (
    *("submit", "submit several", "score", "search", "tokenizer raises", "cancel", "evict"),
    *("close", "cancel while delivering", "cancel while planning", "cancel while running"),
    *("interrupt while planning", "interrupt while running", "raise while running"),
    *(f"callback: {does}" for does in CALLBACKS),
    "not finite",
)
SIMULATED_ONLY = {"not finite", "restarted"} | {
    what for what in RULES if "while" in what and "deliv" not in what
}

EXAMPLES = settings().max_examples
WALK = 100
"""Calls of rules on one engine."""
REQUIRED = {"default": 1, "wide": 4, "deep": 40}
"""How often a run of each profile reaches every rule and every deep state, at least."""


def required(machine: type[EngineMachine]) -> dict[str, int]:
    """Return the least count of each rule and deep state in this process's part of a run."""
    least = max(1, REQUIRED[PROFILE] // SHARDS)
    is_live = issubclass(machine, LiveMachine)
    return {
        what: least for what in (*RULES, *DEEP_STATES) if not (is_live and what in SIMULATED_ONLY)
    }


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize(
    ("machine", "examples", "moves"),
    [(EngineMachine, EXAMPLES // 3, 24 * EXAMPLES), (LiveMachine, EXAMPLES // 8, 12 * EXAMPLES)],
)
def test_every_answer_equals_that_of_the_request_alone(
    machine: type[EngineMachine], examples: int, moves: int, shard: int
) -> None:
    machine.met.clear()
    runs = settings(max_examples=max(1, examples // SHARDS), stateful_step_count=25)
    run_state_machine_as_test(machine, settings=runs)
    chance = random.Random(shard)
    for _ in range(moves // SHARDS // WALK):
        walk_the_rules(machine(), WALK, chance)
    missed = {
        what: f"{machine.met[what]} of {least}"
        for what, least in required(machine).items()
        if machine.met[what] < least
    }
    assert not missed, f"the run did not reach {missed}"


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
    "swap": {"preempted by swap", "preempted by rank", "resumed", "hits"},
    "tight": {"preempted by swap", "preempted by recompute", "preempted by rank", "hits"},
    "dense": {"preempted by recompute", "hits"},
    "no cache": {"preempted by recompute", "QueueFull", "scored"},
    "one row": {"hits", "scored"},
}


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("kind", WALKS)
def test_a_long_random_walk_gives_right_answers_and_no_leaks(kind: str, shard: int) -> None:
    options, sizes = WALKS[kind]
    harness = EngineHarness(HashOracle(), options, **sizes)

    random_walk(harness, DEEP_STEPS // len(WALKS) // SHARDS, seed=len(kind) + 100 * shard)

    met = {what for what, times in harness.met.items() if times}
    expected = EXPECTED[kind] | {"searches"}
    assert met >= expected, f"the walk never met {expected - met}"
