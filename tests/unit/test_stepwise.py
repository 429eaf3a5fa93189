"""The engine that its callers step: what it is made of, what it refuses, how it closes."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged.engine import executor, stepwise
from granite_paged.engine.core import EngineCore
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import Output, Request, SamplingParams
from granite_paged.engine.sampling import draw
from granite_paged.engine.stepwise import StepwiseEngine
from granite_paged.errors import (
    CallbackFailed,
    EngineBusy,
    EngineClosed,
    InvalidArgument,
    InvalidSampling,
    RequestCancelled,
    TokenizerError,
)
from granite_paged.progress import silent
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner
from tests.helpers.words import Words

PARAMS = SamplingParams(max_new_tokens=4, stop_tokens=())


class Device(SimulatedRunner):
    """A runner that counts how often it is warmed up and closed."""

    def __init__(self) -> None:
        super().__init__(HashOracle())
        self.warmed: list[Any] = []
        self.closings = 0
        self.error: BaseException | None = None

    def warm_up(self, progress: Any = None) -> None:
        self.warmed.append(progress)
        if self.error:
            raise self.error

    def close(self) -> None:
        self.closings += 1


def make(model: Any = None, device: Any = None, **options: Any) -> StepwiseEngine:
    return StepwiseEngine(model, runner=device or Device(), **options)


def device_of(engine: StepwiseEngine) -> Device:
    device: Any = engine.runner
    return device


def with_config(**fields: Any) -> Any:
    """Return a model whose generation config has these fields."""
    return SimpleNamespace(generation_config=SimpleNamespace(**fields), config=None)


def drain(engine: StepwiseEngine) -> None:
    while engine.step():
        engine.check_valid()


def ending(call: Any) -> list[Any]:
    """Return a list for what `call` returned or raised, and a callback that calls it once."""
    seen: list[Any] = []

    def on_token(output: Output, token: int, text: str) -> None:
        if not seen:
            seen.append(None)
            try:
                seen[0] = call()
            except EngineBusy as busy:
                seen[0] = busy

    return [seen, on_token]


# -- making -------------------------------------------------------------------------------------


def test_an_engine_has_the_sizes_of_the_documentation_by_default() -> None:
    engine = make()
    assert engine.inspect().prefix.budget == 2**30
    assert engine.inspect().scheduler._limits.swap_bytes == 4 * 2**30
    with pytest.raises(InvalidSampling, match="n must be at most 4096, "):
        engine.submit([1], SamplingParams(n=4097))
    assert not engine.submit([1], SamplingParams(n=4096)).finished


def test_a_full_warm_up_is_the_default_and_a_lazy_one_is_none() -> None:
    assert device_of(make()).warmed == [silent]
    assert device_of(make(warmup="full", progress=print)).warmed == [print]
    assert device_of(make(warmup="lazy")).warmed == []


@pytest.mark.parametrize(("kind", "times"), [("cuda", 1), ("cpu", 0)])
def test_an_engine_on_a_gpu_rehearses_after_its_full_warm_up(
    kind: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(core: EngineCore, runner: Any) -> None:
        assert torch.is_inference_mode_enabled(), "as in a step"
        seen.append((runner.warmed, core))

    monkeypatch.setattr(stepwise, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(stepwise, "_rehearse", note)
    device = Device()
    device.device = SimpleNamespace(type=kind)
    engine = make(device=device)
    assert [warmed for warmed, _ in seen] == [[silent]] * times
    assert engine._core not in [core for _, core in seen]
    make(device=device, warmup="lazy")
    assert len(seen) == times


@pytest.mark.parametrize("queue", [1, 8])
def test_a_rehearsal_takes_every_path_and_leaves_nothing(
    queue: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[SamplingParams] = []

    def note(logits: Any, draws: Any, **options: Any) -> Any:
        drawn.extend(each.params for each in draws)
        return draw(logits, draws, **options)

    monkeypatch.setattr(executor, "draw", note)
    device = Device()
    engine = make(device=device, queue=queue)
    stepwise._rehearse(engine._core, engine.runner)
    stats = engine.stats()
    assert (stats.tokens, stats.prefix_hits) == (3 * 2, 1)
    assert any(params.samples for params in drawn)
    assert any(params.logprobs is not None for params in drawn)
    assert (stats.waiting, stats.running, stats.pages_held, stats.state_bytes) == (0, 0, 0, 0)
    engine.check_valid()
    fresh, after = make(), make(device=device)
    answers = [each.submit([1, 2, 3], PARAMS) for each in (fresh, after)]
    drain(fresh)
    drain(after)
    assert answers[0].outputs[0].tokens == answers[1].outputs[0].tokens != []


def test_a_rehearsal_fits_into_the_smallest_pool() -> None:
    device = Device()
    device.longest = device.alignment
    engine = make(device=device)
    stepwise._rehearse(engine._core, engine.runner)
    assert engine.stats().tokens == 3 * 2
    assert device.computed == 3 * device.longest


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
def test_an_engine_whose_warm_up_raises_is_closed(error: BaseException) -> None:
    device = Device()
    device.error = error
    with pytest.raises(type(error)):
        make(device=device)
    assert device.closings == 1


class Encodes:
    def __call__(self, text: str) -> list[int]:
        return [1]


class Decodes:
    def decode(self, tokens: list[int]) -> str:
        return ""


@pytest.mark.parametrize("tokenizer", [Encodes(), Decodes(), "words"], ids=["a", "b", "c"])
def test_a_tokenizer_must_encode_and_decode(tokenizer: Any) -> None:
    with pytest.raises(TokenizerError, match="tokenizer must encode and decode"):
        make(tokenizer=tokenizer)


def test_a_runner_must_run() -> None:
    with pytest.raises(InvalidArgument, match="runner must be a Runner"):
        make(device="cpu")
    assert make(tokenizer=Words()).tokenizer is not None


# -- submitting ---------------------------------------------------------------------------------


def test_a_callback_must_be_a_function() -> None:
    engine = make()
    with pytest.raises(InvalidArgument, match="on_token must be a function"):
        engine.submit([1], on_token="print")  # type: ignore[arg-type]
    assert engine.idle


def test_stop_strings_need_a_tokenizer() -> None:
    params = SamplingParams(stop_strings=("a",))
    with pytest.raises(InvalidSampling, match="stop_strings need a tokenizer"):
        make().submit([1], params)
    assert make(tokenizer=Words()).submit([1], params).params is params
    assert make(tokenizer=Words()).submit([1], PARAMS).params is PARAMS


def test_params_that_are_not_given_are_those_of_the_generation_config() -> None:
    engine = make(with_config(max_length=20, eos_token_id=7))
    request = engine.submit([1, 2, 3])
    assert (request.params.max_new_tokens, request.stop_tokens) == (17, {7})
    assert engine.submit([1, 2, 3], PARAMS).params is PARAMS
    assert engine.default_params.max_new_tokens == 20, "without a prompt"


def test_a_search_takes_only_the_number_of_tokens_from_the_generation_config() -> None:
    engine = make(with_config(max_length=20, temperature=2.0, do_sample=True))
    search = engine.submit_search([1, 2, 3])
    assert (search.params.max_new_tokens, search.params.temperature) == (17, 0.0)
    assert (len(search.outputs), search.length_penalty) == (4, 1.0)
    given = engine.submit_search([1, 2, 3], PARAMS, beams=2, length_penalty=0.5)
    assert (given.params.max_new_tokens, given.stop_tokens) == (4, frozenset())
    assert (len(given.outputs), given.length_penalty) == (2, 0.5)


def test_a_field_that_is_ignored_is_warned_of_where_the_engine_is_called() -> None:
    engine = make(with_config(num_beams=3, min_p=0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.submit([1])
        assert engine.default_params.max_new_tokens == 64
    assert [str(each.message) for each in caught] == [
        "the engine ignores num_beams, min_p of the generation config"
    ] * 2
    assert [each.filename for each in caught] == [__file__] * 2


# -- ending -------------------------------------------------------------------------------------


def test_a_request_that_is_cancelled_ends_and_one_that_is_finished_stays() -> None:
    engine = make()
    request, other = engine.submit([1], PARAMS), engine.submit([2], PARAMS)
    scoring = engine.submit_scoring([1, 2], [[3, 4]])
    engine.cancel(request)
    engine.cancel(scoring)
    assert request.outputs[0].finish == "cancelled"
    assert isinstance(request.outputs[0].error, RequestCancelled)
    assert isinstance(scoring.error, RequestCancelled)
    drain(engine)
    engine.cancel(other)
    assert (other.outputs[0].finish, other.outputs[0].error) == ("length", None)
    assert engine.idle


def test_only_a_request_of_this_engine_is_cancelled() -> None:
    engine = make()
    with pytest.raises(InvalidArgument, match="cancel takes a request of this engine, got 'one'"):
        engine.cancel("one")  # type: ignore[arg-type]
    strange = make().submit([1], PARAMS)
    with pytest.raises(InvalidArgument, match="cancel takes a request of this engine"):
        engine.cancel(strange)
    assert not strange.finished


def test_every_open_request_is_cancelled() -> None:
    engine = make()
    asked = [engine.submit([number], PARAMS) for number in range(6)]
    engine.step()
    engine.cancel_all()
    assert {request.outputs[0].finish for request in asked} == {"cancelled"}
    assert engine.load == 0


# -- closing ------------------------------------------------------------------------------------


def test_an_engine_closes_once() -> None:
    engine = make()
    assert not engine.closed
    with engine:
        request = engine.submit([1], PARAMS)
        engine.step()
        assert not engine.closed
    assert (engine.closed, device_of(engine).closings) == (True, 1)
    assert isinstance(request.outputs[0].error, EngineClosed)
    engine.close()
    assert device_of(engine).closings == 1
    with pytest.raises(EngineClosed):
        engine.submit([1], PARAMS)


def test_an_engine_that_a_callback_closes_is_shut_when_its_step_is_over() -> None:
    engine = make()
    closings: list[int] = []

    def close(output: Output, token: int, text: str) -> None:
        engine.close()
        closings.append(device_of(engine).closings)

    request = engine.submit([1], PARAMS, on_token=close)
    engine.step()
    engine.step()
    assert closings == [0]
    assert device_of(engine).closings == 1
    assert isinstance(request.outputs[0].error, EngineClosed)


def test_an_engine_that_is_closed_while_it_opens_a_request_is_shut_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The garbage collector may run a finalizer that closes it."""
    engine = make()
    queue = engine.inspect().scheduler.queue
    add = queue.add

    def closing(job: Any) -> None:
        engine.close()
        assert device_of(engine).closings == 0
        add(job)

    monkeypatch.setattr(queue, "add", closing)
    request = engine.submit([1], PARAMS)
    assert device_of(engine).closings == 1
    assert isinstance(request.outputs[0].error, EngineClosed)


def test_an_engine_is_open_while_it_only_takes_requests_in() -> None:
    engine = make()
    engine.submit([1], PARAMS)
    assert device_of(engine).closings == 0
    drain(engine)
    assert device_of(engine).closings == 0


# -- during a step ------------------------------------------------------------------------------


def test_a_callback_may_look_and_forget_but_not_step() -> None:
    engine = make()
    calls = {
        "step": engine.step,
        "check_valid": engine.check_valid,
        "forget_prefixes": engine.forget_prefixes,
    }
    found = {}
    for name, call in calls.items():
        seen, on_token = ending(call)
        engine.submit([1], PARAMS, on_token=on_token)
        drain(engine)
        found[name] = type(seen[0])
    assert found == {"step": EngineBusy, "check_valid": type(None), "forget_prefixes": type(None)}


def test_a_call_that_runs_steps_is_refused_by_its_own_name() -> None:
    engine = Engine(None, runner=Device())  # type: ignore[arg-type]
    seen, on_token = ending(lambda: engine.generate([[1]], PARAMS))
    engine.submit([1], PARAMS, on_token=on_token)
    drain(engine)
    assert str(seen[0]).startswith("generate() was called while a step of this engine runs")


def test_what_is_submitted_in_the_middle_of_a_step_opens_when_it_is_over() -> None:
    engine = make()
    added: list[Request] = []

    def submit(call: str, rows: Any) -> None:
        if call == "prefill" and not added:
            added.append(engine.submit([2], PARAMS))
            assert engine.inspect().scheduler.queue.jobs() == []

    device_of(engine).fault = submit
    engine.submit([1], PARAMS)
    engine.step()
    assert engine.inspect().scheduler.queue.jobs() == added[0].jobs
    drain(engine)
    assert added[0].outputs[0].finish == "length"


def test_a_callback_that_fails_is_the_fault_of_its_request() -> None:
    engine = make()
    request = engine.submit([1], PARAMS, on_token=lambda *news: 1 / 0)
    drain(engine)
    assert isinstance(request.outputs[0].error, CallbackFailed)
