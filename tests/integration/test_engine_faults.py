"""A fault in the middle of a step: at most one request fails, with a typed error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig
from granite_paged.device import Fetch
from granite_paged.engine import executor
from granite_paged.engine.prefix_cache import PrefixCache
from granite_paged.engine.request import Request, SamplingParams
from granite_paged.errors import NonFiniteRequest, StepFailed
from granite_paged.paging.allocator import PageAllocator
from tests.helpers.engine_harness import EngineHarness, expected_tokens
from tests.helpers.simulated_runner import HashOracle
from tests.helpers.tiny_models import tiny_model

DEVICE = (
    "write_pages", "forget_pages", "fork_row", "clear_rows", "set_pages", "save_row", "load_row",
    "load_states", "save_pages", "load_pages", "prefill", "score", "decode",
)  # fmt: skip
HOST: dict[str, tuple[Any, str]] = {
    "allocator.open": (PageAllocator, "open"),
    "allocator.append": (PageAllocator, "append"),
    "allocator.pages_needed": (PageAllocator, "pages_needed"),
    "allocator.fork": (PageAllocator, "fork"),
    "allocator.release": (PageAllocator, "release"),
    "prefix.keep": (PrefixCache, "keep"),
    "prefix.evict": (PrefixCache, "evict"),
    "prefix.find": (PrefixCache, "find"),
    "sampler": (executor, "draw"),
    "device copy": (Fetch, "read"),
}
STEM = list(range(20))


class Broken(RuntimeError):
    """A deliberate fault."""


def raising_at(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call so that it raises instead when it is called for the `number`-th time."""
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise Broken("once")
        return call(*args, **kwargs)

    counted.count = lambda: count  # type: ignore[attr-defined]
    return counted


def busy_harness() -> EngineHarness:
    """Return a harness in which `fill` reaches every call: hits, forks, swaps and scores."""
    harness = EngineHarness(HashOracle(), {"preemption": "swap"}, pages=19, rows=4)
    harness.faulty = True
    return harness


def fill(harness: EngineHarness) -> list[Request]:
    harness.score(STEM[:13], [[1, 2], [3], [4, 5, 6]])
    asked = [
        harness.submit(
            [*STEM[: 4 * i], 50 + i], SamplingParams(max_new_tokens=9 + i, temperature=t)
        )
        for i, t in enumerate((0, 0.5, 0, 0.5, 0, 0))
    ]
    asked.append(harness.submit(STEM, SamplingParams(n=2, max_new_tokens=7)))
    harness.step()
    asked += [harness.submit([*STEM, i], SamplingParams(max_new_tokens=12)) for i in range(4)]
    return [request for request in asked if request is not None]


def assert_only_named_failures(harness: EngineHarness, asked: Sequence[Request]) -> None:
    """Check that failed requests name their fault. `EngineHarness` has checked the answers."""
    for output in (output for request in asked for output in request.outputs):
        if output.error is not None:
            assert isinstance(output.error, StepFailed)
            assert output.error.request == output.request
            assert isinstance(output.error.__cause__, Broken)
    failed = [request for request in asked if request.outputs[0].finish == "error"]
    assert len(failed) <= 1, "one fault ended several requests"


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("site", HOST)
def test_a_fault_on_the_host_ends_at_most_one_request(
    site: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = busy_harness()
    asked = fill(harness)
    owner, name = HOST[site]
    broken = raising_at(number, getattr(owner, name))
    monkeypatch.setattr(owner, name, broken)

    harness.drain()

    if number == 1:
        assert broken.count(), "the fault was never reached"  # type: ignore[attr-defined]
    assert_only_named_failures(harness, asked)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("call", DEVICE)
def test_a_fault_on_the_device_ends_at_most_one_request(call: str, number: int) -> None:
    harness = busy_harness()
    asked = fill(harness)
    broken = raising_at(number, lambda: None)
    harness.runner.fault = lambda made, rows: broken() if made == call else None

    harness.drain()

    if number == 1:
        assert broken.count(), "the fault was never reached"  # type: ignore[attr-defined]
    assert_only_named_failures(harness, asked)


@pytest.mark.parametrize("call", ["write_pages", "clear_rows", "prefill", "decode"])
def test_a_request_that_breaks_every_call_fails_alone(call: str) -> None:
    harness = busy_harness()
    asked = fill(harness)
    victim = asked[4]  # its row had another owner before

    def fault(made: str, rows: Sequence[int]) -> None:
        if made == call and any(job.placement and job.placement.row in rows for job in victim.jobs):
            raise Broken("always")

    harness.runner.fault = fault
    harness.drain()

    assert [r for r in asked if r.outputs[0].finish == "error"] == [victim]
    assert_only_named_failures(harness, asked)
    assert f"request {victim.number} raised Broken (always)" in str(victim.outputs[0].error)


def test_a_state_that_cannot_be_loaded_ends_the_request_that_starts_from_it() -> None:
    harness = EngineHarness(HashOracle(), {}, pages=40, rows=4)
    harness.faulty = True
    short = SamplingParams(max_new_tokens=2)
    for _ in range(2):  # the second one leaves a state
        harness.submit(STEM, short)
        while harness.step():
            pass
    decoding = harness.submit([70, 71], SamplingParams(max_new_tokens=20))
    for _ in range(3):
        harness.step()
    loads = harness.submit(STEM, short)
    broken = raising_at(1, lambda: None)
    harness.runner.fault = lambda made, rows: broken() if made == "load_states" else None
    harness.drain()
    assert broken.count() == 1  # type: ignore[attr-defined]
    assert [each.outputs[0].finish for each in (decoding, loads)] == ["length", "error"]
    assert_only_named_failures(harness, [decoding, loads])


@pytest.mark.parametrize("number", [1, 2, 4, 9, 20, 40, 60])
def test_an_interrupted_step_can_be_repeated(number: int) -> None:
    harness = busy_harness()
    asked = fill(harness)
    calls = 0

    def interrupt(made: str, rows: Sequence[int]) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt

    harness.runner.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        harness.drain()

    harness.drain()

    assert {request.outputs[0].finish for request in asked} == {"length"}


# -- numbers that are not finite ----------------------------------------------------------------

LATE = {
    "head": lambda model: model.lm_head.weight,
    "final norm": lambda model: model.model.norm.weight,
    "last layer": lambda model: model.model.layers[-1].shared_mlp.output_linear.weight,
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", LATE)
def test_numbers_that_are_not_finite_after_the_last_attention_fail_by_name(
    place: str, value: float
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        LATE[place](model).fill_(value)
    sizes = PagedConfig(page_size=8, max_tokens=160, max_sequences=4, chunk_tokens=32)
    with Engine(model, sizes) as engine:
        params = [SamplingParams(max_new_tokens=3), SamplingParams(temperature=1.0, logprobs=2)]
        asked: list[Any] = [engine.submit([3, 4, 5], one) for one in params]
        asked.append(engine.submit_search([3, 4, 5], SamplingParams(max_new_tokens=2), beams=2))
        asked += [engine.submit_scoring([3, 4, 5], each) for each in ([[6], [7]], [[6, 7], [8]])]
        while engine.step():
            pass
    errors = [getattr(one, "error", None) or one.outputs[0].error for one in asked]
    assert [type(error) for error in errors] == [NonFiniteRequest] * len(asked)


def test_one_token_whose_logit_is_not_finite_fails_its_own_request_only() -> None:
    """Half precision overflows in one place at first."""
    harness = busy_harness()
    last = harness.oracle.last

    def overflow(tokens: tuple[int, ...]) -> torch.Tensor:
        logits = last(tokens).clone()
        if tokens[:2] == (90, 91):
            logits[5] = float("inf") if len(tokens) % 2 else float("-inf")
        return logits

    harness.oracle.last = overflow  # type: ignore[method-assign]
    failing = harness.engine.submit([90, 91, 3], SamplingParams(max_new_tokens=4))
    other = harness.submit([9], SamplingParams(max_new_tokens=4))
    harness.drain()
    assert other is not None
    assert isinstance(failing.outputs[0].error, NonFiniteRequest)
    assert other.outputs[0].error is None


def test_a_state_that_is_not_finite_is_not_kept_for_others() -> None:
    """Mamba layers after the last attention layer have states, and no K and V to flag them."""
    model = tiny_model(layer_types=["mamba", "attention", "attention", "mamba"])
    sizes = PagedConfig(page_size=8, max_tokens=320, max_sequences=4, chunk_tokens=32)
    stem = [3 + i % 50 for i in range(32)]
    params = SamplingParams(max_new_tokens=4, stop_tokens=())
    with Engine(model, sizes) as engine:
        engine.generate([[*stem, 4]], SamplingParams(max_new_tokens=1))
        weight = model.model.layers[-1].mamba.in_proj.weight
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        for last in (5, 6):
            engine.generate([[*stem, last]], SamplingParams(max_new_tokens=1))
        with torch.no_grad():
            weight.copy_(saved)
        found = [engine.generate([*stem, last], params)[0].tokens for last in (5, 6)]
        engine.forget_prefixes()
        assert found == [engine.generate([*stem, last], params)[0].tokens for last in (5, 6)]


def test_a_request_whose_copy_cannot_be_loaded_once_is_computed_again() -> None:
    """One case of memory that is short for a moment."""
    harness = EngineHarness(HashOracle(), {"preemption": "swap"}, pages=10, rows=3)
    params = SamplingParams(max_new_tokens=12, stop_tokens=())
    requests = [harness.submit([number] * 6, params) for number in range(1, 4)]
    faults = [torch.OutOfMemoryError("out of memory")]

    def fault(call: str, rows: Any) -> None:
        if call == "load_pages" and faults:
            raise faults.pop()

    harness.runner.fault = fault
    harness.drain()
    assert not faults, "no copy was loaded"
    for request in requests:
        assert request is not None
        expected = expected_tokens(harness.oracle, request.prompt, params)
        assert (request.outputs[0].error, request.outputs[0].tokens) == (None, expected)
