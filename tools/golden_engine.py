"""What the tools for `golden/engine` share: the model, the requests, and the files.

The folder has one file for each kind of GPU, with entries of several tools.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from granite_paged.device import device_name, dtype_name, resolve_device
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import Output, SamplingParams
from granite_paged.environment import versions
from granite_paged.errors import FileError, GranitePagedError
from granite_paged.files import write_json
from granite_paged.models import DTYPES, LoadedModel, load
from granite_paged.report.bench_results import slug, writable_folder
from granite_paged.typed_json import read_json

FOLDER = Path(__file__).parents[1] / "golden" / "engine"

OK, USAGE = 0, 2


class EngineFileError(FileError):
    """A file of `golden/engine` that cannot be read."""

    advice = "restore it, or name another folder with --out"


def exit_status(measure: Callable[[], None]) -> int:
    """Run a tool and return its exit status; an error of ours is one line and status 2."""
    try:
        measure()
    except GranitePagedError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    return OK


# -- the model and its answers ------------------------------------------------------------------


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model, a device and a dtype."""
    parser.add_argument("--random-weights", default="granite-4.0-h-1b", metavar="NAME")
    parser.add_argument("--model", metavar="PATH", help="instead of random weights")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))


def loaded_model(options: argparse.Namespace) -> LoadedModel:
    """Load the model that the command line names. Raises ModelError or DeviceError."""
    weights = None if options.model else options.random_weights
    return load(options.model, random_weights=weights, device=options.device, dtype=options.dtype)


def answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
) -> list[Output]:
    """Return the answers to all prompts. Raises the first error of a request."""
    outputs = engine.generate(prompts, params)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


# -- the files ----------------------------------------------------------------------------------


def device_file(folder: Path, device: str) -> Path:
    """Return the file of a device, such as `cuda`; call this before the work.

    Makes the folder if it is missing, and reads the file if there is one.

    Raises:
        DeviceError: this machine has no such device.
        CannotWrite: the folder cannot be made.
        EngineFileError: the file is not a JSON object.
    """
    file = writable_folder(folder) / f"{slug(device_name(resolve_device(device)))}.json"
    _entries(file)
    return file


def add_entry(file: Path, loaded: LoadedModel, tool: str, entry: dict[str, Any]) -> None:
    """Put what a tool measured into the file of a device, in place of that tool's last entry.

    Args:
        file: see `device_file`.
        loaded: the model that was measured.
        tool: the entry's key, the name of the tool's module.
        entry: what was measured.
    """
    about = {
        "device": device_name(loaded.model.device),
        "host_cores": os.cpu_count(),
        "model": loaded.name,
        "dtype": dtype_name(loaded.model.dtype),
        "versions": versions(),
    }
    write_json(file, {**_entries(file), tool: {**about, **entry}})


def _entries(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    entries: dict[str, Any] = read_json(dict, file, EngineFileError)
    return entries
