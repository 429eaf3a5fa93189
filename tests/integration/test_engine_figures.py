"""The tool that writes the engine's figures for the documentation, on small loads."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import RequestError
from granite_paged.geometry import PagedConfig
from granite_paged.layers.mamba import EXACT_CHUNK
from granite_paged.models import TINY_RECALL
from granite_paged.runner.runner import Runner
from tests.helpers.tiny_models import tiny_model
from tools import engine_figures, exact_cost, golden_engine

Patch = pytest.MonkeyPatch
COMMAND = ["engine_figures", "--quick", "--device", "cpu", "--dtype", "float32"]
MODEL = ["--model", str(TINY_RECALL)]


def test_it_writes_what_it_measured_and_keeps_the_rest(tmp_path: Path, monkeypatch: Patch) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(
        json.dumps({"ray": {"requests": 3}, "engine_figures": {"old": 1}}), encoding="utf-8"
    )
    starts = iter([40.0, 8.0, 9.0])
    monkeypatch.setattr(engine_figures, "start_in_new_process", lambda caches: next(starts))
    monkeypatch.setattr(sys, "argv", [*COMMAND, *MODEL, "--out", str(tmp_path)])

    engine_figures.main()

    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found = kept.pop("engine_figures")
    assert kept == {"ray": {"requests": 3}}
    assert found["start_seconds"] == {"empty_caches": 40.0, "full_caches": [8.0, 9.0]}
    assert (found["late_captures"], found["rows_at_once"]) == (0, 4)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["versions"]["torch"]
    assert found["loads"]["burst"]["requests"] == engine_figures.QUICK.burst.requests
    assert found["loads"]["runs"] == 1
    for name in ("burst_seconds", "mixed_tokens_per_second"):
        assert list(found[name]) == ["not_streamed", "streamed"]
        runs = [len(each) for each in found[name].values()]
        assert runs == [engine_figures.QUICK.runs] * 2
        assert min(min(each) for each in found[name].values()) > 0
    first, second = found["shared_seconds"]
    assert 0 < second < 10 * first
    median, slowest = found["between_tokens_ms"]
    assert 0 < median <= slowest
    assert list(found["decode_step_ms"]) == ["1", "2"]
    assert all(step["runner"] > 0 for step in found["decode_step_ms"].values())


def test_the_runner_computes_the_positions_of_the_engine(monkeypatch: Patch) -> None:
    loads, seen = engine_figures.QUICK, list[tuple[list[int], list[int]]]()
    decode = Runner.decode

    def noted(runner: Runner, rows: Any, positions: Any) -> Any:
        seen.append((list(rows), list(positions)))
        return decode(runner, rows, positions)

    monkeypatch.setattr(Runner, "decode", noted)
    config = PagedConfig(page_size=16, max_sequences=4, max_tokens=1024)
    with contextlib.closing(Runner.for_model(tiny_model(), config)) as runner:
        found = engine_figures.runner_steps(runner, loads)
    assert list(found) == [1, 2]
    ran = range(loads.context, loads.context + loads.steps)
    for rows in loads.decodes:
        _first, *timed = [at for which, at in seen if which == list(range(1, rows + 1))]
        assert timed == [[position] * rows for position in ran]


def test_a_start_is_measured_with_caches_of_its_own(monkeypatch: Patch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "tools.engine_figures", "--quick", "--only-start"]
        environment = options["env"]
        assert environment["TRITON_CACHE_DIR"] == "folder/TRITON_CACHE_DIR"
        assert environment["TORCHINDUCTOR_CACHE_DIR"] == "folder/TORCHINDUCTOR_CACHE_DIR"
        assert environment["PATH"]
        return SimpleNamespace(stdout="a message\n12.345\n", returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["engine_figures", "--quick"])
    assert engine_figures.start_in_new_process("folder") == 12.3


def test_a_start_is_one_engine(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [*COMMAND, *MODEL, "--only-start"])
    engine_figures.main()
    assert 0 < float(capsys.readouterr().out) < 60


def test_a_start_that_fails_ends_the_tool_with_its_status(monkeypatch: Patch) -> None:
    failed = SimpleNamespace(stdout="", returncode=2)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    monkeypatch.setattr(sys, "argv", ["engine_figures"])
    with pytest.raises(SystemExit) as ended:
        engine_figures.start_in_new_process("folder")
    assert ended.value.code == 2


# -- what both tools refuse ---------------------------------------------------------------------

TOOLS: dict[str, Any] = {"engine_figures": engine_figures, "exact_cost": exact_cost}
ON_CPU = ["--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("tool", "options", "named"),
    [
        ("engine_figures", [*ON_CPU, "--quick"], "--quick needs --out"),
        ("exact_cost", [*ON_CPU, "--model", "/nope"], "/nope"),
        ("exact_cost", ["--device", "cuda:99"], "cuda:99 does not exist"),
        ("engine_figures", ["--device", "cuda:99"], "cuda:99 does not exist"),
        ("exact_cost", [*ON_CPU, "--most", "15"], "--most must be 16 or more, got 15"),
        ("exact_cost", [*ON_CPU, "--turns", "0"], "--turns must be 1 or more, got 0"),
        ("exact_cost", [*ON_CPU, "--requests", "-1"], "--requests must be 0 or more, got -1"),
    ],
)
def test_wrong_options_end_a_tool_with_one_line_and_status_2(
    tool: str,
    options: list[str],
    named: str,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *options])
    assert golden_engine.exit_status(TOOLS[tool].main) == golden_engine.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize("tool", list(TOOLS))
@pytest.mark.parametrize(("content", "wrong"), [("{", "is not JSON"), ("[]", "must be")])
def test_a_broken_file_is_reported_before_the_work(
    tool: str,
    content: str,
    wrong: str,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [tool, *ON_CPU, *MODEL, "--out", str(tmp_path)])
    monkeypatch.setattr(golden_engine, "load", lambda *args, **options: pytest.fail("loaded"))
    monkeypatch.setattr(
        engine_figures, "start_in_new_process", lambda caches: pytest.fail("started")
    )
    assert golden_engine.exit_status(TOOLS[tool].main) == golden_engine.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} {wrong}" in line
    assert file.read_text(encoding="utf-8") == content


def test_a_request_that_the_engine_refuses_is_raised() -> None:
    config = PagedConfig(page_size=16, max_sequences=2, max_tokens=64)
    params = SamplingParams(max_new_tokens=2, stop_tokens=())
    with Engine(tiny_model(), config, warmup="lazy") as engine:
        (answer,) = golden_engine.answers(engine, [[3, 4]], params)
        assert len(answer.tokens) == 2
        with pytest.raises(RequestError):
            golden_engine.answers(engine, [[3, 4], [3] * 1000], params)


def test_rows_of_a_decode_step_stand_all_over_a_chunk() -> None:
    mode = exact_cost.Mode(tiny_model(), EXACT_CHUNK, 128, exact=False)
    ends: list[int] = []
    mode.runner.decode = lambda which, places: ends.extend(places)  # type: ignore[method-assign]
    mode.decode(EXACT_CHUNK, 128)()
    mode.runner.close()
    assert sorted(ends) == list(range(128 - EXACT_CHUNK, 128))
