"""Lines of batch files: what they ask, what is wrong with them, which output is theirs."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.batch import lines as batch_lines
from granite_paged.batch.answer import Answer, error_line
from granite_paged.batch.lines import Line, parsed, prefix_key, read_lines
from granite_paged.batch.output import BatchOutput
from granite_paged.batch.request import BatchRequest, Defaults, request_of
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import CannotWrite, DataError, InvalidRequest

RUN = "0123456789abcdef"
DEFAULTS = Defaults(max_new_tokens=7, seed=100)


def read(*rows: Any) -> list[Line]:
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return list(read_lines(io.BytesIO(b"\n".join(texts))))


def asked(**row: Any) -> BatchRequest:
    request = request_of(parsed(3, json.dumps(row).encode()), ["tiny", "folder/tiny"])
    request.params(DEFAULTS)
    return request


# -- lines --------------------------------------------------------------------------------------


def test_blank_lines_count_but_ask_nothing() -> None:
    assert [line.number for line in read({"prompt": "a"}, b"", b" \r", {"prompt": "b"})] == [1, 4]


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    (line,) = read(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n')
    assert line.data == {"prompt": "a"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{broken", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"[1]", "must be a JSON object, got b'\\[1\\]'"),
        (b'"\xff"', "not JSON: 'utf-8' codec can't decode"),
        (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_a_broken_line_has_a_problem_and_the_next_has_none(text: bytes, problem: str) -> None:
    broken, sound = read(text, {"prompt": "a"})
    assert re.search(problem, broken.problem)
    assert (sound.number, sound.problem) == (2, "")


def test_a_line_beyond_the_limit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "LONGEST", 1 << 20)
    long, sound = read({"prompt": "x" * (3 << 20)}, {"prompt": "a"})
    assert long.problem == "it is longer than 1 MiB"
    assert len(long.text) < 1000
    assert (sound.number, sound.problem) == (2, "")


def test_ends_of_lines_are_bytes_of_the_file() -> None:
    content = b'{"prompt": "a"}\n\n{"prompt": "bb"}\n'
    assert [line.end for line in read_lines(io.BytesIO(content))] == [16, len(content)]


@pytest.mark.parametrize("name", ["a", "\ud800", ""])
def test_a_repeated_custom_id_is_that_of_the_first_line(name: str) -> None:
    rows = [{"custom_id": name, "prompt": "a"}, {"custom_id": "b"}, {"custom_id": name}]
    assert [line.problem for line in read(*rows)] == [
        "",
        "",
        f"its custom_id {name!r} is that of line 1",
    ]


def test_prompts_with_a_common_beginning_become_neighbours() -> None:
    rows = [{"prompt": p} for p in ("b x", "a x", "b y", "a y")]
    ordered = sorted(read(*rows), key=prefix_key)
    assert [line.data["prompt"] for line in ordered] == ["a x", "a y", "b x", "b y"]


# -- requests -----------------------------------------------------------------------------------


def test_fields_of_openai_become_sampling_params() -> None:
    request = asked(
        custom_id="a",
        method="POST",
        url="/v1/completions",
        body={
            "model": "tiny",
            "prompt": "x",
            "max_tokens": 5,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "n": 2,
            "seed": 4,
            "stop": ["."],
            "logprobs": 1,
            "user": "me",
            "stream": False,
            "echo": False,
            "logit_bias": None,
            "ignore_eos": True,
        },
    )
    assert request.params(DEFAULTS) == SamplingParams(
        max_new_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        n=2,
        seed=4,
        stop_strings=(".",),
        logprobs=1,
        stop_tokens=(),
    )


def test_a_chat_line_asks_for_logprobs_as_chat_does() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    request = asked(body={**body, "max_completion_tokens": 3})
    params = request.params(DEFAULTS)
    assert (request.chat, params.logprobs, params.max_new_tokens) == (True, 2, 3)


def test_a_line_without_a_seed_has_one_of_its_own() -> None:
    assert asked(prompt="x").params(DEFAULTS) == SamplingParams(max_new_tokens=7, seed=103)


def test_the_generation_config_says_what_neither_line_nor_option_says() -> None:
    config = SimpleNamespace(do_sample=True, temperature=0.5, max_length=20, eos_token_id=[1, 2])
    request = asked(prompt="x", top_k=3)
    expected = SamplingParams(max_new_tokens=14, temperature=0.5, top_k=3, seed=3)
    assert request.params(Defaults(config), prompt_tokens=6) == expected
    assert request.params(Defaults(config, max_new_tokens=30), 6).max_new_tokens == 30


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "must have a prompt or messages, got -"),
        (
            {"prompt": "x", "messages": []},
            "must have a prompt or messages, got prompt and messages",
        ),
        ({"prompt": ["a", "b"]}, "prompt must be one text or token ids"),
        ({"messages": "x"}, "messages must be objects with a role"),
        ({"body": 5}, "body must be an object, got 5"),
        ({"body": {"prompt": "x"}, "extra": 1}, "extra is not a field next to body"),
        ({"custom_id": 5, "prompt": "x"}, "custom_id must be text, got 5"),
        ({"prompt": "x", "method": "GET"}, "method must be POST, got 'GET'"),
        ({"prompt": "x", "url": "/v1/embeddings"}, "url must be /v1/completions or "),
        ({"prompt": "x", "url": "/v1/chat/completions"}, "takes messages, got prompt"),
        ({"prompt": "x", "model": "other"}, "model must be tiny or folder/tiny, got 'other'"),
        ({"prompt": "x", "tools": [1]}, r"tools is not supported; remove it, got \[1\]"),
        ({"prompt": "x", "stream": True}, "stream is not supported; remove it, got True"),
        ({"prompt": "x", "mood": 1}, "mood is not a field of this format"),
        (
            {"prompt": "x", "max_tokens": 0},
            r"max_tokens must be .* at least 1 and below .*31, got 0",
        ),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a finite number"),
        ({"prompt": "x", "stop": {"a": 1}}, "stop must be strings, got {'a': 1}"),
        ({"prompt": "x", "stop": [""]}, "stop must be strings that are not empty"),
        ({"prompt": "x", "logprobs": True}, "logprobs must be a whole number, got True"),
        ({"prompt": "x", "top_logprobs": 1}, "top_logprobs is a field of chat"),
        ({"prompt": "x", "ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"prompt": "x", "max_tokens": 1, "max_completion_tokens": 1}, "are the same: give one"),
        (
            {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            "top_logprobs must be a whole number, together with logprobs: true, got 2",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        asked(**row)


# -- outputs ------------------------------------------------------------------------------------


LINES = read(*({"custom_id": str(n), "prompt": "x"} for n in range(4)))


def answers(lines: list[Line], run: str = RUN) -> list[tuple[Line, Answer]]:
    return [(line, error_line(run, line, "request_failed", "x" * 20)) for line in lines]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    write(path, LINES[:2])
    return path


def write(path: Path, lines: list[Line], run: str = RUN) -> None:
    output = BatchOutput(str(path))
    output.match(iter(LINES[: output.tally.lines]))
    output.write(answers(lines, run))
    output.close()


def resumed(path: Path, lines: list[Line] = LINES) -> Iterator[Line]:
    left = iter(lines)
    output = BatchOutput(str(path))
    try:
        output.match(left)
    finally:
        output.close()
    return left


def test_a_resumed_output_takes_the_lines_that_it_answers(path: Path) -> None:
    assert list(resumed(path)) == LINES[2:]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_tail_is_removed_and_asked_again(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(resumed(path)) == LINES[1:]
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\0" * 40 + b"\n", b'{"id": "batch_r', b'{"i'])
def test_what_a_crash_leaves_is_removed(path: Path, tail: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert list(resumed(path)) == LINES[2:]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"my notes\n", b'{"a": 1}\n', b"x", b'{"id": "batch_req_0_0"}\n{"id": "mine"}\n']
)
def test_another_file_is_refused_and_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    if content.startswith(b'{"id": "batch'):
        content = path.read_bytes() + answers(LINES[:1])[0][1].content
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"line 1: is no answer of this program|name another"):
        resumed(path)
    assert path.read_bytes() == content


def test_a_broken_line_before_a_whole_one_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:30] + b"\n" + whole)
    with pytest.raises(DataError, match="line 1: is no answer of this program"):
        resumed(path)


def test_an_output_of_another_input_is_refused(path: Path) -> None:
    other = read({"custom_id": "0", "prompt": "x"}, {"custom_id": "1", "prompt": "y"})
    with pytest.raises(DataError, match=r"line 2: does not answer line 2 of this input; name"):
        resumed(path, other)


def test_an_output_with_more_lines_than_the_input_is_refused(path: Path) -> None:
    with pytest.raises(DataError, match="line 2: answers a line that the input does not have"):
        resumed(path, LINES[:1])


def test_an_input_may_grow_between_two_runs(path: Path) -> None:
    more = [*LINES, parsed(5, b'{"prompt": "new"}')]
    assert list(resumed(path, more)) == more[2:]


def test_an_output_of_another_run_is_refused(path: Path) -> None:
    output = BatchOutput(str(path))
    output.match(iter(LINES))
    with pytest.raises(DataError, match="another model, tokenizer or other settings"):
        output.check_run("f" * 16)
    output.close()


def test_a_second_run_on_an_open_output_is_refused(path: Path) -> None:
    pytest.importorskip("fcntl")
    first = BatchOutput(str(path))
    with pytest.raises(CannotWrite, match="another run keeps its answers there; wait for it"):
        BatchOutput(str(path))
    first.close()


def test_the_tally_of_a_resumed_output_counts_what_it_holds(path: Path) -> None:
    output = BatchOutput(str(path))
    output.match(iter(LINES))
    output.close()
    assert (output.tally.lines, output.tally.failed) == (2, 2)
    assert output.tally.first_error == f"line 1: {'x' * 20}"


def test_answers_reach_the_disk_every_five_seconds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    output = BatchOutput(str(path))
    output.match(iter(LINES))
    counts = []
    for line in LINES:
        output.write(answers([line]))
        counts.append(len(synced))
    output.close()
    assert counts == [0, 1, 1, 2]
