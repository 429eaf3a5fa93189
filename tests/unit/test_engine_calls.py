"""The engine's calls that wait for answers: generate, score, search and streams."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from granite_paged.engine.stepwise import StepwiseEngine
from granite_paged.errors import (
    EngineClosed,
    InvalidSampling,
    PromptError,
    QueueFull,
    RequestCancelled,
    StepFailed,
)
from tests.helpers.engine_harness import expected_logprobs, expected_tokens
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner
from tests.helpers.words import Words

PARAMS = SamplingParams(max_new_tokens=4, stop_tokens=())
PROMPTS = [[1, 2, 3], [4, 5], [6]]
ANSWERS = [expected_tokens(HashOracle(), prompt, PARAMS) for prompt in PROMPTS]


def make(**options: Any) -> Engine:
    runner: Any = SimulatedRunner(HashOracle())
    return Engine(None, runner=runner, **options)


def fail_at(engine: Engine, call: str, error: BaseException, *, after: int = 0) -> None:
    """Let every call of this name raise, but for the first `after`."""
    good = [None] * after

    def fault(made: str, rows: Any) -> None:
        if made == call:
            if not good:
                raise error
            good.pop()

    engine.runner.fault = fault  # type: ignore[attr-defined]


# -- generate -----------------------------------------------------------------------------------


def test_prompts_are_answered_in_order_and_progress_is_told() -> None:
    engine, told = make(), list[Any]()
    outputs = engine.generate(PROMPTS, PARAMS, progress=lambda *news: told.append(news))
    assert [output.tokens for output in outputs] == ANSWERS
    assert told == [("generate", done, 3) for done in range(4)]
    assert engine.idle


def test_every_sample_of_a_prompt_is_an_output() -> None:
    params = SamplingParams(max_new_tokens=2, n=2)
    outputs = make().generate(PROMPTS, params)
    assert [(output.request, output.index) for output in outputs] == [
        (request, index) for request in range(3) for index in range(2)
    ]


def test_a_prompt_that_is_refused_has_outputs_with_its_error() -> None:
    params = SamplingParams(max_new_tokens=4, stop_tokens=(), n=2)
    first, *refused, last = make().generate(
        [PROMPTS[0], [10**6], PROMPTS[1]], [PARAMS, params, PARAMS]
    )
    assert [first.tokens, last.tokens] == ANSWERS[:2]
    assert [output.index for output in refused] == [0, 1]
    for output in refused:
        assert isinstance(output.error, PromptError)
        assert (output.finish, output.refused, output.prompt) == ("error", [10**6], ())


def test_prompts_wait_for_room_in_the_queue() -> None:
    engine = make(queue=1)
    assert [output.tokens for output in engine.generate(PROMPTS, PARAMS)] == ANSWERS


def test_text_is_encoded_once_however_long_it_waits() -> None:
    encoded: list[str] = []

    class Noted(Words):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            encoded.append(text)
            return super().__call__(text, **options)

    texts = ["w1 w2 w3", "w4 w5", "w6"]
    engine = make(queue=1, tokenizer=Noted())
    assert [output.tokens for output in engine.generate(texts, PARAMS)] == ANSWERS
    assert encoded == texts
    encoded.clear()
    engine.search(texts, PARAMS, beams=1)
    assert encoded == texts
    encoded.clear()
    engine.score([(text, ["w7", "w8"]) for text in texts])
    assert encoded == [text for context in texts for text in (context, "w7", "w8")]


def test_prompts_and_continuations_may_be_iterators() -> None:
    engine = make(queue=1)
    outputs = engine.generate([iter(prompt) for prompt in PROMPTS], PARAMS)  # type: ignore[arg-type, misc]
    assert [output.tokens for output in outputs] == ANSWERS
    continuations = [[7, 8], [9]]
    items: list[Any] = [(iter(p), map(iter, continuations)) for p in PROMPTS]
    assert engine.score(items) == engine.score([(p, continuations) for p in PROMPTS])


def test_a_prompt_waits_for_the_requests_of_others_in_the_queue() -> None:
    engine = make(queue=1)
    other = engine.submit(PROMPTS[1], PARAMS)
    (output,) = engine.generate(PROMPTS[0], PARAMS)
    assert (output.error, output.tokens) == (None, ANSWERS[0])
    assert other.outputs[0].tokens


def test_a_prompt_that_no_queue_of_this_size_can_take_is_refused() -> None:
    engine = make(queue=2)
    outputs = engine.generate(PROMPTS[0], SamplingParams(n=3))
    assert [type(output.error) for output in outputs] == [InvalidSampling] * 3
    assert "n must be at most 2, the length of the engine's queue, got 3" in str(outputs[0].error)
    assert engine.idle


def test_a_prompt_that_is_too_large_for_the_queue_is_refused_while_others_run() -> None:
    engine = make(queue=2)
    other = engine.submit(PROMPTS[1], PARAMS)
    (output, *_) = engine.generate(PROMPTS[0], SamplingParams(n=3))
    assert isinstance(output.error, InvalidSampling)
    assert (other.finished, engine.stats().steps) == (False, 0)


def test_a_prompt_waits_though_the_queue_empties_before_it_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may finish the last request after the queue was found full."""
    engine, submit = make(), StepwiseEngine.submit
    refusals = [QueueFull(waiting=4096, limit=4096)]

    def full_once(self: StepwiseEngine, *asked: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return submit(self, *asked)

    monkeypatch.setattr(StepwiseEngine, "submit", full_once)
    (output,) = engine.generate(PROMPTS[0], PARAMS)
    assert output.tokens == ANSWERS[0]


def test_an_interrupt_cancels_everything_that_was_asked() -> None:
    engine = make()
    fail_at(engine, "decode", KeyboardInterrupt())
    asked: list[Any] = []
    submit = engine.submit
    engine.submit = lambda *given: asked.append(submit(*given)) or asked[-1]  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS)
    assert len(asked) == 3
    for request in asked:
        assert isinstance(request.outputs[0].error, RequestCancelled)
    assert engine.load == 0


def test_steps_are_planned_for_a_runner_that_falls_back() -> None:
    """Captured steps divide a call; one that is not captured pads every chunk to the longest."""
    runner: Any = SimulatedRunner(HashOracle(), rows=8)
    eager = runner.shapes
    runner.shapes = replace(eager, captured=True)
    engine = Engine(None, runner=runner)
    runner.shapes = eager  # as after a hook on the live model
    prompts = [[5] * runner.chunk_tokens, *([6 + number] for number in range(6))]
    outputs = engine.generate(prompts, PARAMS)
    assert [output.error for output in outputs] == [None] * 7
    assert engine.stats().restarted == 0


# -- score and search ---------------------------------------------------------------------------


def test_scores_come_in_the_order_of_continuations() -> None:
    items = [(PROMPTS[0], [[7, 8], [9]]), (PROMPTS[1], [[3]])]
    found = make().score(items)
    assert [[len(score.tokens) for score in scores] for scores in found] == [[2, 1], [1]]
    for (context, continuations), scores in zip(items, found, strict=True):
        for continuation, score in zip(continuations, scores, strict=True):
            expected = expected_logprobs(HashOracle(), context, continuation)
            assert list(score.tokens) == pytest.approx(expected, abs=1e-4)


def test_the_first_refusal_or_failure_of_an_item_is_raised() -> None:
    engine = make()
    with pytest.raises(PromptError):
        engine.score([(PROMPTS[0], [[7, 8]]), ([], [[7]])])
    fail_at(engine, "score", ValueError("broken"))
    with pytest.raises(StepFailed, match="broken"):
        engine.score([(PROMPTS[0], [[7, 8]])])
    assert engine.idle


def test_a_search_has_four_beams_by_default() -> None:
    engine = make()
    params = SamplingParams(max_new_tokens=3, stop_tokens=())
    (found,) = engine.search(PROMPTS[0], params)
    assert len(found) == 4
    (longer,) = engine.search(PROMPTS[0], params, beams=4, length_penalty=1.0)
    assert [o.score for o in found] == [o.score for o in longer]
    (free,) = engine.search(PROMPTS[0], params, length_penalty=0.0)
    assert [o.score for o in found] == pytest.approx([(o.score or 0) / 3 for o in free])


def test_a_search_that_fails_raises() -> None:
    engine = make()
    fail_at(engine, "decode", ValueError("broken"))
    with pytest.raises(StepFailed, match="broken"):
        engine.search(PROMPTS[0], SamplingParams(max_new_tokens=3, stop_tokens=()), beams=2)


# -- streams ------------------------------------------------------------------------------------


def test_a_stream_yields_every_token_while_it_steps() -> None:
    engine = make()
    stream = engine.stream(PROMPTS[0], PARAMS)
    found = [next(stream).token]
    assert (found, engine.idle) == (ANSWERS[0][:1], False)
    found += [piece.token for piece in stream]
    assert found == ANSWERS[0]


def test_leaving_a_stream_cancels_its_request() -> None:
    engine = make()
    stream: Any = engine.stream(PROMPTS[0], PARAMS)
    next(stream)
    stream.close()
    assert engine.load == 0


def test_a_stream_raises_what_ended_its_request() -> None:
    engine = make()
    fail_at(engine, "decode", ValueError("broken"), after=1)
    stream = engine.stream(PROMPTS[0], PARAMS)
    assert next(stream).token == ANSWERS[0][0]
    with pytest.raises(StepFailed, match="broken"):
        next(stream)


async def tokens_of(engine: Engine, prompt: list[int]) -> list[int]:
    return [piece.token async for piece in engine.astream(prompt, PARAMS)]


def test_asynchronous_streams_yield_every_token() -> None:
    engine = make()

    async def work() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))

    assert asyncio.run(work()) == ANSWERS


def test_an_asynchronous_stream_raises_what_ended_its_request() -> None:
    engine = make()
    fail_at(engine, "decode", ValueError("broken"))
    with pytest.raises(StepFailed, match="broken"):
        asyncio.run(tokens_of(engine, PROMPTS[0]))


def test_an_asynchronous_stream_raises_what_a_step_raised() -> None:
    engine = make()
    fail_at(engine, "decode", KeyboardInterrupt("stop"))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        asyncio.run(tokens_of(engine, PROMPTS[0]))
    assert engine.load == 0


def test_a_stream_of_a_closed_engine_is_refused() -> None:
    engine = make()
    engine.close()
    with pytest.raises(EngineClosed):
        next(engine.stream(PROMPTS[0], PARAMS))
    with pytest.raises(EngineClosed):
        asyncio.run(tokens_of(engine, PROMPTS[0]))
