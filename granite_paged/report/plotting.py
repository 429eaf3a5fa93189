"""What all figures share: matplotlib (extra `plot`), one palette, axes, titles, legends, files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import MissingExtra
from granite_paged.files import write_file
from granite_paged.report.bench_results import Result
from granite_paged.report.eval_results import Evaluation
from granite_paged.report.formatting import short_count

COLOURS = {"default": "#D55E00", "static": "#E69F00", "paged": "#0072B2", "floor": "#009E73"}
"""Okabe and Ito's palette, which is colour-blind safe."""

_GRID = {"color": "#DDDDDD", "linewidth": 0.8}

_METADATA: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None}}
"""What to leave out of a file, so that the same data makes the same bytes."""


def check_matplotlib() -> None:
    """Raise MissingExtra if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", extra="plot")


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever the user's environment and matplotlibrc say.

    Names are text: a dollar sign in one does not start a formula. Raises MissingExtra.
    """
    check_matplotlib()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home without a cache is no matter
    backend = os.environ.pop("MPLBACKEND", None)  # an unknown one would end the import
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        yield


def new_figure(*shape: int, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Return a figure and its panels. It belongs to no window and no backend of the user's."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def save(figures: Mapping[str, Any], folder: Path, form: str = "png") -> list[Path]:
    """Write the figures that are not None and return the files. Raises CannotWrite."""
    files = []
    for name, figure in figures.items():
        if figure is not None:
            files.append(folder / f"{name}.{form}")
            drawn = io.BytesIO()
            figure.savefig(drawn, format=form, dpi=120, metadata=_METADATA[form])
            write_file(files[-1], drawn.getvalue())
    return files


def add_title(figure: Any, title: str, runs: Iterable[Result | Evaluation]) -> None:
    """Put a title above all panels, and below it the models, dtypes and devices of the runs."""
    runs = list(runs)
    models = dict.fromkeys(f"{run.model}, {run.dtype}" for run in runs)
    subject = "; ".join([*models, *dict.fromkeys(run.device for run in runs)])
    figure.suptitle(f"{title}\n{subject}", fontsize=11, x=0.01, ha="left")


def add_legend(figure: Any, panels: Iterable[Any], **where: Any) -> None:
    """Put one legend for all panels outside of them."""
    by_label: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(by_label.values(), by_label, fontsize=8, frameon=False, **where)


def style_axes(axes: Any, x_label: str, y_label: str, *, grid: str = "both") -> None:
    """Label both axes, draw a light grid behind the data, and leave the frame open."""
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis=grid, **_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def measured_ticks(axis: Any, sizes: Sequence[float]) -> None:
    """Put ticks at the measured sizes of a logarithmic axis."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_ticks(sizes, [short_count(size) for size in sizes])
    axis.set_minor_locator(ticker.NullLocator())


def plain_log_scale(axes: Any, name: str) -> None:
    """Make the axis `x` or `y` logarithmic, with ticks 1, 2, 5, 10, ... in plain digits."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(ticker.NullFormatter())
