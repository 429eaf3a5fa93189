"""A command that is killed while it works. It runs in a fork of this process: to start Python and
load torch would take far longer than the work.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from granite_paged.cli.main import run


def kill_soon(arguments: list[str], written: Path, draw: random.Random) -> None:
    """Start a command and kill it up to 0.1 s after it adds to `written`, unless it ends before."""
    before = _size(written)
    process = multiprocessing.get_context("fork").Process(target=_run_silently, args=(arguments,))
    process.start()
    while process.is_alive() and _size(written) <= before:
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    process.join()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _run_silently(arguments: list[str]) -> None:
    with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink):
        sys.exit(run(arguments))
