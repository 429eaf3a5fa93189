"""`granite-paged generate` on a checkpoint as authors publish one: chats, files, JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite_paged import Engine, SamplingParams, load
from granite_paged.cli import generate as command
from granite_paged.cli.main import OK, USAGE, run
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.sharded_checkpoint import BOS, byte_level_tokenizer

FOX = "the quick brown fox"


@pytest.fixture
def checkpoint(sharded_checkpoint: Path) -> str:
    return str(sharded_checkpoint)


def generate(checkpoint: str, *arguments: str) -> int:
    return run(["generate", "--model", checkpoint, "--page-size", "16", *arguments])


def reported(checkpoint: str, capsys: Capture, *arguments: str) -> list[dict[str, Any]]:
    """Return the prompts of the report of `generate --json -`."""
    assert generate(checkpoint, *arguments, "--json", "-") == OK, capsys.readouterr().err
    prompts: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["prompts"]
    return prompts


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def params_seen(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    seen: list[SamplingParams] = []
    submit = Engine.submit

    def noted(self: Engine, prompt: Any, params: Any = None, **options: Any) -> Any:
        seen.append(params)
        return submit(self, prompt, params, **options)

    monkeypatch.setattr(Engine, "submit", noted)
    return seen


def test_exact_mode_reports_the_bits_of_each_prompt_alone(
    checkpoint: str, capsys: Capture, tmp_path: Path
) -> None:
    prompts = [FOX, "jumps", f"{FOX} jumps over"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = ["--exact", "--logprobs", "1", "--max-new-tokens", "3", "--temperature", "0"]
    together = reported(checkpoint, capsys, "--file", str(tmp_path / "prompts.txt"), *options)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = reported(checkpoint, capsys, prompt, *options)
        assert found == alone


def test_what_cannot_be_exact_is_one_line(checkpoint: str, capsys: Capture) -> None:
    assert generate(checkpoint, FOX, "--exact", "--backend", "compiled") != OK
    assert_one_line(capsys, "backend 'compiled'")


# -- sampling -----------------------------------------------------------------------------------


def test_the_generation_config_wins_over_defaults_and_options_over_it(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = params_seen(monkeypatch)
    assert generate(checkpoint, FOX, "--seed", "3") == OK
    options = ["--temperature", "0", "--top-k", "7", "--top-p", "0.5", "--stop", "dog"]
    more = ["--repetition-penalty", "2", "--max-new-tokens", "4", "--stop", "\n"]
    assert generate(checkpoint, FOX, *options, *more) == OK
    by_config, by_options = seen
    assert by_config == SamplingParams(
        max_new_tokens=20, temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05, seed=3
    )
    assert by_options == SamplingParams(
        max_new_tokens=4, top_k=7, top_p=0.5, repetition_penalty=2, stop_strings=("dog", "\n")
    )


def test_an_answer_ends_before_a_stop_string(checkpoint: str, capsys: Capture) -> None:
    (whole,) = reported(checkpoint, capsys, FOX, "--temperature", "0")
    text = whole["answers"][0]["text"]
    stop = text[4:6]
    (stopped,) = reported(checkpoint, capsys, FOX, "--temperature", "0", "--stop", stop)
    assert stopped["answers"][0]["text"] == text[: text.index(stop)]
    assert stopped["answers"][0]["finish"] == "stop"


def test_several_answers_differ_and_are_numbered(checkpoint: str, capsys: Capture) -> None:
    assert generate(checkpoint, FOX, "--n", "3", "--max-new-tokens", "5") == OK
    shown = capsys.readouterr().out
    assert [f"answer {i} ---" in shown for i in (1, 2, 3)] == [True] * 3
    (prompt,) = reported(checkpoint, capsys, FOX, "--n", "3", "--max-new-tokens", "5")
    texts = [answer["text"] for answer in prompt["answers"]]
    assert len(set(texts)) == 3


def test_logprobs_are_shown_for_each_token(checkpoint: str, capsys: Capture) -> None:
    options = ["--logprobs", "2", "--max-new-tokens", "3", "--temperature", "0"]
    assert generate(checkpoint, FOX, *options) == OK
    assert len([line for line in capsys.readouterr().out.splitlines() if "\t-" in line]) == 3
    (prompt,) = reported(checkpoint, capsys, FOX, *options)
    for token in prompt["answers"][0]["logprobs"]:
        assert token["top"][0] == [token["text"], token["logprob"]]
        assert len(token["top"]) == 2


def test_generation_may_begin_with_the_beginning_of_text_alone(
    checkpoint: str, capsys: Capture
) -> None:
    (prompt,) = reported(checkpoint, capsys, "", "--max-new-tokens", "2")
    assert (prompt["prompt_tokens"], len(prompt["answers"][0]["tokens"])) == (1, 2)
    assert run(["generate", "", "--max-new-tokens", "1", "--json", "-"]) == OK  # embedded model
    (prompt,) = json.loads(capsys.readouterr().out)["prompts"]
    assert prompt["prompt_tokens"] == 1


def test_ignored_fields_of_the_generation_config_are_named(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    loaded = load(checkpoint)
    loaded.model.generation_config.update(no_repeat_ngram_size=3)
    monkeypatch.setattr("granite_paged.models.load", lambda *args, **options: loaded)
    assert generate(checkpoint, FOX, "--max-new-tokens", "1") == OK
    assert "note: no_repeat_ngram_size of the generation config: ignored" in capsys.readouterr().err


# -- prompts ------------------------------------------------------------------------------------


def test_each_line_of_a_file_is_a_prompt(checkpoint: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.txt").write_text(f"{FOX}\n\nlazy dog\n", encoding="utf-8")
    options = ["--temperature", "0", "--max-new-tokens", "4"]
    found = reported(checkpoint, capsys, "--file", str(tmp_path / "prompts.txt"), *options)
    alone = [*reported(checkpoint, capsys, FOX, *options)]
    alone += reported(checkpoint, capsys, "lazy dog", *options)
    assert found == alone
    assert generate(checkpoint, "--file", str(tmp_path / "prompts.txt"), *options) == OK
    shown = capsys.readouterr().out
    assert "prompts.txt, line 1, answer 1" in shown
    assert "prompts.txt, line 3, answer 1" in shown


def test_lines_of_json_are_texts_or_messages(
    checkpoint: str, tmp_path: Path, capsys: Capture
) -> None:
    messages = [{"role": "user", "content": FOX}]
    rows = [{"prompt": FOX}, {"messages": messages}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text, chat = reported(checkpoint, capsys, "--file", str(file), "--max-new-tokens", "1")
    tokenizer = byte_level_tokenizer()
    assert text["prompt_tokens"] == len(tokenizer(FOX)["input_ids"])
    assert chat["prompt_tokens"] == len(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{\n', "line 2: is no JSON"),
        ("a.jsonl", '{"prompt": "x"}\n\n{"text": "x"}\n', "line 3: must be"),
        ("a.jsonl", '{"messages": []}\n', "line 1: must be"),
        ("a.txt", "\n \n", "holds no prompt"),
    ],
)
def test_a_broken_line_is_refused_by_its_number(
    checkpoint: str, tmp_path: Path, capsys: Capture, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert generate(checkpoint, "--file", str(tmp_path / name)) == USAGE
    assert_one_line(capsys, reason)


def test_a_file_of_other_bytes_is_refused(checkpoint: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert generate(checkpoint, "--file", str(tmp_path / "a.txt")) == USAGE
    assert_one_line(capsys, "cannot be read as UTF-8")


def test_a_refused_line_is_named_and_the_others_are_answered(
    checkpoint: str, tmp_path: Path, capsys: Capture
) -> None:
    rows = ['{"prompt": "fox"}', '{"messages": [{"text": "no role"}]}', '{"prompt": "dog"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert generate(checkpoint, "--file", str(tmp_path / "a.jsonl")) == USAGE
    shown = capsys.readouterr()
    assert [f"line {i}, answer 1" in shown.out for i in (1, 2, 3)] == [True, False, True]
    assert "a.jsonl, line 2: " in shown.err
    assert shown.err.count("\n") == 1


def test_standard_input_is_one_prompt_or_one_per_line(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    typed(monkeypatch, "the fox\nthe dog\n")
    (whole,) = reported(checkpoint, capsys, "-", "--max-new-tokens", "1")
    typed(monkeypatch, "the fox\nthe dog\n")
    lines = reported(checkpoint, capsys, "--file", "-", "--max-new-tokens", "1")
    assert whole["prompt"] == "the fox\nthe dog"
    assert [prompt["prompt"] for prompt in lines] == ["the fox", "the dog"]


# -- chats --------------------------------------------------------------------------------------


def test_a_chat_uses_the_template_and_the_system_message(checkpoint: str, capsys: Capture) -> None:
    options = ["--chat", "--system", "Be brief.", "--max-new-tokens", "1"]
    (prompt,) = reported(checkpoint, capsys, FOX, *options)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": FOX}]
    assert prompt["prompt"] == messages
    tokens = byte_level_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert prompt["prompt_tokens"] == len(tokens)
    assert tokens.count(BOS) == 1


def test_a_chat_in_the_terminal_keeps_its_history(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    prompts: list[tuple[int, ...]] = []
    stream = Engine.stream

    def noted(self: Engine, prompt: Any, params: Any = None) -> Any:
        prompts.append(prompt)
        return stream(self, prompt, params)

    monkeypatch.setattr(Engine, "stream", noted)
    typed(monkeypatch, "the fox\n\nthe dog\n")
    options = ["--temperature", "0", "--max-new-tokens", "6", "--system", "Be brief."]
    assert generate(checkpoint, "--chat", *options) == OK
    first, second = capsys.readouterr().out.rstrip("\n").split("\n", 1) if prompts else ("", "")
    assert second
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "the dog"},
    ]
    expected = byte_level_tokenizer().apply_chat_template(
        history, add_generation_prompt=True, return_dict=False
    )
    assert list(prompts[1]) == expected


def test_a_message_that_is_refused_leaves_the_chat_open(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(command, "_CHAT_TOKENS", 64)
    typed(monkeypatch, f"{FOX * 40}\nfox\n")
    assert generate(checkpoint, "--chat", "--max-new-tokens", "3") == USAGE
    shown = capsys.readouterr()
    assert "out of pages" in shown.err
    assert shown.out.strip()


def test_a_template_that_raises_is_reported_in_one_line(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    loaded = load(checkpoint)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('users must not speak') }}"
    broken = replace(loaded, tokenizer=tokenizer)
    monkeypatch.setattr("granite_paged.models.load", lambda *args, **options: broken)
    assert generate(checkpoint, FOX, "--chat") == USAGE
    assert_one_line(capsys, "users must not speak")
