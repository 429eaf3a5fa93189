"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the tail of a character whose other bytes will come


class Detokenizer:
    """The text of a growing answer.

    Args:
        tokenizer: transformers'.
        stop_strings: the text ends before the first of these that appears.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that a piece is decoded with, so that joints come out right
        self._shown = 0
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int) -> str:
        """One more token. Returns the text that is certain now."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return self._certain(now[len(before) :])

    def finish(self) -> str:
        """No more tokens. Returns the text that was held back."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._start : self._shown])
        rest = self._decode(self._tokens[self._start :])[len(before) :]
        piece = self._certain(rest)
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
    """Characters at the end of the text that the stop string begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
