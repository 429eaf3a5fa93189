"""The files of `golden/engine`: one for each kind of GPU, with entries of several tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from granite_paged.device import device_name, dtype_name
from granite_paged.environment import versions
from granite_paged.files import write_json
from granite_paged.models import LoadedModel
from granite_paged.report.bench_results import slug

FOLDER = Path(__file__).parents[1] / "golden" / "engine"


def add_entry(folder: Path, loaded: LoadedModel, tool: str, entry: dict[str, Any]) -> Path:
    """Put what a tool measured into the file of the model's device; keep what is not in `entry`.

    Args:
        folder: holds the files; it exists.
        loaded: the model that was measured.
        tool: the entry's key, the name of the tool's module.
        entry: what was measured.

    Returns:
        The file.
    """
    device = device_name(loaded.model.device)
    file = folder / f"{slug(device)}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    about = {
        "device": device,
        "host_cores": os.cpu_count(),
        "model": loaded.name,
        "dtype": dtype_name(loaded.model.dtype),
        "versions": versions(),
    }
    write_json(file, {**before, tool: {**about, **entry}})
    return file
