"""Figures that the original study published: curves to draw beside ours, ceilings for its GPU.

They are the one thing here that was typed in; `golden/perf/*.published.json` names the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from granite_paged.report.bench_results import read_as, slug


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One point of a published table; `ms_per_query` is the time of a batch by its prompts."""

    case: str
    mode: str
    batch: int
    context: int
    ms_per_query: float
    peak_gb: float


@dataclass(frozen=True, slots=True)
class PublishedTask:
    """One row of a published table of accuracies."""

    task: str
    mode: str
    accuracy: float
    ms_per_query: float
    peak_gb: float


@dataclass(frozen=True, slots=True)
class Published:
    """One study's tables.

    Attributes:
        source: to be cited.
        device: it was measured on.
        comparable: models of ours that its ceilings are meant for.
    """

    source: str
    device: str
    comparable: list[str]
    rows: list[PublishedRow]
    tasks: list[PublishedTask]

    def applies_to(self, device: str, model: str) -> bool:
        """Whether its figures are ceilings there: that GPU, in whatever form, and such a model."""
        same_device = set(slug(self.device).split("-")) <= set(slug(device).split("-"))
        return same_device and any(model.startswith(name) for name in self.comparable)

    def find(self, case: str, mode: str, batch: int, context: int) -> PublishedRow | None:
        """That point, if it was published."""
        wanted = (case, mode, batch, context)
        rows = (row for row in self.rows if (row.case, row.mode, row.batch, row.context) == wanted)
        return next(rows, None)


def read_published(records: Path) -> list[Published]:
    """Everything published in a folder of records. Raises ResultFileError."""
    return [read_as(Published, path) for path in sorted(records.glob("*.published.json"))]
