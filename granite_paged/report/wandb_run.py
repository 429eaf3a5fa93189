"""Log an evaluation to Weights & Biases (extra `wandb`): metrics, tables and figures.

With `WANDB_MODE=offline` everything stays in `WANDB_DIR`, for `wandb sync`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from granite_paged.errors import CannotWrite, MissingExtra
from granite_paged.report.eval_results import Evaluation, entries
from granite_paged.report.tracking import differences, metrics, numbers


def wandb_module() -> Any:
    """Return the package. Raises MissingExtra without it."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise MissingExtra("wandb", extra="wandb") from None


def log_to_wandb(project: str, evaluation: Evaluation, figures: Sequence[Path] = ()) -> str:
    """Log one finished run, and return its address or folder.

    Raises:
        MissingExtra: if wandb is not installed.
        CannotWrite: if wandb refuses; other files stay as they are.
    """
    wandb = wandb_module()
    found = entries([evaluation])
    config = {name: value for name, value in evaluation.to_json().items() if name != "tasks"}
    try:
        with wandb.init(project=project, config=config, job_type="eval") as run:
            run.summary.update(numbers(found))
            for name, table in (("metrics", metrics(found)), ("differences", differences(found))):
                run.log({name: wandb.Table(columns=table.columns, data=table.rows)})
            run.log({path.stem: wandb.Image(str(path)) for path in figures})
            return str(run.url or run.dir)
    except (wandb.Error, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CannotWrite(
            f"the wandb project {project}", f"{reason}; WANDB_MODE=offline needs no server"
        ) from None
