"""From text to token ids, as lm-eval does it.

A continuation's tokens are those that context and continuation together have more than the context
alone: tokenisers may merge across the seam, and so they do for everybody.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from granite_paged.errors import TokenizerError
from granite_paged.evaluate.scorer import Request

_BATCH = 256  # questions tokenised at once
_COVERED = 0.9  # of a model's vocabulary; the rest may be padding to a round number


@dataclass(frozen=True)
class TextQuestion:
    """A question before it is tokenised; choices follow the context after a space."""

    key: str
    group: str
    context: str
    choices: tuple[str, ...]
    labels: tuple[int, ...]


class Encoder:
    """A tokenizer that fits a model.

    Raises:
        TokenizerError: without a tokenizer, or with one of another vocabulary.
    """

    def __init__(self, tokenizer: Any | None, vocabulary: int, model: str) -> None:
        if tokenizer is None:
            raise TokenizerError(f"{model} has no tokenizer: pass --tokenizer ID_OR_PATH")
        tokens = len(tokenizer)
        if not _COVERED * vocabulary <= tokens <= vocabulary:
            raise TokenizerError(
                f"the tokenizer has {tokens} tokens, {model} a vocabulary of {vocabulary}: "
                "they do not belong together; pass the model's own --tokenizer"
            )
        self._tokenizer = tokenizer

    def requests(self, questions: Sequence[TextQuestion]) -> list[Request]:
        """One a question, in their order."""
        return [
            request
            for start in range(0, len(questions), _BATCH)
            for request in self._batch(questions[start : start + _BATCH])
        ]

    def _batch(self, questions: Sequence[TextQuestion]) -> Iterator[Request]:
        texts = [
            text
            for question in questions
            for text in (question.context, *(f"{question.context} {c}" for c in question.choices))
        ]
        encoded = iter(self._tokenizer(texts)["input_ids"])
        for question in questions:
            context = next(encoded)
            yield Request(context, [next(encoded)[len(context) :] for _ in question.choices])


def shared_prefix(contexts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all contexts have in common; 0 for a single one."""
    if len(contexts) < 2:
        return 0
    # of all sorted sequences, the first and the last differ soonest
    return common_tokens(min(map(tuple, contexts)), max(map(tuple, contexts)))


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences have in common."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in pairs)
