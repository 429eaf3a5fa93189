"""Measure the engine on a GPU, and write what the documentation states of it.

Run from the repository, on an idle GPU: `python -m tools.engine_figures` (about four minutes). The
model has the sizes of granite-4.0-h-1b with random weights, and the engine its defaults. These
entries go to the file of the GPU in `golden/engine`::

    start_seconds            an engine in a new process: with empty caches, and with full ones
    burst_seconds            `generate()` of 128 prompts of 1,024 tokens, 130 new ones each
    mixed_tokens_per_second  the same of 512 requests: prompts of 32 to 512 tokens, 128 to 512 new
    shared_seconds           64 prompts that share 4,096 tokens: the first time, and the second
    between_tokens_ms        of streams while prompts of 8,192 tokens arrive: median and 99 %
    decode_step_ms           by rows: of the engine, and of a runner of its sizes alone
    late_captures            steps that were compiled or captured while a request waited

Bursts and mixed requests are measured run after run, with requests that are not streamed, and
then with streamed ones, which limit the steps of waiting prompts. `loads` holds what was asked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from granite_paged.bench.measure import Clock
from granite_paged.bench.serving import serve, summary
from granite_paged.bench.workload import Arrival, Workload, arrivals
from granite_paged.engine.engine import Engine
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidArgument
from granite_paged.geometry import PagedConfig, pages_for
from granite_paged.models import LoadedModel
from granite_paged.runner.runner import Runner
from tools.golden_engine import (
    FOLDER,
    add_entry,
    add_model_options,
    answers,
    device_file,
    exit_status,
    loaded_model,
)


@dataclass(frozen=True, slots=True)
class Loads:
    """What the engine answers.

    Attributes:
        burst, mixed, streams: workloads.
        prompts, shared, own, new: prompts that share a prefix, and tokens of the prefix, of each
            prompt after it, and of each answer.
        runs: of each workload.
        decodes: rows of a decode step; `steps` of them are timed, after `context` tokens.
    """

    burst: Workload
    mixed: Workload
    streams: Workload
    prompts: int
    shared: int
    own: int
    new: int
    runs: int
    decodes: tuple[int, ...]
    context: int
    steps: int


LOADS = Loads(
    burst=Workload(128, prompt_tokens=(1024, 1024), new_tokens=(130, 130)),
    mixed=Workload(512, prompt_tokens=(32, 512), new_tokens=(128, 512)),
    streams=Workload(256, 30, (32, 512), (256, 512), long_every=16, long_tokens=8192),
    prompts=64,
    shared=4096,
    own=32,
    new=16,
    runs=3,
    decodes=(1, 8, 32),
    context=512,
    steps=200,
)
QUICK = Loads(
    burst=Workload(3, prompt_tokens=(20, 20), new_tokens=(3, 3)),
    mixed=Workload(4, prompt_tokens=(4, 30), new_tokens=(2, 6)),
    streams=Workload(4, 1000, (4, 20), (4, 8), long_every=2, long_tokens=64),
    prompts=3,
    shared=32,
    own=4,
    new=2,
    runs=1,
    decodes=(1, 2),
    context=16,
    steps=4,
)
"""Small loads, to try the command."""


def seconds(engine: Engine, coming: Sequence[Arrival], *, streamed: bool) -> float:
    """Return how long `generate()` takes for all requests at once, with no prefix cached."""
    prompts = [arrival.prompt for arrival in coming]
    params = [
        SamplingParams(max_new_tokens=arrival.new_tokens, stop_tokens=(), streamed=streamed)
        for arrival in coming
    ]
    begin = time.perf_counter()
    answers(engine, prompts, params)
    taken = time.perf_counter() - begin
    engine.forget_prefixes()
    return taken


def both_ways(engine: Engine, coming: Sequence[Arrival], runs: int) -> dict[str, list[float]]:
    """Return the seconds of each run. The very first one finds the engine as it started."""
    return {
        name: [seconds(engine, coming, streamed=streamed) for _ in range(runs)]
        for name, streamed in (("not_streamed", False), ("streamed", True))
    }


def shared(engine: Engine, loads: Loads, vocabulary: int) -> list[float]:
    """Return the seconds for prompts with a new prefix, and for others with the same one."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    params = SamplingParams(max_new_tokens=loads.new, stop_tokens=())
    times: list[list[float]] = [[], []]
    for _ in range(loads.runs):
        prefix = tokens(loads.shared)
        for taken in times:
            prompts = [prefix + tokens(loads.own) for _ in range(loads.prompts)]
            begin = time.perf_counter()
            answers(engine, prompts, params)
            taken.append(time.perf_counter() - begin)
    engine.forget_prefixes()
    return [statistics.median(taken) for taken in times]


def engine_steps(engine: Engine, vocabulary: int, loads: Loads) -> dict[int, float]:
    """Return the milliseconds of a decode step by the engine, by rows."""
    found, prompt = {}, (loads.context, loads.context)
    for rows in loads.decodes:
        taken = []
        for new in (1, loads.steps + 1):
            load = Workload(rows, prompt_tokens=prompt, new_tokens=(new, new))
            coming = arrivals(load, vocabulary, seed=new)
            taken.append(seconds(engine, coming, streamed=False))
        found[rows] = 1e3 * (taken[1] - taken[0]) / loads.steps
    return found


def runner_steps(runner: Runner, loads: Loads) -> dict[int, float]:
    """Return the milliseconds of the same steps by a runner of the engine's sizes, by rows."""
    found, clock = {}, Clock(runner.device)
    each = pages_for(loads.context + loads.steps, runner.config.page_size)
    for rows in loads.decodes:
        which = list(range(1, rows + 1))
        runner.clear_rows(which)
        for row in which:
            runner.set_pages(row, range(1 + (row - 1) * each, 1 + row * each))
        runner.decode(which, [loads.context] * rows)  # the first one captures
        clock.wait()
        begin = time.perf_counter()
        for position in range(loads.context, loads.context + loads.steps):
            runner.decode(which, [position] * rows)
        clock.wait()
        found[rows] = 1e3 * (time.perf_counter() - begin) / loads.steps
    return found


def measured(loaded: LoadedModel, config: PagedConfig, loads: Loads) -> dict[str, Any]:
    """Measure everything but the start from empty caches, and print each part."""
    vocabulary, found = loaded.model.config.vocab_size, dict[str, Any]()

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(name, json.dumps(value), flush=True)

    with Engine(loaded.model, config) as engine:
        note("rows_at_once", engine.runner.rows)
        burst, mixed = (arrivals(load, vocabulary, seed=0) for load in (loads.burst, loads.mixed))
        times = both_ways(engine, burst, loads.runs)
        note("burst_seconds", {way: [round(t, 3) for t in each] for way, each in times.items()})
        asked = sum(arrival.new_tokens for arrival in mixed)
        times = both_ways(engine, mixed, loads.runs)
        rates = {way: [round(asked / t) for t in each] for way, each in times.items()}
        note("mixed_tokens_per_second", rates)
        note("shared_seconds", [round(each, 3) for each in shared(engine, loads, vocabulary)])
        streams = summary(serve(engine, arrivals(loads.streams, vocabulary, seed=0)))
        note("between_tokens_ms", [round(each, 2) for each in streams.between_tokens_ms])
        note("late_captures", engine.stats().late_captures)
        by_engine = engine_steps(engine, vocabulary, loads)
    with contextlib.closing(Runner.for_model(loaded.model, config)) as runner:
        by_runner = runner_steps(runner, loads)
    both = {"engine": by_engine, "runner": by_runner}
    note(
        "decode_step_ms",
        {
            str(rows): {who: round(ms[rows], 3) for who, ms in both.items()}
            for rows in loads.decodes
        },
    )
    return found


def start(options: argparse.Namespace) -> float:
    """Return how long an engine takes to start, apart from imports and the model."""
    loaded = loaded_model(options)
    begin = time.perf_counter()
    with Engine(loaded.model, engine_config(options)):
        return time.perf_counter() - begin


def start_in_new_process(caches: str) -> float:
    """Return what `start` measures in a process with these caches.

    Raises SystemExit with the status of a process that failed; it has said why.
    """
    folders = {name: f"{caches}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    command = [sys.executable, "-m", "tools.engine_figures", *sys.argv[1:], "--only-start"]
    done = subprocess.run(
        command, check=False, env={**os.environ, **folders}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return round(float(done.stdout.split()[-1]), 1)


def engine_config(options: argparse.Namespace) -> PagedConfig:
    """Return the engine's defaults; small sizes for small loads."""
    if not options.quick:
        return PagedConfig()
    return PagedConfig(page_size=16, max_sequences=4, max_tokens=1024)


def main() -> None:
    """Measure, and write the entries into the file of this device. Raises GranitePagedError."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add_model_options(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {FOLDER}")
    parser.add_argument(
        "--quick", action="store_true", help="small loads, to try the command; needs --out"
    )
    parser.add_argument("--only-start", action="store_true", help="print the seconds of a start")
    options = parser.parse_args()
    if options.only_start:
        print(start(options))
        return
    if options.quick and options.out is None:
        raise InvalidArgument("--quick needs --out FOLDER: its loads are not those of the record")
    file = device_file(options.out or FOLDER, options.device)
    with tempfile.TemporaryDirectory() as caches:
        empty, *full = (start_in_new_process(caches) for _ in range(3))
    starts = {"empty_caches": empty, "full_caches": full}
    print("start_seconds", json.dumps(starts), flush=True)
    loaded, loads = loaded_model(options), QUICK if options.quick else LOADS
    found = measured(loaded, engine_config(options), loads)
    entry = {"loads": asdict(loads), "start_seconds": starts, **found}
    add_entry(file, loaded, "engine_figures", entry)
    print(f"written: {file}")


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
