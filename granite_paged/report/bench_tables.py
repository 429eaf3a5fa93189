"""Markdown tables of results: what docs/benchmarks.md shows and `bench --markdown` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from granite_paged.errors import writing
from granite_paged.names import MODES
from granite_paged.report.bench_results import Result, Row

Columns = dict[str, Callable[[Row], str]]

_TITLES = {
    "batch": "Prefill, batch by batch",
    "context": "Prefill of one prompt, longer and longer",
    "decode": "One decode step",
    "kernel": "Decode attention alone, one layer",
    "memory": "Ragged sequences that fit a budget",
    "coldstart": "Cold start",
}


def markdown(results: Sequence[Result]) -> str:
    """Every table of every result, under the name of its device."""
    return "\n".join(part for result in results for part in _sections(result))


def page_part(result: Result, figures: str) -> str:
    """Return what a page shows of a record: tables of its steps and of attention, and two figures.

    figures: folder of the figures, as the page names it.
    """
    head = f"{result.device}, {result.model}, {result.dtype}; medians, the modes of a row in turn."
    found = {case: table(result, case) for case in ("batch", "context", "decode", "kernel")}
    tables = [f"{_TITLES[case]}:\n\n{text}" for case, text in found.items() if text]
    shown = [f"![{name}]({figures}/{name}.png)" for name in ("latency-context", "memory-batch")]
    return "\n".join([head, "", *tables, *shown])


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises CannotWrite."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _sections(result: Result) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    head = [f"**{result.device}** · {result.model}, {result.dtype} · {versions}", ""]
    tables = {case: table(result, case) for case in _TITLES}
    return head + [f"{_TITLES[case]}\n\n{text}" for case, text in tables.items() if text]


def table(result: Result, case: str) -> str:
    """One case as a Markdown table; empty if nothing of it was run."""
    rows = [row for row in result.rows if row.case == case]
    if not rows:
        return ""
    if case == "kernel":
        return _plain_table(rows, _KERNEL)
    if case in ("memory", "coldstart"):
        return _plain_table(rows, _MEMORY if case == "memory" else _COLDSTART)
    return _side_by_side(rows)


# -- modes beside each other --------------------------------------------------------------------


def _side_by_side(rows: Sequence[Row]) -> str:
    """One line a shape: each mode's time and memory, the speed-up, and the floor."""
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    shapes = sorted({(row.batch, row.context) for row in rows})
    by_key = {(row.batch, row.context, row.mode): row for row in rows}
    header = ["batch", "context", *(f"{mode}, ms" for mode in modes)]
    header += [*([_SPEED_UP] if len(modes) > 1 else []), "floor, ms"]
    header += [*(f"{mode}, GB" for mode in modes), "tokens/s"]
    lines = []
    for batch, context in shapes:
        line = {mode: by_key.get((batch, context, mode)) for mode in modes}
        lines.append(_line(batch, context, line))
    return format_table(header, lines) + _notes(rows)


_SPEED_UP = "default / paged"


def _line(batch: int, context: int, by_mode: dict[str, Row | None]) -> list[str]:
    rows = list(by_mode.values())
    floors = [row.floor_ms for row in rows if row and row.floor_ms]
    cells = [str(batch), f"{context:,}", *map(_milliseconds, rows)]
    if len(rows) > 1:
        cells.append(_speed_up(by_mode.get("default"), by_mode.get("paged")))
    cells.append(_number(floors[0]) if floors else "-")
    last = by_mode.get("paged") or rows[-1]
    return [*cells, *map(_gigabytes, rows), _tokens(last)]


def _speed_up(default: Row | None, paged: Row | None) -> str:
    if not (default and paged and default.latency_ms and paged.latency_ms):
        return "-"
    return f"{default.latency_ms.median / paged.latency_ms.median:.2f}"


def _notes(rows: Sequence[Row]) -> str:
    """What a cell has no room for: why a number is missing."""
    missing = [row for row in rows if row.error]
    lines = [f"- {row.mode}, {row.batch} x {row.context}: {row.error}" for row in missing]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


# -- cells --------------------------------------------------------------------------------------


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column's alignment is left, the others' right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.error:
        return "out of memory" if "OutOfMemory" in row.error else "failed"
    return _number(row.latency_ms.median) if row.latency_ms else "-"


def _gigabytes(row: Row | None) -> str:
    return "-" if row is None or row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"


def _tokens(row: Row | None) -> str:
    return f"{row.tokens_per_second:,.0f}" if row and row.tokens_per_second else "-"


def _number(number: float | None) -> str:
    """Three digits that matter."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


# -- one row a line -----------------------------------------------------------------------------


def _plain_table(rows: Sequence[Row], columns: Columns) -> str:
    cells = [[show(row) for show in columns.values()] for row in rows if not row.error]
    return format_table(list(columns), cells) + _notes(rows)


def _ratio(row: Row) -> str:
    return f"{row.paged_us / row.sdpa_us:.2f}" if row.paged_us and row.sdpa_us else "-"


_KERNEL: Columns = {
    "batch": lambda row: str(row.batch),
    "context": lambda row: row.variant or f"{row.context:,}",
    "floor, µs": lambda row: _number(row.floor_us),
    "SDPA, µs": lambda row: _number(row.sdpa_us),
    "paged, µs": lambda row: _number(row.paged_us),
    "paged / SDPA": _ratio,
}

_MEMORY: Columns = {
    "kept": lambda row: "in pages" if row.mode == "paged" else "padded",
    "lengths": lambda row: row.variant.removeprefix("ragged "),
    "sequences": lambda row: f"{row.batch:,}",
    "GB": _gigabytes,
    "budget": lambda row: row.note,
}

_COLDSTART: Columns = {
    "until": lambda row: row.variant,
    "s": lambda row: _number(row.latency_ms.median / 1e3) if row.latency_ms else "-",
}
