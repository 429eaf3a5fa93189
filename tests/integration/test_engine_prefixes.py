"""Cached prefixes: who may share them, and what happens to them when weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from tests.helpers.engine_harness import EngineHarness, expected_tokens
from tests.helpers.simulated_runner import HashOracle

PROMPT = list(range(3, 43))
ASKED = SamplingParams(max_new_tokens=3, stop_tokens=())

# -- namespaces ---------------------------------------------------------------------------------


def ask(engine: Engine, namespace: str) -> list[int]:
    params = SamplingParams(max_new_tokens=3, stop_tokens=(), namespace=namespace)
    (output,) = engine.generate([PROMPT], params)
    return output.tokens


def score(engine: Engine, namespace: str) -> float:
    return engine.score([(PROMPT, [[4, 5]])], namespace=namespace)[0][0].logprob


def search(engine: Engine, namespace: str) -> list[int]:
    params = SamplingParams(max_new_tokens=3, stop_tokens=(), namespace=namespace)
    return engine.search([PROMPT], params, beams=2)[0][0].tokens


@pytest.mark.parametrize("work", [ask, score, search])
def test_prompts_share_prefixes_within_their_namespace_only(
    work: Callable[[Engine, str], Any],
) -> None:
    harness = EngineHarness(HashOracle(), pages=200)
    engine = harness.engine
    hits: list[int] = []
    answers: list[Any] = []
    for namespace in ("a", "a", "a", "b", "b", "b", "", "", ""):
        before = engine.stats().tokens_hit
        answers.append(work(engine, namespace))
        hits.append(engine.stats().tokens_hit - before)
        engine.check_valid()
    assert hits[0::3] == [0, 0, 0], "the first prompt of a namespace finds nothing"
    assert min(hits[2::3]) > 0
    assert all(answer == answers[0] for answer in answers)
    harness.drain()


def test_samples_and_preempted_requests_keep_their_namespace() -> None:
    harness = EngineHarness(HashOracle(), pages=24, rows=4)
    for number in range(12):
        params = SamplingParams(
            max_new_tokens=12,
            stop_tokens=(),
            temperature=0.7,
            n=2,
            namespace=("a", "b")[number % 2],
        )
        harness.submit(PROMPT[: 20 + number], params)
    while harness.step():
        prefix = harness.engine.inspect().prefix
        starts = {node.tokens[0] for node in prefix._root.children.values()}
        assert starts <= {"a", "b"}
    assert harness.engine.stats().preempted
    harness.drain()


def test_a_namespace_changes_no_answer() -> None:
    harness = EngineHarness(HashOracle(), pages=200)
    assert ask(harness.engine, "a") == expected_tokens(HashOracle(), PROMPT, ASKED)
