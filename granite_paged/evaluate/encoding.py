"""Turn text into token ids as lm-eval does.

A continuation's tokens are those of context and continuation together, after the length of the
context alone. A tokenizer may merge across the seam; lm-eval's results include the same effect.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from granite_paged.errors import TokenizerError
from granite_paged.evaluate.scorer import ScoreRequest

_BATCH = 256  # questions per call of the tokenizer
_COVERED = 0.9  # least share of a model's vocabulary; the rest may be padding


@dataclass(frozen=True)
class TextQuestion:
    """A question as text; each choice follows the context after a space."""

    key: str
    group: str
    context: str
    choices: tuple[str, ...]
    labels: tuple[int, ...]


class Encoder:
    """A tokenizer whose vocabulary fits the model's.

    Raises:
        TokenizerError: if there is no tokenizer, or its vocabulary does not fit.
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

    def requests(self, questions: Sequence[TextQuestion]) -> list[ScoreRequest]:
        """Return one request per question, in the same order."""
        return [
            request
            for start in range(0, len(questions), _BATCH)
            for request in self._batch(questions[start : start + _BATCH])
        ]

    def _batch(self, questions: Sequence[TextQuestion]) -> Iterator[ScoreRequest]:
        texts = [
            text
            for question in questions
            for text in (question.context, *(f"{question.context} {c}" for c in question.choices))
        ]
        encoded = iter(self._tokenizer(texts)["input_ids"])
        for question in questions:
            context = next(encoded)
            yield ScoreRequest(context, [next(encoded)[len(context) :] for _ in question.choices])


def shared_prefix(contexts: Sequence[Sequence[int]]) -> int:
    """Return the number of leading tokens that all contexts share; 0 for a single context."""
    if len(contexts) < 2:
        return 0
    # of all sequences in sorted order, the first and the last share the shortest prefix
    return common_tokens(min(map(tuple, contexts)), max(map(tuple, contexts)))


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences share."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in pairs)
