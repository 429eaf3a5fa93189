"""Published figures: curves to draw with ours, and ceilings on the GPU they were measured on.

`original_study.json` is the only copy of the original study's tables, and the only data here that
was typed in. Files named `*.published.json` in a folder of records are used as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from granite_paged.errors import ResultFileError
from granite_paged.report.bench_results import slug
from granite_paged.typed_json import Share, read_json

_STUDY = Path(__file__).with_name("original_study.json")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One point of a published curve; `ms_per_query` is a batch's time divided by its prompts."""

    case: str
    mode: str
    batch: int
    context: int
    ms_per_query: float
    peak_gb: float


@dataclass(frozen=True, slots=True)
class PublishedTask:
    """One row of a published table of accuracies; questions were asked one by one."""

    task: str
    mode: str
    accuracy: Share
    ms_per_query: float
    peak_gb: float


@dataclass(frozen=True, slots=True)
class Published:
    """The tables of one study.

    Attributes:
        source: citation.
        device: the GPU that it was measured on.
        comparable: names of our models that its figures are ceilings for.
        model: its own model.
    """

    source: str
    device: str
    comparable: list[str]
    rows: list[PublishedRow]
    tasks: list[PublishedTask]
    model: str = ""

    def applies_to(self, device: str, model: str) -> bool:
        """Whether its figures are ceilings for this GPU, in any form factor, and this model."""
        same_device = set(slug(self.device).split("-")) <= set(slug(device).split("-"))
        return same_device and self.compares_with(model)

    def compares_with(self, model: str) -> bool:
        """Whether a model has the sizes of the study's: a geometry's name, a hub id or a folder."""
        name = model.rstrip("/").rpartition("/")[2]
        return any(name.startswith(known) for known in self.comparable)

    def find(self, case: str, mode: str, batch: int, context: int) -> PublishedRow | None:
        """Return that point, or None if it was not published."""
        wanted = (case, mode, batch, context)
        rows = (row for row in self.rows if (row.case, row.mode, row.batch, row.context) == wanted)
        return next(rows, None)


def original_study() -> Published:
    """Return the tables of the original study."""
    return _read(_STUDY)


def read_published(records: Path) -> list[Published]:
    """Return the original study and what a folder of records adds. Raises ResultFileError."""
    return [original_study(), *map(_read, sorted(records.glob("*.published.json")))]


def _read(path: Path) -> Published:
    published: Published = read_json(Published, path, ResultFileError)
    return published
