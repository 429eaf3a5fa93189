"""Float64 copies of models on a GPU that several test processes share.

A copy of granite-4.0-h-1b takes 12 GB, so only one process has one at a time.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from granite_paged import verify


@contextmanager
def float64_turn() -> Iterator[None]:
    """Wait until no other process has a turn, and keep others waiting until the block ends."""
    with (Path(tempfile.gettempdir()) / "granite_paged.float64.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@contextmanager
def float64_copy(model: Any) -> Iterator[Any]:
    """Give a float64 copy for the block. Its memory is free afterwards, even if you keep it."""
    with float64_turn():
        exact = verify.float64_copy(model)
        try:
            yield exact
        finally:
            exact.to("meta")
