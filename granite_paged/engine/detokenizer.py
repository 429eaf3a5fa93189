"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded for a character whose last bytes are missing


class Detokenizer:
    """Text of a growing answer.

    Args:
        tokenizer: a transformers tokenizer.
        stop_strings: the text ends before the first of these that appears.

    Attributes:
        text: what is certain so far.
        stopped: whether a stop string appeared.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._tokens: list[int] = []
        self._start = 0  # first token that is decoded again, so that spaces at joints are right
        self._shown = 0  # number of tokens whose text was returned
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token. Return the text that became certain."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return self._certain(now[len(before) :])

    def finish(self) -> str:
        """End the answer. Return the text that was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._start : self._shown])
        piece = self._certain(self._decode(self._tokens[self._start :])[len(before) :])
        held, self._held = self._held, ""
        if not self.stopped:
            piece += held
            self.text += held
        return piece

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = text[: min(found)], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
