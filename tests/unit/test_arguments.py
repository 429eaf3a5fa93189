"""Wrong types and sizes of every argument: each is refused by name, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.engine.group import EngineGroup
from granite_paged.errors import GeometryError, GranitePagedError
from tests.helpers.simulated_runner import HashOracle, SimulatedRunner

WORDS: list[Any] = ["many", None, [1], math.nan]
SIZES: list[Any] = [*WORDS, 0, -1, 2.5, True]

ENGINE: dict[str, list[Any]] = {
    "step_tokens": [value for value in SIZES if value is not None],
    "longest_step": [*WORDS, 0.5, -1, True],
    "queue": SIZES,
    "state_bytes": [*WORDS, -1, 2.5, True],
    "swap_bytes": [*WORDS, -1, 2.5, True],
    "preemption": ["both", None, 5, ["swap"]],
    "tokenizer": ["gpt2", 5, len],
    "runner": ["cuda", 5],
}
CONFIG: dict[str, list[Any]] = {
    "page_size": [*SIZES, 7],
    "memory_fraction": [*WORDS, 0, 1.5, True],
    "max_tokens": [*[value for value in SIZES if value is not None], 8],
    "max_sequences": [value for value in SIZES if value is not None],
    "chunk_tokens": [*SIZES, 8, 48],
    "backend": ["triton", None, 5],
    "check_finite": ["yes", None, 1],
}
CALLS: dict[str, tuple[Callable[[Engine, Any], object], list[Any]]] = {
    "params in submit": (lambda e, v: e.submit([1], v), [5, {"n": 2}, "greedy"]),
    "params in generate": (lambda e, v: e.generate([[1]], v), [5, {"n": 2}, "greedy", [1]]),
    "params in search": (lambda e, v: e.search([[1]], v), [5, {"n": 2}, "greedy"]),
    "params in stream": (lambda e, v: next(e.stream([1], v)), [5, {"n": 2}]),
    "on_token": (lambda e, v: e.submit([1], on_token=v), [5, "print", [print]]),
    "progress in generate": (lambda e, v: e.generate([[1]], progress=v), [5, None, "bar"]),
    "progress in score": (lambda e, v: e.score([([1], [[2]])], progress=v), [5, None]),
    "progress in search": (lambda e, v: e.search([[1]], progress=v), [5, None]),
    "beams": (lambda e, v: e.search([[1]], beams=v), [*SIZES, 10**9]),
    "length_penalty": (lambda e, v: e.search([[1]], length_penalty=v), [*WORDS, math.inf, True]),
    "items": (lambda e, v: e.score(v), [5, None, "text"]),
    "item": (lambda e, v: e.score([v]), [5, None, "ab", ([1],), ([1], [[2]], 3)]),
    "namespace": (lambda e, v: e.score([([1], [[2]])], namespace=v), [5, None]),
    "context": (lambda e, v: e.score([(v, [[2]])]), [5, None, [], [1.5], "text"]),
    "continuation": (lambda e, v: e.score([([1], [v])]), [None, [], [1.5], "text"]),
    "prompt in search": (lambda e, v: e.search([v]), [None, [], [1.5], "text"]),
    "prompt in stream": (lambda e, v: next(e.stream(v)), [None, [], [1.5], "text"]),
    "cancel": (lambda e, v: e.cancel(v), [5, None, "all"]),
    "engines": (lambda e, v: EngineGroup(v), [5, None, "cpu", ["cpu"], []]),
    "devices": (lambda e, v: EngineGroup.replicas(None, v), [5, None, "cpu"]),
}


def rows(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={value!r}")
        for name, values in table.items()
        for value in values
    ]


def make_engine(**options: Any) -> Engine:
    runner: Any = SimulatedRunner(HashOracle())
    return Engine(None, **({"runner": runner} | options))


@pytest.mark.parametrize(("name", "value"), rows(ENGINE))
def test_an_option_of_an_engine_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(GranitePagedError, match=f"^{name} must .*, got "):
        make_engine(**{name: value})


@pytest.mark.parametrize(("name", "value"), rows(CONFIG))
def test_a_size_of_a_config_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(GeometryError, match=f"^{name} must .*, got "):
        PagedConfig(**{name: value})


@pytest.mark.parametrize("value", [5, "small", {"page_size": 16}])
def test_a_config_of_the_wrong_type_is_refused_by_name(value: Any) -> None:
    with pytest.raises(GeometryError, match=r"^config must be a PagedConfig, got "):
        PagedConfig.checked(value)


@pytest.mark.parametrize(
    ("name", "value"), rows({name: values for name, (_, values) in CALLS.items()})
)
def test_an_argument_of_a_call_is_refused_by_name(name: str, value: Any) -> None:
    engine = make_engine()
    with pytest.raises(GranitePagedError, match=rf"{name.split(maxsplit=1)[0]}|token"):
        CALLS[name][0](engine, value)
    assert engine.idle
    assert engine.stats().steps == 0


@pytest.mark.parametrize("value", [5, None, ("a",)])
def test_a_namespace_must_be_text(value: Any) -> None:
    with pytest.raises(GranitePagedError, match=r"^namespace must be a str, got "):
        SamplingParams(namespace=value)


def test_a_request_of_another_engine_cannot_be_cancelled() -> None:
    ours, theirs = make_engine(), make_engine()
    request = theirs.submit([1, 2])
    with pytest.raises(GranitePagedError, match="a request of this engine"):
        ours.cancel(request)
    theirs.cancel(request)
    assert request.finished


def test_an_engine_is_listed_once_in_a_group() -> None:
    engine = make_engine()
    with pytest.raises(GranitePagedError, match="twice"):
        EngineGroup([engine, engine])


def test_integers_of_numpy_are_sizes() -> None:
    config = PagedConfig(page_size=np.int64(16), max_tokens=np.int32(64))  # type: ignore[arg-type]
    assert type(config.page_size) is type(config.max_tokens) is int
    engine = make_engine(queue=np.int64(2), state_bytes=np.int64(0))
    assert engine.submit([1]).number == 0
