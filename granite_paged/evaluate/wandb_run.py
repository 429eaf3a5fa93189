"""Results to Weights & Biases: the same metrics, tables and figures. Optional.

`WANDB_MODE=offline` is respected: everything then stays in `WANDB_DIR` for `wandb sync`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import MissingExtra, ResultsError
from granite_paged.evaluate.results import Entry, Json, entries


def wandb_module() -> Any:
    """The package. Raises MissingExtra without it."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise MissingExtra("wandb", extra="wandb") from None


def log_to_wandb(project: str, evaluation: Json, figures: Sequence[Path] = ()) -> str:
    """One finished run with everything in it. Returns where it is: an address or a folder.

    Raises:
        MissingExtra: without wandb.
        ResultsError: if it refuses; what is elsewhere on disk stays.
    """
    wandb = wandb_module()
    found = entries([evaluation])
    config = {name: value for name, value in evaluation.items() if name != "tasks"}
    try:
        with wandb.init(project=project, config=config, job_type="eval") as run:
            run.summary.update(_numbers(found))
            run.log({"metrics": _metrics_table(wandb, found)})
            run.log({"differences": _differences_table(wandb, found)})
            run.log({path.stem: wandb.Image(str(path)) for path in figures})
            return str(run.url or run.dir)
    except (wandb.Error, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResultsError(f"wandb refuses: {reason}; WANDB_MODE=offline needs no server") from None


def _numbers(found: Sequence[Entry]) -> dict[str, float]:
    """task/mode/metric -> number."""
    return {
        f"{entry.task}/{mode}/{name}": value
        for entry in found
        for mode, metrics in [*entry.modes.items(), *entry.agreement.items()]
        for name, value in metrics.items()
        if isinstance(value, int | float)
    }


def _metrics_table(wandb: Any, found: Sequence[Entry]) -> Any:
    modes = [
        (entry.task, mode, metrics) for entry in found for mode, metrics in entry.modes.items()
    ]
    names = [name for name in modes[0][2] if name != "latency_ms"]
    rows = [[task, mode, *(metrics[name] for name in names)] for task, mode, metrics in modes]
    return wandb.Table(columns=["task", "mode", *names], data=rows)


def _differences_table(wandb: Any, found: Sequence[Entry]) -> Any:
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
    return wandb.Table(columns=columns, data=rows)
