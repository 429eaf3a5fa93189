"""Output lines of a batch: the texts and bytes of log-probabilities."""

from __future__ import annotations

import json
from typing import Any

from granite_paged.batch.answer import answer_line
from granite_paged.batch.lines import parsed
from granite_paged.batch.request import BatchRequest
from granite_paged.engine.request import Output, TokenLogprob

TEXTS = {1: "\ufffd", 2: "\ufffd", 3: "é"}
"""Tokens 1 and 2 are the two bytes of é. Alone, neither is text."""


def logprobs(*tokens: TokenLogprob, chat: bool) -> Any:
    """Return the log-probabilities of an output line."""
    output = Output(0, 0, (5,), [one.token for one in tokens], "é", list(tokens), finish="length")
    request = BatchRequest(1, "x", {}, chat=chat)
    line = parsed(1, b'{"prompt": "x"}')
    answer = answer_line("run", line, request, [output], model="m", text=TEXTS.__getitem__)
    return json.loads(answer.content)["response"]["body"]["choices"][0]["logprobs"]


def test_of_tokens_with_the_same_text_the_most_likely_is_reported() -> None:
    token = TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.5), (3, -2.5)))
    assert logprobs(token, chat=False)["top_logprobs"] == [{"\ufffd": -0.5, "é": -2.5}]


def test_a_token_that_is_part_of_a_character_has_no_bytes() -> None:
    (whole, part) = logprobs(
        TokenLogprob(3, -0.5, ((3, -0.5), (2, -1.5))), TokenLogprob(1, -0.5), chat=True
    )["content"]
    assert (whole["token"], whole["bytes"]) == ("é", list("é".encode()))
    assert [top["bytes"] for top in whole["top_logprobs"]] == [list("é".encode()), None]
    assert (part["token"], part["bytes"]) == ("\ufffd", None)
