"""What trackers of experiments get: numbers by name, and two tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from granite_paged.report.eval_results import Entry


class Table(NamedTuple):
    """Names of the columns, and rows of plain values."""

    columns: list[str]
    rows: list[list[Any]]


def numbers(found: Sequence[Entry]) -> dict[str, float]:
    """Return every number, named task/mode/metric."""
    return {
        f"{task}/{mode}/{name}": value
        for task, mode, values in [*_metrics(found), *_agreements(found)]
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def metrics(found: Sequence[Entry]) -> Table:
    """Return a row for each task and mode. Needs at least one entry."""
    rows = list(_metrics(found))
    names = [name for name in rows[0][2] if name != "latency_ms"]
    cells = [[task, mode, *(values[name] for name in names)] for task, mode, values in rows]
    return Table(["task", "mode", *names], cells)


def differences(found: Sequence[Entry]) -> Table:
    """Return a row for each question that two modes answer differently."""
    columns = ["task", "mode", "question", "default", "other", "gap", "sdpa_error", "near_tie"]
    rows = [
        [entry.name, mode, d.key, d.default_choice, d.other_choice, d.gap, d.sdpa_error, d.near_tie]
        for entry in found
        for mode, agreement in entry.result.agreement.items()
        for d in agreement.differing
    ]
    return Table(columns, rows)


def _metrics(found: Sequence[Entry]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for entry in found:
        yield from ((entry.name, mode, asdict(m)) for mode, m in entry.result.modes.items())


def _agreements(found: Sequence[Entry]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for entry in found:
        yield from ((entry.name, mode, asdict(a)) for mode, a in entry.result.agreement.items())
