"""Lines of an output file, in the format of OpenAI's batch interface.

A line depends on nothing but its request, the model and the settings: it holds no time and no
random name. So a resumed run writes the same bytes as one that was not interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from granite_paged.batch.lines import Line
from granite_paged.batch.request import BatchRequest
from granite_paged.engine.request import Output, TokenLogprob

PREFIX = "batch_req_"

_LOWEST = -9999.0  # JSON has no -inf

_NOT_TEXT = "\ufffd"  # the text of a token that is part of a character

TokenText = Callable[[int], str]
"""Returns the text of one token."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One output line.

    Attributes:
        content: its bytes.
        tokens: number of tokens of the answer, over all samples.
        error: why there is no answer, or "".
    """

    content: bytes
    tokens: int = 0
    error: str = ""


def answer_id(run: str, line: Line) -> str:
    """Return the id of a line's answer: digests of the run (see `answering.py`) and of the line."""
    return f"{PREFIX}{run}_{line.digest}"


def error_line(run: str, line: Line, code: str, message: str) -> Answer:
    """Return the output line of a request that has no answer."""
    message = f"line {line.number}: {' '.join(message.split())}"
    content = _encoded(run, line, None, {"code": code, "message": message})
    return Answer(content, error=message)


def answer_line(
    run: str,
    line: Line,
    request: BatchRequest,
    outputs: Sequence[Output],
    *,
    model: str,
    text: TokenText,
) -> Answer:
    """Return the output line of an answered request."""
    new = sum(len(output.tokens) for output in outputs)
    old = len(outputs[0].prompt)
    kind = ("chatcmpl", "chat.completion") if request.chat else ("cmpl", "text_completion")
    body = {
        "id": f"{kind[0]}-{line.digest}",
        "object": kind[1],
        "created": 0,  # a time would make two runs differ
        "model": model,
        "choices": [_choice(request, output, text) for output in outputs],
        "usage": {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new},
    }
    response = {"status_code": 200, "request_id": f"req_{line.digest}", "body": body}
    return Answer(_encoded(run, line, response, None), new)


def _encoded(run: str, line: Line, response: Any, error: Any) -> bytes:
    row = {"id": answer_id(run, line), "custom_id": line.custom_id}
    return json.dumps({**row, "response": response, "error": error}).encode() + b"\n"


def _choice(request: BatchRequest, output: Output, text: TokenText) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": output.index}
    if request.chat:
        choice["message"] = {"role": "assistant", "content": output.text}
        choice["logprobs"] = _chat_logprobs(output.logprobs, text) if output.logprobs else None
    else:
        choice["text"] = output.text
        choice["logprobs"] = _text_logprobs(output.logprobs, text) if output.logprobs else None
    choice["finish_reason"] = output.finish
    if request.token_ids:
        choice["token_ids"] = list(output.tokens)
    return choice


def _chat_logprobs(logprobs: Sequence[TokenLogprob], text: TokenText) -> dict[str, Any]:
    content = [
        {
            **_token(text(one.token), one.logprob),
            "top_logprobs": [_token(text(token), value) for token, value in one.top],
        }
        for one in logprobs
    ]
    return {"content": content}


def _token(text: str, logprob: float) -> dict[str, Any]:
    is_part = _NOT_TEXT in text  # which bytes the token has is not known
    utf8 = None if is_part else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": utf8}


def _text_logprobs(logprobs: Sequence[TokenLogprob], text: TokenText) -> dict[str, Any]:
    tokens = [text(one.token) for one in logprobs]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": [_by_text(one.top, text) for one in logprobs],
        "text_offset": offsets[:-1],
    }


def _by_text(top: Sequence[tuple[int, float]], text: TokenText) -> dict[str, float]:
    """Return log-probabilities by text. Of tokens with the same text, the first one counts.

    top: tokens and their log-probabilities, the best first.
    """
    found: dict[str, float] = {}
    for token, logprob in top:
        found.setdefault(text(token), _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
