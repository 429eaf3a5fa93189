"""The tool that writes the engine's figures for the documentation, on small loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_paged.models import TINY_RECALL
from tools import engine_figures

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


def test_a_start_is_measured_with_caches_of_its_own(monkeypatch: Patch) -> None:
    def run(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "tools.engine_figures", "--quick", "--only-start"]
        environment = options["env"]
        assert environment["TRITON_CACHE_DIR"] == "folder/TRITON_CACHE_DIR"
        assert environment["TORCHINDUCTOR_CACHE_DIR"] == "folder/TORCHINDUCTOR_CACHE_DIR"
        assert environment["PATH"]
        return SimpleNamespace(stdout="a message\n12.345\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["engine_figures", "--quick"])
    assert engine_figures.start_in_new_process("folder") == 12.3


def test_a_start_is_one_engine(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [*COMMAND, *MODEL, "--only-start"])
    engine_figures.main()
    assert 0 < float(capsys.readouterr().out) < 60
