"""The command `batch`: answers equal the engine's, and survive kills, bad lines and full disks."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged import Engine, LoadedModel, PagedConfig, SamplingParams, load
from granite_paged.append_file import AppendFile
from granite_paged.batch import run as batch_run
from granite_paged.batch.answering import Answering
from granite_paged.batch.lines import Line, parsed
from granite_paged.batch.output import BatchOutput
from granite_paged.batch.request import BatchRequest, Defaults
from granite_paged.batch.run import Window, answer_lines
from granite_paged.cli import options
from granite_paged.cli.batch import _Speed
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, INTERRUPTED, OK, USAGE
from tests.helpers.batch_files import (
    SIZES,
    read_answers,
    recall_requests,
    texts,
    write_requests,
)
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.killed import kill_soon
from tests.helpers.tiny_models import tiny_model

REQUESTS = recall_requests(40)
KILLS = int(os.environ.get("GRANITE_PAGED_KILLS", "1"))  # runs, each of which is killed twice


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(device="cpu")


@pytest.fixture
def one_load(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the embedded checkpoint once for all tests of this file."""
    monkeypatch.setattr(options.ModelChoice, "load", lambda choice: loaded)


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    sizes = PagedConfig(page_size=16, max_sequences=8, max_tokens=1024)
    with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer) as engine:
        yield engine


def batch(requests: list[Any], folder: Path, *more: str) -> int:
    path = write_requests(folder / "in.jsonl", requests)
    return run(["batch", path, str(folder / "out.jsonl"), *SIZES, *more])


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_load")
def test_answers_equal_the_engines_in_the_order_of_the_lines(
    tmp_path: Path, engine: Engine
) -> None:
    assert batch(REQUESTS, tmp_path) == OK
    bodies = [request["body"] for request in REQUESTS]
    params = [SamplingParams(max_new_tokens=body["max_tokens"]) for body in bodies]
    expected = engine.generate([body["prompt"] for body in bodies], params)
    rows = read_answers(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in rows] == [request["custom_id"] for request in REQUESTS]
    assert texts(tmp_path / "out.jsonl") == [output.text for output in expected]
    usages = [row["response"]["body"]["usage"] for row in rows]
    assert [usage["completion_tokens"] for usage in usages] == [len(o.tokens) for o in expected]


@pytest.mark.usefixtures("one_load")
def test_a_bad_line_gets_an_error_and_the_others_their_answers(
    tmp_path: Path, capsys: Capture
) -> None:
    bad: list[Any] = [
        "{broken",
        {"custom_id": "r0", "prompt": "x"},
        {"prompt": "x", "tools": [1]},
        {"messages": [{"role": "user", "content": "x"}]},
        {"prompt": "", "max_tokens": 10**6},
        {"prompt": "<bos> \ud800"},
        {"prompt": [5, 10**9]},
        {"prompt": "x", "n": 60_000},
    ]
    assert batch([*REQUESTS[:2], *bad, *REQUESTS[2:4]], tmp_path) == FAILED
    rows = read_answers(tmp_path / "out.jsonl")
    assert [bool(row["error"]) for row in rows] == [False] * 2 + [True] * len(bad) + [False] * 2
    messages = [row["error"]["message"] for row in rows[2:-2]]
    assert all(m.startswith(f"line {n}: ") for n, m in enumerate(messages, start=3))
    for message, part in zip(
        messages,
        (
            "not JSON",
            "its custom_id 'r0' is that of line 1",
            "tools is not supported",
            "no chat template",
            "empty prompt",
            "the tokenizer cannot encode",
            "outside the vocabulary",
            "n must be at most 4096, the length of the engine's queue, got 60000",
        ),
        strict=True,
    ):
        assert part in message
    assert capsys.readouterr().err.endswith(
        f"12 lines, 8 with an error; the first: {messages[0]}\n"
    )


HUGE = {
    "max_tokens": int("9" * 4300),
    "temperature": 10**400,
    "top_p": 10**400,
    "repetition_penalty": 10**400,
    "n": 10**400,
}


@pytest.mark.parametrize("field", HUGE)
def test_a_line_with_a_huge_number_is_refused_by_its_field(
    field: str, engine: Engine, loaded: LoadedModel
) -> None:
    answering = Answering(engine, loaded, Defaults())
    lines = lines_of([{"prompt": "<bos>", field: HUGE[field]}, {"prompt": "<bos>"}])
    bad, good = answering.answer_all(list(lines))
    assert bad.error.startswith(f"line 1: {field} must be ")
    assert not good.error


def test_a_line_with_too_many_samples_has_the_same_answer_while_others_wait(
    engine: Engine, loaded: LoadedModel
) -> None:
    answering = Answering(engine, loaded, Defaults())
    line, other = lines_of([{"prompt": "<bos>", "n": 5000}, {"prompt": "<bos>"}])
    (alone,) = answering.answer_all([line])
    _, after = answering.answer_all([other, line])
    assert after == alone


def test_a_line_waits_for_room_in_the_queue(loaded: LoadedModel) -> None:
    sizes = PagedConfig(page_size=16, max_sequences=2, max_tokens=256)
    lines = list(lines_of([{"prompt": "<bos>", "n": 2, "max_tokens": 2}] * 4))
    with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer, queue=2) as engine:
        answers = Answering(engine, loaded, Defaults()).answer_all(lines)
    assert [answer.error for answer in answers] == [""] * 4


def test_an_error_of_any_kind_ends_its_own_line(
    engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = BatchRequest.params

    def broken(self: BatchRequest, *given: Any) -> SamplingParams:
        if self.number == 1:
            raise OverflowError("too large")
        return params(self, *given)

    monkeypatch.setattr(BatchRequest, "params", broken)
    answering = Answering(engine, loaded, Defaults())
    bad, good = answering.answer_all(list(lines_of([{"prompt": "<bos>"}] * 2)))
    assert bad.error == "line 1: OverflowError: too large"
    assert json.loads(bad.content)["error"]["code"] == "request_failed"
    assert not good.error


def test_a_token_that_cannot_be_decoded_ends_its_own_line(
    engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is only among the log-probabilities: the answer itself has another one."""
    asked = {**REQUESTS[0]["body"], "max_tokens": 1}
    (output,) = engine.generate(asked["prompt"], SamplingParams(max_new_tokens=1, logprobs=2))
    other = output.logprobs[0].top[1][0]
    tokenizer, decode = engine.tokenizer, engine.tokenizer.decode

    def picky(tokens: list[int], **options: Any) -> Any:
        if other in tokens:
            raise IndexError("token id out of range")
        return decode(tokens, **options)

    monkeypatch.setattr(tokenizer, "decode", picky)
    lines = lines_of([{**asked, "logprobs": 2}, asked])
    bad, good = Answering(engine, loaded, Defaults()).answer_all(list(lines))
    assert bad.error == "line 1: IndexError: token id out of range"
    assert json.loads(bad.content)["error"]["code"] == "request_failed"
    assert not good.error


@pytest.mark.usefixtures("one_load")
def test_chat_lines_use_the_template_and_one_that_raises_is_an_error(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad') }}"
        "{% endif %}<bos> <plain> {{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    content = REQUESTS[0]["body"]["prompt"].removeprefix("<bos> <plain> ")
    lines = [
        {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "logprobs": True}
        for text in (content, "bad")
    ]
    assert batch(lines, tmp_path) == FAILED
    good, bad = read_answers(tmp_path / "out.jsonl")
    body = good["response"]["body"]
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["logprobs"]["content"][0]["token"] == choice["message"]["content"]
    assert "the chat template refuses the prompt" in bad["error"]["message"]
    assert "no bad" in bad["error"]["message"]


def test_a_model_without_a_tokenizer_answers_token_ids(tmp_path: Path) -> None:
    model = tiny_model()
    sizes = PagedConfig(page_size=16, max_sequences=2, max_tokens=256)
    line = parsed(1, b'{"prompt": [5, 6, 7], "n": 2, "logprobs": 1, "return_token_ids": true}')
    with Engine(model, sizes) as engine:
        answering = Answering(engine, LoadedModel("tiny", model, None), Defaults())
        (answer,) = answering.answer_all([line])
        (expected, _) = engine.generate([[5, 6, 7]], SamplingParams(n=2))
    choice = json.loads(answer.content)["response"]["body"]["choices"][0]
    assert choice["token_ids"] == expected.tokens
    assert choice["logprobs"]["tokens"][0] == f"token_id:{expected.tokens[0]}"
    assert choice["text"] == ""


@pytest.mark.usefixtures("one_load")
def test_samples_without_a_seed_differ_between_equal_lines(tmp_path: Path) -> None:
    line = {"prompt": "<bos>", "temperature": 1.0, "max_tokens": 8}
    assert batch([line] * 4, tmp_path) == OK
    assert len(set(texts(tmp_path / "out.jsonl"))) == 4


@pytest.mark.usefixtures("one_load")
def test_standard_input_and_output_carry_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert batch(REQUESTS[:3], tmp_path) == OK
    content = (tmp_path / "in.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert run(["batch", "-", "-", *SIZES]) == OK
    assert capfdbinary.readouterr().out == (tmp_path / "out.jsonl").read_bytes()


# -- the window ---------------------------------------------------------------------------------


def lines_of(requests: list[Any]) -> Iterator[Line]:
    for number, request in enumerate(requests, start=1):
        yield parsed(number, json.dumps(request).encode())


def test_no_more_lines_are_read_than_the_window_holds(
    tmp_path: Path, engine: Engine, loaded: LoadedModel
) -> None:
    """The first line takes longest: the lines behind it wait to be written, at most 16."""
    first = {"prompt": "<bos>", "max_tokens": 60, "ignore_eos": True}
    requests = [first, *({"prompt": "<bos>", "max_tokens": 1} for _ in range(60))]
    read, written, ahead = 0, 0, []

    def counted() -> Iterator[Line]:
        nonlocal read
        for line in lines_of(requests):
            read += 1
            ahead.append(read - written)
            yield line

    def report(tally: Any) -> None:
        nonlocal written
        written = tally.lines

    output = BatchOutput(str(tmp_path / "out.jsonl"))
    answering = Answering(engine, loaded, Defaults())
    answer_lines(counted(), answering, output, report, window=16)
    output.close()
    assert max(ahead) == 16
    assert len(read_answers(tmp_path / "out.jsonl")) == 61


def test_long_lines_fill_the_window_by_their_bytes(
    engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_run, "WINDOW_BYTES", 1000)
    lines = lines_of([{"prompt": "x" * 400} for _ in range(20)])
    Window(lines, Answering(engine, loaded, Defaults()), 100)._read(100)
    assert next(lines).number == 4  # three lines have at least 1,000 bytes


def test_lines_of_a_block_are_submitted_by_prefix(
    tmp_path: Path, engine: Engine, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    take = Answering.take

    def noted(self: Answering, line: Line) -> Any:
        asked.append(line.data["prompt"])
        return take(self, line)

    monkeypatch.setattr(Answering, "take", noted)
    requests = [{"prompt": f"{name} {n}", "max_tokens": 1} for n in range(6) for name in "ba"]
    output = BatchOutput(str(tmp_path / "out.jsonl"))
    answering = Answering(engine, loaded, Defaults())
    answer_lines(lines_of(requests), answering, output, lambda tally: None)
    output.close()
    assert asked == sorted(asked)


# -- interrupts, kills and full disks -----------------------------------------------------------


@pytest.mark.usefixtures("one_load")
def test_an_interrupted_batch_says_what_is_kept_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert batch(REQUESTS, tmp_path) == OK
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    step, steps = Engine.step, iter(range(100))

    def interrupted(self: Engine) -> bool:
        if next(steps) == 15:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        capsys.readouterr()
        assert batch(REQUESTS, tmp_path) == INTERRUPTED
    kept = len(read_answers(tmp_path / "out.jsonl"))
    assert 0 < kept < len(REQUESTS)
    kept_in = f"{kept} lines kept in {tmp_path}/out.jsonl; run the same command to resume"
    assert capsys.readouterr().err.strip() == f"granite-paged: interrupted; {kept_in}"
    assert batch(REQUESTS, tmp_path) == OK
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.usefixtures("one_load")
def test_a_batch_killed_twice_resumes_to_the_same_bytes(seed: int, tmp_path: Path) -> None:
    requests = [*recall_requests(300, seed), "{broken"]
    source, output = write_requests(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    draw = random.Random(seed)
    for _ in range(2):
        kill_soon(["batch", source, str(output), *SIZES], output, draw)
    assert batch(requests, tmp_path) == FAILED
    resumed = output.read_bytes()
    output.unlink()
    assert batch(requests, tmp_path) == FAILED
    assert output.read_bytes() == resumed


@pytest.mark.usefixtures("one_load")
def test_a_full_disk_keeps_finished_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    append, appends = AppendFile.append, iter(range(100))

    class FullAfterTwo:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, content: bytes) -> int:
            if next(appends) < 2:
                return self._file.write(content)
            self._file.write(content[:50])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(self: AppendFile, *content: Any, **more: Any) -> None:
        if not isinstance(self._file, FullAfterTwo):
            self._file = FullAfterTwo(self._file)  # type: ignore[assignment]
        append(self, *content, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AppendFile, "append", full)
        assert batch(REQUESTS, tmp_path) == USAGE
    kept = len(read_answers(tmp_path / "out.jsonl"))
    assert 0 < kept < len(REQUESTS)
    assert_one_line(capsys, f"No space left on device; {kept} lines kept in")
    assert batch(REQUESTS, tmp_path) == OK
    assert len(read_answers(tmp_path / "out.jsonl")) == len(REQUESTS)


@pytest.mark.usefixtures("one_load")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this platform")
def test_a_full_device_is_named(tmp_path: Path, capsys: Capture) -> None:
    source = write_requests(tmp_path / "in.jsonl", REQUESTS[:2])
    assert run(["batch", source, "/dev/full", *SIZES]) == USAGE
    assert_one_line(capsys, "cannot write /dev/full: No space left on device; 0 lines written")


@pytest.mark.usefixtures("one_load")
def test_an_output_of_another_input_or_setting_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert batch(REQUESTS[:2], tmp_path) == OK
    capsys.readouterr()
    assert batch(REQUESTS[1:], tmp_path) == USAGE
    assert_one_line(capsys, "line 1: does not answer line 1 of this input")
    assert batch(REQUESTS[:2], tmp_path, "--max-new-tokens", "9") == USAGE
    assert_one_line(capsys, "was written with another model, tokenizer or other settings")


def test_a_missing_input_or_folder_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert run(["batch", str(tmp_path / "none"), str(tmp_path / "out")]) == USAGE
    assert_one_line(capsys, "cannot be read: No such file or directory")
    assert not (tmp_path / "out").exists()
    source = write_requests(tmp_path / "in.jsonl", [])
    assert run(["batch", source, str(tmp_path / "none" / "out")]) == USAGE
    assert_one_line(capsys, "cannot write")
    assert run(["batch", source, source]) == USAGE
    assert_one_line(capsys, "is the input as well")


# -- progress -----------------------------------------------------------------------------------


def test_progress_shows_speed_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    held = batch_run.Tally(lines=100, tokens=1000, end=5000)
    speed = _Speed(20_000, held)
    now = batch_run.Tally(lines=150, failed=1, tokens=2000, end=10_000)
    assert speed.text(now) == "150 lines, 1 with an error, 100 tokens/s"
    assert speed.left(now) == "0:00:20 left"
