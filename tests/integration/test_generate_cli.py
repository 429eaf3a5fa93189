"""`granite-paged generate` on a checkpoint as authors publish one: shards, template, defaults."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from granite_paged import Engine, PagedConfig, SamplingParams, load
from granite_paged.cli.main import run
from granite_paged.engine.request import Output
from tests.helpers.command_line import Capture, assert_one_line

USAGE = 2
TEXT = "the lazy dog"
USER = {"role": "user", "content": TEXT}
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")
PARAMS = SamplingParams(max_new_tokens=6, repetition_penalty=1.05)  # as the folder's config has it


def answered(folder: Path, prompt: object, params: SamplingParams = PARAMS) -> list[Output]:
    loaded = load(str(folder), device="cpu")
    sizes = PagedConfig(page_size=16, max_tokens=512, max_sequences=4)
    with Engine(loaded.model, sizes, tokenizer=loaded.tokenizer) as engine:
        return engine.generate(prompt, params)


def generate(folder: Path, *arguments: str) -> int:
    return run(["generate", "--model", str(folder), "--device", "cpu", *arguments])


def test_chat_writes_the_template_once(sharded_checkpoint: Path, capsys: Capture) -> None:
    system = {"role": "system", "content": "shout"}
    (expected,) = answered(sharded_checkpoint, [system, USER])
    assert generate(sharded_checkpoint, TEXT, "--system", "shout", *GREEDY) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"


def test_a_conversation_keeps_its_history(
    sharded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (first,) = answered(sharded_checkpoint, [USER])
    history = [USER, {"role": "assistant", "content": first.text}, {**USER, "content": "and?"}]
    (second,) = answered(sharded_checkpoint, history)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXT}\nand?\n"))
    assert generate(sharded_checkpoint, "--chat", *GREEDY) == 0
    assert capsys.readouterr().out == f"{first.text}\n{second.text}\n"


def test_several_answers_and_json(
    sharded_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "answers.json"
    params = SamplingParams(
        max_new_tokens=4, temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.2, n=2,
        seed=7, logprobs=2, stop_strings=("q",),
    )  # fmt: skip
    expected = answered(sharded_checkpoint, TEXT, params)
    options = (
        "--max-new-tokens 4 --temperature 0.8 --top-k 5 --top-p 0.9 --repetition-penalty 1.2 "
        "--n 2 --seed 7 --logprobs 2 --stop q"
    )
    assert generate(sharded_checkpoint, TEXT, *options.split(), "--json", str(file)) == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    assert [answer["tokens"] for answer in written["answers"]] == [o.tokens for o in expected]
    assert [answer["finish"] for answer in written["answers"]] == [o.finish for o in expected]
    assert len(written["answers"][0]["logprobs"][0]["top"]) == 2
    assert "[2] " in capsys.readouterr().out


def test_the_generation_config_holds_where_no_option_is_given(
    sharded_checkpoint: Path, capsys: Capture
) -> None:
    params = SamplingParams.from_generation_config(
        load(str(sharded_checkpoint), device="cpu").model.generation_config, prompt_tokens=3
    )
    assert params.temperature > 0
    (expected,) = answered(sharded_checkpoint, TEXT, params)
    assert generate(sharded_checkpoint, TEXT) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"


def test_text_comes_from_standard_input(
    sharded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (expected,) = answered(sharded_checkpoint, TEXT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert generate(sharded_checkpoint, "-", *GREEDY) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "Missing argument 'TEXT'. Or start a conversation: --chat."),
        (("--chat", "--n", "2"), "leave --n out"),
        ((TEXT, "--top-k", "-1"), "'--top-k'"),
        ((TEXT, "--repetition-penalty", "0"), "'--repetition-penalty'"),
        ((TEXT, "--n", "0"), "'--n'"),
    ],
)
def test_wrong_options_are_refused(
    arguments: tuple[str, ...], reason: str, sharded_checkpoint: Path, capsys: Capture
) -> None:
    assert generate(sharded_checkpoint, *arguments) == USAGE
    assert_one_line(capsys, reason)


def test_chat_without_a_template_is_refused(capsys: Capture) -> None:
    assert run(["generate", "hello", "--chat", "--device", "cpu"]) == USAGE
    assert_one_line(capsys, "no chat template")
