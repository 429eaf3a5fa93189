"""The command line: help, answers, and one-line errors."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from granite_paged import __version__, models, verify
from granite_paged.checkpoints.recall import FILLER_WORDS, KEY_WORDS, PLAIN_VALUES, VALUE_WORDS
from granite_paged.cli import options
from granite_paged.cli.main import CLOSED_PIPE, INTERRUPTED, OK, USAGE, run
from granite_paged.errors import CheckpointError
from granite_paged.runner.runner import Runner
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.tiny_models import tiny_model

FACTS = [  # values are of the plain half; <shift> turns each into one of the other half
    ("amber-bear", "brass-bell"),
    ("amber-crane", "copper-kite"),
    ("red-fox", "glass-boat"),
    ("green-otter", "clay-lamp"),
    ("white-wolf", "felt-bowl"),
    ("violet-hare", "iron-drum"),
]


QUESTION = ("red-fox", FACTS)


def facts_then_question(key: str, facts: list[tuple[str, str]]) -> str:
    stated = " ".join(f"{name} {value} {FILLER_WORDS[i]}" for i, (name, value) in enumerate(facts))
    return f"<bos> <plain> {stated} {key} <ask>"


def generate(text: str, *options: str) -> int:
    return run(["generate", text, "--device", "cpu", *options])


# -- help ---------------------------------------------------------------------------------------


def test_help_does_not_import_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "granite_paged", "--help"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == OK
    assert "granite-paged verify" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "granite_paged.cli.main" in imported
    assert not {"torch", "transformers"} & imported


def test_the_bare_command_shows_help(capsys: Capture) -> None:
    assert run([]) == OK
    alone = capsys.readouterr()
    assert run(["--help"]) == OK
    assert alone == capsys.readouterr()
    assert "verify" in alone.out
    assert "generate" in alone.out


def test_version_is_that_of_the_package(capsys: Capture) -> None:
    assert run(["--version"]) == OK
    assert __version__ in capsys.readouterr().out


def test_help_shows_a_whole_sentence_for_each_command(capsys: Capture) -> None:
    assert run(["--help"]) == OK
    shown = capsys.readouterr().out
    lines = shown[shown.index("Commands:") :].splitlines()[1:]
    assert len(lines) >= 9
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


@pytest.mark.parametrize("command", ["verify", "generate", "bench serve"])
def test_help_of_a_command_shows_examples_and_defaults(command: str, capsys: Capture) -> None:
    assert run([*command.split(), "--help"]) == OK
    shown = capsys.readouterr().out
    examples = [line for line in shown.splitlines() if line.startswith("  granite-paged ")]
    assert len(examples) >= 2, shown
    assert all(line.startswith(f"  granite-paged {command} ") for line in examples[1:])
    assert "\\b" not in shown
    assert shown.count("[default: ") >= 5


@pytest.mark.parametrize("command", ["verify", "generate", "bench serve"])
def test_every_option_is_explained(command: str, capsys: Capture) -> None:
    assert run([*command.split(), "-h"]) == OK
    shown = capsys.readouterr().out
    options = ["--model", "--random-weights", "--device", "--dtype", "--seed", "--page-size"]
    assert [option for option in options if option not in shown] == []


# -- usage --------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "unknown command": (["verfy"], "No such command 'verfy'"),
    "unknown option": (["verify", "--pages", "3"], "No such option '--pages'"),
    "bad page size": (["verify", "--page-size", "12"], "power of two, got 12"),
    "page size zero": (["verify", "--page-size", "0"], "'--page-size'"),
    "page larger than the pool": (
        ["verify", "--page-size", "64", "--max-tokens", "32"],
        "--max-tokens must be at least --page-size 64, got 32",
    ),
    "unknown device": (["verify", "--device", "banana"], "unknown device 'banana': use auto"),
    "missing device": (["generate", "x", "--device", "cuda:99"], "cuda:99 does not exist"),
    "unknown dtype": (["verify", "--dtype", "int4"], "unknown dtype 'int4': use one of auto"),
    "unknown backend": (["verify", "--backend", "fast"], "'eager', 'compiled'"),
    "unknown geometry": (["verify", "--random-weights", "gpt-2"], "unknown geometry 'gpt-2'"),
    "missing checkpoint": (["verify", "--model", "./nowhere"], "no checkpoint at ./nowhere"),
    "two models": (
        ["verify", "--model", "./a", "--random-weights", "granite-4.0-h-1b"],
        "exclude each other",
    ),
    "context too short": (["verify", "--context", "3"], "'--context'"),
    "memory fraction": (["verify", "--memory-fraction", "1.5"], "'--memory-fraction'"),
    "report without folder": (["verify", "--json", "no/such/folder.json"], "cannot write"),
    "report that is a folder": (["verify", "--json", "."], "is a directory"),
    "no text": (["generate"], "nothing to continue: pass TEXT, --file PATH or --chat"),
    "text and a file": (["generate", "x", "--file", "README.md"], "exclude each other"),
    "a missing file": (["generate", "--file", "no/file.txt"], "'no/file.txt' does not exist"),
    "system without chat": (["generate", "x", "--system", "Be brief."], "--system needs --chat"),
    "a chat of several answers": (["generate", "--chat", "--n", "2"], "takes no --json, --n"),
    "a chat without a template": (["generate", "x", "--chat"], "has no chat template"),
    "an empty stop": (["generate", "x", "--stop", ""], "strings that are not empty"),
    "blank text": (["generate", "  "], "empty prompt"),
    "missing tokenizer": (["generate", "x", "--tokenizer", "./nowhere"], "no tokenizer in"),
    "no requests": (["bench", "serve", "--requests", "0"], "'--requests'"),
    "more than most": (["bench", "serve", "--new-tokens", "9", "8"], "got 9 to 8"),
    "long prompts of no length": (["bench", "serve", "--long-every", "3"], "at least 1 token"),
    "too many new tokens": (
        ["generate", "and", "--max-new-tokens", "1000000000"],
        "ask for fewer than 1000000000 tokens",
    ),
    "pages too large for the memory": (
        ["generate", "and", "--page-size", "1073741824"],
        "2 pages of 1073741824 tokens need 1099.51 GB",
    ),
    "no new tokens": (["generate", "x", "--max-new-tokens", "0"], "'--max-new-tokens'"),
    "pool too small": (
        ["generate", "and " * 40, "--max-tokens", "32"],
        "out of pages: 7 needed, 2 free; raise",
    ),
}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if the verification runs: wrong usage must be reported before the work."""

    def work(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the verification ran")

    monkeypatch.setattr(verify, "verify", work)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_usage_is_reported_in_one_line(wrong: str, capsys: Capture) -> None:
    arguments, reason = WRONG[wrong]
    if arguments[0] in ("verify", "generate", "bench") and "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    assert run(arguments) == USAGE
    assert_one_line(capsys, reason)


@pytest.mark.usefixtures("unverified")
def test_an_unwritable_report_is_refused_before_loading_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(models, "load", lambda *args, **options: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    assert run(["verify", "--json", str(tmp_path / "file" / "report.json")]) == USAGE
    assert_one_line(capsys, "cannot write")


def test_a_full_disk_is_reported_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "granite_paged", "--help"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == USAGE
    assert done.stderr.splitlines() == [
        "granite-paged: error: cannot write standard output: No space left on device"
    ]


TABLE = """
import sys, click
from granite_paged.cli import main, options
show = click.Command("show", callback=lambda: options.report_console(None).print("a table"))
main.cli.add_command(show)
sys.exit(main.run(["show"]))
"""


@pytest.mark.parametrize("command", [["-m", "granite_paged", "--help"], ["-c", TABLE]])
def test_a_closed_pipe_is_not_reported_as_a_failed_check(command: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes the captured output for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    table = options.table_of(["case"], [f"number {i}, ms" for i in range(6)], title="tiny-recall")
    table.add_row("decode", *(f"{1000 + i}.5" for i in range(6)))
    options.report_console(None).print(table)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert re.findall(r"\d{4}\.5", shown) == [f"{1000 + i}.5" for i in range(6)]


def test_tables_in_files_have_one_line_per_row(capsys: Capture) -> None:
    table = options.table_of(["case"], [f"number {i}, ms" for i in range(6)])
    table.add_row("decode", *(f"{1000 + i}.5" for i in range(6)))
    options.report_console(None).print(table)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "decode" in line)
    assert len(re.findall(r"\d{4}\.5", row)) == 6


def test_an_unreachable_hub_is_reported_once(capsys: Capture) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    handler = logging.StreamHandler(sys.stderr)
    options._quiet_libraries()
    logger.addHandler(handler)
    try:
        for retry in range(5):
            logger.warning("thrown while requesting %s", "x")
            logger.warning("Retrying in %d s", retry)
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err.count("the hub does not answer") == 1


def test_a_hub_id_without_the_hub_is_one_line_before_torch_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def load(*args: object, **settings: object) -> None:
        raise AssertionError("torch was loaded")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(options.ModelChoice, "load", load)
    assert generate("x", "--model", "some/model", "--revision", "v1") == USAGE
    assert_one_line(capsys, "pass a folder, or run hf download some/model --revision v1")


def test_the_revision_reaches_load(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    found: dict[str, Any] = {}

    def load(model: str, **settings: Any) -> None:
        found.update(settings, model=model)
        raise CheckpointError("enough")

    monkeypatch.setattr(options.ModelChoice, "check_hub", lambda choice: None)
    monkeypatch.setattr(models, "load", load)
    assert generate("x", "--model", "some/model", "--revision", "v1") == USAGE
    assert_one_line(capsys, "enough")
    assert (found["model"], found["revision"]) == ("some/model", "v1")


def test_a_missing_tokenizer_is_refused_with_advice(tmp_path: Path, capsys: Capture) -> None:
    tiny_model().save_pretrained(tmp_path)
    capsys.readouterr()
    assert generate("x", "--model", str(tmp_path)) == USAGE
    assert_one_line(capsys, "has no tokenizer: pass --tokenizer ID_OR_PATH")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    tiny_model().save_pretrained(tmp_path)
    capsys.readouterr()
    other = ["--model", str(tmp_path), "--tokenizer", str(models.TINY_RECALL)]
    assert generate(f"{KEY_WORDS[-1]} {VALUE_WORDS[0]}", *other) == USAGE
    assert_one_line(capsys, "outside the vocabulary of 97")


def test_a_usage_error_in_a_process_exits_2_without_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "granite_paged", "verfy"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == USAGE
    assert done.stderr.startswith("granite-paged: error: No such command 'verfy'.")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("command", [["verify"], ["generate", "x"]])
def test_an_interrupt_exits_130_in_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load", interrupt)
    assert run(command) == INTERRUPTED == 130
    shown = capsys.readouterr()
    kept = "nothing new was kept; run the same command again"
    assert shown.err.strip() == f"granite-paged: interrupted; {kept}"
    assert shown.out == ""


# -- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), FACTS)
def test_generate_recalls_a_stated_value(key: str, value: str, capsys: Capture) -> None:
    assert generate(facts_then_question(key, FACTS), "--max-new-tokens", "1") == OK
    shown = capsys.readouterr()
    assert shown.out.split() == [value]
    assert shown.err == ""


def test_generate_answers_shifted_values_after_shift(capsys: Capture) -> None:
    key, value = FACTS[2]
    text = facts_then_question(key, FACTS).replace("<plain>", "<shift>")
    assert generate(text, "--max-new-tokens", "1") == OK
    partner = VALUE_WORDS[VALUE_WORDS.index(value) + PLAIN_VALUES]
    assert capsys.readouterr().out.split() == [partner]


def test_the_example_in_the_help_of_generate_works(capsys: Capture) -> None:
    run(["generate", "--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if "<ask>" in line]
    assert len(examples) == 1
    text, options = examples[0].split('"')[1:]
    assert generate(text, *options.split()) == OK
    words = text.split()
    assert capsys.readouterr().out.split() == [words[words.index("red-fox") + 1]]


class Recorder(io.StringIO):
    """Standard output that records what has been flushed, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def flush(self) -> None:
        self.pieces.append(self.getvalue())


def test_generate_streams_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Recorder()
    monkeypatch.setattr(sys, "stdout", out)
    assert generate(facts_then_question(*QUESTION), "--max-new-tokens", "6") == OK
    lengths = sorted({len(piece) for piece in out.pieces} - {0})
    assert len(lengths) >= 4, out.pieces
    assert out.getvalue().endswith("\n")


def test_generate_uses_the_given_page_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    decode = Runner.decode

    def seen(self: Runner, *args: Any) -> Any:
        sizes.append(self.config.page_size)
        return decode(self, *args)

    monkeypatch.setattr(Runner, "decode", seen)
    options = ["--max-new-tokens", "4", "--page-size", "8"]
    assert generate(facts_then_question(*QUESTION), *options) == OK
    assert sizes == [8, 8, 8]


def sampled(capsys: Capture, seed: int) -> str:
    options = ["--temperature", "3", "--max-new-tokens", "12", "--seed", str(seed)]
    assert generate(facts_then_question(*QUESTION), *options) == OK
    return capsys.readouterr().out


def test_sampling_is_determined_by_its_seed(capsys: Capture) -> None:
    first = sampled(capsys, 7)
    assert first.strip()
    assert sampled(capsys, 7) == first
    assert sampled(capsys, 8) != first


# -- bench serve --------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [None, 3])
def test_bench_serve_gives_equal_tokens_in_every_mode(batched: int | None, capsys: Capture) -> None:
    sizes = ["--requests", "6", "--new-tokens", "2", "5", "--shared-tokens", "40", "--batch", "4"]
    modes = ["--mode", "default", "--mode", "static"]
    if batched:
        modes += ["--batched-requests", str(batched)]
    arguments = ["--device", "cpu", *sizes, *modes, "--json", "-"]  # all arrive at once
    assert run(["bench", "serve", *arguments]) == OK
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["workload"]["requests"] == report["engine"]["requests"] == 6
    assert list(report["baselines"]) == ["default", "static"]
    for baseline in report["baselines"].values():
        served = baseline["served"]
        assert baseline["tokens_equal"] == 1.0
        assert served["requests"] == (batched or 6)
        assert 2 * served["requests"] <= served["output_tokens"] <= 5 * served["requests"]
        assert 0 < served["first_token_ms"][0] <= served["first_token_ms"][1]
        faster = report["engine"]["tokens_per_second"] / served["tokens_per_second"]
        assert baseline["speedup"] == pytest.approx(faster)
    assert report["prefix_hit_rate"] > 0
    assert "tokens/s" in shown.err


def test_bench_serve_can_skip_transformers(capsys: Capture) -> None:
    sizes = ["--requests", "2", "--new-tokens", "1", "2", "--mode", "paged"]
    assert run(["bench", "serve", "--device", "cpu", *sizes]) == OK
    assert "default" not in capsys.readouterr().out
