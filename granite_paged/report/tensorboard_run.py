"""Log an evaluation to TensorBoard (extra `tensorboard`): metrics, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import MissingExtra, writing
from granite_paged.report.eval_results import Evaluation, entries
from granite_paged.report.markdown import table
from granite_paged.report.tracking import differences, metrics, numbers


def writer_class() -> Any:
    """Return torch's SummaryWriter. Raises MissingExtra without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional
    except ImportError:
        raise MissingExtra("tensorboard", extra="tensorboard") from None
    return SummaryWriter


def log_to_tensorboard(folder: str, evaluation: Evaluation, figures: Sequence[Path] = ()) -> None:
    """Write one finished run, for `tensorboard --logdir FOLDER`.

    Raises:
        MissingExtra: if tensorboard is not installed.
        CannotWrite: if the folder cannot be written; other files stay as they are.
    """
    make_writer, found = writer_class(), entries([evaluation])
    with writing(folder), make_writer(folder) as writer:
        for name, value in numbers(found).items():
            writer.add_scalar(name, value)
        writer.add_text("metrics", table(*metrics(found)))
        writer.add_text("differences", table(*differences(found)))
        for path in figures:
            writer.add_image(path.stem, _pixels(path), dataformats="HWC")


def _pixels(path: Path) -> Any:
    from matplotlib.image import imread  # noqa: PLC0415  # optional, and it drew the figures

    return imread(path)
