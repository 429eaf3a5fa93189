"""Figures of a report: what a table of numbers does not show at a glance."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from granite_paged.report.eval_results import BenchRow, Entry
from granite_paged.report.plotting import load_pyplot, short_count

COLOURS = {"default": "#8a8f98", "static": "#d9902f", "paged": "#1f6fb4"}
_LAST = "#444444"

Figure = Any


def draw_all(folder: Path, entries: Sequence[Entry], bench: Sequence[BenchRow]) -> dict[str, str]:
    """Write every figure that there is data for. Returns name -> caption.

    Raises:
        MissingExtra: without matplotlib.
    """
    pyplot = load_pyplot()
    drawn: dict[str, str] = {}
    for name, (draw, caption) in _FIGURES.items():
        figure = draw(pyplot, entries)
        if figure is not None:
            _save(pyplot, figure, folder / f"{name}.png")
            drawn[name] = caption
    for axis in ("batch", "context"):
        figure = _curves(pyplot, axis, bench)
        if figure is not None:
            _save(pyplot, figure, folder / f"{axis}.png")
            drawn[axis] = f"Time a query and peak memory by {axis}; the band is p10 to p90."
    return drawn


def _save(pyplot: Any, figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same bytes from the same data
    pyplot.close(figure)


# -- evaluations --------------------------------------------------------------------------------


def _accuracy(pyplot: Any, entries: Sequence[Entry]) -> Figure:
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, _height(entries)), layout="constrained", sharey=True
    )
    _bars(left, entries, lambda metrics: metrics["accuracy"], error="stderr")
    left.set(xlabel="accuracy (bar: one standard error)", xlim=(0, 1))
    for place, entry in enumerate(entries):
        for mode, found in entry.agreement.items():
            same = found["questions"] - len(found["differing"])
            share = same / found["questions"]
            right.plot(share, place, "o", color=COLOURS.get(mode, _LAST))
            text = f"{mode}: {same:,} of {found['questions']:,} choices"
            right.annotate(text, (share, place), (-8, 6), textcoords="offset points", ha="right")
    right.set(xlabel="part of choices equal to default's", xlim=(0, 1.03))
    return figure


def _latency(pyplot: Any, entries: Sequence[Entry]) -> Figure:
    rows = -(-len(entries) // 2)
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(11, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(entries) :]:
        axis.set_visible(False)
    for axis, entry in zip(axes.flat, entries, strict=False):
        for mode, metrics in entry.modes.items():
            times = sorted(metrics["latency_ms"])
            below = [(i + 1) / len(times) for i in range(len(times))]
            axis.step(times, below, where="post", color=COLOURS.get(mode, _LAST), label=mode)
        means = ", ".join(
            f"{mode} {_number(metrics['latency_mean_ms'])}" for mode, metrics in entry.modes.items()
        )
        axis.set(xscale="log", xlabel="ms a question", ylabel="part below")
        axis.set_title(f"{entry.label}\nmean ms: {means}", fontsize="medium")
        _plain_numbers(axis.xaxis)
        axis.grid(alpha=0.3)
    _legend_above(figure, axes.flat[: len(entries)])
    return figure


def _throughput(pyplot: Any, entries: Sequence[Entry]) -> Figure:
    figure, axis = pyplot.subplots(figsize=(9, _height(entries)), layout="constrained")
    _bars(axis, entries, lambda metrics: metrics["questions_per_second"], number=True)
    axis.set(xlabel="questions a second")
    return figure


def _memory(pyplot: Any, entries: Sequence[Entry]) -> Figure | None:
    measured = [e for e in entries if any(m["peak_bytes"] for m in e.modes.values())]
    if not measured:
        return None
    figure, axis = pyplot.subplots(figsize=(9, _height(measured)), layout="constrained")
    _bars(axis, measured, lambda metrics: (metrics["peak_bytes"] or 0) / 1e9, number=True)
    axis.set(xlabel="peak GPU memory, GB")
    return figure


_FIGURES: dict[str, tuple[Callable[[Any, Sequence[Entry]], Figure | None], str]] = {
    "accuracy": (_accuracy, "Accuracy of each mode, and how many choices are default's."),
    "latency": (_latency, "Latency of each question: the part of questions below a time."),
    "throughput": (_throughput, "Questions answered in a second."),
    "memory": (_memory, "Peak GPU memory, weights included."),
}


def _height(entries: Sequence[Entry]) -> float:
    modes = max(len(entry.modes) for entry in entries)
    return 1.4 + 0.34 * modes * len(entries)


def _bars(
    axis: Any,
    entries: Sequence[Entry],
    value: Callable[[dict[str, Any]], float],
    *,
    error: str | None = None,
    number: bool = False,
) -> None:
    """Horizontal bars, a group for each entry, a bar for each mode."""
    modes = list(dict.fromkeys(mode for entry in entries for mode in entry.modes))
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        places = [i for i, entry in enumerate(entries) if mode in entry.modes]
        values = [value(entries[i].modes[mode]) for i in places]
        errors = [entries[i].modes[mode][error] or 0 for i in places] if error else None
        shifted = [i + width * (index - (len(modes) - 1) / 2) for i in places]
        bars = axis.barh(
            shifted, values, width, xerr=errors, label=mode, color=COLOURS.get(mode, _LAST)
        )
        if number:
            axis.bar_label(bars, labels=[_number(v) for v in values], padding=3)
    axis.set_yticks(range(len(entries)), [entry.label for entry in entries])
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.margins(x=0.15)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=len(modes))
    axis.set_ylim(len(entries) - 0.5, -1.0)  # room for the legend


def _legend_above(figure: Figure, axes: Iterable[Any]) -> None:
    """One for all axes."""
    labelled: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        labelled.update(zip(labels, handles, strict=True))
    figure.legend(labelled.values(), labelled, loc="outside upper center", ncols=3, frameon=False)


def _plain_numbers(axis: Any) -> None:
    """10 and 200 on a logarithmic axis, not powers of ten."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(ticker.NullLocator())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -- benchmarks ---------------------------------------------------------------------------------


def _curves(pyplot: Any, axis: str, bench: Sequence[BenchRow]) -> Figure | None:
    """Time and memory along `batch` or `context`; one line for what is held fixed and each mode."""
    lines = curves(bench, axis)
    if not lines:
        return None
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = ("-", "--", ":", "-.")
    cases = list(dict.fromkeys(case for case, _ in lines))
    for (case, mode), rows in lines.items():
        look = {"color": COLOURS.get(mode, _LAST), "linestyle": styles[cases.index(case) % 4]}
        x = [getattr(row, axis) for row in rows]
        times.plot(x, [r.median_ms / r.batch for r in rows], label=f"{case}, {mode}", **look)
        low, high = ([q / r.batch for q, r in zip(qs, rows, strict=True)] for qs in _bands(rows))
        times.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        memory.plot(x, [(r.peak_bytes or 0) / 1e9 for r in rows], **look)
    times.set(ylabel="ms a query", yscale="log")
    _plain_numbers(times.yaxis)
    memory.set(ylabel="peak GPU memory, GB")
    memory.set_ylim(bottom=0)
    for panel in (times, memory):
        panel.set(xlabel=axis, xscale="log")
        sizes = sorted({getattr(row, axis) for rows in lines.values() for row in rows})
        panel.set_xticks(sizes, [short_count(size) for size in sizes])
        panel.xaxis.minorticks_off()
        panel.grid(alpha=0.3)
    _legend_above(figure, [times])
    return figure


def curves(bench: Sequence[BenchRow], axis: str) -> dict[tuple[str, str], list[BenchRow]]:
    """(what is held fixed, mode) -> prefills along `axis`; at least three points each.

    A benchmark's cases `batch` and `context` are named after what varies, as the study's tables.
    """
    other = {"batch": "context", "context": "batch"}[axis]
    found: dict[tuple[str, str], list[BenchRow]] = {}
    for row in bench:
        if row.case == axis:
            fixed = f"prefill, {other} {getattr(row, other)}, {row.where}"
            found.setdefault((fixed, row.mode), []).append(row)
    return {
        key: sorted(rows, key=lambda row: int(getattr(row, axis)))
        for key, rows in found.items()
        if len(rows) >= 3
    }


def _bands(rows: Iterable[BenchRow]) -> tuple[list[float], list[float]]:
    return [row.p10_ms for row in rows], [row.p90_ms for row in rows]
