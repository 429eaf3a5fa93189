"""`bench serve --mode vllm` gives vLLM, in another process, the work that the engine does."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged.bench import vllm_serving
from granite_paged.bench.serve_results import read_serve
from granite_paged.bench.vllm_serving import EngineRun, ServedRequest, ServedRound, row_of
from granite_paged.cli.main import INTERRUPTED, OK, USAGE, run
from granite_paged.cli.options import FAILED, ModelChoice
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import Request
from granite_paged.names import SERVING_ENGINES
from tests.helpers.command_line import Capture, assert_one_line
from tests.helpers.fake_vllm import VERSION, write_fake_vllm

SIZES = ["--requests", "3", "--new-tokens", "2", "4", "--rows", "2"]
SEED = 5
COMMAND = ["bench", "serve", "--device", "cpu", "--seed", str(SEED), *SIZES, "--mode", "vllm"]


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the fake vLLM on the path of new processes; return the file of its calls."""
    write_fake_vllm(tmp_path)
    log = tmp_path / "calls.jsonl"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("FAKE_VLLM_LOG", str(log))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return log


def calls(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def serve(tmp_path: Path, *options: str) -> tuple[int, Path]:
    file = tmp_path / "serve.json"
    return run([*COMMAND, *options, "--json", str(file)]), file


def test_vllm_gets_the_requests_of_our_engine(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours: list[list[Request]] = []
    serve_offline, submit = vllm_serving.serve_offline, Engine.submit

    def noted_round(engine: Engine, coming: Any) -> Any:
        ours.append([])
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "submit", noted)
            return serve_offline(engine, coming)

    def noted(self: Engine, *args: Any, **others: Any) -> Request:
        ours[-1].append(submit(self, *args, **others))
        return ours[-1][-1]

    monkeypatch.setattr(vllm_serving, "serve_offline", noted_round)
    status, file = serve(tmp_path)
    assert status == OK
    wanted = [
        {
            "prompts": [{"prompt_token_ids": list(request.prompt)} for request in requests],
            "params": [
                {
                    "temperature": 0.0,
                    "max_tokens": request.params.max_new_tokens,
                    "ignore_eos": True,
                    "detokenize": False,
                }
                for request in requests
            ],
        }
        for requests in ours
    ]
    assert [len(requests) for requests in ours] == [3, 3]
    assert not any(request.streamed for requests in ours for request in requests)
    assert wanted[0] != wanted[1]  # nothing of the second round is in a prefix cache
    assert [call for call in calls(called) if "prompts" in call] == wanted * 2
    rows = read_serve(file).rows
    assert [row.engine for row in rows] == list(SERVING_ENGINES)
    asked = sum(request.params.max_new_tokens for request in ours[1])
    assert {(row.requests, row.output_tokens) for row in rows} == {(3, asked)}


def test_vllm_runs_with_float32_states_and_at_its_defaults(called: Path, tmp_path: Path) -> None:
    status, file = serve(tmp_path)
    assert status == OK
    first, second = (call for call in calls(called) if "settings" in call)
    assert first["settings"].pop("mamba_ssm_cache_dtype") == "float32"
    assert first["settings"] == second["settings"]
    model = second["settings"].pop("model")
    assert Path(model).name == "tiny_recall"
    assert second["settings"] == {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_num_seqs": 2,
        "seed": SEED,
        "disable_log_stats": False,
        "hf_overrides": {"layer_types": ["mamba", "attention"] * 2},
    }
    assert first["safe_path"] is True  # modules of the benchmark do not hide packages
    ours, float32, default = read_serve(file).rows
    assert float32.settings["mamba_ssm_cache_dtype"] == "float32"
    assert default.settings["mamba_ssm_cache_dtype"] == "auto"  # what vLLM decided
    assert float32.versions["vllm"] == VERSION
    assert "granite_paged" in ours.versions


def test_random_weights_reach_vllm_as_a_checkpoint(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ModelChoice.load

    def small(self: ModelChoice) -> Any:
        return load(ModelChoice(None, None, "cpu", "auto", 0, self.config))

    monkeypatch.setattr(ModelChoice, "load", small)
    status, _ = serve(tmp_path, "--random-weights", "granite-4.0-h-1b")
    assert status == OK
    found = [call["files"] for call in calls(called) if "files" in call]
    assert all({"config.json", "model.safetensors"} <= set(files) for files in found)
    folders = {call["settings"]["model"] for call in calls(called) if "settings" in call}
    assert len(folders) == 1
    assert not Path(folders.pop()).exists()


def test_rows_compare_the_second_round_with_ours(called: Path, tmp_path: Path) -> None:
    _, file = serve(tmp_path)
    ours, *theirs = read_serve(file).rows
    assert (ours.speedup, ours.first_tokens_equal, ours.tokens_equal) == (1.0, 1.0, 1.0)
    for row in theirs:
        assert row.tokens_equal == 0.0  # the fake answers one token over and over
        assert row.first_token_ms == (500.0, 500.0)
        assert row.request_ms == (1500.0, 1500.0)
        assert ours.tokens_per_second is not None
        assert row.tokens_per_second is not None
        assert row.seconds is not None
        assert row.output_tokens / row.seconds[1] == pytest.approx(row.tokens_per_second[1])
        expected = ours.tokens_per_second[1] / row.tokens_per_second[1]
        assert row.speedup == pytest.approx(expected)


def test_a_row_counts_answers_that_begin_alike_and_those_that_are_equal() -> None:
    def run(*answers: list[int]) -> EngineRun:
        done = ServedRound(1.0, [ServedRequest(tokens) for tokens in answers])
        return EngineRun((done, done), 1.0, {}, {})

    row = row_of("vllm defaults", run([1, 2], [3, 4], [9], [5]), run([1, 2], [3, 5], [3], [5, 6]))
    assert (row.first_tokens_equal, row.tokens_equal) == (0.75, 0.25)


def test_times_are_left_out_where_vllm_keeps_no_statistics(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAULT", "no statistics")
    status, file = serve(tmp_path)
    assert status == OK
    assert {row.first_token_ms for row in read_serve(file).rows[1:]} == {None}


def test_our_model_is_freed_before_vllm_starts(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    load, run_vllm = ModelChoice.load, vllm_serving.run_vllm

    def noted(self: ModelChoice) -> Any:
        loaded = load(self)
        models.append(weakref.ref(loaded.model))
        return loaded

    def watched(*args: Any) -> Any:
        alive.append(models[0]() is not None)
        return run_vllm(*args)

    monkeypatch.setattr(ModelChoice, "load", noted)
    monkeypatch.setattr(vllm_serving, "run_vllm", watched)
    assert serve(tmp_path)[0] == OK
    assert alive == [False, False]


# -- failures -----------------------------------------------------------------------------------


def test_a_crash_of_vllm_keeps_the_other_rows(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAULT", "start at defaults")
    status, file = serve(tmp_path)
    assert status == FAILED
    ours, float32, default = read_serve(file).rows
    assert not ours.error
    assert not float32.error
    assert "status 1: ValueError: no kernel for this card" in default.error
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "no kernel" in line)
    assert line.startswith("vllm defaults: ")
    (log,) = re.findall(r"its output: (\S+)", line)
    assert "Traceback" in Path(log).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("at work\nE1 KeyError: 'kind'\nRuntimeError: see above\n", "KeyError: 'kind'"),
        ("torch.OutOfMemoryError: 2 GB\n  more\n", "OutOfMemoryError: 2 GB"),
        ("INFO start\nKilled\n", "Killed"),
        ("\n", "no message"),
    ],
    ids=["the first error", "a qualified name", "no error", "nothing"],
)
def test_the_cause_of_a_crash_is_named(output: str, cause: str) -> None:
    assert vllm_serving._cause(output) == cause


def test_an_interruption_keeps_the_rows_that_are_done(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_vllm = vllm_serving.run_vllm

    def interrupted(python: str, settings: Any, *others: Any) -> Any:
        if "mamba_ssm_cache_dtype" not in settings:
            raise KeyboardInterrupt
        return run_vllm(python, settings, *others)

    monkeypatch.setattr(vllm_serving, "run_vllm", interrupted)
    status, file = serve(tmp_path)
    assert status == INTERRUPTED
    assert [row.engine for row in read_serve(file).rows] == list(SERVING_ENGINES[:2])


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [("", "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4,6", "cuda:0", "4,6"), ("4", "cpu", "4")],
)
def test_vllm_sees_the_device_of_the_engine(
    visible: str, device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment = vllm_serving.environment_for(torch.device(device))
    assert environment["CUDA_VISIBLE_DEVICES"] == expected


def test_other_work_than_asked_for_is_no_result(
    called: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAULT", "short")
    status, file = serve(tmp_path)
    assert status == FAILED
    assert all("did other work" in row.error for row in read_serve(file).rows[1:])


def test_an_interpreter_without_vllm_is_refused_before_the_work(
    tmp_path: Path, capsys: Capture
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # as if it had not found it
    python.chmod(0o755)
    assert run([*COMMAND, "--python", str(python)]) == USAGE
    assert_one_line(capsys, f"vLLM is not installed for {python}: pass --python PATH")
    assert run([*COMMAND, "--python", "/nowhere/python"]) == USAGE
    assert_one_line(capsys, "cannot run /nowhere/python: No such file or directory")


def test_arrivals_over_time_are_refused_with_vllm(called: Path, capsys: Capture) -> None:
    assert run([*COMMAND, "--rate", "5"]) == USAGE
    assert_one_line(capsys, "leave --rate at 0")


def test_an_interpreter_without_vllm_to_run_is_refused(capsys: Capture) -> None:
    assert run(["bench", "serve", "--python", sys.executable]) == USAGE
    assert_one_line(capsys, "--mode vllm")


# -- files --------------------------------------------------------------------------------------


def test_plot_tabulates_the_engines(called: Path, tmp_path: Path, capsys: Capture) -> None:
    _, file = serve(tmp_path)
    page = tmp_path / "serve.md"
    assert run(["plot", str(file), "--markdown", str(page)]) == OK
    text = page.read_text(encoding="utf-8")
    assert [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ")][2:] == [
        f"| {engine}" for engine in SERVING_ENGINES
    ]
    assert "mamba_ssm_cache_dtype=float32" in text
    capsys.readouterr()
    assert run(["plot", str(file), "--out", str(tmp_path / "figures")]) == USAGE
    assert_one_line(capsys, "no figures")
