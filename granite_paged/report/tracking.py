"""What goes to a tracker of experiments: numbers by name, and two tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from granite_paged.report.eval_results import Entry


class Table(NamedTuple):
    """Columns by name, and rows of plain values."""

    columns: list[str]
    rows: list[list[Any]]


def numbers(found: Sequence[Entry]) -> dict[str, float]:
    """task/mode/metric -> number."""
    return {
        f"{entry.task}/{mode}/{name}": value
        for entry in found
        for mode, metrics in [*entry.modes.items(), *entry.agreement.items()]
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }


def metrics(found: Sequence[Entry]) -> Table:
    """A row for each task and mode. At least one entry."""
    modes = [(entry.task, mode, values) for entry in found for mode, values in entry.modes.items()]
    names = [name for name in modes[0][2] if name != "latency_ms"]
    rows = [[task, mode, *(values[name] for name in names)] for task, mode, values in modes]
    return Table(["task", "mode", *names], rows)


def differences(found: Sequence[Entry]) -> Table:
    """A row for each question that two modes choose differently on."""
    columns = ["task", "mode", "question", "default", "other", "gap", "sdpa_error", "near_tie"]
    rows = [
        [
            entry.task,
            mode,
            d["key"],
            d["default_choice"],
            d["other_choice"],
            *(d[name] for name in columns[5:]),
        ]
        for entry in found
        for mode, agreement in entry.agreement.items()
        for d in agreement["differing"]
    ]
    return Table(columns, rows)
