"""Results to TensorBoard: the same metrics, tables and figures, in a folder. Optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import MissingExtra, writing
from granite_paged.report.eval_results import Json, entries
from granite_paged.report.tracking import Table, differences, metrics, numbers


def writer_class() -> Any:
    """torch's SummaryWriter. Raises MissingExtra without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional
    except ImportError:
        raise MissingExtra("tensorboard", extra="tensorboard") from None
    return SummaryWriter


def log_to_tensorboard(folder: str, evaluation: Json, figures: Sequence[Path] = ()) -> None:
    """One finished run with everything in it, for `tensorboard --logdir FOLDER`.

    Raises:
        MissingExtra: without tensorboard.
        CannotWrite: if the folder cannot be written; what is elsewhere on disk stays.
    """
    make_writer, found = writer_class(), entries([evaluation])
    with writing(folder), make_writer(folder) as writer:
        for name, value in numbers(found).items():
            writer.add_scalar(name, value)
        writer.add_text("metrics", _markdown(metrics(found)))
        writer.add_text("differences", _markdown(differences(found)))
        for path in figures:
            writer.add_image(path.stem, _pixels(path), dataformats="HWC")


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _pixels(path: Path) -> Any:
    from matplotlib.image import imread  # noqa: PLC0415  # what drew the figures is there

    return imread(path)
