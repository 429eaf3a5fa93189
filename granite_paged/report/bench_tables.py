"""Markdown tables of benchmark results, for docs/benchmarks.md and `bench --markdown`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from granite_paged.names import MAMBA_PACKAGES, MODES
from granite_paged.report import markdown
from granite_paged.report.bench_results import Result, Row
from granite_paged.report.formatting import gigabytes, ratio, significant
from granite_paged.report.published import Published, original_study

Columns = dict[str, Callable[[Row], str]]
"""Heading and text of each column of a table."""

_TITLES = {
    "batch": "Prefill by batch size",
    "context": "Prefill of one prompt by context length",
    "decode": "One decode step",
    "kernel": "Decode attention alone, one layer",
    "memory": "Ragged sequences that fit a memory budget",
    "coldstart": "Cold start",
    "serve": "A seeded workload, all requests sent at once",
}


def tables(results: Sequence[Result]) -> str:
    """Return every table of every result, under the name of its device."""
    return "\n".join(part for result in results for part in _sections(result))


def page_part(result: Result, figures: Sequence[str]) -> str:
    """Return what docs/benchmarks.md shows of a record: tables, then these links to figures."""
    head = (
        f"{result.device}, {result.model}, {result.dtype}. Times are medians; the modes of a row "
        f"took turns in one run. {_mamba_sentence(result)}"
    )
    shown = ("batch", "context", "decode", "kernel", "serve")
    found = {case: table(result, case) for case in shown}
    parts = [f"{_TITLES[case]}:\n\n{text}" for case, text in found.items() if text]
    return "\n".join([head, "", *parts, *study_tables([result]), "\n\n".join(figures)])


def _sections(result: Result) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    head = [f"**{result.device}** · {result.model}, {result.dtype} · {versions}", ""]
    head += [_mamba_sentence(result), ""]
    found = {case: table(result, case) for case in _TITLES}
    return head + [f"{_TITLES[case]}\n\n{text}" for case, text in found.items() if text]


def _mamba_sentence(result: Result) -> str:
    """Say what transformers' modes run Mamba layers with, where a column does not say it."""
    missing = [name for name in MAMBA_PACKAGES if name not in result.versions]
    if len(missing) < len(MAMBA_PACKAGES):
        return "Columns say what transformers' modes run Mamba layers with."
    return (
        "`default` and `static` run Mamba layers with transformers' reference code, which is slow, "
        "unless their column names mamba_ssm."
    )


def table(result: Result, case: str) -> str:
    """Return one case as a table; empty if it was not run."""
    rows = [row for row in result.rows if row.case == case]
    if not rows:
        return ""
    if case not in ROW_BY_ROW:
        return _side_by_side(rows)
    columns = ROW_BY_ROW[case]
    cells = [[show(row) for show in columns.values()] for row in rows if not row.error]
    return markdown.table(list(columns), cells) + _notes(rows)


# -- modes side by side -------------------------------------------------------------------------


def _side_by_side(rows: Sequence[Row]) -> str:
    """Return a line for each shape: time and memory of each mode, speed-ups and floor."""
    labels = sorted({label_of(row) for row in rows}, key=_place)
    shapes = sorted({(row.batch, row.context) for row in rows})
    by_key = {(row.batch, row.context, label_of(row)): row for row in rows}
    ours = [label for label in labels if label != "paged"] if "paged" in labels else []
    names = _SERVED if rows[0].case == "serve" else _STEPS
    header = [*names[:2], *(f"{label}, ms" for label in labels)]
    header += [*(f"{label} / paged" for label in ours), "floor, ms"]
    header += [*(f"{label}, GB" for label in labels), names[2]]
    lines = [
        _line(batch, context, {label: by_key.get((batch, context, label)) for label in labels})
        for batch, context in shapes
    ]
    return markdown.table(header, lines) + _notes(rows) + _gaps(shapes, labels, by_key)


_STEPS = ("batch", "context, tokens", "tokens per second")
_SERVED = ("requests", "tokens each, at most", "new tokens per second")


def label_of(row: Row) -> str:
    """Return the heading of a row's columns: its mode, and whose Mamba kernels it had."""
    return f"{row.mode}, {row.variant}" if row.variant else row.mode


def _place(label: str) -> tuple[int, str]:
    return MODES.index(label.partition(",")[0]), label


def _line(batch: int, context: int, by_label: dict[str, Row | None]) -> list[str]:
    rows = list(by_label.values())
    floors = [row.floor_ms for row in rows if row and row.floor_ms]
    cells = [str(batch), f"{context:,}", *map(_milliseconds, rows)]
    if "paged" in by_label:
        ours = _median(by_label["paged"])
        others = (row for label, row in by_label.items() if label != "paged")
        cells += [ratio(_median(row), ours) for row in others]
    cells.append(significant(floors[0] if floors else None))
    last = by_label.get("paged") or rows[-1]
    return [*cells, *(_gigabytes(row) for row in rows), _tokens(last)]


def _gaps(
    shapes: Sequence[tuple[int, int]],
    labels: Sequence[str],
    by_key: Mapping[tuple[int, int, str], Row],
) -> str:
    """Say in which shapes a mode of the table was not measured, since a dash gives no reason."""
    lines = []
    for label in labels:
        gaps = [f"{b} x {c}" for b, c in shapes if (b, c, label) not in by_key]
        if gaps:
            lines.append(f"- {label}: not measured at {', '.join(gaps)}")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _notes(rows: Sequence[Row]) -> str:
    """Return why numbers are missing, which a cell has no room for."""
    lines = [f"- {label_of(r)}, {r.batch} x {r.context}: {r.error}" for r in rows if r.error]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


# -- cells --------------------------------------------------------------------------------------


def _median(row: Row | None) -> float | None:
    return row.latency_ms.median if row and row.latency_ms else None


def _milliseconds(row: Row | None) -> str:
    if row is not None and row.error:
        if row.error.startswith("not measured"):
            return "-"
        return "out of memory" if "OutOfMemory" in row.error else "failed"
    return significant(_median(row))


def _gigabytes(row: Row | None) -> str:
    return gigabytes(row.peak_bytes if row else None)


def _tokens(row: Row | None) -> str:
    return f"{row.tokens_per_second:,.0f}" if row and row.tokens_per_second else "-"


ROW_BY_ROW: dict[str, Columns] = {
    "kernel": {
        "batch": lambda row: str(row.batch),
        "context, tokens": lambda row: row.variant or f"{row.context:,}",
        "floor, µs": lambda row: significant(row.floor_us),
        "SDPA, µs": lambda row: significant(row.sdpa_us),
        "paged, µs": lambda row: significant(row.paged_us),
        "paged / SDPA": lambda row: ratio(row.paged_us, row.sdpa_us),
    },
    "memory": {
        "K and V": lambda row: "in pages" if row.mode == "paged" else "padded",
        "lengths, tokens": lambda row: row.variant.removeprefix("ragged "),
        "sequences": lambda row: f"{row.batch:,}",
        "GB": _gigabytes,
        "budget": lambda row: row.note,
    },
    "coldstart": {
        "until": lambda row: row.variant,
        "seconds": lambda row: significant(row.latency_ms.median / 1e3 if row.latency_ms else None),
    },
}


# -- the original study -------------------------------------------------------------------------


def study_tables(results: Sequence[Result]) -> list[str]:
    """Return the study's prefill figures and ours; only for cases that have shapes in common."""
    study = original_study()
    found = [_study_table(results, study, case) for case in ("batch", "context")]
    note = (
        f"The original study ({study.source}) measured a {study.model} with another harness on "
        "another GPU. Cells are milliseconds per prompt and peak GPU memory.\n"
    )
    return [note, *filter(None, found)] if any(found) else []


def _study_table(results: Sequence[Result], study: Published, case: str) -> str:
    points = [row for row in study.rows if row.case == case]
    sizes = sorted({(row.batch, row.context) for row in points})
    ours = [
        (f"{result.model}, {result.device}", mode, *cells)
        for result in results
        if study.compares_with(result.model)
        for mode in MODES
        if any(cells := [_point(result.find(case, mode, *size)) for size in sizes])
    ]
    if not ours:
        return ""
    theirs = [
        (f"original study, {study.device}", mode, *(_studied(study, case, mode, s) for s in sizes))
        for mode in dict.fromkeys(row.mode for row in points)
    ]
    named = (f"batch {b}" if case == "batch" else f"{c:,} tokens" for b, c in sizes)
    head = (_TITLES[case], "mode", *named)
    return markdown.table(head, [[cell or "-" for cell in row] for row in (*theirs, *ours)], left=2)


def _studied(study: Published, case: str, mode: str, size: tuple[int, int]) -> str:
    row = study.find(case, mode, *size)
    return f"{row.ms_per_query:,.0f} ms, {row.peak_gb:.2f} GB" if row else ""


def _point(row: Row | None) -> str:
    if row is None or not row.latency_ms or not row.batch:
        return ""
    return f"{row.latency_ms.median / row.batch:,.2f} ms, {gigabytes(row.peak_bytes)} GB"
