"""Benchmark results as files: they are read back as written, and errors name file and field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_paged.errors import CannotWrite, InvalidArgument, ResultFileError
from granite_paged.report.bench_results import (
    CalibratedShape,
    Calibration,
    Latency,
    Rates,
    Result,
    Row,
    model_key,
    read_result,
    record_name,
    slug,
    updated,
    writable_folder,
)
from granite_paged.report.published import original_study, read_published

positive = st.floats(0, 1e9, allow_nan=False)
latencies = st.builds(Latency, positive, positive, positive, st.integers(0, 1000))
maybe = st.one_of(st.none(), positive)
rows = st.builds(
    Row,
    case=st.sampled_from(["batch", "context", "decode", "kernel"]),
    mode=st.sampled_from(["default", "static", "paged"]),
    batch=st.integers(0, 200),
    context=st.integers(1, 2**17),
    latency_ms=st.one_of(st.none(), latencies),
    tokens_per_second=maybe,
    peak_bytes=st.one_of(st.none(), st.integers(0, 2**40)),
    variant=st.sampled_from(["", "ragged 64-4096"]),
    floor_ms=maybe,
    paged_us=maybe,
    note=st.text(max_size=5),
    error=st.text(max_size=5),
)
shapes = st.builds(
    CalibratedShape,
    case=st.just("decode"),
    batch=st.integers(1, 9),
    context=st.integers(1, 9),
    sessions=st.lists(st.lists(positive, max_size=3), max_size=2),
    floor_ms=maybe,
    peak_bytes=st.one_of(st.none(), st.integers(0, 2**40)),
    busy=maybe,
    clock_mhz=st.one_of(st.none(), st.lists(st.integers(0, 4000), min_size=1, max_size=2)),
)
calibrations = st.builds(
    Calibration,
    page_size=st.integers(1, 512),
    backend=st.sampled_from(["auto", "eager"]),
    visits=st.integers(1, 9),
    shapes=st.lists(shapes, max_size=3),
)
results = st.builds(
    Result,
    device=st.text(min_size=1, max_size=20),
    versions=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    seed=st.integers(0, 9),
    rows=st.lists(rows, max_size=5, unique_by=lambda row: row.key),
    model=st.text(max_size=5),
    rates=st.one_of(st.none(), st.builds(Rates, positive, positive)),
    calibration=st.one_of(st.none(), calibrations),
)


def written(folder: Path, data: Any) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@given(results)
def test_written_results_are_read_back(tmp_path_factory: Any, result: Result) -> None:
    path = written(tmp_path_factory.mktemp("results"), result.to_json())
    assert read_result(path) == result


def example() -> dict[str, Any]:
    row = {
        "case": "kernel",
        "mode": "paged",
        "batch": 32,
        "context": 4096,
        "latency_ms": {"median": 0.08, "p10": 0.079, "p90": 0.082, "n": 50},
        "tokens_per_second": 4e5,
        "peak_bytes": 10**9,
        "floor_us": 62.0,
        "sdpa_us": 75,
        "paged_us": 80.0,
    }
    return {"device": "NVIDIA H200", "versions": {"torch": "2.11"}, "seed": 0, "rows": [row]}


def test_the_documented_format_is_read(tmp_path: Path) -> None:
    (row,) = read_result(written(tmp_path, example())).rows
    assert (row.latency_ms, row.sdpa_us) == (Latency(0.08, 0.079, 0.082, 50), 75.0)


def test_empty_fields_are_written() -> None:
    row = Row("batch", "paged", 1, 512, error="OutOfMemoryError: 3 GB")
    data = Result(device="cpu", versions={}, seed=0, rows=[row]).to_json()
    assert data["rows"] == [
        {
            "case": "batch",
            "mode": "paged",
            "batch": 1,
            "context": 512,
            "latency_ms": None,
            "tokens_per_second": None,
            "peak_bytes": None,
            "error": "OutOfMemoryError: 3 GB",
        }
    ]


def broken(place: str, value: Any) -> dict[str, Any]:
    """Return the example with one field changed, or removed if `value` is `...`."""
    whole: Any = example()
    holder = whole
    *path, last = place.replace("[0]", ".0").split(".")
    for name in path:
        holder = holder[int(name) if name.isdigit() else name]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return dict(whole)


WRONG: dict[str, tuple[str, Any, str]] = {
    "no device": ("device", ..., "is missing"),
    "device a number": ("device", 7, "must be text, got 7"),
    "rows an object": ("rows", {}, "must be a list"),
    "version a number": ("versions.torch", 2.11, "must be text"),
    "no mode": ("rows[0].mode", ..., "is missing"),
    "batch a float": ("rows[0].batch", 1.5, "must be a whole number"),
    "batch true": ("rows[0].batch", True, "must be a whole number"),
    "context negative": ("rows[0].context", -1, "at least 0"),
    "median text": ("rows[0].latency_ms.median", "fast", "must be a finite number"),
    "median infinite": ("rows[0].latency_ms.median", float("inf"), "must be a finite number"),
    "median NaN": ("rows[0].latency_ms.median", float("nan"), "must be a finite number"),
    "no median": ("rows[0].latency_ms.median", ..., "is missing"),
    "peak a float": ("rows[0].peak_bytes", 1e9, "must be a whole number"),
    "median huge": ("rows[0].latency_ms.median", 1e300, "at most 1.84e+19"),
    "batch huge": ("rows[0].batch", 10**400, "must be a whole number"),
    "p10 huge": ("rows[0].latency_ms.p10", 10**400, "must be a finite number"),
    "unknown mode": ("rows[0].mode", "foo", "must be one of default, static, paged, got 'foo'"),
    "unknown case": ("rows[0].case", "prefill", "must be one of batch, context, decode, kernel, "),
    "unknown field": ("rows[0].latency", 3, "is not a field of this format"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_names_the_file_and_field(wrong: str, tmp_path: Path) -> None:
    place, value, problem = WRONG[wrong]
    path = written(tmp_path, broken(place, value))
    with pytest.raises(ResultFileError) as caught:
        read_result(path)
    assert str(caught.value).startswith(f"{path}: {place} ")
    assert problem in str(caught.value)
    assert (caught.value.path, caught.value.field) == (str(path), place)


def test_a_duplicate_row_is_refused(tmp_path: Path) -> None:
    data = example()
    data["rows"] *= 2
    with pytest.raises(ResultFileError, match=r"rows\[1\] repeats rows\[0\]"):
        read_result(written(tmp_path, data))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_file_that_is_not_a_result_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ResultFileError, match=problem):
        read_result(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultFileError, match=r"nowhere\.json cannot be read: No such file"):
        read_result(tmp_path / "nowhere.json")


def test_find_returns_only_measured_rows() -> None:
    good, bad = Row("batch", "paged", 1, 512), Row("batch", "paged", 2, 512, error="no memory")
    result = Result(device="cpu", versions={}, seed=0, rows=[bad, good])
    assert result.find("batch", "paged", 1, 512) is good
    assert result.find("batch", "paged", 2, 512) is None
    assert result.measured("batch") == [good]


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb")],
)
def test_a_slug_is_the_gpu_name_in_lower_case(device: str, name: str) -> None:
    assert slug(device) == name


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("granite-4.0-h-1b (random weights, seed 0)", "granite-4.0-h-1b"),
        ("ibm-granite/granite-4.0-h-1b", "granite-4.0-h-1b"),
        ("/data/My Model/", "my-model"),
        ("", "unnamed"),
        ("../..", "unnamed"),
    ],
)
def test_a_record_is_named_by_its_model_without_weights_and_folder(model: str, key: str) -> None:
    assert model_key(model) == key
    assert record_name("NVIDIA H200", model, "bfloat16") == f"nvidia-h200.{key}.bfloat16.json"


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="cannot write"):
        writable_folder(tmp_path / "file" / "folder")


def test_a_folder_is_created_with_those_around_it_and_may_exist(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert writable_folder(folder) == writable_folder(folder) == folder
    assert folder.is_dir()


# -- figures of the original study --------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "model", "applies"),
    [
        ("NVIDIA A100-SXM4-80GB", "granite-4.0-h-1b (random weights, seed 0)", True),
        ("NVIDIA A100 80GB PCIe", "study-24l (random weights, seed 0)", True),
        ("NVIDIA A100-SXM4-40GB", "granite-4.0-h-1b", False),
        ("NVIDIA H200", "granite-4.0-h-1b", False),
        ("NVIDIA A100-SXM4-80GB", "granite-4.0-h-small", False),
    ],
)
def test_published_figures_apply_to_their_gpu_and_model(
    device: str, model: str, applies: bool
) -> None:
    assert original_study().applies_to(device, model) is applies


def test_every_published_shape_has_both_modes() -> None:
    points = {mode: set() for mode in ("default", "paged")}  # type: dict[str, set[Any]]
    for row in original_study().rows:
        points[row.mode].add((row.case, row.batch, row.context))
    assert points["default"] == points["paged"]
    assert len(points["paged"]) == 12


def test_every_folder_of_records_has_the_study(tmp_path: Path) -> None:
    assert read_published(tmp_path) == [original_study()]


def test_the_study_is_cited() -> None:
    assert "HPML Team 13, Columbia University" in original_study().source


def test_a_published_file_is_checked_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "x.published.json").write_text('{"source": "x", "device": 3}')
    with pytest.raises(ResultFileError, match=r"x\.published\.json: device must be text"):
        read_published(tmp_path)


# -- updates of results -------------------------------------------------------------------------

KERNEL = Row("kernel", "paged", 32, 4096, paged_us=1.0)
MEMORY = Row("memory", "paged", 1005, 4096, peak_bytes=1)


@pytest.mark.parametrize(
    ("old", "new", "replaced"),
    [
        (KERNEL, {"paged_us": 2.0}, True),
        (KERNEL, {"variant": "ragged 64-4096"}, False),
        (KERNEL, {"batch": 8}, False),
        (KERNEL, {"mode": "default"}, False),
        (KERNEL, {"case": "decode"}, False),
        (MEMORY, {"batch": 990}, True),
        (MEMORY, {"batch": 990, "mode": "default"}, False),
        (replace(KERNEL, error="out of memory"), {"variant": "warm cache"}, True),
    ],
)
def test_a_new_row_replaces_the_row_it_repeats(
    old: Row, new: dict[str, Any], replaced: bool
) -> None:
    before = Result("GPU", {}, 0, [old])
    again = replace(old, error="", **new)
    found = updated(before, replace(before, rows=[again]))
    assert found.rows == ([again] if replaced else [old, again])


def test_updated_rows_keep_their_places() -> None:
    old = Result("GPU", {}, 0, [replace(KERNEL, batch=batch) for batch in (1, 8, 32)])
    new = [replace(KERNEL, batch=batch, paged_us=3.0) for batch in (64, 8)]
    found = updated(old, replace(old, rows=new)).rows
    assert found == [old.rows[0], new[1], old.rows[2], new[0]]


def test_an_update_keeps_the_calibration_and_the_first_versions() -> None:
    calibration = Calibration(128, "auto", 5, [])
    old = Result("a", {"torch": "2.14"}, 0, [], calibration=calibration)
    new = replace(old, versions={"torch": "2.14", "mamba_ssm": "2.3"}, calibration=None)
    assert updated(old, new) == old


def test_an_error_with_mamba_kernels_leaves_the_row_without_them_alone() -> None:
    plain = Row("batch", "static", 1, 512, error="RuntimeError: x", mamba="reference code")
    fast = replace(plain, error="", variant="mamba_ssm", mamba="mamba_ssm 2.3")
    old = Result("a", {}, 0, [plain])
    assert updated(old, replace(old, rows=[fast])).rows == [plain, fast]


@pytest.mark.parametrize("field", ["device", "model", "dtype"])
def test_results_of_different_kinds_are_not_merged(field: str) -> None:
    before = Result("GPU", {}, 0, [KERNEL])
    with pytest.raises(InvalidArgument, match=f"different {field}"):
        updated(before, replace(before, **{field: "another"}))
