"""Reports of `bench serve` are read back as they were written, or refused by field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from granite_paged.bench.serve_results import (
    Baseline,
    EngineRow,
    Served,
    ServeResult,
    is_serve,
    read_serve,
    serve_table,
)
from granite_paged.bench.workload import Workload
from granite_paged.errors import ResultFileError
from granite_paged.names import SERVING_ENGINES

SERVED = Served(2, 10, 0.5, 20.0, (1.0, 2.0), (3.0, 4.0))
ROWS = [
    EngineRow(
        engine=engine,
        requests=2,
        output_tokens=10,
        seconds=(1.0, 0.5),
        tokens_per_second=(10.0, 20.0),
        first_token_ms=(1.0, 2.0),
        speedup=1.25,
        first_tokens_equal=0.75,
        tokens_equal=0.5,
        start_seconds=3.0,
        device_bytes=2 * 10**9,
        versions={"vllm": "0.25.1"},
        settings={"max_num_seqs": "2"},
    )
    for engine in SERVING_ENGINES[:2]
]
ROWS.append(EngineRow(SERVING_ENGINES[2], 2, error="vLLM ended with status 1: no kernel"))
RESULT = ServeResult(
    device="cpu",
    model="tiny-recall",
    dtype="float32",
    versions={"torch": "2.11.0"},
    seed=0,
    workload=Workload(requests=2),
    engine=SERVED,
    baselines={"default": Baseline(SERVED, 2.0, 1.0)},
    schedule_ms=0.1,
    prefix_hit_rate=0.0,
    preempted=0,
    rows=ROWS,
)


def written(data: Any, folder: Path) -> Path:
    file = folder / "serve.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    return file


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = written(RESULT.to_json(), tmp_path)
    assert read_serve(file) == RESULT
    assert is_serve(file)
    assert not is_serve(written({"rows": []}, tmp_path))


def test_the_table_shows_the_ratio_and_why_a_row_has_no_numbers() -> None:
    text = serve_table(RESULT)
    assert re.search(
        r"^\| vllm float32 state \|.* 20 .* 1\.25 x .* 75% .* 50% .* 2\.00 ", text, re.MULTILINE
    )
    assert "- vllm defaults: vLLM ended with status 1: no kernel" in text
    assert "vllm 0.25.1, max_num_seqs=2" in text


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        pytest.param("engine", "vllm", "rows[1].engine", id="unknown engine"),
        pytest.param("engine", "paged", "rows[1]", id="an engine twice"),
        pytest.param("seconds", [1.0], "rows[1].seconds", id="one round"),
        pytest.param("seconds", None, "rows[1]", id="neither times nor an error"),
        pytest.param("tokens_per_second", None, "rows[1]", id="times without tokens"),
        pytest.param("error", "crashed", "rows[1]", id="times and an error"),
        pytest.param("tokens_equal", 1.5, "rows[1].tokens_equal", id="more than all tokens"),
        pytest.param("speed", 1.0, "rows[1].speed", id="unknown field"),
    ],
)
def test_a_malformed_row_is_refused(name: str, value: Any, place: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(RESULT.to_json()))
    data["rows"][1][name] = value
    file = written(data, tmp_path)
    with pytest.raises(ResultFileError, match=re.escape(f"{file}: {place} ")):
        read_serve(file)


def test_an_impossible_workload_is_refused(tmp_path: Path) -> None:
    data = RESULT.to_json()
    data["workload"]["new_tokens"] = (9, 8)
    with pytest.raises(ResultFileError, match="workload cannot be"):
        read_serve(written(data, tmp_path))
