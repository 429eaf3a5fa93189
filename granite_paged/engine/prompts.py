"""Prompts as callers write them, turned into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite_paged.engine.request import SamplingParams, check_tokens
from granite_paged.errors import InvalidSampling, PromptError, TokenizerError

Prompt = str | Sequence[int]
"""A text, for an engine with a tokenizer, or token ids."""


class PromptEncoder:
    """Turns prompts into token ids of the model's vocabulary."""

    def __init__(self, tokenizer: Any | None, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    def encode(self, prompt: Prompt, what: str = "prompt") -> tuple[int, ...]:
        """Return the token ids of a prompt, a context, or a continuation (without special tokens).

        Raises:
            TokenizerError: for a text, without a tokenizer.
            PromptError: if there are no tokens, or one is outside the vocabulary.
        """
        tokens = self._encoded(prompt, what) if isinstance(prompt, str) else prompt
        return check_tokens(tokens, self._vocabulary, what)

    def _encoded(self, text: str, what: str) -> Sequence[int]:
        if self._tokenizer is None:
            raise TokenizerError(f"a {what} that is text needs Engine(tokenizer=...)")
        special = what != "continuation"
        try:
            tokens: Sequence[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        except Exception as error:
            raise PromptError(f"the tokenizer cannot encode the {what}: {error!r}") from error
        return tokens


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one prompt or several as a list of prompts."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt, by what it holds
    return list(prompts)  # type: ignore[arg-type]


def matched(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    """Return the params of each prompt. Raises InvalidSampling if there are more or fewer."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise InvalidSampling(f"{len(params)} params for {prompts} prompts: give one, or one each")
    return list(params)
