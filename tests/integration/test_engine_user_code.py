"""User code that raises, re-enters or interrupts concerns its own request only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from granite_paged.device import Fetch
from granite_paged.engine import intake
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import Output, Request, SamplingParams, Scoring
from granite_paged.errors import (
    CallbackFailed,
    EngineBusy,
    EngineClosed,
    GranitePagedError,
    InvalidSampling,
    PromptError,
    RequestCancelled,
    TokenizerFailed,
)
from tests.helpers.engine_harness import EngineHarness, expected_tokens
from tests.helpers.simulated_runner import HashOracle

NEW = 6
PARAMS = SamplingParams(max_new_tokens=NEW, stop_tokens=())
PROMPTS = [[1, 2, 3], [4, 5], [6]]


class Words:
    """A tokenizer whose word for token 7 is "w7"; it raises for `broken` tokens and for "BAD"."""

    def __init__(self, *broken: int) -> None:
        self.broken = set(broken)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        if "BAD" in text:
            raise UnicodeError("cannot encode")
        return {"input_ids": [int(word.removeprefix("w")) for word in text.split()]}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        if self.broken & set(tokens):
            raise IndexError("piece id is out of range")
        return " ".join(f"w{token}" for token in tokens)


def make_engine(tokenizer: Any = None, **sizes: Any) -> EngineHarness:
    return EngineHarness(HashOracle(), {"tokenizer": tokenizer or Words()}, **sizes)


def expected(prompt: Sequence[int], params: SamplingParams = PARAMS) -> list[int]:
    return expected_tokens(HashOracle(), prompt, params)


def text_of(tokens: Sequence[int]) -> str:
    return Words().decode(tokens, skip_special_tokens=True)


def ignore(output: Output, token: int, text: str) -> None:
    """A callback that does nothing."""


# -- tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on_token", [None, ignore])
def test_a_decoding_failure_ends_only_its_request(on_token: Any) -> None:
    (bad, *_), good = expected(PROMPTS[0]), expected(PROMPTS[1])
    assert bad not in good
    harness = make_engine(Words(bad))
    failing = harness.engine.submit(PROMPTS[0], PARAMS, on_token=on_token)
    other = harness.engine.submit(PROMPTS[1], PARAMS, on_token=on_token)
    harness.drain()
    (output,) = failing.outputs
    assert isinstance(output.error, TokenizerFailed)
    assert isinstance(output.error.__cause__, IndexError)
    assert len(output.tokens) <= NEW
    assert other.outputs[0].text == text_of(good)


def test_a_decoding_failure_ends_only_its_search() -> None:
    (bad, *_), good = expected(PROMPTS[0]), expected(PROMPTS[1])
    harness = make_engine(Words(bad))
    failing = harness.engine.submit_search(PROMPTS[0], SamplingParams(max_new_tokens=1), beams=2)
    other = harness.engine.submit(PROMPTS[1], PARAMS)
    harness.drain()
    assert {type(output.error) for output in failing.outputs} == {TokenizerFailed}
    assert other.outputs[0].tokens == good


def test_an_encoding_failure_refuses_only_its_prompt() -> None:
    engine = make_engine().engine
    refused, good = engine.generate(["BAD w1", "w4 w5"], PARAMS)
    assert isinstance(refused.error, PromptError)
    assert good.tokens == expected(PROMPTS[1])


def test_a_search_with_more_beams_than_tokens_is_refused() -> None:
    harness = make_engine()
    with pytest.raises(InvalidSampling, match="beams must be at most 97"):
        harness.engine.submit_search([1], PARAMS, beams=98)
    assert harness.engine.idle


# -- prompts and sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, ["a", "b"], [[1, 2], [3]], [1.5], 2**70, [True], []])
def test_a_prompt_of_the_wrong_type_is_refused_alone(bad: Any) -> None:
    engine = make_engine().engine
    good, refused, other = engine.generate([PROMPTS[0], bad, PROMPTS[1]], PARAMS)
    assert isinstance(refused.error, PromptError)
    assert [good.tokens, other.tokens] == [expected(PROMPTS[0]), expected(PROMPTS[1])]
    assert engine.idle


REFUSED: dict[str, tuple[Any, SamplingParams, tuple[int, ...]]] = {
    "text": ("BAD w1", PARAMS, ()),
    "type": (None, PARAMS, ()),
    "token": ([4, 10**6], PARAMS, ()),
    "size": ([4, 5], SamplingParams(max_new_tokens=10**6), (4, 5)),
    "samples": ("w4 w5", SamplingParams(n=5000), (4, 5)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_prompt_keeps_its_place_and_says_what_it_was(kind: str) -> None:
    prompt, params, tokens = REFUSED[kind]
    engine = make_engine().engine
    first, *refused, last = engine.generate(
        [PROMPTS[0], prompt, PROMPTS[1]], [PARAMS, params, PARAMS]
    )
    assert [first.prompt, last.prompt] == [tuple(PROMPTS[0]), tuple(PROMPTS[1])]
    assert first.refused is None
    assert [output.index for output in refused] == list(range(params.n))
    for output in refused:
        assert (output.refused, output.prompt) == (prompt, tokens)
        assert output.finish == "error"
    assert len({first.request, refused[0].request, last.request}) == 3
    assert min(first.request, refused[0].request, last.request) == 0


def test_prompts_in_tensors_share_their_prefix() -> None:
    engine = make_engine(pages=80).engine
    prompt = torch.arange(3, 43)
    for _ in range(3):
        (output,) = engine.generate(prompt, PARAMS)
    assert output.prompt == tuple(range(3, 43))
    assert engine.stats().prefix_hits


def test_too_many_samples_are_refused_before_any_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine().engine
    monkeypatch.setattr(intake, "SampleJob", None)
    with pytest.raises(InvalidSampling):
        engine.submit(PROMPTS[0], SamplingParams(n=60_000))


# -- re-entry -----------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Engine, Request], object]] = {
    "submit": lambda engine, other: engine.submit([9], PARAMS),
    "submit_scoring": lambda engine, other: engine.submit_scoring([9], [[8]]),
    "submit_search": lambda engine, other: engine.submit_search([9], beams=2),
    "cancel": lambda engine, other: engine.cancel(other),
    "cancel_all": lambda engine, other: engine.cancel_all(),
    "stats": lambda engine, other: engine.stats(),
    "load": lambda engine, other: engine.load,
    "idle": lambda engine, other: engine.idle,
    "check_valid": lambda engine, other: engine.check_valid(),
    "forget_prefixes": lambda engine, other: engine.forget_prefixes(),
    "close": lambda engine, other: engine.close(),
    "step": lambda engine, other: engine.step(),
    "generate": lambda engine, other: engine.generate([[9]], PARAMS),
    "score": lambda engine, other: engine.score([([9], [[8]])]),
    "search": lambda engine, other: engine.search([[9]], SamplingParams(max_new_tokens=2)),
    "stream": lambda engine, other: next(engine.stream([9], PARAMS)),
}
BUSY_IN_CALLBACKS = {"step", "generate", "score", "search", "stream"}
BUSY_IN_STEPS = {*BUSY_IN_CALLBACKS, "check_valid", "forget_prefixes"}
ENDS_ALL = {"cancel_all", "close"}


@pytest.mark.parametrize("method", CALLS)
def test_a_method_in_a_callback_works_or_is_refused_by_name(method: str) -> None:
    harness = make_engine()
    seen: list[object] = []

    def reenter(output: Output, token: int, text: str) -> None:
        if len(output.tokens) == 2:
            seen.append(CALLS[method](harness.engine, victim))

    calling = harness.engine.submit(PROMPTS[0], PARAMS, on_token=reenter)
    victim = harness.engine.submit(PROMPTS[1], PARAMS, on_token=ignore)
    other = harness.engine.submit(PROMPTS[2], PARAMS, on_token=ignore)
    harness.drain()
    error = calling.outputs[0].error
    if method in BUSY_IN_CALLBACKS:
        assert isinstance(error, CallbackFailed)
        assert isinstance(error.__cause__, EngineBusy)
        assert method == "stream" or str(error.__cause__).startswith(f"{method}()")
    else:
        assert error is None or method in ENDS_ALL
        check_added(seen[0])
    check_others(method, victim, other)


@pytest.mark.parametrize("call", ["decode", "prefill", "write_pages"])
@pytest.mark.parametrize("method", CALLS)
def test_a_method_in_the_middle_of_a_step_waits_or_is_refused_by_name(
    method: str, call: str
) -> None:
    """The garbage collector may run a finalizer anywhere in a step."""
    harness = make_engine()
    victim = harness.engine.submit(PROMPTS[1], PARAMS)
    other = harness.engine.submit(PROMPTS[2], PARAMS)
    seen: list[Any] = []

    def finalize(made: str, rows: Sequence[int]) -> None:
        if made == call and not seen:
            seen.append(None)
            try:
                seen[0] = CALLS[method](harness.engine, victim)
            except EngineBusy as busy:
                seen[0] = busy

    harness.runner.fault = finalize
    harness.drain()
    assert isinstance(seen[0], EngineBusy) == (method in BUSY_IN_STEPS)
    if isinstance(seen[0], EngineBusy):
        assert method == "stream" or str(seen[0]).startswith(f"{method}()")
    check_added(seen[0])
    check_others(method, victim, other)


@pytest.mark.parametrize("method", CALLS)
def test_a_method_in_another_thread_works_while_a_step_runs(method: str) -> None:
    harness = make_engine()
    victim = harness.engine.submit(PROMPTS[1], PARAMS)
    other = harness.engine.submit(PROMPTS[2], PARAMS)
    calling: list[Future[object]] = []
    with ThreadPoolExecutor(1) as pool:

        def call(made: str, rows: Sequence[int]) -> None:
            if made == "decode" and not calling:
                calling.append(pool.submit(CALLS[method], harness.engine, victim))
                time.sleep(0.02)

        harness.runner.fault = call
        harness.drain()
        check_added(calling[0].result(timeout=10))
        harness.drain()
    check_others(method, victim, other)


def check_added(result: Any) -> None:
    """Check that a request that was submitted in an odd place was answered."""
    if type(result) is Request and result.params == PARAMS:
        assert result.outputs[0].tokens == expected([9])


def check_others(method: str, victim: Request, other: Request) -> None:
    """Check that a call ended what it names, and nothing else."""
    for request in (victim, other):
        output = request.outputs[0]
        may_end = method in ENDS_ALL or (method == "cancel" and request is victim)
        assert output.finish in (("cancelled", "length") if may_end else ("length",))
        assert output.tokens == expected(request.prompt)[: len(output.tokens)]
    if method == "cancel":
        assert victim.outputs[0].finish == "cancelled"


def test_a_callback_may_submit_inspect_and_cancel() -> None:
    harness = make_engine(rows=2)
    victim = harness.engine.submit(PROMPTS[1], SamplingParams(max_new_tokens=40, stop_tokens=()))
    added: list[Request] = []

    def work(output: Output, token: int, text: str) -> None:
        harness.engine.check_valid()
        assert harness.engine.stats().running
        if not added:
            added.append(harness.engine.submit(PROMPTS[2], PARAMS))
            harness.engine.cancel(victim)

    asked = harness.engine.submit(PROMPTS[0], PARAMS, on_token=work)
    harness.drain()
    assert asked.outputs[0].tokens == expected(PROMPTS[0])
    assert added[0].outputs[0].tokens == expected(PROMPTS[2])
    assert victim.outputs[0].finish == "cancelled"


def test_a_callback_may_close_the_engine_after_its_step() -> None:
    harness = make_engine()
    engine = harness.engine
    asked = engine.submit(PROMPTS[0], PARAMS, on_token=lambda *_: engine.close())
    other = engine.submit(PROMPTS[1], PARAMS)
    while engine.step():
        pass
    assert len(asked.outputs[0].tokens) == 1
    assert isinstance(asked.outputs[0].error, EngineClosed)
    assert isinstance(other.outputs[0].error, EngineClosed)
    assert harness.runner.closed
    assert engine.inspect().allocator.held == 0


@pytest.mark.parametrize("call", ["decode", "prefill", "write_pages"])
def test_a_cancel_during_a_step_waits_for_the_next(call: str) -> None:
    """The garbage collector may close an abandoned stream anywhere."""
    harness = make_engine()
    victim = harness.engine.submit(PROMPTS[0], PARAMS)
    others = [harness.engine.submit(prompt, PARAMS) for prompt in PROMPTS[1:]]
    harness.runner.fault = lambda made, rows: (
        harness.engine.cancel(victim) if made == call else None
    )
    harness.drain()
    assert victim.outputs[0].finish == "cancelled"
    for prompt, request in zip(PROMPTS[1:], others, strict=True):
        assert request.outputs[0].tokens == expected(prompt)


# -- interrupts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("where", ["middle", "last", "stop"])
def test_an_interrupt_in_a_callback_changes_no_answer(
    interrupt: type[BaseException], where: str
) -> None:
    whole = expected(PROMPTS[0])
    stops = (whole[3],) if where == "stop" else ()
    params = SamplingParams(max_new_tokens=NEW, stop_tokens=stops)
    answer = expected(PROMPTS[0], params)
    at = {"middle": 2, "last": NEW, "stop": len(answer)}[where]
    harness = make_engine()

    def interrupted(output: Output, token: int, text: str) -> None:
        if len(output.tokens) == at:
            raise interrupt

    asked = harness.engine.submit(PROMPTS[0], params, on_token=interrupted)
    other = harness.engine.submit(PROMPTS[1], PARAMS, on_token=ignore)
    with pytest.raises(interrupt):
        harness.drain()
    harness.drain()
    assert asked.outputs[0].tokens == answer
    assert asked.outputs[0].finish == ("stop" if where == "stop" else "length")
    assert asked.outputs[0].text == text_of(answer)
    assert other.outputs[0].tokens == expected(PROMPTS[1])
    assert harness.engine.stats().restarted == 0
    assert harness.engine.idle


# -- early ends ---------------------------------------------------------------------------------

ENDS: dict[str, tuple[Callable[[Engine, Request | Scoring], None], type[GranitePagedError]]] = {
    "close": (lambda engine, request: engine.close(), EngineClosed),
    "cancel": (lambda engine, request: engine.cancel(request), RequestCancelled),
}


def opened(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Collect the requests that the engine submits."""
    requests: list[Request] = []
    submit = engine.submit

    def noted(*args: Any, **kwargs: Any) -> Request:
        requests.append(submit(*args, **kwargs))
        return requests[-1]

    monkeypatch.setattr(engine, "submit", noted)
    return requests


@pytest.mark.parametrize("how", ENDS)
def test_a_stream_ended_by_another_caller_raises(how: str, monkeypatch: Any) -> None:
    engine = make_engine().engine
    requests = opened(engine, monkeypatch)
    end, error = ENDS[how]
    stream = engine.stream(PROMPTS[0], PARAMS)
    for _ in range(3):
        next(stream)
    end(engine, requests[0])
    with pytest.raises(error):
        next(stream)


@pytest.mark.parametrize("how", ENDS)
def test_an_asynchronous_stream_ended_by_another_caller_raises(how: str, monkeypatch: Any) -> None:
    harness = make_engine()
    harness.runner.fault = lambda made, rows: time.sleep(0.01)  # slower than the event loop
    requests = opened(harness.engine, monkeypatch)
    end, error = ENDS[how]
    params = SamplingParams(max_new_tokens=90, stop_tokens=())

    async def consume() -> None:
        async for token in harness.engine.astream(PROMPTS[0], params):
            seen.append(token)
            if len(seen) == 3:
                end(harness.engine, requests[0])

    seen: list[Any] = []
    with pytest.raises(error):
        asyncio.run(consume())
    assert 3 <= len(seen) < 90


@pytest.mark.parametrize("method", ["score", "search"])
def test_the_first_refusal_is_raised_when_the_others_are_done(method: str) -> None:
    engine = make_engine().engine
    asked: dict[str, Any] = {
        "score": [(PROMPTS[0], [PROMPTS[1]]), ([], [PROMPTS[1]]), ([-1], []), (PROMPTS[2], [[1]])],
        "search": [PROMPTS[0], [], [-1], PROMPTS[2]],
    }
    done: list[tuple[str, int, int]] = []
    with pytest.raises(PromptError, match="empty"):
        getattr(engine, method)(asked[method], progress=lambda *now: done.append(now))
    assert done[-1] == (method, 4, 4)
    assert engine.idle


def test_tokens_are_read_after_the_next_step_was_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the device does not wait for the host, and computes one token after a stop token."""
    harness, order = make_engine(), []
    read = Fetch.read

    def noted(fetch: Fetch) -> dict[str, list[Any]]:
        order.append("read")
        return read(fetch)

    monkeypatch.setattr(Fetch, "read", noted)
    harness.runner.fault = lambda made, rows: order.append(made)
    stop = expected(PROMPTS[0])[2]
    params = SamplingParams(max_new_tokens=NEW, stop_tokens=(stop,))
    (output,) = harness.engine.generate(PROMPTS[0], params)
    assert len(output.tokens) == 3
    calls = [made for made in order if made in ("prefill", "decode")]
    assert calls == ["prefill", "decode", "decode", "decode"]  # the last token is dropped
    assert order.index("read") > order.index("decode")


def test_a_search_ended_by_another_caller_raises() -> None:
    harness = make_engine()
    steps = 0

    def close(made: str, rows: Sequence[int]) -> None:
        nonlocal steps
        steps += made == "decode"
        if steps == 3:
            harness.engine.close()

    harness.runner.fault = close
    with pytest.raises(EngineClosed):
        harness.engine.search([PROMPTS[0]], SamplingParams(max_new_tokens=20), beams=2)


@pytest.mark.parametrize("on_token", [None, ignore])
def test_a_cancelled_request_has_the_text_of_its_tokens(on_token: Any) -> None:
    harness = make_engine()
    asked = harness.engine.submit(
        PROMPTS[0], SamplingParams(max_new_tokens=NEW, stop_tokens=()), on_token=on_token
    )
    for _ in range(4):
        harness.engine.step()
    harness.engine.cancel(asked)
    (output,) = asked.outputs
    assert output.tokens
    assert output.text == text_of(output.tokens)


def test_a_stop_string_completed_by_the_last_token_counts() -> None:
    engine = make_engine().engine
    answer = expected(PROMPTS[0])
    params = SamplingParams(max_new_tokens=NEW, stop_tokens=(), stop_strings=(f"w{answer[-1]}",))
    assert answer.index(answer[-1]) == NEW - 1
    (output,) = engine.generate([PROMPTS[0]], params)
    assert output.finish == "stop"
    assert output.text == text_of(answer[:-1]) + " "
