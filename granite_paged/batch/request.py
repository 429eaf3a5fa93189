"""Requests of a batch file: the fields of OpenAI's completions and chat completions.

::

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "text", …}}
    {"custom_id": "b", "url": "/v1/chat/completions", "body": {"messages": [{…}], …}}
    {"prompt": "text", "max_tokens": 5}

A field is used, or it has a value that changes nothing, or the line is refused by its name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from granite_paged.batch.lines import Line
from granite_paged.engine.defaults import end_of_text, sampling_fields
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidRequest, InvalidSampling

URLS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
"""Addresses of OpenAI's interface, and the field that holds the prompt."""

_SAMPLING = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "n": "n",
    "seed": "seed",
    "stop": "stop_strings",
    "repetition_penalty": "repetition_penalty",
    "priority": "priority",
}

_READ = (
    *("model", "prompt", "messages", "user", "logprobs", "top_logprobs"),
    *("ignore_eos", "return_token_ids"),
)

FIELDS = frozenset({*_SAMPLING, *_READ} - {"model", "user"})
"""Fields that an answer depends on."""

_CHANGES_NOTHING: dict[str, Callable[[Any], bool]] = {
    "stream": lambda value: value is False,
    "echo": lambda value: value is False,
    "store": lambda value: value is False,
    "best_of": lambda value: value == 1,
    "frequency_penalty": lambda value: value == 0,
    "presence_penalty": lambda value: value == 0,
    "logit_bias": lambda value: value == {},
    "tools": lambda value: value == [],
    "suffix": lambda value: value == "",
    "response_format": lambda value: value == {"type": "text"},
}
_UNUSED = ("tool_choice", "parallel_tool_calls", "functions", "function_call", "stream_options")

_ENVELOPE = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a line does not say.

    Attributes:
        generation_config: the model's, or None.
        max_new_tokens: most tokens of an answer. None: what the generation config says, or 64.
        seed: its sum with the line's number is the seed of a line that names none.
    """

    generation_config: Any | None = None
    max_new_tokens: int | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what answers depend on."""
        config = self.generation_config
        sampling = sampling_fields(config) if config is not None else {}
        stops = sorted(end_of_text(config))
        return {
            "sampling": sampling,
            "stops": stops,
            "most": self.max_new_tokens,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks.

    Attributes:
        number: number of the line.
        prompt: text, token ids or chat messages.
        fields: fields of `SamplingParams` that the line sets.
        chat: whether the answer has the format of a chat completion.
        token_ids: whether the answer lists its token ids.
        spelled: names of those fields in the line.
    """

    number: int
    prompt: Any
    fields: dict[str, Any]
    chat: bool = False
    token_ids: bool = False
    spelled: dict[str, str] = field(default_factory=dict)

    def params(self, defaults: Defaults, prompt_tokens: int = 0) -> SamplingParams:
        """Return the params of the line.

        Raises:
            InvalidRequest: if a field is out of range.
        """
        most, seed = defaults.max_new_tokens, (defaults.seed + self.number) % 2**63
        fields = {"max_new_tokens": most, "seed": seed, **self.fields}
        config = defaults.generation_config
        try:
            return SamplingParams.from_generation_config(
                config, prompt_tokens=prompt_tokens, **fields
            )
        except InvalidSampling as error:
            message = str(error)
            for ours, theirs in self.spelled.items():
                message = message.replace(ours, theirs)
            raise InvalidRequest(message) from None


def request_of(line: Line, models: Iterable[str]) -> BatchRequest:
    """Return what a line asks.

    Args:
        line: a line without a problem.
        models: names that the line may call the model by.

    Raises:
        InvalidRequest: if a field is unknown, not supported, contradictory or of another type.
    """
    body, source = _body(line.data)
    given = {name: value for name, value in body.items() if value is not None}
    _check_fields(given, source)
    if given.get("model") not in (None, *models):
        known = " or ".join(dict.fromkeys(models))
        raise InvalidRequest(f"model must be {known}, got {given['model']!r:.80}")
    spelled = {ours: theirs for theirs, ours in _SAMPLING.items() if theirs in given}
    fields = {ours: given[theirs] for ours, theirs in spelled.items()}
    if _switch(given, "ignore_eos"):
        fields["stop_tokens"] = ()
    fields["logprobs"] = _logprobs(given, source == "messages")
    return BatchRequest(
        line.number,
        given[source],
        fields,
        chat=source == "messages",
        token_ids=_switch(given, "return_token_ids"),
        spelled=spelled,
    )


def _body(data: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields of a request, and which of them holds the prompt."""
    if "custom_id" in data and not isinstance(data["custom_id"], str):
        raise InvalidRequest(f"custom_id must be text, got {_short(data['custom_id'])}")
    if "body" not in data:
        body = {name: value for name, value in data.items() if name not in _ENVELOPE}
    elif isinstance(data["body"], dict):
        body = data["body"]
        for name in data:
            if name not in _ENVELOPE:
                raise InvalidRequest(f"{name} is not a field next to body; put it into body")
    else:
        raise InvalidRequest(f"body must be an object, got {_short(data['body'])}")
    if data.get("method", "POST") != "POST":
        raise InvalidRequest(f"method must be POST, got {_short(data['method'])}")
    return body, _source(data.get("url"), body)


def _source(url: Any, body: dict[str, Any]) -> str:
    found = [name for name in ("prompt", "messages") if body.get(name) is not None]
    if len(found) != 1:
        raise InvalidRequest(f"it must have a prompt or messages, got {' and '.join(found) or '-'}")
    if url is None:
        return found[0]
    if not isinstance(url, str) or url not in URLS:
        raise InvalidRequest(f"url must be {' or '.join(URLS)}, got {_short(url)}")
    if URLS[url] != found[0]:
        raise InvalidRequest(f"{url} takes {URLS[url]}, got {found[0]}")
    return found[0]


def _check_fields(given: dict[str, Any], source: str) -> None:
    for name, value in given.items():
        if name in _CHANGES_NOTHING:
            if not _CHANGES_NOTHING[name](value):
                raise InvalidRequest(f"{name} is not supported; remove it, got {_short(value)}")
        elif name in _UNUSED:
            raise InvalidRequest(f"{name} is not supported; remove it")
        elif name not in _READ and name not in _SAMPLING:
            raise InvalidRequest(f"{name} is not a field of this format; remove it")
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise InvalidRequest("max_tokens and max_completion_tokens are the same: give one")
    if source == "prompt":
        _check_prompt(given["prompt"])
    else:
        _check_messages(given["messages"])


def _check_messages(messages: Any) -> None:
    is_list = isinstance(messages, list) and bool(messages)
    if not is_list or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise InvalidRequest(f"messages must be objects with a role, got {_short(messages)}")


def _check_prompt(prompt: Any) -> None:
    is_list = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not is_list:
        raise InvalidRequest(f"prompt must be one text or token ids, got {_short(prompt)}")


def _logprobs(given: dict[str, Any], chat: bool) -> int | None:
    """Return how many most likely tokens to report; None: no log-probabilities at all."""
    if not chat:
        if "top_logprobs" in given:
            raise InvalidRequest("top_logprobs is a field of chat; use logprobs")
        found = given.get("logprobs")
        if found is not None and type(found) is not int:
            raise InvalidRequest(f"logprobs must be a whole number, got {_short(found)}")
        return found
    top = given.get("top_logprobs", 0)
    if _switch(given, "logprobs"):
        return top if type(top) is int else _refuse_top(top)
    return None if top == 0 else _refuse_top(top)


def _refuse_top(top: Any) -> int:
    problem = "must be a whole number, together with logprobs: true"
    raise InvalidRequest(f"top_logprobs {problem}, got {_short(top)}")


def _switch(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return reprlib.repr(value)
