"""Figures of results: time and memory against batch and context, with the floor drawn in.

Each line is one mode on one device; grey lines are the original study's, labelled with their GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from granite_paged.errors import InvalidArgument, writing
from granite_paged.report.bench_results import Result, Row
from granite_paged.report.plotting import load_pyplot, short_count
from granite_paged.report.published import Published, PublishedRow

_COLOURS = {"default": "#D55E00", "static": "#E69F00", "paged": "#0072B2"}  # told apart by all eyes
_GREY = "#7A7A7A"
_FLOOR = "#009E73"
_STYLES = ("-", "--", ":")  # one a result

Value = Callable[[Row], "float | None"]
PublishedValue = Callable[[PublishedRow], float]


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one curve, and how it looks."""

    label: str
    x: list[float]
    y: list[float]
    style: dict[str, Any]


def draw_all(
    results: Sequence[Result], published: Sequence[Published], folder: Path, form: str = "png"
) -> list[Path]:
    """Write every figure that the results have rows for. Returns the files.

    Raises:
        MissingExtra: without matplotlib.
        InvalidArgument: if there is nothing to draw.
        CannotWrite: if the folder cannot be written.
    """
    load_pyplot()
    figures = {
        name: figure
        for name, make in _FIGURES.items()
        if (figure := make(results, published)) is not None
    }
    if not figures:
        raise InvalidArgument("nothing to draw: these results have no row without an error")
    return [_save(figure, folder / f"{name}.{form}") for name, figure in figures.items()]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    try:
        with writing(path):
            figure.savefig(path, dpi=150, bbox_inches="tight", metadata=_UNDATED[path.suffix])
    finally:
        plt.close(figure)
    return path


_UNDATED: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}}  # same data, same file


# -- one case against batch or context ----------------------------------------------------------


def _latency(case: str, axis: str) -> Callable[..., Any]:
    def make(results: Sequence[Result], published: Sequence[Published]) -> Any:
        lines = [
            *_published_lines(published, case, axis, lambda row: row.ms_per_query),
            *_mode_lines(results, case, axis, _ms_per_prompt),
            *_floor_lines(results, case, axis),
        ]
        title = f"Prefill time against {_AXES[axis]}{_fixed(results, case, axis)}"
        return _figure(lines, axis, "ms per prompt", title, results)

    return make


def _memory(case: str, axis: str) -> Callable[..., Any]:
    def make(results: Sequence[Result], published: Sequence[Published]) -> Any:
        lines = [
            *_published_lines(published, case, axis, lambda row: row.peak_gb),
            *_mode_lines(results, case, axis, _peak_gb),
        ]
        title = f"Peak memory of prefill against {_AXES[axis]}{_fixed(results, case, axis)}"
        return _figure(lines, axis, "peak GB", title, results)

    return make


_AXES = {"batch": "batch size", "context": "context length"}


def _fixed(results: Sequence[Result], case: str, axis: str) -> str:
    """What does not change along the axis: tokens of each prompt, or how many prompts."""
    rows = [row for result in results for row in result.measured(case)]
    if axis == "batch":
        values = sorted({row.context for row in rows})
        return f", {' or '.join(map(str, values))} tokens a prompt"
    values = sorted({row.batch for row in rows})
    return "" if values == [1] else f", {' or '.join(map(str, values))} prompts"


def _ms_per_prompt(row: Row) -> float | None:
    return row.latency_ms.median / row.batch if row.latency_ms else None


def _ms_per_step(row: Row) -> float | None:
    return row.latency_ms.median if row.latency_ms else None


def _peak_gb(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 1e9


def _mode_lines(results: Sequence[Result], case: str, axis: str, value: Value) -> list[Line]:
    lines = []
    for place, result in enumerate(results):
        for mode, colour in _COLOURS.items():
            style = {"color": colour, "linestyle": _STYLES[place % len(_STYLES)], "marker": "o"}
            for suffix, rows in _by_other_axis(result.measured(case, mode), axis):
                points = [(getattr(row, axis), value(row)) for row in rows]
                lines.append(_line(f"{mode}{suffix}, {result.device}", points, style))
    return [line for line in lines if line.x]


def _by_other_axis(rows: Sequence[Row], axis: str) -> Iterator[tuple[str, list[Row]]]:
    """One line for each value of what the axis does not show; named where there are several."""
    other, unit = ("context", "tokens") if axis == "batch" else ("batch", "prompts")
    values = sorted({getattr(row, other) for row in rows})
    for value in values:
        suffix = f" {value} {unit}" if len(values) > 1 else ""
        yield suffix, [row for row in rows if getattr(row, other) == value]


def _floor_lines(results: Sequence[Result], case: str, axis: str) -> list[Line]:
    lines = []
    for result in results:
        style = {"color": _FLOOR, "linestyle": (0, (1, 1)), "linewidth": 1.5}
        for suffix, rows in _by_other_axis(result.measured(case), axis):
            points = {(getattr(r, axis), r.floor_ms / r.batch) for r in rows if r.floor_ms}
            lines.append(_line(f"floor{suffix}, {result.device}", points, style))
    return [line for line in lines if line.x]


def _published_lines(
    published: Sequence[Published], case: str, axis: str, value: PublishedValue
) -> list[Line]:
    lines = []
    for study in published:
        for mode, mark in (("default", "s"), ("paged", "^")):
            rows = [row for row in study.rows if (row.case, row.mode) == (case, mode)]
            points = [(getattr(row, axis), value(row)) for row in rows]
            style = {"color": _GREY, "linestyle": "-", "linewidth": 1, "marker": mark}
            label = f"original study: {mode}, {study.device}"
            lines.append(_line(label, points, {**style, "markersize": 4}))
    return [line for line in lines if line.x]


def _line(label: str, points: Iterable[tuple[float, float | None]], style: dict[str, Any]) -> Line:
    there = sorted((x, y) for x, y in points if y is not None)
    return Line(label, [x for x, _ in there], [y for _, y in there], style)


def _figure(
    lines: Sequence[Line], axis: str, unit: str, title: str, results: Sequence[Result]
) -> Any:
    """One pair of logarithmic axes; None if only the published lines would be on it."""
    if not any(line.style["color"] != _GREY for line in lines):
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for line in lines:
        axes.plot(line.x, line.y, label=line.label, **line.style)
    _dress(axes, _AXES[axis], unit, {x for line in lines for x in line.x})
    axes.set_title(f"{title}\n{_models(results)}", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _dress(axes: Any, x_label: str, y_label: str, places: set[float]) -> None:
    """Logarithmic axes with plain numbers at the places that were measured."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(places), [short_count(x) for x in sorted(places)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label + (", tokens" if "context" in x_label else ""))
    axes.set_ylabel(y_label)
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _models(results: Sequence[Result]) -> str:
    return "; ".join(sorted({f"{result.model}, {result.dtype}" for result in results}))


# -- decode and kernel --------------------------------------------------------------------------


def _decode(results: Sequence[Result], published: Sequence[Published]) -> Any:
    """A panel for each context: time of a step against the batch."""
    contexts = sorted({row.context for result in results for row in result.measured("decode")})
    if not contexts:
        return None
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1,
        len(contexts),
        figsize=(3 * len(contexts) + 1, 4.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, context in zip(panels[0], contexts, strict=True):
        lines = _decode_lines(results, context)
        for line in lines:
            axes.plot(line.x, line.y, label=line.label, **line.style)
        _dress(axes, "batch size", "ms per step", {x for line in lines for x in line.x})
        axes.set_title(f"{short_count(context)} tokens of context", fontsize=10)
    for axes in panels[0][1:]:
        axes.set_ylabel("")
    figure.suptitle(f"One decode step\n{_models(results)}", fontsize=11, x=0.01, ha="left")
    _shared_legend(figure, panels[0])
    return figure


def _decode_lines(results: Sequence[Result], context: int) -> list[Line]:
    kept = [
        Result(
            device=result.device,
            versions=result.versions,
            seed=result.seed,
            rows=[row for row in result.rows if row.context == context],
        )
        for result in results
    ]
    modes = _mode_lines(kept, "decode", "batch", _ms_per_step)
    floors = []
    for result in kept:
        points = [(row.batch, row.floor_ms) for row in result.measured("decode")]
        style = {"color": _FLOOR, "linestyle": (0, (1, 1)), "linewidth": 1.5}
        floors.append(_line(f"floor, {result.device}", set(points), style))
    return modes + floors


def _shared_legend(figure: Any, panels: Iterable[Any]) -> None:
    by_label: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    handles = list(by_label.values())
    figure.legend(
        handles, list(by_label), fontsize=8, frameon=False, loc="outside lower center", ncol=4
    )


def _kernel(results: Sequence[Result], published: Sequence[Published]) -> Any:
    """Bars a shape: floor, SDPA and paged, in microseconds."""
    rows = [(result.device, row) for result in results for row in result.measured("kernel")]
    rows = [(device, row) for device, row in rows if row.paged_us and row.sdpa_us and row.floor_us]
    if not rows:
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.1 * len(rows) + 3, 4))
    bars = (
        ("byte floor", "floor_us", _FLOOR),
        ("SDPA, contiguous", "sdpa_us", _COLOURS["default"]),
        ("FlexAttention, paged", "paged_us", _COLOURS["paged"]),
    )
    for place, (label, name, colour) in enumerate(bars):
        heights = [getattr(row, name) for _, row in rows]
        middles = [x + 0.27 * (place - 1) for x in range(len(rows))]
        drawn = axes.bar(middles, heights, width=0.25, label=label, color=colour)
        axes.bar_label(drawn, [f"{height:.3g}" for height in heights], fontsize=7, padding=1)
    axes.set_xticks(range(len(rows)), [_shape_label(row) for _, row in rows], fontsize=8)
    axes.set_ylabel("µs per layer")
    axes.spines[["top", "right"]].set_visible(False)
    devices = ", ".join(sorted({device for device, _ in rows}))
    axes.set_title(f"Decode attention alone, {devices}", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _shape_label(row: Row) -> str:
    return f"{row.batch} x\n{row.variant.replace(' ', chr(10)) or short_count(row.context)}"


_FIGURES: dict[str, Callable[..., Any]] = {
    "latency-batch": _latency("batch", "batch"),
    "latency-context": _latency("context", "context"),
    "memory-batch": _memory("batch", "batch"),
    "memory-context": _memory("context", "context"),
    "decode": _decode,
    "kernel": _kernel,
}
