"""Validation of requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from granite_paged.bench.workload import Workload, arrivals
from granite_paged.engine.prompts import check_tokens
from granite_paged.engine.request import COLDEST, SamplingParams
from granite_paged.errors import InvalidArgument, InvalidSampling, PromptError

WRONG: dict[str, Any] = {
    "max_new_tokens": 0,
    "temperature": -0.1,
    "top_k": -1,
    "top_p": 0.0,
    "repetition_penalty": 0.0,
    "seed": -1,
    "logprobs": -1,
    "stop_strings": ("",),
    "n": 0,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_parameter_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidSampling, match=f"^{name} must .*, got "):
        SamplingParams(**{name: WRONG[name]})


WRONG_TYPES: dict[str, list[Any]] = {
    "max_new_tokens": [2.5, "3", True, None, 10**5000],
    "temperature": ["hot", True, None, 10**400, 10**5000],
    "top_k": [2.5, False],
    "top_p": ["all", None, 10**400],
    "repetition_penalty": [None, True, 1e39, 10**400],
    "seed": [1.5, None],
    "logprobs": [1.5, True],
    "stop_tokens": [2, "ab", (2.0,), (True,), {2: True}],
    "stop_strings": [5, (5,), None, {"red": True}],
    "n": [2.0, None, 2**16],
    "priority": [0.5, None],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in WRONG_TYPES.items()
        for number, value in enumerate(values)
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidSampling, match=f"^{name} must .*, got "):
        SamplingParams(**{name: value})


def test_the_defaults_are_the_documented_ones() -> None:
    assert SamplingParams() == SamplingParams(
        max_new_tokens=64,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=0,
        logprobs=None,
        stop_tokens=None,
        stop_strings=(),
        n=1,
        priority=0,
        streamed=False,
        namespace="",
    )


@pytest.mark.parametrize(
    ("name", "held", "refused"),
    [
        ("max_new_tokens", [1, 2**31 - 1], [0, 2**31]),
        ("seed", [0, 2**63 - 1], [2**63]),
        ("repetition_penalty", [1e-6, 1e6], [9e-7, 1e6 + 0.5]),
        ("stop_tokens", [(0,)], [(-1,)]),
        ("logprobs", [0], [-1]),
        ("n", [1, 2**16 - 1], [0, 2**16]),
        ("top_p", [1e-9, 1.0], [0.0, 1.0000001]),
    ],
)
def test_a_parameter_is_taken_up_to_its_bounds(
    name: str, held: list[Any], refused: list[Any]
) -> None:
    for value in held:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(InvalidSampling, match=f"^{name} must"):
            SamplingParams(**{name: value})


def test_the_coldest_temperature_still_samples() -> None:
    assert SamplingParams(temperature=COLDEST).samples
    assert not SamplingParams(temperature=COLDEST / 2).samples
    assert SamplingParams().greedy
    for field in ({"temperature": 1.0}, {"repetition_penalty": 1.5}, {"logprobs": 0}):
        assert not SamplingParams(**field).greedy


def test_common_number_types_are_converted() -> None:
    params: Any = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "top_p": 1}
    params |= {"stop_tokens": [np.int64(4), 5], "stop_strings": "red"}
    converted = SamplingParams(**params)
    assert type(converted.max_new_tokens) is int
    assert type(converted.temperature) is type(converted.top_p) is float
    assert converted.stop_tokens == (4, 5)
    assert converted.stop_strings == ("red",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_temperature_must_be_finite(value: float) -> None:
    with pytest.raises(InvalidSampling, match="temperature"):
        SamplingParams(temperature=value)


@pytest.mark.parametrize(
    ("tokens", "reason"), [([], "empty prompt"), ([5, 97], "token 97"), ([-1], "token -1")]
)
def test_tokens_are_checked(tokens: list[int], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        check_tokens(tokens, 97, "prompt")


@pytest.mark.parametrize("other", [np.int64(4), np.array(4)])
def test_token_ids_of_several_types_become_int(other: Any) -> None:
    tokens = check_tokens([5, other, 6], 97, "prompt")
    assert tokens == (5, 4, 6)
    assert {type(token) for token in tokens} == {int}


@pytest.mark.parametrize("other", [True, 4.0, "4", None])
def test_a_token_that_is_no_integer_is_refused(other: Any) -> None:
    with pytest.raises(PromptError, match="must be integers"):
        check_tokens([5, other, 6], 97, "prompt")


def test_a_workload_is_determined_by_its_seed() -> None:
    workload = Workload(
        requests=50, rate=10, shared_tokens=8, kinds=2, long_every=10, long_tokens=99
    )
    coming = arrivals(workload, 97, seed=3)
    assert coming == arrivals(workload, 97, seed=3)
    assert coming != arrivals(workload, 97, seed=4)
    assert [one.at for one in coming] == sorted(one.at for one in coming)
    assert 2 < coming[-1].at < 10, "50 requests at 10 per second"
    assert [len(one.prompt) == 99 for one in coming].count(True) == 5
    assert len({one.prompt[:8] for one in coming if len(one.prompt) < 99}) == 2
    assert all(len(one.prompt) + one.new_tokens <= workload.longest for one in coming)


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": (0, 4)}, {"new_tokens": (5, 4)}, {"long_every": 3}]
)
def test_an_impossible_workload_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Workload(**wrong)


def test_samples_and_temperatures_have_the_documented_ends() -> None:
    assert SamplingParams(n=65_535).n == 65_535
    with pytest.raises(InvalidSampling, match="n must be"):
        SamplingParams(n=65_536)
    assert SamplingParams(temperature=1e-8).samples
    assert not SamplingParams(temperature=0.99e-8).samples
