"""Beam search on the engine gives the beams of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.errors import GranitePagedError, InvalidSampling, StepFailed
from tests.helpers.engine_harness import EngineHarness, Interrupted
from tests.helpers.simulated_runner import HashOracle
from tests.helpers.tiny_models import EOS, FLAVOURS, VOCABULARY, tiny_model

PROMPTS = [
    [3 + (7 * i + 5 * n) % (VOCABULARY - 3) for i in range(length)]
    for n, length in enumerate((21, 16, 1))
]
NEW, BEAMS = 10, 4


def by_transformers(model: Any, prompt: list[int], **options: Any) -> tuple[list[list[int]], Any]:
    with torch.inference_mode():
        done = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    answers = [trimmed(tokens[len(prompt) :]) for tokens in done.sequences.tolist()]
    return answers, done.sequences_scores.tolist()


def trimmed(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def sizes(rows: int, pages: int = 60) -> PagedConfig:
    return PagedConfig(page_size=4, max_tokens=4 * pages, max_sequences=rows, chunk_tokens=32)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_beams_equal_those_of_transformers(flavour: str, length_penalty: float) -> None:
    model = tiny_model(flavour)
    with Engine(model, sizes(rows=2 * BEAMS)) as engine:
        found = engine.search(
            PROMPTS, SamplingParams(max_new_tokens=NEW), beams=BEAMS, length_penalty=length_penalty
        )
        engine.check_valid()
    for prompt, outputs in zip(PROMPTS, found, strict=True):
        expected, scores = by_transformers(model, prompt, length_penalty=length_penalty)
        assert [output.tokens for output in outputs] == expected
        assert [output.score for output in outputs] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize(("rows", "pages"), [(1, 60), (2, 60), (3, 12), (8, 17)])
def test_beams_that_do_not_fit_are_recomputed(rows: int, pages: int) -> None:
    model = tiny_model()
    with Engine(model, sizes(rows, pages), preemption="swap") as engine:
        others = [engine.submit(prompt, SamplingParams(max_new_tokens=NEW)) for prompt in PROMPTS]
        found = engine.search(PROMPTS, SamplingParams(max_new_tokens=NEW), beams=BEAMS)
        while engine.step():
            engine.check_valid()
        engine.forget_prefixes()
        allocator, _, scheduler = engine.inspect()
        assert allocator.held == 0, "pages leaked"
        assert scheduler.running.rows.free == rows, "a row leaked"
    assert all(request.outputs[0].error is None for request in others)
    for prompt, outputs in zip(PROMPTS, found, strict=True):
        assert [output.tokens for output in outputs] == by_transformers(model, prompt)[0]


def test_beams_share_pages_of_common_tokens() -> None:
    harness = EngineHarness(HashOracle(), pages=80, rows=4)
    harness.engine.submit_search(list(range(40)), SamplingParams(max_new_tokens=6), beams=4)
    most = 0
    while harness.engine.step():
        harness.check()
        most = max(most, harness.engine.inspect().allocator.held)
    assert most <= 10 + 4 * 3, "forty tokens in ten pages, and a few for each beam"
    assert harness.runner.forked >= 3


@pytest.mark.parametrize("call", ["decode", "fork_row", "write_pages", "prefill"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_fault_ends_a_whole_search_or_none_of_it(call: str, number: int) -> None:
    harness = EngineHarness(HashOracle(), pages=60, rows=6)
    harness.faulty = True
    params = SamplingParams(max_new_tokens=8, stop_tokens=())
    made = 0

    def fault(what: str, rows: Sequence[int]) -> None:
        nonlocal made
        made += what == call
        if what == call and made == number:
            raise RuntimeError("once")

    harness.runner.fault = fault
    request = harness.engine.submit_search([1, 2, 3, 4, 5], params, beams=3)
    other = harness.submit([9], params)
    harness.drain()
    assert request.finished
    assert other is not None
    assert other.outputs[0].finish in ("length", "error")
    errors = {type(output.error) for output in request.outputs}
    assert errors in ({type(None)}, {StepFailed})


def test_a_search_is_independent_of_rows_that_report_more_tokens() -> None:
    """The simulated runner's logits tie often."""
    params = SamplingParams(max_new_tokens=2, stop_tokens=())
    for number in range(30):
        prompt = [(7 * place + 5 * number * number) % 97 for place in range(9)]
        found = []
        for reported in (None, 44):
            harness = EngineHarness(HashOracle(), pages=200, rows=10)
            neighbour = SamplingParams(max_new_tokens=9, logprobs=reported, stop_tokens=())
            harness.submit(prompt[::-1], neighbour)
            asked = harness.engine.submit_search(prompt, params, beams=4)
            harness.drain()
            found.append([output.tokens for output in asked.outputs])
        assert found[0] == found[1]


def test_a_cancelled_search_releases_everything() -> None:
    harness = EngineHarness(HashOracle(), pages=60, rows=6)
    request = harness.engine.submit_search([1, 2, 3], SamplingParams(max_new_tokens=20), beams=3)
    for _ in range(6):
        harness.step()
    harness.engine.cancel(request)
    harness.drain()
    assert [output.finish for output in request.outputs] == ["cancelled"] * 3


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"beams": 0}, "at least 1"),
        ({"params": SamplingParams(temperature=1.0)}, "does not sample"),
    ],
)
def test_an_invalid_search_is_refused(wrong: dict[str, Any], reason: str) -> None:
    with Engine(tiny_model(), sizes(2)) as engine, pytest.raises(InvalidSampling, match=reason):
        engine.search(PROMPTS, **wrong)
    assert issubclass(InvalidSampling, GranitePagedError)


@pytest.mark.parametrize("call", ["clear_rows", "decode", "write_pages"])
def test_an_interrupt_while_beams_wait_changes_no_answer(call: str) -> None:
    """Some beams have reported their token, and others wait for rows: all start over."""
    for number in range(1, 12):
        harness = EngineHarness(HashOracle(), {"state_bytes": 0}, rows=2, pages=8)
        harness.search([9] * 5, SamplingParams(max_new_tokens=5, stop_tokens=()), 3)
        calls = count(1)

        def interrupt(made: str, rows: Any, at: int = number, calls: Any = calls) -> None:
            if made == call and next(calls) == at:
                raise Interrupted

        harness.runner.fault = interrupt
        harness.drain()  # compares the answers
