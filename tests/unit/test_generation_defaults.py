"""Sampling params from a generation config: what transformers' `generate()` would take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from granite_paged.engine.defaults import end_of_text, ignored_fields, sampling_fields
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidSampling


def params_of(overrides: dict[str, Any] | None = None, **fields: Any) -> SamplingParams:
    config = GenerationConfig(**fields)
    return SamplingParams.from_generation_config(config, **overrides or {})


def test_an_empty_config_gives_the_defaults() -> None:
    assert params_of() == SamplingParams.from_generation_config(None) == SamplingParams()


def test_sampling_fields_are_taken() -> None:
    fields = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.05,
        "max_new_tokens": 20,
    }
    found = params_of(do_sample=True, stop_strings=["\n\n"], **fields)
    assert found == SamplingParams(**fields, stop_strings=("\n\n",))


def test_without_do_sample_the_most_likely_token_is_taken() -> None:
    assert params_of(temperature=0.7, do_sample=False).temperature == 0
    assert params_of(temperature=0.7).temperature == 0


def test_sampling_has_the_temperature_and_top_k_of_transformers() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    found = params_of(do_sample=True)
    assert (found.temperature, found.top_k) == (defaults["temperature"], defaults["top_k"])


def test_overrides_win_and_none_stands_for_not_set() -> None:
    found = params_of({"temperature": 0.2, "top_p": None}, do_sample=True, top_p=0.9)
    assert (found.temperature, found.top_p) == (0.2, 0.9)


def test_max_length_counts_the_prompt_and_max_new_tokens_wins() -> None:
    assert params_of(max_length=50).max_new_tokens == 50
    assert params_of({"prompt_tokens": 10}, max_length=50).max_new_tokens == 40
    assert params_of({"prompt_tokens": 10}, max_length=50, max_new_tokens=7).max_new_tokens == 7
    assert params_of({"prompt_tokens": 60, "max_new_tokens": 3}, max_length=50).max_new_tokens == 3
    assert params_of({"prompt_tokens": 60, "max_new_tokens": 3}, max_length=1).max_new_tokens == 3
    with pytest.raises(InvalidSampling, match=r"max_length of the generation config .* 50"):
        params_of({"prompt_tokens": 50}, max_length=50)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "50"])
def test_a_max_length_that_is_no_positive_integer_is_refused(wrong: Any) -> None:
    config = SimpleNamespace(max_length=wrong)
    with pytest.raises(InvalidSampling, match=f"an integer of at least 1, got {wrong!r}"):
        sampling_fields(config)


def test_max_length_is_all_for_the_answer_where_no_prompt_is_counted() -> None:
    assert sampling_fields(SimpleNamespace(max_length=1)) == {"max_new_tokens": 1}


@pytest.mark.parametrize(("name", "wrong"), [("top_p", 2.0), ("top_k", "x"), ("max_length", -1)])
def test_a_wrong_value_is_refused_by_name(name: str, wrong: Any) -> None:
    config = GenerationConfig()
    setattr(config, name, wrong)
    with pytest.raises(InvalidSampling, match=name):
        SamplingParams.from_generation_config(config)


def test_fields_that_the_engine_ignores_are_named() -> None:
    assert ignored_fields(GenerationConfig(do_sample=True, top_p=0.5, num_beams=1)) == []
    found = ignored_fields(GenerationConfig(num_beams=4, no_repeat_ngram_size=3, min_p=0.1))
    assert sorted(found) == ["min_p", "no_repeat_ngram_size", "num_beams"]


def test_the_values_of_ignored_fields_that_do_nothing_are_those_of_transformers() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert ignored_fields(SimpleNamespace(**defaults)) == []
    assert ignored_fields(SimpleNamespace(min_new_tokens=0, min_p=0.0, guidance_scale=1.0)) == []
    assert ignored_fields(SimpleNamespace(min_new_tokens=-1, min_p=1, guidance_scale=2)) == [
        "min_new_tokens",
        "min_p",
        "guidance_scale",
    ]


@pytest.mark.parametrize(("given", "expected"), [(5, {5}), (0, {0}), ([5, 9], {5, 9}), ([], set())])
def test_every_end_of_text_token_is_taken(given: Any, expected: set[int]) -> None:
    assert end_of_text(None, GenerationConfig(eos_token_id=given)) == expected


@pytest.mark.parametrize("wrong", [[None, 5], "5", [True], -1, [2.0]])
def test_an_end_of_text_that_is_no_token_is_refused(wrong: Any) -> None:
    config = GenerationConfig()
    config.eos_token_id = wrong
    with pytest.raises(InvalidSampling, match="eos_token_id must be a token id"):
        end_of_text(config)
