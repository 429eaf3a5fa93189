"""A tokenizer whose word for token 7 is "w7". It raises when asked to."""

from __future__ import annotations

from collections.abc import Sequence


class Words:
    """A tokenizer.

    Attributes:
        fails: raised at the next call of "encode" or "decode", once.
    """

    def __init__(self) -> None:
        self.fails: dict[str, Exception] = {}

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        self._fail("encode")
        return {"input_ids": [int(word.removeprefix("w")) for word in text.split()]}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        self._fail("decode")
        return self.text(tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return what `decode` returns, without a fault."""
        return " ".join(f"w{token}" for token in tokens)

    def _fail(self, call: str) -> None:
        if call in self.fails:
            raise self.fails.pop(call)
