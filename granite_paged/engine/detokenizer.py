"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # decoded for a character whose last bytes are missing
_MAX_HELD = 16  # tokens without certain text; no character has that many
_TAIL = 4  # most tokens of one character: UTF-8 has at most 4 bytes


class Detokenizer:
    """Text of a growing answer. The pieces together are what decoding all tokens at once gives.

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
        self._window: list[int] = []  # tokens that are decoded together, so that joints are right
        self._shown = 0  # number of tokens of the window whose text is certain
        self._sent = 0  # number of characters of the window's text that are certain
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token. Return the text that became certain."""
        self._window.append(token)
        text = self._decode(self._window)
        is_full = len(self._window) - self._shown >= _MAX_HELD
        if text.endswith(_INCOMPLETE):
            return self._certain(self._shift(text)) if is_full else ""
        piece = text[self._sent :]
        if piece:
            self._window = self._window[self._shown :]
            self._shown, self._sent = len(self._window), len(self._decode(self._window))
        elif is_full:
            self._window.pop()  # one more special token, which decoding skips
        return self._certain(piece)

    def finish(self) -> str:
        """End the answer. Return the text that was held back."""
        if self.stopped:
            return ""
        piece = self._certain(self._decode(self._window)[self._sent :])
        held, self._held = self._held, ""
        if not self.stopped:
            piece += held
            self.text += held
        return piece

    def _shift(self, text: str) -> str:
        """Keep only the last tokens of a long window. Return its text but for what they begin."""
        self._window = self._window[-_TAIL:]
        tail = self._decode(self._window)
        begun = int(tail.endswith(_INCOMPLETE))
        piece = text[self._sent : len(text) - begun]
        self._shown, self._sent = 0, len(tail) - begun
        return piece

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = text[: min(found)], ""
        else:
            starts = (len(text) - _overlap(text, stop) for stop in self._stop_strings)
            certain = min(starts, default=len(text))
            text, self._held = text[:certain], text[certain:]
        self.text += text
        return text

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`. `text` is without `stop`."""
    return max(length for length in range(len(stop)) if text.endswith(stop[:length]))
