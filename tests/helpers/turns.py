"""Turns of tests that share a GPU: only one process at a time takes more than 10 GB.

A float64 copy of granite-4.0-h-1b takes 12 GB, and 256 rows of it in exact mode 20 GB.
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
def large_turn() -> Iterator[None]:
    """Wait until no other process has a turn, and keep others waiting until the block ends."""
    with (Path(tempfile.gettempdir()) / "granite_paged.large.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@contextmanager
def float64_copy(model: Any) -> Iterator[Any]:
    """Give a float64 copy for the block. Its memory is free afterwards, even if you keep it."""
    with large_turn():
        exact = verify.float64_copy(model)
        try:
            yield exact
        finally:
            exact.to("meta")
