"""Figures of evaluations. A row is a task of one run, a colour is a mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from granite_paged.quantiles import quantile
from granite_paged.report.eval_results import CHANCE, Entry, ModeMetrics
from granite_paged.report.formatting import significant
from granite_paged.report.plotting import (
    COLOURS,
    add_legend,
    add_title,
    default_style,
    new_figure,
    plain_log_scale,
    save,
    style_axes,
)

_ROW = 0.42  # inches of a row
_CHANCE = {"color": "#333333", "linestyle": "--", "linewidth": 1.2}


@default_style()
def draw_all(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """Write every figure that there is data for, and return the files.

    Raises:
        MissingExtra: if matplotlib is not installed.
        CannotWrite: if the folder cannot be written.
    """
    return save({name: draw(entries) for name, draw in _FIGURES.items()}, folder)


def _accuracy(entries: Sequence[Entry]) -> Any:
    title = "Accuracy, and agreement with default"
    if any(entry.run.random_weights for entry in entries):
        title += ": random weights score at chance, agreement is what is tested"
    figure, (left, right) = _panels(entries, title, count=2)
    for y, _, mode, metrics in _bars(entries):
        left.barh(
            y, metrics.accuracy, _height(entries), xerr=metrics.stderr or 0, color=_colour(mode),
            label=mode,
        )  # fmt: skip
    for place, entry in enumerate(entries):
        if entry.name in CHANCE:
            x = [CHANCE[entry.name]] * 2
            left.plot(x, [place - 0.5, place + 0.5], label="uniform guess", **_CHANCE)
        _draw_agreement(right, place, entry)
    left.set(xlim=(0, 1))
    left.set_xlabel("accuracy (black bar: one standard error)")
    right.set_xlabel("share of questions with the same choice as default")
    right.set_xlim(min([0.9, *(x for x in right.dataLim.intervalx if 0 <= x <= 1)]) - 0.02, 1.005)
    add_legend(figure, [left], loc="outside lower center", ncol=4)
    return figure


def _draw_agreement(axes: Any, place: int, entry: Entry) -> None:
    for mode, found in entry.result.agreement.items():
        share = found.same / found.questions if found.questions else 0.0
        axes.plot(share, place, "o", color=_colour(mode))
        others = len(found.differing)
        ties = "all" if found.near_ties == others else f"{found.near_ties} of"
        rest = f"; {ties} {others} others are near-ties" if others else ""
        rest += f"; {found.not_finite:,} more are not finite" if found.not_finite else ""
        text = f"{mode}: {found.same:,} of {found.questions:,}{rest}"
        axes.annotate(
            text, (share, place), (-7, 0), textcoords="offset points", ha="right", va="center",
            fontsize=8,
        )  # fmt: skip


def _latency(entries: Sequence[Entry]) -> Any:
    """Draw a distribution where questions ran one by one, and only the mean of batches.

    The questions of a batch share one time, so batches have no distribution of questions.
    """
    figure, axes = _panels(entries, "Latency per question")
    for y, entry, mode, metrics in _bars(entries):
        times, colour = [time for time in metrics.latency_ms if time], _colour(mode)
        if len(times) > 1 and entry.run.batch == 1:
            for low, high, width in ((0.01, 0.99, 1), (0.25, 0.75, 6)):
                ends = [quantile(times, low), quantile(times, high)]
                axes.plot(
                    ends, [y, y], color=colour, linewidth=width, alpha=0.6,
                    solid_capstyle="butt", label=f"{mode}: {low:.0%} to {high:.0%}",
                )  # fmt: skip
        if metrics.latency_mean_ms:
            mean = metrics.latency_mean_ms
            axes.plot(mean, y, "o", color=colour, markersize=5, label=f"{mode}: mean")
            axes.annotate(
                significant(mean), (mean, y), (0, 4), textcoords="offset points", ha="center",
                fontsize=8,
            )  # fmt: skip
    style_axes(
        axes, "ms per question (batches: mean time of a batch / its questions)", "", grid="x"
    )
    plain_log_scale(axes, "x")
    add_legend(figure, [axes], loc="outside lower center", ncol=3)
    return figure


def _throughput(entries: Sequence[Entry]) -> Any:
    return _bar_chart(
        entries, "Throughput", "questions per second", lambda metrics: metrics.questions_per_second
    )


def _memory(entries: Sequence[Entry]) -> Any:
    measured = [e for e in entries if any(m.peak_bytes for m in e.result.modes.values())]
    if not measured:
        return None
    return _bar_chart(
        measured,
        "Peak GPU memory, weights included",
        "GB",
        lambda metrics: (metrics.peak_bytes or 0) / 1e9,
    )


_FIGURES: dict[str, Callable[[Sequence[Entry]], Any]] = {
    "accuracy": _accuracy,
    "latency": _latency,
    "throughput": _throughput,
    "memory": _memory,
}


def _bar_chart(
    entries: Sequence[Entry], title: str, label: str, value: Callable[[ModeMetrics], float]
) -> Any:
    figure, axes = _panels(entries, title)
    for y, _, mode, metrics in _bars(entries):
        bar = axes.barh(y, value(metrics), _height(entries), color=_colour(mode), label=mode)
        axes.bar_label(bar, [significant(value(metrics))], padding=3, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    add_legend(figure, [axes], loc="outside lower center", ncol=3)
    return figure


# -- panels -------------------------------------------------------------------------------------


def _panels(entries: Sequence[Entry], title: str, count: int = 1) -> tuple[Any, Any]:
    """Return a figure with a row for each entry, and its panel or panels."""
    modes = max(len(entry.result.modes) for entry in entries)
    size = (6 + 4.5 * count, 1.6 + _ROW * (0.5 + 0.5 * modes) * len(entries))
    figure, panels = new_figure(1, count, figsize=size, sharey=True)
    for axes in panels if count > 1 else [panels]:
        style_axes(axes, "", "", grid="x")
        axes.set_ylim(len(entries) - 0.4, -0.6)
    first = panels[0] if count > 1 else panels
    first.set_yticks(range(len(entries)), [entry.label for entry in entries], fontsize=9)
    add_title(figure, title, (entry.run for entry in entries))
    return figure, panels


def _bars(entries: Sequence[Entry]) -> Iterator[tuple[float, Entry, str, ModeMetrics]]:
    """Yield every mode of every entry with its place, from top to bottom."""
    height = _height(entries)
    for place, entry in enumerate(entries):
        first = place - height * (len(entry.result.modes) - 1) / 2
        for index, (mode, metrics) in enumerate(entry.result.modes.items()):
            yield first + height * index, entry, mode, metrics


def _height(entries: Sequence[Entry]) -> float:
    return 0.8 / max(len(entry.result.modes) for entry in entries)


def _colour(mode: str) -> str:
    return COLOURS.get(mode, "#444444")
