"""The command `gate`, on a pretended GPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from granite_paged import environment
from granite_paged.bench import gate, judge, records, suites, visits
from granite_paged.bench.calibration import Bound
from granite_paged.bench.cases import Shape
from granite_paged.bench.judge import Gated, Seen
from granite_paged.bench.session import Session
from granite_paged.bench.visits import VISITS
from granite_paged.cli.main import run
from granite_paged.cli.options import FAILED, INTERRUPTED, OK, USAGE, ModelChoice
from granite_paged.report.bench_results import read_result
from tests.helpers.command_line import Capture, assert_one_line


def judged(
    monkeypatch: pytest.MonkeyPatch, records: Path, *options: str, ratio: float = 0.5
) -> int:
    """Run the gate on a pretended GPU, where paged takes `ratio` times as long as default."""

    @contextlib.contextmanager
    def ready(session: Any, gated: Any) -> Iterator[Any]:
        yield {}, Seen(peaks={"paged": 9 * 10**8, "default": 10**9})

    def look_at(gated: Any, subjects: Any, seen: Seen, visits: int) -> None:
        times = [1 + 0.001 * (i % 3) for i in range(visits)]
        seen.default = times
        seen.paged = seen.times = [ratio * time for time in times]

    monkeypatch.setattr(gate, "ready_subjects", ready)
    monkeypatch.setattr(gate, "look_at", look_at)
    pretend_gpu(monkeypatch)
    return run(["gate", "--device", "cpu", "--records", str(records), *options])


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelChoice, "require_gpu", lambda *args: None)
    monkeypatch.setattr(gate, "refuse_where_blind", lambda session: None)
    monkeypatch.setattr(Session, "floor", lambda self, case, shape: 0.1)
    monkeypatch.setattr(visits, "shapes_for", lambda session, shapes: list(shapes))


RECORD = "cpu.tiny-recall.float32.json"


def test_the_gate_on_an_unrecorded_gpu_says_how_to_record_it_without_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert judged(monkeypatch, tmp_path) == OK
    shown = capsys.readouterr().out
    assert "--calibrate 20 --records DIR" in shown
    assert "nox" not in shown
    assert str(tmp_path / RECORD) in shown
    assert "not slower than default" in shown
    assert "as recorded" not in shown


def test_the_gate_exits_1_if_paged_is_slower_than_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    report = tmp_path / "gate.json"
    assert judged(monkeypatch, tmp_path, "--json", str(report), ratio=1.2) == FAILED
    data = json.loads(report.read_text())
    assert data["passed"] is False
    assert {c["verdict"] for c in data["checks"] if c["law"] == "not slower than default"} == {
        "failed"
    }


def recorded(folder: Path, ratio: float, **changes: Any) -> Path:
    """Write a record in which every gated shape takes `ratio` seconds, with a floor of 0.1."""
    suites = [10 * ratio * (1 + 0.001 * (i % 3)) for i in range(20)]
    shapes = [
        {
            "case": gated.case,
            "batch": gated.shape.batch,
            "context": gated.shape.context,
            "sessions": [suites] if gated.time else [],
            "floor_ms": 100.0,
            "peak_bytes": 9 * 10**8,
        }
        for gated in judge.GATED
    ]
    settings = {"page_size": 16, "backend": "auto", "visits": VISITS}
    head = {"device": "cpu", "model": "tiny-recall", "dtype": "float32", "seed": 0}
    head["versions"] = environment.versions()
    whole = {**head, "rows": [], "calibration": {**settings, "shapes": shapes}, **changes}
    (folder / RECORD).write_text(json.dumps(whole))
    return folder / RECORD


@pytest.mark.parametrize(("ratio", "status"), [(0.5, OK), (0.475, FAILED)])
def test_the_gate_compares_time_over_floor_with_the_record(
    ratio: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    recorded(tmp_path, ratio)
    assert judged(monkeypatch, tmp_path) == status
    shown = capsys.readouterr().out
    assert shown.count("time as recorded") == sum(gated.time for gated in judge.GATED)
    assert shown.count("memory as recorded") == len(judge.GATED)
    assert "--calibrate" not in shown


def test_found_and_allowed_stand_in_their_own_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    recorded(tmp_path, 0.5)
    judged(monkeypatch, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "time as rec" in line]
    assert lines
    for line in lines:
        found, allowed = line.split("recorded")[1].split("<=")
        assert float(found) < float(allowed.split()[0])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype bfloat16 (here float32)"),
        ({"model": "granite-4.0-h-1b"}, "model granite-4.0-h-1b (here tiny-recall)"),
        ({"device": "NVIDIA H200"}, "device NVIDIA H200 (here cpu)"),
        ({"versions": {"torch": "2.0"}}, "torch 2.0"),
        ({"versions": {}}, "torch missing"),
        ({"calibration": None}, "no calibration"),
        ({"rows": 7}, "must be a list"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--teeth", "2"]])
def test_a_record_of_another_contract_exits_2_in_one_line(
    options: list[str],
    changes: dict[str, Any],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    recorded(tmp_path, 0.5, **changes)
    assert judged(monkeypatch, tmp_path, *options) == USAGE
    assert_one_line(capsys, named)


def test_an_unreadable_record_exits_2_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    recorded(tmp_path, 0.5).write_text("{")
    assert judged(monkeypatch, tmp_path) == USAGE
    assert_one_line(capsys, "is not JSON")


def test_a_short_model_without_a_record_exits_2_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Only the engine's shape is left then, which `default` does not run."""
    served = [gated for gated in judge.GATED if gated.case == "serve"]
    monkeypatch.setattr(judge, "GATED", served)
    assert judged(monkeypatch, tmp_path) == USAGE
    assert_one_line(capsys, "nothing was judged")


@pytest.mark.parametrize("options", [[], ["--teeth", "2"]])
def test_a_folder_of_records_that_does_not_exist_is_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A mistyped folder must not look like a GPU without a record."""
    assert judged(monkeypatch, tmp_path / "typo", *options) == USAGE
    assert_one_line(capsys, "typo does not exist")


# -- calibration and teeth ----------------------------------------------------------------------

SMALL = (
    Gated("batch", Shape(2, 32)),
    Gated("context", Shape(1, 48), time=False, default=False),
    Gated("serve", Shape(1, 3), default=False, seen=1.1),
)


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run real suites of small shapes on the CPU."""
    monkeypatch.setattr(ModelChoice, "require_gpu", lambda *args: None)
    monkeypatch.setattr(gate, "refuse_where_blind", lambda session: None)
    monkeypatch.setattr(judge, "GATED", SMALL)
    monkeypatch.setattr(visits, "STEPS", 2)
    for module in (suites, records):
        monkeypatch.setattr(module, "VISITS", 2)


def test_a_calibration_is_written_and_extended(
    small_suite: None, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "new"
    command = ["gate", "--device", "cpu", "--records", str(folder), "--calibrate", "5"]
    assert run(command) == OK
    shown = capsys.readouterr().out
    assert "of 0 suites would have been red" in shown  # five suites are too few to leave one out
    assert str(folder / RECORD) in shown
    assert run([*command, "--update"]) == OK
    assert "of 10 suites would have been red" in capsys.readouterr().out
    calibration = read_result(folder / RECORD).calibration
    assert calibration is not None
    assert (calibration.page_size, calibration.visits) == (16, 2)
    batch, context, serve = calibration.shapes
    assert [len(suites) for suites in batch.sessions] == [5, 5]
    assert context.sessions == []
    assert serve.floor_ms
    assert run(command) == OK  # without --update, a calibration starts again
    (batch, *_) = read_result(folder / RECORD).calibration.shapes
    assert [len(suites) for suites in batch.sessions] == [5]


def test_a_calibration_extends_a_record_that_lacks_a_shape(
    small_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["gate", "--device", "cpu", "--records", str(tmp_path), "--calibrate", "6"]
    monkeypatch.setattr(judge, "GATED", SMALL[:2])
    assert run(command) == OK
    monkeypatch.setattr(judge, "GATED", SMALL)
    capsys.readouterr()
    assert run([*command, "--update"]) == OK
    assert "of 6 suites would have been red" in capsys.readouterr().out
    found = read_result(tmp_path / RECORD).calibration
    assert found is not None
    assert [list(map(len, shape.sessions)) for shape in found.shapes] == [[6, 6], [], [6]]


def interrupt_suite(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Interrupt a suite. Return the list of suites that were begun, which grows."""
    measured = suites.measure_suite
    begun: list[int] = []

    def counted(*args: Any) -> Any:
        begun.append(len(begun) + 1)
        if begun[-1] == number:
            raise KeyboardInterrupt
        return measured(*args)

    monkeypatch.setattr(suites, "measure_suite", counted)
    return begun


def test_an_interrupted_calibration_is_resumed(
    small_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["gate", "--device", "cpu", "--records", str(tmp_path), "--calibrate", "5"]
    left = tmp_path / f"{RECORD.removesuffix('.json')}.unfinished"
    begun = interrupt_suite(monkeypatch, 3)
    assert run(command) == INTERRUPTED
    assert f"2 suites kept in {left}; run the same command to resume" in capsys.readouterr().err
    assert not (tmp_path / RECORD).exists()
    first = read_result(left).calibration
    assert first is not None
    assert run(command) == OK
    assert f"resumed: 2 suites are in {left}; 4 more will run" in capsys.readouterr().err
    assert len(begun) == 3 + 4
    assert not left.exists()
    found = read_result(tmp_path / RECORD).calibration
    assert found is not None
    for shape, before in zip(found.shapes, first.shapes, strict=True):
        assert [len(session) for session in shape.sessions] == ([2, 4] if before.sessions else [])
        assert shape.sessions[:1] == before.sessions
    assert all(bound for _, bound in suites.bounds_of(found)), "the gate can compare with it"


def test_an_interrupted_calibration_with_update_keeps_the_recorded_suites(
    small_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["gate", "--device", "cpu", "--records", str(tmp_path), "--calibrate", "5"]
    assert run(command) == OK
    record = (tmp_path / RECORD).read_bytes()
    interrupt_suite(monkeypatch, 3)
    assert run([*command, "--update"]) == INTERRUPTED
    assert (tmp_path / RECORD).read_bytes() == record
    assert run([*command, "--update"]) == OK
    found = read_result(tmp_path / RECORD).calibration
    assert found is not None
    assert [len(session) for session in found.shapes[0].sessions] == [5, 2, 4]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"dtype": "bfloat16"}, "dtype bfloat16 (here float32)"), ({"shapes": []}, "other shapes")],
)
def test_suites_of_another_contract_are_not_resumed(
    changes: dict[str, Any],
    named: str,
    small_suite: None,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    command = ["gate", "--device", "cpu", "--records", str(tmp_path), "--calibrate", "5"]
    settings = {"page_size": 16, "backend": "auto", "visits": 2}
    calibration = {**settings, "shapes": changes.pop("shapes", [])}
    recorded(tmp_path, 0.5, calibration=calibration, **changes).rename(
        tmp_path / f"{RECORD.removesuffix('.json')}.unfinished"
    )
    assert run(command) == USAGE
    assert_one_line(capsys, named)


def test_teeth_count_green_and_red_tries(
    small_suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Judge twice: against no bound to speak of, and against one that everything exceeds."""
    folder, report = tmp_path, tmp_path / "teeth.json"
    command = ["gate", "--device", "cpu", "--records", str(folder)]
    run([*command, "--calibrate", "6"])
    for module in (judge, suites):
        monkeypatch.setattr(module, "scattered", lambda *args, **options: False)
    monkeypatch.setattr(judge, "SEEN", 100.0)
    for base, green, red in ((1e9, 2, 0), (1e-9, 0, 2)):
        bound = Bound(base, 0.0, 0.0, 0.01, 0.0)
        monkeypatch.setattr(judge, "bound_of", lambda sessions, checks, bound=bound: bound)
        assert run([*command, "--teeth", "2", "--json", str(report)]) == FAILED
        bites = json.loads(report.read_text())["bites"]
        times = [bite for bite in bites if bite["law"] == "time as recorded"]
        assert [(bite["tries"], bite["green"], bite["red"]) for bite in times] == [
            (2, green, red)
        ] * 2
    assert "green without it" in capsys.readouterr().out


def test_teeth_without_a_record_exit_2(small_suite: None, tmp_path: Path, capsys: Capture) -> None:
    assert run(["gate", "--device", "cpu", "--records", str(tmp_path), "--teeth", "2"]) == USAGE
    assert_one_line(capsys, "make one with --calibrate")


@pytest.mark.parametrize(
    "options", [["--update"], ["--calibrate", "9", "--teeth", "2"], ["--calibrate", "4"]]
)
def test_options_of_the_gate_that_do_not_fit_are_refused(
    options: list[str], capsys: Capture
) -> None:
    assert run(["gate", "--device", "cpu", *options]) == USAGE
    assert_one_line(capsys, options[0])
