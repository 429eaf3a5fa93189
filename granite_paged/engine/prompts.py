"""Prompts as callers write them, turned into token ids.

One prompt is one of::

    "text"                                   encoded by the engine's tokenizer
    [5, 17, 8]                               token ids; also numpy, torch, or a matrix of one row
    tokenizer("text")                        its `input_ids`, without padding
    [{"role": "user", "content": "text"}]    chat messages, by the tokenizer's chat template

Anything else is refused by name, before any work.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Number
from typing import Any, Protocol

from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidSampling, PromptError, TokenizerError, check_token_range


class Array(Protocol):
    """An array of numpy or torch."""

    def tolist(self) -> Any:
        """Return its numbers as nested lists."""
        ...


Prompt = str | Sequence[int] | Array | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A text, token ids, a tokenizer's output, or chat messages."""


class PromptEncoder:
    """Turns prompts into token ids of the model's vocabulary."""

    def __init__(self, tokenizer: Any | None, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def encode(self, prompt: Prompt, what: str = "prompt") -> tuple[int, ...]:
        """Return the token ids of a prompt, a context, or a continuation (without special tokens).

        Raises:
            TokenizerError: for text or messages, without a tokenizer.
            PromptError: if there are no tokens, one is outside the vocabulary, or `prompt` is none
                of the above.
        """
        if isinstance(prompt, str):
            return self.encode(self._encoded(prompt, what), what)
        rows = as_prompts(prompt)
        one = rows[0] if len(rows) == 1 else prompt
        if isinstance(one, list) and one and all(map(_is_message, one)):
            one = self._chat(one, what)
        return check_tokens(one, self._vocabulary, what)

    def _encoded(self, text: str, what: str) -> list[int]:
        tokenizer = self._tokenizer_for(what)
        try:
            return list(tokenizer(text, add_special_tokens=what != "continuation")["input_ids"])
        except Exception as error:
            raise PromptError(f"the tokenizer cannot encode the {what}: {error!r}") from error

    def _chat(self, messages: list[Mapping[str, Any]], what: str) -> list[int]:
        tokenizer = self._tokenizer_for(what)
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError(
                f"the {what} is chat messages, but the tokenizer has no chat template"
            )
        try:
            tokens: list[int] = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise PromptError(f"the chat template refuses the {what}: {error!r}") from error
        return tokens

    def _tokenizer_for(self, what: str) -> Any:
        if self._tokenizer is None:
            raise TokenizerError(f"a {what} that is text needs a tokenizer: Engine(tokenizer=...)")
        return self._tokenizer


def as_prompts(prompts: Any) -> list[Any]:
    """Return one prompt or several as a list of prompts. Arrays become lists."""
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        return _unpadded(prompts)
    plain = _plain(prompts)
    if isinstance(plain, str | bytes | Mapping | Set) or not isinstance(plain, Iterable):
        return [plain]
    listed = list(plain)
    return [listed] if listed and _is_part(listed[0]) else listed


def check_tokens(tokens: Any, vocabulary: int, what: str) -> tuple[int, ...]:
    """Return token ids as a tuple of int.

    Raises:
        PromptError: if there are none, or one is no integer or outside the vocabulary.
    """
    plain = _plain(tokens)
    if isinstance(plain, str | bytes) or not isinstance(plain, Sequence):
        raise PromptError(
            f"a {what} must be text, token ids, a tokenizer's output or chat messages, "
            f"got {reprlib.repr(tokens)}"
        )
    checked = tuple(t if type(t) is int else _token(t, what) for t in plain)
    if not checked:
        raise PromptError(f"empty {what}: it has no tokens")
    check_token_range(min(checked), max(checked), vocabulary)
    return checked


def checked_params(params: SamplingParams | None) -> SamplingParams:
    """Return the params, or their defaults. Raises InvalidSampling for another type."""
    if params is None or isinstance(params, SamplingParams):
        return params or SamplingParams()
    raise InvalidSampling(f"params must be SamplingParams, got {reprlib.repr(params)}")


def matched(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    """Return the params of each prompt.

    Raises:
        InvalidSampling: if there are more or fewer than prompts, or one is of another type.
    """
    if not isinstance(params, Sequence):
        return [checked_params(params)] * prompts
    if len(params) != prompts:
        raise InvalidSampling(f"{len(params)} params for {prompts} prompts: give one, or one each")
    return [checked_params(one) for one in params]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _unpadded(encoding: Mapping[str, Any]) -> list[Any]:
    """Return the rows of a tokenizer's output, without the tokens that its mask hides."""
    ids, mask = _plain(encoding["input_ids"]), _plain(encoding.get("attention_mask"))
    if not isinstance(ids, list) or not ids or not isinstance(ids[0], list):
        ids, mask = [ids], [mask]
    if mask is None or mask[0] is None:
        return list(ids)
    return [
        [token for token, seen in zip(row, shown, strict=False) if seen]
        for row, shown in zip(ids, mask, strict=False)
    ]


def _is_part(value: Any) -> bool:
    """Return whether a list that begins with `value` is one prompt, not several."""
    is_number = isinstance(value, Number) or getattr(value, "ndim", None) == 0
    return is_number or _is_message(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _token(value: Any, what: str) -> int:
    number = _plain(value)
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    raise PromptError(f"the token ids of a {what} must be integers, got {reprlib.repr(value)}")
