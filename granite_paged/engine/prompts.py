"""Prompts as callers write them, turned into token ids.

One prompt is one of::

    "text"                                   encoded by the engine's tokenizer
    [5, 17, 8]                               token ids; also numpy, torch, or a matrix of one row
    tokenizer("text")                        its `input_ids`, without padding
    [{"role": "user", "content": "text"}]    chat messages, by the tokenizer's chat template
    Chat(messages, {"tools": [...]})         the same, with arguments for the template

Anything else is refused by name, before any work.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Integral, Number
from typing import Any, Protocol

from granite_paged.engine.request import SamplingParams
from granite_paged.errors import (
    InvalidRequest,
    InvalidSampling,
    PromptError,
    TokenizerError,
    check_token_range,
)


class Array(Protocol):
    """An array of numpy or torch."""

    def tolist(self) -> Any:
        """Return its numbers as nested lists."""
        ...


Message = Mapping[str, Any]
"""One message of a chat: {"role": ..., "content": ...}, and what else the template reads."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and named arguments for the chat template that writes it as a prompt."""

    messages: tuple[Message, ...]
    template: Mapping[str, Any] = field(default_factory=dict)


Prompt = str | Sequence[int] | Array | Mapping[str, Any] | Sequence[Message] | Chat
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
            PromptError: if there are no tokens, one is outside the vocabulary, the chat template
                is missing or raises, or `prompt` is none of the above.
        """
        if isinstance(prompt, str):
            return self.encode(self._encoded(prompt, what), what)
        if isinstance(prompt, Chat):
            return self.encode(self._chat(prompt, what), what)
        rows = as_prompts(prompt)
        one = rows[0] if len(rows) == 1 else prompt
        if isinstance(one, list) and one and all(map(_is_message, one)):
            one = self._chat(Chat(tuple(one)), what)
        return check_tokens(one, self._vocabulary, what)

    def check_chat(self, what: str = "prompt") -> None:
        """Raise TokenizerError without a tokenizer, and PromptError if it has no chat template."""
        if not getattr(self._tokenizer_for(what), "chat_template", None):
            raise PromptError(
                f"the {what} is chat messages, but the tokenizer has no chat template: "
                "set tokenizer.chat_template, or pass text"
            )

    def _encoded(self, text: str, what: str) -> list[int]:
        tokenizer = self._tokenizer_for(what)
        try:
            return list(tokenizer(text, add_special_tokens=what != "continuation")["input_ids"])
        except Exception as error:
            raise PromptError(f"the tokenizer cannot encode the {what}: {error!r}") from error

    def _chat(self, chat: Chat, what: str) -> list[int]:
        self.check_chat(what)
        options = {"add_generation_prompt": True, **chat.template}
        options |= {"tokenize": True, "return_dict": False}
        try:
            tokens: list[int] = self._tokenizer_for(what).apply_chat_template(
                list(chat.messages), **options
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


def conversations(messages: Any) -> list[Sequence[Message]]:
    """Return one conversation or several as a list. Raises PromptError for anything else."""
    if isinstance(messages, Sequence) and not isinstance(messages, str) and messages:
        one = list(messages)
        several = [one] if isinstance(one[0], Mapping) else one
        if all(map(_is_conversation, several)):
            return several
    raise PromptError(
        'messages must be a list of {"role": ..., "content": ...}, or several such lists, '
        f"got {reprlib.repr(messages)}"
    )


def scoring_items(items: Any) -> list[Any]:
    """Return (context, continuations) pairs as a list. Raises InvalidRequest for anything else."""
    if isinstance(items, str | bytes | Mapping | Set) or not isinstance(items, Iterable):
        raise InvalidRequest(
            f"items must be a list of (context, continuations), got {reprlib.repr(items)}"
        )
    return list(items)


def context_and_continuations(item: Any) -> tuple[Any, Any]:
    """Return the two parts of an item to score. Raises InvalidRequest for anything else."""
    if not isinstance(item, Sequence) or isinstance(item, str | bytes) or len(item) != 2:
        raise InvalidRequest(
            f"an item must be a pair (context, continuations), got {reprlib.repr(item)}"
        )
    context, continuations = item
    return context, continuations


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
    checked = tuple(plain)
    if not {int}.issuperset(map(type, checked)):
        checked = tuple(_token(token, what) for token in checked)
    if not checked:
        raise PromptError(f"empty {what}: it has no tokens")
    check_token_range(min(checked), max(checked), vocabulary)
    return checked


def checked_params(params: SamplingParams | None) -> SamplingParams | None:
    """Return the params. Raises InvalidSampling for another type."""
    if params is None or isinstance(params, SamplingParams):
        return params
    raise InvalidSampling(f"params must be SamplingParams, got {reprlib.repr(params)}")


def matched(
    params: SamplingParams | Sequence[SamplingParams | None] | None, prompts: int
) -> list[SamplingParams | None]:
    """Return the params of each prompt; None stands for the model's defaults.

    Raises:
        InvalidSampling: if there are more or fewer than prompts, or one is of another type.
    """
    if not isinstance(params, Sequence):
        return [checked_params(params)] * prompts
    if len(params) != prompts:
        raise InvalidSampling(f"{len(params)} params for {prompts} prompts: give one, or one each")
    return [checked_params(one) for one in params]


def samples_of(params: SamplingParams | None) -> int:
    """Return the number of answers to a prompt with these params."""
    return params.n if params else 1


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


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _token(value: Any, what: str) -> int:
    number = _plain(value)
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    raise PromptError(f"the token ids of a {what} must be integers, got {reprlib.repr(value)}")
