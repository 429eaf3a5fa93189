"""What a model's generation config says, read as transformers' `generate()` reads it.

Host only and without torch: a generation config is any object with the fields of transformers'
`GenerationConfig`.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from granite_paged.errors import InvalidSampling

_TAKEN = ("max_new_tokens", "top_k", "top_p", "repetition_penalty", "stop_strings")

_TOP_K = 50  # transformers' own default wherever it samples

_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
}
"""Fields that `generate()` honours and the engine does not, with the values that do nothing."""


def sampling_fields(config: Any | None, prompt_tokens: int = 0) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that a generation config sets.

    Raises:
        InvalidSampling: if its `max_length` leaves no token for an answer.
    """
    fields = {name: getattr(config, name, None) for name in _TAKEN}
    if getattr(config, "do_sample", None):
        temperature, top_k = getattr(config, "temperature", None), fields["top_k"]
        fields["temperature"] = 1.0 if temperature is None else temperature
        fields["top_k"] = _TOP_K if top_k is None else top_k
    max_length = getattr(config, "max_length", None)
    if fields["max_new_tokens"] is None and max_length is not None:
        fields["max_new_tokens"] = _room(max_length, prompt_tokens)
    return {name: value for name, value in fields.items() if value is not None}


def _room(max_length: Any, prompt_tokens: int) -> int:
    if not isinstance(max_length, Integral) or max_length < 1:
        raise InvalidSampling(f"max_length must be an integer of at least 1, got {max_length!r}")
    if max_length <= prompt_tokens:
        raise InvalidSampling(
            f"max_length of the generation config must exceed the prompt's {prompt_tokens} tokens: "
            f"set max_new_tokens, got {max_length}"
        )
    return int(max_length) - prompt_tokens


def ignored_fields(config: Any | None) -> list[str]:
    """Return the fields that change what `generate()` answers, and that the engine ignores."""
    set_here = {name: getattr(config, name, None) for name in _NEUTRAL}
    return [name for name, value in set_here.items() if value not in (None, _NEUTRAL[name])]


def end_of_text(*configs: Any) -> frozenset[int]:
    """Return the stop tokens of the first config that has any: all of its `eos_token_id`.

    Raises:
        InvalidSampling: if one is no token id.
    """
    for config in configs:
        given = getattr(config, "eos_token_id", None)
        if given is not None:
            return frozenset(_token_ids(given))
    return frozenset()


def _token_ids(given: Any) -> list[int]:
    tokens = [given] if isinstance(given, Integral) else given
    if isinstance(tokens, str) or not all(map(_is_token, tokens)):
        raise InvalidSampling(f"eos_token_id must be a token id or a list of them, got {given!r}")
    return [int(token) for token in tokens]


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0
