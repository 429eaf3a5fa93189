"""Figures of benchmark results: time and memory against batch and context, with the floor.

A colour is a mode. The original study's curves are grey.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from granite_paged.errors import InvalidArgument
from granite_paged.names import MODES
from granite_paged.report.bench_results import WITH_MAMBA_SSM, Result, Row
from granite_paged.report.formatting import significant
from granite_paged.report.plotting import (
    COLOURS,
    add_legend,
    add_title,
    default_style,
    measured_ticks,
    new_figure,
    plain_log_scale,
    save,
    style_axes,
)
from granite_paged.report.published import Published, PublishedRow

_RESULT_STYLES = ("-", "--", "-.")
_MARKERS = {"": "o", WITH_MAMBA_SSM: "D"}
_FLOOR_STYLE = {"color": COLOURS["floor"], "linestyle": ":"}
_STUDY_STYLES: dict[str, dict[str, Any]] = {  # they overlap: a thin line above a wide one
    "default": {"color": "#BBBBBB", "linewidth": 4, "marker": "s", "markersize": 7},
    "paged": {"color": "#333333", "linestyle": "--", "marker": "^", "markersize": 4},
}
_AXES = {"batch": "batch size", "context": "context length, tokens"}

Value = Callable[[Row], "float | None"]
Draw = Callable[[Sequence[Result], Sequence[Published]], Any]


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one curve, by ascending x, and matplotlib's options for it."""

    label: str
    points: list[tuple[float, float]]
    style: dict[str, Any]


@default_style()
def draw_all(
    results: Sequence[Result], published: Sequence[Published], folder: Path, form: str = "png"
) -> list[Path]:
    """Write every figure that the results have rows for, and return the files.

    Raises:
        MissingExtra: if matplotlib is not installed.
        InvalidArgument: if there is nothing to draw.
        CannotWrite: if the folder cannot be written.
    """
    figures = {name: draw(results, published) for name, draw in _FIGURES.items()}
    if not any(figures.values()):
        raise InvalidArgument("nothing to draw: these results have no row without an error")
    return save(figures, folder, form)


# -- prefill against batch or context -----------------------------------------------------------


def _time(results: Sequence[Result], published: Sequence[Published], case: str) -> Any:
    lines = _lines(results, case, case, _ms_per_prompt, floor=_floor_ms_per_prompt)
    study = _study_lines(published, case, lambda row: row.ms_per_query)
    return _curves(results, case, lines, study, ("Prefill time", "ms per prompt", "log"))


def _memory(results: Sequence[Result], published: Sequence[Published], case: str) -> Any:
    lines = _lines(results, case, case, _peak_gb)
    study = _study_lines(published, case, lambda row: row.peak_gb)
    labels = ("Peak memory of prefill", "peak GPU memory, GB", "linear")
    return _curves(results, case, lines, study, labels)


def _curves(
    results: Sequence[Result],
    case: str,
    lines: Sequence[Line],
    study: Sequence[Line],
    labels: tuple[str, str, str],
) -> Any:
    """Draw one panel; return None if only the study's lines would be on it.

    labels: title, name of the y axis, and its scale.
    """
    if not lines:
        return None
    title, unit, scale = labels
    figure, axes = new_figure(figsize=(9, 4.5))
    _plot(axes, [*study, *lines])
    style_axes(axes, _AXES[case], unit)
    if scale == "log":
        plain_log_scale(axes, "y")
    else:
        axes.set_ylim(bottom=0)
    add_title(figure, f"{title}{_fixed(results, case)}", results)
    add_legend(figure, [axes], loc="outside right center")
    return figure


def _fixed(results: Sequence[Result], case: str) -> str:
    """Return what does not change along the axis, as the end of a title."""
    rows = [row for result in results for row in result.measured(case)]
    if case == "batch":
        lengths = sorted({row.context for row in rows})
        return f" by batch size, {' or '.join(f'{n:,}' for n in lengths)} tokens per prompt"
    batches = sorted({row.batch for row in rows})
    prompts = "one prompt" if batches == [1] else f"{' or '.join(map(str, batches))} prompts"
    return f" by context length, {prompts}"


# -- decode and kernel --------------------------------------------------------------------------


def _decode(results: Sequence[Result], published: Sequence[Published]) -> Any:
    """Draw a panel for each context: time of a step against the batch."""
    contexts = sorted({row.context for result in results for row in result.measured("decode")})
    if not contexts:
        return None
    figure, panels = new_figure(
        1,
        len(contexts),
        figsize=(2.6 * len(contexts) + 1, 4.4),
        sharey=True,
        squeeze=False,
    )
    for axes, context in zip(panels[0], contexts, strict=True):
        rows = [[row for row in r.rows if row.context == context] for r in results]
        kept = [replace(r, rows=found) for r, found in zip(results, rows, strict=True)]
        _plot(axes, _lines(kept, "decode", "batch", _ms, floor=lambda row: row.floor_ms))
        style_axes(axes, "batch size", "ms per step" if context == contexts[0] else "")
        plain_log_scale(axes, "y")
        axes.set_title(f"context {context:,} tokens", fontsize=10)
    add_title(figure, "Time of one decode step", results)
    add_legend(figure, panels[0], loc="outside lower center", ncol=4)
    return figure


def _kernel(results: Sequence[Result], published: Sequence[Published]) -> Any:
    """Draw three bars for each shape: floor, SDPA and paged, in microseconds."""
    rows = [row for result in results for row in result.measured("kernel")]
    rows = [row for row in rows if row.paged_us and row.sdpa_us and row.floor_us]
    if not rows:
        return None
    rows.sort(key=lambda row: (row.context, row.variant, row.batch))
    figure, axes = new_figure(figsize=(1.2 * len(rows) + 2, 4.2))
    bars = (
        ("floor (bytes / bandwidth)", "floor_us", COLOURS["floor"]),
        ("SDPA, contiguous K and V", "sdpa_us", COLOURS["default"]),
        ("FlexAttention, paged K and V", "paged_us", COLOURS["paged"]),
    )
    for place, (label, name, colour) in enumerate(bars):
        heights = [getattr(row, name) for row in rows]
        middles = [x + 0.27 * (place - 1) for x in range(len(rows))]
        drawn = axes.bar(middles, heights, width=0.25, label=label, color=colour)
        axes.bar_label(drawn, list(map(significant, heights)), fontsize=7, padding=1)
    style_axes(axes, "sequences × tokens of each", "µs per layer", grid="y")
    axes.set_xticks(range(len(rows)), list(map(_shape, rows)), fontsize=8)
    add_title(figure, "Decode attention alone, one layer", results)
    add_legend(figure, [axes], loc="outside lower center", ncol=3)
    return figure


def _shape(row: Row) -> str:
    return f"{row.batch} × {row.context:,}" if not row.variant else f"{row.batch} ×\n{row.variant}"


_FIGURES: dict[str, Draw] = {
    "latency-batch": functools.partial(_time, case="batch"),
    "latency-context": functools.partial(_time, case="context"),
    "memory-batch": functools.partial(_memory, case="batch"),
    "memory-context": functools.partial(_memory, case="context"),
    "decode": _decode,
    "kernel": _kernel,
}


# -- lines --------------------------------------------------------------------------------------


def _lines(
    results: Sequence[Result], case: str, axis: str, value: Value, floor: Value | None = None
) -> list[Line]:
    """Return a line for each result and mode, and for each result's floor."""
    lines: list[Line] = []
    for place, result in enumerate(results):
        source = f", {result.device}" if len(results) > 1 else ""
        if [other.device for other in results].count(result.device) > 1:
            source += f" (file {place + 1})"
        style = {"linestyle": _RESULT_STYLES[place % len(_RESULT_STYLES)], "marker": "o"}
        for mode, (variant, marker) in itertools.product(MODES, _MARKERS.items()):
            rows = [row for row in result.measured(case, mode) if row.variant == variant]
            look = {**style, "marker": marker, "color": COLOURS[mode]}
            label = f"{mode}, {variant}" if variant else mode
            lines += _split((label, source), rows, axis, value, look)
        if floor is not None:
            lines += _split(("floor", source), result.measured(case), axis, floor, _FLOOR_STYLE)
    return lines


def _split(
    label: tuple[str, str], rows: Sequence[Row], axis: str, value: Value, style: dict[str, Any]
) -> Iterator[Line]:
    """Yield a line for each value of the size that the axis does not show.

    label: its beginning and its end; that size goes between them.
    """
    other, unit = ("context", "tokens") if axis == "batch" else ("batch", "prompts")
    sizes = sorted({getattr(row, other) for row in rows})
    for size in sizes:
        points = [(getattr(r, axis), value(r)) for r in rows if getattr(r, other) == size]
        suffix = f" {size} {unit}" if len(sizes) > 1 else ""
        yield from _line(suffix.join(label), points, style)


def _study_lines(
    published: Sequence[Published], case: str, value: Callable[[PublishedRow], float]
) -> list[Line]:
    lines: list[Line] = []
    for study in published:
        for mode, style in _STUDY_STYLES.items():
            rows = [row for row in study.rows if (row.case, row.mode) == (case, mode)]
            label = f"original study: {mode},\n{study.model}, {study.device}"
            lines += _line(label, [(getattr(row, case), value(row)) for row in rows], style)
    return lines


def _line(
    label: str, points: Iterable[tuple[float, float | None]], style: dict[str, Any]
) -> Iterator[Line]:
    """Yield a line of the points that logarithmic axes can show, if there are any."""
    shown = sorted({(float(x), y) for x, y in points if x and y})
    if shown:
        yield Line(label, shown, style)


def _plot(axes: Any, lines: Sequence[Line]) -> None:
    for line in lines:
        axes.plot(*zip(*line.points, strict=True), label=line.label, **line.style)
    axes.set_xscale("log", base=2)
    measured_ticks(axes.xaxis, sorted({x for line in lines for x, _ in line.points}))


# -- values -------------------------------------------------------------------------------------


def _ms(row: Row) -> float | None:
    return row.latency_ms.median if row.latency_ms else None


def _ms_per_prompt(row: Row) -> float | None:
    return row.latency_ms.median / row.batch if row.latency_ms and row.batch else None


def _floor_ms_per_prompt(row: Row) -> float | None:
    return row.floor_ms / row.batch if row.floor_ms and row.batch else None


def _peak_gb(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 1e9
