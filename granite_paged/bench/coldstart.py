"""Time from a loaded model to its first token, and to every shape compiled and captured.

Each measurement runs in two new processes: the first starts with empty compile caches, the second
with the caches that the first left. Loading the model is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from granite_paged.bench.cases import Shape
from granite_paged.bench.modes import Sequences, config_for, make_runner, prefill_calls, token_ids
from granite_paged.errors import Unsupported
from granite_paged.geometry import PagedConfig

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

STAGES = {"first_token": "first token", "every_bucket": "every bucket"}


def in_this_process(model: Any, config: PagedConfig, shape: Shape, seed: int) -> dict[str, float]:
    """Return the seconds from this call to each stage of `STAGES`."""
    prompts = token_ids(model, shape.batch, shape.context, seed).tolist()
    begin = time.perf_counter()
    runner = make_runner(model, config_for(config, shape))
    sequences = Sequences(runner, shape.batch)
    sequences.open(shape.context)
    for chunks in prefill_calls(runner, prompts):
        logits = runner.prefill(chunks)
    logits.argmax(dim=-1).tolist()  # waits for the device
    first = time.perf_counter() - begin
    runner.warm_up()
    return {"first_token": first, "every_bucket": time.perf_counter() - begin}


def in_fresh_processes(arguments: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Run `granite-paged coldstart` with these arguments on empty, then on warm caches.

    Yields:
        The stage with the state of the caches, and its seconds.

    Raises:
        Unsupported: the process failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory(prefix="granite-paged-") as folder:
        caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
        for state in ("empty cache", "warm cache"):
            for stage, seconds in _fresh(arguments, caches).items():
                yield f"{STAGES[stage]}, {state}", seconds


def _fresh(arguments: Sequence[str], caches: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "granite_paged", "coldstart", *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **caches}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unsupported(f"the fresh process failed: {last}")
    stages: dict[str, float] = json.loads(done.stdout)
    return stages
