"""The paged mode on the real runner decodes what transformers decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from granite_paged import PagedConfig
from granite_paged.bench import modes
from granite_paged.bench.cases import Shape
from granite_paged.bench.modes import Default, Paged
from granite_paged.cli.main import OK, run
from granite_paged.report.bench_results import read_result
from tests.helpers.tiny_models import tiny_model


def test_bench_works_with_the_real_runner(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    cases = ["--case", "batch", "--case", "decode", "--batch", "2", "--context", "40"]
    options = ["--device", "cpu", "--quick", "--mode", "default", "--mode", "paged"]
    assert run(["bench", *cases, *options, "--json", str(file)]) == OK
    result = read_result(file)
    assert [row.error for row in result.rows if row.error] == []
    assert {row.mode for row in result.rows} == {"default", "paged"}


def test_a_paged_step_gives_the_token_of_default(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = modes.make_runner
    monkeypatch.setattr(modes, "make_runner", lambda *args: made.append(real(*args)) or made[-1])
    model, shape = tiny_model(), Shape(2, 40)
    expected = Default(model, 0).prepare("decode", shape).step().tolist()
    paged = Paged(model, PagedConfig(page_size=16), 0).prepare("decode", shape)
    paged.step()
    first = made[0].tokens[1].item()  # the other rows continue copies of the first
    paged.release()
    assert first == expected[0]


def test_a_released_step_can_be_prepared_again() -> None:
    mode = Paged(tiny_model(), PagedConfig(page_size=16), 0)
    for _ in range(2):
        prepared = mode.prepare("prefill", Shape(2, 40))
        prepared.step()
        prepared.reset()
        prepared.step()
        prepared.release()
